//! The thin async side of links: outboxes that batch what waits into one gRPC message, and a pool that keeps one link to each business member.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::future::BoxFuture;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, Sleep, interval, sleep_until, timeout};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Endpoint;

use crate::ids::MemberId;
use crate::link::link_client::LinkClient;
use crate::link::{ClientFrame, ClientFrames, Hello, Role, ServerFrame, client_frame, push, server_frame};
use crate::process::AbortOnPanic;
use crate::token::SharedToken;

/// How often a link's client pings its owner.
pub const PING_INTERVAL: Duration = Duration::from_secs(1);
/// A link that was silent for so long is gone, whatever TCP says.
pub const LINK_SILENCE_MAX: Duration = Duration::from_secs(3);
/// The largest gRPC message of a link, bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// How long a link gathers frames after each message that it sent. The first frame after a silence leaves at once.
const GATHER: Duration = Duration::from_millis(3);
/// The same after a message with something urgent in it.
const GATHER_URGENT: Duration = Duration::from_micros(500);
/// Frames that one gRPC message carries at most.
const FRAMES_PER_MESSAGE_MAX: usize = 1_024;
/// Bytes of one gRPC message, unless its first frame alone has more: far below what the other side takes at all.
const MESSAGE_BYTES_WANTED: usize = 4 << 20;
/// Bytes that wait in an outbox at most.
const OUTBOX_BYTES_MAX: usize = 256 << 20;
/// Bytes that wait in an outbox from which on nobody should ask for more.
const OUTBOX_BYTES_BUSY: usize = 16 << 20;

/// The outbox is full: its reader is too slow, and the link should end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the link's outbox is full: the other side reads too slowly")]
pub struct Overflow;

/// A bounded queue of frames whose reader takes all that waits as one message: the busier the link, the larger its batches.
#[derive(Debug)]
pub struct Outbox<F> {
    state: Mutex<OutboxState<F>>,
    frames_max: usize,
    /// Some of it was taken, or it was closed.
    taken: Notify,
}

#[derive(Debug)]
struct OutboxState<F> {
    frames: Vec<F>,
    /// Of all frames, as encoded.
    bytes: usize,
    waker: Option<Waker>,
    closed: bool,
}

impl<F: Message> OutboxState<F> {
    /// The next message's frames.
    fn take(&mut self) -> Vec<F> {
        if self.frames.len() <= FRAMES_PER_MESSAGE_MAX && self.bytes <= MESSAGE_BYTES_WANTED {
            self.bytes = 0;
            return std::mem::take(&mut self.frames);
        }
        let (mut count, mut bytes) = (0, 0);
        for frame in self.frames.iter().take(FRAMES_PER_MESSAGE_MAX) {
            let more = frame.encoded_len();
            if count > 0 && bytes + more > MESSAGE_BYTES_WANTED {
                break;
            }
            (count, bytes) = (count + 1, bytes + more);
        }
        self.bytes -= bytes;
        let rest = self.frames.split_off(count);
        std::mem::replace(&mut self.frames, rest)
    }
}

impl<F: Message> Outbox<F> {
    /// An outbox that holds at most `frames_max` frames, and 256 MiB.
    pub fn new(frames_max: usize) -> Arc<Self> {
        let state = OutboxState { frames: Vec::new(), bytes: 0, waker: None, closed: false };
        Arc::new(Self { state: Mutex::new(state), frames_max, taken: Notify::new() })
    }

    /// Puts frames in; a closed outbox drops them.
    ///
    /// # Errors
    /// [`Overflow`] if they do not fit; the outbox is closed then, because a link with a hole in it is worse than none.
    pub fn push(&self, frames: impl IntoIterator<Item = F>) -> Result<(), Overflow> {
        let mut state = self.state.lock();
        if state.closed {
            return Ok(());
        }
        for frame in frames {
            state.bytes += frame.encoded_len();
            state.frames.push(frame);
        }
        let full = state.frames.len() > self.frames_max || state.bytes > OUTBOX_BYTES_MAX;
        state.closed = full;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        if full { Err(Overflow) } else { Ok(()) }
    }

