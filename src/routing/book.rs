//! Booking load on workers: at once in this replica's own cells, and as deltas to be proposed.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::view::{WorkerLive, WorkerView};
use crate::ids::WorkerIx;
use crate::state::load::LoadDelta;

/// Deltas waiting for the next batch, summed by worker: the queue is bounded by the number of
/// workers, however many requests come and go while there is no leader.
#[derive(Debug, Default)]
struct Pending {
    deltas: HashMap<WorkerIx, LoadDelta>,
}

/// Where bookings go. Cheap to clone.
#[derive(Clone)]
pub struct Bookings {
    pending: Arc<Mutex<Pending>>,
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Bookings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bookings").field("pending", &self.pending).finish_non_exhaustive()
    }
}

impl Bookings {
    /// `wake` is called, outside any lock, when something gathers after nothing had.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self { pending: Arc::default(), wake: Arc::new(wake) }
    }

    /// Books a request on a worker's rank 0 until the returned guard is dropped.
    pub fn book(&self, worker: Arc<WorkerView>, prefill_tokens: u32, decode_blocks: u32) -> Booking {
        self.book_rank(worker, 0, prefill_tokens, decode_blocks)
    }

    /// Books a request on one of a worker's ranks until the returned guard is dropped.
    pub fn book_rank(
        &self,
        worker: Arc<WorkerView>,
        rank: u32,
        prefill_tokens: u32,
        decode_blocks: u32,
    ) -> Booking {
        let delta = LoadDelta {
            requests: 1,
            prefill_tokens: prefill_tokens.into(),
            decode_blocks: decode_blocks.into(),
        };
        let booking = Booking { bookings: self.clone(), worker, rank, held: LoadDelta::default() };
        booking.and_change(delta)
    }

    fn change(&self, worker: &WorkerView, rank: u32, delta: LoadDelta) {
        if delta.is_zero() {
            return;
        }
        let mut pending = self.pending.lock();
        // Under the lock, so that `restate` sees own loads and deltas of the same moment.
        worker.live.own.add(&delta);
        if worker.dp_ranks() > 1 {
            worker.live.book_rank(rank, &delta);
        }
        let was_empty = pending.deltas.is_empty();
        pending.deltas.entry(worker.record.ix).or_default().merge(&delta);
        drop(pending);
        if was_empty {
            (self.wake)();
        }
    }

    /// Takes what has gathered, without deltas that cancelled out. Order is by worker, so
    /// that equal states encode equally.
    pub fn drain(&self) -> Vec<(WorkerIx, LoadDelta)> {
        let mut deltas: Vec<_> = std::mem::take(&mut self.pending.lock().deltas)
            .into_iter()
            .filter(|(_, d)| !d.is_zero())
            .collect();
        deltas.sort_unstable_by_key(|(worker, _)| *worker);
        deltas
    }

    /// Drops what has gathered and says instead all that is held: for when the cluster has
    /// released this replica's bookings while they were still held.
    pub fn restate(&self, lives: &HashMap<WorkerIx, Arc<WorkerLive>>) -> Vec<(WorkerIx, LoadDelta)> {
        let mut pending = self.pending.lock();
        pending.deltas.clear();
        let mut held: Vec<_> = lives
            .iter()
            .map(|(worker, live)| (*worker, live.own.get().undo().negated()))
            .filter(|(_, d)| !d.is_zero())
            .collect();
        held.sort_unstable_by_key(|(worker, _)| *worker);
        held
    }
}

/// A request's share of a worker's load; freed when dropped.
#[derive(Debug)]
pub struct Booking {
    bookings: Bookings,
    worker: Arc<WorkerView>,
    rank: u32,
    held: LoadDelta,
}

impl Booking {
    fn and_change(mut self, delta: LoadDelta) -> Self {
        self.change(delta);
        self
    }

    fn change(&mut self, delta: LoadDelta) {
        self.held.merge(&delta);
        self.bookings.change(&self.worker, self.rank, delta);
    }

    /// The worker it is on.
    pub fn worker(&self) -> &Arc<WorkerView> {
        &self.worker
    }

    /// The first output token arrived: the prefill is done. Idempotent.
    pub fn prefill_done(&mut self) {
        let outstanding = self.held.prefill_tokens;
        self.change(LoadDelta { prefill_tokens: -outstanding, ..LoadDelta::default() });
    }

    /// Output has grown by this many KV blocks.
    pub fn grow(&mut self, blocks: u32) {
        self.change(LoadDelta { decode_blocks: blocks.into(), ..LoadDelta::default() });
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.change(self.held.negated());
    }
}
