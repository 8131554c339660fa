//! The one thread that writes. It takes everything that is queued, writes the frames of both
//! groups, syncs each touched file once, moves the watermark, and only then calls back, in the
//! order of the queue. The first error is final: nothing is written and no sync tried after it.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::frame::{self, HeadState, Kind, Position, SEGMENT_HEADER};
use super::recovery::SegmentMeta;
use super::segment::{Keeper, Segment};
use super::shared::{Done, Op, Shared};
use crate::cluster::storage::watermark::{Watermark, WatermarkError, WatermarkState, vote_hash};
use crate::ids::Group;

/// A watermark that was written but not synced is synced after this time at the latest.
const WATERMARK_SYNC_EVERY: Duration = Duration::from_secs(1);

/// Write buffers above this are given back after the batch.
const KEEP_BUFFER: usize = 4 << 20;

/// One group's end of the log.
pub(super) struct GroupWriter {
    group: Group,
    segment: Segment,
    /// Where the next frame goes; what lies between `written` and here is in `buffer`.
    offset: u64,
    written: u64,
    buffer: Vec<u8>,
    synced: Position,
    unsynced: bool,
    state: HeadState,
    segments: VecDeque<SegmentMeta>,
    /// Entries written since the last sync: index, operation, place.
    placed: Vec<(u64, u64, Position)>,
    /// Segments begun since the last sync.
    begun: Vec<Segment>,
    /// Segments that recovery no longer needs once the purge frame is durable.
    retired: Vec<u64>,
}

impl GroupWriter {
    pub(super) fn new(
        group: Group,
        segment: Segment,
        offset: u64,
        state: HeadState,
        segments: VecDeque<SegmentMeta>,
    ) -> Self {
        let synced = Position { segment: segment.number, offset };
        Self {
            group,
            segment,
            offset,
            written: offset,
            buffer: Vec::new(),
            synced,
            unsynced: false,
            state,
            segments,
            placed: Vec::new(),
            begun: Vec::new(),
            retired: Vec::new(),
        }
    }

    fn put(&mut self, kind: Kind, index: Option<u64>, payload: &Bytes) -> io::Result<Position> {
        let at = Position { segment: self.segment.number, offset: self.offset };
        frame::encode(&mut self.buffer, self.group, at, self.synced, kind, index, payload);
        self.offset += frame::frame_bytes(payload.len());
        if kind != Kind::Head {
            self.state.apply(kind, index, payload).map_err(io::Error::other)?;
        }
        Ok(at)
    }

    fn flush(&mut self, timing: &mut Timing) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.segment.file.write_at(self.written, &self.buffer)?;
            timing.bytes += self.buffer.len() as u64;
            self.written = self.offset;
            self.buffer.clear();
            if self.buffer.capacity() > KEEP_BUFFER {
                self.buffer = Vec::new();
            }
        }
        Ok(())
    }

    fn sync(&mut self, timing: &mut Timing) -> io::Result<()> {
        self.flush(timing)?;
        let start = Instant::now();
        self.segment.file.sync_data()?;
        timing.syncs.push(start.elapsed());
        self.synced = Position { segment: self.segment.number, offset: self.offset };
        self.unsynced = false;
        Ok(())
    }

    /// Goes on to the next segment if a frame with this payload does not fit. The full one is
    /// synced first, so a frame in a later segment proves that the earlier ones were durable.
    fn make_room(&mut self, payload: usize, keeper: &Keeper, timing: &mut Timing) -> io::Result<()> {
        if self.offset + frame::frame_bytes(payload) <= self.segment.capacity {
            return Ok(());
        }
        self.sync(timing)?;
        let previous_end = self.offset;
        self.segment = keeper.take(self.group, self.segment.number + 1)?;
        keeper.prepare(self.group, self.segment.number + 1);
        self.begin(previous_end)
    }

    /// Writes the head frame of a fresh segment.
    fn begin(&mut self, previous_end: u64) -> io::Result<()> {
        let number = self.segment.number;
        self.segments.push_back(SegmentMeta { number, max_index: None });
        self.begun.push(self.segment.clone());
        self.offset = SEGMENT_HEADER;
        self.written = SEGMENT_HEADER;
        self.state.previous_end = previous_end;
        self.state.oldest = self.segments.front().map_or(number, |oldest| oldest.number);
        let head = self.state.encode().into();
        self.put(Kind::Head, None, &head)?;
        self.unsynced = true;
        Ok(())
    }

    fn purge(&mut self, upto: u64, meta: &Bytes, keeper: &Keeper, timing: &mut Timing) -> io::Result<()> {
        if self.state.purged_index() >= Some(upto) {
            return Ok(());
        }
        self.make_room(meta.len() + 8, keeper, timing)?;
        while self.segments.len() > 1 && self.segments[0].max_index <= Some(upto) {
            self.retired.extend(self.segments.pop_front().map(|segment| segment.number));
        }
        let oldest = self.segments.front().map_or(self.segment.number, |oldest| oldest.number);
        self.put(Kind::Purge, Some(upto), &HeadState::purge_payload(oldest, meta))?;
        Ok(())
    }

    fn entry(
        &mut self,
        index: u64,
        operation: u64,
        data: &Bytes,
        keeper: &Keeper,
        timing: &mut Timing,
    ) -> io::Result<()> {
        self.make_room(data.len(), keeper, timing)?;
        let at = self.put(Kind::Entry, Some(index), data)?;
        if let Some(meta) = self.segments.back_mut() {
            meta.max_index = meta.max_index.max(Some(index));
        }
        self.placed.push((index, operation, at));
        Ok(())
    }
}

