//! An owned shard: what is asked of it, what it reads, and its life as ours.

mod batch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use im_proto::ids::{Conversation as Parsed, is_name, room_key, shard_of};
use im_proto::link::reply::Outcome as Answer;
use im_proto::link::{
    Entry, Fetch, Fetched, Group as GroupInfo, GroupChange, GroupGet, GroupMember, Head, HeadList, Heads, MarkRead,
    Refusal, Send, Stored, body,
};

use self::batch::Formed;
pub(super) use self::batch::{Forming, Op};
use super::cache::Cache;
use super::calls::{StoreAnswer, StoreCall};
use super::conversation::{Conversation, Members};
use super::notify::Outgoing;
use super::ownership::{CONFIRMED_FOR, Leaving, store_refusal};
use super::rooms::{RoomWrite, Rooms};
use super::scrub::Scrub;
use super::users::{UserWrite, Users};
use super::{Ask, Context, Env, LinkId, Map, ReplyTo};
use crate::store::{LogEntry, LogRange, StoreError, Tail};

/// Entries of one fetch.
const FETCH_ENTRIES_MAX: u32 = 256;
/// Payload bytes of one fetch.
const FETCH_BYTES_MAX: u32 = 1 << 20;
/// Users that one change of a group may name.
const CHANGE_USERS_MAX: usize = 1_000;
const NOT_A_MEMBER: &str = "not a member of this conversation";

/// A shard in our hands.
pub(super) struct OwnedShard {
    pub(super) number: u32,
    pub(super) epoch: u64,
    /// When the store last agreed that we own it.
    confirmed_at: Duration,
    /// Asked while unconfirmed for too long.
    stalled: VecDeque<Ask>,
    pub(super) leaving: Option<Leaving>,

    head_pos: u64,
    ops: VecDeque<Op>,
    under_way: Option<Vec<Formed>>,
    /// After a refused commit.
    write_again_at: Duration,
    watermark_written: u64,
    watermark_written_at: Duration,

    conversations: Cache<Conversation>,
    pub(super) rooms: Rooms,
    pub(super) users: Users,
    pub(super) outgoing: Outgoing,
    pub(super) scrub: Scrub,
    parked: BTreeMap<u64, Parked>,
    next_parked: u64,
    /// The last message refused of a group; see `Request::oldest`.
    refused: Map<(LinkId, u64), u64>,

    load: f64,
    pub(super) load_count: u64,
}

/// A request that waits for loads.
struct Parked {
    ask: Ask,
    missing: usize,
}

/// A fetch that reads the log.
#[derive(Debug)]
pub(super) struct PendingFetch {
    to: ReplyTo,
    conversation: Arc<str>,
    /// The visible interval it reads in, and where the next one starts.
    last: u64,
    after: u64,
    head: u64,
    backward: bool,
    /// Fewer than these came: the interval is read to its end.
    visible: Vec<(u64, u64)>,
}

impl OwnedShard {
    /// `asked_at`: when the store was asked for it, since when somebody else may have acquired it.
    pub(super) fn new(tail: Tail, asked_at: Duration, now: Duration) -> Self {
        Self {
            number: tail.shard,
            epoch: tail.epoch,
            confirmed_at: asked_at,
            stalled: VecDeque::new(),
            leaving: None,
            head_pos: tail.head_pos,
            ops: VecDeque::new(),
            under_way: None,
            write_again_at: now,
            watermark_written: tail.watermark,
            watermark_written_at: now,
            conversations: Cache::default(),
            rooms: Rooms::default(),
            users: Users::new(now),
            outgoing: Outgoing::new(tail.watermark, now),
            scrub: Scrub::new(now),
            parked: BTreeMap::new(),
            next_parked: 1,
            refused: Map::default(),
            load: 0.0,
            load_count: 0,
        }
    }

    pub(super) fn describe(&self) -> String {
        let (epoch, ops, parked) = (self.epoch, self.ops.len(), self.parked.len());
        format!(
            "owned at {epoch}: {ops} ops, {parked} parked, under way {}, leaving {:?}",
            self.under_way.is_some(),
            self.leaving
        )
    }

