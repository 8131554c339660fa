//! What the cluster counts of itself: [`GroupCounters`] are added to where things happen, a
//! [`ClusterStats`] is what they say at one moment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::storage::wal::{SYNC_BUCKETS_US, WalStats};
use crate::ids::Group;
use crate::telemetry::histogram::{BYTES, COUNT, Histogram, MICROS, ROUND, Scale, Snapshot};

/// One group's counters since the start of the process.
#[derive(Debug)]
pub struct GroupCounters {
    batch_mutations: Histogram,
    batch_bytes: Histogram,
    proposals: Histogram,
    resends: AtomicU64,
    leader_changes: AtomicU64,
    checkpoints: Histogram,
    checkpoint_failures: AtomicU64,
}

impl Default for GroupCounters {
    fn default() -> Self {
        Self {
            batch_mutations: Histogram::new(&COUNT),
            batch_bytes: Histogram::new(&BYTES),
            proposals: Histogram::new(&ROUND),
            resends: AtomicU64::new(0),
            leader_changes: AtomicU64::new(0),
            checkpoints: Histogram::new(&ROUND),
            checkpoint_failures: AtomicU64::new(0),
        }
    }
}

impl GroupCounters {
    /// A batch was sealed.
    pub fn sealed(&self, mutations: u64, bytes: usize) {
        self.batch_mutations.observe(mutations);
        self.batch_bytes.observe(bytes as u64);
    }

    /// A batch was applied here, so long after it was sealed.
    pub fn applied(&self, after: Duration) {
        self.proposals.observe_time(after);
    }

    /// So many batches were sent once more.
    pub fn resent(&self, batches: usize) {
        self.resends.fetch_add(batches as u64, Ordering::Relaxed);
    }

    /// Another replica leads than before, or one after nobody did.
    pub fn leader_changed(&self) {
        self.leader_changes.fetch_add(1, Ordering::Relaxed);
    }

    /// A checkpoint was written, or could not be.
    pub fn checkpoint(&self, took: Duration, written: bool) {
        if written {
            self.checkpoints.observe_time(took);
        } else {
            self.checkpoint_failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What they say now, with the bytes that wait in the group's queue.
    pub fn read(&self, group: Group, queued_bytes: usize) -> GroupStats {
        GroupStats {
            group,
            batch_mutations: self.batch_mutations.snapshot(),
            batch_bytes: self.batch_bytes.snapshot(),
            proposals: self.proposals.snapshot(),
            resends: self.resends.load(Ordering::Relaxed),
            queued_bytes: queued_bytes as u64,
            leader_changes: self.leader_changes.load(Ordering::Relaxed),
            checkpoints: self.checkpoints.snapshot(),
            checkpoint_failures: self.checkpoint_failures.load(Ordering::Relaxed),
        }
    }
}

/// One group's counters at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupStats {
    /// Which.
    pub group: Group,
    /// Changes in a batch of this replica.
    pub batch_mutations: Snapshot,
    /// Its bytes.
    pub batch_bytes: Snapshot,
    /// From sealing a batch to its application here.
    pub proposals: Snapshot,
    /// Batches sent more than once.
    pub resends: u64,
    /// Bytes waiting and on their way.
    pub queued_bytes: u64,
    /// How often a leader was seen to come.
    pub leader_changes: u64,
    /// Times of checkpoints written.
    pub checkpoints: Snapshot,
    /// Checkpoints that could not be written.
    pub checkpoint_failures: u64,
}

/// The log's counters at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct LogStats {
    /// Syncs of its files.
    pub syncs: Snapshot,
    /// Batches written.
    pub batches: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Syncs of the watermark.
    pub watermark_syncs: u64,
}

static SYNC: Scale = Scale { bounds: &SYNC_BUCKETS_US, ticks_per_unit: MICROS };

impl From<&WalStats> for LogStats {
    fn from(stats: &WalStats) -> Self {
        let sum = stats.sync_time.as_micros() as u64;
        Self {
            syncs: Snapshot::from_parts(&SYNC, &stats.sync_buckets, sum),
            batches: stats.batches,
            bytes: stats.bytes,
            watermark_syncs: stats.watermark_syncs,
        }
    }
}

/// All of it. Empty for a replica that takes no part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterStats {
    /// Both groups.
    pub groups: Vec<GroupStats>,
    /// The log, once there is one.
    pub log: Option<LogStats>,
}
