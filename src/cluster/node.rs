//! A replica's part in the cluster: puts storage, consensus, proposers, links and clocks
//! together, and answers for them as [`ControlPlane`].

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use openraft::SnapshotPolicy;
use openraft::async_runtime::watch::WatchReceiver;
use parking_lot::Mutex;
use rand::RngExt;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::api::ControlPlane;
use super::clock::{self, Rhythm};
use super::handle::Handle;
use super::hooks::{Board, CacheHooks, ControlHooks};
use super::identity::Identity;
use super::log_store::LogStore;
use super::machine::{Cell, Machine};
use super::membership;
use super::network::Network;
use super::peer::lane::Lane;
use super::peer::link::Links;
use super::peer::server::{Served, Service};
use super::place::LinkHost;
use super::proposer::{self, Batching, Driver, Proposer, Route};
use super::pulse::{self, Pulse};
use super::storage::checkpoint::CheckpointStore;
use super::storage::disk::RealDisk;
use super::storage::wal::{Wal, WalError, WalOptions};
use super::types::Raft;
use crate::ids::{Group, Incarnation, ReplicaId};
use crate::routing::book::Bookings;
use crate::state::cache::CacheState;
use crate::state::command::{CacheCommand, ControlCommand, ReplicaInfo};
use crate::state::control::ControlState;

/// Most bytes of segments gathered into one log entry, where log segments are large enough: an
/// entry of more than half a log segment is refused by the log, which ends the consensus.
const ENTRY_BYTES: u64 = 1 << 20;

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
            auto_promote: true,
            heartbeat: Duration::from_millis(50),
            election: (Duration::from_millis(150), Duration::from_millis(300)),
            propose_timeout: Duration::from_secs(3),
            batching: Batching::default(),
            rhythm: Rhythm::default(),
            checkpoint_log_bytes: 64 << 20,
            checkpoint_interval: Duration::from_secs(60),
            wal_segment_bytes: 16 << 20,
            digest_every: 256,
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
    pub(super) raft_runtime: tokio::runtime::Handle,
    /// Held while this process lives.
    _lock: std::fs::File,
}

/// A replica's part in the cluster. Dropping it without [`Cluster::shutdown`] is like a crash.
pub struct Cluster {
    inner: Arc<Inner>,
    runtime: Option<Runtime>,
}

impl Cluster {
    /// Takes the folder, starts the links on `listener`, and begins to form, join or resume.
    /// Returns at once; whether the replica has a place yet is in [`ControlPlane::status`].
    pub fn start(config: NodeConfig, listener: TcpListener) -> Result<Self, StartError> {
        let lock = lock_folder(&config.data_dir)?;
        let identity = Identity::open(&config.data_dir, &config.info.name, rand::rng().random())
            .map_err(|e| StartError::Damaged(e.to_string()))?;
        if let Some(why) = &identity.quarantined {
            return Err(StartError::Damaged(format!("this folder is quarantined: {why}")));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("raft")
            .enable_all()
            .build()?;
        let control = Proposer::new(config.batching);
        let cache: Proposer<CacheState> = Proposer::new(config.batching);
        let waker = cache.clone();
        let down = Arc::new(Mutex::new(None));
        let (data_dir, quarantine) = (config.data_dir.clone(), down.clone());
        let board = Arc::new(Board::new(move |why| {
            // Served from here on would be whatever this state says: better nothing at all.
            tracing::error!(%why, "this replica's state has diverged; stopping");
            *quarantine.lock() = Some(why.clone());
            if let Ok(mut identity) = Identity::open(&data_dir, "", 0) {
                identity.quarantined = Some(why);
                if let Err(error) = identity.write(&data_dir) {
                    tracing::error!(%error, "cannot write the quarantine down");
                }
            }
            std::process::exit(70);
        }));
        let inner = Arc::new(Inner {
            board,
            bookings: Bookings::new(move || waker.wake()),
            control,
            cache,
            pulse: Arc::default(),
            identity: Mutex::new(identity),
            member: OnceLock::new(),
            down,
            nudge: tokio::sync::Notify::new(),
            invited: Mutex::default(),
            stop: CancellationToken::new(),
            raft_runtime: runtime.handle().clone(),
            _lock: lock,
            config,
        });
        // A member's log is opened here, so that a damaged one is told to the caller.
        let known = inner.identity.lock().member();
        if let Some((cluster, id)) = known {
            runtime.block_on(inner.become_member(cluster, id))?;
        }
        listener.set_nonblocking(true)?;
        runtime.spawn(serve_links(inner.clone(), listener));
        runtime.spawn(inner.clone().find_a_place());
        Ok(Self { inner, runtime: Some(runtime) })
    }

    /// The interface for everybody else.
    pub fn control_plane(&self) -> Arc<dyn ControlPlane> {
        Arc::new(Handle { inner: self.inner.clone() })
    }

    /// The cache group's proposer, for measuring.
    pub fn cache_proposer(&self) -> Proposer<CacheState> {
        self.inner.cache.clone()
    }

    /// Waits until the consensus has stopped for good and says why; pending while all is well.
    pub async fn failed(&self) -> String {
        self.inner.watch_for_failure().await
    }

    /// Hands the leadership of both groups to others, if there is any to hand over and somebody
    /// to take it. Within about two seconds.
    pub async fn hand_over_leadership(&self) {
        let inner = self.inner.clone();
        let done = self.inner.raft_runtime.spawn(async move {
            let Some(member) = inner.member.get() else { return };
            for raft in &member.rafts {
                let reply = membership::transfer(raft, member.id, None).await;
                tracing::debug!(?reply, "leadership handed over");
            }
        });
        let _ = done.await;
    }

    /// Stops the groups and closes the log.
    pub async fn shutdown(mut self) {
        self.inner.stop.cancel();
        let inner = self.inner.clone();
        let stopped = self.inner.raft_runtime.spawn(async move {
            let Some(member) = inner.member.get() else { return };
            for raft in &member.rafts {
                if let Err(error) = raft.shutdown().await {
                    tracing::warn!(%error, "consensus did not stop cleanly");
                }
            }
        });
        let _ = stopped.await;
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.inner.stop.cancel();
        if let Some(runtime) = self.runtime.take() {
            // The ordinary drop would block, which an async caller must not.
            runtime.shutdown_background();
        }
    }
}

/// One process a folder: `LOCK` is held (flock) as long as the file is open.
fn lock_folder(dir: &std::path::Path) -> Result<std::fs::File, StartError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let lock = std::fs::File::create(dir.join("LOCK"))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(_) => Err(StartError::Damaged(format!(
            "{} is in use by another process; give each replica its own data folder",
            dir.display()
        ))),
    }
}

