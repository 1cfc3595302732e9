//! Which shards should move where.
//!
//! A greedy planner over measured loads: shards that nobody owns are placed, members that leave are emptied, and then,
//! only if somebody is outside the tolerance, the fullest give to the emptiest until all are close to the fair share. What
//! has to be placed goes largest first to the least loaded (Graham's LPT rule). A shard is planned from where it is to
//! where it ends, so it never moves twice. Loads are measured, so they scatter: what chance explains is no reason to move
//! anything ([`PlanInput::load_window`]). O((n + m) log n) for n shards on m members. Weights are integers, so the same
//! input gives the same plan on every machine.

use super::map::{Ownership, Shard, ShardMap};
use im_proto::ids::MemberId;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::marker::PhantomData;
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

/// All that a plan depends on.
#[derive(Clone, Debug)]
pub struct PlanInput {
    /// Time since the coordinator's start.
    pub now: Duration,
    /// Members that can own shards.
    pub members: Vec<PlanMember>,
    /// The i-th is shard i.
    pub shards: Vec<PlanShard>,
    /// A shard that moved less than that ago rests, unless its owner leaves.
    pub cooldown: Duration,
    /// The plan has at most that many moves.
    pub moves_max: usize,
    /// Nothing is balanced while every member's load is within this fraction of the fair share.
    pub tolerance: f64,
    /// What a shard costs without any traffic, in the unit of the loads: near zero load the number of shards is balanced.
    pub idle_load: f64,
    /// Loads are numbers of independent messages in that time, divided by it, so they scatter like Poisson's; zero = they
    /// are exact.
    pub load_window: Duration,
}

/// A member that can own shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanMember {
    /// Which one.
    pub id: MemberId,
    /// It is to be emptied.
    pub leaving: bool,
}

/// What is known of one shard.
#[derive(Clone, Debug, Default)]
pub struct PlanShard {
    /// Its row; while it is under way, with the owner-to-be as owner.
    pub row: Ownership,
    /// Measured load per second.
    pub load: f64,
    /// When it last moved, on the clock of [`PlanInput::now`].
    pub moved_at: Option<Duration>,
    /// It is under way, or otherwise not to be touched.
    pub pinned: bool,
}

/// One planned move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// The shard.
    pub shard: Shard,
    /// The epoch that the plan saw.
    pub epoch: u64,
    /// The owner that the plan saw.
    pub from: Option<MemberId>,
    /// The owner to be.
    pub to: MemberId,
}

/// A plan's state: it can be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proposed {}
/// A plan's state: somebody, or the mode `Auto`, said yes to exactly this content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Approved {}
/// A plan's state: it was checked against the map and can be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {}

/// Moves that belong together, with their content hash. What runs is what was shown: only a `Plan<Committed>` can be run,
/// and the only way there leads through [`Plan::approve`] and [`Plan::commit`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan<State = Proposed> {
    moves: Vec<Move>,
    hash: u64,
    state: PhantomData<State>,
}

/// Why a plan is not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The approval is for another plan.
    #[error(
        "the approval {approved:016x} is for another plan than the one now shown, {shown:016x}: look at it and approve that one"
    )]
    OtherPlan {
        /// Hash of the plan that is shown.
        shown: u64,
        /// Hash in the approval.
        approved: u64,
    },
    /// The shards have moved on since.
    #[error(
        "the plan is stale: shard {shard} is no longer where the plan saw it; a new plan is made in the next round"
    )]
    Stale {
        /// The first shard that differs.
        shard: Shard,
    },
}

impl<State> Plan<State> {
    /// The moves, most urgent first.
    pub fn moves(&self) -> &[Move] {
        &self.moves
    }

    /// Hash of the content.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    fn into_state<Next>(self) -> Plan<Next> {
        Plan { moves: self.moves, hash: self.hash, state: PhantomData }
    }
}

impl Plan<Proposed> {
    /// A plan of these moves.
    pub fn new(moves: Vec<Move>) -> Self {
        let mut hasher = Xxh3::new();
        for Move { shard, epoch, from, to } in &moves {
            hasher.update(&shard.to_le_bytes());
            hasher.update(&epoch.to_le_bytes());
            // A member id contains no line break.
            hasher.update(from.as_ref().map_or("", MemberId::as_str).as_bytes());
            hasher.update(b"\n");
            hasher.update(to.as_str().as_bytes());
            hasher.update(b"\n");
        }
        Self { hash: hasher.digest(), moves, state: PhantomData }
    }

