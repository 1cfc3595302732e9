//! The audience of a live room: thousands of viewers that cost little, so that a server's limit is found and not the client's.
//!
//! A thread sweeps over the sockets of its viewers. They are registered with no epoll, so a sender pays for no wake-up of theirs, as it
//! would not if they were on another machine. Every viewer's bytes are counted; all messages of a room have one length, so each lost one
//! shows. Of an *attentive* viewer every message is looked at: its number and how late it is. What comes for the others is thrown away in
//! the kernel, uncopied.
//!
//! A sweep sees a message some time after it arrived. The same socket was seen empty earlier, so the arrival lies between: both bounds of
//! the delay are recorded, and what is between them is the reader's own lag.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use rustix::net::{RecvFlags, recv};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::history::{micros, new_latency_histogram};
use crate::wire::{self, Publish, Version};

/// Bytes of a payload that say which message it is: two decimal numbers of sixteen digits, a blank behind each.
pub const HEAD_BYTES: usize = 34;
/// Bytes taken from a socket at a time.
const READ_BYTES: usize = 256 << 10;
/// The longest packet that an attentive viewer takes for a message.
const PACKET_BYTES_MAX: usize = 64 << 10;
/// A server's answer to CONNECT and SUBSCRIBE is waited for this long.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Why somebody is not in a room.
#[derive(Debug, Error)]
pub enum EnterError {
    /// TCP said no, or the connection broke.
    #[error("connection to {server}: {source}")]
    Io {
        /// The server's address.
        server: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// CONNECT or SUBSCRIBE was refused.
    #[error("{server} refuses {what} with code {code:#04x}; look at its limits and at who may do this")]
    Refused {
        /// The server's address.
        server: SocketAddr,
        /// Which packet.
        what: &'static str,
        /// Its return code.
        code: u8,
    },
    /// No answer in time.
    #[error("{server} does not answer {what} within {} s", ANSWER_WITHIN.as_secs())]
    Silent {
        /// The server's address.
        server: SocketAddr,
        /// Which packet.
        what: &'static str,
    },
}

/// Logs in with MQTT 3.1.1 (so that every server sends the same bytes), a clean session and no keep-alive, and subscribes a filter with
/// QoS 0 if there is one. The stream does not block.
///
/// # Errors
/// [`EnterError`].
pub async fn enter(
    server: SocketAddr,
    user: &str,
    password: Option<&str>,
    filter: Option<&str>,
) -> Result<TcpStream, EnterError> {
    let broken = |source| EnterError::Io { server, source };
    let mut stream = tokio::net::TcpStream::connect(server).await.map_err(broken)?;
    stream.set_nodelay(true).map_err(broken)?;
    let mut request = BytesMut::new();
    let connect = wire::Connect {
        user,
        password,
        client_id: user,
        clean_start: true,
        keep_alive_seconds: 0,
        session_expiry_seconds: 0,
        receive_maximum: None,
    };
    wire::encode_connect(Version::V311, &connect, &mut request);
    let [.., code] = ask::<4>(&mut stream, server, "CONNECT", &request).await?;
    if code != 0 {
        return Err(EnterError::Refused { server, what: "CONNECT", code });
    }
    if let Some(filter) = filter {
        subscribe(&mut stream, server, filter).await?;
    }
    stream.into_std().map_err(broken)
}

/// Subscribes a filter with QoS 0, for a client that gets nothing else now.
///
/// # Errors
/// [`EnterError`].
pub async fn subscribe(stream: &mut tokio::net::TcpStream, server: SocketAddr, filter: &str) -> Result<(), EnterError> {
    let mut request = BytesMut::new();
    wire::encode_subscribe(Version::V311, 1, filter, 0, &mut request);
    let [.., code] = ask::<5>(stream, server, "SUBSCRIBE", &request).await?;
    if code < 0x80 { Ok(()) } else { Err(EnterError::Refused { server, what: "SUBSCRIBE", code }) }
}

/// Sends a packet and reads the answer, whose length is known.
async fn ask<const LENGTH: usize>(
    stream: &mut tokio::net::TcpStream,
    server: SocketAddr,
    what: &'static str,
    request: &[u8],
) -> Result<[u8; LENGTH], EnterError> {
    let exchange = async {
        let mut answer = [0; LENGTH];
        stream.write_all(request).await?;
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    };
    let answered = timeout(ANSWER_WITHIN, exchange).await.map_err(|_| EnterError::Silent { server, what })?;
    answered.map_err(|source| EnterError::Io { server, source })
}

/// The time that messages are stamped with.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// Microseconds since its start.
    pub fn now_us(self) -> u64 {
        micros(self.0.elapsed())
    }

