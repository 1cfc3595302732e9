//! Last step: what the ImCluster's status says. Pure, with time as a parameter.
//!
//! The status is for decisions of people and machines, not for dashboards: what changes all the time is a metric. So a
//! status is written only when it [means something else](is_news).

use super::decide::Problem;
use crate::autoscale::Limit;
use crate::control::status::{self as control, rfc3339};
use im_crds::{
    Condition, ConditionStatus, DrainStatus, ImClusterStatus, MEMBERS_LISTED_MAX, MemberStatus, ProposalStatus,
    ShardStatus, TierStatus,
};
use std::time::SystemTime;

/// What the controller knows, besides what control says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Situation {
    /// Generation of the spec that was looked at.
    pub generation: i64,
    /// What stands in the way.
    pub problem: Option<Problem>,
    /// Nothing is changed.
    pub paused: bool,
    /// Children that would be written, were it not paused.
    pub held_back: usize,
}

/// Reasons that stand until a new leader has looked for long enough to say that they are past.
const LASTING: [&str; 4] = ["StoreUnreachable", "PrometheusUnreachable", "QueryFails", "MetricsInDoubt"];

/// A condition without its times.
struct Verdict {
    kind: &'static str,
    status: ConditionStatus,
    reason: String,
    message: String,
}

impl Verdict {
    /// Whether it stands for something that is not as it should be.
    fn is_bad(&self) -> bool {
        (self.status == ConditionStatus::True) != (self.kind == "Ready")
    }
}

fn verdict(kind: &'static str, status: ConditionStatus, reason: &str, message: impl Into<String>) -> Verdict {
    Verdict { kind, status, reason: reason.to_owned(), message: message.into() }
}

fn holds(holds: bool) -> ConditionStatus {
    if holds { ConditionStatus::True } else { ConditionStatus::False }
}

/// The status at `now`; `shown` is what control says, if somebody leads. What control can't say while it is new stays as it
/// was: all of it before it says anything, and whether all is well while it still listens to the members.
pub fn status(
    previous: &ImClusterStatus,
    situation: &Situation,
    shown: Option<&control::Status>,
    now: SystemTime,
) -> ImClusterStatus {
    // A status before the first one is empty.
    let begins = shown.is_some_and(|shown| shown.cluster.is_empty());
    let shown = shown.filter(|shown| !shown.cluster.is_empty());
    // Somebody led before, and knew more than this one does yet.
    if shown.is_none() && (begins || situation.problem.is_none()) && previous.shards.total > 0 {
        return previous.clone();
    }
    let verdicts = [
        ready(situation, shown),
        progressing(situation, shown),
        degraded(situation, shown),
        rebalancing(shown),
        draining(shown),
        scaling_limited(shown),
        no_message_lost(shown),
    ];
    let (listens, young) = shown.map_or((false, false), |shown| (shown.shards.hearing, shown.young));
    let conditions = verdicts.into_iter().map(|verdict| {
        let known = previous.conditions.iter().find(|condition| condition.kind == verdict.kind);
        let unheard = match verdict.kind {
            "Ready" | "NoMessageLost" => listens,
            "Degraded" => listens && situation.problem.is_none(),
            _ => false,
        };
        let stands = |known: &&Condition| {
            let lasts = young && LASTING.contains(&known.reason.as_str()) && !verdict.is_bad();
            lasts || (unheard && known.reason != "Starting")
        };
        if let Some(known) = known.filter(stands) {
            return Condition { observed_generation: situation.generation, ..known.clone() };
        }
        let since = known.filter(|known| known.status == verdict.status);
        Condition {
            kind: verdict.kind.to_owned(),
            status: verdict.status,
            observed_generation: situation.generation,
            last_transition_time: since.map_or_else(|| rfc3339(now), |known| known.last_transition_time.clone()),
            reason: verdict.reason,
            message: verdict.message,
        }
    });
    let conditions = conditions.collect();
    let Some(shown) = shown else {
        return ImClusterStatus { observed_generation: situation.generation, conditions, ..previous.clone() };
    };
    ImClusterStatus {
        observed_generation: situation.generation,
        conditions,
        gateway: tier(&shown.tiers.gateway),
        business: tier(&shown.tiers.business),
        shards: ShardStatus {
            term: shown.shards.term,
            number: shown.shards.number,
            total: shown.shards.total,
            moving: shown.shards.moving,
            unowned: shown.shards.total.saturating_sub(shown.shards.owned),
            queued: shown.shards.queued,
        },
        drains: members(shown).filter_map(drain).collect(),
        proposals: proposals(shown),
        watermark_lag_seconds: shown.watermark_lag_seconds.map(|lag| (lag * 10.0).round() / 10.0),
    }
}

