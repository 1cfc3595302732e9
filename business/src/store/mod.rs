//! The store: a fenced log plus a fenced, ordered key-value table for each shard. Nothing else; all chat meaning lives above it.
//!
//! It is also the judge of who owns a shard. A row (shard, epoch, owner) moves by compare-and-set only ([`Store::acquire`]), and
//! every write names the epoch it was made for: a write of an earlier epoch is [`Outcome::Fenced`], whatever its sender believes.
//!
//! | module | engine |
//! | --- | --- |
//! | [`sqlite`] | one SQLite file in this process and a journal before it, one fdatasync for all that waits (what the store member runs) |
//! | [`remote`], [`server`] | the store member over gRPC: any engine, served and called |
//! | [`postgres`] | PostgreSQL |
//! | [`memory`] | maps in memory, for simulations and for trying out |
//!
//! All of them pass the same suite (`tests/store_suite.rs`). Invariant: no engine knows what a key, a kind or a payload means.

pub mod memory;
pub mod postgres;
pub mod remote;
pub mod server;
pub mod sqlite;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use im_proto::ids::MemberId;
use im_proto::token::SharedToken;

/// Multi-row answers end early when their payloads reach this many bytes, so that no answer outgrows a gRPC message.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Multi-row answers end early at this many rows.
pub const ANSWER_ROWS_MAX: u32 = 10_000;
/// Payload bytes of one conversation in an answer of [`Store::tails`].
const TAIL_BYTES_MAX: usize = 1 << 20;

/// The highest `pos` a shard's log can have: SQLite keeps shard and pos in one 63-bit row id.
pub const POS_MAX: u64 = (1 << 40) - 1;

/// The highest shard number.
pub const SHARD_MAX: u32 = (1 << 23) - 1;

/// Where engines log how many rows of the log each transaction stored, at level TRACE: what a bare loop has to write to be compared.
pub(crate) const TRANSACTIONS: &str = "im_business::store::transactions";

/// At most so many holes are named by one call of [`Store::scrub`].
const HOLES_MAX: usize = 100;

/// Who may write a shard. A shard that was never acquired has epoch 0 and no owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardRow {
    /// The shard.
    pub shard: u32,
    /// Grows by one with each acquire.
    pub epoch: u64,
    /// `None` after a release.
    pub owner: Option<MemberId>,
}

impl ShardRow {
    /// The row of a shard that was never acquired.
    pub fn unowned(shard: u32) -> Self {
        Self { shard, epoch: 0, owner: None }
    }

    /// Whether `me` may write in `epoch`.
    pub fn is_held(&self, me: &MemberId, epoch: u64) -> bool {
        self.epoch == epoch && self.owner.as_ref() == Some(me)
    }
}

/// A compare-and-set: (expected epoch, expected owner) → (epoch + 1, me).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The shard.
    pub shard: u32,
    /// The epoch last heard of.
    pub expected_epoch: u64,
    /// The owner last heard of.
    pub expected_owner: Option<MemberId>,
}

impl Claim {
    fn matches(&self, row: &ShardRow) -> bool {
        row.epoch == self.expected_epoch && row.owner == self.expected_owner
    }
}

/// What became of a [`Claim`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// The shard is ours, in the epoch that the tail names.
    Won(Tail),
    /// Somebody else was faster or the claim was out of date: the row found. Do not retry, report it.
    Lost(ShardRow),
}

/// The end of a shard's log, read after its acquire committed: nothing of an earlier epoch can be added to it any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// The shard.
    pub shard: u32,
    /// The epoch just won.
    pub epoch: u64,
    /// The highest `pos`, 0 when the log is empty.
    pub head_pos: u64,
    /// The highest `pos` up to which all notifications were acknowledged, as last stored.
    pub watermark: u64,
    /// The `pos` after the watermark are not contiguous up to the head: something stored was lost.
    pub hole: bool,
}

/// One row of a shard's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// The conversation's id.
    pub conversation: Arc<str>,
    /// 1, 2, 3 … within the conversation.
    pub seq: u64,
    /// 1, 2, 3 … within the shard, in commit order; at most [`POS_MAX`].
    pub pos: u64,
    /// Unique within (shard, conversation): what makes a resend a duplicate.
    pub key: Bytes,
    /// Who sent it.
    pub sender: Arc<str>,
    /// The sender's device.
    pub device: Arc<str>,
    /// What the entry is; the store does not look at it.
    pub kind: u8,
    /// The id that the client gave the message, or empty.
    pub client_id: Arc<str>,
    /// Milliseconds since the Unix epoch, the owner's clock.
    pub ts_ms: i64,
    /// The message.
    pub payload: Bytes,
}

