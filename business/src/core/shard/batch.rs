//! A shard's batches: how writes become one, and what becomes of them when the store has answered.
//!
//! Sequence numbers are given when a batch is formed, against what is committed, and taken over when the commit is confirmed; a batch
//! that is not stored leaves no trace. One batch of a shard is under way at a time; what comes meanwhile waits for the next.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use im_proto::ids::shard_of;
use im_proto::link::reply::Outcome as Answer;
use im_proto::link::{Body, EntryKind, GroupChange, MarkRead, Marked, Notify, ReadState, Refusal, Send, Stored, body};
use im_proto::state::{GroupRow, MarkRow};
use im_proto::topic::SYSTEM_SENDER;
use prost::Message;

use super::{NOT_A_MEMBER, OwnedShard, group_info};
use crate::core::calls::keys;
use crate::core::conversation::{Conversation, GroupStep, Member};
use crate::core::notify::PeerToken;
use crate::core::ownership::RETRY_PAUSE;
use crate::core::rooms::{FormedRoom, FormingRooms, RoomWrite};
use crate::core::users::UserWrite;
use crate::core::{Env, ReplyTo};
use crate::store::{Duplicate, LogEntry, Put, ShardBatch};

/// Writes of one shard in one batch.
const BATCH_OPS_MAX: usize = 512;
/// How often a watermark that moved is written when nothing else is.
const WATERMARK_INTERVAL: Duration = Duration::from_secs(5);
/// How often it is written with something else. What a new owner notifies again for nothing is at most so old.
const WATERMARK_WITH_BATCH_INTERVAL: Duration = Duration::from_secs(1);

/// A write that waits for the next batch.
pub(in crate::core) enum Op {
    Send { to: ReplyTo, send: Send, key: Bytes },
    Mark { to: ReplyTo, mark: MarkRead },
    Group { to: ReplyTo, change: GroupChange },
    User(UserWrite),
    Room(RoomWrite),
}

/// A write under way.
pub(super) enum Formed {
    Send {
        to: ReplyTo,
        send: Send,
        key: Bytes,
        entry: LogEntry,
    },
    Mark {
        to: ReplyTo,
        mark: MarkRead,
        seq: u64,
    },
    /// An implied mark, written with the batch.
    Implied {
        conversation: Arc<str>,
        user: Arc<str>,
        seq: u64,
    },
    Group {
        to: ReplyTo,
        change: GroupChange,
        entries: Vec<LogEntry>,
        members: Vec<(Arc<str>, Member)>,
    },
    User(UserWrite),
    Room(FormedRoom),
}

impl Op {
    /// The conversation or the rooms that it needs in memory.
    pub(super) fn names(&self) -> Vec<&str> {
        match self {
            Self::Send { send, .. } => vec![&send.conversation],
            Self::Mark { mark, .. } => vec![&mark.conversation],
            Self::Group { change, .. } => vec![&change.conversation],
            Self::User(_) => Vec::new(),
            Self::Room(RoomWrite::Counts { counts, .. }) => counts.rooms.iter().map(|count| &*count.room).collect(),
            Self::Room(RoomWrite::Change { change, .. }) => vec![&change.room],
        }
    }
}

impl Formed {
    /// See [`Op::names`].
    pub(super) fn names(&self) -> Vec<&str> {
        match self {
            Self::Send { send, .. } => vec![&send.conversation],
            Self::Mark { mark, .. } => vec![&mark.conversation],
            Self::Implied { conversation, .. } => vec![conversation],
            Self::Group { change, .. } => vec![&change.conversation],
            Self::User(_) => Vec::new(),
            Self::Room(FormedRoom::Counts { counts, .. }) => counts.rooms.iter().map(|count| &*count.room).collect(),
            Self::Room(FormedRoom::Change { change, .. }) => vec![&change.room],
        }
    }

