//! A round of scaling and planning, and the measuring before it.

use super::super::proposal::{APPROVE_ANNOTATION, Change, Content, Verdict};
use super::super::scaling::{Observed, clock};
use super::super::status::{Outage, StoreAway, rfc3339};
use super::super::tiers::{Stage, Step, TierMember, next_steps};
use super::{Acts, Done, HEARD_WITHIN, Leader, Leaving, Link, Order, within};
use crate::autoscale::{Member, MemberState};
use crate::metrics::round::{Answers, Connector};
use crate::metrics::{Endpoint, Request, Round, Target, measure};
use crate::platform::process::STOP_GRACE;
use crate::platform::{Platform, PlatformError, Process, ProcessState, Tier};
use crate::shards::{Event, Move, Plan, Proposed, Snapshot, plan};
use im_crds::Mode;
use im_proto::ids::MemberId;
use std::time::{Duration, SystemTime};

/// A member that is silent for longer holds nothing that would keep it from being stopped.
const SILENT_HOLDS: Duration = Duration::from_secs(60);
/// A leaving business member that still owns shards after that stays.
const EMPTY_DEADLINE: Duration = Duration::from_secs(120);
/// An emptied business member stays that long, so that senders hear from itself who has its shards now.
const EMPTY_LINGER: Duration = Duration::from_secs(1);
/// A member that is there and does not serve for longer is not waited for.
const FAILS_AFTER: Duration = Duration::from_secs(30);
/// An approved change of a tier that is not done by then is given up.
const APPROVED_FOR: Duration = Duration::from_secs(1_800);

impl<P: Platform> Leader<P> {
    pub(super) fn round(&mut self) {
        let now = self.now();
        // Owners that did not dial in while control listened are nobody's address any more.
        if !self.hears() && !self.remembered.is_empty() {
            self.remembered.clear();
            self.map_changed = true;
        }
        self.note_refusals();
        let snapshot = self.coordinator.snapshot(now);
        self.note_outages(&snapshot);
        let acts = self.acts();
        let mut changes = Vec::new();
        for tier in Tier::ALL {
            changes.extend(self.scale(tier, acts, &snapshot));
        }
        self.spread_connections();
        self.order_gateways(acts);
        self.plan(acts, changes);
    }

    /// Decides about a tier and takes the next steps that may be taken; what else would have to be done is returned.
    fn scale(&mut self, tier: Tier, acts: Acts, snapshot: &Snapshot) -> Option<Change> {
        let now = self.now();
        self.note_absent(tier);
        self.note_leaving(tier, snapshot);
        self.note_empty(tier, snapshot);
        let members = self.tier_members(tier, snapshot);
        let ordered = self.view.ordered.of(tier);
        let rolling = members.iter().any(|member| member.outdated && member.is_to_serve());
        let wanted = {
            let (members, cores) = (&self.observed(tier), self.platform.cores(&self.cluster, tier));
            let observed = Observed { tier, members, ordered, rolling, signals: &self.signals, cores };
            self.tiers[tier].scaler.decide(now, tier.scaling(&self.cluster), &observed)
        };
        // During a roll-out no metric is looked at: what was in doubt stays so. Of nobody nothing is known, and that is right.
        if !rolling {
            let serves = members.iter().any(|member| member.stage == Stage::Ready);
            self.tiers[tier].doubt.see(now, (serves && wanted.is_in_doubt()).then_some(()));
        }
        self.counts.decided(&self.key().0, tier, wanted.replicas, &wanted.metrics);
        if self.tiers[tier].wanted.replicas != wanted.replicas {
            let because = wanted.because.first().map(|reason| format!(": {reason}")).unwrap_or_default();
            self.tell(format!("{tier}: {} wanted{because}", wanted.replicas));
        }
        let change = proposed_change(tier, wanted.replicas, &members, ordered);
        let (surge, initial) = (tier.surge(&self.cluster), tier.scaling(&self.cluster).initial());
        // Somebody has to be there before anything can be paused or recommended.
        let steps = match acts {
            _ if self.tiers[tier].acting => vec![],
            // Who holds what is not known before the members have been heard.
            _ if self.hears() && !members.is_empty() => vec![],
            _ if members.is_empty() && acts != Acts::Freely => next_steps(tier, initial, surge, &[], ordered),
            Acts::Freely => next_steps(tier, wanted.replicas, surge, &members, ordered),
            Acts::Approved => self.approved_steps(tier, &members, ordered),
            Acts::Never => vec![],
        };
        self.tiers[tier].wanted = wanted;
        // What was approved, or is on its way, is not proposed again.
        let state = &self.tiers[tier];
        let proposes = !members.is_empty() && state.approved.is_none() && !state.acting;
        self.take(tier, steps, snapshot);
        change.filter(|_| proposes)
    }

