//! What a gateway counts, in Prometheus' words, and the 10-second averages that autoscaling reads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::mqtt::Reason;

/// Averages are taken over this long, seconds.
const WINDOW_S: usize = 10;
/// Connects are averaged over this long, seconds: a drain elsewhere has to slow down soon.
const CONNECTS_WINDOW_S: usize = 3;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StatusLabel {
    status: u16,
}

/// A gauge with a fraction.
pub type FloatGauge = Gauge<f64, AtomicU64>;

/// The counters and gauges of one process.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    registry: Arc<Registry>,
    refused: Family<ReasonLabel, Counter>,
    http_refused: Family<StatusLabel, Counter>,
    averages: Arc<Mutex<Averages>>,
    /// Open client connections.
    pub connections: Gauge,
    /// Publishes taken and deliveries made per second.
    pub messages_per_second: FloatGauge,
    /// CPU used, in cores.
    pub cpu_cores: FloatGauge,
    /// Publishes taken from clients.
    pub accepted: Counter,
    /// Messages acknowledged as stored.
    pub acked: Counter,
    /// Messages sent to clients.
    pub delivered: Counter,
    /// Connections ended by the owner: taken over or administratively.
    pub kicked: Counter,
    /// Connections shed while draining.
    pub shed: Counter,
    /// Acknowledgements of packet ids that nobody waited for.
    pub unknown_puback: Counter,
    /// Room messages lost by viewers that did not keep up.
    pub room_dropped: Counter,
    /// Likes and gifts that were not taken: too many different ones at a time, or refused by the owner.
    pub room_counts_refused: Counter,
    /// Messages passed over because the client can't take their size.
    pub too_large_for_client: Counter,
    /// Deliveries that wait because so many bytes wait already for a client that reads slowly.
    pub send_buffer_full: Counter,
    /// Handshakes that were too slow.
    pub slow_handshakes: Counter,
    /// TLS and WebSocket handshakes that failed.
    pub handshakes_failed: Counter,
    /// Open HTTP connections.
    pub http_connections: Gauge,
    /// HTTP connections that were closed because too many are open.
    pub http_connections_refused: Counter,
    /// Times that a client's reading was paused for sending too fast.
    pub throttled: Counter,
    /// Announcements of sessions to an owner.
    pub announced: Counter,
    /// Clients that got their CONNACK.
    pub connected: Counter,
    /// Milliseconds that they waited for it after their CONNECT, all together.
    pub connect_ms: Counter,
    /// Clients that were kept out for want of room: too many at once, too many at all, or no owner to register them.
    pub connects_refused: Counter,
    /// Time from CONNECT to CONNACK, 3 s average.
    pub connect_seconds: FloatGauge,
    /// Clients kept out for want of room per second, 3 s average.
    pub connects_refused_per_second: FloatGauge,
}

#[derive(Debug, Default)]
struct Averages {
    /// Per second: messages so far, CPU ticks so far.
    samples: VecDeque<(u64, Duration)>,
    /// Per second: connects so far, milliseconds so far, refused so far.
    connects: VecDeque<[u64; 3]>,
}

impl Metrics {
    /// A set of its own registry.
    pub fn new() -> Self {
        let mut metrics = Self::default();
        let mut registry = Registry::with_prefix("im");
        registry.register("connections", "Open client connections", metrics.connections.clone());
        registry.register(
            "messages_per_second",
            "Publishes taken and deliveries made per second, 10 s average",
            metrics.messages_per_second.clone(),
        );
        registry.register("cpu_cores", "CPU used in cores, 10 s average", metrics.cpu_cores.clone());
        registry.register(
            "connect_seconds",
            "Time from CONNECT to CONNACK in seconds, 3 s average",
            metrics.connect_seconds.clone(),
        );
        registry.register(
            "connects_refused_per_second",
            "Clients kept out for want of room per second, 3 s average",
            metrics.connects_refused_per_second.clone(),
        );
        registry.register("refused", "Refusals by reason", metrics.refused.clone());
        registry.register("http_refused", "HTTP requests refused, by status", metrics.http_refused.clone());
        registry.register("http_connections", "Open HTTP connections", metrics.http_connections.clone());
        for (name, help, counter) in [
            ("accepted", "Publishes taken from clients", &metrics.accepted),
            ("acked", "Messages acknowledged as stored", &metrics.acked),
            ("delivered", "Messages sent to clients", &metrics.delivered),
            ("kicked", "Connections ended by the owner", &metrics.kicked),
            ("shed", "Connections shed while draining", &metrics.shed),
            ("unknown_puback", "Acknowledgements that nobody waited for", &metrics.unknown_puback),
            ("room_dropped", "Room messages lost by slow viewers", &metrics.room_dropped),
            ("room_counts_refused", "Likes and gifts that were not taken", &metrics.room_counts_refused),
            ("too_large_for_client", "Messages over a client's maximum packet size", &metrics.too_large_for_client),
            ("send_buffer_full", "Deliveries put off because a client reads slowly", &metrics.send_buffer_full),
            ("slow_handshakes", "Handshakes that were too slow", &metrics.slow_handshakes),
            ("handshakes_failed", "TLS and WebSocket handshakes that failed", &metrics.handshakes_failed),
            (
                "http_connections_refused",
                "HTTP connections closed because too many are open",
                &metrics.http_connections_refused,
            ),
            ("throttled", "Pauses of clients that send too fast", &metrics.throttled),
            ("announced", "Announcements of sessions to owners", &metrics.announced),
            ("connected", "Clients that got their CONNACK", &metrics.connected),
            ("connects_refused", "Clients kept out for want of room", &metrics.connects_refused),
        ] {
            registry.register(name, help, counter.clone());
        }
        metrics.registry = Arc::new(registry);
        metrics
    }