async fn serve_links(inner: Arc<Inner>, listener: TcpListener) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the peer listener does not work");
            return;
        }
    };
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let stop = inner.stop.clone();
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(2)))
        .add_service(Service::serve(Arc::new(LinkHost { inner })))
        .serve_with_incoming_shutdown(incoming, async move { stop.cancelled().await });
    if let Err(error) = served.await {
        tracing::error!(%error, "the peer links have stopped");
    }
}

impl Inner {
    /// Opens log and checkpoints and starts both groups.
    pub(super) async fn become_member(
        self: &Arc<Self>,
        cluster: u128,
        id: ReplicaId,
    ) -> Result<(), StartError> {
        let dir = self.config.data_dir.clone();
        let options = WalOptions {
            cluster,
            member: id.0,
            segment_bytes: self.config.wal_segment_bytes,
            max_entry_bytes: (self.config.wal_segment_bytes / 2).min(8 << 20) as usize,
            ..WalOptions::default()
        };
        let damaged = |error: WalError| match error {
            WalError::Io { source, file } => {
                StartError::Io(std::io::Error::new(source.kind(), format!("{}: {source}", file.display())))
            }
            other => StartError::Damaged(other.to_string()),
        };
        let (wal, found) = Wal::open(Arc::new(RealDisk), &dir.join("raft"), options).map_err(damaged)?;
        let wal = Arc::new(wal);
        let store = CheckpointStore::open(&dir.join("checkpoints"))
            .map_err(|e| StartError::Damaged(format!("checkpoints: {e}")))?;
        let store = Arc::new(store);
        let incarnation = wal.incarnation();

        let control_hooks = Arc::new(ControlHooks {
            me: id,
            proposer: self.control.clone(),
            board: self.board.clone(),
            cache: OnceLock::new(),
            // No version: the first thing applied is published even if there is no worker in it.
            seen: u64::MAX.into(),
        });
        let cache_hooks = Arc::new(CacheHooks {
            me: id,
            proposer: self.cache.clone(),
            control: self.control.clone(),
            board: self.board.clone(),
        });
        let every = self.config.digest_every;
        let control = Arc::new(Cell::new(control_hooks.clone(), id, incarnation, every));
        let cache = Arc::new(Cell::new(cache_hooks, id, incarnation, every));
        // Set once, here.
        let _ = control_hooks.cache.set(cache.clone());

        let mut machines = Vec::new();
        for group in Group::ALL {
            let cell: Arc<dyn super::machine::AnyCell> = match group {
                Group::Control => control.clone(),
                Group::Cache => cache.clone(),
            };
            let (machine, fell_back) = Machine::open(group, cell, store.clone(), wal.clone())
                .map_err(|why| StartError::Damaged(format!("{group} checkpoint: {why}")))?;
            if let Some(why) = fell_back {
                tracing::warn!(%group, %why, "newest checkpoint is damaged; took the one before");
            }
            let purged = found[group.index()].purged.as_ref().map_or(0, |(index, _)| *index);
            if machine.applied_index() < purged {
                return Err(StartError::Damaged(format!(
                    "{group}: the checkpoint ends at {} but the log begins after {purged}",
                    machine.applied_index()
                )));
            }
            machines.push(machine);
        }
        let Ok(machines): Result<[Machine; 2], _> = machines.try_into() else {
            return Err(StartError::Damaged("not two groups".to_owned()));
        };

        let links = Arc::new(Links::new(cluster, id));
        let mut rafts = Vec::new();
        for group in Group::ALL {
            let raft = Raft::new(
                id.0,
                Arc::new(self.raft_config(group)?),
                Network::new(group, links.clone()),
                LogStore::new(wal.clone(), group),
                machines[group.index()].clone(),
            )
            .await
            .map_err(|fatal| StartError::Damaged(format!("{group}: {fatal}")))?;
            rafts.push(raft);
        }
        let Ok(rafts): Result<[Raft; 2], _> = rafts.try_into() else {
            return Err(StartError::Damaged("not two groups".to_owned()));
        };
        self.start_tasks(cluster, id, incarnation, rafts, machines, control, cache, wal, links);
        Ok(())
    }

