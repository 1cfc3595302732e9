//! The task of one connection: bytes between a socket and its session. All decisions are the session's.
//!
//! An idle connection owns no buffer: it reads into a buffer of its worker thread and keeps only the beginning of a packet whose rest has
//! not come yet.

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::{Sink, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Sleep, sleep, timeout, timeout_at};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::error::{Error as WebSocketError, ProtocolError};

use crate::hub::{Connection, Hub};
use crate::listen::{Gateway, HalfOpen};
use crate::mqtt::{self, DecodeError, OutBuffer, Packet, Reason, Version};
use crate::session::{ConnectRefused, Effects, End, Session};

/// How long the last bytes of an ended connection may take.
const LINGER_MAX: Duration = Duration::from_secs(2);
const READ_BYTES: usize = 16 << 10;
/// Packets taken from one connection before others have their turn.
const PACKETS_PER_TURN: usize = 64;

thread_local! {
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// A client's stream of bytes.
pub trait Socket: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Gives the writing end to others than the connection's task, if bytes go to the socket as they are. Once.
    fn share(&mut self) -> Option<OwnedWriteHalf> {
        None
    }
}

/// Takes a CONNECT from a fresh stream and hands the connection to a task of its own.
pub async fn handshake<S: Socket>(gateway: Arc<Gateway>, mut stream: S, half_open: HalfOpen) {
    let size_max = gateway.hub.shared.limits.packet_size_max as usize;
    let mut input = Vec::new();
    let decoded = timeout_at(half_open.deadline, read_connect(&mut stream, &mut input, size_max)).await;
    let metrics = &gateway.hub.shared.metrics;
    let mut out = OutBuffer::default();
    match decoded {
        Err(_) => {
            metrics.slow_handshakes.inc();
            return;
        }
        Ok(Err(None)) => return,
        // MQTT 5 clients are told what is wrong with their bytes; to others an unknown language is spoken anyway.
        Ok(Err(Some(error))) => {
            metrics.refused(error.reason);
            let version = if error.reason == Reason::UnsupportedVersion { Version::V311 } else { Version::V5 };
            mqtt::connack_refused(&mut out, version, error.reason, error.what);
        }
        Ok(Ok(())) => match mqtt::decode(None, &input, size_max) {
            Ok(Some((Packet::Connect(connect), used))) => match open(&gateway, &connect, &mut stream) {
                Ok(connection) => {
                    drop(half_open);
                    // Without the space of the CONNECT, which would stay as long as the connection is idle.
                    let rest = input.split_off(used);
                    let driver = Driver::new(gateway.clone(), connection, stream, rest);
                    tokio::spawn(driver);
                    return;
                }
                Err(refused) => {
                    metrics.refused(refused.reason);
                    if matches!(
                        refused.reason,
                        Reason::ConnectionRateExceeded | Reason::QuotaExceeded | Reason::ServerUnavailable
                    ) {
                        metrics.connects_refused.inc();
                    }
                    mqtt::connack_refused(&mut out, connect.version, refused.reason, &refused.text);
                }
            },
            _ => return,
        },
    }
    // Nothing depends on whether the refusal arrives.
    let _ = timeout(LINGER_MAX, async {
        stream.write_all(&out.take_bytes()).await?;
        stream.shutdown().await
    })
    .await;
}

/// Reads until the first packet is complete.
async fn read_connect<S>(stream: &mut S, input: &mut Vec<u8>, size_max: usize) -> Result<(), Option<DecodeError>>
where
    S: AsyncRead + Unpin,
{
    loop {
        if mqtt::decode(None, input, size_max).map_err(Some)?.is_some() {
            return Ok(());
        }
        match stream.read_buf(input).await {
            Ok(1..) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let what = "neither TLS nor binary WebSocket frames";
                return Err(Some(DecodeError { reason: Reason::Malformed, what }));
            }
            Ok(0) | Err(_) => return Err(None),
        }
    }
}

fn open(
    gateway: &Arc<Gateway>,
    connect: &mqtt::Connect<'_>,
    stream: &mut impl Socket,
) -> Result<Arc<Connection>, ConnectRefused> {
    let hub = &gateway.hub;
    let refuse = |reason, text: &str| Err(ConnectRefused { reason, text: text.to_owned() });
    if !gateway.connect_rate.take(hub.clock.now_ms()) {
        return refuse(Reason::ConnectionRateExceeded, "too many connects: wait some seconds, with jitter");
    }
    if hub.connections() >= gateway.limits.max_connections {
        return refuse(Reason::QuotaExceeded, "this gateway is full: connect again");
    }
    let shards = hub.shards();
    if shards == 0 {
        return refuse(Reason::ServerUnavailable, "the gateway has no shard map yet: connect again");
    }
    let now_ms = hub.clock.now_ms();
    let mut effects = Effects::default();
    let authenticate = |user: &str, password: Option<&[u8]>| gateway.auth.connect(user, password, now_ms);
    let session = Session::open(&hub.shared, shards, now_ms, hub.connection_id(), connect, authenticate, &mut effects)?;
    Ok(hub.add(session, effects, stream.share()))
}

