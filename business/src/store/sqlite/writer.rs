//! The one thread that writes: groups of requests, the transaction that stays open, the journal, and the thread that makes commits
//! durable behind it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use im_proto::ids::MemberId;
use im_proto::store as pb;
use parking_lot::Mutex;
use prost::Message;
use rusqlite::{Connection, ffi};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::super::server::wire;
use super::super::{Acquired, Claim, Outcome, Released, ShardBatch, StoreError, TRANSACTIONS, malformed};
use super::Read;
use super::journal::Journal;
use super::record::encode_commit;
use super::tables::Tables;

/// Rows that one group takes, a request beyond it waits for the next.
const GROUP_ROWS_MAX: usize = 16_384;
/// How long the writer lingers for requests when fewer came than the last time: far less than the fsync that it saves.
const LINGER: Duration = Duration::from_micros(100);
/// How long a transaction stays open, and how many rows it takes. Longer ones write fewer pages for the same rows; a commit keeps
/// writers waiting while it hands its pages to the kernel, for some 20 ms, which should be well below a hundredth of the time.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);
const FLUSH_ROWS: usize = 32_768;
/// Pages in the write-ahead log that are not in the file yet, from which they are moved there. Commits write the same leaves again
/// and again: a checkpoint of many versions writes each page once.
const WAL_BACKLOG_PAGES: u64 = 8_192;
/// Pages of the write-ahead log from which the writer itself ends the checkpoint, so that the log starts over (64 MiB).
const WAL_PAGES_MAX: u64 = 16_384;
/// Pages that the syncer may leave to the writer, who copies them between two transactions: about what a
/// commit of short messages has.
const WAL_REST_PAGES: u64 = 4_096;
/// Pages of the write-ahead log from which the writer does not wait for the syncer any more (128 MiB).
const WAL_PAGES_LIMIT: u64 = 2 * WAL_PAGES_MAX;

pub(super) type Reply<A> = oneshot::Sender<Result<A, StoreError>>;
/// A shard and the epoch in which it is held.
type Held = (u32, u64);

/// A request, and its answer once it was applied, to be given once it is durable.
#[derive(Debug)]
pub(super) struct Pending<Q, A> {
    question: Q,
    answer: Option<A>,
    reply: Reply<A>,
}

impl<Q, A> Pending<Q, A> {
    pub(super) fn new(question: Q, reply: Reply<A>) -> Self {
        Self { question, answer: None, reply }
    }

    /// Of the journal: whoever asked has his answer.
    fn again(question: Q) -> Self {
        Self::new(question, oneshot::channel().0)
    }

    fn finish(self, stored: Result<(), StoreError>) {
        let unapplied = || StoreError::refused("not applied");
        // Whoever asked may be gone.
        let _ = self.reply.send(stored.and_then(|()| self.answer.ok_or_else(unapplied)));
    }
}

/// What the writer is asked.
pub(super) enum Write {
    Acquire(Pending<(MemberId, Vec<Claim>), Vec<Acquired>>),
    Release(Pending<(MemberId, Vec<Held>), Vec<Released>>),
    Commit(Pending<(MemberId, Vec<ShardBatch>), Vec<Outcome>>),
    /// A read of what is not committed yet.
    Read(Read),
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
            Self::Commit(pending) => pending.question.1.iter().map(|b| b.appends.len() + b.puts.len()).sum(),
            Self::Read(_) | Self::PagesMax(_) => 1,
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

