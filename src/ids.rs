//! The names things go by. Newtypes, so that a replica is never mistaken for a log index.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A member of the cluster. Allocated once, never used again after the member is gone:
/// a replica that lost its disk comes back under a new one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug, Default)]
#[serde(transparent)]
pub struct ReplicaId(pub u64);

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One life of a replica's process. Counts up at every start, durably, so that what an
/// earlier life of the same replica booked or sent can be told from what this one did.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug, Default)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A worker: one engine behind one base URL. 1 to 128 bytes of `[A-Za-z0-9._:-]`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
#[serde(transparent)]
pub struct WorkerId(pub Arc<str>);

impl WorkerId {
    /// Longest accepted id, in bytes.
    pub const MAX_LEN: usize = 128;

    /// Checks the alphabet and the length; the error says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > Self::MAX_LEN {
            return Err(format!("worker id must have 1 to {} bytes, this has {}", Self::MAX_LEN, text.len()));
        }
        match text.chars().find(|c| !(c.is_ascii_alphanumeric() || "._:-".contains(*c))) {
            Some(bad) => {
                Err(format!("worker id {text:?} contains {bad:?}; allowed are letters, digits and . _ : -"))
            }
            None => Ok(Self(text.into())),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A worker's short name in what is mutated often. Allocated by the registry with the worker's
/// first registration, kept while it is registered, never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug, Default)]
#[serde(transparent)]
pub struct WorkerIx(pub u32);

impl fmt::Display for WorkerIx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The two Raft groups. `Control` carries what is rare and must not wait (registry, members,
/// liveness); `Cache` carries the firehose (loads, later prefix-index mutations and streams).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
#[repr(u8)]
pub enum Group {
    /// Registry, members, liveness.
    Control = 0,
    /// Loads; later the prefix index and the stream directory.
    Cache = 1,
}

impl Group {
    /// Both groups, in index order.
    pub const ALL: [Group; 2] = [Group::Control, Group::Cache];

    /// 0 for control, 1 for cache: an index into per-group arrays and the number on the wire.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The inverse of [`Group::index`]; `None` for a number no group has.
    pub fn from_wire(number: u32) -> Option<Self> {
        match number {
            0 => Some(Group::Control),
            1 => Some(Group::Cache),
            _ => None,
        }
    }

    /// Lower-case name for logs, metrics and folders.
    pub fn name(self) -> &'static str {
        match self {
            Group::Control => "control",
            Group::Cache => "cache",
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An output stream: `st_` and 26 characters of base32 (`a-z2-7`), 130 bits, random or derived from
/// a client's idempotency key. Only its holder of the same principal may use it, so it is hard to
/// guess but not a secret.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StreamId([u8; 26]);

impl StreamId {
    const PREFIX: &'static str = "st_";
    const ALPHABET: &'static [u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    /// Length of the text.
    pub const LEN: usize = 29;

    /// Of the first 130 bits.
    pub fn from_bits(bits: [u8; 17]) -> Self {
        let mut text = [0; 26];
        for (at, char) in text.iter_mut().enumerate() {
            let bit = at * 5;
            let high = u16::from(bits[bit / 8]) << 8;
            let low = bits.get(bit / 8 + 1).copied().map_or(0, u16::from);
            *char = Self::ALPHABET[usize::from((high | low) >> (11 - bit % 8) & 31)];
        }
        Self(text)
    }

    /// Reads the text; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let chars: [u8; 26] = text.strip_prefix(Self::PREFIX)?.as_bytes().try_into().ok()?;
        // The last character carries 5 of the 130 bits, like the others: none is out of range.
        chars.iter().all(|char| Self::ALPHABET.contains(char)).then_some(Self(chars))
    }

    /// The 26 characters.
    pub fn chars(&self) -> &[u8; 26] {
        &self.0
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::PREFIX)?;
        self.0.iter().try_for_each(|char| fmt::Write::write_char(f, char::from(*char)))
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_ids_are_read_as_they_are_written() {
        for seed in 0..=255_u8 {
            let id = StreamId::from_bits([seed; 17]);
            let text = id.to_string();
            assert_eq!(text.len(), StreamId::LEN);
            assert_eq!(StreamId::parse(&text), Some(id));
        }
        assert_eq!(StreamId::from_bits([255; 17]).to_string(), format!("st_{}", "7".repeat(26)));
        assert_ne!(StreamId::from_bits([0; 17]), StreamId::from_bits([1; 17]));
        let mut last = [0; 17];
        last[16] = 0b1100_0000;
        assert_ne!(StreamId::from_bits([0; 17]), StreamId::from_bits(last), "all 130 bits count");
        for bad in [
            "",
            "st_",
            "st_abc",
            "xx_aaaaaaaaaaaaaaaaaaaaaaaaaa",
            "st_AAAAAAAAAAAAAAAAAAAAAAAAAA",
            "st_aaaaaaaaaaaaaaaaaaaaaaaaa1",
        ] {
            assert_eq!(StreamId::parse(bad), None, "{bad}");
        }
    }
}