/// A row to be written: the same fields as one that was read.
pub type Append = LogEntry;

/// A write to the shard's key-value table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Put {
    /// Any text without NUL.
    pub key: String,
    /// `None` deletes.
    pub value: Option<Bytes>,
}

/// What one shard wants written: all of it, or nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShardBatch {
    /// The shard; once at most in a commit.
    pub shard: u32,
    /// The epoch in which the writer holds it.
    pub epoch: u64,
    /// New rows of the log.
    pub appends: Vec<Append>,
    /// Writes to the table; of two with the same key the later one counts.
    pub puts: Vec<Put>,
    /// The new watermark; a lower one than stored is ignored.
    pub watermark: Option<u64>,
    /// Gives the shard back with it, as [`Store::release`] would behind it: (epoch, me) → (epoch, nobody).
    pub release: bool,
}

/// What became of a [`ShardBatch`]. Anything but `Committed` means that nothing of that shard's batch was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Stored durably.
    Committed,
    /// The shard is not ours in that epoch: the row found.
    Fenced(ShardRow),
    /// Keys that are stored already. Leave them out, renumber the rest, commit again.
    Duplicates(Vec<Duplicate>),
    /// A (conversation, seq) or (shard, pos) is taken by another key under our own epoch, or the batch contradicts itself: what the
    /// owner believes of the shard is wrong. Acquire it anew.
    Corrupt(String),
}

/// An append whose key is stored already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Duplicate {
    /// Index into the batch's appends.
    pub index: usize,
    /// The entry stored under that key.
    pub stored: LogEntry,
}

/// What became of a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Released {
    /// (epoch, me) → (epoch, nobody).
    Done,
    /// It was not ours any more: the row found.
    Lost(ShardRow),
}

/// A part of one conversation's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRange {
    /// The conversation's shard.
    pub shard: u32,
    /// The conversation.
    pub conversation: Arc<str>,
    /// Forward: the lowest seq. Backward: the highest; 0 = from the head.
    pub from: u64,
    /// At most so many entries.
    pub limit: u32,
    /// The payloads together take at most so many bytes; the first entry comes in any case. Capped by [`ANSWER_BYTES_MAX`].
    pub max_bytes: u32,
    /// Descending instead of ascending seq.
    pub backward: bool,
}

/// How far a scrub has come: up to this `pos`, and, by conversation and seq, up to this entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the doc above says what they are
pub struct ScrubAt {
    pub pos: u64,
    pub conversation: Arc<str>,
    pub seq: u64,
}

/// A part of a shard was looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Texts that name what is missing.
    pub holes: Vec<String>,
    /// Where to go on; `None`: that was the end.
    pub next: Option<ScrubAt>,
}

impl LogRange {
    /// The ranges that [`Store::tails`] is about. They share the bytes of one answer.
    fn tails(conversations: Vec<(u32, Arc<str>)>, limit: u32) -> Vec<Self> {
        let max_bytes = (ANSWER_BYTES_MAX / conversations.len().max(1)).min(TAIL_BYTES_MAX) as u32;
        let tail = |(shard, conversation)| Self { shard, conversation, from: 0, limit, max_bytes, backward: true };
        conversations.into_iter().map(tail).collect()
    }

    fn bytes_max(&self) -> usize {
        (self.max_bytes as usize).min(ANSWER_BYTES_MAX)
    }
}

/// Why the store did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Certainly nothing was stored: the disk is full, the database is read-only or cannot be reached. Try again later.
    #[error("the store refuses: {reason}")]
    Refused {
        /// For the log.
        reason: String,
    },
    /// The call was under way when the connection broke or time ran out: it may or may not be stored. Freeze the shards, acquire
    /// them anew, and look.
    #[error("the outcome is unknown: {reason}")]
    Unknown {
        /// For the log.
        reason: String,
    },
}

impl StoreError {
    /// Certainly nothing was stored.
    pub fn refused(reason: impl fmt::Display) -> Self {
        Self::Refused { reason: reason.to_string() }
    }

    /// May or may not be stored.
    pub fn unknown(reason: impl fmt::Display) -> Self {
        Self::Unknown { reason: reason.to_string() }
    }
}

