//! What the index is held against: the same thing said with maps, slowly, block by block.
//!
//! Knows no nodes, no numbers and no locks. The bound in bytes is not modelled: tests tell it what
//! was evicted ([`Reference::evicted`]).

use std::collections::{BTreeMap, BTreeSet};

use super::hash::{LocalHash, Seed, SequenceHash, chained};
use super::types::{EngineHash, KvOp, Overlap, RankIx, Tier};

/// A block that somebody holds, or something that follows it.
#[derive(Clone, Debug)]
struct Block {
    parent: Option<SequenceHash>,
    seed: Seed,
}

#[derive(Clone, Debug, Default)]
struct Rank {
    /// `Some(true)`: predicted.
    predicted: Option<bool>,
    main: BTreeMap<u64, SequenceHash>,
    aliases: BTreeMap<u64, SequenceHash>,
    tiers: [BTreeSet<SequenceHash>; 3],
    used: BTreeMap<SequenceHash, u64>,
}

impl Rank {
    fn holds(&self, block: SequenceHash) -> bool {
        self.tiers.iter().any(|tier| tier.contains(&block))
    }

    fn held(&self) -> BTreeSet<SequenceHash> {
        self.tiers.iter().flatten().copied().collect()
    }

    fn get(&self, name: u64) -> Option<SequenceHash> {
        self.main.get(&name).or_else(|| self.aliases.get(&name)).copied()
    }

    /// The least of a block's second names takes the place of the first.
    fn promote(&mut self, block: SequenceHash) -> bool {
        let Some(name) = self.aliases.iter().find(|(_, b)| **b == block).map(|(name, _)| *name) else {
            return false;
        };
        self.aliases.remove(&name);
        self.main.insert(name, block);
        true
    }
}

/// The reference.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reference {
    ranks: BTreeMap<u32, Rank>,
    blocks: BTreeMap<SequenceHash, Block>,
    clock: u64,
    pub(crate) orphans: u64,
    pub(crate) refused: u64,
}

impl Reference {
    pub(crate) fn apply(&mut self, rank: RankIx, op: &KvOp) {
        let state = self.ranks.entry(rank.0).or_default();
        let empty = match op {
            KvOp::Store { blocks, .. } => blocks.is_empty(),
            KvOp::Copy { blocks, .. } | KvOp::Remove { blocks, .. } => blocks.is_empty(),
            KvOp::Clear => false,
        };
        if empty {
            return;
        }
        if state.predicted == Some(true) && *op != KvOp::Clear {
            self.refused += 1;
            return;
        }
        match op {
            KvOp::Store { parent, tier, seed, blocks } => self.store(rank, *parent, *tier, *seed, blocks),
            KvOp::Copy { tier, blocks } => {
                for name in blocks {
                    match state.get(name.0) {
                        Some(block) => {
                            state.tiers[*tier as usize].insert(block);
                        }
                        None => self.orphans += 1,
                    }
                }
            }
            KvOp::Remove { tier, blocks } => {
                for name in blocks {
                    Self::remove(state, *tier, name.0);
                }
            }
            KvOp::Clear => *state = Rank::default(),
        }
        self.prune();
    }

    fn store(
        &mut self,
        rank: RankIx,
        parent: Option<EngineHash>,
        tier: Tier,
        seed: Seed,
        blocks: &[(LocalHash, EngineHash)],
    ) {
        let state = self.ranks.entry(rank.0).or_default();
        let mut before = None;
        if let Some(parent) = parent {
            before = state.get(parent.0);
            if before.is_none() {
                self.orphans += blocks.len() as u64;
                return;
            }
        }
        state.predicted = Some(false);
        self.clock += 1;
        let mut nameless = Vec::new();
        for (local, EngineHash(name)) in blocks {
            let block = chained(before, *local);
            self.blocks.entry(block).or_insert(Block { parent: before, seed });
            before = Some(block);
            let held = state.holds(block);
            state.tiers[tier as usize].insert(block);
            if state.get(*name) == Some(block) {
                continue;
            }
            state.aliases.remove(name);
            nameless.extend(state.main.remove(name));
            if held {
                state.aliases.insert(*name, block);
            } else {
                state.main.insert(*name, block);
            }
        }
        for block in nameless {
            if !state.promote(block) {
                state.tiers.iter_mut().for_each(|tier| {
                    tier.remove(&block);
                });
            }
        }
    }

    fn remove(state: &mut Rank, tier: Tier, name: u64) {
        let Some(block) = state.get(name) else { return };
        if !state.tiers[tier as usize].contains(&block) || state.aliases.remove(&name).is_some() {
            return;
        }
        if state.promote(block) {
            state.main.remove(&name);
            return;
        }
        state.tiers[tier as usize].remove(&block);
        if !state.holds(block) {
            state.main.remove(&name);
        }
    }

