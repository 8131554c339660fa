//! The bytes of the log: segment headers and frames, encoded and checked. Called by writer,
//! reader and recovery; a frame is valid only in the group, segment and place it was written for.
//!
//! ```text
//! segment  magic 8 | version u32 | group u32 | number u64 | capacity u64 | zero 28 | crc32c u32
//! frame    length u32 | crc32c u32 | type u8 | 0xE7 | low 16 bits of segment | synced offset u32
//!          | synced segment u64 | index u64 | payload, padded with zeroes to 8 bytes
//! ```
//! All integers little-endian. The checksum also covers group, segment number and offset, which
//! are not stored: what is left over in a recycled file never validates.

use bytes::Bytes;

use crate::ids::Group;

/// Bytes before the first frame of a segment.
pub(super) const SEGMENT_HEADER: u64 = 64;
/// Bytes before a frame's payload.
pub(super) const FRAME_HEADER: u64 = 32;
/// Format this code writes; older ones would be read here, newer ones are refused.
pub(super) const VERSION: u32 = 1;

const SEGMENT_MAGIC: [u8; 8] = *b"EVRLWAL\n";
const FRAME_MARK: u8 = 0xE7;
/// Stands for "none" in the index field.
const NO_INDEX: u64 = u64::MAX;

/// A place in one group's log. Ordered; only ever grows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Position {
    /// Segment number; 0 means "before the first segment".
    pub segment: u64,
    /// Byte in the segment file.
    pub offset: u64,
}

/// What a frame says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// First frame of every segment: the state that must outlive older segments.
    Head = 1,
    Entry = 2,
    Vote = 3,
    TruncateAfter = 4,
    Purge = 5,
    Committed = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Kind::Head, Kind::Entry, Kind::Vote, Kind::TruncateAfter, Kind::Purge, Kind::Committed]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// A frame that passed its checksum.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) index: Option<u64>,
    pub(super) synced: Position,
    pub(super) payload: Bytes,
    /// Offset of the byte after the frame and its padding.
    pub(super) end: u64,
}

/// Bytes a frame with this payload takes.
pub(super) fn frame_bytes(payload: usize) -> u64 {
    (FRAME_HEADER + payload as u64).next_multiple_of(8)
}

fn checksum(group: Group, at: Position, header: &[u8], payload: &[u8]) -> u32 {
    let mut place = [0; 17];
    place[0] = group.index() as u8;
    place[1..9].copy_from_slice(&at.segment.to_le_bytes());
    place[9..].copy_from_slice(&at.offset.to_le_bytes());
    let crc = crc32c::crc32c(&place);
    let crc = crc32c::crc32c_append(crc, &header[..4]);
    let crc = crc32c::crc32c_append(crc, &header[8..FRAME_HEADER as usize]);
    crc32c::crc32c_append(crc, payload)
}

/// Appends a frame to `buffer`, which will be written so that the frame starts at `at`.
pub(super) fn encode(
    buffer: &mut Vec<u8>,
    group: Group,
    at: Position,
    synced: Position,
    kind: Kind,
    index: Option<u64>,
    payload: &[u8],
) {
    let start = buffer.len();
    // Payloads are bounded by `max_entry_bytes` and segments by 1 GiB (checked by the options).
    buffer.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    buffer.extend_from_slice(&[0; 4]);
    buffer.push(kind as u8);
    buffer.push(FRAME_MARK);
    buffer.extend_from_slice(&(at.segment as u16).to_le_bytes());
    buffer.extend_from_slice(&(synced.offset as u32).to_le_bytes());
    buffer.extend_from_slice(&synced.segment.to_le_bytes());
    buffer.extend_from_slice(&index.unwrap_or(NO_INDEX).to_le_bytes());
    let crc = checksum(group, at, &buffer[start..], payload);
    buffer[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    buffer.extend_from_slice(payload);
    buffer.resize(start + frame_bytes(payload.len()) as usize, 0);
}

/// Little-endian number at `at`; the caller has checked that the bytes are there.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

/// Whether the bytes at the start of `bytes` look like a frame header of this segment. Cheap,
/// proves nothing; every valid frame passes.
pub(super) fn looks_like_frame(bytes: &[u8], segment: u64) -> bool {
    bytes.len() >= FRAME_HEADER as usize
        && bytes[9] == FRAME_MARK
        && bytes[10..12] == (segment as u16).to_le_bytes()
        && Kind::from_byte(bytes[8]).is_some()
}

/// Checks the frame that starts `bytes`, which was read from `at`; the error says what is wrong.
pub(super) fn decode(group: Group, at: Position, bytes: &Bytes) -> Result<Frame, &'static str> {
    let header_end = FRAME_HEADER as usize;
    if bytes.len() < header_end {
        return Err("no room for a frame header");
    }
    if bytes[..header_end].iter().all(|byte| *byte == 0) {
        return Err("zeroes where a frame should be");
    }
    if !looks_like_frame(bytes, at.segment) {
        return Err("no frame header of this segment");
    }
    let length = u32_at(bytes, 0) as usize;
    let Some(payload) = header_end.checked_add(length).and_then(|end| bytes.get(header_end..end)) else {
        return Err("frame length reaches past the end of the segment");
    };
    if checksum(group, at, &bytes[..header_end], payload) != u32_at(bytes, 4) {
        return Err("frame checksum does not match");
    }
    // `looks_like_frame` has checked the type.
    let Some(kind) = Kind::from_byte(bytes[8]) else { return Err("unknown frame type") };
    let index = u64_at(bytes, 24);
    Ok(Frame {
        kind,
        index: (index != NO_INDEX).then_some(index),
        synced: Position { segment: u64_at(bytes, 16), offset: u64::from(u32_at(bytes, 12)) },
        payload: bytes.slice(header_end..header_end + length),
        end: at.offset + frame_bytes(length),
    })
}