    /// Counts a refusal.
    pub fn refused(&self, reason: Reason) {
        self.refused.get_or_create(&ReasonLabel { reason: reason.name() }).inc();
    }

    /// How often something was refused for this reason.
    pub fn refusals(&self, reason: Reason) -> u64 {
        self.refused.get_or_create(&ReasonLabel { reason: reason.name() }).get()
    }

    /// Counts an HTTP request that was refused.
    pub fn http_refused(&self, status: u16) {
        self.http_refused.get_or_create(&StatusLabel { status }).inc();
    }

    /// Notes a client that got its CONNACK so long after its CONNECT.
    pub fn connected_after(&self, waited_ms: u64) {
        self.connected.inc();
        self.connect_ms.inc_by(waited_ms);
    }

    /// Takes a sample for the averages; to be called once a second. `cpu` is the process's CPU time so far.
    pub fn sample(&self, cpu: Duration) {
        let mut averages = self.averages.lock();
        averages.samples.push_back((self.accepted.get() + self.delivered.get(), cpu));
        if averages.samples.len() > WINDOW_S + 1 {
            averages.samples.pop_front();
        }
        if let (Some(first), Some(last)) = (averages.samples.front(), averages.samples.back()) {
            let seconds = (averages.samples.len() - 1).max(1) as f64;
            self.messages_per_second.set((last.0 - first.0) as f64 / seconds);
            self.cpu_cores.set(last.1.saturating_sub(first.1).as_secs_f64() / seconds);
        }
        averages.connects.push_back([self.connected.get(), self.connect_ms.get(), self.connects_refused.get()]);
        if averages.connects.len() > CONNECTS_WINDOW_S + 1 {
            averages.connects.pop_front();
        }
        if let (Some(first), Some(last)) = (averages.connects.front(), averages.connects.back()) {
            let [connected, connect_ms, refused] = [0, 1, 2].map(|i| (last[i] - first[i]) as f64);
            let seconds = (averages.connects.len() - 1).max(1) as f64;
            self.connect_seconds.set(connect_ms / 1_000.0 / connected.max(1.0));
            self.connects_refused_per_second.set(refused / seconds);
        }
    }

    /// The text exposition.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String can't fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

/// Milliseconds since the process's start of time; monotonic.
#[derive(Debug, Clone, Copy)]
pub struct Clock(std::time::Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(std::time::Instant::now())
    }
}

impl Clock {
    /// Now.
    pub fn now_ms(&self) -> u64 {
        self.0.elapsed().as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_are_over_ten_seconds() {
        let metrics = Metrics::new();
        for second in 0..30 {
            metrics.sample(Duration::from_millis(second * 500));
            metrics.accepted.inc_by(100);
        }
        assert!((metrics.messages_per_second.get() - 100.0).abs() < 1e-9);
        assert!((metrics.cpu_cores.get() - 0.5).abs() < 1e-9);
        assert_eq!(metrics.connect_seconds.get(), 0.0, "nobody waited");
        for second in 30..60 {
            metrics.sample(Duration::from_millis(second * 500));
            metrics.connected_after(100);
            metrics.connected_after(300);
            metrics.connects_refused.inc_by(5);
        }
        assert!((metrics.connect_seconds.get() - 0.2).abs() < 1e-9);
        assert!((metrics.connects_refused_per_second.get() - 5.0).abs() < 1e-9);
        for second in 60..65 {
            metrics.sample(Duration::from_millis(second * 500));
        }
        assert_eq!((metrics.connect_seconds.get(), metrics.connects_refused_per_second.get()), (0.0, 0.0));
        metrics.refused(Reason::QuotaExceeded);
        let text = metrics.render();
        assert!(text.contains("im_refused_total{reason=\"quota exceeded\"} 1"), "{text}");
        assert!(text.contains("im_accepted_total 3000"), "{text}");
    }
}
