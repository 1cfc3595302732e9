//! The store in one SQLite file, with a journal before it, for the one process that owns it.
//!
//! One thread writes. It takes all requests that wait, applies them in their order to a SQLite transaction that stays open, appends
//! them to the journal with one fdatasync, and then answers them all: group commit, whose group is what arrived during the sync before.
//! Every five seconds the transaction is committed (WAL, synchronous=NORMAL). A message touches a leaf of the log and of each of its two
//! indexes; in transactions of thousands of rows most leaves are touched again and again and written once, and that is most of what a
//! durable message costs.
//!
//! A shard that fails is taken back by deleting its few rows, so no savepoints are needed (they would copy each page they touch). What
//! fails otherwise is undone by rolling back and applying the journal again, which is what opening the store does, too.
//!
//! Reads have threads and connections of their own and never wait for the writer, unless they look at what is not committed yet: those
//! go to the writer.
//!
//! | module | what it holds |
//! | --- | --- |
//! | here | the store's threads, its schema, reading |
//! | [`writer`] | groups, the open transaction, checkpoints |
//! | [`tables`] | what a write does to the tables |
//! | [`journal`] | the two journal files |
//! | [`record`] | a commit as the journal keeps it |
//! | [`unflushed`] | what readers can't see yet |

mod journal;
mod record;
mod tables;
mod unflushed;
mod writer;

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use im_proto::ids::MemberId;
use im_proto::process::AbortOnPanic;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, Row, params};
use tokio::sync::{mpsc, oneshot};

use self::tables::{ENTRY, OF_CONVERSATION, Tables, entry, id, int, row_of_shard, shard_row};
use self::unflushed::{Concern, Unflushed};
use self::writer::{Pending, Reply, Syncer, Write, Writer};
use super::{
    ANSWER_BYTES_MAX, ANSWER_ROWS_MAX, Acquired, Answer, Claim, LogEntry, LogRange, OpenError, Outcome, POS_MAX,
    Released, ScrubAt, Scrubbed, ShardBatch, ShardRow, Store, StoreError, claimable, prefix_end, scrub_limit, scrubbed,
};

