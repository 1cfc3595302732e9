//! Live rooms: fan-out at the speed of the wire, and counting.
//!
//! What comes from the owner is encoded once. The room's own task goes round its viewers as long as there is something: at once when the
//! room was quiet, else a round begins at most once within `coalesce`. Each viewer is sent all that came since the task was with him
//! last, so a message waits for one round at most; it costs him one lock and one `write`, and the connection's task is woken only for what
//! the socket did not take. The task pauses after some viewers, so that a room of many holds up no other.
//!
//! Messages in hand are bounded by the owner, which is told when they have gone out ([`RoomTook`]): a publisher that is faster than the
//! wire is refused there.
//!
//! Viewers, likes and gifts are counted here and sent once per interval, per shard one request under a number, and again under the same
//! number until it is answered: the owner takes it once.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use im_proto::ids::{MemberId, room_key, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Body, ClientFrame, Count, Done, Refusal, Refused, RoomCount, RoomCounter, RoomCounts, RoomJoin, RoomJoined,
    RoomKick, RoomLeave, RoomMessage, RoomStats, RoomTook, body, client_frame,
};
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::{Connection, Hub, Token};
use crate::mqtt::Version;
use crate::session::{Answer, Batch, Counter, RoomPart, Sent, Versions, Window};

/// Viewers served before others have their turn.
const VIEWERS_PER_TURN: usize = 64;
/// Bytes sent before others have their turn: they cost more than the calls when each viewer is sent much.
const BYTES_PER_TURN: usize = 256 << 10;
/// Bytes of one room that not every viewer was sent. The owner keeps to less.
const PENDING_BYTES_MAX: usize = 1 << 20;
/// The owner is told at the latest when so many bytes have gone out, a sixteenth of what may be in hand.
const TOLD_BYTES_MAX: u64 = 16 << 10;
/// Different counters of a room in one interval.
const COUNTERS_MAX: usize = 64;
/// Likes and gifts of one room that wait for their acknowledgement.
const COUNT_WAITERS_MAX: usize = 65_536;
/// Rooms of one request.
const ROOMS_PER_COUNTS: usize = 4_096;

/// How rooms are served.
#[derive(Debug, Clone, Copy)]
pub struct RoomsConfig {
    /// Least time between two batches of a room.
    pub coalesce: Duration,
    /// Between two sendings of what was counted.
    pub flush_interval: Duration,
}

impl Default for RoomsConfig {
    fn default() -> Self {
        Self { coalesce: Duration::from_millis(5), flush_interval: Duration::from_secs(1) }
    }
}

/// The live rooms of one process.
#[derive(Debug, Default)]
pub(super) struct Rooms {
    config: RoomsConfig,
    rooms: Mutex<HashMap<Arc<str>, Arc<Room>>>,
    counting: Mutex<Counting>,
    /// Joins asked so far.
    joins: AtomicU64,
}

/// What was counted and is not known to be stored.
#[derive(Debug, Default)]
struct Counting {
    last_number: u64,
    by_shard: HashMap<u32, Unstored>,
}

#[derive(Debug)]
struct Unstored {
    counts: RoomCounts,
    /// By room.
    waiters: Vec<(Arc<str>, Vec<CountWaiter>)>,
    /// It is with the router; otherwise it was refused for now.
    is_asked: bool,
}

/// Somebody who hears when his like or gift is stored.
#[derive(Debug)]
struct CountWaiter {
    connection: Arc<Connection>,
    ticket: u32,
    counter: Counter,
}

#[derive(Debug)]
pub(super) struct Room {
    name: Arc<str>,
    shard: u32,
    state: Mutex<RoomState>,
}

/// Somebody in a room.
#[derive(Debug)]
struct Viewer {
    connection: Arc<Connection>,
    /// Number of the first message (or statistics) that he was not sent.
    next: u64,
}

#[derive(Debug, Default)]
struct RoomState {
    /// By the connection's slot.
    viewers: BTreeMap<u32, Viewer>,
    watchers: BTreeMap<u32, Viewer>,
    /// By part, whether the owner knows (or will be told again) that somebody is in it: who comes now is in at once.
    joined: [bool; 2],
    /// The last join while it has no answer. What is answered to earlier ones is not about who is here now.
    joining: Option<u64>,
    /// The owner did not take what it was told last.
    join_again: bool,
    waiting: Vec<(Arc<Connection>, RoomPart, u32)>,
    /// The owner's number of the last message that came.
    last: u64,

