//! What look-ups read of one node: a run of blocks, who holds them, and where it goes on.

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::bits::Bits;
use super::ranks::RankSet;
use crate::kv::hash::LocalHash;
use crate::kv::types::Tier;

/// Tiers there are.
pub(super) const TIERS: usize = 3;

/// A multiplier whose bits look random.
const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;

/// Spreads the bits of a number, the same way on every replica.
///
/// Who chooses the numbers? Engines name blocks; they are inside the trust boundary. Local hashes
/// are ours, over tokens a client chooses: whoever made a million prompts whose first hashes agree
/// in the upper bits of this product would slow a table down, at the cost of a search for each of
/// them; [`Children`] of one node at a time.
pub(super) fn spread(number: u64) -> u64 {
    let product = u128::from(number ^ MULTIPLIER) * u128::from(MULTIPLIER);
    (product as u64) ^ (product >> 64) as u64
}

/// How many leading numbers two lists share.
pub(super) fn common(a: &[LocalHash], b: &[LocalHash]) -> usize {
    const STEP: usize = 16;
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    let mut at = 0;
    // Whole steps are compared without a branch for each number.
    for (x, y) in a.chunks_exact(STEP).zip(b.chunks_exact(STEP)) {
        let differing = x.iter().zip(y).fold(0, |any, (x, y)| any | (x.0 ^ y.0));
        if differing != 0 {
            break;
        }
        at += STEP;
    }
    at + a[at..].iter().zip(&b[at..]).take_while(|(x, y)| x == y).count()
}

/// One rank's share of a node that is not simply all of it on the accelerator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Part {
    pub(super) rank: u32,
    /// Which blocks, by tier. Those of the first are not kept while the rank is in
    /// [`Body::full`].
    pub(super) tiers: [Bits; TIERS],
}

/// Blocks of one rank from a node's start on, without a gap, each by its best tier.
#[derive(Clone, Copy, Default)]
pub(super) struct Run {
    pub(super) blocks: u32,
    pub(super) host: u32,
    pub(super) disk: u32,
}

impl Part {
    pub(super) fn new(rank: u32) -> Self {
        Self { rank, tiers: Default::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tiers.iter().all(Bits::is_empty)
    }

    pub(super) fn contains(&self, bit: usize) -> bool {
        self.tiers.iter().any(|tier| tier.contains(bit))
    }

    /// One more than the last block held.
    pub(super) fn end(&self) -> usize {
        self.tiers.iter().map(Bits::end).max().unwrap_or(0)
    }

    pub(super) fn words(&self) -> usize {
        self.tiers.iter().map(|tier| tier.words().len()).sum()
    }

    /// The run within the first `len` blocks.
    pub(super) fn run(&self, len: usize) -> Run {
        let mut run = Run::default();
        for at in 0..len.div_ceil(64) {
            let [gpu, host, disk] = [0, 1, 2].map(|tier| self.tiers[tier].word(at));
            let most = (len - at * 64).min(64) as u32;
            let held = (!(gpu | host | disk)).trailing_zeros().min(most);
            let mask = if held == 64 { u64::MAX } else { (1 << held) - 1 };
            run.blocks += held;
            run.host += (host & !gpu & mask).count_ones();
            run.disk += (disk & !gpu & !host & mask).count_ones();
            if held < most {
                break;
            }
        }
        run
    }
}

/// A child: the hash of its first block, in halves so that it takes 12 bytes, and its number.
#[derive(Clone, Copy)]
pub(super) struct Child {
    low: u32,
    high: u32,
    node: u32,
}

impl Child {
    fn new(first: LocalHash, node: u32) -> Self {
        Self { low: first.0 as u32, high: (first.0 >> 32) as u32, node }
    }