/// Write requests that may wait; whoever comes next waits to hand his in.
const WRITES_WAITING_MAX: usize = 1024;
/// Reads that may wait.
const READS_WAITING_MAX: usize = 1024;
/// Connections that read.
const READERS: usize = 4;
/// Pages that a connection keeps, KiB. The writer's are those that the open transaction changed, and what it changes again and again.
const READER_CACHE_KIB: i32 = 8 << 10;
const WRITER_CACHE_KIB: i32 = 64 << 10;
/// Steps; the number of those done is in `meta`.
const MIGRATIONS: [&str; 2] = ["
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
", "
    -- Numbers instead of names in the log and its indexes: less than half of the leaves that a transaction touches, and no texts to compare.
    CREATE TABLE conversation (
        id INTEGER PRIMARY KEY,
        shard INTEGER NOT NULL,
        name TEXT NOT NULL,
        UNIQUE (shard, name)
    );
    INSERT INTO conversation (shard, name) SELECT DISTINCT shard, conversation FROM log;
    ALTER TABLE log RENAME TO log_with_names;
    CREATE TABLE log (
        id INTEGER PRIMARY KEY, -- shard * 2^40 + pos: (shard, pos) in one b-tree of its own rows
        conversation INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        key BLOB NOT NULL,
        sender TEXT NOT NULL,
        device TEXT NOT NULL,
        kind INTEGER NOT NULL,
        client_id TEXT NOT NULL,
        ts_ms INTEGER NOT NULL,
        payload BLOB NOT NULL
    );
    INSERT INTO log
        SELECT l.id, c.id, seq, key, sender, device, kind, client_id, ts_ms, payload
        FROM log_with_names l JOIN conversation c ON c.shard = l.shard AND c.name = l.conversation ORDER BY l.id;
    DROP TABLE log_with_names;
    CREATE UNIQUE INDEX log_seq ON log (conversation, seq);
    CREATE UNIQUE INDEX log_key ON log (conversation, key);
"];

// ---------------------------------------------------------------------------------------------------------------------------------
// The store: hands requests to the threads
// ---------------------------------------------------------------------------------------------------------------------------------

/// A SQLite file, owned by this process until it is dropped.
#[derive(Debug)]
pub struct Sqlite {
    /// To the writer; `None` only while dropping.
    writes: Option<mpsc::Sender<Write>>,
    /// To whichever reader is free.
    reads: mpsc::Sender<Read>,
    /// What only the writer can read yet.
    unflushed: Arc<Unflushed>,
    writer: Option<thread::JoinHandle<()>>,
}

/// Reads with the connection given, or has an answer without.
type Read = Box<dyn FnOnce(Result<&Connection, StoreError>) + Send>;

impl Sqlite {
    /// Opens or creates the file and its journals, brings what only they have into the file, and starts the threads.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let failed =
            |reason: &dyn std::fmt::Display| OpenError::File { path: path.to_owned(), reason: reason.to_string() };
        let lock = lock(path)?;
        let mut connection = connect(path).map_err(|e| failed(&e))?;
        migrate(&mut connection).map_err(|e| failed(&e))?;
        let unflushed = Arc::new(Unflushed::default());
        let syncer = Syncer::new(connect(path).map_err(|e| failed(&e))?, path).map_err(|e| failed(&e))?;
        let (writes, requests) = mpsc::channel(WRITES_WAITING_MAX);
        connection.pragma_update(None, "cache_size", -WRITER_CACHE_KIB).map_err(|e| failed(&e))?;
        let tables = Tables::new(connection, unflushed.clone());
        let writer = Writer::open(path, tables, requests, &syncer, lock).map_err(|e| failed(&e))?;
        // The names of the new files must be as durable as what is in them.
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|d| d.sync_all()).map_err(|e| failed(&e))?;

        let (reads, jobs) = mpsc::channel::<Read>(READS_WAITING_MAX);
        let jobs = Arc::new(Mutex::new(jobs));
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let run = move || {
                // Without its writer a store would refuse everything for good.
                let _guard = AbortOnPanic("a thread of the store");
                run();
            };
            thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|e| failed(&e))
        };
        for _ in 0..READERS {
            let (connection, jobs) = (connect(path).map_err(|e| failed(&e))?, jobs.clone());
            connection.pragma_update(None, "query_only", true).map_err(|e| failed(&e))?;
            spawn("store-reader", Box::new(move || read_until_closed(&connection, &jobs)))?;
        }
        spawn("store-syncer", Box::new(move || syncer.run()))?;
        let writer = spawn("store-writer", Box::new(move || writer.run()))?;
        Ok(Self { writes: Some(writes), reads, unflushed, writer: Some(writer) })
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

    /// Has a reader answer, or the writer if it is about what readers can't see yet.
    async fn read<A: Send + 'static>(
        &self,
        concern: Concern<'_>,
        read: impl FnOnce(&Connection) -> rusqlite::Result<A> + Send + 'static,
    ) -> Result<A, StoreError> {
        let (reply, answer) = oneshot::channel();
        let job: Read = Box::new(move |connection: Result<&Connection, StoreError>| {
            let answer = connection.and_then(|connection| read(connection).map_err(StoreError::refused));
            // Nobody waits any more: nothing to do.
            let _ = reply.send(answer);
        });
        let closed = || StoreError::refused("the store is closed");
        if self.unflushed.concern(concern) {
            self.writes.as_ref().ok_or_else(closed)?.send(Write::Read(job)).await.map_err(|_| closed())?;
        } else {
            self.reads.send(job).await.map_err(|_| closed())?;
        }
        answer.await.map_err(|_| closed())?
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
            self.write(|reply| Write::Acquire(Pending::new((me, claims), reply))).await
        })
    }

    fn release(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<Released>> {
        let me = me.clone();
        Box::pin(self.write(|reply| Write::Release(Pending::new((me, shards), reply))))
    }

    fn check(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<ShardRow>> {
        let me = me.clone();
        Box::pin(async move {
            let asked: Vec<u32> = shards.iter().map(|(shard, _)| *shard).collect();
            let lost = move |c: &Connection| {
                let mut lost = Vec::new();
                for (shard, epoch) in shards {
                    let row = shard_row(c, shard)?;
                    if !row.is_held(&me, epoch) {
                        lost.push(row);
                    }
                }
                Ok(lost)
            };
            self.read(Concern::Rows(&asked), lost).await
        })
    }

    fn commit(&self, me: &MemberId, batches: Vec<ShardBatch>) -> Answer<'_, Vec<Outcome>> {
        let me = me.clone();
        Box::pin(self.write(|reply| Write::Commit(Pending::new((me, batches), reply))))
    }

    fn find(&self, shard: u32, conversation: Arc<str>, key: Bytes) -> Answer<'_, Option<LogEntry>> {
        Box::pin(async move {
            let id = conversation.clone();
            let find = move |c: &Connection| {
                let mut select =
                    c.prepare_cached(&format!("SELECT {ENTRY} FROM log WHERE {OF_CONVERSATION} AND key = ?3"))?;
                select.query_row(params![shard, id, &key[..]], entry).optional()
            };
            self.read(Concern::Conversations(&[(shard, conversation)]), find).await
        })
    }

    fn range(&self, range: LogRange) -> Answer<'_, Vec<LogEntry>> {
        Box::pin(async move {
            let place = (range.shard, range.conversation.clone());
            self.read(Concern::Conversations(&[place]), move |c| entries_of(c, &range)).await
        })
    }

    fn tails(&self, conversations: Vec<(u32, Arc<str>)>, limit: u32) -> Answer<'_, Vec<Vec<LogEntry>>> {
        Box::pin(async move {
            let ranges = LogRange::tails(conversations.clone(), limit);
            let read = move |c: &Connection| ranges.iter().map(|range| entries_of(c, range)).collect();
            self.read(Concern::Conversations(&conversations), read).await
        })
    }

    fn since(&self, shard: u32, after_pos: u64, limit: u32) -> Answer<'_, Vec<LogEntry>> {
        Box::pin(self.read(Concern::Log(shard), move |c| {
            let mut select =
                c.prepare_cached(&format!("SELECT {ENTRY} FROM log WHERE id > ?1 AND id <= ?2 ORDER BY id LIMIT ?3"))?;
            let rows = select.query(params![id(shard, after_pos), id(shard, POS_MAX), limit.min(ANSWER_ROWS_MAX)])?;
            within(rows, ANSWER_BYTES_MAX, entry, |e| e.payload.len())
        }))
    }

    fn items(&self, shard: u32, prefix: String, after: Option<String>, limit: u32) -> Answer<'_, Vec<(String, Bytes)>> {
        Box::pin(async move {
            let wanted = prefix.clone();
            let read = move |c: &Connection| {
                let mut select = c.prepare_cached(
                    "SELECT k, v FROM item WHERE shard = ?1 AND k >= ?2 AND (?3 IS NULL OR k < ?3) AND (?4 IS NULL OR k > ?4)
                     ORDER BY k LIMIT ?5",
                )?;
                // A scan that goes on after a key starts there, not at the prefix.
                let from = after.as_deref().filter(|after| *after > prefix.as_str()).unwrap_or(&prefix);
                let end = prefix_end(&prefix);
                let rows = select.query(params![shard, from, end, after, limit.min(ANSWER_ROWS_MAX)])?;
                within(
                    rows,
                    ANSWER_BYTES_MAX,
                    |row| Ok((row.get(0)?, blob(row, 1)?)),
                    |(_, v): &(String, Bytes)| v.len(),
                )
            };
            self.read(Concern::Items(shard, &wanted), read).await
        })
    }

    fn get(&self, shard: u32, keys: Vec<String>) -> Answer<'_, Vec<Option<Bytes>>> {
        Box::pin(async move {
            let wanted = keys.clone();
            let read = move |c: &Connection| {
                let mut select = c.prepare_cached("SELECT v FROM item WHERE shard = ?1 AND k = ?2")?;
                keys.iter().map(|key| select.query_row(params![shard, key], |row| blob(row, 0)).optional()).collect()
            };
            self.read(Concern::Keys(shard, &wanted), read).await
        })
    }

    fn shards(&self) -> Answer<'_, Vec<ShardRow>> {
        Box::pin(self.read(Concern::AllRows, |c| {
            let mut select = c.prepare_cached("SELECT shard, epoch, owner FROM shard ORDER BY shard")?;
            select.query_map([], row_of_shard)?.collect()
        }))
    }

    fn scrub(&self, shard: u32, after: ScrubAt, limit: u32) -> Answer<'_, Scrubbed> {
        Box::pin(self.read(Concern::Log(shard), move |c| scrub(c, shard, after, limit)))
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Reading, and the file
// ---------------------------------------------------------------------------------------------------------------------------------

