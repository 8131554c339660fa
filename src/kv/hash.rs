//! Block hashes, independent of the engine's own.
//!
//! The local hash of one *full* block is XXH3-64, with a seed, over its token ids as
//! little-endian u32; a partial block at the end has none. The seed is [`SEED`] plus a term for
//! the LoRA adapter and one for the cache salt, so that what engines keep apart never meets. The
//! sequence hash chains local hashes. Both are the formulas of Dynamo's router, so that its
//! published vectors hold.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

/// The seed of a block without adapter and salt, and of every link of the chain.
pub const SEED: u64 = 1337;

/// Marks text that was hashed because no tokenizer was to be had: such blocks never meet blocks of
/// tokens.
const TEXT: u64 = 0x7465_7874_2d62_6c6b;

/// Hash of one full block's tokens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[repr(transparent)]
pub struct LocalHash(pub u64);

/// Hash of one full block's tokens and of all blocks before it: names a whole prefix.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[repr(transparent)]
pub struct SequenceHash(pub u64);

/// Seed of local hashes: what keeps blocks of equal tokens apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[repr(transparent)]
pub struct Seed(pub u64);

impl Default for Seed {
    fn default() -> Self {
        Self(SEED)
    }
}

impl Seed {
    /// For an adapter and a cache salt. An empty name or salt is none.
    pub fn new(lora: Option<&str>, salt: Option<&str>) -> Self {
        let term = |text: Option<&str>, seed| {
            text.filter(|t| !t.is_empty()).map_or(0, |t| xxh3_64_with_seed(t.as_bytes(), seed))
        };
        Self(SEED.wrapping_add(term(lora, 0)).wrapping_add(term(salt, 1)))
    }

    /// For something else that keeps blocks apart (an image's id, say).
    #[must_use]
    pub fn with(self, extra: &[u8]) -> Self {
        Self(self.0.wrapping_add(xxh3_64_with_seed(extra, 2)))
    }

    /// For pieces of text instead of tokens.
    #[must_use]
    pub fn of_text(self) -> Self {
        Self(self.0.wrapping_add(TEXT))
    }
}

/// Hash of one block's token ids.
pub fn local_hash(tokens: &[u32], seed: Seed) -> LocalHash {
    if cfg!(target_endian = "little") {
        return LocalHash(xxh3_64_with_seed(bytemuck::cast_slice(tokens), seed.0));
    }
    let mut hasher = Xxh3::with_seed(seed.0);
    tokens.iter().for_each(|token| hasher.update(&token.to_le_bytes()));
    LocalHash(hasher.digest())
}

/// Hashes of the full blocks of `tokens`. `block_size` 0 yields none.
pub fn local_hashes(tokens: &[u32], block_size: usize, seed: Seed) -> Vec<LocalHash> {
    if block_size == 0 {
        return Vec::new();
    }
    tokens.chunks_exact(block_size).map(|block| local_hash(block, seed)).collect()
}

/// The chain's next link; the first one is the first local hash itself.
pub fn chained(before: Option<SequenceHash>, local: LocalHash) -> SequenceHash {
    let Some(before) = before else { return SequenceHash(local.0) };
    let mut link = [0; 16];
    link[..8].copy_from_slice(&before.0.to_le_bytes());
    link[8..].copy_from_slice(&local.0.to_le_bytes());
    SequenceHash(xxh3_64_with_seed(&link, SEED))
}

/// Sequence hashes of a prefix's blocks.
pub fn sequence_hashes(locals: &[LocalHash]) -> Vec<SequenceHash> {
    let mut before = None;
    locals
        .iter()
        .map(|local| {
            let hash = chained(before, *local);
            before = Some(hash);
            hash
        })
        .collect()
}

/// Hashes of the full pieces of `chunk` bytes of a text, for where no tokenizer is to be had.
pub fn text_hashes(text: &[u8], chunk: usize, seed: Seed) -> Vec<LocalHash> {
    if chunk == 0 {
        return Vec::new();
    }
    text.chunks_exact(chunk).map(|piece| LocalHash(xxh3_64_with_seed(piece, seed.of_text().0))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(lora: Option<&str>, salt: Option<&str>) -> u64 {
        let tokens: Vec<u32> = (0..64).collect();
        local_hashes(&tokens, 16, Seed::new(lora, salt))[0].0
    }

    #[test]
    fn the_published_vectors_hold() {
        let tokens: Vec<u32> = (0..70).collect();
        let locals = local_hashes(&tokens, 16, Seed::default());
        let numbers: Vec<u64> = locals.iter().map(|h| h.0).collect();
        assert_eq!(
            numbers,
            [15310707395893867146, 15292316782987903195, 5532946206955930018, 14928757266181269122]
        );
        let numbers: Vec<u64> = sequence_hashes(&locals).iter().map(|h| h.0).collect();
        assert_eq!(
            numbers,
            [15310707395893867146, 13769157705258532664, 11879827756109914528, 3888788807566526800]
        );
        assert_eq!(first(Some("ad"), None), 16857968906251730735);
        assert_eq!(first(None, Some("t1")), 12926961996278155955);
    }

    #[test]
    fn text_never_meets_tokens_and_empty_names_are_none() {
        let tokens: Vec<u32> = (0..16).collect();
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        assert_ne!(text_hashes(&bytes, 64, Seed::default()), local_hashes(&tokens, 16, Seed::default()));
        assert_eq!(Seed::new(Some(""), Some("")), Seed::default());
        assert!(local_hashes(&tokens, 0, Seed::default()).is_empty());
        assert!(text_hashes(&bytes, 0, Seed::default()).is_empty());
    }
}
