//! What a write does to the tables, within the transaction that is open.

use std::collections::HashMap;
use std::sync::Arc;

use im_proto::ids::MemberId;
use rusqlite::{Connection, ErrorCode, OptionalExtension, Row, params};

use super::super::{
    Acquired, Claim, Duplicate, LogEntry, Outcome, POS_MAX, Released, ShardBatch, ShardRow, Tail, contradiction,
    last_puts, place_taken,
};
use super::blob;
use super::unflushed::Unflushed;

/// A log row's columns, as [`entry`] reads them.
pub(super) const ENTRY: &str = "(SELECT c.name FROM conversation c WHERE c.id = log.conversation),
    seq, id, key, sender, device, kind, client_id, ts_ms, payload";
/// That a log row is of conversation ?2 of shard ?1.
pub(super) const OF_CONVERSATION: &str =
    "conversation = (SELECT c.id FROM conversation c WHERE c.shard = ?1 AND c.name = ?2)";
/// Numbers of conversations that the writer remembers.
const KNOWN_MAX: usize = 1 << 16;

/// The row id of (shard, pos).
pub(super) fn id(shard: u32, pos: u64) -> i64 {
    (i64::from(shard) << 40) | pos.min(POS_MAX) as i64
}

/// A number of ours as SQLite's; what is beyond its range is beyond any stored one as well.
pub(super) fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The tables as their only writer sees them.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) connection: Connection,
    pub(super) unflushed: Arc<Unflushed>,
    /// Rows as they are in the open transaction: each batch asks for its shard's.
    rows: HashMap<u32, ShardRow, foldhash::fast::RandomState>,
    known: Known,
}

/// Numbers of some conversations, by shard and name.
type Known = HashMap<(u32, Arc<str>), i64, foldhash::fast::RandomState>;

impl Tables {
    pub(super) fn new(connection: Connection, unflushed: Arc<Unflushed>) -> Self {
        Self { connection, unflushed, rows: HashMap::default(), known: Known::default() }
    }

    /// Opens a transaction if none is open.
    pub(super) fn begin(&self) -> rusqlite::Result<()> {
        if self.connection.is_autocommit() {
            self.connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        }
        Ok(())
    }

    /// Undoes what is open. Some errors have done so already.
    pub(super) fn rollback(&mut self) -> rusqlite::Result<()> {
        self.rows.clear();
        self.known.clear();
        if self.connection.is_autocommit() { Ok(()) } else { self.connection.execute_batch("ROLLBACK") }
    }

    /// Commits what is open, as the state behind this record of the journal.
    pub(super) fn commit_as(&self, record: u64) -> rusqlite::Result<()> {
        self.begin()?;
        self.connection.prepare_cached("INSERT OR REPLACE INTO meta VALUES ('applied', ?1)")?.execute([int(record)])?;
        self.connection.prepare_cached("COMMIT")?.execute([])?;
        Ok(())
    }

    /// The record of the journal up to which the file has everything.
    pub(super) fn applied(&self) -> rusqlite::Result<u64> {
        let applied =
            self.connection.query_row("SELECT v FROM meta WHERE k = 'applied'", [], |row| row.get::<_, i64>(0));
        Ok(applied.optional()?.unwrap_or(0).max(0) as u64)
    }

    fn row(&mut self, shard: u32) -> rusqlite::Result<ShardRow> {
        if let Some(row) = self.rows.get(&shard) {
            return Ok(row.clone());
        }
        let row = shard_row(&self.connection, shard)?;
        self.rows.insert(shard, row.clone());
        Ok(row)
    }

    pub(super) fn acquire(&mut self, me: &MemberId, claim: &Claim) -> rusqlite::Result<Acquired> {
        let row = self.row(claim.shard)?;
        if !claim.matches(&row) {
            return Ok(Acquired::Lost(row));
        }
        let (shard, epoch) = (claim.shard, row.epoch + 1);
        self.unflushed.mark_row(shard);
        self.connection
            .prepare_cached(
                "INSERT INTO shard (shard, epoch, owner) VALUES (?1, ?2, ?3)
                 ON CONFLICT (shard) DO UPDATE SET epoch = excluded.epoch, owner = excluded.owner",
            )?
            .execute(params![shard, int(epoch), me.as_str()])?;
        self.rows.insert(shard, ShardRow { shard, epoch, owner: Some(me.clone()) });
        tail(&self.connection, shard, epoch).map(Acquired::Won)
    }

