//! The write-ahead log of both Raft groups, for the storage adapter under Raft: one directory,
//! one writer thread, group commit. Invariants: nothing is called done before it would survive a
//! power cut; operations of a group take effect in the order they were handed in; what was
//! durable and no longer reads back is an error, never cut; the first disk error is final.

mod error;
mod frame;
mod memory;
mod opening;
mod options;
mod read_ahead;
mod recovery;
mod segment;
mod shared;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::VecDeque;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{JoinHandle, ThreadId};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, MutexGuard};

pub use self::error::WalError;
pub use self::frame::Position;
pub use self::options::WalOptions;
pub use self::shared::{Done, SYNC_BUCKETS_US, WalStats};

use self::memory::{EntryIndex, GroupMemory, Located};
use self::opening::{create_log, open_watermark, remove_temporaries, split, summary};
use self::read_ahead::ReadAhead;
use self::recovery::Inspection;
use self::segment::{Keeper, SegmentStore};
use self::shared::{Core, Op, Shared};
use self::writer::Writer;
use super::disk::Disk;
use super::watermark::WatermarkState;
use crate::ids::{Group, Incarnation};

/// What was found when the log was opened, per group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The last saved vote.
    pub vote: Option<Bytes>,
    /// The last saved commit note that survived; it may be older than the last one saved.
    pub committed: Option<Bytes>,
    /// Last purged index and what was handed in with it.
    pub purged: Option<(u64, Bytes)>,
    /// First entry.
    pub first: Option<u64>,
    /// Last entry.
    pub last: Option<u64>,
    /// Bytes of a torn write that were cut from the end. No one was told they were durable.
    pub truncated_tail_bytes: u64,
}

/// The open log. Share it with `Arc`; dropping the last handle writes what is queued and closes.
pub struct Wal {
    shared: Arc<Shared>,
    options: WalOptions,
    dir: PathBuf,
    incarnation: Incarnation,
    found: Option<WatermarkState>,
    thread: Option<JoinHandle<()>>,
    writer: ThreadId,
}

