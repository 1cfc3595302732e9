//! The store as maps in memory. [`Memory`] is synchronous and deterministic, for simulations in virtual time; [`MemoryStore`] makes a
//! [`Store`] of it. What it does is what the other engines are held to.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use im_proto::ids::MemberId;
use parking_lot::Mutex;

use super::{
    ANSWER_BYTES_MAX, ANSWER_ROWS_MAX, Acquired, Answer, Claim, Duplicate, LogEntry, LogRange, Outcome, Released,
    ScrubAt, Scrubbed, ShardBatch, ShardRow, Store, StoreError, Tail, claimable, contradiction, malformed, place_taken,
    scrub_limit, scrubbed,
};

/// All shards.
#[derive(Debug, Default, Clone)]
pub struct Memory {
    shards: BTreeMap<u32, Shard>,
}

#[derive(Debug, Default, Clone)]
struct Shard {
    epoch: u64,
    owner: Option<MemberId>,
    watermark: u64,
    log: BTreeMap<u64, LogEntry>,
    pos_by_seq: BTreeMap<(Arc<str>, u64), u64>,
    pos_by_key: BTreeMap<(Arc<str>, Bytes), u64>,
    items: BTreeMap<String, Bytes>,
}

impl Shard {
    fn row(&self, shard: u32) -> ShardRow {
        ShardRow { shard, epoch: self.epoch, owner: self.owner.clone() }
    }

    fn head_pos(&self) -> u64 {
        self.log.last_key_value().map_or(0, |(pos, _)| *pos)
    }

    fn tail(&self, shard: u32) -> Tail {
        let (head_pos, watermark) = (self.head_pos(), self.watermark);
        let above = self.log.range(watermark.saturating_add(1)..).count() as u64;
        Tail { shard, epoch: self.epoch, head_pos, watermark, hole: watermark.saturating_add(above) != head_pos }
    }

    fn commit(&mut self, batch: ShardBatch) -> Outcome {
        let duplicates: Vec<Duplicate> = (batch.appends.iter().enumerate())
            .filter_map(|(index, wanted)| {
                let pos = self.pos_by_key.get(&(wanted.conversation.clone(), wanted.key.clone()))?;
                Some(Duplicate { index, stored: self.log.get(pos)?.clone() })
            })
            .collect();
        if !duplicates.is_empty() {
            return Outcome::Duplicates(duplicates);
        }
        if let Some(why) = contradiction(&batch) {
            return Outcome::Corrupt(why);
        }
        let taken = |e: &&LogEntry| {
            self.log.contains_key(&e.pos) || self.pos_by_seq.contains_key(&(e.conversation.clone(), e.seq))
        };
        if let Some(entry) = batch.appends.iter().find(taken) {
            return Outcome::Corrupt(place_taken(batch.shard, entry));
        }
        for entry in batch.appends {
            self.pos_by_seq.insert((entry.conversation.clone(), entry.seq), entry.pos);
            self.pos_by_key.insert((entry.conversation.clone(), entry.key.clone()), entry.pos);
            self.log.insert(entry.pos, entry);
        }
        for put in batch.puts {
            match put.value {
                Some(value) => self.items.insert(put.key, value),
                None => self.items.remove(&put.key),
            };
        }
        self.watermark = self.watermark.max(batch.watermark.unwrap_or(0));
        if batch.release {
            self.owner = None;
        }
        Outcome::Committed
    }
}

/// Takes entries until their payloads together would exceed `bytes_max`; the first in any case.
fn within<'a>(entries: impl Iterator<Item = &'a LogEntry>, limit: u32, bytes_max: usize) -> Vec<LogEntry> {
    let mut bytes = 0;
    entries
        .take(limit.min(ANSWER_ROWS_MAX) as usize)
        .enumerate()
        .take_while(|(i, e)| {
            bytes += e.payload.len();
            *i == 0 || bytes <= bytes_max
        })
        .map(|(_, e)| e.clone())
        .collect()
}