    /// What not every viewer was sent, and the number of its first message, counted here.
    window: Window,
    window_from: u64,
    /// What viewers speak, or spoke since the first of them came: messages are encoded for no other.
    versions: Versions,
    /// For whom what came since the last round counts, and how much.
    in_hand: Option<(MemberId, u64)>,
    /// A task goes round.
    is_sending: bool,

    /// Messages of the window that are not in the history yet (if there is one): who enters is sent those and later ones.
    unshown: Vec<RoomMessage>,
    shown: u64,
    history_max: usize,
    history: VecDeque<RoomMessage>,
    /// `history`, encoded.
    welcome: Option<Arc<Batch>>,
    stats: Option<Arc<Batch>>,
    /// How many statistics there were.
    stats_count: u64,
    stats_waits: bool,
    /// Who is kept out, until when (Unix milliseconds).
    kicked: HashMap<String, i64>,

    counts: BTreeMap<Counter, u64>,
    count_waiters: Vec<CountWaiter>,
    viewers_told: u32,
}

/// What becomes of somebody who enters.
pub(super) enum Entering {
    /// The owner is asked; he hears later.
    Waits,
    /// He is in, and gets this first.
    In(Option<Arc<Batch>>),
    /// He was put out of the room.
    KeptOut,
}

/// One round of the sending task.
#[derive(Debug, PartialEq, Eq)]
struct Round {
    parts: [bool; 2],
    /// At its end everybody was sent the messages before this one.
    through: u64,
    in_hand: Option<(MemberId, u64)>,
}

/// Some viewers of a round, and what they are sent: each the batch of that index.
#[derive(Default)]
struct Turn {
    viewers: Vec<(Arc<Connection>, usize)>,
    /// What is behind a place, up to `end`. The last of them often serves the next turn, too.
    batches: Vec<(u64, Arc<Batch>)>,
    end: u64,
}

impl Turn {
    fn begin(&mut self, end: u64) {
        let last = self.batches.pop().filter(|_| self.end == end);
        self.batches.clear();
        self.batches.extend(last);
        self.end = end;
    }
}

impl Rooms {
    pub(super) fn new(config: RoomsConfig) -> Self {
        Self { config, ..Self::default() }
    }

    fn get(&self, name: &str) -> Option<Arc<Room>> {
        self.rooms.lock().get(name).cloned()
    }
}

impl RoomState {
    fn part(&mut self, part: RoomPart) -> &mut BTreeMap<u32, Viewer> {
        match part {
            RoomPart::Messages => &mut self.viewers,
            RoomPart::Stats => &mut self.watchers,
        }
    }

    fn is_empty(&self) -> bool {
        self.viewers.is_empty() && self.watchers.is_empty()
    }

    /// Nobody is in this part any more.
    fn forget(&mut self, part: RoomPart) {
        self.joined[part as usize] = false;
        match part {
            RoomPart::Messages => {
                (self.history, self.unshown) = (VecDeque::new(), Vec::new());
                self.welcome = None;
                self.versions = Versions::default();
            }
            RoomPart::Stats => self.stats = None,
        }
    }

    /// By part, whether somebody is in it.
    fn occupied(&self) -> [bool; 2] {
        [!self.viewers.is_empty(), !self.watchers.is_empty()]
    }

    fn is_kept_out(&mut self, user: &str) -> bool {
        match self.kicked.get(user) {
            None => false,
            Some(until_ms) if *until_ms > wall_ms() => true,
            Some(_) => {
                self.kicked.remove(user);
                false
            }
        }
    }

    /// What somebody who is in now gets first.
    fn welcome(&mut self, part: RoomPart) -> Option<Arc<Batch>> {
        match part {
            RoomPart::Stats => self.stats.clone(),
            RoomPart::Messages if self.history.is_empty() => None,
            RoomPart::Messages => {
                let (history, versions) = (&self.history, self.versions);
                let encode = || {
                    let mut window = Window::default();
                    history.iter().for_each(|message| window.push(message, versions));
                    Arc::new(window.cut(0))
                };
                Some(self.welcome.get_or_insert_with(encode).clone())
            }
        }
    }

