//! A prefix index for the simulation: which rank holds which prefix, in a plain map.
//!
//! Exact and small; the product's own index is held against the same questions elsewhere.

use std::collections::HashMap;

use crate::kv::hash::SequenceHash;
use crate::kv::types::{Overlap, RankIx};

/// Most ranks that a simulation may have.
pub const MAX_RANKS: u32 = 256;
const WORDS: usize = MAX_RANKS as usize / 64;

/// Some ranks.
type Ranks = [u64; WORDS];

fn bit(rank: RankIx) -> (usize, u64) {
    (rank.0 as usize / 64 % WORDS, 1 << (rank.0 % 64))
}

/// Blocks that ranks hold.
#[derive(Clone, Debug, Default)]
pub struct PrefixMap {
    holders: HashMap<SequenceHash, Ranks>,
}

impl PrefixMap {
    /// A rank holds a block.
    pub fn store(&mut self, rank: RankIx, hash: SequenceHash) {
        let (word, mask) = bit(rank);
        self.holders.entry(hash).or_default()[word] |= mask;
    }

    /// A rank holds a block no more.
    pub fn remove(&mut self, rank: RankIx, hash: SequenceHash) {
        let (word, mask) = bit(rank);
        if let Some(ranks) = self.holders.get_mut(&hash) {
            ranks[word] &= !mask;
            if *ranks == Ranks::default() {
                self.holders.remove(&hash);
            }
        }
    }
}

/// How many leading blocks each rank holds; sorted by rank.
pub fn overlaps(map: &PrefixMap, hashes: &[SequenceHash]) -> Vec<Overlap> {
    let mut found = Vec::new();
    let mut left = [u64::MAX; WORDS];
    for (blocks, hash) in hashes.iter().map(Some).chain([None]).enumerate() {
        let here = hash.and_then(|hash| map.holders.get(hash)).copied().unwrap_or_default();
        for word in 0..WORDS {
            let mut ended = left[word] & !here[word];
            left[word] &= here[word];
            while ended != 0 && blocks > 0 {
                let rank = RankIx(word as u32 * 64 + ended.trailing_zeros());
                ended &= ended - 1;
                found.push(Overlap { rank, blocks: blocks as u32, gpu: blocks as u32, host: 0 });
            }
        }
        if left == [0; WORDS] {
            break;
        }
    }
    found.sort_unstable_by_key(|overlap| overlap.rank);
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn overlaps_are_the_leading_blocks_that_are_held(
            held in prop::collection::vec((0_u32..256, 0_u64..8), 0..200),
            gone in prop::collection::vec((0_u32..256, 0_u64..8), 0..50),
            length in 0_u64..8,
        ) {
            let mut map = PrefixMap::default();
            held.iter().for_each(|(rank, hash)| map.store(RankIx(*rank), SequenceHash(*hash)));
            gone.iter().for_each(|(rank, hash)| map.remove(RankIx(*rank), SequenceHash(*hash)));
            let hashes: Vec<SequenceHash> = (0..length).map(SequenceHash).collect();
            let mut expected = Vec::new();
            for rank in 0..256 {
                let has = |hash: u64| held.contains(&(rank, hash)) && !gone.contains(&(rank, hash));
                let blocks = (0..length).take_while(|hash| has(*hash)).count() as u32;
                if blocks > 0 {
                    expected.push(Overlap { rank: RankIx(rank), blocks, gpu: blocks, host: 0 });
                }
            }
            prop_assert_eq!(overlaps(&map, &hashes), expected);
        }
    }
}
