//! The operator's own HTTP port: is it alive, what does it wait for, what did it do.

use super::cluster_metrics::ClusterMetrics;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use tokio::sync::watch;

/// What an operator that is not ready waits for; empty = nothing.
pub type WaitsFor = watch::Receiver<String>;

/// How a reconcile ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// What kind of error.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Category {
    category: &'static str,
}

/// The controller's metrics. Copies count the same.
#[derive(Clone, Default)]
pub struct Metrics {
    reconciles: Family<Outcome, Counter>,
    errors: Family<Category, Counter>,
    /// ImClusters that this replica decides for.
    pub clusters: Gauge,
    /// How each of them is.
    pub statuses: ClusterMetrics,
}

impl Metrics {
    /// Exports them.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Looks at an ImCluster, by how they ended: done, waiting (on the user), refused, failed";
        registry.register("reconciles", help, self.reconciles.clone());
        registry.register("reconcile_errors", "What the Kubernetes API refused, by category", self.errors.clone());
        registry.register("clusters", "ImClusters that this replica decides for", self.clusters.clone());
        registry.register_collector(Box::new(self.statuses.clone()));
    }

    /// A reconcile ended.
    pub fn reconciled(&self, outcome: &'static str) {
        self.reconciles.get_or_create(&Outcome { outcome }).inc();
    }

    /// Something was refused.
    pub fn failed(&self, category: &'static str) {
        self.errors.get_or_create(&Category { category }).inc();
    }
}

/// `/healthz`, `/readyz` and `/metrics`.
pub fn router(registry: Registry, waits_for: WaitsFor) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz).with_state(waits_for))
        .route("/metrics", get(metrics).with_state(Arc::new(registry)))
}

async fn readyz(State(waits_for): State<WaitsFor>) -> Response {
    let waits_for = waits_for.borrow().clone();
    if waits_for.is_empty() {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("waits for {waits_for}\n")).into_response()
    }
}

async fn metrics(State(registry): State<Arc<Registry>>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