    /// Number of the next message (or statistics).
    fn end(&self, part: RoomPart) -> u64 {
        match part {
            RoomPart::Messages => self.window_from + self.window.len(),
            RoomPart::Stats => self.stats_count,
        }
    }

    /// Where somebody who enters begins: behind what he is welcomed with.
    fn place(&self, part: RoomPart) -> u64 {
        match part {
            RoomPart::Messages => self.shown,
            RoomPart::Stats => self.stats_count,
        }
    }

    /// Puts what was sent to somebody into the history.
    fn show(&mut self) {
        self.shown = self.end(RoomPart::Messages);
        if !self.unshown.is_empty() {
            self.history.extend(self.unshown.drain(..));
            let surplus = self.history.len().saturating_sub(self.history_max);
            self.history.drain(..surplus);
            self.welcome = None;
        }
    }

    /// Somebody who speaks this version is about to enter. If he is the first, what is in the window was not encoded for him: he is
    /// welcomed with it.
    fn speak(&mut self, version: Version) {
        if self.versions.add(version) {
            self.show();
            self.welcome = None;
        }
    }

    /// What is to be sent now; with nothing, the task ends.
    fn begin_round(&mut self) -> Option<Round> {
        let parts = [!self.window.is_empty(), std::mem::take(&mut self.stats_waits)];
        // What came for nobody is told of, too.
        if !parts.contains(&true) && self.in_hand.is_none() {
            self.is_sending = false;
            // Its memory is that of the busiest moment.
            self.window = Window::default();
            return None;
        }
        self.show();
        Some(Round { parts, through: self.shown, in_hand: self.in_hand.take() })
    }

    fn end_round(&mut self, round: &Round) {
        self.window.forget(round.through.saturating_sub(self.window_from));
        self.window_from = round.through;
    }

    /// The next viewers who were not sent everything, from this slot on. Says where to go on.
    fn take_turn(&mut self, part: RoomPart, from: u32, turn: &mut Turn) -> Option<u32> {
        if part == RoomPart::Messages {
            self.show();
        }
        let end = self.end(part);
        turn.begin(end);
        let mut bytes = 0;
        let Self { viewers, watchers, window, window_from, stats, .. } = self;
        let viewers = match part {
            RoomPart::Messages => viewers,
            RoomPart::Stats => watchers,
        };
        for (slot, viewer) in viewers.range_mut(from..).filter(|(_, viewer)| viewer.next < end) {
            let next = std::mem::replace(&mut viewer.next, end);
            // Most of them were sent the same so far.
            let known = turn.batches.iter().position(|(from, _)| *from == next);
            let index = known.unwrap_or_else(|| {
                let batch = match part {
                    RoomPart::Messages => Arc::new(window.cut(next.saturating_sub(*window_from))),
                    RoomPart::Stats => stats.clone().unwrap_or_default(),
                };
                turn.batches.push((next, batch));
                turn.batches.len() - 1
            });
            bytes += turn.batches[index].1.bytes();
            turn.viewers.push((viewer.connection.clone(), index));
            if turn.viewers.len() == VIEWERS_PER_TURN || bytes >= BYTES_PER_TURN {
                return slot.checked_add(1);
            }
        }
        None
    }
}

fn wall_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

fn done() -> Answer {
    Answer::Outcome(Outcome::Done(Done {}))
}

/// The answer to somebody who was put out of the room.
pub(super) fn kept_out() -> Answer {
    let reason = "put out of this room".to_owned();
    Answer::Outcome(Outcome::Refused(Refused { code: Refusal::Sanctioned.into(), reason }))
}

fn stats_batch(stats: &RoomStats) -> Arc<Batch> {
    let (likes, gifts) = Counter::likes_and_gifts(&stats.totals);
    let payload = serde_json::json!({ "viewers": stats.viewers, "likes": likes, "gifts": gifts }).to_string().into();
    let mut window = Window::default();
    window.push_below(&stats.room, "stats", &payload);
    Arc::new(window.cut(0))
}

