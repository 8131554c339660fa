//! The HTTP front: connections, the proxy path, the node and admin planes, health and metrics.
//!
//! **Invariants.** Nothing here names the consensus library or its storage: the cluster is
//! known as [`crate::cluster::api::ControlPlane`] only. Request and response bodies pass
//! through as bytes. A client's departure drops everything done for it. No state is global:
//! listeners own a [`front::Shard`] each and share a [`front::Front`].
//!
//! Reading order: `routes` (what there is) → [`server`] → `accept` → `conn` and `head` (a
//! connection's guard) → `service` (one request: its route, its credentials) → `proxy` →
//! `attempts` → `upstream` and `relay`, or `call` (what is answered here).

mod abandon;
mod accept;
mod admin;
mod allowed;
mod announced;
mod attempts;
mod auth;
mod awake;
mod body;
mod bootstrap;
mod call;
mod checks;
mod conn;
mod cors;
mod depth;
mod discovered;
mod edge;
mod errors;
mod explain;
mod fetch;
mod front;
mod gauges;
mod growth;
mod head;
mod headers;
mod health;
mod index;
mod keys;
mod knowledge;
mod ksana;
mod metrics;
mod models;
mod names;
mod nodes;
mod openapi;
mod passthrough;
mod peek;
mod placing;
mod probe;
mod proxy;
mod pump;
mod queue;
mod register;
mod relay;
mod reserving;
mod retry;
mod routes;
mod sequel;
mod server;
mod service;
mod status;
mod streams;
#[cfg(test)]
mod tests;
mod throttle;
mod upstream;
mod wishes;

pub use accept::{FrontOptions, bind};
pub use allowed::{Allowed, Forbidden, Resolve, Resolved, SystemResolver};
pub use auth::{NodeToken, TokenDigests};
pub use body::BodyLimits;
pub use conn::ConnTimeouts;
pub use cors::Origins;
pub use discovered::{Discovery, keep_discovered_workers};
pub use errors::{ApiError, Code, RateLimit};
pub use fetch::FetchError;
pub use front::{Front, FrontConfig, NodeOptions, PdOptions, ProxyOptions, Shard};
pub use gauges::ProcessGauges;
pub use headers::HeaderRules;
pub use keys::{ClientKey, KeyRing};
pub use ksana::KsanaOptions;
pub use metrics::{Access, AccessOptions, Metrics, RecentErrors};
pub use names::Names;
pub use peek::{Peek, peek, peek_around};
pub use probe::{ask_worker, post_to_worker, run_prober};
pub use queue::QueueOptions;
pub use register::{keep_configured_workers, register_found};
pub use retry::RetryOptions;
pub use routes::{Listener, Route};
pub use server::{serve_admin, serve_client};
pub use streams::{Generator, NoEngines, Places, StreamOptions, takes};
pub use throttle::Rate;
pub use upstream::{Pool, PoolOptions, WorkerTls};
