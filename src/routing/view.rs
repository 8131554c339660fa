//! What a routing decision reads: the workers and their loads, as of now, without a lock.
//!
//! The cluster publishes a new [`RegistryView`] when the registry changes (rare); loads change
//! in place in atomics (often). A load has two halves: what *other* replicas booked, final
//! from the log, and what *this* replica has booked, exact and at once. So a replica always
//! sees its own decisions, and others' after one commit.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use super::breaker::Breaker;
use crate::ids::WorkerId;
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
    /// This replica's last attempts to connect failed: not chosen while set, whatever the
    /// registry says (the cluster-wide decision follows).
    pub unreachable: AtomicBool,
    /// What this replica's requests there came to.
    pub breaker: Breaker,
}

impl WorkerLive {
    /// Cluster-wide load as this replica sees it, never below zero.
    pub fn load(&self) -> LoadSum {
        let (p, o) = (self.peers.get(), self.own.get());
        LoadSum {
            requests: (p.requests + o.requests).max(0),
            prefill_tokens: (p.prefill_tokens + o.prefill_tokens).max(0),
            decode_blocks: (p.decode_blocks + o.decode_blocks).max(0),
        }
    }
}

/// One worker in a view.
#[derive(Debug)]
pub struct WorkerView {
    /// The committed record.
    pub record: WorkerRecord,
    /// Load and local health, shared by all views that hold this worker.
    pub live: Arc<WorkerLive>,
}

impl WorkerView {
    /// The worker's id.
    pub fn id(&self) -> &WorkerId {
        &self.record.spec.id
    }

    /// Whether it has as many requests as it should, over the whole cluster.
    pub fn is_saturated(&self, ordinary: u32) -> bool {
        let most = self.record.spec.max_requests.unwrap_or(ordinary);
        self.live.load().requests >= i64::from(most)
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
