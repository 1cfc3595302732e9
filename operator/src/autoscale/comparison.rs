//! Our decisions beside the HorizontalPodAutoscaler's, on the same load in virtual time. Prints a table:
//! `cargo test --workspace --lib autoscale::comparison -- --nocapture`.
//!
//! The HPA is modelled after `pkg/controller/podautoscaler` of Kubernetes 1.34: `horizontal.go` (a sync each 15 s, the
//! number computed from `spec.replicas`, defaults of `behavior`, no change when the metric can't be had) and
//! `replica_calculator.go` (tolerance, pods that are not ready or have no metric; for CPU `groupPods` with its
//! `cpuInitializationPeriod`). Its CPU comes through metrics-server: scraped each 15 s, the mean of the 15 s between two
//! scrapes, of samples that the kubelet took up to 10 s (here: 5 s) earlier. Both have pods that serve 10 s after their
//! creation, load that spreads evenly at once, and a CPU that can't be used to more than 100 %.

use super::*;
use im_crds::{Behavior, BuiltIn, BuiltInMetric, Target, TargetType};
use std::collections::BTreeSet;

/// Messages a second, or connections, that one pod can bear.
const CAPACITY: f64 = 1_000.0;
/// What a pod should have of it, percent.
const TARGET: u32 = 70;
const MIN: u32 = 2;
const MAX: u32 = 30;
/// From creation to serving, seconds.
const START: u64 = 10;
/// Between two scrapes by Prometheus or metrics-server, seconds.
const SCRAPE: u64 = 15;
/// Members' gauges are averages over that, seconds.
const AVERAGE: u64 = 10;
/// Between two looks by the HPA, seconds.
const SYNC: u64 = 15;

/// Who decides, and by what.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scaler {
    Ours(BuiltIn),
    HpaCpu,
    /// Our gauge through an adapter for Prometheus.
    HpaGauge,
}

