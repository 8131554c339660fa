//! A set of small numbers (offsets within a node) as bits.
//!
//! **Invariant**: the last word is not zero, so that equal sets take equal room on every replica.

/// Offsets.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    /// 0 to `len`.
    pub(super) fn ones(len: usize) -> Self {
        let mut words = vec![u64::MAX; len / 64];
        if !len.is_multiple_of(64) {
            words.push((1 << (len % 64)) - 1);
        }
        Self(words)
    }

    /// From words that may come from anywhere; `None` if not what [`Self::words`] gives for a
    /// node of `len` blocks.
    pub(super) fn checked(words: Vec<u64>, len: usize) -> Option<Self> {
        let bits = Self(words);
        (bits.0.last() != Some(&0) && bits.end() <= len).then_some(bits)
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.0
    }

    pub(super) fn word(&self, at: usize) -> u64 {
        self.0.get(at).copied().unwrap_or(0)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, bit: usize) -> bool {
        self.word(bit / 64) >> (bit % 64) & 1 == 1
    }

    /// One more than the greatest; 0 for none.
    pub(super) fn end(&self) -> usize {
        self.0.last().map_or(0, |last| self.0.len() * 64 - last.leading_zeros() as usize)
    }

    pub(super) fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether it is new.
    pub(super) fn insert(&mut self, bit: usize) -> bool {
        if self.0.len() <= bit / 64 {
            // Exactly: these are many and small.
            self.0.reserve_exact(bit / 64 + 1 - self.0.len());
            self.0.resize(bit / 64 + 1, 0);
        }
        let word = &mut self.0[bit / 64];
        let new = *word >> (bit % 64) & 1 == 0;
        *word |= 1 << (bit % 64);
        new
    }

    /// Whether it was there.
    pub(super) fn remove(&mut self, bit: usize) -> bool {
        let was = self.contains(bit);
        if was {
            self.0[bit / 64] &= !(1 << (bit % 64));
            self.trim();
        }
        was
    }

    /// Takes out those from `at` on, counted from there.
    pub(super) fn split_off(&mut self, at: usize) -> Self {
        let (skip, shift) = (at / 64, at % 64);
        let words = (skip..self.0.len())
            .map(|w| match shift {
                0 => self.word(w),
                _ => self.word(w) >> shift | self.word(w + 1) << (64 - shift),
            })
            .collect();
        let mut high = Self(words);
        high.trim();
        self.0.truncate(at.div_ceil(64));
        if shift != 0
            && let Some(last) = self.0.get_mut(skip)
        {
            *last &= (1 << shift) - 1;
        }
        self.trim();
        high
    }

    /// Adds those of `other`, counted from `at`.
    pub(super) fn append(&mut self, other: &Self, at: usize) {
        for (word, bits) in other.0.iter().enumerate() {
            let mut rest = *bits;
            while rest != 0 {
                self.insert(at + word * 64 + rest.trailing_zeros() as usize);
                rest &= rest - 1;
            }
        }
    }

    fn trim(&mut self) {
        while self.0.last() == Some(&0) {
            self.0.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn listed(bits: &Bits) -> Vec<usize> {
        (0..300).filter(|bit| bits.contains(*bit)).collect()
    }

    proptest! {
        #[test]
        fn what_is_split_and_joined_is_the_same(
            members in proptest::collection::btree_set(0usize..300, 0..60),
            at in 0usize..300,
            gone in proptest::collection::vec(0usize..300, 0..20),
        ) {
            let mut bits = Bits::default();
            members.iter().for_each(|bit| { bits.insert(*bit); });
            let whole = bits.clone();
            let high = bits.split_off(at);
            prop_assert_eq!(listed(&bits), members.iter().copied().filter(|b| *b < at).collect::<Vec<_>>());
            prop_assert_eq!(
                listed(&high),
                members.iter().filter(|b| **b >= at).map(|b| b - at).collect::<Vec<_>>()
            );
            prop_assert!(bits.end() <= at);
            bits.append(&high, at);
            prop_assert_eq!(&bits, &whole);
            let mut left = members.clone();
            for bit in gone {
                prop_assert_eq!(bits.remove(bit), left.remove(&bit));
            }
            prop_assert_eq!(bits.count(), left.len());
            prop_assert_eq!(bits.end(), left.last().map_or(0, |last| last + 1));
            prop_assert!(Bits::checked(bits.words().to_vec(), bits.end()).is_some());
        }
    }

    #[test]
    fn ones_are_all_up_to_the_end() {
        for len in [0, 1, 63, 64, 65, 128, 200] {
            assert_eq!((Bits::ones(len).count(), Bits::ones(len).end()), (len, len));
        }
        assert!(Bits::checked(vec![1, 0], 128).is_none());
        assert!(Bits::checked(vec![3], 1).is_none());
    }
}