impl Hub {
    // ---- entering and leaving -----------------------------------------------------------------------------------------

    pub(super) fn enter_room(
        &self,
        name: &Arc<str>,
        part: RoomPart,
        connection: &Arc<Connection>,
        (user, version): (&str, Version),
        ticket: u32,
    ) -> (Arc<str>, Entering) {
        let mut rooms = self.rooms.rooms.lock();
        let room = self.room(&mut rooms, name);
        let mut state = room.state.lock();
        if state.is_kept_out(user) {
            return (room.name.clone(), Entering::KeptOut);
        }
        if part == RoomPart::Messages {
            state.speak(version);
        }
        let viewer = Viewer { connection: connection.clone(), next: state.place(part) };
        let is_first = state.part(part).is_empty();
        state.part(part).insert(connection.slot(), viewer);
        if state.joined[part as usize] {
            return (room.name.clone(), Entering::In(state.welcome(part)));
        }
        state.waiting.push((connection.clone(), part, ticket));
        if is_first || state.joining.is_none() {
            self.request_join(&room, &mut state);
        }
        (room.name.clone(), Entering::Waits)
    }

    fn room(&self, rooms: &mut HashMap<Arc<str>, Arc<Room>>, name: &Arc<str>) -> Arc<Room> {
        let make = || {
            let shard = shard_of(&room_key(name), self.shards());
            Arc::new(Room { name: name.clone(), shard, state: Mutex::default() })
        };
        rooms.entry(name.clone()).or_insert_with(make).clone()
    }

    /// Tells the owner who is here.
    fn request_join(&self, room: &Room, state: &mut RoomState) {
        let viewers = state.viewers.len() as u32;
        state.viewers_told = viewers;
        let (unwatched, last) = (state.watchers.is_empty(), state.last);
        let join = RoomJoin { room: room.name.to_string(), viewers, unwatched, last };
        let number = self.rooms.joins.fetch_add(1, Ordering::Relaxed);
        let mut routing = self.routing.lock();
        let body = Body { body: Some(body::Body::RoomJoin(join)) };
        let is_asked =
            routing.router.request(room.shard, 0, body, Token::RoomJoined(room.name.clone(), number)).is_ok();
        // Without space in the queue it is asked again with the next counts, or by the next one who enters.
        (state.joining, state.join_again) = (is_asked.then_some(number), !is_asked);
        self.send_out(&mut routing);
    }

    pub(super) fn room_joined(self: &Arc<Self>, name: &Arc<str>, number: u64, answer: &Answer) {
        let (joined, refused) = match answer {
            Answer::Outcome(Outcome::RoomJoined(joined)) => (joined.clone(), None),
            Answer::Outcome(Outcome::Refused(refused)) => (RoomJoined::default(), Some(refused.clone())),
            _ => (RoomJoined::default(), None),
        };
        let Some(room) = self.rooms.get(name) else { return };
        let waiting = {
            let mut state = room.state.lock();
            if state.joining.take_if(|last| *last == number).is_none() {
                return;
            }
            state.join_again = refused.is_some();
            if refused.is_none() {
                let occupied = state.occupied();
                let was_joined = std::mem::replace(&mut state.joined, occupied);
                state.history_max = joined.history_max as usize;
                state.kicked = joined.kicked.into_iter().map(|kick| (kick.user, kick.until_ms)).collect();
                if state.joined[0] && !was_joined[0] {
                    state.history = joined.history.iter().map(RoomMessage::detached).collect();
                    state.welcome = None;
                }
                if let Some(stats) = joined.stats.as_ref().filter(|_| state.joined[1]) {
                    state.stats = Some(stats_batch(stats));
                }
            }
            let waiting = std::mem::take(&mut state.waiting);
            waiting.into_iter().map(|(viewer, part, ticket)| (viewer, ticket, state.welcome(part))).collect::<Vec<_>>()
        };
        for (connection, ticket, welcome) in waiting {
            self.with(&connection, |session, now_ms, effects| {
                let answer = match &refused {
                    Some(refused) => Answer::Outcome(Outcome::Refused(refused.clone())),
                    None if room.state.lock().is_kept_out(session.user()) => kept_out(),
                    None => done(),
                };
                let is_in = matches!(answer, Answer::Outcome(Outcome::Done(_)));
                session.on_answer(now_ms, ticket, answer, effects);
                if let Some(welcome) = welcome.filter(|_| is_in) {
                    session.on_room_batch(&welcome, |_| 0);
                }
            });
        }
    }

