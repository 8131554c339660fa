//! Booking load on workers: at once in this replica's own cells, and as deltas to be proposed.
//!
//! A [`Tentative`] booking is proposed by itself, before the request is sent, and counts here
//! meanwhile: the state takes it only if nobody else has booked on the worker since the choice.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::live::LiveBlocks;
use super::recent::Awaited;
use super::view::{WorkerLive, WorkerView};
use crate::ids::WorkerIx;
use crate::kv::hash::SequenceHash;
use crate::state::command::CacheCommand;
use crate::state::load::{LoadDelta, LoadSum};
use crate::state::ranks::RankKey;

/// Deltas waiting for the next batch, summed by rank: the queue is bounded by the number of
/// ranks, however many requests come and go while there is no leader.
#[derive(Debug, Default)]
struct Pending {
    deltas: HashMap<RankKey, LoadDelta>,
    /// How often everything was said anew.
    restated: u64,
}

/// How a request is booked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reserve {
    /// At once, here; the others hear of it.
    #[default]
    Local,
    /// In the log first, unless somebody else was faster.
    Linearizable,
}

impl Reserve {
    /// Their names in the configuration.
    pub const NAMES: &[&str] = &["local", "linearizable"];
}

/// What a request costs the rank it is sent to.
#[derive(Clone, Debug, Default)]
pub struct Share {
    /// Which rank.
    pub rank: u32,
    /// Tokens whose prefill is outstanding.
    pub prefill_tokens: u32,
    /// KV blocks of the whole prompt.
    pub decode_blocks: u32,
    /// The full blocks among them, as far as they are known: those that another running request of
    /// this replica holds there already are not booked again.
    pub chain: Option<Arc<[SequenceHash]>>,
}

/// Where bookings go. Cheap to clone.
#[derive(Clone)]
pub struct Bookings {
    pending: Arc<Mutex<Pending>>,
    /// What the cluster believes that this replica holds may be wrong.
    in_doubt: Arc<AtomicBool>,
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
        Self { pending: Arc::default(), in_doubt: Arc::default(), wake: Arc::new(wake) }
    }

    /// Books a request on a worker's rank 0 until the returned guard is dropped.
    pub fn book(&self, worker: Arc<WorkerView>, prefill_tokens: u32, decode_blocks: u32) -> Booking {
        self.book_share(worker, Share { prefill_tokens, decode_blocks, ..Share::default() })
    }

    /// Books a request on one of a worker's ranks until the returned guard is dropped.
    pub fn book_share(&self, worker: Arc<WorkerView>, share: Share) -> Booking {
        let (booking, delta) = Booking::prepare(self, worker, share);
        self.change(&booking.worker, booking.rank, delta, delta);
        booking
    }

    /// Books what somebody else says that runs on one of a worker's ranks, until the returned guard is
    /// dropped.
    pub fn book_told(&self, worker: Arc<WorkerView>, rank: u32, load: LoadDelta) -> Booking {
        let bookings = self.clone();
        let held = LoadDelta::default();
        let mut booking =
            Booking { bookings, worker, rank, held, counted: None, shared: None, awaited: None };
        booking.turn_into(load);
        booking
    }

    /// Books a request here, for the cluster to confirm. `seen` is what was booked on the worker
    /// when it was chosen.
    pub fn try_book(&self, worker: Arc<WorkerView>, share: Share, seen: LoadSum) -> Tentative {
        let (booking, delta) = Booking::prepare(self, worker, share);
        let restated = self.pending.lock().restated;
        self.change(&booking.worker, booking.rank, delta, LoadDelta::default());
        Tentative { booking: Some(booking), delta, seen, restated }
    }

    /// Changes this replica's own load, and what is told of it.
    fn change(&self, worker: &WorkerView, rank: u32, own: LoadDelta, told: LoadDelta) {
        if own.is_zero() && told.is_zero() {
            return;
        }
        let mut pending = self.pending.lock();
        // Under the lock, so that `restate` sees own loads and deltas of the same moment.
        worker.live.own.add(&own);
        if worker.dp_ranks() > 1 {
            worker.live.book_rank(key_of(worker, rank).rank, &own);
        }
        if told.is_zero() {
            return;
        }
        let was_empty = pending.deltas.is_empty();
        pending.deltas.entry(key_of(worker, rank)).or_default().merge(&told);
        drop(pending);
        if was_empty {
            (self.wake)();
        }
    }

    /// Everything has to be said anew: what became of something is not known.
    fn doubt(&self) {
        self.in_doubt.store(true, Ordering::Release);
        (self.wake)();
    }

    /// Whether everything has to be said anew, see [`Bookings::restate`]; asked once.
    pub fn take_doubt(&self) -> bool {
        self.in_doubt.swap(false, Ordering::AcqRel)
    }

    /// Takes what has gathered, without deltas that cancelled out. Order is by rank, so
    /// that equal states encode equally.
    pub fn drain(&self) -> Vec<(RankKey, LoadDelta)> {
        let mut deltas: Vec<_> = std::mem::take(&mut self.pending.lock().deltas)
            .into_iter()
            .filter(|(_, d)| !d.is_zero())
            .collect();
        deltas.sort_unstable_by_key(|(rank, _)| *rank);
        deltas
    }

    /// Drops what has gathered and says instead all that is held: for when the cluster has
    /// released this replica's bookings while they were still held.
    pub fn restate(&self, lives: &HashMap<WorkerIx, Arc<WorkerLive>>) -> Vec<(RankKey, LoadDelta)> {
        let mut pending = self.pending.lock();
        pending.deltas.clear();
        pending.restated += 1;
        let mut held: Vec<_> = lives
            .iter()
            .flat_map(|(worker, live)| {
                let by_rank = live.own_by_rank().into_iter();
                by_rank.map(|(rank, own)| (RankKey { worker: *worker, rank }, own.undo().negated()))
            })
            .filter(|(_, d)| !d.is_zero())
            .collect();
        held.sort_unstable_by_key(|(rank, _)| *rank);
        held
    }
}

