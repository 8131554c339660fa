//! The watermark: a small file that remembers who this replica is and how far its log was known
//! to be durable, so that a replica which lost memory notices before it votes. Written by the
//! log's writer thread after every sync; at most one of its two slots is ever un-synced.
//!
//! ```text
//! slot (512 bytes, at 0 and 4096)
//!   magic 8 | version u32 | zero u32 | sequence u64 | cluster u128 | member u64 | incarnation u64
//!   | 2 × (flags u64 | vote hash u64 | last u64 | segment u64 | offset u64 | applied u64 | digest u128)
//!   | zeroes | XXH3-64 of all before
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::disk::{Disk, DiskFile};
use super::wal::Position;
use crate::ids::Group;

/// Name of the file in the replica's directory.
pub const FILE_NAME: &str = "watermark";

const MAGIC: [u8; 8] = *b"EVRLWMK\n";
const VERSION: u32 = 1;
const SLOT: usize = 512;
/// Slots lie on different pages, so that writing one cannot hurt the other.
const SLOT_AT: [u64; 2] = [0, 4096];
const FILE_BYTES: u64 = 8192;
const GROUP_AT: usize = 56;
const GROUP_BYTES: usize = 64;

/// Why the watermark could not be read or written.
#[derive(thiserror::Error, Debug)]
pub enum WatermarkError {
    /// The disk refused.
    #[error("watermark {}: {source}", .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the disk said.
        source: io::Error,
    },
    /// Neither slot is whole. The replica can no longer tell whether it lost memory.
    #[error(
        "watermark {} is damaged in both slots; this replica must not vote, rejoin it under a new id",
        .file.display()
    )]
    Corrupt {
        /// The file.
        file: PathBuf,
    },
    /// Written by a newer version of this program.
    #[error("watermark {} has format {found}, this program reads {known}", .file.display(), known = VERSION)]
    Version {
        /// The file.
        file: PathBuf,
        /// Its version.
        found: u32,
    },
}

/// What is remembered of one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GroupMark {
    /// XXH3-64 of the vote payload, if there was a vote.
    pub vote_hash: Option<u64>,
    /// Last durable index of the log.
    pub last: Option<u64>,
    /// The log was durable up to here.
    pub durable: Position,
    /// Last applied index, as reported by the state machine.
    pub applied: Option<u64>,
    /// Digest of the state at `applied`.
    pub digest: u128,
}

/// Contents of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WatermarkState {
    /// The cluster this replica belongs to.
    pub cluster: u128,
    /// Its member id.
    pub member: u64,
    /// Counts the openings of the log; durable before the log is used.
    pub incarnation: u64,
    /// Per group, by [`Group::index`].
    pub groups: [GroupMark; 2],
}

/// Hash of a vote payload, as kept in the watermark.
pub fn vote_hash(vote: &[u8]) -> u64 {
    xxh3_64(vote)
}

fn encode(state: &WatermarkState, sequence: u64) -> [u8; SLOT] {
    let mut slot = [0; SLOT];
    slot[..8].copy_from_slice(&MAGIC);
    slot[8..12].copy_from_slice(&VERSION.to_le_bytes());
    slot[16..24].copy_from_slice(&sequence.to_le_bytes());
    slot[24..40].copy_from_slice(&state.cluster.to_le_bytes());
    slot[40..48].copy_from_slice(&state.member.to_le_bytes());
    slot[48..56].copy_from_slice(&state.incarnation.to_le_bytes());
    for (at, mark) in state.groups.iter().enumerate() {
        let part = &mut slot[GROUP_AT + at * GROUP_BYTES..][..GROUP_BYTES];
        let flags = u64::from(mark.vote_hash.is_some())
            | u64::from(mark.last.is_some()) << 1
            | u64::from(mark.applied.is_some()) << 2;
        let numbers = [
            flags,
            mark.vote_hash.unwrap_or(0),
            mark.last.unwrap_or(0),
            mark.durable.segment,
            mark.durable.offset,
            mark.applied.unwrap_or(0),
        ];
        for (number, into) in numbers.iter().zip(part.chunks_exact_mut(8)) {
            into.copy_from_slice(&number.to_le_bytes());
        }
        part[48..64].copy_from_slice(&mark.digest.to_le_bytes());
    }
    let sum = xxh3_64(&slot[..SLOT - 8]);
    slot[SLOT - 8..].copy_from_slice(&sum.to_le_bytes());
    slot
}

/// Contents and sequence of a slot, or `None` if it is damaged or empty; `Err` is a version.
fn decode(slot: &[u8; SLOT]) -> Option<Result<(u64, WatermarkState), u32>> {
    let number = |at: usize| {
        let mut raw = [0; 8];
        raw.copy_from_slice(&slot[at..at + 8]);
        u64::from_le_bytes(raw)
    };
    let wide = |at: usize| u128::from(number(at)) | u128::from(number(at + 8)) << 64;
    if slot[..8] != MAGIC || xxh3_64(&slot[..SLOT - 8]) != number(SLOT - 8) {
        return None;
    }
    let version = number(8) as u32;
    if version != VERSION {
        return Some(Err(version));
    }
    let mut state = WatermarkState {
        cluster: wide(24),
        member: number(40),
        incarnation: number(48),
        ..Default::default()
    };
    for (at, mark) in state.groups.iter_mut().enumerate() {
        let start = GROUP_AT + at * GROUP_BYTES;
        let flags = number(start);
        let flagged = |bit: u64, value: u64| (flags & bit != 0).then_some(value);
        *mark = GroupMark {
            vote_hash: flagged(1, number(start + 8)),
            last: flagged(2, number(start + 16)),
            durable: Position { segment: number(start + 24), offset: number(start + 32) },
            applied: flagged(4, number(start + 40)),
            digest: wide(start + 48),
        };
    }
    Some(Ok((number(16), state)))
}

