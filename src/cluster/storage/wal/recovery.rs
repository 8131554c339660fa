//! Reading a group's segments back when the log is opened: `inspect` decides and writes nothing,
//! `repair` cuts the torn tail. Invariant: only bytes that no one was ever told are durable may
//! be cut; anything else that does not validate is an error naming file and byte.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::error::WalError;
use super::frame::{self, FRAME_HEADER, HeadState, Kind, Position, SEGMENT_HEADER};
use super::memory::EntryIndex;
use super::segment::{Segment, SegmentStore, parse_name};
use crate::cluster::storage::disk::DiskFile;
use crate::cluster::storage::watermark::{GroupMark, vote_hash};
use crate::ids::Group;

/// What the writer remembers of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SegmentMeta {
    pub(super) number: u64,
    /// Highest entry index ever written into it.
    pub(super) max_index: Option<u64>,
}

/// A group's log as found, and what is to be done about its end.
pub(super) struct Inspected {
    pub(super) state: HeadState,
    pub(super) entries: EntryIndex,
    pub(super) segments: VecDeque<SegmentMeta>,
    pub(super) files: BTreeMap<u64, Arc<dyn DiskFile>>,
    /// The segment that is written next, and where.
    pub(super) current: Segment,
    pub(super) end: u64,
    /// The one after, if it is ready for use.
    pub(super) prepared: Option<Segment>,
    /// Bytes of torn frames after `end`; they are zeroed by `repair`.
    pub(super) torn_bytes: u64,
    /// Segments to delete: purged ones, and what came after the end.
    discard: Vec<u64>,
    durable_from: u64,
}

struct Loaded {
    file: Arc<dyn DiskFile>,
    bytes: Bytes,
}

/// Head state, its frame, and the segment's capacity.
type FirstFrame = (HeadState, frame::Frame, u64);

/// Offset in the segment, and what is wrong there.
type Unreadable = (u64, &'static str);

/// One group's directory and what the watermark says of it.
pub(super) struct Inspection<'a> {
    pub(super) store: &'a SegmentStore,
    pub(super) group: Group,
    pub(super) mark: &'a GroupMark,
}

