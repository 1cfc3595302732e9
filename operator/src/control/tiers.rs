//! How a tier gets from the members that run to the number that is wanted: pure, one round at a time.
//!
//! A member leaves in two steps. First what it holds goes elsewhere (a gateway's connections are shed, a business member's
//! shards are moved), then its process is stopped. Until then the way back is open: a tier that grows again takes back who
//! is leaving before it starts anybody new, and who is leaving stays in the place of one that fails. Members with an
//! outdated configuration are replaced the same way, a few at a time: so many more are started, and once all are ready as
//! many outdated ones leave.

use crate::platform::Tier;
use std::time::Duration;

/// How far a member is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stage {
    /// Its process is there, but it does not serve (not yet, or not now).
    Starting,
    /// It ended by itself, or has not served for so long that nobody knows whether it ever will.
    Failing,
    /// It serves.
    Ready,
    /// What it holds goes elsewhere.
    Leaving {
        /// Nothing is left.
        empty: bool,
        /// It should have been empty by now.
        overdue: bool,
    },
    /// Its process was told to end. Its name is in use until it has.
    Stopping,
}

/// A member of the tier, as a round sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct TierMember {
    /// Its name.
    pub name: String,
    /// How far it is.
    pub stage: Stage,
    /// What it holds: connections, or shards.
    pub cost: u64,
    /// It runs with a configuration that is no longer wanted.
    pub outdated: bool,
}

impl TierMember {
    /// Whether it is one of those that serve, or are to.
    pub fn is_to_serve(&self) -> bool {
        matches!(self.stage, Stage::Starting | Stage::Failing | Stage::Ready)
    }
}

/// What a round does with a member.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Start so many new ones.
    Start(u32),
    /// Begin to move away what it holds.
    Leave(String),
    /// Keep it after all.
    Return(String),
    /// End its process.
    Stop(String),
}

/// The next steps towards `desired` members of which some are there, the oldest first, and `ordered` more were asked for. While
/// members with an outdated configuration are replaced, there may be up to `surge_max` more.
pub fn next_steps(tier: Tier, desired: u32, surge_max: u32, members: &[TierMember], ordered: u32) -> Vec<Step> {
    let mut steps = Vec::new();
    // The youngest first.
    let serving: Vec<&TierMember> = members.iter().rev().filter(|member| member.is_to_serve()).collect();
    let all_ready = ordered == 0 && serving.iter().all(|member| member.stage == Stage::Ready);
    let surge = (serving.iter().filter(|member| member.outdated).count() as u32).min(surge_max);
    let count = serving.len() as u32 + ordered;
    let allowed = if all_ready { desired } else { desired + surge };

    let mut failing: Vec<&TierMember> = Vec::new();
    if count <= allowed {
        failing.extend(serving.iter().filter(|member| member.stage == Stage::Failing && member.cost == 0));
    }
    let mut leaving: Vec<&TierMember> = Vec::new();
    for member in members {
        let Stage::Leaving { empty, overdue } = member.stage else { continue };
        // Of one that could serve and one that fails, the latter goes; a Deployment that shrinks takes it first anyway.
        if let Some(position) = failing.iter().position(|failing| failing.outdated == member.outdated) {
            steps.push(Step::Stop(failing.remove(position).name.clone()));
            steps.push(Step::Return(member.name.clone()));
            continue;
        }
        match (empty, overdue, tier) {
            // The rest of an overdue gateway's connections is closed by its own end.
            (true, _, _) | (_, true, Tier::Gateway) => steps.push(Step::Stop(member.name.clone())),
            // Shards that could not be moved would be without owner for a moment: it rather stays.
            (false, true, Tier::Business) => steps.push(Step::Return(member.name.clone())),
            (false, false, _) => leaving.push(member),
        }
    }

    if count < desired + surge {
        let mut missing = desired + surge - count;
        // The least drained first: it has most left to keep.
        leaving.retain(|member| !member.outdated);
        leaving.sort_by_key(|member| std::cmp::Reverse(member.cost));
        for member in leaving {
            if missing > 0 {
                steps.push(Step::Return(member.name.clone()));
                missing -= 1;
            }
        }
        if missing > 0 {
            steps.push(Step::Start(missing));
        }
    } else if count > allowed {
        let mut excess = (count - allowed) as usize;
        // Who never got ready and holds nothing goes first, all in one step, and needs no leaving. While outdated members
        // are being replaced their successors are exactly such members, and are spared.
        let (mut idle, mut ready) = (Vec::new(), Vec::new());
        let mut lost = 0;
        for member in serving {
            match member.stage {
                Stage::Ready => ready.push(member),
                _ if member.cost == 0 => idle.push(member),
                _ => lost += 1,
            }
        }
        let unready = idle.len() + lost + ordered as usize;
        idle.sort_by_key(|member| !member.outdated);
        let stopped = idle.into_iter().take(excess).map(|member| Step::Stop(member.name.clone()));
        let before = steps.len();
        steps.extend(stopped);
        let stopped = steps.len() - before;
        excess -= stopped;
        // Nobody leaves while another that is to stay is not ready.
        if unready == stopped {
            ready.sort_by_key(|member| (!member.outdated, member.cost));
            steps.extend(ready.into_iter().take(excess).map(|member| Step::Leave(member.name.clone())));
        }
    }
    steps
}