impl Wal {
    /// Opens the log of a replica's directory, or creates it if neither log nor watermark are
    /// there. Counts the incarnation up, durably. Where nothing is wrong, what is left of a torn
    /// last write is cut; where something is, nothing on disk is changed.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: WalOptions,
    ) -> Result<(Wal, [Recovered; 2]), WalError> {
        options.check()?;
        disk.create_dir(dir).map_err(WalError::io(dir))?;
        let lock = disk.lock(&dir.join("lock")).map_err(|source| match source.kind() {
            std::io::ErrorKind::WouldBlock => WalError::Locked { dir: dir.to_path_buf() },
            _ => WalError::Io { file: dir.join("lock"), source },
        })?;
        let store = SegmentStore {
            disk: disk.clone(),
            dir: dir.join("log"),
            bytes: options.segment_bytes,
            max_spares: options.max_spare_segments,
        };
        let (mut watermark, found) = open_watermark(&*disk, dir, &store, &options)?;
        let fresh = WatermarkState { cluster: options.cluster, member: options.member, ..Default::default() };
        let mut mark = found.unwrap_or(fresh);

        // First look at both groups, then change anything.
        let mut inspected = [None, None];
        for group in Group::ALL {
            inspected[group.index()] =
                Inspection { store: &store, group, mark: mark.group(group) }.inspect()?;
        }
        disk.create_dir(&store.dir).map_err(WalError::io(&store.dir))?;
        remove_temporaries(&store)?;
        let mut ready = [None, None];
        let mut opened = Vec::new();
        for group in Group::ALL {
            let log = match inspected[group.index()].take() {
                Some(log) => {
                    log.repair(&store, group)?;
                    log
                }
                None => create_log(&store, group)?,
            };
            let state = mark.group_mut(group);
            state.durable = Position { segment: log.current.number, offset: log.end };
            state.last = log.state.last;
            state.vote_hash = log.state.vote.as_deref().map(super::watermark::vote_hash);
            ready[group.index()] = log.prepared.clone();
            opened.push((group, log));
        }
        mark.incarnation += 1;
        watermark.write_both(&mark)?;

        let mut recovered = [Recovered::default(), Recovered::default()];
        let (writers, memories): (Vec<_>, Vec<_>) = opened
            .into_iter()
            .map(|(group, log)| {
                recovered[group.index()] = summary(&log);
                split(group, log)
            })
            .unzip();
        // `opened` holds one log per group, in index order.
        let (Ok(groups), Ok(memories)) = (writers.try_into(), memories.try_into()) else {
            return Err(WalError::Options("not two groups".into()));
        };
        let shared = Arc::new(Shared {
            core: Mutex::new(Core {
                groups: memories,
                queue: VecDeque::new(),
                queued_bytes: 0,
                next_operation: 1,
                stopping: false,
                failed: None,
                applied: [None, None],
                applied_dirty: false,
                stats: WalStats::default(),
            }),
            work: Condvar::new(),
            room: Condvar::new(),
        });
        let keeper = Keeper::start(store, ready).map_err(WalError::io(dir))?;
        let writer = Writer {
            shared: shared.clone(),
            groups,
            keeper,
            watermark,
            mark,
            cache_bytes: options.cache_bytes,
            _lock: lock,
        };
        let thread = std::thread::Builder::new()
            .name("wal-writer".into())
            .spawn(move || writer.run())
            .map_err(WalError::io(dir))?;
        let wal = Wal {
            shared,
            options,
            dir: dir.join("log"),
            incarnation: Incarnation(mark.incarnation),
            found,
            writer: thread.thread().id(),
            thread: Some(thread),
        };
        Ok((wal, recovered))
    }

    /// Appends entries. They can be read when this returns; `done` is called when they are
    /// durable. Blocks while the queue holds more than `max_queue_bytes`: whoever appends waits
    /// for the disk. On `Err` nothing was taken and `done` is never called.
    pub fn append(&self, group: Group, entries: Vec<(u64, Bytes)>, done: Done) -> Result<(), WalError> {
        let mut bytes = 0;
        for (_, data) in &entries {
            self.check_size(data, self.options.max_entry_bytes)?;
            bytes += data.len();
        }
        let mut core = self.enter(bytes)?;
        let memory = &core.groups[group.index()];
        let mut expected = memory.entries.next();
        if let (true, Some((found, _))) = (memory.pristine(), entries.first()) {
            expected = *found;
        }
        for (nth, (found, _)) in entries.iter().enumerate() {
            let expected = expected + nth as u64;
            if *found != expected {
                return Err(WalError::Order { group, expected, found: *found });
            }
        }
        let operation = core.next_operation;
        core.next_operation += 1;
        let memory = &mut core.groups[group.index()];
        if memory.pristine() && !entries.is_empty() {
            memory.entries = EntryIndex::starting_at(expected);
        }
        for (_, data) in &entries {
            memory.entries.push_queued(operation, data.clone());
        }
        self.submit(core, Op::Append { group, operation, entries, done });
        Ok(())
    }

    /// Saves the vote; `done` is called when vote and watermark are durable. The vote covers
    /// everything handed in for the group before it.
    pub fn save_vote(&self, group: Group, vote: Bytes, done: Done) -> Result<(), WalError> {
        self.check_size(&vote, self.options.max_meta_bytes)?;
        let mut core = self.enter(vote.len())?;
        core.groups[group.index()].vote = Some(vote.clone());
        self.submit(core, Op::Vote { group, vote, done });
        Ok(())
    }

    /// Removes every entry after `keep`, or all that are not purged. They are gone for readers
    /// at once, and for good when `done` is called.
    pub fn truncate_after(&self, group: Group, keep: Option<u64>, done: Done) -> Result<(), WalError> {
        let mut core = self.enter(0)?;
        let memory = &mut core.groups[group.index()];
        let purged = memory.purged.as_ref().map(|(index, _)| *index);
        if let Some(purged) = purged.filter(|purged| keep.is_some_and(|keep| keep < *purged)) {
            return Err(WalError::CutBelowPurged { group, index: keep, purged });
        }
        memory.entries.truncate_after(keep.max(purged));
        self.submit(core, Op::TruncateAfter { group, keep, done });
        Ok(())
    }

    /// Forgets every entry up to `upto`; a checkpoint must cover them, durably. `meta` is kept
    /// with the index. Beyond the end of the log, the log goes on at `upto + 1`. Segments that
    /// are no longer needed are removed in the background after `done`. An index that is
    /// already purged changes nothing.
    pub fn purge(&self, group: Group, upto: u64, meta: Bytes, done: Done) -> Result<(), WalError> {
        self.check_size(&meta, self.options.max_meta_bytes)?;
        let mut core = self.enter(meta.len())?;
        let memory = &mut core.groups[group.index()];
        if memory.purged.as_ref().is_none_or(|(purged, _)| *purged < upto) {
            memory.entries.purge(upto);
            memory.purged = Some((upto, meta.clone()));
        }
        self.submit(core, Op::Purge { group, upto, meta, done });
        Ok(())
    }

    /// Notes how far the log is committed. Written, but not synced for its own sake: after a
    /// power cut an older note may be found.
    pub fn save_committed(&self, group: Group, committed: Bytes) -> Result<(), WalError> {
        self.check_size(&committed, self.options.max_meta_bytes)?;
        let mut core = self.enter(committed.len())?;
        core.groups[group.index()].committed = Some(committed.clone());
        self.submit(core, Op::Committed { group, committed });
        Ok(())
    }

    /// Notes what is applied, for the watermark. Written with the next batch, or within a second.
    pub fn note_applied(&self, group: Group, index: u64, digest: u128) {
        let mut core = self.shared.core.lock();
        core.applied[group.index()] = Some((index, digest));
        if !core.applied_dirty {
            core.applied_dirty = true;
            drop(core);
            self.shared.work.notify_one();
        }
    }

    /// Makes the watermark durable now.
    pub fn sync_watermark(&self, done: Done) -> Result<(), WalError> {
        let core = self.enter(0)?;
        self.submit(core, Op::SyncWatermark { done });
        Ok(())
    }

    /// Entries of a range, in order, at least one if it exists, then as many as fit in
    /// `max_bytes` of payload. Ends early where the log does. `Purged` if the range starts in
    /// what is purged.
    pub fn read(
        &self,
        group: Group,
        range: Range<u64>,
        max_bytes: usize,
    ) -> Result<Vec<(u64, Bytes)>, WalError> {
        let mut located = Vec::new();
        let mut files = Vec::new();
        {
            let core = self.shared.core.lock();
            let memory = &core.groups[group.index()];
            let start = match &memory.purged {
                Some((purged, _)) if range.start <= *purged && range.start < range.end => {
                    return Err(WalError::Purged { group, index: range.start, purged: *purged });
                }
                _ => range.start.max(memory.entries.first().unwrap_or(range.start)),
            };
            let mut bytes = 0;
            for index in start..range.end {
                let Some(length) = memory.entries.length_of(index) else { break };
                bytes += length as usize;
                if bytes > max_bytes && !located.is_empty() {
                    break;
                }
                let Some(place) = memory.entries.locate(index) else { break };
                if let Located::OnDisk(at, _) = place {
                    files.push(memory.files.get(&at.segment).cloned());
                } else {
                    files.push(None);
                }
                located.push((index, place));
            }
        }
        let mut entries = Vec::with_capacity(located.len());
        let mut run = ReadAhead::default();
        for (nth, (index, place)) in located.iter().enumerate() {
            let data = match place {
                Located::Here(data) => data.clone(),
                Located::OnDisk(at, length) => match &files[nth] {
                    Some(file) => run
                        .entry(&**file, group, *at, *length, &located[nth..], *index)
                        .map_err(|why| self.unreadable(group, *index, *at, why))?,
                    None => return Err(self.unreadable(group, *index, *at, "its segment is gone".into())),
                },
            };
            entries.push((*index, data));
        }
        Ok(entries)
    }

    /// First and last entry.
    pub fn bounds(&self, group: Group) -> (Option<u64>, Option<u64>) {
        let core = self.shared.core.lock();
        let entries = &core.groups[group.index()].entries;
        (entries.first(), entries.last())
    }

    /// The vote last handed in.
    pub fn vote(&self, group: Group) -> Option<Bytes> {
        self.shared.core.lock().groups[group.index()].vote.clone()
    }

    /// The commit note last handed in.
    pub fn committed(&self, group: Group) -> Option<Bytes> {
        self.shared.core.lock().groups[group.index()].committed.clone()
    }

    /// Last purged index and what was handed in with it.
    pub fn purged(&self, group: Group) -> Option<(u64, Bytes)> {
        self.shared.core.lock().groups[group.index()].purged.clone()
    }

    /// Bytes of the group's segments on disk, without the one prepared ahead and the spares.
    /// Segments of an earlier, other `segment_bytes` are counted with today's.
    pub fn bytes(&self, group: Group) -> u64 {
        let segments = self.shared.core.lock().groups[group.index()].files.len();
        segments as u64 * self.options.segment_bytes
    }

    /// Counters for metrics.
    pub fn stats(&self) -> WalStats {
        self.shared.core.lock().stats.clone()
    }

    /// Why the log refuses everything, if it does.
    pub fn failed(&self) -> Option<String> {
        self.shared.core.lock().failed.clone()
    }

    /// How often this log was opened, this time included: the incarnation of the replica.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The watermark as it was before this opening; `None` if the log was created.
    pub fn found_watermark(&self) -> Option<&WatermarkState> {
        self.found.as_ref()
    }

    fn check_size(&self, data: &Bytes, max: usize) -> Result<(), WalError> {
        let bytes = data.len();
        if bytes > max { Err(WalError::TooLarge { bytes, max }) } else { Ok(()) }
    }

    /// Waits for room in the queue and refuses if the log has failed.
    fn enter(&self, bytes: usize) -> Result<MutexGuard<'_, Core>, WalError> {
        let mut core = self.shared.core.lock();
        loop {
            if let Some(why) = &core.failed {
                return Err(WalError::Failed(why.clone()));
            }
            // A callback that hands in more work must not wait for its own thread.
            let on_writer = std::thread::current().id() == self.writer;
            let fits = core.queued_bytes + bytes <= self.options.max_queue_bytes;
            if fits || core.queue.is_empty() || on_writer {
                return Ok(core);
            }
            self.shared.room.wait(&mut core);
        }
    }

    fn submit(&self, mut core: MutexGuard<'_, Core>, op: Op) {
        core.queued_bytes += op.bytes();
        core.queue.push_back(op);
        drop(core);
        self.shared.work.notify_one();
    }

    /// The error for an entry that could not be read: purged in the meantime, or damaged.
    fn unreadable(&self, group: Group, index: u64, at: Position, why: String) -> WalError {
        match self.purged(group) {
            Some((purged, _)) if index <= purged => WalError::Purged { group, index, purged },
            _ => WalError::Corrupt {
                file: self.dir.join(segment::file_name(group, at.segment)),
                offset: at.offset,
                why: format!("entry {index}: {why}"),
            },
        }
    }
}

impl Drop for Wal {
    fn drop(&mut self) {
        self.shared.core.lock().stopping = true;
        self.shared.work.notify_one();
        if let Some(thread) = self.thread.take() {
            // A callback may own the last handle: the thread then ends on its own.
            if std::thread::current().id() != self.writer {
                // A panic was reported through `failed` by the thread itself.
                let _ = thread.join();
            }
        }
    }
}

impl GroupMemory {
    /// Nothing was ever appended or purged: the first index is the caller's choice
    /// (openraft's conformance suite begins anywhere).
    fn pristine(&self) -> bool {
        self.purged.is_none() && self.entries.next() == 0
    }
}
