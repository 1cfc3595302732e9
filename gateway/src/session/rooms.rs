//! A session's part in live rooms: what it is sent of them, and what it counts in them.
//!
//! A room's messages are encoded once for all its viewers and joined into batches; a session takes a batch whole or, when its client does
//! not keep up, loses it. Room messages have QoS 0 and no part in the inbox's window.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use im_proto::link::{Count, RoomMessage};
use im_proto::topic::SYSTEM_SENDER;

use super::{Digits, Effects, Phase, RoomEffect, Session};
use crate::mqtt::{Delivery, OutBuffer, Reason, Version};

/// What one PUBLISH may count at most.
const COUNT_MAX: u64 = 1_000;

/// What of a room a session is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoomPart {
    /// `r/{room}`: its messages; makes the connection a viewer.
    Messages,
    /// `r/{room}/stats`.
    Stats,
}

/// A subscription of a session.
#[derive(Debug)]
pub(super) struct EnteredRoom {
    pub(super) room: Arc<str>,
    pub(super) part: RoomPart,
}

/// What is counted in a room.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counter {
    /// `r/{room}/like`.
    Like,
    /// `r/{room}/gift/{gift}`.
    Gift(Box<str>),
}

impl Counter {
    /// Likes, and gifts by their names, out of what an owner counted.
    pub fn likes_and_gifts(totals: &[Count]) -> (u64, BTreeMap<String, u64>) {
        let likes = totals.iter().find(|total| total.name == Self::Like.name()).map_or(0, |total| total.count);
        let gift = |total: &Count| Some((total.name.strip_prefix("gift/")?.to_owned(), total.count));
        (likes, totals.iter().filter_map(gift).collect())
    }

    /// Its name at the owner.
    pub fn name(&self) -> String {
        match self {
            Self::Like => "like".to_owned(),
            Self::Gift(gift) => format!("gift/{gift}"),
        }
    }
}

/// Versions of the protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Versions {
    v5: bool,
    v311: bool,
}

impl Versions {
    /// Each of them.
    pub const BOTH: Self = Self { v5: true, v311: true };

    /// Adds one; says whether it is new.
    pub fn add(&mut self, version: Version) -> bool {
        let has = match version {
            Version::V5 => &mut self.v5,
            Version::V311 => &mut self.v311,
        };
        !std::mem::replace(has, true)
    }
}

/// Packets of one version, one behind the other.
#[derive(Debug, Default)]
struct Packets {
    bytes: Bytes,
    ends: Vec<u32>,
    largest: usize,
}

/// Messages of a room that go out together, in those versions in which they were encoded.
#[derive(Debug, Default)]
pub struct Batch {
    count: u64,
    v5: Packets,
    v311: Packets,
}

impl Batch {
    fn of(&self, version: Version) -> &Packets {
        match version {
            Version::V5 => &self.v5,
            Version::V311 => &self.v311,
        }
    }

    /// Messages in it.
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes of the larger encoding.
    pub fn bytes(&self) -> usize {
        self.v5.bytes.len().max(self.v311.bytes.len())
    }
}

/// Messages of a room that not every viewer was sent yet, encoded. They come at its end, each viewer is sent those behind his
/// place, and at its front they are forgotten. In a version that nobody speaks they are left out.
#[derive(Debug, Default)]
pub struct Window {
    v5: OpenPackets,
    v311: OpenPackets,
}

#[derive(Debug, Default)]
struct OpenPackets {
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl OpenPackets {
    /// Appends a packet, or only its place.
    fn push(&mut self, delivery: &Delivery<'_>, version: Version, is_spoken: bool) {
        if is_spoken {
            let mut out = OutBuffer::default();
            delivery.encode(&mut out, version);
            self.bytes.extend_from_slice(&out.take_bytes());
        }
        self.ends.push(self.bytes.len() as u32);
    }

    /// Where the packets behind the first `count` begin.
    fn start(&self, count: usize) -> usize {
        count.checked_sub(1).map_or(0, |last| self.ends.get(last).map_or(self.bytes.len(), |end| *end as usize))
    }

    fn cut(&self, from: usize) -> Packets {
        let start = self.start(from);
        if start == self.bytes.len() {
            return Packets::default();
        }
        let bytes = Bytes::copy_from_slice(&self.bytes[start..]);
        let ends: Vec<u32> = self.ends.iter().skip(from).map(|end| end - start as u32).collect();
        let begins = std::iter::once(0).chain(ends.iter().copied());
        let largest = ends.iter().zip(begins).map(|(end, begin)| end - begin).max().unwrap_or_default() as usize;
        Packets { bytes, ends, largest }
    }

    fn forget(&mut self, count: usize) {
        let start = self.start(count);
        self.bytes.drain(..start);
        self.ends.drain(..count.min(self.ends.len()));
        self.ends.iter_mut().for_each(|end| *end -= start as u32);
    }
}

impl Window {
    /// Appends a message of a room.
    pub fn push(&mut self, message: &RoomMessage, versions: Versions) {
        let number = Digits::new(message.number);
        let properties = [("from", message.sender.as_str()), ("n", number.as_str())];
        let delivery = Delivery {
            topic: &["r", &message.room],
            packet_id: 0,
            user_properties: &properties,
            payload: &message.payload,
        };
        self.push_delivery(&delivery, versions);
    }

    /// Appends a message on a topic under the room's.
    pub fn push_below(&mut self, room: &str, below: &str, payload: &Bytes) {
        let delivery = Delivery { topic: &["r", room, below], packet_id: 0, user_properties: &[], payload };
        self.push_delivery(&delivery, Versions::BOTH);
    }

