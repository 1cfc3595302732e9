//! From signals to a number of members: the thin side of `autoscale`.

use crate::autoscale::{History, Input, Member, MetricState, Reading, decide};
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
}

/// How many members there should be, and why.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Wanted {
    pub(super) replicas: u32,
    pub(super) because: Vec<String>,
    /// Each metric's state, in the order of the spec.
    pub(super) metrics: Vec<MetricState>,
}

impl Wanted {
    fn without_metrics(replicas: u32, because: &str) -> Self {
        Self { replicas, because: vec![because.to_owned()], metrics: vec![] }
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
        let Observed { tier, members, ordered, rolling: _, signals } = *observed;
        let readings: Vec<Reading> = spec.metrics.iter().map(|metric| signals.reading(tier, members, metric)).collect();
        let input = Input { now: clock(now), spec, members, ordered, readings: &readings };
        let (decision, history) = decide(&input, std::mem::take(&mut self.history));
        self.history = history;
        Wanted { replicas: decision.replicas, because: decision.because, metrics: decision.metrics }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autoscale::MemberState;
    use crate::metrics::{Round, Sample};
    use im_crds::ImCluster;
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
            let members: Vec<Member> = (0..connections.len())
                .map(|index| Member { name: name(index), state: MemberState::Ready })
                .collect();
            let names: BTreeSet<String> = members.iter().map(|member| member.name.clone()).collect();
            self.signals.absorb("now", &names, Round { asked_at: clock(now), prometheus: None, direct });
            let signals = &self.signals;
            let observed = Observed { tier: Tier::Gateway, members: &members, ordered: 0, rolling, signals };
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
}
