//! The one trait between decisions and the world: who runs, start one, stop one.

pub mod kubernetes;
pub mod process;

use crate::shards::ShardMap;
use im_crds::{ImCluster, Scaling, SecretKey, ShardMapSpec};
use im_proto::ids::MemberId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::time::Duration;
use tokio::sync::watch;

/// What a process of the system is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Decides; carries no messages.
    Control,
    /// Holds the embedded store.
    Store,
    /// Owns shards.
    Business,
    /// Holds client connections.
    Gateway,
}

impl Role {
    /// In lower case, as in configurations and labels.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Store => "store",
            Self::Business => "business",
            Self::Gateway => "gateway",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One of the tiers that scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Holds client connections.
    Gateway,
    /// Owns shards.
    Business,
}

impl Tier {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Gateway, Self::Business];

    /// The tier that a process belongs to, if it belongs to one.
    pub fn of(role: Role) -> Option<Self> {
        match role {
            Role::Gateway => Some(Self::Gateway),
            Role::Business => Some(Self::Business),
            Role::Control | Role::Store => None,
        }
    }

    /// What its members are for.
    pub fn role(self) -> Role {
        match self {
            Self::Gateway => Role::Gateway,
            Self::Business => Role::Business,
        }
    }

    /// How many members it is to have in that cluster.
    pub fn scaling(self, cluster: &ImCluster) -> Scaling<'_> {
        match self {
            Self::Gateway => cluster.spec.gateway.scaling(),
            Self::Business => cluster.spec.business.scaling(),
        }
    }

    /// Members that may be added in that cluster while outdated ones are replaced.
    pub fn surge(self, cluster: &ImCluster) -> u32 {
        match self {
            Self::Gateway => cluster.spec.gateway.surge,
            Self::Business => cluster.spec.business.surge,
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.role().fmt(f)
    }
}

/// What a process is doing, as its supervisor sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProcessState {
    /// It runs.
    Running,
    /// It does not run: it ended and is started again after its back-off, or it was not started yet.
    Waiting,
    /// It was asked to end, by whomever, and still runs.
    Stopping,
}

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Its name. Where the platform restarts processes under their name, a restart keeps it.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// What it is doing.
    pub state: ProcessState,
    /// While it lives, what tells it from another one of the same name; the member says the same in its Hello. The process
    /// id as text, or the pod's UID.
    #[serde(default)]
    pub instance: Option<String>,
    /// Its process id while it lives, where that means anything.
    pub pid: Option<u32>,
    /// How often it was started.
    pub starts: u32,
    /// The template of the configuration it was started with; see [`Platform::template`].
    pub template: String,
    /// Where it listens, by what for.
    pub addresses: BTreeMap<String, String>,
}

/// Members that were asked for and are not shown as processes yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ordered {
    /// Gateways.
    pub gateway: u32,
    /// Business members.
    pub business: u32,
}

impl Ordered {
    /// Those of one tier.
    pub fn of(self, tier: Tier) -> u32 {
        match tier {
            Tier::Gateway => self.gateway,
            Tier::Business => self.business,
        }
    }
}

/// What the platform shows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    /// Every process that lives or will be started (again). Of each tier the oldest first: among equals the last one leaves.
    pub processes: Vec<Process>,
    /// What was asked for and is not among the processes yet.
    #[serde(default)]
    pub ordered: Ordered,
    /// Rises with each change of the ImCluster, its annotations included.
    pub generation: u64,
    /// Why what the user wrote last is not what runs, if so.
    pub file_error: Option<String>,
}

impl View {
    /// The process of that name.
    pub fn process(&self, name: &str) -> Option<&Process> {
        self.processes.iter().find(|process| process.name == name)
    }

    /// The members of a tier, the oldest first.
    pub fn of_tier(&self, tier: Tier) -> impl Iterator<Item = &Process> {
        self.processes.iter().filter(move |process| process.role == tier.role())
    }
}

/// What survives the leader's own end: the map, and where its owners listen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredMap {
    /// The map.
    pub map: ShardMapSpec,
    /// The Link address of each business member that is known. A hint: without it senders wait until the members dial in.
    #[serde(default)]
    pub links: BTreeMap<String, String>,
}