/// A rank's name in the log. A worker has no others than it says.
fn key_of(worker: &WorkerView, rank: u32) -> RankKey {
    let rank = if rank < worker.dp_ranks() { rank } else { 0 };
    RankKey { worker: worker.record.ix, rank }
}

/// A request's share of a worker's load; freed when dropped.
#[derive(Debug)]
pub struct Booking {
    bookings: Bookings,
    worker: Arc<WorkerView>,
    rank: u32,
    /// Without the blocks of `shared`.
    held: LoadDelta,
    /// When it was counted last among those that certainly run.
    counted: Option<u32>,
    /// Blocks that others may hold too.
    shared: Option<(Arc<LiveBlocks>, Arc<[SequenceHash]>)>,
    /// Until the first token.
    awaited: Option<Awaited>,
}

impl Booking {
    /// A booking that is not booked yet, and what it adds.
    fn prepare(bookings: &Bookings, worker: Arc<WorkerView>, share: Share) -> (Self, LoadDelta) {
        let chain = share.chain.filter(|chain| !chain.is_empty());
        let shared = chain.map(|chain| (worker.live.live_blocks(share.rank), chain));
        let (known, fresh) = match &shared {
            Some((live, chain)) => (chain.len() as i64, live.hold(chain) as i64),
            None => (0, 0),
        };
        let held = LoadDelta {
            requests: 1,
            prefill_tokens: share.prefill_tokens.into(),
            decode_blocks: (i64::from(share.decode_blocks) - known).max(0),
        };
        let delta = LoadDelta { decode_blocks: held.decode_blocks + fresh, ..held };
        let mut booking = Self {
            bookings: bookings.clone(),
            worker,
            rank: share.rank,
            held,
            counted: None,
            shared,
            awaited: None,
        };
        booking.heard();
        (booking, delta)
    }

    fn change(&mut self, delta: LoadDelta) {
        self.held.merge(&delta);
        self.bookings.change(&self.worker, self.rank, delta, delta);
    }