/// What every call of a [`Store`] gives.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// A store. Answers come in the order of what was asked. Reads see every commit answered before they were asked. A read of many rows
/// may end before its limit ([`ANSWER_BYTES_MAX`], [`ANSWER_ROWS_MAX`]): only an empty answer is the end.
pub trait Store: Send + Sync + 'static {
    /// Compare-and-set of each claim by itself. Waits for, or fences, what the old owner has under way.
    fn acquire(&self, me: &MemberId, claims: Vec<Claim>) -> Answer<'_, Vec<Acquired>>;

    /// Gives shards, held in the epochs named, back. The caller has no commit of theirs open.
    fn release(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<Released>>;

    /// The rows among `shards` that are not (epoch, me) any more.
    fn check(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<ShardRow>>;

    /// Stores batches with one fsync, each of them all or nothing by itself. The caller has at most one commit open for a shard.
    fn commit(&self, me: &MemberId, batches: Vec<ShardBatch>) -> Answer<'_, Vec<Outcome>>;

    /// The entry that was stored under a key, however long ago.
    fn find(&self, shard: u32, conversation: Arc<str>, key: Bytes) -> Answer<'_, Option<LogEntry>>;

    /// A part of a conversation's log.
    fn range(&self, range: LogRange) -> Answer<'_, Vec<LogEntry>>;

    /// The newest entries of some conversations, newest first: at most `limit` of each, and 1 MiB or its part of [`ANSWER_BYTES_MAX`],
    /// but one of each that has any. It is what an owner reads first of a conversation; of many at once, since a call costs more than
    /// to look whether there is anything.
    fn tails(&self, conversations: Vec<(u32, Arc<str>)>, limit: u32) -> Answer<'_, Vec<Vec<LogEntry>>> {
        let ranges = LogRange::tails(conversations, limit);
        Box::pin(futures::future::try_join_all(ranges.into_iter().map(|range| self.range(range))))
    }

    /// A shard's log after a `pos`, in commit order.
    fn since(&self, shard: u32, after_pos: u64, limit: u32) -> Answer<'_, Vec<LogEntry>>;

    /// The table's entries whose keys start with `prefix` and are greater than `after`, in byte order of the keys.
    fn items(&self, shard: u32, prefix: String, after: Option<String>, limit: u32) -> Answer<'_, Vec<(String, Bytes)>>;

    /// The values of some keys.
    fn get(&self, shard: u32, keys: Vec<String>) -> Answer<'_, Vec<Option<Bytes>>>;

    /// Every row that exists.
    fn shards(&self) -> Answer<'_, Vec<ShardRow>>;

    /// Looks for holes in a part of a shard: `pos` must be 1 … head, `seq` of each conversation too. Looks at `limit` rows in either
    /// order, and at no payloads. What is written meanwhile is no hole.
    fn scrub(&self, shard: u32, after: ScrubAt, limit: u32) -> Answer<'_, Scrubbed>;
}

/// Where the store is.
#[derive(Clone, PartialEq, Eq)]
pub enum StoreSpec {
    /// `memory:`: nothing survives the process.
    Memory,
    /// `sqlite:PATH`: a file of this process.
    Sqlite(PathBuf),
    /// `grpc://host:port`: the store member.
    Remote {
        /// `http://host:port`.
        endpoint: String,
    },
    /// `postgres://…`: a libpq connection URL.
    Postgres(String),
}

/// Without credentials.
impl fmt::Debug for StoreSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory:"),
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Remote { endpoint } => write!(f, "grpc{}", endpoint.strip_prefix("http").unwrap_or(endpoint)),
            Self::Postgres(url) => write!(f, "postgres://…@{}", url.rsplit_once('@').map_or("…", |(_, host)| host)),
        }
    }
}

impl FromStr for StoreSpec {
    type Err = OpenError;

    fn from_str(url: &str) -> Result<Self, OpenError> {
        if url == "memory:" {
            return Ok(Self::Memory);
        }
        if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            return Ok(Self::Postgres(url.to_owned()));
        }
        match url.split_once(':') {
            Some(("sqlite", path)) if !path.is_empty() => Ok(Self::Sqlite(path.into())),
            Some(("grpc", address)) if address.len() > 2 && address.starts_with("//") => {
                Ok(Self::Remote { endpoint: format!("http:{address}") })
            }
            _ => Err(OpenError::Url),
        }
    }
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL is none of ours. It is not repeated: it may hold a password.
    #[error("not a store's URL; give sqlite:PATH, grpc://HOST:PORT, postgres://USER@HOST/DATABASE or memory:")]
    Url,
    /// Another process has the file.
    #[error("{path} is in use by another process; a SQLite store has one owner, stop the other or give another path")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file can't be used.
    #[error("cannot open the store {path}: {reason}; check that the directory exists and is writable")]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// The address can't be used.
    #[error("not an address of a store member: {reason}; give grpc://HOST:PORT")]
    Endpoint {
        /// What went wrong.
        reason: String,
    },
    /// The database doesn't answer.
    #[error("cannot use the database: {reason}; check the URL and that the user may create tables")]
    Database {
        /// What went wrong.
        reason: String,
    },
    /// The authorities that the database's certificate may be from can't be used.
    #[error("cannot use the certificates of {of}: {reason}; give a PEM file with those of the authorities")]
    Authorities {
        /// The file, or the system.
        of: String,
        /// What went wrong.
        reason: String,
    },
    /// The database would acknowledge what it can still lose.
    #[error(
        "the database runs with synchronous_commit = off, which loses acknowledged messages; set it to on (or remote_apply) for this user"
    )]
    NotDurable,
}

