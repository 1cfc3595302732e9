//! The live view of an evening: what is measured here, and what the operator says it does about it. Pure: snapshots in,
//! text out.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use hdrhistogram::Histogram;
use serde::Deserialize;

/// Width of the evening's curve in characters.
const CURVE_COLUMNS: usize = 60;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// One tier in the operator's status.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct Tier {
    /// Members that run.
    pub replicas: u32,
    /// Members that should run.
    pub desired: Option<u32>,
    /// Why this many.
    pub because: Vec<String>,
}

/// The shards in the operator's status.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default, rename_all = "camelCase")]
pub struct Shards {
    /// Being moved right now.
    pub moving: u32,
    /// All of them.
    pub total: u32,
    /// How many each business member holds.
    pub per_member: BTreeMap<String, u32>,
}

/// The operator's status document. Unknown fields are skipped, missing ones are left empty: it is only shown.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default, rename_all = "camelCase")]
pub struct Status {
    /// `gateway` and `business`.
    pub tiers: BTreeMap<String, Tier>,
    /// Shards and who has them.
    pub shards: Option<Shards>,
    /// Age of the oldest message whose recipients are not yet notified.
    pub watermark_lag_seconds: Option<f64>,
    /// The store's own judgement: true, false, or unknown.
    pub no_message_lost: Option<serde_json::Value>,
}

/// A member as `members.json` lists it; shown when there is no status document.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// `control`, `store`, `gateway` or `business`.
    pub role: String,
    /// Its process.
    pub pid: u32,
    /// Where it listens, by name of the port; the shape is the supervisor's affair.
    #[serde(default)]
    pub addresses: serde_json::Value,
}

impl Status {
    /// What `members.json` alone tells: how many there are.
    pub fn from_members(members: &[Member]) -> Self {
        let mut status = Self::default();
        for member in members.iter().filter(|member| matches!(member.role.as_str(), "gateway" | "business")) {
            status.tiers.entry(member.role.clone()).or_default().replicas += 1;
        }
        status
    }
}

/// What there is to see at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Name of the phase.
    pub phase: String,
    /// Time since the evening began, and how long it takes.
    pub elapsed: Duration,
    /// See `elapsed`.
    pub duration: Duration,
    /// The curve of the load, a share of the peak for each column.
    pub curve: fn(f64) -> f64,
    /// Peak of the schedule in messages a second.
    pub peak_per_second: f64,
    /// Messages a second that were acknowledged.
    pub acked_per_second: f64,
    /// Deliveries a second.
    pub delivered_per_second: f64,
    /// Sent and not yet answered.
    pub in_flight: u64,
    /// Messages that a full client could not take: the schedule runs ahead of the system.
    pub shed: u64,
    /// People online, and all.
    pub online: usize,
    /// See `online`.
    pub people: usize,
    /// Sent and acknowledged since the beginning.
    pub sent: u64,
    /// Refused since the beginning.
    pub refused: u64,
    /// p50 and p99 of the ack latency in milliseconds, if any.
    pub ack_millis: Option<(f64, f64)>,
    /// p50 and p99 of the delivery latency in milliseconds, if any.
    pub delivery_millis: Option<(f64, f64)>,
    /// Lost, duplicated, reordered, anything else so far.
    pub violations: [u64; 4],
    /// What the operator says.
    pub status: Option<Status>,
    /// Latest remarks.
    pub notes: Vec<(Duration, String)>,
}

/// p50 and p99 in milliseconds of a histogram in microseconds.
pub fn quantiles(latency: &Histogram<u64>) -> Option<(f64, f64)> {
    let millis = |quantile| latency.value_at_quantile(quantile) as f64 / 1000.0;
    (!latency.is_empty()).then(|| (millis(0.5), millis(0.99)))
}

fn latency_text(quantiles: Option<(f64, f64)>) -> String {
    quantiles.map_or_else(|| "–".to_owned(), |(median, high)| format!("p50 {median:.1} ms  p99 {high:.1} ms"))
}

