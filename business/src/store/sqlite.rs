//! The store in one SQLite file (WAL, synchronous=FULL), for the one process that owns it.
//!
//! One thread writes. It takes all requests that wait, applies them in their order within one transaction, commits with one fsync and
//! then answers them all: group commit, whose group is what arrived during the fsync before. A shard that fails is taken back by
//! deleting its few rows, so no savepoints are needed (they would copy each page they touch). Reads have threads and
//! connections of their own and never wait for the writer.
//!
//! Checkpoints: a thread of its own moves the log's pages to the file all the time; the writer only does the rest when the log is
//! long, and so lets it begin from its start again.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use im_proto::ids::MemberId;
use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, ffi, params};
use tokio::sync::{mpsc, oneshot};

use super::{
    ANSWER_BYTES_MAX, ANSWER_ROWS_MAX, Acquired, Answer, Claim, Duplicate, HOLES_MAX, LogEntry, LogRange, OpenError,
    Outcome, POS_MAX, Released, ShardBatch, ShardRow, Store, StoreError, TRANSACTIONS, Tail, claimable, contradiction,
    hole_text, last_puts, malformed, place_taken, prefix_end,
};

/// Write requests that may wait; whoever comes next waits to hand his in.
const WRITES_WAITING_MAX: usize = 1024;
/// Reads that may wait.
const READS_WAITING_MAX: usize = 1024;
/// Rows that one transaction takes, a request beyond it waits for the next.
const GROUP_ROWS_MAX: usize = 16_384;
/// How long the writer lingers for requests when fewer came than the last time: far less than the fsync that it saves.
const LINGER: Duration = Duration::from_micros(100);
/// Connections that read.
const READERS: usize = 4;
/// Pages in the write-ahead log that are not in the file yet, from which the checkpointer is woken. Commits write the same leaves again
/// and again: a checkpoint of many versions writes each page once, and its fsyncs stand in the way of commits less often.
const WAL_BACKLOG_PAGES: u64 = 8_192;
/// Pages of the write-ahead log from which the writer itself ends the checkpoint, so that the log starts over (64 MiB).
const WAL_PAGES_MAX: u64 = 16_384;
/// Pages that the checkpointer may leave to the writer, who copies them between two commits.
const WAL_REST_PAGES: u64 = 512;
/// Pages of the write-ahead log from which the writer does not wait for the checkpointer any more (256 MiB).
const WAL_PAGES_LIMIT: u64 = 4 * WAL_PAGES_MAX;

/// Additive steps; the number of those done is in `meta`.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE shard (
        shard INTEGER PRIMARY KEY,
        epoch INTEGER NOT NULL,
        owner TEXT,
        watermark INTEGER NOT NULL DEFAULT 0
    );
    CREATE TABLE log (
        id INTEGER PRIMARY KEY, -- shard * 2^40 + pos: (shard, pos) in one b-tree of its own rows
        shard INTEGER NOT NULL,
        conversation TEXT NOT NULL,
        seq INTEGER NOT NULL,
        key BLOB NOT NULL,
        sender TEXT NOT NULL,
        device TEXT NOT NULL,
        kind INTEGER NOT NULL,
        client_id TEXT NOT NULL,
        ts_ms INTEGER NOT NULL,
        payload BLOB NOT NULL
    );
    CREATE UNIQUE INDEX log_seq ON log (shard, conversation, seq);
    CREATE UNIQUE INDEX log_key ON log (shard, conversation, key);
    CREATE TABLE item (
        shard INTEGER NOT NULL,
        k TEXT NOT NULL,
        v BLOB NOT NULL,
        PRIMARY KEY (shard, k)
    ) WITHOUT ROWID;
"];

const ENTRY: &str = "conversation, seq, id, key, sender, device, kind, client_id, ts_ms, payload";

/// The row id of (shard, pos).
fn id(shard: u32, pos: u64) -> i64 {
    (i64::from(shard) << 40) | pos.min(POS_MAX) as i64
}

/// A number of ours as SQLite's; what is beyond its range is beyond any stored one as well.
fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

// ---------------------------------------------------------------------------------------------------------------------------------
// The store: hands requests to the threads
// ---------------------------------------------------------------------------------------------------------------------------------

/// Ends the process when the thread that holds it panics: a store without its writer would refuse everything for good, one that starts
/// anew serves again.
struct EndOnPanic;

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!("a thread of the store panicked: ending, to start anew from what is durable");
            std::process::abort();
        }
    }
}