    fn acts(&self) -> Acts {
        match (self.cluster.spec.paused, self.cluster.spec.mode) {
            (true, _) => Acts::Never,
            (false, Mode::Recommend) => Acts::Approved,
            (false, Mode::Auto) => Acts::Freely,
        }
    }

    /// The steps of a tier that may only do what was approved, and may finish what it began.
    fn approved_steps(&mut self, tier: Tier, members: &[TierMember], ordered: u32) -> Vec<Step> {
        let now = self.now();
        let approved = self.tiers[tier].approved;
        let replaces = approved.is_some_and(|(change, _)| change.outdated > 0);
        let relevant = |member: &TierMember| TierMember { outdated: member.outdated && replaces, ..member.clone() };
        let members: Vec<TierMember> = members.iter().map(relevant).collect();
        let count = members.iter().filter(|member| member.is_to_serve()).count() as u32 + ordered;
        let target = approved.map_or(count, |(change, _)| change.to);
        let settled = members.iter().all(|member| member.stage == Stage::Ready && !member.outdated);
        if let Some((_, since)) = approved {
            let done = ordered == 0 && count == target && settled;
            if done || now.saturating_sub(since) >= APPROVED_FOR {
                self.tiers[tier].approved = None;
                let how = if done { "is done" } else { "could not be done in time; what is missing is proposed anew" };
                self.tell(format!("{tier}: what was approved {how}"));
            }
        }
        next_steps(tier, target, tier.surge(&self.cluster), &members, ordered)
    }

    /// Lets planned moves wait while the store refuses writes: each begins and ends with one.
    fn note_refusals(&mut self) {
        let refuses = |(member, link): (&MemberId, &Link)| {
            (self.is_live(link) && link.beat.store_refuses).then(|| member.name().to_owned())
        };
        let waits = self.links.iter().find_map(refuses);
        let waits = waits.map(|name| format!("planned moves wait: the store refuses the writes of {name}"));
        if waits.is_some() != self.waits.is_some() {
            self.tell(waits.clone().unwrap_or_else(|| "the store takes writes again: planned moves go on".to_owned()));
        }
        self.coordinator.hold_planned(waits.is_some());
        self.waits = waits;
    }

    /// Notes what has been away for a while.
    fn note_outages(&mut self, snapshot: &Snapshot) {
        let now = self.now();
        let heard = snapshot.members.iter().filter(|(_, member)| member.silent_for < HEARD_WITHIN);
        let heard: Vec<(&str, bool)> = heard.map(|(id, member)| (id.name(), member.store_ok)).collect();
        if self.store_away.see(now, StoreAway::of(&heard)) {
            let words = self.store_away.shown().map(ToString::to_string);
            self.tell(words.unwrap_or_else(|| "the store answers all members again".to_owned()));
        }
        if self.prometheus.see(now, self.signals.failing().map(Outage::of)) {
            let words = self.prometheus.shown().map(|outage| outage.message.clone());
            self.tell(words.unwrap_or_else(|| "Prometheus answers again".to_owned()));
        }
    }

    /// Notes since when each member that does not serve does not; as far as this leader saw.
    fn note_absent(&mut self, tier: Tier) {
        let now = self.now();
        let absent = self.view.of_tier(tier).filter(|process| self.live_link(process).is_none()).map(|process| {
            let since = self.tiers[tier].absent.get(&process.name).copied().unwrap_or(now);
            (process.name.clone(), since)
        });
        self.tiers[tier].absent = absent.collect();
    }

