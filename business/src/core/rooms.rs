//! Live rooms: messages in one order to every gateway that has viewers, moderation, and the merging of viewers, likes and gifts.
//!
//! A room's messages are not stored. Its settings and totals are items of its shard; who is in it is what the gateways say over their
//! links, and ends with them. A gateway sends what it counted under a number of its boot; the number last taken is stored with the
//! totals, so a count that is sent again, to whomever, is in them once.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use im_proto::ids::MemberId;
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Count, Refusal, Room as RoomInfo, RoomChange, RoomCounted, RoomCounter, RoomCounts, RoomGet, RoomJoin, RoomJoined,
    RoomKick, RoomLeave, RoomMessage, RoomPublish, RoomStats, Sanction, body, push,
};
use im_proto::state::{CountedBoot, CountedRow, CountsRow, RoomRow, SanctionRow};
use prost::Message;

use super::cache::Cache;
use super::calls::{RoomRows, StoreAnswer, StoreCall, keys};
use super::ownership::store_refusal;
use super::shard::{Forming, Op, OwnedShard};
use super::{Context, Env, LinkId, Map, ReplyTo};
use crate::store::{Put, StoreError};

/// Bytes of one room's messages that a gateway may have in hand. Past it the gateway loses messages; when every gateway is past it, the
/// publishers are refused for now.
const WINDOW_BYTES: u64 = 256 << 10;
/// Payload bytes of the messages kept for late comers.
const HISTORY_BYTES_MAX: usize = 64 << 10;
/// Different gifts of one room.
const GIFTS_MAX: usize = 64;
/// The counter that every room has space for.
const LIKES: &str = "like";
const MODERATORS_MAX: usize = 100;
const SANCTIONS_MAX: usize = 1_000;
/// People whose last message is remembered for slow mode; when there are more, those who may speak again are forgotten.
const SPOKEN_MAX: usize = 10_000;
/// Payload bytes of one shard's messages that wait until its gateways have announced their rooms.
const HELD_BYTES_MAX: usize = 4 << 20;
/// How long the last number of a gateway's boot is kept after it was stored.
const COUNTED_KEPT_MS: i64 = 24 * 3_600_000;

/// The live rooms of one shard.
#[derive(Default)]
pub(super) struct Rooms {
    rooms: Cache<Room>,
    /// By a gateway's boot: the number of the last counts in the totals, and when. Read with the first room.
    counted: Option<BTreeMap<u64, (u64, i64)>>,
    /// Rooms whose statistics changed since they were told, and from when they may be.
    stats_due: BTreeMap<Arc<str>, Duration>,
    /// Messages that came before all gateways had said which rooms they are in: some would miss them.
    held: VecDeque<(ReplyTo, RoomPublish)>,
    held_bytes: usize,
}

/// Totals by counter.
type Totals = BTreeMap<String, u64>;

/// One live room.
#[derive(Default)]
struct Room {
    settings: RoomRow,
    totals: Totals,
    gateways: BTreeMap<LinkId, Joined>,
    /// Of the last message.
    number: u64,
    history: VecDeque<RoomMessage>,
    history_bytes: usize,
    /// When somebody spoke last, while slow mode is on.
    spoken: Map<Arc<str>, Duration>,
    /// Statistics are not told before.
    stats_at: Duration,
}

/// A gateway in a room.
#[derive(Default)]
struct Joined {
    /// Without any it is sent no messages.
    viewers: u32,
    /// Somebody wants the statistics.
    is_watching: bool,
    /// Sent to it and not sent on yet.
    bytes_in_hand: u64,
}

/// A write of room state.
pub(super) enum RoomWrite {
    Counts { to: ReplyTo, boot: u64, counts: RoomCounts },
    Change { to: ReplyTo, change: Box<RoomChange> },
}

/// The same under way, with what is so once it is stored.
pub(super) enum FormedRoom {
    Counts { to: ReplyTo, boot: u64, counts: RoomCounts, at_ms: i64, totals: Vec<(Arc<str>, Totals)> },
    Change { to: ReplyTo, change: Box<RoomChange>, settings: Box<RoomRow>, at_ms: i64 },
}

