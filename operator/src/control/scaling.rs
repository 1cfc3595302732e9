//! From signals to a number of members: the thin side of `autoscale`.

use crate::autoscale::{Decision, History, Input, Limit, Member, MetricState, Reading, decide};
use crate::metrics::Signals;
use crate::platform::Tier;
use im_crds::{Autoscaling, Scaling};
use std::time::Duration;

/// Scaling's clock begins that long before control: a sample may be older than control itself.
const BEFORE: Duration = Duration::from_secs(86_400);

/// Scaling's clock, by control's.
pub(super) fn clock(since_began: Duration) -> Duration {
    BEFORE + since_began
}

/// What runs of a tier, and what is known about it.
pub(super) struct Observed<'a> {
    pub(super) tier: Tier,
    pub(super) members: &'a [Member],
    /// Members that were asked for and are not seen yet.
    pub(super) ordered: u32,
    /// A new configuration is being rolled out.
    pub(super) rolling: bool,
    pub(super) signals: &'a Signals,
    /// Cores that are set aside for each member.
    pub(super) cores: f64,
}

/// How many members there should be, and why.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Wanted {
    pub(super) replicas: u32,
    pub(super) because: Vec<String>,
    /// What keeps it from what the metrics ask for.
    pub(super) limited: Option<Limit>,
    /// Each metric's state, in the order of the spec.
    pub(super) metrics: Vec<MetricState>,
}

impl Wanted {
    /// Whether some metric can't be trusted, so that nothing is scaled in.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.metrics.iter().any(|state| *state != MetricState::Fresh)
    }

    fn without_metrics(replicas: u32, because: &str) -> Self {
        Self { replicas, because: vec![because.to_owned()], ..Self::default() }
    }
}

/// The autoscaler's memory of one tier.
#[derive(Debug, Default)]
pub(super) struct Scaler {
    history: History,
    /// What it said last; 0 before it said anything.
    last: u32,
}

impl Scaler {
    /// Decides about a tier; `now` is control's clock. While a new configuration is rolling out the number stays: for a
    /// while there is one more than wanted, and the young ones have nothing to say.
    pub(super) fn decide(&mut self, now: Duration, scaling: Scaling<'_>, observed: &Observed<'_>) -> Wanted {
        let wanted = match scaling {
            Scaling::Fixed(replicas) => Wanted::without_metrics(replicas, "replicas is fixed in the file"),
            Scaling::Auto(spec) if observed.rolling && self.last > 0 => Wanted::without_metrics(
                self.last.clamp(spec.min_replicas, spec.max_replicas),
                "members are being replaced by ones with the new configuration",
            ),
            Scaling::Auto(spec) => self.auto(now, spec, observed),
        };
        self.last = wanted.replicas;
        wanted
    }

    fn auto(&mut self, now: Duration, spec: &Autoscaling, observed: &Observed<'_>) -> Wanted {
        let Observed { tier, members, ordered, rolling: _, signals, cores } = *observed;
        let reading = |metric| signals.reading(tier, members, metric, cores);
        let readings: Vec<Reading> = spec.metrics.iter().map(reading).collect();
        let input = Input { now: clock(now), spec, members, ordered, readings: &readings };
        let (decision, history) = decide(&input, std::mem::take(&mut self.history));
        self.history = history;
        let Decision { replicas, because, limited, metrics, current: _ } = decision;
        Wanted { replicas, because, limited, metrics }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autoscale::MemberState;
    use crate::metrics::PrometheusError;
    use crate::metrics::prometheus::{Aged, Answer};
    use crate::metrics::round::Answers;
    use crate::metrics::{Round, Sample};
    use im_crds::{BuiltIn, ImCluster};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn cluster() -> ImCluster {
        ImCluster::parse_yaml(
            "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {name: chat}\nspec: {auth: {insecure: {}},
               gateway: {autoscaling: {minReplicas: 1, maxReplicas: 4, metrics: [
                 {type: BuiltIn, builtIn: {name: Connections, target: {type: AverageValue, value: 100}}}]}}}",
        )
        .expect("a good file")
    }

    /// One tier whose members are scraped, in the order of their numbers.
    #[derive(Default)]
    struct Machine {
        scaler: Scaler,
        signals: Signals,
    }

