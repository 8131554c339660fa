//! The bound in bytes.
//!
//! What is counted is what things are worth, not what the allocator gave: the same on every
//! replica. When the bound is passed, the ends of the tree that were stored least recently go, for
//! all ranks, until a sixteenth is free: in one go, because names are kept by name and those of
//! what went must be swept out. So a store costs nothing for the bound until it is passed.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::tree::{Tree, Writer};

/// Bytes by which things are counted. Each is what the thing takes here, with the slack of lists
/// and tables that grow.
mod worth {
    /// A node: body, the writer's part, its entry with the parent.
    pub(super) const NODE: u64 = 256;
    /// A block: its hash, sum, number and place.
    pub(super) const BLOCK: u64 = 34;
    /// A name.
    pub(super) const NAME: u64 = 22;
    /// A name beyond the first.
    pub(super) const ALIAS: u64 = 64;
    /// A part, without its bits.
    pub(super) const PART: u64 = 80;
    /// A word of bits.
    pub(super) const WORD: u64 = 8;
    /// A prediction.
    pub(super) const PREDICTION: u64 = 48;
}

impl Tree {
    /// What everything is worth.
    pub(super) fn bytes(&self) -> u64 {
        self.counters.nodes * worth::NODE
            + self.counters.blocks * worth::BLOCK
            + self.named * worth::NAME
            + self.aliases * worth::ALIAS
            + self.parts * worth::PART
            + self.words * worth::WORD
            + self.predictions * worth::PREDICTION
    }
}

impl Writer<'_> {
    /// Keeps the bound.
    pub(super) fn evict(&mut self) {
        if self.tree.bytes() <= self.limit {
            return;
        }
        let target = self.limit - self.limit / 16;
        let mut ends: BinaryHeap<_> = (1..self.tree.metas.len() as u32)
            .filter(|node| self.tree.metas[*node as usize].alive && self.body(*node).children.is_empty())
            .map(|node| Reverse(self.age(node)))
            .collect();
        let mut dead = vec![0u64; self.tree.places.len().div_ceil(64)];
        let mut swept = vec![false; self.tree.ranks.len()];
        let mut parents = Vec::new();
        // Names are worth something until they are swept; what will go is known.
        while self.tree.bytes() > target
            && let Some(Reverse((_, _, node))) = ends.pop()
        {
            for block in &self.tree.metas[node as usize].ids {
                dead[*block as usize / 64] |= 1 << (block % 64);
            }
            let ranks = self.body(node).ranks();
            for rank in ranks {
                self.forget_prediction(rank, node);
                let blocks = self.leave(rank, node);
                self.tree.counters.evicted += blocks;
                swept[rank as usize] = true;
            }
            let parent = self.tree.metas[node as usize].parent;
            self.unlink(node);
            parents.push(parent);
            if parent != super::slab::ROOT && self.body(parent).children.is_empty() {
                ends.push(Reverse(self.age(parent)));
            }
        }
        for rank in swept.iter().enumerate().filter_map(|(rank, swept)| swept.then_some(rank)) {
            let names = self.tree.ranks[rank].names_mut();
            let aliases = names.aliases() as u64;
            names.retain(|block| dead[block as usize / 64] >> (block % 64) & 1 == 0);
            self.tree.aliases = self.tree.aliases + names.aliases() as u64 - aliases;
        }
        for parent in parents {
            self.settle(parent);
        }
    }

    /// By what ends are told apart: when something was stored there last, then their own hash.
    fn age(&self, node: u32) -> (u64, u64, u32) {
        let meta = &self.tree.metas[node as usize];
        (meta.stamp, meta.sequence(0).0, node)
    }
}
