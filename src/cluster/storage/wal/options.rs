//! Settings of the log, with the reason for each default. Made by the node's configuration,
//! checked when the log is opened.

use super::error::WalError;
use super::frame::{FRAME_HEADER, SEGMENT_HEADER};

/// Settings of the log.
#[derive(Clone, Debug)]
pub struct WalOptions {
    /// The cluster this replica belongs to; a directory of another one is refused.
    pub cluster: u128,
    /// This replica's member id; a directory of another one is refused.
    pub member: u64,
    /// Size of a segment file. 16 MiB: three seconds of log at the highest measured rate, and
    /// small enough to zero-fill in the background.
    pub segment_bytes: u64,
    /// Newest entries kept in memory per group for readers. 32 MiB: followers that keep up are
    /// never served from disk.
    pub cache_bytes: usize,
    /// Largest entry. 8 MiB: half a segment.
    pub max_entry_bytes: usize,
    /// Largest vote, commit note and purge note; the three are written again in every segment.
    pub max_meta_bytes: usize,
    /// Bytes that may wait for the writer before callers are held. 64 MiB: half a second of a
    /// slow disk.
    pub max_queue_bytes: usize,
    /// Purged segments kept for reuse, both groups together. 2: in the steady state one is
    /// filled while one waits.
    pub max_spare_segments: usize,
}

impl Default for WalOptions {
    fn default() -> Self {
        Self {
            cluster: 0,
            member: 0,
            segment_bytes: 16 << 20,
            cache_bytes: 32 << 20,
            max_entry_bytes: 8 << 20,
            max_meta_bytes: 16 << 10,
            max_queue_bytes: 64 << 20,
            max_spare_segments: 2,
        }
    }
}

impl WalOptions {
    /// Refuses settings under which a frame might not fit into a fresh segment.
    pub(super) fn check(&self) -> Result<(), WalError> {
        let head = FRAME_HEADER + 64 + 3 * self.max_meta_bytes as u64;
        let largest =
            (FRAME_HEADER + 16).saturating_add(self.max_entry_bytes.max(self.max_meta_bytes) as u64);
        let needed = (SEGMENT_HEADER + head).saturating_add(largest);
        if !self.segment_bytes.is_multiple_of(4096) || self.segment_bytes > 1 << 30 {
            return Err(WalError::Options("segment_bytes must be a multiple of 4096, at most 1 GiB".into()));
        }
        if needed > self.segment_bytes {
            return Err(WalError::Options(format!(
                "segment_bytes is {}, but the largest entry and the notes need {needed}",
                self.segment_bytes
            )));
        }
        Ok(())
    }
}
