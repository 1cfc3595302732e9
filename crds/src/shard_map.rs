//! `ShardMap`: who owns which shard. One per ImCluster, written by the operator alone.

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// Who owns which shard, in a form that 16,384 shards fit into an API object with.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "imcluster.dev",
    version = "v1alpha1",
    kind = "ShardMap",
    plural = "shardmaps",
    shortname = "smap",
    namespaced,
    derive = "PartialEq",
    doc = "Who owns which shard of an ImCluster. Written by the operator; editing it by hand has no effect on fencing.",
    printcolumn(name = "Shards", type_ = "integer", json_path = ".spec.shards"),
    printcolumn(
        name = "Owners",
        type_ = "string",
        json_path = ".spec.owners",
        description = "How many shards each member owns"
    ),
    printcolumn(
        name = "Term",
        type_ = "integer",
        json_path = ".spec.term",
        description = "Rises with each leader of the operator"
    ),
    printcolumn(name = "Number", type_ = "integer", json_path = ".spec.number", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ShardMapSpec {
    /// Term of the leader that wrote it.
    pub term: u64,
    /// Number of the map within the term.
    pub number: u64,
    /// How many shards there are.
    pub shards: u32,
    /// For people: how many shards each member owns.
    #[serde(default)]
    pub owners: String,
    /// The owners that `assignments` points into.
    pub members: Vec<String>,
    /// For shard 0, 1, 2 …, separated by blanks: `OWNER.EPOCH`, OWNER an index into `members` or `-` for none; a run of
    /// N equal ones is written `OWNER.EPOCHxN`.
    pub assignments: String,
    /// Where the business members listened when this was written, `HOST:PORT` by member.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub links: BTreeMap<String, String>,
}

/// Members that [`ShardMapSpec::owners`] names.
const OWNERS_NAMED_MAX: usize = 8;

/// How many shards each member owns, in words: most first, `MEMBER=COUNT`, and how many more members there are.
fn owners(shards: &[MapShard<'_>]) -> String {
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    for shard in shards {
        // A member's name, without the boot that tells its processes apart.
        let name = shard.owner.map_or("none", |owner| owner.split_once('/').map_or(owner, |(name, _)| name));
        *counts.entry(name).or_default() += 1;
    }
    let mut counts: Vec<(&str, u32)> = counts.into_iter().collect();
    counts.sort_by_key(|(name, count)| (std::cmp::Reverse(*count), *name));
    let more = counts.len().saturating_sub(OWNERS_NAMED_MAX);
    let named = counts.iter().take(OWNERS_NAMED_MAX).map(|(name, count)| format!("{name}={count}"));
    let mut words: Vec<String> = named.collect();
    if more > 0 {
        words.push(format!("and {more} more"));
    }
    words.join(" ")
}

/// One shard of a map: the epoch under which it was last acquired, and who holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapShard<'a> {
    /// Epoch of the last acquisition that is known.
    pub epoch: u64,
    /// Who holds it.
    pub owner: Option<&'a str>,
}

/// Why a stored map can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// A word of `assignments` is not in the documented form.
    #[error(
        "spec.assignments: `{0}` is not OWNER.EPOCH or OWNER.EPOCHxN; delete the ShardMap, the operator rebuilds it"
    )]
    Word(String),
    /// The number of shards differs from what `assignments` lists.
    #[error(
        "spec.assignments lists {listed} shards, spec.shards says {shards}; delete the ShardMap, the operator rebuilds it"
    )]
    Count {
        /// What `assignments` lists.
        listed: u64,
        /// What `shards` says.
        shards: u32,
    },
}

