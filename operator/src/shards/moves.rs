//! How a shard gets from one owner to the next.
//!
//! [`Coordinator`] is the state machine: it hears heartbeats and results, and says who should release, acquire, or take
//! back. It never *decides* who owns a shard, the store does, by compare-and-set on the fencing row; the coordinator's map
//! is what it last heard of the rows. So every event may be lost, late or doubled: a wrong belief costs one failed acquire,
//! whose answer carries the true row.
//!
//! A shard is in one of four steps, each but `Rest` with its own deadline and a way back:
//!
//! ```text
//!             planned move                  released, owner lost,
//!                                           or deadline and no longer claimed
//!   Rest ───────────────────▶ Releasing ───────────────────────────────▶ Acquiring
//!    ▲ │                          │ deadline and still claimed,              │
//!    │ │                          ▼ or the target is gone                    │
//!    │ │                      TakingBack                                     │
//!    │ │   any row of a higher epoch, or the deadline                        │
//!    ├─┼──────────────────────────┘                                          │
//!    │ └── nobody's, or the owner is lost: place it ────────────────────────▶│
//!    └── acquired by whomever; deadline or target gone: place it anew ◀──────┘
//! ```

use super::map::{Ownership, Shard, ShardMap, Version};
use super::planner::{Committed, Move, Placement, Plan, PlanInput, PlanMember, PlanShard, weight};
use im_crds::Rebalance;
use im_proto::ids::MemberId;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

/// Deadlines and waiting times. The defaults are those of the design.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// A new leader only listens for that long.
    pub hearing: Duration,
    /// A shard that nobody claims, and a member that says nothing, for that long is lost.
    pub lost_after: Duration,
    /// A member that says nothing for that long gets nothing new; it counts when many fall silent at once.
    pub suspect_after: Duration,
    /// When over half fall silent at once, nothing is taken from them for at most that long.
    pub hold_max: Duration,
    /// From Release to Released.
    pub release: Duration,
    /// From CancelRelease to a claim.
    pub take_back: Duration,
    /// From Acquire to its result.
    pub acquire: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            hearing: Duration::from_secs(3),
            lost_after: Duration::from_secs(3),
            suspect_after: Duration::from_secs(2),
            hold_max: Duration::from_secs(15),
            release: Duration::from_secs(2),
            take_back: Duration::from_secs(2),
            acquire: Duration::from_secs(2),
        }
    }
}

/// What the coordinator hears. A member id names one process start, so whatever is late can be told from what is new.
#[derive(Clone, Debug)]
pub enum Event {
    /// A member dialled in. Other processes of its name count as dead.
    MemberJoined {
        /// Who.
        member: MemberId,
    },
    /// A member's connection ended. Unconfirmed it means little; silence decides.
    MemberGone {
        /// Who.
        member: MemberId,
        /// Its process is known to have ended.
        confirmed_dead: bool,
    },
    /// A member is to be emptied, or no longer.
    Leaving {
        /// Who.
        member: MemberId,
        /// Whether it leaves.
        leaving: bool,
    },
    /// A member's data path says what it holds.
    Heartbeat {
        /// Who.
        member: MemberId,
        /// Every shard it holds, with the epoch.
        held: Vec<(Shard, u64)>,
        /// Measured load per second of shards it holds; others keep what was last heard.
        loads: Vec<(Shard, f64)>,
        /// The store answers it.
        store_ok: bool,
        /// The highest term it knows.
        term: u64,
    },
    /// A member gave a shard up: the row is (epoch, none).
    Released {
        /// The shard.
        shard: Shard,
        /// The epoch that ended.
        epoch: u64,
        /// Who held it.
        by: MemberId,
    },
    /// A member's acquire won: the row is (epoch, by).
    Acquired {
        /// The shard.
        shard: Shard,
        /// The new epoch.
        epoch: u64,
        /// Who holds it.
        by: MemberId,
    },
    /// A member's acquire lost.
    AcquireLost {
        /// The shard.
        shard: Shard,
        /// The row that it found.
        row: Ownership,
        /// Whose acquire.
        by: MemberId,
    },
    /// A plan to run. What an earlier plan has not begun yet is dropped.
    NewPlan(Plan<Committed>),
    /// Time passes. At least every 250 ms.
    Tick,
}

/// What is to be done. Every command carries the term (see [`Coordinator::version`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell the owner to finish what is open, send new requests to `to`, and release the row.
    Release {
        /// Present owner.
        by: MemberId,
        /// The shard.
        shard: Shard,
        /// Present epoch.
        epoch: u64,
        /// Owner to be.
        to: MemberId,
    },
    /// Tell the owner to go on, by acquiring the next epoch if it had begun to release.
    CancelRelease {
        /// Present owner.
        by: MemberId,
        /// The shard.
        shard: Shard,
        /// The epoch that it was to release.
        epoch: u64,
    },
    /// Tell a member to acquire a shard by compare-and-set.
    Acquire {
        /// Owner to be.
        by: MemberId,
        /// The shard.
        shard: Shard,
        /// The row that it has to find.
        expected: Ownership,
    },
    /// The map changed: publish it.
    MapChanged,
    /// A member has heard a higher term: somebody else leads. Stop, or begin a term above it
    /// ([`Coordinator::begin_term`]).
    Outranked {
        /// The term heard.
        term: u64,
    },
}

/// Where a shard is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Rest,
    Releasing { to: MemberId, since: Duration },
    TakingBack { until: Duration },
    Acquiring { by: MemberId, expected: Ownership, until: Duration },
}

#[derive(Clone, Debug)]
struct Slot {
    step: Step,
    /// When the row's owner last claimed it, at the row's epoch.
    claimed_at: Duration,
    moved_at: Option<Duration>,
    load: f64,
    /// Who did not answer the last acquire: others first.
    avoid: Option<MemberId>,
}

#[derive(Clone, Debug)]
struct Member {
    heard_at: Duration,
    store_ok: bool,
    leaving: bool,
    /// Its silence was taken for its end.
    given_up: bool,
}

/// Why a process counts as dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// Its end was seen.
    Confirmed,
    /// Another process of its name joined. If it joins once more, then that one came before it and was only heard later.
    Succeeded,
}