    fn apply(&mut self, tables: &mut Tables) -> rusqlite::Result<()> {
        match self {
            Self::Acquire(Pending { question: (me, claims), answer, .. }) => {
                *answer = Some(claims.iter().map(|claim| tables.acquire(me, claim)).collect::<Result<_, _>>()?);
            }
            Self::Release(Pending { question: (me, shards), answer, .. }) => {
                let release = |(shard, epoch): &Held| tables.release(me, *shard, *epoch);
                *answer = Some(shards.iter().map(release).collect::<Result<_, _>>()?);
            }
            Self::Commit(Pending { question: (me, batches), answer, .. }) => {
                let commit = |(batch, malformed): (&ShardBatch, Option<String>)| match malformed {
                    Some(why) => Ok(Outcome::Corrupt(why)),
                    None => tables.commit(me, batch),
                };
                *answer = Some(batches.iter().zip(malformed(batches)).map(commit).collect::<Result<_, _>>()?);
            }
            Self::Read(_) | Self::PagesMax(_) => {}
            #[cfg(test)]
            Self::Fault(pending) => pending.question.happen()?,
        }
        Ok(())
    }

    /// Appends what the journal keeps of it.
    fn record(&self, record: &mut Vec<u8>) {
        use pb::journal_record::change::Change;
        let change = match self {
            Self::Acquire(Pending { question: (me, claims), .. }) => Change::Acquire(pb::AcquireRequest {
                me: me.to_string(),
                claims: claims.iter().cloned().map(wire::claim_to).collect(),
            }),
            Self::Release(Pending { question: (me, shards), .. }) => {
                Change::Release(pb::ReleaseRequest { me: me.to_string(), shards: wire::held_to(shards.clone()) })
            }
            Self::Commit(Pending { question: (me, batches), .. }) => return encode_commit(record, me, batches),
            _ => return,
        };
        let changes = vec![pb::journal_record::Change { change: Some(change) }];
        record.extend(pb::JournalRecord { changes }.encode_to_vec());
    }

    fn of_record(change: pb::journal_record::Change) -> Result<Self, tonic::Status> {
        use pb::journal_record::change::Change;
        Ok(match change.change.ok_or_else(|| tonic::Status::data_loss("a change of an unknown kind"))? {
            Change::Acquire(pb::AcquireRequest { me, claims }) => {
                let claims = claims.into_iter().map(wire::claim).collect::<Result<_, _>>()?;
                Self::Acquire(Pending::again((wire::member(&me)?, claims)))
            }
            Change::Release(pb::ReleaseRequest { me, shards }) => {
                Self::Release(Pending::again((wire::member(&me)?, wire::held(shards))))
            }
            Change::Commit(pb::CommitRequest { me, batches }) => {
                let batches = batches.into_iter().map(wire::batch).collect::<Result<_, _>>()?;
                Self::Commit(Pending::again((wire::member(&me)?, batches)))
            }
        })
    }

    fn finish(self, stored: Result<(), StoreError>, connection: Result<&Connection, StoreError>) {
        match self {
            Self::Acquire(pending) => pending.finish(stored),
            Self::Release(pending) => pending.finish(stored),
            Self::Commit(pending) => pending.finish(stored),
            Self::Read(read) => read(connection),
            Self::PagesMax(pending) => pending.finish(stored),
            #[cfg(test)]
            Self::Fault(pending) => pending.finish(stored),
        }
    }
}

/// Why the journal could not be applied.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReplayError {
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    #[error(transparent)]
    Journal(#[from] io::Error),
    /// It was written by a newer release, or is damaged in a way that its checksum does not show.
    #[error("record {number} of the journal can't be read: {reason}; start the release that wrote it")]
    Record { number: u64, reason: String },
}

/// What keeps the writer from writing.
#[derive(Debug)]
struct Trouble {
    why: StoreError,
    /// The open transaction has all that was answered, so it can be read.
    is_readable: bool,
}

/// See the module.
pub(super) struct Writer {
    tables: Tables,
    journal: Journal,
    /// The group's, to be appended.
    record: Vec<u8>,
    requests: mpsc::Receiver<Write>,
    /// For waiting with a deadline.
    runtime: Runtime,
    /// When what is open is to be committed; `None`: nothing is open.
    flush_at: Option<Instant>,
    rows_open: usize,
    /// The last record whose changes are committed.
    flushed: u64,
    trouble: Option<Trouble>,
    wal: File,
    progress: Arc<Progress>,
    /// Wakes the syncer.
    wake: SyncSender<()>,
    /// Says to other processes that the file is taken.
    _lock: File,
}