/// Drives one connection until it is closed.
pub struct Driver<S> {
    gateway: Arc<Gateway>,
    connection: Arc<Connection>,
    stream: S,
    version: Version,
    /// The beginning of a packet, or packets that the session does not want yet.
    input: Vec<u8>,
    /// What the socket has not taken yet; an idle connection keeps no space for it.
    writing: Option<Box<OutBuffer>>,
    flushed: bool,
    /// Packets that may be taken now; refilled by time.
    tokens: f32,
    refilled_ms: u64,
    /// A pause for rate, or the deadline of a closing connection.
    sleep: Option<Pin<Box<Sleep>>>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// The session ended: its last bytes go out.
    Closing,
    /// All is written; what still comes in is dropped, so that the client reads our last bytes before it sees the close.
    Draining,
    Closed,
}

/// What came of writing.
struct Wrote {
    /// Nothing is left.
    all: bool,
    /// The session takes packets.
    wants_input: bool,
}

impl<S> Driver<S> {
    fn new(gateway: Arc<Gateway>, connection: Arc<Connection>, stream: S, input: Vec<u8>) -> Self {
        let version = gateway.hub.with_quietly(&connection, |session, _, _| session.version()).0;
        let tokens = gateway.limits.message_rate as f32;
        let refilled_ms = gateway.hub.clock.now_ms();
        let (writing, state) = (None, State::Open);
        Self {
            gateway,
            connection,
            stream,
            version,
            input,
            writing,
            flushed: true,
            tokens,
            refilled_ms,
            sleep: None,
            state,
        }
    }
}

