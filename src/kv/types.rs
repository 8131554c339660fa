//! What is said about blocks: who has which, where.

use serde::{Deserialize, Serialize};

use super::hash::{LocalHash, Seed};

/// One DP rank of one worker, as a small number that the replicated state hands out and takes
/// back: index of arrays and bit of bitsets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[repr(transparent)]
pub struct RankIx(pub u32);

/// The engine's own name of a block: opaque, unique in one rank while the block lives. Integers
/// are taken bit by bit, longer digests are hashed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[repr(transparent)]
pub struct EngineHash(pub u64);

/// Where a block lies. A block may lie in several at once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
#[repr(u8)]
pub enum Tier {
    /// The accelerator's own memory: `GPU`.
    #[default]
    Gpu = 0,
    /// The host's memory: `CPU`, `CPU_PINNED`.
    Host = 1,
    /// Anything slower: `DISK`, `STORAGE`, `EXTERNAL`.
    Disk = 2,
}

/// One event of one rank's feed, in our terms.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KvOp {
    /// These blocks, each following the one before, are held in `tier`. Said again it changes
    /// nothing.
    Store {
        /// The block before the first; `None` if the first begins a prompt.
        parent: Option<EngineHash>,
        /// Where.
        tier: Tier,
        /// What the local hashes were made with; a child inherits the salt of its parent, which
        /// only the first block of a chain tells.
        seed: Seed,
        /// The blocks.
        blocks: Vec<(LocalHash, EngineHash)>,
    },
    /// Blocks that are known already are held in `tier` too (an offload tells no tokens).
    Copy {
        /// Where.
        tier: Tier,
        /// Which.
        blocks: Vec<EngineHash>,
    },
    /// These are held in `tier` no more. Unknown ones are none of our business.
    Remove {
        /// Where.
        tier: Tier,
        /// Which.
        blocks: Vec<EngineHash>,
    },
    /// The rank holds nothing at all.
    Clear,
}

/// Blocks of a prompt's beginning that one rank holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Overlap {
    /// Which.
    pub rank: RankIx,
    /// Leading blocks held in whatever tier, without a gap.
    pub blocks: u32,
    /// Of those, how many are on the accelerator.
    pub gpu: u32,
    /// Of the others, how many are in the host's memory.
    pub host: u32,
}

impl Overlap {
    /// The rest: blocks that only a slower tier holds.
    pub fn disk(&self) -> u32 {
        self.blocks - self.gpu - self.host
    }
}
