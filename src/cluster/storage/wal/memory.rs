//! What readers see of one group without touching the disk: where each entry is, the newest
//! entries themselves, vote and purge state. Filled by the callers of the log at once and by the
//! writer as frames reach the disk; an entry that is not on disk yet is never evicted.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::frame::Position;
use crate::cluster::storage::disk::DiskFile;

/// Where an entry is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// Only in memory, handed in by this operation; an index that was truncated and appended
    /// again is told apart by it.
    Queued(u64),
    /// In a segment file.
    Stored(Position),
}

#[derive(Clone, Debug)]
struct Slot {
    place: Place,
    length: u32,
    data: Option<Bytes>,
}

/// An entry as a reader gets it.
pub(super) enum Located {
    /// From the cache.
    Here(Bytes),
    /// To be read from disk: where, and the length of the payload.
    OnDisk(Position, u32),
}

/// Entries of one group by index: contiguous, the newest with their bytes.
#[derive(Default)]
pub(super) struct EntryIndex {
    base: u64,
    slots: VecDeque<Slot>,
    /// All entries from here on are cached.
    cached_from: u64,
    cached_bytes: usize,
}

impl EntryIndex {
    /// Empty, expecting `base` next.
    pub(super) fn starting_at(base: u64) -> Self {
        Self { base, cached_from: base, ..Self::default() }
    }

    pub(super) fn next(&self) -> u64 {
        self.base + self.slots.len() as u64
    }

    pub(super) fn first(&self) -> Option<u64> {
        (!self.slots.is_empty()).then_some(self.base)
    }

    pub(super) fn last(&self) -> Option<u64> {
        self.next().checked_sub(1).filter(|_| !self.slots.is_empty())
    }

    /// Adds the next entry, in memory only.
    pub(super) fn push_queued(&mut self, operation: u64, data: Bytes) {
        self.cached_bytes += data.len();
        self.slots.push_back(Slot {
            place: Place::Queued(operation),
            length: data.len() as u32,
            data: Some(data),
        });
    }

    /// Adds the next entry, as found on disk.
    pub(super) fn push_stored(&mut self, at: Position, length: u32) {
        self.slots.push_back(Slot { place: Place::Stored(at), length, data: None });
        self.cached_from = self.next();
    }

    /// Notes that the entry handed in by `operation` is on disk. Nothing happens if it has been
    /// truncated or purged since.
    pub(super) fn stored(&mut self, index: u64, operation: u64, at: Position) {
        let Some(offset) = index.checked_sub(self.base) else { return };
        if let Some(slot) = self.slots.get_mut(offset as usize)
            && slot.place == Place::Queued(operation)
        {
            slot.place = Place::Stored(at);
        }
    }

    /// Drops the oldest cached bytes above the limit, as far as they are on disk.
    pub(super) fn evict(&mut self, limit: usize) {
        while self.cached_bytes > limit && self.cached_from < self.next() {
            let slot = &mut self.slots[(self.cached_from - self.base) as usize];
            if matches!(slot.place, Place::Queued(_)) {
                return;
            }
            self.cached_bytes -= slot.data.take().map_or(0, |data| data.len());
            self.cached_from += 1;
        }
    }

    /// Removes everything after `keep` (everything, for `None`).
    pub(super) fn truncate_after(&mut self, keep: Option<u64>) {
        let next = keep.map_or(0, |keep| keep + 1);
        while self.next() > next {
            match self.slots.pop_back() {
                Some(slot) => self.cached_bytes -= slot.data.map_or(0, |data| data.len()),
                None => {
                    self.base = next;
                    break;
                }
            }
        }
        self.cached_from = self.cached_from.clamp(self.base, self.next());
    }

    /// Removes everything up to `upto`; the next entry is at least `upto + 1`.
    pub(super) fn purge(&mut self, upto: u64) {
        while self.base <= upto {
            match self.slots.pop_front() {
                Some(slot) => {
                    self.cached_bytes -= slot.data.map_or(0, |data| data.len());
                    self.base += 1;
                }
                None => self.base = upto + 1,
            }
        }
        self.cached_from = self.cached_from.clamp(self.base, self.next());
    }

    /// Entries from `index` on; `None` if there is no such entry.
    pub(super) fn locate(&self, index: u64) -> Option<Located> {
        let slot = self.slots.get(index.checked_sub(self.base)? as usize)?;
        match (&slot.data, slot.place) {
            (Some(data), _) => Some(Located::Here(data.clone())),
            (None, Place::Stored(at)) => Some(Located::OnDisk(at, slot.length)),
            // A queued entry always has its bytes: `evict` passes it over.
            (None, Place::Queued(_)) => None,
        }
    }

    pub(super) fn length_of(&self, index: u64) -> Option<u32> {
        Some(self.slots.get(index.checked_sub(self.base)? as usize)?.length)
    }
}

/// Everything of one group that readers share with the writer.
pub(super) struct GroupMemory {
    pub(super) entries: EntryIndex,
    /// Open segment files by number, for readers.
    pub(super) files: BTreeMap<u64, Arc<dyn DiskFile>>,
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<Bytes>,
    pub(super) purged: Option<(u64, Bytes)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_confirmation_of_a_truncated_entry_does_not_touch_its_successor() {
        let mut entries = EntryIndex::starting_at(1);
        entries.push_queued(7, Bytes::from_static(b"old"));
        entries.truncate_after(Some(0));
        entries.push_queued(8, Bytes::from_static(b"new"));
        entries.stored(1, 7, Position { segment: 1, offset: 64 });
        entries.evict(0);
        assert!(matches!(entries.locate(1), Some(Located::Here(data)) if data == "new"));
    }

    #[test]
    fn eviction_stops_at_what_is_not_on_disk() {
        let mut entries = EntryIndex::starting_at(0);
        for index in 0..4 {
            entries.push_queued(index, Bytes::from_static(b"0123456789"));
        }
        let at = Position { segment: 1, offset: 64 };
        entries.stored(0, 0, at);
        entries.stored(1, 1, at);
        entries.evict(0);
        assert!(matches!(entries.locate(1), Some(Located::OnDisk(..))));
        assert!(matches!(entries.locate(2), Some(Located::Here(_))));
        entries.purge(9);
        assert_eq!((entries.first(), entries.next()), (None, 10));
    }
}