/// A SQLite file, owned by this process until it is dropped.
#[derive(Debug)]
pub struct Sqlite {
    /// To the writer; `None` only while dropping.
    writes: Option<mpsc::Sender<Write>>,
    /// To whichever reader is free.
    reads: mpsc::Sender<Read>,
    writer: Option<thread::JoinHandle<()>>,
}

type Read = Box<dyn FnOnce(&Connection) + Send>;

impl Sqlite {
    /// Opens or creates the file and starts the threads.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let failed =
            |reason: &dyn std::fmt::Display| OpenError::File { path: path.to_owned(), reason: reason.to_string() };
        let lock = lock(path)?;
        let mut connection = connect(path).map_err(|e| failed(&e))?;
        migrate(&mut connection).map_err(|e| failed(&e))?;
        // The names of the new files must be as durable as what is in them.
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|d| d.sync_all()).map_err(|e| failed(&e))?;

        let (writes, requests) = mpsc::channel(WRITES_WAITING_MAX);
        let (reads, jobs) = mpsc::channel::<Read>(READS_WAITING_MAX);
        let jobs = Arc::new(Mutex::new(jobs));
        let (wake, woken) = sync_channel(1);
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let run = move || {
                let _guard = EndOnPanic;
                run();
            };
            thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|e| failed(&e))
        };
        for _ in 0..READERS {
            let (connection, jobs) = (connect(path).map_err(|e| failed(&e))?, jobs.clone());
            connection.pragma_update(None, "query_only", true).map_err(|e| failed(&e))?;
            spawn("store-reader", Box::new(move || read_until_closed(&connection, &jobs)))?;
        }
        let checkpoints = connect(path).map_err(|e| failed(&e))?;
        spawn("store-checkpoint", Box::new(move || checkpoint_until_closed(&checkpoints, &woken)))?;
        let writer = Writer { connection, requests, wake, _lock: lock };
        let writer = spawn("store-writer", Box::new(move || writer.run()))?;
        Ok(Self { writes: Some(writes), reads, writer: Some(writer) })
    }

    /// Bounds the file to so many pages of 4 KiB: beyond it the store refuses as with a full disk, and goes on when it is raised. Lasts
    /// until the process ends.
    pub async fn set_pages_max(&self, pages: u32) -> Result<(), StoreError> {
        self.write(|reply| Write::PagesMax(Pending::new(pages, reply))).await
    }

    /// Hands a request to the writer and waits for its answer.
    async fn write<A>(&self, write: impl FnOnce(Reply<A>) -> Write) -> Result<A, StoreError> {
        let closed = || StoreError::refused("the store is closed");
        let (reply, answer) = oneshot::channel();
        self.writes.as_ref().ok_or_else(closed)?.send(write(reply)).await.map_err(|_| closed())?;
        answer.await.unwrap_or_else(|_| Err(StoreError::unknown("the store closed with the request under way")))
    }

    /// Has a reader answer.
    async fn read<A: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> rusqlite::Result<A> + Send + 'static,
    ) -> Result<A, StoreError> {
        let (reply, answer) = oneshot::channel();
        let job: Read = Box::new(move |connection| {
            // Nobody waits any more: nothing to do.
            let _ = reply.send(read(connection));
        });
        let closed = || StoreError::refused("the store is closed");
        self.reads.send(job).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?.map_err(StoreError::refused)
    }
}

impl Drop for Sqlite {
    /// Waits for the transaction under way, so that the file is free afterwards.
    fn drop(&mut self) {
        self.writes = None;
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has ended the process.
            let _ = writer.join();
        }
    }
}

