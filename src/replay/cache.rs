//! A simulated engine's prefix cache: blocks by sequence hash, least recently used ones leave
//! first, blocks of running requests never.

use std::collections::{HashMap, VecDeque};

use crate::kv::hash::SequenceHash;

/// Marks the made-up names of blocks of output. A prompt's block has one of them by a chance of
/// one in 2^64 for each block in the cache.
const OUTPUT: u64 = 0xa5a5 << 48;

#[derive(Clone, Copy, Debug)]
struct Held {
    /// Running requests that use it.
    users: u32,
    /// When it was let go last, as a count; names its place in the queue.
    stamp: u64,
}

/// What changed in a cache, for the index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// A block is held now.
    Stored(SequenceHash),
    /// A block is held no more; it may be one of output that was never said to be held.
    Removed(SequenceHash),
}

/// A cache of `capacity` blocks, of which some are held by name and some are in use without one.
#[derive(Debug)]
pub struct BlockCache {
    capacity: u64,
    blocks: HashMap<SequenceHash, Held>,
    /// Blocks without users, the next to leave in front. Entries of blocks that were used again
    /// since, or are gone, stay until they come to the front or are swept.
    idle: VecDeque<(u64, SequenceHash)>,
    idle_count: u64,
    /// Blocks in use that nobody can find: partial ones, output, and those being computed.
    nameless: u64,
    stamp: u64,
    changes: Vec<Change>,
}

impl BlockCache {
    /// An empty one.
    pub fn new(capacity: u64) -> Self {
        Self {
            capacity,
            blocks: HashMap::new(),
            idle: VecDeque::new(),
            idle_count: 0,
            nameless: 0,
            stamp: 0,
            changes: Vec::new(),
        }
    }

    /// How many leading blocks of a prompt are held.
    pub fn matching(&self, hashes: &[SequenceHash]) -> usize {
        hashes.iter().take_while(|hash| self.blocks.contains_key(hash)).count()
    }

    /// Takes the first `cached` blocks of a prompt into use, and `more` nameless ones; nothing
    /// happens, and the answer is no, if there is no room.
    pub fn admit(&mut self, hashes: &[SequenceHash], cached: usize, more: u64) -> bool {
        let woken = hashes[..cached].iter().filter(|h| self.blocks[*h].users == 0).count() as u64;
        let in_use = self.blocks.len() as u64 - self.idle_count + self.nameless;
        if in_use + woken + more > self.capacity {
            return false;
        }
        for hash in &hashes[..cached] {
            self.take(*hash);
        }
        self.nameless += more;
        self.shrink();
        true
    }

    fn take(&mut self, hash: SequenceHash) {
        if let Some(held) = self.blocks.get_mut(&hash) {
            if held.users == 0 {
                self.idle_count -= 1;
            }
            held.users += 1;
        }
    }

    fn shrink(&mut self) {
        while self.blocks.len() as u64 + self.nameless > self.capacity {
            let Some((stamp, hash)) = self.idle.pop_front() else { return };
            if self.blocks.get(&hash).is_some_and(|held| held.users == 0 && held.stamp == stamp) {
                self.blocks.remove(&hash);
                self.idle_count -= 1;
                self.changes.push(Change::Removed(hash));
            }
        }
    }

    /// A nameless block has been computed: it is held by its name now, and used. If it had been
    /// computed elsewhere meanwhile, that one is used and this one is free.
    pub fn computed(&mut self, hash: SequenceHash) {
        self.nameless = self.nameless.saturating_sub(1);
        if self.blocks.contains_key(&hash) {
            return self.take(hash);
        }
        self.blocks.insert(hash, Held { users: 1, stamp: 0 });
        self.changes.push(Change::Stored(hash));
    }

    /// A request has ended: its blocks may leave, the last one first. Of its nameless ones `full`
    /// stay until then, as what was put out may be asked again (in a trace it never is, because it
    /// does not say what was put out); the others are free.
    pub fn release(&mut self, hashes: &[SequenceHash], nameless: u64, full: u64) {
        self.nameless = self.nameless.saturating_sub(nameless);
        for _ in 0..full.min(nameless) {
            self.stamp += 1;
            let hash = SequenceHash(OUTPUT | self.stamp);
            self.blocks.insert(hash, Held { users: 0, stamp: self.stamp });
            self.idle.push_back((self.stamp, hash));
            self.idle_count += 1;
        }
        for hash in hashes.iter().rev() {
            let Some(held) = self.blocks.get_mut(hash) else { continue };
            held.users = held.users.saturating_sub(1);
            if held.users == 0 {
                self.stamp += 1;
                held.stamp = self.stamp;
                self.idle.push_back((self.stamp, *hash));
                self.idle_count += 1;
            }
        }
        if self.idle.len() > 1024 + 4 * self.blocks.len() {
            let blocks = &self.blocks;
            self.idle
                .retain(|(stamp, hash)| blocks.get(hash).is_some_and(|h| h.users == 0 && h.stamp == *stamp));
        }
    }

    /// What has changed since the last call, in order.
    pub fn changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    /// Blocks that are held by name.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Blocks in use.
    pub fn in_use(&self) -> u64 {
        self.blocks.len() as u64 - self.idle_count + self.nameless
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(of: std::ops::Range<u64>) -> Vec<SequenceHash> {
        of.map(SequenceHash).collect()
    }

    fn run(cache: &mut BlockCache, prompt: &[SequenceHash]) -> usize {
        let cached = cache.matching(prompt);
        assert!(cache.admit(prompt, cached, (prompt.len() - cached) as u64));
        prompt[cached..].iter().for_each(|hash| cache.computed(*hash));
        cache.release(prompt, 0, 0);
        cached
    }

    #[test]
    fn the_oldest_prompt_leaves_first_and_its_tail_before_its_head() {
        let mut cache = BlockCache::new(6);
        assert_eq!(run(&mut cache, &hashes(0..3)), 0);
        assert_eq!(run(&mut cache, &hashes(10..13)), 0);
        assert_eq!(run(&mut cache, &hashes(20..22)), 0);
        assert_eq!(cache.matching(&hashes(0..3)), 1);
        assert_eq!(cache.matching(&hashes(10..13)), 3);
        assert_eq!(run(&mut cache, &hashes(0..1)), 1, "used again, it is the youngest");
        assert_eq!(run(&mut cache, &hashes(30..33)), 0);
        assert_eq!((cache.matching(&hashes(0..1)), cache.matching(&hashes(10..13))), (1, 0));
    }

    #[test]
    fn blocks_in_use_stay_and_no_room_means_no() {
        let mut cache = BlockCache::new(4);
        let prompt = hashes(0..3);
        assert!(cache.admit(&prompt, 0, 3));
        prompt.iter().for_each(|hash| cache.computed(*hash));
        assert!(!cache.admit(&hashes(10..12), 0, 2));
        assert!(cache.admit(&prompt, 3, 1), "a shared prefix takes no room");
        assert_eq!(cache.in_use(), 4);
        cache.release(&prompt, 1, 0);
        cache.release(&prompt, 0, 0);
        assert_eq!((cache.in_use(), cache.len()), (0, 3));
        assert!(cache.admit(&hashes(10..14), 0, 4) && cache.is_empty());
    }
}