/// Connections a second that one draining gateway may shed: its part of what the others can take in. A fifth of their
/// connect rate, because reconnecting costs more than staying, and their own clients come and go as well.
pub fn drain_rate(rate_max: u32, connect_rate: u32, connections_max: u32, draining: usize, others: &[u64]) -> f64 {
    let room: u64 = others.iter().map(|connections| u64::from(connections_max).saturating_sub(*connections)).sum();
    let intake = 0.2 * f64::from(connect_rate) * others.len() as f64;
    // Without room shedding would only move the crowd in circles.
    intake.min(f64::from(rate_max)).min(room as f64) / draining.max(1) as f64
}

/// What gateways that stay go through while clients come to them from others.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Strain {
    /// Milliseconds from CONNECT to CONNACK, at the slowest of them.
    pub connect_ms: f64,
    /// Clients that they keep out per second, all together.
    pub refused_per_second: f64,
}

impl Strain {
    /// That of these gateways: the slowest of them counts, since its clients wait there.
    pub fn of(gateways: impl Iterator<Item = Self>) -> Self {
        gateways.fold(Self::default(), |all, one| Self {
            connect_ms: all.connect_ms.max(one.connect_ms),
            refused_per_second: all.refused_per_second + one.refused_per_second,
        })
    }

    fn hurts(self) -> bool {
        self.connect_ms > CONNECT_MS_MAX || self.refused_per_second > 0.0
    }
}

/// Clients that wait longer for their CONNACK say that more come than can be taken in, milliseconds. An owner's registration is a
/// commit or two.
const CONNECT_MS_MAX: f64 = 500.0;
/// After the pace was halved its effect has to be seen before it is halved again: gateways average over 3 s, and say so each 0.5 s.
const EFFECT_SEEN: Duration = Duration::from_secs(4);
/// From a standstill to the full rate.
const RECOVERY: Duration = Duration::from_secs(60);
/// A drain never stands still: what is left at its deadline would come back all at once.
const PACE_MIN: f64 = 1.0 / 32.0;

/// Which part of what the others have room for is shed: halved while it hurts, and back to the whole little by little. Additive
/// increase and multiplicative decrease (Chiu and Jain 1989) find the rate that nobody knows: how fast clients come back, and
/// what it costs to take them in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    part: f64,
    looked_at: Duration,
    halved_at: Option<Duration>,
}

impl Pace {
    /// The whole, as of `now`.
    pub fn full(now: Duration) -> Self {
        Self { part: 1.0, looked_at: now, halved_at: None }
    }

