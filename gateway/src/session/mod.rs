//! The protocol state machine of one connection.
//!
//! Sans-I/O: packets, answers, pushes and ticks come in with the time in milliseconds; packets go out through the session's own
//! [`OutBuffer`], everything else through [`Effects`]. It knows nothing of sockets, tasks or links, so a seeded loop can drive it.
//!
//! Here: its vocabulary and its state, what it asks and what it is answered, and what time brings. How it begins and ends is in
//! `lifecycle`, what clients may say in `protocol`, what they are sent in `delivery`, live rooms in `rooms`.

mod delivery;
mod lifecycle;
mod protocol;
mod rooms;

use std::fmt::Write as _;
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use im_proto::ids::{room_key, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{Body, Refusal, Refused, SessionNumber, Taken, body};

use self::delivery::Inbox;
use self::rooms::EnteredRoom;
pub use self::rooms::{Batch, Counter, RoomPart, Sent, Versions, Window};
use crate::metrics::Metrics;
use crate::mqtt::{self, OutBuffer, Reason, Version};

/// How long a client waits for an outcome before its connection ends.
pub const OUTCOME_WAIT_MS_MAX: u64 = 10_000;
/// Requests that wait besides publishes with QoS 1.
const WAITING_EXTRA_MAX: usize = 256;

/// What all sessions of a process share.
#[derive(Debug)]
pub struct Shared {
    /// The process's boot id: the first half of the keys it makes.
    pub boot: u64,
    /// What clients are held to.
    pub limits: SessionLimits,
    /// What happened, counted.
    pub metrics: Metrics,
    next_key: AtomicU64,
}

/// Limits that CONNACK announces, and what else a session needs to know.
#[derive(Debug, Clone)]
pub struct SessionLimits {
    /// Publishes that a client may have unanswered.
    pub receive_maximum: u16,
    /// The largest packet taken, bytes.
    pub packet_size_max: u32,
    /// The longest keep-alive granted, seconds.
    pub keep_alive_s_max: u16,
    /// The longest session expiry granted, seconds.
    pub session_expiry_s_max: u32,
    /// Messages of one conversation that a new session gets at most.
    pub catch_up: u64,
    /// What may wait for a client that reads slowly, bytes, give or take the packet that exceeds it. Half of it may be with the socket's
    /// task, so the session's own out-buffer may hold the other half.
    pub send_buffer_bytes: usize,
}

impl SessionLimits {
    /// With as much in the out-buffer, deliveries wait and room messages are lost, bytes.
    pub fn deliver_below(&self) -> usize {
        self.send_buffer_bytes / 4
    }

    /// With as much in the out-buffer, nothing more is read from the client, bytes. The space above [`SessionLimits::deliver_below`] is
    /// for answers alone: a client that does not read its deliveries can still be answered.
    fn read_below(&self) -> usize {
        self.send_buffer_bytes / 2
    }
}

impl Shared {
    /// For a process with this boot id.
    pub fn new(boot: u64, limits: SessionLimits, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { boot, limits, metrics, next_key: AtomicU64::new(1) })
    }

    fn key(&self) -> [u8; 16] {
        let mut key = [0; 16];
        key[..8].copy_from_slice(&self.boot.to_be_bytes());
        key[8..].copy_from_slice(&self.next_key.fetch_add(1, Ordering::Relaxed).to_be_bytes());
        key
    }
}

/// Who an authenticated client is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// When the proof ends, milliseconds on the session's clock.
    pub expires_at_ms: Option<u64>,
}

/// Why a CONNECT is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {text}", .reason.name())]
pub struct ConnectRefused {
    /// The code of the CONNACK.
    pub reason: Reason,
    /// What the client can do about it.
    pub text: String,
}

/// A request for the owner of a shard.
#[derive(Debug)]
pub struct SessionRequest {
    /// By which the answer comes back; `None` if nobody waits for it (it is to be carried through nevertheless).
    pub ticket: Option<u32>,
    /// Whose owner it goes to.
    pub shard: u32,
    /// Requests of one group keep their order; 0 = no group.
    pub order: u64,
    /// What is asked.
    pub body: Body,
}

