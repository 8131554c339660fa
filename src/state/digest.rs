//! The rolling digest of a state: equal on all replicas at the same log index, or something is
//! badly wrong.
//!
//! It is the wrapping sum of the XXH3-64 of every record (key and value), so a mutation changes
//! it by what it replaces and what it writes, in O(1), and a state read back from a checkpoint
//! can be checked against it. A sum rather than an exclusive or: two equal records do not
//! cancel out.

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

/// The sum so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Digest(pub u64);

impl Digest {
    /// A record of `kind` with this content appears.
    pub fn add(&mut self, kind: u8, record: &impl Serialize) {
        self.0 = self.0.wrapping_add(hash(kind, record));
    }

    /// A record of `kind` with this content disappears.
    pub fn remove(&mut self, kind: u8, record: &impl Serialize) {
        self.0 = self.0.wrapping_sub(hash(kind, record));
    }

    /// A cell of five numbers changes from `old` to `new`; all-zero cells (past the two key
    /// words) do not count. The hot path of the cache group.
    pub fn change_cell(&mut self, key: [u64; 2], old: [i64; 3], new: [i64; 3]) {
        self.0 = self.0.wrapping_sub(cell(key, old)).wrapping_add(cell(key, new));
    }
}

fn hash(kind: u8, record: &impl Serialize) -> u64 {
    let mut bytes = vec![kind];
    bytes.extend(crate::codec::encode(record));
    xxh3_64(&bytes)
}

fn cell(key: [u64; 2], values: [i64; 3]) -> u64 {
    if values == [0; 3] {
        return 0;
    }
    let mut bytes = [0u8; 40];
    bytes[..8].copy_from_slice(&key[0].to_le_bytes());
    bytes[8..16].copy_from_slice(&key[1].to_le_bytes());
    for (slot, value) in bytes[16..].chunks_exact_mut(8).zip(values) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    xxh3_64(&bytes)
}