    /// From above 0 to 1.
    pub fn part(self) -> f64 {
        self.part
    }

    /// The pace at `now`, while the others go through `strain`.
    pub fn next(self, now: Duration, strain: Strain) -> Self {
        let elapsed = now.saturating_sub(self.looked_at);
        let waits = self.halved_at.is_some_and(|at| now.saturating_sub(at) < EFFECT_SEEN);
        let (part, halved_at) = match (strain.hurts(), waits) {
            (true, true) => (self.part, self.halved_at),
            (true, false) => ((self.part / 2.0).max(PACE_MIN), Some(now)),
            (false, _) => ((self.part + elapsed.as_secs_f64() / RECOVERY.as_secs_f64()).min(1.0), self.halved_at),
        };
        Self { part, looked_at: now, halved_at }
    }
}

/// A gateway this much above the mean sheds some of its connections …
const CROWDED: f64 = 1.5;
/// … until it is only so much above it.
const LEVEL: f64 = 1.1;
/// Fewer than so many above the mean are not worth a reconnect.
const CROWD_MIN: f64 = 100.0;
/// … and so few are left where they are once it has begun.
const CROWD_LEFT: f64 = 20.0;
/// In about that time the crowd has gone, if there is room.
const LEVEL_SECONDS: f64 = 60.0;
/// The part of what others can take in that levelling may use: drains, which can't wait, have the rest.
const LEVEL_PART: f64 = 0.25;