impl Store for Sqlite {
    fn acquire(&self, me: &MemberId, claims: Vec<Claim>) -> Answer<'_, Vec<Acquired>> {
        let me = me.clone();
        Box::pin(async move {
            claimable(&claims)?;
            let swapped = self.write(|reply| Write::Acquire(Pending::new((me, claims), reply))).await?;
            let won = swapped.iter().filter_map(|s| s.as_ref().ok().copied()).collect::<Vec<_>>();
            let tails = self.read(move |c| won.iter().map(|(shard, epoch)| tail(c, *shard, *epoch)).collect()).await;
            let tails: Vec<Tail> = tails.map_err(|e| StoreError::unknown(format_args!("acquired, but: {e}")))?;
            let mut tails = tails.into_iter();
            let answer = |swapped: Swapped| match swapped {
                Ok(_) => tails.next().map(Acquired::Won),
                Err(row) => Some(Acquired::Lost(row)),
            };
            Ok(swapped.into_iter().filter_map(answer).collect())
        })
    }

    fn release(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<Released>> {
        let me = me.clone();
        Box::pin(self.write(|reply| Write::Release(Pending::new((me, shards), reply))))
    }

    fn check(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<ShardRow>> {
        let me = me.clone();
        Box::pin(self.read(move |c| {
            let mut lost = Vec::new();
            for (shard, epoch) in shards {
                let row = shard_row(c, shard)?;
                if !row.is_held(&me, epoch) {
                    lost.push(row);
                }
            }
            Ok(lost)
        }))
    }

    fn commit(&self, me: &MemberId, batches: Vec<ShardBatch>) -> Answer<'_, Vec<Outcome>> {
        let me = me.clone();
        Box::pin(self.write(|reply| Write::Commit(Pending::new((me, batches), reply))))
    }

    fn find(&self, shard: u32, conversation: Arc<str>, key: Bytes) -> Answer<'_, Option<LogEntry>> {
        Box::pin(self.read(move |c| {
            let mut select = c.prepare_cached(&format!(
                "SELECT {ENTRY} FROM log WHERE shard = ?1 AND conversation = ?2 AND key = ?3"
            ))?;
            select.query_row(params![shard, conversation, &key[..]], entry).optional()
        }))
    }

    fn range(&self, range: LogRange) -> Answer<'_, Vec<LogEntry>> {
        Box::pin(self.read(move |c| {
            let (compare, order) = if range.backward { ("<=", "DESC") } else { (">=", "ASC") };
            let from = if range.backward && range.from == 0 { i64::MAX } else { int(range.from) };
            let mut select = c.prepare_cached(&format!(
                "SELECT {ENTRY} FROM log WHERE shard = ?1 AND conversation = ?2 AND seq {compare} ?3 ORDER BY seq {order} LIMIT ?4"
            ))?;
            let rows = select.query(params![range.shard, range.conversation, from, range.limit.min(ANSWER_ROWS_MAX)])?;
            within(rows, range.bytes_max(), entry, |e| e.payload.len())
        }))
    }

    fn since(&self, shard: u32, after_pos: u64, limit: u32) -> Answer<'_, Vec<LogEntry>> {
        Box::pin(self.read(move |c| {
            let mut select =
                c.prepare_cached(&format!("SELECT {ENTRY} FROM log WHERE id > ?1 AND id <= ?2 ORDER BY id LIMIT ?3"))?;
            let rows = select.query(params![id(shard, after_pos), id(shard, POS_MAX), limit.min(ANSWER_ROWS_MAX)])?;
            within(rows, ANSWER_BYTES_MAX, entry, |e| e.payload.len())
        }))
    }

    fn items(&self, shard: u32, prefix: String, after: Option<String>, limit: u32) -> Answer<'_, Vec<(String, Bytes)>> {
        Box::pin(self.read(move |c| {
            let mut select = c.prepare_cached(
                "SELECT k, v FROM item WHERE shard = ?1 AND k >= ?2 AND (?3 IS NULL OR k < ?3) AND (?4 IS NULL OR k > ?4)
                 ORDER BY k LIMIT ?5",
            )?;
            // A scan that goes on after a key starts there, not at the prefix.
            let from = after.as_deref().filter(|after| *after > prefix.as_str()).unwrap_or(&prefix);
            let rows = select.query(params![shard, from, prefix_end(&prefix), after, limit.min(ANSWER_ROWS_MAX)])?;
            within(rows, ANSWER_BYTES_MAX, |row| Ok((row.get(0)?, blob(row, 1)?)), |(_, v): &(String, Bytes)| v.len())
        }))
    }

    fn get(&self, shard: u32, keys: Vec<String>) -> Answer<'_, Vec<Option<Bytes>>> {
        Box::pin(self.read(move |c| {
            let mut select = c.prepare_cached("SELECT v FROM item WHERE shard = ?1 AND k = ?2")?;
            keys.iter().map(|key| select.query_row(params![shard, key], |row| blob(row, 0)).optional()).collect()
        }))
    }

    fn shards(&self) -> Answer<'_, Vec<ShardRow>> {
        Box::pin(self.read(|c| {
            let mut select = c.prepare_cached("SELECT shard, epoch, owner FROM shard ORDER BY shard")?;
            select.query_map([], row_of_shard)?.collect()
        }))
    }

    fn scrub(&self, shard: u32) -> Answer<'_, Vec<String>> {
        Box::pin(self.read(move |c| scrub(c, shard)))
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// The writer
// ---------------------------------------------------------------------------------------------------------------------------------