impl Inspection<'_> {
    fn corrupt(&self, at: Position, why: impl Into<String>) -> WalError {
        let file = self.store.path(self.group, at.segment);
        WalError::Corrupt { file, offset: at.offset, why: why.into() }
    }

    fn lost(&self, why: String) -> WalError {
        WalError::LostMemory { group: self.group, why }
    }

    fn load(&self, number: u64) -> Result<Loaded, WalError> {
        let path: PathBuf = self.store.path(self.group, number);
        let read = || {
            let file = self.store.disk.open(&path)?;
            let mut bytes = vec![0; file.size()? as usize];
            file.read_at(0, &mut bytes)?;
            Ok(Loaded { file, bytes: bytes.into() })
        };
        read().map_err(WalError::io(&path))
    }

    /// Places at or after `from` where something looks like a frame of this segment, with the
    /// frame if it is valid.
    fn candidates<'b>(
        &'b self,
        number: u64,
        bytes: &'b Bytes,
        from: u64,
    ) -> impl Iterator<Item = (Position, Option<frame::Frame>)> + 'b {
        let from = from.next_multiple_of(8) as usize;
        (from..bytes.len().saturating_sub(FRAME_HEADER as usize - 1)).step_by(8).filter_map(move |offset| {
            if !frame::looks_like_frame(&bytes[offset..], number) {
                return None;
            }
            let at = Position { segment: number, offset: offset as u64 };
            Some((at, frame::decode(self.group, at, &bytes.slice(offset..)).ok()))
        })
    }

    /// The furthest sync that a valid frame in these segments tells of, and whether there is any
    /// valid frame.
    fn claims(&self, numbers: &[u64]) -> Result<(Position, bool), WalError> {
        let mut furthest = Position::default();
        let mut any = false;
        for number in numbers {
            let loaded = self.load(*number)?;
            for (_, frame) in self.candidates(*number, &loaded.bytes, SEGMENT_HEADER) {
                if let Some(frame) = frame {
                    furthest = furthest.max(frame.synced);
                    any = true;
                }
            }
        }
        Ok((furthest, any))
    }

    /// Capacity by the segment's header, after checking everything it says.
    fn check_header(&self, number: u64, bytes: &Bytes) -> Result<Result<u64, &'static str>, WalError> {
        let header = match frame::decode_segment_header(bytes) {
            Ok(header) => header,
            Err(why) => return Ok(Err(why)),
        };
        let start = Position { segment: number, offset: 0 };
        if header.version != frame::VERSION {
            let file = self.store.path(self.group, number);
            return Err(WalError::Version { file, found: header.version });
        }
        if header.group as usize != self.group.index() || header.number != number {
            let why = format!("this is segment {} of group {}", header.number, header.group);
            return Err(self.corrupt(start, why));
        }
        if (bytes.len() as u64) < header.capacity {
            let why = format!("file was cut short: it should have {} bytes", header.capacity);
            return Err(self.corrupt(Position { segment: number, offset: bytes.len() as u64 }, why));
        }
        Ok(Ok(header.capacity))
    }

    /// Reads the group's log. `None`: there is none, and none was promised.
    pub(super) fn inspect(&self) -> Result<Option<Inspected>, WalError> {
        let dir = &self.store.dir;
        let names = self.store.disk.list(dir).map_err(WalError::io(dir))?;
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| parse_name(self.group, name)).collect();
        numbers.sort_unstable();
        let promised = self.mark.durable.segment > 0;
        if numbers.is_empty() {
            let (group, dir) = (self.group, dir.clone());
            return if promised { Err(WalError::LogMissing { group, dir }) } else { Ok(None) };
        }

        let mut walk = Walk::new();
        let mut last_read = None;
        let mut claimed = Position::default();
        for (nth, number) in numbers.iter().copied().enumerate() {
            let loaded = self.load(number)?;
            let (head, frame, capacity) = match self.head(number, &loaded.bytes)? {
                Ok(found) => found,
                Err((offset, why)) => {
                    // Nothing readable starts here: the segment was prepared and never used, or
                    // its use was never synced, unless someone says otherwise.
                    let (furthest, any) = self.claims(&numbers[nth..])?;
                    let used = if nth == 0 {
                        promised || any
                    } else {
                        self.mark.durable.segment >= number || furthest.segment >= number
                    };
                    if used {
                        return Err(self.corrupt(Position { segment: number, offset }, why));
                    }
                    claimed = furthest;
                    break;
                }
            };
            walk.enter(self, number, head)?;
            walk.step(self, Position { segment: number, offset: SEGMENT_HEADER }, &frame)?;
            walk.current = Some(Segment { number, capacity, file: loaded.file.clone() });
            walk.files.insert(number, loaded.file.clone());
            walk.end_why = loop {
                let at = walk.at;
                match self.read(at, capacity, &loaded.bytes) {
                    Ok(frame) => walk.step(self, at, &frame)?,
                    Err(why) => break why,
                }
            };
            // Whether this is the end of the log, the next segment's head says.
            last_read = Some(loaded.bytes);
        }
        if let Some(bytes) = last_read {
            walk.torn_bytes = self.judge_tail(walk.at, &bytes, walk.end_why, claimed)?;
        }
        walk.finish(self, &numbers)
    }

    /// Header and head frame of a segment, or where and why there are none.
    fn head(&self, number: u64, bytes: &Bytes) -> Result<Result<FirstFrame, Unreadable>, WalError> {
        let start = Position { segment: number, offset: SEGMENT_HEADER };
        let capacity = match self.check_header(number, bytes)? {
            Ok(capacity) => capacity,
            Err(why) => return Ok(Err((0, why))),
        };
        let head = match self.read(start, capacity, bytes) {
            Ok(frame) if frame.kind == Kind::Head => {
                HeadState::decode(&frame.payload).map(|head| (head, frame, capacity))
            }
            Ok(_) => Err("no head frame at the start of the segment"),
            Err(why) => Err(why),
        };
        Ok(head.map_err(|why| (start.offset, why)))
    }

    fn read(&self, at: Position, capacity: u64, bytes: &Bytes) -> Result<frame::Frame, &'static str> {
        frame::decode(self.group, at, &bytes.slice(at.offset.min(capacity) as usize..capacity as usize))
    }

    /// Decides whether what follows the last valid frame of the log is a torn write (its length
    /// is returned) or damage to something that was durable. `claimed` is the furthest sync that
    /// frames in later segments tell of.
    fn judge_tail(
        &self,
        end: Position,
        bytes: &Bytes,
        why: &str,
        claimed: Position,
    ) -> Result<u64, WalError> {
        if claimed > end {
            let why = format!(
                "{why}; a later segment was written when the log was durable up to segment {} byte {}",
                claimed.segment, claimed.offset
            );
            return Err(self.corrupt(end, why));
        }
        let mut torn_end = end.offset;
        for (at, frame) in self.candidates(end.segment, bytes, end.offset) {
            torn_end = torn_end.max(frame.as_ref().map_or(at.offset + FRAME_HEADER, |frame| frame.end));
            if let Some(frame) = frame.filter(|frame| frame.synced > end) {
                let synced = frame.synced;
                let why = format!(
                    "{why}; the frame at byte {} was written when the log was durable up to segment {} byte {}",
                    at.offset, synced.segment, synced.offset
                );
                return Err(self.corrupt(end, why));
            }
        }
        let mark = self.mark.durable;
        if mark > end {
            let promise = format!("it was durable up to segment {} byte {}", mark.segment, mark.offset);
            return Err(if torn_end > end.offset {
                self.corrupt(end, format!("{why}; by the watermark {promise}"))
            } else {
                self.lost(format!(
                    "it ends at segment {} byte {}, by the watermark {promise}",
                    end.segment, end.offset
                ))
            });
        }
        Ok(torn_end - end.offset)
    }
}