    /// Notes who goes by itself: it was told to end by somebody else (an eviction, a signal) and lives until it is empty.
    fn note_leaving(&mut self, tier: Tier, snapshot: &Snapshot) {
        let now = self.now();
        let mut going = Vec::new();
        let mut stays = Vec::new();
        for process in self.view.of_tier(tier) {
            let says_so = self.link_of(process).is_some_and(|(_, link)| link.beat.leaving);
            let known = self.tiers[tier].leaving.get(&process.name).map(|leaving| leaving.by_itself);
            if process.state == ProcessState::Stopping || says_so {
                if known != Some(true) {
                    going.push((process.name.clone(), self.holds(tier, process, snapshot), says_so));
                }
            } else if known == Some(true) {
                stays.push(process.name.clone());
            }
        }
        for name in stays {
            self.tiers[tier].leaving.remove(&name);
            self.mark_leaving(&name, false);
        }
        for (name, held_first, says_so) in going {
            if says_so {
                self.tell(format!("{name} was told to end: what it holds goes elsewhere first"));
            }
            let fresh = Leaving { since: now, by_itself: true, held_first, empty_since: None };
            self.tiers[tier].leaving.entry(name.clone()).or_insert(fresh).by_itself = true;
            self.mark_leaving(&name, true);
        }
    }

    /// What a member holds, as it said last, not too long ago: connections, or shards that it has or is about to get.
    pub(super) fn holds(&self, tier: Tier, process: &Process, snapshot: &Snapshot) -> u64 {
        let now = self.now();
        match (tier, self.link_of(process)) {
            // Connections end with their process.
            (Tier::Gateway, _) if process.state == ProcessState::Waiting => 0,
            (Tier::Gateway, Some((_, link))) if now.saturating_sub(link.heard) >= SILENT_HOLDS => 0,
            (Tier::Gateway, Some((_, link))) => link.beat.connections,
            (Tier::Business, Some((member, _))) => held_or_coming(snapshot, member),
            (_, None) if now >= SILENT_HOLDS => 0,
            // It was there before this leader, and has not said yet what it holds: something.
            (_, None) => process.instance.as_ref().is_some_and(|instance| self.inherited.contains(instance)).into(),
        }
    }

    /// Notes since when each leaving member of the tier holds nothing.
    fn note_empty(&mut self, tier: Tier, snapshot: &Snapshot) {
        let now = self.now();
        let holds_nothing = |name: &String, leaving: &Leaving| {
            let Some(process) = self.view.process(name) else { return true };
            match (tier, self.live_link(process)) {
                (Tier::Gateway, Some((_, link))) => {
                    leaving.since < link.heard && matches!(link.told, Some(Order::Drain(_))) && link.beat.drained
                }
                (Tier::Business, Some((member, _))) => held_or_coming(snapshot, member) == 0,
                // It ended by itself, or does not answer: only the first means that it holds nothing.
                (_, None) => process.state == ProcessState::Waiting,
            }
        };
        let state = &self.tiers[tier];
        let empty: Vec<bool> = state.leaving.iter().map(|(name, leaving)| holds_nothing(name, leaving)).collect();
        for (leaving, empty) in self.tiers[tier].leaving.values_mut().zip(empty) {
            leaving.empty_since = if empty { leaving.empty_since.or(Some(now)) } else { None };
        }
    }

    fn tier_members(&self, tier: Tier, snapshot: &Snapshot) -> Vec<TierMember> {
        let now = self.now();
        let state = &self.tiers[tier];
        let processes = self.view.of_tier(tier);
        let member = |process: &Process| {
            let stage = match (process.state, state.leaving.get(&process.name)) {
                (ProcessState::Stopping, _) => Stage::Stopping,
                // Told to end where the platform does not know: it comes back under its name.
                (_, Some(Leaving { by_itself: true, .. })) => Stage::Starting,
                (_, Some(leaving)) => {
                    let deadline = match tier {
                        Tier::Gateway => self.cluster.spec.gateway.drain.deadline.duration(),
                        Tier::Business => EMPTY_DEADLINE,
                    };
                    let lingers = match (tier, process.state) {
                        // With nobody there it lingers for nobody.
                        (Tier::Gateway, _) | (_, ProcessState::Waiting) => Duration::ZERO,
                        (Tier::Business, _) => EMPTY_LINGER,
                    };
                    let empty = leaving.empty_since.is_some_and(|since| now.saturating_sub(since) >= lingers);
                    Stage::Leaving { empty, overdue: now.saturating_sub(leaving.since) >= deadline }
                }
                (_, None) if self.live_link(process).is_some() => Stage::Ready,
                (ProcessState::Waiting, None) if process.starts > 1 => Stage::Failing,
                (_, None) if state.absent_for(process, now) >= FAILS_AFTER => Stage::Failing,
                (_, None) => Stage::Starting,
            };
            let cost = self.holds(tier, process, snapshot);
            TierMember { name: process.name.clone(), stage, cost, outdated: process.template != state.template }
        };
        processes.map(member).collect()
    }