type Reply<A> = oneshot::Sender<Result<A, StoreError>>;
/// A shard and the epoch in which it is held.
type Held = (u32, u64);
/// What an acquire won, or the row found.
type Swapped = Result<Held, ShardRow>;

/// A request, and its answer once it was applied, to be given once it is durable.
#[derive(Debug)]
struct Pending<Q, A> {
    question: Q,
    answer: Option<A>,
    reply: Reply<A>,
}

impl<Q, A> Pending<Q, A> {
    fn new(question: Q, reply: Reply<A>) -> Self {
        Self { question, answer: None, reply }
    }

    fn finish(self, committed: Result<(), StoreError>) {
        let unapplied = || StoreError::refused("not applied");
        // Whoever asked may be gone.
        let _ = self.reply.send(committed.and_then(|()| self.answer.ok_or_else(unapplied)));
    }
}

#[derive(Debug)]
enum Write {
    Acquire(Pending<(MemberId, Vec<Claim>), Vec<Swapped>>),
    Release(Pending<(MemberId, Vec<Held>), Vec<Released>>),
    Commit(Pending<(MemberId, Vec<ShardBatch>), Vec<Outcome>>),
    PagesMax(Pending<u32, ()>),
    /// For tests of what a fault does to the process.
    #[cfg(test)]
    Fault(Pending<tests::Fault, ()>),
}

impl Write {
    /// How many rows it takes, about.
    fn rows(&self) -> usize {
        match self {
            Self::Acquire(pending) => pending.question.1.len(),
            Self::Release(pending) => pending.question.1.len(),
            Self::Commit(pending) => pending.question.1.iter().map(|b| b.appends.len() + b.puts.len() + 1).sum(),
            Self::PagesMax(_) => 1,
            #[cfg(test)]
            Self::Fault(_) => 1,
        }
    }

    /// Log rows that it stored.
    fn rows_stored(&self) -> usize {
        let Self::Commit(Pending { question: (_, batches), answer: Some(outcomes), .. }) = self else { return 0 };
        let stored = batches.iter().zip(outcomes).filter(|(_, outcome)| **outcome == Outcome::Committed);
        stored.map(|(batch, _)| batch.appends.len()).sum()
    }

    fn apply(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        match self {
            Self::Acquire(Pending { question: (me, claims), answer, .. }) => {
                *answer = Some(claims.iter().map(|claim| acquire(connection, me, claim)).collect::<Result<_, _>>()?);
            }
            Self::Release(Pending { question: (me, shards), answer, .. }) => {
                let release = |(shard, epoch): &Held| release(connection, me, *shard, *epoch);
                *answer = Some(shards.iter().map(release).collect::<Result<_, _>>()?);
            }
            Self::Commit(Pending { question: (me, batches), answer, .. }) => {
                let commit = |(batch, malformed): (&ShardBatch, Option<String>)| match malformed {
                    Some(why) => Ok(Outcome::Corrupt(why)),
                    None => commit(connection, me, batch),
                };
                *answer = Some(batches.iter().zip(malformed(batches)).map(commit).collect::<Result<_, _>>()?);
            }
            Self::PagesMax(Pending { question: pages, answer, .. }) => {
                connection.pragma_update_and_check(None, "max_page_count", *pages, |_| Ok(()))?;
                *answer = Some(());
            }
            #[cfg(test)]
            Self::Fault(pending) => pending.question.happen()?,
        }
        Ok(())
    }

    fn finish(self, committed: Result<(), StoreError>) {
        match self {
            Self::Acquire(pending) => pending.finish(committed),
            Self::Release(pending) => pending.finish(committed),
            Self::Commit(pending) => pending.finish(committed),
            Self::PagesMax(pending) => pending.finish(committed),
            #[cfg(test)]
            Self::Fault(pending) => pending.finish(committed),
        }
    }
}

struct Writer {
    connection: Connection,
    requests: mpsc::Receiver<Write>,
    /// Wakes the checkpointer.
    wake: SyncSender<()>,
    /// Says to other processes that the file is taken.
    _lock: File,
}

