//! What can go wrong with the log, in words that name the file and the remedy. Returned by every
//! call of the log; built by recovery, writer and reader.

use std::io;
use std::path::{Path, PathBuf};

use crate::cluster::storage::watermark::WatermarkError;
use crate::ids::Group;

/// Why the log did not do something.
#[derive(thiserror::Error, Debug)]
pub enum WalError {
    /// The options make no sense together.
    #[error("write-ahead log options: {0}")]
    Options(String),
    /// The disk refused.
    #[error("write-ahead log {}: {source}", .file.display())]
    Io {
        /// File or directory.
        file: PathBuf,
        /// What the disk said.
        source: io::Error,
    },
    /// Another process has this log open.
    #[error("{} is in use by another process", .dir.display())]
    Locked {
        /// The replica's directory.
        dir: PathBuf,
    },
    /// Something that was durable is damaged. Nothing was changed on disk.
    #[error("{} is damaged at byte {offset}: {why}; this replica must not vote, rejoin it under a new id", .file.display())]
    Corrupt {
        /// The segment.
        file: PathBuf,
        /// Where in the file.
        offset: u64,
        /// What does not hold.
        why: String,
    },
    /// A segment that recovery needs is not there.
    #[error("segment {} is missing; this replica must not vote, rejoin it under a new id", .file.display())]
    MissingSegment {
        /// The file that should exist.
        file: PathBuf,
    },
    /// Written by a newer version of this program.
    #[error("{} has format {found}, this program reads {known}; start the newer version again", .file.display(), known = super::frame::VERSION)]
    Version {
        /// The segment.
        file: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The log ends before, or differs at, a place that was known to be durable.
    #[error("the {group} log has lost memory: {why}; this replica must not vote, rejoin it under a new id")]
    LostMemory {
        /// Whose log.
        group: Group,
        /// What is missing.
        why: String,
    },
    /// The watermark speaks of a log, but there is none.
    #[error("{} holds no {group} log although the watermark knows one; this replica must not vote, rejoin it under a new id", .dir.display())]
    LogMissing {
        /// Whose log.
        group: Group,
        /// Where it should be.
        dir: PathBuf,
    },
    /// There is a log, but no watermark.
    #[error("{} is missing although {} holds a log; whether the log is complete cannot be told, rejoin this replica under a new id", .watermark.display(), .dir.display())]
    WatermarkMissing {
        /// The file that should exist.
        watermark: PathBuf,
        /// Where the log is.
        dir: PathBuf,
    },
    /// The directory belongs to someone else.
    #[error("{} belongs to member {found_member} of cluster {found_cluster:032x}, not to member {member} of {cluster:032x}", .dir.display())]
    Identity {
        /// The replica's directory.
        dir: PathBuf,
        /// Cluster asked for.
        cluster: u128,
        /// Member asked for.
        member: u64,
        /// Cluster found.
        found_cluster: u128,
        /// Member found.
        found_member: u64,
    },
    /// The watermark file cannot be read or written.
    #[error(transparent)]
    Watermark(#[from] WatermarkError),
    /// The log has failed earlier or is closed; it stays so until it is opened again.
    #[error("the write-ahead log has failed: {0}")]
    Failed(String),
    /// Entries must continue the log.
    #[error("the {group} log expects entry {expected}, not {found}")]
    Order {
        /// Whose log.
        group: Group,
        /// Next index.
        expected: u64,
        /// Index handed in.
        found: u64,
    },
    /// Truncation below what was purged.
    #[error("the {group} log cannot be cut after {index:?}: {purged} is purged")]
    CutBelowPurged {
        /// Whose log.
        group: Group,
        /// Index to keep.
        index: Option<u64>,
        /// Last purged index.
        purged: u64,
    },
    /// The payload is larger than the log takes.
    #[error("a payload of {bytes} bytes is above the log's limit of {max}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The entry was purged; a checkpoint covers it.
    #[error("entry {index} of the {group} log is purged (up to {purged})")]
    Purged {
        /// Whose log.
        group: Group,
        /// Entry asked for.
        index: u64,
        /// Last purged index.
        purged: u64,
    },
}

impl WalError {
    /// Whether this replica can no longer vouch for what it promised: it must not vote, and
    /// rejoins under a new id.
    pub fn forbids_voting(&self) -> bool {
        matches!(
            self,
            WalError::Corrupt { .. }
                | WalError::MissingSegment { .. }
                | WalError::LostMemory { .. }
                | WalError::LogMissing { .. }
                | WalError::WatermarkMissing { .. }
                | WalError::Watermark(WatermarkError::Corrupt { .. })
        )
    }

    pub(super) fn io(file: &Path) -> impl FnOnce(io::Error) -> WalError + '_ {
        move |source| WalError::Io { file: file.to_path_buf(), source }
    }
}