/// Dead processes that are remembered, so that their late messages don't revive them.
const DEAD_REMEMBERED_MAX: usize = 1_024;
/// A member that has been silent for that long and owns nothing is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// The map, the members, and every shard's step. Time is the time since the coordinator's start.
#[derive(Clone, Debug)]
pub struct Coordinator {
    timing: Timing,
    rebalance: Rebalance,
    idle_load: f64,
    map: ShardMap,
    slots: Vec<Slot>,
    members: BTreeMap<MemberId, Member>,
    /// Processes that count as dead, and the order in which they came to.
    dead: HashMap<MemberId, Death>,
    dead_order: VecDeque<MemberId>,
    queue: VecDeque<Move>,
    in_flight: usize,
    hearing_until: Duration,
    hold_since: Option<Duration>,
    /// The hold has lasted its maximum: silence counts again until the members are back.
    hold_spent: bool,
    /// Planned moves wait; see [`Coordinator::hold_planned`].
    planned_wait: bool,
    map_changed: bool,
}

/// What a shard costs without traffic, in messages per second: it keeps the number of shards level when there is no load.
pub const IDLE_LOAD: f64 = 0.1;
/// Members report averages that decay with a time constant of 10 s, which scatter like counts over 20 s; but a message
/// counts about twice in its shard, when it is stored and when it is with its recipients, which halves that.
const LOAD_WINDOW: Duration = Duration::from_secs(10);
/// An owner's average begins at nothing: for that long after a move the last owner's counts if it is higher.
const LOAD_SETTLES: Duration = Duration::from_secs(30);

impl Coordinator {
    /// A new leader, with the map that was last stored and a term above the one in it. It only listens until
    /// `now + timing.hearing`.
    pub fn new(timing: Timing, rebalance: Rebalance, map: ShardMap, now: Duration) -> Self {
        let slot = Slot { step: Step::Rest, claimed_at: now, moved_at: None, load: 0.0, avoid: None };
        let mut map = map;
        map.begin_term(map.version().term + 1);
        Self {
            hearing_until: now + timing.hearing,
            slots: vec![slot; map.shards() as usize],
            timing,
            rebalance,
            idle_load: IDLE_LOAD,
            map,
            members: BTreeMap::new(),
            dead: HashMap::new(),
            dead_order: VecDeque::new(),
            queue: VecDeque::new(),
            in_flight: 0,
            hold_since: None,
            hold_spent: false,
            planned_wait: false,
            map_changed: false,
        }
    }

    /// Term and number of the present map.
    pub fn version(&self) -> Version {
        self.map.version()
    }

    /// The present map.
    pub fn map(&self) -> &ShardMap {
        &self.map
    }

    /// Begins a term above `heard`.
    pub fn begin_term(&mut self, heard: u64) {
        self.map.begin_term(heard.saturating_add(1));
    }

    /// Ends the listening early: every member there is has been heard.
    pub fn end_hearing(&mut self, now: Duration) {
        self.hearing_until = self.hearing_until.min(now);
    }

    /// Follows an edit of the budget.
    pub fn set_rebalance(&mut self, rebalance: Rebalance) {
        self.rebalance = rebalance;
    }

    /// Lets planned moves wait, or go on: a release is a write, and a store that refuses those would leave its shard on the
    /// way for nothing. What is under way and what is lost is not affected.
    pub fn hold_planned(&mut self, wait: bool) {
        self.planned_wait = wait;
    }