    fn first(self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
}

/// The children of a node, by the hash of their first block.
pub(super) enum Children {
    /// Searched from end to end.
    Few(Vec<Child>),
    /// Many prompts begin with a system prompt: its last node has a child for each.
    Many(HashTable<Child>),
}

/// More children than this are kept in a table.
const FEW_CHILDREN: usize = 12;

impl Default for Children {
    fn default() -> Self {
        Self::Few(Vec::new())
    }
}

impl Children {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Few(list) => list.len(),
            Self::Many(table) => table.len(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn get(&self, first: LocalHash) -> Option<u32> {
        match self {
            Self::Few(list) => list.iter().find(|child| child.first() == first.0),
            Self::Many(table) => table.find(spread(first.0), |child| child.first() == first.0),
        }
        .map(|child| child.node)
    }

    /// Adds a child or puts another in its place.
    pub(super) fn set(&mut self, first: LocalHash, node: u32) {
        match self {
            Self::Few(list) => {
                if let Some(child) = list.iter_mut().find(|child| child.first() == first.0) {
                    child.node = node;
                } else if list.len() < FEW_CHILDREN {
                    list.push(Child::new(first, node));
                } else {
                    let mut table = HashTable::with_capacity(2 * FEW_CHILDREN);
                    for child in list.iter().copied().chain([Child::new(first, node)]) {
                        table.insert_unique(spread(child.first()), child, |child| spread(child.first()));
                    }
                    *self = Self::Many(table);
                }
            }
            Self::Many(table) => {
                match table.entry(
                    spread(first.0),
                    |child| child.first() == first.0,
                    |child| spread(child.first()),
                ) {
                    Entry::Occupied(mut child) => child.get_mut().node = node,
                    Entry::Vacant(place) => {
                        place.insert(Child::new(first, node));
                    }
                }
            }
        }
    }

    pub(super) fn remove(&mut self, first: LocalHash) {
        match self {
            Self::Few(list) => list.retain(|child| child.first() != first.0),
            Self::Many(table) => {
                if let Ok(child) = table.find_entry(spread(first.0), |child| child.first() == first.0) {
                    child.remove();
                }
                if table.is_empty() {
                    *self = Self::default();
                }
            }
        }
    }

    /// In no order that means anything.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let (list, table) = match self {
            Self::Few(list) => (Some(list), None),
            Self::Many(table) => (None, Some(table)),
        };
        let list = list.into_iter().flatten();
        list.chain(table.into_iter().flatten()).map(|child| child.node)
    }
}

/// What look-ups read of one node.
#[derive(Default)]
pub(super) struct Body {
    /// Its blocks, each following the one before.
    pub(super) locals: Vec<LocalHash>,
    /// Who has all of them on the accelerator.
    pub(super) full: RankSet,
    /// Who has some of them there, or any elsewhere. Ordered by rank; none is empty.
    pub(super) parts: Vec<Part>,
    /// Nodes that follow the last block.
    pub(super) children: Children,
}

impl Body {
    pub(super) fn part(&self, rank: u32) -> Option<&Part> {
        let at = self.parts.binary_search_by_key(&rank, |part| part.rank).ok()?;
        Some(&self.parts[at])
    }

    /// Where the rank's part is; makes an empty one if need be.
    pub(super) fn part_at(&mut self, rank: u32) -> usize {
        self.parts.binary_search_by_key(&rank, |part| part.rank).unwrap_or_else(|at| {
            self.parts.reserve_exact(1);
            self.parts.insert(at, Part::new(rank));
            at
        })
    }

    /// Whether the rank holds the block in whatever tier.
    pub(super) fn holds(&self, rank: u32, bit: usize) -> bool {
        self.full.contains(rank) || self.part(rank).is_some_and(|part| part.contains(bit))
    }

    /// Whether the rank holds the block in this tier.
    pub(super) fn holds_in(&self, rank: u32, bit: usize, tier: Tier) -> bool {
        tier == Tier::Gpu && self.full.contains(rank)
            || self.part(rank).is_some_and(|part| part.tiers[tier as usize].contains(bit))
    }

    /// Restores the invariants of [`Body::full`] and [`Body::parts`] after blocks came or went.
    pub(super) fn normalise(&mut self) {
        let (len, full) = (self.locals.len(), &mut self.full);
        self.parts.retain_mut(|part| {
            if part.tiers[0].count() == len && len > 0 {
                full.insert(part.rank);
                part.tiers[0] = Bits::default();
            }
            !part.is_empty()
        });
    }

    /// Ranks that hold anything here, in order.
    pub(super) fn ranks(&self) -> Vec<u32> {
        let mut ranks: Vec<u32> = self.full.iter().chain(self.parts.iter().map(|part| part.rank)).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// Words of sets and bits, for the account.
    pub(super) fn words(&self) -> usize {
        self.full.words() + self.parts.iter().map(Part::words).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(numbers: impl IntoIterator<Item = u64>) -> Vec<LocalHash> {
        numbers.into_iter().map(LocalHash).collect()
    }

    #[test]
    fn common_prefixes_are_counted_at_every_length() {
        let long = hashes(0..100);
        for at in 0..100 {
            let mut other = long.clone();
            other[at].0 = 1000;
            assert_eq!(common(&long, &other), at);
            assert_eq!(common(&long[..at], &long), at);
        }
    }

    #[test]
    fn a_run_ends_at_the_first_gap_and_counts_the_best_tier() {
        let mut part = Part::new(1);
        part.tiers[0] = Bits::ones(70);
        part.tiers[1] = Bits::ones(80);
        (78..90).for_each(|bit| {
            part.tiers[2].insert(bit);
        });
        (95..99).for_each(|bit| {
            part.tiers[0].insert(bit);
        });
        let run = part.run(100);
        assert_eq!((run.blocks, run.host, run.disk), (90, 10, 10));
        let run = part.run(64);
        assert_eq!((run.blocks, run.host, run.disk), (64, 0, 0));
    }

    #[test]
    fn children_are_found_among_few_and_among_many() {
        let mut children = Children::default();
        for n in 0..1000u32 {
            children.set(LocalHash(u64::from(n) << 40), n);
            children.set(LocalHash(u64::from(n) << 40), n + 1);
        }
        assert_eq!(children.len(), 1000);
        for n in 0..1000u32 {
            assert_eq!(children.get(LocalHash(u64::from(n) << 40)), Some(n + 1));
            children.remove(LocalHash(u64::from(n) << 40));
        }
        assert!(children.is_empty() && children.iter().next().is_none());
    }
}