    fn raft_config(&self, group: Group) -> Result<openraft::Config, StartError> {
        let millis = |d: Duration| d.as_millis() as u64;
        openraft::Config {
            cluster_name: group.name().to_owned(),
            heartbeat_interval: millis(self.config.heartbeat),
            election_timeout_min: millis(self.config.election.0),
            election_timeout_max: millis(self.config.election.1),
            enable_pre_vote: Some(true),
            // A leader's entries go to the followers while its own disk is still at it. One that
            // is killed and goes on in the same term could give an index to another entry of
            // that term, which nobody would notice; and it does not know what it has committed,
            // so its reads would be of the past. It must stand for election like everybody else.
            enable_leader_restore: Some(false),
            // Our own trigger counts bytes; openraft's counts entries, which may be of any size.
            snapshot_policy: SnapshotPolicy::Never,
            // Purged by us, up to the checkpoint before the newest.
            max_in_snapshot_log_to_keep: u64::MAX,
            purge_batch_size: 256,
            replication_lag_threshold: 8000,
            max_payload_entries: 256,
            install_snapshot_timeout: 30_000,
            ..openraft::Config::default()
        }
        .validate()
        .map_err(|e| StartError::Damaged(format!("raft configuration: {e}")))
    }

    #[allow(clippy::too_many_arguments)]
    fn start_tasks(
        self: &Arc<Self>,
        cluster: u128,
        id: ReplicaId,
        incarnation: Incarnation,
        rafts: [Raft; 2],
        machines: [Machine; 2],
        control: Arc<Cell<ControlState>>,
        cache: Arc<Cell<CacheState>>,
        wal: Arc<Wal>,
        links: Arc<Links>,
    ) {
        let mut intakes = Vec::new();
        let mut routes = Vec::new();
        for group in Group::ALL {
            let raft = &rafts[group.index()];
            let (tx, rx) = mpsc::channel(proposer::INTAKE);
            let entry_bytes = (self.config.wal_segment_bytes / 4).min(ENTRY_BYTES) as usize;
            tokio::spawn(proposer::intake(raft.clone(), rx, entry_bytes));
            intakes.push(tx);
            let (tx, rx) = watch::channel(Route::Nowhere);
            tokio::spawn(follow_leader(raft.clone(), id, links.clone(), tx));
            routes.push(rx);
        }
        let (control_route, cache_route) = (routes[0].clone(), routes[1].clone());
        let [control_intake, cache_intake]: [mpsc::Sender<_>; 2] = [intakes[0].clone(), intakes[1].clone()];

        // The first thing said in this life, before anything that was queued while there was no
        // cluster could be: so it goes through `fill`, which comes with the first segment.
        let announce = OnceLock::new();
        let info = self.config.info.clone();
        let up = move || match announce.set(()) {
            Ok(()) => vec![ControlCommand::ReplicaUp { id, incarnation, info: info.clone() }],
            Err(()) => Vec::new(),
        };
        tokio::spawn(proposer::run(Driver {
            proposer: self.control.clone(),
            group: Group::Control,
            me: id,
            incarnation,
            route: control_route.clone(),
            intake: control_intake.clone(),
            fill: Box::new(up),
        }));
        let (bookings, board) = (self.bookings.clone(), self.board.clone());
        let announced = OnceLock::new();
        let fill = move || {
            let mut commands = Vec::new();
            if announced.set(()).is_ok() {
                commands.push(CacheCommand::ReplicaUp { id, incarnation });
            }
            if board.lease_lost.swap(false, std::sync::atomic::Ordering::AcqRel) {
                tracing::warn!("the cluster had released this replica's bookings; saying them again");
                commands.push(CacheCommand::ReplaceLoads(bookings.restate(&board.lives.lock())));
                return commands;
            }
            let deltas = bookings.drain();
            if !deltas.is_empty() {
                commands.push(CacheCommand::Loads(deltas));
            }
            commands
        };
        tokio::spawn(proposer::run(Driver {
            proposer: self.cache.clone(),
            group: Group::Cache,
            me: id,
            incarnation,
            route: cache_route.clone(),
            intake: cache_intake.clone(),
            fill: Box::new(fill),
        }));
        tokio::spawn(clock::run_control(rafts[0].clone(), self.config.rhythm));
        tokio::spawn(clock::run_cache(rafts[1].clone(), cache.clone(), self.config.rhythm));
        let timeout_ms = self.config.rhythm.worker_timeout.as_millis() as u64;
        tokio::spawn(pulse::run(self.pulse.clone(), control.clone(), self.control.clone(), timeout_ms));
        for group in Group::ALL {
            let raft = rafts[group.index()].clone();
            let (wal, machine) = (wal.clone(), machines[group.index()].clone());
            let (bytes, interval) = (self.config.checkpoint_log_bytes, self.config.checkpoint_interval);
            tokio::spawn(checkpoint_when_due(raft, wal, machine, group, bytes, interval));
        }
        let served = Arc::new(Served {
            cluster,
            me: id,
            rafts: rafts.clone(),
            intakes: [control_intake, cache_intake],
            heard: Default::default(),
        });
        let member = Member {
            id,
            cluster,
            incarnation,
            rafts,
            machines,
            control,
            cache,
            wal,
            served,
            routes: [control_route, cache_route],
        };
        if self.member.set(Arc::new(member)).is_err() {
            tracing::error!("became a member twice");
        }
    }
}