    /// Ends the stream after what is queued.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
        self.taken.notify_waiters();
    }

    /// Waits while so much is queued that whoever makes its reader ask for more should wait: 16 MiB.
    pub async fn has_room(&self) {
        loop {
            let taken = self.taken.notified();
            {
                let state = self.state.lock();
                if state.closed || state.bytes < OUTBOX_BYTES_BUSY {
                    return;
                }
            }
            taken.await;
        }
    }

    /// The reading end: all that waits, at most 1,024 frames and about 4 MiB a time. After each time it rests for [`GATHER`], so that a busy link has
    /// few large messages instead of many small ones, each of which would wake three tasks and cost two system calls.
    pub fn reader(self: &Arc<Self>) -> OutboxReader<F> {
        OutboxReader { outbox: self.clone(), rest: None, is_resting: false, is_urgent: |_| false }
    }
}

/// The reading end of an [`Outbox`], which it closes when dropped.
#[derive(Debug)]
pub struct OutboxReader<F: Message> {
    outbox: Arc<Outbox<F>>,
    /// Made with the first message, and used again.
    rest: Option<Pin<Box<Sleep>>>,
    is_resting: bool,
    is_urgent: fn(&F) -> bool,
}

impl<F: Message> OutboxReader<F> {
    /// Frames of which this is true make it rest less: a stream of them is worth more messages.
    pub fn hurried_by(mut self, is_urgent: fn(&F) -> bool) -> Self {
        self.is_urgent = is_urgent;
        self
    }

    fn begin_rest(&mut self, frames: &[F]) {
        let until = Instant::now() + if frames.iter().any(self.is_urgent) { GATHER_URGENT } else { GATHER };
        match &mut self.rest {
            Some(rest) => rest.as_mut().reset(until),
            None => self.rest = Some(Box::pin(sleep_until(until))),
        }
        self.is_resting = true;
    }
}

impl<F: Message> Drop for OutboxReader<F> {
    fn drop(&mut self) {
        self.outbox.close();
    }
}

impl<F: Message> Stream for OutboxReader<F> {
    type Item = Vec<F>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Vec<F>>> {
        let this = self.get_mut();
        // While it rests nobody can wake it but the clock.
        if this.is_resting
            && let Some(rest) = &mut this.rest
        {
            std::task::ready!(rest.as_mut().poll(cx));
            this.is_resting = false;
        }
        let mut state = this.outbox.state.lock();
        if state.frames.is_empty() {
            if state.closed {
                return Poll::Ready(None);
            }
            state.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let frames = state.take();
        let is_all = state.frames.is_empty();
        drop(state);
        this.outbox.taken.notify_waiters();
        if is_all {
            this.begin_rest(&frames);
        }
        Poll::Ready(Some(frames))
    }
}

/// Whether this asks an owner to publish in a live room: the key of that body is its first byte.
fn is_room_publish(frame: &ClientFrame) -> bool {
    const KEY: u8 = 9 << 3 | 2;
    matches!(&frame.frame, Some(client_frame::Frame::Request(request)) if request.body.first() == Some(&KEY))
}

/// Whether this is a message of a live room for a gateway.
pub fn is_room_message(frame: &ServerFrame) -> bool {
    let Some(server_frame::Frame::Push(push)) = &frame.frame else { return false };
    matches!(push.push, Some(push::Push::RoomMessage(_)))
}

/// What a pool tells its user; called from the link's own task, in order per member.
#[derive(Debug)]
pub enum LinkEvent {
    /// The stream is open and Hello is on its way.
    Up(MemberId),
    /// Frames of the owner, pongs left out.
    Frames(MemberId, Vec<ServerFrame>),
    /// The stream ended; the pool dials again by itself.
    Down(MemberId),
}

/// Receives a pool's events. Must not block for long: the link's reading stops meanwhile (which is the back-pressure).
pub type LinkHandler = Arc<dyn Fn(LinkEvent) -> BoxFuture<'static, ()> + Send + Sync>;

/// Keeps one link to each member that it was told of.
pub struct LinkPool {
    me: MemberId,
    role: Role,
    token: SharedToken,
    handler: LinkHandler,
    links: Mutex<HashMap<MemberId, PooledLink, foldhash::fast::RandomState>>,
}

struct PooledLink {
    outbox: Arc<Mutex<Option<Arc<Outbox<ClientFrame>>>>>,
    task: JoinHandle<()>,
}

impl Drop for PooledLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl LinkPool {
    /// A pool that dials as `me`; `token` authenticates this tier to the other.
    pub fn new(me: MemberId, role: Role, token: SharedToken, handler: LinkHandler) -> Arc<Self> {
        Arc::new(Self { me, role, token, handler, links: Mutex::default() })
    }