    fn entries(&self) -> &[LogEntry] {
        match self {
            Self::Send { entry, .. } => std::slice::from_ref(entry),
            Self::Group { entries, .. } => entries,
            _ => &[],
        }
    }
}

impl OwnedShard {
    /// Takes what waits into a batch, within what is left of the commit's budget.
    pub(in crate::core) fn form_batch(
        &mut self,
        env: &mut Env,
        ops_left: &mut usize,
        bytes_left: &mut usize,
    ) -> Option<ShardBatch> {
        let now = env.now.mono;
        let is_released = self.leaving.as_ref().is_some_and(|leaving| leaving.releasing);
        if self.under_way.is_some() || is_released || now < self.write_again_at {
            return None;
        }
        let interval = if self.ops.is_empty() { WATERMARK_INTERVAL } else { WATERMARK_WITH_BATCH_INTERVAL };
        let is_due = now >= self.watermark_written_at + interval || self.leaving.is_some();
        let watermark = is_due.then(|| self.outgoing.watermark(self.head_pos));
        let watermark = watermark.filter(|watermark| *watermark > self.watermark_written);
        if self.ops.is_empty() && watermark.is_none() {
            return None;
        }
        let mut forming = Forming { pos: self.head_pos, ts_ms: env.now.wall_ms, ..Forming::default() };
        let budget = BATCH_OPS_MAX.min(*ops_left);
        while forming.formed.len() < budget && *bytes_left > 0 {
            let Some(op) = self.ops.pop_front() else { break };
            if let Op::Send { send, .. } = &op {
                *bytes_left = bytes_left.saturating_sub(send.payload.len());
            }
            self.form(env, &mut forming, op);
        }
        let Forming { deferred, formed, appends, mut puts, heads, rooms, ts_ms, .. } = forming;
        puts.extend(self.room_puts(&rooms, ts_ms));
        for op in deferred.into_iter().rev() {
            self.ops.push_front(op);
        }
        let mut formed = formed;
        for (id, head) in heads {
            let Some(conversation) = self.conversation(&id) else { continue };
            for (user, seq) in conversation.marks_due(head) {
                puts.push(Put { key: keys::mark(&id, &user), value: Some(MarkRow { seq }.encode_to_vec().into()) });
                formed.push(Formed::Implied { conversation: id.clone(), user, seq });
            }
        }
        // The last batch of a shard that leaves gives it back as well.
        let release = self.ops.is_empty()
            && self.parked.is_empty()
            && self.leaving.as_ref().is_some_and(|leaving| leaving.ask_at <= now);
        if formed.is_empty() && watermark.is_none() {
            return None;
        }
        *ops_left = ops_left.saturating_sub(formed.len());
        self.outgoing.watermark_sent = watermark.unwrap_or(0);
        if watermark.is_some() {
            self.watermark_written_at = now;
        }
        self.under_way = Some(formed);
        if let Some(leaving) = &mut self.leaving {
            leaving.releasing = release;
        }
        Some(ShardBatch { shard: self.number, epoch: self.epoch, appends, puts, watermark, release })
    }