/// The open file.
pub struct Watermark {
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    sequence: u64,
    /// Slot that un-synced writes go to; the other holds the last synced state.
    slot: usize,
    dirty: bool,
}

impl Watermark {
    /// Reads the watermark of a replica's directory without opening its log: who it is. `None`
    /// if there is no such file.
    pub fn peek(disk: &dyn Disk, dir: &Path) -> Result<Option<WatermarkState>, WatermarkError> {
        Ok(Self::load(disk, dir)?.map(|(_, state)| state))
    }

    /// Creates the file, durably. A half-made one of an earlier try is replaced.
    pub fn create(disk: &dyn Disk, dir: &Path, state: &WatermarkState) -> Result<Self, WatermarkError> {
        let path = dir.join(FILE_NAME);
        let temporary = dir.join("watermark.tmp");
        let make = || {
            if disk.list(dir)?.iter().any(|name| name == "watermark.tmp") {
                disk.remove(&temporary)?;
            }
            let file = disk.create(&temporary)?;
            file.preallocate(FILE_BYTES)?;
            file.write_at(SLOT_AT[0], &encode(state, 1))?;
            file.write_at(SLOT_AT[1], &encode(state, 2))?;
            file.sync_data()?;
            disk.rename(&temporary, &path)?;
            disk.sync_dir(dir)?;
            Ok(file)
        };
        match make() {
            Ok(file) => Ok(Self { path, file, sequence: 2, slot: 0, dirty: false }),
            Err(source) => Err(WatermarkError::Io { file: path, source }),
        }
    }

    /// Opens the file; `None` if it is missing.
    pub fn load(disk: &dyn Disk, dir: &Path) -> Result<Option<(Self, WatermarkState)>, WatermarkError> {
        let path = dir.join(FILE_NAME);
        let fail = |source| WatermarkError::Io { file: path.clone(), source };
        if !disk.list(dir).map_err(fail)?.iter().any(|name| name == FILE_NAME) {
            return Ok(None);
        }
        let file = disk.open(&path).map_err(fail)?;
        if file.size().map_err(fail)? < FILE_BYTES {
            return Err(WatermarkError::Corrupt { file: path });
        }
        let mut newest: Option<(u64, WatermarkState, usize)> = None;
        for (slot, at) in SLOT_AT.into_iter().enumerate() {
            let mut bytes = [0; SLOT];
            file.read_at(at, &mut bytes).map_err(fail)?;
            match decode(&bytes) {
                Some(Ok((sequence, state))) if newest.is_none_or(|(known, ..)| sequence > known) => {
                    newest = Some((sequence, state, slot));
                }
                Some(Err(found)) => return Err(WatermarkError::Version { file: path, found }),
                _ => {}
            }
        }
        match newest {
            // The newest slot may not be durable (the process died, not the machine): the next
            // write goes to the same one only after a sync, which `write_both` does.
            Some((sequence, state, slot)) => {
                Ok(Some((Self { path, file, sequence, slot: 1 - slot, dirty: true }, state)))
            }
            None => Err(WatermarkError::Corrupt { file: path }),
        }
    }

    /// Writes both slots, each made durable before the other is touched: for what must survive
    /// the loss of one slot (identity and incarnation).
    pub fn write_both(&mut self, state: &WatermarkState) -> Result<(), WatermarkError> {
        self.file.sync_data().map_err(|source| self.io(source))?;
        for _ in 0..2 {
            self.write(state)?;
            self.sync()?;
        }
        Ok(())
    }

    /// Writes the state, without a sync: it survives the process, not a power cut.
    pub fn write(&mut self, state: &WatermarkState) -> Result<(), WatermarkError> {
        self.sequence += 1;
        let slot = encode(state, self.sequence);
        self.dirty = true;
        self.file.write_at(SLOT_AT[self.slot], &slot).map_err(|source| self.io(source))
    }

    /// Makes the last write durable; later ones go to the other slot.
    pub fn sync(&mut self) -> Result<(), WatermarkError> {
        if self.dirty {
            self.file.sync_data().map_err(|source| self.io(source))?;
            self.dirty = false;
            self.slot = 1 - self.slot;
        }
        Ok(())
    }

    /// Whether something written is not durable yet.
    pub fn dirty(&self) -> bool {
        self.dirty
    }

    fn io(&self, source: io::Error) -> WatermarkError {
        WatermarkError::Io { file: self.path.clone(), source }
    }
}

impl WatermarkState {
    /// The mark of one group.
    pub fn group(&self, group: Group) -> &GroupMark {
        &self.groups[group.index()]
    }

    /// The mark of one group, to change.
    pub fn group_mut(&mut self, group: Group) -> &mut GroupMark {
        &mut self.groups[group.index()]
    }
}
