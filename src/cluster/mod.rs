//! The cluster: Raft, its storage and its peer links. The only module that names openraft or
//! sled.
//!
//! Entry point: [`node::Cluster::start`]. Everybody else knows the cluster by [`api::ControlPlane`].

mod apart;
pub mod api;
pub mod clock;
#[cfg(test)]
mod conformance;
pub mod down;
pub mod formation;
mod handle;
pub mod hooks;
pub mod identity;
pub mod inner;
pub mod log_store;
pub mod machine;
mod member;
pub mod membership;
pub mod network;
pub mod node;
pub mod pacemaker;
pub mod peer;
mod place;
pub mod proposer;
pub mod pulse;
pub mod read_index;
pub mod solo;
pub mod stats;
pub mod storage;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
pub mod types;
