//! A commit as the journal keeps it, encoded from what is at hand. Making a `pb::JournalRecord` first would copy every text of every row,
//! and this is done for each message.
//!
//! The encoding is that of Protocol Buffers (the contract is `im/store/v1/store.proto`), but for the lengths of messages: they are written
//! when the message is, into five bytes that were left for them, which readers take like any other length.

use im_proto::ids::MemberId;
use prost::encoding::{WireType, encode_key, encode_varint};

use super::super::{LogEntry, Put, ShardBatch};

/// Appends a `JournalRecord` with one change, a commit. Records behind each other are one record with the changes of both.
pub(super) fn encode_commit(out: &mut Vec<u8>, me: &MemberId, batches: &[ShardBatch]) {
    message(out, 1, |change| {
        message(change, 3, |commit| {
            bytes(commit, 1, me.as_str().as_bytes());
            for batch in batches {
                message(commit, 2, |out| encode_batch(out, batch));
            }
        });
    });
}

fn encode_batch(out: &mut Vec<u8>, batch: &ShardBatch) {
    let ShardBatch { shard, epoch, appends, puts, watermark, release } = batch;
    number(out, 1, (*shard).into());
    number(out, 2, *epoch);
    for entry in appends {
        message(out, 3, |out| encode_entry(out, entry));
    }
    for Put { key, value } in puts {
        message(out, 4, |out| {
            bytes(out, 1, key.as_bytes());
            if let Some(value) = value {
                bytes(out, 2, value);
            }
        });
    }
    if let Some(watermark) = watermark {
        number(out, 5, *watermark);
    }
    number(out, 6, (*release).into());
}

fn encode_entry(out: &mut Vec<u8>, entry: &LogEntry) {
    let LogEntry { conversation, seq, pos, key, sender, device, kind, client_id, ts_ms, payload } = entry;
    bytes(out, 1, conversation.as_bytes());
    number(out, 2, *seq);
    number(out, 3, *pos);
    bytes(out, 4, key);
    bytes(out, 5, sender.as_bytes());
    bytes(out, 6, device.as_bytes());
    number(out, 7, (*kind).into());
    bytes(out, 8, client_id.as_bytes());
    number(out, 9, zigzag(*ts_ms));
    bytes(out, 10, payload);
}

fn number(out: &mut Vec<u8>, tag: u32, value: u64) {
    encode_key(tag, WireType::Varint, out);
    encode_varint(value, out);
}

/// How `sint64` writes a number.
fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn bytes(out: &mut Vec<u8>, tag: u32, value: &[u8]) {
    encode_key(tag, WireType::LengthDelimited, out);
    encode_varint(value.len() as u64, out);
    out.extend_from_slice(value);
}

fn message(out: &mut Vec<u8>, tag: u32, fill: impl FnOnce(&mut Vec<u8>)) {
    const LENGTH_BYTES: usize = 5;
    encode_key(tag, WireType::LengthDelimited, out);
    let begin = out.len() + LENGTH_BYTES;
    out.resize(begin, 0);
    fill(out);
    let length = out.len() - begin;
    for (index, byte) in out[begin - LENGTH_BYTES..begin].iter_mut().enumerate() {
        let goes_on = if index + 1 < LENGTH_BYTES { 0x80 } else { 0 };
        *byte = (length >> (7 * index)) as u8 & 0x7F | goes_on;
    }
}

#[cfg(test)]
mod tests {
    use im_proto::store as pb;
    use proptest::prelude::*;
    use prost::Message;

    use super::super::super::server::wire;
    use super::*;

    fn batches() -> impl Strategy<Value = Vec<ShardBatch>> {
        let text = || "[a-z/é]{0,9}";
        let blob = || proptest::collection::vec(any::<u8>(), 0..300);
        let entry = (text(), any::<[u64; 2]>(), blob(), text(), any::<u8>(), any::<i64>(), blob());
        let entry = entry.prop_map(|(name, [seq, pos], key, sender, kind, ts_ms, payload)| LogEntry {
            conversation: name.as_str().into(),
            seq,
            pos,
            key: key.into(),
            device: sender.as_str().into(),
            sender: sender.into(),
            kind,
            client_id: name.into(),
            ts_ms,
            payload: payload.into(),
        });
        let value = proptest::option::of(blob().prop_map(bytes::Bytes::from));
        let put = (text(), value).prop_map(|(key, value)| Put { key, value });
        let many = |strategy| proptest::collection::vec(strategy, 0..3);
        let batch = (any::<u32>(), any::<u64>(), many(entry.boxed()), proptest::collection::vec(put, 0..3));
        let batch = (batch, any::<Option<u64>>(), any::<bool>());
        let batch = batch.prop_map(|((shard, epoch, appends, puts), watermark, release)| ShardBatch {
            shard,
            epoch,
            appends,
            puts,
            watermark,
            release,
        });
        proptest::collection::vec(batch, 0..4)
    }

    proptest! {
        #[test]
        fn it_is_the_contracts_record(commits in proptest::collection::vec(batches(), 0..3)) {
            let me = MemberId::new("a", 1).expect("a good name");
            let mut record = Vec::new();
            let mut changes = Vec::new();
            for batches in commits {
                encode_commit(&mut record, &me, &batches);
                let batches = batches.into_iter().map(wire::batch_to).collect();
                let commit = pb::CommitRequest { me: me.to_string(), batches };
                let change = Some(pb::journal_record::change::Change::Commit(commit));
                changes.push(pb::journal_record::Change { change });
            }
            prop_assert_eq!(pb::JournalRecord::decode(&record[..]), Ok(pb::JournalRecord { changes }));
        }
    }
}
