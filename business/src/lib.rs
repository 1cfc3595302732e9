//! Business: the owners of shards, and the stores they write to.
//!
//! [`core`] decides, without I/O; [`serve`] is the shell around it; [`store`] is what it writes to.

pub mod config;
pub mod core;
pub mod fail_points;
pub mod metrics;
pub mod serve;
pub mod store;
