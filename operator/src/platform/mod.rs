//! The one trait between decisions and the world: who runs, start one, stop one.

pub mod process;

use im_crds::ImCluster;
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

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Store => "store",
            Self::Business => "business",
            Self::Gateway => "gateway",
        })
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

    /// The name of its member number `index`.
    pub fn member_name(self, index: u32) -> String {
        format!("{self}-{index}")
    }

    /// The inverse of [`Tier::member_name`].
    pub fn index_of(self, name: &str) -> Option<u32> {
        name.strip_prefix(&format!("{self}-"))?.parse().ok()
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
    /// It ended and is started again after its back-off.
    Waiting,
    /// It was asked to end and still runs.
    Stopping,
}

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Its name, which a restart keeps.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// What it is doing.
    pub state: ProcessState,
    /// Its process id while it lives.
    pub pid: Option<u32>,
    /// How often it was started.
    pub starts: u32,
    /// The template of the configuration it was started with; see [`Platform::template`].
    pub template: String,
    /// Where it listens, by what for.
    pub addresses: BTreeMap<String, String>,
}

/// What the platform shows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    /// Every process that lives or will be started again.
    pub processes: Vec<Process>,
    /// Rises with each ImCluster that is to be run instead of the one before.
    pub generation: u64,
    /// Why what the user wrote last is not what runs, if so.
    pub file_error: Option<String>,
}

impl View {
    /// The process of that name.
    pub fn process(&self, name: &str) -> Option<&Process> {
        self.processes.iter().find(|process| process.name == name)
    }
}

/// Why the platform did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// Whoever starts and stops members can't be reached.
    #[error("the supervisor can't be reached: {0}")]
    Unreachable(#[from] std::io::Error),
    /// It refuses.
    #[error("the supervisor refuses: {0}")]
    Refused(String),
    /// It answers something else.
    #[error("the supervisor answers nonsense: {0}")]
    Nonsense(String),
    /// The configuration can't be made.
    #[error("{0}")]
    Config(String),
}

/// Where members run. An action that is repeated, or comes too late, does no harm.
pub trait Platform: Send + Sync + 'static {
    /// Who runs, and each later change of it. The exit of a process that this shows is certain.
    fn watch(&self) -> watch::Receiver<View>;

    /// The ImCluster to run; read again when [`View::generation`] rises.
    ///
    /// # Errors
    /// [`PlatformError`].
    fn cluster(&self) -> Result<ImCluster, PlatformError>;

    /// A digest of all that a member of that tier is configured with, its name aside. A member with another one is to be
    /// replaced.
    fn template(&self, cluster: &ImCluster, tier: Tier) -> String;

    /// Starts a member. The name must not be in use.
    fn start(
        &self,
        cluster: &ImCluster,
        tier: Tier,
        name: &str,
    ) -> impl Future<Output = Result<(), PlatformError>> + Send;

    /// Asks a member to end, and ends it after `grace`.
    fn stop(&self, name: &str, grace: Duration) -> impl Future<Output = Result<(), PlatformError>> + Send;

    /// Makes known where the process `pid` of that name listens.
    fn describe(
        &self,
        name: &str,
        pid: u32,
        addresses: BTreeMap<String, String>,
    ) -> impl Future<Output = Result<(), PlatformError>> + Send;
}