    fn form(&mut self, env: &mut Env, forming: &mut Forming, op: Op) {
        match op {
            Op::Send { to, send, key } => {
                let Some(conversation) = self.conversation(&send.conversation) else {
                    return self.refuse_in_turn(env, to, Refusal::Busy, "the conversation left memory: send again");
                };
                let id = conversation.id.clone();
                if !conversation.is_member(&send.sender) {
                    if to.again {
                        // He may have been one when it was stored.
                        return self.look_for(env, to, id, key);
                    }
                    return self.refuse_in_turn(env, to, Refusal::NotAMember, NOT_A_MEMBER);
                }
                if self.would_overtake(&to) {
                    return self.refuse_in_turn(
                        env,
                        to,
                        Refusal::Busy,
                        "an earlier message of this connection was refused: send again",
                    );
                }
                let Some(conversation) = self.conversation(&id) else { return };
                if forming.closed.contains(&id) || !forming.keys.insert((id.clone(), key.clone())) {
                    // The same key twice: the second waits until the first is stored, and everything behind it too.
                    forming.closed.insert(id);
                    return forming.deferred.push_back(Op::Send { to, send, key });
                }
                let entry = forming.append(
                    conversation,
                    &send.sender,
                    &send.device,
                    &send.client_id,
                    key.clone(),
                    0,
                    send.payload.clone(),
                );
                forming.formed.push(Formed::Send { to, send, key, entry });
            }
            Op::Mark { to, mark } => {
                let Some(conversation) = self.conversation(&mark.conversation) else {
                    return env.refuse(to, Refusal::Busy, "the conversation left memory: send again");
                };
                if conversation.visible(&mark.user).is_empty() {
                    return env.refuse(to, Refusal::NotAMember, NOT_A_MEMBER);
                }
                let known = conversation.mark(&mark.user);
                let seq = mark.seq.min(conversation.visible_head(&mark.user));
                if seq <= known {
                    return env.reply(to, Answer::Marked(Marked { seq: known }));
                }
                let value = Some(MarkRow { seq }.encode_to_vec().into());
                forming.puts.push(Put { key: keys::mark(&conversation.id, &mark.user), value });
                forming.formed.push(Formed::Mark { to, mark, seq });
            }
            Op::Group { to, change } => {
                let Some(conversation) = self.conversation(&change.conversation) else {
                    return env.refuse(to, Refusal::Busy, "the conversation left memory: ask again");
                };
                let id = conversation.id.clone();
                // Members are checked against what is committed: a change closes its conversation for the rest of the batch.
                if !forming.closed.insert(id.clone()) || forming.heads.contains_key(&id) {
                    return forming.deferred.push_back(Op::Group { to, change });
                }
                let steps = match conversation.plan_change(&change) {
                    Ok(steps) => steps,
                    Err((code, reason)) => return env.refuse(to, code, reason),
                };
                if steps.is_empty() {
                    let info = group_info(conversation);
                    return env.reply(to, Answer::Group(info));
                }
                if conversation.head == 0 {
                    let row = GroupRow { created_ms: env.now.wall_ms };
                    forming.puts.push(Put { key: keys::group(&id), value: Some(row.encode_to_vec().into()) });
                }
                let (mut entries, mut members) = (Vec::new(), Vec::new());
                for (index, GroupStep { payload, members: changed }) in steps.into_iter().enumerate() {
                    let mut key = BytesMut::from(&[3u8][..]);
                    key.put_slice(change.key.as_bytes());
                    key.put_u8(index as u8);
                    let kind = EntryKind::System as u8;
                    entries.push(forming.append(conversation, SYSTEM_SENDER, "", "", key.freeze(), kind, payload));
                    for (user, member) in &changed {
                        forming.puts.push(Put { key: keys::member(&id, user), value: Some(member.encode()) });
                    }
                    members.extend(changed);
                }
                forming.formed.push(Formed::Group { to, change, entries, members });
            }
            Op::User(write) => {
                forming.puts.extend(write.puts.iter().cloned());
                forming.formed.push(Formed::User(write));
            }
            Op::Room(write) => self.form_room(env, forming, write),
        }
    }