    pub(super) fn release(&mut self, me: &MemberId, shard: u32, epoch: u64) -> rusqlite::Result<Released> {
        let row = self.row(shard)?;
        if !row.is_held(me, epoch) {
            return Ok(Released::Lost(row));
        }
        self.disown(shard)?;
        Ok(Released::Done)
    }

    fn disown(&mut self, shard: u32) -> rusqlite::Result<()> {
        self.unflushed.mark_row(shard);
        self.connection.prepare_cached("UPDATE shard SET owner = NULL WHERE shard = ?1")?.execute([shard])?;
        if let Some(row) = self.rows.get_mut(&shard) {
            row.owner = None;
        }
        Ok(())
    }

    pub(super) fn commit(&mut self, me: &MemberId, batch: &ShardBatch) -> rusqlite::Result<Outcome> {
        let row = self.row(batch.shard)?;
        if !row.is_held(me, batch.epoch) {
            return Ok(Outcome::Fenced(row));
        }
        self.unflushed.mark(batch.shard, &batch.appends, &batch.puts);
        let c = &self.connection;
        let mut insert = c.prepare_cached(
            "INSERT INTO log (id, conversation, seq, key, sender, device, kind, client_id, ts_ms, payload)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        )?;
        for (index, e) in batch.appends.iter().enumerate() {
            let inserted = insert.execute(params![
                id(batch.shard, e.pos),
                number_of(c, &mut self.known, batch.shard, &e.conversation)?,
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
        drop(insert);
        if batch.release {
            self.disown(batch.shard)?;
        }
        Ok(Outcome::Committed)
    }
}

/// The number of a conversation, which has one from now on.
fn number_of(c: &Connection, known: &mut Known, shard: u32, name: &Arc<str>) -> rusqlite::Result<i64> {
    let key = (shard, name.clone());
    if let Some(number) = known.get(&key) {
        return Ok(*number);
    }
    let mut select = c.prepare_cached("SELECT id FROM conversation WHERE shard = ?1 AND name = ?2")?;
    let number = match select.query_row(params![shard, name], |row| row.get(0)).optional()? {
        Some(number) => number,
        None => {
            c.prepare_cached("INSERT INTO conversation (shard, name) VALUES (?1, ?2)")?
                .execute(params![shard, name])?;
            c.last_insert_rowid()
        }
    };
    if known.len() >= KNOWN_MAX {
        known.clear();
    }
    known.insert(key, number);
    Ok(number)
}

/// Why a batch conflicts with what is stored (it was taken back already).
fn refusal(c: &Connection, batch: &ShardBatch) -> rusqlite::Result<Outcome> {
    let mut by_key = c.prepare_cached(&format!("SELECT {ENTRY} FROM log WHERE {OF_CONVERSATION} AND key = ?3"))?;
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
        c.prepare_cached(&format!("SELECT 1 FROM log WHERE id = ?3 OR ({OF_CONVERSATION} AND seq = ?4)"))?;
    for e in &batch.appends {
        if by_place.exists(params![batch.shard, e.conversation, id(batch.shard, e.pos), int(e.seq)])? {
            return Ok(Outcome::Corrupt(place_taken(batch.shard, e)));
        }
    }
    Ok(Outcome::Corrupt(format!("shard {}: the log refuses the batch", batch.shard)))
}

pub(super) fn shard_row(c: &Connection, shard: u32) -> rusqlite::Result<ShardRow> {
    let mut select = c.prepare_cached("SELECT shard, epoch, owner FROM shard WHERE shard = ?1")?;
    Ok(select.query_row([shard], row_of_shard).optional()?.unwrap_or_else(|| ShardRow::unowned(shard)))
}

pub(super) fn row_of_shard(row: &Row<'_>) -> rusqlite::Result<ShardRow> {
    let owner = row.get_ref(2)?.as_str_or_null()?.map(MemberId::parse).transpose();
    let owner =
        owner.map_err(|e| rusqlite::Error::FromSqlConversionFailure(2, rusqlite::types::Type::Text, e.into()))?;
    Ok(ShardRow { shard: row.get(0)?, epoch: row.get::<_, i64>(1)? as u64, owner })
}

pub(super) fn tail(c: &Connection, shard: u32, epoch: u64) -> rusqlite::Result<Tail> {
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

pub(super) fn entry(row: &Row<'_>) -> rusqlite::Result<LogEntry> {
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