impl Writer {
    fn run(mut self) {
        let mut last_size = 0;
        while let Some(first) = self.requests.blocking_recv() {
            let mut rows = first.rows();
            let mut group = vec![first];
            self.join_waiting(&mut group, &mut rows);
            // Those answered together ask together again, a moment after the first of them.
            if group.len() < last_size {
                thread::sleep(LINGER);
                self.join_waiting(&mut group, &mut rows);
            }
            last_size = group.len();
            let committed = self.transact(&mut group);
            for write in group {
                write.finish(committed.clone());
            }
            self.bound_wal();
        }
    }

    fn join_waiting(&mut self, group: &mut Vec<Write>, rows: &mut usize) {
        while *rows < GROUP_ROWS_MAX
            && let Ok(next) = self.requests.try_recv()
        {
            *rows += next.rows();
            group.push(next);
        }
    }

    fn transact(&self, group: &mut [Write]) -> Result<(), StoreError> {
        let run = |sql| self.connection.prepare_cached(sql)?.execute([]);
        let applied = run("BEGIN IMMEDIATE").and_then(|_| {
            group.iter_mut().try_for_each(|write| write.apply(&self.connection))?;
            run("COMMIT")
        });
        let Err(error) = applied else {
            tracing::trace!(target: TRANSACTIONS, rows = group.iter().map(Write::rows_stored).sum::<usize>());
            return Ok(());
        };
        // After a failed fsync nobody knows what is on the disk, and a second one may lie: only a new start from the log tells.
        end_if_unsafe(&error, "writing");
        // Some errors end the transaction by themselves.
        if !self.connection.is_autocommit()
            && let Err(error) = self.connection.execute_batch("ROLLBACK")
        {
            tracing::error!(%error, "the store can't roll back and ends, to start anew from what is durable");
            std::process::abort();
        }
        tracing::warn!(%error, "the store refuses writes");
        Err(StoreError::refused(error))
    }

    /// Keeps the write-ahead log short.
    fn bound_wal(&self) {
        match checkpoint(&self.connection, "NOOP") {
            Ok((pages, moved)) => {
                let rest = pages - moved.min(pages);
                let is_long = pages >= WAL_PAGES_MAX;
                if is_long && (rest < WAL_REST_PAGES || pages >= WAL_PAGES_LIMIT) {
                    if let Err(error) = checkpoint(&self.connection, "PASSIVE") {
                        end_if_unsafe(&error, "checkpointing");
                        tracing::warn!(%error, "the store can't shorten its write-ahead log");
                    }
                } else if is_long || rest >= WAL_BACKLOG_PAGES {
                    // Woken already or gone at the end: both fine.
                    let _ = self.wake.try_send(());
                }
            }
            Err(error) => tracing::warn!(%error, "the store can't read the length of its write-ahead log"),
        }
    }
}

/// Ends the process after a failed fsync. (A write that failed is rolled back like any error: its transaction has no valid end.)
fn end_if_unsafe(error: &rusqlite::Error, doing: &str) {
    let code = error.sqlite_error().map(|e| e.extended_code);
    if let Some(ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC) = code {
        tracing::error!(%error, "fsync failed while {doing} the store: what is on the disk is unknown, ending to recover from the log");
        std::process::abort();
    }
}

/// (pages in the write-ahead log, pages of it that are in the file).
fn checkpoint(connection: &Connection, mode: &str) -> rusqlite::Result<(u64, u64)> {
    connection
        .prepare_cached(&format!("PRAGMA wal_checkpoint({mode})"))?
        .query_row([], |row| Ok((row.get::<_, i64>(1)?.max(0) as u64, row.get::<_, i64>(2)?.max(0) as u64)))
}

fn checkpoint_until_closed(connection: &Connection, woken: &Receiver<()>) {
    while woken.recv().is_ok() {
        if let Err(error) = checkpoint(connection, "PASSIVE") {
            end_if_unsafe(&error, "checkpointing");
            tracing::warn!(%error, "checkpoint failed, the write-ahead log stays");
        }
    }
}

fn acquire(c: &Connection, me: &MemberId, claim: &Claim) -> rusqlite::Result<Swapped> {
    let row = shard_row(c, claim.shard)?;
    if !claim.matches(&row) {
        return Ok(Err(row));
    }
    let epoch = row.epoch + 1;
    c.prepare_cached(
        "INSERT INTO shard (shard, epoch, owner) VALUES (?1, ?2, ?3)
         ON CONFLICT (shard) DO UPDATE SET epoch = excluded.epoch, owner = excluded.owner",
    )?
    .execute(params![claim.shard, int(epoch), me.as_str()])?;
    Ok(Ok((claim.shard, epoch)))
}

