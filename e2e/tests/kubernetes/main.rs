//! A real Kubernetes: people chat through the Service of an `ImCluster` that the operator runs, while it is scaled, edited,
//! upgraded, and while its pods, the operator's leader, Prometheus or the API server fail. Every message of every client is
//! checked: none lost, none twice, none out of order.
//!
//! `make e2e` brings up the cluster and runs this; without it (no `IM_E2E_SUITE` in the environment) each scenario says that it is
//! skipped. Scenarios run one at a time, each in a namespace of its own that enforces restricted Pod Security.

#[path = "../support/mod.rs"]
mod support;

mod dependencies;
mod environment;
mod operator;
mod processes;
mod proxy;
mod scene;
mod world;

mod faults;
mod input;
mod leadership;
mod prometheus;
mod random;
mod rollout;
mod scaling;
mod secrets;
