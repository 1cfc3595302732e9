//! The protocol state machine of one connection (design §2, §3 Presence, §4).
//!
//! Sans-I/O: packets, answers, pushes and ticks come in with the time in milliseconds; packets go out through the session's own
//! [`OutBuffer`], everything else through [`Effects`]. It knows nothing of sockets, tasks or links, so a seeded loop can drive it.
//!
//! Delivery is a pull. Per conversation the session knows the next seq to send and the highest it heard of; a push that is exactly the
//! next one goes out at once, any other only raises the latter, and what is missing is fetched as the client's window allows.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use im_proto::ids::{self, Conversation, is_name, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Body, Close, Cursor, Cursors, Deliver, Entry, EntryKind, Fetch, Fetched, Heads, IndexRow, KickReason, KickSession,
    MarkRead, Recipient, Refusal, Refused, Register, Registered, RoomPublish, Send, SessionNumber, Subscribe, Taken,
    body,
};
use im_proto::topic::{self, Publish as PublishTopic, SYSTEM_SENDER, Subscription, TopicError};
use xxhash_rust::xxh3::Xxh3Default;

use crate::metrics::Metrics;
use crate::mqtt::{self, Connect, DecodeError, Delivery, OutBuffer, Packet, Publish, Reason, Version, Welcome};

/// How long a client waits for an outcome before its connection ends.
pub const OUTCOME_WAIT_MS_MAX: u64 = 10_000;
/// With more than this unwritten, a session's deliveries wait and room messages are lost, bytes.
pub const OUT_BYTES_HIGH: usize = 64 << 10;
/// With more than this unwritten, nothing more is read from the client, bytes.
const OUT_BYTES_INPUT_STOP: usize = 256 << 10;
/// Packet ids of one connection's deliveries.
const PACKET_IDS: u16 = 4_096;
const WINDOW_MAX_V5: u16 = 1_024;
const WINDOW_V311: u16 = 64;
const FETCHES_MAX: usize = 2;
const FETCH_ENTRIES_MAX: usize = 64;
const FETCH_BYTES_MAX: u32 = 64 << 10;
/// Own stored messages that delivery has not reached yet; beyond it they are fetched and skipped.
const OWN_AHEAD_MAX: usize = 1_024;
const ROOMS_MAX: usize = 64;
const SUBSCRIBES_WAITING_MAX: usize = 16;
const FILTERS_MAX: usize = 64;
/// Requests that wait besides publishes with QoS 1.
const WAITING_EXTRA_MAX: usize = 256;
const CLIENT_MESSAGE_ID_BYTES_MAX: usize = 64;

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