    /// Dials who is new and drops who is gone. Must be called within a tokio runtime.
    pub fn set_members(self: &Arc<Self>, members: &[(MemberId, String)]) {
        let mut links = self.links.lock();
        links.retain(|member, _| members.iter().any(|(m, _)| m == member));
        for (member, address) in members {
            if *member != self.me && !links.contains_key(member) {
                let outbox = Arc::new(Mutex::new(None));
                let task = tokio::spawn(self.clone().keep(member.clone(), address.clone(), outbox.clone()));
                links.insert(member.clone(), PooledLink { outbox, task });
            }
        }
    }

    /// Puts frames on the link to a member. Without one they are dropped: the router sends again what matters when the link is up.
    pub fn send(&self, to: &MemberId, frames: impl IntoIterator<Item = ClientFrame>) {
        let outbox = self.links.lock().get(to).and_then(|link| link.outbox.lock().clone());
        if let Some(outbox) = outbox
            && outbox.push(frames).is_err()
        {
            tracing::warn!(member = %to, "the outbox to a business member overflowed: the link is dialled again");
        }
    }

    async fn keep(
        self: Arc<Self>,
        member: MemberId,
        address: String,
        slot: Arc<Mutex<Option<Arc<Outbox<ClientFrame>>>>>,
    ) {
        // Without its task a link would never be dialled again, and the member's shards would be silent for all clients of this process.
        let _guard = AbortOnPanic("the task of a link");
        let mut pause = Duration::from_millis(20);
        loop {
            let opened = Instant::now();
            let outcome = self.run(&member, &address, &slot).await;
            if slot.lock().take().is_some() {
                (self.handler)(LinkEvent::Down(member.clone())).await;
            }
            if let Err(error) = outcome {
                tracing::debug!(%member, %address, %error, "link");
            }
            pause = if opened.elapsed() > LINK_SILENCE_MAX {
                Duration::from_millis(20)
            } else {
                (pause * 2).min(PING_INTERVAL)
            };
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        }
    }

    async fn run(
        &self,
        member: &MemberId,
        address: &str,
        slot: &Mutex<Option<Arc<Outbox<ClientFrame>>>>,
    ) -> Result<(), tonic::Status> {
        let unavailable = |error: tonic::transport::Error| tonic::Status::unavailable(error.to_string());
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(unavailable)?;
        let endpoint = endpoint.connect_timeout(PING_INTERVAL).tcp_nodelay(true);
        let endpoint = endpoint.initial_stream_window_size(4 << 20).initial_connection_window_size(8 << 20);
        let channel = endpoint.connect().await.map_err(unavailable)?;
        let mut client = LinkClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);

        let outbox = Outbox::new(1 << 20);
        let hello = Hello { member: self.me.to_string(), role: self.role.into() };
        let frame = |frame| ClientFrame { frame: Some(frame) };
        let push =
            |f| outbox.push([frame(f)]).map_err(|overflow| tonic::Status::resource_exhausted(overflow.to_string()));
        push(client_frame::Frame::Hello(hello))?;
        let frames = outbox.reader().hurried_by(is_room_publish);
        let mut request = tonic::Request::new(frames.map(|frames| ClientFrames { frames }));
        if let Some(bearer) = self.token.bearer() {
            request.metadata_mut().insert("authorization", bearer);
        }
        let answer = timeout(LINK_SILENCE_MAX, client.open(request)).await;
        let mut inbound = answer.map_err(|_| tonic::Status::deadline_exceeded("no answer to Hello"))??.into_inner();
        *slot.lock() = Some(outbox.clone());
        (self.handler)(LinkEvent::Up(member.clone())).await;

