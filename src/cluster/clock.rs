//! The leader's clock: committed ticks by which leases and timeouts are measured, the same on
//! every replica. A follower's copy of this task does nothing but look whether it leads.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use openraft::Instant as _;
use openraft::async_runtime::watch::WatchReceiver;

use super::machine::Cell;
use super::machine::Raft;
use super::proposer::Proposer;
use super::types::Proposal;
use crate::codec;
use crate::ids::ReplicaId;
use crate::kv::index::Options;
use crate::state::cache::CacheState;
use crate::state::command::{CacheCommand, ControlCommand};

/// How often time is told.
#[derive(Clone, Copy, Debug)]
pub struct Rhythm {
    /// In the control group; a tenth of the worker timeout where that is less.
    pub control: Duration,
    /// In the cache group while anything is booked.
    pub cache_busy: Duration,
    /// In the cache group otherwise.
    pub cache_idle: Duration,
    /// Life of a replica's lease.
    pub lease: Duration,
    /// See [`ControlCommand::Tick`].
    pub worker_timeout: Duration,
}

impl Default for Rhythm {
    fn default() -> Self {
        Self {
            control: Duration::from_millis(500),
            cache_busy: Duration::from_millis(100),
            cache_idle: Duration::from_millis(1000),
            lease: Duration::from_millis(750),
            worker_timeout: Duration::from_millis(5000),
        }
    }
}

fn ms(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Time since the last tick of the same leadership, at most twice the period: when the leader
/// itself stood still, nobody else was late.
struct Stopwatch {
    last: Option<(u64, Instant)>,
}

impl Stopwatch {
    fn lap(&mut self, term: u64, period: Duration) -> Duration {
        let now = Instant::now();
        let elapsed = match self.last {
            Some((last_term, last)) if last_term == term => (now - last).min(period * 2),
            _ => Duration::ZERO,
        };
        self.last = Some((term, now));
        elapsed
    }
}

/// An acknowledgement this fresh counts as heard in a tick: three heartbeats at the default. The
/// lease runs from the last tick that heard the replica, so the two add up.
const FRESH: Duration = Duration::from_millis(400);

/// Replicas that have acknowledged this leader just now, itself included.
fn heard(raft: &Raft) -> (u64, BTreeSet<ReplicaId>) {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    let mut heard = BTreeSet::from([ReplicaId(metrics.id)]);
    for (id, at) in metrics.heartbeat.iter().flatten() {
        if at.as_ref().is_some_and(|at| at.elapsed() < FRESH) {
            heard.insert(ReplicaId(*id));
        }
    }
    (metrics.current_term, heard)
}

async fn tick(raft: &Raft, command: Vec<u8>) -> bool {
    let proposal = Proposal { segments: Vec::new(), clock: Some(Bytes::from(command)) };
    raft.client_write_ff(proposal, None).await.is_ok()
}

/// Returns when this replica leads, at once if it does already; false when the group has stopped.
async fn leads(raft: &Raft) -> bool {
    let mut metrics = raft.server_metrics();
    while !raft.is_leader() {
        if metrics.changed().await.is_err() {
            return false;
        }
    }
    true
}

/// Tells the control group the time, while this replica leads it; ends with the group.
pub async fn run_control(raft: Raft, rhythm: Rhythm) {
    let period = rhythm.control.min(rhythm.worker_timeout / 10).max(Duration::from_millis(10));
    let mut watch = Stopwatch { last: None };
    while leads(&raft).await {
        let (term, replicas) = heard(&raft);
        let command = ControlCommand::Tick {
            elapsed_ms: ms(watch.lap(term, period)),
            replicas: replicas.into_iter().collect(),
            worker_timeout_ms: ms(rhythm.worker_timeout),
            lease_ms: ms(rhythm.lease),
        };
        if !tick(&raft, codec::encode(&command)).await {
            return;
        }
        tokio::time::sleep(period).await;
    }
}

/// For how many of the busy clock's periods the index's bound must have differed from the leader's
/// until it is set: a leadership that lasts, not one in passing.
const DIFFERED_FOR: u32 = 10;

/// Tells the cache group the time and the bound of the prefix index, while this replica leads it;
/// ends with the group.
pub async fn run_cache(
    raft: Raft,
    cell: Arc<Cell<CacheState>>,
    rhythm: Rhythm,
    index: Options,
    proposer: Proposer<CacheState>,
) {
    let mut differs = 0;
    let mut watch = Stopwatch { last: None };
    let mut idle_for = Duration::ZERO;
    while leads(&raft).await {
        tokio::time::sleep(rhythm.cache_busy).await;
        let same = cell.read(|state| state.index().options().bytes == index.limit());
        differs = if same || !raft.is_leader() { 0 } else { differs + 1 };
        if differs == DIFFERED_FOR {
            differs = 0;
            tracing::info!(bytes = index.limit(), "bounding the prefix index of all replicas");
            // Without room it is said again.
            let _ = proposer.submit(&[CacheCommand::BoundIndex { bytes: index.bytes }]);
        }
        idle_for += rhythm.cache_busy;
        let busy = cell.read(CacheState::holds_anything);
        if !busy && idle_for < rhythm.cache_idle {
            continue;
        }
        idle_for = Duration::ZERO;
        let (term, replicas) = heard(&raft);
        let command = CacheCommand::Tick {
            elapsed_ms: ms(watch.lap(term, rhythm.cache_idle)),
            replicas: replicas.into_iter().collect(),
            lease_ms: ms(rhythm.lease),
        };
        if !tick(&raft, codec::encode(&command)).await {
            return;
        }
    }
}