/// Entering or leaving a live room.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum RoomEffect {
    /// Answered under the ticket with `Done` once this gateway is in the room.
    Enter {
        room: Arc<str>,
        ticket: u32,
    },
    Leave {
        room: Arc<str>,
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
    UnsubscribeInbox { packet_id: u16, codes: Vec<u8> },
    EnterRoom { packet_id: u16, filter: usize, room: Arc<str> },
    Fetch { flow: u32, from: u64, head_before: u64 },
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

/// A SUBACK code that is not known yet.
const UNANSWERED: u8 = 0xFF;

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

/// What is delivered of one conversation.
#[derive(Debug)]
struct Flow {
    conversation: Arc<str>,
    /// The next seq to send; all before it was sent or is none of this session's.
    next: u64,
    /// The highest seq heard of.
    head: u64,
    /// Nothing after it; 0 = no end.
    to_seq: u64,
    /// The membership change that said so.
    as_of: u64,
    /// Sent and not acknowledged, ascending.
    in_flight: VecDeque<u64>,
    /// Own stored seqs after `next`, ascending.
    own_ahead: Vec<u64>,
    fetching: bool,
    /// Queued in `behind`.
    queued: bool,
    /// Queued in `dirty`.
    dirty: bool,
    own_mark_told: u64,
    peer_mark_told: u64,
}

impl Flow {
    fn new(conversation: Arc<str>, next: u64) -> Self {
        Self {
            conversation,
            next: next.max(1),
            head: 0,
            to_seq: 0,
            as_of: 0,
            in_flight: VecDeque::new(),
            own_ahead: Vec::new(),
            fetching: false,
            queued: false,
            dirty: false,
            own_mark_told: 0,
            peer_mark_told: 0,
        }
    }

    /// All up to this seq was acknowledged or needs no delivery.
    fn acked(&self) -> u64 {
        self.in_flight.front().map_or(self.next, |seq| *seq) - 1
    }

    fn is_behind(&self) -> bool {
        self.next <= if self.to_seq == 0 { self.head } else { self.head.min(self.to_seq) }
    }

    fn advance_to(&mut self, next: u64) {
        self.next = self.next.max(next);
        let mut passed = 0;
        for own in &self.own_ahead {
            if *own > self.next {
                break;
            }
            self.next = self.next.max(own + 1);
            passed += 1;
        }
        self.own_ahead.drain(..passed);
    }

    fn own_stored(&mut self, seq: u64) {
        if seq == self.next {
            self.advance_to(seq + 1);
        } else if seq > self.next
            && self.own_ahead.len() < OWN_AHEAD_MAX
            && let Err(index) = self.own_ahead.binary_search(&seq)
        {
            self.own_ahead.insert(index, seq);
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Unacked {
    flow: u32,
    seq: u64,
    acked: bool,
}

#[derive(Debug)]
struct Inbox {
    state: InboxState,
    flows: Vec<Flow>,
    flow_by_conversation: HashMap<Arc<str>, u32>,
    /// Flows that miss something, in turn.
    behind: VecDeque<u32>,
    /// Flows whose cursor moved since the owner was told.
    dirty: Vec<u32>,
    fetches: usize,
    /// Heads could not be asked: again at the next tick.
    compare_again: bool,
    /// Sent publishes in the order of their packet ids.
    unacked: VecDeque<Unacked>,
    outstanding: u16,
    window: u16,
    /// The connection's block of packet ids starts here.
    ids_from: u16,
    /// The first of `unacked` has the id `ids_from + first_offset`.
    first_offset: u16,
}

impl Inbox {
    fn flow(&mut self, conversation: &str, next: u64) -> u32 {
        if let Some(index) = self.flow_by_conversation.get(conversation) {
            return *index;
        }
        let (index, conversation) = (self.flows.len() as u32, Arc::<str>::from(conversation));
        self.flow_by_conversation.insert(conversation.clone(), index);
        self.flows.push(Flow::new(conversation, next));
        index
    }

    fn mark_behind(&mut self, index: u32) {
        let flow = &mut self.flows[index as usize];
        if flow.is_behind() && !flow.queued && !flow.fetching {
            flow.queued = true;
            self.behind.push_back(index);
        }
    }

    fn mark_dirty(&mut self, index: u32) {
        let flow = &mut self.flows[index as usize];
        if !std::mem::replace(&mut flow.dirty, true) {
            self.dirty.push(index);
        }
    }

    fn merge(&mut self, row: &IndexRow) -> u32 {
        let index = self.flow(&row.conversation, row.from_seq);
        let flow = &mut self.flows[index as usize];
        if row.as_of >= flow.as_of {
            flow.as_of = row.as_of;
            flow.to_seq = row.to_seq;
        }
        index
    }

    /// How many more publishes may be sent now.
    fn room(&self, out: &OutBuffer) -> usize {
        if !matches!(self.state, InboxState::Subscribed) || out.len() >= OUT_BYTES_HIGH {
            return 0;
        }
        usize::from(self.window - self.outstanding).min(usize::from(PACKET_IDS) - self.unacked.len())
    }

    fn next_packet_id(&mut self, flow: u32, seq: u64) -> u16 {
        let offset = (self.first_offset + self.unacked.len() as u16) % PACKET_IDS;
        self.unacked.push_back(Unacked { flow, seq, acked: false });
        self.outstanding += 1;
        self.flows[flow as usize].in_flight.push_back(seq);
        self.ids_from + offset
    }

    /// Whether the packet id was waited for.
    fn acknowledged(&mut self, packet_id: u16) -> bool {
        let Some(offset) = packet_id.checked_sub(self.ids_from).filter(|offset| *offset < PACKET_IDS) else {
            return false;
        };
        let index = (offset + PACKET_IDS - self.first_offset) % PACKET_IDS;
        let Some(unacked) = self.unacked.get_mut(usize::from(index)).filter(|unacked| !unacked.acked) else {
            return false;
        };
        unacked.acked = true;
        let Unacked { flow, seq, .. } = *unacked;
        self.outstanding -= 1;
        let in_flight = &mut self.flows[flow as usize].in_flight;
        if let Ok(position) = in_flight.binary_search(&seq) {
            in_flight.remove(position);
        }
        self.mark_dirty(flow);
        while self.unacked.front().is_some_and(|unacked| unacked.acked) {
            self.unacked.pop_front();
            self.first_offset = (self.first_offset + 1) % PACKET_IDS;
        }
        true
    }
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
    rooms: Vec<Arc<str>>,
    /// What the last connection left unanswered.
    resumable: Vec<Taken>,
    will: Option<Box<OwnedWill>>,
    /// An announcement was not taken: the next tick tries again.
    announce_again: bool,
    inbox: Inbox,
}

impl Session {
    /// Admits a CONNECT and asks the user shard's owner to register it: CONNACK follows in [`Session::on_answer`].
    /// `connection` distinguishes the connections of this process; `authenticate` proves a user by a password.
    ///
    /// # Errors
    /// The reason for the CONNACK that refuses it.
    pub fn open(
        shared: &Arc<Shared>,
        shards: u32,
        now_ms: u64,
        connection: u64,
        connect: &Connect<'_>,
        authenticate: impl FnOnce(&str, Option<&[u8]>) -> Result<Identity, ConnectRefused>,
        effects: &mut Effects,
    ) -> Result<Self, ConnectRefused> {
        let refuse = |reason, text: &str| Err(ConnectRefused { reason, text: text.to_owned() });
        let v5 = connect.version == Version::V5;
        let user = match connect.username {
            Some(user) if is_name(user) => user,
            _ => {
                return refuse(
                    Reason::BadCredentials,
                    "the user name must be a user id: 1 to 64 of A-Z a-z 0-9 . _ @ -",
                );
            }
        };
        let device_assigned = connect.client_id.is_empty();
        let device = match connect.client_id {
            "" if !v5 && !connect.clean_start => {
                return refuse(Reason::ClientIdNotValid, "an empty client id needs Clean Session 1");
            }
            "" => format!("auto-{:016x}-{connection}", shared.boot),
            id if is_name(id) => id.to_owned(),
            _ => {
                return refuse(
                    Reason::ClientIdNotValid,
                    "the client id must be a device id: 1 to 64 of A-Z a-z 0-9 . _ @ -",
                );
            }
        };
        let will = match &connect.will {
            None => None,
            Some(will) if will.qos == 2 => return refuse(Reason::QosNotSupported, "the will's QoS must be 0 or 1"),
            Some(will) if will.retain => {
                return refuse(Reason::RetainNotSupported, "retained messages are not supported");
            }
            Some(will) => match PublishTopic::parse(will.topic) {
                Ok(PublishTopic::ToRoom(room)) => {
                    Some(Box::new(OwnedWill { room: room.into(), payload: Bytes::copy_from_slice(will.payload) }))
                }
                _ => return refuse(Reason::TopicNameInvalid, "a will is taken for r/{room} only"),
            },
        };
        let identity = authenticate(user, connect.password)?;
        let limits = &shared.limits;
        let session_expiry_s = match connect.session_expiry_s {
            Some(asked) => asked.min(limits.session_expiry_s_max),
            None if connect.clean_start => 0,
            None => limits.session_expiry_s_max,
        };
        let cap_s = limits.keep_alive_s_max;
        let keep_alive_s_told = (v5 && (connect.keep_alive_s == 0 || connect.keep_alive_s > cap_s)).then_some(cap_s);
        let keep_alive_s = keep_alive_s_told.unwrap_or(connect.keep_alive_s);
        let mut session = Self {
            shared: shared.clone(),
            shards,
            version: connect.version,
            problem_information: connect.problem_information,
            phase: Phase::Registering { since_ms: now_ms },
            user: user.into(),
            device: device.into(),
            device_assigned,
            connection,
            number: None,
            out: OutBuffer::default(),
            packet_size_max: connect.packet_size_max,
            session_expiry_s,
            keep_alive_s_told,
            silence_ms_max: u64::from(keep_alive_s) * 1_500,
            heard_ms: now_ms,
            expires_at_ms: identity.expires_at_ms,
            waiting: Vec::new(),
            next_ticket: 1,
            publishes_unanswered: 0,
            subscribes: Vec::new(),
            rooms: Vec::new(),
            resumable: Vec::new(),
            will,
            announce_again: false,
            inbox: Inbox {
                state: InboxState::Unsubscribed,
                flows: Vec::new(),
                flow_by_conversation: HashMap::new(),
                behind: VecDeque::new(),
                dirty: Vec::new(),
                fetches: 0,
                compare_again: false,
                unacked: VecDeque::new(),
                outstanding: 0,
                window: if v5 { connect.receive_maximum.min(WINDOW_MAX_V5) } else { WINDOW_V311 },
                ids_from: 1,
                first_offset: 0,
            },
        };
        let register = Register {
            user: session.user.to_string(),
            device: session.device.to_string(),
            number: None,
            clean_start: connect.clean_start,
            expiry_s: session_expiry_s,
            connection,
            subscribed: false,
            cursors: Vec::new(),
        };
        session.ask_user(now_ms, What::Register, body::Body::Register(register), effects);
        Ok(session)
    }

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
            && self.out.len() < OUT_BYTES_INPUT_STOP
            && self.waiting.len() < receive_maximum + WAITING_EXTRA_MAX
            && (self.version == Version::V5 || self.publishes_unanswered < receive_maximum)
    }

    /// Whether something waits to be written.
    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    /// Takes what waits to be written. [`Session::on_written`] has to follow when that is done.
    pub fn take_output(&mut self) -> OutBuffer {
        std::mem::take(&mut self.out)
    }

    /// The out-buffer drained: who waited for room in it goes on.
    pub fn on_written(&mut self, now_ms: u64, effects: &mut Effects) {
        if !self.inbox.behind.is_empty() {
            self.fetch(now_ms, effects);
        }
    }

    /// The router took a request of this session under an id.
    pub fn routed(&mut self, ticket: u32, request_id: u64) {
        if let Some(waiting) = self.waiting.iter_mut().find(|waiting| waiting.ticket == ticket) {
            waiting.request_id = request_id;
        }
    }

    // ---- from the client ----------------------------------------------------------------------------------------------

    /// A packet of the client. Only while [`Session::wants_input`].
    pub fn on_packet(&mut self, now_ms: u64, packet: Packet<'_>, effects: &mut Effects) {
        if self.phase != Phase::Live {
            return;
        }
        self.heard_ms = now_ms;
        match packet {
            Packet::Connect(_) => self.end(End::Server(Reason::ProtocolError, "a second CONNECT"), effects),
            Packet::Publish(publish) => self.on_publish(now_ms, &publish, effects),
            Packet::PubAck { packet_id } => {
                if self.inbox.acknowledged(packet_id) {
                    self.fetch(now_ms, effects);
                } else {
                    self.shared.metrics.unknown_puback.inc();
                }
            }
            Packet::Subscribe(subscribe) => self.on_subscribe(now_ms, &subscribe, effects),
            Packet::Unsubscribe { packet_id, filters } => self.on_unsubscribe(now_ms, packet_id, &filters, effects),
            Packet::PingReq => mqtt::pingresp(&mut self.out),
            Packet::Disconnect { session_expiry_s: Some(1..), .. }
                if self.version == Version::V5 && self.session_expiry_s == 0 =>
            {
                let text = "a session that ends with its connection can't be given an expiry in DISCONNECT";
                self.end(End::Server(Reason::ProtocolError, text), effects);
            }
            Packet::Disconnect { reason, session_expiry_s } => {
                let cap_s = self.shared.limits.session_expiry_s_max;
                let session_expiry_s = session_expiry_s.map(|asked| asked.min(cap_s));
                self.end(End::Client { will: reason != Reason::Success.code(), session_expiry_s }, effects);
            }
        }
    }

    /// Input that is no packet.
    pub fn on_bad_input(&mut self, error: DecodeError, effects: &mut Effects) {
        self.shared.metrics.refused(error.reason);
        self.end(End::Server(error.reason, error.what), effects);
    }

    fn on_publish(&mut self, now_ms: u64, publish: &Publish<'_>, effects: &mut Effects) {
        let fatal = if publish.qos == 2 {
            Some((Reason::QosNotSupported, "QoS 2 is not supported: use QoS 1 and the user property id"))
        } else if publish.retain {
            Some((Reason::RetainNotSupported, "retained messages are not supported"))
        } else if publish.topic_alias {
            Some((Reason::TopicAliasInvalid, "topic aliases are not supported"))
        } else if publish.qos == 1 && self.publishes_unanswered >= usize::from(self.shared.limits.receive_maximum) {
            Some((
                Reason::ReceiveMaximumExceeded,
                "more publishes without an answer than the announced Receive Maximum",
            ))
        } else {
            None
        };
        if let Some((reason, text)) = fatal {
            self.shared.metrics.refused(reason);
            return self.end(End::Server(reason, text), effects);
        }
        let hash = hash_of(publish);
        let in_use = self.waiting.iter().find_map(|waiting| match &waiting.what {
            What::Publish(taken) if publish.qos == 1 && taken.packet_id == publish.packet_id => {
                Some(taken.hash == hash && publish.dup)
            }
            _ => None,
        });
        match in_use {
            Some(true) => return, // its answer is under way
            Some(false) => {
                return self.refuse(
                    publish.packet_id,
                    publish.topic,
                    Reason::PacketIdInUse,
                    "the packet id waits for its answer",
                    effects,
                );
            }
            None => {}
        }
        let mut taken = Box::new(TakenPublish {
            packet_id: publish.packet_id,
            hash,
            key: None,
            topic: publish.topic.into(),
            mark: None,
        });
        let user = self.user.clone();
        let request = match PublishTopic::parse(publish.topic) {
            Ok(PublishTopic::ToUser(peer)) => self.send_to(ids::direct_conversation(&user, peer), publish, &mut taken),
            Ok(PublishTopic::ToGroup(group)) => self.send_to(ids::group_conversation(group), publish, &mut taken),
            Ok(PublishTopic::ReadUser(peer)) => {
                self.mark_read(ids::direct_conversation(&user, peer), publish, &mut taken)
            }
            Ok(PublishTopic::ReadGroup(group)) => self.mark_read(ids::group_conversation(group), publish, &mut taken),
            Ok(PublishTopic::ToRoom(room)) => {
                let shard = self.shard_of_room(room);
                let (sender, device) = (user.to_string(), self.device.to_string());
                let payload = Bytes::copy_from_slice(publish.payload);
                Ok((shard, 0, body::Body::RoomPublish(RoomPublish { room: room.to_owned(), sender, device, payload })))
            }
            Ok(PublishTopic::Like(_)) => Err((Reason::ImplementationSpecific, "likes are not available yet")),
            Err(TopicError::Unknown | TopicError::Wildcard) => Err((
                Reason::TopicNameInvalid,
                "unknown topic: use u/{user}, g/{group}, read/u/{peer}, read/g/{group} or r/{room}",
            )),
        };
        match request {
            Ok((shard, order, body)) => {
                self.shared.metrics.accepted.inc();
                self.publishes_unanswered += usize::from(publish.qos == 1);
                self.ask(now_ms, What::Publish(taken), shard, order, body, effects);
            }
            Err((reason, text)) => self.refuse(publish.packet_id, publish.topic, reason, text, effects),
        }
    }

    #[allow(clippy::type_complexity)]
    fn send_to(
        &mut self,
        conversation: String,
        publish: &Publish<'_>,
        taken: &mut TakenPublish,
    ) -> Result<(u32, u64, body::Body), (Reason, &'static str)> {
        let client_id = match publish.id {
            Some(id) if id.is_empty() || id.len() > CLIENT_MESSAGE_ID_BYTES_MAX || id.chars().any(char::is_control) => {
                return Err((Reason::ImplementationSpecific, "the user property id must be 1 to 64 printable bytes"));
            }
            id => id.unwrap_or_default(),
        };
        if client_id.is_empty() {
            taken.key = Some(self.key_for(publish, taken.hash));
        }
        let order = order_group(self.connection, &conversation);
        let shard = shard_of(&conversation, self.shards);
        let send = Send {
            conversation,
            sender: self.user.to_string(),
            device: self.device.to_string(),
            client_id: client_id.to_owned(),
            key: taken.key.map(|key| Bytes::copy_from_slice(&key)).unwrap_or_default(),
            payload: Bytes::copy_from_slice(publish.payload),
        };
        Ok((shard, order, body::Body::Send(send)))
    }

    /// A DUP of what the last connection left unanswered goes under its old key, so that it is stored once.
    fn key_for(&mut self, publish: &Publish<'_>, hash: u64) -> [u8; 16] {
        let matches = |taken: &Taken| taken.packet_id == u32::from(publish.packet_id) && taken.hash == hash;
        if publish.dup
            && let Some(index) = self.resumable.iter().position(matches)
            && let Ok(key) = <[u8; 16]>::try_from(&self.resumable.swap_remove(index).key[..])
        {
            return key;
        }
        self.shared.key()
    }

    #[allow(clippy::type_complexity)]
    fn mark_read(
        &self,
        conversation: String,
        publish: &Publish<'_>,
        taken: &mut TakenPublish,
    ) -> Result<(u32, u64, body::Body), (Reason, &'static str)> {
        let seq =
            std::str::from_utf8(publish.payload).ok().and_then(|text| text.trim().parse().ok()).filter(|seq| *seq > 0);
        let seq: u64 =
            seq.ok_or((Reason::PayloadFormatInvalid, "the payload must be a seq: a decimal number from 1"))?;
        let shard = shard_of(&conversation, self.shards);
        taken.mark = Some((conversation.clone(), seq));
        Ok((shard, 0, body::Body::MarkRead(MarkRead { conversation, user: self.user.to_string(), seq })))
    }

    fn on_subscribe(&mut self, now_ms: u64, subscribe: &mqtt::Subscribe<'_>, effects: &mut Effects) {
        if subscribe.has_identifier {
            let reason = Reason::SubscriptionIdsNotSupported;
            self.shared.metrics.refused(reason);
            return self.end(End::Server(reason, "subscription identifiers are not supported"), effects);
        }
        if self.subscribes.len() >= SUBSCRIBES_WAITING_MAX {
            self.shared.metrics.refused(Reason::QuotaExceeded);
            let codes = vec![Reason::QuotaExceeded.code(); subscribe.filters.len()];
            return mqtt::suback(
                &mut self.out,
                self.version,
                subscribe.packet_id,
                &codes,
                "too many SUBSCRIBEs wait for their SUBACK",
            );
        }
        let packet_id = subscribe.packet_id;
        let count = subscribe.filters.len();
        self.subscribes.push(PendingSubscribe {
            packet_id,
            codes: vec![UNANSWERED; count],
            unanswered: count,
            reason: "",
        });
        for (index, (filter, qos)) in subscribe.filters.iter().enumerate() {
            let refusal = match Subscription::parse(filter) {
                _ if index >= FILTERS_MAX => (Reason::QuotaExceeded, "at most 64 topic filters a SUBSCRIBE"),
                Ok(Subscription::Inbox) => {
                    self.subscribe_inbox(now_ms, packet_id, index, effects);
                    continue;
                }
                Ok(Subscription::Room(room)) if self.rooms.iter().any(|r| **r == *room) => {
                    self.granted(packet_id, index, 0);
                    continue;
                }
                Ok(Subscription::Room(_)) if self.rooms.len() >= ROOMS_MAX => {
                    (Reason::QuotaExceeded, "at most 64 rooms a connection")
                }
                Ok(Subscription::Room(room)) => {
                    let room = Arc::<str>::from(room);
                    self.rooms.push(room.clone());
                    let ticket = self.wait(now_ms, What::EnterRoom { packet_id, filter: index, room: room.clone() });
                    effects.rooms.push(RoomEffect::Enter { room, ticket });
                    let _ = qos; // rooms are QoS 0, whatever was asked
                    continue;
                }
                Ok(Subscription::RoomStats(_)) => (Reason::ImplementationSpecific, "room stats are not available yet"),
                Err(_) if filter.starts_with("$share/") => {
                    (Reason::SharedSubscriptionsNotSupported, "shared subscriptions are not supported")
                }
                Err(TopicError::Wildcard) => (Reason::TopicFilterInvalid, "of wildcards, only inbox/# is served"),
                Err(TopicError::Unknown) => {
                    (Reason::TopicFilterInvalid, "unknown topic filter: use inbox/# or r/{room}")
                }
            };
            self.not_granted(packet_id, index, refusal);
        }
    }

    fn granted(&mut self, packet_id: u16, filter: usize, code: u8) {
        let Some(position) = self.subscribes.iter().position(|pending| pending.packet_id == packet_id) else { return };
        let pending = &mut self.subscribes[position];
        if let Some(slot) = pending.codes.get_mut(filter)
            && std::mem::replace(slot, code) == UNANSWERED
        {
            pending.unanswered -= 1;
        }
        if pending.unanswered == 0 {
            let pending = self.subscribes.remove(position);
            let reason = if self.problem_information { pending.reason } else { "" };
            mqtt::suback(&mut self.out, self.version, packet_id, &pending.codes, reason);
        }
    }

    fn not_granted(&mut self, packet_id: u16, filter: usize, (reason, text): (Reason, &'static str)) {
        self.shared.metrics.refused(reason);
        if let Some(pending) = self.subscribes.iter_mut().find(|pending| pending.packet_id == packet_id) {
            pending.reason = text;
        }
        self.granted(packet_id, filter, reason.code());
    }

    fn subscribe_inbox(&mut self, now_ms: u64, packet_id: u16, filter: usize, effects: &mut Effects) {
        match &mut self.inbox.state {
            InboxState::Subscribed => self.granted(packet_id, filter, 1),
            InboxState::Subscribing(subscribing) => subscribing.waiters.push((packet_id, filter)),
            InboxState::Unsubscribed => {
                let heads_left = self.ask_heads(now_ms, || What::HeadsToSubscribe, effects);
                self.inbox.state =
                    InboxState::Subscribing(Box::new(Subscribing { waiters: vec![(packet_id, filter)], heads_left }));
                if heads_left == 0 {
                    self.write_subscription(now_ms, effects);
                }
            }
        }
    }

    /// Asks for the heads of all conversations, one batch per owner's shard. Returns the number of batches.
    fn ask_heads(&mut self, now_ms: u64, what: impl Fn() -> What, effects: &mut Effects) -> usize {
        let mut batches = BTreeMap::<u32, Vec<String>>::new();
        for flow in &self.inbox.flows {
            batches.entry(shard_of(&flow.conversation, self.shards)).or_default().push(flow.conversation.to_string());
        }
        let count = batches.len();
        for (shard, conversations) in batches {
            let heads = Heads { user: self.user.to_string(), conversations };
            self.ask(now_ms, what(), shard, 0, body::Body::Heads(heads), effects);
        }
        count
    }

    fn write_subscription(&mut self, now_ms: u64, effects: &mut Effects) {
        let subscribe = Subscribe {
            user: self.user.to_string(),
            device: self.device.to_string(),
            number: self.number,
            subscribed: true,
            cursors: self.cursors(),
        };
        self.ask_user(now_ms, What::SubscribeInbox, body::Body::Subscribe(subscribe), effects);
    }

    fn subscription_failed(&mut self, refusal: (Reason, &'static str)) {
        if let InboxState::Subscribing(subscribing) = std::mem::replace(&mut self.inbox.state, InboxState::Unsubscribed)
        {
            for (packet_id, filter) in subscribing.waiters {
                self.not_granted(packet_id, filter, refusal);
            }
        }
    }

    fn on_unsubscribe(&mut self, now_ms: u64, packet_id: u16, filters: &[&str], effects: &mut Effects) {
        let mut inbox = false;
        let mut codes = Vec::with_capacity(filters.len());
        for filter in filters {
            let existed = match Subscription::parse(filter) {
                Ok(Subscription::Inbox) if matches!(self.inbox.state, InboxState::Subscribed) => {
                    inbox = true;
                    true
                }
                Ok(Subscription::Room(room)) => match self.rooms.iter().position(|r| **r == *room) {
                    Some(position) => {
                        effects.rooms.push(RoomEffect::Leave { room: self.rooms.swap_remove(position) });
                        true
                    }
                    None => false,
                },
                _ => false,
            };
            codes.push(if existed { Reason::Success } else { Reason::NoSubscriptionExisted }.code());
        }
        if !inbox {
            return mqtt::unsuback(&mut self.out, self.version, packet_id, &codes);
        }
        self.inbox.state = InboxState::Unsubscribed;
        let unsubscribe = Subscribe {
            user: self.user.to_string(),
            device: self.device.to_string(),
            number: self.number,
            subscribed: false,
            cursors: Vec::new(),
        };
        self.ask_user(now_ms, What::UnsubscribeInbox { packet_id, codes }, body::Body::Subscribe(unsubscribe), effects);
    }

    // ---- answers ------------------------------------------------------------------------------------------------------

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
            What::HeadsToCompare => match answer {
                Answer::Outcome(Outcome::Heads(list)) => {
                    for head in &list.heads {
                        let Some(&index) = self.inbox.flow_by_conversation.get(head.conversation.as_str()) else {
                            continue;
                        };
                        let flow = &mut self.inbox.flows[index as usize];
                        flow.head = flow.head.max(head.head);
                        self.inbox.mark_behind(index);
                        self.tell_marks(index, head.own_mark, head.peer_mark);
                    }
                    self.fetch(now_ms, effects);
                }
                _ => self.inbox.compare_again = true,
            },
            What::SubscribeInbox => match answer {
                Answer::Outcome(Outcome::Done(_)) => {
                    if let InboxState::Subscribing(subscribing) =
                        std::mem::replace(&mut self.inbox.state, InboxState::Subscribed)
                    {
                        for (packet_id, filter) in subscribing.waiters {
                            self.granted(packet_id, filter, 1);
                        }
                    }
                    (0..self.inbox.flows.len() as u32).for_each(|index| self.inbox.mark_behind(index));
                    self.fetch(now_ms, effects);
                }
                Answer::Outcome(Outcome::Refused(refused)) if refused.code() == Refusal::StaleSession => {
                    self.taken_over(effects)
                }
                answer => self.subscription_failed(refusal_of(&answer).0),
            },
            What::UnsubscribeInbox { packet_id, codes } => match answer {
                Answer::Outcome(Outcome::Done(_)) => mqtt::unsuback(&mut self.out, self.version, packet_id, &codes),
                Answer::Outcome(Outcome::Refused(refused)) if refused.code() == Refusal::StaleSession => {
                    self.taken_over(effects)
                }
                answer => {
                    if matches!(self.inbox.state, InboxState::Unsubscribed) {
                        self.inbox.state = InboxState::Subscribed;
                    }
                    let ((reason, _), _) = refusal_of(&answer);
                    let codes = vec![reason.code(); codes.len()];
                    mqtt::unsuback(&mut self.out, self.version, packet_id, &codes);
                }
            },
            What::EnterRoom { packet_id, filter, room } => match answer {
                Answer::Outcome(Outcome::Done(_)) => self.granted(packet_id, filter, 0),
                answer => {
                    self.rooms.retain(|entered| *entered != room);
                    effects.rooms.push(RoomEffect::Leave { room });
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

    fn on_registered(&mut self, now_ms: u64, answer: Answer, effects: &mut Effects) {
        let registered = match answer {
            Answer::Outcome(Outcome::Registered(registered)) => registered,
            answer => {
                let ((reason, text), _) = refusal_of(&answer);
                let reason = if reason == Reason::NotAuthorized { reason } else { Reason::ServerUnavailable };
                return self.refuse_connect(reason, text, effects);
            }
        };
        let Registered { number, session_present, subscribed, connections, index, cursors, taken } = registered;
        self.number = number;
        self.inbox.ids_from = 1 + (connections % 15) as u16 * PACKET_IDS;
        for row in &index {
            self.inbox.merge(row);
        }
        for cursor in &cursors {
            let flow = self.inbox.flow(&cursor.conversation, cursor.seq + 1);
            self.inbox.flows[flow as usize].next = cursor.seq + 1;
        }
        self.resumable = taken;
        self.phase = Phase::Live;
        let limits = &self.shared.limits;
        let welcome = Welcome {
            session_present,
            session_expiry_s: self.session_expiry_s,
            receive_maximum: limits.receive_maximum,
            packet_size_max: limits.packet_size_max,
            assigned_client_id: self.device_assigned.then_some(&self.device),
            server_keep_alive_s: self.keep_alive_s_told,
        };
        mqtt::connack(&mut self.out, self.version, &welcome);
        if session_present && subscribed {
            self.inbox.state = InboxState::Subscribed;
            self.compare_heads(now_ms, effects);
        }
    }

    fn refuse_connect(&mut self, reason: Reason, text: &'static str, effects: &mut Effects) {
        self.shared.metrics.refused(reason);
        mqtt::connack_refused(&mut self.out, self.version, reason, text);
        self.will = None;
        self.end(End::Broken, effects);
    }

    fn compare_heads(&mut self, now_ms: u64, effects: &mut Effects) {
        self.inbox.compare_again = false;
        if matches!(self.inbox.state, InboxState::Subscribed) {
            self.ask_heads(now_ms, || What::HeadsToCompare, effects);
        }
    }

    fn on_heads_to_subscribe(&mut self, now_ms: u64, answer: Answer, effects: &mut Effects) {
        let list = match answer {
            Answer::Outcome(Outcome::Heads(list)) => list,
            answer => return self.subscription_failed(refusal_of(&answer).0),
        };
        let InboxState::Subscribing(subscribing) = &mut self.inbox.state else { return };
        subscribing.heads_left -= 1;
        let done = subscribing.heads_left == 0;
        for head in &list.heads {
            let Some(&index) = self.inbox.flow_by_conversation.get(head.conversation.as_str()) else { continue };
            let flow = &mut self.inbox.flows[index as usize];
            // The row's from_seq is where the flow stands; a new session begins at what is unread, at most the newest `catch_up`.
            let cursor = head.own_mark.max(head.head.saturating_sub(self.shared.limits.catch_up)).max(flow.next - 1);
            flow.advance_to(cursor + 1);
            flow.head = flow.head.max(head.head);
            self.tell_marks(index, head.own_mark, head.peer_mark);
        }
        if done {
            self.write_subscription(now_ms, effects);
        }
    }

    fn on_publish_answered(&mut self, taken: TakenPublish, answer: Answer, effects: &mut Effects) {
        self.publishes_unanswered -= usize::from(taken.packet_id != 0);
        let acked: &[(&str, &str)] = match answer {
            Answer::Outcome(Outcome::Stored(stored)) => {
                self.shared.metrics.acked.inc();
                // A conversation that is not known yet becomes so by the owner's push, which says where it starts.
                if let Some(conversation) = conversation_of(&self.user, &taken.topic)
                    && let Some(&index) = self.inbox.flow_by_conversation.get(conversation.as_str())
                {
                    self.inbox.flows[index as usize].own_stored(stored.seq);
                    self.inbox.mark_dirty(index);
                }
                if taken.packet_id == 0 {
                    return;
                }
                let (seq, ts) = (Digits::new(stored.seq), Digits::new(stored.ts_ms.unsigned_abs()));
                return self.success(taken.packet_id, &[("seq", seq.as_str()), ("ts", ts.as_str())]);
            }
            Answer::Outcome(Outcome::Marked(marked)) => {
                if let Some((conversation, _)) = &taken.mark
                    && let Some(&index) = self.inbox.flow_by_conversation.get(conversation.as_str())
                {
                    let flow = &mut self.inbox.flows[index as usize];
                    flow.own_mark_told = flow.own_mark_told.max(marked.seq);
                }
                if taken.packet_id == 0 {
                    return;
                }
                let seq = Digits::new(marked.seq);
                return self.success(taken.packet_id, &[("seq", seq.as_str())]);
            }
            Answer::Outcome(Outcome::Done(_)) => &[],
            answer => {
                let ((reason, text), _) = refusal_of(&answer);
                return self.refuse(taken.packet_id, &taken.topic, reason, text, effects);
            }
        };
        if taken.packet_id != 0 {
            self.success(taken.packet_id, acked);
        }
    }

    fn success(&mut self, packet_id: u16, user_properties: &[(&str, &str)]) {
        let user_properties = if self.problem_information { user_properties } else { &[] };
        mqtt::puback(&mut self.out, self.version, packet_id, Reason::Success, "", user_properties);
    }

    /// Refuses a publish: MQTT 5 by the code; 3.1.1, which has no negative PUBACK, by a notice, or for now by ending.
    fn refuse(&mut self, packet_id: u16, topic: &str, reason: Reason, text: &'static str, effects: &mut Effects) {
        self.shared.metrics.refused(reason);
        if packet_id == 0 {
            return;
        }
        let for_now = matches!(reason, Reason::QuotaExceeded | Reason::Unspecified);
        match self.version {
            Version::V5 => {
                let text = if self.problem_information { text } else { "" };
                mqtt::puback(&mut self.out, self.version, packet_id, reason, text, &[]);
            }
            Version::V311 if for_now || !matches!(self.inbox.state, InboxState::Subscribed) => {
                self.end(End::Server(reason, text), effects);
            }
            Version::V311 => {
                let notice = serde_json::json!({ "packetId": packet_id, "topic": topic, "reason": reason.name() });
                let payload = Bytes::from(notice.to_string());
                let delivery =
                    Delivery { topic: &[topic::REFUSED_TOPIC], packet_id: 0, user_properties: &[], payload: &payload };
                delivery.encode(&mut self.out, self.version);
                mqtt::puback(&mut self.out, self.version, packet_id, Reason::Success, "", &[]);
            }
        }
    }

    // ---- delivery -----------------------------------------------------------------------------------------------------

    /// A message for this session's user.
    pub fn on_deliver(&mut self, now_ms: u64, deliver: &Deliver, recipient: &Recipient, effects: &mut Effects) {
        let Some(entry) = &deliver.entry else { return };
        if self.phase != Phase::Live {
            return; // a registration that is under way compares heads
        }
        let index = self.inbox.flow(&deliver.conversation, recipient.from_seq);
        let own = self.is_own(entry);
        let room = self.inbox.room(&self.out) > 0;
        let flow = &mut self.inbox.flows[index as usize];
        if recipient.as_of >= flow.as_of {
            flow.as_of = recipient.as_of;
            flow.to_seq = recipient.to_seq;
        }
        if entry.seq < flow.next || flow.to_seq != 0 && entry.seq > flow.to_seq {
            return;
        }
        match self.inbox.state {
            InboxState::Unsubscribed => {}
            InboxState::Subscribed if entry.seq == flow.next && !flow.fetching && !flow.queued && (own || room) => {
                flow.head = flow.head.max(entry.seq);
                self.deliver(index, entry);
                self.inbox.mark_behind(index);
                self.fetch(now_ms, effects);
            }
            InboxState::Subscribing(_) | InboxState::Subscribed => {
                flow.head = flow.head.max(entry.seq);
                if matches!(self.inbox.state, InboxState::Subscribed) {
                    self.inbox.mark_behind(index);
                    self.fetch(now_ms, effects);
                }
            }
        }
    }

    fn is_own(&self, entry: &Entry) -> bool {
        entry.kind() == EntryKind::Message && entry.sender == *self.user && entry.device == *self.device
    }

    /// Sends an entry, which is the flow's next, or passes over it if it is the session's own or the client can't take its size.
    fn deliver(&mut self, index: u32, entry: &Entry) {
        let own = self.is_own(entry);
        self.inbox.flows[index as usize].advance_to(entry.seq + 1);
        self.inbox.mark_dirty(index);
        if own {
            return;
        }
        let conversation = self.inbox.flows[index as usize].conversation.clone();
        let (kind, name) = match Conversation::parse(&conversation) {
            Ok(Conversation::Group(group)) => ("g", group),
            Ok(direct) => match direct.peer_of(&self.user) {
                Some(peer) => ("u", peer),
                None => return,
            },
            Err(_) => return,
        };
        let from = if entry.kind() == EntryKind::System { SYSTEM_SENDER } else { &entry.sender };
        let (seq, ts) = (Digits::new(entry.seq), Digits::new(entry.ts_ms.unsigned_abs()));
        let topic = ["inbox", kind, name, from, seq.as_str()];
        let properties = [("seq", seq.as_str()), ("ts", ts.as_str()), ("id", entry.client_id.as_str())];
        let mut delivery = Delivery {
            topic: if self.version == Version::V5 { &topic[..4] } else { &topic },
            packet_id: 1, // any, for the size
            user_properties: if entry.client_id.is_empty() { &properties[..2] } else { &properties },
            payload: &entry.payload,
        };
        if self.packet_size_max.is_some_and(|max| delivery.size(self.version) > max as usize) {
            self.shared.metrics.too_large_for_client.inc();
            return;
        }
        delivery.packet_id = self.inbox.next_packet_id(index, entry.seq);
        delivery.encode(&mut self.out, self.version);
        self.shared.metrics.delivered.inc();
    }

    /// Fetches what is missing, as far as the window allows.
    fn fetch(&mut self, now_ms: u64, effects: &mut Effects) {
        while self.inbox.fetches < FETCHES_MAX {
            let room = self.inbox.room(&self.out);
            if room == 0 {
                return;
            }
            let Some(index) = self.inbox.behind.pop_front() else { return };
            let flow = &mut self.inbox.flows[index as usize];
            flow.queued = false;
            if !flow.is_behind() {
                continue;
            }
            flow.fetching = true;
            let (from, head_before) = (flow.next, flow.head);
            let fetch = Fetch {
                conversation: flow.conversation.to_string(),
                user: self.user.to_string(),
                from,
                limit: room.min(FETCH_ENTRIES_MAX) as u32,
                bytes_max: FETCH_BYTES_MAX,
                backward: false,
            };
            let shard = shard_of(&fetch.conversation, self.shards);
            self.inbox.fetches += 1;
            self.ask(
                now_ms,
                What::Fetch { flow: index, from, head_before },
                shard,
                0,
                body::Body::Fetch(fetch),
                effects,
            );
        }
    }

    fn on_fetched(
        &mut self,
        now_ms: u64,
        index: u32,
        from: u64,
        head_before: u64,
        answer: Answer,
        effects: &mut Effects,
    ) {
        self.inbox.fetches -= 1;
        self.inbox.flows[index as usize].fetching = false;
        match answer {
            Answer::Outcome(Outcome::Fetched(fetched)) => self.take_fetched(index, from, head_before, &fetched),
            answer => {
                let (_, for_now) = refusal_of(&answer);
                if for_now {
                    return self.inbox.mark_behind(index); // taken up again by the next tick or acknowledgement
                }
                let flow = &mut self.inbox.flows[index as usize];
                flow.head = flow.next - 1;
            }
        }
        self.inbox.mark_behind(index);
        self.fetch(now_ms, effects);
    }

    fn take_fetched(&mut self, index: u32, from: u64, head_before: u64, fetched: &Fetched) {
        if !matches!(self.inbox.state, InboxState::Subscribed) {
            return;
        }
        let mut all = true;
        for entry in &fetched.entries {
            let flow = &self.inbox.flows[index as usize];
            if entry.seq < flow.next {
                continue;
            }
            if flow.to_seq != 0 && entry.seq > flow.to_seq {
                break;
            }
            if !self.is_own(entry) && self.inbox.room(&self.out) == 0 {
                all = false;
                break;
            }
            self.deliver(index, entry);
        }
        let flow = &mut self.inbox.flows[index as usize];
        if all {
            flow.advance_to(fetched.next);
            flow.head = flow.head.max(fetched.head);
            if flow.next == from && flow.head == head_before {
                // Nothing there that this user may see, whatever the hint said.
                flow.head = flow.next - 1;
            }
            self.inbox.mark_dirty(index);
        }
    }

    /// Somebody read up to a seq: the peer, or the user himself elsewhere.
    pub fn on_read_state(&mut self, conversation: &str, reader: &str, seq: u64) {
        if self.phase != Phase::Live {
            return;
        }
        let Some(&index) = self.inbox.flow_by_conversation.get(conversation) else { return };
        if *reader == *self.user { self.tell_marks(index, seq, 0) } else { self.tell_marks(index, 0, seq) }
    }

    /// Tells read marks that are higher than the last ones told. Unsubscribed clients are told nothing, slow ones later.
    fn tell_marks(&mut self, index: u32, own: u64, peer: u64) {
        if matches!(self.inbox.state, InboxState::Unsubscribed) {
            return;
        }
        let flow = &mut self.inbox.flows[index as usize];
        let (kind, name, other) = match Conversation::parse(&flow.conversation) {
            Ok(Conversation::Group(group)) => ("g", group, None),
            Ok(direct) => match direct.peer_of(&self.user) {
                Some(peer) => ("u", peer, Some(peer)),
                None => return,
            },
            Err(_) => return,
        };
        let marks = [(own, &mut flow.own_mark_told, Some(&*self.user)), (peer, &mut flow.peer_mark_told, other)];
        for (seq, told, reader) in marks {
            let Some(reader) = reader else { continue };
            if seq <= *told || self.out.len() >= OUT_BYTES_HIGH {
                continue;
            }
            *told = seq;
            let payload = Bytes::copy_from_slice(Digits::new(seq).as_str().as_bytes());
            let topic = ["inbox", "read", kind, name];
            let delivery =
                Delivery { topic: &topic, packet_id: 0, user_properties: &[("from", reader)], payload: &payload };
            delivery.encode(&mut self.out, self.version);
        }
    }

    /// A room's message, encoded once per version for all its viewers. A viewer that can't keep up loses it.
    pub fn on_room_message(&mut self, encoded: &Bytes) {
        if self.phase != Phase::Live {
            return;
        }
        if self.out.len() >= OUT_BYTES_HIGH || self.packet_size_max.is_some_and(|max| encoded.len() > max as usize) {
            self.shared.metrics.room_dropped.inc();
        } else {
            self.out.put(encoded);
            self.shared.metrics.delivered.inc();
        }
    }

    // ---- presence -----------------------------------------------------------------------------------------------------

    /// The user's shard has a new owner or a new link: the session has to be told again.
    pub fn announce(&mut self, now_ms: u64, effects: &mut Effects) {
        if self.phase != Phase::Live {
            return; // its registration is sent again by the router
        }
        if let Some(position) = self.waiting.iter().position(|waiting| matches!(waiting.what, What::Announce)) {
            effects.cancel.push(self.waiting.remove(position).request_id);
        }
        let register = Register {
            user: self.user.to_string(),
            device: self.device.to_string(),
            number: self.number,
            clean_start: false,
            expiry_s: self.session_expiry_s,
            connection: self.connection,
            subscribed: matches!(self.inbox.state, InboxState::Subscribed),
            cursors: self.cursors(),
        };
        self.ask_user(now_ms, What::Announce, body::Body::Register(register), effects);
    }

    /// The owner ends a session: ours, if it is the named one or an older one.
    pub fn on_kick(&mut self, kick: &KickSession, effects: &mut Effects) {
        let order = |number: Option<SessionNumber>| number.map(|number| (number.epoch, number.counter));
        if self.phase != Phase::Live || *self.device != *kick.device || order(self.number) > order(kick.number) {
            return;
        }
        match kick.reason() {
            KickReason::Administrative => {
                self.shared.metrics.kicked.inc();
                self.end(End::Server(Reason::AdministrativeAction, "ended by an administrator"), effects);
            }
            KickReason::TakenOver | KickReason::Unspecified => self.taken_over(effects),
        }
    }

    fn taken_over(&mut self, effects: &mut Effects) {
        self.shared.metrics.kicked.inc();
        self.end(End::Server(Reason::SessionTakenOver, "the session goes on in another connection"), effects);
    }

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
        if self.inbox.compare_again {
            self.compare_heads(now_ms, effects);
        }
        self.fetch(now_ms, effects);
        self.send_cursors(now_ms, effects);
        if self.waiting.is_empty() {
            self.waiting = Vec::new();
            self.subscribes.shrink_to_fit();
        }
    }

    fn send_cursors(&mut self, now_ms: u64, effects: &mut Effects) {
        let under_way = self.waiting.iter().any(|waiting| matches!(waiting.what, What::Cursors));
        if self.inbox.dirty.is_empty() || under_way || !matches!(self.inbox.state, InboxState::Subscribed) {
            return;
        }
        let mut cursors = Vec::with_capacity(self.inbox.dirty.len());
        for index in std::mem::take(&mut self.inbox.dirty) {
            let flow = &mut self.inbox.flows[index as usize];
            flow.dirty = false;
            cursors.push(Cursor { conversation: flow.conversation.to_string(), seq: flow.acked() });
        }
        let cursors =
            Cursors { user: self.user.to_string(), device: self.device.to_string(), number: self.number, cursors };
        self.ask_user(now_ms, What::Cursors, body::Body::Cursors(cursors), effects);
    }

    fn cursors(&self) -> Vec<Cursor> {
        let cursor = |flow: &Flow| Cursor { conversation: flow.conversation.to_string(), seq: flow.acked() };
        self.inbox.flows.iter().map(cursor).collect()
    }

    // ---- the end ------------------------------------------------------------------------------------------------------

    /// The connection ends: what was not answered is dropped, the owner learns how far the client got.
    pub fn end(&mut self, end: End, effects: &mut Effects) {
        if self.phase == Phase::Ended {
            return;
        }
        let registering = matches!(self.phase, Phase::Registering { .. });
        self.phase = Phase::Ended;
        let (will, session_expiry_s) = match end {
            End::Client { will, session_expiry_s } => (will, session_expiry_s),
            End::Broken => (true, None),
            End::Server(reason, text) => {
                if registering {
                    mqtt::connack_refused(&mut self.out, self.version, reason, text);
                } else {
                    mqtt::disconnect(&mut self.out, self.version, reason, text);
                }
                (!registering, None)
            }
        };
        for room in self.rooms.drain(..) {
            effects.rooms.push(RoomEffect::Leave { room });
        }
        if let Some(number) = self.number {
            debug_assert!(!registering, "{number:?} before Registered");
            self.send_close(session_expiry_s, effects);
        }
        // A registration stays: its answer names the session that then has to be closed.
        for waiting in std::mem::take(&mut self.waiting) {
            match waiting.what {
                What::Register => self.waiting.push(waiting),
                _ if waiting.request_id != 0 => effects.cancel.push(waiting.request_id),
                _ => {}
            }
        }
        if let Some(will) = self.will.take().filter(|_| will && self.number.is_some()) {
            let OwnedWill { room, payload } = *will;
            let (sender, device) = (self.user.to_string(), self.device.to_string());
            let shard = self.shard_of_room(&room);
            let body = body::Body::RoomPublish(RoomPublish { room: room.into(), sender, device, payload });
            effects.requests.push(SessionRequest { ticket: None, shard, order: 0, body: Body { body: Some(body) } });
        }
        self.inbox.flows = Vec::new();
        self.inbox.flow_by_conversation = HashMap::new();
        self.inbox.behind = VecDeque::new();
        self.inbox.dirty = Vec::new();
    }

    fn send_close(&mut self, expiry_s: Option<u32>, effects: &mut Effects) {
        let mut taken = std::mem::take(&mut self.resumable);
        for waiting in &self.waiting {
            if let What::Publish(publish) = &waiting.what
                && let Some(key) = publish.key
                && publish.packet_id != 0
            {
                taken.retain(|old| old.packet_id != u32::from(publish.packet_id));
                let key = Bytes::copy_from_slice(&key);
                taken.push(Taken { packet_id: publish.packet_id.into(), hash: publish.hash, key });
            }
        }
        let subscribed = matches!(self.inbox.state, InboxState::Subscribed);
        let close = Close {
            user: self.user.to_string(),
            device: self.device.to_string(),
            number: self.number,
            cursors: if subscribed { self.cursors() } else { Vec::new() },
            taken,
            expiry_s,
        };
        let shard = shard_of(&self.user, self.shards);
        effects.requests.push(SessionRequest {
            ticket: None,
            shard,
            order: 0,
            body: Body { body: Some(body::Body::Close(close)) },
        });
    }

    // ---- requests -----------------------------------------------------------------------------------------------------

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
}

/// The key whose shard owns a room.
pub fn room_key(room: &str) -> String {
    format!("r/{room}")
}

fn conversation_of(user: &str, topic: &str) -> Option<String> {
    match PublishTopic::parse(topic) {
        Ok(PublishTopic::ToUser(peer)) => Some(ids::direct_conversation(user, peer)),
        Ok(PublishTopic::ToGroup(group)) => Some(ids::group_conversation(group)),
        _ => None,
    }
}

/// By which a publish sent again is known: xxh3 of topic, a zero byte and payload.
fn hash_of(publish: &Publish<'_>) -> u64 {
    let mut hash = Xxh3Default::new();
    hash.update(publish.topic.as_bytes());
    hash.update(&[0]);
    hash.update(publish.payload);
    hash.digest()
}

fn order_group(connection: u64, conversation: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(conversation.as_bytes(), connection).max(1)
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