/// Header of a segment file.
pub(super) fn encode_segment_header(
    group: Group,
    number: u64,
    capacity: u64,
) -> [u8; SEGMENT_HEADER as usize] {
    let mut header = [0; SEGMENT_HEADER as usize];
    header[..8].copy_from_slice(&SEGMENT_MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(group.index() as u32).to_le_bytes());
    header[16..24].copy_from_slice(&number.to_le_bytes());
    header[24..32].copy_from_slice(&capacity.to_le_bytes());
    let crc = crc32c::crc32c(&header[..60]);
    header[60..].copy_from_slice(&crc.to_le_bytes());
    header
}

/// What a segment header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SegmentHeader {
    pub(super) version: u32,
    pub(super) group: u32,
    pub(super) number: u64,
    pub(super) capacity: u64,
}

/// Checks magic and checksum only: whose segment it is, the caller compares.
pub(super) fn decode_segment_header(bytes: &[u8]) -> Result<SegmentHeader, &'static str> {
    let Some(header) = bytes.get(..SEGMENT_HEADER as usize) else {
        return Err("file is shorter than a segment header");
    };
    if crc32c::crc32c(&header[..60]) != u32_at(header, 60) {
        return Err("segment header checksum does not match");
    }
    if header[..8] != SEGMENT_MAGIC {
        return Err("not a segment of a write-ahead log");
    }
    Ok(SegmentHeader {
        version: u32_at(header, 8),
        group: u32_at(header, 12),
        number: u64_at(header, 16),
        capacity: u64_at(header, 24),
    })
}

/// The state carried by a [`Kind::Head`] frame, and the one recovery and writer keep.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct HeadState {
    /// End of the last frame in the segment before.
    pub(super) previous_end: u64,
    /// Oldest segment that recovery needs.
    pub(super) oldest: u64,
    /// Last index of the log, also when everything was purged.
    pub(super) last: Option<u64>,
    pub(super) purged: Option<(u64, Bytes)>,
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<Bytes>,
}

impl HeadState {
    /// Payload of the frame.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&self.previous_end.to_le_bytes());
        out.extend_from_slice(&self.oldest.to_le_bytes());
        out.extend_from_slice(&self.last.unwrap_or(NO_INDEX).to_le_bytes());
        out.extend_from_slice(&self.purged.as_ref().map_or(NO_INDEX, |(index, _)| *index).to_le_bytes());
        let meta = self.purged.as_ref().map(|(_, meta)| meta);
        for part in [meta, self.vote.as_ref(), self.committed.as_ref()] {
            // Present parts are stored with their length plus one; 0 is "none".
            let length = part.map_or(0, |bytes| bytes.len() as u32 + 1);
            out.extend_from_slice(&length.to_le_bytes());
            out.extend_from_slice(part.map_or(&[][..], |bytes| &bytes[..]));
        }
        out
    }

    /// Reads a payload; the frame's checksum has been checked, so an error means a bug or a
    /// foreign writer.
    pub(super) fn decode(payload: &Bytes) -> Result<Self, &'static str> {
        const SHORT: &str = "head frame is too short";
        if payload.len() < 32 {
            return Err(SHORT);
        }
        let number = |at| u64_at(payload, at);
        let optional = |value: u64| (value != NO_INDEX).then_some(value);
        let mut at = 32;
        let mut parts = [None, None, None];
        for part in &mut parts {
            if payload.len() < at + 4 {
                return Err(SHORT);
            }
            let length = u32_at(payload, at) as usize;
            at += 4;
            if let Some(length) = length.checked_sub(1) {
                if payload.len() < at + length {
                    return Err(SHORT);
                }
                *part = Some(payload.slice(at..at + length));
                at += length;
            }
        }
        let [meta, vote, committed] = parts;
        Ok(Self {
            previous_end: number(0),
            oldest: number(8),
            last: optional(number(16)),
            purged: optional(number(24)).zip(meta),
            vote,
            committed,
        })
    }
}

impl HeadState {
    /// Index of the last purged entry.
    pub(super) fn purged_index(&self) -> Option<u64> {
        self.purged.as_ref().map(|(index, _)| *index)
    }

    /// Carries out what a frame says; the one definition for writer and recovery. Entries are
    /// expected to be in order.
    pub(super) fn apply(
        &mut self,
        kind: Kind,
        index: Option<u64>,
        payload: &Bytes,
    ) -> Result<(), &'static str> {
        match kind {
            Kind::Head => return Err("head frame in the middle of a segment"),
            Kind::Entry => self.last = index,
            Kind::Vote => self.vote = Some(payload.clone()),
            Kind::Committed => self.committed = Some(payload.clone()),
            // `None` is smaller than any index.
            Kind::TruncateAfter => self.last = self.last.min(index).max(self.purged_index()),
            Kind::Purge => {
                let Some(index) = index.filter(|_| payload.len() >= 8) else {
                    return Err("purge frame without index or oldest segment");
                };
                self.oldest = u64_at(payload, 0);
                self.purged = Some((index, payload.slice(8..)));
                self.last = self.last.max(Some(index));
            }
        }
        Ok(())
    }

    /// Payload of a [`Kind::Purge`] frame.
    pub(super) fn purge_payload(oldest: u64, meta: &[u8]) -> Bytes {
        let mut payload = oldest.to_le_bytes().to_vec();
        payload.extend_from_slice(meta);
        payload.into()
    }

    /// The index an entry must have to continue the log; a log that never held anything may
    /// start anywhere.
    pub(super) fn accepts(&self, index: u64) -> bool {
        match self.last {
            Some(last) => index == last + 1,
            None => true,
        }
    }
}
