//! The cache of tokenised pieces of text, shared by all models.
//!
//! Kept are pieces, not prefixes: between two places where a tokenizer splits whatever stands
//! around, the ids of a piece depend on its text alone (see [`super::tokenizer`]). So a
//! conversation's turns are kept once, however long it grows, and a document that comes up in
//! many prompts is kept once wherever it stands.
//!
//! The key is XXH3-128 of the piece with a seed that is drawn at the start and differs by
//! tokenizer: nobody outside can make two texts meet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use quick_cache::Weighter;
use quick_cache::sync::Cache;
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// What an entry costs besides its ids.
const ENTRY: u64 = 96;

/// Pieces and their ids.
#[derive(Debug)]
pub struct Segments {
    cache: Cache<u128, Arc<[u32]>, Weight>,
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Clone, Debug)]
struct Weight;

impl Weighter<u128, Arc<[u32]>> for Weight {
    fn weight(&self, _: &u128, ids: &Arc<[u32]>) -> u64 {
        ENTRY + 4 * ids.len() as u64
    }
}

/// What the cache did, in bytes of text.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SegmentFigures {
    /// Bytes whose ids were there.
    pub hit_bytes: u64,
    /// Bytes that were tokenised.
    pub missed_bytes: u64,
    /// Bytes that the entries take.
    pub kept_bytes: u64,
}

impl Segments {
    /// With at most `bytes` of ids and entries. 0 keeps nothing.
    pub fn new(bytes: usize) -> Self {
        // A piece is some hundred tokens.
        let expected = (bytes / 512).clamp(16, 1 << 20);
        Self {
            cache: Cache::with_weighter(expected, bytes as u64, Weight),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// The ids of a piece.
    pub fn get(&self, piece: &str, seed: u64) -> Option<Arc<[u32]>> {
        let found = self.cache.get(&key(piece, seed));
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(piece.len() as u64, Ordering::Relaxed);
        found
    }

    /// Keeps a piece's ids, at the cost of what was not asked for lately.
    pub fn put(&self, piece: &str, seed: u64, ids: &[u32]) {
        self.cache.insert(key(piece, seed), Arc::from(ids));
    }

    /// What it did.
    pub fn figures(&self) -> SegmentFigures {
        SegmentFigures {
            hit_bytes: self.hits.load(Ordering::Relaxed),
            missed_bytes: self.misses.load(Ordering::Relaxed),
            kept_bytes: self.cache.weight(),
        }
    }
}

fn key(piece: &str, seed: u64) -> u128 {
    xxh3_128_with_seed(piece.as_bytes(), seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_stays_within_its_bytes_and_keeps_tokenizers_apart() {
        let segments = Segments::new(100_000);
        segments.put("piece", 1, &[1, 2]);
        assert_eq!(segments.get("piece", 1).as_deref(), Some(&[1, 2][..]));
        assert_eq!(segments.get("piece", 2), None);
        for n in 0..1000 {
            segments.put(&format!("piece {n}"), 1, &[0; 100]);
            assert!(segments.figures().kept_bytes <= 100_000);
        }
        let none = Segments::new(0);
        none.put("piece", 1, &[1]);
        assert_eq!(none.get("piece", 1), None);
    }
}
