//! The configuration files of the two programs: JSON, written by the operator or by hand.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub use im_proto::process::Identity;
use im_proto::token::{SharedToken, TokenError};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read {path}: {source}; check --config and the files that it names")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what was expected.
    #[error("{path}: {source}; correct the field that is named here")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A token can't be used.
    #[error("{name}: {source}")]
    Token {
        /// The field.
        name: &'static str,
        /// Why.
        source: TokenError,
    },
    /// A value is given twice, or not at all.
    #[error("set {count} of: {inline}, {inline}{suffix}")]
    Choice {
        /// How many are to be set.
        count: &'static str,
        /// The field that holds the value.
        inline: &'static str,
        /// With this after it, the field that names the file which holds it.
        suffix: &'static str,
    },
}

/// A business member.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServeConfig {
    /// Its name; `--name` overrides it.
    #[serde(default)]
    pub name: String,
    /// From the command line.
    #[serde(skip)]
    pub identity: Identity,
    /// The cluster that it belongs to, NAMESPACE/NAME.
    #[serde(default)]
    pub cluster: Option<String>,
    /// Where control services listen, host:port; tried in turn.
    pub control: Vec<String>,
    /// Where gateways and other members reach it.
    pub link: Listen,
    /// Health and metrics.
    pub admin: Listen,
    /// `grpc://host:port` (a store member) or `postgres://…`; also `sqlite:PATH` and `memory:` for a member alone.
    #[serde(default)]
    pub store: Option<String>,
    /// The file that holds it instead.
    #[serde(default)]
    pub store_url_file: Option<PathBuf>,
    /// PEM file with the authorities that a PostgreSQL server's certificate may be from; with it TLS is a must.
    #[serde(default)]
    pub store_ca_file: Option<PathBuf>,
    /// What links must present, and what is presented to control.
    #[serde(default)]
    pub link_token: Option<String>,
    /// The file that holds it instead.
    #[serde(default)]
    pub link_token_file: Option<PathBuf>,
    /// A copy of the shard map to begin with; see [`im_proto::map_hint`].
    #[serde(default)]
    pub map_hint_file: Option<PathBuf>,
    /// What the store member asks for.
    #[serde(default)]
    pub store_token: Option<String>,
    /// The file that holds it instead.
    #[serde(default)]
    pub store_token_file: Option<PathBuf>,
    /// Largest payload of a message, bytes.
    #[serde(default)]
    pub payload_max: Option<usize>,
    /// Live rooms.
    #[serde(default)]
    pub rooms: RoomsConfig,
    /// From SIGTERM to the end at the latest, seconds: in this time its shards go to others.
    #[serde(default = "default_grace")]
    pub termination_grace_seconds: u64,
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

fn default_grace() -> u64 {
    5
}

impl ServeConfig {
    /// The store's URL, wherever it is.
    ///
    /// # Errors
    /// [`ConfigError`], also when it is nowhere.
    pub fn read_store_url(&self) -> Result<String, ConfigError> {
        let url = inline_or_file("store", "UrlFile", self.store.as_ref(), self.store_url_file.as_deref())?;
        url.ok_or(ConfigError::Choice { count: "exactly one", inline: "store", suffix: "UrlFile" })
    }

    /// The token of links and control, wherever it is.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn link_token(&self) -> Result<SharedToken, ConfigError> {
        shared_token("linkToken", self.link_token.as_deref(), self.link_token_file.as_deref())
    }

    /// The token of the store member, wherever it is.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn store_token(&self) -> Result<SharedToken, ConfigError> {
        shared_token("storeToken", self.store_token.as_deref(), self.store_token_file.as_deref())
    }
}

/// A token that stands in the configuration, or in a file, one per line; see [`im_proto::token`].
fn shared_token(name: &'static str, inline: Option<&str>, file: Option<&Path>) -> Result<SharedToken, ConfigError> {
    let token = match (inline, file) {
        (Some(_), Some(_)) => return Err(ConfigError::Choice { count: "at most one", inline: name, suffix: "File" }),
        (Some(token), None) => SharedToken::fixed(token),
        (None, Some(path)) => SharedToken::file(path),
        (None, None) => Ok(SharedToken::none()),
    };
    token.map_err(|source| ConfigError::Token { name, source })
}

/// A value that stands in the configuration, or in a file.
fn inline_or_file(
    name: &'static str,
    suffix: &'static str,
    inline: Option<&String>,
    file: Option<&Path>,
) -> Result<Option<String>, ConfigError> {
    match (inline, file) {
        (Some(_), Some(_)) => Err(ConfigError::Choice { count: "at most one", inline: name, suffix }),
        (inline, None) => Ok(inline.cloned()),
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text.trim().to_owned())),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        },
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
    /// The file that holds it instead.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
}

impl StoreConfig {
    /// The token, wherever it is.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn shared_token(&self) -> Result<SharedToken, ConfigError> {
        shared_token("token", self.token.as_deref(), self.token_file.as_deref())
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(fields: &str) -> ServeConfig {
        let always = r#""control":[],"link":{"address":"127.0.0.1:0"},"admin":{"address":"127.0.0.1:0"}"#;
        serde_json::from_str(&format!("{{{always}{fields}}}")).expect("a configuration")
    }

    #[test]
    fn a_secret_stands_in_the_configuration_or_in_a_file() {
        let file = std::env::temp_dir().join(format!("im-business-config-{}", std::process::id()));
        std::fs::write(&file, "from the file\n").expect("written");
        let path = file.display();
        let both = config(&format!(r#","store":"memory:","linkToken":"inline","storeTokenFile":"{path}""#));
        assert_eq!(both.read_store_url().expect("inline"), "memory:");
        let bearer = |token: SharedToken| token.bearer().expect("a token");
        assert_eq!(bearer(both.link_token().expect("inline")), "Bearer inline");
        assert_eq!(bearer(both.store_token().expect("readable")), "Bearer from the file");
        let twice = config(&format!(r#","linkToken":"inline","linkTokenFile":"{path}""#));
        let error = twice.link_token().expect_err("which one?").to_string();
        assert_eq!(error, "set at most one of: linkToken, linkTokenFile");
        let error = twice.read_store_url().expect_err("none").to_string();
        assert_eq!(error, "set exactly one of: store, storeUrlFile");
        std::fs::remove_file(&file).expect("removed");
        assert!(both.store_token().expect_err("gone").to_string().contains("im-business-config"));
    }
}
