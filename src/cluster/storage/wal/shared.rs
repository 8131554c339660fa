//! What callers and the writer thread share: the queue, the readers' view and the verdict.
//! One lock guards all of it, so the order of the queue is the order in which callers saw
//! their changes take effect.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::memory::GroupMemory;
use super::writer::Timing;
use crate::ids::Group;

/// Called once, on the writer thread, when an operation is durable or has failed. Must be short
/// and must not panic: the next batch waits for it.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Something for the writer to do.
pub(super) enum Op {
    Append { group: Group, operation: u64, entries: Vec<(u64, Bytes)>, done: Done },
    Vote { group: Group, vote: Bytes, done: Done },
    TruncateAfter { group: Group, keep: Option<u64>, done: Done },
    Purge { group: Group, upto: u64, meta: Bytes, done: Done },
    Committed { group: Group, committed: Bytes },
    SyncWatermark { done: Done },
}

impl Op {
    pub(super) fn bytes(&self) -> usize {
        const FIXED: usize = 64;
        FIXED
            + match self {
                Op::Append { entries, .. } => entries.iter().map(|(_, data)| data.len() + FIXED).sum(),
                Op::Vote { vote: payload, .. }
                | Op::Purge { meta: payload, .. }
                | Op::Committed { committed: payload, .. } => payload.len(),
                Op::TruncateAfter { .. } | Op::SyncWatermark { .. } => 0,
            }
    }

    pub(super) fn into_done(self) -> Option<Done> {
        match self {
            Op::Append { done, .. }
            | Op::Vote { done, .. }
            | Op::TruncateAfter { done, .. }
            | Op::Purge { done, .. }
            | Op::SyncWatermark { done } => Some(done),
            Op::Committed { .. } => None,
        }
    }
}

/// Upper bounds of the sync time histogram, in microseconds; the last bucket has none.
pub const SYNC_BUCKETS_US: [u64; 12] =
    [50, 100, 250, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 200_000, 1_000_000];

/// Counters since the log was opened, for metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalStats {
    /// Syncs of segment files.
    pub syncs: u64,
    /// Their time, summed.
    pub sync_time: Duration,
    /// The longest.
    pub sync_time_max: Duration,
    /// Syncs by time, see [`SYNC_BUCKETS_US`]; not cumulative.
    pub sync_buckets: [u64; SYNC_BUCKETS_US.len() + 1],
    /// Batches written (one sync per touched group each).
    pub batches: u64,
    /// Bytes of frames written.
    pub bytes: u64,
    /// Syncs of the watermark.
    pub watermark_syncs: u64,
}

impl WalStats {
    pub(super) fn add(&mut self, timing: &Timing) {
        self.batches += 1;
        self.bytes += timing.bytes;
        self.watermark_syncs += timing.watermark_syncs;
        for time in &timing.syncs {
            self.syncs += 1;
            self.sync_time += *time;
            self.sync_time_max = self.sync_time_max.max(*time);
            let micros = time.as_micros() as u64;
            let bucket = SYNC_BUCKETS_US.iter().position(|bound| micros <= *bound);
            self.sync_buckets[bucket.unwrap_or(SYNC_BUCKETS_US.len())] += 1;
        }
    }
}

/// Everything behind the lock.
pub(super) struct Core {
    pub(super) groups: [GroupMemory; 2],
    pub(super) queue: VecDeque<Op>,
    pub(super) queued_bytes: usize,
    pub(super) next_operation: u64,
    pub(super) stopping: bool,
    /// Why the log refuses everything; set once.
    pub(super) failed: Option<String>,
    pub(super) applied: [Option<(u64, u128)>; 2],
    pub(super) applied_dirty: bool,
    pub(super) stats: WalStats,
}

/// Lock and signals.
pub(super) struct Shared {
    pub(super) core: Mutex<Core>,
    /// The writer has something to do.
    pub(super) work: Condvar,
    /// The queue has room again, or the log has failed.
    pub(super) room: Condvar,
}

impl Shared {
    /// Makes the log refuse everything from now on and answers `dones` and all that is queued.
    pub(super) fn fail(&self, error: &io::Error, dones: Vec<Done>) {
        let queue = {
            let mut core = self.core.lock();
            core.failed.get_or_insert_with(|| error.to_string());
            core.queued_bytes = 0;
            std::mem::take(&mut core.queue)
        };
        self.room.notify_all();
        for done in dones.into_iter().chain(queue.into_iter().filter_map(Op::into_done)) {
            done(Err(io::Error::new(error.kind(), error.to_string())));
        }
    }
}