    fn push_delivery(&mut self, delivery: &Delivery<'_>, versions: Versions) {
        self.v5.push(delivery, Version::V5, versions.v5);
        self.v311.push(delivery, Version::V311, versions.v311);
    }

    /// Messages in it.
    pub fn len(&self) -> u64 {
        self.v5.ends.len() as u64
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.v5.ends.is_empty()
    }

    /// Bytes of the larger encoding.
    pub fn bytes(&self) -> usize {
        self.v5.bytes.len().max(self.v311.bytes.len())
    }

    /// What is behind the first `from` messages.
    pub fn cut(&self, from: u64) -> Batch {
        let count = self.len().saturating_sub(from);
        Batch { count, v5: self.v5.cut(from as usize), v311: self.v311.cut(from as usize) }
    }

    /// Forgets the first `count` messages.
    pub fn forget(&mut self, count: u64) {
        self.v5.forget(count as usize);
        self.v311.forget(count as usize);
    }
}

/// What became of a batch in a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Messages written, or waiting to be.
    pub delivered: u64,
    /// Messages lost, because the client does not keep up or can't take their size.
    pub lost: u64,
    /// Something waits to be written and the connection's task does not know.
    pub wakes: bool,
}

impl Session {
    /// Sends a batch. `write` may put bytes on the socket at once and says how many it took; it is asked only when nothing waits before
    /// them. A client that has too much waiting loses the batch.
    pub fn on_room_batch(&mut self, batch: &Batch, write: impl FnOnce(&[u8]) -> usize) -> Sent {
        let mut sent = Sent::default();
        if self.phase != Phase::Live {
            return sent;
        }
        let packets = batch.of(self.version);
        let fitting = match self.packet_size_max {
            Some(max) if packets.largest > max as usize => Some(fitting(packets, max as usize)),
            _ => None,
        };
        let (bytes, count) = fitting.as_ref().map_or((&packets.bytes, batch.len()), |(bytes, count)| (bytes, *count));
        sent.lost = batch.len() - count;
        let is_idle = !self.has_output() && !self.is_writing;
        if !is_idle && self.out.len() + bytes.len() > self.shared.limits.deliver_below() {
            sent.lost = batch.len();
            return sent;
        }
        sent.delivered = count;
        let written = if is_idle && !bytes.is_empty() { write(bytes).min(bytes.len()) } else { 0 };
        if written < bytes.len() {
            // A little rest must not keep the whole batch in memory.
            let rest = bytes.slice(written..);
            self.out.put(&if rest.len() < bytes.len() / 4 { Bytes::copy_from_slice(&rest) } else { rest });
            sent.wakes = is_idle;
        }
        sent
    }

    /// The room is told from the hub's own copy of its name, which all viewers share.
    pub fn share_room_name(&mut self, name: &Arc<str>) {
        for entered in self.rooms.iter_mut().filter(|entered| *entered.room == **name) {
            entered.room = name.clone();
        }
    }

    /// A moderator put the user out of the room.
    pub fn on_room_kick(&mut self, room: &str, effects: &mut Effects) {
        let before = self.rooms.len();
        self.rooms.retain(|entered| {
            let stays = *entered.room != *room;
            if !stays {
                effects.rooms.push(RoomEffect::Leave { room: entered.room.clone(), part: entered.part });
            }
            stays
        });
        if self.rooms.len() < before && self.phase == Phase::Live {
            let payload = Bytes::from_static(br#"{"kicked":true}"#);
            let properties = [("from", SYSTEM_SENDER)];
            let delivery =
                Delivery { topic: &["r", room], packet_id: 0, user_properties: &properties, payload: &payload };
            delivery.encode(&mut self.out, self.version);
        }
    }

    /// Counts in a room; a count that nobody waits for joins the one before it.
    pub(super) fn count(
        &mut self,
        room: &str,
        counter: Counter,
        count: u64,
        ticket: Option<u32>,
        effects: &mut Effects,
    ) {
        if let Some(RoomEffect::Count { room: last, counter: same, count: sum, ticket: None }) =
            effects.rooms.last_mut()
            && ticket.is_none()
            && **last == *room
            && *same == counter
        {
            *sum += count;
            return;
        }
        let shared = self.rooms.iter().find(|entered| *entered.room == *room).map(|entered| entered.room.clone());
        effects.rooms.push(RoomEffect::Count { room: shared.unwrap_or_else(|| room.into()), counter, count, ticket });
    }
}

/// The payload of a like or a gift: how many, one if it is empty.
pub(super) fn count_of(payload: &[u8]) -> Result<u64, (Reason, &'static str)> {
    if payload.is_empty() {
        return Ok(1);
    }
    let count = std::str::from_utf8(payload).ok().and_then(|text| text.trim().parse().ok());
    count.filter(|count| (1..=COUNT_MAX).contains(count)).ok_or((
        Reason::PayloadFormatInvalid,
        "the payload must be empty (it counts as one) or a decimal number from 1 to 1000",
    ))
}

/// The packets that a client with this maximum takes, and how many they are.
fn fitting(packets: &Packets, max: usize) -> (Bytes, u64) {
    let (mut bytes, mut count, mut start) = (Vec::new(), 0, 0);
    for end in packets.ends.iter().map(|end| *end as usize) {
        if end - start <= max {
            bytes.extend_from_slice(&packets.bytes[start..end]);
            count += 1;
        }
        start = end;
    }
    (bytes.into(), count)
}