    /// The highest `pos` stored.
    pub(super) fn head_pos(&self) -> u64 {
        self.head_pos
    }

    // ---- requests -------------------------------------------------------------------------------------------------------

    /// Takes a request that is meant for this epoch.
    pub(super) fn ask(&mut self, env: &mut Env, ask: Ask) {
        if !self.is_confirmed(env.now.mono) {
            // Perhaps somebody else owns it by now: the check under way, or the next, tells.
            if self.stalled.len() >= env.limits.shard_ops_max && ask.may_be_refused() {
                return self.refuse_in_turn(env, ask.to, Refusal::Busy, "the store is slow to confirm this shard");
            }
            return self.stalled.push_back(ask);
        }
        self.dispatch(env, ask);
    }

    /// Whether the store agreed so lately that the shard is ours that questions may be answered.
    pub(super) fn is_confirmed(&self, now: Duration) -> bool {
        now <= self.confirmed_at + CONFIRMED_FOR
    }

    /// The store agreed, at this time, that the shard is ours.
    pub(super) fn confirmed(&mut self, env: &mut Env, at: Duration) {
        self.confirmed_at = self.confirmed_at.max(at);
        if self.is_confirmed(env.now.mono) {
            for ask in std::mem::take(&mut self.stalled) {
                self.dispatch(env, ask);
            }
        }
    }

    fn dispatch(&mut self, env: &mut Env, ask: Ask) {
        if let Err(reason) = check(&ask.body, ask.shard, env) {
            return env.refuse(ask.to, Refusal::Invalid, reason);
        }
        let missing = self.load_missing(env, &ask.body);
        if missing > 0 {
            if env.parked >= env.limits.parked_max && ask.may_be_refused() {
                // The loads go on: the next attempt finds them done.
                self.forget_waiter(self.next_parked);
                return self.refuse_in_turn(env, ask.to, Refusal::Busy, "too many requests wait for the store");
            }
            env.parked += 1;
            self.parked.insert(self.next_parked, Parked { ask, missing });
            self.next_parked += 1;
            return;
        }
        let to = ask.to;
        match ask.body {
            body::Body::Send(send) => {
                env.stats.accepted += 1;
                if send.payload.len() > env.limits.payload_max {
                    return env.refuse(to, Refusal::Invalid, "the payload is too large");
                }
                let key = dedup_key(&send);
                self.enqueue(env, Op::Send { to, send, key });
            }
            body::Body::MarkRead(mark) => self.enqueue(env, Op::Mark { to, mark }),
            body::Body::GroupChange(change) => self.enqueue(env, Op::Group { to, change }),
            body::Body::Heads(heads) => self.heads(env, to, &heads),
            body::Body::Fetch(fetch) => self.fetch(env, to, &fetch),
            body::Body::GroupGet(get) => self.group_get(env, to, &get),
            other => self.ask_rooms(env, to, other),
        }
    }

    /// Queues a write of user state.
    pub(super) fn write_user(&mut self, env: &mut Env, write: UserWrite) {
        self.enqueue(env, Op::User(write));
    }

    /// Queues a write of room state.
    pub(super) fn write_room(&mut self, env: &mut Env, write: RoomWrite) {
        self.enqueue(env, Op::Room(write));
    }

    fn enqueue(&mut self, env: &mut Env, op: Op) {
        let to = match &op {
            Op::Send { to, .. } | Op::Mark { to, .. } | Op::Group { to, .. } => Some(*to),
            Op::Room(write) => Some(write.to()),
            Op::User(_) => None,
        };
        match to {
            Some(to) if self.ops.len() >= env.limits.shard_ops_max && !to.again => {
                self.refuse_in_turn(env, to, Refusal::Busy, "the shard's queue is full: try again in a moment");
            }
            _ => self.ops.push_back(op),
        }
    }

    // ---- loads ----------------------------------------------------------------------------------------------------------

