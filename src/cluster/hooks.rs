//! What happens around the two states when they change: proposers get their answers, readers
//! their views, and a replica learns what the cluster thinks of it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::machine::{Cell, Hooks};
use super::proposer::Proposer;
use crate::ids::{Group, ReplicaId, StreamId, WorkerIx};
use crate::kv::types::RankIx;
use crate::routing::blocks::Blocks;
use crate::routing::groups::Groups;
use crate::routing::view::{NOT_SCORED, RegistryView, WorkerLive, WorkerView};
use crate::state::cache::CacheState;
use crate::state::command::{CacheOutcome, ControlCommand, ControlOutcome};
use crate::state::control::ControlState;
use crate::state::ranks::{Knowledge, Ranks};

/// What readers read, and what connects the groups.
pub struct Board {
    /// The registry, replaced when it changes.
    pub registry: ArcSwap<RegistryView>,
    /// KsanaLLM's groups, replaced when they change.
    pub groups: ArcSwap<Groups>,
    /// Who has which blocks.
    pub blocks: Blocks,
    /// The ranks, as of the last time that one came, went, changed hands or became whole; their
    /// cursors may be older.
    pub ranks: watch::Sender<Arc<Ranks>>,
    /// Load and health of every worker that is registered or still booked on.
    pub lives: Mutex<HashMap<WorkerIx, Arc<WorkerLive>>>,
    /// Set when the cluster has released what this replica holds.
    pub lease_lost: AtomicBool,
    /// Told of streams that are taken over.
    pub stream_moved: OnceLock<Box<dyn Fn(StreamId, u32) + Send + Sync>>,
    /// Called with the reason when this replica's state differs from the majority's.
    pub diverged: Box<dyn Fn(String) + Send + Sync>,
}

impl Board {
    /// An empty board.
    pub fn new(diverged: impl Fn(String) + Send + Sync + 'static) -> Self {
        Self {
            registry: ArcSwap::default(),
            groups: ArcSwap::default(),
            blocks: Blocks::default(),
            ranks: watch::Sender::default(),
            lives: Mutex::default(),
            lease_lost: AtomicBool::new(false),
            stream_moved: OnceLock::new(),
            diverged: Box::new(diverged),
        }
    }
}

impl Board {
    fn publish_ranks(&self, state: &CacheState) {
        self.blocks.set_index(state.index());
        let ranks = Arc::new(state.ranks().clone());
        let lives = self.lives.lock();
        for (worker, live) in lives.iter() {
            live.set_ranks(scored(&ranks, *worker));
            live.set_reckoned(is_reckoned(&ranks, *worker));
        }
        self.ranks.send_replace(ranks);
    }
}

fn is_reckoned(ranks: &Ranks, worker: WorkerIx) -> bool {
    ranks.of(worker).any(|(_, record)| record.knowledge == Knowledge::Predicted)
}

/// The names by which a worker's ranks are looked up; [`NOT_SCORED`] for one whose blocks are
/// known only in part.
fn scored(ranks: &Ranks, worker: WorkerIx) -> Vec<RankIx> {
    let mut names = Vec::new();
    for (key, record) in ranks.of(worker) {
        names.resize(key.rank as usize, NOT_SCORED);
        names.push(if record.cursor.recovering() { NOT_SCORED } else { record.ix });
    }
    names
}

fn report_digest(proposer: &Proposer<ControlState>, me: ReplicaId, group: Group, index: u64, digest: u64) {
    tracing::debug!(%group, index, digest = format!("{digest:016x}"), "digest");
    // A report that finds the queue full is not worth waiting for; the next will do.
    let _ = proposer.submit(&[ControlCommand::Digest { id: me, group, index, digest }]);
}

/// Around the control state.
pub struct ControlHooks {
    /// This replica.
    pub me: ReplicaId,
    /// The group's proposer.
    pub proposer: Proposer<ControlState>,
    /// See [`Board`].
    pub board: Arc<Board>,
    /// The other group's state, for the loads of workers that appear.
    pub cache: OnceLock<Arc<Cell<CacheState>>>,
    /// Registry version last published.
    pub seen: AtomicU64,
}

impl ControlHooks {
    fn publish_groups(&self, state: &ControlState) {
        if self.board.groups.load().are_of(state.ksana()) {
            return;
        }
        let mut fresh = Vec::new();
        let groups = {
            let mut lives = self.board.lives.lock();
            Groups::of(state.ksana(), |ix| {
                let made = || {
                    let live = Arc::<WorkerLive>::default();
                    fresh.push((ix, live.clone()));
                    live
                };
                lives.entry(ix).or_insert_with(made).clone()
            })
        };
        self.fill(&fresh);
        self.board.groups.store(Arc::new(groups));
    }

