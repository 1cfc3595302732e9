//! From scraped samples to a number of members: the thin side of `autoscale`.

use crate::autoscale::{History, Input, Member, MemberState, Reading, Sample as Value, Values, decide};
use crate::metrics::Sample;
use im_crds::{Autoscaling, BuiltIn, Scaling};
use std::time::Duration;

/// What 100 % of CPU utilization is on one machine, where nobody limits a process: one core.
const CORES_PER_MEMBER: f64 = 1.0;

/// What is known of one member of a tier.
#[derive(Clone, Debug)]
pub(super) struct Measured {
    pub(super) name: String,
    pub(super) state: MemberState,
    /// The last sample and when it was taken.
    pub(super) sample: Option<(Duration, Sample)>,
}

/// How many members there should be, and why.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Wanted {
    pub(super) replicas: u32,
    pub(super) because: Vec<String>,
}

/// The autoscaler's memory of one tier.
#[derive(Debug, Default)]
pub(super) struct Scaler {
    history: History,
    /// What it said last; 0 before it said anything.
    last: u32,
}

impl Scaler {
    /// Decides about a tier of which `members` run and `ordered` more were asked for. While a new configuration is
    /// `rolling` out the number stays: for a while there is one more than wanted, and the young ones have nothing to say.
    pub(super) fn decide(
        &mut self,
        now: Duration,
        scaling: Scaling<'_>,
        members: &[Measured],
        ordered: u32,
        rolling: bool,
    ) -> Wanted {
        let wanted = match scaling {
            Scaling::Fixed(replicas) => Wanted { replicas, because: vec!["replicas is fixed in the file".to_owned()] },
            Scaling::Auto(spec) if rolling && self.last > 0 => Wanted {
                replicas: self.last.clamp(spec.min_replicas, spec.max_replicas),
                because: vec!["members are being replaced by ones with the new configuration".to_owned()],
            },
            Scaling::Auto(spec) => self.auto(now, spec, members, ordered),
        };
        self.last = wanted.replicas;
        wanted
    }

    fn auto(&mut self, now: Duration, spec: &Autoscaling, members: &[Measured], ordered: u32) -> Wanted {
        let readings: Vec<Reading> = spec
            .metrics
            .iter()
            .map(|metric| {
                let value = |member: &Measured| {
                    let (at, sample) = member.sample?;
                    Some((member.name.clone(), Value { value: pick(metric.built_in.name, &sample)?, at }))
                };
                let values = Values::PerMember(members.iter().filter_map(value).collect());
                // Members are scraped directly: there is no source that could be young.
                Reading { values, source_started_at: None }
            })
            .collect();
        let members: Vec<Member> =
            members.iter().map(|member| Member { name: member.name.clone(), state: member.state }).collect();
        let input = Input { now, spec, members: &members, ordered, readings: &readings };
        let (decision, history) = decide(&input, std::mem::take(&mut self.history));
        self.history = history;
        Wanted { replicas: decision.replicas, because: decision.because }
    }
}

/// A member's value of a metric, in the unit of its target.
fn pick(metric: BuiltIn, sample: &Sample) -> Option<f64> {
    match metric {
        BuiltIn::Connections => sample.connections,
        BuiltIn::MessagesPerSecond => sample.messages_per_second,
        BuiltIn::CpuUtilization => sample.cpu_cores.map(|cores| cores / CORES_PER_MEMBER * 100.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use im_crds::ImCluster;

    fn cluster() -> ImCluster {
        ImCluster::parse_yaml(
            "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {name: chat}\nspec: {auth: {insecure: {}},
               gateway: {autoscaling: {minReplicas: 1, maxReplicas: 4, metrics: [
                 {type: BuiltIn, builtIn: {name: Connections, target: {type: AverageValue, value: 100}}}]}}}",
        )
        .expect("a good file")
    }

    fn member(name: &str, at: Duration, connections: f64) -> Measured {
        let sample = Sample { connections: Some(connections), ..Sample::default() };
        Measured { name: name.into(), state: MemberState::Ready, sample: Some((at, sample)) }
    }

    #[test]
    fn scraped_connections_scale_out_and_missing_ones_never_in() {
        let cluster = cluster();
        let scaling = cluster.spec.gateway.scaling();
        let now = Duration::from_secs(1_000);
        let mut scaler = Scaler::default();
        let crowded = [member("gateway-0", now, 290.0)];
        let wanted = scaler.decide(now, scaling, &crowded, 0, false);
        assert_eq!(wanted.replicas, 3, "{:?}", wanted.because);
        assert!(!wanted.because.is_empty());

        let silent = |name: &str| Measured { name: name.into(), state: MemberState::Ready, sample: None };
        let mut scaler = Scaler::default();
        for second in 0..600 {
            let now = now + Duration::from_secs(second);
            let wanted = scaler.decide(now, scaling, &[silent("gateway-0"), silent("gateway-1")], 0, false);
            assert_eq!(wanted.replicas, 2, "{:?}", wanted.because);
        }
    }

    #[test]
    fn a_roll_out_keeps_the_number() {
        let cluster = cluster();
        let scaling = cluster.spec.gateway.scaling();
        let now = Duration::from_secs(1_000);
        let mut scaler = Scaler::default();
        assert_eq!(scaler.decide(now, scaling, &[member("gateway-0", now, 190.0)], 0, false).replicas, 2);
        let crowd = [member("gateway-0", now, 900.0), member("gateway-1", now, 900.0)];
        assert_eq!(scaler.decide(now, scaling, &crowd, 0, true).replicas, 2);
        let now = now + Duration::from_secs(20);
        let crowd = [member("gateway-0", now, 900.0), member("gateway-1", now, 900.0)];
        assert_eq!(scaler.decide(now, scaling, &crowd, 0, false).replicas, 4);
        assert_eq!(scaler.decide(now, Scaling::Fixed(3), &crowd, 0, true).replicas, 3);
    }
}