fn members(shown: &control::Status) -> impl Iterator<Item = &control::MemberStatus> {
    shown.tiers.gateway.members.iter().chain(&shown.tiers.business.members)
}

fn ready(situation: &Situation, shown: Option<&control::Status>) -> Verdict {
    let no = |reason: &str, message: String| verdict("Ready", ConditionStatus::False, reason, message);
    let Some(shown) = shown else {
        return match &situation.problem {
            Some(problem) => no(problem.reason, problem.message.clone()),
            None => no("Starting", "members are being started".to_owned()),
        };
    };
    let shards = &shown.shards;
    if shown.tiers.business.ready == 0 {
        no("NoBusinessMember", "no business member serves: nothing can be stored".to_owned())
    } else if shown.tiers.gateway.ready == 0 {
        no("NoGateway", "no gateway serves: no client can connect".to_owned())
    } else if let Some(away) = shards.store_away.as_ref().filter(|away| away.all) {
        no("StoreUnreachable", format!("{away}: nothing can be stored"))
    } else if shards.owned < shards.total {
        no("ShardsWithoutOwner", "some shards have no owner that lives: their conversations wait".to_owned())
    } else {
        verdict("Ready", ConditionStatus::True, "Serving", "clients can connect and send")
    }
}

fn progressing(situation: &Situation, shown: Option<&control::Status>) -> Verdict {
    let is = |status, reason: &str, message: &str| verdict("Progressing", status, reason, message);
    if situation.paused {
        let message = match situation.held_back {
            0 => "paused: nothing is changed".to_owned(),
            n => format!("paused: nothing is changed; {n} objects differ from what the spec asks for"),
        };
        return verdict("Progressing", ConditionStatus::False, "Paused", message);
    }
    let Some(shown) = shown else {
        return match &situation.problem {
            Some(problem) => is(ConditionStatus::False, problem.reason, "waits until what Ready names is put right"),
            None => is(ConditionStatus::True, "Starting", "members are being started"),
        };
    };
    let unsettled: Vec<&str> = [("gateways", &shown.tiers.gateway), ("business members", &shown.tiers.business)]
        .into_iter()
        .filter(|(_, tier)| tier.ready != tier.desired || tier.members.len() != tier.desired as usize)
        .map(|(name, _)| name)
        .collect();
    if let Some(stale) = &shown.shards.stale_approval {
        is(ConditionStatus::False, "ApprovalStale", stale)
    } else if shown.mode == "Recommend" && !proposals(shown).is_empty() {
        is(ConditionStatus::False, "WaitsForApproval", "changes are proposed, see status.proposals")
    } else if unsettled.is_empty() {
        is(ConditionStatus::False, "Settled", "as many members serve as there should be")
    } else {
        is(ConditionStatus::True, "Scaling", &format!("the number of {} is changing", unsettled.join(" and ")))
    }
}

fn degraded(situation: &Situation, shown: Option<&control::Status>) -> Verdict {
    let yes = |reason: &str, message: String| verdict("Degraded", ConditionStatus::True, reason, message);
    if let Some(problem) = &situation.problem {
        return yes(problem.reason, problem.message.clone());
    }
    let Some(shown) = shown else {
        return verdict("Degraded", ConditionStatus::Unknown, "Starting", "nothing is known yet");
    };
    if shown.shards.degraded {
        let message = "over half of the business members fell silent at once: nothing is taken from them for 15 s";
        return yes("MembersSilent", message.to_owned());
    }
    if let Some(away) = &shown.shards.store_away {
        return yes("StoreUnreachable", format!("{away}: see the database, and the way to it; tried again"));
    }
    if let Some(waits) = &shown.shards.waits {
        return yes("StoreRefuses", waits.clone());
    }
    // A pod that is fetched and started waits too; one that was started before and waits has crashed.
    let failing =
        |member: &&control::MemberStatus| member.state == "silent" || (member.state == "waiting" && member.starts > 1);
    let failing: Vec<&str> = members(shown).filter(failing).map(|member| member.name.as_str()).take(3).collect();
    if !failing.is_empty() {
        return yes("MembersFailing", format!("do not serve, see their pods' events and logs: {}", failing.join(", ")));
    }
    if let Some(outage) = &shown.prometheus {
        return yes(&outage.reason, format!("{}; tried again", outage.message));
    }
    verdict("Degraded", ConditionStatus::False, "AsItShouldBe", "nothing is wrong")
}