impl<S> Drop for Driver<S> {
    fn drop(&mut self) {
        let hub = &self.gateway.hub;
        hub.with_quietly(&self.connection, |session, _, effects| session.end(End::Broken, effects));
        hub.remove(&self.connection);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Driver<S> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.connection.waker.register(cx.waker());
        if let Err(error) = this.poll_open(cx) {
            if error.kind() == io::ErrorKind::InvalidData {
                this.gateway.hub.shared.metrics.refused(Reason::Malformed);
            }
            this.state = State::Closed;
        }
        if this.state != State::Open && this.poll_closing(cx).is_ready() {
            this.state = State::Closed;
        }
        if this.state == State::Closed { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Driver<S> {
    /// Writes and reads while the connection is open; an error means that the socket is gone.
    fn poll_open(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.state == State::Open {
            let Wrote { wants_input, .. } = self.poll_write(cx)?;
            if self.state != State::Open || self.paused(cx) {
                break;
            }
            if !self.input.is_empty() {
                let input = std::mem::take(&mut self.input);
                let used = self.take_packets(&input);
                self.input = behind(input, used);
                // There may be something to write now, or a pause to poll.
                if used > 0 || self.sleep.is_some() {
                    continue;
                }
            }
            if !(wants_input && self.poll_read(cx)?) {
                break;
            }
        }
        Ok(())
    }

    /// Writes all that waits; marks the connection as closing when the session ended.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> io::Result<Wrote> {
        loop {
            if let Some(mut writing) = self.writing.take()
                && !self.poll_write_out(cx, &mut writing)?
            {
                self.writing = Some(writing);
                return Ok(self.blocked());
            }
            let hub = &self.gateway.hub;
            let ((mut out, wants_input, is_ended), _) =
                hub.with_quietly(&self.connection, |session, now_ms, effects| {
                    let out = session.take_output();
                    if !out.is_empty() {
                        session.on_written(now_ms, effects);
                    }
                    self.connection.pause(!session.wants_input());
                    (out, session.wants_input(), session.is_ended())
                });
            if !out.is_empty() {
                if !self.poll_write_out(cx, &mut out)? {
                    self.writing = Some(Box::new(out));
                    return Ok(self.blocked());
                }
                continue;
            }
            if !self.flushed {
                match Pin::new(&mut self.stream).poll_flush(cx)? {
                    Poll::Ready(()) => self.flushed = true,
                    Poll::Pending => return Ok(Wrote { all: false, wants_input }),
                }
            }
            if is_ended {
                self.begin_closing();
            }
            return Ok(Wrote { all: true, wants_input });
        }
    }

    /// Writes `out` as far as the socket takes it; says whether that is all.
    fn poll_write_out(&mut self, cx: &mut Context<'_>, out: &mut OutBuffer) -> io::Result<bool> {
        let stream = &mut self.stream;
        while !out.is_empty() {
            let mut slices = [IoSlice::new(&[]); OutBuffer::SLICES];
            let written = match out.slices(&mut slices) {
                // The kernel takes one piece with less ado.
                1 => Pin::new(&mut *stream).poll_write(cx, &slices[0]),
                count => Pin::new(&mut *stream).poll_write_vectored(cx, &slices[..count]),
            };
            match written? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => {
                    self.flushed = false;
                    out.advance(written);
                }
                Poll::Pending => return Ok(false),
            }
        }
        Ok(true)
    }

    /// The socket takes nothing more for now; the session goes on.
    fn blocked(&mut self) -> Wrote {
        let look = |session: &mut Session, _, _: &mut Effects| {
            self.connection.pause(!session.wants_input());
            (session.wants_input(), session.is_ended())
        };
        let ((wants_input, is_ended), _) = self.gateway.hub.with_quietly(&self.connection, look);
        if is_ended {
            self.begin_closing();
        }
        Wrote { all: false, wants_input }
    }

    fn begin_closing(&mut self) {
        if self.state == State::Open {
            self.state = State::Closing;
            self.sleep = Some(Box::pin(sleep(LINGER_MAX)));
        }
    }

    /// Reads once. Says whether something came.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        READ_BUFFER.with_borrow_mut(|buffer| {
            let mut buffer = ReadBuf::new(buffer);
            match Pin::new(&mut self.stream).poll_read(cx, &mut buffer)? {
                Poll::Pending => Ok(false),
                Poll::Ready(()) if buffer.filled().is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
                Poll::Ready(()) => {
                    if self.input.is_empty() {
                        let used = self.take_packets(buffer.filled());
                        self.input = buffer.filled()[used..].to_vec();
                    } else {
                        self.input.extend_from_slice(buffer.filled());
                    }
                    Ok(true)
                }
            }
        })
    }

    /// Gives the session the packets that are complete and says how many bytes they were.
    fn take_packets(&mut self, input: &[u8]) -> usize {
        let hub = &self.gateway.hub;
        let rate = self.gateway.limits.message_rate as f32;
        let size_max = hub.shared.limits.packet_size_max as usize;
        let now_ms = hub.clock.now_ms();
        self.tokens = (self.tokens + (now_ms - self.refilled_ms) as f32 * rate / 1_000.0).min(rate);
        self.refilled_ms = now_ms;
        let mut used = 0;
        let mut throttled = false;
        let (version, tokens) = (self.version, &mut self.tokens);
        loop {
            let before = used;
            hub.with_quietly(&self.connection, |session, now_ms, effects| {
                for _ in 0..PACKETS_PER_TURN {
                    if !session.wants_input() {
                        return;
                    }
                    match mqtt::decode(Some(version), &input[used..], size_max) {
                        Ok(None) => return,
                        Ok(Some(_)) if *tokens < 1.0 => {
                            throttled = true;
                            return;
                        }
                        Ok(Some((packet, size))) => {
                            *tokens -= 1.0;
                            used += size;
                            session.on_packet(now_ms, packet, effects);
                        }
                        Err(error) => return session.on_bad_input(error, effects),
                    }
                }
            });
            if used == before || used == input.len() || throttled {
                break;
            }
        }
        if throttled {
            hub.shared.metrics.throttled.inc();
            self.sleep = Some(Box::pin(sleep(Duration::from_millis(10).max(Duration::from_secs_f32(1.0 / rate)))));
        }
        used
    }

    /// Whether the client is paused for sending too fast.
    fn paused(&mut self, cx: &mut Context<'_>) -> bool {
        let pending = self.sleep.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_pending());
        if !pending {
            self.sleep = None;
        }
        pending
    }

    fn poll_closing(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.sleep.as_mut().is_none_or(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(());
        }
        if self.state == State::Closing {
            match self.poll_write(cx) {
                Err(_) => return Poll::Ready(()),
                Ok(Wrote { all: false, .. }) => return Poll::Pending,
                Ok(Wrote { all: true, .. }) => {}
            }
            match Pin::new(&mut self.stream).poll_shutdown(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Ready(Ok(())) => self.state = State::Draining,
            }
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
            loop {
                let mut buffer = ReadBuf::new(buffer);
                match Pin::new(&mut self.stream).poll_read(cx, &mut buffer) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                    Poll::Ready(_) => return Poll::Ready(()),
                }
            }
        })
    }
}