    /// Approves exactly this content.
    ///
    /// # Errors
    /// [`PlanError::OtherPlan`] if the hash is that of another plan.
    pub fn approve(self, approved: u64) -> Result<Plan<Approved>, PlanError> {
        if approved == self.hash {
            Ok(self.into_state())
        } else {
            Err(PlanError::OtherPlan { shown: self.hash, approved })
        }
    }
}

impl Plan<Approved> {
    /// Checks that every shard is still where the plan saw it.
    ///
    /// # Errors
    /// [`PlanError::Stale`] if one is not.
    pub fn commit(self, map: &ShardMap) -> Result<Plan<Committed>, PlanError> {
        for Move { shard, epoch, from, .. } in &self.moves {
            let unchanged = map.get(*shard).is_some_and(|row| row.epoch == *epoch && row.owner == *from);
            if !unchanged {
                return Err(PlanError::Stale { shard: *shard });
            }
        }
        Ok(self.into_state())
    }
}

/// Loads are counted in thousandths of a message per second.
const WEIGHT_UNITS: f64 = 1_000.0;
/// Balancing, once begun, goes down to this part of the tolerance, so that a small change does not start it anew.
const SETTLE_PART: f64 = 0.25;

/// What lies within so many standard deviations of the fair share may be chance. Balancing leaves a deviation of
/// [`NOISE_SETTLED`] and was misled by some three more; the rest leaves a false alarm, a
/// few needless moves, in one of some 90,000 rounds (21 in 1,800,000 of constant traffic in virtual time).
const NOISE_BAND: f64 = 8.0;
/// Balancing is no finer than so many standard deviations.
const NOISE_SETTLED: f64 = 2.0;

/// Who is further above its share than this part of the tolerance may give a lump to somebody who passes on crumbs.
const ROUGH_PART: f64 = 0.5;

/// A shard heavier than a share divided by that is large.
const LARGE_PARTS: u64 = 2;

/// The weight of a shard: its load and what it costs without any, never 0. Nonsense (negative, NaN) counts as no load.
pub(super) fn weight(load: f64, idle_load: f64) -> u64 {
    let load = if load.is_finite() { load.clamp(0.0, 1e12) } else { 0.0 };
    ((load + idle_load.clamp(0.0, 1e12)) * WEIGHT_UNITS).round().max(1.0) as u64
}

/// Members by load, for placing shards one by one: the least loaded is taken each time.
#[derive(Default)]
pub(super) struct Placement(BinaryHeap<Reverse<(u64, usize)>>);

impl Placement {
    pub(super) fn new(loads: impl Iterator<Item = (usize, u64)>) -> Self {
        Self(loads.map(|(member, load)| Reverse((load, member))).collect())
    }

    /// The least loaded member (lowest index among equals), which then carries `weight` more.
    pub(super) fn place(&mut self, weight: u64) -> Option<usize> {
        let mut least = self.0.peek_mut()?;
        let Reverse((load, member)) = *least;
        *least = Reverse((load.saturating_add(weight), member));
        Some(member)
    }
}

/// One staying member while balancing.
#[derive(Default)]
struct Bin {
    load: u64,
    /// Shards that may still be moved, by weight.
    movable: BTreeSet<(u64, Shard)>,
    /// The heaviest shard that may not.
    heaviest_fixed: u64,
}

impl Bin {
    fn heaviest(&self) -> u64 {
        self.movable.last().map_or(0, |(weight, _)| *weight).max(self.heaviest_fixed)
    }

    /// What it should have at most: the fair share, or its heaviest shard alone, which can't be split.
    fn ceiling(&self, fair: u64) -> u64 {
        self.heaviest().max(fair)
    }

    fn excess(&self, fair: u64) -> u64 {
        self.load.saturating_sub(self.ceiling(fair))
    }

    /// Takes a shard that may not be moved again.
    fn arrive(&mut self, weight: u64) {
        self.load += weight;
        self.heaviest_fixed = self.heaviest_fixed.max(weight);
    }
}