/// What the batch being formed changes in rooms.
#[derive(Default)]
pub(super) struct FormingRooms {
    totals: BTreeMap<Arc<str>, Totals>,
    numbers: BTreeMap<u64, u64>,
    changed: BTreeSet<Arc<str>>,
}

impl RoomWrite {
    pub(super) fn to(&self) -> ReplyTo {
        match self {
            Self::Counts { to, .. } | Self::Change { to, .. } => *to,
        }
    }
}

impl FormedRoom {
    pub(super) fn to(&self) -> ReplyTo {
        match self {
            Self::Counts { to, .. } | Self::Change { to, .. } => *to,
        }
    }

    /// For the next batch, because this one was not stored.
    pub(super) fn reopen(self) -> RoomWrite {
        match self {
            Self::Counts { to, boot, counts, .. } => RoomWrite::Counts { to, boot, counts },
            Self::Change { to, change, .. } => RoomWrite::Change { to, change },
        }
    }
}

impl Room {
    fn load(settings: Option<Bytes>, totals: Option<Bytes>) -> Result<Self, prost::DecodeError> {
        let CountsRow { names, totals } = CountsRow::decode(totals.unwrap_or_default())?;
        Ok(Self {
            settings: RoomRow::decode(settings.unwrap_or_default())?,
            totals: names.into_iter().zip(totals).collect(),
            ..Self::default()
        })
    }

    fn stats(&self, room: &str) -> RoomStats {
        let total = |(name, count): (&String, &u64)| Count { name: name.clone(), count: *count };
        RoomStats {
            room: room.to_owned(),
            viewers: self.gateways.values().map(|gateway| u64::from(gateway.viewers)).sum(),
            totals: self.totals.iter().map(total).collect(),
        }
    }

    fn is_moderator(&self, user: &str) -> bool {
        self.settings.owner == user || self.settings.moderators.iter().any(|moderator| moderator == user)
    }

    fn keep(&mut self, message: &RoomMessage, history_max: usize) {
        if history_max == 0 {
            return;
        }
        self.history_bytes += message.payload.len();
        self.history.push_back(message.detached());
        while self.history.len() > history_max || self.history_bytes > HISTORY_BYTES_MAX {
            let Some(oldest) = self.history.pop_front() else { return };
            self.history_bytes -= oldest.payload.len();
        }
    }

    /// Whether slow mode lets this person speak now; then the time is noted.
    fn may_speak(&mut self, now: Duration, user: &str) -> bool {
        let pause = Duration::from_millis(self.settings.slow_mode_ms.into());
        if pause.is_zero() || self.is_moderator(user) {
            return true;
        }
        if self.spoken.get(user).is_some_and(|at| now < *at + pause) {
            return false;
        }
        if self.spoken.len() >= SPOKEN_MAX {
            self.spoken.retain(|_, at| now < *at + pause);
        }
        if self.spoken.len() < SPOKEN_MAX {
            self.spoken.insert(user.into(), now);
        }
        true
    }
}

fn is_sanctioned(sanctions: &[SanctionRow], user: &str, now_ms: i64) -> bool {
    sanctions.iter().any(|sanction| sanction.user == user && sanction.until_ms > now_ms)
}

/// Says for each what is told of it: who, and until when.
fn told(room: &str, sanctions: &[SanctionRow], now_ms: i64) -> Vec<RoomKick> {
    let current = sanctions.iter().filter(|sanction| sanction.until_ms > now_ms);
    current
        .map(|sanction| RoomKick { room: room.to_owned(), user: sanction.user.clone(), until_ms: sanction.until_ms })
        .collect()
}

