//! The shim: a proxy beside a client that gives it streams which outlive replicas, over the public
//! protocol, while the client knows nothing of it.
//!
//! [`resume`] cuts bodies into events and knows where to go on; `request` says which requests are
//! resumed and what the others that a stream takes look like; both are pure. `upstream` connects,
//! `stream` brings one stream to its end, `forward` passes everything else on, `server` listens.
//! Nothing is kept but what is on its way: a shim that dies takes its streams with it, so it runs
//! where its client runs.

mod forward;
mod request;
mod resume;
mod server;
mod stream;
#[cfg(test)]
mod tests;
mod upstream;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::server::run;
use self::upstream::Upstream;
pub use self::upstream::{Address, AddressError};

/// What a shim is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Addresses of the cluster, tried in turn; at least one.
    pub upstreams: Vec<Address>,
    /// TLS towards `https` addresses.
    pub tls: rustls::ClientConfig,
    /// How long a stream may make no progress while nobody can be reached: 30 s.
    pub retry_budget: Duration,
    /// How long connecting is tried again for requests of which nothing was sent: 5 s.
    pub connect_budget: Duration,
    /// A stream's connection that is silent for this long is dead: 8.75 s, 1.75 of the heartbeats
    /// that the cluster sends.
    pub stall_timeout: Duration,
    /// Longest time to connect, TLS included: 2 s.
    pub connect_timeout: Duration,
    /// From sending a request to the head of its answer: 10 min, as replicas wait for engines.
    pub head_timeout: Duration,
    /// From asking for the rest of a stream to the head of the answer: 5 s.
    pub resume_head_timeout: Duration,
    /// Longest pause inside a body, of the client's or of an upstream's that is no stream; and
    /// how long a client may take nothing: 5 min.
    pub idle_timeout: Duration,
    /// Longest time to the end of a request's head, from the answer before it: 60 s, longer than
    /// clients keep idle connections.
    pub request_head_timeout: Duration,
    /// Largest body of a request whose stream would be resumed, which is kept to be sent again:
    /// 32 MiB, as replicas take.
    pub max_body: usize,
    /// Largest request head: 64 KiB.
    pub max_head: usize,
    /// Most connections at once; further ones wait in the kernel's backlog: 1,024.
    pub max_connections: usize,
    /// How long what is in flight may take to end when the shim is stopped: 30 s.
    pub drain_timeout: Duration,
}

impl Settings {
    /// The defaults, for these addresses.
    pub fn new(upstreams: Vec<Address>, tls: rustls::ClientConfig) -> Self {
        Self {
            upstreams,
            tls,
            retry_budget: Duration::from_secs(30),
            connect_budget: Duration::from_secs(5),
            stall_timeout: Duration::from_millis(8750),
            connect_timeout: Duration::from_secs(2),
            head_timeout: Duration::from_secs(600),
            resume_head_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(300),
            request_head_timeout: Duration::from_secs(60),
            max_body: 32 << 20,
            max_head: 64 << 10,
            max_connections: 1024,
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    upstream: Upstream,
    /// Whose turn it is: the address that answered last.
    turn: AtomicUsize,
    /// Cancelled when what is still in flight is cut off.
    cut: CancellationToken,
    /// Connections, streams and cancellations on their way.
    tasks: TaskTracker,
}

impl Shared {
    fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            upstream: Upstream::new(&settings),
            settings,
            turn: AtomicUsize::new(0),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }
}