    /// Lets those that are new here have what the other state knows of them.
    fn fill(&self, fresh: &[(WorkerIx, Arc<WorkerLive>)]) {
        let (Some(cache), false) = (self.cache.get(), fresh.is_empty()) else { return };
        // Under the other state's lock, so that no later value is overwritten.
        cache.read(|cache| {
            for (ix, live) in fresh {
                live.set_peers(cache.peers_load(self.me, *ix));
                live.set_correction(cache.correction(*ix));
                live.set_ranks(scored(cache.ranks(), *ix));
                live.set_reckoned(is_reckoned(cache.ranks(), *ix));
            }
        });
    }
}

impl Hooks<ControlState> for ControlHooks {
    fn acknowledged(&self, number: u64, outcomes: Vec<ControlOutcome>) {
        self.proposer.acknowledged(number, outcomes);
    }

    fn caught_up(&self, number: u64) {
        self.proposer.caught_up(number);
    }

    fn published(&self, state: &mut ControlState, index: u64) {
        for (group, at, id) in state.take_diverged() {
            if id == self.me {
                (self.board.diverged)(format!("its {group} state at index {at} differs from the majority's"));
            } else {
                tracing::error!(%group, index = at, replica = %id, "a replica's state differs from the majority's");
            }
        }
        self.publish_groups(state);
        if self.seen.swap(state.registry_version(), Ordering::Relaxed) == state.registry_version() {
            return;
        }
        let mut fresh = Vec::new();
        let workers = {
            let mut lives = self.board.lives.lock();
            lives.retain(|ix, live| {
                Arc::strong_count(live) > 1 || state.workers().values().any(|w| w.ix == *ix)
            });
            let mut view = Vec::with_capacity(state.workers().len());
            for record in state.workers().values() {
                let live = lives.entry(record.ix).or_insert_with(|| {
                    let live = Arc::<WorkerLive>::default();
                    fresh.push((record.ix, live.clone()));
                    live
                });
                view.push(Arc::new(WorkerView { record: record.clone(), live: live.clone() }));
            }
            view
        };
        self.fill(&fresh);
        self.board.registry.store(Arc::new(RegistryView::new(index, workers)));
    }

    fn digest_due(&self, index: u64, digest: u64) {
        report_digest(&self.proposer, self.me, Group::Control, index, digest);
    }
}

/// Around the cache state.
pub struct CacheHooks {
    /// This replica.
    pub me: ReplicaId,
    /// The group's proposer.
    pub proposer: Proposer<CacheState>,
    /// Digests are reported through the control group.
    pub control: Proposer<ControlState>,
    /// See [`Board`].
    pub board: Arc<Board>,
}

impl Hooks<CacheState> for CacheHooks {
    fn acknowledged(&self, number: u64, outcomes: Vec<CacheOutcome>) {
        self.proposer.acknowledged(number, outcomes);
    }

    fn caught_up(&self, number: u64) {
        self.proposer.caught_up(number);
        // Whatever the cluster did with this replica's bookings meanwhile came with the snapshot
        // and was not seen: say all of them again.
        self.board.lease_lost.store(true, Ordering::Release);
        self.proposer.wake();
    }

    fn published(&self, state: &mut CacheState, _index: u64) {
        if state.take_released().contains(&self.me) {
            self.board.lease_lost.store(true, Ordering::Release);
            self.proposer.wake();
        }
        if state.take_ranks_changed() {
            self.board.publish_ranks(state);
        }
        let moved = state.take_moved_streams();
        if let Some(told) = self.board.stream_moved.get() {
            moved.into_iter().for_each(|(id, attempt)| told(id, attempt));
        }
        for (origin, routed) in state.take_routed() {
            // What this replica sent, it has noted itself, at once.
            if origin != self.me {
                self.board.blocks.recent.note_told(routed.rank, routed.seed, routed.locals);
            }
        }
        for (origin, keys) in state.take_waiting() {
            if origin != self.me {
                self.board.blocks.recent.still_wait(&keys);
            }
        }
        let (changed, restored) = (state.take_changed(), state.take_restored());
        if changed.is_empty() && !restored {
            return;
        }
        let lives = self.board.lives.lock();
        let set = |worker: WorkerIx, live: &WorkerLive| {
            live.set_peers(state.peers_load(self.me, worker));
            live.set_correction(state.correction(worker));
        };
        if restored {
            return lives.iter().for_each(|(worker, live)| set(*worker, live));
        }
        for worker in changed {
            if let Some(live) = lives.get(&worker) {
                set(worker, live);
            }
        }
    }

    fn digest_due(&self, index: u64, digest: u64) {
        report_digest(&self.control, self.me, Group::Cache, index, digest);
    }
}