    /// Takes one event in and says what is to be done, in this order.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::MemberJoined { member } => self.member_joined(now, member),
            Event::MemberGone { member, confirmed_dead: true } => {
                self.bury(&member, Death::Confirmed);
                self.sweep(now, &mut actions);
            }
            Event::MemberGone { confirmed_dead: false, .. } => {}
            Event::Leaving { member, leaving } => {
                if let Some(member) = self.members.get_mut(&member) {
                    member.leaving = leaving;
                }
            }
            Event::Heartbeat { member, held, loads, store_ok, term } => {
                self.heartbeat(now, &member, &held, store_ok, &mut actions);
                for (shard, load) in loads {
                    if let Some(slot) = self.slots.get_mut(shard as usize) {
                        let settled = slot.moved_at.is_none_or(|at| now.saturating_sub(at) >= LOAD_SETTLES);
                        slot.load = if settled { load } else { slot.load.max(load) };
                    }
                }
                if term > self.version().term {
                    if now < self.hearing_until {
                        self.begin_term(term);
                        self.map_changed = true;
                    } else {
                        actions.push(Action::Outranked { term });
                    }
                }
            }
            Event::Released { shard, epoch, by } => self.released(now, shard, epoch, &by, &mut actions),
            Event::Acquired { shard, epoch, by } => self.learn(now, shard, &Ownership { epoch, owner: Some(by) }),
            Event::AcquireLost { shard, row, by } => self.acquire_lost(now, shard, &row, &by, &mut actions),
            Event::NewPlan(plan) => self.queue = plan.moves().iter().cloned().collect(),
            Event::Tick => self.sweep(now, &mut actions),
        }
        self.begin_planned(now, &mut actions);
        if std::mem::take(&mut self.map_changed) {
            self.map.next_number();
            actions.push(Action::MapChanged);
        }
        actions
    }

    fn member_joined(&mut self, now: Duration, member: MemberId) {
        match self.dead.get(&member) {
            Some(Death::Confirmed) => return,
            Some(Death::Succeeded) => {
                self.dead.remove(&member);
                self.dead_order.retain(|dead| *dead != member);
            }
            None => {}
        }
        let earlier: Vec<MemberId> =
            self.members.keys().filter(|other| other.name() == member.name() && **other != member).cloned().collect();
        for other in earlier {
            self.bury(&other, Death::Succeeded);
        }
        self.hear(now, &member);
    }

    /// Notes a sign of life; `None` from a process that is known to have ended.
    fn hear(&mut self, now: Duration, member: &MemberId) -> Option<&mut Member> {
        if self.dead.contains_key(member) {
            return None;
        }
        let fresh = Member { heard_at: now, store_ok: true, leaving: false, given_up: false };
        let known = self.members.entry(member.clone()).or_insert(fresh);
        known.heard_at = now;
        known.given_up = false;
        Some(known)
    }

    fn bury(&mut self, member: &MemberId, death: Death) {
        self.members.remove(member);
        if self.dead.insert(member.clone(), death).is_none() {
            self.dead_order.push_back(member.clone());
        }
        // A forgotten one that still owns something is silent, so it is lost all the same, three seconds later.
        if self.dead_order.len() > DEAD_REMEMBERED_MAX
            && let Some(oldest) = self.dead_order.pop_front()
        {
            self.dead.remove(&oldest);
        }
    }

    fn heartbeat(
        &mut self,
        now: Duration,
        member: &MemberId,
        held: &[(Shard, u64)],
        store_ok: bool,
        actions: &mut Vec<Action>,
    ) {
        let Some(known) = self.hear(now, member) else { return };
        known.store_ok = store_ok;
        for (shard, epoch) in held {
            self.learn(now, *shard, &Ownership { epoch: *epoch, owner: Some(member.clone()) });
        }
        if !store_ok {
            self.sweep(now, actions);
        }
    }

    /// Takes a row over if it is newer; a claim of the row's owner keeps it fresh.
    fn learn(&mut self, now: Duration, shard: Shard, row: &Ownership) {
        let Some(known) = self.map.get(shard) else { return };
        let (known_epoch, same) = (known.epoch, known == row);
        if same {
            if row.owner.is_some() {
                self.slots[shard as usize].claimed_at = now;
            }
        } else if self.map.merge(shard, row) {
            self.map_changed = true;
            let slot = &mut self.slots[shard as usize];
            if row.epoch > known_epoch && row.owner.is_some() {
                // Whoever won has it, planned or not.
                slot.claimed_at = now;
                slot.moved_at = Some(now);
                slot.avoid = None;
                self.enter(shard, Step::Rest);
            }
        }
    }

    fn enter(&mut self, shard: Shard, step: Step) {
        let slot = &mut self.slots[shard as usize];
        match (slot.step == Step::Rest, step == Step::Rest) {
            (true, false) => self.in_flight += 1,
            (false, true) => self.in_flight -= 1,
            (true, true) | (false, false) => {}
        }
        slot.step = step;
    }

    fn released(&mut self, now: Duration, shard: Shard, epoch: u64, by: &MemberId, actions: &mut Vec<Action>) {
        let Some(row) = self.map.get(shard) else { return };
        // A release of an epoch that was never heard of counts too: the row is at least that far.
        if row.epoch == epoch && row.owner.as_ref() != Some(by) {
            return;
        }
        self.learn(now, shard, &Ownership { epoch, owner: None });
        self.advance(now, shard, actions);
    }

    fn acquire_lost(&mut self, now: Duration, shard: Shard, row: &Ownership, by: &MemberId, actions: &mut Vec<Action>) {
        if shard >= self.map.shards() {
            return;
        }
        self.learn(now, shard, row);
        let again = match &self.slots[shard as usize].step {
            // Only with another expectation than the one that just failed: no loop without news.
            Step::Acquiring { by: target, expected, .. } if target == by => self.map.get(shard) != Some(expected),
            _ => false,
        };
        if again {
            self.acquire(now, shard, by.clone(), actions);
        }
    }

    fn acquire(&mut self, now: Duration, shard: Shard, by: MemberId, actions: &mut Vec<Action>) {
        let Some(expected) = self.map.get(shard).cloned() else { return };
        let until = now + self.timing.acquire;
        self.enter(shard, Step::Acquiring { by: by.clone(), expected: expected.clone(), until });
        actions.push(Action::Acquire { by, shard, expected });
    }

    fn take_back(&mut self, now: Duration, shard: Shard, owner: MemberId, actions: &mut Vec<Action>) {
        let epoch = self.map.get(shard).map_or(0, |row| row.epoch);
        self.slots[shard as usize].moved_at = Some(now); // rests before it is planned again
        self.enter(shard, Step::TakingBack { until: now + self.timing.take_back });
        actions.push(Action::CancelRelease { by: owner, shard, epoch });
    }

    fn is_silent(&self, now: Duration, member: &MemberId) -> bool {
        self.members.get(member).is_none_or(|known| now.saturating_sub(known.heard_at) >= self.timing.suspect_after)
    }

    /// Whether a member could take a shard now.
    pub fn is_usable(&self, now: Duration, member: &MemberId) -> bool {
        self.members.get(member).is_some_and(|known| {
            known.store_ok && !known.given_up && now.saturating_sub(known.heard_at) < self.timing.suspect_after
        })
    }

    /// Whether nobody can be expected to serve a shard any more.
    fn is_lost(&self, now: Duration, shard: Shard) -> bool {
        let (Some(row), Some(slot)) = (self.map.get(shard), self.slots.get(shard as usize)) else { return false };
        let Some(owner) = &row.owner else { return true };
        if self.dead.contains_key(owner) {
            return true;
        }
        if now.saturating_sub(slot.claimed_at) >= self.timing.lost_after {
            // Of those who fell silent together nothing is taken while the hold lasts.
            return !(self.holds() && self.is_silent(now, owner));
        }
        let cut_off = self.members.get(owner).is_some_and(|known| !known.store_ok);
        cut_off && self.members.keys().any(|other| other != owner && self.is_usable(now, other))
    }

    fn holds(&self) -> bool {
        self.hold_since.is_some() && !self.hold_spent
    }

    /// Marks who is silent, and holds if over half fell silent at once.
    fn watch_members(&mut self, now: Duration) {
        let silence = |member: &Member| now.saturating_sub(member.heard_at);
        let counted = self.members.values().filter(|member| !member.given_up);
        let (known, suspects) = counted.fold((0, 0), |(known, suspects), member| {
            (known + 1, suspects + usize::from(silence(member) >= self.timing.suspect_after))
        });
        if known >= 3 && suspects * 2 > known {
            let since = *self.hold_since.get_or_insert(now);
            self.hold_spent = now.saturating_sub(since) >= self.timing.hold_max;
        } else {
            self.hold_since = None;
            self.hold_spent = false;
        }
        if !self.holds() {
            // Once the hold is spent the silent ones stop counting, so that it can't begin anew with the same ones.
            for member in self.members.values_mut().filter(|member| silence(member) >= self.timing.lost_after) {
                member.given_up = true;
            }
        }
        let owners: HashSet<&MemberId> = self.map.rows().iter().filter_map(|row| row.owner.as_ref()).collect();
        self.members.retain(|id, member| silence(member) < FORGET_AFTER || owners.contains(id));
    }

    /// Looks at every shard.
    fn sweep(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if now < self.hearing_until {
            return;
        }
        self.watch_members(now);
        for shard in 0..self.map.shards() {
            self.advance(now, shard, actions);
        }
        self.place_lost(now, actions);
    }

    /// Takes one shard as far as it gets without being placed.
    fn advance(&mut self, now: Duration, shard: Shard, actions: &mut Vec<Action>) {
        let Some(row) = self.map.get(shard) else { return };
        let slot = &self.slots[shard as usize];
        match &slot.step {
            Step::Rest => {}
            Step::Releasing { to, since } => {
                let (to, since) = (to.clone(), *since);
                let usable = self.is_usable(now, &to);
                let overdue = now.saturating_sub(since) >= self.timing.release;
                // Heartbeats come twice a second: what was claimed a second ago is still held.
                let claimed = now.saturating_sub(slot.claimed_at) < Duration::from_secs(1);
                let owner = row.owner.clone().filter(|_| !self.is_lost(now, shard));
                match owner {
                    None if usable => self.acquire(now, shard, to, actions),
                    None => self.enter(shard, Step::Rest),
                    Some(_) if overdue && !claimed && usable => self.acquire(now, shard, to, actions),
                    Some(owner) if overdue || !usable => self.take_back(now, shard, owner, actions),
                    Some(_) => {}
                }
            }
            Step::TakingBack { until } => {
                let owner_dead = row.owner.as_ref().is_some_and(|owner| self.dead.contains_key(owner));
                if now >= *until || owner_dead {
                    self.enter(shard, Step::Rest);
                }
            }
            Step::Acquiring { by, expected, until } => {
                if !self.is_usable(now, by) || now >= *until {
                    let by = by.clone();
                    self.slots[shard as usize].avoid = Some(by);
                    self.enter(shard, Step::Rest);
                } else if expected != row {
                    let by = by.clone();
                    self.acquire(now, shard, by, actions);
                }
            }
        }
    }

    /// Gives every lost shard to somebody: to the restarted process of its owner, else to the least loaded.
    fn place_lost(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let mut lost: Vec<Shard> = (0..self.map.shards())
            .filter(|shard| self.slots[*shard as usize].step == Step::Rest && self.is_lost(now, *shard))
            .collect();
        if lost.is_empty() {
            return;
        }
        let usable: Vec<MemberId> = self.members.keys().filter(|id| self.is_usable(now, id)).cloned().collect();
        let staying = |id: &&MemberId| self.members.get(*id).is_some_and(|member| !member.leaving);
        let mut targets: Vec<MemberId> = usable.iter().filter(staying).cloned().collect();
        if targets.is_empty() {
            // Rather served by who leaves than by nobody.
            targets = usable;
        }
        let index: HashMap<&MemberId, usize> = targets.iter().enumerate().map(|(i, id)| (id, i)).collect();
        let mut loads = vec![0_u64; targets.len()];
        for (shard, slot) in self.slots.iter().enumerate() {
            if let Some(i) = self.holder_to_be(shard as Shard).and_then(|id| index.get(id)) {
                loads[*i] += weight(slot.load, self.idle_load);
            }
        }
        let mut placement = Placement::new(loads.into_iter().enumerate());
        lost.sort_by(|a, b| {
            let load = |shard: &Shard| weight(self.slots[*shard as usize].load, self.idle_load);
            load(b).cmp(&load(a)).then(a.cmp(b))
        });
        for shard in lost {
            let owner = self.map.get(shard).and_then(|row| row.owner.clone());
            let avoid = self.slots[shard as usize].avoid.clone();
            let restarted = owner.and_then(|owner| {
                targets.iter().find(|id| id.name() == owner.name() && **id != owner && Some(*id) != avoid.as_ref())
            });
            let target = match restarted {
                Some(restarted) => Some(restarted.clone()),
                None => {
                    let weight = weight(self.slots[shard as usize].load, self.idle_load);
                    let mut pick = placement.place(weight);
                    if targets.len() > 1 && pick.map(|i| &targets[i]) == avoid.as_ref() {
                        pick = placement.place(weight);
                    }
                    pick.map(|i| targets[i].clone())
                }
            };
            if let Some(target) = target {
                self.acquire(now, shard, target, actions);
            }
        }
    }

    /// Who holds a shard when what is under way has come to its end.
    fn holder_to_be(&self, shard: Shard) -> Option<&MemberId> {
        match &self.slots[shard as usize].step {
            Step::Rest | Step::TakingBack { .. } => self.map.get(shard)?.owner.as_ref(),
            Step::Releasing { to, .. } => Some(to),
            Step::Acquiring { by, .. } => Some(by),
        }
    }

    /// Begins queued moves within the budget. A move whose shard is not where the plan saw it, or whose target can't take
    /// it, is dropped: the next plan sees what is then.
    fn begin_planned(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if now < self.hearing_until || self.holds() || self.planned_wait {
            return;
        }
        while self.in_flight < self.rebalance.moves_in_flight as usize {
            let Some(Move { shard, epoch, from, to }) = self.queue.pop_front() else { return };
            let unchanged = self.map.get(shard).is_some_and(|row| row.epoch == epoch && row.owner == from);
            let rests = self.slots.get(shard as usize).is_some_and(|slot| slot.step == Step::Rest);
            if !unchanged || !rests || !self.is_usable(now, &to) {
                continue;
            }
            match from {
                None => self.acquire(now, shard, to, actions),
                // A store that refuses the owner's writes would refuse its release, too, and after it perhaps the acquire.
                Some(from) if from != to && !self.is_lost(now, shard) && self.is_usable(now, &from) => {
                    self.enter(shard, Step::Releasing { to: to.clone(), since: now });
                    actions.push(Action::Release { by: from, shard, epoch, to });
                }
                Some(_) => {}
            }
        }
    }

    /// What a planner needs; `None` while planning makes no sense: still listening, too many silent, shards without owner,
    /// an earlier plan not yet begun in full, or a store that refuses writes.
    pub fn plan_input(&self, now: Duration) -> Option<PlanInput> {
        if self.planned_wait {
            return None;
        }
        let unsettled =
            (0..self.map.shards()).any(|s| self.slots[s as usize].step == Step::Rest && self.is_lost(now, s));
        if now < self.hearing_until || self.hold_since.is_some() || unsettled || !self.queue.is_empty() {
            return None;
        }
        let members = self.members.iter().filter(|(id, _)| self.is_usable(now, id));
        let members = members.map(|(id, member)| PlanMember { id: id.clone(), leaving: member.leaving }).collect();
        let shard = |(i, slot): (usize, &Slot)| PlanShard {
            row: Ownership { epoch: self.map.rows()[i].epoch, owner: self.holder_to_be(i as Shard).cloned() },
            load: slot.load,
            moved_at: slot.moved_at,
            pinned: slot.step != Step::Rest,
        };
        Some(PlanInput {
            now,
            members,
            shards: self.slots.iter().enumerate().map(shard).collect(),
            cooldown: self.rebalance.cooldown.duration(),
            moves_max: self.rebalance.moves_per_round as usize,
            tolerance: self.rebalance.tolerance,
            idle_load: self.idle_load,
            load_window: LOAD_WINDOW,
        })
    }

    /// What there is to show.
    pub fn snapshot(&self, now: Duration) -> Snapshot {
        let mut members: BTreeMap<MemberId, MemberSnapshot> = BTreeMap::new();
        for (id, member) in &self.members {
            let shown = MemberSnapshot {
                silent_for: now.saturating_sub(member.heard_at),
                store_ok: member.store_ok,
                leaving: member.leaving,
                shards: 0,
                load: 0.0,
            };
            members.insert(id.clone(), shown);
        }
        let mut moving = Vec::new();
        for (i, slot) in self.slots.iter().enumerate() {
            let row = &self.map.rows()[i];
            if let Some(member) = row.owner.as_ref().and_then(|owner| members.get_mut(owner)) {
                member.shards += 1;
                member.load += slot.load;
            }
            let phase = match slot.step {
                Step::Rest => continue,
                Step::Releasing { .. } => Phase::Releasing,
                Step::TakingBack { .. } => Phase::TakingBack,
                Step::Acquiring { .. } => Phase::Acquiring,
            };
            let to = self.holder_to_be(i as Shard).cloned();
            moving.push(Moving { shard: i as Shard, from: row.owner.clone(), to, phase });
        }
        Snapshot {
            version: self.version(),
            shards: self.map.shards(),
            unowned: (0..self.map.shards()).filter(|shard| self.is_lost(now, *shard)).count() as u32,
            moving,
            queued: self.queue.len(),
            degraded: self.hold_since.is_some(),
            hearing: now < self.hearing_until,
            members,
        }
    }
}