/// Connections a second that a gateway which serves is to shed because it holds `own` and the `others` far fewer, as after
/// a scale-out: long-lived connections don't move by themselves. `None`: it keeps them. `sheds`: it does so already.
pub fn level_rate(
    own: u64,
    sheds: bool,
    rate_max: u32,
    connect_rate: u32,
    connections_max: u32,
    others: &[u64],
) -> Option<f64> {
    let own = own as f64;
    let mean = (own + others.iter().map(|held| *held as f64).sum::<f64>()) / (others.len() + 1) as f64;
    let begins = own > mean * CROWDED && own - mean >= CROWD_MIN;
    let goes_on = sheds && own > mean * LEVEL && own - mean >= CROWD_LEFT;
    if !(begins || goes_on) {
        return None;
    }
    let below: Vec<u64> = others.iter().copied().filter(|held| (*held as f64) < mean).collect();
    let intake = drain_rate(rate_max, connect_rate, connections_max, 1, &below) * LEVEL_PART;
    Some(((own - mean) / LEVEL_SECONDS).max(1.0).min(intake)).filter(|rate| *rate > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(index: u32) -> String {
        format!("m-{index}")
    }

    fn member(index: u32, stage: Stage, cost: u64) -> TierMember {
        TierMember { name: name(index), stage, cost, outdated: false }
    }

    const LEAVING: Stage = Stage::Leaving { empty: false, overdue: false };

    #[test]
    fn grows_by_what_is_neither_there_nor_asked_for() {
        let members = [member(0, Stage::Ready, 5), member(2, Stage::Stopping, 0)];
        assert_eq!(next_steps(Tier::Gateway, 3, 1, &members, 0), [Step::Start(2)]);
        assert_eq!(next_steps(Tier::Gateway, 3, 1, &members, 1), [Step::Start(1)]);
        assert_eq!(next_steps(Tier::Gateway, 3, 1, &members, 2), []);
        assert_eq!(next_steps(Tier::Gateway, 1, 1, &members, 0), []);
        assert_eq!(next_steps(Tier::Gateway, 1, 1, &[member(0, Stage::Ready, 5), member(1, Stage::Ready, 5)], 1), []);
    }

    #[test]
    fn growing_takes_back_the_least_drained_before_it_starts_anybody() {
        let members = [member(0, Stage::Ready, 9), member(1, LEAVING, 3), member(2, LEAVING, 7)];
        assert_eq!(next_steps(Tier::Gateway, 2, 1, &members, 0), [Step::Return(name(2))]);
        assert_eq!(
            next_steps(Tier::Gateway, 4, 1, &members, 0),
            [Step::Return(name(2)), Step::Return(name(1)), Step::Start(1)]
        );
    }

    #[test]
    fn the_cheapest_leaves_and_the_newest_on_a_tie() {
        let members = [member(0, Stage::Ready, 3), member(1, Stage::Ready, 2), member(2, Stage::Ready, 2)];
        assert_eq!(next_steps(Tier::Gateway, 2, 1, &members, 0), [Step::Leave(name(2))]);
        assert_eq!(next_steps(Tier::Business, 1, 1, &members, 0), [Step::Leave(name(2)), Step::Leave(name(1))]);
    }

    #[test]
    fn who_never_got_ready_goes_first_and_nobody_leaves_while_another_is_not_ready() {
        let starting = member(3, Stage::Starting, 0);
        let members =
            [member(0, Stage::Ready, 3), member(1, Stage::Ready, 0), starting.clone(), member(4, Stage::Starting, 0)];
        assert_eq!(next_steps(Tier::Gateway, 2, 1, &members, 0), [Step::Stop(name(4)), Step::Stop(name(3))]);
        assert_eq!(next_steps(Tier::Gateway, 3, 1, &members, 0), [Step::Stop(name(4))]);
        assert_eq!(
            next_steps(Tier::Gateway, 1, 1, &members, 0),
            [Step::Stop(name(4)), Step::Stop(name(3)), Step::Leave(name(1))]
        );
        let lost = [member(0, Stage::Ready, 3), member(1, Stage::Ready, 1), member(2, Stage::Starting, 4)];
        assert_eq!(next_steps(Tier::Business, 2, 1, &lost, 0), [], "2 still holds something and does not answer");
    }

    #[test]
    fn an_empty_one_is_stopped_and_an_overdue_one_by_its_tier() {
        let empty = [member(0, Stage::Ready, 1), member(1, Stage::Leaving { empty: true, overdue: false }, 0)];
        assert_eq!(next_steps(Tier::Gateway, 1, 1, &empty, 0), [Step::Stop(name(1))]);
        let overdue = [member(0, Stage::Ready, 1), member(1, Stage::Leaving { empty: false, overdue: true }, 9)];
        assert_eq!(next_steps(Tier::Gateway, 1, 1, &overdue, 0), [Step::Stop(name(1))]);
        assert_eq!(next_steps(Tier::Business, 1, 1, &overdue, 0), [Step::Return(name(1))]);
    }

    /// Plays rounds in which every step succeeds, until nothing is left to do.
    #[test]
    fn who_leaves_stays_in_the_place_of_one_that_fails() {
        let leaving = |index, empty| member(index, Stage::Leaving { empty, overdue: false }, 1);
        let failing = member(1, Stage::Failing, 0);
        for (second, third, expected) in [
            (failing.clone(), leaving(2, true), vec![Step::Stop(name(1)), Step::Return(name(2))]),
            (failing.clone(), leaving(2, false), vec![Step::Stop(name(1)), Step::Return(name(2))]),
            (member(1, Stage::Starting, 0), leaving(2, true), vec![Step::Stop(name(2))]),
            // What it holds may still be there.
            (member(1, Stage::Failing, 7), leaving(2, true), vec![Step::Stop(name(2))]),
            // The old and the new configuration are not each other's places.
            (
                TierMember { outdated: true, ..failing.clone() },
                leaving(2, true),
                vec![Step::Stop(name(2)), Step::Start(1)],
            ),
            // Nobody takes the place of one that is stopped.
            (failing.clone(), member(2, Stage::Stopping, 0), vec![]),
        ] {
            let members = [member(0, Stage::Ready, 1), second.clone(), third.clone()];
            assert_eq!(next_steps(Tier::Gateway, 2, 1, &members, 0), expected, "{second:?}, {third:?}");
        }
        let members = [member(0, Stage::Ready, 1), failing, leaving(2, false)];
        assert_eq!(next_steps(Tier::Gateway, 1, 1, &members, 0), [Step::Stop(name(1))], "there is one too many anyway");
    }

    fn settle(tier: Tier, desired: u32, mut members: Vec<TierMember>) -> (Vec<TierMember>, Vec<u32>) {
        let mut ready_counts = Vec::new();
        let mut started = 1_000;
        for _ in 0..100 {
            let steps = next_steps(tier, desired, 1, &members, 0);
            if steps.is_empty() && members.iter().all(|m| m.stage == Stage::Ready) {
                return (members, ready_counts);
            }
            for step in &steps {
                match step {
                    Step::Start(count) => {
                        let fresh = started..started + count;
                        members.extend(fresh.map(|index| member(index, Stage::Starting, 0)));
                        started += count;
                    }
                    Step::Leave(name) => change(&mut members, name, LEAVING),
                    Step::Return(name) => change(&mut members, name, Stage::Ready),
                    Step::Stop(name) => change(&mut members, name, Stage::Stopping),
                }
            }
            ready_counts.push(members.iter().filter(|m| m.stage == Stage::Ready).count() as u32);
            members.retain(|m| m.stage != Stage::Stopping);
            for m in &mut members {
                m.stage = match m.stage {
                    Stage::Starting | Stage::Failing => Stage::Ready,
                    Stage::Leaving { .. } => Stage::Leaving { empty: true, overdue: false },
                    other => other,
                };
            }
        }
        panic!("does not settle: {members:?}");
    }

    fn change(members: &mut [TierMember], name: &str, stage: Stage) {
        let found = members.iter_mut().find(|m| m.name == name).expect("steps are about members");
        found.stage = stage;
    }

    #[test]
    fn a_new_configuration_replaces_all_without_ever_serving_with_fewer() {
        let outdated = |index| TierMember { outdated: true, ..member(index, Stage::Ready, 10) };
        let (members, ready_counts) = settle(Tier::Gateway, 3, (0..3).map(outdated).collect());
        assert_eq!(members.len(), 3);
        assert!(members.iter().all(|m| !m.outdated));
        assert!(ready_counts.iter().all(|ready| *ready >= 3), "{ready_counts:?}");
    }

    #[test]
    fn the_drain_rate_follows_what_the_others_can_take() {
        assert_eq!(drain_rate(500, 1_000, 10_000, 1, &[0, 0]), 400.0);
        assert_eq!(drain_rate(50, 1_000, 10_000, 1, &[0, 0]), 50.0);
        assert_eq!(drain_rate(500, 1_000, 10_000, 2, &[0, 0]), 200.0);
        assert_eq!(drain_rate(500, 1_000, 10_000, 1, &[10_000]), 0.0);
        assert_eq!(drain_rate(500, 1_000, 10_000, 1, &[]), 0.0);
    }

    #[test]
    fn a_drain_slows_down_while_it_hurts_and_comes_back_little_by_little() {
        let calm = Strain { connect_ms: 499.0, refused_per_second: 0.0 };
        let slow = Strain { connect_ms: 501.0, refused_per_second: 0.0 };
        let full = Strain { connect_ms: 5.0, refused_per_second: 0.1 };
        assert_eq!(Strain::of([calm, full, full].into_iter()), Strain { connect_ms: 499.0, refused_per_second: 0.2 });
        let mut pace = Pace::full(Duration::ZERO);
        // At that second, under that strain, this part.
        for (second, strain, part) in [
            (1, calm, 1.0),
            (2, slow, 0.5),
            (3, slow, 0.5),
            (5, full, 0.5),
            (6, full, 0.25),
            (9, calm, 0.3),
            (10, slow, 0.15),
            (14, slow, 0.075),
            (18, slow, 0.0375),
            (22, slow, PACE_MIN),
            (26, full, PACE_MIN),
            (56, calm, PACE_MIN + 0.5),
            (200, calm, 1.0),
            (201, slow, 0.5),
        ] {
            pace = pace.next(Duration::from_secs(second), strain);
            assert!((pace.part() - part).abs() < 1e-9, "{} at {second} s", pace.part());
        }
    }

    /// Clients come back at once to gateways that take in so many a second; what is more waits.
    #[test]
    fn a_drain_finds_what_the_others_can_take_in() {
        for (offered, taken_in) in [(500.0, 50.0), (500.0, 400.0), (100.0, 1_000.0)] {
            let (mut pace, mut queue, mut shed, mut longest_ms) = (Pace::full(Duration::ZERO), 0.0_f64, 0.0, 0.0_f64);
            for second in 1..=600 {
                let rate = offered * pace.part();
                shed += rate;
                queue = (queue + rate - taken_in).max(0.0);
                let strain = Strain { connect_ms: queue / taken_in * 1_000.0, refused_per_second: 0.0 };
                pace = pace.next(Duration::from_secs(second), strain);
                if second > 60 {
                    longest_ms = longest_ms.max(strain.connect_ms);
                }
            }
            let possible = offered.min(taken_in) * 600.0;
            println!(
                "{offered}/s to who takes {taken_in}/s: {:.0} % of what is possible, then at most {longest_ms:.0} ms",
                shed / possible * 100.0
            );
            assert!(shed > possible * 0.6, "{shed} of {possible}");
            assert!(longest_ms < 10_000.0, "{longest_ms} ms");
        }
    }

    #[test]
    fn a_crowded_gateway_sheds_slowly_and_only_while_it_is_far_above_the_mean() {
        let rate = |own, sheds, others: &[u64]| level_rate(own, sheds, 500, 1_000, 15_000, others);
        // 9,000 and two newcomers: 6,000 above the mean, in a minute; they take in 200 a second each.
        assert_eq!(rate(9_000, false, &[0, 0]), Some(100.0));
        assert_eq!(rate(12_000, false, &[0, 0]), Some(100.0), "a quarter of what they take in");
        assert_eq!(rate(4_400, false, &[3_000, 3_000]), None, "not far enough above");
        assert_eq!(
            rate(4_400, true, &[3_000, 3_000]),
            Some((4_400.0 - 10_400.0 / 3.0) / 60.0),
            "once begun it goes on"
        );
        assert_eq!(rate(3_200, true, &[3_000, 3_000]), None, "level enough");
        assert_eq!(rate(30, true, &[20, 20]), None, "a few more or less");
        assert_eq!(rate(90, false, &[0, 0]), None, "not worth it");
        assert_eq!(rate(9_000, false, &[]), None, "alone");
        assert_eq!(rate(15_000, false, &[14_000, 100]), Some(50.0), "who is full too takes nothing in");
        assert_eq!(level_rate(20_000, false, 500, 1_000, 8_000, &[8_000, 8_000]), None, "no room");
    }

    fn any_stage() -> impl Strategy<Value = Stage> {
        prop_oneof![
            Just(Stage::Starting),
            Just(Stage::Failing),
            Just(Stage::Ready),
            (any::<bool>(), any::<bool>()).prop_map(|(empty, overdue)| Stage::Leaving { empty, overdue }),
            Just(Stage::Stopping),
        ]
    }

    proptest! {
        /// From any state a tier gets to the number wanted, all of them up to date, and stays there.
        #[test]
        fn every_tier_settles_at_what_is_wanted(
            stages in proptest::collection::vec((any_stage(), 0_u64..100, any::<bool>()), 0..8),
            desired in 1_u32..6,
            gateway in any::<bool>(),
        ) {
            let tier = if gateway { Tier::Gateway } else { Tier::Business };
            let members = stages.into_iter().enumerate().map(|(i, (stage, cost, outdated))| TierMember {
                name: name(i as u32), stage, cost, outdated,
            });
            let (settled, _) = settle(tier, desired, members.collect());
            prop_assert_eq!(settled.len() as u32, desired);
            prop_assert!(settled.iter().all(|m| !m.outdated));
        }
    }
}