/// The settings after a change.
///
/// Servers may do all; the owner all but to give the room away to nobody; moderators mute, kick and set slow mode, but not against the
/// owner or each other.
fn change_settings(settings: &RoomRow, change: &RoomChange, now_ms: i64) -> Result<RoomRow, (Refusal, String)> {
    let forbidden = |reason: &str| Err((Refusal::Forbidden, reason.to_owned()));
    let is_server = change.actor.is_empty();
    let is_owner = !is_server && settings.owner == change.actor;
    let is_moderator = settings.moderators.contains(&change.actor);
    if !(is_server || is_owner || is_moderator) {
        return forbidden("only the room's owner, its moderators and servers may do this; a server names the owner");
    }
    let changes_roles =
        !(change.owner.is_empty() && change.add_moderators.is_empty() && change.remove_moderators.is_empty());
    if changes_roles && !(is_server || is_owner) {
        return forbidden("only the room's owner and servers may give roles");
    }
    let mut next = settings.clone();
    if !change.owner.is_empty() {
        next.owner.clone_from(&change.owner);
    }
    next.moderators.retain(|user| !change.remove_moderators.contains(user));
    for user in &change.add_moderators {
        if !next.moderators.contains(user) {
            next.moderators.push(user.clone());
        }
    }
    if let Some(slow_mode_ms) = change.slow_mode_ms {
        next.slow_mode_ms = slow_mode_ms;
    }
    for (sanctions, wanted) in [(&mut next.muted, &change.mute), (&mut next.kicked, &change.kick)] {
        sanctions.retain(|sanction| sanction.until_ms > now_ms);
        for Sanction { user, seconds } in wanted {
            if !is_server && (*user == settings.owner || (!is_owner && settings.moderators.contains(user))) {
                return forbidden("neither the owner nor a moderator can be muted or kicked by a moderator");
            }
            sanctions.retain(|sanction| sanction.user != *user);
            if *seconds > 0 {
                sanctions.push(SanctionRow { user: user.clone(), until_ms: now_ms + i64::from(*seconds) * 1_000 });
            }
        }
        if sanctions.len() > SANCTIONS_MAX {
            return Err((Refusal::Invalid, format!("at most {SANCTIONS_MAX} people can be muted or kicked at a time")));
        }
    }
    if next.moderators.len() > MODERATORS_MAX {
        return Err((Refusal::Invalid, format!("at most {MODERATORS_MAX} moderators")));
    }
    Ok(next)
}

impl Rooms {
    fn get(&self, room: &str) -> Option<&Room> {
        self.rooms.get(room)
    }

    fn get_mut(&mut self, room: &str) -> Option<&mut Room> {
        self.rooms.get_mut(room)
    }

    pub(super) fn forget_waiter(&mut self, waiter: u64) {
        self.rooms.forget_waiter(waiter);
    }

    fn stats_changed(&mut self, now: Duration, room: &str) {
        if let Some((name, room)) = self.rooms.get_named(room) {
            self.stats_due.entry(name.clone()).or_insert(now.max(room.stats_at));
        }
    }

    /// A gateway's link ended, and with it what it had in the rooms. What came over it is sent again over the next.
    pub(super) fn link_closed(&mut self, now: Duration, link: LinkId) {
        self.held.retain(|(to, _)| to.link != link);
        self.held_bytes = self.held.iter().map(|(_, publish)| publish.payload.len()).sum();
        let left = self.rooms.iter_mut().filter_map(|(name, room)| room.gateways.remove(&link).map(|_| name.clone()));
        let left: Vec<Arc<str>> = left.collect();
        for name in left {
            self.stats_changed(now, &name);
        }
    }

    /// What is held goes to the next owner.
    pub(super) fn forget_held(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
    }

    /// A gateway sent messages on, or gave them up.
    pub(super) fn took(&mut self, link: LinkId, room: &str, bytes: u64) {
        if let Some(gateway) = self.get_mut(room).and_then(|room| room.gateways.get_mut(&link)) {
            gateway.bytes_in_hand = gateway.bytes_in_hand.saturating_sub(bytes);
        }
    }

    /// Forgets rooms that no gateway is in and nobody asked about for a while, but for those named, of which something is to be written.
    pub(super) fn sweep(&mut self, now: Duration, named: &BTreeSet<&str>) {
        self.rooms.retain(now, |name, room, is_idle| !room.gateways.is_empty() || !is_idle || named.contains(&**name));
        let rooms = &self.rooms;
        self.stats_due.retain(|room, _| rooms.is_known(room));
    }
}

