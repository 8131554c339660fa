//! The prefix index: which rank holds how much of a prompt's beginning.
//!
//! A compressed radix tree over local hashes, for all ranks at once. A node is a run of blocks and
//! the set of ranks that hold all of it on the accelerator; what is held in part or in slower
//! tiers is kept as bits beside that. One writer applies what engines say ([`KvOp`]) or what we
//! predict; any number of readers look prompts up meanwhile, each node behind a lock of its own.
//!
//! **Invariants**
//! - Deterministic: the same operations in the same order give the same content, the same
//!   evictions and the same [`Index::digest`] on every replica, also if one of them was restored
//!   from a dump in between. No clock, no randomness, no order of a hash table decides anything.
//! - Bounded: [`Options::bytes`], by an account that is equal on every replica too.
//! - A look-up counts no block that its rank did not hold at some moment while it ran.
//!
//! `docs/explanation/prefix-index.md` says why it is built like this.

mod apply;
mod bits;
mod body;
mod dump;
mod evict;
mod load;
mod lookup;
mod names;
mod predict;
mod ranks;
mod slab;
#[cfg(test)]
mod tests;
mod tree;

use parking_lot::Mutex;

use self::apply::Op;
pub use self::dump::Frozen;
use self::slab::{MOST_NODES, Slab};
use self::tree::{Meta, Source, Tree, Writer};
use super::hash::{LocalHash, Seed};
use super::types::{EngineHash, KvOp, Overlap, RankIx};
use super::wire::{self, Head, WireError};

/// Key and value pairs: what an index is written to disk and sent to a peer as.
pub type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// Ranks beyond this are refused: they index arrays.
pub const MOST_RANKS: u32 = 1 << 16;

/// What may be chosen about an index. Must be the same on all replicas at the same place in the
/// log: content and digest depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// How much memory it may take, by its own account. Clamped to 1 MiB up to 3.5 GiB.
    pub bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        // About eight million blocks on as many ranks as you like: 64 ranks of 128 thousand.
        Self { bytes: 512 << 20 }
    }
}

impl Options {
    /// The bound as it is taken.
    pub fn limit(self) -> u64 {
        // So many nodes are always to be had, and what one operation adds before the bound is
        // looked at.
        self.bytes.clamp(1 << 20, MOST_NODES as u64 * 224)
    }
}

/// What can be counted of an index. The same on every replica.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counters {
    /// Different blocks, whoever holds them.
    pub blocks: u64,
    /// Blocks of each rank, added up.
    pub worker_blocks: u64,
    /// Nodes of the tree.
    pub nodes: u64,
    /// What all of it takes, by its own account.
    pub bytes: u64,
    /// Blocks of ranks that were dropped to keep the bound.
    pub evicted: u64,
    /// Blocks that were not stored because nobody knows what comes before them, and copies of
    /// unknown blocks.
    pub orphans: u64,
    /// What was refused: events of a rank that is predicted, predictions of one that has events,
    /// ranks beyond [`MOST_RANKS`], and names beyond the bound on second names.
    pub refused: u64,
}

/// The prefix index.
pub struct Index {
    slab: Slab,
    tree: Mutex<Owned>,
}

/// The writer's side, and its buffers.
struct Owned {
    tree: Tree,
    /// The bound in bytes.
    limit: u64,
    locals: Vec<LocalHash>,
    names: Vec<EngineHash>,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index").field("counters", &self.counters()).finish_non_exhaustive()
    }
}

impl Default for Index {
    fn default() -> Self {
        Self::new(Options::default())
    }
}

impl Index {
    /// An empty one.
    pub fn new(options: Options) -> Self {
        // The root: a node without blocks, that is never counted.
        let root = Meta { alive: true, ..Meta::default() };
        let tree = Tree { metas: vec![root], ..Tree::default() };
        Self::with(options, tree, Slab::new())
    }

    fn with(options: Options, tree: Tree, slab: Slab) -> Self {
        let owned = Owned { tree, limit: options.limit(), locals: Vec::new(), names: Vec::new() };
        Self { slab, tree: Mutex::new(owned) }
    }

    fn writer<'a>(&'a self, owned: &'a mut Owned) -> Writer<'a> {
        Writer { slab: &self.slab, tree: &mut owned.tree, limit: owned.limit }
    }

    /// Moves the bound; what is beyond it goes at once.
    pub fn set_options(&self, options: Options) {
        let mut owned = self.tree.lock();
        owned.limit = options.limit();
        self.writer(&mut owned).evict();
    }

    /// What was chosen about it, as it took it.
    pub fn options(&self) -> Options {
        Options { bytes: self.tree.lock().limit }
    }

