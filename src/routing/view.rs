//! What a routing decision reads: the workers and their loads, as of now, without a lock.
//!
//! The cluster publishes a new [`RegistryView`] when the registry changes (rare); loads change
//! in place in atomics (often). A load has two halves: what *other* replicas booked, final
//! from the log, and what *this* replica has booked, exact and at once. So a replica always
//! sees its own decisions, and others' after one commit. Both are known for each data-parallel rank
//! of a worker that has several. What an engine has to do beyond that, for others, comes on top; what
//! it has not, for long, is taken off, but never from what certainly runs ([`super::certain`]): on the
//! ranks that it is said of, or shared among all of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use arc_swap::ArcSwap;
use parking_lot::RwLock;

use super::breaker::Breaker;
use super::certain::Lately;
use super::live::LiveBlocks;
use crate::ids::WorkerId;
use crate::kv::types::RankIx;
use crate::state::corrections::Correction;
use crate::state::load::{LoadDelta, LoadSum, part};
use crate::state::worker::{AGENT_LABEL, WorkerRecord, WorkerRole, WorkerSpec};

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
    /// Booked by the other replicas, as committed, on all ranks.
    pub peers: LoadCell,
    /// The part of `peers` on each rank; empty where all of it is on rank 0.
    peer_ranks: RwLock<Vec<LoadCell>>,
    /// Booked by this replica, exact.
    pub own: LoadCell,
    /// What the engine says it has to do beyond what is booked, by committed decision: of other
    /// routers, or of requests that nobody waits for any more. Below zero for what is booked and
    /// is not there.
    pub foreign: LoadCell,
    /// What of that is said of single ranks, ascending; empty where they are not told apart.
    foreign_ranks: ArcSwap<Vec<(u32, LoadSum)>>,
    /// This replica's requests there that certainly run.
    pub lately: Lately,
    /// Those of them on each rank, where there are several, counted in the same eras.
    lately_ranks: RwLock<Vec<Lately>>,
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

    /// Load as this replica sees it, never below zero: what the cluster booked, as the engine's own
    /// figures correct it.
    pub fn load(&self) -> LoadSum {
        corrected(self.booked(), self.foreign.get(), self.certain())
    }

    /// What the cluster booked, as this replica sees it, never below zero.
    pub fn booked(&self) -> LoadSum {
        sum([self.peers.get(), self.own.get()])
    }

    /// The part of this replica's own bookings that certainly runs.
    pub fn certain(&self) -> LoadSum {
        certain(self.own.get(), self.lately.requests())
    }

    /// Replaces what the engine has to do beyond what is booked.
    pub fn set_correction(&self, correction: Option<&Correction>) {
        self.foreign.set(correction.map(|correction| correction.whole).unwrap_or_default());
        let ranks = correction.map(|correction| correction.ranks.as_slice()).unwrap_or_default();
        if self.foreign_ranks.load().as_slice() != ranks {
            self.foreign_ranks.store(Arc::new(ranks.to_vec()));
        }
    }

    /// What the engine has to do beyond what is booked.
    pub fn correction(&self) -> Correction {
        Correction { whole: self.foreign.get(), ranks: self.foreign_ranks.load().to_vec() }
    }

    /// Counts one of [`WorkerLive::lately`] on its rank.
    pub fn count_on_rank(&self, rank: u32) {
        let rank = rank as usize;
        if rank >= MOST_RANKS {
            return;
        }
        if let Some(lately) = self.lately_ranks.read().get(rank) {
            return lately.count();
        }
        let mut cells = self.lately_ranks.write();
        if cells.len() <= rank {
            cells.resize_with(rank + 1, Lately::default);
        }
        cells[rank].count();
    }

    /// Begins the next era of [`WorkerLive::lately`].
    pub fn turn(&self) {
        self.lately.turn();
        self.lately_ranks.read().iter().for_each(Lately::turn);
    }
}