    fn take(&mut self, tier: Tier, steps: Vec<Step>, snapshot: &Snapshot) {
        let now = self.now();
        let (mut count, mut stops) = (0, Vec::new());
        for step in steps {
            match step {
                Step::Start(more) => count += more,
                Step::Stop(name) => stops.push(name),
                Step::Leave(name) => {
                    let how = if tier == Tier::Gateway { "sheds its connections" } else { "gives its shards away" };
                    self.tell(format!("{name} leaves: it {how} first"));
                    let held_first = self.view.process(&name).map_or(0, |process| self.holds(tier, process, snapshot));
                    let leaving = Leaving { since: now, by_itself: false, held_first, empty_since: None };
                    self.tiers[tier].leaving.insert(name.clone(), leaving);
                    self.mark_leaving(&name, true);
                    self.round_due = true;
                }
                Step::Return(name) => {
                    self.tell(format!("{name} stays after all"));
                    self.tiers[tier].leaving.remove(&name);
                    self.mark_leaving(&name, false);
                }
            }
        }
        if count == 0 && stops.is_empty() {
            return;
        }
        self.tiers[tier].acting = true;
        let (platform, cluster) = (self.platform.clone(), self.cluster.clone());
        self.tasks.spawn(async move {
            let (mut told, mut complete) = (Vec::new(), true);
            let mut note = |outcome: Result<(), PlatformError>, done: String, not_done: String| {
                complete &= outcome.is_ok();
                told.push(outcome.map_or_else(|error| format!("{not_done}: {error}"), |()| done));
            };
            if count > 0 {
                let (done, not_done) =
                    (format!("{tier}: {count} more are started"), format!("{tier}: {count} more can't be started"));
                note(within(platform.start(&cluster, tier, count)).await, done, not_done);
            }
            for name in stops {
                let (done, not_done) = (format!("{name} is stopped"), format!("{name} can't be stopped"));
                note(within(platform.stop(&name, STOP_GRACE)).await, done, not_done);
            }
            Done::Steps { tier, told, complete }
        });
    }

    /// Tells the coordinator; a gateway is told by its orders.
    fn mark_leaving(&mut self, name: &str, leaving: bool) {
        let business = self.link(name).filter(|(_, link)| link.tier == Tier::Business);
        if let Some(member) = business.map(|(member, _)| member.clone()) {
            self.decide(Event::Leaving { member, leaving });
        }
    }

    /// Plans the shards' moves, and runs what may be run.
    fn plan(&mut self, acts: Acts, changes: Vec<Change>) {
        let proposed = self.coordinator.plan_input(self.now()).map(|input| plan(&input));
        if acts == Acts::Freely {
            self.proposals.clear();
            self.stale_approval = None;
            self.tiers.gateway.approved = None;
            self.tiers.business.approved = None;
            if let Some(proposed) = proposed.filter(|proposed| !proposed.moves().is_empty()) {
                self.begin(proposed);
            }
            return;
        }
        // Who goes by itself takes its shards with it whether or not anybody says yes, and what was approved to leave has
        // to be emptied.
        let goes = |name: &str| {
            let leaving = self.tiers.business.leaving.get(name);
            leaving.is_some_and(|leaving| leaving.by_itself || acts == Acts::Approved)
        };
        let moves = proposed.map(|proposed| proposed.moves().to_vec()).unwrap_or_default();
        let (due, optional): (Vec<_>, Vec<_>) =
            moves.into_iter().partition(|planned| planned.from.as_ref().is_some_and(|from| goes(from.name())));
        if !due.is_empty() {
            return self.begin(Plan::new(due));
        }
        let fresh = Content { plan: Plan::new(optional), changes };
        let (now, term) = (self.now(), self.coordinator.version().term);
        let coordinator = &self.coordinator;
        let fits = |shown: &Plan<Proposed>| {
            let able = |planned: &Move| coordinator.is_usable(now, &planned.to);
            shown.moves().iter().all(able)
                && shown.clone().approve(shown.hash()).is_ok_and(|approved| approved.commit(coordinator.map()).is_ok())
        };
        self.proposals.show(now, term, fresh, fits);
        if acts == Acts::Approved {
            self.approve();
        }
    }

