//! The history checker: what every client sent, was told and saw, message by message, against the system's invariants.
//!
//! A [`History`] takes [`Event`]s in the order in which the clients saw them and folds them at once into compact records
//! (some 80 bytes for each message, one bit for each delivery), so that a million messages fit well below a GiB.
//! [`History::check`] then judges. Both are pure: time is a parameter, nothing is random.
//!
//! What is held, in the words of the design's invariants 1 and 2:
//! - an acknowledged message reaches every session of everyone who was a member at its `seq`, except the very session that
//!   sent it ([`Kind::Lost`]);
//! - a message is stored once and comes once within a connection ([`Kind::Duplicated`]);
//! - it comes in the order of `seq`, nothing skipped within a session, and one connection's messages to one conversation
//!   get their `seq` in the order of sending ([`Kind::Reordered`]);
//! - `seq` is 1, 2, 3 … without holes ([`Kind::Gap`]), one `seq` is one message, unchanged ([`Kind::Collision`],
//!   [`Kind::Corrupted`]), nobody sees what nobody wrote ([`Kind::Invented`]) or what is not for him ([`Kind::Trespass`]);
//! - what was refused is not stored ([`Kind::Refused`]), and a session that did not expire is still there at the next
//!   login ([`Kind::SessionLost`]).
//!
//! What can't be known is not judged: a message whose acknowledgement never came may be stored or not.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    hash::{DefaultHasher, Hasher},
    time::Duration,
};

use hdrhistogram::Histogram;

/// Violations kept as text; all of them are counted.
const VIOLATION_TEXTS_MAX: usize = 100;
/// A `seq` that jumps further ahead than this can't be true; it is reported instead of allocated for.
const SEQ_JUMP_MAX: u64 = 1_000_000;
/// Latencies above this are counted as this.
const LATENCY_MICROS_MAX: u64 = 600_000_000;

/// A person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserId(u32);

/// A person's device: what has a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(u32);

/// A 1:1 or a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConversationId(u32);

/// A message's id; on the wire 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(pub u64);

impl MessageId {
    /// Reads the form on the wire; `None` = somebody else's id.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() == 16 { u64::from_str_radix(text, 16).ok().map(Self) } else { None }
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:016x}", self.0)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{self}")
    }
}

/// A short fingerprint of a payload, to notice a changed one.
pub fn fingerprint(payload: &[u8]) -> u32 {
    let mut hasher = DefaultHasher::new();
    hasher.write(payload);
    hasher.finish() as u32
}

/// What a client did or saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// CONNACK.
    Connected {
        /// Whose.
        session: SessionId,
        /// 1, 2, 3 … for each session.
        connection: u32,
        /// The server said that it had the session.
        session_present: bool,
    },
    /// SUBACK for `inbox/#`: from now on the session is owed every message.
    Subscribed {
        /// Whose.
        session: SessionId,
    },
    /// The connection is gone.
    Disconnected {
        /// Whose.
        session: SessionId,
    },
    /// The session is about to be ended on purpose (clean start, expiry): it is owed nothing more.
    Ended {
        /// Whose.
        session: SessionId,
    },
    /// Somebody is a member of a group, from this log entry on; without `seq`: for all that is sent after this event.
    Joined {
        /// The group.
        group: ConversationId,
        /// Who.
        user: UserId,
        /// The log entry of the join; 0 = from the group's beginning.
        seq: Option<u64>,
    },
    /// Somebody leaves, with this log entry as his last; without `seq`: record this *before* asking for it, he is owed what
    /// was acknowledged before.
    Left {
        /// The group.
        group: ConversationId,
        /// Who.
        user: UserId,
        /// The log entry of the leave.
        seq: Option<u64>,
    },
    /// A message is about to be written to the network; again for each resend.
    Sent {
        /// The message.
        id: MessageId,
        /// Who sends.
        session: SessionId,
        /// On which of its connections.
        connection: u32,
        /// Where to.
        conversation: ConversationId,
        /// [`fingerprint`] of the payload.
        payload: u32,
        /// The `id` travels along (MQTT 5), so that sending it twice stores it once.
        idempotent: bool,
        /// When the schedule wanted it sent.
        scheduled: Duration,
    },
    /// PUBACK success; 3.1.1 tells no seq.
    Acked {
        /// The message.
        id: MessageId,
        /// Its number in the conversation.
        seq: Option<u64>,
    },
    /// PUBACK with a reason code.
    Refused {
        /// The message.
        id: MessageId,
    },
    /// A message came in.
    Received {
        /// At whose.
        session: SessionId,
        /// On which of its connections.
        connection: u32,
        /// In which conversation.
        conversation: ConversationId,
        /// Who wrote it, if that is somebody of this history.
        from: Option<UserId>,
        /// Its number.
        seq: u64,
        /// Its id, if it has one of ours.
        id: Option<MessageId>,
        /// [`fingerprint`] of the payload.
        payload: u32,
    },
}

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Acknowledged and not delivered to a session that should have it.
    Lost,
    /// Stored under two numbers, or delivered twice within one connection.
    Duplicated,
    /// Numbers not in the order of sending, or delivered out of order.
    Reordered,
    /// A number that nobody saw, or a stored message that a session never got though nobody was told that it is stored.
    Gap,
    /// One number shows two messages.
    Collision,
    /// Payload or sender differ from what was sent.
    Corrupted,
    /// A message that nobody sent.
    Invented,
    /// Delivered to somebody who was no member.
    Trespass,
    /// Refused, and yet there.
    Refused,
    /// The server forgot a session.
    SessionLost,
}

