//! The HTTP front: connections, the proxy path, the node and admin planes, health and metrics.
//!
//! **Invariants.** Nothing here names the consensus library or its storage: the cluster is
//! known as [`crate::cluster::api::ControlPlane`] only. Request and response bodies pass
//! through as bytes. A client's departure drops everything done for it. No state is global:
//! listeners own a [`front::Shard`] each and share a [`front::Front`].
//!
//! Reading order: [`server`] (planes) → `accept` → `conn` and `head` (a connection's guard) →
//! `service` (one request) → `proxy` → `attempts` → `upstream` and `relay`.

mod accept;
mod admin;
mod allowed;
mod attempts;
mod auth;
mod body;
mod checks;
mod conn;
mod errors;
mod fetch;
mod front;
mod gauges;
mod head;
mod headers;
mod health;
mod metrics;
mod models;
mod nodes;
mod peek;
mod probe;
mod proxy;
mod queue;
mod register;
mod relay;
mod retry;
mod server;
mod service;
mod status;
#[cfg(test)]
mod tests;
mod upstream;

pub use accept::{FrontOptions, bind};
pub use allowed::{Allowed, Forbidden};
pub use auth::TokenDigests;
pub use body::BodyLimits;
pub use conn::ConnTimeouts;
pub use errors::{ApiError, Code};
pub use front::{Front, FrontConfig, NodeOptions, ProxyOptions, Shard};
pub use headers::HeaderRules;
pub use metrics::{Access, AccessOptions, Metrics, RecentErrors};
pub use probe::run_prober;
pub use queue::QueueOptions;
pub use register::keep_configured_workers;
pub use retry::RetryOptions;
pub use server::{serve_admin, serve_client};
pub use upstream::{Pool, PoolOptions};
