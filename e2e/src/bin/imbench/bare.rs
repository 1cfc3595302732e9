//! The limits: what one process does with the same rows and the same durability when it does nothing else.
//!
//! The same on both sides: the rows (those that the system stored), their order, their two keys, WAL with synchronous = FULL, and
//! checkpoints, which are taken whenever the write-ahead log has 64 MiB and count. What the system writes besides its log (index rows,
//! marks, cursors) is left out of the bare loop: it is the system's own cost. How it stores the rows is the system's own, too: the bare
//! loop has one plain table ([`TABLE`]), the same for all releases.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use im_e2e::history::{micros, new_latency_histogram};
use rusqlite::{Connection, params};
use tokio_postgres::NoTls;
use tokio_postgres::types::ToSql;

use crate::Outcome;

/// Pages of the write-ahead log at which it is checkpointed, as in the store: 64 MiB.
const WAL_PAGES_MAX: u32 = 16_384;

/// A row of the log, in either store.
#[derive(Clone)]
pub struct Row {
    shard: i32,
    pos: i64,
    conversation: String,
    seq: i64,
    key: Vec<u8>,
    sender: String,
    device: String,
    kind: i16,
    client_id: String,
    ts_ms: i64,
    payload: Vec<u8>,
}

/// The log of a SQLite store in the order of its commits: what was stored in a time, milliseconds since the Unix epoch.
pub fn rows_of(recorded: &Path, stored_ms: Range<i64>) -> Outcome<Vec<Row>> {
    let recorded = Connection::open(recorded)?;
    let mut select = recorded.prepare(
        "SELECT c.shard, log.id & ((1 << 40) - 1), c.name, seq, key, sender, device, kind, client_id, ts_ms, payload
         FROM log JOIN conversation c ON c.id = log.conversation WHERE ts_ms >= ?1 AND ts_ms < ?2 ORDER BY ts_ms, log.id",
    )?;
    let rows = select.query_map([stored_ms.start, stored_ms.end], |row| {
        Ok(Row {
            shard: row.get(0)?,
            pos: row.get(1)?,
            conversation: row.get(2)?,
            seq: row.get(3)?,
            key: row.get(4)?,
            sender: row.get(5)?,
            device: row.get(6)?,
            kind: row.get(7)?,
            client_id: row.get(8)?,
            ts_ms: row.get(9)?,
            payload: row.get(10)?,
        })
    })?;
    Ok(rows.collect::<Result<Vec<Row>, _>>()?)
}

/// Where the bare loop puts its rows.
const TABLE: &str = "
    CREATE TABLE log (
        id INTEGER PRIMARY KEY,
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
";

/// A database with an empty table, in the state of a store that has run for long: its write-ahead log has its full length (a file that
/// grows costs a journal commit with each fsync), and starts over when it is full.
fn empty_table(path: &Path) -> Outcome<Connection> {
    let database = Connection::open(path)?;
    database.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    database.pragma_update(None, "synchronous", "FULL")?;
    database.pragma_update(None, "cache_size", -16 * 1024)?;
    database.pragma_update_and_check(None, "wal_autocheckpoint", WAL_PAGES_MAX, |_| Ok(()))?;
    database.execute_batch(TABLE)?;
    database.execute_batch("CREATE TABLE filler (x BLOB); INSERT INTO filler VALUES (zeroblob(64 << 20))")?;
    database.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))?;
    Ok(database)
}

fn insert(database: &Connection, rows: &[Row]) -> rusqlite::Result<()> {
    database.execute_batch("BEGIN IMMEDIATE")?;
    let mut insert = database.prepare_cached(
        "INSERT INTO log (id, shard, conversation, seq, key, sender, device, kind, client_id, ts_ms, payload)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?;
    for row in rows {
        insert.execute(params![
            (i64::from(row.shard) << 40) | row.pos,
            row.shard,
            row.conversation,
            row.seq,
            row.key,
            row.sender,
            row.device,
            row.kind,
            row.client_id,
            row.ts_ms,
            row.payload
        ])?;
    }
    database.execute_batch("COMMIT")
}

/// Cuts rows into the recorded transactions; an error if they do not add up.
fn cut<'a>(mut rows: &'a [Row], transactions: &[usize]) -> Outcome<Vec<&'a [Row]>> {
    let recorded: usize = transactions.iter().sum();
    if recorded != rows.len() {
        return Err(format!("the recorded transactions have {recorded} rows, the log has {}", rows.len()).into());
    }
    let mut batches = Vec::with_capacity(transactions.len());
    for size in transactions {
        let (batch, rest) = rows.split_at(*size);
        batches.push(batch);
        rows = rest;
    }
    Ok(batches)
}

/// Writes the rows of a recorded SQLite file again, transaction by transaction of the sizes recorded; rows per second.
pub fn replay_sqlite(recorded: &Path, copy: &Path, transactions: &[usize]) -> Outcome<f64> {
    let rows = rows_of(recorded, 0..i64::MAX)?;
    let batches = cut(&rows, transactions)?;
    let database = empty_table(copy)?;
    let start = Instant::now();
    for batch in batches {
        insert(&database, batch)?;
    }
    Ok(rows.len() as f64 / start.elapsed().as_secs_f64())
}

