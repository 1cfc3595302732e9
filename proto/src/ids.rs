//! Identifiers and the shard hash.

use std::fmt;
use std::sync::Arc;

/// Why an id is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Users, devices, groups and rooms are 1–64 of `[A-Za-z0-9._@-]`.
    #[error("{0:?} is not an id: use 1 to 64 of A-Z a-z 0-9 . _ @ -")]
    Name(String),
    /// A member is `name/boot`, boot 16 hex digits.
    #[error("{0:?} is not a member: expected name/boot with a boot id of 16 hex digits")]
    Member(String),
    /// A conversation is `u/{a}/{b}` with a ≤ b, or `g/{group}`.
    #[error("{0:?} is not a conversation: expected u/{{a}}/{{b}} with a <= b, or g/{{group}}")]
    Conversation(String),
}

/// The longest id of a user, device, group or room, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Whether `name` may name a user, a device, a group or a room.
pub fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'@' | b'-'))
}

/// A process of the cluster: its name, which a restart keeps, and its boot id, random per process start. It is what the store fences by.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberId(Arc<str>);

impl MemberId {
    /// `name` must be an id (see [`is_name`]).
    pub fn new(name: &str, boot: u64) -> Result<Self, IdError> {
        if !is_name(name) {
            return Err(IdError::Name(name.to_owned()));
        }
        Ok(Self(format!("{name}/{boot:016x}").into()))
    }

    /// The inverse of `Display`.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        match text.split_once('/') {
            Some((name, boot)) if is_name(name) && boot.len() == 16 && boot.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Ok(Self(text.into()))
            }
            _ => Err(IdError::Member(text.to_owned())),
        }
    }

    /// The name, which a restarted process has again.
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or(&*self.0, |(name, _)| name)
    }

    /// The boot id.
    pub fn boot(&self) -> u64 {
        self.0.split_once('/').and_then(|(_, boot)| u64::from_str_radix(boot, 16).ok()).unwrap_or(0)
    }

    /// `name/boot`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The shard of a key: a conversation id for conversation state, a user id for user state, `r/{room}` for a room.
pub fn shard_of(key: &str, shards: u32) -> u32 {
    (xxhash_rust::xxh3::xxh3_64(key.as_bytes()) % u64::from(shards.max(1))) as u32
}

/// The id of the conversation of two people: the same whoever of them asks.
pub fn direct_conversation(a: &str, b: &str) -> String {
    if a <= b { format!("u/{a}/{b}") } else { format!("u/{b}/{a}") }
}

/// The id of a group's conversation.
pub fn group_conversation(group: &str) -> String {
    format!("g/{group}")
}

/// The key whose shard owns a live room.
pub fn room_key(room: &str) -> String {
    format!("r/{room}")
}

/// A conversation id taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conversation<'a> {
    /// Two people (or one with himself), a ≤ b.
    Direct(&'a str, &'a str),
    /// A group.
    Group(&'a str),
}

impl<'a> Conversation<'a> {
    /// Takes a conversation id apart.
    pub fn parse(id: &'a str) -> Result<Self, IdError> {
        let bad = || IdError::Conversation(id.to_owned());
        match id.split_once('/') {
            Some(("u", pair)) => match pair.split_once('/') {
                Some((a, b)) if is_name(a) && is_name(b) && a <= b => Ok(Self::Direct(a, b)),
                _ => Err(bad()),
            },
            Some(("g", group)) if is_name(group) => Ok(Self::Group(group)),
            _ => Err(bad()),
        }
    }

    /// In a 1:1, the other one as seen by `user` (`user` himself in a conversation with himself); `None` in a group and for strangers.
    pub fn peer_of(&self, user: &str) -> Option<&'a str> {
        match *self {
            Self::Direct(a, b) if a == user => Some(b),
            Self::Direct(a, b) if b == user => Some(a),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Other implementations of the hash are held against these.
    #[test]
    fn shard_vectors() {
        let vectors = [("alice", 688), ("bob", 229), ("u/alice/bob", 243), ("g/team", 970), ("r/stage", 137)];
        for (key, shard) in vectors {
            assert_eq!(shard_of(key, 1024), shard, "{key}");
            assert_eq!(shard_of(key, 1), 0);
        }
    }

    #[test]
    fn members_parse_what_they_print() {
        let member = MemberId::new("business-1", 0x1f).expect("a good name");
        assert_eq!(member.to_string(), "business-1/000000000000001f");
        assert_eq!(MemberId::parse(member.as_str()), Ok(member.clone()));
        assert_eq!((member.name(), member.boot()), ("business-1", 0x1f));
        for bad in ["", "x", "x/1", "/0000000000000001", "x/000000000000000g", "a b/0000000000000001"] {
            assert!(MemberId::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_direct_conversation_is_the_same_from_both_sides(a in "[a-z0-9._@-]{1,64}", b in "[a-z0-9._@-]{1,64}") {
            let id = direct_conversation(&a, &b);
            prop_assert_eq!(&id, &direct_conversation(&b, &a));
            let parsed = Conversation::parse(&id).expect("own ids parse");
            prop_assert_eq!(parsed.peer_of(&a), Some(b.as_str()));
            prop_assert_eq!(parsed.peer_of(&b), Some(a.as_str()));
            prop_assert!(shard_of(&id, 7) < 7);
        }
    }
}
