//! What the open transaction changed: readers can't see that yet, so reads of it go to the writer.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::Mutex;

use super::super::{LogEntry, Put};

/// What a read looks at.
#[derive(Debug, Clone, Copy)]
pub(super) enum Concern<'a> {
    /// The owners of some shards.
    Rows(&'a [u32]),
    /// The owners of all shards.
    AllRows,
    /// The logs of some conversations, by shard and name.
    Conversations(&'a [(u32, Arc<str>)]),
    /// A shard's log, and its watermark.
    Log(u32),
    /// The items whose keys start so.
    Items(u32, &'a str),
    /// Some items.
    Keys(u32, &'a [String]),
}

/// See the module. Whoever marks does so before the write is answered, whoever clears does so after the commit.
#[derive(Debug, Default)]
pub(super) struct Unflushed(Mutex<Marks>);

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;
type Set<T> = HashSet<T, foldhash::fast::RandomState>;

#[derive(Debug, Default)]
struct Marks {
    rows: Set<u32>,
    conversations: Map<u32, Set<Arc<str>>>,
    items: Map<u32, BTreeSet<String>>,
}

impl Unflushed {
    /// Whether a read looks at something that changed.
    pub(super) fn concern(&self, concern: Concern<'_>) -> bool {
        let marks = self.0.lock();
        match concern {
            Concern::Rows(shards) => shards.iter().any(|shard| marks.rows.contains(shard)),
            Concern::AllRows => !marks.rows.is_empty(),
            Concern::Conversations(places) => {
                places.iter().any(|(shard, id)| marks.conversations.get(shard).is_some_and(|ids| ids.contains(id)))
            }
            Concern::Log(shard) => marks.conversations.contains_key(&shard) || marks.rows.contains(&shard),
            Concern::Items(shard, prefix) => marks.items.get(&shard).is_some_and(|keys| {
                keys.range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
                    .next()
                    .is_some_and(|key| key.starts_with(prefix))
            }),
            Concern::Keys(shard, keys) => {
                marks.items.get(&shard).is_some_and(|changed| keys.iter().any(|key| changed.contains(key)))
            }
        }
    }

    /// A shard's owner or watermark changes.
    pub(super) fn mark_row(&self, shard: u32) {
        self.0.lock().rows.insert(shard);
    }

    /// A shard's log and table change.
    pub(super) fn mark(&self, shard: u32, appends: &[LogEntry], puts: &[Put]) {
        let mut marks = self.0.lock();
        if !appends.is_empty() {
            let conversations = marks.conversations.entry(shard).or_default();
            for entry in appends {
                if !conversations.contains(&entry.conversation) {
                    conversations.insert(entry.conversation.clone());
                }
            }
        }
        if !puts.is_empty() {
            let items = marks.items.entry(shard).or_default();
            for put in puts {
                if !items.contains(&put.key) {
                    items.insert(put.key.clone());
                }
            }
        }
    }

    /// Readers see everything again.
    pub(super) fn clear(&self) {
        let mut marks = self.0.lock();
        marks.rows.clear();
        marks.conversations.clear();
        marks.items.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_a_concern() {
        let unflushed = Unflushed::default();
        unflushed.mark(1, &[], &[Put { key: "i/ann/u/ann/bob".to_owned(), value: None }]);
        unflushed.mark_row(2);
        let concern = |concern| unflushed.concern(concern);
        for prefix in ["", "i/", "i/ann/", "i/ann/u/ann/bob"] {
            assert!(concern(Concern::Items(1, prefix)), "{prefix}");
        }
        for prefix in ["i/an/", "i/ann/u/ann/bob/", "j/", "h/"] {
            assert!(!concern(Concern::Items(1, prefix)), "{prefix}");
        }
        assert!(!concern(Concern::Items(2, "")) && !concern(Concern::Log(1)) && concern(Concern::Log(2)));
        assert!(concern(Concern::Rows(&[1, 2])) && !concern(Concern::Rows(&[1])) && concern(Concern::AllRows));
        let (changed, others) = (["x".to_owned(), "i/ann/u/ann/bob".to_owned()], ["i/ann".to_owned()]);
        assert!(concern(Concern::Keys(1, &changed)) && !concern(Concern::Keys(1, &others)));
        unflushed.clear();
        assert!(!concern(Concern::AllRows) && !concern(Concern::Items(1, "")));
    }
}
