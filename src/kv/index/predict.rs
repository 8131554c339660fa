//! What a rank without events probably holds: the prompts that were sent to it, as far as its
//! cache reaches, least recently used first out.
//!
//! **Invariant**: nodes of predictions end where a prompt ended or parted from another, and are
//! held whole. So each node has one time of last use per rank, and a node is used no earlier than
//! any below it. A rank's *leaves* are its nodes below which it has none; no two have the same
//! time, as one prompt has one end.

use std::collections::{BTreeMap, BTreeSet};

use super::slab::ROOT;
use super::tree::{MOST_BLOCKS, Source, Writer};
use crate::kv::hash::{LocalHash, Seed};
use crate::kv::types::{RankIx, Tier};

/// One rank's predicted blocks of one node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Predicted {
    pub(super) rank: u32,
    /// Nodes below that are predicted for the same rank.
    pub(super) children: u32,
    /// When it was used last.
    pub(super) stamp: u64,
}

/// A rank's leaves by the time of last use.
pub(super) type Leaves = BTreeMap<u64, u32>;

impl Writer<'_> {
    /// The rank was sent a prompt of these blocks and can hold `capacity` of them. Refused if it
    /// tells by events what it has.
    pub(super) fn predict(&mut self, rank: RankIx, seed: Seed, locals: &[LocalHash], capacity: u64) -> bool {
        if self.rank(rank).source == Source::Events {
            self.tree.counters.refused += 1;
            return false;
        }
        self.rank(rank).source = Source::Predictions;
        let most = usize::try_from(capacity).unwrap_or(usize::MAX);
        let locals = &locals[..locals.len().min(most)];
        self.tree.clock += 1;
        let (mut node, mut done) = (ROOT, 0);
        while done < locals.len() {
            let rest = &locals[done..];
            let child = self.body(node).children.get(rest[0]);
            let (next, took) = match child {
                Some(child) => {
                    let (shared, end) = self.follow(child, 0, rest);
                    (if end { child } else { self.split(child, shared) }, shared)
                }
                None => {
                    let took = rest.len().min(MOST_BLOCKS);
                    (self.grow(node, &rest[..took], seed), took)
                }
            };
            self.touch(rank, next, took);
            (node, done) = (next, done + took);
        }
        let stamp = self.tree.clock;
        if self.prediction(rank.0, node).is_some_and(|p| p.children == 0) {
            self.rank(rank).leaves.insert(stamp, node);
        }
        self.keep_within(rank, capacity);
        self.evict();
        true
    }

    fn prediction(&mut self, rank: u32, node: u32) -> Option<&mut Predicted> {
        let list = &mut self.meta(node).predicted;
        let at = list.binary_search_by_key(&rank, |p| p.rank).ok()?;
        Some(&mut list[at])
    }

    /// Marks a node as used now. It is taken from the leaves: the end of the path is put back.
    fn touch(&mut self, rank: RankIx, node: u32, len: usize) {
        let stamp = self.tree.clock;
        self.meta(node).stamp = stamp;
        if let Some(known) = self.prediction(rank.0, node) {
            let before = std::mem::replace(&mut known.stamp, stamp);
            if known.children == 0 {
                self.rank(rank).leaves.remove(&before);
            }
            return;
        }
        self.hold(rank.0, node, 0, len, Tier::Gpu);
        let list = &mut self.meta(node).predicted;
        let at = list.partition_point(|p| p.rank < rank.0);
        list.reserve_exact(1);
        list.insert(at, Predicted { rank: rank.0, children: 0, stamp });
        self.tree.predictions += 1;
        let parent = self.tree.metas[node as usize].parent;
        if let Some(above) = self.prediction(rank.0, parent) {
            above.children += 1;
        }
    }

    /// Lets go of the ends of what was used least recently until the rest fits.
    fn keep_within(&mut self, rank: RankIx, capacity: u64) {
        while self.rank(rank).held > capacity {
            let excess = usize::try_from(self.rank(rank).held - capacity).unwrap_or(usize::MAX);
            let Some((_, node)) = self.rank(rank).leaves.first_key_value() else { return };
            let node = *node;
            let len = self.tree.metas[node as usize].ids.len();
            if excess < len {
                // The end keeps the node's number, and its place among the leaves.
                self.split(node, len - excess);
            }
            self.forget_prediction(rank.0, node);
            self.leave(rank.0, node);
            self.settle(node);
        }
    }

    /// Takes a node from a rank's predictions, if it is one; what is above may become a leaf.
    /// The blocks are the caller's.
    pub(super) fn forget_prediction(&mut self, rank: u32, node: u32) {
        let list = &mut self.meta(node).predicted;
        let Ok(at) = list.binary_search_by_key(&rank, |p| p.rank) else { return };
        let gone = list.remove(at);
        self.tree.predictions -= 1;
        if gone.children == 0 {
            self.tree.ranks[rank as usize].leaves.remove(&gone.stamp);
        }
        let parent = self.tree.metas[node as usize].parent;
        if let Some(above) = self.prediction(rank, parent) {
            // What goes from above while it has children (all go) leaves none behind that count.
            above.children = above.children.saturating_sub(1);
            let (children, stamp) = (above.children, above.stamp);
            if children == 0 {
                self.tree.ranks[rank as usize].leaves.insert(stamp, parent);
            }
        }
    }

    /// All nodes of a rank's predictions.
    pub(super) fn predicted_nodes(&mut self, rank: RankIx) -> Vec<u32> {
        let leaves: Vec<u32> = self.rank(rank).leaves.values().copied().collect();
        let mut nodes = BTreeSet::new();
        for leaf in leaves {
            let mut node = leaf;
            // Up to where another leaf's way was taken already.
            while self.prediction(rank.0, node).is_some() && nodes.insert(node) {
                node = self.tree.metas[node as usize].parent;
            }
        }
        nodes.into_iter().collect()
    }
}
