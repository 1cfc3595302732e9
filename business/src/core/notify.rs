//! Tells the owners of the recipients what was committed, until they have it.
//!
//! The log is the queue: what is beyond the window is read again from it, and a new owner begins after the stored watermark. The
//! watermark is the lowest `pos` that is not acknowledged, less one.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use im_proto::ids::{Conversation as Parsed, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{Body, Notify, Recipient, body};

use super::calls::{StoreAnswer, StoreCall};
use super::ownership::RETRY_PAUSE;
use super::shard::{OwnedShard, entry_of};
use super::{Context, Core, Env, owned_at};
use crate::store::{LogEntry, StoreError};

/// Entries read from the log at a time.
const BACKLOG_ENTRIES: u32 = 512;

/// What a request to another owner was for.
#[derive(Debug, Clone, Copy)]
pub(super) enum PeerToken {
    /// Nothing depends on it.
    Hint,
    /// Recipients of an entry in one shard.
    Notify { shard: u32, epoch: u64, pos: u64, recipients_shard: u32 },
}

/// Notifications of one shard's log.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Up to here notifications were begun.
    started: u64,
    /// Begun, not acknowledged by all.
    pending: BTreeMap<u64, Pending>,
    /// Read from the log, not begun.
    backlog: VecDeque<LogEntry>,
    reading: bool,
    read_again_at: Duration,
    behind_since: Duration,
    /// The watermark in the batch under way.
    pub(super) watermark_sent: u64,
}

#[derive(Debug)]
struct Pending {
    entry: LogEntry,
    at: Duration,
    parts: Vec<Part>,
}

/// The recipients of an entry that one shard holds.
#[derive(Debug)]
struct Part {
    shard: u32,
    /// The request under way; `None`: send at `again_at`.
    request: Option<u64>,
    again_at: Duration,
}

impl Part {
    fn is_due(&self, now: Duration) -> bool {
        self.request.is_none() && self.again_at <= now
    }
}

/// Who is told by which shard's owner, in the order of shards.
fn by_shard(recipients: Vec<Recipient>, shards: u32) -> Vec<(u32, Vec<Recipient>)> {
    let mut placed: Vec<(u32, Recipient)> =
        recipients.into_iter().map(|recipient| (shard_of(&recipient.user, shards), recipient)).collect();
    placed.sort_by_key(|(shard, _)| *shard);
    let mut groups: Vec<(u32, Vec<Recipient>)> = Vec::new();
    for (shard, recipient) in placed {
        match groups.last_mut() {
            Some((last, group)) if *last == shard => group.push(recipient),
            _ => groups.push((shard, vec![recipient])),
        }
    }
    groups
}

impl Outgoing {
    pub(super) fn new(watermark: u64, now: Duration) -> Self {
        Self {
            started: watermark,
            pending: BTreeMap::new(),
            backlog: VecDeque::new(),
            reading: false,
            read_again_at: now,
            behind_since: now,
            watermark_sent: 0,
        }
    }

    /// All up to here is with its recipients.
    pub(super) fn watermark(&self, head_pos: u64) -> u64 {
        self.pending.keys().next().map_or(self.started, |pos| pos - 1).min(head_pos)
    }

    /// How long the oldest entry waits.
    pub(super) fn lag(&self, head_pos: u64, now: Duration) -> Duration {
        match self.pending.values().next() {
            Some(oldest) => now.saturating_sub(oldest.at),
            None if self.started < head_pos => now.saturating_sub(self.behind_since),
            None => Duration::ZERO,
        }
    }

    pub(super) fn cancel_all(&mut self, env: &mut Env) {
        for request in self.pending.values().flat_map(|pending| &pending.parts).filter_map(|part| part.request) {
            env.router.cancel(request);
        }
        self.pending.clear();
    }
}

impl OwnedShard {
    /// An entry of ours was committed.
    pub(super) fn notify_committed(&mut self, env: &mut Env, entry: LogEntry) {
        let outgoing = &self.outgoing;
        let in_turn = outgoing.started + 1 == entry.pos && outgoing.backlog.is_empty() && !outgoing.reading;
        if !in_turn || outgoing.pending.len() >= env.limits.notify_window || !self.begin(env, &entry) {
            if self.outgoing.started + 1 == entry.pos {
                self.outgoing.behind_since = env.now.mono;
            }
            self.read_backlog(env);
        }
    }

    /// Reads what is not begun, if there is room for it.
    pub(super) fn read_backlog(&mut self, env: &mut Env) {
        let head_pos = self.head_pos();
        let outgoing = &mut self.outgoing;
        let is_due = outgoing.started < head_pos && outgoing.backlog.is_empty() && !outgoing.reading;
        if is_due && outgoing.pending.len() <= env.limits.notify_window / 2 && env.now.mono >= outgoing.read_again_at {
            outgoing.reading = true;
            let call = StoreCall::Since { shard: self.number, after_pos: outgoing.started, limit: BACKLOG_ENTRIES };
            env.call(call, Context::Since { shard: self.number, epoch: self.epoch });
        }
    }