/// What is left of `input`, without the space of what was used. The beginning of a large packet stays where it is: it grows with each read.
fn behind(input: Vec<u8>, used: usize) -> Vec<u8> {
    if used == 0 { input } else { input[used..].to_vec() }
}

/// MQTT over TCP and nothing else.
pub struct Tcp {
    stream: OwnedReadHalf,
    shared: Option<OwnedWriteHalf>,
}

impl Tcp {
    /// Over an accepted connection.
    pub fn new(stream: TcpStream) -> Self {
        let (stream, shared) = stream.into_split();
        Self { stream, shared: Some(shared) }
    }

    /// Writes as soon as the socket takes something.
    fn poll_with<R>(&self, cx: &mut Context<'_>, write: impl Fn(&TcpStream) -> io::Result<R>) -> Poll<io::Result<R>> {
        let stream: &TcpStream = self.stream.as_ref();
        loop {
            futures::ready!(stream.poll_write_ready(cx))?;
            match write(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }
}

impl Socket for Tcp {
    fn share(&mut self) -> Option<OwnedWriteHalf> {
        self.shared.take()
    }
}

impl AsyncRead for Tcp {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Tcp {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |stream| stream.try_write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream: &TcpStream = self.stream.as_ref();
        Poll::Ready(socket2::SockRef::from(stream).shutdown(std::net::Shutdown::Write))
    }
}

impl Socket for tokio_rustls::server::TlsStream<TcpStream> {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Socket for WebSocket<S> {}

/// The largest frame that is sent, bytes: far below what a WebSocket may have waiting for its socket.
const FRAME_BYTES_MAX: usize = 64 << 10;

/// MQTT over WebSocket: a stream of bytes made of binary frames, whose borders mean nothing.
pub struct WebSocket<S> {
    frames: WebSocketStream<S>,
    rest: Bytes,
}

impl<S> WebSocket<S> {
    /// Over an accepted WebSocket.
    pub fn new(frames: WebSocketStream<S>) -> Self {
        Self { frames, rest: Bytes::new() }
    }
}

/// [`io::ErrorKind::InvalidData`] is what the client did wrong.
fn to_io(error: WebSocketError) -> io::Error {
    match error {
        WebSocketError::Io(error) => error,
        WebSocketError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => io::Error::other(error),
        WebSocketError::Protocol(_) | WebSocketError::Capacity(_) | WebSocketError::Utf8(_) => {
            io::Error::new(io::ErrorKind::InvalidData, error)
        }
        error => io::Error::other(error),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for WebSocket<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match futures::ready!(self.frames.poll_next_unpin(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Ok(Message::Text(_))) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "MQTT comes in binary frames")));
                }
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(to_io(error))),
            }
        }
        let length = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WebSocket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        futures::ready!(Pin::new(&mut self.frames).poll_ready(cx)).map_err(to_io)?;
        let bytes = &bytes[..bytes.len().min(FRAME_BYTES_MAX)];
        Pin::new(&mut self.frames).start_send(Message::Binary(Bytes::copy_from_slice(bytes))).map_err(to_io)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.frames).poll_flush(cx).map_err(to_io)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.frames).poll_close(cx).map_err(to_io)
    }
}

/// Ends a connection for a reason of the server.
pub fn end(hub: &Arc<Hub>, connection: &Arc<Connection>, reason: Reason, text: &'static str) {
    hub.with(connection, |session, _, effects| session.end(End::Server(reason, text), effects));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_a_packet_is_not_copied_with_each_read() {
        let input = vec![7; 1_000];
        let at = input.as_ptr();
        let input = behind(input, 0);
        assert_eq!((input.as_ptr(), input.len()), (at, 1_000));
        let rest = behind(input, 990);
        assert_eq!((&rest[..], rest.capacity()), (&[7; 10][..], 10));
    }

    /// What an idle connection costs besides the kernel's socket and tokio's registration of it; the whole process is held to 1.5 KiB per
    /// connection. Both are just below sizes that the allocator has: 640 B with the reference counts, 256 B with the task's own 96.
    #[test]
    fn the_state_of_a_connection_is_small() {
        let (connection, task) = (size_of::<Connection>(), size_of::<Driver<Tcp>>());
        assert!(connection <= 640 - 16, "the state that others reach is {connection} bytes");
        assert!(task <= 256 - 96, "the task's state is {task} bytes");
    }
}