    /// Starts reading what a request needs and is not in memory; the request about to be parked waits for it.
    fn load_missing(&mut self, env: &mut Env, body: &body::Body) -> usize {
        let mut missing = 0;
        let now = env.now.mono;
        let waiter = self.next_parked;
        let single;
        let conversations: &[String] = match body {
            body::Body::Heads(heads) => &heads.conversations,
            body::Body::Send(Send { conversation, .. })
            | body::Body::MarkRead(MarkRead { conversation, .. })
            | body::Body::Fetch(Fetch { conversation, .. })
            | body::Body::GroupChange(GroupChange { conversation, .. })
            | body::Body::GroupGet(GroupGet { conversation, .. }) => {
                // The usual case, without a copy.
                if self.conversations.touch(now, conversation) {
                    return 0;
                }
                single = [conversation.clone()];
                &single
            }
            _ => &[],
        };
        let (number, epoch) = (self.number, self.epoch);
        for conversation in conversations {
            let load = |conversation| ask_for_conversation(env, number, epoch, conversation);
            missing += usize::from(self.conversations.need(now, conversation, Some(waiter), load));
        }
        missing + self.load_missing_users(env, body, waiter) + self.load_missing_rooms(env, body, waiter)
    }

    fn forget_waiter(&mut self, waiter: u64) {
        self.conversations.forget_waiter(waiter);
        self.users.forget_waiter(waiter);
        self.rooms.forget_waiter(waiter);
    }

    pub(super) fn conversation_loaded(&mut self, env: &mut Env, id: Arc<str>, answer: Result<StoreAnswer, StoreError>) {
        let loaded = match answer {
            Ok(StoreAnswer::LoadConversation(rows)) => {
                Conversation::load(id.clone(), rows).map_err(|reason| (Refusal::StoreUnavailable, reason))
            }
            Ok(_) => Err((Refusal::StoreUnavailable, "the store answered something else".to_owned())),
            Err(error) => Err(store_refusal(&error)),
        };
        match loaded {
            Ok(value) => {
                let waiters = self.conversations.loaded(env.now.mono, id, value);
                self.wake(env, waiters);
            }
            Err((code, reason)) => {
                let waiters = self.conversations.failed(&id);
                let patient = self.refuse_waiters(env, waiters, code, &reason);
                self.conversations.try_again(env.now.mono, id, patient);
            }
        }
        self.notify_backlog(env);
    }

    /// A load failed: tells those whom a refusal does not mislead, and gives the others back.
    pub(super) fn refuse_waiters(&mut self, env: &mut Env, waiters: Vec<u64>, code: Refusal, reason: &str) -> Vec<u64> {
        let mut patient = Vec::new();
        for waiter in waiters {
            match self.parked.get(&waiter) {
                Some(parked) if parked.ask.may_be_refused() => {
                    if let Some(Parked { ask, .. }) = self.parked.remove(&waiter) {
                        env.parked -= 1;
                        self.refuse_in_turn(env, ask.to, code, reason);
                    }
                }
                Some(_) => patient.push(waiter),
                None => {}
            }
        }
        patient
    }

    /// Refuses, and remembers that nothing of the same group may overtake it until the sender knows.
    fn refuse_in_turn(&mut self, env: &mut Env, to: ReplyTo, code: Refusal, reason: &str) {
        if to.order != 0 {
            let last = self.refused.entry((to.link, to.order)).or_default();
            *last = to.id.max(*last);
        }
        env.refuse(to, code, reason);
    }

    /// Whether an earlier message of the group was refused and the sender may not have known when it sent this one.
    fn would_overtake(&mut self, to: &ReplyTo) -> bool {
        match self.refused.get(&(to.link, to.order)).copied() {
            None => false,
            Some(refused) if to.oldest > refused => {
                self.refused.remove(&(to.link, to.order));
                false
            }
            // What was asked before came before.
            Some(refused) => !to.again && to.id > refused,
        }
    }

    /// What requests waited for is there.
    pub(super) fn wake(&mut self, env: &mut Env, waiters: Vec<u64>) {
        for waiter in waiters {
            let Some(parked) = self.parked.get_mut(&waiter) else { continue };
            parked.missing -= 1;
            if parked.missing == 0
                && let Some(Parked { ask, .. }) = self.parked.remove(&waiter)
            {
                env.parked -= 1;
                self.dispatch(env, ask);
            }
        }
    }

