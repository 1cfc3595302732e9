//! `ImCluster` status: what is, and why.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator observed and decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
// Also of an object that nobody has looked at yet.
#[schemars(extend("default" = { "observedGeneration": -1 }))]
pub struct ImClusterStatus {
    /// Generation of the spec that this status is about; -1 until there is one, so that kstatus does not read a fresh
    /// object as healthy.
    pub observed_generation: i64,
    /// The metav1 conditions Ready, Progressing, Degraded, Rebalancing, Draining, ScalingLimited, NoMessageLost.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The gateway tier.
    pub gateway: TierStatus,
    /// The business tier.
    pub business: TierStatus,
    /// The shards.
    pub shards: ShardStatus,
    /// Members that are being emptied.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drains: Vec<DrainStatus>,
    /// What is proposed and waits for approval while the mode is `Recommend`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub proposals: Vec<ProposalStatus>,
    /// Age of the oldest message whose recipients were not all notified, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub watermark_lag_seconds: Option<f64>,
}

impl Default for ImClusterStatus {
    fn default() -> Self {
        Self {
            observed_generation: -1,
            conditions: Vec::new(),
            gateway: TierStatus::default(),
            business: TierStatus::default(),
            shards: ShardStatus::default(),
            drains: Vec::new(),
            proposals: Vec::new(),
            watermark_lag_seconds: None,
        }
    }
}

/// One metav1 condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Its name.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Generation of the spec that it is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// When `status` last changed, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
    /// One CamelCase word for machines.
    pub reason: String,
    /// A sentence for people.
    #[serde(default)]
    pub message: String,
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// Nobody can say.
    Unknown,
}

/// One tier.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct TierStatus {
    /// Members that run.
    pub replicas: u32,
    /// Members that serve.
    pub ready: u32,
    /// Members that there should be.
    pub desired: u32,
    /// Why that many: the reason chain of the last decision.
    pub because: Vec<String>,
    /// The first [`MEMBERS_LISTED_MAX`] members, oldest first.
    pub members: Vec<MemberStatus>,
}

/// Members of a tier that its status lists.
pub const MEMBERS_LISTED_MAX: usize = 32;

/// One member of a tier. What changes all the time is a metric and not in here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MemberStatus {
    /// Its name, which is its pod's.
    pub name: String,
    /// starting, ready, silent, draining, emptying, waiting or stopping.
    pub state: String,
    /// Shards that it owns, of a business member.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<u32>,
}

/// A member that is being emptied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DrainStatus {
    /// Its name.
    pub member: String,
    /// What it held when that began: connections, or shards.
    pub held_at_start: u64,
    /// How much of it has gone, in percent.
    pub percent_done: u32,
    /// About how long the rest takes, in seconds; none while nothing moves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
}

/// Something that is proposed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProposalStatus {
    /// Hash of its content: the value of the annotation `imcluster.dev/approve` that approves it.
    pub hash: String,
    /// What would be done.
    pub what: String,
}

/// The shards.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ShardStatus {
    /// Term of the leader that wrote the current map.
    pub term: u64,
    /// Number of the current map within its term.
    pub number: u64,
    /// Shards in all.
    pub total: u32,
    /// Shards on their way to another owner.
    pub moving: u32,
    /// Shards without an owner.
    pub unowned: u32,
    /// Moves that are planned and not begun.
    pub queued: u32,
}