/// Entering and leaving a live room, and counting in it.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum RoomEffect {
    /// Answered under the ticket with `Done` once this gateway is in the room.
    Enter {
        room: Arc<str>,
        part: RoomPart,
        ticket: u32,
    },
    Leave {
        room: Arc<str>,
        part: RoomPart,
    },
    /// Answered under the ticket, if there is one, with `Done` once the owner has stored it.
    Count {
        room: Arc<str>,
        counter: Counter,
        count: u64,
        ticket: Option<u32>,
    },
}

/// What a session wants done by its surroundings, in this order.
#[derive(Debug, Default)]
pub struct Effects {
    /// Requests that nobody waits for any more, by the router's ids.
    pub cancel: Vec<u64>,
    /// Requests to route.
    pub requests: Vec<SessionRequest>,
    /// Rooms entered and left.
    pub rooms: Vec<RoomEffect>,
}

impl Effects {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.cancel.is_empty() && self.requests.is_empty() && self.rooms.is_empty()
    }
}

/// What became of a request.
#[derive(Debug)]
pub enum Answer {
    /// The owner's word.
    Outcome(Outcome),
    /// It was not taken: a queue is full.
    Full,
}

/// How a connection ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The client's DISCONNECT; `will` if it asked for its will.
    Client {
        /// Publish the will.
        will: bool,
        /// A changed session expiry, seconds.
        session_expiry_s: Option<u32>,
    },
    /// The socket is gone.
    Broken,
    /// We end it, for this reason.
    Server(Reason, &'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Waits for the user shard's owner; CONNACK comes after.
    Registering {
        since_ms: u64,
    },
    Live,
    Ended,
}

#[derive(Debug)]
struct Waiting {
    ticket: u32,
    /// The router's id; 0 until routed.
    request_id: u64,
    since_ms: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    Register,
    Announce,
    Publish(Box<TakenPublish>),
    HeadsToSubscribe,
    HeadsToCompare,
    SubscribeInbox,
    /// `was_subscribed`: it is again if this is refused; else the subscription was still on its way.
    UnsubscribeInbox {
        packet_id: u16,
        codes: Vec<u8>,
        was_subscribed: bool,
    },
    EnterRoom {
        packet_id: u16,
        filter: usize,
        room: Arc<str>,
        part: RoomPart,
    },
    Fetch {
        flow: u32,
        from: u64,
        head_before: u64,
    },
    Cursors,
}

impl What {
    /// Whether the client waits for this, so that it must not take for ever.
    fn client_waits(&self) -> bool {
        match self {
            Self::Publish(taken) => taken.packet_id != 0,
            Self::HeadsToSubscribe | Self::SubscribeInbox | Self::UnsubscribeInbox { .. } | Self::EnterRoom { .. } => {
                true
            }
            Self::Register | Self::Announce | Self::HeadsToCompare | Self::Fetch { .. } | Self::Cursors => false,
        }
    }

    /// Whether the user's owner does this for a session that it knows.
    fn is_of_session(&self) -> bool {
        matches!(self, Self::Announce | Self::SubscribeInbox | Self::UnsubscribeInbox { .. } | Self::Cursors)
    }
}

/// A publish that waits for its outcome.
#[derive(Debug)]
struct TakenPublish {
    /// 0 = QoS 0: nobody is told.
    packet_id: u16,
    hash: u64,
    /// The key it went under, if the client gave no id.
    key: Option<[u8; 16]>,
    topic: Box<str>,
    /// `read/…`: the conversation and the seq marked.
    mark: Option<(String, u64)>,
}

#[derive(Debug)]
struct PendingSubscribe {
    packet_id: u16,
    codes: Vec<u8>,
    unanswered: usize,
    reason: &'static str,
}

#[derive(Debug)]
enum InboxState {
    Unsubscribed,
    /// Heads are asked for starting cursors, then the owner writes the subscription; `waiters` are (packet id, filter) of the SUBACKs.
    Subscribing(Box<Subscribing>),
    Subscribed,
}

#[derive(Debug, Default)]
struct Subscribing {
    waiters: Vec<(u16, usize)>,
    heads_left: usize,
}

#[derive(Debug)]
struct OwnedWill {
    room: Box<str>,
    payload: Bytes,
}