        let mut ping = interval(PING_INTERVAL);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut number = 0;
        loop {
            tokio::select! {
                message = inbound.message() => {
                    let Some(message) = message? else { return Ok(()) };
                    heard = Instant::now();
                    let mut frames = message.frames;
                    frames.retain(|frame| !matches!(frame.frame, Some(server_frame::Frame::Pong(_)) | None));
                    if !frames.is_empty() {
                        (self.handler)(LinkEvent::Frames(member.clone(), frames)).await;
                    }
                }
                _ = ping.tick() => {
                    if heard.elapsed() > LINK_SILENCE_MAX {
                        return Err(tonic::Status::deadline_exceeded("the owner's loop was silent for 3 s"));
                    }
                    number += 1;
                    push(client_frame::Frame::Ping(number))?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{Body, Request, RoomCounts, RoomPublish, body};
    use futures::FutureExt;

    #[tokio::test]
    async fn an_outbox_batches_and_is_bounded() {
        let outbox = Outbox::<u64>::new(2_000);
        let mut reader = outbox.reader();
        outbox.push(0..1_500).expect("room");
        assert_eq!(reader.next().await.map(|batch| batch.len()), Some(FRAMES_PER_MESSAGE_MAX));
        assert_eq!(reader.next().await.map(|batch| batch.len()), Some(1_500 - FRAMES_PER_MESSAGE_MAX));
        assert_eq!(outbox.push(0..2_001), Err(Overflow));
        outbox.push(0..1).expect("a closed outbox drops");
    }

    /// What people fetch who were away for long: more in a thousand frames than one gRPC message may have.
    #[tokio::test]
    async fn large_frames_are_spread_over_messages_and_whoever_asks_for_more_waits() {
        const FRAME_BYTES: usize = 64 << 10;
        let frame = |index: u8| {
            let mut bytes = vec![0; FRAME_BYTES];
            bytes[0] = index;
            bytes
        };
        let outbox = Outbox::<Vec<u8>>::new(1 << 20);
        let mut reader = outbox.reader();
        outbox.push((0..=255).cycle().take(1_100).map(frame)).expect("room");
        assert!(outbox.has_room().now_or_never().is_none(), "{} MiB wait", (1_100 * FRAME_BYTES) >> 20);
        outbox.push([vec![0; 2 * MESSAGE_BYTES_WANTED]]).expect("room");
        let mut seen = Vec::new();
        while seen.len() < 1_100 {
            let batch = reader.next().await.expect("there is more");
            assert!(batch.iter().map(Message::encoded_len).sum::<usize>() <= MESSAGE_BYTES_WANTED);
            seen.extend(batch.iter().map(|frame| frame[0]));
        }
        assert!(seen.into_iter().eq((0..=255).cycle().take(1_100)), "in order");
        assert!(outbox.has_room().now_or_never().is_some());
        assert_eq!(reader.next().await.map(|batch| batch.len()), Some(1), "one that is too large goes alone");
        assert!(outbox.push([vec![0; OUTBOX_BYTES_MAX]]).is_err());
    }

    #[test]
    fn messages_of_rooms_are_told_from_others() {
        let request = |body| {
            let body = Body { body: Some(body) }.encode_to_vec().into();
            let request = Request { id: 1, body, ..Request::default() };
            ClientFrame { frame: Some(client_frame::Frame::Request(request)) }
        };
        assert!(is_room_publish(&request(body::Body::RoomPublish(RoomPublish::default()))));
        assert!(!is_room_publish(&request(body::Body::RoomCounts(RoomCounts::default()))));
        assert!(!is_room_publish(&ClientFrame { frame: Some(client_frame::Frame::Ping(9 << 3 | 2)) }));
    }

    #[tokio::test]
    async fn what_is_urgent_shortens_the_rest() {
        let outbox = Outbox::<u64>::new(10);
        let mut reader = outbox.reader().hurried_by(|frame| *frame == 7);
        for (frame, rest) in [(1, GATHER), (7, GATHER_URGENT)] {
            outbox.push([frame]).expect("room");
            let before = Instant::now();
            reader.next().await;
            let until = reader.rest.as_ref().expect("it rests").deadline();
            assert!(until >= before + rest && until <= Instant::now() + rest, "{frame}");
        }
    }
}