    /// Applies what a rank says of its blocks. Look-ups go on meanwhile; other writers wait.
    pub fn apply(&self, rank: RankIx, ops: &[KvOp]) {
        let mut owned = self.tree.lock();
        let Owned { tree, limit, locals, names } = &mut *owned;
        if refused(rank, tree) {
            return;
        }
        let mut writer = Writer { slab: &self.slab, tree, limit: *limit };
        for op in ops {
            let op = match op {
                KvOp::Store { parent, tier, seed, blocks } => {
                    locals.clear();
                    names.clear();
                    locals.extend(blocks.iter().map(|(local, _)| *local));
                    names.extend(blocks.iter().map(|(_, name)| *name));
                    Op::Store { parent: *parent, tier: *tier, seed: *seed, locals, names }
                }
                KvOp::Copy { tier, blocks } => Op::Copy { tier: *tier, names: blocks },
                KvOp::Remove { tier, blocks } => Op::Remove { tier: *tier, names: blocks },
                KvOp::Clear => Op::Clear,
            };
            writer.apply(rank, op);
        }
    }

    /// The same from [`wire::encode`]d bytes. Either all of it is applied or, if it is not well
    /// formed, nothing.
    pub fn apply_encoded(&self, rank: RankIx, bytes: &[u8]) -> Result<(), WireError> {
        wire::check(bytes)?;
        let mut owned = self.tree.lock();
        let Owned { tree, limit, locals, names } = &mut *owned;
        if refused(rank, tree) {
            return Ok(());
        }
        let mut writer = Writer { slab: &self.slab, tree, limit: *limit };
        let mut ops = wire::Reader::new(bytes)?;
        while let Some(head) = ops.next_into(locals, names)? {
            let op = match head {
                Head::Store { parent, tier, seed } => Op::Store { parent, tier, seed, locals, names },
                Head::Copy { tier } => Op::Copy { tier, names },
                Head::Remove { tier } => Op::Remove { tier, names },
                Head::Clear => Op::Clear,
            };
            writer.apply(rank, op);
        }
        Ok(())
    }

    /// Says that a prompt of these blocks was sent to a rank without events, which can hold
    /// `capacity` blocks: it holds them now, and lost what it had not used for longest. `false` if
    /// the rank has events, which know better; a rank is one or the other until it is removed.
    pub fn predict(&self, rank: RankIx, seed: Seed, locals: &[LocalHash], capacity: u64) -> bool {
        let mut owned = self.tree.lock();
        if refused(rank, &mut owned.tree) {
            return false;
        }
        self.writer(&mut owned).predict(rank, seed, locals, capacity)
    }

    /// Forgets a rank: it holds nothing, and may have events or be predicted.
    pub fn remove_rank(&self, rank: RankIx) {
        let mut owned = self.tree.lock();
        if (rank.0 as usize) < owned.tree.ranks.len() {
            self.writer(&mut owned).clear(rank);
        }
    }

    /// For each rank that holds the first block, how many it holds from there on without a gap.
    /// In the order of ranks; `out` is emptied first. Does not wait for writers, but for the
    /// moment in which one changes a node that is looked at.
    pub fn lookup(&self, locals: &[LocalHash], out: &mut Vec<Overlap>) {
        lookup::lookup(&self.slab, locals, out);
    }

    /// What the local hashes of the chain were made with in which a rank has this block. `None` if
    /// it is unknown.
    pub fn seed_of(&self, rank: RankIx, name: EngineHash) -> Option<Seed> {
        let owned = self.tree.lock();
        let block = owned.tree.ranks.get(rank.0 as usize)?.names.get(name)?;
        let place = owned.tree.places[block as usize];
        Some(owned.tree.metas[place.node as usize].seed)
    }

    /// Says which content this is: equal for equal sets of (rank, sequence hash, tier), whatever
    /// led there.
    pub fn digest(&self) -> u64 {
        self.tree.lock().tree.digest
    }

    /// What can be counted.
    pub fn counters(&self) -> Counters {
        let owned = self.tree.lock();
        Counters { bytes: owned.tree.bytes(), ..owned.tree.counters }
    }

    /// Blocks that a rank holds, and whether they are predicted.
    pub fn rank(&self, rank: RankIx) -> (u64, bool) {
        let owned = self.tree.lock();
        let state = owned.tree.ranks.get(rank.0 as usize);
        state.map_or((0, false), |state| (state.held, state.source == Source::Predictions))
    }

    /// What there is at this moment, to be written out later ([`Frozen::records`]) while other
    /// operations are applied.
    pub fn freeze(&self) -> Frozen {
        let owned = self.tree.lock();
        dump::freeze(&owned.tree, &self.slab)
    }

    /// Everything, as records of about 256 KiB, the keys of which begin with `b'x'`. Equal
    /// content does not mean equal bytes: compare digests.
    pub fn dump(&self) -> Records {
        self.freeze().records()
    }

    /// The inverse of [`Self::dump`]. Whatever cannot have come from there is an error.
    pub fn load(options: Options, records: &Records) -> Result<Self, LoadError> {
        let (tree, slab) = load::load(records)?;
        let index = Self::with(options, tree, slab);
        let mut owned = index.tree.lock();
        // The bound may be lower than it was.
        index.writer(&mut owned).evict();
        drop(owned);
        Ok(index)
    }
}

fn refused(rank: RankIx, tree: &mut Tree) -> bool {
    let refused = rank.0 >= MOST_RANKS;
    tree.counters.refused += u64::from(refused);
    refused
}

/// Why records are not an index.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a dump of a prefix index: {0}")]
pub struct LoadError(&'static str);
