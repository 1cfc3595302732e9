//! What a client is sent.
//!
//! Delivery is a pull. Per conversation the session knows the next seq to send and the highest it heard of; a push that is exactly the
//! next one goes out at once, any other only raises the latter, and what is missing is fetched as the client's window allows.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use im_proto::ids::{Conversation, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{Cursor, Cursors, Deliver, Entry, EntryKind, Fetch, Fetched, Heads, IndexRow, Recipient, body};
use im_proto::topic::SYSTEM_SENDER;

use super::{Answer, Digits, Effects, InboxState, Phase, Session, What, refusal_of};
use crate::mqtt::{Delivery, Version};

/// Packet ids of one connection's deliveries.
const PACKET_IDS: u16 = 4_096;
const WINDOW_MAX_V5: u16 = 1_024;
const WINDOW_V311: u16 = 64;
const FETCHES_MAX: usize = 2;
const FETCH_ENTRIES_MAX: usize = 64;
const FETCH_BYTES_MAX: u32 = 64 << 10;
/// Own stored messages that delivery has not reached yet; beyond it they are fetched and skipped.
const OWN_AHEAD_MAX: usize = 1_024;

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
pub(super) struct Inbox {
    pub(super) state: InboxState,
    flows: Vec<Flow>,
    flow_by_conversation: HashMap<Arc<str>, u32>,
    /// Flows that miss something, in turn.
    behind: VecDeque<u32>,
    /// Flows whose cursor moved since the owner was told.
    dirty: Vec<u32>,
    fetches: usize,
    /// Heads could not be asked, or a mark not told: again at the next tick that finds room for what comes of it.
    pub(super) compare_again: bool,
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
    /// Of a client that takes so many unacknowledged publishes.
    pub(super) fn new(version: Version, receive_maximum: u16) -> Self {
        Self {
            state: InboxState::Unsubscribed,
            flows: Vec::new(),
            flow_by_conversation: HashMap::new(),
            behind: VecDeque::new(),
            dirty: Vec::new(),
            fetches: 0,
            compare_again: false,
            unacked: VecDeque::new(),
            outstanding: 0,
            window: if version == Version::V5 { receive_maximum.min(WINDOW_MAX_V5) } else { WINDOW_V311 },
            ids_from: 1,
            first_offset: 0,
        }
    }

    /// The packet ids of the session's `connections`th connection: fifteen blocks in turn, so that a late PUBACK acknowledges nothing.
    pub(super) fn begin_ids(&mut self, connections: u64) {
        self.ids_from = 1 + (connections % 15) as u16 * PACKET_IDS;
    }

    /// An earlier connection of the session got so far.
    pub(super) fn resume_after(&mut self, cursor: &Cursor) {
        let flow = self.flow(&cursor.conversation, cursor.seq + 1);
        self.flows[flow as usize].next = cursor.seq + 1;
    }

    /// Gives back the memory: nothing is delivered any more.
    pub(super) fn forget(&mut self) {
        self.flows = Vec::new();
        self.flow_by_conversation = HashMap::new();
        self.behind = VecDeque::new();
        self.dirty = Vec::new();
    }

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

    pub(super) fn merge(&mut self, row: &IndexRow) -> u32 {
        let index = self.flow(&row.conversation, row.from_seq);
        let flow = &mut self.flows[index as usize];
        if row.as_of >= flow.as_of {
            flow.as_of = row.as_of;
            flow.to_seq = row.to_seq;
        }
        index
    }

    /// The session's own message was stored: delivery passes over it.
    pub(super) fn own_stored(&mut self, conversation: &str, seq: u64) {
        if let Some(&index) = self.flow_by_conversation.get(conversation) {
            self.flows[index as usize].own_stored(seq);
            self.mark_dirty(index);
        }
    }

    /// The client itself marked all up to this seq as read: it need not be told.
    pub(super) fn own_marked(&mut self, conversation: &str, seq: u64) {
        if let Some(&index) = self.flow_by_conversation.get(conversation) {
            let told = &mut self.flows[index as usize].own_mark_told;
            *told = seq.max(*told);
        }
    }