fn release(c: &Connection, me: &MemberId, shard: u32, epoch: u64) -> rusqlite::Result<Released> {
    let row = shard_row(c, shard)?;
    if !row.is_held(me, epoch) {
        return Ok(Released::Lost(row));
    }
    disown(c, shard)?;
    Ok(Released::Done)
}

fn disown(c: &Connection, shard: u32) -> rusqlite::Result<()> {
    c.prepare_cached("UPDATE shard SET owner = NULL WHERE shard = ?1")?.execute([shard])?;
    Ok(())
}

fn commit(c: &Connection, me: &MemberId, batch: &ShardBatch) -> rusqlite::Result<Outcome> {
    let row = shard_row(c, batch.shard)?;
    if !row.is_held(me, batch.epoch) {
        return Ok(Outcome::Fenced(row));
    }
    let mut insert = c.prepare_cached(
        "INSERT INTO log (id, shard, conversation, seq, key, sender, device, kind, client_id, ts_ms, payload)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?;
    for (index, e) in batch.appends.iter().enumerate() {
        let inserted = insert.execute(params![
            id(batch.shard, e.pos),
            batch.shard,
            e.conversation,
            int(e.seq),
            &e.key[..],
            e.sender,
            e.device,
            e.kind,
            e.client_id,
            e.ts_ms,
            &e.payload[..]
        ]);
        match inserted {
            Ok(_) => {}
            Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => {
                let mut delete = c.prepare_cached("DELETE FROM log WHERE id = ?1")?;
                for taken_back in &batch.appends[..index] {
                    delete.execute([id(batch.shard, taken_back.pos)])?;
                }
                return refusal(c, batch);
            }
            Err(error) => return Err(error),
        }
    }
    // Nothing can conflict from here on.
    for put in last_puts(&batch.puts) {
        match &put.value {
            Some(value) => c
                .prepare_cached(
                    "INSERT INTO item (shard, k, v) VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET v = excluded.v",
                )?
                .execute(params![batch.shard, put.key, &value[..]])?,
            None => c
                .prepare_cached("DELETE FROM item WHERE shard = ?1 AND k = ?2")?
                .execute(params![batch.shard, put.key])?,
        };
    }
    if let Some(watermark) = batch.watermark {
        c.prepare_cached("UPDATE shard SET watermark = max(watermark, ?2) WHERE shard = ?1")?
            .execute(params![batch.shard, int(watermark)])?;
    }
    if batch.release {
        disown(c, batch.shard)?;
    }
    Ok(Outcome::Committed)
}

/// Why a batch conflicts with what is stored (it was taken back already).
fn refusal(c: &Connection, batch: &ShardBatch) -> rusqlite::Result<Outcome> {
    let mut by_key =
        c.prepare_cached(&format!("SELECT {ENTRY} FROM log WHERE shard = ?1 AND conversation = ?2 AND key = ?3"))?;
    let mut duplicates = Vec::new();
    for (index, e) in batch.appends.iter().enumerate() {
        if let Some(stored) = by_key.query_row(params![batch.shard, e.conversation, &e.key[..]], entry).optional()? {
            duplicates.push(Duplicate { index, stored });
        }
    }
    if !duplicates.is_empty() {
        return Ok(Outcome::Duplicates(duplicates));
    }
    if let Some(why) = contradiction(batch) {
        return Ok(Outcome::Corrupt(why));
    }
    let mut by_place =
        c.prepare_cached("SELECT 1 FROM log WHERE id = ?1 OR (shard = ?2 AND conversation = ?3 AND seq = ?4)")?;
    for e in &batch.appends {
        if by_place.exists(params![id(batch.shard, e.pos), batch.shard, e.conversation, int(e.seq)])? {
            return Ok(Outcome::Corrupt(place_taken(batch.shard, e)));
        }
    }
    Ok(Outcome::Corrupt(format!("shard {}: the log refuses the batch", batch.shard)))
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Reading, and the file
// ---------------------------------------------------------------------------------------------------------------------------------

fn read_until_closed(connection: &Connection, jobs: &Mutex<mpsc::Receiver<Read>>) {
    loop {
        // The lock is held while waiting: the readers queue up behind it, one job wakes one of them.
        let job = jobs.lock().blocking_recv();
        match job {
            Some(job) => job(connection),
            None => return,
        }
    }
}

fn shard_row(c: &Connection, shard: u32) -> rusqlite::Result<ShardRow> {
    let mut select = c.prepare_cached("SELECT shard, epoch, owner FROM shard WHERE shard = ?1")?;
    Ok(select.query_row([shard], row_of_shard).optional()?.unwrap_or_else(|| ShardRow::unowned(shard)))
}

fn row_of_shard(row: &Row<'_>) -> rusqlite::Result<ShardRow> {
    let owner = row.get_ref(2)?.as_str_or_null()?.map(MemberId::parse).transpose();
    let owner =
        owner.map_err(|e| rusqlite::Error::FromSqlConversionFailure(2, rusqlite::types::Type::Text, e.into()))?;
    Ok(ShardRow { shard: row.get(0)?, epoch: row.get::<_, i64>(1)? as u64, owner })
}

fn tail(c: &Connection, shard: u32, epoch: u64) -> rusqlite::Result<Tail> {
    let mut select = c.prepare_cached(
        "SELECT watermark,
                (SELECT coalesce(max(id), ?2) - ?2 FROM log WHERE id > ?2 AND id <= ?3),
                (SELECT count(*) FROM log WHERE id > ?2 + watermark AND id <= ?3)
         FROM shard WHERE shard = ?1",
    )?;
    select.query_row(params![shard, id(shard, 0), id(shard, POS_MAX)], |row| {
        let (watermark, head, above): (i64, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let hole = watermark.saturating_add(above) != head;
        Ok(Tail { shard, epoch, head_pos: head as u64, watermark: watermark as u64, hole })
    })
}

fn entry(row: &Row<'_>) -> rusqlite::Result<LogEntry> {
    let text = |column| Ok::<Arc<str>, rusqlite::Error>(row.get_ref(column)?.as_str()?.into());
    Ok(LogEntry {
        conversation: text(0)?,
        seq: row.get::<_, i64>(1)? as u64,
        pos: row.get::<_, i64>(2)? as u64 & POS_MAX,
        key: blob(row, 3)?,
        sender: text(4)?,
        device: text(5)?,
        kind: row.get(6)?,
        client_id: text(7)?,
        ts_ms: row.get(8)?,
        payload: blob(row, 9)?,
    })
}

fn blob(row: &Row<'_>, column: usize) -> rusqlite::Result<Bytes> {
    Ok(Bytes::copy_from_slice(row.get_ref(column)?.as_blob()?))
}

/// Takes rows until together they would exceed `bytes_max`; the first in any case.
fn within<T>(
    mut rows: rusqlite::Rows<'_>,
    bytes_max: usize,
    read: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
    size: impl Fn(&T) -> usize,
) -> rusqlite::Result<Vec<T>> {
    let (mut taken, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next()? {
        let value = read(row)?;
        bytes += size(&value);
        if bytes > bytes_max && !taken.is_empty() {
            break;
        }
        taken.push(value);
    }
    Ok(taken)
}

fn scrub(c: &Connection, shard: u32) -> rusqlite::Result<Vec<String>> {
    let base = id(shard, 0);
    let mut holes = Vec::new();
    let mut positions = c.prepare_cached(
        "SELECT before, pos FROM (SELECT id - ?1 AS pos, lag(id - ?1, 1, 0) OVER (ORDER BY id) AS before
                                  FROM log WHERE id > ?1 AND id <= ?2) WHERE pos <> before + 1 ORDER BY pos LIMIT ?3",
    )?;
    let mut rows = positions.query(params![base, id(shard, POS_MAX), HOLES_MAX as u32])?;
    while let Some(row) = rows.next()? {
        holes.push(hole_text(shard, "pos", row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64));
    }
    let mut seqs = c.prepare_cached(
        "SELECT conversation, before, seq
         FROM (SELECT conversation, seq, lag(seq, 1, 0) OVER (PARTITION BY conversation ORDER BY seq) AS before
               FROM log WHERE shard = ?1) WHERE seq <> before + 1 ORDER BY conversation, seq LIMIT ?2",
    )?;
    let mut rows = seqs.query(params![shard, HOLES_MAX as u32])?;
    while let Some(row) = rows.next()? {
        let what = format!("conversation {}: seq", row.get_ref(0)?.as_str()?);
        holes.push(hole_text(shard, &what, row.get::<_, i64>(1)? as u64, row.get::<_, i64>(2)? as u64));
    }
    if let Some(Tail { head_pos, watermark, .. }) = tail(c, shard, 0).optional()?
        && watermark > head_pos
    {
        holes.push(hole_text(shard, "pos", head_pos, watermark + 1));
    }
    holes.truncate(HOLES_MAX);
    Ok(holes)
}

/// Takes the file for this process. (SQLite's own exclusive mode would keep our readers out too.)
fn lock(path: &Path) -> Result<File, OpenError> {
    let mut name: OsString = path.into();
    name.push(".lock");
    let file = File::options().create(true).truncate(false).write(true).open(&name);
    let file = file.map_err(|e| OpenError::File { path: path.to_owned(), reason: e.to_string() })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(e)) => Err(OpenError::File { path: path.to_owned(), reason: e.to_string() }),
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update_and_check(None, "wal_autocheckpoint", 0, |_| Ok(()))?;
    connection.pragma_update(None, "cache_size", -16 * 1024)?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    transaction.execute_batch("CREATE TABLE IF NOT EXISTS meta (k TEXT PRIMARY KEY, v INTEGER NOT NULL)")?;
    let done =
        transaction.query_row("SELECT v FROM meta WHERE k = 'version'", [], |r| r.get::<_, u32>(0)).optional()?;
    for step in MIGRATIONS.iter().skip(done.unwrap_or(0) as usize) {
        transaction.execute_batch(step)?;
    }
    // A newer release's version stays: its steps are additive, we can work with what they added.
    let version = (MIGRATIONS.len() as u32).max(done.unwrap_or(0));
    transaction.execute("INSERT OR REPLACE INTO meta VALUES ('version', ?1)", [version])?;
    transaction.commit()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, reason = "a test's own expectations")]

    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// What goes wrong in the writer's thread.
    #[derive(Debug, Clone, Copy)]
    pub(super) enum Fault {
        /// SQLite reports this extended error code.
        Error(i32),
        Panic,
    }

    impl Fault {
        pub(super) fn happen(self) -> rusqlite::Result<()> {
            match self {
                Self::Error(code) => Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)),
                Self::Panic => panic!("a fault of the test"),
            }
        }
    }

    /// Name the fault and an empty directory to the child process.
    const FAULT: &str = "IM_TEST_STORE_FAULT";
    const DIRECTORY: &str = "IM_TEST_STORE_DIRECTORY";
    /// The child's status when it outlived the fault, with the store refusing just that write.
    const REFUSED: i32 = 7;

    /// The process that has the fault; without one, an empty test.
    #[test]
    fn child_with_a_fault() {
        let Ok(fault) = std::env::var(FAULT) else { return };
        let fault = if fault == "panic" { Fault::Panic } else { Fault::Error(fault.parse().expect("a code")) };
        let path = Path::new(&std::env::var_os(DIRECTORY).expect("a directory")).join("store.db");
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let refused = runtime.block_on(async {
            let store = Sqlite::open(&path).expect("a fresh file");
            let answer = store.write(|reply| Write::Fault(Pending::new(fault, reply))).await;
            matches!(answer, Err(StoreError::Refused { .. })) && store.shards().await.is_ok()
        });
        std::process::exit(if refused { REFUSED } else { 1 });
    }

    fn status_after(fault: &str) -> std::process::ExitStatus {
        let directory = std::env::temp_dir().join(format!("im-store-fault-{}-{fault}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a writable temporary directory");
        let mut child = Command::new(std::env::current_exe().expect("this test"));
        child.args(["--exact", "store::sqlite::tests::child_with_a_fault"]);
        let ended = child.env(FAULT, fault).env(DIRECTORY, &directory).output().expect("it starts");
        std::fs::remove_dir_all(&directory).expect("the child is gone");
        ended.status
    }

    #[test]
    fn who_cannot_know_what_is_on_the_disk_ends_his_process() {
        const SIGABRT: i32 = 6;
        for code in [ffi::SQLITE_IOERR_FSYNC, ffi::SQLITE_IOERR_DIR_FSYNC] {
            assert_eq!(status_after(&code.to_string()).signal(), Some(SIGABRT), "code {code}");
        }
        assert_eq!(status_after("panic").signal(), Some(SIGABRT), "a dead writer");
        for code in [ffi::SQLITE_FULL, ffi::SQLITE_IOERR_WRITE, ffi::SQLITE_BUSY] {
            assert_eq!(status_after(&code.to_string()).code(), Some(REFUSED), "code {code}");
        }
    }
}
