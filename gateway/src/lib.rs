//! The gateway: client connections, MQTT, sessions, delivery, draining.
//!
//! `mqtt` is the wire, `session` the protocol state machine of one connection (sans-I/O), `hub` what all connections of a process share,
//! `connection` and `listen` the sockets, `auth` who clients are, `http` the JSON API, `member` the control stream.
//!
//! Invariant of this crate: nothing durable lives here. Whatever it loses by dying, owners and clients have.

pub mod auth;
pub mod config;
pub mod connection;
pub mod http;
pub mod hub;
pub mod listen;
pub mod member;
pub mod metrics;
pub mod mqtt;
pub mod run;
pub mod session;
