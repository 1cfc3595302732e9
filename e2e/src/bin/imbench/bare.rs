//! The limits: what one process does with the same rows and the same durability when it does nothing else.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use im_e2e::history::{micros, new_latency_histogram};
use rusqlite::{Connection, params};
use tokio_postgres::NoTls;
use tokio_postgres::types::ToSql;

use crate::Outcome;

/// A row of the log, in either store.
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

/// A database with the tables of `recorded` and nothing in it.
fn empty_copy(recorded: &Connection, path: &Path) -> Outcome<Connection> {
    let database = Connection::open(path)?;
    database.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(()))?;
    database.pragma_update(None, "synchronous", "FULL")?;
    database.pragma_update(None, "cache_size", -16 * 1024)?;
    let mut tables = recorded.prepare("SELECT sql FROM sqlite_master WHERE tbl_name = 'log' AND sql IS NOT NULL")?;
    for sql in tables.query_map([], |row| row.get::<_, String>(0))? {
        database.execute_batch(&sql?)?;
    }
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

/// Writes the rows of a recorded SQLite file again, so many in a transaction; rows per second.
pub fn replay_sqlite(recorded: &Path, copy: &Path, batch_rows: usize) -> Outcome<f64> {
    let recorded = Connection::open(recorded)?;
    let mut select = recorded.prepare(
        "SELECT shard, id & ((1 << 40) - 1), conversation, seq, key, sender, device, kind, client_id, ts_ms, payload
         FROM log ORDER BY ts_ms, id",
    )?;
    let rows = select.query_map([], |row| {
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
    let rows = rows.collect::<Result<Vec<Row>, _>>()?;
    let database = empty_copy(&recorded, copy)?;
    let start = Instant::now();
    for batch in rows.chunks(batch_rows.max(1)) {
        insert(&database, batch)?;
    }
    Ok(rows.len() as f64 / start.elapsed().as_secs_f64())
}

/// The same for the log of a PostgreSQL database: one statement is one transaction is one flush.
pub async fn replay_postgres(url: &str, batch_rows: usize) -> Outcome<f64> {
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
    let start = Instant::now();
    for batch in rows.chunks(batch_rows.max(1)) {
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

/// Bytes of a message of [`group_commit_round_trip`]: its number and a payload.
const RECORD_BYTES: usize = 128;

/// A socket, and behind it one thread that stores all that came in with one transaction and then answers it: how long a message
/// takes at a constant rate. `recorded` gives the table.
pub fn group_commit_round_trip(
    recorded: &Path,
    copy: &Path,
    per_second: u64,
    length: Duration,
) -> Outcome<Histogram<u64>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let database = empty_copy(&Connection::open(recorded)?, copy)?;
    // As a store that runs for long: its write-ahead log has its full length (a file that grows costs a journal commit with each
    // fsync), and starts over when it is full.
    database.pragma_update_and_check(None, "wal_autocheckpoint", 16_384, |_| Ok(()))?;
    database.execute_batch("CREATE TABLE filler (x BLOB); INSERT INTO filler VALUES (zeroblob(64 << 20))")?;
    database.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(()))?;
    let mut stream = TcpStream::connect(listener.local_addr()?)?;
    stream.set_nodelay(true)?;
    let (server, _) = listener.accept()?;
    let server = std::thread::spawn(move || store_and_answer(server, &database));
    let count = per_second * length.as_secs();
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
    for number in 0..count {
        std::thread::sleep(due(number).saturating_duration_since(Instant::now()));
        record[..8].copy_from_slice(&number.to_le_bytes());
        stream.write_all(&record)?;
    }
    let latency = reader.join().map_err(|_| "the reader panicked")??;
    stream.shutdown(std::net::Shutdown::Write)?;
    server.join().map_err(|_| "the server panicked")??;
    Ok(latency)
}

fn store_and_answer(mut stream: TcpStream, database: &Connection) -> Outcome {
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
        let rows: Vec<Row> = buffer[..whole].chunks_exact(RECORD_BYTES).map(row_of).collect();
        let numbers: Vec<u8> =
            buffer[..whole].chunks_exact(RECORD_BYTES).flat_map(|record| record[..8].iter().copied()).collect();
        insert(database, &rows)?;
        stream.write_all(&numbers)?;
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

fn row_of(record: &[u8]) -> Row {
    let number = record.iter().take(8).rev().fold(0i64, |number, byte| (number << 8) | i64::from(*byte));
    let conversation = number % 256;
    Row {
        shard: (conversation % 64) as i32,
        pos: number + 1,
        conversation: format!("u/a{conversation}/b{conversation}"),
        seq: number / 256 + 1,
        key: format!("\x01a{conversation}\0phone\0{number:016x}").into_bytes(),
        sender: format!("a{conversation}"),
        device: "phone".to_owned(),
        kind: 0,
        client_id: format!("{number:016x}"),
        ts_ms: number,
        payload: record[28..].to_vec(),
    }
}
