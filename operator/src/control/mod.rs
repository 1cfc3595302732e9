//! The control service: members report to it and get the map from it, in the manner of xDS.
//!
//! One loop per ImCluster ([`Leader`]) owns the coordinator of its shards and the state of both tiers. It hears the
//! members, the platform and the clock, asks the pure decisions what to do, and does it through outboxes and the platform.
//! It blocks on nobody: who doesn't answer is dealt with by deadlines of the decisions. [`Clusters`] takes each member to
//! the loop of its cluster, or tells it who leads if this process does not.

mod clusters;
mod lasting;
mod leader;
pub mod proposal;
mod scaling;
mod service;
pub mod status;
pub mod tiers;

pub use clusters::{ClusterKey, Clusters, Leadership, Led};
pub use leader::Setup;

use crate::console;
use crate::metrics;
use crate::platform::process::ProcessPlatform;
use crate::platform::{Platform, PlatformError};
use crate::up::data_dir::{DataDir, DataDirError, write_atomically};
use im_proto::control::control_server::ControlServer;
use im_proto::token::Tokens;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// The largest report of a member, bytes.
const REPORT_BYTES_MAX: usize = 16 << 20;
/// Between attempts to open the console's port.
const CONSOLE_RETRY: Duration = Duration::from_secs(2);

/// What `imcluster control` is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The supervisor's data directory.
    pub data_dir: PathBuf,
    /// Where the console listens, `IP:PORT` or `off`.
    pub console: String,
    /// Paths in the ImCluster are relative to this directory.
    pub paths_from: PathBuf,
}

/// Why control ends.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The data directory can't be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// What runs, or the map, can't be read or written; [`PlatformError::Outranked`]: another one leads this cluster.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// An address is taken, or a file can't be written.
    #[error("{what}: {source}")]
    Io {
        /// Which.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The data directory's secrets are damaged.
    #[error("{0} holds no token for its members: put the file of secrets back, or begin with another data directory")]
    Token(PathBuf),
    /// The gRPC server ended.
    #[error("the control service ended: {0}")]
    Server(#[from] tonic::transport::Error),
    /// The loop of a cluster ended by a fault of its own.
    #[error("the loop that decides for {cluster} broke off: {reason}; it is in the log above")]
    Broken {
        /// The cluster.
        cluster: ClusterKey,
        /// What is known.
        reason: String,
    },
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> ControlError {
    let what = what.into();
    move |source| ControlError::Io { what, source }
}

/// Runs control under the supervisor of `options.data_dir` until SIGTERM.
///
/// # Errors
/// [`ControlError`].
pub async fn run(options: Options) -> Result<(), ControlError> {
    let data = DataDir::open(&options.data_dir)?;
    let endpoints = data.endpoints()?;
    let no_token = || ControlError::Token(data.root().to_owned());
    let tokens = Tokens::parse(&data.secrets()?.link_token).ok_or_else(no_token)?;
    let mut terminations = signal(SignalKind::terminate()).map_err(io("SIGTERM"))?;
    let platform = Arc::new(ProcessPlatform::connect(data.clone(), options.paths_from.clone()).await?);
    let listener = TcpListener::bind(endpoints.control).await.map_err(io(endpoints.control.to_string()))?;

    // The only control of this machine leads for good.
    let (_leads, leadership) = watch::channel(Leadership::Leading);
    let clusters = Clusters::new(leadership);
    let key = ClusterKey::of(&platform.cluster()?);
    let metrics = metrics::Setup { reads_files: true, ..metrics::Setup::default() };
    let mut led = clusters.lead(key, tokens, platform.clone(), Setup { metrics, ..Setup::default() });

    let socket = data.status_socket();
    let _ = std::fs::remove_file(&socket);
    let at_socket = UnixListener::bind(&socket).map_err(io("run/status.sock"))?;
    let router = console::router(led.status.clone(), clusters.clone());
    let at_port = router.clone();
    tokio::spawn(async move { axum::serve(at_socket, router).await });
    if let Ok(address) = options.console.parse::<SocketAddr>() {
        tokio::spawn(open_console(address, at_port, data.clone(), platform));
    }
    tokio::select! {
        ended = serve(clusters, listener) => ended,
        ended = led.ended() => ended,
        _ = terminations.recv() => Ok(()),
    }
}

/// Serves the members of all clusters on `listener`, for ever.
///
/// # Errors
/// [`ControlError::Server`].
pub async fn serve(clusters: Arc<Clusters>, listener: TcpListener) -> Result<(), ControlError> {
    let service =
        ControlServer::new(service::ControlService::new(clusters)).max_decoding_message_size(REPORT_BYTES_MAX);
    let server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(2)))
        .http2_keepalive_timeout(Some(Duration::from_secs(4)))
        .tcp_nodelay(true)
        .add_service(service)
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    Ok(server.await?)
}

/// Opens the console's port, as soon as it is free, and says where it is.
async fn open_console(address: SocketAddr, router: axum::Router, data: DataDir, platform: Arc<ProcessPlatform>) {
    let mut complained = false;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) if !complained => {
                tracing::error!(
                    "the console can't listen at {address}: {error}; free it, or choose another with --console"
                );
                complained = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(CONSOLE_RETRY).await;
    };
    let Ok(address) = listener.local_addr() else { return };
    let document = serde_json::json!({ "address": address });
    if let Err(error) = write_atomically(&data.console_json(), document.to_string().as_bytes()) {
        tracing::error!("run/console.json: {error}");
    }
    let addresses = BTreeMap::from([("console".to_owned(), address.to_string())]);
    if let Err(error) = platform.describe("control", &std::process::id().to_string(), addresses).await {
        tracing::warn!("members.json does not show the console: {error}");
    }
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!("the console ended: {error}");
    }
}