impl Writer {
    /// Brings what only the journal has into the file.
    pub(super) fn open(
        path: &Path,
        tables: Tables,
        requests: mpsc::Receiver<Write>,
        syncer: &Syncer,
        lock: File,
    ) -> Result<Self, ReplayError> {
        let flushed = tables.applied()?;
        let mut writer = Self {
            tables,
            journal: Journal::open(path, flushed)?,
            record: Vec::new(),
            requests,
            runtime: tokio::runtime::Builder::new_current_thread().enable_time().build()?,
            flush_at: None,
            rows_open: 0,
            flushed,
            trouble: None,
            wal: syncer.wal.try_clone()?,
            progress: syncer.progress.clone(),
            wake: syncer.wake.clone(),
            _lock: lock,
        };
        if writer.journal.last() > flushed {
            writer.replay()?;
            writer.tables.commit_as(writer.journal.last())?;
            writer.is_flushed(writer.journal.last());
            tracing::info!(from = flushed + 1, to = writer.flushed, "the store took over what its journal had");
        }
        writer.wal.sync_data()?;
        writer.progress.durable.store(writer.flushed, Ordering::Release);
        Ok(writer)
    }

    pub(super) fn run(mut self) {
        let mut last_size = 0;
        loop {
            let first = match self.flush_at {
                None => self.requests.blocking_recv(),
                Some(at) => match self.runtime.block_on(async { timeout_at(at, self.requests.recv()).await }) {
                    Ok(first) => first,
                    Err(_) => {
                        self.flush();
                        continue;
                    }
                },
            };
            let Some(first) = first else { break };
            let mut rows = first.rows();
            let mut group = vec![first];
            self.join_waiting(&mut group, &mut rows);
            // Those answered together ask together again, a moment after the first of them.
            if group.len() < last_size {
                thread::sleep(LINGER);
                self.join_waiting(&mut group, &mut rows);
            }
            last_size = group.len();
            let stored = self.store(&mut group, rows);
            for write in group {
                let readable = match &self.trouble {
                    Some(Trouble { why, is_readable: false }) => Err(why.clone()),
                    _ => Ok(&self.tables.connection),
                };
                write.finish(stored.clone(), readable);
            }
            let is_much = self.rows_open >= FLUSH_ROWS || self.journal.is_half_full();
            if is_much || self.flush_at.is_some_and(|at| at <= Instant::now()) {
                self.flush();
            }
        }
        self.flush();
    }

    fn join_waiting(&mut self, group: &mut Vec<Write>, rows: &mut usize) {
        while *rows < GROUP_ROWS_MAX
            && let Ok(next) = self.requests.try_recv()
        {
            *rows += next.rows();
            group.push(next);
        }
    }

    /// Applies a group and makes it durable: all of it, or nothing.
    fn store(&mut self, group: &mut [Write], rows: usize) -> Result<(), StoreError> {
        // A read says nothing of whether there is something to store.
        if group.iter().all(|write| matches!(write, Write::Read(_))) {
            return Ok(());
        }
        let mut is_bound_anew = false;
        for write in &mut *group {
            if let Write::PagesMax(Pending { question: pages, answer, .. }) = write {
                let set = self.tables.connection.pragma_update_and_check(None, "max_page_count", *pages, |_| Ok(()));
                *answer = Some(set.map_err(StoreError::refused)?);
                is_bound_anew = true;
            }
        }
        if is_bound_anew && self.trouble.is_some() {
            self.flush();
        }
        if let Some(Trouble { why, .. }) = &self.trouble {
            return Err(why.clone());
        }
        let begun = self.tables.begin();
        let applied = begun.and_then(|()| group.iter_mut().try_for_each(|write| write.apply(&mut self.tables)));
        if let Err(error) = applied {
            return Err(self.undo(&error));
        }
        self.record.clear();
        group.iter().for_each(|write| write.record(&mut self.record));
        if !self.record.is_empty() {
            if self.journal.has_room(self.record.len()) {
                if let Err(error) = self.journal.append(&self.record) {
                    end(&error, "writing the journal");
                }
            } else {
                self.store_in_file()?;
            }
        }
        tracing::trace!(target: TRANSACTIONS, rows = group.iter().map(Write::rows_stored).sum::<usize>());
        if !self.tables.connection.is_autocommit() {
            self.rows_open += rows;
            self.flush_at.get_or_insert_with(|| Instant::now() + FLUSH_INTERVAL);
        }
        Ok(())
    }

