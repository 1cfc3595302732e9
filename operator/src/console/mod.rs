//! The console: the status as JSON, a page that draws it, and the table of `imcluster status`.

use crate::control::Clusters;
use crate::control::proposal::APPROVE_ANNOTATION;
use crate::control::status::{Status, TierStatus};
use crate::metrics::{ScrapeError, export, get};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get as on_get;
use hyper_util::rt::TokioIo;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::watch;

/// From the question to the answer of `imcluster status`.
const STATUS_TIMEOUT: Duration = Duration::from_secs(3);

/// The console's HTTP service: `/` draws, `/status` is the JSON document, `/metrics`, `/healthz`.
pub fn router(status: watch::Receiver<Status>, clusters: Arc<Clusters>) -> Router {
    Router::new()
        .route("/", on_get(async || Html(include_str!("page.html"))))
        .route("/status", on_get(show_status))
        .route("/metrics", on_get(show_metrics))
        .route("/healthz", on_get(async || "ok\n"))
        .with_state(Shown { status, clusters })
}

/// What the pages are made of.
#[derive(Clone)]
struct Shown {
    status: watch::Receiver<Status>,
    clusters: Arc<Clusters>,
}

async fn show_status(State(shown): State<Shown>) -> Response {
    match serde_json::to_vec(&*shown.status.borrow()) {
        Ok(json) => {
            ([(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")], json).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn show_metrics(State(shown): State<Shown>) -> Response {
    match export(&shown.status.borrow(), |registry| shown.clusters.register(registry)) {
        Ok(page) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], page).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Why there is no status.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// Nobody listens.
    #[error("control does not answer at {socket} ({source}): is `imcluster up` running with this data directory?")]
    NotRunning {
        /// The socket.
        socket: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The answer is no status.
    #[error("control's answer can't be read: {0}")]
    Answer(String),
    /// No answer in time.
    #[error("control did not answer within {STATUS_TIMEOUT:?}; its log is logs/control.log in the data directory")]
    Timeout,
}

/// Asks control at its unix socket.
///
/// # Errors
/// [`StatusError`].
pub async fn fetch(socket: &Path) -> Result<Status, StatusError> {
    let ask = async {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|source| StatusError::NotRunning { socket: socket.display().to_string(), source })?;
        let answer: Result<_, ScrapeError> = get(TokioIo::new(stream), "/status").await;
        let json = answer.map_err(|error| StatusError::Answer(error.to_string()))?;
        serde_json::from_slice(&json).map_err(|error| StatusError::Answer(error.to_string()))
    };
    tokio::time::timeout(STATUS_TIMEOUT, ask).await.map_err(|_| StatusError::Timeout)?
}

/// The status for people.
pub fn table(status: &Status) -> String {
    let mut out = String::new();
    // Writing to a String can't fail.
    let _ = draw(&mut out, status);
    out
}

fn draw(out: &mut String, status: &Status) -> std::fmt::Result {
    let paused = if status.paused { ", paused" } else { "" };
    writeln!(out, "{} ({}{paused})  {}", status.cluster, status.mode, status.at)?;
    if let Some(error) = &status.file.error {
        writeln!(out, "\nThe file is refused, what ran before goes on:")?;
        for line in error.lines() {
            writeln!(out, "  {line}")?;
        }
    }
    draw_tier(out, "GATEWAYS", &status.tiers.gateway)?;
    draw_tier(out, "BUSINESS", &status.tiers.business)?;
    let shards = &status.shards;
    writeln!(
        out,
        "\nSHARDS    {} of {} owned, {} moving, {} to move, map {}.{}",
        shards.owned, shards.total, shards.moving, shards.queued, shards.term, shards.number
    )?;
    if shards.hearing {
        writeln!(out, "  control is new and listens to the members first")?;
    }
    if shards.degraded {
        writeln!(out, "  over half of the members fell silent at once: nothing is taken from them for up to 15 s")?;
    }
    if let Some(proposal) = &shards.proposal {
        writeln!(out, "\nPROPOSED  approve with the annotation {APPROVE_ANNOTATION}: \"{}\"", proposal.hash)?;
        for sentence in &proposal.what {
            writeln!(out, "  {sentence}")?;
        }
    }
    let store = shards.store_away.as_ref().map(ToString::to_string);
    let prometheus = status.prometheus.as_ref().map(|outage| &outage.message);
    for problem in shards.stale_approval.iter().chain(&shards.waits).chain(&store).chain(prometheus) {
        writeln!(out, "  {problem}")?;
    }
    let nobody = || "nobody".to_owned();
    for moving in shards.moves.iter().take(8) {
        let (from, to) = (moving.from.clone().unwrap_or_else(nobody), moving.to.clone().unwrap_or_else(nobody));
        writeln!(out, "  {:>5}  {from} -> {to}  {}", moving.shard, moving.phase)?;
    }
    if shards.moving > 8 {
        writeln!(out, "  … and {} more", shards.moving - 8)?;
    }
    match status.watermark_lag_seconds {
        Some(lag) => writeln!(out, "\nLAG       {lag:.1} s")?,
        None => writeln!(out, "\nLAG       unknown")?,
    }
    writeln!(out, "NO MESSAGE LOST  {}: {}", status.no_message_lost.status, status.no_message_lost.reason)
}

fn draw_tier(out: &mut String, title: &str, tier: &TierStatus) -> std::fmt::Result {
    writeln!(
        out,
        "\n{title:<9} {} running, {} ready, {} desired ({} to {})",
        tier.replicas, tier.ready, tier.desired, tier.min, tier.max
    )?;
    for reason in &tier.because {
        writeln!(out, "  because {reason}")?;
    }
    for member in &tier.members {
        let pid = member.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        write!(out, "  {:<14} {:<9} pid {pid:<8}", member.name, member.state)?;
        if let Some(connections) = member.connections {
            write!(out, " {connections:>6} connections")?;
        }
        if let Some(shards) = member.shards {
            write!(out, " {shards:>5} shards")?;
        }
        if let Some((lowest, highest)) = member.epochs {
            write!(out, "  epochs {lowest}..{highest}")?;
        }
        writeln!(out, "  {:.0} msg/s  {:.2} cores", member.messages_per_second, member.cpu_cores)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::status::{MemberStatus, MoveStatus, Outage, StoreAway};

    #[test]
    fn the_table_says_who_how_many_and_why() {
        let mut status = Status { cluster: "chat".into(), mode: "Auto".into(), ..Status::default() };
        status.tiers.gateway = TierStatus {
            replicas: 2,
            ready: 1,
            desired: 3,
            min: 1,
            max: 4,
            because: vec!["Connections: 250 at 100 each".into()],
            limited: None,
            in_doubt: false,
            members: vec![MemberStatus {
                name: "gateway-0".into(),
                pid: Some(42),
                state: "ready".into(),
                connections: Some(250),
                ..MemberStatus::default()
            }],
        };
        status.shards.moving = 9;
        status.shards.moves =
            vec![MoveStatus { shard: 7, from: None, to: Some("business-1".into()), phase: "acquiring".into() }; 9];
        let away = StoreAway { members: vec!["business-0".into()], all: true };
        status.shards.store_away = Some(away);
        let message = "Prometheus did not answer within 3 s".to_owned();
        status.prometheus = Some(Outage { reason: "PrometheusUnreachable".into(), message });
        status.file.error = Some("spec.gateway.replicas: is 0".into());
        let table = table(&status);
        for expected in [
            "spec.gateway.replicas: is 0",
            "2 running, 1 ready, 3 desired (1 to 4)",
            "because Connections: 250 at 100 each",
            "pid 42",
            "250 connections",
            "7  nobody -> business-1  acquiring",
            "and 1 more",
            "the store does not answer business-0",
            "Prometheus did not answer within 3 s",
            "LAG       unknown",
        ] {
            assert!(table.contains(expected), "no `{expected}` in\n{table}");
        }
    }
}