/// What there is to show of the shards.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Term and number of the map.
    pub version: Version,
    /// Number of shards.
    pub shards: u32,
    /// Shards that nobody serves.
    pub unowned: u32,
    /// Shards under way.
    pub moving: Vec<Moving>,
    /// Planned moves that have not begun.
    pub queued: usize,
    /// Over half of the members fell silent at once.
    pub degraded: bool,
    /// Still only listening.
    pub hearing: bool,
    /// The members.
    pub members: BTreeMap<MemberId, MemberSnapshot>,
}

/// One shard under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moving {
    /// The shard.
    pub shard: Shard,
    /// Owner of the row as last heard.
    pub from: Option<MemberId>,
    /// Owner to be.
    pub to: Option<MemberId>,
    /// How far it is.
    pub phase: Phase,
}

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The owner finishes and releases.
    Releasing,
    /// The owner goes on after all.
    TakingBack,
    /// The next owner acquires.
    Acquiring,
}

/// One member, as far as shards go.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberSnapshot {
    /// Since when it says nothing.
    pub silent_for: Duration,
    /// Whether the store answers it.
    pub store_ok: bool,
    /// Whether it is being emptied.
    pub leaving: bool,
    /// Shards it holds.
    pub shards: u32,
    /// Load per second of these.
    pub load: f64,
}

