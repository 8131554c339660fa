//! What a hand-over between engines needs of the cache: room for ids whose KV comes from elsewhere, and
//! blocks that nobody else finds.

use super::{KvCache, Namespace, SequenceBlocks};

impl SequenceBlocks {
    /// Blocks that are nobody else's: SGLang's decode engines keep no prefixes.
    pub fn private(namespace: Namespace) -> Self {
        Self { private: true, ..Self::new(namespace) }
    }

    /// Its blocks, in the order of its ids.
    pub fn ids(&self) -> &[u32] {
        &self.blocks
    }
}

impl KvCache {
    /// Ids in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Gives a sequence without blocks its `cached` leading ids, as [`KvCache::admit`] does, and blocks
    /// for ids up to `upto` that can be found by others only once [`KvCache::grow`] says that the ids are
    /// there. Keeps nothing and returns false if there is no room.
    pub fn reserve(
        &mut self,
        sequence: &mut SequenceBlocks,
        tokens: &[u32],
        cached: usize,
        upto: usize,
    ) -> bool {
        if !self.admit(sequence, tokens, cached, cached) {
            return false;
        }
        let has_room = self.make_room(sequence, upto);
        if !has_room {
            self.release(sequence);
        }
        has_room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_blocks_are_found_only_once_they_are_filled() {
        let mut cache = KvCache::new(4, 2);
        let tokens = [1, 2, 3, 4, 5];
        let mut blocks = SequenceBlocks::default();
        assert!(cache.reserve(&mut blocks, &tokens, 0, 5));
        assert_eq!((blocks.ids().len(), cache.free_blocks()), (3, 1));
        assert_eq!(cache.cached_tokens(&mut SequenceBlocks::default(), &tokens), 0);
        assert!(cache.take_events().is_empty());
        assert!(cache.grow(&mut blocks, &tokens, 5));
        assert_eq!(cache.cached_tokens(&mut SequenceBlocks::default(), &tokens), 4);
        assert_eq!(cache.take_events().len(), 1);
        // Nothing is kept of what does not fit.
        let mut other = SequenceBlocks::default();
        assert!(!cache.reserve(&mut other, &[9; 8], 0, 8));
        assert_eq!((other.ids().len(), cache.free_blocks()), (0, 1));
    }

    #[test]
    fn private_blocks_neither_find_nor_are_found() {
        let mut cache = KvCache::new(8, 2);
        let tokens = [1, 2, 3, 4, 5];
        let (mut public, mut private) =
            (SequenceBlocks::default(), SequenceBlocks::private(Namespace::default()));
        assert!(cache.admit(&mut private, &tokens, 0, 5));
        assert_eq!(cache.cached_tokens(&mut public, &tokens), 0);
        assert!(cache.admit(&mut public, &tokens, 0, 5));
        assert_eq!(cache.cached_tokens(&mut SequenceBlocks::private(Namespace::default()), &tokens), 0);
        assert_eq!(cache.take_events().len(), 1);
    }
}
