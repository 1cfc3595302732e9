//! What is known about a cluster's load after many rounds of measuring, and who said so. Pure.
//!
//! The policy: Prometheus is asked where there is one. Whatever it has no fresh value of is taken from the members
//! themselves, and the reasons say so. The last value stays until it is too old to count (the autoscaler's judgement), so
//! one query that fails is no outage. A query of one's own has no other source: it fails, and the tier doesn't scale in
//! for as long as its window remembers that, whatever the metrics that could be scraped directly ask for.

use super::prometheus::{Answer, PrometheusError};
use super::round::Round;
use crate::autoscale::{Member, Reading, Sample, Values};
use crate::platform::Tier;
use im_crds::{BuiltIn, Metric, PrometheusMetric};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What 100 % of CPU utilization is where nobody limits a member: one core.
const CORES_PER_MEMBER: f64 = 1.0;

/// The last known values. Time is that of [`Round::asked_at`].
#[derive(Debug, Default)]
pub struct Signals {
    /// The newest value of each member.
    gauges: BTreeMap<BuiltIn, BTreeMap<String, Known>>,
    queries: BTreeMap<(String, bool), Values>,
    /// What Prometheus does not answer now.
    failing_gauges: BTreeMap<(Tier, BuiltIn), Failure>,
    failing_queries: BTreeMap<(String, bool), Failure>,
    /// Whether there was a Prometheus to ask in the last round.
    asks_prometheus: bool,
    source_started_at: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    sample: Sample,
    directly: bool,
}

/// Since when something is not answered, and the latest reason.
#[derive(Clone, Debug, PartialEq)]
struct Failure {
    since: String,
    error: PrometheusError,
}

impl Failure {
    /// Goes on from an earlier failure, if there was one.
    fn after(earlier: Option<&Self>, since: &str, error: &PrometheusError) -> Self {
        Self { since: earlier.map_or(since, |earlier| &earlier.since).to_owned(), error: error.clone() }
    }
}

impl Signals {
    /// Takes in what a round found. `wall_clock` is the time for people; what nobody asks about any more is forgotten.
    pub fn absorb(&mut self, wall_clock: &str, members: &BTreeSet<String>, round: Round) {
        let at = |age: Duration| round.asked_at.saturating_sub(age);
        let mut learn = |metric: BuiltIn, member: &str, known: Known| {
            let values = self.gauges.entry(metric).or_default();
            let newer = values.get(member).is_none_or(|before| before.sample.at <= known.sample.at);
            if newer {
                values.insert(member.to_owned(), known);
            }
        };
        for (member, sample) in &round.direct {
            for metric in [BuiltIn::Connections, BuiltIn::MessagesPerSecond, BuiltIn::CpuUtilization] {
                if let Some(value) = sample.get(metric) {
                    learn(metric, member, Known { sample: Sample { value, at: round.asked_at }, directly: true });
                }
            }
        }
        self.asks_prometheus = round.prometheus.is_some();
        let answers = round.prometheus.unwrap_or_default();
        let (failing_gauges, failing_queries) =
            (std::mem::take(&mut self.failing_gauges), std::mem::take(&mut self.failing_queries));
        for (key, answer) in answers.gauges {
            match answer {
                Ok(values) => {
                    for (member, aged) in values {
                        let sample = Sample { value: aged.value, at: at(aged.age) };
                        learn(key.1, &member, Known { sample, directly: false });
                    }
                }
                Err(error) => {
                    let failure = Failure::after(failing_gauges.get(&key), wall_clock, &error);
                    self.failing_gauges.insert(key, failure);
                }
            }
        }
        let mut earlier = std::mem::take(&mut self.queries);
        for (key, answer) in answers.queries {
            let values = match answer {
                Ok(Answer::PerPod(values)) => {
                    let sample = |aged: super::prometheus::Aged| Sample { value: aged.value, at: at(aged.age) };
                    Values::PerMember(values.into_iter().map(|(pod, aged)| (pod, sample(aged))).collect())
                }
                Ok(Answer::Total(total)) => {
                    Values::Total(total.map(|aged| Sample { value: aged.value, at: at(aged.age) }))
                }
                Err(error) => {
                    let failure = Failure::after(failing_queries.get(&key), wall_clock, &error);
                    let words = failure.to_string();
                    self.failing_queries.insert(key.clone(), failure);
                    match earlier.remove(&key) {
                        // What was known ages; the autoscaler says when it is too old.
                        Some(values @ (Values::PerMember(_) | Values::Total(Some(_)))) => values,
                        _ => Values::Failed(words),
                    }
                }
            };
            self.queries.insert(key, values);
        }
        self.source_started_at = answers.source_age.and_then(|age| round.asked_at.checked_sub(age));
        for values in self.gauges.values_mut() {
            values.retain(|member, _| members.contains(member));
        }
    }

    /// What is known of one metric of a tier with these members.
    pub fn reading(&self, tier: Tier, members: &[Member], metric: &Metric) -> Reading {
        match metric {
            Metric::BuiltIn(metric) => self.gauge(tier, members, metric.name),
            Metric::Prometheus(metric) => self.query(metric),
        }
    }

    fn gauge(&self, tier: Tier, members: &[Member], metric: BuiltIn) -> Reading {
        let unit = match metric {
            BuiltIn::CpuUtilization => 100.0 / CORES_PER_MEMBER,
            BuiltIn::Connections | BuiltIn::MessagesPerSecond => 1.0,
        };
        let all = self.gauges.get(&metric);
        let known = members.iter().filter_map(|member| Some((&member.name, all?.get(&member.name)?)));
        let directly = known.clone().filter(|(_, known)| known.directly).count();
        let values = known.map(|(name, Known { sample, .. })| {
            (name.clone(), Sample { value: sample.value * unit, at: sample.at })
        });
        let origin = match (self.failing_gauges.get(&(tier, metric)), self.asks_prometheus) {
            (Some(failure), _) => format!("scraped directly: {failure}"),
            (None, false) => "scraped directly".to_owned(),
            (None, true) if directly == 0 => "from Prometheus".to_owned(),
            (None, true) => format!("from Prometheus, but for {directly} that it lacks, scraped directly"),
        };
        Reading { values: Values::PerMember(values.collect()), origin, source_started_at: self.source_started_at }
    }

    fn query(&self, metric: &PrometheusMetric) -> Reading {
        let key = (metric.query.clone(), metric.per_pod);
        let values = match self.queries.get(&key) {
            Some(values) => values.clone(),
            None if self.asks_prometheus => Values::Failed("not asked yet".to_owned()),
            None => Values::Failed(
                "there is no Prometheus: set spec.metrics.prometheus.url, or start the operator with --prometheus-url"
                    .to_owned(),
            ),
        };
        let origin = match (self.failing_queries.get(&key), &values) {
            (_, Values::Failed(_)) => String::new(),
            (Some(failure), _) => format!("known before: {failure}"),
            (None, _) => "from Prometheus".to_owned(),
        };
        Reading { values, origin, source_started_at: self.source_started_at }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, since {}", self.error, self.since)
    }
}