struct Walk {
    state: HeadState,
    entries: EntryIndex,
    segments: VecDeque<SegmentMeta>,
    files: BTreeMap<u64, Arc<dyn DiskFile>>,
    current: Option<Segment>,
    at: Position,
    first: Position,
    holes: Vec<u64>,
    mark_met: bool,
    torn_bytes: u64,
    end_why: &'static str,
}

impl Walk {
    fn new() -> Self {
        Self {
            state: HeadState::default(),
            entries: EntryIndex::default(),
            segments: VecDeque::new(),
            files: BTreeMap::new(),
            current: None,
            at: Position::default(),
            first: Position::default(),
            holes: Vec::new(),
            mark_met: false,
            torn_bytes: 0,
            end_why: "",
        }
    }

    /// Goes on to a segment whose head frame is valid.
    fn enter(&mut self, inspection: &Inspection<'_>, number: u64, head: HeadState) -> Result<(), WalError> {
        let start = Position { segment: number, offset: SEGMENT_HEADER };
        let before = self.at;
        if self.current.is_none() {
            self.first = start;
        }
        if self.current.is_some() && before.segment + 1 == number {
            if head.previous_end != before.offset {
                let why = format!(
                    "{}; the next segment says this one ends at byte {}",
                    self.end_why, head.previous_end
                );
                return Err(inspection.corrupt(before, why));
            }
            let known =
                HeadState { previous_end: head.previous_end, oldest: head.oldest, ..self.state.clone() };
            if known != head {
                return Err(inspection.corrupt(start, "head frame differs from the segments before"));
            }
        } else {
            if self.current.is_some() {
                self.holes.extend(before.segment + 1..number);
                self.segments.clear();
            }
            self.entries = EntryIndex::starting_at(head.last.map_or(0, |last| last + 1));
        }
        self.state = head;
        self.segments.push_back(SegmentMeta { number, max_index: None });
        Ok(())
    }

    /// Takes in one valid frame.
    fn step(
        &mut self,
        inspection: &Inspection<'_>,
        at: Position,
        frame: &frame::Frame,
    ) -> Result<(), WalError> {
        if frame.synced > at {
            return Err(inspection.corrupt(at, "frame claims a sync of bytes after itself"));
        }
        if at.offset > SEGMENT_HEADER {
            if frame.kind == Kind::Entry {
                let index = frame.index.filter(|index| self.state.accepts(*index)).ok_or_else(|| {
                    let why = format!("entry {:?} follows entry {:?}", frame.index, self.state.last);
                    inspection.corrupt(at, why)
                })?;
                if self.entries.next() != index {
                    self.entries = EntryIndex::starting_at(index);
                }
                self.entries.push_stored(at, frame.payload.len() as u32);
                if let Some(meta) = self.segments.back_mut() {
                    meta.max_index = meta.max_index.max(Some(index));
                }
            }
            self.state
                .apply(frame.kind, frame.index, &frame.payload)
                .map_err(|why| inspection.corrupt(at, why))?;
            match (frame.kind, frame.index) {
                (Kind::TruncateAfter, _) => self.entries.truncate_after(self.state.last),
                (Kind::Purge, Some(upto)) => self.entries.purge(upto),
                _ => {}
            }
        }
        self.at = Position { segment: at.segment, offset: frame.end };
        let mark = inspection.mark;
        if self.at == mark.durable {
            self.mark_met = true;
            if mark.last != self.state.last || mark.vote_hash != self.state.vote.as_deref().map(vote_hash) {
                return Err(inspection.lost(format!(
                    "at segment {} byte {} the watermark knows last index {:?} and another history than the log, which has {:?}",
                    self.at.segment, self.at.offset, mark.last, self.state.last
                )));
            }
        }
        Ok(())
    }