/// One connection of one client, from its CONNECT on.
#[derive(Debug)]
pub struct Session {
    shared: Arc<Shared>,
    shards: u32,
    version: Version,
    problem_information: bool,
    phase: Phase,
    user: Arc<str>,
    device: Arc<str>,
    device_assigned: bool,
    connection: u64,
    number: Option<SessionNumber>,
    out: OutBuffer,
    /// What was taken of the out-buffer last is still being written.
    is_writing: bool,
    packet_size_max: Option<u32>,
    session_expiry_s: u32,
    /// What the client hears of its keep-alive in CONNACK.
    keep_alive_s_told: Option<u16>,
    /// Silence after which the connection ends; 0 = off.
    silence_ms_max: u64,
    heard_ms: u64,
    expires_at_ms: Option<u64>,
    waiting: Vec<Waiting>,
    next_ticket: u32,
    publishes_unanswered: usize,
    subscribes: Vec<PendingSubscribe>,
    rooms: Vec<EnteredRoom>,
    /// What the last connection left unanswered.
    resumable: Vec<Taken>,
    will: Option<Box<OwnedWill>>,
    /// An announcement was not taken: the next tick tries again.
    announce_again: bool,
    inbox: Inbox,
}

impl Session {
    /// The user.
    pub fn user(&self) -> &Arc<str> {
        &self.user
    }

    /// The device.
    pub fn device(&self) -> &Arc<str> {
        &self.device
    }

    /// The version that the client speaks.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The number that the owner gave it; `None` before that.
    pub fn number(&self) -> Option<SessionNumber> {
        self.number
    }

    /// CONNACK went out and the connection has not ended.
    pub fn is_live(&self) -> bool {
        self.phase == Phase::Live
    }

    /// Nothing more is read; what is in the out-buffer is written, then the socket closes.
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Whether packets are taken now. The surroundings leave them in the socket otherwise, which is the back-pressure.
    pub fn wants_input(&self) -> bool {
        let receive_maximum = usize::from(self.shared.limits.receive_maximum);
        self.phase == Phase::Live
            && self.out.len() < self.shared.limits.read_below()
            && self.waiting.len() < receive_maximum + WAITING_EXTRA_MAX
            && (self.version == Version::V5 || self.publishes_unanswered < receive_maximum)
    }

    /// Whether something waits to be written.
    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// Takes what waits to be written. To be called only when what was taken before is written. [`Session::on_written`] has to follow when
    /// that is done.
    pub fn take_output(&mut self) -> OutBuffer {
        self.is_writing = self.has_output();
        std::mem::take(&mut self.out)
    }

