//! The coordinator against a simulated world in virtual time: a store that compares and sets, members that act on
//! commands, messages that get lost, late or doubled, crashes, restarts, stopped processes, members cut off from the
//! store, and new leaders with an old map. A failing seed replays.

use super::map::{Ownership, Shard, ShardMap};
use super::moves::{Action, Coordinator, Event, Timing};
use super::planner::plan;
use im_crds::{Rebalance, TimeSpan};
use im_proto::ids::MemberId;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

const SHARDS: u32 = 24;
const NAMES: [&str; 5] = ["business-0", "business-1", "business-2", "business-3", "business-4"];
const STEP: Duration = Duration::from_millis(50);
const FAULTS_UNTIL: Duration = Duration::from_secs(60);
/// Hold (15 s), silence (3 s), one failed acquire after another, cooldown: with reserve.
const QUIET_UNTIL: Duration = Duration::from_secs(120);

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A command as it travels: with the term of the leader that sent it.
#[derive(Clone, Debug)]
enum Message {
    Up(Event),
    Down { to: MemberId, term: u64, action: Action },
}

struct Member {
    id: MemberId,
    held: BTreeMap<Shard, u64>,
    term: u64,
    stopped_until: Duration,
    store_away_until: Duration,
    inbox: Vec<(u64, Action)>,
    leaving: bool,
}

