//! What one metric asks for.

use super::{
    FULLEST_MAX, Input, MemberState, MetricState, NEARLY_ALL, Reading, SAMPLE_AGE_MAX, SOURCE_SETTLES, Sample, Values,
};
use im_crds::{BuiltInMetric, Metric, PrometheusMetric, QueryTargetType, TargetType};
use std::collections::BTreeMap;
use std::time::Duration;

/// What one metric asks for, if it says anything.
pub(super) struct Proposal {
    pub(super) replicas: Option<u32>,
    pub(super) state: MetricState,
    pub(super) because: Vec<String>,
}

impl Proposal {
    fn nothing(state: MetricState, name: &str, detail: &str) -> Self {
        let detail = if detail.is_empty() { String::new() } else { format!(" ({detail})") };
        Self { replicas: None, state, because: vec![format!("{name}: {state}{detail}")] }
    }
}

/// Characters of a query that reasons show.
const QUERY_SHOWN_CHARS: usize = 48;
/// A ratio of exactly 1 ± tolerance is within it in floating point too.
const RATIO_SLACK: f64 = 1e-9;
/// No tier is larger than that, whatever a metric says.
const REPLICAS_MAX: f64 = 1_000_000.0;

fn ceil(replicas: f64) -> u32 {
    replicas.ceil().clamp(0.0, REPLICAS_MAX) as u32
}

fn is_sane(sample: &Sample) -> bool {
    sample.value.is_finite() && sample.value >= 0.0
}

fn is_fresh(sample: &Sample, now: Duration) -> bool {
    is_sane(sample) && now.saturating_sub(sample.at) <= SAMPLE_AGE_MAX
}

/// Where a metric should be.
#[derive(Clone, Copy)]
enum Goal {
    /// What each member should have on average.
    Average { target: f64, kind: TargetType },
    /// What the whole tier should have, however many members it has.
    Whole { target: f64 },
}

/// A metric's name, for people, and its goal.
fn name_and_goal(metric: &Metric) -> (String, Goal) {
    match metric {
        Metric::BuiltIn(BuiltInMetric { name, target }) => {
            (format!("{name:?}"), Goal::Average { target: f64::from(target.value.max(1)), kind: target.kind })
        }
        Metric::Prometheus(PrometheusMetric { query, target, per_pod: _ }) => {
            let value = target.value.max(f64::MIN_POSITIVE);
            let goal = match target.kind {
                QueryTargetType::AverageValue => Goal::Average { target: value, kind: TargetType::AverageValue },
                QueryTargetType::Value => Goal::Whole { target: value },
            };
            (format!("`{}`", shortened(query)), goal)
        }
    }
}

