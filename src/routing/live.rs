//! Which blocks the running requests of this replica hold on a rank: a prefix that several of them
//! share is there once, and booked once.
//!
//! Every request counts each of its blocks up when it is booked and down when it ends. What went up
//! from 0 is its addition to the load, what came down to 0 is what its end frees; so the booked
//! blocks of a rank are always as many as there are different ones, whoever ends first. Per
//! replica: what another one sends to the same rank is booked by that one.

use std::hash::{BuildHasher, Hasher};

use hashbrown::HashMap;
use parking_lot::Mutex;

use crate::kv::hash::SequenceHash;

/// Blocks of running requests on one rank, and how many requests hold each. As large as the
/// running requests' prompts; gives memory back when most of them have ended.
#[derive(Debug, Default)]
pub struct LiveBlocks {
    counts: Mutex<HashMap<SequenceHash, u32, Mix>>,
}

/// Room for so many blocks is kept however few are held.
const KEPT: usize = 1024;

impl LiveBlocks {
    /// A request holds these from now on; how many of them nobody held. Hashes of one chain differ
    /// from each other, since each names a whole prefix.
    pub fn hold(&self, chain: &[SequenceHash]) -> u64 {
        let mut counts = self.counts.lock();
        let mut fresh = 0;
        for hash in chain {
            let count = counts.entry(*hash).or_insert(0);
            fresh += u64::from(*count == 0);
            *count += 1;
        }
        fresh
    }

    /// A request holds these no longer; how many of them nobody holds now.
    pub fn let_go(&self, chain: &[SequenceHash]) -> u64 {
        let mut counts = self.counts.lock();
        let mut gone = 0;
        for hash in chain {
            let hashbrown::hash_map::Entry::Occupied(mut entry) = counts.entry(*hash) else { continue };
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
                gone += 1;
            }
        }
        if counts.capacity() > KEPT && counts.len() < counts.capacity() / 8 {
            let room = (counts.len() * 2).max(KEPT / 2);
            counts.shrink_to(room);
        }
        gone
    }

    /// How many different blocks are held.
    pub fn len(&self) -> usize {
        self.counts.lock().len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Spreads hashes that a client may have chosen over a table's places: by a multiplication with
/// a number that it cannot know, both halves of the product folded together.
#[derive(Clone, Debug)]
struct Mix {
    key: u64,
}

impl Default for Mix {
    fn default() -> Self {
        // The standard library's random keys; odd, so that no product is lost.
        Self { key: std::hash::RandomState::new().hash_one(0u64) | 1 }
    }
}

impl BuildHasher for Mix {
    type Hasher = Mixed;

    fn build_hasher(&self) -> Mixed {
        Mixed(self.key)
    }
}

/// See [`Mix`].
struct Mixed(u64);

impl Hasher for Mixed {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        let product = u128::from(word ^ self.0.rotate_left(32)) * u128::from(self.0);
        self.0 = (product as u64) ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::kv::hash::{LocalHash, sequence_hashes};

    proptest! {
        #[test]
        fn what_is_booked_is_what_different_blocks_are_held(
            steps in prop::collection::vec((any::<bool>(), prop::collection::vec(0..3u64, 0..6), 0..20usize), 0..60)
        ) {
            let live = LiveBlocks::default();
            let mut requests: Vec<Vec<SequenceHash>> = Vec::new();
            let mut booked = 0u64;
            let distinct = |requests: &[Vec<SequenceHash>]| requests.iter().flatten().collect::<HashSet<_>>().len();
            for (ends, locals, which) in steps {
                if ends && !requests.is_empty() {
                    let chain = requests.swap_remove(which % requests.len());
                    booked -= live.let_go(&chain);
                } else {
                    let locals: Vec<LocalHash> = locals.into_iter().map(LocalHash).collect();
                    let chain = sequence_hashes(&locals);
                    booked += live.hold(&chain);
                    requests.push(chain);
                }
                prop_assert_eq!(booked, distinct(&requests) as u64);
                prop_assert_eq!(live.len() as u64, booked);
            }
            for chain in requests {
                booked -= live.let_go(&chain);
            }
            prop_assert!(booked == 0 && live.is_empty());
        }
    }

    #[test]
    fn memory_is_given_back_when_the_requests_have_ended() {
        let live = LiveBlocks::default();
        let chain: Vec<SequenceHash> = (0..100_000).map(SequenceHash).collect();
        live.hold(&chain);
        live.let_go(&chain[10..]);
        assert!(live.counts.lock().capacity() <= 2 * KEPT, "{}", live.counts.lock().capacity());
        assert_eq!(live.hold(&chain[..20]), 10);
    }
}