struct World {
    random: Random,
    now: Duration,
    rows: Vec<Ownership>,
    /// Every state that a row ever had.
    history: HashSet<(Shard, Ownership)>,
    members: BTreeMap<&'static str, Option<Member>>,
    coordinator: Coordinator,
    /// Virtual time at which the present leader started.
    leader_since: Duration,
    stored_map: ShardMap,
    network: Vec<(Duration, Message)>,
    /// Shards that the present plan has asked to release.
    released_by_plan: BTreeSet<Shard>,
    moves_begun: usize,
    moves_done: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let map = ShardMap::new(SHARDS);
        let mut world = Self {
            random: Random(seed),
            now: Duration::ZERO,
            rows: vec![Ownership::default(); SHARDS as usize],
            history: (0..SHARDS).map(|shard| (shard, Ownership::default())).collect(),
            members: NAMES.iter().map(|name| (*name, None)).collect(),
            coordinator: Self::leader(map.clone()),
            leader_since: Duration::ZERO,
            stored_map: map,
            network: Vec::new(),
            released_by_plan: BTreeSet::new(),
            moves_begun: 0,
            moves_done: 0,
        };
        for name in &NAMES[..3] {
            world.start(name);
        }
        world
    }

    fn leader(map: ShardMap) -> Coordinator {
        let rebalance = Rebalance { moves_in_flight: 6, cooldown: TimeSpan::from_secs(2), ..Rebalance::default() };
        Coordinator::new(Timing::default(), rebalance, map, Duration::ZERO)
    }

    fn faulty(&self) -> bool {
        self.now < FAULTS_UNTIL
    }

    fn start(&mut self, name: &'static str) {
        let id = MemberId::new(name, self.random.next()).expect("a good name");
        let member = Member {
            id: id.clone(),
            held: BTreeMap::new(),
            term: 0,
            stopped_until: Duration::ZERO,
            store_away_until: Duration::ZERO,
            inbox: Vec::new(),
            leaving: false,
        };
        self.members.insert(name, Some(member));
        self.send(Message::Up(Event::MemberJoined { member: id }));
    }

    fn send(&mut self, message: Message) {
        let faulty = self.faulty();
        let copies = match faulty {
            true if self.random.one_in(8) => 0,
            true if self.random.one_in(8) => 2,
            _ => 1,
        };
        // Who dials may wait to be accepted.
        let on_time = if matches!(message, Message::Up(Event::MemberJoined { .. })) { 3 } else { 10 };
        for _ in 0..copies {
            let delay_ms = if faulty && self.random.one_in(on_time) { 3_000 } else { 60 };
            let delay = Duration::from_millis(self.random.below(delay_ms));
            self.network.push((self.now + delay, message.clone()));
        }
    }

    /// Changes a row if it is the expected one, as the store does; else returns the row found.
    fn compare_and_set(&mut self, shard: Shard, expected: &Ownership, new: Ownership) -> Result<(), Ownership> {
        let row = &mut self.rows[shard as usize];
        if row != expected {
            return Err(row.clone());
        }
        *row = new.clone();
        assert!(self.history.insert((shard, new)), "a row state came twice: two writers in one epoch");
        Ok(())
    }

    fn faults(&mut self) {
        if !self.random.one_in(20) {
            return;
        }
        let name = NAMES[self.random.below(NAMES.len() as u64) as usize];
        let for_a_while = self.now + Duration::from_millis(500 + self.random.below(8_000));
        match self.random.below(7) {
            0 | 1 => {
                if let Some(member) = self.members.insert(name, None).flatten() {
                    let confirmed_dead = self.random.one_in(2);
                    self.send(Message::Up(Event::MemberGone { member: member.id, confirmed_dead }));
                }
            }
            2 | 3 if self.members[name].is_none() => self.start(name),
            4 => {
                if let Some(Some(member)) = self.members.get_mut(name) {
                    member.stopped_until = for_a_while;
                }
            }
            5 => {
                if let Some(Some(member)) = self.members.get_mut(name) {
                    member.store_away_until = for_a_while;
                }
            }
            6 => {
                let Some(Some(member)) = self.members.get_mut(name) else { return };
                member.leaving = !member.leaving;
            }
            _ => {}
        }
        if self.random.one_in(12) {
            self.coordinator = Self::leader(self.stored_map.clone());
            self.leader_since = self.now;
            self.released_by_plan.clear();
        }
    }

    /// What a member's process does with one command.
    fn obey(&mut self, name: &'static str, term: u64, action: Action) {
        let Some(Some(member)) = self.members.get_mut(name) else { return };
        if term < member.term || self.now < member.store_away_until {
            return;
        }
        member.term = term;
        let me = member.id.clone();
        let holds = |shard: Shard| member.held.get(&shard).copied();
        match action {
            Action::Release { shard, epoch, .. } if holds(shard) == Some(epoch) => {
                member.held.remove(&shard);
                let mine = Ownership { epoch, owner: Some(me.clone()) };
                if self.compare_and_set(shard, &mine, Ownership { epoch, owner: None }).is_ok() {
                    self.send(Message::Up(Event::Released { shard, epoch, by: me }));
                }
            }
            Action::CancelRelease { shard, epoch, .. } if holds(shard).is_none() => {
                self.acquire(name, shard, Ownership { epoch, owner: None });
            }
            Action::Acquire { shard, expected, .. } => self.acquire(name, shard, expected),
            _ => {}
        }
    }

    fn acquire(&mut self, name: &'static str, shard: Shard, expected: Ownership) {
        let Some(Some(member)) = self.members.get(name) else { return };
        let by = member.id.clone();
        let epoch = expected.epoch + 1;
        let event = match self.compare_and_set(shard, &expected, Ownership { epoch, owner: Some(by.clone()) }) {
            Ok(()) => {
                if let Some(Some(member)) = self.members.get_mut(name) {
                    member.held.insert(shard, epoch);
                }
                Event::Acquired { shard, epoch, by }
            }
            Err(row) => Event::AcquireLost { shard, row, by },
        };
        self.send(Message::Up(event));
    }

    fn member_steps(&mut self) {
        let known = self.coordinator.snapshot(self.now - self.leader_since).members;
        for name in NAMES {
            let Some(Some(member)) = self.members.get_mut(name) else { continue };
            if self.now < member.stopped_until {
                continue;
            }
            let store_ok = self.now >= member.store_away_until;
            for (term, action) in std::mem::take(&mut member.inbox) {
                self.obey(name, term, action);
            }
            let Some(Some(member)) = self.members.get_mut(name) else { continue };
            if self.now.as_millis().is_multiple_of(500) {
                if store_ok {
                    // The check against the store: what is fenced is let go.
                    let rows = &self.rows;
                    let me = &member.id;
                    member.held.retain(|shard, epoch| {
                        rows[*shard as usize] == Ownership { epoch: *epoch, owner: Some(me.clone()) }
                    });
                }
                let heartbeat = Event::Heartbeat {
                    member: member.id.clone(),
                    held: member.held.iter().map(|(shard, epoch)| (*shard, *epoch)).collect(),
                    loads: member.held.keys().map(|shard| (*shard, f64::from(*shard % 5) * 10.0)).collect(),
                    store_ok,
                    term: member.term,
                };
                let leaving = Event::Leaving { member: member.id.clone(), leaving: member.leaving };
                if !known.contains_key(&member.id) {
                    // A leader that does not know it has closed its stream, or has none of it yet: it dials.
                    let joined = Event::MemberJoined { member: member.id.clone() };
                    self.send(Message::Up(joined));
                }
                self.send(Message::Up(heartbeat));
                self.send(Message::Up(leaving));
            }
        }
    }

    fn tell_leader(&mut self, event: Event) {
        let now = self.now - self.leader_since;
        if matches!(event, Event::NewPlan(_)) {
            self.released_by_plan.clear();
        }
        if matches!(event, Event::Acquired { .. }) {
            self.moves_done += 1;
        }
        let before = self.coordinator.map().clone();
        let actions = self.coordinator.handle(now, event);
        for (shard, (old, new)) in before.rows().iter().zip(self.coordinator.map().rows()).enumerate() {
            assert!(old == new || new.is_newer_than(old), "shard {shard} went back from {old:?} to {new:?}");
            assert!(self.history.contains(&(shard as Shard, new.clone())), "{new:?} was never a row of shard {shard}");
        }
        for action in actions {
            let term = self.coordinator.version().term;
            let to = match &action {
                Action::Release { by, shard, .. } => {
                    assert!(self.released_by_plan.insert(*shard), "shard {shard} moved twice within a plan");
                    self.moves_begun += 1;
                    by.clone()
                }
                Action::CancelRelease { by, .. } | Action::Acquire { by, .. } => by.clone(),
                Action::MapChanged => {
                    // Written at most once a second: a new leader starts from an old one.
                    if self.random.one_in(4) || !self.faulty() {
                        self.stored_map = self.coordinator.map().clone();
                    }
                    continue;
                }
                Action::Outranked { term } => {
                    self.coordinator.begin_term(*term);
                    continue;
                }
            };
            self.send(Message::Down { to, term, action });
        }
    }

    fn step(&mut self) {
        self.now += STEP;
        if self.faulty() {
            self.faults();
        } else if self.now == FAULTS_UNTIL {
            for member in self.members.values_mut().flatten() {
                (member.stopped_until, member.store_away_until) = (self.now, self.now);
            }
            if self.members.values().all(Option::is_none) {
                self.start(NAMES[0]);
            }
        }
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.network).into_iter().partition(|(at, _)| *at <= self.now);
        self.network = later;
        for (_, message) in due {
            match message {
                Message::Up(event) => self.tell_leader(event),
                Message::Down { to, term, action } => {
                    let member = self.members.values_mut().flatten().find(|member| member.id == to);
                    if let Some(member) = member {
                        member.inbox.push((term, action));
                    }
                }
            }
        }
        self.member_steps();
        if self.now.as_millis().is_multiple_of(100) {
            self.tell_leader(Event::Tick);
        }
        if self.now.as_millis().is_multiple_of(1_000)
            && let Some(input) = self.coordinator.plan_input(self.now - self.leader_since)
        {
            let proposed = plan(&input);
            let hash = proposed.hash();
            let approved = proposed.approve(hash).expect("its own hash");
            // Shards under way are pinned, so the plan never speaks of a row that the map does not have.
            let committed = approved.commit(self.coordinator.map()).expect("planned from this very map");
            if !committed.moves().is_empty() {
                self.tell_leader(Event::NewPlan(committed));
            }
        }
    }

    fn check_settled(&self) {
        let live: BTreeMap<&MemberId, &Member> = self.members.values().flatten().map(|m| (&m.id, m)).collect();
        let staying = live.values().any(|member| !member.leaving);
        for (shard, row) in self.rows.iter().enumerate() {
            let shard = shard as Shard;
            let owner = row.owner.as_ref().and_then(|owner| live.get(owner));
            let owner = owner.unwrap_or_else(|| panic!("shard {shard} has no live owner: {row:?}"));
            assert_eq!(owner.held.get(&shard), Some(&row.epoch), "the owner of shard {shard} does not know");
            assert!(!(staying && owner.leaving), "shard {shard} is still with a member that leaves");
        }
        assert_eq!(self.coordinator.map().rows(), self.rows.as_slice());
        let snapshot = self.coordinator.snapshot(self.now - self.leader_since);
        assert!(snapshot.moving.is_empty() && snapshot.queued == 0, "stuck: {snapshot:#?}");
        assert_eq!((snapshot.unowned, snapshot.degraded), (0, false));
    }
}

fn run(seed: u64) -> World {
    let mut world = World::new(seed);
    while world.now < QUIET_UNTIL {
        world.step();
    }
    world.check_settled();
    world
}

#[test]
fn the_world_is_eventful() {
    let (begun, done) = (0..20).map(run).fold((0, 0), |(b, d), world| (b + world.moves_begun, d + world.moves_done));
    assert!(begun > 200 && done > 500, "{begun} moves begun, {done} shards acquired: the test tests nothing");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_every_shard_finds_a_live_owner(seed in any::<u64>()) {
        run(seed);
    }
}