impl StoredMap {
    /// The map and the addresses, ready for use; `None` if they are not those of a cluster with so many shards. Then the
    /// members and the store's rows tell what is: a lost map costs time, never messages.
    pub fn decode(&self, shards: u32) -> Option<(ShardMap, BTreeMap<MemberId, String>)> {
        let damaged = |reason: String| tracing::warn!("the stored shard map is not used: {reason}");
        // Before its rows take up memory.
        if self.map.shards != shards {
            damaged(format!("it has {} shards, the cluster {shards}", self.map.shards));
            return None;
        }
        let map = ShardMap::from_spec(&self.map).map_err(|error| damaged(error.to_string())).ok()?;
        let links = self.links.iter().filter_map(|(member, link)| Some((MemberId::parse(member).ok()?, link.clone())));
        Some((map, links.collect()))
    }
}

/// Why the platform did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// Whoever starts and stops members can't be reached.
    #[error("the supervisor can't be reached: {0}")]
    Unreachable(#[from] std::io::Error),
    /// The Kubernetes API refuses, or can't be reached.
    #[error("the Kubernetes API: {0}")]
    Api(#[from] kube::Error),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// It refuses.
    #[error("refused: {0}")]
    Refused(String),
    /// It answers something else.
    #[error("the supervisor answers nonsense: {0}")]
    Nonsense(String),
    /// The configuration can't be made.
    #[error("{0}")]
    Config(String),
    /// Somebody else wrote the shard map: another one leads this cluster by now, and this one has to end.
    #[error("another operator leads this cluster by now")]
    Outranked,
}

/// Where members run. An action that is repeated, or comes too late, does no harm. Actions may take their time: whoever
/// decides does not wait for them, but has at most one of a tier under way.
pub trait Platform: Send + Sync + 'static {
    /// Who runs, and each later change of it. The exit of a process that this shows is certain. Its end ends whoever
    /// decides.
    fn watch(&self) -> watch::Receiver<View>;

    /// The ImCluster to run, its annotations included; read again when [`View::generation`] rises.
    ///
    /// # Errors
    /// [`PlatformError`].
    fn cluster(&self) -> Result<ImCluster, PlatformError>;

    /// A digest of all that a member of that tier is configured with, its name aside. A member with another one is to be
    /// replaced. Asked again when [`View::generation`] rises.
    fn template(&self, cluster: &ImCluster, tier: Tier) -> String;

    /// Cores that are set aside for each member of that tier: 100 % of its CPU utilization. One where nothing is set aside.
    fn cores(&self, _cluster: &ImCluster, _tier: Tier) -> f64 {
        1.0
    }

    /// What that key of a Secret holds that the ImCluster refers to, as of the last look; `None` = it is not there, or there
    /// are no Secrets on this platform.
    fn secret(&self, _key: &SecretKey) -> Option<Vec<u8>> {
        None
    }

    /// Starts `count` members with the present configuration; the platform names them. After `Ok` the watch already shows
    /// them, as processes or as [`View::ordered`].
    fn start(
        &self,
        cluster: &ImCluster,
        tier: Tier,
        count: u32,
    ) -> impl Future<Output = Result<(), PlatformError>> + Send;

    /// Asks a member to end, and ends it after `grace`. It is not replaced. After `Ok` the watch shows it as
    /// [`ProcessState::Stopping`], or no longer.
    fn stop(&self, name: &str, grace: Duration) -> impl Future<Output = Result<(), PlatformError>> + Send;

    /// Whether whoever spreads new connections over the gateways may choose this one.
    fn set_serving(&self, name: &str, serving: bool) -> impl Future<Output = Result<(), PlatformError>> + Send;

    /// Makes known where the process `instance` of that name listens.
    fn describe(
        &self,
        name: &str,
        instance: &str,
        addresses: BTreeMap<String, String>,
    ) -> impl Future<Output = Result<(), PlatformError>> + Send;

    /// The map that was stored last, if any.
    ///
    /// # Errors
    /// [`PlatformError`] when it can't be known whether there is one; one that can't be read counts as none.
    fn load_map(&self) -> impl Future<Output = Result<Option<StoredMap>, PlatformError>> + Send;

    /// Replaces the stored map: the one that this very platform loaded or stored before. Called at most once a second.
    ///
    /// # Errors
    /// [`PlatformError::Outranked`] if somebody else stored one since.
    fn save_map(&self, map: &StoredMap) -> impl Future<Output = Result<(), PlatformError>> + Send;

    /// Lays a copy of the map ([`im_proto::map_hint`]) where members that start find it, whether anybody leads by then or not.
    fn publish_map(&self, hint: Vec<u8>) -> impl Future<Output = Result<(), PlatformError>> + Send;
}
