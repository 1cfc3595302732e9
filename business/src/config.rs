//! The configuration files of the two programs: JSON, written by the operator or by hand.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read {path}: {source}; give the configuration with --config FILE")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what was expected.
    #[error("{path}: {source}; see the documentation of the configuration for its fields")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
}

/// A business member.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServeConfig {
    /// Its name, which a restart keeps.
    pub name: String,
    /// Where control services listen, host:port; tried in turn.
    pub control: Vec<String>,
    /// Where gateways and other members reach it.
    pub link: Listen,
    /// Health and metrics.
    pub admin: Listen,
    /// `grpc://host:port` (a store member) or `postgres://…`; also `sqlite:PATH` and `memory:` for a member alone.
    pub store: String,
    /// What links must present.
    #[serde(default)]
    pub link_token: Option<String>,
    /// What the store member asks for.
    #[serde(default)]
    pub store_token: Option<String>,
    /// How long message ids are remembered, seconds. Ids are kept as long as the messages, so this is a lower bound that always holds.
    #[serde(default)]
    pub dedup_window_seconds: Option<u64>,
    /// Largest payload of a message, bytes.
    #[serde(default)]
    pub payload_max: Option<usize>,
    /// Live rooms.
    #[serde(default)]
    pub rooms: RoomsConfig,
    /// Lets `POST /fail-points/{name}` on the admin address end the process at a chosen point. For tests.
    #[serde(default)]
    pub fail_points: bool,
}

/// Live rooms.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RoomsConfig {
    /// Messages of a room that late comers get. They are kept in the owner's and the gateways' memory only, at most 64 KiB a room.
    pub history: usize,
    /// Between two statistics of a room, milliseconds.
    pub stats_interval_ms: u64,
}

impl Default for RoomsConfig {
    fn default() -> Self {
        Self { history: 0, stats_interval_ms: 1_000 }
    }
}

/// A store member.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoreConfig {
    /// Its name.
    pub name: String,
    /// Where business members reach it.
    pub listen: SocketAddr,
    /// Where the database file lives.
    pub data_dir: PathBuf,
    /// What business members must present.
    #[serde(default)]
    pub token: Option<String>,
}

/// Where to listen.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listen {
    /// host:port; port 0 takes a free one.
    pub address: SocketAddr,
}

/// Reads a configuration.
///
/// # Errors
/// [`ConfigError`] names the file and what is wrong with it.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })
}