    /// The batch is stored.
    pub(in crate::core) fn committed(&mut self, env: &mut Env, at: Duration) {
        self.confirmed(env, at);
        let Some(formed) = self.under_way.take() else { return };
        env.is_urgent |= self.leaving.is_some();
        self.watermark_written = self.watermark_written.max(self.outgoing.watermark_sent);
        for write in formed {
            match write {
                Formed::Send { to, entry, .. } => {
                    let (seq, ts_ms) = (entry.seq, entry.ts_ms);
                    env.reply(to, Answer::Stored(Stored { seq, ts_ms }));
                    self.entry_committed(env, entry);
                }
                Formed::Mark { to, mark, seq } => {
                    if let Some(conversation) = self.conversation_mut(&mark.conversation) {
                        conversation.mark_written(&mark.user.as_str().into(), seq);
                    }
                    env.reply(to, Answer::Marked(Marked { seq }));
                    self.tell_mark(env, &mark, seq);
                }
                Formed::Implied { conversation, user, seq } => {
                    if let Some(conversation) = self.conversation_mut(&conversation) {
                        conversation.mark_written(&user, seq);
                    }
                }
                Formed::Group { to, change, entries, members } => {
                    let now_ms = env.now.wall_ms;
                    if let Some(conversation) = self.conversation_mut(&change.conversation) {
                        conversation.apply_members(members, now_ms);
                    }
                    for entry in entries {
                        self.entry_committed(env, entry);
                    }
                    if let Some(conversation) = self.conversation(&change.conversation) {
                        let info = group_info(conversation);
                        env.reply(to, Answer::Group(info));
                    }
                }
                Formed::User(write) => self.user_written(env, write),
                Formed::Room(write) => self.room_written(env, write),
            }
        }
    }

    fn entry_committed(&mut self, env: &mut Env, entry: LogEntry) {
        env.stats.committed += 1;
        self.load_count += 1;
        self.head_pos = entry.pos;
        if let Some(conversation) = self.conversation_mut(&entry.conversation.clone()) {
            conversation.committed(entry.clone());
        }
        self.notify_committed(env, entry);
    }

    /// A batch that was to give the shard back was not stored.
    fn release_again(&mut self, ask_at: Duration) {
        if let Some(leaving) = &mut self.leaving {
            (leaving.releasing, leaving.ask_at) = (false, ask_at);
        }
    }

    /// Some keys were stored before: they are answered with what is stored, the rest is numbered anew.
    pub(in crate::core) fn duplicates(&mut self, env: &mut Env, duplicates: Vec<Duplicate>) {
        let Some(formed) = self.under_way.take() else { return };
        self.release_again(env.now.mono);
        let mut stored: BTreeMap<usize, LogEntry> =
            duplicates.into_iter().map(|duplicate| (duplicate.index, duplicate.stored)).collect();
        env.stats.duplicates += stored.len() as u64;
        let mut index = 0;
        let mut again = Vec::new();
        for write in formed {
            let entries = write.entries().len();
            let hit = (index..index + entries).find_map(|index| stored.remove(&index));
            index += entries;
            match (write, hit) {
                (Formed::Send { to, send, .. }, Some(stored)) => {
                    if stored.payload == send.payload {
                        env.reply(to, Answer::Stored(Stored { seq: stored.seq, ts_ms: stored.ts_ms }));
                    } else {
                        env.refuse(to, Refusal::IdReused, "this id was used for another message");
                    }
                }
                (Formed::Group { to, change, entries, .. }, Some(stored)) => {
                    let is_message = !change.system_message.is_empty() && entries.len() == 1;
                    if is_message && stored.payload != change.system_message {
                        env.refuse(to, Refusal::IdReused, "this id was used for another message");
                    } else if let Some(conversation) = self.conversation(&change.conversation) {
                        let mut info = group_info(conversation);
                        if is_message {
                            info.head = stored.seq;
                        }
                        env.reply(to, Answer::Group(info));
                    }
                }
                (write, _) => again.extend(reopen(write)),
            }
        }
        for op in again.into_iter().rev() {
            self.ops.push_front(op);
        }
    }