fn rebalancing(shown: Option<&control::Status>) -> Verdict {
    let moves = shown.is_some_and(|shown| shown.shards.moving > 0 || shown.shards.queued > 0);
    let (reason, message) = if moves {
        ("ShardsMove", "shards are on their way to other members")
    } else {
        ("NothingMoves", "no shard is on its way")
    };
    verdict("Rebalancing", holds(moves), reason, message)
}

fn draining(shown: Option<&control::Status>) -> Verdict {
    let leaves = |member: &&control::MemberStatus| matches!(member.state.as_str(), "draining" | "emptying");
    let leaving = shown.is_some_and(|shown| members(shown).any(|member| leaves(&member)));
    let (reason, message) = if leaving {
        ("MembersLeave", "members are being emptied, see status.drains")
    } else {
        ("NobodyLeaves", "no member is being emptied")
    };
    verdict("Draining", holds(leaving), reason, message)
}

fn scaling_limited(shown: Option<&control::Status>) -> Verdict {
    let Some(shown) = shown else {
        return verdict("ScalingLimited", ConditionStatus::Unknown, "Starting", "nothing is known yet");
    };
    let named = |holds: fn(&control::TierStatus) -> bool| -> Vec<&str> {
        let tiers = [("gateway", &shown.tiers.gateway), ("business", &shown.tiers.business)];
        tiers.into_iter().filter(|(_, tier)| holds(tier)).map(|(name, _)| name).collect()
    };
    let at_max = named(|tier| tier.limited == Some(Limit::Max));
    let at_min = named(|tier| tier.limited == Some(Limit::Min));
    let in_doubt = named(|tier| tier.in_doubt);
    if !at_max.is_empty() {
        let message = format!("the load asks for more: raise maxReplicas of {}", at_max.join(" and "));
        verdict("ScalingLimited", ConditionStatus::True, "TooManyReplicas", message)
    } else if !in_doubt.is_empty() {
        let tiers = in_doubt.join(" and ");
        let message = format!("nothing is scaled in: not every metric of {tiers} can be trusted, `because` says why");
        verdict("ScalingLimited", ConditionStatus::True, "MetricsInDoubt", message)
    } else if !at_min.is_empty() {
        let message = format!("the load asks for fewer than minReplicas of {}", at_min.join(" and "));
        verdict("ScalingLimited", ConditionStatus::True, "TooFewReplicas", message)
    } else {
        verdict("ScalingLimited", ConditionStatus::False, "WithinBounds", "the number of members follows the load")
    }
}

fn no_message_lost(shown: Option<&control::Status>) -> Verdict {
    let Some(shown) = shown else {
        return verdict("NoMessageLost", ConditionStatus::Unknown, "Starting", "nothing is known yet");
    };
    let (status, reason) = match shown.no_message_lost.status.as_str() {
        "True" => (ConditionStatus::True, "LogsComplete"),
        "False" => (ConditionStatus::False, "HolesFound"),
        _ if shown.shards.hearing => (ConditionStatus::Unknown, "Listening"),
        _ if shown.shards.owned < shown.shards.total => (ConditionStatus::Unknown, "ShardsWithoutOwner"),
        _ => (ConditionStatus::Unknown, "NotifiedLate"),
    };
    verdict("NoMessageLost", status, reason, shown.no_message_lost.reason.clone())
}

fn tier(shown: &control::TierStatus) -> TierStatus {
    let member = |member: &control::MemberStatus| MemberStatus {
        name: member.name.clone(),
        state: member.state.clone(),
        shards: member.shards,
    };
    TierStatus {
        replicas: shown.replicas,
        ready: shown.ready,
        desired: shown.desired,
        because: shown.because.clone(),
        members: shown.members.iter().take(MEMBERS_LISTED_MAX).map(member).collect(),
    }
}

fn drain(member: &control::MemberStatus) -> Option<DrainStatus> {
    let control::DrainStatus { held_at_start, held, seconds_left } = member.drain?;
    // Who comes in addition does not make it go backwards.
    let gone = held_at_start.saturating_sub(held);
    let percent_done =
        gone.saturating_mul(100).checked_div(held_at_start).map_or(100, |percent| percent.min(100) as u32);
    Some(DrainStatus { member: member.name.clone(), held_at_start, percent_done, seconds_left })
}

