//! What a routing decision reads: the workers and their loads, as of now, without a lock.
//!
//! The cluster publishes a new [`RegistryView`] when the registry changes (rare); loads change
//! in place in atomics (often). A load has two halves: what *other* replicas booked, final
//! from the log, and what *this* replica has booked, exact and at once. So a replica always
//! sees its own decisions, and others' after one commit. Where a worker has several data-parallel
//! ranks, this replica knows which of them it booked; of the others' bookings each rank gets an
//! equal part. What an engine has to do beyond that, for others, comes on top.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use arc_swap::ArcSwap;
use parking_lot::RwLock;

use super::breaker::Breaker;
use super::live::LiveBlocks;
use crate::ids::WorkerId;
use crate::kv::types::RankIx;
use crate::state::load::{LoadDelta, LoadSum};
use crate::state::worker::WorkerRecord;

/// [`LoadSum`] in atomics. Readers may see the members of different moments; a cost function
/// does not mind.
#[derive(Debug, Default)]
pub struct LoadCell {
    requests: AtomicI64,
    prefill_tokens: AtomicI64,
    decode_blocks: AtomicI64,
}

impl LoadCell {
    /// Adds a delta.
    pub fn add(&self, d: &LoadDelta) {
        self.requests.fetch_add(d.requests.into(), Ordering::Relaxed);
        self.prefill_tokens.fetch_add(d.prefill_tokens, Ordering::Relaxed);
        self.decode_blocks.fetch_add(d.decode_blocks, Ordering::Relaxed);
    }

    /// Replaces the sum.
    pub fn set(&self, sum: LoadSum) {
        self.requests.store(sum.requests, Ordering::Relaxed);
        self.prefill_tokens.store(sum.prefill_tokens, Ordering::Relaxed);
        self.decode_blocks.store(sum.decode_blocks, Ordering::Relaxed);
    }

    /// Reads the sum.
    pub fn get(&self) -> LoadSum {
        LoadSum {
            requests: self.requests.load(Ordering::Relaxed),
            prefill_tokens: self.prefill_tokens.load(Ordering::Relaxed),
            decode_blocks: self.decode_blocks.load(Ordering::Relaxed),
        }
    }
}

/// Load and health of one worker; lives as long as the worker is registered, across views.
#[derive(Debug, Default)]
pub struct WorkerLive {
    /// Booked by the other replicas, as committed.
    pub peers: LoadCell,
    /// Booked by this replica, exact.
    pub own: LoadCell,
    /// What the engine says it has to do beyond what is booked, by committed decision: of other
    /// routers, or of requests that nobody waits for any more.
    pub foreign: LoadCell,
    /// The part of `own` on each data-parallel rank, where there are several and one was booked.
    /// At most as many as a worker may have ranks.
    own_ranks: RwLock<Vec<LoadCell>>,
    /// Blocks of this replica's running requests, by rank; as many as were booked on.
    live_blocks: RwLock<Vec<Arc<LiveBlocks>>>,
    /// What the prefix index calls its ranks, by rank; shorter than there are ranks, or empty,
    /// where the index knows nothing of them.
    ranks: ArcSwap<Vec<RankIx>>,
    /// See [`WorkerLive::set_reckoned`].
    reckoned: AtomicBool,
    /// This replica's last attempts to connect failed: not chosen while set, whatever the
    /// registry says (the cluster-wide decision follows).
    pub unreachable: AtomicBool,
    /// What this replica's requests there came to.
    pub breaker: Breaker,
}

impl WorkerLive {
    /// Blocks of this replica's running requests on a rank.
    pub fn live_blocks(&self, rank: u32) -> Arc<LiveBlocks> {
        // Beyond what the registry lets in: all in one place, which is right but for the sharing.
        let rank = (rank as usize).min(MOST_RANKS);
        if let Some(blocks) = self.live_blocks.read().get(rank) {
            return Arc::clone(blocks);
        }
        let mut all = self.live_blocks.write();
        if all.len() <= rank {
            all.resize_with(rank + 1, Arc::default);
        }
        Arc::clone(&all[rank])
    }

    /// Load as this replica sees it, never below zero: what the cluster booked and what is foreign.
    pub fn load(&self) -> LoadSum {
        sum([self.peers.get(), self.own.get(), self.foreign.get()])
    }

    /// What the cluster booked, as this replica sees it, never below zero.
    pub fn booked(&self) -> LoadSum {
        sum([self.peers.get(), self.own.get()])
    }
}

fn sum<const N: usize>(parts: [LoadSum; N]) -> LoadSum {
    let of = |member: fn(&LoadSum) -> i64| parts.iter().map(member).sum::<i64>().max(0);
    LoadSum {
        requests: of(|part| part.requests),
        prefill_tokens: of(|part| part.prefill_tokens),
        decode_blocks: of(|part| part.decode_blocks),
    }
}

/// In place of a rank's name, when what is known of it is not to be scored.
pub const NOT_SCORED: RankIx = RankIx(u32::MAX);

impl WorkerLive {
    /// Whether its blocks are reckoned from what is sent to it, because its engine tells nothing.
    pub fn set_reckoned(&self, reckoned: bool) {
        self.reckoned.store(reckoned, Ordering::Relaxed);
    }

    /// Sets what the prefix index calls its ranks.
    pub fn set_ranks(&self, ranks: Vec<RankIx>) {
        if **self.ranks.load() != ranks {
            self.ranks.store(Arc::new(ranks));
        }
    }