impl Kind {
    const ALL: [Self; 10] = [
        Self::Lost,
        Self::Duplicated,
        Self::Reordered,
        Self::Gap,
        Self::Collision,
        Self::Corrupted,
        Self::Invented,
        Self::Trespass,
        Self::Refused,
        Self::SessionLost,
    ];
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Report {
    /// Messages sent (resends not counted again).
    pub sent: u64,
    /// Messages acknowledged.
    pub acked: u64,
    /// Messages whose last answer was a refusal.
    pub refused: u64,
    /// Messages without any answer.
    pub unanswered: u64,
    /// Deliveries, redeliveries included.
    pub received: u64,
    /// Deliveries of what a session had seen on an earlier connection: allowed ("at least once").
    pub redelivered: u64,
    /// Log entries that no client of this history sent: joins, leaves, strangers.
    pub foreign: u64,
    /// Count of [`Kind::Lost`].
    pub lost: u64,
    /// Count of [`Kind::Duplicated`].
    pub duplicated: u64,
    /// Count of [`Kind::Reordered`].
    pub reordered: u64,
    /// Count of [`Kind::Gap`].
    pub gaps: u64,
    /// Count of all other violations.
    pub other: u64,
    /// What exactly, at most 100 of them.
    pub violations: Vec<String>,
    /// From the scheduled time to the PUBACK, in microseconds.
    pub ack_latency: Histogram<u64>,
    /// From the scheduled time to the arrival at a session that was connected all the while, in microseconds.
    pub delivery_latency: Histogram<u64>,
}

impl Report {
    /// No invariant was violated.
    pub fn is_clean(&self) -> bool {
        self.lost + self.duplicated + self.reordered + self.gaps + self.other == 0
    }

    /// Nothing is missing and every message has its answer: the history is complete.
    pub fn is_settled(&self) -> bool {
        self.lost == 0 && self.gaps == 0 && self.unanswered == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "sent {}, acknowledged {}, refused {}, unanswered {}; delivered {} (again after a reconnect: {}), other entries {}",
            self.sent, self.acked, self.refused, self.unanswered, self.received, self.redelivered, self.foreign
        )?;
        writeln!(
            out,
            "lost {}, duplicated {}, reordered {}, gaps {}, other violations {}",
            self.lost, self.duplicated, self.reordered, self.gaps, self.other
        )?;
        for (name, latency) in [("ack", &self.ack_latency), ("delivery", &self.delivery_latency)] {
            let millis = |quantile| latency.value_at_quantile(quantile) as f64 / 1000.0;
            let (median, high, highest) = (millis(0.5), millis(0.99), millis(0.999));
            let most = latency.max() as f64 / 1000.0;
            writeln!(out, "{name:9} p50 {median:.1} ms, p99 {high:.1} ms, p99.9 {highest:.1} ms, max {most:.1} ms")?;
        }
        for violation in &self.violations {
            writeln!(out, "  {violation}")?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    None,
    Acked,
    Refused,
}

#[derive(Clone, Debug)]
struct Message {
    id: MessageId,
    session: SessionId,
    conversation: ConversationId,
    /// The connection of the latest sending, and when that was (in events).
    connection: u32,
    sending: u32,
    first_sending: u32,
    /// When the ack came (in events).
    acked: u32,
    /// 0 = not known.
    seq: u32,
    payload: u32,
    scheduled_micros: u64,
    sends: u16,
    answer: Answer,
    idempotent: bool,
}

/// A log entry that is none of our messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Foreign {
    id: Option<MessageId>,
    payload: u32,
}

/// What is known of one number of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Unseen,
    /// Index into `messages`.
    Ours(u32),
    /// Index into `foreign`.
    Foreign(u32),
}

#[derive(Clone, Copy, Debug)]
enum Bound {
    Seq(u32),
    /// In events.
    Event(u32),
}

