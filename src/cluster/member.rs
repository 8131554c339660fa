//! Becoming a member: opens log and checkpoints, starts both groups and the tasks around them.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use openraft::SnapshotPolicy;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use super::clock;
use super::hooks::{Board, CacheHooks, ControlHooks};
use super::inner::{Inner, Member, StartError};
use super::log_store::LogStore;
use super::machine::{AnyCell, Cell, Machine, Raft};
use super::network::Network;
use super::pacemaker::{self, Heard};
use super::peer::lane::Lane;
use super::peer::link::Links;
use super::peer::server::Served;
use super::proposer::{self, Driver, Proposer, Route};
use super::pulse;
use super::read_index::ReadIndex;
use super::stats::GroupCounters;
use super::storage::checkpoint::CheckpointStore;
use super::storage::disk::RealDisk;
use super::storage::wal::{Wal, WalError, WalOptions};
use crate::ids::{Group, Incarnation, ReplicaId};
use crate::routing::recent::TURN;
use crate::state::cache::CacheState;
use crate::state::command::{CacheCommand, ControlCommand};
use crate::state::control::ControlState;

/// Most bytes of segments gathered into one log entry, where log segments are large enough: an
/// entry of more than half a log segment is refused by the log, which ends the consensus.
const ENTRY_BYTES: u64 = 1 << 20;

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
            let cell: Arc<dyn AnyCell> = match group {
                Group::Control => control.clone(),
                Group::Cache => cache.clone(),
            };
            let counters = self.counters(group).clone();
            let (machine, fell_back) = Machine::open(group, cell, store.clone(), wal.clone(), counters)
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

        let links = Arc::new(Links::new(self.dialer.clone(), cluster, id));
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
            // that term, which log matching cannot see; and it does not know what it has
            // committed, so its reads would be of the past. It stands for election like
            // everybody else. Found by the digests, when all replicas were killed under writes.
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
            tokio::spawn(follow_leader(raft.clone(), id, links.clone(), tx, self.counters(group).clone()));
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
            has_peers: has_peers(rafts[0].clone()),
        }));
        let (bookings, board) = (self.bookings.clone(), self.board.clone());
        let announced = OnceLock::new();
        let fill = move || {
            let mut commands = Vec::new();
            if announced.set(()).is_ok() {
                commands.push(CacheCommand::ReplicaUp { id, incarnation });
            }
            let in_doubt = bookings.take_doubt();
            let lease_lost = board.lease_lost.swap(false, std::sync::atomic::Ordering::AcqRel);
            if lease_lost {
                tracing::warn!("the cluster had released this replica's bookings; saying them again");
            }
            if lease_lost || in_doubt {
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
            has_peers: has_peers(rafts[1].clone()),
        }));
        tokio::spawn(clock::run_control(rafts[0].clone(), self.config.rhythm));
        tokio::spawn(clock::run_cache(
            rafts[1].clone(),
            cache.clone(),
            self.config.rhythm,
            self.config.index,
            self.cache.clone(),
        ));
        let timeout = self.config.rhythm.worker_timeout;
        tokio::spawn(pulse::run(self.pulse.clone(), control.clone(), self.control.clone(), timeout));
        if let Some(watch) = self.config.ksana {
            let (raft, proposer) = (rafts[0].clone(), self.control.clone());
            tokio::spawn(pulse::watch_ksana(watch, raft, control.clone(), proposer));
        }
        let peers = has_peers(rafts[1].clone());
        tokio::spawn(turns(Arc::downgrade(&self.board), self.cache.clone(), peers));
        for group in Group::ALL {
            let raft = rafts[group.index()].clone();
            let (wal, machine) = (wal.clone(), machines[group.index()].clone());
            let (bytes, interval) = (self.config.checkpoint_log_bytes, self.config.checkpoint_interval);
            tokio::spawn(checkpoint_when_due(raft, wal, machine, group, bytes, interval));
        }
        let heard = Heard::default();
        tokio::spawn(pacemaker::run(rafts.clone(), heard.clone(), self.config.heartbeat));
        let served = Arc::new(Served {
            cluster,
            me: id,
            rafts: rafts.clone(),
            intakes: [control_intake, cache_intake],
            heard,
            reads: ReadIndex::new(id, links),
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

/// Whether a group has members beside this one.
fn has_peers(raft: Raft) -> Box<dyn Fn() -> bool + Send + Sync> {
    let metrics = raft.server_metrics();
    Box::new(move || metrics.borrow_watched().membership_config.membership().nodes().count() > 1)
}

/// Lets what was just sent be forgotten in time, and tells the others what still waits; ends with the
/// replica.
async fn turns(
    board: Weak<Board>,
    cache: Proposer<CacheState>,
    has_peers: Box<dyn Fn() -> bool + Send + Sync>,
) {
    let mut rhythm = tokio::time::interval(TURN);
    rhythm.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rhythm.tick().await;
        let Some(board) = board.upgrade() else { return };
        // Many long prompts that wait for long take some milliseconds.
        let Ok(keys) = tokio::task::spawn_blocking(move || board.blocks.recent.turn()).await else { return };
        if !keys.is_empty() && has_peers() {
            // No room: they have more to do than to know this.
            let _ = cache.tell(&[CacheCommand::Waiting { keys }]);
        }
    }
}

/// Keeps the proposers' route to the leader; ends when nobody wants to know or the group stops.
async fn follow_leader(
    raft: Raft,
    me: ReplicaId,
    links: Arc<Links>,
    route: watch::Sender<Route>,
    counters: Arc<GroupCounters>,
) {
    let mut metrics = raft.server_metrics();
    let mut last: Option<(Option<ReplicaId>, _)> = None;
    loop {
        let (leader, node) = {
            let now = metrics.borrow_watched();
            let node =
                now.current_leader.and_then(|id| now.membership_config.membership().get_node(&id).cloned());
            (now.current_leader.map(ReplicaId), node)
        };
        let key = (leader, node.as_ref().map(|n| n.peer.clone()));
        if last.as_ref() != Some(&key) {
            let before = last.as_ref().and_then(|(leader, _)| *leader);
            if leader.is_some() && leader != before {
                counters.leader_changed();
            }
            let next = match (leader, node) {
                (Some(id), _) if id == me => Route::Here,
                (Some(id), Some(node)) => match links.to(id, &node) {
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