fn read_until_closed(connection: &Connection, jobs: &Mutex<mpsc::Receiver<Read>>) {
    loop {
        // The lock is held while waiting: the readers queue up behind it, one job wakes one of them.
        let job = jobs.lock().blocking_recv();
        match job {
            Some(job) => job(Ok(connection)),
            None => return,
        }
    }
}

fn blob(row: &Row<'_>, column: usize) -> rusqlite::Result<Bytes> {
    Ok(Bytes::copy_from_slice(row.get_ref(column)?.as_blob()?))
}

fn entries_of(c: &Connection, range: &LogRange) -> rusqlite::Result<Vec<LogEntry>> {
    let (compare, order) = if range.backward { ("<=", "DESC") } else { (">=", "ASC") };
    let from = if range.backward && range.from == 0 { i64::MAX } else { int(range.from) };
    let mut select = c.prepare_cached(&format!(
        "SELECT {ENTRY} FROM log WHERE {OF_CONVERSATION} AND seq {compare} ?3 ORDER BY seq {order} LIMIT ?4"
    ))?;
    let limit = range.limit.min(ANSWER_ROWS_MAX);
    let rows = select.query(params![range.shard, range.conversation, from, limit])?;
    within(rows, range.bytes_max(), entry, |e| e.payload.len())
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

fn scrub(c: &Connection, shard: u32, after: ScrubAt, limit: u32) -> rusqlite::Result<Scrubbed> {
    let mut watermark = c.prepare_cached("SELECT watermark FROM shard WHERE shard = ?1")?;
    let watermark = watermark.query_row([shard], |row| row.get::<_, i64>(0)).optional()?.unwrap_or(0);
    let mut select = c.prepare_cached("SELECT id - ?1 FROM log WHERE id > ?2 AND id <= ?3 ORDER BY id LIMIT ?4")?;
    let behind = params![id(shard, 0), id(shard, after.pos), id(shard, POS_MAX), scrub_limit(limit)];
    let positions: Vec<u64> =
        select.query_map(behind, |row| Ok(row.get::<_, i64>(0)? as u64))?.collect::<Result<_, _>>()?;
    let mut select = c.prepare_cached(
        "SELECT c.name, log.seq FROM conversation c CROSS JOIN log ON log.conversation = c.id
         WHERE c.shard = ?1 AND c.name >= ?2 AND (c.name, log.seq) > (?2, ?3) ORDER BY c.name, log.seq LIMIT ?4",
    )?;
    let behind = params![shard, after.conversation, int(after.seq), scrub_limit(limit)];
    let place = |row: &Row<'_>| Ok((row.get_ref(0)?.as_str()?.into(), row.get::<_, i64>(1)? as u64));
    let seqs = select.query_map(behind, place)?.collect::<Result<_, _>>()?;
    Ok(scrubbed(shard, after, limit, watermark as u64, &positions, seqs))
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
    // The journal is what makes writes durable; see `Syncer`.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update_and_check(None, "wal_autocheckpoint", 0, |_| Ok(()))?;
    connection.pragma_update(None, "cache_size", -READER_CACHE_KIB)?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn migrate(connection: &mut Connection) -> Result<(), Box<dyn std::error::Error>> {
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    transaction.execute_batch("CREATE TABLE IF NOT EXISTS meta (k TEXT PRIMARY KEY, v INTEGER NOT NULL)")?;
    let done =
        transaction.query_row("SELECT v FROM meta WHERE k = 'version'", [], |r| r.get::<_, u32>(0)).optional()?;
    let (done, known) = (done.unwrap_or(0), MIGRATIONS.len() as u32);
    if done > known {
        return Err(format!(
            "a newer release made its tables (version {done}, this one knows {known}); start that one"
        )
        .into());
    }
    for step in MIGRATIONS.iter().skip(done as usize) {
        transaction.execute_batch(step)?;
    }
    transaction.execute("INSERT OR REPLACE INTO meta VALUES ('version', ?1)", [known])?;
    Ok(transaction.commit()?)
}

#[cfg(test)]
mod tests {
    use super::super::Put;
    use super::*;

    /// A place for a store that goes with the test.
    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let directory = std::env::temp_dir().join(format!("im-store-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&directory).expect("a writable temporary directory");
            Self(directory)
        }

        fn path(&self) -> std::path::PathBuf {
            self.0.join("store.db")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn entry(conversation: &str, seq: u64, pos: u64) -> LogEntry {
        LogEntry {
            conversation: conversation.into(),
            seq,
            pos,
            key: format!("{conversation} {seq}").into_bytes().into(),
            sender: "ann".into(),
            device: "phone".into(),
            kind: 0,
            client_id: "".into(),
            ts_ms: 7,
            payload: Bytes::from_static(b"hello"),
        }
    }

    #[tokio::test]
    async fn a_file_of_an_earlier_release_is_taken_over() {
        let scratch = Scratch::new("earlier");
        let log = [entry("g/x", 1, 1), entry("g/y", 1, 2), entry("g/x", 2, 3)];
        let file = Connection::open(scratch.path()).expect("a file");
        file.execute_batch(MIGRATIONS[0]).expect("tables");
        let meta = "CREATE TABLE meta (k TEXT PRIMARY KEY, v INTEGER NOT NULL); INSERT INTO meta VALUES ('version', 1)";
        file.execute_batch(meta).expect("a table");
        let me = MemberId::new("a", 1).expect("a good name");
        file.execute("INSERT INTO shard VALUES (1, 1, ?1, 0)", [me.as_str()]).expect("a row");
        for e in &log {
            let row =
                params![id(1, e.pos), e.conversation, e.seq as i64, &e.key[..], e.sender, e.device, &e.payload[..]];
            file.execute("INSERT INTO log VALUES (?1, 1, ?2, ?3, ?4, ?5, ?6, 0, '', 7, ?7)", row).expect("a row");
        }
        drop(file);

        let store = Sqlite::open(&scratch.path()).expect("an earlier file");
        assert_eq!(store.since(1, 0, 10).await.expect("readable"), log);
        assert_eq!(store.find(1, "g/x".into(), log[2].key.clone()).await.expect("readable"), Some(log[2].clone()));
        let commit = |e: LogEntry| ShardBatch { shard: 1, epoch: 1, appends: vec![e], ..ShardBatch::default() };
        let again = LogEntry { key: log[1].key.clone(), ..entry("g/y", 2, 4) };
        let stored = store.commit(&me, vec![commit(again)]).await.expect("writable");
        assert!(matches!(&stored[..], [Outcome::Duplicates(found)] if found[0].stored == log[1]), "{stored:?}");
        assert_eq!(store.commit(&me, vec![commit(entry("g/y", 2, 4))]).await.expect("writable"), [Outcome::Committed]);
        drop(store);
        let store = Sqlite::open(&scratch.path()).expect("its own file");
        assert_eq!(store.since(1, 3, 10).await.expect("readable"), [entry("g/y", 2, 4)]);
        assert_eq!(store.scrub(1, ScrubAt::default(), 10).await.expect("readable"), Scrubbed::default());
    }

    #[test]
    fn a_file_of_a_newer_release_is_refused() {
        let scratch = Scratch::new("newer");
        drop(Sqlite::open(&scratch.path()).expect("a fresh file"));
        let file = Connection::open(scratch.path()).expect("a file");
        file.execute("UPDATE meta SET v = v + 1 WHERE k = 'version'", []).expect("a row");
        let refused = Sqlite::open(&scratch.path()).expect_err("unknown tables").to_string();
        assert!(refused.contains("a newer release made its tables (version 3, this one knows 2)"), "{refused}");
    }

    #[tokio::test]
    async fn numbers_of_conversations_that_were_rolled_back_are_not_used() {
        let scratch = Scratch::new("rolled-back");
        let me = MemberId::new("a", 1).expect("a good name");
        let store = Sqlite::open(&scratch.path()).expect("a fresh file");
        let claim = Claim { shard: 1, expected_epoch: 0, expected_owner: None };
        store.acquire(&me, vec![claim]).await.expect("writable");
        // A full file: the batch that makes a conversation is undone with it.
        store.set_pages_max(1).await.expect("a bound");
        let large = Put { key: "large".to_owned(), value: Some(vec![0; 1 << 20].into()) };
        let batch =
            |e: LogEntry, puts| ShardBatch { shard: 1, epoch: 1, appends: vec![e], puts, ..ShardBatch::default() };
        store.commit(&me, vec![batch(entry("g/x", 1, 1), vec![large])]).await.expect_err("the file is full");
        store.set_pages_max(u32::MAX - 1).await.expect("no bound");
        for (name, pos) in [("g/y", 1), ("g/x", 2)] {
            let stored = store.commit(&me, vec![batch(entry(name, 1, pos), Vec::new())]).await.expect("writable");
            assert_eq!(stored, [Outcome::Committed]);
        }
        let log = store.since(1, 0, 10).await.expect("readable");
        assert_eq!(log.iter().map(|e| &*e.conversation).collect::<Vec<_>>(), ["g/y", "g/x"]);
    }
}