struct Scenario {
    name: &'static str,
    seconds: u64,
    /// When the load rises so much that more pods are needed.
    rises_at: u64,
    load: fn(u64) -> f64,
    /// When the source of metrics is away: Prometheus, or the metrics API.
    outage: std::ops::Range<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Pod {
    id: u64,
    created: u64,
}

impl Pod {
    fn serves(self, t: u64) -> bool {
        t >= self.created + START
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Score {
    /// Seconds from the rise to the first change.
    first_change: Option<u64>,
    /// Seconds from the rise to enough pods that serve.
    enough: Option<u64>,
    pod_seconds: u64,
    overload_seconds: u64,
}

/// Load of each serving pod at each past second, and who served.
#[derive(Default)]
struct Past {
    shares: Vec<(f64, BTreeSet<u64>)>,
}

impl Past {
    /// A pod's mean of `value(share)` over `[from, to)`, if it served through all of it.
    fn mean(&self, pod: u64, from: u64, to: u64, value: impl Fn(f64) -> f64) -> Option<f64> {
        let window = self.shares.get(from as usize..to as usize).filter(|window| !window.is_empty())?;
        let served = window.iter().filter(|(_, served)| served.contains(&pod));
        let (count, sum) = served.fold((0, 0.0), |(count, sum), (share, _)| (count + 1, sum + value(*share)));
        (count == window.len()).then(|| sum / count as f64)
    }
}

fn cpu_percent(share: f64) -> f64 {
    (share / CAPACITY).min(1.0) * 100.0
}

fn play(scenario: &Scenario, scaler: Scaler) -> Score {
    let mut pods: Vec<Pod> = Vec::new();
    let (mut next, mut past, mut score) = (0, Past::default(), Score::default());
    let first = ((scenario.load)(0) / (CAPACITY * f64::from(TARGET) / 100.0)).ceil().max(f64::from(MIN)) as u32;
    // Warm: what serves at the beginning has served for long.
    let warm = 600;
    let (mut history, mut hpa) = (History::default(), Hpa::new(first));
    for t in 0..warm + scenario.seconds {
        let since = t.saturating_sub(warm);
        if t == 0 {
            pods.extend((0..first).map(|id| Pod { id: u64::from(id), created: 0 }));
            next = u64::from(first);
        }
        let load = (scenario.load)(since);
        let serving: BTreeSet<u64> = pods.iter().filter(|pod| pod.serves(t)).map(|pod| pod.id).collect();
        past.shares.push((load / (serving.len().max(1)) as f64, serving.clone()));
        let away = t >= warm && scenario.outage.contains(&since);
        let wanted = match scaler {
            Scaler::Ours(metric) => ours(t, away, metric, &pods, &past, &mut history),
            Scaler::HpaCpu | Scaler::HpaGauge => hpa.sync(t, away, scaler, &pods, &past),
        };
        if t >= warm {
            score.pod_seconds += pods.len() as u64;
            score.overload_seconds += u64::from(load > serving.len() as f64 * CAPACITY);
            if since >= scenario.rises_at {
                let after = since - scenario.rises_at;
                if wanted as usize > pods.len() {
                    score.first_change.get_or_insert(after);
                }
                if load <= serving.len() as f64 * CAPACITY && score.first_change.is_some() {
                    score.enough.get_or_insert(after);
                }
            }
        }
        while pods.len() < wanted as usize {
            pods.push(Pod { id: next, created: t });
            next += 1;
        }
        pods.truncate(wanted as usize);
    }
    score
}

/// A decision each second on gauges that Prometheus scraped last, or on the members' own while it is away.
fn ours(t: u64, away: bool, metric: BuiltIn, pods: &[Pod], past: &Past, history: &mut History) -> u32 {
    let now = Duration::from_secs(t);
    let scraped = if away { t } else { t - t % SCRAPE };
    let value = |share: f64| if metric == BuiltIn::CpuUtilization { cpu_percent(share) } else { share };
    let sample = |pod: &Pod| {
        // A young pod's average is of what there is.
        let from = scraped.saturating_sub(AVERAGE).max(pod.created + START);
        let value = past.mean(pod.id, from, scraped, value)?;
        Some((pod.id.to_string(), Sample { value, at: Duration::from_secs(scraped) }))
    };
    let readings = [Reading {
        values: Values::PerMember(pods.iter().filter_map(sample).collect()),
        origin: String::new(),
        source_started_at: None,
    }];
    let state = |pod: &Pod| if pod.serves(t) { MemberState::Ready } else { MemberState::Starting };
    let members: Vec<Member> = pods.iter().map(|pod| Member { name: pod.id.to_string(), state: state(pod) }).collect();
    let target = match metric {
        BuiltIn::CpuUtilization => Target { kind: TargetType::Utilization, value: TARGET },
        _ => Target { kind: TargetType::AverageValue, value: (CAPACITY * f64::from(TARGET) / 100.0) as u32 },
    };
    let spec = Autoscaling {
        min_replicas: MIN,
        max_replicas: MAX,
        metrics: vec![BuiltInMetric { name: metric, target }.into()],
        behavior: Behavior::default(),
        tolerance: 0.1,
    };
    let input = Input { now, spec: &spec, members: &members, ordered: 0, readings: &readings };
    let (decision, next) = decide(&input, std::mem::take(history));
    *history = next;
    decision.replicas
}

/// Upstream's controller for one tier, with the defaults of `behavior`.
struct Hpa {
    replicas: u32,
    /// Time and number of each recommendation, for the stabilization of 300 s.
    recommendations: Vec<(u64, u32)>,
    /// Time and size of each growth, for the policies of 15 s.
    growths: Vec<(u64, u32)>,
}

/// A pod's metric as the HPA gets it.
struct PodMetric {
    value: f64,
    at: u64,
    window: u64,
}

impl Hpa {
    fn new(replicas: u32) -> Self {
        Self { replicas, recommendations: Vec::new(), growths: Vec::new() }
    }

    fn sync(&mut self, t: u64, away: bool, scaler: Scaler, pods: &[Pod], past: &Past) -> u32 {
        // Off the beat of the scrapes, as two controllers are; a metric that can't be had is an error and no change.
        if t % SYNC != 7 || away {
            return self.replicas;
        }
        let metric = |pod: &Pod| {
            let scraped = t - t % SCRAPE;
            let (from, to, at, window) = match scaler {
                Scaler::HpaCpu => {
                    let at = scraped.saturating_sub(5);
                    (at.saturating_sub(SCRAPE), at, at, SCRAPE)
                }
                _ => (scraped.saturating_sub(AVERAGE).max(pod.created + START), scraped, scraped, 0),
            };
            let value = |share| if scaler == Scaler::HpaCpu { cpu_percent(share) } else { share };
            Some(PodMetric { value: past.mean(pod.id, from, to, value)?, at, window })
        };
        let target = match scaler {
            Scaler::HpaCpu => f64::from(TARGET),
            _ => CAPACITY * f64::from(TARGET) / 100.0,
        };
        let metrics: Vec<(Pod, Option<PodMetric>)> = pods.iter().map(|pod| (*pod, metric(pod))).collect();
        let proposed = self.propose(t, &metrics, target, scaler == Scaler::HpaCpu);
        self.replicas = self.behave(t, proposed.clamp(MIN, MAX));
        self.replicas
    }

    /// `calcPlainMetricReplicas` and `GetResourceReplicas`, which differ in what a missing metric is taken for.
    fn propose(&self, t: u64, pods: &[(Pod, Option<PodMetric>)], target: f64, is_cpu: bool) -> u32 {
        let (mut ready, mut unready, mut missing) = (Vec::new(), 0_u32, 0_u32);
        for (pod, metric) in pods {
            let ready_at = pod.created + START;
            let Some(metric) = metric else {
                // A pod that is pending is set aside; one that serves is missing.
                if pod.serves(t) {
                    missing += 1
                } else {
                    unready += 1
                }
                continue;
            };
            let initializing = is_cpu && t < pod.created + 300;
            let is_unready = !pod.serves(t) || (initializing && metric.at < ready_at + metric.window);
            if is_unready { unready += 1 } else { ready.push(metric.value) }
        }
        if ready.is_empty() {
            return self.replicas;
        }
        let mean = |sum: f64, count: u32| sum / f64::from(count);
        let (sum, count) = (ready.iter().sum::<f64>(), ready.len() as u32);
        let ratio = mean(sum, count) / target;
        let growing_with_unready = unready > 0 && ratio > 1.0;
        if !growing_with_unready && missing == 0 {
            if (ratio - 1.0).abs() <= 0.1 {
                return self.replicas;
            }
            return (ratio * f64::from(count)).ceil() as u32;
        }
        let (mut sum, mut count) = (sum, count);
        if missing > 0 {
            let assumed = if ratio < 1.0 { if is_cpu { target.max(100.0) } else { target } } else { 0.0 };
            sum += assumed * f64::from(missing);
            count += missing;
        }
        if growing_with_unready {
            count += unready;
        }
        let assumed_ratio = mean(sum, count) / target;
        let turned = (ratio < 1.0 && assumed_ratio > 1.0) || (ratio > 1.0 && assumed_ratio < 1.0);
        if (assumed_ratio - 1.0).abs() <= 0.1 || turned {
            return self.replicas;
        }
        let replicas = (assumed_ratio * f64::from(count)).ceil() as u32;
        let wrong_way =
            (assumed_ratio < 1.0 && replicas > self.replicas) || (assumed_ratio > 1.0 && replicas < self.replicas);
        if wrong_way { self.replicas } else { replicas }
    }

    /// The default `behavior`: up by the larger of 4 pods and 100 % in 15 s; down to the highest recommendation of 300 s.
    fn behave(&mut self, t: u64, proposed: u32) -> u32 {
        self.recommendations.retain(|(at, _)| t - at < 300);
        self.recommendations.push((t, proposed));
        self.growths.retain(|(at, _)| t - at < 15);
        if proposed > self.replicas {
            let grown: u32 = self.growths.iter().map(|(_, by)| by).sum();
            let start = self.replicas - grown;
            let allowed = (start + 4).max(start * 2).max(self.replicas);
            let replicas = proposed.min(allowed);
            self.growths.push((t, replicas - self.replicas));
            return replicas;
        }
        let highest = self.recommendations.iter().map(|(_, replicas)| *replicas).max().unwrap_or(proposed);
        highest.min(self.replicas)
    }
}

fn step(t: u64) -> f64 {
    if (120..1_500).contains(&t) { 8_000.0 } else { 1_000.0 }
}

fn tide(t: u64) -> f64 {
    5_000.0 - 4_000.0 * (t as f64 / 3_600.0 * std::f64::consts::TAU).cos()
}

fn spike(t: u64) -> f64 {
    if (300..420).contains(&t) { 10_000.0 } else { 1_000.0 }
}

#[test]
fn beside_the_hpa() {
    let scenarios = [
        Scenario { name: "step, x8 and back", seconds: 2_400, rises_at: 120, load: step, outage: 0..0 },
        Scenario { name: "tide of an hour", seconds: 3_600, rises_at: 0, load: tide, outage: 0..0 },
        Scenario { name: "spike, x10 for 2 min", seconds: 1_200, rises_at: 300, load: spike, outage: 0..0 },
        Scenario { name: "step, metrics away", seconds: 2_400, rises_at: 120, load: step, outage: 60..660 },
    ];
    let scalers = [
        ("ours, Connections", Scaler::Ours(BuiltIn::Connections)),
        ("ours, CpuUtilization", Scaler::Ours(BuiltIn::CpuUtilization)),
        ("HPA, CPU", Scaler::HpaCpu),
        ("HPA, our gauge by an adapter", Scaler::HpaGauge),
    ];
    println!(
        "{:<22} {:<30} {:>12} {:>10} {:>12} {:>14}",
        "load", "scaler", "first change", "enough", "pod-seconds", "overload"
    );
    let seconds = |value: Option<u64>| value.map_or("never".to_owned(), |value| format!("{value} s"));
    for scenario in &scenarios {
        let scores = scalers.map(|(name, scaler)| {
            let score = play(scenario, scaler);
            let (change, enough) = (seconds(score.first_change), seconds(score.enough));
            let (pods, overload) = (score.pod_seconds, score.overload_seconds);
            println!("{:<22} {name:<30} {change:>12} {enough:>10} {pods:>12} {overload:>12} s", scenario.name);
            score
        });
        let [connections, cpu, hpa_cpu, hpa_gauge] = scores;
        assert!(connections.overload_seconds <= hpa_gauge.overload_seconds, "the same gauge: {scores:#?}");
        assert!(cpu.overload_seconds <= hpa_cpu.overload_seconds, "the same saturating CPU: {scores:#?}");
        // Being earlier has a price: averages of the old members remember what the new ones already took over.
        let bearable = hpa_gauge.pod_seconds as f64 * 1.3;
        assert!(connections.pod_seconds as f64 <= bearable || !scenario.outage.is_empty(), "{scores:#?}");
        if scenario.name.starts_with("step") {
            let within = if scenario.outage.is_empty() { AVERAGE + SCRAPE + 1 } else { AVERAGE + 1 };
            assert!(connections.first_change.is_some_and(|after| after <= within), "{within} s: {connections:?}");
        }
    }
}
