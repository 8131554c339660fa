//! What engines say, done to the tree.

use super::body::TIERS;
use super::names::Given;
use super::ranks::ones;
use super::slab::ROOT;
use super::tree::{ALL_TIERS, Held, MOST_BLOCKS, Rank, Source, Writer};
use crate::kv::hash::{LocalHash, Seed};
use crate::kv::types::{EngineHash, RankIx, Tier};

/// One operation, its columns borrowed.
pub(super) enum Op<'a> {
    Store {
        parent: Option<EngineHash>,
        tier: Tier,
        seed: Seed,
        locals: &'a [LocalHash],
        names: &'a [EngineHash],
    },
    Copy {
        tier: Tier,
        names: &'a [EngineHash],
    },
    Remove {
        tier: Tier,
        names: &'a [EngineHash],
    },
    Clear,
}

impl Writer<'_> {
    pub(super) fn apply(&mut self, rank: RankIx, op: Op<'_>) {
        match op {
            Op::Clear => self.clear(rank),
            // Says nothing; the encoding leaves it out.
            Op::Store { locals: [], .. } | Op::Copy { names: [], .. } | Op::Remove { names: [], .. } => {}
            _ if self.rank(rank).source == Source::Predictions => self.tree.counters.refused += 1,
            Op::Store { parent, tier, seed, locals, names } => {
                self.store(rank, parent, tier, seed, locals, names);
                self.evict();
            }
            Op::Copy { tier, names } => {
                for name in names {
                    self.copy(rank, tier, *name);
                }
                self.evict();
            }
            Op::Remove { tier, names } => {
                for name in names {
                    self.remove(rank, tier, *name);
                }
            }
        }
    }

    fn store(
        &mut self,
        rank: RankIx,
        parent: Option<EngineHash>,
        tier: Tier,
        seed: Seed,
        locals: &[LocalHash],
        names: &[EngineHash],
    ) {
        let (mut node, mut at) = match parent.map(|name| self.rank(rank).names.get(name)) {
            None => (ROOT, 0),
            Some(Some(block)) => {
                let (node, at) = self.place(block);
                (node, at + 1)
            }
            Some(None) => {
                self.tree.counters.orphans += locals.len() as u64;
                return;
            }
        };
        self.rank(rank).source = Source::Events;
        self.tree.clock += 1;
        let mut displaced = Vec::new();
        let mut done = 0;
        while done < locals.len() {
            let (shared, end) = self.follow(node, at, &locals[done..]);
            if shared > 0 {
                let stamp = self.tree.clock;
                self.meta(node).stamp = stamp;
                let held = self.hold(rank.0, node, at, at + shared, tier);
                self.give_names(rank, node, at, &names[done..done + shared], &held, &mut displaced);
                done += shared;
                at += shared;
                if end && done == locals.len() {
                    // The rank may have become the last of those who hold both.
                    let above = self.tree.metas[node as usize].parent;
                    self.merge(above);
                }
                continue;
            }
            if !end {
                node = self.split(node, at);
                continue;
            }
            let child = self.body(node).children.get(locals[done]);
            if let Some(child) = child {
                (node, at) = (child, 0);
                continue;
            }
            let rest = &locals[done..];
            let took = match tier {
                Tier::Gpu => self.lengthen(rank.0, node, rest, seed),
                _ => 0,
            };
            let took = if took > 0 {
                took
            } else {
                let took = rest.len().min(MOST_BLOCKS);
                node = self.grow(node, &rest[..took], seed);
                at = 0;
                self.hold(rank.0, node, 0, took, tier);
                took
            };
            self.give_names(rank, node, at, &names[done..done + took], &Held::None, &mut displaced);
            done += took;
            at += took;
        }
        for block in displaced {
            if !self.rank(rank).names_mut().lost_main(block) {
                self.forget(rank, block);
            } else {
                self.tree.aliases -= 1;
            }
        }
    }

    /// Names a stretch of a node; `held` says what of it the rank held before.
    fn give_names(
        &mut self,
        rank: RankIx,
        node: u32,
        at: usize,
        names: &[EngineHash],
        held: &Held,
        displaced: &mut Vec<u32>,
    ) {
        let tree = &mut *self.tree;
        let ids = &tree.metas[node as usize].ids[at..at + names.len()];
        let known = tree.ranks[rank.0 as usize].names_mut();
        let aliases = known.aliases() as u64;
        for (i, (name, block)) in names.iter().zip(ids).enumerate() {
            let (given, other) = known.give(*name, *block, held.contains(at + i));
            displaced.extend(other);
            tree.counters.refused += u64::from(given == Given::Refused);
        }
        tree.aliases = tree.aliases + known.aliases() as u64 - aliases;
    }

    /// The rank lets a block without a name go from every tier.
    fn forget(&mut self, rank: RankIx, block: u32) {
        let (node, _) = self.place(block);
        for tier in ALL_TIERS {
            self.let_go(rank.0, block, tier);
        }
        self.settle(node);
    }

    fn copy(&mut self, rank: RankIx, tier: Tier, name: EngineHash) {
        let Some(block) = self.rank(rank).names.get(name) else {
            self.tree.counters.orphans += 1;
            return;
        };
        let (node, at) = self.place(block);
        self.hold(rank.0, node, at, at + 1, tier);
    }

    fn remove(&mut self, rank: RankIx, tier: Tier, name: EngineHash) {
        let Some(block) = self.rank(rank).names.get(name) else { return };
        let (node, at) = self.place(block);
        if !self.body(node).holds_in(rank.0, at, tier) {
            return;
        }
        if self.rank(rank).names_mut().remove_one_of_several(name, block) {
            self.tree.aliases -= 1;
            return;
        }
        if self.let_go(rank.0, block, tier) {
            self.rank(rank).names_mut().remove_main(name);
            self.settle(node);
        }
    }

    /// All nodes of blocks that a rank has names for, which are all that it holds.
    fn named_nodes(&self, rank: RankIx) -> Vec<u32> {
        let mut marked = vec![0u64; self.tree.metas.len().div_ceil(64)];
        for (_, block) in self.tree.ranks[rank.0 as usize].names.iter() {
            let node = self.tree.places[block as usize].node;
            marked[node as usize / 64] |= 1 << (node % 64);
        }
        ones(&marked).collect()
    }

    /// The rank holds nothing, and is as new.
    pub(super) fn clear(&mut self, rank: RankIx) {
        let nodes: Vec<u32> = match self.rank(rank).source {
            Source::None => return,
            Source::Events => self.named_nodes(rank),
            Source::Predictions => self.predicted_nodes(rank),
        };
        for node in &nodes {
            self.forget_prediction(rank.0, *node);
        }
        self.leave_all(rank.0, nodes);
        let state = self.rank(rank);
        debug_assert_eq!((state.held, state.tiers), (0, [(0, 0); TIERS]));
        let aliases = state.names.aliases() as u64;
        *state = Rank::default();
        self.tree.aliases -= aliases;
    }
}