#[derive(Clone, Copy, Debug)]
struct Membership {
    user: UserId,
    since: Bound,
    until: Option<Bound>,
}

#[derive(Clone, Debug)]
struct Conversation {
    name: String,
    /// A 1:1 has its two people for ever.
    group: bool,
    members: Vec<Membership>,
    /// Slot of seq 1, 2, 3 …
    slots: Vec<Slot>,
    first_event: u32,
}

#[derive(Clone, Debug)]
struct Session {
    user: UserId,
    device: String,
    subscribed: Option<u32>,
    ended: bool,
    /// When the present connection began, in events and in time; `None` = not connected.
    connected: Option<(u32, Duration)>,
}

/// What one session saw of one conversation.
#[derive(Clone, Debug, Default)]
struct View {
    connection: u32,
    /// The last number within that connection.
    last: u32,
    /// The highest number ever.
    high: u32,
    /// Bit `seq - 1`.
    seen: Vec<u64>,
    /// Numbers stepped over when a higher one came first, both ends included.
    skipped: Vec<(u32, u32)>,
}

impl View {
    fn has(&self, seq: u32) -> bool {
        let bit = seq - 1;
        self.seen.get((bit / 64) as usize).is_some_and(|word| word & (1 << (bit % 64)) != 0)
    }

    fn insert(&mut self, seq: u32) {
        let bit = seq - 1;
        let word = (bit / 64) as usize;
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        self.seen[word] |= 1 << (bit % 64);
    }
}

#[derive(Clone, Debug, Default)]
struct Violations {
    counts: HashMap<Kind, u64>,
    texts: Vec<String>,
}

impl Violations {
    fn add(&mut self, kind: Kind, text: impl FnOnce() -> String) {
        *self.counts.entry(kind).or_default() += 1;
        if self.texts.len() < VIOLATION_TEXTS_MAX {
            self.texts.push(format!("{kind:?}: {}", text()));
        }
    }

    fn count(&self, kind: Kind) -> u64 {
        self.counts.get(&kind).copied().unwrap_or(0)
    }
}

/// All that is known of a run.
#[derive(Clone, Debug)]
pub struct History {
    events: u32,
    users: Vec<String>,
    user_ids: HashMap<String, UserId>,
    sessions: Vec<Session>,
    session_ids: HashMap<(UserId, String), SessionId>,
    conversations: Vec<Conversation>,
    pair_ids: HashMap<(UserId, UserId), ConversationId>,
    group_ids: HashMap<String, ConversationId>,
    messages: Vec<Message>,
    message_ids: HashMap<MessageId, u32>,
    foreign: Vec<Foreign>,
    views: HashMap<(SessionId, ConversationId), View>,
    violations: Violations,
    received: u64,
    redelivered: u64,
    ack_latency: Histogram<u64>,
    delivery_latency: Histogram<u64>,
}

impl Default for History {
    fn default() -> Self {
        Self::new()
    }
}

impl History {
    /// An empty history.
    pub fn new() -> Self {
        let histogram = new_latency_histogram();
        Self {
            events: 0,
            users: Vec::new(),
            user_ids: HashMap::new(),
            sessions: Vec::new(),
            session_ids: HashMap::new(),
            conversations: Vec::new(),
            pair_ids: HashMap::new(),
            group_ids: HashMap::new(),
            messages: Vec::new(),
            message_ids: HashMap::new(),
            foreign: Vec::new(),
            views: HashMap::new(),
            violations: Violations::default(),
            received: 0,
            redelivered: 0,
            ack_latency: histogram.clone(),
            delivery_latency: histogram,
        }
    }

    /// The id of a person, given out at the first call.
    pub fn user(&mut self, name: &str) -> UserId {
        if let Some(id) = self.user_ids.get(name) {
            return *id;
        }
        let id = UserId(index(self.users.len()));
        self.users.push(name.to_owned());
        self.user_ids.insert(name.to_owned(), id);
        id
    }

    /// The id of a person who is already known.
    pub fn known_user(&self, name: &str) -> Option<UserId> {
        self.user_ids.get(name).copied()
    }

    /// The id of a device's session, given out at the first call.
    pub fn session(&mut self, user: &str, device: &str) -> SessionId {
        let user = self.user(user);
        let key = (user, device.to_owned());
        if let Some(id) = self.session_ids.get(&key) {
            return *id;
        }
        let id = SessionId(index(self.sessions.len()));
        self.sessions.push(Session {
            user,
            device: device.to_owned(),
            subscribed: None,
            ended: false,
            connected: None,
        });
        self.session_ids.insert(key, id);
        id
    }