    pub(super) fn conversation(&self, id: &str) -> Option<&Conversation> {
        self.conversations.get(id)
    }

    fn conversation_mut(&mut self, id: &str) -> Option<&mut Conversation> {
        self.conversations.get_mut(id)
    }

    /// The conversation, or `None` after its load was started.
    pub(super) fn conversation_or_load(&mut self, env: &mut Env, id: &Arc<str>) -> Option<&Conversation> {
        if !self.conversations.is_known(id) {
            let now = env.now.mono;
            let load = |conversation| ask_for_conversation(env, self.number, self.epoch, conversation);
            self.conversations.need(now, id, None, load);
        }
        self.conversation(id)
    }

    // ---- reads ----------------------------------------------------------------------------------------------------------

    fn heads(&mut self, env: &mut Env, to: ReplyTo, heads: &Heads) {
        let user = heads.user.as_str();
        let found = heads.conversations.iter().filter_map(|id| self.conversation(id));
        let heads = found.map(|conversation| Head {
            conversation: conversation.id.to_string(),
            head: conversation.visible_head(user),
            ts_ms: conversation.head_ts_ms,
            own_mark: conversation.mark(user),
            peer_mark: conversation.peer_of(user).map_or(0, |peer| conversation.mark(peer)),
        });
        env.reply(to, Answer::Heads(HeadList { heads: heads.collect() }));
    }

    fn fetch(&mut self, env: &mut Env, to: ReplyTo, fetch: &Fetch) {
        let shard = self.number;
        let Some(conversation) = self.conversation(&fetch.conversation) else { return };
        let visible = conversation.visible(&fetch.user);
        let head = conversation.visible_head(&fetch.user);
        if visible.is_empty() {
            return env.refuse(to, Refusal::NotAMember, NOT_A_MEMBER);
        }
        let limit = fetch.limit.clamp(1, FETCH_ENTRIES_MAX);
        let max_bytes = fetch.bytes_max.clamp(1, FETCH_BYTES_MAX);
        let answer = |entries, next| Answer::Fetched(Fetched { entries, next, head });
        let id = conversation.id.clone();
        let (from, last, after) = if fetch.backward {
            let wanted = if fetch.from == 0 { head } else { fetch.from.min(head) };
            let Some(&(first, last)) = visible.iter().rev().find(|(first, last)| *first <= wanted && first <= last)
            else {
                return env.reply(to, answer(Vec::new(), 0));
            };
            // Backward, `last` is the lower end.
            (last.min(wanted), first, 0)
        } else {
            let wanted = fetch.from.max(1);
            let Some(index) = visible.iter().position(|(first, last)| *last >= wanted && first <= last) else {
                return env.reply(to, answer(Vec::new(), head.max(wanted - 1) + 1));
            };
            let (first, last) = visible[index];
            (first.max(wanted), last, visible.get(index + 1).map_or(last + 1, |(first, _)| *first))
        };
        if !fetch.backward
            && let Some(cached) = conversation.cached_from(from)
        {
            let mut bytes = 0;
            let fits = |entry: &&LogEntry| {
                let first = bytes == 0;
                bytes += entry.payload.len() + 1;
                entry.seq <= last && (first || bytes <= max_bytes as usize)
            };
            let entries: Vec<Entry> = cached.take(limit as usize).take_while(fits).map(entry_of).collect();
            let end = entries.last().map_or(from - 1, |entry| entry.seq);
            return env.reply(to, answer(entries, if end >= last { after } else { end + 1 }));
        }
        let call = StoreCall::Range(LogRange {
            shard,
            conversation: id.clone(),
            from,
            limit,
            max_bytes,
            backward: fetch.backward,
        });
        let pending = PendingFetch { to, conversation: id, last, after, head, backward: fetch.backward, visible };
        env.call(call, Context::Range { shard, epoch: self.epoch, fetch: pending });
    }