    pub(super) fn leave_room(&self, name: &str, part: RoomPart, connection: &Arc<Connection>) {
        let mut rooms = self.rooms.rooms.lock();
        let Some(room) = rooms.get(name).cloned() else { return };
        let mut state = room.state.lock();
        let slot = connection.slot();
        let was_in = state.part(part).get(&slot).is_some_and(|viewer| Arc::ptr_eq(&viewer.connection, connection));
        if was_in {
            state.part(part).remove(&slot);
        }
        state.waiting.retain(|(viewer, waits_for, _)| !(Arc::ptr_eq(viewer, connection) && *waits_for == part));
        if was_in && state.part(part).is_empty() {
            state.forget(part);
            if state.is_empty() {
                (state.joining, state.join_again) = (None, false);
                let body = Body { body: Some(body::Body::RoomLeave(RoomLeave { room: name.to_owned() })) };
                let mut routing = self.routing.lock();
                // An owner that never hears of it stops when the link ends.
                let _ = routing.router.request(room.shard, 0, body, Token::Nobody);
                self.send_out(&mut routing);
            } else {
                self.request_join(&room, &mut state);
            }
        }
        // What was counted in it still has to be sent.
        if state.is_empty() && state.counts.is_empty() {
            rooms.remove(name);
        }
    }

    /// A shard has a new owner or a new link: it is told which rooms this gateway is in.
    pub(super) fn announce_rooms(&self, shard: u32) {
        for room in self.rooms.rooms.lock().values().filter(|room| room.shard == shard) {
            let mut state = room.state.lock();
            if !state.is_empty() {
                self.request_join(room, &mut state);
            }
        }
    }

    // ---- fan-out ------------------------------------------------------------------------------------------------------

    /// A message from the owner.
    pub(super) fn on_room_message(self: &Arc<Self>, owner: &MemberId, message: RoomMessage) {
        let Some(room) = self.rooms.get(&message.room) else { return };
        let mut state = room.state.lock();
        let bytes = message.bytes_in_hand();
        match &mut state.in_hand {
            Some((from, in_hand)) if from == owner => *in_hand += bytes,
            in_hand => *in_hand = Some((owner.clone(), bytes)),
        }
        state.last = state.last.max(message.number);
        if state.window.bytes() >= PENDING_BYTES_MAX {
            self.shared.metrics.room_dropped.inc_by(state.viewers.len() as u64);
        } else if !state.viewers.is_empty() {
            let versions = state.versions;
            state.window.push(&message, versions);
            if state.history_max > 0 {
                state.unshown.push(message.detached());
            }
        }
        self.start_sending(&room, &mut state);
    }

    /// Statistics of a room.
    pub(super) fn on_room_stats(self: &Arc<Self>, stats: &RoomStats) {
        let Some(room) = self.rooms.get(&stats.room) else { return };
        let mut state = room.state.lock();
        // The first watcher gets them with the answer to the join that he causes.
        if state.watchers.is_empty() {
            return;
        }
        state.stats = Some(stats_batch(stats));
        state.stats_count += 1;
        state.stats_waits = true;
        self.start_sending(&room, &mut state);
    }

    fn start_sending(self: &Arc<Self>, room: &Arc<Room>, state: &mut RoomState) {
        if !std::mem::replace(&mut state.is_sending, true) {
            tokio::spawn(self.clone().go_round(room.clone()));
        }
    }