    impl Machine {
        fn decide(&mut self, second: u64, scaling: Scaling<'_>, connections: &[Option<f64>], rolling: bool) -> Wanted {
            let now = Duration::from_secs(second);
            let name = |index: usize| format!("gateway-{index}");
            let sample = |(index, value): (usize, &Option<f64>)| {
                Some((name(index), Sample { connections: Some((*value)?), ..Sample::default() }))
            };
            let direct: BTreeMap<_, _> = connections.iter().enumerate().filter_map(sample).collect();
            let members: Vec<Member> =
                (0..connections.len()).map(|index| Member { name: name(index), state: MemberState::Ready }).collect();
            let names: BTreeSet<String> = members.iter().map(|member| member.name.clone()).collect();
            self.signals.absorb("now", &names, Round { asked_at: clock(now), prometheus: None, direct });
            let signals = &self.signals;
            let observed =
                Observed { tier: Tier::Gateway, members: &members, ordered: 0, rolling, signals, cores: 1.0 };
            self.scaler.decide(now, scaling, &observed)
        }
    }

    #[test]
    fn scraped_connections_scale_out_and_missing_ones_never_in() {
        let cluster = cluster();
        let scaling = cluster.spec.gateway.scaling();
        let wanted = Machine::default().decide(1, scaling, &[Some(290.0)], false);
        assert_eq!(wanted.replicas, 3, "{:?}", wanted.because);
        assert!(wanted.because[0].ends_with("scraped directly"), "{:?}", wanted.because);
        let mut silent = Machine::default();
        for second in 0..600 {
            let wanted = silent.decide(second, scaling, &[None, None], false);
            assert_eq!(wanted.replicas, 2, "{:?}", wanted.because);
        }
    }

    #[test]
    fn a_roll_out_keeps_the_number() {
        let cluster = cluster();
        let scaling = cluster.spec.gateway.scaling();
        let mut machine = Machine::default();
        assert_eq!(machine.decide(0, scaling, &[Some(190.0)], false).replicas, 2);
        let crowd = [Some(900.0), Some(900.0)];
        assert_eq!(machine.decide(0, scaling, &crowd, true).replicas, 2);
        assert_eq!(machine.decide(20, scaling, &crowd, false).replicas, 4);
        assert_eq!(machine.decide(20, Scaling::Fixed(3), &crowd, true).replicas, 3);
    }

    /// What happens in one round of measuring.
    #[derive(Clone, Debug)]
    struct Weather {
        prometheus: Sky,
        /// Which members can be scraped directly: bit i for member i.
        scraped: u8,
        /// Connections of all members together; with another digit it is the answer to the query.
        load: f64,
    }

    /// How Prometheus is.
    #[derive(Clone, Debug)]
    enum Sky {
        /// Every member's sample is that old, seconds.
        Clear { age: u64 },
        /// It knows member i if bit i is set; it answers the query.
        Cloudy { known: u8 },
        /// It started that long ago, seconds, and knows everything again.
        Restarted { ago: u64 },
        /// It has nothing.
        Empty,
        /// It does not answer.
        Dark,
    }

    fn weather() -> impl Strategy<Value = Weather> {
        let sky = prop_oneof![
            12 => (0_u64..45).prop_map(|age| Sky::Clear { age }),
            12 => Just(Sky::Clear { age: 0 }),
            1 => any::<u8>().prop_map(|known| Sky::Cloudy { known }),
            1 => (0_u64..200).prop_map(|ago| Sky::Restarted { ago }),
            1 => Just(Sky::Empty),
            1 => Just(Sky::Dark),
        ];
        let scraped = prop_oneof![4 => Just(u8::MAX), 1 => any::<u8>()];
        (sky, scraped, 0.0..500.0).prop_map(|(prometheus, scraped, load)| Weather { prometheus, scraped, load })
    }

    const GAUGE: (Tier, BuiltIn) = (Tier::Gateway, BuiltIn::Connections);
    const MEMBERS: u8 = 5;

    /// A round in that weather, at that second, of a tier of so many members.
    fn round(weather: &Weather, at: Duration, members: u8) -> Round {
        let share = weather.load / f64::from(members);
        let aged = |age| Aged { value: share, age: Duration::from_secs(age) };
        let pods = |known: u8, age| {
            (0..members).filter(|i| known >> i & 1 == 1).map(|i| (format!("g{i}"), aged(age))).collect()
        };
        let total = Answer::Total(Some(Aged { value: weather.load, age: Duration::ZERO }));
        let (gauge, query, source_age) = match weather.prometheus {
            Sky::Clear { age } => (Ok(pods(u8::MAX, age)), Ok(total), None),
            Sky::Cloudy { known } => (Ok(pods(known, 0)), Ok(total), None),
            Sky::Restarted { ago } => (Ok(pods(u8::MAX, 0)), Ok(total), Some(Duration::from_secs(ago))),
            Sky::Empty => (Ok(BTreeMap::new()), Ok(Answer::Total(None)), None),
            Sky::Dark => (Err(PrometheusError::Timeout), Err(PrometheusError::Timeout), None),
        };
        let answers = Answers {
            gauges: BTreeMap::from([(GAUGE, gauge)]),
            queries: BTreeMap::from([(("work".to_owned(), false), query)]),
            source_age,
        };
        let sample = Sample { connections: Some(share), ..Sample::default() };
        let direct =
            (0..members).filter(|i| weather.scraped >> i & 1 == 1).map(|i| (format!("g{i}"), sample)).collect();
        Round { asked_at: clock(at), prometheus: Some(answers), direct }
    }