    /// Commits and waits until it is durable: for groups that the journal has no room for.
    fn store_in_file(&mut self) -> Result<(), StoreError> {
        if let Err(error) = self.tables.commit_as(self.journal.last() + 1) {
            return Err(self.undo(&error));
        }
        if let Err(error) = self.wal.sync_data() {
            end(&error, "writing the store");
        }
        let number = self.journal.skip();
        self.progress.durable.store(number, Ordering::Release);
        self.is_flushed(number);
        Ok(())
    }

    /// Commits what is open. A failure loses nothing: the journal has it, and nothing more is taken until a commit succeeds.
    fn flush(&mut self) {
        if let Some(Trouble { is_readable: false, .. }) = &self.trouble
            && let Err(error) = self.replay()
        {
            return self.is_in_trouble(&error, false);
        }
        match self.tables.commit_as(self.journal.last()) {
            Ok(()) => {
                self.is_flushed(self.journal.last());
                if self.trouble.take().is_some() {
                    tracing::info!("the store takes writes again");
                }
                self.journal.turn(self.progress.durable.load(Ordering::Acquire));
            }
            Err(error) => {
                end_if_unsafe(&error, "writing");
                match self.replay() {
                    Ok(()) => self.is_in_trouble(&ReplayError::Sqlite(error), true),
                    Err(error) => self.is_in_trouble(&error, false),
                }
            }
        }
    }

    fn is_flushed(&mut self, number: u64) {
        self.flushed = number;
        self.tables.unflushed.clear();
        (self.flush_at, self.rows_open) = (None, 0);
        self.progress.committed.store(number, Ordering::Release);
        // Before the syncer is woken, which would be in the way.
        self.bound_wal();
        // Woken already or gone at the end: both fine.
        let _ = self.wake.try_send(());
    }

    fn is_in_trouble(&mut self, error: &ReplayError, is_readable: bool) {
        if self.trouble.is_none() {
            tracing::warn!(%error, "the store refuses writes");
        }
        self.trouble = Some(Trouble { why: StoreError::refused(error), is_readable });
        self.flush_at = Some(Instant::now() + FLUSH_INTERVAL);
    }

    /// A group failed: back to what was answered, and why it failed.
    fn undo(&mut self, error: &rusqlite::Error) -> StoreError {
        end_if_unsafe(error, "writing");
        tracing::warn!(%error, "the store refuses a write");
        match self.replay() {
            // So that the next failure has less to do again.
            Ok(()) => self.flush(),
            Err(error) => self.is_in_trouble(&error, false),
        }
        StoreError::refused(error)
    }

    /// Rolls back and applies what the journal has and the file has not.
    fn replay(&mut self) -> Result<(), ReplayError> {
        if let Err(error) = self.tables.rollback() {
            end(&error, "rolling back");
        }
        for record in self.journal.records_after(self.flushed)? {
            let number = record.number;
            let unreadable =
                |reason: &dyn std::fmt::Display| ReplayError::Record { number, reason: reason.to_string() };
            let decoded = pb::JournalRecord::decode(record.payload.as_slice()).map_err(|e| unreadable(&e))?;
            self.tables.begin()?;
            for change in decoded.changes {
                Write::of_record(change).map_err(|e| unreadable(&e.message()))?.apply(&mut self.tables)?;
            }
        }
        Ok(())
    }