    /// Goes round a room's viewers until there is nothing for the time of a round.
    async fn go_round(self: Arc<Self>, room: Arc<Room>) {
        let mut gone_out: Option<(MemberId, u64)> = None;
        loop {
            let began = Instant::now();
            let Some(round) = room.state.lock().begin_round() else { break };
            for (part, is_due) in [RoomPart::Messages, RoomPart::Stats].into_iter().zip(round.parts) {
                if is_due {
                    self.send_to_all(&room, part).await;
                }
            }
            room.state.lock().end_round(&round);
            if let Some((owner, bytes)) = round.in_hand {
                match &mut gone_out {
                    Some((told, sum)) if *told == owner => *sum += bytes,
                    _ => {
                        self.tell_gone_out(&room, gone_out.take());
                        gone_out = Some((owner, bytes));
                    }
                }
            }
            if gone_out.as_ref().is_some_and(|(_, bytes)| *bytes >= TOLD_BYTES_MAX) {
                self.tell_gone_out(&room, gone_out.take());
            }
            sleep_until(began + self.rooms.config.coalesce).await;
        }
        self.tell_gone_out(&room, gone_out);
    }

    /// Tells the owner of a room how many bytes of its messages have gone out.
    fn tell_gone_out(&self, room: &Room, gone_out: Option<(MemberId, u64)>) {
        if let (Some((owner, bytes)), Some(pool)) = (gone_out, self.pool.get()) {
            let took = RoomTook { room: room.name.to_string(), bytes };
            pool.send(&owner, [ClientFrame { frame: Some(client_frame::Frame::RoomTook(took)) }]);
        }
    }

    /// Sends everybody what he was not sent, in turns; what became of it is counted after each.
    async fn send_to_all(&self, room: &Room, part: RoomPart) {
        let mut turn = Turn::default();
        let mut next = Some(0);
        while let Some(from) = next {
            next = room.state.lock().take_turn(part, from, &mut turn);
            let mut sent = Sent::default();
            for (connection, index) in turn.viewers.drain(..) {
                let one = connection.send_batch(&turn.batches[index].1);
                sent.delivered += one.delivered;
                sent.lost += one.lost;
            }
            self.shared.metrics.delivered.inc_by(sent.delivered);
            self.shared.metrics.room_dropped.inc_by(sent.lost);
            if next.is_some() {
                tokio::task::yield_now().await;
            }
        }
    }

    // ---- moderation ---------------------------------------------------------------------------------------------------

    /// The owner keeps somebody out, or lets him in again.
    pub(super) fn on_room_kick(self: &Arc<Self>, kick: &RoomKick) {
        let Some(room) = self.rooms.get(&kick.room) else { return };
        if kick.until_ms <= wall_ms() {
            room.state.lock().kicked.remove(&kick.user);
            return;
        }
        {
            let mut state = room.state.lock();
            let now_ms = wall_ms();
            state.kicked.retain(|_, until_ms| *until_ms > now_ms);
            state.kicked.insert(kick.user.clone(), kick.until_ms);
        }
        for connection in self.connections_of(&kick.user) {
            self.with(&connection, |session, _, effects| session.on_room_kick(&kick.room, effects));
        }
    }

    // ---- counting -----------------------------------------------------------------------------------------------------

    /// Counts something in a room. Answered under the ticket once it is stored; the answer is returned if it is known at once.
    pub(super) fn count_in_room(
        &self,
        name: &Arc<str>,
        counter: Counter,
        count: u64,
        user: &str,
        waiter: Option<(&Arc<Connection>, u32)>,
    ) -> Option<(u32, Answer)> {
        let mut rooms = self.rooms.rooms.lock();
        let room = self.room(&mut rooms, name);
        let mut state = room.state.lock();
        drop(rooms);
        if state.is_kept_out(user) {
            self.shared.metrics.room_counts_refused.inc();
            return waiter.map(|(_, ticket)| (ticket, kept_out()));
        }
        // Gifts that somebody invented must not keep likes out.
        let has_space =
            counter == Counter::Like || state.counts.len() < COUNTERS_MAX || state.counts.contains_key(&counter);
        if !has_space || state.count_waiters.len() >= COUNT_WAITERS_MAX {
            self.shared.metrics.room_counts_refused.inc();
            return waiter.map(|(_, ticket)| (ticket, Answer::Full));
        }
        let waiter = waiter.map(|(connection, ticket)| {
            let (connection, counter) = (connection.clone(), counter.clone());
            CountWaiter { connection, ticket, counter }
        });
        state.count_waiters.extend(waiter);
        *state.counts.entry(counter).or_default() += count;
        None
    }

    /// Sends what was counted, once per interval; runs for ever.
    pub async fn keep_counting(self: Arc<Self>) {
        let mut ticks = interval(self.rooms.config.flush_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.send_counts();
        }
    }