impl OwnedShard {
    // ---- loads ----------------------------------------------------------------------------------------------------------

    pub(super) fn load_missing_rooms(&mut self, env: &mut Env, body: &body::Body, waiter: u64) -> usize {
        let mut missing = 0;
        let (number, epoch, now) = (self.number, self.epoch, env.now.mono);
        let mut need = |room: &str| {
            let load = |room| ask_for_room(env, number, epoch, room);
            missing += usize::from(self.rooms.rooms.need(now, room, Some(waiter), load));
        };
        match body {
            body::Body::RoomJoin(RoomJoin { room, .. })
            | body::Body::RoomLeave(RoomLeave { room })
            | body::Body::RoomPublish(RoomPublish { room, .. })
            | body::Body::RoomChange(RoomChange { room, .. })
            | body::Body::RoomGet(RoomGet { room, .. }) => need(room),
            body::Body::RoomCounts(counts) => counts.rooms.iter().for_each(|count| need(&count.room)),
            // All is announced only when the joins before it are through.
            body::Body::Announced(_) => missing += self.rooms.rooms.need_all_loads(waiter),
            _ => {}
        }
        missing
    }

    pub(super) fn room_loaded(&mut self, env: &mut Env, name: Arc<str>, answer: Result<StoreAnswer, StoreError>) {
        let unusable = |error: prost::DecodeError| (Refusal::StoreUnavailable, error.to_string());
        let loaded = match answer {
            Ok(StoreAnswer::LoadRoom(RoomRows { settings, totals, counted })) => Room::load(settings, totals)
                .and_then(|room| Ok((room, CountedRow::decode(counted.unwrap_or_default())?)))
                .map_err(unusable),
            Ok(_) => Err((Refusal::StoreUnavailable, "the store answered something else".to_owned())),
            Err(error) => Err(store_refusal(&error)),
        };
        match loaded {
            Ok((room, counted)) => {
                // What was written since the first read is known better here than there.
                self.rooms.counted.get_or_insert_with(|| {
                    counted.boots.into_iter().map(|row| (row.boot, (row.number, row.at_ms))).collect()
                });
                let waiters = self.rooms.rooms.loaded(env.now.mono, name, room);
                self.wake(env, waiters);
            }
            Err((code, reason)) => {
                let waiters = self.rooms.rooms.failed(&name);
                let patient = self.refuse_waiters(env, waiters, code, &reason);
                self.rooms.rooms.try_again(env.now.mono, name, patient);
            }
        }
    }

    // ---- requests -------------------------------------------------------------------------------------------------------

    /// Takes a request about a room that is in memory.
    pub(super) fn ask_rooms(&mut self, env: &mut Env, to: ReplyTo, body: body::Body) {
        match body {
            body::Body::RoomJoin(join) => self.room_join(env, to, &join),
            body::Body::RoomLeave(leave) => {
                if self.rooms.get_mut(&leave.room).is_some_and(|room| room.gateways.remove(&to.link).is_some()) {
                    self.rooms.stats_changed(env.now.mono, &leave.room);
                }
                env.done(to);
            }
            body::Body::RoomPublish(publish) => self.publish_or_hold(env, to, publish),
            body::Body::RoomCounts(counts) => self.room_counts(env, to, counts),
            body::Body::RoomChange(change) => self.write_room(env, RoomWrite::Change { to, change: Box::new(change) }),
            body::Body::RoomGet(get) => {
                let Some(room) = self.rooms.get(&get.room) else { return };
                let info = room_info(room, &get.room, &get.actor, env.now.wall_ms);
                env.reply(to, Outcome::Room(info));
            }
            user_body => self.ask_users(env, to, user_body),
        }
    }