    fn at(self, us: u64) -> Instant {
        self.0 + Duration::from_micros(us)
    }
}

/// A payload of that length (at least [`HEAD_BYTES`]) that says its number and when it was due.
pub fn payload(number: u64, scheduled_us: u64, bytes: usize) -> Vec<u8> {
    let mut payload = format!("{number:016} {scheduled_us:016} ").into_bytes();
    payload.resize(bytes.max(HEAD_BYTES), b'.');
    payload
}

/// Number and due time of a payload.
fn head_of(payload: &[u8]) -> Option<(u64, u64)> {
    let digits = |bytes: Option<&[u8]>| std::str::from_utf8(bytes?).ok()?.parse::<u64>().ok();
    Some((digits(payload.get(..16))?, digits(payload.get(17..33))?))
}

/// The payload of the first packet, and the packet's length; `None` if more bytes are needed or it is no PUBLISH with QoS 0.
fn first_publish(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let (mut length, mut at) = (0_usize, 1);
    loop {
        let byte = *bytes.get(at)?;
        length |= usize::from(byte & 0x7F) << (7 * (at - 1));
        at += 1;
        if byte < 0x80 {
            break;
        }
        if at > 4 {
            return None;
        }
    }
    let body = bytes.get(at..at + length)?;
    let (high, low) = (*body.first()?, *body.get(1)?);
    let payload = body.get(2 + usize::from(u16::from_be_bytes([high, low]))..)?;
    Some((payload, at + length))
}

/// How a viewer reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Each message is looked at.
    Full,
    /// Only the bytes are counted.
    Counts,
    /// Each message is looked at, but a slow link brings only so many bytes in a sweep.
    Slow {
        /// So many.
        bytes_per_sweep: usize,
    },
}

/// What came to one viewer. Numbers are only known of one who looks at them.
#[derive(Debug, Default)]
pub struct Seen {
    /// Bytes taken from the socket, and in how many pieces: nearly what the server wrote at a time for who looks often.
    pub bytes: AtomicU64,
    /// See there.
    pub pieces: AtomicU64,
    /// Messages looked at.
    pub messages: AtomicU64,
    /// Numbers that were jumped over.
    pub lost: AtomicU64,
    /// Messages that came again, or after a later one.
    pub reordered: AtomicU64,
    /// The highest number; before the first message the one after which he entered.
    pub last: AtomicU64,
    is_closed: AtomicBool,
    leaves: AtomicBool,
}

impl Seen {
    /// One of its counters.
    pub fn of(&self, counter: impl Fn(&Self) -> &AtomicU64) -> u64 {
        counter(self).load(Ordering::Relaxed)
    }

    /// The connection ended, or what came is not a room's.
    pub fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }

    fn look_at(&self, number: u64) {
        let last = self.last.load(Ordering::Relaxed);
        let is_first = self.messages.fetch_add(1, Ordering::Relaxed) == 0;
        if number > last {
            self.lost.fetch_add(number - last - 1, Ordering::Relaxed);
        } else if !is_first {
            self.reordered.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // What was on the way when he entered may come, or not.
        self.last.store(number, Ordering::Relaxed);
    }
}

/// Somebody in the room, as his thread has him.
struct Viewer {
    stream: Arc<TcpStream>,
    attention: Attention,
    seen: Arc<Seen>,
    /// The beginning of a packet.
    rest: Vec<u8>,
    /// When the socket was last known to be empty.
    empty_us: u64,
}

/// Somebody in the room, for the others. He leaves when this is dropped.
#[derive(Debug)]
pub struct Seat {
    stream: Arc<TcpStream>,
    /// What came to him.
    pub seen: Arc<Seen>,
}