/// Makes a plan: pure and deterministic.
pub fn plan(input: &PlanInput) -> Plan<Proposed> {
    Plan::new(Planning::new(input).run())
}

struct Planning<'a> {
    input: &'a PlanInput,
    weights: Vec<u64>,
    /// Index of each shard's owner among the members; `None`: nobody, or somebody who is not among them.
    owners: Vec<Option<usize>>,
    staying: Vec<usize>,
    /// Load of a member that has neither too much nor too little.
    fair: u64,
}

/// How far measured loads may be from the fair share by chance, in the unit of the weights.
#[derive(Clone, Copy, Debug, Default)]
struct Noise {
    /// Less than the fair share by that much.
    below: u64,
    /// More than the fair share by that much.
    above: u64,
    /// The standard deviation.
    deviation: u64,
}

impl Noise {
    /// Of one of `members` equal shares of `traffic` messages a second. The square root of a Poisson count has a standard deviation of 1/2
    /// whatever its mean (Bartlett 1936), so the band is symmetric there: a member that has next to nothing stands out
    /// even where the band is wide.
    fn of(traffic: f64, members: usize, window: Duration) -> Self {
        let seconds = window.as_secs_f64();
        if seconds == 0.0 || traffic <= 0.0 {
            return Self::default();
        }
        let units = |load: f64| (load * WEIGHT_UNITS).round() as u64;
        let half_band = NOISE_BAND / 2.0 / seconds.sqrt();
        let (low, high) = ((traffic.sqrt() - half_band).max(0.0), traffic.sqrt() + half_band);
        Self {
            below: units(traffic - low * low),
            // Nobody has more than there is.
            above: units((high * high - traffic).min(traffic * members as f64)),
            deviation: units((traffic / seconds).sqrt()),
        }
    }
}

/// Down to where members are evened out.
struct Goal {
    excess_max: u64,
    deficit_max: u64,
    /// Who has more excess than that may give a lump to somebody who passes on crumbs.
    rough: u64,
}

impl<'a> Planning<'a> {
    fn new(input: &'a PlanInput) -> Self {
        let index: HashMap<&MemberId, usize> =
            input.members.iter().enumerate().map(|(i, member)| (&member.id, i)).collect();
        let owner = |shard: &PlanShard| shard.row.owner.as_ref().and_then(|owner| index.get(owner).copied());
        let weights: Vec<u64> = input.shards.iter().map(|shard| weight(shard.load, input.idle_load)).collect();
        let staying: Vec<usize> = (0..input.members.len()).filter(|i| !input.members[*i].leaving).collect();
        let fair = fair_share(&weights, staying.len());
        Self { owners: input.shards.iter().map(owner).collect(), fair, weights, staying, input }
    }