    fn room_join(&mut self, env: &mut Env, to: ReplyTo, join: &RoomJoin) {
        let (history_max, now_ms) = (env.limits.room_history, env.now.wall_ms);
        let Some(room) = self.rooms.get_mut(&join.room) else { return };
        let gateway = room.gateways.entry(to.link).or_default();
        (gateway.viewers, gateway.is_watching) = (join.viewers, !join.unwatched);
        // Numbers go on where the last owner's ended.
        room.number = room.number.max(join.last);
        let joined = RoomJoined {
            history: room.history.iter().cloned().collect(),
            history_max: history_max as u32,
            kicked: told(&join.room, &room.settings.kicked, now_ms),
            stats: Some(room.stats(&join.room)),
        };
        self.rooms.stats_changed(env.now.mono, &join.room);
        env.reply(to, Outcome::RoomJoined(joined));
    }

    /// Sends a message to the room; while a new owner still hears which gateways are in it, the message waits.
    fn publish_or_hold(&mut self, env: &mut Env, to: ReplyTo, publish: RoomPublish) {
        if publish.payload.len() > env.limits.payload_max {
            return env.refuse(to, Refusal::Invalid, "the payload is too large");
        }
        if self.presence_known(env) {
            self.publish_held(env);
            return self.room_publish(env, to, publish);
        }
        let held = &mut self.rooms.held;
        let is_full = held.len() >= env.limits.shard_ops_max || self.rooms.held_bytes >= HELD_BYTES_MAX;
        // What may have been taken before is never refused for now: there is no more of it than routers hold.
        if is_full && !to.again {
            return env.refuse(to, Refusal::Busy, "the room's gateways are still announced: try again in a moment");
        }
        self.rooms.held_bytes += publish.payload.len();
        held.push_back((to, publish));
    }

    /// Sends what waited until all gateways had announced their rooms.
    pub(super) fn publish_held(&mut self, env: &mut Env) {
        self.rooms.held_bytes = 0;
        for (to, publish) in std::mem::take(&mut self.rooms.held) {
            self.room_publish(env, to, publish);
        }
    }

    fn room_publish(&mut self, env: &mut Env, to: ReplyTo, publish: RoomPublish) {
        let Some(room) = self.rooms.get_mut(&publish.room) else { return };
        let settings = &room.settings;
        if [&settings.muted, &settings.kicked]
            .iter()
            .any(|sanctions| is_sanctioned(sanctions, &publish.sender, env.now.wall_ms))
        {
            return env.refuse(to, Refusal::Sanctioned, "muted in this room, or put out of it");
        }
        let has_space = |gateway: &Joined| gateway.bytes_in_hand < WINDOW_BYTES;
        // What may have been taken before is never refused for now.
        if !to.again {
            let mut with_viewers = room.gateways.values().filter(|gateway| gateway.viewers > 0).peekable();
            if with_viewers.peek().is_some() && !with_viewers.any(has_space) {
                return env.refuse(to, Refusal::Busy, "the room's gateways take no more now: try again in a moment");
            }
            if !room.may_speak(env.now.mono, &publish.sender) {
                return env.refuse(to, Refusal::TooSoon, "slow mode: wait before the next message");
            }
        }
        room.number += 1;
        let RoomPublish { room: name, sender, device, payload } = publish;
        let message = RoomMessage { room: name, sender, device, payload, number: room.number };
        room.keep(&message, env.limits.room_history);
        let bytes = message.bytes_in_hand();
        self.load_count += 1;
        for (link, gateway) in room.gateways.iter_mut().filter(|(_, gateway)| gateway.viewers > 0) {
            if !(has_space(gateway) || to.again) {
                env.stats.room_dropped += 1;
                continue;
            }
            if let Some(id) = env.links.get(link).cloned() {
                gateway.bytes_in_hand += bytes;
                env.push(&id, push::Push::RoomMessage(message.clone()), None);
            }
        }
        env.done(to);
    }

    fn room_counts(&mut self, env: &mut Env, to: ReplyTo, counts: RoomCounts) {
        let Some(boot) = env.links.get(&to.link).map(MemberId::boot) else { return };
        for count in &counts.rooms {
            let gateway = self.rooms.get_mut(&count.room).and_then(|room| room.gateways.get_mut(&to.link));
            if let Some(gateway) = gateway
                && std::mem::replace(&mut gateway.viewers, count.viewers) != count.viewers
            {
                self.rooms.stats_changed(env.now.mono, &count.room);
            }
        }
        if counts.rooms.iter().all(|count| count.counted.is_empty()) {
            return env.done(to);
        }
        self.load_count += 1;
        self.write_room(env, RoomWrite::Counts { to, boot, counts });
    }

