//! What the end-to-end tests and the load generator `imload` are made of. It knows the system under test only by its
//! public interfaces: MQTT, HTTP and `members.json`.

pub mod api;
pub mod audience;
pub mod client;
pub mod history;
pub mod machine;
pub mod view;
pub mod wire;
pub mod workload;
