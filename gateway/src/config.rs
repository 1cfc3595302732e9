//! The gateway's configuration file: JSON, camelCase, unknown fields refused, every limit with a default.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use im_proto::process::Identity;
use im_proto::token::{SharedToken, TokenError};
use serde::Deserialize;

use crate::hub::RoomsConfig;
use crate::session::SessionLimits;

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("cannot read {path}: {error}: check --config")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file is no valid configuration.
    #[error("{path}: {error}: correct the field named here")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        error: serde_json::Error,
    },
    /// A value that can't be right.
    #[error("{0}")]
    Invalid(String),
    /// The token of the tiers.
    #[error("linkToken, or linkTokenFile: {0}")]
    Token(#[from] TokenError),
}

/// One gateway.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    /// The member's name; `--name` overrides it.
    #[serde(default)]
    pub name: String,
    /// From the command line.
    #[serde(skip)]
    pub identity: Identity,
    /// The cluster that it belongs to, NAMESPACE/NAME.
    #[serde(default)]
    pub cluster: Option<String>,
    /// Where the control service listens, host:port; tried in turn.
    #[serde(default)]
    pub control: Vec<String>,
    /// A copy of the shard map to begin with; see [`im_proto::map_hint`].
    #[serde(default)]
    pub map_hint_file: Option<PathBuf>,
    /// Authenticates this tier to the others.
    #[serde(default)]
    pub link_token: Option<String>,
    /// The file that holds it instead, one token per line; see [`im_proto::token`].
    #[serde(default)]
    pub link_token_file: Option<PathBuf>,
    /// MQTT over TCP.
    #[serde(default)]
    pub mqtt: Option<Listen>,
    /// MQTT over TLS.
    #[serde(default)]
    pub tls: Option<TlsListen>,
    /// MQTT over WebSocket.
    #[serde(default)]
    pub web_socket: Option<Listen>,
    /// The JSON API.
    #[serde(default)]
    pub http: Option<Listen>,
    /// Health and metrics of this very process.
    pub admin: Listen,
    /// How clients prove who they are.
    pub auth: AuthConfig,
    /// One service token per line.
    #[serde(default)]
    pub service_tokens_file: Option<PathBuf>,
    /// What clients are held to.
    #[serde(default)]
    pub limits: Limits,
    /// What sessions get.
    #[serde(default)]
    pub messages: Messages,
    /// How live rooms are served.
    #[serde(default)]
    pub rooms: Rooms,
    /// How long a terminated gateway sheds its connections, seconds.
    #[serde(default = "default_grace")]
    pub termination_grace_seconds: u64,
    /// Worker threads.
    #[serde(default = "default_threads")]
    pub threads: usize,
}

fn default_grace() -> u64 {
    5
}

/// One core's worth: what scales is the number of gateways.
fn default_threads() -> usize {
    1
}

/// An address to listen on.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listen {
    /// host:port; port 0 picks one.
    pub address: SocketAddr,
}

/// An address to listen on, with its certificate.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TlsListen {
    /// host:port.
    pub address: SocketAddr,
    /// PEM, the server's certificate first.
    pub cert_file: PathBuf,
    /// PEM.
    pub key_file: PathBuf,
}

/// How clients prove who they are.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum AuthConfig {
    /// Any password is right: for trying out.
    Insecure {},
    /// The password is a JSON Web Token whose `sub` is the user.
    #[serde(rename_all = "camelCase")]
    Jwt {
        /// PEM public keys, or one secret for HS256.
        #[serde(default)]
        keys_file: Option<PathBuf>,
        /// A JSON Web Key Set; read again when it changes.
        #[serde(default)]
        jwks_file: Option<PathBuf>,
        /// The `aud` that tokens must name.
        #[serde(default)]
        audience: Option<String>,
        /// The `iss` that tokens must name.
        #[serde(default)]
        issuer: Option<String>,
    },
}

/// What clients are held to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections of this process.
    pub max_connections: usize,
    /// CONNECTs a second.
    pub connect_rate: u32,
    /// Connections before their CONNECT.
    pub half_open_max: usize,
    /// From accept to a complete CONNECT, TLS and WebSocket included, milliseconds.
    pub handshake_timeout_ms: u64,
    /// Publishes that a client may have unanswered.
    pub receive_maximum: u16,
    /// The largest packet taken, bytes.
    pub max_packet_size: u32,
    /// The longest keep-alive granted, seconds.
    pub keep_alive_max_seconds: u16,
    /// The longest session expiry granted, seconds.
    pub session_expiry_max_seconds: u32,
    /// Packets a second that are read from one connection.
    pub message_rate: u32,
    /// Bytes that may wait for one client that reads slowly.
    pub send_buffer_bytes: u32,
    /// The largest payload taken over HTTP, bytes; what comes over MQTT the owners hold to the same.
    pub max_payload: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 50_000,
            connect_rate: 1_000,
            half_open_max: 2_000,
            handshake_timeout_ms: 10_000,
            receive_maximum: 1_024,
            max_packet_size: 262_144,
            keep_alive_max_seconds: 1_200,
            session_expiry_max_seconds: 2_592_000,
            message_rate: 200,
            send_buffer_bytes: 1 << 20,
            max_payload: 65_536,
        }
    }
}

