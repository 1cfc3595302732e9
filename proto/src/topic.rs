//! The topic grammar: what a client may publish and subscribe, and the topics it receives on.

use crate::ids::{NAME_BYTES_MAX, is_name};

/// Where a PUBLISH goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publish<'a> {
    /// `u/{user}`: a message to a person.
    ToUser(&'a str),
    /// `g/{group}`: a message to a group.
    ToGroup(&'a str),
    /// `read/u/{peer}`: read up to the payload's seq.
    ReadUser(&'a str),
    /// `read/g/{group}`.
    ReadGroup(&'a str),
    /// `r/{room}`: a message to a live room.
    ToRoom(&'a str),
    /// `r/{room}/like`: counts.
    Like(&'a str),
    /// `r/{room}/gift/{gift}`: counts, each gift for itself.
    Gift {
        /// Where.
        room: &'a str,
        /// Which.
        gift: &'a str,
    },
}

/// What a SUBSCRIBE asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subscription<'a> {
    /// `inbox/#`: all that is meant for the user.
    Inbox,
    /// `r/{room}`: a live room's messages.
    Room(&'a str),
    /// `r/{room}/stats`: its viewers and likes.
    RoomStats(&'a str),
}

/// Why a topic or filter is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// Not one of ours, or an id in it is malformed.
    #[error(
        "unknown topic: use u/{{user}}, g/{{group}}, read/u/{{peer}}, read/g/{{group}}, r/{{room}}, r/{{room}}/like or r/{{room}}/gift/{{gift}}"
    )]
    Unknown,
    /// A wildcard elsewhere than in `inbox/#`.
    #[error("wildcards are refused: subscribe inbox/#, r/{{room}} or r/{{room}}/stats")]
    Wildcard,
}

/// Longest topic that can be right, in bytes: `r/{room}/gift/{gift}`.
pub const TOPIC_BYTES_MAX: usize = 2 * NAME_BYTES_MAX + 8;

impl<'a> Publish<'a> {
    /// Parses the topic of a PUBLISH.
    pub fn parse(topic: &'a str) -> Result<Self, TopicError> {
        if topic.len() > TOPIC_BYTES_MAX {
            return Err(TopicError::Unknown);
        }
        let name = |id: &'a str| if is_name(id) { Ok(id) } else { Err(TopicError::Unknown) };
        match topic.split_once('/') {
            Some(("u", user)) => name(user).map(Self::ToUser),
            Some(("g", group)) => name(group).map(Self::ToGroup),
            Some(("r", rest)) => match rest.split_once('/') {
                None => name(rest).map(Self::ToRoom),
                Some((room, "like")) => name(room).map(Self::Like),
                Some((room, rest)) => {
                    let gift = rest.strip_prefix("gift/").ok_or(TopicError::Unknown)?;
                    Ok(Self::Gift { room: name(room)?, gift: name(gift)? })
                }
            },
            Some(("read", rest)) => match rest.split_once('/') {
                Some(("u", peer)) => name(peer).map(Self::ReadUser),
                Some(("g", group)) => name(group).map(Self::ReadGroup),
                _ => Err(TopicError::Unknown),
            },
            _ => Err(TopicError::Unknown),
        }
    }
}

impl<'a> Subscription<'a> {
    /// Parses a topic filter.
    pub fn parse(filter: &'a str) -> Result<Self, TopicError> {
        if filter == "inbox/#" {
            return Ok(Self::Inbox);
        }
        if filter.contains(['#', '+']) {
            return Err(TopicError::Wildcard);
        }
        match filter.strip_prefix("r/").map(|rest| rest.split_once('/').unwrap_or((rest, ""))) {
            Some((room, "")) if is_name(room) && !filter.ends_with('/') => Ok(Self::Room(room)),
            Some((room, "stats")) if is_name(room) => Ok(Self::RoomStats(room)),
            _ => Err(TopicError::Unknown),
        }
    }
}

/// The sender shown for joins, leaves and system messages.
pub const SYSTEM_SENDER: &str = "$system";

/// Where 3.1.1 clients learn what was refused for good.
pub const REFUSED_TOPIC: &str = "inbox/refused";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publish_topics() {
        let long = format!("u/{}", "x".repeat(65));
        let cases = [
            ("u/bob", Ok(Publish::ToUser("bob"))),
            ("g/team.1", Ok(Publish::ToGroup("team.1"))),
            ("read/u/bob", Ok(Publish::ReadUser("bob"))),
            ("read/g/team", Ok(Publish::ReadGroup("team"))),
            ("r/stage", Ok(Publish::ToRoom("stage"))),
            ("r/stage/like", Ok(Publish::Like("stage"))),
            ("r/stage/gift/rose", Ok(Publish::Gift { room: "stage", gift: "rose" })),
            ("r/stage/gift/", Err(TopicError::Unknown)),
            ("r/stage/gift/a/b", Err(TopicError::Unknown)),
            ("r/stage/dance", Err(TopicError::Unknown)),
            ("u/", Err(TopicError::Unknown)),
            ("u/a/b", Err(TopicError::Unknown)),
            ("u/ü", Err(TopicError::Unknown)),
            (&long, Err(TopicError::Unknown)),
            ("inbox/u/bob", Err(TopicError::Unknown)),
            ("$SYS/x", Err(TopicError::Unknown)),
            ("", Err(TopicError::Unknown)),
        ];
        for (topic, want) in cases {
            assert_eq!(Publish::parse(topic), want, "{topic:?}");
        }
    }

    #[test]
    fn filters() {
        let cases = [
            ("inbox/#", Ok(Subscription::Inbox)),
            ("r/stage", Ok(Subscription::Room("stage"))),
            ("r/stage/stats", Ok(Subscription::RoomStats("stage"))),
            ("r/stage/", Err(TopicError::Unknown)),
            ("r/+", Err(TopicError::Wildcard)),
            ("#", Err(TopicError::Wildcard)),
            ("inbox/u/bob/#", Err(TopicError::Wildcard)),
            ("u/bob", Err(TopicError::Unknown)),
        ];
        for (filter, want) in cases {
            assert_eq!(Subscription::parse(filter), want, "{filter:?}");
        }
    }
}
