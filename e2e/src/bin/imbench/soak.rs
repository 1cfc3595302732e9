//! Memory over time: people chat, a room goes on, viewers come and go, and no process may grow.
//!
//! Judged by a straight line through the second half of the samples: a process that grows along it by more than [`GROWTH_MAX`] of its size
//! (and [`GROWTH_KIB_MAX`]) in that time is not flat.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::system::{Bench, Cluster, resident_kib};
use crate::{Outcome, Table, Wanted};

/// Of a process' memory, in the second half.
const GROWTH_MAX: f64 = 0.03;
/// What allocators and caches may move without meaning anything, KiB.
const GROWTH_KIB_MAX: f64 = 1_024.0;
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Seconds for the load's beginning and end.
const AROUND: u64 = 20;

/// Chat before the samples: the store keeps pages in a cache of 64 MiB, whose filling would pass for growth.
const FILLING: &str = "--clients 100 --rate 3000 --peers 8 --duration 80";

/// So many seconds.
///
/// # Errors
/// What could not be started, a message lost, or a process that grows.
pub async fn soak(bench: &Bench, table: &mut Table, seconds: u64) -> Outcome {
    let cluster = Cluster::start(bench, "soak", 1).await?;
    let (mqtt, http) = (cluster.mqtt, cluster.http());
    let words = |text: String| text.split(' ').map(str::to_owned).collect::<Vec<String>>();
    let room = words(format!(
        "room --mqtt {mqtt} --http {http} --viewers 300 --enter-rate 100 --chat-rate 20 --likes 500 --slow 5 --leave-rate 5 --storm 200 --duration {seconds}"
    ));
    let chat = words(format!("steady --mqtt {mqtt} --clients 100 --rate 200 --peers 8 --duration {seconds}"));
    bench.imload_result(&words(format!("steady --mqtt {mqtt} {FILLING}"))).await?;
    let mut sizes: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    let begun = Instant::now();
    let load = async { tokio::try_join!(bench.imload_result(&room), bench.imload_result(&chat)) };
    tokio::pin!(load);
    let mut tick = interval(SAMPLE_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let (room, chat) = loop {
        tokio::select! {
            done = &mut load => break done?,
            _ = tick.tick() => {
                let second = begun.elapsed().as_secs_f64();
                if second > (seconds + 4 * AROUND) as f64 {
                    return Err("imload does not end".into());
                }
                // While all of the load is on.
                if second < seconds as f64 {
                    for (role, pid) in cluster.processes()? {
                        sizes.entry(role).or_default().push((second, resident_kib(pid)));
                    }
                }
            }
        }
    };
    cluster.stop().await?;
    let number = |value: &Value, path: &str| value.pointer(path).and_then(Value::as_f64).unwrap_or(f64::NAN);
    let lost = number(&room, "/lost") + number(&room, "/reordered") + number(&room, "/broken");
    table.add("soak: room messages missed", "", lost, "received", number(&room, "/received"), Wanted::AtMost(0.0));
    let refused = number(&chat, "/refused") + number(&chat, "/notTaken");
    table.add("soak: chat refused", "", refused, "acknowledged", number(&chat, "/acked"), Wanted::AtMost(0.0));
    let mut growing = Vec::new();
    for (role, samples) in sizes {
        let second_half = &samples[samples.len() / 2..];
        let Some(line) = Line::through(second_half) else {
            return Err(format!("too few samples of {role}: a soak takes at least 10 s").into());
        };
        let size = samples.last().map_or(0.0, |(_, kib)| *kib);
        let allowed = (size * GROWTH_MAX).max(GROWTH_KIB_MAX);
        let grown = line.slope * (second_half[second_half.len() - 1].0 - second_half[0].0);
        let name = format!("soak: {role} ({size:.0} KiB) grew in the second half");
        table.add(name, "KiB", grown, "allowed", allowed, Wanted::AtMost(1.0));
        if grown > allowed {
            growing.push(role);
        }
    }
    if growing.is_empty() { Ok(()) } else { Err(format!("memory is not flat: {}", growing.join(", ")).into()) }
}

/// A straight line by least squares.
#[derive(Debug, PartialEq)]
struct Line {
    /// Of y per x.
    slope: f64,
}

impl Line {
    /// `None` if the points do not determine it.
    fn through(points: &[(f64, f64)]) -> Option<Self> {
        let count = points.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
        let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
        let spread: f64 = points.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
        let common: f64 = points.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
        (points.len() >= 3 && spread > 0.0).then(|| Self { slope: common / spread })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fit_sees_growth_through_noise() {
        let samples = |slope: f64| -> Vec<(f64, f64)> {
            (0..300).map(|x| (f64::from(x), 50_000.0 + slope * f64::from(x) + f64::from(x * 7_919 % 200))).collect()
        };
        let slope = |points: &[(f64, f64)]| Line::through(points).map_or(f64::NAN, |line| line.slope);
        assert!(slope(&samples(0.0)).abs() < 0.2);
        assert!((slope(&samples(12.0)) - 12.0).abs() < 0.2);
        assert_eq!(Line::through(&[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]), None);
        assert_eq!(Line::through(&[(1.0, 1.0), (2.0, 2.0)]), None);
    }
}