    /// Gives everything up; what that takes off. Nothing the second time.
    fn undo(&mut self) -> LoadDelta {
        let mut delta = std::mem::take(&mut self.held).negated();
        if let Some((live, chain)) = self.shared.take() {
            delta.decode_blocks -= live.let_go(&chain) as i64;
        }
        delta
    }

    /// The worker it is on.
    pub fn worker(&self) -> &Arc<WorkerView> {
        &self.worker
    }

    /// Something was heard of the request: it certainly runs.
    pub fn heard(&mut self) {
        let (worker, rank) = (&self.worker, self.rank);
        if worker.live.lately.heard(&mut self.counted) && worker.dp_ranks() > 1 {
            worker.live.count_on_rank(key_of(worker, rank).rank);
        }
    }

    /// Keeps what is expected of the request's prompt until the first output token, or its end.
    pub fn awaits(&mut self, awaited: Option<Awaited>) {
        self.awaited = awaited;
    }

    /// The first output token arrived: the prefill is done. Idempotent.
    pub fn prefill_done(&mut self) {
        self.awaited = None;
        let outstanding = self.held.prefill_tokens;
        self.change(LoadDelta { prefill_tokens: -outstanding, ..LoadDelta::default() });
    }

    /// It is this much now, all together.
    pub fn turn_into(&mut self, load: LoadDelta) {
        let mut delta = self.held.negated();
        delta.merge(&load);
        self.change(delta);
    }

    /// Output has grown by this many KV blocks.
    pub fn grow(&mut self, blocks: u32) {
        self.change(LoadDelta { decode_blocks: blocks.into(), ..LoadDelta::default() });
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        let delta = self.undo();
        self.bookings.change(&self.worker, self.rank, delta, delta);
    }
}

/// A booking that counts here and waits for the cluster's word. Has to be settled with what became
/// of its [`Tentative::command`], and only after that is known for good: the command may be
/// applied however long it waits.
///
/// When all bookings are said anew meanwhile, it is not known whether the command comes before or
/// after that; they are then said anew once more.
#[derive(Debug)]
pub struct Tentative {
    /// There until it is settled.
    booking: Option<Booking>,
    delta: LoadDelta,
    seen: LoadSum,
    restated: u64,
}

impl Tentative {
    /// What to propose.
    ///
    /// Output that grows meanwhile is no reason to choose again as long as it is less than what
    /// the request itself brings.
    pub fn command(&self) -> Option<CacheCommand> {
        let booking = self.booking.as_ref()?;
        let rank = key_of(&booking.worker, booking.rank);
        let blocks = self.seen.decode_blocks + self.delta.decode_blocks;
        let at_most = LoadSum { decode_blocks: blocks, ..self.seen };
        Some(CacheCommand::Reserve { rank, delta: self.delta, at_most })
    }

    /// It was taken: an ordinary booking from now on.
    pub fn confirmed(mut self) -> Option<Booking> {
        let booking = self.booking.take();
        if let Some(booking) = &booking {
            self.mind_restatements(&booking.bookings);
        }
        booking
    }

    /// It was not taken, or was never proposed.
    pub fn refused(mut self) {
        let Some(mut booking) = self.booking.take() else { return };
        let undo = booking.undo();
        // The cluster never heard of it. Blocks that others came to share meanwhile stay: they
        // have not been told of.
        let mut told = self.delta;
        told.merge(&undo);
        booking.bookings.change(&booking.worker, booking.rank, undo, told);
        self.mind_restatements(&booking.bookings);
    }

    /// It was decided about, but how is not known.
    pub fn unknown(mut self) {
        if let Some(booking) = self.booking.take() {
            booking.bookings.doubt();
        }
    }

    fn mind_restatements(&self, bookings: &Bookings) {
        if bookings.pending.lock().restated != self.restated {
            bookings.doubt();
        }
    }
}

impl Drop for Tentative {
    fn drop(&mut self) {
        if let Some(booking) = self.booking.take() {
            booking.bookings.doubt();
        }
    }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
