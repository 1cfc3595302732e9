//! The controller and everything it decides with: pure decisions (`autoscale`, `shards`), one trait to the world
//! (`platform`), and thin shells around them (`control`, `up`, `console`).
//!
//! Architecture invariant: nothing in `autoscale`, `shards` and `control::tiers` does I/O or reads a clock.

pub mod autoscale;
pub mod console;
pub mod control;
pub mod controller;
pub mod leadership;
pub mod metrics;
pub mod platform;
pub mod shards;
pub mod up;