/// The whole screen, from its upper left corner, for a terminal of this width.
pub fn screen(snapshot: &Snapshot, columns: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    let share = (snapshot.elapsed.as_secs_f64() / snapshot.duration.as_secs_f64().max(0.001)).min(1.0);
    let (elapsed, duration) = (snapshot.elapsed.as_secs(), snapshot.duration.as_secs());
    lines.push(format!("imload · an evening · {} · {elapsed} s of {duration} s", snapshot.phase));
    let mut curve = String::new();
    for column in 0..CURVE_COLUMNS {
        let at = (column as f64 + 0.5) / CURVE_COLUMNS as f64;
        let bar = BARS[(((snapshot.curve)(at) * 7.99) as usize).min(7)];
        let style = if at <= share { "\x1b[32m" } else { "\x1b[2m" };
        let _ = write!(curve, "{style}{bar}\x1b[0m");
    }
    lines.push(curve);
    lines.push(format!(
        "wanted {:6.0} msg/s   acknowledged {:6.0} msg/s   delivered {:6.0} msg/s   in flight {}",
        (snapshot.curve)(share) * snapshot.peak_per_second,
        snapshot.acked_per_second,
        snapshot.delivered_per_second,
        snapshot.in_flight
    ));
    lines.push(format!(
        "people online {} of {}   sent {}   refused {}   not taken {}",
        snapshot.online, snapshot.people, snapshot.sent, snapshot.refused, snapshot.shed
    ));
    lines.push(format!("ack       {}", latency_text(snapshot.ack_millis)));
    lines.push(format!("delivery  {}", latency_text(snapshot.delivery_millis)));
    let [lost, duplicated, reordered, other] = snapshot.violations;
    let colour = if snapshot.violations == [0; 4] { "\x1b[1;32m" } else { "\x1b[1;31m" };
    lines.push(format!(
        "{colour}lost {lost}   duplicated {duplicated}   reordered {reordered}   other violations {other}\x1b[0m"
    ));
    lines.push(String::new());
    match &snapshot.status {
        Some(status) => status_lines(status, &mut lines),
        None => lines.push("(no status from the operator yet)".to_owned()),
    }
    lines.push(String::new());
    for (at, note) in &snapshot.notes {
        lines.push(format!("{:5} s  {note}", at.as_secs()));
    }
    let mut screen = String::from("\x1b[H");
    for line in lines {
        let _ = write!(screen, "{}\x1b[0m\x1b[K\r\n", cut(&line, columns));
    }
    screen.push_str("\x1b[J");
    screen
}

fn status_lines(status: &Status, lines: &mut Vec<String>) {
    for (name, tier) in &status.tiers {
        let wish = match tier.desired {
            Some(desired) if desired != tier.replicas => format!("{} → {desired}", tier.replicas),
            _ => tier.replicas.to_string(),
        };
        let why = if tier.because.is_empty() { String::new() } else { format!("because {}", tier.because.join("; ")) };
        lines.push(format!("{name:9} {} {wish:7} {why}", "■".repeat(tier.replicas.min(20) as usize)));
    }
    if let Some(shards) = &status.shards {
        let members: Vec<String> = shards.per_member.iter().map(|(name, count)| format!("{name} {count}")).collect();
        lines.push(format!("shards    {} moving of {}   {}", shards.moving, shards.total, members.join("  ")));
    }
    let lag = status.watermark_lag_seconds.map(|seconds| format!("watermark lag {seconds:.1} s"));
    let kept = status.no_message_lost.as_ref().map(|value| {
        let value = value.get("status").unwrap_or(value);
        format!("NoMessageLost {}", value.to_string().trim_matches('"'))
    });
    let rest: Vec<String> = lag.into_iter().chain(kept).collect();
    if !rest.is_empty() {
        lines.push(format!("store     {}", rest.join("   ")));
    }
}

