//! A set of ranks: a few as numbers in place, more of them as bits.
//!
//! **Invariant**: up to [`FEW`] are numbers, in order; more are bits whose last word is not zero.
//! So equal sets are equal values and take equal room on every replica.

/// How many fit in place: as many as make no node larger.
const FEW: usize = 5;

/// Ranks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum RankSet {
    /// In order; the rest of the array is 0.
    Few { len: u8, ranks: [u32; FEW] },
    /// As bits.
    Many { len: u32, words: Box<[u64]> },
}

impl Default for RankSet {
    fn default() -> Self {
        Self::Few { len: 0, ranks: [0; FEW] }
    }
}

impl RankSet {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Few { len, .. } => usize::from(*len),
            Self::Many { len, .. } => *len as usize,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn is_only(&self, rank: u32) -> bool {
        matches!(self, Self::Few { len: 1, ranks } if ranks[0] == rank)
    }

    pub(super) fn contains(&self, rank: u32) -> bool {
        match self {
            Self::Few { len, ranks } => ranks[..usize::from(*len)].contains(&rank),
            Self::Many { words, .. } => {
                words.get(rank as usize / 64).is_some_and(|word| word >> (rank % 64) & 1 == 1)
            }
        }
    }

    /// Words taken beyond the value itself.
    pub(super) fn words(&self) -> usize {
        match self {
            Self::Few { .. } => 0,
            Self::Many { words, .. } => words.len(),
        }
    }

    /// How many words of bits the greatest member takes.
    pub(super) fn width(&self) -> usize {
        match self {
            Self::Few { len, ranks } => {
                ranks[..usize::from(*len)].last().map_or(0, |rank| *rank as usize / 64 + 1)
            }
            Self::Many { words, .. } => words.len(),
        }
    }

    /// The members as bits, added to `bits`, which are wide enough for those that fit.
    pub(super) fn add_to(&self, bits: &mut [u64]) {
        match self {
            Self::Few { len, ranks } => {
                for rank in &ranks[..usize::from(*len)] {
                    if let Some(word) = bits.get_mut(*rank as usize / 64) {
                        *word |= 1 << (rank % 64);
                    }
                }
            }
            Self::Many { words, .. } => {
                bits.iter_mut().zip(words).for_each(|(to, word)| *to |= word);
            }
        }
    }

    /// In order.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let (few, words): (&[u32], &[u64]) = match self {
            Self::Few { len, ranks } => (&ranks[..usize::from(*len)], &[]),
            Self::Many { words, .. } => (&[], words),
        };
        few.iter().copied().chain(ones(words))
    }

    /// Whether it is new.
    pub(super) fn insert(&mut self, rank: u32) -> bool {
        if self.contains(rank) {
            return false;
        }
        match self {
            Self::Few { len, ranks } if usize::from(*len) < FEW => {
                let n = usize::from(*len);
                let at = ranks[..n].partition_point(|r| *r < rank);
                ranks.copy_within(at..n, at + 1);
                ranks[at] = rank;
                *len += 1;
            }
            Self::Few { ranks, .. } => {
                let most = ranks.iter().copied().max().unwrap_or(0).max(rank);
                let mut words = vec![0; most as usize / 64 + 1];
                for rank in ranks.iter().chain([&rank]) {
                    words[*rank as usize / 64] |= 1u64 << (rank % 64);
                }
                *self = Self::Many { len: FEW as u32 + 1, words: words.into() };
            }
            Self::Many { len, words } => {
                let word = rank as usize / 64;
                if word >= words.len() {
                    let mut wider = std::mem::take(words).into_vec();
                    wider.resize(word + 1, 0);
                    *words = wider.into();
                }
                words[word] |= 1 << (rank % 64);
                *len += 1;
            }
        }
        true
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, rank: u32) -> bool {
        if !self.contains(rank) {
            return false;
        }
        match self {
            Self::Few { len, ranks } => {
                let n = usize::from(*len);
                let at = ranks[..n].partition_point(|r| *r < rank);
                ranks.copy_within(at + 1..n, at);
                ranks[n - 1] = 0;
                *len -= 1;
            }
            Self::Many { len, words } => {
                words[rank as usize / 64] &= !(1 << (rank % 64));
                *len -= 1;
                if *len as usize <= FEW {
                    let mut few = [0; FEW];
                    few.iter_mut().zip(ones(words)).for_each(|(to, rank)| *to = rank);
                    *self = Self::Few { len: FEW as u8, ranks: few };
                } else if words.last() == Some(&0) {
                    let kept = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
                    *words = words[..kept].into();
                }
            }
        }
        true
    }
}

/// The bits that are set, in order.
pub(super) fn ones(words: &[u64]) -> impl Iterator<Item = u32> + '_ {
    words.iter().enumerate().flat_map(|(at, word)| {
        let mut rest = *word;
        std::iter::from_fn(move || {
            let bit = (rest != 0).then(|| at as u32 * 64 + rest.trailing_zeros())?;
            rest &= rest - 1;
            Some(bit)
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set_and_equal_sets_are_equal_values(
            steps in proptest::collection::vec((any::<bool>(), 0u32..400), 0..80)
        ) {
            let (mut set, mut model) = (RankSet::default(), BTreeSet::new());
            for (add, rank) in steps {
                if add {
                    prop_assert_eq!(set.insert(rank), model.insert(rank));
                } else {
                    prop_assert_eq!(set.remove(rank), model.remove(&rank));
                }
                prop_assert_eq!(set.len(), model.len());
            }
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            let mut again = RankSet::default();
            model.iter().rev().for_each(|rank| { again.insert(*rank); });
            prop_assert_eq!(&again, &set);
            let mut bits = vec![0; set.width()];
            set.add_to(&mut bits);
            prop_assert!(bits.last() != Some(&0));
            prop_assert_eq!(ones(&bits).collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
        }
    }
}