/// What sessions get.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Messages {
    /// Messages of one conversation that a new session gets at most.
    pub catch_up: u64,
}

impl Default for Messages {
    fn default() -> Self {
        Self { catch_up: 1_000 }
    }
}

/// How live rooms are served.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Rooms {
    /// Least time between two batches of a room's messages, milliseconds; a message that comes later than that goes out at once.
    pub coalesce_ms: u64,
    /// Between two sendings of the viewers, likes and gifts counted, milliseconds.
    pub flush_interval_ms: u64,
}

impl Default for Rooms {
    fn default() -> Self {
        Self { coalesce_ms: 5, flush_interval_ms: 1_000 }
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn read(path: &Path, identity: Identity) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.to_owned(), error })?;
        let mut config: Self =
            serde_json::from_str(&text).map_err(|error| ConfigError::Parse { path: path.to_owned(), error })?;
        if let Some(name) = &identity.name {
            config.name.clone_from(name);
        }
        config.identity = identity;
        config.check()?;
        Ok(config)
    }

    /// What this tier proves itself to the others with, wherever it is.
    ///
    /// # Errors
    /// [`ConfigError::Token`].
    pub fn shared_token(&self) -> Result<SharedToken, ConfigError> {
        Ok(match (&self.link_token_file, &self.link_token) {
            (Some(path), _) => SharedToken::file(path)?,
            (None, Some(token)) => SharedToken::fixed(token)?,
            (None, None) => SharedToken::none(),
        })
    }

    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |text: &str| Err(ConfigError::Invalid(text.to_owned()));
        let limits = &self.limits;
        if !im_proto::ids::is_name(&self.name) {
            return invalid("name, or --name: use 1 to 64 of A-Z a-z 0-9 . _ @ -");
        }
        if self.link_token.is_some() && self.link_token_file.is_some() {
            return invalid("give one of linkToken and linkTokenFile");
        }
        if let AuthConfig::Jwt { keys_file, jwks_file, .. } = &self.auth
            && keys_file.is_some() == jwks_file.is_some()
        {
            return invalid("auth.jwt: give one of keysFile and jwksFile");
        }
        if limits.receive_maximum == 0
            || limits.message_rate == 0
            || limits.connect_rate == 0
            || limits.keep_alive_max_seconds == 0
        {
            return invalid(
                "limits: receiveMaximum, messageRate, connectRate and keepAliveMaxSeconds must be at least 1",
            );
        }
        if limits.max_connections == 0 || limits.half_open_max == 0 || self.threads == 0 {
            return invalid("limits.maxConnections, limits.halfOpenMax and threads must be at least 1");
        }
        if !(1..=3_600_000).contains(&limits.handshake_timeout_ms) {
            return invalid("limits.handshakeTimeoutMs: use 1 to 3600000 (an hour)");
        }
        if !(256..=16 << 20).contains(&limits.max_packet_size) {
            return invalid("limits.maxPacketSize: use 256 to 16777216 bytes");
        }
        if !(4_096..=64 << 20).contains(&limits.send_buffer_bytes) {
            return invalid("limits.sendBufferBytes: use 4096 to 67108864 bytes");
        }
        if !(1..=25).contains(&self.rooms.coalesce_ms) {
            return invalid("rooms.coalesceMs: use 1 to 25");
        }
        if !(100..=60_000).contains(&self.rooms.flush_interval_ms) {
            return invalid("rooms.flushIntervalMs: use 100 to 60000 (a minute)");
        }
        Ok(())
    }

    /// How live rooms are served.
    pub fn rooms_config(&self) -> RoomsConfig {
        RoomsConfig {
            coalesce: Duration::from_millis(self.rooms.coalesce_ms),
            flush_interval: Duration::from_millis(self.rooms.flush_interval_ms),
        }
    }

    /// What sessions are held to.
    pub fn session_limits(&self) -> SessionLimits {
        SessionLimits {
            receive_maximum: self.limits.receive_maximum,
            packet_size_max: self.limits.max_packet_size,
            keep_alive_s_max: self.limits.keep_alive_max_seconds,
            session_expiry_s_max: self.limits.session_expiry_max_seconds,
            catch_up: self.messages.catch_up,
            send_buffer_bytes: self.limits.send_buffer_bytes as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_has_defaults_and_typos_are_named() {
        let small = r#"{"name":"gateway-0","admin":{"address":"127.0.0.1:0"},"auth":{"insecure":{}}}"#;
        let config: Config = serde_json::from_str(small).expect("the smallest configuration");
        config.check().expect("valid");
        assert_eq!((config.limits.receive_maximum, config.messages.catch_up), (1_024, 1_000));
        let typo = small.replace("\"auth\"", "\"limit\":{},\"auth\"");
        let error = serde_json::from_str::<Config>(&typo).expect_err("an unknown field").to_string();
        assert!(error.contains("limit"), "{error}");
        let both = Config { link_token: Some("x".into()), link_token_file: Some("y".into()), ..config.clone() };
        assert!(both.check().is_err());
        let both = r#"{"jwt":{"keysFile":"a","jwksFile":"b"}}"#;
        let config = Config { auth: serde_json::from_str(both).expect("parses"), ..config };
        assert!(config.check().is_err());
    }
}