/// The part of one's own bookings that so many requests are.
fn certain(own: LoadSum, requests: u32) -> LoadSum {
    own.part(i64::from(requests).min(own.requests), own.requests)
}

fn sum<const N: usize>(parts: [LoadSum; N]) -> LoadSum {
    let of = |member: fn(&LoadSum) -> i64| parts.iter().map(member).sum::<i64>().max(0);
    LoadSum {
        requests: of(|part| part.requests),
        prefill_tokens: of(|part| part.prefill_tokens),
        decode_blocks: of(|part| part.decode_blocks),
    }
}

/// What is booked, with a correction: what that takes off ends at what is certain. What an engine
/// holds beyond what is booked, and not for requests of others, it holds for those booked: it is gone
/// with the last of them, and not only with the next look at the engine.
fn corrected(booked: LoadSum, foreign: LoadSum, certain: LoadSum) -> LoadSum {
    let is_idle = booked.requests + foreign.requests <= 0;
    let of = |member: fn(&LoadSum) -> i64| {
        let (booked, foreign) = (member(&booked), member(&foreign));
        let foreign = if is_idle { foreign.min(0) } else { foreign };
        let least = member(&certain).min(booked).max(0);
        if foreign < 0 { (booked + foreign).max(least) } else { booked + foreign }
    };
    LoadSum {
        requests: of(|load| load.requests),
        prefill_tokens: of(|load| load.prefill_tokens),
        decode_blocks: of(|load| load.decode_blocks),
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

    /// Replaces what the other replicas booked, by rank; loads of the same rank are summed.
    pub fn set_peers(&self, ranks: impl Iterator<Item = (u32, LoadSum)>) {
        let (mut total, mut first) = (LoadSum::default(), LoadSum::default());
        let mut others: Vec<LoadSum> = Vec::new();
        for (rank, load) in ranks {
            total = total.with(&load);
            match rank as usize {
                0 => first = first.with(&load),
                rank if rank < MOST_RANKS => {
                    if others.len() < rank {
                        others.resize(rank, LoadSum::default());
                    }
                    others[rank - 1] = others[rank - 1].with(&load);
                }
                _ => {}
            }
        }
        self.peers.set(total);
        if others.is_empty() && self.peer_ranks.read().is_empty() {
            return;
        }
        let mut cells = self.peer_ranks.write();
        if cells.len() <= others.len() {
            cells.resize_with(others.len() + 1, LoadCell::default);
        }
        let loads = std::iter::once(first).chain(others).chain(std::iter::repeat(LoadSum::default()));
        cells.iter().zip(loads).for_each(|(cell, load)| cell.set(load));
    }

    /// What this replica has booked, by rank; what is of no known rank is on rank 0.
    pub fn own_by_rank(&self) -> Vec<(u32, LoadSum)> {
        let mut ranks: Vec<(u32, LoadSum)> =
            (0..).zip(self.own_ranks.read().iter().map(LoadCell::get)).collect();
        let others = ranks.iter().skip(1).fold(LoadSum::default(), |sum, (_, load)| sum.with(load));
        let first = (0, self.own.get().minus(&others));
        match ranks.first_mut() {
            Some(rank) => *rank = first,
            None => ranks.push(first),
        }
        ranks
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

    /// What this replica has booked on one of `ranks` ranks.
    fn rank_own(&self, rank: u32, ranks: u32) -> LoadSum {
        if ranks > 1 { of_rank(&self.own_ranks, rank) } else { self.own.get() }
    }

    /// What the cluster booked on one of `ranks` ranks, as this replica sees it, never below zero.
    fn rank_booked(&self, rank: u32, ranks: u32, peers_count: bool) -> LoadSum {
        let peers = match peers_count {
            false => LoadSum::default(),
            true if ranks <= 1 => self.peers.get(),
            true if self.peer_ranks.read().is_empty() && rank == 0 => self.peers.get(),
            true => of_rank(&self.peer_ranks, rank),
        };
        sum([peers, self.rank_own(rank, ranks)])
    }

    /// The part of this replica's own bookings on one of `ranks` ranks that certainly runs.
    fn rank_certain(&self, rank: u32, ranks: u32) -> LoadSum {
        let requests = match ranks {
            0..=1 => self.lately.requests(),
            _ => self.lately_ranks.read().get(rank as usize).map(Lately::requests).unwrap_or_default(),
        };
        certain(self.rank_own(rank, ranks), requests)
    }

    /// Load of one of `ranks` ranks as this replica sees it, never below zero.
    fn rank_load(&self, rank: u32, ranks: u32, peers_count: bool) -> LoadSum {
        let booked = self.rank_booked(rank, ranks, peers_count);
        let foreign = self.rank_foreign(rank, ranks, &booked);
        // What is missing may be missing of the peers' bookings.
        let foreign = if peers_count { foreign } else { foreign.not_below_zero() };
        corrected(booked, foreign, self.rank_certain(rank, ranks))
    }

    /// What one of `ranks` ranks has to do beyond this that is booked there.
    fn rank_foreign(&self, rank: u32, ranks: u32, booked: &LoadSum) -> LoadSum {
        let foreign = self.foreign.get();
        if ranks <= 1 {
            return foreign;
        }
        let by_rank = self.foreign_ranks.load();
        if !by_rank.is_empty() {
            let found = by_rank.binary_search_by_key(&rank, |(rank, _)| *rank);
            return found.map(|at| by_rank[at].1).unwrap_or_default();
        }
        if foreign.is_zero() {
            return foreign;
        }
        let whole = self.booked();
        // More may be anywhere; less is where something is booked.
        let share = |member: fn(&LoadSum) -> i64| match member(&foreign) {
            more @ 0.. => more / i64::from(ranks),
            less => part(less, member(booked), member(&whole)),
        };
        LoadSum {
            requests: share(|load| load.requests),
            prefill_tokens: share(|load| load.prefill_tokens),
            decode_blocks: share(|load| load.decode_blocks),
        }
    }
}

fn of_rank(cells: &RwLock<Vec<LoadCell>>, rank: u32) -> LoadSum {
    cells.read().get(rank as usize).map(LoadCell::get).unwrap_or_default()
}

/// Most data-parallel ranks a worker may have, as the registry checks.
const MOST_RANKS: usize = WorkerSpec::MAX_RANKS as usize;

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

    /// What the cluster booked on one of its ranks, with what the peers did or without, never below
    /// zero.
    pub fn rank_booked(&self, rank: u32, peers_count: bool) -> LoadSum {
        self.live.rank_booked(rank, self.dp_ranks(), peers_count)
    }

    /// The part of this replica's own bookings on one of its ranks that certainly runs.
    pub fn rank_certain(&self, rank: u32) -> LoadSum {
        self.live.rank_certain(rank, self.dp_ranks())
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
    /// Whether a node agent is beside any of them.
    pub has_agents: bool,
    /// Whether any of them does but a part of a request.
    pub has_parts: bool,
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
        let has_agents = workers.iter().any(|worker| worker.record.spec.labels.contains_key(AGENT_LABEL));
        let has_parts = workers.iter().any(|worker| worker.record.spec.role != WorkerRole::Aggregated);
        Self { index, workers, all, by_model, has_agents, has_parts }
    }

    /// The model that is served, if it is the only one; its adapters do not count.
    pub fn only_model(&self) -> Option<&str> {
        let mut base = self.by_model.iter().filter(|(name, positions)| {
            let models = positions.first().map(|at| self.workers[*at].record.spec.models.as_slice());
            models.unwrap_or_default().iter().any(|model| model.name == **name && model.lora_of.is_none())
        });
        let (name, _) = base.next()?;
        base.next().is_none().then_some(name)
    }

    /// Finds a worker by id.
    pub fn worker(&self, id: &WorkerId) -> Option<&Arc<WorkerView>> {
        let at = self.workers.binary_search_by(|w| w.id().cmp(id)).ok()?;
        Some(&self.workers[at])
    }
}