    /// Keeps the write-ahead log short.
    fn bound_wal(&self) {
        match checkpoint(&self.tables.connection, "NOOP") {
            Ok((pages, moved)) => {
                let rest = pages - moved.min(pages);
                // Of two checkpoints at once one does nothing: beyond the limit this one waits for the other, and so do those who write.
                let turn = match pages {
                    WAL_PAGES_LIMIT.. => Some(self.progress.checkpoints.lock()),
                    WAL_PAGES_MAX.. if rest < WAL_REST_PAGES => self.progress.checkpoints.try_lock(),
                    _ => None,
                };
                if turn.is_some()
                    && let Err(error) = checkpoint(&self.tables.connection, "PASSIVE")
                {
                    end_if_unsafe(&error, "checkpointing");
                    tracing::warn!(%error, "the store can't shorten its write-ahead log");
                }
            }
            Err(error) => tracing::warn!(%error, "the store can't read the length of its write-ahead log"),
        }
    }
}

/// Records of the journal by what became of them.
#[derive(Debug, Default)]
struct Progress {
    /// Committed to the write-ahead log.
    committed: AtomicU64,
    /// And synced, so that the journal may forget them.
    durable: AtomicU64,
    /// Held by whoever moves pages of the write-ahead log to the file.
    checkpoints: Mutex<()>,
}

/// Makes commits durable behind the writer's back, and moves the log's pages to the file.
pub(super) struct Syncer {
    connection: Connection,
    /// SQLite's own log. In mode NORMAL it is synced at checkpoints only; a prefix of it is valid whatever of it was written.
    wal: File,
    progress: Arc<Progress>,
    wake: SyncSender<()>,
    woken: Receiver<()>,
}

impl Syncer {
    /// `connection`: to the file at `path`, which has a write-ahead log already.
    pub(super) fn new(connection: Connection, path: &Path) -> io::Result<Self> {
        let mut name = path.as_os_str().to_owned();
        name.push("-wal");
        let (wake, woken) = sync_channel(1);
        Ok(Self { connection, wal: File::open(name)?, progress: Arc::default(), wake, woken })
    }

    /// Works until the writer is gone.
    pub(super) fn run(self) {
        let Self { connection, wal, progress, wake, woken } = self;
        drop(wake);
        while woken.recv().is_ok() {
            let committed = progress.committed.load(Ordering::Acquire);
            if let Err(error) = wal.sync_data() {
                end(&error, "writing the store");
            }
            progress.durable.fetch_max(committed, Ordering::AcqRel);
            let moved = checkpoint(&connection, "NOOP").and_then(|(pages, moved)| {
                let is_due = pages >= WAL_PAGES_MAX || pages - moved.min(pages) >= WAL_BACKLOG_PAGES;
                if !is_due {
                    return Ok(());
                }
                let _turn = progress.checkpoints.lock();
                checkpoint(&connection, "PASSIVE").map(drop)
            });
            if let Err(error) = moved {
                end_if_unsafe(&error, "checkpointing");
                tracing::warn!(%error, "checkpoint failed, the write-ahead log stays");
            }
        }
    }
}

/// Ends the process: nobody knows what is on the disk, and asking again may be answered with a lie. A new start recovers.
fn end(error: &dyn std::fmt::Display, doing: &str) -> ! {
    tracing::error!(%error, "{doing} failed: what is on the disk is unknown, ending to recover from what is durable");
    std::process::abort();
}

/// Ends the process after a failed fsync. (A write that failed is rolled back like any error: its transaction has no valid end.)
fn end_if_unsafe(error: &rusqlite::Error, doing: &str) {
    let code = error.sqlite_error().map(|e| e.extended_code);
    if let Some(ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC) = code {
        end(error, doing);
    }
}