    // ---- writes ---------------------------------------------------------------------------------------------------------

    /// Takes a write into the batch being formed.
    pub(super) fn form_room(&mut self, env: &mut Env, forming: &mut Forming, write: RoomWrite) {
        let at_ms = env.now.wall_ms;
        match write {
            RoomWrite::Counts { to, boot, counts } => {
                let stored = self.rooms.counted.as_ref().and_then(|counted| counted.get(&boot));
                if stored.is_some_and(|(number, _)| counts.number <= *number) {
                    return self.answer_counts(env, to, &counts);
                }
                if forming.rooms.numbers.get(&boot).is_some_and(|number| counts.number <= *number) {
                    // It is in this very batch: answered when that is stored.
                    return forming.defer(Op::Room(RoomWrite::Counts { to, boot, counts }));
                }
                forming.rooms.numbers.insert(boot, counts.number);
                let mut totals_then = Vec::new();
                for count in counts.rooms.iter().filter(|count| !count.counted.is_empty()) {
                    let Some((name, room)) = self.rooms.rooms.get_named(&count.room) else { continue };
                    let totals = forming.rooms.totals.entry(name.clone()).or_insert_with(|| room.totals.clone());
                    for Count { name, count } in &count.counted {
                        let gifts = totals.len() - usize::from(totals.contains_key(LIKES));
                        let has_space = name == LIKES || gifts < GIFTS_MAX;
                        match totals.get_mut(name) {
                            Some(total) => *total = total.saturating_add(*count),
                            None if has_space => drop(totals.insert(name.clone(), *count)),
                            // `answer_counts` tells of it.
                            None => {}
                        }
                    }
                    totals_then.push((name.clone(), totals.clone()));
                }
                forming.form_room(FormedRoom::Counts { to, boot, counts, at_ms, totals: totals_then });
            }
            RoomWrite::Change { to, change } => {
                let Some((name, room)) = self.rooms.rooms.get_named(&change.room) else {
                    return env.refuse(to, Refusal::Busy, "the room left memory: ask again");
                };
                // A change is judged by what is committed.
                if !forming.rooms.changed.insert(name.clone()) {
                    return forming.defer(Op::Room(RoomWrite::Change { to, change }));
                }
                match change_settings(&room.settings, &change, at_ms) {
                    Err((code, reason)) => env.refuse(to, code, reason),
                    Ok(settings) => {
                        let value = Some(settings.encode_to_vec().into());
                        forming.put(Put { key: keys::room(&change.room), value });
                        forming.form_room(FormedRoom::Change { to, change, settings: Box::new(settings), at_ms });
                    }
                }
            }
        }
    }

    /// The rows of what the batch counted: one per room, however many gateways sent counts.
    pub(super) fn room_puts(&self, forming: &FormingRooms, now_ms: i64) -> Vec<Put> {
        let row = |(room, totals): (&Arc<str>, &Totals)| {
            let row = CountsRow { names: totals.keys().cloned().collect(), totals: totals.values().copied().collect() };
            Put { key: keys::room_counts(room), value: Some(row.encode_to_vec().into()) }
        };
        let mut puts: Vec<Put> = forming.totals.iter().map(row).collect();
        if !forming.numbers.is_empty() {
            let mut counted = self.rooms.counted.clone().unwrap_or_default();
            counted.retain(|_, (_, at_ms)| *at_ms + COUNTED_KEPT_MS > now_ms);
            counted.extend(forming.numbers.iter().map(|(boot, number)| (*boot, (*number, now_ms))));
            let boots = counted.into_iter().map(|(boot, (number, at_ms))| CountedBoot { boot, number, at_ms });
            let row = CountedRow { boots: boots.collect() };
            puts.push(Put { key: keys::counted().to_owned(), value: Some(row.encode_to_vec().into()) });
        }
        puts
    }