impl Seat {
    /// Writes a whole packet. Says whether the socket took it; a part of a packet ends the connection.
    pub fn write(&self, packet: &[u8]) -> bool {
        match (&*self.stream).write(packet) {
            Ok(written) if written == packet.len() => true,
            Ok(_) => {
                self.seen.leaves.store(true, Ordering::Relaxed);
                false
            }
            Err(_) => false,
        }
    }

    /// Says good-bye before he leaves.
    pub fn leave(self) {
        let mut packet = BytesMut::new();
        wire::encode_disconnect(&mut packet);
        self.write(&packet);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seen.leaves.store(true, Ordering::Relaxed);
    }
}

/// How late messages were, microseconds: at least and at most.
#[derive(Debug, Clone)]
pub struct Delays {
    /// When the socket was still empty.
    pub least: Histogram<u64>,
    /// When the message was read.
    pub most: Histogram<u64>,
}

impl Default for Delays {
    fn default() -> Self {
        Self { least: new_latency_histogram(), most: new_latency_histogram() }
    }
}

#[derive(Default)]
struct Shared {
    added: Mutex<Vec<Viewer>>,
    delays: Mutex<Delays>,
    longest_sweep_us: AtomicU64,
    is_over: AtomicBool,
}

/// A thread that reads for its viewers; it ends when this is dropped.
pub struct Reader {
    clock: Clock,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    /// One that sweeps so often.
    pub fn start(clock: Clock, pause: Duration) -> Self {
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || read_for_all(clock, pause, &theirs));
        Self { clock, shared, thread: Some(thread) }
    }

    /// Takes somebody in, who entered after the message with this number.
    pub fn seat(&self, stream: TcpStream, attention: Attention, entered_after: u64) -> Seat {
        let (stream, seen) = (Arc::new(stream), Arc::<Seen>::default());
        seen.last.store(entered_after, Ordering::Relaxed);
        let empty_us = self.clock.now_us();
        let viewer = Viewer { stream: stream.clone(), attention, seen: seen.clone(), rest: Vec::new(), empty_us };
        self.shared.added.lock().push(viewer);
        Seat { stream, seen }
    }

    /// How late messages were since the last time that this was asked.
    pub fn take_delays(&self) -> Delays {
        std::mem::take(&mut self.shared.delays.lock())
    }

    /// The longest time between two looks at a socket since this was asked last.
    pub fn take_longest_sweep(&self) -> Duration {
        Duration::from_micros(self.shared.longest_sweep_us.swap(0, Ordering::Relaxed))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn read_for_all(clock: Clock, pause: Duration, shared: &Shared) {
    let mut viewers: Vec<Viewer> = Vec::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut began = clock.now_us();
    while !shared.is_over.load(Ordering::Relaxed) {
        viewers.append(&mut shared.added.lock());
        viewers.retain_mut(|viewer| {
            let stays = !viewer.seen.leaves.load(Ordering::Relaxed) && viewer.read(clock, &mut buffer, shared).is_ok();
            if !stays {
                viewer.seen.is_closed.store(true, Ordering::Relaxed);
            }
            stays
        });
        std::thread::sleep((clock.at(began) + pause).saturating_duration_since(Instant::now()));
        let now = clock.now_us();
        shared.longest_sweep_us.fetch_max(now - began, Ordering::Relaxed);
        began = now;
    }
}

impl Viewer {
    /// Takes what is there. An error means that nothing more comes.
    fn read(&mut self, clock: Clock, buffer: &mut [u8], shared: &Shared) -> io::Result<()> {
        let most = match self.attention {
            Attention::Slow { bytes_per_sweep } => bytes_per_sweep.min(buffer.len()),
            Attention::Full | Attention::Counts => buffer.len(),
        };
        loop {
            let asked_us = clock.now_us();
            let taken = match self.attention {
                Attention::Counts => recv(&*self.stream, &mut buffer[..], RecvFlags::TRUNC | RecvFlags::DONTWAIT)
                    .map(|(_, taken)| taken)
                    .map_err(io::Error::from),
                Attention::Full | Attention::Slow { .. } => (&*self.stream).read(&mut buffer[..most]),
            };
            let taken = match taken {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(taken) => taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.empty_us = asked_us;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.seen.bytes.fetch_add(taken as u64, Ordering::Relaxed);
            self.seen.pieces.fetch_add(1, Ordering::Relaxed);
            if self.attention != Attention::Counts {
                self.look_at(&buffer[..taken], clock.now_us(), shared)?;
            }
            if matches!(self.attention, Attention::Slow { .. }) {
                return Ok(());
            }
            if taken < most {
                self.empty_us = asked_us;
                return Ok(());
            }
        }
    }

    fn look_at(&mut self, bytes: &[u8], now_us: u64, shared: &Shared) -> io::Result<()> {
        let joined;
        let mut bytes = if self.rest.is_empty() {
            bytes
        } else {
            joined = [std::mem::take(&mut self.rest).as_slice(), bytes].concat();
            &joined
        };
        let mut delays = (self.attention == Attention::Full).then(|| shared.delays.lock());
        while let Some((payload, length)) = first_publish(bytes) {
            // Only messages have this form; a room's statistics and notices do not.
            if let Some((number, scheduled_us)) = head_of(payload) {
                self.seen.look_at(number);
                if let Some(delays) = &mut delays {
                    delays.most.saturating_record(now_us.saturating_sub(scheduled_us));
                    delays.least.saturating_record(self.empty_us.saturating_sub(scheduled_us));
                }
            }
            bytes = &bytes[length..];
        }
        if bytes.len() > PACKET_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.rest = bytes.to_vec();
        Ok(())
    }
}

/// What became of a publisher's schedule.
#[derive(Debug, Clone, Copy, Default)]
pub struct Published {
    /// Messages that were due.
    pub due: u64,
    /// All of them went out; otherwise the connection is in the middle of a packet and of no more use.
    pub is_complete: bool,
    /// The most that a message was late because this thread was.
    pub own_lag: Duration,
    /// The longest time that the socket let messages wait.
    pub held_up: Duration,
}

/// What is published.
#[derive(Debug, Clone, Copy)]
pub struct Programme<'a> {
    /// One after the other, again and again. Messages are numbered per topic.
    pub topics: &'a [String],
    /// The number of the first message of each topic.
    pub first: u64,
    /// Of a payload.
    pub bytes: usize,
    /// Messages per second, all topics together.
    pub per_second: f64,
    /// How long.
    pub time: Duration,
}

/// Publishes with QoS 0 at an open rate from a thread of its own: what the server does changes nothing in the schedule. Gives up when the
/// socket takes nothing for as long as the schedule lasts, at least a second.
///
/// # Errors
/// The connection broke.
pub fn publish(stream: &TcpStream, clock: Clock, programme: &Programme<'_>) -> io::Result<Published> {
    /// What may wait for the socket.
    const WAITING_BYTES_MAX: usize = 16 << 20;
    let Programme { topics, first, bytes, per_second, time } = *programme;
    let begun_us = clock.now_us();
    let due_us = |number: u64| begun_us + (number as f64 / per_second * 1e6) as u64;
    let due = (time.as_secs_f64() * per_second).round() as u64;
    let mut published = Published { due, ..Published::default() };
    let (mut encoded, mut packets) = (0_u64, BytesMut::new());
    let mut waiting_since_us = None;
    loop {
        let now_us = clock.now_us();
        while encoded < due && due_us(encoded) <= now_us && packets.len() < WAITING_BYTES_MAX {
            let scheduled_us = due_us(encoded);
            published.own_lag = published.own_lag.max(Duration::from_micros(now_us - scheduled_us));
            let (round, at) = (encoded / topics.len() as u64, (encoded % topics.len() as u64) as usize);
            let (topic, payload) = (&topics[at], payload(first + round, scheduled_us, bytes));
            let publish =
                Publish { topic, payload: &payload, qos: 0, retain: false, dup: false, packet_id: 0, id: None };
            wire::encode_publish(Version::V311, &publish, &mut packets);
            encoded += 1;
        }
        while !packets.is_empty() {
            match (&*stream).write(&packets) {
                Ok(written) => {
                    drop(packets.split_to(written));
                    waiting_since_us = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if packets.is_empty() && encoded == due {
            published.is_complete = true;
            return Ok(published);
        }
        if !packets.is_empty() {
            let waits = Duration::from_micros(now_us - *waiting_since_us.get_or_insert(now_us));
            published.held_up = published.held_up.max(waits);
            if waits > time.max(Duration::from_secs(1)) {
                return Ok(published);
            }
        }
        let next_us = due_us(encoded).clamp(now_us + 200, now_us + 1_000);
        std::thread::sleep(clock.at(next_us).saturating_duration_since(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::net::TcpListener;

    const TOPIC: &str = "r/stage";

    fn packet(number: u64, scheduled_us: u64) -> Vec<u8> {
        let payload = payload(number, scheduled_us, 128);
        let publish =
            Publish { topic: TOPIC, payload: &payload, qos: 0, retain: false, dup: false, packet_id: 0, id: None };
        let mut packet = BytesMut::new();
        wire::encode_publish(Version::V311, &publish, &mut packet);
        packet.to_vec()
    }

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let viewer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        viewer.set_nonblocking(true).unwrap();
        (viewer, listener.accept().unwrap().0)
    }

    fn until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline, "not within 10 s: {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn packets_are_found_wherever_the_reads_end() {
        let bytes = packet(7, 11);
        assert_eq!(bytes.len(), 1 + 2 + 2 + TOPIC.len() + 128);
        for end in 0..bytes.len() {
            assert!(first_publish(&bytes[..end]).is_none());
        }
        let (payload, length) = first_publish(&bytes).unwrap();
        assert_eq!((head_of(payload), length), (Some((7, 11)), bytes.len()));
        assert_eq!(head_of(br#"{"viewers":1}"#), None);
        assert!(first_publish(&[0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]).is_none());
    }

    #[test]
    fn losses_repetitions_and_delays_show() {
        let clock = Clock::default();
        let reader = Reader::start(clock, Duration::from_millis(1));
        let (viewer, mut server) = pair();
        let (counted, other) = pair();
        let (seat, bytes) = (reader.seat(viewer, Attention::Full, 3), reader.seat(counted, Attention::Counts, 0));
        let stream = [4, 7, 6, 7, 8].map(|number| packet(number, clock.now_us())).concat();
        for part in stream.chunks(100) {
            server.write_all(part).unwrap();
        }
        (&other).write_all(&stream).unwrap();
        until("all is read", || seat.seen.of(|seen| &seen.messages) == 5);
        let seen = &seat.seen;
        assert_eq!([seen.of(|s| &s.lost), seen.of(|s| &s.reordered), seen.of(|s| &s.last)], [2, 2, 8]);
        until("the bytes are counted", || bytes.seen.of(|seen| &seen.bytes) == stream.len() as u64);
        let delays = reader.take_delays();
        assert_eq!((delays.most.len(), delays.least.len()), (5, 5));
        assert!(delays.least.max() <= delays.most.max());
        drop(server);
        until("the end is seen", || seen.is_closed());
        drop(bytes);
        until("who leaves closes his connection", || (&other).write(b"x").is_err());
    }

    #[test]
    fn a_schedule_is_kept_and_a_server_that_does_not_read_is_no_lag_of_ours() {
        let (star, mut server) = pair();
        let clock = Clock::default();
        let time = Duration::from_millis(200);
        let topics = [TOPIC.to_owned()];
        let programme = Programme { topics: &topics, first: 1, bytes: 128, per_second: 500.0, time };
        let published = publish(&star, clock, &programme).unwrap();
        assert_eq!((published.due, published.is_complete), (100, true));
        let length = packet(0, 0).len();
        let mut bytes = vec![0; 100 * length];
        server.read_exact(&mut bytes).unwrap();
        let (payload, _) = first_publish(&bytes[99 * length..]).unwrap();
        assert_eq!(head_of(payload).unwrap().0, 100);
        // Far more than the buffers hold, and nobody reads.
        let flood = Programme { bytes: 60_000, per_second: 2_000.0, ..programme };
        let published = publish(&star, clock, &flood).unwrap();
        assert!(!published.is_complete && published.held_up >= Duration::from_secs(1));
    }
}