/// (pages in the write-ahead log, pages of it that are in the file).
fn checkpoint(connection: &Connection, mode: &str) -> rusqlite::Result<(u64, u64)> {
    connection
        .prepare_cached(&format!("PRAGMA wal_checkpoint({mode})"))?
        .query_row([], |row| Ok((row.get::<_, i64>(1)?.max(0) as u64, row.get::<_, i64>(2)?.max(0) as u64)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::super::super::{LogEntry, Put, ScrubAt, Scrubbed, Store};
    use super::super::Sqlite;
    use super::super::journal::FILE_BYTES;
    use super::*;

    /// What goes wrong in the writer's thread.
    #[derive(Debug, Clone, Copy)]
    pub(in super::super) enum Fault {
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
        child.args(["--exact", "store::sqlite::writer::tests::child_with_a_fault"]);
        let ended = child.env(FAULT, fault).env(DIRECTORY, &directory).output().expect("it starts");
        std::fs::remove_dir_all(&directory).expect("the child is gone");
        ended.status
    }

    /// Entries that the child has stored before it ends without a word, the second one larger than a journal.
    const SIZES: [usize; 4] = [1, FILE_BYTES as usize + 1, 2, 3];

    fn batch(pos: u64) -> ShardBatch {
        let entry = LogEntry {
            conversation: "g/x".into(),
            seq: pos,
            pos,
            key: pos.to_be_bytes().to_vec().into(),
            sender: "ann".into(),
            device: "phone".into(),
            kind: 0,
            client_id: "".into(),
            ts_ms: 0,
            payload: vec![b'.'; SIZES[pos as usize - 1]].into(),
        };
        let put = Put { key: "last".to_owned(), value: Some(pos.to_be_bytes().to_vec().into()) };
        ShardBatch { shard: 1, epoch: 1, appends: vec![entry], puts: vec![put], ..ShardBatch::default() }
    }

    /// The process that ends before its transaction is committed; without a directory, an empty test.
    #[test]
    fn child_that_ends_at_once() {
        let Some(directory) = std::env::var_os(DIRECTORY).filter(|_| std::env::var_os(FAULT).is_none()) else { return };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let me = MemberId::new("a", 1).expect("a good name");
            let store = Sqlite::open(&Path::new(&directory).join("store.db")).expect("a fresh file");
            let claim = Claim { shard: 1, expected_epoch: 0, expected_owner: None };
            store.acquire(&me, vec![claim]).await.expect("the store takes writes");
            for pos in 1..=SIZES.len() as u64 {
                let outcomes = store.commit(&me, vec![batch(pos)]).await.expect("the store takes writes");
                assert_eq!(outcomes, [Outcome::Committed]);
            }
            std::process::abort();
        });
    }

    #[test]
    fn what_was_answered_is_there_after_a_crash() {
        let directory = std::env::temp_dir().join(format!("im-store-crash-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a writable temporary directory");
        let mut child = Command::new(std::env::current_exe().expect("this test"));
        child.args(["--exact", "store::sqlite::writer::tests::child_that_ends_at_once"]);
        let ended = child.env_remove(FAULT).env(DIRECTORY, &directory).output().expect("it starts");
        assert_eq!(ended.status.signal(), Some(6), "{}", String::from_utf8_lossy(&ended.stdout));
        let path = directory.join("store.db");
        let file = Connection::open(&path).expect("a file");
        let in_file = file.query_row("SELECT count(*) FROM log", [], |row| row.get::<_, u32>(0)).expect("a table");
        assert!((in_file as usize) < SIZES.len(), "the journal had nothing to give: nothing is tested");
        drop(file);
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            let store = Sqlite::open(&path).expect("its own file");
            let log = store.since(1, 0, 10).await.expect("readable");
            assert_eq!(log.iter().map(|entry| entry.payload.len()).collect::<Vec<_>>(), SIZES);
            let last = store.get(1, vec!["last".to_owned()]).await.expect("readable");
            assert_eq!(last[0].as_deref(), Some(&(SIZES.len() as u64).to_be_bytes()[..]));
            let scrubbed = store.scrub(1, ScrubAt::default(), u32::MAX).await.expect("readable");
            assert_eq!(scrubbed, Scrubbed::default());
        });
        std::fs::remove_dir_all(&directory).expect("the child is gone");
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
