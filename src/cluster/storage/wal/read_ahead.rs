//! Entries read back from segment files, neighbours together. Called by `Wal::read`; whatever it
//! returns passed its checksum and is the entry that was asked for.

use bytes::Bytes;

use super::frame::{self, Position};
use super::memory::Located;
use crate::cluster::storage::disk::DiskFile;
use crate::ids::Group;

/// Reads neighbouring entries with one call.
#[derive(Default)]
pub(super) struct ReadAhead {
    start: Position,
    bytes: Bytes,
}

impl ReadAhead {
    /// Most that one call reads, unless a single entry is larger.
    const STEP: u64 = 1 << 20;

    /// The entry at `at`; reads those in `following` along with it as far as they lie close.
    pub(super) fn entry(
        &mut self,
        file: &dyn DiskFile,
        group: Group,
        at: Position,
        length: u32,
        following: &[(u64, Located)],
        index: u64,
    ) -> Result<Bytes, String> {
        let end = at.offset + frame::frame_bytes(length as usize);
        let held = self.start.offset + self.bytes.len() as u64;
        if at.segment != self.start.segment || at.offset < self.start.offset || end > held {
            let mut until = end;
            for (_, place) in following {
                match place {
                    Located::OnDisk(next, length)
                        if next.segment == at.segment && next.offset >= at.offset =>
                    {
                        let next_end = next.offset + frame::frame_bytes(*length as usize);
                        if next_end - at.offset > Self::STEP {
                            break;
                        }
                        until = until.max(next_end);
                    }
                    _ => break,
                }
            }
            let mut bytes = vec![0; (until - at.offset) as usize];
            file.read_at(at.offset, &mut bytes).map_err(|error| error.to_string())?;
            self.start = at;
            self.bytes = bytes.into();
        }
        let from = (at.offset - self.start.offset) as usize;
        let frame = frame::decode(group, at, &self.bytes.slice(from..))?;
        if frame.kind != frame::Kind::Entry || frame.index != Some(index) {
            return Err("another frame is in its place".into());
        }
        Ok(frame.payload)
    }
}