    /// The id of the 1:1 of two people, in any order.
    pub fn pair(&mut self, one: UserId, other: UserId) -> ConversationId {
        let key = (one.min(other), one.max(other));
        if let Some(id) = self.pair_ids.get(&key) {
            return *id;
        }
        let name = format!("{} and {}", self.users[key.0.0 as usize], self.users[key.1.0 as usize]);
        let member = |user| Membership { user, since: Bound::Seq(0), until: None };
        let mut members = vec![member(key.0)];
        if key.0 != key.1 {
            members.push(member(key.1));
        }
        let id = self.add_conversation(name, false, members);
        self.pair_ids.insert(key, id);
        id
    }

    /// The id of a group, given out at the first call.
    pub fn group(&mut self, name: &str) -> ConversationId {
        if let Some(id) = self.group_ids.get(name) {
            return *id;
        }
        let id = self.add_conversation(format!("group {name}"), true, Vec::new());
        self.group_ids.insert(name.to_owned(), id);
        id
    }

    fn add_conversation(&mut self, name: String, group: bool, members: Vec<Membership>) -> ConversationId {
        let id = ConversationId(index(self.conversations.len()));
        let first_event = self.events;
        self.conversations.push(Conversation { name, group, members, slots: Vec::new(), first_event });
        id
    }

