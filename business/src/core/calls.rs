//! What the core asks of the store, as values: the shell runs them against a real store, a simulation against one in memory.

use std::sync::Arc;

use bytes::Bytes;
use im_proto::ids::MemberId;

use crate::store::{
    Acquired, Claim, LogEntry, LogRange, Outcome, Released, ScrubAt, Scrubbed, ShardBatch, ShardRow, Store, StoreError,
};

/// How many entries of a conversation's end are read with it: senders' marks are implied by what they sent in them.
pub const TAIL_ENTRIES: u32 = 64;
/// Items read at a time.
const PAGE: u32 = 1_000;

/// One question or write.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // the fields are those of the trait's methods
pub enum StoreCall {
    /// Every shard's row.
    Shards,
    /// Compare-and-set of shards.
    Acquire(Vec<Claim>),
    /// Give shards back: (shard, epoch).
    Release(Vec<(u32, u64)>),
    /// Are these still ours: (shard, epoch)?
    Check(Vec<(u32, u64)>),
    /// Durable writes.
    Commit(Vec<ShardBatch>),
    /// All that is kept of a conversation but its log.
    LoadConversation { shard: u32, conversation: Arc<str> },
    /// All that is kept of a user.
    LoadUser { shard: u32, user: Arc<str> },
    /// All that is kept of a live room.
    LoadRoom { shard: u32, room: Arc<str> },
    /// What was stored under a key.
    Find { shard: u32, conversation: Arc<str>, key: Bytes },
    /// A part of a conversation's log.
    Range(LogRange),
    /// A part of a shard's log.
    Since { shard: u32, after_pos: u64, limit: u32 },
    /// Holes in a part of a shard's log.
    Scrub { shard: u32, after: ScrubAt, limit: u32 },
}

/// The answer to the call of the same name.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // named after the calls
pub enum StoreAnswer {
    Shards(Vec<ShardRow>),
    Acquire(Vec<Acquired>),
    Release(Vec<Released>),
    Check(Vec<ShardRow>),
    Commit(Vec<Outcome>),
    LoadConversation(ConversationRows),
    LoadUser(UserRows),
    LoadRoom(RoomRows),
    Find(Option<LogEntry>),
    Range(Vec<LogEntry>),
    Since(Vec<LogEntry>),
    Scrub(Scrubbed),
}

/// A conversation as stored. Keys come without their prefix.
#[derive(Debug, Clone, Default)]
pub struct ConversationRows {
    /// (seq, ts_ms) of the last entry.
    pub head: (u64, i64),
    /// Read marks by user.
    pub marks: Vec<(String, Bytes)>,
    /// The group's row, if it is one and exists.
    pub group: Option<Bytes>,
    /// Members of a group, past ones too.
    pub members: Vec<(String, Bytes)>,
    /// The last entries, ascending.
    pub tail: Vec<LogEntry>,
}

/// A user as stored. Keys come without their prefix.
#[derive(Debug, Clone, Default)]
pub struct UserRows {
    /// By conversation.
    pub index: Vec<(String, Bytes)>,
    /// By device.
    pub sessions: Vec<(String, Bytes)>,
    /// By device.
    pub cursors: Vec<(String, Bytes)>,
}

/// A live room as stored.
#[derive(Debug, Clone, Default)]
pub struct RoomRows {
    /// How it is moderated.
    pub settings: Option<Bytes>,
    /// Its totals.
    pub totals: Option<Bytes>,
    /// Which gateways' counts are in the totals of all rooms of the shard.
    pub counted: Option<Bytes>,
}

/// Names of items. Ids have no `/`, so no prefix is a prefix of another's.
pub mod keys {
    /// A user's read mark.
    pub fn mark(conversation: &str, user: &str) -> String {
        format!("m/{conversation}/{user}")
    }
    /// A group's own row.
    pub fn group(conversation: &str) -> String {
        format!("G/{conversation}")
    }
    /// A member of a group.
    pub fn member(conversation: &str, user: &str) -> String {
        format!("g/{conversation}/{user}")
    }
    /// A conversation of a user.
    pub fn index(user: &str, conversation: &str) -> String {
        format!("i/{user}/{conversation}")
    }
    /// A session.
    pub fn session(user: &str, device: &str) -> String {
        format!("s/{user}/{device}")
    }
    /// A session's cursors.
    pub fn cursors(user: &str, device: &str) -> String {
        format!("c/{user}/{device}")
    }
    /// A live room's settings.
    pub fn room(room: &str) -> String {
        format!("r/{room}")
    }
    /// A live room's totals.
    pub fn room_counts(room: &str) -> String {
        format!("t/{room}")
    }
    /// Which gateways' counts are in the totals of the shard's rooms.
    pub fn counted() -> &'static str {
        "T/"
    }
}