/// Cuts a line to the terminal's width; colour codes take no room.
fn cut(line: &str, columns: usize) -> String {
    let (mut text, mut width, mut in_code) = (String::new(), 0, false);
    for character in line.chars() {
        match character {
            '\x1b' => in_code = true,
            'm' if in_code => {
                in_code = false;
                text.push(character);
                continue;
            }
            _ if !in_code => {
                width += 1;
                if width > columns {
                    break;
                }
            }
            _ => {}
        }
        text.push(character);
    }
    text
}

/// One line for a log instead of a screen.
pub fn line(snapshot: &Snapshot) -> String {
    let [lost, duplicated, reordered, other] = snapshot.violations;
    let mut text = format!(
        "{:4} s {:9} online {:4} acked {:6.0}/s delivered {:6.0}/s in flight {:4} ack {} delivery {} lost {lost} duplicated {duplicated} reordered {reordered} other {other}",
        snapshot.elapsed.as_secs(),
        snapshot.phase,
        snapshot.online,
        snapshot.acked_per_second,
        snapshot.delivered_per_second,
        snapshot.in_flight,
        latency_text(snapshot.ack_millis),
        latency_text(snapshot.delivery_millis),
    );
    for (name, tier) in snapshot.status.iter().flat_map(|status| &status.tiers) {
        let _ = write!(text, " {name} {}", tier.replicas);
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        Snapshot {
            phase: "peak".to_owned(),
            elapsed: Duration::from_secs(60),
            duration: Duration::from_secs(120),
            curve: crate::workload::evening,
            peak_per_second: 500.0,
            acked_per_second: 498.0,
            delivered_per_second: 700.0,
            in_flight: 3,
            shed: 0,
            online: 90,
            people: 100,
            sent: 12_345,
            refused: 0,
            ack_millis: Some((1.5, 9.0)),
            delivery_millis: None,
            violations: [0; 4],
            status: None,
            notes: vec![(Duration::from_secs(5), "hello".to_owned())],
        }
    }

    #[test]
    fn a_status_with_unknown_and_missing_fields_is_shown() {
        let text = r#"{"tiers": {"gateway": {"replicas": 2, "desired": 3, "because": ["cpu 80 % of 60 %"], "new": 1}},
            "shards": {"moving": 4, "total": 1024, "perMember": {"business-1": 512}}, "noMessageLost": {"status": "True", "reason": "all well"}, "x": []}"#;
        let status: Status = serde_json::from_str(text).unwrap();
        let screen = screen(&Snapshot { status: Some(status), ..snapshot() }, 200);
        for part in
            ["2 → 3", "because cpu 80 % of 60 %", "4 moving of 1024", "business-1 512", "NoMessageLost True", "hello"]
        {
            assert!(screen.contains(part), "{part} is missing in {screen}");
        }
        assert_eq!(serde_json::from_str::<Status>("{}").unwrap(), Status::default());
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for line in screen(&snapshot(), 40).lines() {
            let mut plain = line.replace(['\r'], "");
            for code in ["\x1b[H", "\x1b[K", "\x1b[J", "\x1b[0m", "\x1b[1;32m", "\x1b[32m", "\x1b[2m"] {
                plain = plain.replace(code, "");
            }
            assert!(plain.chars().count() <= 40, "{plain:?}");
        }
    }

    #[test]
    fn violations_are_in_the_line() {
        let text = line(&Snapshot { violations: [1, 2, 3, 4], ..snapshot() });
        assert!(text.contains("lost 1 duplicated 2 reordered 3 other 4"), "{text}");
    }

    #[test]
    fn members_are_counted_by_tier() {
        let member = |name: &str, role: &str| Member {
            name: name.to_owned(),
            role: role.to_owned(),
            pid: 1,
            addresses: serde_json::Value::Null,
        };
        let members =
            [member("g1", "gateway"), member("b1", "business"), member("b2", "business"), member("s", "store")];
        let status = Status::from_members(&members);
        assert_eq!(
            (status.tiers["gateway"].replicas, status.tiers["business"].replicas, status.tiers.len()),
            (1, 2, 2)
        );
    }
}