    pub(super) fn range_read(&mut self, env: &mut Env, fetch: PendingFetch, answer: Result<StoreAnswer, StoreError>) {
        let rows = match answer {
            Ok(StoreAnswer::Range(rows)) => rows,
            Ok(_) => return,
            Err(error) => {
                let (code, reason) = store_refusal(&error);
                return env.refuse(fetch.to, code, reason);
            }
        };
        let seen = |seq: u64| fetch.visible.iter().any(|(first, last)| (*first..=*last).contains(&seq));
        let mut entries: Vec<Entry> = rows.iter().filter(|row| seen(row.seq)).map(entry_of).collect();
        if fetch.backward {
            let next = rows.last().map_or(0, |row| row.seq.saturating_sub(1));
            return env.reply(fetch.to, Answer::Fetched(Fetched { entries, next, head: fetch.head }));
        }
        entries.retain(|entry| entry.seq <= fetch.last);
        let Some(end) = entries.last().map(|entry| entry.seq) else {
            // The head says that there is more than the log gives.
            env.stats.holes += 1;
            tracing::error!(shard = self.number, conversation = %fetch.conversation, "the log ends before its head");
            return env.refuse(fetch.to, Refusal::StoreUnavailable, "the log can't be read");
        };
        let next = if end >= fetch.last { fetch.after } else { end + 1 };
        env.reply(fetch.to, Answer::Fetched(Fetched { entries, next, head: fetch.head }));
    }

    /// Looks for a message that may have been stored while its sender was a member.
    fn look_for(&mut self, env: &mut Env, to: ReplyTo, conversation: Arc<str>, key: Bytes) {
        let (shard, epoch) = (self.number, self.epoch);
        env.call(StoreCall::Find { shard, conversation, key }, Context::Find { shard, epoch, to });
    }

    pub(super) fn looked_for(&mut self, env: &mut Env, to: ReplyTo, answer: Result<StoreAnswer, StoreError>) {
        // Without an answer of the store none is given: better than a wrong one. The sender's patience ends after 10 s.
        let Ok(StoreAnswer::Find(found)) = answer else { return };
        match found {
            Some(found) => env.reply(to, Answer::Stored(Stored { seq: found.seq, ts_ms: found.ts_ms })),
            None => self.refuse_in_turn(env, to, Refusal::NotAMember, NOT_A_MEMBER),
        }
    }

    fn group_get(&mut self, env: &mut Env, to: ReplyTo, get: &GroupGet) {
        let Some(conversation) = self.conversation(&get.conversation) else { return };
        let Members::Group(Some(_)) = &conversation.members else {
            return env.refuse(to, Refusal::NotFound, "there is no such group");
        };
        if !get.actor.is_empty() && !conversation.is_member(&get.actor) {
            return env.refuse(to, Refusal::NotAMember, "only members may see a group");
        }
        let info = group_info(conversation);
        env.reply(to, Answer::Group(info));
    }

    /// A client's link ended. What came over it and is not being written yet is dropped: it is asked again over the next link, or nobody
    /// waits for it; and it must not be stored behind something refused that the sender will never hear of.
    pub(super) fn link_closed(&mut self, env: &mut Env, link: LinkId) {
        self.refused.retain(|(refused, _), _| *refused != link);
        self.ops.retain(|op| !matches!(op, Op::Send { to, .. } | Op::Mark { to, .. } if to.link == link));
        let is_void =
            |ask: &Ask| ask.to.link == link && matches!(ask.body, body::Body::Send(_) | body::Body::MarkRead(_));
        self.stalled.retain(|ask| !is_void(ask));
        let before = self.parked.len();
        self.parked.retain(|_, parked| !is_void(&parked.ask));
        env.parked -= before - self.parked.len();
        self.rooms.link_closed(env.now.mono, link);
    }

    // ---- the end --------------------------------------------------------------------------------------------------------

    /// Whether nothing of the shard waits or is under way; then it may be released.
    pub(super) fn nothing_open(&self) -> bool {
        self.ops.is_empty() && self.under_way.is_none() && self.parked.is_empty()
    }