    fn finish(mut self, inspection: &Inspection<'_>, numbers: &[u64]) -> Result<Option<Inspected>, WalError> {
        let Some(current) = self.current.take() else {
            // Not even a first head frame, and nothing was promised: an interrupted creation.
            return Ok(None);
        };
        let oldest = self.state.oldest;
        let missing =
            (oldest..self.first.segment).next().or(self.holes.into_iter().find(|hole| *hole >= oldest));
        if let Some(number) = missing {
            let file = inspection.store.path(inspection.group, number);
            return Err(WalError::MissingSegment { file });
        }
        let mark = inspection.mark.durable;
        if mark > self.at {
            return Err(inspection.lost(format!(
                "it ends at segment {} byte {}, the watermark knows it durable up to segment {} byte {}",
                self.at.segment, self.at.offset, mark.segment, mark.offset
            )));
        }
        if mark > self.first && !self.mark_met {
            return Err(inspection.corrupt(mark, "no frame ends where the watermark says one does"));
        }
        let base = self.state.purged_index().map_or(0, |purged| purged + 1);
        let next = self.state.last.map_or(base, |last| last + 1);
        let first = self.entries.first().unwrap_or(self.entries.next());
        let starts_right = first == base || (self.state.purged.is_none() && first <= 1);
        if !starts_right || self.entries.next().max(base) != next {
            let why = format!("entries {base} to {first} are missing");
            return Err(inspection.corrupt(self.first, why));
        }

        let mut prepared = None;
        let mut discard: Vec<u64> = numbers.iter().copied().filter(|number| *number < oldest).collect();
        for number in numbers.iter().copied().filter(|number| *number > current.number) {
            let loaded = inspection.load(number)?;
            let clean = inspection.candidates(number, &loaded.bytes, SEGMENT_HEADER).next().is_none();
            let capacity = inspection.check_header(number, &loaded.bytes).ok().and_then(Result::ok);
            match capacity {
                Some(capacity)
                    if clean && number == current.number + 1 && capacity == inspection.store.bytes =>
                {
                    prepared = Some(Segment { number, capacity, file: loaded.file });
                }
                _ => discard.push(number),
            }
        }
        self.segments.retain(|meta| meta.number >= oldest);
        self.files.retain(|number, _| *number >= oldest);
        let durable_from = if mark.segment == current.number { mark.offset } else { SEGMENT_HEADER };
        Ok(Some(Inspected {
            state: self.state,
            entries: self.entries,
            segments: self.segments,
            files: self.files,
            current,
            end: self.at.offset,
            prepared,
            torn_bytes: self.torn_bytes,
            discard,
            durable_from,
        }))
    }
}

impl Inspected {
    /// Makes the log end where the inspection found its end, and everything before durable.
    pub(super) fn repair(&self, store: &SegmentStore, group: Group) -> Result<(), WalError> {
        let path = store.path(group, self.current.number);
        let file = &self.current.file;
        let settle = || {
            if self.torn_bytes > 0 {
                let zeroes = vec![0; (self.current.capacity - self.end) as usize];
                file.write_at(self.end, &zeroes)?;
            }
            if self.durable_from < self.end {
                // What an earlier process wrote and never synced (or failed to) may be only in
                // the page cache, and marked clean there: write it again, so that the sync
                // really covers it.
                let mut bytes = vec![0; (self.end - self.durable_from) as usize];
                file.read_at(self.durable_from, &mut bytes)?;
                file.write_at(self.durable_from, &bytes)?;
            }
            file.sync_data()
        };
        settle().map_err(WalError::io(&path))?;
        for number in &self.discard {
            let path = store.path(group, *number);
            store.disk.remove(&path).map_err(WalError::io(&path))?;
            store.disk.sync_dir(&store.dir).map_err(WalError::io(&store.dir))?;
        }
        Ok(())
    }
}

impl Inspected {
    /// A log that was just created in this segment.
    pub(super) fn fresh(current: Segment) -> Self {
        let state = HeadState { oldest: current.number, ..HeadState::default() };
        let meta = SegmentMeta { number: current.number, max_index: None };
        let end = SEGMENT_HEADER + frame::frame_bytes(state.encode().len());
        Self {
            entries: EntryIndex::starting_at(0),
            segments: VecDeque::from([meta]),
            files: BTreeMap::from([(current.number, current.file.clone())]),
            end,
            prepared: None,
            torn_bytes: 0,
            discard: Vec::new(),
            durable_from: end,
            state,
            current,
        }
    }

    /// The head frame of a fresh log's first segment.
    pub(super) fn first_head(&self, group: Group) -> Vec<u8> {
        let at = Position { segment: self.current.number, offset: SEGMENT_HEADER };
        let mut buffer = Vec::new();
        frame::encode(&mut buffer, group, at, Position::default(), Kind::Head, None, &self.state.encode());
        buffer
    }
}