/// Runs a call against a store.
///
/// # Errors
/// The store's own: see [`StoreError`] for what is certain after it.
pub async fn execute(store: &dyn Store, me: &MemberId, call: StoreCall) -> Result<StoreAnswer, StoreError> {
    Ok(match call {
        StoreCall::Shards => StoreAnswer::Shards(store.shards().await?),
        StoreCall::Acquire(claims) => StoreAnswer::Acquire(store.acquire(me, claims).await?),
        StoreCall::Release(shards) => StoreAnswer::Release(store.release(me, shards).await?),
        StoreCall::Check(shards) => StoreAnswer::Check(store.check(me, shards).await?),
        StoreCall::Commit(batches) => StoreAnswer::Commit(store.commit(me, batches).await?),
        StoreCall::Find { shard, conversation, key } => StoreAnswer::Find(store.find(shard, conversation, key).await?),
        StoreCall::Range(range) => StoreAnswer::Range(store.range(range).await?),
        StoreCall::Since { shard, after_pos, limit } => StoreAnswer::Since(store.since(shard, after_pos, limit).await?),
        StoreCall::Scrub { shard, after, limit } => StoreAnswer::Scrub(store.scrub(shard, after, limit).await?),
        StoreCall::LoadConversation { shard, conversation } => {
            let tails = store.tails(vec![(shard, conversation.clone())], TAIL_ENTRIES).await?;
            load_behind(store, shard, conversation, tails.into_iter().next().unwrap_or_default()).await?
        }
        StoreCall::LoadUser { shard, user } => {
            let index = all_items(store, shard, keys::index(&user, "")).await?;
            let sessions = all_items(store, shard, keys::session(&user, "")).await?;
            let cursors = if sessions.is_empty() {
                Vec::new()
            } else {
                all_items(store, shard, keys::cursors(&user, "")).await?
            };
            StoreAnswer::LoadUser(UserRows { index, sessions, cursors })
        }
        StoreCall::LoadRoom { shard, room } => {
            let names = vec![keys::room(&room), keys::room_counts(&room), keys::counted().to_owned()];
            let mut rows = store.get(shard, names).await?.into_iter();
            let mut next = || rows.next().flatten();
            StoreAnswer::LoadRoom(RoomRows { settings: next(), totals: next(), counted: next() })
        }
    })
}

/// Loads a conversation whose newest entries, newest first, are known.
///
/// # Errors
/// As [`execute`].
pub async fn load_behind(
    store: &dyn Store,
    shard: u32,
    conversation: Arc<str>,
    mut tail: Vec<LogEntry>,
) -> Result<StoreAnswer, StoreError> {
    // The end of the log tells the head as well; where there is none, nobody has a mark, and no group exists.
    let Some(head) = tail.first().map(|last| (last.seq, last.ts_ms)) else {
        return Ok(StoreAnswer::LoadConversation(ConversationRows::default()));
    };
    tail.reverse();
    let marks = all_items(store, shard, keys::mark(&conversation, "")).await?;
    let (group, members) = if conversation.starts_with("g/") {
        let group = store.get(shard, vec![keys::group(&conversation)]).await?.into_iter().next().flatten();
        (group, all_items(store, shard, keys::member(&conversation, "")).await?)
    } else {
        (None, Vec::new())
    };
    Ok(StoreAnswer::LoadConversation(ConversationRows { head, marks, group, members, tail }))
}

/// Every item under a prefix, the prefix cut off.
async fn all_items(store: &dyn Store, shard: u32, prefix: String) -> Result<Vec<(String, Bytes)>, StoreError> {
    let mut all: Vec<(String, Bytes)> = Vec::new();
    loop {
        let after = all.last().map(|(key, _)| format!("{prefix}{key}"));
        let page = store.items(shard, prefix.clone(), after, PAGE).await?;
        let last = page.is_empty();
        for (key, value) in page {
            let Some(rest) = key.strip_prefix(&prefix) else {
                return Err(StoreError::unknown(format_args!("the store answers {prefix} with {key}")));
            };
            all.push((rest.to_owned(), value));
        }
        // An answer may end early by size: only an empty one is the end; a short first page of a few items is, too.
        if last || (all.len() < PAGE as usize && all.iter().map(|(_, value)| value.len()).sum::<usize>() < 1 << 20) {
            return Ok(all);
        }
    }
}