/// Opens a store. `me` is whom the database is to know this process as; `token` is what a store member asks for (it is not a
/// part of the URL: that is visible to everybody in `ps`); `ca_file` has the authorities that the database's certificate may be from.
pub async fn open(
    spec: &StoreSpec,
    token: SharedToken,
    ca_file: Option<&Path>,
    me: &MemberId,
) -> Result<Arc<dyn Store>, OpenError> {
    Ok(match spec {
        StoreSpec::Memory => Arc::new(memory::MemoryStore::default()),
        StoreSpec::Sqlite(path) => Arc::new(sqlite::Sqlite::open(path)?),
        StoreSpec::Remote { endpoint } => Arc::new(remote::Remote::new(endpoint, token)?),
        StoreSpec::Postgres(url) => Arc::new(postgres::Postgres::open(url, ca_file, me).await?),
    })
}

/// The lowest string above all strings that start with `prefix`, in byte order (= code point order); `None`: there is no end.
fn prefix_end(prefix: &str) -> Option<String> {
    let mut end = prefix.to_owned();
    while let Some(last) = end.pop() {
        // The code points between D800 and DFFF are not characters: RangeInclusive<char> knows.
        if let Some(next) = (last..=char::MAX).nth(1) {
            end.push(next);
            return Some(end);
        }
    }
    None
}

/// Refuses claims of shards that no engine can hold.
fn claimable(claims: &[Claim]) -> Result<(), StoreError> {
    match claims.iter().find(|claim| claim.shard > SHARD_MAX) {
        Some(claim) => Err(StoreError::refused(format_args!("shard {} is above {SHARD_MAX}", claim.shard))),
        None => Ok(()),
    }
}

/// What is wrong with each batch in itself, without looking at what is stored; `None`: nothing. Every engine asks this first.
fn malformed(batches: &[ShardBatch]) -> Vec<Option<String>> {
    let mut seen = HashSet::with_capacity(batches.len());
    batches
        .iter()
        .map(|batch| {
            if batch.shard > SHARD_MAX {
                return Some(format!("shard {} is above {SHARD_MAX}", batch.shard));
            }
            if !seen.insert(batch.shard) {
                return Some(format!("shard {} is twice in one commit", batch.shard));
            }
            for entry in &batch.appends {
                if !(1..=POS_MAX).contains(&entry.pos) || !(1..=i64::MAX as u64).contains(&entry.seq) {
                    return Some(format!("seq {} or pos {} is out of range", entry.seq, entry.pos));
                }
                let texts = [&entry.conversation, &entry.sender, &entry.device, &entry.client_id];
                if texts.iter().any(|text| text.contains('\0')) {
                    return Some(format!("a text of pos {} has a NUL", entry.pos));
                }
            }
            if let Some(watermark) = batch.watermark.filter(|watermark| *watermark > POS_MAX) {
                return Some(format!("watermark {watermark} is above {POS_MAX}"));
            }
            if batch.puts.iter().any(|put| put.key.contains('\0')) {
                return Some("an item's key has a NUL".to_owned());
            }
            None
        })
        .collect()
}

/// Two appends of one batch that exclude each other.
fn contradiction(batch: &ShardBatch) -> Option<String> {
    let (mut keys, mut seqs, mut positions) = (HashSet::new(), HashSet::new(), HashSet::new());
    batch.appends.iter().find_map(|e| {
        if !positions.insert(e.pos) {
            Some(format!("pos {} is twice in the batch of shard {}", e.pos, batch.shard))
        } else if !seqs.insert((&e.conversation, e.seq)) {
            Some(format!("{} seq {} is twice in the batch", e.conversation, e.seq))
        } else if !keys.insert((&e.conversation, &e.key)) {
            Some(format!("{} seq {} has a key that is in the batch before it", e.conversation, e.seq))
        } else {
            None
        }
    })
}

/// The text for an append whose place is taken by another key.
fn place_taken(shard: u32, wanted: &LogEntry) -> String {
    format!("shard {shard}: pos {} or {} seq {} is taken by another entry", wanted.pos, wanted.conversation, wanted.seq)
}

