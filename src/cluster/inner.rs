//! What a node is made of: its configuration, what it keeps, and its running groups. Filled in
//! by [`super::node`] and [`super::member`], used by everything that acts for the node.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::clock::Rhythm;
use super::hooks::Board;
use super::identity::Identity;
use super::machine::{Cell, Machine, Raft};
use super::peer::dial::Dialer;
use super::peer::server::Served;
use super::proposer::{Batching, Proposer, Route};
use super::pulse::{KsanaWatch, Pulse};
use super::stats::GroupCounters;
use super::storage::wal::Wal;
use crate::ids::{Group, Incarnation, ReplicaId};
use crate::kv::index::Options;
use crate::routing::book::Bookings;
use crate::state::cache::CacheState;
use crate::state::command::ReplicaInfo;
use crate::state::control::ControlState;
use crate::tls::peer::PeerTls;

/// How a replica takes part.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Name and addresses, as others shall know them; `info.peer` is where they reach its links.
    pub info: ReplicaInfo,
    /// Folder for identity, log and checkpoints.
    pub data_dir: PathBuf,
    /// First members by name, this one included; empty for a cluster of one.
    pub peers: BTreeMap<String, String>,
    /// Peer addresses of an existing cluster to join.
    pub join: Vec<String>,
    /// Certificates for the links; without, they are in plain text and anybody's.
    pub tls: Option<Arc<PeerTls>>,
    /// What else is served on the peer listener, and what drives connections that are for streams.
    pub services: Option<(tonic::service::Routes, Handle)>,
    /// Become a voter as soon as caught up.
    pub auto_promote: bool,
    /// Raft heartbeat.
    pub heartbeat: Duration,
    /// Shortest and longest election timeout.
    pub election: (Duration, Duration),
    /// How long a proposal may wait for a quorum.
    pub propose_timeout: Duration,
    /// The proposers' batching.
    pub batching: Batching,
    /// The leaders' clocks.
    pub rhythm: Rhythm,
    /// Checkpoint a group when its log is larger than this.
    pub checkpoint_log_bytes: u64,
    /// Checkpoint a group at least this often, if anything was applied.
    pub checkpoint_interval: Duration,
    /// Size of a log segment.
    pub wal_segment_bytes: u64,
    /// Compare digests every this many log indexes.
    pub digest_every: u64,
    /// What the prefix index of all replicas may take, when this one leads.
    pub index: Options,
    /// How KsanaLLM's nodes go offline when this one leads; nobody looks after them without.
    pub ksana: Option<KsanaWatch>,
}

impl NodeConfig {
    /// The defaults, for a replica of this name in this folder.
    pub fn new(name: &str, data_dir: PathBuf) -> Self {
        Self {
            info: ReplicaInfo {
                name: name.to_owned(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                ..ReplicaInfo::default()
            },
            data_dir,
            peers: BTreeMap::new(),
            join: Vec::new(),
            tls: None,
            services: None,
            auto_promote: true,
            heartbeat: Duration::from_millis(125),
            election: (Duration::from_millis(150), Duration::from_millis(300)),
            propose_timeout: Duration::from_secs(3),
            batching: Batching::default(),
            rhythm: Rhythm::default(),
            checkpoint_log_bytes: 64 << 20,
            checkpoint_interval: Duration::from_secs(60),
            wal_segment_bytes: 16 << 20,
            digest_every: 256,
            index: Options::default(),
            ksana: None,
        }
    }
}

/// Why a replica could not take part.
#[derive(thiserror::Error, Debug)]
pub enum StartError {
    /// The folder is damaged, or belongs to somebody else. The replica may serve traffic, but
    /// takes no part; `everline member repair` sets the folder aside.
    #[error("{0}")]
    Damaged(String),
    /// The machine did not give what is needed; trying again may help.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// The running groups.
pub(super) struct Member {
    pub(super) id: ReplicaId,
    pub(super) cluster: u128,
    pub(super) incarnation: Incarnation,
    pub(super) rafts: [Raft; 2],
    pub(super) machines: [Machine; 2],
    pub(super) control: Arc<Cell<ControlState>>,
    pub(super) cache: Arc<Cell<CacheState>>,
    pub(super) wal: Arc<Wal>,
    pub(super) served: Arc<Served>,
    /// Where each group's leader is.
    pub(super) routes: [watch::Receiver<Route>; 2],
}

pub(super) struct Inner {
    pub(super) config: NodeConfig,
    /// How this replica connects to others.
    pub(super) dialer: Dialer,
    pub(super) board: Arc<Board>,
    pub(super) bookings: Bookings,
    pub(super) control: Proposer<ControlState>,
    pub(super) cache: Proposer<CacheState>,
    pub(super) pulse: Arc<Pulse>,
    pub(super) identity: Mutex<Identity>,
    pub(super) member: OnceLock<Arc<Member>>,
    pub(super) down: Arc<Mutex<Option<String>>>,
    /// Wakes the formation: somebody formed a cluster with us, or invited us.
    pub(super) nudge: tokio::sync::Notify,
    pub(super) invited: Mutex<Vec<String>>,
    pub(super) stop: CancellationToken,
    pub(super) raft_runtime: Handle,
    /// It has applied all that was committed when it asked for that, once in this life.
    pub(super) caught_up: AtomicBool,
    pub(super) started: Instant,
    /// Held while this process lives.
    pub(super) _lock: std::fs::File,
}

impl Inner {
    /// What is counted of a group.
    pub(super) fn counters(&self, group: Group) -> &Arc<GroupCounters> {
        match group {
            Group::Control => self.control.counters(),
            Group::Cache => self.cache.counters(),
        }
    }
}
