//! `im-business serve`: an owner of shards. `im-business store`: the store member.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use im_business::config::{self, Identity, ServeConfig, StoreConfig};
use im_business::serve::serve;
use im_business::store::{Store, server, sqlite::Sqlite};
use tokio::signal::unix::{SignalKind, signal};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Owners of shards, and the store member.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Own shards: order, store and announce messages.
    Serve {
        /// The configuration, JSON.
        #[arg(long)]
        config: PathBuf,
        #[command(flatten)]
        identity: Identity,
    },
    /// Keep the messages of a cluster in one SQLite file and serve its business members.
    Store {
        /// The configuration, JSON.
        #[arg(long)]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    // A log that can't be written (disk full) must not end the process, as printing that to stderr would.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    log.log_internal_errors(false).init();
    let arguments = Arguments::parse();
    // One core's worth of work, on one thread: what scales is the number of members.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.map_err(|error| error.to_string()).and_then(|runtime| {
        runtime.block_on(async {
            match arguments.command {
                Command::Serve { config, identity } => {
                    let mut config: ServeConfig = config::read(&config).map_err(|error| error.to_string())?;
                    if let Some(name) = &identity.name {
                        config.name.clone_from(name);
                    }
                    config.identity = identity;
                    serve(config, terminated()).await.map_err(|error| error.to_string())
                }
                Command::Store { config } => {
                    let config: StoreConfig = config::read(&config).map_err(|error| error.to_string())?;
                    serve_store(config).await
                }
            }
        })
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve_store(config: StoreConfig) -> Result<(), String> {
    let token = config.shared_token().map_err(|error| error.to_string())?;
    let folder = &config.data_dir;
    std::fs::create_dir_all(folder)
        .map_err(|error| format!("cannot create {}: {error}; give a writable dataDir", folder.display()))?;
    let store: Arc<dyn Store> =
        Arc::new(Sqlite::open(&folder.join("messages.sqlite")).map_err(|error| error.to_string())?);
    let address: SocketAddr = config.listen;
    let listener =
        tokio::net::TcpListener::bind(address).await.map_err(|error| format!("cannot listen on {address}: {error}"))?;
    tracing::info!(name = config.name, %address, "store member starts");
    tokio::select! {
        ended = server::serve(listener, store, token) => ended.map_err(|error| error.to_string()),
        () = terminated() => Ok(()),
    }
}

/// SIGTERM or SIGINT.
async fn terminated() {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}