    /// Takes one event, seen at `at` since the beginning. Gives the latency that an ack or a live delivery shows.
    pub fn record(&mut self, at: Duration, event: Event) -> Option<Duration> {
        self.events += 1;
        match event {
            Event::Connected { session, connection, session_present } => {
                let now = self.events;
                let state = &mut self.sessions[session.0 as usize];
                state.connected = Some((now, at));
                if session_present && connection == 1 {
                    // A session from before this history: its subscription still stands.
                    state.subscribed.get_or_insert(now);
                }
                if !session_present && state.subscribed.is_some() && !state.ended {
                    // Reported once; what it missed meanwhile would only be noise.
                    state.subscribed = None;
                    let name = self.session_name(session);
                    self.violations.add(Kind::SessionLost, || format!("the server forgot the session of {name}"));
                }
                None
            }
            Event::Subscribed { session } => {
                let now = self.events;
                let state = &mut self.sessions[session.0 as usize];
                if state.ended {
                    state.ended = false;
                    state.subscribed = None;
                    self.views.retain(|(of, _), _| *of != session);
                }
                self.sessions[session.0 as usize].subscribed.get_or_insert(now);
                None
            }
            Event::Disconnected { session } => {
                self.sessions[session.0 as usize].connected = None;
                None
            }
            Event::Ended { session } => {
                self.sessions[session.0 as usize].ended = true;
                None
            }
            Event::Joined { group, user, seq } => {
                let since = seq.map_or(Bound::Event(self.events), |seq| Bound::Seq(narrow(seq)));
                self.conversations[group.0 as usize].members.push(Membership { user, since, until: None });
                None
            }
            Event::Left { group, user, seq } => {
                let until = seq.map_or(Bound::Event(self.events), |seq| Bound::Seq(narrow(seq)));
                let members = &mut self.conversations[group.0 as usize].members;
                if let Some(open) = members.iter_mut().find(|member| member.user == user && member.until.is_none()) {
                    open.until = Some(until);
                }
                None
            }
            Event::Sent { id, session, connection, conversation, payload, idempotent, scheduled } => {
                self.record_sent(id, session, connection, conversation, payload, idempotent, scheduled);
                None
            }
            Event::Acked { id, seq } => self.record_acked(at, id, seq),
            Event::Refused { id } => {
                match self.message_ids.get(&id) {
                    // A late refusal does not count once the message is known to be stored.
                    Some(&at) if self.messages[at as usize].answer != Answer::Acked => {
                        self.messages[at as usize].answer = Answer::Refused;
                    }
                    Some(_) => {}
                    None => self.violations.add(Kind::Invented, || format!("{id} was refused but never sent")),
                }
                None
            }
            Event::Received { session, connection, conversation, from, seq, id, payload } => {
                self.record_received(at, session, connection, conversation, from, seq, id, payload)
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // The fields of one event.
    fn record_sent(
        &mut self,
        id: MessageId,
        session: SessionId,
        connection: u32,
        conversation: ConversationId,
        payload: u32,
        idempotent: bool,
        scheduled: Duration,
    ) {
        let now = self.events;
        if let Some(&at) = self.message_ids.get(&id) {
            let message = &mut self.messages[at as usize];
            message.sends = message.sends.saturating_add(1);
            message.connection = connection;
            message.sending = now;
            if message.answer == Answer::Refused {
                // It was not stored: its place in the order is that of this attempt.
                message.answer = Answer::None;
                message.first_sending = now;
            }
            return;
        }
        self.message_ids.insert(id, index(self.messages.len()));
        self.messages.push(Message {
            id,
            session,
            conversation,
            connection,
            sending: now,
            first_sending: now,
            acked: 0,
            seq: 0,
            payload,
            scheduled_micros: u64::try_from(scheduled.as_micros()).unwrap_or(u64::MAX),
            sends: 1,
            answer: Answer::None,
            idempotent,
        });
    }

    fn record_acked(&mut self, at: Duration, id: MessageId, seq: Option<u64>) -> Option<Duration> {
        let Some(&place) = self.message_ids.get(&id) else {
            self.violations.add(Kind::Invented, || format!("{id} was acknowledged but never sent"));
            return None;
        };
        let now = self.events;
        let message = &mut self.messages[place as usize];
        let first = message.answer != Answer::Acked;
        if first {
            message.answer = Answer::Acked;
            message.acked = now;
        }
        let (conversation, scheduled) = (message.conversation, Duration::from_micros(message.scheduled_micros));
        if let Some(seq) = seq {
            self.place(conversation, seq, Slot::Ours(place));
        }
        if !first {
            return None;
        }
        let latency = at.saturating_sub(scheduled);
        self.ack_latency.saturating_record(micros(latency));
        Some(latency)
    }

    #[allow(clippy::too_many_arguments)] // The fields of one event.
    fn record_received(
        &mut self,
        at: Duration,
        session: SessionId,
        connection: u32,
        conversation: ConversationId,
        from: Option<UserId>,
        seq: u64,
        id: Option<MessageId>,
        payload: u32,
    ) -> Option<Duration> {
        self.received += 1;
        let ours = id.and_then(|id| self.message_ids.get(&id).copied());
        let slot = match ours {
            Some(place) => {
                let message = &self.messages[place as usize];
                let sender = self.sessions[message.session.0 as usize].user;
                let (sent_to, sent_payload, own) = (message.conversation, message.payload, message.session == session);
                let who = self.session_name(session);
                let what = || format!("{} #{seq} as seen by {who}", self.conversations[conversation.0 as usize].name);
                if sent_payload != payload || sent_to != conversation || from != Some(sender) {
                    let text = format!("{}: payload, conversation or sender are not those that were sent", what());
                    self.violations.add(Kind::Corrupted, || text);
                } else if own {
                    let text = format!("{}: a session got its own message back", what());
                    self.violations.add(Kind::Duplicated, || text);
                }
                Slot::Ours(place)
            }
            None => {
                if from.is_some_and(|from| self.is_client(from)) {
                    let name = self.conversations[conversation.0 as usize].name.clone();
                    self.violations.add(Kind::Invented, || format!("{name} #{seq}: nobody sent it (id {id:?})"));
                }
                let entry = Foreign { id, payload };
                let known = self.slot(conversation, seq).and_then(|slot| match slot {
                    Slot::Foreign(place) if self.foreign[place as usize] == entry => Some(slot),
                    _ => None,
                });
                known.unwrap_or_else(|| {
                    self.foreign.push(entry);
                    Slot::Foreign(index(self.foreign.len() - 1))
                })
            }
        };
        let seq = self.place(conversation, seq, slot)?;
        let mut fresh = false;
        let mut trouble = None;
        let view = self.views.entry((session, conversation)).or_default();
        if view.connection != connection {
            view.connection = connection;
            view.last = 0;
        }
        if seq <= view.last {
            trouble = Some(if view.has(seq) { Kind::Duplicated } else { Kind::Reordered });
        } else if view.has(seq) {
            self.redelivered += 1;
        }
        if seq > view.high {
            if seq > view.high + 1 {
                view.skipped.push((view.high + 1, seq - 1));
            }
            view.high = seq;
        }
        view.last = view.last.max(seq);
        if !view.has(seq) {
            view.insert(seq);
            fresh = true;
        }
        let last = view.last;
        if let Some(kind) = trouble {
            let (who, name) = (self.session_name(session), self.conversations[conversation.0 as usize].name.clone());
            self.violations
                .add(kind, || format!("{name} #{seq} came to {who} after #{last} on connection {connection}"));
        }
        // What waited for somebody offline says nothing of the system's speed.
        let message = &self.messages[ours? as usize];
        let (connected_event, _) = self.sessions[session.0 as usize].connected?;
        if !fresh || connected_event > message.first_sending {
            return None;
        }
        let latency = at.saturating_sub(Duration::from_micros(message.scheduled_micros));
        self.delivery_latency.saturating_record(micros(latency));
        Some(latency)
    }

    /// Whether a person has a session in this history (others are strangers who may write what they like).
    fn is_client(&self, user: UserId) -> bool {
        // Every session's owner is interned; people who are only written to are not clients.
        self.sessions.iter().any(|session| session.user == user)
    }

    fn slot(&self, conversation: ConversationId, seq: u64) -> Option<Slot> {
        let place = usize::try_from(seq.checked_sub(1)?).ok()?;
        self.conversations[conversation.0 as usize].slots.get(place).copied()
    }

    /// Writes down that a number shows a message; a number or a message that is already taken otherwise is a violation.
    fn place(&mut self, conversation: ConversationId, seq: u64, slot: Slot) -> Option<u32> {
        let room = &mut self.conversations[conversation.0 as usize];
        let known = room.slots.len() as u64;
        if seq == 0 || seq > known + SEQ_JUMP_MAX {
            let name = room.name.clone();
            self.violations.add(Kind::Gap, || format!("{name}: the number {seq} after {known} can't be true"));
            return None;
        }
        let seq = narrow(seq);
        let position = seq as usize - 1;
        if room.slots.len() <= position {
            room.slots.resize(position + 1, Slot::Unseen);
        }
        match room.slots[position] {
            Slot::Unseen => room.slots[position] = slot,
            taken if taken == slot => {}
            taken => {
                let name = room.name.clone();
                let (one, other) = (self.slot_name(taken), self.slot_name(slot));
                self.violations.add(Kind::Collision, || format!("{name} #{seq} is {one} and also {other}"));
            }
        }
        if let Slot::Ours(place) = slot {
            let message = &mut self.messages[place as usize];
            if message.seq == 0 {
                message.seq = seq;
            } else if message.seq != seq && message.idempotent {
                let (id, first) = (message.id, message.seq);
                let name = self.conversations[conversation.0 as usize].name.clone();
                self.violations.add(Kind::Duplicated, || format!("{name}: {id} is stored as #{first} and as #{seq}"));
            }
        }
        Some(seq)
    }

    fn slot_name(&self, slot: Slot) -> String {
        match slot {
            Slot::Unseen => "nothing".to_owned(),
            Slot::Ours(place) => format!("message {}", self.messages[place as usize].id),
            Slot::Foreign(place) => format!("an entry of others {:?}", self.foreign[place as usize]),
        }
    }

    fn session_name(&self, session: SessionId) -> String {
        let session = &self.sessions[session.0 as usize];
        format!("{}/{}", self.users[session.user.0 as usize], session.device)
    }

    /// Whether a session is owed the message at a number.
    fn is_owed(&self, session: SessionId, room: &Conversation, members: &[&Membership], seq: u32, slot: Slot) -> bool {
        let state = &self.sessions[session.0 as usize];
        let (Some(subscribed), false) = (state.subscribed, state.ended) else { return false };
        let message = match slot {
            Slot::Unseen => return false,
            Slot::Ours(place) => Some(&self.messages[place as usize]),
            Slot::Foreign(_) => None,
        };
        match message {
            Some(message) if message.session == session || message.first_sending < subscribed => return false,
            None if room.first_event < subscribed => return false,
            _ => {}
        }
        members.iter().any(|member| {
            let entered = match member.since {
                Bound::Seq(since) => seq >= since,
                Bound::Event(since) => message.is_some_and(|message| message.first_sending > since),
            };
            let stayed = match member.until {
                None => true,
                Some(Bound::Seq(until)) => seq <= until,
                Some(Bound::Event(until)) => {
                    message.is_some_and(|message| message.answer == Answer::Acked && message.acked < until)
                }
            };
            entered && stayed
        })
    }

    /// Deliveries that an online session waits for longer than `grace`: what a live view shows as lost so far.
    pub fn overdue(&self, now: Duration, grace: Duration) -> u64 {
        let Some(before) = now.checked_sub(grace) else { return 0 };
        let mut overdue = 0;
        self.for_each_debt(|session, _, _, _, message| {
            let online = self.sessions[session.0 as usize].connected.is_some_and(|(_, since)| since < before);
            // The time of the ack is not kept; a schedule and a grace are near enough for a display.
            let old = message.is_some_and(|message| Duration::from_micros(message.scheduled_micros) < before);
            overdue += u64::from(online && old && message.is_some_and(|message| message.answer == Answer::Acked));
        });
        overdue
    }

    /// Calls back for each message that a session is owed and did not get.
    fn for_each_debt<'a>(&'a self, mut debt: impl FnMut(SessionId, &'a Conversation, u32, Slot, Option<&'a Message>)) {
        let mut sessions_of: HashMap<UserId, Vec<SessionId>> = HashMap::new();
        for (place, session) in self.sessions.iter().enumerate() {
            sessions_of.entry(session.user).or_default().push(SessionId(index(place)));
        }
        let nothing = View::default();
        for (place, room) in self.conversations.iter().enumerate() {
            let id = ConversationId(index(place));
            let mut people: Vec<UserId> = room.members.iter().map(|member| member.user).collect();
            people.sort_unstable();
            people.dedup();
            for user in people {
                let members: Vec<&Membership> = room.members.iter().filter(|member| member.user == user).collect();
                for session in sessions_of.get(&user).into_iter().flatten().copied() {
                    let view = self.views.get(&(session, id)).unwrap_or(&nothing);
                    for (position, slot) in room.slots.iter().copied().enumerate() {
                        let seq = index(position + 1);
                        if !view.has(seq) && self.is_owed(session, room, &members, seq, slot) {
                            let message =
                                if let Slot::Ours(at) = slot { Some(&self.messages[at as usize]) } else { None };
                            debt(session, room, seq, slot, message);
                        }
                    }
                }
            }
        }
    }

    /// Judges what is recorded so far, as if it was the end.
    pub fn check(&self) -> Report {
        let mut violations = self.violations.clone();
        self.for_each_debt(|session, room, seq, slot, message| {
            let (who, name, what) = (self.session_name(session), &room.name, self.slot_name(slot));
            if message.is_some_and(|message| message.answer == Answer::Acked) {
                violations
                    .add(Kind::Lost, || format!("{name} #{seq}, {what}, was acknowledged and never came to {who}"));
            } else {
                violations.add(Kind::Gap, || format!("{name} #{seq}, {what}, is stored and never came to {who}"));
            }
        });
        self.check_unplaced(&mut violations);
        self.check_deliveries(&mut violations);
        self.check_sending_order(&mut violations);
        self.check_numbers(&mut violations);
        self.check_refused(&mut violations);
        let count = |answer| self.messages.iter().filter(|message| message.answer == answer).count() as u64;
        let [lost, duplicated, reordered, gaps] =
            [Kind::Lost, Kind::Duplicated, Kind::Reordered, Kind::Gap].map(|kind| violations.count(kind));
        let other =
            Kind::ALL.iter().map(|kind| violations.count(*kind)).sum::<u64>() - lost - duplicated - reordered - gaps;
        Report {
            sent: self.messages.len() as u64,
            acked: count(Answer::Acked),
            refused: count(Answer::Refused),
            unanswered: count(Answer::None),
            received: self.received,
            redelivered: self.redelivered,
            foreign: self.foreign.len() as u64,
            lost,
            duplicated,
            reordered,
            gaps,
            other,
            violations: violations.texts,
            ack_latency: self.ack_latency.clone(),
            delivery_latency: self.delivery_latency.clone(),
        }
    }

    /// Acknowledged without a number (3.1.1) and seen by nobody: lost if anybody was there to see it.
    fn check_unplaced(&self, violations: &mut Violations) {
        for message in self.messages.iter().filter(|message| message.answer == Answer::Acked && message.seq == 0) {
            let room = &self.conversations[message.conversation.0 as usize];
            for (place, state) in self.sessions.iter().enumerate() {
                let session = SessionId(index(place));
                let owed = state.subscribed.is_some_and(|since| since < message.first_sending)
                    && !state.ended
                    && session != message.session
                    && room.members.iter().any(|member| member.user == state.user && member.until.is_none());
                if owed {
                    let (id, name, who) = (message.id, &room.name, self.session_name(session));
                    violations.add(Kind::Lost, || format!("{name}, {id}, was acknowledged and never came to {who}"));
                }
            }
        }
    }

    /// Skipped and delivered later is out of order; delivered to somebody who was no member is a trespass.
    fn check_deliveries(&self, violations: &mut Violations) {
        for ((session, conversation), view) in &self.views {
            let room = &self.conversations[conversation.0 as usize];
            let user = self.sessions[session.0 as usize].user;
            let members: Vec<&Membership> = room.members.iter().filter(|member| member.user == user).collect();
            for seq in view.skipped.iter().flat_map(|(first, last)| *first..=*last) {
                let Some(slot) = self.slot(*conversation, u64::from(seq)) else { continue };
                if view.has(seq) && self.is_owed(*session, room, &members, seq, slot) {
                    let who = self.session_name(*session);
                    violations.add(Kind::Reordered, || format!("{} #{seq} came to {who} after a later one", room.name));
                }
            }
            let intervals: Option<Vec<(u32, u32)>> = members
                .iter()
                .map(|member| match (member.since, member.until) {
                    (Bound::Seq(since), None) => Some((since, u32::MAX)),
                    (Bound::Seq(since), Some(Bound::Seq(until))) => Some((since, until)),
                    _ => None,
                })
                .collect();
            let Some(intervals) = intervals else { continue };
            if room.group && intervals.iter().all(|interval| *interval != (0, u32::MAX)) {
                let strays = (1..=view.high).filter(|seq| view.has(*seq));
                for seq in strays.filter(|seq| !intervals.iter().any(|(since, until)| since <= seq && seq <= until)) {
                    let who = self.session_name(*session);
                    violations.add(Kind::Trespass, || format!("{} #{seq} came to {who}, no member then", room.name));
                }
            }
        }
    }

    fn check_sending_order(&self, violations: &mut Violations) {
        let mut acked: Vec<&Message> =
            self.messages.iter().filter(|message| message.answer == Answer::Acked && message.seq > 0).collect();
        let key = |message: &Message| (message.session, message.conversation, message.connection);
        acked.sort_unstable_by_key(|message| (key(message), message.sending));
        for pair in acked.windows(2) {
            let [earlier, later] = pair else { continue };
            // Without an id on the wire a resend is stored anew, under a later number than the first.
            let known = earlier.idempotent || earlier.sends == 1;
            // What was refused and sent again may stand behind what was stored meanwhile.
            let in_order = earlier.first_sending < later.first_sending;
            if key(earlier) == key(later) && earlier.seq > later.seq && known && in_order {
                let name = &self.conversations[earlier.conversation.0 as usize].name;
                let who = self.session_name(earlier.session);
                violations.add(Kind::Reordered, || {
                    format!("{name}: {who} sent {} (#{}) before {} (#{})", earlier.id, earlier.seq, later.id, later.seq)
                });
            }
        }
    }

    /// Holes in the numbers that no message of unknown outcome can fill.
    fn check_numbers(&self, violations: &mut Violations) {
        let mut fillers: HashMap<ConversationId, u64> = HashMap::new();
        for message in &self.messages {
            let unknown = match message.answer {
                Answer::None | Answer::Refused => message.seq == 0,
                Answer::Acked => message.seq == 0 || !message.idempotent,
            };
            if unknown {
                *fillers.entry(message.conversation).or_default() += u64::from(message.sends);
            }
        }
        for (place, room) in self.conversations.iter().enumerate() {
            // Log entries of a group's beginning may have been seen by nobody who is here.
            let first_seen = room.slots.iter().position(|slot| *slot != Slot::Unseen).unwrap_or(0);
            let start = if room.group { first_seen } else { 0 };
            let holes: Vec<u32> = (start..room.slots.len())
                .filter(|position| room.slots[*position] == Slot::Unseen)
                .map(|position| index(position + 1))
                .collect();
            let excused = fillers.get(&ConversationId(index(place))).copied().unwrap_or(0);
            if holes.len() as u64 > excused {
                let mut list = String::new();
                for seq in holes.iter().take(5) {
                    let _ = write!(list, " #{seq}");
                }
                for _ in 0..holes.len() as u64 - excused {
                    violations.add(Kind::Gap, || format!("{}: nobody saw{list}", room.name));
                }
            }
        }
    }

    fn check_refused(&self, violations: &mut Violations) {
        for message in &self.messages {
            // Sent twice and refused once: the other one may have been stored.
            if message.answer == Answer::Refused && message.seq > 0 && message.sends == 1 {
                let name = &self.conversations[message.conversation.0 as usize].name;
                violations.add(Kind::Refused, || format!("{name} #{}: {} was refused", message.seq, message.id));
            }
        }
    }

    /// Messages sent so far and how many of them have an answer.
    pub fn progress(&self) -> (u64, u64) {
        let answered = self.messages.iter().filter(|message| message.answer != Answer::None).count();
        (self.messages.len() as u64, answered as u64)
    }

    /// Violations found while recording (losses show only at the end): duplicated, reordered, all others.
    pub fn live_violations(&self) -> (u64, u64, u64) {
        let (duplicated, reordered) = (self.violations.count(Kind::Duplicated), self.violations.count(Kind::Reordered));
        let all: u64 = Kind::ALL.iter().map(|kind| self.violations.count(*kind)).sum();
        (duplicated, reordered, all - duplicated - reordered)
    }
}

/// An empty histogram for latencies in microseconds, up to ten minutes, three digits exact.
pub fn new_latency_histogram() -> Histogram<u64> {
    match Histogram::new_with_bounds(1, LATENCY_MICROS_MAX, 3) {
        Ok(histogram) => histogram,
        Err(error) => unreachable!("constant bounds: {error}"),
    }
}

/// A latency as the histograms take it.
pub fn micros(latency: Duration) -> u64 {
    u64::try_from(latency.as_micros()).unwrap_or(u64::MAX).clamp(1, LATENCY_MICROS_MAX)
}

/// Tables here never reach 2^32 entries: memory ends first.
fn index(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

fn narrow(seq: u64) -> u32 {
    u32::try_from(seq).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