    /// Sends what was counted.
    pub fn send_counts(&self) {
        let mut counting = self.rooms.counting.lock();
        self.collect_counts(&mut counting);
        let mut routing = self.routing.lock();
        for (shard, unstored) in counting.by_shard.iter_mut().filter(|(_, unstored)| !unstored.is_asked) {
            let body = Body { body: Some(body::Body::RoomCounts(unstored.counts.clone())) };
            // Without space in the queue it is tried again at the next interval.
            unstored.is_asked = routing.router.request(*shard, 0, body, Token::RoomCounts(*shard)).is_ok();
        }
        self.send_out(&mut routing);
    }

    /// Takes what the rooms counted, of shards whose last counts are stored.
    fn collect_counts(&self, counting: &mut Counting) {
        let Counting { last_number, by_shard } = counting;
        let mut fresh: HashMap<u32, Unstored> = HashMap::new();
        self.rooms.rooms.lock().retain(|name, room| {
            let mut state = room.state.lock();
            if state.join_again && !state.is_empty() {
                self.request_join(room, &mut state);
            }
            let viewers = state.viewers.len() as u32;
            let is_told = state.counts.is_empty() && (viewers == state.viewers_told || state.joined == [false; 2]);
            if is_told || by_shard.contains_key(&room.shard) {
                return !(state.is_empty() && state.counts.is_empty());
            }
            let unstored = fresh.entry(room.shard).or_insert_with(|| {
                *last_number += 1;
                let counts = RoomCounts { number: *last_number, rooms: Vec::new() };
                Unstored { counts, waiters: Vec::new(), is_asked: false }
            });
            if unstored.counts.rooms.len() >= ROOMS_PER_COUNTS {
                return true;
            }
            state.viewers_told = viewers;
            let counted = std::mem::take(&mut state.counts);
            let counted = counted.into_iter().map(|(counter, count)| Count { name: counter.name(), count });
            let counted = counted.collect();
            unstored.counts.rooms.push(RoomCount { room: name.to_string(), viewers, counted });
            let waiters = std::mem::take(&mut state.count_waiters);
            if !waiters.is_empty() {
                unstored.waiters.push((name.clone(), waiters));
            }
            !state.is_empty()
        });
        by_shard.extend(fresh);
    }