    /// Puts what waits on the socket, as far as `write` takes it; it says how many bytes. While what was taken before is still being
    /// written, and after the end, nothing is: that is for whoever took it.
    pub fn write_out(&mut self, now_ms: u64, effects: &mut Effects, write: impl FnOnce(&[IoSlice<'_>]) -> usize) {
        if self.is_writing || !self.has_output() || self.is_ended() {
            return;
        }
        let mut slices = [IoSlice::new(&[]); OutBuffer::SLICES];
        let count = self.out.slices(&mut slices);
        let written = write(&slices[..count]);
        if written >= self.out.len() {
            // Without its space: an idle connection has none.
            self.out = OutBuffer::default();
            self.on_written(now_ms, effects);
        } else {
            self.out.advance(written);
        }
    }

    /// The out-buffer drained: who waited for room in it goes on.
    pub fn on_written(&mut self, now_ms: u64, effects: &mut Effects) {
        self.fetch(now_ms, effects);
    }

    // ---- requests and answers -----------------------------------------------------------------------------------------

    fn wait(&mut self, now_ms: u64, what: What) -> u32 {
        let ticket = self.next_ticket;
        self.next_ticket = self.next_ticket.wrapping_add(1);
        self.waiting.push(Waiting { ticket, request_id: 0, since_ms: now_ms, what });
        ticket
    }

    fn ask(&mut self, now_ms: u64, what: What, shard: u32, order: u64, body: body::Body, effects: &mut Effects) {
        let ticket = Some(self.wait(now_ms, what));
        effects.requests.push(SessionRequest { ticket, shard, order, body: Body { body: Some(body) } });
    }

    fn ask_user(&mut self, now_ms: u64, what: What, body: body::Body, effects: &mut Effects) {
        let shard = shard_of(&self.user, self.shards);
        self.ask(now_ms, what, shard, 0, body, effects);
    }

    fn shard_of_room(&self, room: &str) -> u32 {
        shard_of(&room_key(room), self.shards)
    }

    /// Gives up what `is_void`: its answers are ignored from now on.
    fn give_up(&mut self, is_void: impl Fn(&What) -> bool, effects: &mut Effects) -> Vec<Waiting> {
        let void: Vec<Waiting> = self.waiting.extract_if(.., |waiting| is_void(&waiting.what)).collect();
        effects.cancel.extend(void.iter().map(|waiting| waiting.request_id));
        void
    }

    /// The router took a request of this session under an id.
    pub fn routed(&mut self, ticket: u32, request_id: u64) {
        if let Some(waiting) = self.waiting.iter_mut().find(|waiting| waiting.ticket == ticket) {
            waiting.request_id = request_id;
        }
    }

    /// What became of the request with this ticket.
    pub fn on_answer(&mut self, now_ms: u64, ticket: u32, answer: Answer, effects: &mut Effects) {
        let Some(position) = self.waiting.iter().position(|waiting| waiting.ticket == ticket) else { return };
        let what = self.waiting.remove(position).what;
        if self.phase == Phase::Ended {
            // The only request that outlives its connection: the owner has to learn that the session is over.
            if let (What::Register, Answer::Outcome(Outcome::Registered(registered))) = (&what, &answer) {
                self.number = registered.number;
                self.send_close(None, effects);
            }
            return;
        }
        match what {
            What::Register => self.on_registered(now_ms, answer, effects),
            What::Announce => match answer {
                Answer::Outcome(Outcome::Registered(registered)) => {
                    for row in &registered.index {
                        self.inbox.merge(row);
                    }
                    self.compare_heads(now_ms, effects);
                }
                Answer::Outcome(Outcome::Refused(refused)) if refused.code() == Refusal::StaleSession => {
                    self.taken_over(effects)
                }
                _ => self.announce_again = true,
            },
            What::Publish(taken) => self.on_publish_answered(*taken, answer, effects),
            What::HeadsToSubscribe => self.on_heads_to_subscribe(now_ms, answer, effects),
            What::HeadsToCompare => self.on_heads_to_compare(now_ms, answer, effects),
            What::SubscribeInbox => match answer {
                Answer::Outcome(Outcome::Done(_)) => {
                    if let InboxState::Subscribing(subscribing) =
                        std::mem::replace(&mut self.inbox.state, InboxState::Subscribed)
                    {
                        for (packet_id, filter) in subscribing.waiters {
                            self.granted(packet_id, filter, 1);
                        }
                    }
                    self.fetch_all(now_ms, effects);
                }
                Answer::Outcome(Outcome::Refused(refused)) if refused.code() == Refusal::StaleSession => {
                    self.taken_over(effects)
                }
                answer => self.subscription_failed(refusal_of(&answer).0, effects),
            },
            What::UnsubscribeInbox { packet_id, codes, was_subscribed } => match answer {
                Answer::Outcome(Outcome::Done(_)) => mqtt::unsuback(&mut self.out, self.version, packet_id, &codes),
                Answer::Outcome(Outcome::Refused(refused)) if refused.code() == Refusal::StaleSession => {
                    self.taken_over(effects)
                }
                answer => {
                    if was_subscribed && matches!(self.inbox.state, InboxState::Unsubscribed) {
                        self.inbox.state = InboxState::Subscribed;
                        // What was announced meanwhile was not noted.
                        self.inbox.compare_again = true;
                    }
                    let ((reason, _), _) = refusal_of(&answer);
                    let codes = vec![reason.code(); codes.len()];
                    mqtt::unsuback(&mut self.out, self.version, packet_id, &codes);
                }
            },
            What::EnterRoom { packet_id, filter, room, part } => match answer {
                Answer::Outcome(Outcome::Done(_)) => self.granted(packet_id, filter, 0),
                answer => {
                    self.rooms.retain(|entered| (&entered.room, entered.part) != (&room, part));
                    effects.rooms.push(RoomEffect::Leave { room, part });
                    self.not_granted(packet_id, filter, refusal_of(&answer).0);
                }
            },
            What::Fetch { flow, from, head_before } => {
                self.on_fetched(now_ms, flow, from, head_before, answer, effects)
            }
            What::Cursors => {
                if matches!(&answer, Answer::Outcome(Outcome::Refused(refused)) if refused.code() == Refusal::StaleSession)
                {
                    self.taken_over(effects);
                }
            }
        }
    }

    // ---- time ---------------------------------------------------------------------------------------------------------

    /// What time brings; to be called about once a second.
    pub fn on_tick(&mut self, now_ms: u64, effects: &mut Effects) {
        match self.phase {
            Phase::Ended => return,
            Phase::Registering { since_ms } => {
                if now_ms.saturating_sub(since_ms) >= OUTCOME_WAIT_MS_MAX {
                    self.refuse_connect(Reason::ServerUnavailable, "no owner answered within 10 s: try again", effects);
                }
                return;
            }
            Phase::Live => {}
        }
        let overdue = |waiting: &Waiting| {
            waiting.what.client_waits() && now_ms.saturating_sub(waiting.since_ms) >= OUTCOME_WAIT_MS_MAX
        };
        let end = if self.silence_ms_max != 0 && now_ms.saturating_sub(self.heard_ms) > self.silence_ms_max {
            Some((Reason::KeepAliveTimeout, "nothing was heard for 1.5 times the keep-alive"))
        } else if self.expires_at_ms.is_some_and(|at_ms| now_ms >= at_ms) {
            Some((Reason::NotAuthorized, "the token expired: connect again with a new one"))
        } else if self.waiting.iter().any(overdue) {
            Some((Reason::ServerBusy, "no outcome within 10 s: connect again and send again"))
        } else {
            None
        };
        if let Some((reason, text)) = end {
            self.shared.metrics.refused(reason);
            return self.end(End::Server(reason, text), effects);
        }
        if std::mem::take(&mut self.announce_again) {
            self.announce(now_ms, effects);
        }
        if self.inbox.compare_again && !self.is_congested() {
            self.compare_heads(now_ms, effects);
        }
        self.fetch(now_ms, effects);
        self.send_cursors(now_ms, effects);
        if self.waiting.is_empty() {
            self.waiting = Vec::new();
            self.subscribes.shrink_to_fit();
        }
    }
}

/// What a client is told of an answer that is no success, and whether it is refused only for now.
fn refusal_of(answer: &Answer) -> ((Reason, &'static str), bool) {
    let code = match answer {
        Answer::Outcome(Outcome::Refused(refused)) => Refused::code(refused),
        Answer::Full => Refusal::Busy,
        Answer::Outcome(_) => Refusal::Unspecified,
    };
    match code {
        Refusal::NotAMember => ((Reason::NotAuthorized, "not a member"), false),
        Refusal::IdReused => ((Reason::ImplementationSpecific, "this id was used for another payload"), false),
        Refusal::NotFound => ((Reason::TopicNameInvalid, "there is no such conversation"), false),
        Refusal::Forbidden => ((Reason::NotAuthorized, "not allowed"), false),
        Refusal::Sanctioned => ((Reason::NotAuthorized, "muted in this room, or put out of it"), false),
        Refusal::TooSoon => ((Reason::ImplementationSpecific, "slow mode: wait before the next message"), false),
        Refusal::Invalid => ((Reason::PayloadFormatInvalid, "the owner found it invalid"), false),
        Refusal::StaleSession => ((Reason::SessionTakenOver, "the session goes on in another connection"), false),
        Refusal::Busy => ((Reason::QuotaExceeded, "a queue is full: try again later"), true),
        Refusal::StoreUnavailable => ((Reason::Unspecified, "the message store is unavailable: try again later"), true),
        Refusal::Unspecified => ((Reason::Unspecified, "the owner gave no usable answer: try again later"), true),
    }
}

/// A decimal number without an allocation.
struct Digits {
    bytes: [u8; 20],
    length: usize,
}

impl Digits {
    fn new(number: u64) -> Self {
        let mut digits = Self { bytes: [0; 20], length: 0 };
        // Twenty digits hold every u64.
        let _ = write!(digits, "{number}");
        digits
    }

    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.length]).unwrap_or_default()
    }
}

impl std::fmt::Write for Digits {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.length + text.len();
        self.bytes.get_mut(self.length..end).ok_or(std::fmt::Error)?.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}
