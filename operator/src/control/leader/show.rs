//! What the loop shows: the status.

use super::super::lasting::LASTS;
use super::super::status::{
    DrainStatus, FileStatus, MOVES_LISTED_MAX, MemberStatus, MoveStatus, Proposal, Shards, Status, TierStatus, Tiers,
    member_state, no_message_lost, rfc3339,
};
use super::{Leader, TierState};
use crate::platform::{Platform, ProcessState, Tier};
use crate::shards::Snapshot;
use crate::shards::moves::Phase;
use im_crds::Scaling;
use im_proto::ids::MemberId;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime};

/// What is away as control begins lasts by then: members dial in and the first question runs into its deadline before.
const YOUNG: Duration = LASTS.saturating_mul(2);

impl<P: Platform> Leader<P> {
    pub(super) fn show(&self) {
        let snapshot = self.coordinator.snapshot(self.now());
        let spec = &self.cluster.spec;
        let fresh = self.links.values().filter(|link| link.tier == Tier::Business && self.is_live(link));
        let lag = fresh.map(|link| link.beat.watermark_lag_s).reduce(f64::max);
        let file_error = self.view.file_error.clone().or_else(|| self.cluster_error.clone());
        let status = Status {
            cluster: self.cluster.metadata.name.clone().unwrap_or_default(),
            mode: format!("{:?}", spec.mode),
            paused: spec.paused,
            at: rfc3339(SystemTime::now()),
            tiers: Tiers {
                gateway: self.show_tier(Tier::Gateway, &self.tiers.gateway, &snapshot),
                business: self.show_tier(Tier::Business, &self.tiers.business, &snapshot),
            },
            no_message_lost: no_message_lost(self.holes.values().sum(), &snapshot, lag),
            shards: self.show_shards(&snapshot),
            prometheus: self.prometheus.shown().cloned(),
            young: self.now() < YOUNG,
            watermark_lag_seconds: lag,
            events: self.happenings.clone(),
            file: FileStatus { ok: file_error.is_none(), error: file_error },
        };
        self.status.send_replace(status);
    }

    fn show_tier(&self, tier: Tier, state: &TierState, snapshot: &Snapshot) -> TierStatus {
        let (min, max) = match tier.scaling(&self.cluster) {
            Scaling::Fixed(replicas) => (replicas, replicas),
            Scaling::Auto(autoscaling) => (autoscaling.min_replicas, autoscaling.max_replicas),
        };
        let mut shown = TierStatus {
            desired: state.wanted.replicas,
            min,
            max,
            because: state.wanted.because.clone(),
            limited: state.wanted.limited,
            in_doubt: state.doubt.shown().is_some(),
            ..TierStatus::default()
        };
        let processes = self.view.of_tier(tier);
        let epochs = self.epochs();
        for process in processes {
            let leaving = state.leaving.get(&process.name);
            let leaves = leaving.is_some();
            let link = self.link_of(process);
            let heard = self.live_link(process).is_some();
            let leaving_word = match tier {
                Tier::Gateway => "draining",
                Tier::Business => "emptying",
            };
            let beat = link.map(|(_, link)| link.beat).unwrap_or_default();
            let mut member = MemberStatus {
                name: process.name.clone(),
                pid: process.pid,
                starts: process.starts,
                state: member_state(process.state, leaves.then_some(leaving_word), link.is_some(), heard),
                messages_per_second: beat.messages_per_second,
                cpu_cores: beat.cpu_cores,
                drain: leaving.map(|leaving| {
                    let since = self.now().saturating_sub(leaving.since);
                    DrainStatus::new(leaving.held_first, self.holds(tier, process, snapshot), since)
                }),
                ..MemberStatus::default()
            };
            match tier {
                Tier::Gateway => {
                    member.connections = Some(beat.connections);
                    member.draining = Some(leaves);
                }
                Tier::Business => {
                    let held = link.and_then(|(id, _)| Some((id, snapshot.members.get(id)?)));
                    member.shards = Some(held.map_or(0, |(_, held)| held.shards));
                    member.load = Some(held.map_or(0.0, |(_, held)| held.load));
                    member.epochs = held.and_then(|(id, _)| epochs.get(id).copied());
                }
            }
            shown.replicas += u32::from(!leaves && process.state == ProcessState::Running);
            shown.ready += u32::from(!leaves && heard);
            shown.members.push(member);
        }
        shown
    }

    /// Lowest and highest epoch of each owner's shards.
    fn epochs(&self) -> HashMap<&MemberId, (u64, u64)> {
        let mut epochs: HashMap<&MemberId, (u64, u64)> = HashMap::new();
        for row in self.coordinator.map().rows() {
            if let Some(owner) = &row.owner {
                let (low, high) = epochs.entry(owner).or_insert((row.epoch, row.epoch));
                (*low, *high) = ((*low).min(row.epoch), (*high).max(row.epoch));
            }
        }
        epochs
    }

    fn show_shards(&self, snapshot: &Snapshot) -> Shards {
        let mut per_member: BTreeMap<String, u32> = BTreeMap::new();
        for (member, held) in &snapshot.members {
            *per_member.entry(member.name().to_owned()).or_default() += held.shards;
        }
        let name = |member: &Option<MemberId>| member.as_ref().map(|member| member.name().to_owned());
        let phase = |phase| match phase {
            Phase::Releasing => "releasing",
            Phase::TakingBack => "takingBack",
            Phase::Acquiring => "acquiring",
        };
        let moves = snapshot.moving.iter().take(MOVES_LISTED_MAX).map(|moving| MoveStatus {
            shard: moving.shard,
            from: name(&moving.from),
            to: name(&moving.to),
            phase: phase(moving.phase).to_owned(),
        });
        Shards {
            total: snapshot.shards,
            owned: snapshot.shards - snapshot.unowned,
            moving: snapshot.moving.len() as u32,
            queued: snapshot.queued as u32,
            term: snapshot.version.term,
            number: snapshot.version.number,
            per_member,
            moves: moves.collect(),
            degraded: snapshot.degraded,
            hearing: snapshot.hearing,
            proposal: self.proposals.shown().map(|shown| Proposal {
                hash: shown.hash.clone(),
                moves: shown.content.plan.moves().len(),
                what: shown.content.sentences(),
            }),
            stale_approval: self.stale_approval.clone(),
            waits: self.waits.clone(),
            store_away: self.store_away.shown().cloned(),
        }
    }
}
