//! Who owns which shard, and how that changes. Pure: events and time in, actions out.
//!
//! - [`map`]: what is known of the store's fencing rows, merged by highest epoch.
//! - [`planner`]: which shards should move where, from measured loads; a plan is run by its content hash.
//! - [`moves`]: how one shard gets from one owner to the next, through every failure on the way.
//!
//! Architecture invariant: nothing here does I/O, reads a clock or draws a random number, and nothing here is needed for
//! safety. That at most one member writes a shard is the store's doing (compare-and-set on the fencing row); this module
//! only has to see to it that every shard ends up with a live owner.

pub mod map;
pub mod moves;
pub mod planner;

pub use map::{Ownership, Shard, ShardMap, Version};
pub use moves::{Action, Coordinator, Event, Snapshot, Timing};
pub use planner::{Approved, Committed, Move, Plan, PlanError, PlanInput, PlanMember, PlanShard, Proposed, plan};

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod steady;