    pub(super) fn backlog_read(&mut self, env: &mut Env, answer: Result<StoreAnswer, StoreError>) {
        self.outgoing.reading = false;
        match answer {
            Ok(StoreAnswer::Since(entries)) => {
                let started = self.outgoing.started;
                let mut expected = started + 1;
                for entry in entries.into_iter().filter(|entry| entry.pos > started) {
                    if entry.pos != expected {
                        env.stats.holes += 1;
                        tracing::error!(
                            shard = self.number,
                            expected,
                            found = entry.pos,
                            "a hole in the log: a stored message was lost"
                        );
                    }
                    expected = entry.pos + 1;
                    self.outgoing.backlog.push_back(entry);
                }
                self.notify_backlog(env);
            }
            _ => self.outgoing.read_again_at = env.now.mono + RETRY_PAUSE,
        }
    }

    /// Begins what was read, in order, as far as the window and the members of groups in memory allow.
    pub(super) fn notify_backlog(&mut self, env: &mut Env) {
        while let Some(entry) = self.outgoing.backlog.front().cloned() {
            if self.outgoing.pending.len() >= env.limits.notify_window || !self.begin(env, &entry) {
                return;
            }
            self.outgoing.backlog.pop_front();
        }
        self.read_backlog(env);
    }

    /// Who is told of an entry; `None` while the group is being read.
    fn recipients_of(&mut self, env: &mut Env, entry: &LogEntry) -> Option<Vec<Recipient>> {
        if let Ok(Parsed::Direct(a, b)) = Parsed::parse(&entry.conversation) {
            let told = |user: &str| Recipient { user: user.to_owned(), from_seq: 1, to_seq: 0, as_of: 0 };
            return Some(if a == b { vec![told(a)] } else { vec![told(a), told(b)] });
        }
        self.conversation_or_load(env, &entry.conversation).map(|conversation| conversation.recipients(entry.seq))
    }

    fn begin(&mut self, env: &mut Env, entry: &LogEntry) -> bool {
        let Some(recipients) = self.recipients_of(env, entry) else { return false };
        self.outgoing.started = entry.pos;
        if recipients.is_empty() {
            env.stats.notified += 1;
            return true;
        }
        let at = env.now.mono;
        let mut parts = Vec::new();
        for (shard, recipients) in by_shard(recipients, env.shards) {
            let mut part = Part { shard, request: None, again_at: at };
            self.send_part(env, entry, recipients, &mut part);
            parts.push(part);
        }
        self.outgoing.pending.insert(entry.pos, Pending { entry: entry.clone(), at, parts });
        true
    }

    fn send_part(&self, env: &mut Env, entry: &LogEntry, recipients: Vec<Recipient>, part: &mut Part) {
        let notify = Notify {
            conversation: entry.conversation.to_string(),
            entry: Some(entry_of(entry)),
            recipients,
            read_states: Vec::new(),
        };
        let (shard, epoch, recipients_shard) = (self.number, self.epoch, part.shard);
        let token = PeerToken::Notify { shard, epoch, pos: entry.pos, recipients_shard };
        let body = Body { body: Some(body::Body::Notify(notify)) };
        match env.router.request(part.shard, 0, body, token) {
            Ok(request) => part.request = Some(request),
            Err(_) => part.again_at = env.now.mono + RETRY_PAUSE,
        }
    }

    fn notified(&mut self, env: &mut Env, pos: u64, recipients_shard: u32, outcome: Outcome) {
        let Some(pending) = self.outgoing.pending.get_mut(&pos) else { return };
        let Some(index) = pending.parts.iter().position(|part| part.shard == recipients_shard) else { return };
        if let Outcome::Done(_) = outcome {
            pending.parts.swap_remove(index);
            self.load_count += 1;
            if pending.parts.is_empty() {
                self.outgoing.pending.remove(&pos);
                env.stats.notified += 1;
                self.notify_backlog(env);
            }
        } else {
            pending.parts[index].request = None;
            pending.parts[index].again_at = env.now.mono + RETRY_PAUSE;
        }
    }

    /// Sends again what was refused for now.
    pub(super) fn retry_notifications(&mut self, env: &mut Env) {
        let now = env.now.mono;
        let is_due = |pending: &Pending| pending.parts.iter().any(|part| part.is_due(now));
        let due: Vec<u64> =
            self.outgoing.pending.iter().filter(|(_, pending)| is_due(pending)).map(|(pos, _)| *pos).collect();
        for pos in due {
            let Some(mut pending) = self.outgoing.pending.remove(&pos) else { continue };
            if let Some(recipients) = self.recipients_of(env, &pending.entry) {
                for (shard, recipients) in by_shard(recipients, env.shards) {
                    let mut parts = pending.parts.iter_mut();
                    if let Some(part) = parts.find(|part| part.shard == shard && part.is_due(now)) {
                        self.send_part(env, &pending.entry, recipients, part);
                    }
                }
            }
            self.outgoing.pending.insert(pos, pending);
        }
        self.notify_backlog(env);
    }
}

impl Core {
    /// Another owner answered.
    pub(super) fn peer_answered(&mut self, token: PeerToken, outcome: Outcome) {
        if let PeerToken::Notify { shard, epoch, pos, recipients_shard } = token
            && let Some(owned) = owned_at(&mut self.slots, shard, epoch)
        {
            owned.notified(&mut self.env, pos, recipients_shard, outcome);
        }
    }
}