impl Memory {
    fn row(&self, shard: u32) -> ShardRow {
        self.shards.get(&shard).map_or_else(|| ShardRow::unowned(shard), |s| s.row(shard))
    }

    /// See [`Store::acquire`].
    pub fn acquire(&mut self, me: &MemberId, claims: Vec<Claim>) -> Vec<Acquired> {
        let mut acquire = |claim: Claim| {
            let row = self.row(claim.shard);
            if !claim.matches(&row) {
                return Acquired::Lost(row);
            }
            let shard = self.shards.entry(claim.shard).or_default();
            shard.epoch += 1;
            shard.owner = Some(me.clone());
            Acquired::Won(shard.tail(claim.shard))
        };
        claims.into_iter().map(&mut acquire).collect()
    }

    /// See [`Store::release`].
    pub fn release(&mut self, me: &MemberId, shards: Vec<(u32, u64)>) -> Vec<Released> {
        let mut release = |(number, epoch): (u32, u64)| match self.shards.get_mut(&number) {
            Some(shard) if shard.row(number).is_held(me, epoch) => {
                shard.owner = None;
                Released::Done
            }
            _ => Released::Lost(self.row(number)),
        };
        shards.into_iter().map(&mut release).collect()
    }

    /// See [`Store::check`].
    pub fn check(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Vec<ShardRow> {
        shards
            .into_iter()
            .filter_map(|(shard, epoch)| Some(self.row(shard)).filter(|row| !row.is_held(me, epoch)))
            .collect()
    }

    /// See [`Store::commit`].
    pub fn commit(&mut self, me: &MemberId, batches: Vec<ShardBatch>) -> Vec<Outcome> {
        let malformed = malformed(&batches);
        let mut commit = |(batch, malformed): (ShardBatch, Option<String>)| {
            if let Some(why) = malformed {
                return Outcome::Corrupt(why);
            }
            match self.shards.get_mut(&batch.shard) {
                Some(shard) if shard.row(batch.shard).is_held(me, batch.epoch) => shard.commit(batch),
                _ => Outcome::Fenced(self.row(batch.shard)),
            }
        };
        batches.into_iter().zip(malformed).map(&mut commit).collect()
    }

    /// See [`Store::find`].
    pub fn find(&self, shard: u32, conversation: Arc<str>, key: Bytes) -> Option<LogEntry> {
        let shard = self.shards.get(&shard)?;
        shard.log.get(shard.pos_by_key.get(&(conversation, key))?).cloned()
    }

    /// See [`Store::range`].
    pub fn range(&self, range: &LogRange) -> Vec<LogEntry> {
        let Some(shard) = self.shards.get(&range.shard) else { return Vec::new() };
        let place = |seq| (range.conversation.clone(), seq);
        let bytes_max = range.bytes_max();
        if range.backward {
            let from = if range.from == 0 { u64::MAX } else { range.from };
            let places = shard.pos_by_seq.range(place(0)..=place(from)).rev();
            within(places.filter_map(|(_, pos)| shard.log.get(pos)), range.limit, bytes_max)
        } else {
            let places = shard.pos_by_seq.range(place(range.from)..=place(u64::MAX));
            within(places.filter_map(|(_, pos)| shard.log.get(pos)), range.limit, bytes_max)
        }
    }

    /// See [`Store::since`].
    pub fn since(&self, shard: u32, after_pos: u64, limit: u32) -> Vec<LogEntry> {
        let Some(shard) = self.shards.get(&shard) else { return Vec::new() };
        within(shard.log.range(after_pos.saturating_add(1)..).map(|(_, e)| e), limit, ANSWER_BYTES_MAX)
    }

    /// See [`Store::items`].
    pub fn items(&self, shard: u32, prefix: &str, after: Option<&str>, limit: u32) -> Vec<(String, Bytes)> {
        let Some(shard) = self.shards.get(&shard) else { return Vec::new() };
        let mut bytes = 0;
        (shard.items.range(prefix.to_owned()..))
            .take_while(|(k, _)| k.starts_with(prefix))
            .filter(|(k, _)| after.is_none_or(|after| k.as_str() > after))
            .take(limit.min(ANSWER_ROWS_MAX) as usize)
            .enumerate()
            .take_while(|(i, (_, v))| {
                bytes += v.len();
                *i == 0 || bytes <= ANSWER_BYTES_MAX
            })
            .map(|(_, (k, v))| (k.clone(), v.clone()))
            .collect()
    }

    /// See [`Store::get`].
    pub fn get(&self, shard: u32, keys: &[String]) -> Vec<Option<Bytes>> {
        let shard = self.shards.get(&shard);
        keys.iter().map(|key| shard?.items.get(key).cloned()).collect()
    }

    /// See [`Store::shards`].
    pub fn shards(&self) -> Vec<ShardRow> {
        self.shards.iter().map(|(number, shard)| shard.row(*number)).collect()
    }

    /// See [`Store::scrub`].
    pub fn scrub(&self, number: u32, after: ScrubAt, limit: u32) -> Scrubbed {
        let Some(shard) = self.shards.get(&number) else { return Scrubbed::default() };
        let rows = scrub_limit(limit) as usize;
        let positions: Vec<u64> =
            shard.log.range(after.pos.saturating_add(1)..).map(|(pos, _)| *pos).take(rows).collect();
        let behind = (Bound::Excluded((after.conversation.clone(), after.seq)), Bound::Unbounded);
        let seqs = shard.pos_by_seq.range(behind).map(|(place, _)| place.clone()).take(rows).collect();
        scrubbed(number, after, limit, shard.watermark, &positions, seqs)
    }
}

/// [`Memory`] behind a lock.
#[derive(Debug, Default)]
pub struct MemoryStore(Mutex<Memory>);

fn now<'a, T: Send + 'a>(value: T) -> Answer<'a, T> {
    Box::pin(std::future::ready(Ok(value)))
}