    /// Takes nothing new from now on, and writes down what is only in memory.
    pub(super) fn leave(&mut self, env: &mut Env, to: String) {
        if self.leaving.is_some() {
            return;
        }
        let moved = im_proto::link::Moved { shard: self.number, ended: self.epoch, to: to.clone(), released: false };
        self.leaving = Some(Leaving { to, releasing: false, ask_at: env.now.mono, cancelled: false });
        self.stalled.clear();
        self.rooms.forget_held();
        env.parked -= self.parked.len();
        self.parked.clear();
        self.write_cursors(env);
        env.is_urgent = true;
        env.router.moved(&moved);
        env.broadcast(im_proto::link::server_frame::Frame::Moved(moved));
    }

    /// The shard is ours no more: what it waited for elsewhere is called off.
    pub(super) fn abandon(&mut self, env: &mut Env) {
        env.parked -= self.parked.len();
        self.parked.clear();
        self.outgoing.cancel_all(env);
    }

    // ---- now and then ---------------------------------------------------------------------------------------------------

    pub(super) fn tick(&mut self, env: &mut Env) {
        let now = env.now.mono;
        for conversation in self.conversations.due(now) {
            ask_for_conversation(env, self.number, self.epoch, conversation);
        }
        self.retry_notifications(env);
        self.tick_users(env);
        self.tick_rooms(env);
    }

    /// Messages and notifications per second, averaged over some 10 s; `passed` since the last call, in seconds.
    pub(super) fn load_average(&mut self, passed: f64) -> f64 {
        let rate = std::mem::take(&mut self.load_count) as f64 / passed;
        let weight = 1.0 - (-passed / 10.0).exp();
        self.load += (rate - self.load) * weight;
        self.load
    }

    pub(super) fn watermark_lag(&self, now: Duration) -> Duration {
        self.outgoing.lag(self.head_pos, now)
    }

    /// Forgets what was not used for a while, if more than `max` are held.
    pub(super) fn sweep(&mut self, env: &mut Env, max: usize) {
        let now = env.now.mono;
        // What waits for a load may need what is there already.
        if !self.parked.is_empty() {
            return;
        }
        let under_way = self.under_way.iter().flatten();
        let named: BTreeSet<&str> =
            self.ops.iter().flat_map(Op::names).chain(under_way.clone().flat_map(Formed::names)).collect();
        let writes_users = self.ops.iter().any(|op| matches!(op, Op::User(_)))
            || under_way.clone().any(|write| matches!(write, Formed::User(_)));
        if self.conversations.len() > max {
            self.conversations.retain(now, |id, _, is_idle| !is_idle || named.contains(&**id));
        }
        self.rooms.sweep(now, &named);
        if !writes_users {
            self.sweep_users(env, max);
        }
    }
}

fn ask_for_conversation(env: &mut Env, shard: u32, epoch: u64, conversation: Arc<str>) {
    let call = StoreCall::LoadConversation { shard, conversation: conversation.clone() };
    env.call(call, Context::LoadConversation { shard, epoch, conversation });
}

/// What makes a resend of this message a duplicate.
fn dedup_key(send: &Send) -> Bytes {
    let mut key = BytesMut::new();
    if send.client_id.is_empty() {
        key.put_u8(2);
        key.put_slice(&send.key);
    } else {
        key.put_u8(1);
        for part in [&send.sender, &send.device] {
            key.put_slice(part.as_bytes());
            key.put_u8(0);
        }
        key.put_slice(send.client_id.as_bytes());
    }
    key.freeze()
}

/// An entry as clients of a link see it.
pub(super) fn entry_of(entry: &LogEntry) -> Entry {
    Entry {
        seq: entry.seq,
        ts_ms: entry.ts_ms,
        sender: entry.sender.to_string(),
        device: entry.device.to_string(),
        client_id: entry.client_id.to_string(),
        kind: i32::from(entry.kind),
        payload: entry.payload.clone(),
    }
}