    pub(crate) fn remove_rank(&mut self, rank: RankIx) {
        self.ranks.remove(&rank.0);
        self.prune();
    }

    pub(crate) fn predict(&mut self, rank: RankIx, seed: Seed, locals: &[LocalHash], capacity: u64) {
        let state = self.ranks.entry(rank.0).or_default();
        if state.predicted == Some(false) {
            self.refused += 1;
            return;
        }
        state.predicted = Some(true);
        self.clock += 1;
        let mut before = None;
        for local in locals.iter().take(capacity as usize) {
            let block = chained(before, *local);
            self.blocks.entry(block).or_insert(Block { parent: before, seed });
            before = Some(block);
            state.tiers[0].insert(block);
            state.used.insert(block, self.clock);
        }
        while state.tiers[0].len() as u64 > capacity {
            let above: BTreeSet<_> = state.tiers[0].iter().filter_map(|b| self.blocks[b].parent).collect();
            let ends = state.tiers[0].iter().filter(|block| !above.contains(block));
            let oldest = *ends.min_by_key(|block| state.used[block]).expect("a tree has an end");
            state.tiers[0].remove(&oldest);
            state.used.remove(&oldest);
        }
        self.prune();
    }

    /// Only what is held, or before something held, is kept.
    fn prune(&mut self) {
        let mut kept = BTreeSet::new();
        for block in self.ranks.values().flat_map(Rank::held) {
            let mut at = Some(block);
            while let Some(block) = at
                && kept.insert(block)
            {
                at = self.blocks[&block].parent;
            }
        }
        self.blocks.retain(|block, _| kept.contains(block));
    }

    /// Takes over what the bound left. Nothing may have come, and what went must have gone for all
    /// ranks, with all that followed it.
    pub(crate) fn evicted(&mut self, left: &BTreeSet<(u32, SequenceHash, Tier)>) -> u64 {
        let before = self.content();
        assert!(left.is_subset(&before), "the bound never adds anything");
        let still: BTreeSet<_> = left.iter().map(|(_, block, _)| *block).collect();
        for (_, block, _) in before.difference(left) {
            assert!(!still.contains(block), "a block is evicted for all ranks at once");
        }
        let mut evicted = 0;
        for state in self.ranks.values_mut() {
            evicted += state.held().difference(&still).count() as u64;
            state.tiers.iter_mut().for_each(|tier| tier.retain(|block| still.contains(block)));
            state.main.retain(|_, block| still.contains(block));
            state.aliases.retain(|_, block| still.contains(block));
            state.used.retain(|block, _| still.contains(block));
        }
        for block in &still {
            // A gap is one that was there before: blocks go from the end.
            let parent = self.blocks[block].parent;
            let held_before = |b: &SequenceHash| before.iter().any(|(_, block, _)| block == b);
            assert!(parent.is_none_or(|p| still.contains(&p) || !held_before(&p)), "ends go first");
        }
        self.prune();
        evicted
    }

    pub(crate) fn lookup(&self, locals: &[LocalHash]) -> Vec<Overlap> {
        let mut found = Vec::new();
        for (rank, state) in &self.ranks {
            let mut overlap = Overlap { rank: RankIx(*rank), ..Overlap::default() };
            let mut before = None;
            for local in locals {
                let block = chained(before, *local);
                before = Some(block);
                let [gpu, host, disk] = [0, 1, 2].map(|tier| state.tiers[tier].contains(&block));
                if !(gpu || host || disk) {
                    break;
                }
                overlap.blocks += 1;
                overlap.gpu += u32::from(gpu);
                overlap.host += u32::from(host && !gpu);
            }
            if overlap.blocks > 0 {
                found.push(overlap);
            }
        }
        found
    }

    pub(crate) fn seed_of(&self, rank: RankIx, name: EngineHash) -> Option<Seed> {
        Some(self.blocks[&self.ranks.get(&rank.0)?.get(name.0)?].seed)
    }

    pub(crate) fn content(&self) -> BTreeSet<(u32, SequenceHash, Tier)> {
        let tiers = [Tier::Gpu, Tier::Host, Tier::Disk];
        let of = |(rank, state): (&u32, &Rank)| {
            let rank = *rank;
            let lists = tiers.map(|tier| state.tiers[tier as usize].clone());
            tiers
                .into_iter()
                .zip(lists)
                .flat_map(move |(tier, list)| list.into_iter().map(move |block| (rank, block, tier)))
        };
        self.ranks.iter().flat_map(of).collect()
    }

    /// Different blocks, and blocks of each rank.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let held = self.ranks.values().map(|state| state.held().len() as u64).sum();
        (self.blocks.len() as u64, held)
    }
}