#[cfg(test)]
mod tests {
    use super::super::planner::plan;
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn id(name: &str, boot: u64) -> MemberId {
        MemberId::new(name, boot).expect("a good name")
    }

    fn row(epoch: u64, owner: Option<&MemberId>) -> Ownership {
        Ownership { epoch, owner: owner.cloned() }
    }

    /// A coordinator with a clock and members that say what the map says they hold, unless told otherwise.
    struct Scene {
        coordinator: Coordinator,
        now: Duration,
        members: Vec<MemberId>,
    }

    impl Scene {
        /// Shard i is owned, in epoch 5, by the i-th member, round and round; the listening is over.
        fn new(shards: u32, names: &[&str]) -> Self {
            let members: Vec<MemberId> = names.iter().map(|name| id(name, 1)).collect();
            let mut map = ShardMap::new(shards);
            for shard in 0..shards {
                map.merge(shard, &row(5, Some(&members[shard as usize % members.len()])));
            }
            let rebalance = Rebalance { moves_in_flight: 2, ..Rebalance::default() };
            let coordinator = Coordinator::new(Timing::default(), rebalance, map, Duration::ZERO);
            let mut scene = Self { coordinator, now: Duration::ZERO, members };
            let actions = scene.pass(3_000, &[]);
            assert_eq!(actions, [], "nothing to do for a healthy cluster");
            scene
        }

        fn tell(&mut self, event: Event) -> Vec<Action> {
            let mut actions = self.coordinator.handle(self.now, event);
            actions.retain(|action| *action != Action::MapChanged);
            actions
        }

        fn held(&self, member: &MemberId) -> Vec<(Shard, u64)> {
            let rows = self.coordinator.map().rows().iter().enumerate();
            rows.filter(|(_, row)| row.owner.as_ref() == Some(member)).map(|(i, row)| (i as Shard, row.epoch)).collect()
        }