    /// The store certainly wrote nothing: clients are told; what nobody can be refused is tried again.
    pub(in crate::core) fn refused(&mut self, env: &mut Env, reason: &str) {
        self.write_again_at = env.now.mono + RETRY_PAUSE;
        let Some(formed) = self.under_way.take() else { return };
        self.release_again(self.write_again_at);
        let mut again = Vec::new();
        for write in formed {
            match write {
                Formed::Send { to, .. } | Formed::Mark { to, .. } | Formed::Group { to, .. } if !to.again => {
                    self.refuse_in_turn(env, to, Refusal::StoreUnavailable, reason);
                }
                Formed::Send { .. } | Formed::Mark { .. } | Formed::Group { .. } => again.extend(reopen(write)),
                Formed::Room(write) if !write.to().again => {
                    env.refuse(write.to(), Refusal::StoreUnavailable, reason);
                }
                Formed::Room(write) => again.push(Op::Room(write.reopen())),
                Formed::Implied { .. } => {}
                Formed::User(write) => again.extend(self.user_write_refused(env, write, reason).map(Op::User)),
            }
        }
        for op in again.into_iter().rev() {
            self.ops.push_front(op);
        }
    }

    /// Tells the reader's other devices, and in a 1:1 the peer, of a read mark. A hint: heads carry marks too.
    fn tell_mark(&mut self, env: &mut Env, mark: &MarkRead, seq: u64) {
        let Some(conversation) = self.conversation(&mark.conversation) else { return };
        let peer = conversation.peer_of(&mark.user).filter(|peer| ***peer != *mark.user).map(ToString::to_string);
        for user in peer.into_iter().chain([mark.user.clone()]) {
            let shard = shard_of(&user, env.shards);
            let state = ReadState { user, conversation: mark.conversation.clone(), reader: mark.user.clone(), seq };
            let notify = Notify { read_states: vec![state], ..Notify::default() };
            let body = Body { body: Some(body::Body::Notify(notify)) };
            // Full queues drop a hint.
            let _ = env.router.request(shard, 0, body, PeerToken::Hint);
        }
    }
}

/// A batch being put together.
#[derive(Default)]
pub(in crate::core) struct Forming {
    pos: u64,
    ts_ms: i64,
    heads: BTreeMap<Arc<str>, u64>,
    /// Conversations that take nothing more into this batch.
    closed: BTreeSet<Arc<str>>,
    keys: HashSet<(Arc<str>, Bytes), foldhash::fast::FixedState>,
    formed: Vec<Formed>,
    deferred: VecDeque<Op>,
    appends: Vec<LogEntry>,
    puts: Vec<Put>,
    pub(in crate::core) rooms: FormingRooms,
}

impl Forming {
    /// Leaves a write to the next batch.
    pub(in crate::core) fn defer(&mut self, op: Op) {
        self.deferred.push_back(op);
    }

    pub(in crate::core) fn put(&mut self, put: Put) {
        self.puts.push(put);
    }

    pub(in crate::core) fn form_room(&mut self, write: FormedRoom) {
        self.formed.push(Formed::Room(write));
    }

    #[allow(clippy::too_many_arguments)] // the fields of one log entry
    fn append(
        &mut self,
        conversation: &Conversation,
        sender: &str,
        device: &str,
        client_id: &str,
        key: Bytes,
        kind: u8,
        payload: Bytes,
    ) -> LogEntry {
        let head = self.heads.entry(conversation.id.clone()).or_insert(conversation.head);
        *head += 1;
        self.pos += 1;
        let entry = LogEntry {
            conversation: conversation.id.clone(),
            seq: *head,
            pos: self.pos,
            key,
            sender: sender.into(),
            device: device.into(),
            kind,
            client_id: client_id.into(),
            ts_ms: self.ts_ms.max(conversation.head_ts_ms),
            payload,
        };
        self.appends.push(entry.clone());
        entry
    }
}

/// A write that goes into the next batch again.
fn reopen(write: Formed) -> Option<Op> {
    match write {
        Formed::Send { to, send, key, .. } => Some(Op::Send { to, send, key }),
        Formed::Mark { to, mark, .. } => Some(Op::Mark { to, mark }),
        Formed::Group { to, change, .. } => Some(Op::Group { to, change }),
        Formed::Implied { .. } => None,
        Formed::User(write) => Some(Op::User(write)),
        Formed::Room(write) => Some(Op::Room(write.reopen())),
    }
}