    /// What the prefix index calls its ranks.
    pub fn ranks(&self) -> Arc<Vec<RankIx>> {
        self.ranks.load_full()
    }

    /// Notes a booking of this replica on a rank of several.
    pub fn book_rank(&self, rank: u32, d: &LoadDelta) {
        let rank = rank as usize;
        if rank >= MOST_RANKS {
            return;
        }
        let cells = self.own_ranks.read();
        if let Some(cell) = cells.get(rank) {
            return cell.add(d);
        }
        drop(cells);
        let mut cells = self.own_ranks.write();
        if cells.len() <= rank {
            cells.resize_with(rank + 1, LoadCell::default);
        }
        cells[rank].add(d);
    }

    /// Load of one of `ranks` ranks as this replica sees it, never below zero.
    fn rank_load(&self, rank: u32, ranks: u32, peers_count: bool) -> LoadSum {
        let peers = if peers_count { self.peers.get() } else { LoadSum::default() };
        let foreign = self.foreign.get();
        let share = |n: i64| n / i64::from(ranks.max(1));
        let own = if ranks > 1 {
            self.own_ranks.read().get(rank as usize).map(LoadCell::get).unwrap_or_default()
        } else {
            self.own.get()
        };
        let shared = [peers, foreign].map(|load| LoadSum {
            requests: share(load.requests),
            prefill_tokens: share(load.prefill_tokens),
            decode_blocks: share(load.decode_blocks),
        });
        sum([shared[0], shared[1], own])
    }
}

/// Most data-parallel ranks a worker may have, as the registry checks.
const MOST_RANKS: usize = 1024;

/// Tokens in a block where the worker does not say.
const ORDINARY_BLOCK: u32 = 16;

/// Blocks that a rank is taken to hold where the worker does not say.
pub const ORDINARY_CAPACITY: u64 = 8192;

/// One worker in a view.
#[derive(Debug)]
pub struct WorkerView {
    /// The committed record.
    pub record: WorkerRecord,
    /// Load and local health, shared by all views that hold this worker.
    pub live: Arc<WorkerLive>,
}

impl WorkerView {
    /// Tokens in a KV block, never 0.
    pub fn block_size(&self) -> u32 {
        self.record.spec.block_size.unwrap_or(ORDINARY_BLOCK).max(1)
    }

    /// Blocks that one of its ranks can hold, where it says so.
    pub fn rank_capacity(&self) -> Option<u64> {
        self.record.spec.capacity_blocks.map(|blocks| (blocks / u64::from(self.dp_ranks())).max(1))
    }

    /// Blocks that a rank can hold, if what it holds is reckoned from what is sent there: because
    /// its engine tells nothing, or nobody knows yet whether it does.
    pub fn reckoned_capacity(&self, rank: u32) -> Option<u64> {
        let unknown = self.live.ranks.load().len() <= rank as usize;
        let reckoned = unknown || self.live.reckoned.load(Ordering::Relaxed);
        reckoned.then(|| self.rank_capacity().unwrap_or(ORDINARY_CAPACITY))
    }

    /// How many data-parallel ranks it has, never 0.
    pub fn dp_ranks(&self) -> u32 {
        self.record.spec.dp_ranks.max(1)
    }

    /// Load of one of its ranks, with what the peers booked or without.
    pub fn rank_load(&self, rank: u32, peers_count: bool) -> LoadSum {
        self.live.rank_load(rank, self.dp_ranks(), peers_count)
    }

    /// The worker's id.
    pub fn id(&self) -> &WorkerId {
        &self.record.spec.id
    }

    /// Whether it has as many requests as it should, over the whole cluster.
    pub fn is_saturated(&self, ordinary: u32) -> bool {
        self.is_saturated_by(self.live.load(), ordinary)
    }

    /// Whether this load is as many requests as it should have.
    pub fn is_saturated_by(&self, load: LoadSum, ordinary: u32) -> bool {
        load.requests >= i64::from(self.record.spec.max_requests.unwrap_or(ordinary))
    }

    /// Online by committed decision, not draining, and reachable from here.
    pub fn is_routable(&self) -> bool {
        self.record.online && !self.record.drain && !self.live.unreachable.load(Ordering::Relaxed)
    }
}

/// The registry as of one log index, ready for look-ups.
#[derive(Debug, Default)]
pub struct RegistryView {
    /// Control-group log index this was made from.
    pub index: u64,
    /// All workers, by id.
    pub workers: Vec<Arc<WorkerView>>,
    /// All positions in `workers`.
    pub all: Vec<usize>,
    /// Model or adapter name to positions in `workers`.
    pub by_model: HashMap<String, Vec<usize>>,
}

impl RegistryView {
    /// Builds the look-up tables.
    pub fn new(index: u64, workers: Vec<Arc<WorkerView>>) -> Self {
        let mut by_model: HashMap<String, Vec<usize>> = HashMap::new();
        for (position, worker) in workers.iter().enumerate() {
            for model in &worker.record.spec.models {
                let positions = by_model.entry(model.name.clone()).or_default();
                if positions.last() != Some(&position) {
                    positions.push(position);
                }
            }
        }
        let all = (0..workers.len()).collect();
        Self { index, workers, all, by_model }
    }

    /// Finds a worker by id.
    pub fn worker(&self, id: &WorkerId) -> Option<&Arc<WorkerView>> {
        let at = self.workers.binary_search_by(|w| w.id().cmp(id)).ok()?;
        Some(&self.workers[at])
    }
}
