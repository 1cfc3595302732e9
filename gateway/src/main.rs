//! `im-gateway --config FILE`: one gateway.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use im_gateway::config::{Config, Identity};
use im_gateway::run;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Client connections of an ImCluster: MQTT 5 and 3.1.1, and the HTTP API.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration, JSON.
    #[arg(long)]
    config: PathBuf,
    #[command(flatten)]
    identity: Identity,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A log that can't be written (disk full) must not end the process, as printing that to stderr would.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    log.log_internal_errors(false).init();
    match serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::read(&arguments.config, arguments.identity.clone())?;
    // One thread needs no scheduler that hands tasks from thread to thread.
    let mut runtime = match config.threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.worker_threads(config.threads).enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let running = run::start(&config)?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        running.member.leave(Duration::from_secs(config.termination_grace_seconds)).await;
        Ok::<_, Box<dyn std::error::Error>>(())
    })?;
    // Connections that did not take their last bytes are not waited for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    Ok(())
}
