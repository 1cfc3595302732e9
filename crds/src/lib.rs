//! The Kubernetes types of the system: [`ImCluster`], which a user writes, and [`ShardMap`], which the operator writes.
//!
//! The same YAML serves `kubectl apply` and `imcluster up FILE`. In the cluster the API server enforces the schema and
//! the CEL rules of the generated CRD; on one machine [`ImCluster::parse_yaml`] and [`ImCluster::validate`] enforce the
//! same rules with the same words (a test runs both over the same objects).
//!
//! Architecture invariant: nothing here depends on another crate of this project, and nothing here does I/O.

#![allow(clippy::duplicated_attributes, reason = "every printer column has a type_")]

mod cluster;
mod kubernetes;
mod parse;
mod shard_map;
mod status;
mod units;
mod validate;

pub use cluster::*;
pub use kubernetes::*;
pub use parse::{ParseError, Violation};
pub use shard_map::{MapError, MapShard, ShardMap, ShardMapSpec};
pub use status::*;
pub use units::{Empty, TimeSpan, TimeSpanError};
pub use validate::Place;

/// API group of every type here.
pub const GROUP: &str = "imcluster.dev";
/// API version of every type here.
pub const VERSION: &str = "v1alpha1";
/// Annotation of an ImCluster with the hash of the proposal that is to be carried out.
pub const APPROVE_ANNOTATION: &str = "imcluster.dev/approve";
