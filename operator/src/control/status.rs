//! The status document: what is, and why. Served as JSON by the console, read by `imcluster status`.

use crate::autoscale::Limit;
use crate::metrics::PrometheusError;
use crate::platform::ProcessState;
use crate::shards::Snapshot;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Events that are kept.
pub const EVENTS_MAX: usize = 50;
/// Moves that are listed.
pub const MOVES_LISTED_MAX: usize = 64;
/// Members that a sentence names.
const MEMBERS_NAMED_MAX: usize = 3;
/// From this watermark lag on nobody can say that nothing is lost.
const LAG_UNKNOWN_S: f64 = 30.0;

/// The whole document.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Name of the ImCluster.
    pub cluster: String,
    /// `Auto` or `Recommend`.
    pub mode: String,
    /// No change is made.
    pub paused: bool,
    /// When this was written, RFC 3339.
    pub at: String,
    /// The tiers.
    pub tiers: Tiers,
    /// The shards.
    pub shards: Shards,
    /// Why Prometheus says nothing, or not all that it is asked, if that lasts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prometheus: Option<Outage>,
    /// Control is too new to say what lasts.
    #[serde(default)]
    pub young: bool,
    /// Age of the oldest message whose recipients were not all notified, seconds; `None` = nobody says.
    pub watermark_lag_seconds: Option<f64>,
    /// Whether every acknowledged message is still there.
    pub no_message_lost: Verdict,
    /// What happened last, oldest first.
    pub events: VecDeque<Event>,
    /// Whether what the user wrote last is what runs.
    pub file: FileStatus,
}

/// Something that does not do what it is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outage {
    /// One CamelCase word for machines.
    pub reason: String,
    /// A sentence.
    pub message: String,
}

impl Outage {
    pub(super) fn of(error: &PrometheusError) -> Self {
        // A query that is refused, or whose result is of no use, came to its end.
        let answers = matches!(error, PrometheusError::Query(_) | PrometheusError::Result(_));
        let reason = if answers { "QueryFails" } else { "PrometheusUnreachable" };
        Self { reason: reason.to_owned(), message: error.to_string() }
    }
}

/// Both tiers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tiers {
    /// The gateways.
    pub gateway: TierStatus,
    /// The business members.
    pub business: TierStatus,
}

/// One tier.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TierStatus {
    /// Members that run and are not leaving.
    pub replicas: u32,
    /// Members that serve.
    pub ready: u32,
    /// Members that there should be.
    pub desired: u32,
    /// Never fewer.
    pub min: u32,
    /// Never more.
    pub max: u32,
    /// Why that many are desired.
    pub because: Vec<String>,
    /// What keeps it from what the metrics ask for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limited: Option<Limit>,
    /// For a while now some metric can't be trusted: nothing is scaled in.
    #[serde(default)]
    pub in_doubt: bool,
    /// Each member.
    pub members: Vec<MemberStatus>,
}

/// One member. What makes no sense for its tier is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberStatus {
    /// Its name.
    pub name: String,
    /// Its process id.
    pub pid: Option<u32>,
    /// How often its process was started.
    pub starts: u32,
    /// starting, ready, silent, draining, emptying, waiting, stopping.
    pub state: String,
    /// Open client connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    /// It sheds its connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draining: Option<bool>,
    /// How far it is with giving away what it holds, if it is to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
    /// Shards that it owns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<u32>,
    /// Lowest and highest epoch of these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<(u64, u64)>,
    /// Messages per second of these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<f64>,
    /// Messages per second that it carries.
    pub messages_per_second: f64,
    /// CPU used, in cores.
    pub cpu_cores: f64,
}

/// How far a member is with giving away what it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DrainStatus {
    /// What it held when it began: connections, or shards.
    pub held_at_start: u64,
    /// What it still holds.
    pub held: u64,
    /// About how long the rest takes at the pace so far, seconds; `None` while nothing has gone.
    pub seconds_left: Option<u64>,
}

impl DrainStatus {
    pub(super) fn new(held_at_start: u64, held: u64, since: Duration) -> Self {
        let gone = held_at_start.saturating_sub(held);
        let left = |gone: u64| (since.as_secs_f64() * held as f64 / gone as f64).ceil() as u64;
        Self { held_at_start, held, seconds_left: if held == 0 { Some(0) } else { (gone > 0).then(|| left(gone)) } }
    }
}

/// The shards.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shards {
    /// How many there are.
    pub total: u32,
    /// How many have an owner that lives.
    pub owned: u32,
    /// How many are under way.
    pub moving: u32,
    /// How many moves are planned and not begun.
    pub queued: u32,
    /// Term of the map.
    pub term: u64,
    /// Number of the map in its term.
    pub number: u64,
    /// How many each member owns, by its name.
    pub per_member: BTreeMap<String, u32>,
    /// Some of those under way.
    pub moves: Vec<MoveStatus>,
    /// Over half of the members fell silent at once: nothing is taken from them for a while.
    pub degraded: bool,
    /// Control is new and only listens.
    pub hearing: bool,
    /// What is proposed while the mode is `Recommend`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proposal: Option<Proposal>,
    /// Why the last approval led to nothing, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_approval: Option<String>,
    /// Why planned moves wait, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits: Option<String>,
    /// Members that the store does not answer, if that lasts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_away: Option<StoreAway>,
}