    fn run(self) -> Vec<Move> {
        if self.staying.is_empty() {
            return Vec::new();
        }
        let mut unowned = Vec::new();
        let mut leaving = Vec::new();
        for (i, shard) in self.input.shards.iter().enumerate() {
            match self.owners[i] {
                // Who is not among the members may still hold it: that is for the lost-owner rules to say, not for a plan.
                None if shard.row.owner.is_none() && !shard.pinned => unowned.push(i),
                Some(owner) if self.input.members[owner].leaving && !shard.pinned => leaving.push(i),
                None | Some(_) => {}
            }
        }
        let mut bins = self.bins();
        // One shard more or less can't be helped.
        let lightest = self.weights.iter().copied().min().unwrap_or(1).saturating_sub(1);
        let part = |fraction: f64| (self.fair as f64 * self.input.tolerance * fraction) as u64;
        let rough = part(ROUGH_PART).max(lightest);

        // First what is a large part of a share finds its place; then members that are far above their share give, while
        // there is room; what else has to move fills the gaps.
        let by_weight = |shard: &usize| (Reverse(self.weights[*shard]), *shard);
        unowned.sort_by_key(by_weight);
        leaving.sort_by_key(by_weight);
        let mut homeless: Vec<usize> = unowned.iter().chain(&leaving).copied().collect();
        homeless.sort_by_key(by_weight);
        let large = homeless.partition_point(|shard| self.weights[*shard] > self.fair / LARGE_PARTS);
        let (large, small) = homeless.split_at(large);
        let mut targets = vec![0; self.weights.len()];
        self.place(&mut bins, large, &mut targets);
        let mut given = Vec::new();
        if !small.is_empty() {
            let only_the_full = Goal { excess_max: rough, deficit_max: u64::MAX, rough };
            given = self.even_out(&mut bins, only_the_full, usize::MAX);
        }
        self.place(&mut bins, small, &mut targets);
        let mut moves: Vec<(Shard, usize)> =
            unowned.iter().chain(&leaving).map(|shard| (*shard as Shard, targets[*shard])).collect();
        moves.extend(given);
        let idle = self.weights.len() as f64 * self.input.idle_load / self.staying.len() as f64;
        let traffic = self.fair as f64 / WEIGHT_UNITS - idle;
        let noise = Noise::of(traffic, self.staying.len(), self.input.load_window);
        let settle = part(SETTLE_PART).max((noise.deviation as f64 * NOISE_SETTLED) as u64);
        let start = |noise: u64| part(1.0).max(settle.max(lightest) + noise);
        let within = |bin: &Bin| {
            bin.excess(self.fair) <= start(noise.above) && bin.load.saturating_add(start(noise.below)) >= self.fair
        };
        if !self.staying.iter().all(|i| within(&bins[*i])) {
            let goal = Goal { excess_max: settle, deficit_max: settle, rough };
            let room = self.input.moves_max.saturating_sub(moves.len());
            moves.extend(self.even_out(&mut bins, goal, room));
        }
        moves.truncate(self.input.moves_max);
        moves.into_iter().map(|(shard, to)| self.planned(shard, to)).collect()
    }

    fn planned(&self, shard: Shard, to: usize) -> Move {
        let row = &self.input.shards[shard as usize].row;
        Move { shard, epoch: row.epoch, from: row.owner.clone(), to: self.input.members[to].id.clone() }
    }

    /// Places shards one by one with the least loaded of those who stay.
    fn place(&self, bins: &mut [Bin], shards: &[usize], targets: &mut [usize]) {
        let mut placement = Placement::new(self.staying.iter().map(|i| (*i, bins[*i].load)));
        for shard in shards {
            let Some(to) = placement.place(self.weights[*shard]) else { return };
            bins[to].arrive(self.weights[*shard]);
            targets[*shard] = to;
        }
    }

    /// The members with the shards that they have; of one that leaves, nothing that is going to be placed.
    fn bins(&self) -> Vec<Bin> {
        let mut bins: Vec<Bin> = self.input.members.iter().map(|_| Bin::default()).collect();
        for (i, shard) in self.input.shards.iter().enumerate() {
            let Some(owner) = self.owners[i] else { continue };
            let rests = shard.moved_at.is_some_and(|at| self.input.now.saturating_sub(at) < self.input.cooldown);
            if shard.pinned || rests {
                bins[owner].arrive(self.weights[i]);
            } else {
                bins[owner].load += self.weights[i];
                bins[owner].movable.insert((self.weights[i], i as Shard));
            }
        }
        bins
    }

    /// The fullest give to the emptiest until the goal is reached, or nothing helps any more. Each shard moves at most once,
    /// so it ends.
    fn even_out(&self, bins: &mut [Bin], goal: Goal, moves_max: usize) -> Vec<(Shard, usize)> {
        let fair = self.fair;
        let mut moves = Vec::new();
        let mut donors: BTreeSet<(u64, Reverse<usize>)> =
            self.staying.iter().map(|i| (bins[*i].excess(fair), Reverse(*i))).collect();
        let mut receivers: BTreeSet<(u64, usize)> = self.staying.iter().map(|i| (bins[*i].load, *i)).collect();
        while moves.len() < moves_max {
            let (Some(&(excess, Reverse(donor))), Some(&(load, emptiest))) = (donors.last(), receivers.first()) else {
                break;
            };
            let deficit = fair.saturating_sub(load);
            if donor == emptiest || (excess <= goal.excess_max && deficit <= goal.deficit_max) {
                break;
            }
            let chosen = match choose(&bins[donor], excess, deficit, load) {
                Some(shard) => Some((emptiest, shard)),
                None if excess > goal.rough => make_room(bins, &receivers, donor, excess, fair),
                None => None,
            };
            donors.remove(&(excess, Reverse(donor)));
            let Some((receiver, (weight, shard))) = chosen else {
                // Nothing of it helps anybody: leave it as it is.
                continue;
            };
            donors.remove(&(bins[receiver].excess(fair), Reverse(receiver)));
            receivers.remove(&(bins[donor].load, donor));
            receivers.remove(&(bins[receiver].load, receiver));
            bins[donor].load -= weight;
            bins[donor].movable.remove(&(weight, shard));
            bins[receiver].arrive(weight);
            for member in [donor, receiver] {
                donors.insert((bins[member].excess(fair), Reverse(member)));
                receivers.insert((bins[member].load, member));
            }
            moves.push((shard, receiver));
        }
        moves
    }
}

