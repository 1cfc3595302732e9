//! The control service: members report to it and get the map from it, in the manner of xDS.
//!
//! One loop ([`Leader`]) owns the coordinator of the shards and the state of both tiers. It hears the members, the
//! platform and the clock, asks the pure decisions what to do, and does it through outboxes and the platform. It blocks
//! on nobody: who doesn't answer is dealt with by deadlines of the decisions.

mod leader;
mod scaling;
mod service;
pub mod status;
pub mod tiers;

pub use leader::{Leader, Setup};

use crate::console;
use crate::platform::process::ProcessPlatform;
use crate::platform::{Platform, PlatformError};
use crate::shards::{ShardMap, Timing};
use crate::up::data_dir::{DataDir, DataDirError, write_atomically};
use im_crds::ShardMapSpec;
use im_proto::control::control_server::ControlServer;
use im_proto::ids::MemberId;
use serde::{Deserialize, Serialize};
use status::Status;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// Reports of all members that wait for the loop.
const INCOMING_MAX: usize = 4_096;
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
    /// The supervisor is not there, or what it says can't be used.
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
    /// The gRPC server ended.
    #[error("the control service ended: {0}")]
    Server(#[from] tonic::transport::Error),
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> ControlError {
    let what = what.into();
    move |source| ControlError::Io { what, source }
}

/// What survives control's own end: the map, and where its owners listen.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredMap {
    /// The map.
    pub map: ShardMapSpec,
    /// The Link address of each business member that is known.
    pub links: BTreeMap<String, String>,
}

impl StoredMap {
    /// Reads it; `None` if there is none that can be used. Then the members and the store's rows tell what is: a lost map
    /// costs time, never messages.
    pub fn read(path: &Path, shards: u32) -> Option<(ShardMap, BTreeMap<MemberId, String>)> {
        let bytes = std::fs::read(path).ok()?;
        let damaged = |reason: String| tracing::warn!("{} is not used: {reason}", path.display());
        let stored: Self = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string())).ok()?;
        let map = ShardMap::from_spec(&stored.map).map_err(|error| damaged(error.to_string())).ok()?;
        if map.shards() != shards {
            damaged(format!("it has {} shards, the cluster {shards}", map.shards()));
            return None;
        }
        let links =
            stored.links.iter().filter_map(|(member, link)| Some((MemberId::parse(member).ok()?, link.clone())));
        Some((map, links.collect()))
    }

    /// Replaces what is stored.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        write_atomically(path, &serde_json::to_vec(self).map_err(std::io::Error::other)?)
    }
}

/// Runs control under the supervisor of `options.data_dir` until SIGTERM.
///
/// # Errors
/// [`ControlError`].
pub async fn run(options: Options) -> Result<(), ControlError> {
    let data = DataDir::open(&options.data_dir)?;
    let endpoints = data.endpoints()?;
    let mut terminations = signal(SignalKind::terminate()).map_err(io("SIGTERM"))?;
    let platform = Arc::new(ProcessPlatform::connect(data.clone(), options.paths_from.clone()).await?);
    let listener = TcpListener::bind(endpoints.control).await.map_err(io(endpoints.control.to_string()))?;

    let (status, shown) = watch::channel(Status::default());
    let socket = data.status_socket();
    let _ = std::fs::remove_file(&socket);
    let at_socket = UnixListener::bind(&socket).map_err(io("run/status.sock"))?;
    let router = console::router(shown.clone());
    tokio::spawn(async move { axum::serve(at_socket, router).await });
    if let Ok(address) = options.console.parse::<SocketAddr>() {
        tokio::spawn(open_console(address, shown, data.clone(), platform.clone()));
    }

    let setup = Setup { map_file: data.shard_map(), timing: Timing::default() };
    tokio::select! {
        ended = serve(platform, listener, setup, status) => ended,
        _ = terminations.recv() => Ok(()),
    }
}

/// Serves members on `listener` and decides, for ever.
///
/// # Errors
/// [`ControlError`] when the cluster or the map file can't be read or written at the start, or the server ends.
pub async fn serve<P: Platform>(
    platform: Arc<P>,
    listener: TcpListener,
    setup: Setup,
    status: watch::Sender<Status>,
) -> Result<(), ControlError> {
    let (incoming, inbox) = mpsc::channel(INCOMING_MAX);
    let leader = Leader::new(platform, setup, status)?;
    let service = ControlServer::new(service::ControlService::new(incoming)).max_decoding_message_size(16 << 20);
    let server = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(2)))
        .http2_keepalive_timeout(Some(Duration::from_secs(4)))
        .tcp_nodelay(true)
        .add_service(service)
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    tokio::select! {
        ended = server => Ok(ended?),
        () = leader.run(inbox) => Ok(()),
    }
}

/// Opens the console's port, as soon as it is free, and says where it is.
async fn open_console(
    address: SocketAddr,
    status: watch::Receiver<Status>,
    data: DataDir,
    platform: Arc<ProcessPlatform>,
) {
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
    if let Err(error) = platform.describe("control", std::process::id(), addresses).await {
        tracing::warn!("members.json does not show the console: {error}");
    }
    if let Err(error) = axum::serve(listener, console::router(status)).await {
        tracing::error!("the console ended: {error}");
    }
}
