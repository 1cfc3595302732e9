//! `ImCluster` status: what is, and why.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator observed and decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
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
}