    /// Runs a plan just as it is.
    fn begin(&mut self, proposed: Plan<Proposed>) {
        let (hash, moves) = (proposed.hash(), proposed.moves().len());
        match proposed.approve(hash).and_then(|approved| approved.commit(self.coordinator.map())) {
            Ok(committed) => {
                self.tell(format!("{moves} shards move, plan {hash:016x}"));
                self.decide(Event::NewPlan(committed));
            }
            Err(error) => tracing::info!("{error}"),
        }
    }

    /// Does what the ImCluster's annotation approves, if that is what is shown.
    fn approve(&mut self) {
        let now = self.now();
        let annotations = self.cluster.metadata.annotations.as_ref();
        let approval = annotations.and_then(|annotations| annotations.get(APPROVE_ANNOTATION)).cloned();
        match self.proposals.approve(approval.as_deref()) {
            Verdict::Nothing if approval.is_none() => self.stale_approval = None,
            Verdict::Nothing => {}
            Verdict::Stale(reason) => {
                self.tell(reason.clone());
                self.stale_approval = Some(reason);
            }
            Verdict::Run(content) => {
                self.stale_approval = None;
                self.tell(format!("approved: {}", content.sentences().join("; ")));
                for change in content.changes {
                    self.tiers[change.tier].approved = Some((change, now));
                }
                if !content.plan.moves().is_empty() {
                    self.begin(content.plan);
                }
                self.round_due = true;
            }
        }
    }

    /// Measures every live member, off this loop; while one round of it is under way there is no second.
    pub(super) fn measure(&mut self) {
        let Some(mut connector) = self.connector.take() else { return };
        let live = self.links.iter().filter(|(_, link)| self.is_live(link));
        let targets = live.map(|(member, link)| Target {
            name: member.name().to_owned(),
            tier: link.tier,
            address: link.admin_address.clone(),
        });
        let request = Request::of(&self.cluster, targets.collect(), clock(self.now()));
        // Reads files: small ones, and anew, since tokens change.
        let endpoint = Endpoint::of(&self.cluster, &self.measuring, |key| self.platform.secret(key));
        self.tasks.spawn(async move {
            let round = measure(&mut connector, endpoint, &request).await;
            Done::Measured { round, connector }
        });
    }

    pub(super) fn on_measured(&mut self, round: Round, connector: Connector) {
        self.connector = Some(connector);
        for error in round.prometheus.iter().flat_map(Answers::errors) {
            self.counts.failed(&self.key().0, error.reason());
        }
        let members = self.view.processes.iter().map(|process| process.name.clone()).collect();
        self.signals.absorb(&rfc3339(SystemTime::now()), &members, round);
    }

    /// What the autoscaler sees.
    fn observed(&self, tier: Tier) -> Vec<Member> {
        let leaving = &self.tiers[tier].leaving;
        let processes = self.view.of_tier(tier);
        let observed = processes.map(|process| {
            let goes = process.state == ProcessState::Stopping || leaving.contains_key(&process.name);
            let state = match (goes, self.live_link(process)) {
                (true, _) => MemberState::Draining,
                (false, Some(_)) => MemberState::Ready,
                (false, None) => MemberState::Starting,
            };
            Member { name: process.name.clone(), state }
        });
        observed.collect()
    }
}

/// Shards that a member holds or is about to get.
fn held_or_coming(snapshot: &Snapshot, member: &MemberId) -> u64 {
    let held = snapshot.members.get(member).map_or(0, |held| u64::from(held.shards));
    let coming = snapshot
        .moving
        .iter()
        .filter(|moving| moving.to.as_ref() == Some(member) && moving.from.as_ref() != Some(member));
    held + coming.count() as u64
}

/// What would have to be done with a tier, if anything.
fn proposed_change(tier: Tier, wanted: u32, members: &[TierMember], ordered: u32) -> Option<Change> {
    let serves = |member: &&TierMember| member.is_to_serve();
    let from = members.iter().filter(serves).count() as u32 + ordered;
    let outdated = members.iter().filter(serves).filter(|member| member.outdated).count() as u32;
    (from != wanted || outdated > 0).then_some(Change { tier, from, to: wanted, outdated })
}