        fn beat(&mut self, member: &MemberId, held: Vec<(Shard, u64)>, store_ok: bool) -> Vec<Action> {
            self.tell(Event::Heartbeat { member: member.clone(), held, loads: Vec::new(), store_ok, term: 0 })
        }

        /// Time passes in steps of 250 ms; all members but the silent ones say what they hold.
        fn pass(&mut self, millis: u64, silent: &[&MemberId]) -> Vec<Action> {
            let mut actions = Vec::new();
            let until = self.now + ms(millis);
            while self.now < until {
                self.now += ms(250);
                for member in self.members.clone() {
                    if !silent.contains(&&member) {
                        actions.extend(self.beat(&member, self.held(&member), true));
                    }
                }
                actions.extend(self.tell(Event::Tick));
            }
            actions
        }

        fn run(&mut self, moves: &[(Shard, &MemberId)]) -> Vec<Action> {
            let planned = |(shard, to): &(Shard, &MemberId)| {
                let row = &self.coordinator.map().rows()[*shard as usize];
                Move { shard: *shard, epoch: row.epoch, from: row.owner.clone(), to: (*to).clone() }
            };
            let plan = Plan::new(moves.iter().map(planned).collect());
            let hash = plan.hash();
            let committed = plan.approve(hash).and_then(|plan| plan.commit(self.coordinator.map()));
            self.tell(Event::NewPlan(committed.expect("planned from this very map")))
        }

        fn acquired(&mut self, shard: Shard, epoch: u64, by: &MemberId) -> Vec<Action> {
            self.tell(Event::Acquired { shard, epoch, by: by.clone() })
        }
    }

    fn acquire(by: &MemberId, shard: Shard, expected: Ownership) -> Action {
        Action::Acquire { by: by.clone(), shard, expected }
    }

    #[test]
    fn a_planned_move_releases_first_and_acquires_then() {
        let mut scene = Scene::new(2, &["a", "b"]);
        let [a, b] = [scene.members[0].clone(), scene.members[1].clone()];
        let release = Action::Release { by: a.clone(), shard: 0, epoch: 5, to: b.clone() };
        assert_eq!(scene.run(&[(0, &b)]), [release]);
        let released = Event::Released { shard: 0, epoch: 5, by: a };
        assert_eq!(scene.tell(released.clone()), [acquire(&b, 0, row(5, None))]);
        assert_eq!(scene.tell(released), [], "doubled");
        assert_eq!(scene.acquired(0, 6, &b), []);
        assert_eq!(scene.coordinator.map().get(0), Some(&row(6, Some(&b))));
        assert_eq!(scene.coordinator.snapshot(scene.now).moving, []);
        assert_eq!(scene.pass(5_000, &[]), []);
    }

    #[test]
    fn an_owner_that_does_not_release_but_still_claims_keeps_the_shard() {
        let mut scene = Scene::new(2, &["a", "b"]);
        let [a, b] = [scene.members[0].clone(), scene.members[1].clone()];
        scene.run(&[(0, &b)]);
        assert_eq!(scene.pass(1_750, &[]), [], "before the deadline");
        assert_eq!(scene.pass(250, &[]), [Action::CancelRelease { by: a.clone(), shard: 0, epoch: 5 }]);
        // It had released after all, and took it back: the next epoch says so.
        assert_eq!(scene.acquired(0, 6, &a), []);
        assert_eq!(scene.coordinator.snapshot(scene.now).moving, []);
    }

    #[test]
    fn an_owner_that_neither_releases_nor_claims_is_taken_over() {
        let mut scene = Scene::new(2, &["a", "b"]);
        let [a, b] = [scene.members[0].clone(), scene.members[1].clone()];
        scene.run(&[(0, &b)]);
        assert_eq!(scene.pass(1_750, &[&a]), []);
        assert_eq!(scene.pass(250, &[&a]), [acquire(&b, 0, row(5, Some(&a)))]);
        // Its Released was lost on the way: the row says so, and the next try is for that row.
        let lost = |row: Ownership| Event::AcquireLost { shard: 0, row, by: b.clone() };
        assert_eq!(scene.tell(lost(row(5, None))), [acquire(&b, 0, row(5, None))]);
        // The same answer once more is no news: no loop, the deadline decides.
        assert_eq!(scene.tell(lost(row(5, None))), []);
        assert_eq!(scene.tell(lost(row(6, Some(&b)))), [], "the second try had won, only its report is late");
        assert_eq!(scene.coordinator.snapshot(scene.now).moving, []);
    }