/// What a member should carry, once each shard that is heavier than that has a member of its own.
fn fair_share(weights: &[u64], members: usize) -> u64 {
    let mut heaviest_first = weights.to_vec();
    heaviest_first.sort_unstable_by_key(|weight| Reverse(*weight));
    let mut rest: u64 = heaviest_first.iter().sum();
    let mut members = members as u64;
    for weight in heaviest_first {
        if members <= 1 || weight <= rest / members {
            break;
        }
        rest -= weight;
        members -= 1;
    }
    rest.div_ceil(members.max(1))
}

/// The shard that the donor should give: the heaviest that leaves the donor at or above its share and the receiver at or
/// below; else the lightest, if the receiver then still has less than the donor had.
fn choose(donor: &Bin, excess: u64, deficit: u64, receiver_load: u64) -> Option<(u64, Shard)> {
    let fits = excess.min(deficit);
    if let Some(found) = donor.movable.range(..=(fits, Shard::MAX)).next_back() {
        return Some(*found);
    }
    let lightest = donor.movable.first()?;
    (receiver_load + lightest.0 < donor.load).then_some(*lightest)
}

/// For a donor of which nothing fits anywhere, since it has only lumps left: its lightest shard, and one of the emptier
/// members that can pass on enough small shards to take it in.
fn make_room(
    bins: &[Bin],
    receivers: &BTreeSet<(u64, usize)>,
    donor: usize,
    excess: u64,
    fair: u64,
) -> Option<(usize, (u64, Shard))> {
    const RECEIVERS_MAX: usize = 8;
    const CRUMBS_MAX: usize = 256;
    let lump = *bins[donor].movable.first()?;
    let has_room = |receiver: &usize| {
        let bin = &bins[*receiver];
        let too_much = (bin.load + lump.0).saturating_sub(fair);
        let crumbs = bin.movable.range(..(excess, 0)).rev().take(CRUMBS_MAX).map(|(weight, _)| weight);
        *receiver != donor && crumbs.sum::<u64>() >= too_much
    };
    let receiver = receivers.iter().take(RECEIVERS_MAX).map(|(_, receiver)| *receiver).find(has_room)?;
    Some((receiver, lump))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Instant;

    fn members(n: usize) -> Vec<PlanMember> {
        let id = |i: usize| MemberId::new(&format!("business-{i}"), i as u64).expect("a good name");
        (0..n).map(|i| PlanMember { id: id(i), leaving: false }).collect()
    }

    /// `owners[i]` is the index of shard i's owner.
    fn input(members: Vec<PlanMember>, owners: &[Option<usize>], loads: impl Fn(usize) -> f64) -> PlanInput {
        let shard = |(i, owner): (usize, &Option<usize>)| PlanShard {
            row: Ownership { epoch: 1, owner: owner.map(|o| members[o].id.clone()) },
            load: loads(i),
            moved_at: None,
            pinned: false,
        };
        let shards = owners.iter().enumerate().map(shard).collect();
        PlanInput {
            now: Duration::from_secs(1_000),
            members,
            shards,
            cooldown: Duration::from_secs(60),
            moves_max: usize::MAX,
            tolerance: 0.1,
            idle_load: 0.1,
            load_window: Duration::from_secs(10),
        }
    }

    /// Owners by index once the plan has run; checks that each move starts where the shard is and none moves twice.
    fn after(input: &PlanInput, plan: &Plan) -> Vec<Option<usize>> {
        let index = |id: &MemberId| input.members.iter().position(|member| member.id == *id);
        let mut owners: Vec<Option<usize>> =
            input.shards.iter().map(|s| s.row.owner.as_ref().and_then(index)).collect();
        let mut moved = BTreeSet::new();
        for Move { shard, from, to, .. } in plan.moves() {
            assert!(moved.insert(*shard), "shard {shard} moves twice");
            assert_eq!(*from, input.shards[*shard as usize].row.owner);
            assert_ne!(from.as_ref(), Some(to));
            owners[*shard as usize] = index(to);
        }
        owners
    }

    fn loads(input: &PlanInput, owners: &[Option<usize>]) -> Vec<f64> {
        let mut loads = vec![0.0; input.members.len()];
        for (shard, owner) in owners.iter().enumerate() {
            loads[owner.expect("everything is owned after an unlimited plan")] += input.shards[shard].load;
        }
        loads
    }

    fn counts(owners: &[Option<usize>], members: usize) -> Vec<usize> {
        let mut counts = vec![0; members];
        for owner in owners.iter().flatten() {
            counts[*owner] += 1;
        }
        counts
    }

    /// The fewest moves from these counts to ones that differ by at most one: who has most keeps one more.
    fn lower_bound(counts: &[usize], staying: &[usize], shards: usize) -> usize {
        let (share, more) = (shards / staying.len(), shards % staying.len());
        let mut sorted: Vec<usize> = staying.iter().map(|i| counts[*i]).collect();
        sorted.sort_unstable_by_key(|count| Reverse(*count));
        let kept: usize = sorted.iter().enumerate().map(|(i, count)| (*count).min(share + usize::from(i < more))).sum();
        shards - kept
    }

    #[test]
    fn a_new_member_gets_its_share_and_nothing_else_moves() {
        for (before, shards) in [(1, 256), (3, 1_024), (20, 1_024), (7, 16_384)] {
            let owners: Vec<Option<usize>> = (0..shards).map(|i| Some(i % before)).collect();
            let input = input(members(before + 1), &owners, |_| 5.0);
            let plan = plan(&input);
            let counts = counts(&after(&input, &plan), before + 1);
            let share = shards as f64 / (before + 1) as f64;
            assert!(counts[before] as f64 >= share * 0.9, "{counts:?}");
            assert!(plan.moves().len() <= shards.div_ceil(before + 1), "{} moves", plan.moves().len());
            assert!(plan.moves().iter().all(|m| m.to == input.members[before].id));
        }
    }

    #[test]
    fn who_leaves_is_emptied_first_and_unowned_shards_come_before() {
        let mut owners: Vec<Option<usize>> = (0..100).map(|i| Some(i % 4)).collect();
        owners[7] = None;
        let mut input = input(members(4), &owners, |i| if i < 50 { 1.0 } else { 0.0 });
        input.members[2].leaving = true;
        input.moves_max = 10;
        let first = plan(&input);
        assert_eq!(first.moves().len(), 10);
        assert_eq!((first.moves()[0].shard, first.moves()[0].from.as_ref()), (7, None));
        assert!(first.moves()[1..].iter().all(|m| m.from.as_ref() == Some(&input.members[2].id)));
        input.moves_max = usize::MAX;
        assert_eq!(counts(&after(&input, &plan(&input)), 4)[2], 0);
    }

    #[test]
    fn nothing_moves_without_need() {
        let owners: Vec<Option<usize>> = (0..1_000).map(|i| Some(i % 10)).collect();
        let balanced = input(members(10), &owners, |i| 10.0 + (i % 7) as f64);
        assert_eq!(plan(&balanced).moves(), []);
        // A few idle shards more on one member are nothing; nor is noise near zero load.
        let noisy = input(members(10), &owners, |i| if i % 10 == 3 { 0.005 } else { 0.0 });
        assert_eq!(plan(&noisy).moves(), []);
        // With nobody to go to, nothing moves either.
        let mut all_leave = balanced;
        all_leave.members.iter_mut().for_each(|member| member.leaving = true);
        assert_eq!(plan(&all_leave).moves(), []);
        assert_eq!(plan(&input(Vec::new(), &[None, None], |_| 1.0)).moves(), []);
    }

    #[test]
    fn what_chance_explains_moves_nothing() {
        let owners: Vec<Option<usize>> = (0..100).map(|i| Some(i % 4)).collect();
        // Shares of 50 a second, measured over 10 s: the standard deviation is 2.2, the first member has 10 more.
        let light = input(members(4), &owners, |i| if i % 4 == 0 { 2.4 } else { 2.0 });
        assert_eq!(plan(&light).moves(), []);
        let exact = PlanInput { load_window: Duration::ZERO, ..light.clone() };
        assert_ne!(plan(&exact).moves(), []);
        // The same proportions with a hundred times the traffic are no chance.
        let heavy = input(members(4), &owners, |i| if i % 4 == 0 { 240.0 } else { 200.0 });
        assert_ne!(plan(&heavy).moves(), []);
        // Nor is it chance that somebody has nothing at all.
        let newcomer = input(members(5), &owners, |_| 0.4);
        assert!(plan(&newcomer).moves().len() >= 15, "{:?}", plan(&newcomer).moves());
    }

    #[test]
    fn a_plan_leads_to_rest() {
        let owners: Vec<Option<usize>> = (0..1_024).map(|i| Some(i % 3)).collect();
        let mut input = input(members(5), &owners, |i| 1_000.0 / (i + 1) as f64);
        let owners = after(&input, &plan(&input));
        for (shard, owner) in owners.iter().enumerate() {
            input.shards[shard].row.owner = owner.map(|o| input.members[o].id.clone());
        }
        assert_eq!(plan(&input).moves(), [], "the second plan finds nothing to do");
    }

    #[test]
    fn resting_and_pinned_shards_stay() {
        let owners: Vec<Option<usize>> = vec![Some(0); 64];
        let mut input = input(members(2), &owners, |_| 5.0);
        for (i, shard) in input.shards.iter_mut().enumerate() {
            shard.moved_at = (i % 2 == 0).then_some(Duration::from_secs(990));
            shard.pinned = i % 4 == 1;
        }
        let plan = plan(&input);
        assert!(!plan.moves().is_empty());
        assert!(plan.moves().iter().all(|m| m.shard % 4 == 3), "{plan:?}");
    }

    #[test]
    fn what_runs_is_what_was_shown() {
        let a_plan = |load: f64| {
            let owners: Vec<Option<usize>> = vec![Some(0); 16];
            plan(&input(members(2), &owners, move |i| if i == 0 { load } else { 1.0 }))
        };
        assert_eq!(a_plan(1.0).hash(), a_plan(1.0).hash());
        let (shown, other) = (a_plan(1.0), a_plan(9.0));
        assert_ne!(shown.hash(), other.hash());
        let refused = PlanError::OtherPlan { shown: other.hash(), approved: shown.hash() };
        assert_eq!(other.approve(shown.hash()), Err(refused));

        let mut map = ShardMap::new(16);
        for shard in 0..16 {
            map.merge(shard, &Ownership { epoch: 1, owner: Some(members(1)[0].id.clone()) });
        }
        let moved = shown.moves()[0].shard;
        let hash = shown.hash();
        let approved = shown.approve(hash).expect("its own hash");
        assert!(approved.clone().commit(&map).is_ok());
        map.merge(moved, &Ownership { epoch: 1, owner: None });
        assert_eq!(approved.commit(&map), Err(PlanError::Stale { shard: moved }));
    }

    /// Zipf(1.0) over 1,024 shards, ranks scattered by the seed; from no owner at all (`before` = 0), or from any number of
    /// members.
    fn spread_zipf(members_now: usize, before: usize, seed: u64) {
        let rank = |i: usize| (i as u64).wrapping_mul(2 * (seed % 512) + 1).wrapping_add(seed) % 1_024;
        let heaviest = 100_000.0;
        let owners: Vec<Option<usize>> = (0..1_024_usize).map(|i| i.checked_rem(before)).collect();
        let mut input = input(members(members_now.max(before)), &owners, |i| heaviest / (rank(i) + 1) as f64);
        input.members.iter_mut().skip(members_now).for_each(|member| member.leaving = true);
        let loads = loads(&input, &after(&input, &plan(&input)));
        let mean = loads.iter().sum::<f64>() / members_now as f64;
        let fullest = loads.iter().copied().fold(0.0, f64::max);
        assert!(fullest <= 1.10 * mean.max(heaviest), "fullest {fullest}, mean {mean}, heaviest {heaviest}");
        assert!(loads[members_now..].iter().all(|load| *load == 0.0));
    }

    /// Lumps that met on one member while small shards had been placed around them.
    #[test]
    fn lumps_that_once_stuck_together_are_parted() {
        spread_zipf(7, 10, 14_065_202_119_380_924_893);
        spread_zipf(7, 39, 3_103_800_124_315_262_712);
        spread_zipf(15, 18, 460_089_454_123_308_641);
    }

    /// The goal: 16,384 shards x 1,000 members in at most 50 ms. The best of a few runs, because the machine may
    /// be busy with other tests.
    #[test]
    fn the_largest_cluster_is_planned_in_50_ms() {
        let owners: Vec<Option<usize>> = (0..16_384).map(|i| Some(i % 700)).collect();
        let mut input = input(members(1_000), &owners, |i| 10_000.0 / (i + 1) as f64);
        for i in 0..100 {
            input.members[i * 7].leaving = true;
        }
        let timed = || {
            let started = Instant::now();
            assert!(!plan(&input).moves().is_empty());
            started.elapsed()
        };
        let best = (0..5).map(|_| timed()).min().expect("five runs");
        println!("16,384 shards x 1,000 members: {best:?}");
        assert!(best <= Duration::from_millis(50), "{best:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn uniform_load_moves_near_the_lower_bound(
            before in 1_usize..40,
            joining in 0_usize..10,
            leaving in 0_usize..10,
            shards in 1_usize..2_000,
            skew in 0_usize..5,
            load in prop_oneof![Just(0.0), Just(3e8)],
        ) {
            // Uneven at the start: the first members have more.
            let owners: Vec<Option<usize>> = (0..shards).map(|i| Some((i * i * skew / 7 + i) % before)).collect();
            let mut input = input(members(before + joining), &owners, |_| load);
            let leaving = leaving.min(before + joining - 1);
            input.members.iter_mut().take(leaving).for_each(|member| member.leaving = true);
            let plan = plan(&input);
            let staying: Vec<usize> = (leaving..before + joining).collect();
            let bound = lower_bound(&counts(&owners, before + joining), &staying, shards);
            let moves = plan.moves().len();
            prop_assert!(moves as f64 <= bound as f64 * 1.05, "{moves} moves, {bound} needed");
            // Within the tolerance, or one shard.
            let counts = counts(&after(&input, &plan), before + joining);
            let share = shards as f64 / staying.len() as f64;
            let slack = (share * 0.1).max(1.0) + 1e-9;
            for i in staying {
                prop_assert!((counts[i] as f64 - share).abs() <= slack, "{counts:?}");
            }
        }

        #[test]
        fn zipf_load_is_spread(members_now in 3_usize..=50, before in 0_usize..=50, seed in any::<u64>()) {
            spread_zipf(members_now, before, seed);
        }

        #[test]
        fn any_input_gives_a_valid_plan(
            owners in prop::collection::vec(prop::option::of(0_usize..8), 0..200),
            loads in prop::collection::vec(prop_oneof![any::<f64>(), 0.0..1e4], 200),
            leaving in prop::collection::vec(any::<bool>(), 8),
            moves_max in 0_usize..100,
        ) {
            let mut input = input(members(8), &owners, |i| loads[i]);
            input.members.iter_mut().zip(leaving).for_each(|(member, leaving)| member.leaving = leaving);
            input.moves_max = moves_max;
            let made = plan(&input);
            prop_assert!(made.moves().len() <= moves_max);
            let _ = after(&input, &made);
            let to_leaving = made.moves().iter().any(|m| input.members.iter().any(|p| p.leaving && p.id == m.to));
            prop_assert!(!to_leaving);
            prop_assert_eq!(plan(&input), made);
        }
    }
}