    /// The batch is stored.
    pub(super) fn room_written(&mut self, env: &mut Env, write: FormedRoom) {
        match write {
            FormedRoom::Counts { to, boot, counts, at_ms, totals } => {
                let counted = self.rooms.counted.get_or_insert_default();
                counted.retain(|_, (_, stored_ms)| *stored_ms + COUNTED_KEPT_MS > at_ms);
                counted.insert(boot, (counts.number, at_ms));
                for (name, totals) in totals {
                    if let Some(room) = self.rooms.get_mut(&name) {
                        room.totals = totals;
                    }
                    self.rooms.stats_changed(env.now.mono, &name);
                }
                self.answer_counts(env, to, &counts);
            }
            FormedRoom::Change { to, change, settings, at_ms } => {
                let Some(room) = self.rooms.get_mut(&change.room) else { return };
                room.settings = *settings;
                if room.settings.slow_mode_ms == 0 {
                    room.spoken = Map::default();
                }
                let info = room_info(room, &change.room, &change.actor, at_ms);
                let gateways: Vec<MemberId> =
                    room.gateways.keys().filter_map(|link| env.links.get(link).cloned()).collect();
                for Sanction { user, seconds } in change.kick {
                    let until_ms = if seconds == 0 { 0 } else { at_ms + i64::from(seconds) * 1_000 };
                    let kick = RoomKick { room: change.room.clone(), user, until_ms };
                    for gateway in &gateways {
                        env.push(gateway, push::Push::RoomKick(kick.clone()), None);
                    }
                }
                env.reply(to, Outcome::Room(info));
            }
        }
    }

    /// Answers counts that are stored. A counter that is in the totals stays there, so one that is not was refused, however late it is
    /// asked again.
    fn answer_counts(&self, env: &mut Env, to: ReplyTo, counts: &RoomCounts) {
        let mut refused = Vec::new();
        for count in &counts.rooms {
            let Some(room) = self.rooms.get(&count.room) else { continue };
            let missing = count.counted.iter().filter(|counted| !room.totals.contains_key(&counted.name));
            refused.extend(missing.map(|counted| RoomCounter { room: count.room.clone(), name: counted.name.clone() }));
        }
        if refused.is_empty() {
            return env.done(to);
        }
        env.stats.refused += refused.len() as u64;
        env.reply(to, Outcome::RoomCounted(RoomCounted { refused }));
    }

    // ---- now and then ---------------------------------------------------------------------------------------------------

    /// Tells statistics that changed, and loads again what could not be loaded.
    pub(super) fn tick_rooms(&mut self, env: &mut Env) {
        let now = env.now.mono;
        for room in self.rooms.rooms.due(now) {
            ask_for_room(env, self.number, self.epoch, room);
        }
        // A new owner that has not heard all gateways would tell too few viewers.
        if self.rooms.stats_due.is_empty() || !self.presence_known(env) {
            return;
        }
        let due: Vec<Arc<str>> =
            self.rooms.stats_due.iter().filter(|(_, at)| **at <= now).map(|(room, _)| room.clone()).collect();
        for name in due {
            self.rooms.stats_due.remove(&name);
            let Some(room) = self.rooms.get_mut(&name) else { continue };
            let watching = room.gateways.iter().filter(|(_, gateway)| gateway.is_watching);
            let watching: Vec<MemberId> = watching.filter_map(|(link, _)| env.links.get(link).cloned()).collect();
            if watching.is_empty() {
                continue;
            }
            room.stats_at = now + env.limits.room_stats_interval;
            let stats = room.stats(&name);
            for gateway in watching {
                env.push(&gateway, push::Push::RoomStats(stats.clone()), None);
            }
        }
    }
}

fn ask_for_room(env: &mut Env, shard: u32, epoch: u64, room: Arc<str>) {
    env.call(StoreCall::LoadRoom { shard, room: room.clone() }, Context::LoadRoom { shard, epoch, room });
}

