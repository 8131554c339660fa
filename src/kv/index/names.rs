//! The engine's names of one rank's blocks.
//!
//! **Invariant**: every block that the rank holds has exactly one *main* name. A block that is
//! stored under a second name (two physical blocks of equal content, as far as we can see) has an
//! *alias*: taking one of its names back leaves the block with the others. Aliases are rare, so
//! they are kept apart, and bounded.

use std::collections::{BTreeMap, BTreeSet};

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::body::spread;
use crate::kv::types::EngineHash;

/// Aliases of one rank. More are not kept: what follows them is an orphan.
pub(super) const MOST_ALIASES: usize = 4096;

/// A name, in halves so that an entry takes 12 bytes.
#[derive(Clone, Copy)]
struct Name {
    low: u32,
    high: u32,
    block: u32,
}

impl Name {
    fn new(name: EngineHash, block: u32) -> Self {
        Self { low: name.0 as u32, high: (name.0 >> 32) as u32, block }
    }

    fn name(self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
}

/// Names of one rank's blocks, by number of block. Cloned when one of them changes while a frozen
/// image still has it.
#[derive(Clone, Default)]
pub(super) struct Names {
    table: HashTable<Name>,
    aliases: BTreeMap<u64, u32>,
    by_block: BTreeSet<(u32, u64)>,
}

/// What became of a name that was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Given {
    /// It is known for this block.
    Known,
    /// It is the block's main name now.
    Main,
    /// It is one more name of the block.
    Alias,
    /// It would be one alias too many.
    Refused,
}

impl Names {
    pub(super) fn get(&self, name: EngineHash) -> Option<u32> {
        let main = self.table.find(spread(name.0), |n| n.name() == name.0).map(|n| n.block);
        main.or_else(|| self.aliases.get(&name.0).copied())
    }

    /// Main names.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn aliases(&self) -> usize {
        self.aliases.len()
    }

    /// Gives a name to a block, which is `held` already or not. The other block that went by the
    /// name until now, if any, comes second: it must be let go ([`Self::lost_main`]).
    pub(super) fn give(&mut self, name: EngineHash, block: u32, held: bool) -> (Given, Option<u32>) {
        if !self.aliases.is_empty()
            && let Some(other) = self.aliases.get(&name.0).copied()
        {
            if other == block {
                return (Given::Known, None);
            }
            self.aliases.remove(&name.0);
            self.by_block.remove(&(other, name.0));
        }
        let entry = self.table.entry(spread(name.0), |n| n.name() == name.0, |n| spread(n.name()));
        match entry {
            Entry::Vacant(place) if !held => {
                place.insert(Name::new(name, block));
                (Given::Main, None)
            }
            Entry::Vacant(_) => (self.alias(name, block), None),
            Entry::Occupied(mut found) => {
                let other = found.get().block;
                if other == block {
                    return (Given::Known, None);
                }
                if held {
                    found.remove();
                    return (self.alias(name, block), Some(other));
                }
                found.get_mut().block = block;
                (Given::Main, Some(other))
            }
        }
    }

    fn alias(&mut self, name: EngineHash, block: u32) -> Given {
        if self.aliases.len() >= MOST_ALIASES {
            return Given::Refused;
        }
        self.aliases.insert(name.0, block);
        self.by_block.insert((block, name.0));
        Given::Alias
    }

    /// After a block lost its main name: an alias takes its place. `false` if it has none: then
    /// the rank must let the block go.
    pub(super) fn lost_main(&mut self, block: u32) -> bool {
        let Some(alias) = self.by_block.range((block, 0)..=(block, u64::MAX)).next().map(|(_, name)| *name)
        else {
            return false;
        };
        self.by_block.remove(&(block, alias));
        self.aliases.remove(&alias);
        self.insert(EngineHash(alias), block);
        true
    }

    /// Takes a name back that is one of several of its block. `false` if it is the only one (then
    /// nothing is done).
    pub(super) fn remove_one_of_several(&mut self, name: EngineHash, block: u32) -> bool {
        if self.aliases.is_empty() {
            return false;
        }
        if self.aliases.remove(&name.0).is_some() {
            self.by_block.remove(&(block, name.0));
            return true;
        }
        if self.by_block.range((block, 0)..=(block, u64::MAX)).next().is_none() {
            return false;
        }
        self.remove_main(name);
        self.lost_main(block)
    }

    pub(super) fn remove_main(&mut self, name: EngineHash) {
        if let Ok(found) = self.table.find_entry(spread(name.0), |n| n.name() == name.0) {
            found.remove();
        }
    }

    /// Forgets all names of blocks that are gone.
    pub(super) fn retain(&mut self, mut kept: impl FnMut(u32) -> bool) {
        self.table.retain(|name| kept(name.block));
        self.aliases.retain(|_, block| kept(*block));
        self.by_block.retain(|(block, _)| kept(*block));
    }

    /// Main names and their blocks, in no order that means anything.
    pub(super) fn iter(&self) -> impl Iterator<Item = (EngineHash, u32)> + '_ {
        self.table.iter().map(|name| (EngineHash(name.name()), name.block))
    }

    /// Aliases and their blocks.
    pub(super) fn iter_aliases(&self) -> impl Iterator<Item = (EngineHash, u32)> + '_ {
        self.aliases.iter().map(|(name, block)| (EngineHash(*name), *block))
    }

    /// Room for so many more.
    pub(super) fn reserve(&mut self, more: usize) {
        self.table.reserve(more, |name| spread(name.name()));
    }

    /// A main name that is known to be new.
    fn insert(&mut self, name: EngineHash, block: u32) {
        self.table.insert_unique(spread(name.0), Name::new(name, block), |n| spread(n.name()));
    }
}
