//! What the operator says of each ImCluster to Prometheus: the figures that `kubectl get imc` shows, for alerts and dashboards.
//!
//! The series carry `namespace` and `imcluster`, as the members' own series do after the scrape, so that both can be joined.
//! Only the leader knows how a cluster is: the others export nothing but that they don't lead.

use im_crds::{ConditionStatus, ImClusterStatus};
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// The state of all ImClusters that this process looks after. Clones share it: one is the registry's, another is kept by
/// whoever writes statuses. Names are those behind the registry's prefix.
#[derive(Clone, Debug, Default)]
pub struct ClusterMetrics(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    leading: bool,
    /// By namespace and name.
    clusters: BTreeMap<(String, String), ImClusterStatus>,
}

impl ClusterMetrics {
    /// Whether this process leads. Whoever stops leading forgets all clusters: what it knew is about to be wrong.
    pub fn set_leading(&self, leading: bool) {
        let mut state = self.0.lock();
        state.leading = leading;
        if !leading {
            state.clusters.clear();
        }
    }

    /// The cluster's status is now this one. Nothing happens if this process does not lead.
    pub fn set(&self, namespace: &str, name: &str, status: &ImClusterStatus) {
        let mut state = self.0.lock();
        if state.leading {
            state.clusters.insert((namespace.to_owned(), name.to_owned()), status.clone());
        }
    }

    /// The cluster is gone.
    pub fn remove(&self, namespace: &str, name: &str) {
        self.0.lock().clusters.remove(&(namespace.to_owned(), name.to_owned()));
    }
}

/// Labels beside `namespace` and `imcluster`, and a value.
type Sample = (Vec<(&'static str, String)>, f64);

/// A gauge: name, help, and its samples for one cluster.
type Family = (&'static str, &'static str, fn(&ImClusterStatus) -> Vec<Sample>);

const FAMILIES: [Family; 8] = [
    ("condition", "1 for the status that a condition has, 0 for the two others", |status| {
        let all =
            [(ConditionStatus::True, "True"), (ConditionStatus::False, "False"), (ConditionStatus::Unknown, "Unknown")];
        let of_condition = |condition: &im_crds::Condition| {
            let (kind, is) = (condition.kind.clone(), condition.status);
            let sample = move |(status, name): (ConditionStatus, &str)| {
                (vec![("type", kind.clone()), ("status", name.to_owned())], f64::from(u8::from(status == is)))
            };
            all.map(sample)
        };
        status.conditions.iter().flat_map(of_condition).collect()
    }),
    ("replicas", "Members that run", |status| tiers(status, |tier| tier.replicas)),
    ("replicas_ready", "Members that serve", |status| tiers(status, |tier| tier.ready)),
    ("replicas_desired", "Members that there should be", |status| tiers(status, |tier| tier.desired)),
    ("shards", "Shards in all", |status| one(f64::from(status.shards.total))),
    ("shards_moving", "Shards on their way to another owner", |status| one(f64::from(status.shards.moving))),
    ("shards_unowned", "Shards without an owner", |status| one(f64::from(status.shards.unowned))),
    (
        "watermark_lag_seconds",
        "Age of the oldest message whose recipients were not all notified; none while nobody says",
        |status| status.watermark_lag_seconds.map(one).unwrap_or_default(),
    ),
];

fn one(value: f64) -> Vec<Sample> {
    vec![(Vec::new(), value)]
}

fn tiers(status: &ImClusterStatus, members: fn(&im_crds::TierStatus) -> u32) -> Vec<Sample> {
    let sample = |name: &str, tier| (vec![("tier", name.to_owned())], f64::from(members(tier)));
    vec![sample("gateway", &status.gateway), sample("business", &status.business)]
}

impl Collector for ClusterMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let state = self.0.lock();
        let leading = ConstGauge::new(f64::from(u8::from(state.leading)));
        let help = "1 while this replica decides";
        leading.encode(encoder.encode_descriptor("leader", help, None, MetricType::Gauge)?)?;
        for (name, help, samples_of) in FAMILIES {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for ((namespace, cluster), status) in &state.clusters {
                for (labels, value) in samples_of(status) {
                    let of_cluster = [("namespace", namespace.as_str()), ("imcluster", cluster.as_str())];
                    let labels = labels.iter().map(|(name, value)| (*name, value.as_str()));
                    let labels: Vec<_> = of_cluster.into_iter().chain(labels).collect();
                    metric.encode_family(&labels)?.encode_gauge(&value)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use im_crds::{Condition, ShardStatus, TierStatus};
    use prometheus_client::registry::Registry;

    fn exported(metrics: &ClusterMetrics) -> Result<Vec<String>, fmt::Error> {
        let mut registry = Registry::with_prefix("imcluster");
        registry.register_collector(Box::new(metrics.clone()));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect())
    }

    fn status() -> ImClusterStatus {
        let degraded = Condition {
            kind: "Degraded".into(),
            status: ConditionStatus::Unknown,
            observed_generation: 1,
            last_transition_time: "2026-01-01T00:00:00Z".into(),
            reason: "Silent".into(),
            message: String::new(),
        };
        ImClusterStatus {
            conditions: vec![degraded],
            gateway: TierStatus { replicas: 3, ready: 2, desired: 4, ..TierStatus::default() },
            shards: ShardStatus { total: 256, moving: 5, unowned: 1, ..ShardStatus::default() },
            watermark_lag_seconds: None,
            ..ImClusterStatus::default()
        }
    }

    #[test]
    fn a_leader_exports_each_cluster() -> Result<(), fmt::Error> {
        let metrics = ClusterMetrics::default();
        metrics.set_leading(true);
        metrics.set("talk", "chat", &status());
        let of_chat =
            |name: &str, labels: &str, value| format!(r#"{name}{{namespace="talk",imcluster="chat"{labels}}} {value}"#);
        let wanted = vec![
            "imcluster_leader 1.0".to_owned(),
            of_chat("imcluster_condition", r#",type="Degraded",status="True""#, "0.0"),
            of_chat("imcluster_condition", r#",type="Degraded",status="False""#, "0.0"),
            of_chat("imcluster_condition", r#",type="Degraded",status="Unknown""#, "1.0"),
            of_chat("imcluster_replicas", r#",tier="gateway""#, "3.0"),
            of_chat("imcluster_replicas", r#",tier="business""#, "0.0"),
            of_chat("imcluster_replicas_ready", r#",tier="gateway""#, "2.0"),
            of_chat("imcluster_replicas_ready", r#",tier="business""#, "0.0"),
            of_chat("imcluster_replicas_desired", r#",tier="gateway""#, "4.0"),
            of_chat("imcluster_replicas_desired", r#",tier="business""#, "0.0"),
            of_chat("imcluster_shards", "", "256.0"),
            of_chat("imcluster_shards_moving", "", "5.0"),
            of_chat("imcluster_shards_unowned", "", "1.0"),
        ];
        assert_eq!(exported(&metrics)?, wanted);
        metrics.remove("talk", "chat");
        assert_eq!(exported(&metrics)?, ["imcluster_leader 1.0"]);
        Ok(())
    }

    #[test]
    fn only_the_leader_knows() -> Result<(), fmt::Error> {
        let metrics = ClusterMetrics::default();
        metrics.set("talk", "chat", &status());
        assert_eq!(exported(&metrics)?, ["imcluster_leader 0.0"], "it never led");
        metrics.set_leading(true);
        metrics.set("talk", "chat", &status());
        metrics.set_leading(false);
        assert_eq!(exported(&metrics)?, ["imcluster_leader 0.0"], "it led");
        Ok(())
    }
}