    /// Keeps for each input when its latest value is from: what the judge knows, without the code under test. A value may be
    /// from before the first second.
    #[derive(Default)]
    struct Judge {
        members: BTreeMap<u8, i64>,
        query: Option<i64>,
        young: bool,
    }

    impl Judge {
        fn see(&mut self, weather: &Weather, second: i64, members: u8) {
            for i in 0..members {
                let by_prometheus = match weather.prometheus {
                    Sky::Clear { age } => Some(second - age as i64),
                    Sky::Cloudy { known } => (known >> i & 1 == 1).then_some(second),
                    Sky::Restarted { .. } => Some(second),
                    Sky::Empty | Sky::Dark => None,
                };
                let directly = (weather.scraped >> i & 1 == 1).then_some(second);
                if let Some(latest) = by_prometheus.max(directly) {
                    let known = self.members.entry(i).or_insert(latest);
                    *known = latest.max(*known);
                }
            }
            self.members.retain(|i, _| *i < members);
            self.query = match weather.prometheus {
                Sky::Dark => self.query,
                Sky::Empty => None,
                _ => Some(second),
            };
            self.young = matches!(weather.prometheus, Sky::Restarted { ago } if Duration::from_secs(ago) < crate::autoscale::SOURCE_SETTLES);
        }

        fn knows_all(&self, second: i64, members: u8) -> bool {
            let fresh = |at: Option<&i64>| at.is_some_and(|at| second - at <= 30);
            !self.young && fresh(self.query.as_ref()) && (0..members).all(|i| fresh(self.members.get(&i)))
        }
    }

    #[test]
    fn the_judge_knows_values_from_before_the_first_second() {
        let mut judge = Judge::default();
        let clear = |age| Weather { prometheus: Sky::Clear { age }, scraped: 0, load: 0.0 };
        judge.see(&clear(1), 0, MEMBERS);
        assert!(judge.knows_all(0, MEMBERS));
        assert!(!judge.knows_all(30, MEMBERS), "31 s old");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever fails in whatever order: no scale-in unless every input was there and fresh for the whole window.
        #[test]
        fn outages_never_scale_in(rounds in prop::collection::vec(weather(), 20..120), window in 0_u64..90) {
            let mut cluster = ImCluster::parse_yaml(
                "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {name: chat}\nspec: {auth: {insecure: {}},
                   gateway: {autoscaling: {minReplicas: 1, maxReplicas: 5, metrics: [
                     {type: BuiltIn, builtIn: {name: Connections, target: {type: AverageValue, value: 100}}},
                     {type: Prometheus, prometheus: {query: work, target: {type: AverageValue, value: 100}}}]}}}",
            )
            .expect("a good file");
            if let Some(autoscaling) = &mut cluster.spec.gateway.autoscaling {
                autoscaling.behavior.scale_down.stabilization_window_seconds = Some(window as u32);
            }
            let (mut scaler, mut signals, mut judge) = (Scaler::default(), Signals::default(), Judge::default());
            let mut running = MEMBERS;
            // When not everything was known.
            let mut doubts: Vec<u64> = Vec::new();
            for (index, weather) in rounds.iter().enumerate() {
                let second = index as u64 * 5;
                let now = Duration::from_secs(second);
                let names = (0..running).map(|i| format!("g{i}")).collect();
                signals.absorb("now", &names, round(weather, now, running));
                judge.see(weather, second as i64, running);
                if !judge.knows_all(second as i64, running) {
                    doubts.push(second);
                }
                let members: Vec<Member> =
                    (0..running).map(|i| Member { name: format!("g{i}"), state: MemberState::Ready }).collect();
                let observed = Observed {
                    tier: Tier::Gateway,
                    members: &members,
                    ordered: 0,
                    rolling: false,
                    signals: &signals,
                    cores: 1.0,
                };
                let wanted = scaler.decide(now, cluster.spec.gateway.scaling(), &observed);
                if wanted.replicas < u32::from(running) {
                    let doubt = doubts.iter().rev().find(|at| second - **at <= window);
                    prop_assert!(doubt.is_none(), "in at {second} s, in doubt at {doubt:?}: {:?}", wanted.because);
                    prop_assert!(second >= window, "in at {second} s: {:?}", wanted.because);
                }
                running = wanted.replicas as u8;
            }
        }
    }
}