impl ShardMapSpec {
    /// Packs a map; `shards[i]` is shard i.
    pub fn encode(term: u64, number: u64, shards: &[MapShard<'_>]) -> Self {
        let mut members: Vec<String> = Vec::new();
        let mut index: HashMap<&str, usize> = HashMap::new();
        let mut assignments = String::new();
        for run in shards.chunk_by(|a, b| a == b) {
            let Some(first) = run.first() else { continue };
            if !assignments.is_empty() {
                assignments.push(' ');
            }
            match first.owner {
                None => assignments.push('-'),
                Some(owner) => {
                    let position = *index.entry(owner).or_insert_with(|| {
                        members.push(owner.to_owned());
                        members.len() - 1
                    });
                    // Writing to a String can't fail.
                    let _ = write!(assignments, "{position}");
                }
            }
            let _ = write!(assignments, ".{}", first.epoch);
            if run.len() > 1 {
                let _ = write!(assignments, "x{}", run.len());
            }
        }
        Self {
            term,
            number,
            shards: shards.len() as u32,
            owners: owners(shards),
            members,
            assignments,
            links: BTreeMap::new(),
        }
    }

    /// Unpacks the map; element i of the result is shard i.
    ///
    /// # Errors
    /// [`MapError`] when the text is not what [`ShardMapSpec::encode`] writes.
    pub fn decode(&self) -> Result<Vec<MapShard<'_>>, MapError> {
        let mut shards = Vec::new();
        for word in self.assignments.split_ascii_whitespace() {
            let refuse = || MapError::Word(word.to_owned());
            let (owner, rest) = word.split_once('.').ok_or_else(refuse)?;
            let (epoch, run) = rest.split_once('x').unwrap_or((rest, "1"));
            let epoch = epoch.parse().map_err(|_| refuse())?;
            let run: u32 = run.parse().map_err(|_| refuse())?;
            let owner = match owner {
                "-" => None,
                position => {
                    let position: usize = position.parse().map_err(|_| refuse())?;
                    Some(self.members.get(position).ok_or_else(refuse)?.as_str())
                }
            };
            let listed = shards.len() as u64 + u64::from(run);
            if listed > u64::from(self.shards) {
                return Err(MapError::Count { listed, shards: self.shards });
            }
            shards.extend(std::iter::repeat_n(MapShard { epoch, owner }, run as usize));
        }
        if shards.len() != self.shards as usize {
            return Err(MapError::Count { listed: shards.len() as u64, shards: self.shards });
        }
        Ok(shards)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_survives_the_way_there_and_back() {
        let shards = [
            MapShard { epoch: 3, owner: Some("business-0/aa") },
            MapShard { epoch: 3, owner: Some("business-0/aa") },
            MapShard { epoch: 0, owner: None },
            MapShard { epoch: 7, owner: Some("business-1/bb") },
            MapShard { epoch: 3, owner: Some("business-0/aa") },
        ];
        let spec = ShardMapSpec::encode(2, 9, &shards);
        assert_eq!(spec.assignments, "0.3x2 -.0 1.7 0.3");
        assert_eq!(spec.owners, "business-0=3 business-1=1 none=1");
        assert_eq!(spec.decode().expect("own encoding"), shards);
    }

    #[test]
    fn the_largest_map_stays_far_below_the_limit_of_an_api_object() {
        let names: Vec<String> = (0..1000).map(|i| format!("business-{i}/0123456789abcdef")).collect();
        let shards: Vec<MapShard<'_>> = (0..16_384)
            .map(|i| MapShard { epoch: 1_000 + i as u64, owner: Some(names[i * 7 % 1000].as_str()) })
            .collect();
        let spec = ShardMapSpec::encode(1, 1, &shards);
        let bytes = serde_json::to_vec(&spec).expect("serializes").len();
        assert!(bytes < 400_000, "{bytes} bytes");
        assert_eq!(spec.decode().expect("own encoding"), shards);
    }

    #[test]
    fn a_damaged_map_is_refused() {
        let spec = |shards, assignments: &str| ShardMapSpec {
            term: 1,
            number: 1,
            shards,
            owners: String::new(),
            members: vec!["a/1".into()],
            assignments: assignments.into(),
            links: BTreeMap::new(),
        };
        for (shards, text) in
            [(1, "1.1"), (1, "x"), (1, "0.x"), (2, "0.1"), (1, "0.1x2"), (1, "0.1x4294967295"), (1, "")]
        {
            assert!(spec(shards, text).decode().is_err(), "{text} was taken");
        }
    }
}