    /// How many more publishes the client takes now, by its window.
    fn room(&self) -> usize {
        if !matches!(self.state, InboxState::Subscribed) {
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
    pub(super) fn acknowledged(&mut self, packet_id: u16) -> bool {
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

impl Session {
    /// Asks for the heads of all conversations, one batch per owner's shard. Returns the number of batches.
    pub(super) fn ask_heads(&mut self, now_ms: u64, what: impl Fn() -> What, effects: &mut Effects) -> usize {
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

    pub(super) fn compare_heads(&mut self, now_ms: u64, effects: &mut Effects) {
        self.inbox.compare_again = false;
        if matches!(self.inbox.state, InboxState::Subscribed) {
            self.ask_heads(now_ms, || What::HeadsToCompare, effects);
        }
    }

    pub(super) fn on_heads_to_compare(&mut self, now_ms: u64, answer: Answer, effects: &mut Effects) {
        let list = match answer {
            Answer::Outcome(Outcome::Heads(list)) => list,
            _ => return self.inbox.compare_again = true,
        };
        for head in &list.heads {
            let Some(&index) = self.inbox.flow_by_conversation.get(head.conversation.as_str()) else { continue };
            let flow = &mut self.inbox.flows[index as usize];
            flow.head = flow.head.max(head.head);
            self.inbox.mark_behind(index);
            self.tell_marks(index, head.own_mark, head.peer_mark);
        }
        self.fetch(now_ms, effects);
    }

    pub(super) fn on_heads_to_subscribe(&mut self, now_ms: u64, answer: Answer, effects: &mut Effects) {
        let list = match answer {
            Answer::Outcome(Outcome::Heads(list)) => list,
            answer => return self.subscription_failed(refusal_of(&answer).0, effects),
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

    /// A message for this session's user.
    pub fn on_deliver(&mut self, now_ms: u64, deliver: &Deliver, recipient: &Recipient, effects: &mut Effects) {
        let Some(entry) = &deliver.entry else { return };
        if self.phase != Phase::Live {
            return; // a registration that is under way compares heads
        }
        let index = self.inbox.flow(&deliver.conversation, recipient.from_seq);
        let own = self.is_own(entry);
        let room = self.room() > 0;
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
                if self.is_congested() {
                    self.shared.metrics.send_buffer_full.inc();
                }
                if matches!(self.inbox.state, InboxState::Subscribed) {
                    self.inbox.mark_behind(index);
                    self.fetch(now_ms, effects);
                }
            }
        }
    }

    /// How many more publishes may be sent now: none while the client does not read what it has.
    fn room(&self) -> usize {
        if self.is_congested() { 0 } else { self.inbox.room() }
    }

    pub(super) fn is_congested(&self) -> bool {
        self.out.len() >= self.shared.limits.deliver_below()
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

    /// The subscription is written: what was announced meanwhile is missing.
    pub(super) fn fetch_all(&mut self, now_ms: u64, effects: &mut Effects) {
        (0..self.inbox.flows.len() as u32).for_each(|index| self.inbox.mark_behind(index));
        self.fetch(now_ms, effects);
    }

    /// Fetches what is missing, as far as the window allows.
    pub(super) fn fetch(&mut self, now_ms: u64, effects: &mut Effects) {
        while self.inbox.fetches < FETCHES_MAX {
            let room = self.room();
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

    pub(super) fn on_fetched(
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
            Answer::Outcome(Outcome::Fetched(fetched)) => self.take_fetched(index, &fetched),
            answer => {
                let (_, for_now) = refusal_of(&answer);
                if for_now {
                    return self.inbox.mark_behind(index); // taken up again by the next tick or acknowledgement
                }
                let flow = &mut self.inbox.flows[index as usize];
                flow.head = flow.next - 1;
                self.inbox.compare_again = true; // an owner that was replaced may not know of a join
            }
        }
        let flow = &self.inbox.flows[index as usize];
        if (flow.next, flow.head) == (from, head_before) {
            // Who answered knows less than who announced it, because he was replaced: others first, then the next tick or
            // acknowledgement asks again.
            self.fetch(now_ms, effects);
            return self.inbox.mark_behind(index);
        }
        self.inbox.mark_behind(index);
        self.fetch(now_ms, effects);
    }

    fn take_fetched(&mut self, index: u32, fetched: &Fetched) {
        if !matches!(self.inbox.state, InboxState::Subscribed) {
            return;
        }
        let mut all = true;
        for entry in &fetched.entries {
            let flow = &self.inbox.flows[index as usize];
            if entry.seq < flow.next {
                continue;
            }
            // Whatever the index said meanwhile: the owner shows members what they may see, be it of after they came back.
            if !self.is_own(entry) && self.room() == 0 {
                all = false;
                break;
            }
            self.deliver(index, entry);
        }
        let flow = &mut self.inbox.flows[index as usize];
        if all {
            flow.advance_to(fetched.next);
            flow.head = flow.head.max(fetched.head);
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
    pub(super) fn tell_marks(&mut self, index: u32, own: u64, peer: u64) {
        if matches!(self.inbox.state, InboxState::Unsubscribed) {
            return;
        }
        let is_congested = self.is_congested();
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
            if seq <= *told {
                continue;
            }
            if is_congested {
                self.inbox.compare_again = true;
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

    pub(super) fn send_cursors(&mut self, now_ms: u64, effects: &mut Effects) {
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

    pub(super) fn cursors(&self) -> Vec<Cursor> {
        let cursor = |flow: &Flow| Cursor { conversation: flow.conversation.to_string(), seq: flow.acked() };
        self.inbox.flows.iter().map(cursor).collect()
    }
}