/// A store that does not answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoreAway {
    /// Whom it does not answer.
    pub members: Vec<String>,
    /// It answers nobody else either.
    pub all: bool,
}

impl StoreAway {
    /// Of so many business members that were heard a moment ago, with whether the store answers each.
    pub(super) fn of(members: &[(&str, bool)]) -> Option<Self> {
        let away: Vec<String> =
            members.iter().filter(|(_, answered)| !answered).map(|(name, _)| (*name).to_owned()).collect();
        (!away.is_empty()).then_some(Self { all: away.len() == members.len(), members: away })
    }
}

/// A sentence.
impl fmt::Display for StoreAway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = self.members.iter().take(MEMBERS_NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
        write!(f, "the store does not answer {named}")?;
        match self.members.len().saturating_sub(MEMBERS_NAMED_MAX) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// One shard under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MoveStatus {
    /// Which.
    pub shard: u32,
    /// Its owner, as last heard.
    pub from: Option<String>,
    /// Its owner to be.
    pub to: Option<String>,
    /// releasing, takingBack, acquiring.
    pub phase: String,
}

/// Something that nobody has approved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Proposal {
    /// The value of the annotation `imcluster.dev/approve` that approves it.
    pub hash: String,
    /// How many shards would move.
    pub moves: usize,
    /// One sentence for each thing that would be done.
    pub what: Vec<String>,
}

/// What can be said, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// A sentence.
    pub reason: String,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// When, RFC 3339.
    pub at: String,
    /// What.
    pub text: String,
}

/// How the user's file is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileStatus {
    /// It is what runs.
    pub ok: bool,
    /// Why not: one line per rule, each with the field's path and the reason.
    pub error: Option<String>,
}

/// Whether every acknowledged message is still there. The store's word: holes that an acquire or the scrubber found.
pub(super) fn no_message_lost(holes: u64, snapshot: &Snapshot, lag_s: Option<f64>) -> Verdict {
    let (status, reason) = if holes > 0 {
        ("False", format!("{holes} holes in seq or pos were found; the logs of the business members name them"))
    } else if snapshot.hearing {
        ("Unknown", "control is new and still listens to the members".to_owned())
    } else if snapshot.unowned > 0 {
        ("Unknown", format!("{} of {} shards have no owner that lives", snapshot.unowned, snapshot.shards))
    } else if lag_s.is_some_and(|lag| lag > LAG_UNKNOWN_S) {
        ("Unknown", format!("some recipients have not been notified for {:.0} s", lag_s.unwrap_or_default()))
    } else {
        ("True", "no hole in any log, every shard has an owner, everybody is notified in time".to_owned())
    };
    Verdict { status: status.to_owned(), reason }
}

/// One word for a member.
pub(super) fn member_state(process: ProcessState, leaving: Option<&str>, joined: bool, heard: bool) -> String {
    let word = match (process, leaving) {
        (ProcessState::Waiting, _) => "waiting",
        (ProcessState::Stopping, _) => "stopping",
        (ProcessState::Running, Some(word)) => word,
        (ProcessState::Running, None) if heard => "ready",
        (ProcessState::Running, None) if joined => "silent",
        (ProcessState::Running, None) => "starting",
    };
    word.to_owned()
}

/// A moment in RFC 3339, UTC, whole milliseconds.
pub fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, of_day) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Civil from days, by Howard Hinnant ("chrono-Compatible Low-Level Date Algorithms"): years begin in March.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drain_tells_how_long_it_takes_at_its_pace() {
        let after = Duration::from_secs(30);
        for (first, held, left) in
            [(100, 100, None), (100, 25, Some(10)), (100, 0, Some(0)), (0, 0, Some(0)), (5, 9, None)]
        {
            assert_eq!(DrainStatus::new(first, held, after).seconds_left, left, "{held} of {first}");
        }
    }

    #[test]
    fn a_store_that_is_away_names_whom_it_does_not_answer() {
        assert_eq!(StoreAway::of(&[]), None);
        assert_eq!(StoreAway::of(&[("b-0", true), ("b-1", true)]), None);
        for (members, all, words) in [
            (&[("b-0", true), ("b-1", false)][..], false, "b-1"),
            (&[("b-0", false), ("b-1", false)], true, "b-0, b-1"),
            (&[("0", false), ("1", false), ("2", false), ("3", false), ("4", false)], true, "0, 1, 2 and 2 more"),
        ] {
            let away = StoreAway::of(members).expect("somebody is not answered");
            assert_eq!((away.all, away.to_string()), (all, format!("the store does not answer {words}")));
        }
    }

    #[test]
    fn a_query_that_fails_is_no_prometheus_that_is_away() {
        for (error, reason) in [
            (PrometheusError::Timeout, "PrometheusUnreachable"),
            (PrometheusError::Status(502), "PrometheusUnreachable"),
            (PrometheusError::Query("unclosed".into()), "QueryFails"),
            (PrometheusError::Result("a matrix".into()), "QueryFails"),
        ] {
            let outage = Outage::of(&error);
            assert_eq!((outage.reason.as_str(), outage.message), (reason, error.to_string()));
        }
    }

    #[test]
    fn moments_are_written_as_in_rfc_3339() {
        for (millis, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_735_689_599_000, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400_001, "2100-03-01T00:00:00.001Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_millis(millis)), text);
        }
    }
}