/// The beginning of a query, on one line.
fn shortened(query: &str) -> String {
    let line = query.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(QUERY_SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

pub(super) fn propose(input: &Input<'_>, current: u32, metric: &Metric, reading: &Reading) -> Proposal {
    let (name, goal) = name_and_goal(metric);
    let mut proposal = match &reading.values {
        Values::Failed(why) => Proposal::nothing(MetricState::NoData, &name, why),
        Values::Total(total) => propose_total(input, current, &name, goal, reading, *total),
        Values::PerMember(values) => propose_per_member(input, current, &name, goal, reading, values),
    };
    if !reading.origin.is_empty()
        && let Some(first) = proposal.because.first_mut()
    {
        first.push_str(&format!(", {}", reading.origin));
    }
    proposal
}

impl Reading {
    fn source_is_young(&self, now: Duration) -> bool {
        self.source_started_at.is_some_and(|at| now.saturating_sub(at) < SOURCE_SETTLES)
    }

    /// What it means that there is no value.
    fn empty(&self, now: Duration) -> MetricState {
        if self.source_is_young(now) { MetricState::EmptyAfterRestart } else { MetricState::NoData }
    }
}

fn propose_per_member(
    input: &Input<'_>,
    current: u32,
    name: &str,
    goal: Goal,
    reading: &Reading,
    values: &BTreeMap<String, Sample>,
) -> Proposal {
    // A goal of the whole tier has no share of one member; the schema's rules refuse the pair.
    let Goal::Average { target, kind } = goal else {
        return Proposal::nothing(MetricState::NoData, name, "a target of type Value takes no perPod");
    };
    // Joined to what serves: series of members that are gone, drain or start say nothing.
    let ready: Vec<&str> =
        input.members.iter().filter(|m| m.state == MemberState::Ready).map(|m| m.name.as_str()).collect();
    let fresh: BTreeMap<&str, f64> = ready
        .iter()
        .filter_map(|name| values.get(*name).filter(|s| is_fresh(s, input.now)).map(|s| (*name, s.value)))
        .collect();
    if fresh.is_empty() {
        let stale = ready.iter().any(|name| values.get(*name).is_some_and(is_sane));
        return Proposal::nothing(if stale { MetricState::Stale } else { reading.empty(input.now) }, name, "");
    }
    let state = match (fresh.len(), ready.len()) {
        (have, all) if (have as f64) < all as f64 * NEARLY_ALL => MetricState::Partial { fresh: have, ready: all },
        _ => MetricState::Fresh,
    };
    let tier = Tier {
        values: fresh.values().copied().collect(),
        missing: ready.len() - fresh.len(),
        not_ready: current.saturating_sub(ready.len() as u32) as usize,
        current,
        target,
        missing_when_low: match kind {
            TargetType::AverageValue => target,
            TargetType::Utilization => target.max(100.0),
        },
        tolerance: input.spec.tolerance,
    };
    let by_mean = tier.by_mean();
    let mean = tier.values.iter().sum::<f64>() / tier.values.len() as f64;
    let mut because =
        vec![format!("{name}: {mean:.1} per member on average, target {target}, {} serve: {by_mean}", ready.len())];
    if state != MetricState::Fresh {
        because.push(format!("{name}: {state}"));
    }
    let mut replicas = by_mean;
    if let Some((fullest, value)) = fresh.iter().max_by(|a, b| a.1.total_cmp(b.1)) {
        let by_fullest = tier.by_fullest(*value, by_mean);
        if by_fullest > by_mean {
            because.push(format!("{name}: {fullest} is the fullest with {value:.1}: {by_fullest}"));
            replicas = by_fullest;
        }
    }
    Proposal { replicas: Some(replicas), state, because }
}

/// Upstream's `GetExternalMetricReplicas` and `GetExternalPerPodMetricReplicas`.
fn propose_total(
    input: &Input<'_>,
    current: u32,
    name: &str,
    goal: Goal,
    reading: &Reading,
    total: Option<Sample>,
) -> Proposal {
    let total = match total {
        Some(sample) if is_fresh(&sample, input.now) => sample.value,
        Some(sample) if is_sane(&sample) => return Proposal::nothing(MetricState::Stale, name, ""),
        _ => return Proposal::nothing(reading.empty(input.now), name, ""),
    };
    let members = f64::from(current);
    let (ratio, asked, what) = match goal {
        Goal::Average { target, .. } => {
            let what = format!("{total:.1} in all, target {target} each");
            (total / (target * members.max(1.0)), ceil(total / target), what)
        }
        Goal::Whole { target } => {
            let ratio = total / target;
            let serve = input.members.iter().filter(|member| member.state == MemberState::Ready).count();
            let asked = ceil(ratio * serve as f64);
            // Those that start are counted in `current` and have done nothing for the value yet.
            let asked = if ratio > 1.0 { asked.max(current) } else { asked.min(current) };
            (ratio, asked, format!("{total:.3}, target {target}, {serve} serve"))
        }
    };
    let replicas = if (ratio - 1.0).abs() <= input.spec.tolerance + RATIO_SLACK { current } else { asked };
    let mut because = vec![format!("{name}: {what}: {replicas}")];
    let state = if reading.source_is_young(input.now) { MetricState::Settling } else { MetricState::Fresh };
    if state != MetricState::Fresh {
        because.push(format!("{name}: {state}"));
    }
    Proposal { replicas: Some(replicas), state, because }
}

/// A tier as one metric sees it.
struct Tier {
    /// Of the members that serve and have a fresh value; at least one.
    values: Vec<f64>,
    /// Members that serve and have none.
    missing: usize,
    /// Members that start, or were ordered.
    not_ready: usize,
    current: u32,
    target: f64,
    /// What a member without value is taken to have when the others are below the target.
    missing_when_low: f64,
    tolerance: f64,
}

impl Tier {
    fn within_tolerance(&self, ratio: f64) -> bool {
        (ratio - 1.0).abs() <= self.tolerance + RATIO_SLACK
    }

    /// Upstream's `calcPlainMetricReplicas`: members whose value is not known are assumed to speak against the change, and
    /// a change that turns round under that assumption is none.
    fn by_mean(&self) -> u32 {
        let known = self.values.len() as f64;
        let sum: f64 = self.values.iter().sum();
        let ratio = sum / known / self.target;
        let out_with_unready = self.not_ready > 0 && ratio > 1.0;
        if !out_with_unready && self.missing == 0 {
            return if self.within_tolerance(ratio) { self.current } else { ceil(ratio * known) };
        }
        let missing = self.missing as f64;
        let assumed = if ratio < 1.0 { missing * self.missing_when_low } else { 0.0 };
        let unready = if out_with_unready { self.not_ready as f64 } else { 0.0 };
        let counted = known + missing + unready;
        let ratio_assumed = (sum + assumed) / counted / self.target;
        let turned = (ratio < 1.0 && ratio_assumed > 1.0) || (ratio > 1.0 && ratio_assumed < 1.0);
        if turned || self.within_tolerance(ratio_assumed) {
            return self.current;
        }
        let replicas = ceil(ratio_assumed * counted);
        let wrong_way =
            (ratio_assumed < 1.0 && replicas > self.current) || (ratio_assumed > 1.0 && replicas < self.current);
        if wrong_way { self.current } else { replicas }
    }

    /// The fullest member, above the target, keeps the number; far above it, it asks for one more. It never asks for more
    /// than twice what the mean does: beyond that more members would not take anything off it.
    fn by_fullest(&self, fullest: f64, by_mean: u32) -> u32 {
        let ratio = fullest / self.target;
        let asked = if ratio > FULLEST_MAX {
            self.current + 1
        } else if ratio > 1.0 && !self.within_tolerance(ratio) {
            self.current
        } else {
            0
        };
        // One more only once those that were ordered serve.
        let asked = if self.not_ready > 0 { asked.min(self.current) } else { asked };
        asked.min(by_mean.saturating_mul(2))
    }
}