/// What a batch cost.
#[derive(Default)]
pub(super) struct Timing {
    pub(super) syncs: Vec<Duration>,
    pub(super) bytes: u64,
    pub(super) watermark_syncs: u64,
}

/// The writer thread's own state.
pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) groups: [GroupWriter; 2],
    pub(super) keeper: Keeper,
    pub(super) watermark: Watermark,
    pub(super) mark: WatermarkState,
    pub(super) cache_bytes: usize,
    /// Held until nothing is written any more.
    pub(super) _lock: Box<dyn Any + Send + Sync>,
}

/// What the writer found to do.
enum Work {
    Batch(Vec<Op>),
    /// Only the watermark is due.
    Watermark,
    Stop,
}

fn watermark_io(error: WatermarkError) -> io::Error {
    match error {
        WatermarkError::Io { source, .. } => source,
        other => io::Error::other(other),
    }
}

/// Calls everyone, also after one of them has panicked.
fn call_back(dones: Vec<Done>) -> io::Result<()> {
    let mut outcome = Ok(());
    for done in dones {
        if catch_unwind(AssertUnwindSafe(|| done(Ok(())))).is_err() {
            outcome = Err(io::Error::other("a callback of the log panicked"));
        }
    }
    outcome
}

/// Fails the log if the thread ends in any other way than by being told to.
struct Obituary(Arc<Shared>);

impl Drop for Obituary {
    fn drop(&mut self) {
        let error = io::Error::other("the log is closed");
        self.0.fail(&error, Vec::new());
    }
}

impl Writer {
    /// The thread's body; returns when the log is closed or has failed.
    pub(super) fn run(mut self) {
        let obituary = Obituary(self.shared.clone());
        for group in &self.groups {
            self.keeper.prepare(group.group, group.segment.number + 1);
        }
        let mut synced_at = Instant::now();
        loop {
            let batch = match self.next(synced_at) {
                Work::Batch(batch) => batch,
                Work::Watermark => Vec::new(),
                Work::Stop => break,
            };
            let mut dones = Vec::with_capacity(batch.len());
            let due = synced_at.elapsed() >= WATERMARK_SYNC_EVERY;
            match self.carry_out(batch, &mut dones, due) {
                Ok(watermark_synced) => {
                    if watermark_synced {
                        synced_at = Instant::now();
                    }
                    if let Err(error) = call_back(dones) {
                        self.shared.fail(&error, Vec::new());
                        return;
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "write-ahead log failed; this replica stops taking part");
                    self.shared.fail(&error, dones);
                    return;
                }
            }
        }
        // Closing: everything queued was carried out. A failure here loses no promise.
        self.take_applied();
        let _ = self.watermark.write(&self.mark).and_then(|()| self.watermark.sync());
        drop(obituary);
    }

    fn next(&self, synced_at: Instant) -> Work {
        let mut core = self.shared.core.lock();
        loop {
            if !core.queue.is_empty() {
                let batch = std::mem::take(&mut core.queue).into();
                core.queued_bytes = 0;
                self.shared.room.notify_all();
                return Work::Batch(batch);
            }
            if core.stopping {
                return Work::Stop;
            }
            if self.watermark.dirty() || core.applied_dirty {
                let due = synced_at + WATERMARK_SYNC_EVERY;
                if Instant::now() >= due || self.shared.work.wait_until(&mut core, due).timed_out() {
                    return Work::Watermark;
                }
            } else {
                self.shared.work.wait(&mut core);
            }
        }
    }