/// Keeps the proposers' route to the leader; ends when nobody wants to know or the group stops.
async fn follow_leader(raft: Raft, me: ReplicaId, links: Arc<Links>, route: watch::Sender<Route>) {
    let mut metrics = raft.server_metrics();
    let mut last = None;
    loop {
        let (leader, node) = {
            let now = metrics.borrow_watched();
            let node =
                now.current_leader.and_then(|id| now.membership_config.membership().get_node(&id).cloned());
            (now.current_leader.map(ReplicaId), node)
        };
        let key = (leader, node.as_ref().map(|n| n.peer.clone()));
        if last.as_ref() != Some(&key) {
            let next = match (leader, node) {
                (Some(id), _) if id == me => Route::Here,
                (Some(id), Some(node)) => match links.to(id, &node.peer) {
                    Ok(link) => Route::Peer(Arc::new(Lane::new(link))),
                    Err(why) => {
                        tracing::error!(%why, "the leader's address is no address");
                        Route::Nowhere
                    }
                },
                _ => Route::Nowhere,
            };
            if route.send(next).is_err() {
                return;
            }
            last = Some(key);
        }
        if metrics.changed().await.is_err() {
            return;
        }
    }
}

/// Has a checkpoint made when the log has grown or time has passed; ends with the group.
async fn checkpoint_when_due(
    raft: Raft,
    wal: Arc<Wal>,
    machine: Machine,
    group: Group,
    log_bytes: u64,
    interval: Duration,
) {
    let mut last = tokio::time::Instant::now();
    let mut bytes_then = wal.bytes(group);
    let mut purged = 0;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let purgeable = machine.purgeable();
        if purgeable > purged {
            purged = purgeable;
            if raft.trigger().purge_log(purgeable).await.is_err() {
                return;
            }
        }
        let snapshot = raft.metrics().borrow_watched().snapshot.map_or(0, |id| id.index);
        let grown = wal.bytes(group) >= bytes_then + log_bytes;
        let due = last.elapsed() >= interval && machine.applied_index() > snapshot;
        if grown || due {
            last = tokio::time::Instant::now();
            bytes_then = wal.bytes(group);
            if raft.trigger().snapshot().await.is_err() {
                return;
            }
        } else {
            bytes_then = bytes_then.min(wal.bytes(group));
        }
    }
}
