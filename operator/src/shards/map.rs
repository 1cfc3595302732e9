//! What is known of the store's fencing rows.

use im_crds::{MapShard, ShardMapSpec};
use im_proto::ids::{IdError, MemberId};

/// Number of a shard, from 0.
pub type Shard = u32;

/// Version of a map. Members ignore a lower one than they have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Term of the leader that made it.
    pub term: u64,
    /// Number within the term.
    pub number: u64,
}

/// A fencing row as it was last heard of: the epoch counts acquisitions, the owner acquired it or has released it since.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ownership {
    /// Epoch of the last acquisition; 0 = never acquired.
    pub epoch: u64,
    /// Who holds it; `None` = released, or never acquired.
    pub owner: Option<MemberId>,
}

impl Ownership {
    /// Whether this is a later state of the same row than `other`: within one epoch a row goes only from its owner to
    /// nobody.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        self.epoch > other.epoch || (self.epoch == other.epoch && self.owner.is_none() && other.owner.is_some())
    }
}

/// The last known fencing row of every shard. Rows only ever become newer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardMap {
    version: Version,
    rows: Vec<Ownership>,
}

/// Why a stored map can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// It is not in the documented form.
    #[error(transparent)]
    Encoding(#[from] im_crds::MapError),
    /// It names an owner that is not a member id.
    #[error("spec.members: {0}; delete the ShardMap, the operator rebuilds it")]
    Member(#[from] IdError),
}

impl ShardMap {
    /// The map of a cluster in which nothing was ever acquired.
    pub fn new(shards: u32) -> Self {
        Self { version: Version::default(), rows: vec![Ownership::default(); shards as usize] }
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Number of shards.
    pub fn shards(&self) -> u32 {
        self.rows.len() as u32
    }

    /// The row of a shard; `None` if there is no such shard.
    pub fn get(&self, shard: Shard) -> Option<&Ownership> {
        self.rows.get(shard as usize)
    }

    /// All rows; the i-th is that of shard i.
    pub fn rows(&self) -> &[Ownership] {
        &self.rows
    }

    /// Takes a row over if it is newer; says whether it was.
    pub fn merge(&mut self, shard: Shard, heard: &Ownership) -> bool {
        match self.rows.get_mut(shard as usize) {
            Some(row) if heard.is_newer_than(row) => {
                *row = heard.clone();
                true
            }
            _ => false,
        }
    }

    /// Marks a change within the same term.
    pub fn next_number(&mut self) {
        self.version.number += 1;
    }

    /// Begins a new term; a lower or equal one is ignored.
    pub fn begin_term(&mut self, term: u64) {
        if term > self.version.term {
            self.version = Version { term, number: 0 };
        }
    }

    /// The form in which it is stored.
    pub fn to_spec(&self) -> ShardMapSpec {
        let shards: Vec<MapShard<'_>> = self
            .rows
            .iter()
            .map(|row| MapShard { epoch: row.epoch, owner: row.owner.as_ref().map(MemberId::as_str) })
            .collect();
        ShardMapSpec::encode(self.version.term, self.version.number, &shards)
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// [`MapError`] when it is damaged.
    pub fn from_spec(spec: &ShardMapSpec) -> Result<Self, MapError> {
        let mut rows = Vec::with_capacity(spec.shards as usize);
        for shard in spec.decode()? {
            rows.push(Ownership { epoch: shard.epoch, owner: shard.owner.map(MemberId::parse).transpose()? });
        }
        Ok(Self { version: Version { term: spec.term, number: spec.number }, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(epoch: u64, owner: Option<&MemberId>) -> Ownership {
        Ownership { epoch, owner: owner.cloned() }
    }

    #[test]
    fn the_highest_epoch_wins_and_a_release_is_the_last_word_of_its_epoch() {
        let a = MemberId::new("a", 1).expect("a good name");
        let b = MemberId::new("b", 2).expect("a good name");
        let mut map = ShardMap::new(1);
        assert!(map.merge(0, &row(3, Some(&a))));
        assert!(!map.merge(0, &row(3, Some(&b))), "one epoch has one owner");
        assert!(!map.merge(0, &row(2, None)));
        assert!(map.merge(0, &row(3, None)));
        assert!(!map.merge(0, &row(3, Some(&a))), "a late heartbeat of the released epoch");
        assert!(map.merge(0, &row(4, Some(&b))));
        assert!(!map.merge(1, &row(9, Some(&b))), "no such shard");
        assert_eq!(map.get(0), Some(&row(4, Some(&b))));
    }

    #[test]
    fn a_map_survives_storage() -> Result<(), MapError> {
        let a = MemberId::new("business-0", 0xabc).expect("a good name");
        let mut map = ShardMap::new(5);
        map.begin_term(7);
        map.next_number();
        map.merge(1, &row(3, Some(&a)));
        map.merge(2, &row(3, Some(&a)));
        map.merge(4, &row(9, None));
        assert_eq!(ShardMap::from_spec(&map.to_spec())?, map);
        let mut damaged = map.to_spec();
        damaged.members = vec!["nobody".into()];
        assert!(matches!(ShardMap::from_spec(&damaged), Err(MapError::Member(_))));
        Ok(())
    }
}