    fn take_applied(&mut self) {
        let mut core = self.shared.core.lock();
        core.applied_dirty = false;
        for (mark, applied) in self.mark.groups.iter_mut().zip(&core.applied) {
            if let Some((index, digest)) = applied {
                mark.applied = Some(*index);
                mark.digest = *digest;
            }
        }
    }

    /// Writes and syncs a batch; `dones` are the callbacks to call, in order. True if the
    /// watermark was synced too.
    fn carry_out(&mut self, batch: Vec<Op>, dones: &mut Vec<Done>, due: bool) -> io::Result<bool> {
        let mut timing = Timing::default();
        let mut sync_watermark = due;
        let mut batch = batch.into_iter();
        let mut outcome = Ok(());
        for op in batch.by_ref() {
            outcome = self.encode(op, dones, &mut sync_watermark, &mut timing);
            if outcome.is_err() {
                break;
            }
        }
        // The callbacks of what was not reached are owed an answer as well.
        dones.extend(batch.filter_map(Op::into_done));
        outcome?;

        for writer in &mut self.groups {
            writer.flush(&mut timing)?;
        }
        for writer in &mut self.groups {
            if writer.unsynced {
                writer.sync(&mut timing)?;
            }
        }
        self.take_applied();
        for writer in &self.groups {
            let mark = self.mark.group_mut(writer.group);
            // Only what is durable: commit notes may lie after `synced`, but they move neither
            // vote nor last index.
            mark.durable = writer.synced;
            mark.last = writer.state.last;
            mark.vote_hash = writer.state.vote.as_deref().map(vote_hash);
        }
        self.watermark.write(&self.mark).map_err(watermark_io)?;
        if sync_watermark {
            self.watermark.sync().map_err(watermark_io)?;
            timing.watermark_syncs += 1;
        }
        self.publish(&timing);
        for writer in &mut self.groups {
            self.keeper.retire(writer.group, std::mem::take(&mut writer.retired));
        }
        Ok(sync_watermark)
    }

    fn encode(
        &mut self,
        op: Op,
        dones: &mut Vec<Done>,
        sync_watermark: &mut bool,
        timing: &mut Timing,
    ) -> io::Result<()> {
        let keeper = &self.keeper;
        let mut owed = |done: Done| dones.push(done);
        match op {
            Op::Append { group, operation, entries, done } => {
                owed(done);
                let writer = &mut self.groups[group.index()];
                writer.unsynced = true;
                for (index, data) in &entries {
                    writer.entry(*index, operation, data, keeper, timing)?;
                    writer.unsynced = true;
                }
            }
            Op::Vote { group, vote, done } => {
                owed(done);
                *sync_watermark = true;
                let writer = &mut self.groups[group.index()];
                writer.make_room(vote.len(), keeper, timing)?;
                writer.put(Kind::Vote, None, &vote)?;
                writer.unsynced = true;
            }
            Op::TruncateAfter { group, keep, done } => {
                owed(done);
                let writer = &mut self.groups[group.index()];
                writer.make_room(0, keeper, timing)?;
                writer.put(Kind::TruncateAfter, keep, &Bytes::new())?;
                writer.unsynced = true;
            }
            Op::Purge { group, upto, meta, done } => {
                owed(done);
                let writer = &mut self.groups[group.index()];
                writer.purge(upto, &meta, keeper, timing)?;
                writer.unsynced = true;
            }
            Op::Committed { group, committed } => {
                let writer = &mut self.groups[group.index()];
                writer.make_room(committed.len(), keeper, timing)?;
                writer.put(Kind::Committed, None, &committed)?;
            }
            Op::SyncWatermark { done } => {
                owed(done);
                *sync_watermark = true;
            }
        }
        Ok(())
    }

    /// Tells readers what is on disk now.
    fn publish(&mut self, timing: &Timing) {
        let mut core = self.shared.core.lock();
        let core = &mut *core;
        core.stats.add(timing);
        for writer in &mut self.groups {
            let memory = &mut core.groups[writer.group.index()];
            for segment in writer.begun.drain(..) {
                memory.files.insert(segment.number, segment.file);
            }
            for (index, operation, at) in writer.placed.drain(..) {
                memory.entries.stored(index, operation, at);
            }
            for number in &writer.retired {
                memory.files.remove(number);
            }
            memory.entries.evict(self.cache_bytes);
        }
    }
}
