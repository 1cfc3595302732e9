//! What control exports: the numbers of one cluster's status, and what scaling did.

use crate::autoscale::MetricState;
use crate::control::status::Status;
use crate::platform::Tier;
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// What control exports, in Prometheus' text format: the numbers of the status, and what `register` adds.
///
/// # Errors
/// None that can happen: it is written to memory.
pub fn export(status: &Status, register: impl FnOnce(&mut Registry)) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("im");
    register(&mut registry);
    let members = Family::<[(&str, &str); 2], Gauge>::default();
    for (tier, shown) in [("gateway", &status.tiers.gateway), ("business", &status.tiers.business)] {
        for (count, value) in [("running", shown.replicas), ("ready", shown.ready), ("desired", shown.desired)] {
            members.get_or_create(&[("tier", tier), ("count", count)]).set(value.into());
        }
    }
    registry.register("tier_members", "Members of a tier: that run, that serve, that there should be", members);
    let shards = Family::<[(&str, &str); 1], Gauge>::default();
    let shown = &status.shards;
    for (count, value) in
        [("total", shown.total), ("owned", shown.owned), ("moving", shown.moving), ("queued", shown.queued)]
    {
        shards.get_or_create(&[("count", count)]).set(value.into());
    }
    registry.register("shards", "Shards: all, with an owner that lives, under way, about to move", shards);
    let term = Gauge::<i64>::default();
    term.set(i64::try_from(shown.term).unwrap_or(i64::MAX));
    registry.register("map_term", "Term of the shard map", term);
    let verdicts = Family::<[(&str, &str); 1], Gauge>::default();
    for verdict in ["True", "False", "Unknown"] {
        verdicts.get_or_create(&[("status", verdict)]).set((status.no_message_lost.status == verdict).into());
    }
    registry.register("no_message_lost", "1 at what the store says about acknowledged messages", verdicts);
    if let Some(lag) = status.watermark_lag_seconds {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(lag);
        registry.register("watermark_lag_seconds", "Age of the oldest message not notified to all", gauge);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// One tier of one cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, EncodeLabelSet)]
struct TierLabels {
    cluster: String,
    tier: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabels {
    cluster: String,
    tier: &'static str,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DoubtLabels {
    cluster: String,
    tier: &'static str,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    cluster: String,
    reason: &'static str,
}

/// What scaling did, of all clusters of one operator; clones share the numbers.
#[derive(Clone, Debug, Default)]
pub struct ScalingMetrics {
    wanted: Family<TierLabels, Gauge>,
    untrusted: Family<TierLabels, Gauge>,
    changes: Family<ChangeLabels, Counter>,
    doubts: Family<DoubtLabels, Counter>,
    failures: Family<FailureLabels, Counter>,
    /// What was told of each tier last: changes are counted, not decisions.
    last: Arc<Mutex<BTreeMap<TierLabels, Last>>>,
}

#[derive(Clone, Debug)]
struct Last {
    replicas: u32,
    metrics: Vec<MetricState>,
}

impl ScalingMetrics {
    /// Adds every number to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("scaling_wanted_members", "Members that a tier should have", self.wanted.clone());
        registry.register(
            "scaling_untrusted_metrics",
            "Metrics of a tier that can't be trusted now: it does not scale in",
            self.untrusted.clone(),
        );
        registry.register("scaling_changes", "Changes of the number of members wanted", self.changes.clone());
        registry.register(
            "scaling_metric_outages",
            "Times that a metric could not be trusted any more, by what was wrong first",
            self.doubts.clone(),
        );
        registry.register("prometheus_failures", "Queries that Prometheus did not answer", self.failures.clone());
    }

    /// Notes a decision: how many members `tier` of `cluster` should have, and how far each of its metrics can be trusted.
    pub fn decided(&self, cluster: &str, tier: Tier, replicas: u32, metrics: &[MetricState]) {
        let tier = tier.role().name();
        let labels = TierLabels { cluster: cluster.to_owned(), tier };
        self.wanted.get_or_create(&labels).set(replicas.into());
        let untrusted = metrics.iter().filter(|state| **state != MetricState::Fresh).count();
        self.untrusted.get_or_create(&labels).set(i64::try_from(untrusted).unwrap_or(i64::MAX));
        let mut all = self.last.lock();
        let now = Last { replicas, metrics: metrics.to_vec() };
        let Some(last) = all.insert(labels, now) else { return };
        if last.replicas != replicas {
            let direction = if replicas > last.replicas { "out" } else { "in" };
            self.changes.get_or_create(&ChangeLabels { cluster: cluster.to_owned(), tier, direction }).inc();
        }
        let before = last.metrics.iter().chain(std::iter::repeat(&MetricState::Fresh));
        for (state, before) in metrics.iter().zip(before) {
            if *before == MetricState::Fresh && *state != MetricState::Fresh {
                let labels = DoubtLabels { cluster: cluster.to_owned(), tier, state: state.name() };
                self.doubts.get_or_create(&labels).inc();
            }
        }
    }

    /// Notes that Prometheus did not answer a query of `cluster`.
    pub fn failed(&self, cluster: &str, reason: &'static str) {
        self.failures.get_or_create(&FailureLabels { cluster: cluster.to_owned(), reason }).inc();
    }

    /// Forgets a cluster that is gone; its counters stay, as Prometheus expects of counters.
    pub fn forget(&self, cluster: &str) {
        let mut last = self.last.lock();
        let gone: Vec<TierLabels> = last.keys().filter(|labels| labels.cluster == cluster).cloned().collect();
        for labels in gone {
            last.remove(&labels);
            self.wanted.remove(&labels);
            self.untrusted.remove(&labels);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_the_status_are_exported() {
        let mut status = Status { watermark_lag_seconds: Some(1.5), ..Status::default() };
        status.tiers.gateway.desired = 3;
        status.shards.total = 256;
        status.no_message_lost.status = "True".into();
        let page = export(&status, |_| ()).expect("written to memory");
        for line in [
            "im_tier_members{tier=\"gateway\",count=\"desired\"} 3",
            "im_shards{count=\"total\"} 256",
            "im_no_message_lost{status=\"True\"} 1",
            "im_no_message_lost{status=\"False\"} 0",
            "im_watermark_lag_seconds 1.5",
        ] {
            assert!(page.lines().any(|found| found == line), "no `{line}` in\n{page}");
        }
        let silent = export(&Status::default(), |_| ()).expect("written to memory");
        assert!(!silent.contains("im_watermark_lag_seconds"), "unknown is not zero");
    }

    #[test]
    fn changes_and_outages_are_counted_once() {
        let metrics = ScalingMetrics::default();
        let (fresh, stale) = (MetricState::Fresh, MetricState::Stale);
        for (replicas, states) in [(1, [fresh, fresh]), (3, [fresh, stale]), (3, [fresh, stale]), (2, [fresh, fresh])] {
            metrics.decided("im/chat", Tier::Gateway, replicas, &states);
        }
        metrics.decided("im/chat", Tier::Gateway, 2, &[MetricState::Partial { fresh: 1, ready: 2 }, stale]);
        metrics.failed("im/chat", "timeout");
        let page = |metrics: &ScalingMetrics| {
            let mut registry = Registry::with_prefix("im");
            metrics.register(&mut registry);
            let mut page = String::new();
            encode(&mut page, &registry).expect("written to memory");
            page
        };
        let text = page(&metrics);
        let tier = "cluster=\"im/chat\",tier=\"gateway\"";
        for line in [
            format!("im_scaling_wanted_members{{{tier}}} 2"),
            format!("im_scaling_untrusted_metrics{{{tier}}} 2"),
            format!("im_scaling_changes_total{{{tier},direction=\"out\"}} 1"),
            format!("im_scaling_changes_total{{{tier},direction=\"in\"}} 1"),
            format!("im_scaling_metric_outages_total{{{tier},state=\"stale\"}} 2"),
            format!("im_scaling_metric_outages_total{{{tier},state=\"partial\"}} 1"),
            "im_prometheus_failures_total{cluster=\"im/chat\",reason=\"timeout\"} 1".to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
        }
        metrics.forget("im/chat");
        assert!(!page(&metrics).contains("im_scaling_wanted_members{"), "a cluster that is gone wants nothing");
    }
}
