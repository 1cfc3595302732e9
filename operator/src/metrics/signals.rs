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
            for metric in BuiltIn::ALL {
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

    /// What Prometheus did not answer in the last round, if there is something; of several the first.
    pub fn failing(&self) -> Option<&PrometheusError> {
        self.failing_gauges.values().chain(self.failing_queries.values()).map(|failure| &failure.error).next()
    }

    /// What is known of one metric of a tier with these members, of which each has `cores` set aside for it: that is 100 % of
    /// CPU utilization.
    pub fn reading(&self, tier: Tier, members: &[Member], metric: &Metric, cores: f64) -> Reading {
        match metric {
            Metric::BuiltIn(metric) => self.gauge(tier, members, metric.name, cores),
            Metric::Prometheus(metric) => self.query(metric),
        }
    }

    fn gauge(&self, tier: Tier, members: &[Member], metric: BuiltIn, cores: f64) -> Reading {
        let unit = match metric {
            BuiltIn::CpuUtilization => 100.0 / cores,
            BuiltIn::Connections | BuiltIn::MessagesPerSecond => 1.0,
        };
        let all = self.gauges.get(&metric);
        let known = members.iter().filter_map(|member| Some((&member.name, all?.get(&member.name)?)));
        let directly = known.clone().filter(|(_, known)| known.directly).count();
        let values = known
            .map(|(name, Known { sample, .. })| (name.clone(), Sample { value: sample.value * unit, at: sample.at }));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autoscale::MemberState;
    use crate::metrics::direct;
    use crate::metrics::prometheus::Aged;
    use crate::metrics::round::Answers;
    use im_crds::{BuiltInMetric, QueryTarget, QueryTargetType, Target, TargetType};

    const HOUR: Duration = Duration::from_secs(3_600);
    const GAUGE: (Tier, BuiltIn) = (Tier::Gateway, BuiltIn::Connections);

    fn connections() -> Metric {
        BuiltInMetric { name: BuiltIn::Connections, target: Target { kind: TargetType::AverageValue, value: 100 } }
            .into()
    }

    fn own_query() -> Metric {
        let target = QueryTarget { kind: QueryTargetType::AverageValue, value: 1.0 };
        Metric::Prometheus(PrometheusMetric { query: "work".into(), target, per_pod: false })
    }

    fn members() -> Vec<Member> {
        ["g-1", "g-2"].map(|name| Member { name: name.into(), state: MemberState::Ready }).into()
    }

    fn aged(value: f64, secs: u64) -> Aged {
        Aged { value, age: Duration::from_secs(secs) }
    }

    /// A round at so many seconds after the hour.
    fn round(secs: u64, prometheus: Option<Answers>, direct: &[(&str, f64)]) -> Round {
        let sample = |value: f64| direct::Sample { connections: Some(value), ..Default::default() };
        let direct = direct.iter().map(|(member, value)| ((*member).to_owned(), sample(*value))).collect();
        Round { asked_at: HOUR + Duration::from_secs(secs), prometheus, direct }
    }

    fn answers(gauges: &[(&str, Aged)], total: Option<Aged>) -> Answers {
        let gauges = gauges.iter().map(|(pod, aged)| ((*pod).to_owned(), *aged)).collect();
        Answers {
            gauges: BTreeMap::from([(GAUGE, Ok(gauges))]),
            queries: BTreeMap::from([(("work".to_owned(), false), Ok(Answer::Total(total)))]),
            source_age: None,
        }
    }

    fn outage() -> Answers {
        Answers {
            gauges: BTreeMap::from([(GAUGE, Err(PrometheusError::Timeout))]),
            queries: BTreeMap::from([(("work".to_owned(), false), Err(PrometheusError::Timeout))]),
            source_age: None,
        }
    }

    fn absorb(signals: &mut Signals, wall_clock: &str, round: Round) {
        let names = members().into_iter().map(|member| member.name).collect();
        signals.absorb(wall_clock, &names, round);
    }

    fn values(reading: &Reading) -> Vec<(&str, f64, u64)> {
        let Values::PerMember(values) = &reading.values else { panic!("{reading:?}") };
        let secs = |sample: &Sample| sample.at.saturating_sub(HOUR).as_secs();
        values.iter().map(|(member, sample)| (member.as_str(), sample.value, secs(sample))).collect()
    }

    #[test]
    fn each_value_is_the_newest_and_says_where_it_is_from() {
        let mut signals = Signals::default();
        let read = |signals: &Signals| signals.reading(Tier::Gateway, &members(), &connections(), 1.0);
        absorb(
            &mut signals,
            "9:00",
            round(100, Some(answers(&[("g-1", aged(1.0, 5)), ("g-2", aged(2.0, 10))], None)), &[]),
        );
        let reading = read(&signals);
        assert_eq!(values(&reading), [("g-1", 1.0, 95), ("g-2", 2.0, 90)]);
        assert_eq!(reading.origin, "from Prometheus");

        // An answer that is older than what is known teaches nothing.
        absorb(
            &mut signals,
            "9:01",
            round(110, Some(answers(&[("g-1", aged(9.0, 60)), ("g-3", aged(3.0, 0))], None)), &[("g-2", 4.0)]),
        );
        let reading = read(&signals);
        assert_eq!(values(&reading), [("g-1", 1.0, 95), ("g-2", 4.0, 110)], "g-3 is no member");
        assert_eq!(reading.origin, "from Prometheus, but for 1 that it lacks, scraped directly");

        for (wall_clock, secs) in [("9:02", 120), ("9:03", 130)] {
            absorb(&mut signals, wall_clock, round(secs, Some(outage()), &[("g-1", 5.0), ("g-2", 6.0)]));
            let reading = read(&signals);
            assert_eq!(values(&reading), [("g-1", 5.0, secs), ("g-2", 6.0, secs)]);
            assert_eq!(
                reading.origin, "scraped directly: Prometheus did not answer within 3 s, since 9:02",
                "since its first failure"
            );
            assert_eq!(signals.failing(), Some(&PrometheusError::Timeout));
        }
        absorb(
            &mut signals,
            "9:04",
            round(140, Some(answers(&[("g-1", aged(7.0, 1)), ("g-2", aged(8.0, 1))], None)), &[]),
        );
        assert_eq!((read(&signals).origin.as_str(), signals.failing()), ("from Prometheus", None));
        absorb(&mut signals, "9:05", round(150, None, &[("g-1", 5.0)]));
        assert_eq!(read(&signals).origin, "scraped directly");
    }

    #[test]
    fn utilization_is_a_part_of_what_is_set_aside() {
        let mut signals = Signals::default();
        let target = Target { kind: TargetType::Utilization, value: 70 };
        let metric = BuiltInMetric { name: BuiltIn::CpuUtilization, target }.into();
        let busy = |cores| direct::Sample { cpu_cores: Some(cores), ..Default::default() };
        let direct = BTreeMap::from([("g-1".to_owned(), busy(0.25)), ("g-2".to_owned(), busy(0.5))]);
        absorb(&mut signals, "9:00", Round { asked_at: HOUR, prometheus: None, direct });
        for (cores, percent) in [(1.0, [25.0, 50.0]), (0.5, [50.0, 100.0]), (0.25, [100.0, 200.0]), (2.0, [12.5, 25.0])]
        {
            let reading = signals.reading(Tier::Gateway, &members(), &metric, cores);
            let found: Vec<f64> = values(&reading).into_iter().map(|(_, value, _)| value).collect();
            assert_eq!(found, percent, "of {cores} cores");
        }
    }

    #[test]
    fn the_answer_to_a_query_ages_through_an_outage() {
        let mut signals = Signals::default();
        let read = |signals: &Signals| signals.reading(Tier::Gateway, &members(), &own_query(), 1.0);
        let words = |reading: &Reading| match &reading.values {
            Values::Failed(words) => words.clone(),
            other => panic!("{other:?}"),
        };
        assert!(words(&read(&signals)).contains("there is no Prometheus: set spec.metrics.prometheus.url"));
        absorb(&mut signals, "9:00", round(0, Some(outage()), &[]));
        assert_eq!(words(&read(&signals)), "Prometheus did not answer within 3 s, since 9:00");
        absorb(&mut signals, "9:01", round(10, Some(answers(&[], Some(aged(5.0, 0)))), &[]));
        let known = Values::Total(Some(Sample { value: 5.0, at: HOUR + Duration::from_secs(10) }));
        assert_eq!(read(&signals).values, known);
        absorb(&mut signals, "9:02", round(20, Some(outage()), &[]));
        let reading = read(&signals);
        assert_eq!(reading.values, known, "with the time of its answer");
        assert_eq!(reading.origin, "known before: Prometheus did not answer within 3 s, since 9:02");
        // "Nothing" is an answer: what was known before is not true any more.
        absorb(&mut signals, "9:03", round(30, Some(answers(&[], None)), &[]));
        assert_eq!(read(&signals).values, Values::Total(None));
        absorb(&mut signals, "9:04", round(40, Some(outage()), &[]));
        assert_eq!(words(&read(&signals)), "Prometheus did not answer within 3 s, since 9:04");
        // Who asks about it no more forgets it.
        let nothing = Answers { gauges: BTreeMap::new(), queries: BTreeMap::new(), source_age: None };
        absorb(&mut signals, "9:05", round(50, Some(nothing), &[]));
        assert_eq!(words(&read(&signals)), "not asked yet");
    }

    #[test]
    fn the_age_of_prometheus_is_passed_on() {
        let mut signals = Signals::default();
        let with_age = |age| Answers { source_age: age, ..answers(&[], None) };
        for (age, started_at) in [
            (Some(Duration::from_secs(10)), Some(HOUR - Duration::from_secs(10))),
            (Some(Duration::MAX), None),
            (None, None),
        ] {
            absorb(&mut signals, "9:00", round(0, Some(with_age(age)), &[]));
            for metric in [connections(), own_query()] {
                let reading = signals.reading(Tier::Gateway, &members(), &metric, 1.0);
                assert_eq!(reading.source_started_at, started_at, "{age:?}");
            }
        }
    }
}
