//! A checkpoint as sled holds it: every record cut into pieces small enough for sled's own log
//! (larger values go to files that sled never syncs), each piece checksummed with its key.
//! Called by the checkpoint store; what does not add up exactly is an error.
//!
//! ```text
//! 'c' generation u64 'm'                            manifest
//! 'c' generation u64 'r' record u64 piece u32       xxh3-64 | part of (key length u32 | key | value)
//! 'k' key                                           xxh3-64 | value   (plain records)
//! ```
//! Numbers in keys are big-endian. Record 0 is the checkpoint's meta.

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Largest part of a record in one sled value: 16 of them, a leaf's worth, stay below the
/// ~128 KiB above which sled writes a page to a file that it never syncs.
pub(super) const PIECE: usize = 7 << 10;

const SUM: usize = 8;

/// Start of every key of a generation.
pub(super) fn generation_prefix(generation: u64) -> [u8; 9] {
    let mut key = [b'c'; 9];
    key[1..].copy_from_slice(&generation.to_be_bytes());
    key
}

/// Generation of a checkpoint's key.
pub(super) fn generation_of(key: &[u8]) -> Option<u64> {
    let raw: [u8; 8] = key.get(1..9)?.try_into().ok()?;
    (key[0] == b'c').then_some(u64::from_be_bytes(raw))
}

pub(super) fn manifest_key(generation: u64) -> Vec<u8> {
    let mut key = generation_prefix(generation).to_vec();
    key.push(b'm');
    key
}

pub(super) fn record_prefix(generation: u64) -> Vec<u8> {
    let mut key = generation_prefix(generation).to_vec();
    key.push(b'r');
    key
}

fn piece_key(generation: u64, record: u64, piece: u32) -> Vec<u8> {
    let mut key = record_prefix(generation);
    key.extend_from_slice(&record.to_be_bytes());
    key.extend_from_slice(&piece.to_be_bytes());
    key
}

/// Hash of a sled key and its value together, so that a value under another key is noticed.
pub(super) fn pair_hash(key: &[u8], data: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&(key.len() as u64).to_le_bytes());
    hash.update(key);
    hash.update(data);
    hash.digest()
}

/// Puts the checksum in front.
pub(super) fn seal(key: &[u8], data: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(SUM + data.len());
    value.extend_from_slice(&pair_hash(key, data).to_le_bytes());
    value.extend_from_slice(data);
    value
}

/// Checks the checksum and takes it off.
pub(super) fn unseal<'a>(key: &[u8], value: &'a [u8]) -> Result<&'a [u8], String> {
    match value.split_first_chunk::<SUM>() {
        Some((sum, data)) if u64::from_le_bytes(*sum) == pair_hash(key, data) => Ok(data),
        _ => Err(format!("value of key {} fails its checksum", hex(key))),
    }
}

fn hex(key: &[u8]) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Cuts records into sled pairs and sums them up.
pub(super) struct Cutter {
    generation: u64,
    records: u64,
    pieces: u64,
    hash: Xxh3,
}

impl Cutter {
    pub(super) fn new(generation: u64) -> Self {
        Self { generation, records: 0, pieces: 0, hash: Xxh3::new() }
    }

    /// Calls `put` with each pair of the next record.
    pub(super) fn record<E>(
        &mut self,
        key: &[u8],
        value: &[u8],
        mut put: impl FnMut(Vec<u8>, Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut whole = Vec::with_capacity(4 + key.len() + value.len());
        whole.extend_from_slice(&(key.len() as u32).to_le_bytes());
        whole.extend_from_slice(key);
        whole.extend_from_slice(value);
        self.hash.update(&xxh3_64(&whole).to_le_bytes());
        for (piece, part) in whole.chunks(PIECE).enumerate() {
            let sled_key = piece_key(self.generation, self.records, piece as u32);
            let sealed = seal(&sled_key, part);
            put(sled_key, sealed)?;
            self.pieces += 1;
        }
        self.records += 1;
        Ok(())
    }

    /// Records, pieces and checksum so far.
    pub(super) fn sums(&self) -> (u64, u64, u64) {
        (self.records, self.pieces, self.hash.digest())
    }
}

/// Puts pieces together again; the pairs must come in key order.
pub(super) struct Joiner {
    generation: u64,
    records: u64,
    pieces: u64,
    hash: Xxh3,
    open: Vec<u8>,
    next_piece: u32,
}

/// A record's key and value.
pub(super) type Record = (Vec<u8>, Vec<u8>);

impl Joiner {
    pub(super) fn new(generation: u64) -> Self {
        Self { generation, records: 0, pieces: 0, hash: Xxh3::new(), open: Vec::new(), next_piece: 0 }
    }

    /// Takes the next pair; returns the record that ended before it, if one did.
    pub(super) fn pair(&mut self, key: &[u8], value: &[u8]) -> Result<Option<Record>, String> {
        let mut finished = None;
        if key != piece_key(self.generation, self.records, self.next_piece) {
            finished = self.finish()?;
            if finished.is_none() || key != piece_key(self.generation, self.records, 0) {
                return Err(format!("record {} is missing or incomplete", self.records));
            }
        }
        self.open.extend_from_slice(unseal(key, value)?);
        self.next_piece += 1;
        self.pieces += 1;
        Ok(finished)
    }

    /// The record that was being put together.
    pub(super) fn finish(&mut self) -> Result<Option<Record>, String> {
        if self.next_piece == 0 {
            return Ok(None);
        }
        let whole = std::mem::take(&mut self.open);
        self.hash.update(&xxh3_64(&whole).to_le_bytes());
        let split = whole.split_first_chunk::<4>().and_then(|(length, rest)| {
            let length = u32::from_le_bytes(*length) as usize;
            (length <= rest.len()).then(|| rest.split_at(length))
        });
        let Some((key, value)) = split else { return Err(format!("record {} is too short", self.records)) };
        self.records += 1;
        self.next_piece = 0;
        Ok(Some((key.to_vec(), value.to_vec())))
    }

    pub(super) fn sums(&self) -> (u64, u64, u64) {
        (self.records, self.pieces, self.hash.digest())
    }
}