    /// The owner answered counts of a shard.
    pub(super) fn counts_answered(self: &Arc<Self>, shard: u32, answer: &Answer) {
        let refused = match answer {
            Answer::Outcome(Outcome::Refused(refused)) => Some(refused.clone()),
            _ => None,
        };
        let is_for_now = |code| matches!(code, Refusal::Busy | Refusal::StoreUnavailable);
        let mut counting = self.rooms.counting.lock();
        if refused.as_ref().is_some_and(|refused| is_for_now(refused.code())) {
            if let Some(unstored) = counting.by_shard.get_mut(&shard) {
                unstored.is_asked = false;
            }
            return;
        }
        let Some(unstored) = counting.by_shard.remove(&shard) else { return };
        drop(counting);
        if let Some(refused) = &refused {
            tracing::error!(shard, reason = refused.reason, "counts of rooms are refused for good");
            self.shared.metrics.room_counts_refused.inc();
        }
        let uncounted: &[RoomCounter] = match answer {
            Answer::Outcome(Outcome::RoomCounted(counted)) => &counted.refused,
            _ => &[],
        };
        self.shared.metrics.room_counts_refused.inc_by(uncounted.len() as u64);
        for (room, waiters) in unstored.waiters {
            let uncounted: HashSet<&str> =
                uncounted.iter().filter(|counter| *counter.room == *room).map(|counter| &*counter.name).collect();
            for CountWaiter { connection, ticket, counter } in waiters {
                let answer = match &refused {
                    Some(refused) => Answer::Outcome(Outcome::Refused(refused.clone())),
                    // The room counts as many different gifts as it can.
                    None if !uncounted.is_empty() && uncounted.contains(&*counter.name()) => Answer::Full,
                    None => done(),
                };
                self.with(&connection, |session, now_ms, effects| session.on_answer(now_ms, ticket, answer, effects));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(number: u64) -> RoomMessage {
        RoomMessage { room: "stage".into(), number, payload: "la".into(), ..RoomMessage::default() }
    }

    #[test]
    fn what_a_round_sends_is_forgotten_at_its_end_and_is_history_from_its_begin() {
        let mut state = RoomState { history_max: 2, is_sending: true, ..RoomState::default() };
        let push = |state: &mut RoomState, number| {
            state.window.push(&message(number), Versions::BOTH);
            state.unshown.push(message(number));
        };
        (1..=3).for_each(|number| push(&mut state, number));
        assert!(state.welcome(RoomPart::Messages).is_none(), "what is still to be sent is no history");
        assert_eq!(state.place(RoomPart::Messages), 0);
        let round = state.begin_round().expect("three messages");
        assert_eq!((round.parts, round.through), ([true, false], 3));
        assert_eq!(state.welcome(RoomPart::Messages).map(|batch| batch.len()), Some(2));
        assert_eq!(state.place(RoomPart::Messages), 3, "he was welcomed with them");

        push(&mut state, 4);
        state.end_round(&round);
        assert_eq!(
            (state.window.len(), state.window.cut(0).len()),
            (1, 1),
            "who was before it in the round waits for it"
        );
        let round = state.begin_round().expect("one message");
        state.end_round(&round);
        assert!(state.begin_round().is_none());
        assert!(!state.is_sending, "the task ends when there is nothing");
    }

    #[test]
    fn who_brings_another_version_begins_behind_what_was_not_encoded_in_it() {
        let mut state = RoomState { history_max: 2, ..RoomState::default() };
        let push = |state: &mut RoomState, number| {
            let versions = state.versions;
            state.window.push(&message(number), versions);
            state.unshown.push(message(number));
        };
        state.speak(Version::V5);
        (1..=3).for_each(|number| push(&mut state, number));
        state.speak(Version::V311);
        assert_eq!(
            (state.place(RoomPart::Messages), state.window.cut(0).len()),
            (3, 3),
            "others still have to get them"
        );
        assert_eq!(state.welcome(RoomPart::Messages).map(|batch| batch.len()), Some(2));
        state.speak(Version::V311);
        push(&mut state, 4);
        assert_eq!(state.place(RoomPart::Messages), 3, "the next one begins before what the first was not sent");
        assert_eq!(state.window.cut(3).len(), 1);
    }

    #[test]
    fn a_batch_serves_the_next_turn_while_nothing_comes() {
        let batch = || (0, Arc::<Batch>::default());
        let mut turn = Turn { batches: vec![batch(), batch()], end: 7, ..Turn::default() };
        let last = turn.batches[1].1.clone();
        turn.begin(7);
        assert!(turn.batches.len() == 1 && Arc::ptr_eq(&turn.batches[0].1, &last));
        turn.begin(8);
        assert!(turn.batches.is_empty(), "it ends before what came");
    }

    #[test]
    fn the_owner_hears_of_what_came_for_nobody() {
        let owner = MemberId::new("business-0", 1).expect("a good name");
        let mut state = RoomState { in_hand: Some((owner, 100)), ..RoomState::default() };
        let round = state.begin_round().expect("there is something to tell");
        assert_eq!((round.parts, round.in_hand.as_ref().map(|(_, bytes)| *bytes)), ([false, false], Some(100)));
        state.end_round(&round);
        assert!(state.begin_round().is_none());
    }

    #[test]
    fn statistics_go_out_once() {
        let mut state = RoomState { stats_waits: true, stats: Some(Arc::default()), ..RoomState::default() };
        let round = state.begin_round().expect("statistics");
        assert_eq!(round.parts, [false, true]);
        state.end_round(&round);
        assert!(state.begin_round().is_none());
    }

    #[test]
    fn sanctions_end() {
        let mut state = RoomState::default();
        state.kicked.insert("eve".into(), wall_ms() + 60_000);
        state.kicked.insert("bob".into(), wall_ms() - 1);
        assert!(state.is_kept_out("eve"));
        assert!(!state.is_kept_out("bob") && !state.is_kept_out("ann"));
        assert_eq!(state.kicked.len(), 1, "what is over is forgotten");
    }
}
