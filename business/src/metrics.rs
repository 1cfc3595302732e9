//! What a member says of itself to Prometheus: a snapshot that the core's task refreshes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use im_proto::process::cpu_time;
use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::core::Stats;

/// The figures of one moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Snapshot {
    /// Counters of the core.
    pub stats: Stats,
    /// Shards held.
    pub shards: u64,
    /// Messages and notifications per second, 10 s average.
    pub messages_per_second: f64,
    /// CPU used, cores, 10 s average.
    pub cpu_cores: f64,
    /// Age of the oldest message that is not with its recipients, seconds.
    pub watermark_lag_s: f64,
    /// Incoming links.
    pub links: u64,
}

/// Shared between the core's task and the scraper.
#[derive(Debug, Clone, Default)]
pub struct Metrics(pub Arc<Mutex<Snapshot>>);

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let now = *self.0.lock();
        let gauges = [
            ("im_messages_per_second", "Messages taken and notifications made, 10 s average", now.messages_per_second),
            ("im_cpu_cores", "CPU used in cores, 10 s average", now.cpu_cores),
            ("im_shards", "Shards held", now.shards as f64),
            ("im_links", "Incoming links", now.links as f64),
            ("im_watermark_lag_seconds", "Age of the oldest message not with its recipients yet", now.watermark_lag_s),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let counters = [
            ("im_accepted", "Messages taken from links", now.stats.accepted),
            ("im_committed", "Log entries stored", now.stats.committed),
            ("im_duplicates", "Messages that were stored before", now.stats.duplicates),
            ("im_notified", "Log entries whose recipients all have them", now.stats.notified),
            ("im_refused", "Requests refused", now.stats.refused),
            ("im_pushed", "Pushes to gateways", now.stats.pushed),
            ("im_shards_acquired", "Shards acquired", now.stats.acquired),
            ("im_shards_fenced", "Shards lost to a higher epoch", now.stats.fenced),
            ("im_unknown_outcomes", "Shards whose last commit has an unknown outcome", now.stats.unknown_outcomes),
            ("im_commits", "Commits", now.stats.commits),
            ("im_commit_batches", "Shards' batches in commits", now.stats.batches),
            ("im_holes", "Holes found in a log: any is a loss", now.stats.holes),
            ("im_malformed", "Frames that could not be understood", now.stats.malformed),
            ("im_room_dropped", "Room messages not sent to a gateway that is too slow", now.stats.room_dropped),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}

/// CPU time of this process as an average over some 10 s.
#[derive(Debug)]
pub struct CpuAverage {
    at: Instant,
    used: Duration,
    cores: f64,
}

impl Default for CpuAverage {
    fn default() -> Self {
        Self { at: Instant::now(), used: cpu_time(), cores: 0.0 }
    }
}

impl CpuAverage {
    /// Cores used; call it every now and then.
    pub fn sample(&mut self) -> f64 {
        let (now, used) = (Instant::now(), cpu_time());
        let passed = now.duration_since(self.at).as_secs_f64();
        if passed >= 0.5 {
            let rate = used.saturating_sub(self.used).as_secs_f64() / passed;
            self.cores += (rate - self.cores) * (1.0 - (-passed / 10.0).exp());
            (self.at, self.used) = (now, used);
        }
        self.cores
    }
}