fn group_info(conversation: &Conversation) -> GroupInfo {
    let mut info =
        GroupInfo { conversation: conversation.id.to_string(), head: conversation.head, ..GroupInfo::default() };
    if let Members::Group(Some(group)) = &conversation.members {
        info.created_ms = group.created_ms;
        let current = group.members.iter().filter(|(_, member)| member.is_in());
        info.members = current
            .map(|(user, member)| GroupMember {
                user: user.to_string(),
                role: member.role.into(),
                from_seq: member.intervals.last().map_or(0, |interval| interval.from),
            })
            .collect();
    }
    info
}

/// What no client of a link may ask: ids that are none, keys of another shard, too much at once.
fn check(body: &body::Body, shard: u32, env: &Env) -> Result<(), String> {
    let conversation = |id: &str| match Parsed::parse(id) {
        Err(error) => Err(error.to_string()),
        Ok(_) if shard_of(id, env.shards) != shard => Err(format!("{id} is not of shard {shard}")),
        Ok(_) => Ok(()),
    };
    let name = |id: &str| if is_name(id) { Ok(()) } else { Err(format!("{id:?} is not an id")) };
    let user = |id: &str| match name(id) {
        Ok(()) if shard_of(id, env.shards) != shard => Err(format!("{id} is not of shard {shard}")),
        other => other,
    };
    let room = |id: &str| match name(id) {
        Ok(()) if shard_of(&room_key(id), env.shards) != shard => Err(format!("room {id} is not of shard {shard}")),
        other => other,
    };
    match body {
        body::Body::Send(send) => conversation(&send.conversation).and_then(|()| name(&send.sender)).and_then(|()| {
            let has_key = !send.client_id.is_empty() || !send.key.is_empty();
            if has_key && send.client_id.len() <= 64 {
                Ok(())
            } else {
                Err("a message needs an id of at most 64 bytes, or a key".into())
            }
        }),
        body::Body::MarkRead(mark) => conversation(&mark.conversation),
        body::Body::Heads(heads) => heads.conversations.iter().try_for_each(|id| conversation(id)),
        body::Body::Fetch(fetch) => conversation(&fetch.conversation),
        body::Body::GroupGet(get) => conversation(&get.conversation),
        body::Body::GroupChange(change) => {
            if change.add.len() + change.remove.len() + change.roles.len() > CHANGE_USERS_MAX {
                return Err(format!("at most {CHANGE_USERS_MAX} users at a time"));
            }
            let users = change.add.iter().chain(&change.remove).chain(change.roles.iter().map(|role| &role.user));
            conversation(&change.conversation).and_then(|()| users.map(String::as_str).try_for_each(name))
        }
        body::Body::Announced(_) => Ok(()),
        body::Body::RoomJoin(join) => room(&join.room),
        body::Body::RoomLeave(leave) => room(&leave.room),
        body::Body::RoomPublish(publish) => room(&publish.room).and_then(|()| name(&publish.sender)),
        body::Body::RoomGet(get) => room(&get.room),
        body::Body::RoomCounts(counts) => counts.rooms.iter().try_for_each(|count| room(&count.room)),
        body::Body::RoomChange(change) => {
            let roles = change.add_moderators.iter().chain(&change.remove_moderators);
            let sanctioned = change.mute.iter().chain(&change.kick).map(|sanction| &sanction.user);
            let owner = (!change.owner.is_empty()).then_some(&change.owner);
            let mut users = roles.chain(sanctioned).chain(owner);
            room(&change.room).and_then(|()| users.try_for_each(|user| name(user)))
        }
        body::Body::Register(register) => user(&register.user).and_then(|()| name(&register.device)),
        body::Body::Close(close) => user(&close.user).and_then(|()| name(&close.device)),
        body::Body::Subscribe(subscribe) => user(&subscribe.user).and_then(|()| name(&subscribe.device)),
        body::Body::Cursors(cursors) => user(&cursors.user).and_then(|()| name(&cursors.device)),
        body::Body::Conversations(list) => user(&list.user),
        body::Body::Presence(presence) => user(&presence.user),
        body::Body::Kick(kick) => user(&kick.user),
        body::Body::Notify(notify) => {
            let told = notify.recipients.iter().map(|recipient| &recipient.user);
            told.chain(notify.read_states.iter().map(|state| &state.user)).try_for_each(|id| user(id))
        }
    }
}