/// A room as `actor` may see it.
fn room_info(room: &Room, name: &str, actor: &str, now_ms: i64) -> RoomInfo {
    let (mut muted, mut kicked) = (Vec::new(), Vec::new());
    if actor.is_empty() || room.is_moderator(actor) {
        muted = told(name, &room.settings.muted, now_ms);
        kicked = told(name, &room.settings.kicked, now_ms);
    }
    RoomInfo {
        room: name.to_owned(),
        owner: room.settings.owner.clone(),
        moderators: room.settings.moderators.clone(),
        slow_mode_ms: room.settings.slow_mode_ms,
        muted,
        kicked,
        stats: Some(room.stats(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(actor: &str) -> RoomChange {
        RoomChange { room: "stage".into(), actor: actor.into(), ..RoomChange::default() }
    }

    #[test]
    fn roles_decide_who_may_change_what() {
        let settings = RoomRow { owner: "ann".into(), moderators: vec!["mo".into()], ..RoomRow::default() };
        let roles = |actor| RoomChange { add_moderators: vec!["bob".into()], ..change(actor) };
        let mute =
            |actor, user: &str| RoomChange { mute: vec![Sanction { user: user.into(), seconds: 10 }], ..change(actor) };
        let cases = [
            (roles(""), true),
            (roles("ann"), true),
            (roles("mo"), false),
            (roles("eve"), false),
            (mute("mo", "eve"), true),
            (mute("mo", "ann"), false),
            (mute("mo", "mo"), false),
            (mute("ann", "mo"), true),
            (mute("ann", "ann"), false),
            (mute("", "ann"), true),
            (mute("eve", "bob"), false),
        ];
        for (change, is_allowed) in cases {
            assert_eq!(change_settings(&settings, &change, 0).is_ok(), is_allowed, "{change:?}");
        }
        assert!(change_settings(&RoomRow::default(), &roles("ann"), 0).is_err(), "a room of nobody's is nobody's");
    }

    #[test]
    fn sanctions_end_and_are_lifted() {
        let sanction = |seconds| RoomChange { mute: vec![Sanction { user: "eve".into(), seconds }], ..change("") };
        let muted = change_settings(&RoomRow::default(), &sanction(10), 1_000).expect("a server may");
        assert!(is_sanctioned(&muted.muted, "eve", 10_999));
        assert!(!is_sanctioned(&muted.muted, "eve", 11_000));
        assert!(!is_sanctioned(&muted.muted, "bob", 2_000));
        let lifted = change_settings(&muted, &sanction(0), 2_000).expect("a server may");
        assert!(lifted.muted.is_empty());
        let later = change_settings(&muted, &change(""), 20_000).expect("a server may");
        assert!(later.muted.is_empty(), "what is over is forgotten");
    }

    #[test]
    fn slow_mode_spares_moderators() {
        let settings =
            RoomRow { owner: "ann".into(), moderators: vec!["mo".into()], slow_mode_ms: 1_000, ..RoomRow::default() };
        let mut room = Room { settings, ..Room::default() };
        let at = Duration::from_millis;
        assert!(room.may_speak(at(0), "bob"));
        assert!(!room.may_speak(at(999), "bob"));
        assert!(room.may_speak(at(999), "eve"));
        assert!(room.may_speak(at(1_000), "bob"));
        for _ in 0..3 {
            assert!(room.may_speak(at(1_000), "ann") && room.may_speak(at(1_000), "mo"));
        }
    }

    #[test]
    fn history_is_bounded_by_number_and_bytes() {
        let mut room = Room::default();
        let message = |number, size| RoomMessage { number, payload: vec![0; size].into(), ..RoomMessage::default() };
        for number in 1..=9 {
            room.keep(&message(number, 10), 3);
        }
        assert_eq!(room.history.iter().map(|kept| kept.number).collect::<Vec<_>>(), [7, 8, 9]);
        room.keep(&message(10, HISTORY_BYTES_MAX), 3);
        assert_eq!(room.history.len(), 1, "the bytes of one fill it");
        room.keep(&message(11, HISTORY_BYTES_MAX + 1), 3);
        assert_eq!((room.history.len(), room.history_bytes), (0, 0));
    }
}