/// The last put of each key: what counts.
fn last_puts(puts: &[Put]) -> impl Iterator<Item = &Put> {
    let last: HashMap<&str, usize> = puts.iter().enumerate().map(|(i, put)| (put.key.as_str(), i)).collect();
    puts.iter().enumerate().filter(move |(i, put)| last.get(put.key.as_str()) == Some(i)).map(|(_, put)| put)
}

/// The rows that one call of [`Store::scrub`] reads in either order.
fn scrub_limit(limit: u32) -> u32 {
    limit.clamp(1, ANSWER_ROWS_MAX)
}

/// What a scrub makes of what it read behind `after`, in order and up to `limit`. The watermark was read before: what was appended since
/// then would else look lost.
fn scrubbed(
    shard: u32,
    after: ScrubAt,
    limit: u32,
    watermark: u64,
    positions: &[u64],
    seqs: Vec<(Arc<str>, u64)>,
) -> Scrubbed {
    let is_end = positions.len().max(seqs.len()) < scrub_limit(limit) as usize;
    let (mut at, mut holes) = (after, Vec::new());
    for &pos in positions {
        if pos != at.pos + 1 {
            holes.push(hole_text(shard, "pos", at.pos, pos));
        }
        at.pos = pos;
    }
    for (conversation, seq) in seqs {
        let before = if at.conversation == conversation { at.seq } else { 0 };
        if seq != before + 1 {
            holes.push(hole_text(shard, &format!("conversation {conversation}: seq"), before, seq));
        }
        (at.conversation, at.seq) = (conversation, seq);
    }
    if is_end && watermark > at.pos {
        holes.push(hole_text(shard, "pos", at.pos, watermark + 1));
    }
    holes.truncate(HOLES_MAX);
    Scrubbed { holes, next: (!is_end).then_some(at) }
}

/// The text for numbers missing between `before` and `found`. `what`: "pos", or "conversation X: seq".
fn hole_text(shard: u32, what: &str, before: u64, found: u64) -> String {
    match (before + 1, found.saturating_sub(1)) {
        (first, last) if first == last => format!("shard {shard}: {what} {first} is missing"),
        (first, last) => format!("shard {shard}: {what} {first} to {last} are missing"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn prefix_end_is_right_above_the_prefix(prefix in any::<String>(), tail in any::<String>(), other in any::<String>()) {
            if let Some(end) = prefix_end(&prefix) {
                let with_prefix = format!("{prefix}{tail}");
                prop_assert!(with_prefix < end);
                prop_assert_eq!(other >= prefix && other < end, other.starts_with(&prefix));
            }
        }
    }

    #[test]
    fn prefix_end_at_the_edges() {
        assert_eq!(prefix_end("a/"), Some("a0".to_owned()));
        assert_eq!(prefix_end(""), None);
        assert_eq!(prefix_end("\u{10ffff}"), None);
        assert_eq!(prefix_end("a\u{10ffff}"), Some("b".to_owned()));
        assert_eq!(prefix_end("\u{d7ff}"), Some("\u{e000}".to_owned()));
    }

    #[test]
    fn specs_parse_and_hide_passwords() {
        let parse = |url: &str| url.parse::<StoreSpec>();
        assert!(matches!(parse("memory:"), Ok(StoreSpec::Memory)));
        assert!(matches!(parse("sqlite:/var/lib/im/store.db"), Ok(StoreSpec::Sqlite(p)) if p.ends_with("store.db")));
        assert!(
            matches!(parse("grpc://store:7000"), Ok(StoreSpec::Remote { endpoint }) if endpoint == "http://store:7000")
        );
        for bad in ["", "sqlite:", "grpc:store:7000", "grpc://", "mysql://x", "memory:x"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        let spec = parse("postgres://im:secret@db/im").expect("a good URL");
        assert_eq!(format!("{spec:?}"), "postgres://…@db/im");
    }

    #[test]
    fn of_puts_with_one_key_the_last_counts() {
        let put = |key: &str, value: &'static str| Put {
            key: key.to_owned(),
            value: Some(Bytes::from_static(value.as_bytes())),
        };
        let puts = [put("a", "1"), put("b", "2"), put("a", "3")];
        assert_eq!(last_puts(&puts).cloned().collect::<Vec<_>>(), [put("b", "2"), put("a", "3")]);
    }

    #[test]
    fn holes_read_well() {
        assert_eq!(hole_text(3, "pos", 4, 6), "shard 3: pos 5 is missing");
        assert_eq!(hole_text(3, "pos", 0, 4), "shard 3: pos 1 to 3 are missing");
    }
}