fn proposals(shown: &control::Status) -> Vec<ProposalStatus> {
    let proposal =
        |proposal: &control::Proposal| ProposalStatus { hash: proposal.hash.clone(), what: proposal.what.join("; ") };
    shown.shards.proposal.iter().map(proposal).collect()
}

/// What of a status is worth a write.
#[derive(PartialEq)]
struct Meaning<'a> {
    generation: i64,
    conditions: Vec<(&'a str, ConditionStatus, &'a str, Option<&'a str>)>,
    tiers: [(u32, u32, u32, &'a [MemberStatus]); 2],
    shards: (u64, u32, u32, u32, u32),
    drains: Vec<(&'a str, u32, Option<u64>)>,
    proposals: &'a [ProposalStatus],
    lag: Option<usize>,
}

/// Lags that differ by less are the same, seconds.
const LAG_STEPS: [f64; 6] = [1.0, 5.0, 10.0, 30.0, 60.0, 300.0];

impl<'a> Meaning<'a> {
    fn of(status: &'a ImClusterStatus) -> Self {
        let condition = |condition: &'a Condition| {
            // Only there does the message say more than the reason, in words that change with their meaning alone.
            let message = (condition.kind == "Degraded").then_some(condition.message.as_str());
            (condition.kind.as_str(), condition.status, condition.reason.as_str(), message)
        };
        let tier = |tier: &'a TierStatus| (tier.replicas, tier.ready, tier.desired, tier.members.as_slice());
        let drain = |drain: &'a DrainStatus| {
            (drain.member.as_str(), drain.percent_done / 10, drain.seconds_left.map(|left| left.div_ceil(30)))
        };
        let shards = &status.shards;
        Self {
            generation: status.observed_generation,
            conditions: status.conditions.iter().map(condition).collect(),
            tiers: [tier(&status.gateway), tier(&status.business)],
            shards: (shards.term, shards.total, shards.moving, shards.unowned, shards.queued),
            drains: status.drains.iter().map(drain).collect(),
            proposals: &status.proposals,
            lag: status.watermark_lag_seconds.map(|lag| LAG_STEPS.iter().filter(|step| lag >= **step).count()),
        }
    }
}

/// Whether the new status means something else than the old one.
pub fn is_news(old: &ImClusterStatus, new: &ImClusterStatus) -> bool {
    Meaning::of(old) != Meaning::of(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn member(name: &str, state: &str, starts: u32) -> control::MemberStatus {
        control::MemberStatus { name: name.into(), state: state.into(), starts, ..control::MemberStatus::default() }
    }

    /// A cluster in which everything is as it should be.
    fn good() -> control::Status {
        let tier = |name: &str| control::TierStatus {
            replicas: 1,
            ready: 1,
            desired: 1,
            min: 1,
            max: 3,
            because: vec!["Connections: 57 of 100".into()],
            limited: None,
            in_doubt: false,
            members: vec![member(name, "ready", 1)],
        };
        let mut status = control::Status { cluster: "chat".into(), mode: "Auto".into(), ..control::Status::default() };
        status.tiers = control::Tiers { gateway: tier("g"), business: tier("b") };
        (status.shards.total, status.shards.owned) = (256, 256);
        status.no_message_lost = control::Verdict { status: "True".into(), reason: "no hole".into() };
        status
    }

    fn away(all: bool) -> Option<control::StoreAway> {
        Some(control::StoreAway { members: vec!["b".into()], all })
    }

    fn outage() -> Option<control::Outage> {
        Some(control::Outage { reason: "PrometheusUnreachable".into(), message: "Prometheus did not answer".into() })
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn words(status: &ImClusterStatus) -> Vec<String> {
        let word = |condition: &Condition| format!("{}={:?} {}", condition.kind, condition.status, condition.reason);
        status.conditions.iter().map(word).collect()
    }

    fn of(situation: &Situation, shown: Option<&control::Status>) -> ImClusterStatus {
        status(&ImClusterStatus::default(), situation, shown, at(0))
    }

    const GOOD: [&str; 7] = [
        "Ready=True Serving",
        "Progressing=False Settled",
        "Degraded=False AsItShouldBe",
        "Rebalancing=False NothingMoves",
        "Draining=False NobodyLeaves",
        "ScalingLimited=False WithinBounds",
        "NoMessageLost=True LogsComplete",
    ];

    #[test]
    fn every_state_has_its_conditions() {
        assert_eq!(words(&of(&Situation::default(), Some(&good()))), GOOD);
        type Change = fn(&mut control::Status);
        let cases: [(Change, &[&str]); 19] = [
            (|s| s.shards.store_away = away(false), &["Degraded=True StoreUnreachable"]),
            (|s| s.shards.store_away = away(true), &["Ready=False StoreUnreachable", "Degraded=True StoreUnreachable"]),
            (|s| s.prometheus = outage(), &["Degraded=True PrometheusUnreachable"]),
            (|s| s.tiers.gateway.in_doubt = true, &["ScalingLimited=True MetricsInDoubt"]),
            (
                |s| (s.tiers.business.in_doubt, s.tiers.gateway.limited) = (true, Some(Limit::Max)),
                &["ScalingLimited=True TooManyReplicas"],
            ),
            (|s| s.shards.waits = Some("the store refuses".into()), &["Degraded=True StoreRefuses"]),
            (|s| s.shards.stale_approval = Some("it changed".into()), &["Progressing=False ApprovalStale"]),
            (|s| s.tiers.gateway.ready = 0, &["Ready=False NoGateway", "Progressing=True Scaling"]),
            (|s| s.tiers.business.ready = 0, &["Ready=False NoBusinessMember", "Progressing=True Scaling"]),
            (|s| s.shards.owned = 255, &["Ready=False ShardsWithoutOwner"]),
            (|s| s.tiers.gateway.desired = 2, &["Progressing=True Scaling"]),
            (
                |s| s.tiers.gateway.members.push(member("h", "draining", 1)),
                &["Progressing=True Scaling", "Draining=True MembersLeave"],
            ),
            (|s| s.shards.degraded = true, &["Degraded=True MembersSilent"]),
            (|s| s.tiers.business.members[0].state = "silent".into(), &["Degraded=True MembersFailing"]),
            (|s| s.shards.moving = 3, &["Rebalancing=True ShardsMove"]),
            (|s| s.shards.queued = 3, &["Rebalancing=True ShardsMove"]),
            (|s| s.tiers.gateway.limited = Some(Limit::Max), &["ScalingLimited=True TooManyReplicas"]),
            (|s| s.tiers.gateway.limited = Some(Limit::Min), &["ScalingLimited=True TooFewReplicas"]),
            (|s| s.no_message_lost.status = "False".into(), &["NoMessageLost=False HolesFound"]),
        ];
        for (change, expected) in cases {
            let mut shown = good();
            change(&mut shown);
            let found = words(&of(&Situation::default(), Some(&shown)));
            let different: Vec<&str> = found.iter().map(String::as_str).filter(|word| !GOOD.contains(word)).collect();
            assert_eq!(different, expected);
        }
    }

    #[test]
    fn a_problem_is_told_whether_or_not_members_run() {
        let problem = Problem { reason: "SecretMissing", message: "there is no Secret x: create it".into() };
        let situation = Situation { problem: Some(problem), generation: 4, ..Situation::default() };
        let before = of(&situation, None);
        assert_eq!(
            words(&before)[..3],
            ["Ready=False SecretMissing", "Progressing=False SecretMissing", "Degraded=True SecretMissing"]
        );
        assert_eq!(before.observed_generation, 4);
        let running = of(&situation, Some(&good()));
        assert_eq!(words(&running)[0], GOOD[0], "what runs goes on");
        assert_eq!(words(&running)[2], "Degraded=True SecretMissing");
        let starting = of(&Situation::default(), Some(&control::Status::default()));
        assert_eq!(words(&starting)[..2], ["Ready=False Starting", "Progressing=True Starting"]);
        let paused = Situation { paused: true, held_back: 2, ..Situation::default() };
        assert_eq!(words(&of(&paused, Some(&good())))[1], "Progressing=False Paused");
    }

    #[test]
    fn times_change_with_the_status_only_and_a_new_leader_changes_nothing_while_it_listens() {
        let first = status(&ImClusterStatus::default(), &Situation::default(), Some(&good()), at(1));
        let mut bad = good();
        bad.tiers.gateway.ready = 0;
        let second = status(&first, &Situation::default(), Some(&bad), at(2));
        let time = |status: &ImClusterStatus, i: usize| status.conditions[i].last_transition_time.clone();
        assert_eq!(time(&second, 0), rfc3339(at(2)), "Ready changed");
        assert_eq!(time(&second, 6), rfc3339(at(1)), "NoMessageLost did not");
        bad.shards.hearing = true;
        let listening = status(&first, &Situation { generation: 9, ..Situation::default() }, Some(&bad), at(3));
        assert_eq!((words(&listening)[0].as_str(), time(&listening, 0)), (GOOD[0], rfc3339(at(1))));
        assert_eq!(listening.conditions[0].observed_generation, 9);
        for silent in [None, Some(control::Status::default())] {
            let new = status(&first, &Situation { generation: 9, ..Situation::default() }, silent.as_ref(), at(4));
            assert_eq!(new, first, "it knows nothing yet");
        }
    }

    #[test]
    fn what_lasts_stands_until_a_new_leader_can_say_that_it_is_past() {
        let mut bad = good();
        (bad.shards.store_away, bad.tiers.gateway.in_doubt) = (away(true), true);
        let first = status(&ImClusterStatus::default(), &Situation::default(), Some(&bad), at(1));
        let mut new = control::Status { young: true, ..good() };
        let words_of = |shown: &control::Status| words(&status(&first, &Situation::default(), Some(shown), at(2)));
        assert_eq!(words_of(&new), words(&first));
        new.tiers.gateway.ready = 0;
        assert_eq!(words_of(&new)[0], "Ready=False NoGateway", "something else is wrong");
        assert_eq!(words_of(&good()), GOOD);
    }

    #[test]
    fn a_problem_changes_nothing_that_a_new_leader_does_not_know_yet() {
        let first = status(&ImClusterStatus::default(), &Situation::default(), Some(&good()), at(1));
        let problem = Problem { reason: "SecretMissing", message: "there is no Secret x: create it".into() };
        let situation = Situation { problem: Some(problem), ..Situation::default() };
        let begins = control::Status::default();
        assert_eq!(status(&first, &situation, Some(&begins), at(2)), first);
        let mut listening = good();
        (listening.shards.hearing, listening.tiers.business.ready) = (true, 0);
        let words = words(&status(&first, &situation, Some(&listening), at(3)));
        assert_eq!((words[0].as_str(), words[2].as_str()), (GOOD[0], "Degraded=True SecretMissing"));
        let nobody = status(&first, &situation, None, at(4));
        assert_eq!(nobody.conditions[0].reason, "SecretMissing", "nobody leads");
    }

    #[test]
    fn a_drain_shows_how_far_it_is() {
        let drain = |held_at_start, held, seconds_left| {
            let mut shown = good();
            shown.tiers.gateway.members[0].drain = Some(control::DrainStatus { held_at_start, held, seconds_left });
            let drains = of(&Situation::default(), Some(&shown)).drains;
            (drains[0].percent_done, drains[0].seconds_left)
        };
        assert_eq!(drain(200, 200, None), (0, None));
        assert_eq!(drain(200, 50, Some(10)), (75, Some(10)));
        assert_eq!(drain(200, 300, None), (0, None));
        assert_eq!(drain(0, 0, Some(0)), (100, Some(0)));
    }

    #[test]
    fn only_what_means_something_is_news() {
        let shown = |change: fn(&mut control::Status)| {
            let mut shown = good();
            change(&mut shown);
            of(&Situation::default(), Some(&shown))
        };
        let first = shown(|_| {});
        let same: [fn(&mut control::Status); 5] = [
            |s| s.tiers.gateway.because = vec!["Connections: 58 of 100".into()],
            |s| s.tiers.gateway.members[0].connections = Some(9),
            |s| s.shards.number = 99,
            |s| s.at = "later".into(),
            |s| s.no_message_lost.reason = "other words".into(),
        ];
        for change in same {
            assert!(!is_news(&first, &shown(change)));
        }
        let news: [fn(&mut control::Status); 8] = [
            |s| s.prometheus = outage(),
            |s| s.shards.store_away = away(false),
            |s| s.tiers.gateway.in_doubt = true,
            |s| s.tiers.gateway.desired = 2,
            |s| s.tiers.gateway.members[0].state = "silent".into(),
            |s| s.shards.moving = 1,
            |s| s.shards.term = 2,
            |s| s.watermark_lag_seconds = Some(7.0),
        ];
        for change in news {
            assert!(is_news(&first, &shown(change)));
        }
        let lag = |seconds| ImClusterStatus { watermark_lag_seconds: Some(seconds), ..first.clone() };
        assert!(!is_news(&lag(0.1), &lag(0.7)));
        assert!(is_news(&lag(0.1), &lag(31.0)));
    }
}
