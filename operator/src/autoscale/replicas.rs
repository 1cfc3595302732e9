//! What one metric asks for.

use super::{
    FULLEST_MAX, Input, MemberState, MetricState, NEARLY_ALL, Reading, SAMPLE_AGE_MAX, SOURCE_SETTLES, Sample, Values,
};
use im_crds::{BuiltInMetric, Metric, TargetType};
use std::collections::BTreeMap;
use std::time::Duration;

/// What one metric asks for, if it says anything.
pub(super) struct Proposal {
    pub(super) replicas: Option<u32>,
    pub(super) state: MetricState,
    pub(super) because: Vec<String>,
}

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

pub(super) fn propose(input: &Input<'_>, current: u32, metric: &Metric, reading: &Reading) -> Proposal {
    let BuiltInMetric { name, target } = &metric.built_in;
    let young = reading.source_started_at.is_some_and(|at| input.now.saturating_sub(at) < SOURCE_SETTLES);
    let nothing = |state: MetricState, detail: &str| Proposal {
        replicas: None,
        state,
        because: vec![format!("{name:?}: {state}{detail}")],
    };
    let empty = if young { MetricState::EmptyAfterRestart } else { MetricState::NoData };
    let values = match &reading.values {
        Values::Failed(why) => return nothing(MetricState::NoData, &format!(" ({why})")),
        Values::Total(sample) if is_fresh(sample, input.now) => {
            return propose_total(input, current, &metric.built_in, sample.value);
        }
        Values::Total(sample) => return nothing(if is_sane(sample) { MetricState::Stale } else { empty }, ""),
        Values::PerMember(values) => values,
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
        return nothing(if stale { MetricState::Stale } else { empty }, "");
    }
    let state = match (fresh.len(), ready.len()) {
        (have, all) if (have as f64) < all as f64 * NEARLY_ALL => MetricState::Partial { fresh: have, ready: all },
        _ => MetricState::Fresh,
    };
    let target_value = f64::from(target.value.max(1));
    let tier = Tier {
        values: fresh.values().copied().collect(),
        missing: ready.len() - fresh.len(),
        not_ready: current.saturating_sub(ready.len() as u32) as usize,
        current,
        target: target_value,
        missing_when_low: match target.kind {
            TargetType::AverageValue => target_value,
            TargetType::Utilization => target_value.max(100.0),
        },
        tolerance: input.spec.tolerance,
    };
    let by_mean = tier.by_mean();
    let mean = tier.values.iter().sum::<f64>() / tier.values.len() as f64;
    let mut because = Vec::new();
    if state != MetricState::Fresh {
        because.push(format!("{name:?}: {state}"));
    }
    because.push(format!(
        "{name:?}: {mean:.1} per member on average, target {}, {} serve: {by_mean}",
        target.value,
        ready.len()
    ));
    let mut replicas = by_mean;
    if let Some((fullest, value)) = fresh.iter().max_by(|a, b| a.1.total_cmp(b.1)) {
        let by_fullest = tier.by_fullest(*value, by_mean);
        if by_fullest > by_mean {
            because.push(format!("{name:?}: {fullest} is the fullest with {value:.1}: {by_fullest}"));
            replicas = by_fullest;
        }
    }
    Proposal { replicas: Some(replicas), state, because }
}

fn propose_total(input: &Input<'_>, current: u32, metric: &BuiltInMetric, total: f64) -> Proposal {
    let target = f64::from(metric.target.value.max(1));
    let ratio = total / (target * f64::from(current.max(1)));
    let replicas = if (ratio - 1.0).abs() <= input.spec.tolerance { current } else { ceil(total / target) };
    let because =
        vec![format!("{:?}: {total:.1} in all, target {} each: {replicas}", metric.name, metric.target.value)];
    Proposal { replicas: Some(replicas), state: MetricState::Fresh, because }
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
        // A hair of slack, so that a ratio of exactly 1 ± tolerance is within it in floating point too.
        (ratio - 1.0).abs() <= self.tolerance + 1e-9
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
