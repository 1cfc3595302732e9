//! A copy of the shard map in a file, for members that start while nobody leads the cluster.
//!
//! It is a hint. It has no version, so the first map of a leader replaces it; and whoever owns a shard says so on its links, so that an
//! owner that has changed since does no harm.

use std::io::ErrorKind;
use std::path::Path;

use prost::Message;

use crate::control::Map;

/// What the file holds: the same as long as the map says the same.
pub fn encode(map: Map) -> Vec<u8> {
    Map { number: 0, ..map }.encode_to_vec()
}

/// The map in that file, if there is one. A file that can't be read counts as none: a leader's map will come.
pub fn read(path: &Path) -> Option<Map> {
    let unusable =
        |error: &dyn std::fmt::Display| tracing::warn!(path = %path.display(), %error, "no hint of a shard map");
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        Err(error) => {
            unusable(&error);
            return None;
        }
    };
    let map = Map::decode(bytes.as_slice()).map_err(|error| unusable(&error)).ok()?;
    tracing::info!(path = %path.display(), shards = map.shards, members = map.members.len(), "began with a copy of the shard map");
    Some(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Member;

    #[test]
    fn a_hint_has_no_version_and_a_damaged_one_counts_as_none() {
        let path = std::env::temp_dir().join(format!("im-map-hint-{}", std::process::id()));
        assert_eq!(read(&path), None);
        let member = Member { member: "business-0/a".to_owned(), role: 2, link_address: "127.0.0.1:7000".to_owned() };
        let map = Map { number: 7, shards: 2, members: vec![member], owners: vec![1, 0], epochs: vec![3, 0] };
        std::fs::write(&path, encode(map.clone())).expect("a writable temporary folder");
        assert_eq!(read(&path), Some(Map { number: 0, ..map }));
        std::fs::write(&path, [0xff; 9]).expect("a writable temporary folder");
        assert_eq!(read(&path), None);
        std::fs::remove_file(&path).expect("its owner");
    }
}