    #[test]
    fn a_target_that_dies_gives_the_shard_back_or_on() {
        let mut scene = Scene::new(3, &["a", "b", "c"]);
        let [a, b] = [scene.members[0].clone(), scene.members[1].clone()];
        let dead = Event::MemberGone { member: b.clone(), confirmed_dead: true };
        let mut before_release =
            Scene { coordinator: scene.coordinator.clone(), now: scene.now, members: scene.members.clone() };
        before_release.run(&[(0, &b)]);
        let actions = before_release.tell(dead.clone());
        assert!(actions.contains(&Action::CancelRelease { by: a.clone(), shard: 0, epoch: 5 }), "{actions:?}");

        scene.run(&[(0, &b)]);
        scene.tell(Event::Released { shard: 0, epoch: 5, by: a.clone() });
        let actions = scene.tell(dead);
        // The shard on its way to it, and its own: both to the least loaded (a had none left, then one like c).
        let targets: Vec<(&MemberId, Shard)> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Acquire { by, shard, .. } => Some((by, *shard)),
                _ => None,
            })
            .collect();
        assert_eq!(targets, [(&a, 0), (&a, 1)]);
    }

    #[test]
    fn an_acquire_without_answer_goes_to_somebody_else() {
        let mut scene = Scene::new(3, &["a", "b", "c"]);
        let [a, b, c] = [scene.members[0].clone(), scene.members[1].clone(), scene.members[2].clone()];
        scene.members.retain(|member| *member != a);
        let first = scene.tell(Event::MemberGone { member: a.clone(), confirmed_dead: true });
        assert_eq!(first, [acquire(&b, 0, row(5, Some(&a)))]);
        assert_eq!(scene.pass(1_750, &[]), []);
        assert_eq!(scene.pass(250, &[]), [acquire(&c, 0, row(5, Some(&a)))]);
    }

    #[test]
    fn silence_counts_after_three_seconds_a_confirmed_death_at_once() {
        let mut scene = Scene::new(2, &["a", "b"]);
        let [a, b] = [scene.members[0].clone(), scene.members[1].clone()];
        scene.tell(Event::MemberGone { member: a.clone(), confirmed_dead: false });
        assert_eq!(scene.pass(2_750, &[&a]), [], "a broken connection alone means nothing");
        assert_eq!(scene.pass(250, &[&a]), [acquire(&b, 0, row(5, Some(&a)))]);

        let mut scene = Scene::new(2, &["a", "b"]);
        let died = scene.tell(Event::MemberGone { member: a.clone(), confirmed_dead: true });
        assert_eq!(died, [acquire(&b, 0, row(5, Some(&a)))]);
        assert_eq!(scene.beat(&a, vec![(0, 5)], true), [], "a late heartbeat of the dead");
        assert!(!scene.coordinator.snapshot(scene.now).members.contains_key(&a));
    }

    #[test]
    fn who_is_heard_late_does_not_shut_out_his_successor() {
        let member = |boot| MemberId::new("a", boot).expect("a good name");
        let joined = |member: &MemberId| Event::MemberJoined { member: member.clone() };
        let usable = |scene: &Scene, member: &MemberId| scene.coordinator.is_usable(scene.now, member);
        let (first, second) = (member(1), member(2));

        let mut scene = Scene::new(1, &["b"]);
        scene.tell(joined(&second));
        scene.tell(joined(&first));
        assert!(!usable(&scene, &second), "it seems to be the earlier one");
        scene.tell(joined(&second));
        assert!(usable(&scene, &second) && !usable(&scene, &first), "its stream was closed, and it dialled again");

        scene.tell(Event::MemberGone { member: first.clone(), confirmed_dead: true });
        scene.tell(joined(&first));
        assert!(usable(&scene, &second) && !usable(&scene, &first), "the dead stay dead");
    }

    #[test]
    fn a_shard_that_a_live_owner_no_longer_claims_is_lost() {
        let mut scene = Scene::new(2, &["a", "b"]);
        let a = scene.members[0].clone();
        let mut actions = Vec::new();
        for _ in 0..6 {
            actions.extend(scene.pass(500, &[&a]));
            actions.extend(scene.beat(&a, Vec::new(), true));
        }
        actions.extend(scene.tell(Event::Tick));
        assert!(matches!(actions.as_slice(), [Action::Acquire { shard: 0, .. }]), "{actions:?}");
    }

    #[test]
    fn an_owner_that_alone_cannot_reach_the_store_loses_its_shards() {
        let mut scene = Scene::new(2, &["a", "b"]);
        let [a, b] = [scene.members[0].clone(), scene.members[1].clone()];
        assert_eq!(scene.beat(&a, vec![(0, 5)], false), [acquire(&b, 0, row(5, Some(&a)))]);

        let mut scene = Scene::new(2, &["a", "b"]);
        assert_eq!(scene.beat(&a, vec![(0, 5)], false).len(), 1);
        let mut scene = Scene::new(2, &["a", "b"]);
        // The store is away for all: nobody would do better.
        for member in [&a, &b] {
            scene.coordinator.members.get_mut(member).expect("it joined").store_ok = false;
        }
        assert_eq!(scene.beat(&a, vec![(0, 5)], false), []);
        assert_eq!(scene.beat(&b, vec![(1, 5)], false), []);
    }

    #[test]
    fn nothing_is_moved_by_plan_while_the_store_refuses_its_owner_or_its_target() {
        for refused in [vec![0], vec![1], vec![0, 1]] {
            let mut scene = Scene::new(2, &["a", "b"]);
            let b = scene.members[1].clone();
            for member in &refused {
                let member = scene.members[*member].clone();
                // Not by a heartbeat, which would hand the shards of one who is cut off alone to the other.
                scene.coordinator.members.get_mut(&member).expect("it joined").store_ok = false;
            }
            let begun = scene.run(&[(0, &b)]);
            assert!(!begun.iter().any(|action| matches!(action, Action::Release { .. })), "{refused:?}: {begun:?}");
            let moving = scene.coordinator.snapshot(scene.now).moving;
            assert!(moving.iter().all(|moving| moving.phase != Phase::Releasing), "{refused:?}: {moving:?}");
        }
        // Nor is a plan made that empties somebody into a store that takes nothing.
        let mut scene = Scene::new(2, &["a", "b"]);
        for member in scene.members.clone() {
            scene.coordinator.members.get_mut(&member).expect("it joined").store_ok = false;
            scene.tell(Event::Leaving { member, leaving: true });
        }
        let input = scene.coordinator.plan_input(scene.now).expect("nothing is under way");
        assert_eq!(plan(&input).moves(), []);
    }

    #[test]
    fn a_new_owners_average_counts_when_it_has_settled() {
        let mut scene = Scene::new(2, &["a", "b"]);
        let [a, b] = [scene.members[0].clone(), scene.members[1].clone()];
        let report = |scene: &mut Scene, member: &MemberId, load: f64| {
            let (held, loads) = (scene.held(member), vec![(0, load)]);
            scene.tell(Event::Heartbeat { member: member.clone(), held, loads, store_ok: true, term: 0 });
            scene.coordinator.slots[0].load
        };
        assert_eq!(report(&mut scene, &a, 50.0), 50.0);
        scene.run(&[(0, &b)]);
        scene.tell(Event::Released { shard: 0, epoch: 5, by: a });
        scene.acquired(0, 6, &b);
        assert_eq!(report(&mut scene, &b, 3.0), 50.0, "not measured yet");
        assert_eq!(report(&mut scene, &b, 80.0), 80.0, "more is more");
        scene.pass(30_000, &[]);
        assert_eq!(report(&mut scene, &b, 40.0), 40.0);
    }

    #[test]
    fn when_over_half_fall_silent_at_once_nothing_is_taken_for_a_while() {
        let mut scene = Scene::new(4, &["a", "b", "c", "d"]);
        let [a, b, c] = [scene.members[0].clone(), scene.members[1].clone(), scene.members[2].clone()];
        assert_eq!(scene.pass(2_000, &[&a, &b, &c]), []);
        assert!(scene.coordinator.snapshot(scene.now).degraded);
        // One of them is known to have ended: that one is not waited for.
        let mut confirmed = scene.coordinator.clone();
        let actions = confirmed.handle(scene.now, Event::MemberGone { member: a.clone(), confirmed_dead: true });
        assert!(actions.iter().any(|action| matches!(action, Action::Acquire { shard: 0, .. })), "{actions:?}");
        assert_eq!(scene.pass(14_750, &[&a, &b, &c]), [], "held");
        let taken = scene.pass(500, &[&a, &b, &c]);
        assert_eq!(taken.iter().filter(|action| matches!(action, Action::Acquire { .. })).count(), 3, "{taken:?}");

        // They come back within the hold: nothing has moved.
        let mut scene = Scene::new(4, &["a", "b", "c", "d"]);
        assert_eq!(scene.pass(10_000, &[&a, &b, &c]), []);
        assert_eq!(scene.pass(10_000, &[]), []);
        assert!(!scene.coordinator.snapshot(scene.now).degraded);
    }

    #[test]
    fn a_new_leader_listens_and_merges_by_the_highest_epoch() {
        let [a, b] = [id("a", 1), id("b", 1)];
        let mut stored = ShardMap::new(3);
        stored.begin_term(7);
        stored.merge(0, &row(5, Some(&a)));
        let mut leader = Coordinator::new(Timing::default(), Rebalance::default(), stored, ms(0));
        assert_eq!(leader.version().term, 8);
        let beat = |member: &MemberId, held: &[(Shard, u64)], term| Event::Heartbeat {
            member: member.clone(),
            held: held.to_vec(),
            loads: Vec::new(),
            store_ok: true,
            term,
        };
        // The stored map was old; and so is what a thinks of shard 0. Another leader had come to term 9 meanwhile.
        assert_eq!(leader.handle(ms(100), beat(&b, &[(0, 6), (1, 2)], 9)), [Action::MapChanged]);
        assert_eq!(leader.handle(ms(200), beat(&a, &[(0, 5)], 3)), []);
        assert_eq!(leader.version().term, 10);
        assert_eq!(leader.map().get(0), Some(&row(6, Some(&b))));
        assert_eq!(leader.handle(ms(2_900), Event::Tick), [], "only listening");
        leader.handle(ms(2_950), beat(&b, &[(0, 6), (1, 2)], 9));
        leader.handle(ms(2_950), beat(&a, &[], 3));
        assert_eq!(leader.handle(ms(3_000), Event::Tick), [acquire(&a, 2, row(0, None))]);
        assert_eq!(leader.handle(ms(3_100), beat(&a, &[], 11)), [Action::Outranked { term: 11 }]);
        leader.begin_term(11);
        assert_eq!(leader.version().term, 12);
    }

    #[test]
    fn a_restarted_member_gets_its_own_shards_back() {
        let mut scene = Scene::new(6, &["a", "b", "c"]);
        let (old, new) = (scene.members[1].clone(), id("b", 2));
        scene.members[1] = new.clone();
        scene.tell(Event::MemberJoined { member: new.clone() });
        let expected: Vec<Action> = [1, 4].iter().map(|shard| acquire(&new, *shard, row(5, Some(&old)))).collect();
        assert_eq!(scene.tell(Event::Tick), expected);
    }

    #[test]
    fn the_budget_bounds_what_is_under_way() {
        let mut scene = Scene::new(8, &["a", "b"]);
        let [a, b] = [scene.members[0].clone(), scene.members[1].clone()];
        let begun = scene.run(&[(0, &b), (2, &b), (4, &b)]);
        assert_eq!(begun.iter().filter(|action| matches!(action, Action::Release { .. })).count(), 2);
        assert!(scene.coordinator.plan_input(scene.now).is_none(), "the plan has not begun in full");
        scene.tell(Event::Released { shard: 0, epoch: 5, by: a });
        let next = scene.acquired(0, 6, &b);
        assert!(matches!(next.as_slice(), [Action::Release { shard: 4, .. }]), "{next:?}");
        let input = scene.coordinator.plan_input(scene.now).expect("all has begun");
        let pinned: Vec<usize> = (0..8).filter(|i| input.shards[*i].pinned).collect();
        assert_eq!(pinned, [2, 4]);
        assert!(plan(&input).moves().iter().all(|m| ![0, 2, 4].contains(&m.shard)));
    }

    #[test]
    fn a_queued_move_whose_shard_has_gone_elsewhere_is_dropped() {
        let mut scene = Scene::new(9, &["a", "b", "c"]);
        let [a, b, c] = [scene.members[0].clone(), scene.members[1].clone(), scene.members[2].clone()];
        scene.run(&[(0, &b), (3, &b), (6, &b)]);
        // Shard 6 waits for its turn and meanwhile gets another owner.
        scene.acquired(6, 6, &c);
        scene.tell(Event::Released { shard: 0, epoch: 5, by: a });
        assert_eq!(scene.acquired(0, 6, &b), []);
        assert_eq!(scene.coordinator.snapshot(scene.now).queued, 0);
    }

    #[test]
    fn the_shards_of_one_owner_are_spread_over_the_others() {
        let mut scene = Scene::new(40, &["a", "b", "c", "d", "e"]);
        let [a, e] = [scene.members[0].clone(), scene.members[4].clone()];
        scene.tell(Event::Leaving { member: e.clone(), leaving: true });
        let actions = scene.tell(Event::MemberGone { member: a, confirmed_dead: true });
        let mut taken: BTreeMap<MemberId, u32> = BTreeMap::new();
        for action in &actions {
            if let Action::Acquire { by, .. } = action {
                *taken.entry(by.clone()).or_default() += 1;
            }
        }
        let mut counts: Vec<u32> = taken.values().copied().collect();
        counts.sort_unstable();
        assert_eq!(counts, [2, 3, 3]);
        assert!(!taken.contains_key(&e), "it leaves");
    }
}