/// The same for the log of a PostgreSQL database: one statement is one transaction is one flush.
pub async fn replay_postgres(url: &str, transactions: &[usize]) -> Outcome<f64> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    let select = "SELECT shard, pos, conversation, seq, key, sender, device, kind, client_id, ts_ms, payload FROM log ORDER BY ts_ms, pos";
    let rows: Vec<Row> = client
        .query(select, &[])
        .await?
        .iter()
        .map(|row| Row {
            shard: row.get(0),
            pos: row.get(1),
            conversation: row.get(2),
            seq: row.get(3),
            key: row.get(4),
            sender: row.get(5),
            device: row.get(6),
            kind: row.get(7),
            client_id: row.get(8),
            ts_ms: row.get(9),
            payload: row.get(10),
        })
        .collect();
    client.batch_execute("CREATE TABLE replayed (LIKE log INCLUDING ALL)").await?;
    let insert = "INSERT INTO replayed (shard, conversation, seq, pos, key, sender, device, kind, client_id, ts_ms, payload)
        SELECT * FROM unnest($1::int4[], $2::text[], $3::int8[], $4::int8[], $5::bytea[], $6::text[], $7::text[], $8::int2[],
                             $9::text[], $10::int8[], $11::bytea[])";
    let insert = client.prepare(insert).await?;
    let batches = cut(&rows, transactions)?;
    let start = Instant::now();
    for batch in batches {
        macro_rules! column {
            ($field:ident) => {
                &batch.iter().map(|row| &row.$field).collect::<Vec<_>>()
            };
        }
        let columns: [&(dyn ToSql + Sync); 11] = [
            column!(shard),
            column!(conversation),
            column!(seq),
            column!(pos),
            column!(key),
            column!(sender),
            column!(device),
            column!(kind),
            column!(client_id),
            column!(ts_ms),
            column!(payload),
        ];
        client.execute(&insert, &columns).await?;
    }
    Ok(rows.len() as f64 / start.elapsed().as_secs_f64())
}

/// Bytes of a message of [`group_commit_round_trip`]: the number of its row, and as many more as a small message has.
const RECORD_BYTES: usize = 128;

/// A socket, and behind it one thread that stores all that came in with one transaction and then answers it: how long a message
/// takes at a constant rate. The rows are those of the system under test, in their order.
pub fn group_commit_round_trip(rows: Vec<Row>, copy: &Path, per_second: u64) -> Outcome<Histogram<u64>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let database = empty_table(copy)?;
    let mut stream = TcpStream::connect(listener.local_addr()?)?;
    stream.set_nodelay(true)?;
    let (server, _) = listener.accept()?;
    let count = rows.len() as u64;
    let server = std::thread::spawn(move || store_and_answer(server, &database, &rows));
    let start = Instant::now() + Duration::from_millis(10);
    let due = move |number: u64| start + Duration::from_nanos(number * 1_000_000_000 / per_second);
    let mut answers = stream.try_clone()?;
    let reader = std::thread::spawn(move || -> std::io::Result<Histogram<u64>> {
        let mut latency = new_latency_histogram();
        let mut answer = [0; 8];
        for _ in 0..count {
            answers.read_exact(&mut answer)?;
            latency.saturating_record(micros(due(u64::from_le_bytes(answer)).elapsed()));
        }
        Ok(latency)
    });
    let mut record = [7; RECORD_BYTES];
    let mut sent = Ok(());
    for number in 0..count {
        std::thread::sleep(due(number).saturating_duration_since(Instant::now()));
        record[..8].copy_from_slice(&number.to_le_bytes());
        sent = stream.write_all(&record);
        if sent.is_err() {
            break;
        }
    }
    // Once the last one is answered nothing more comes; a server that failed has closed its end.
    let latency = reader.join().map_err(|_| "the reader panicked")?;
    let closed = stream.shutdown(std::net::Shutdown::Both);
    // What the server says tells more than the broken socket.
    server.join().map_err(|_| "the server panicked")??;
    sent?;
    closed?;
    Ok(latency?)
}

fn store_and_answer(mut stream: TcpStream, database: &Connection, rows: &[Row]) -> Outcome {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 1 << 20];
    let mut filled = 0;
    loop {
        let read = stream.read(&mut buffer[filled..])?;
        if read == 0 {
            return Ok(());
        }
        filled += read;
        let whole = filled / RECORD_BYTES * RECORD_BYTES;
        let numbers: Vec<u8> =
            buffer[..whole].chunks_exact(RECORD_BYTES).flat_map(|record| record[..8].iter().copied()).collect();
        let (numbers_of_rows, _) = numbers.as_chunks::<8>();
        if let (Some(first), Some(last)) = (numbers_of_rows.first(), numbers_of_rows.last()) {
            let range = u64::from_le_bytes(*first) as usize..=u64::from_le_bytes(*last) as usize;
            insert(database, rows.get(range).ok_or("a row that does not exist was asked for")?)?;
        }
        stream.write_all(&numbers)?;
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}