impl Store for MemoryStore {
    fn acquire(&self, me: &MemberId, claims: Vec<Claim>) -> Answer<'_, Vec<Acquired>> {
        let answer: Result<_, StoreError> = claimable(&claims).map(|()| self.0.lock().acquire(me, claims));
        Box::pin(std::future::ready(answer))
    }
    fn release(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<Released>> {
        now(self.0.lock().release(me, shards))
    }
    fn check(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<ShardRow>> {
        now(self.0.lock().check(me, shards))
    }
    fn commit(&self, me: &MemberId, batches: Vec<ShardBatch>) -> Answer<'_, Vec<Outcome>> {
        now(self.0.lock().commit(me, batches))
    }
    fn find(&self, shard: u32, conversation: Arc<str>, key: Bytes) -> Answer<'_, Option<LogEntry>> {
        now(self.0.lock().find(shard, conversation, key))
    }
    fn range(&self, range: LogRange) -> Answer<'_, Vec<LogEntry>> {
        now(self.0.lock().range(&range))
    }
    fn since(&self, shard: u32, after_pos: u64, limit: u32) -> Answer<'_, Vec<LogEntry>> {
        now(self.0.lock().since(shard, after_pos, limit))
    }
    fn items(&self, shard: u32, prefix: String, after: Option<String>, limit: u32) -> Answer<'_, Vec<(String, Bytes)>> {
        now(self.0.lock().items(shard, &prefix, after.as_deref(), limit))
    }
    fn get(&self, shard: u32, keys: Vec<String>) -> Answer<'_, Vec<Option<Bytes>>> {
        now(self.0.lock().get(shard, &keys))
    }
    fn shards(&self) -> Answer<'_, Vec<ShardRow>> {
        now(self.0.lock().shards())
    }
    fn scrub(&self, shard: u32, after: ScrubAt, limit: u32) -> Answer<'_, Scrubbed> {
        now(self.0.lock().scrub(shard, after, limit))
    }
}
