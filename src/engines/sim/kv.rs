//! The paged KV cache: prefix reuse by a chain of block hashes, eviction in LRU order, tail first.
//!
//! The rules are vLLM's. A block is *held* by the sequences that use it and otherwise stands in
//! the free queue, where it keeps its content until it is taken for something else. A sequence
//! gives its blocks back last one first, so that chains are eaten from their tails.
//!
//! **Invariant:** a block is in the free queue exactly when nobody holds it; a block with a hash is
//! in the index under that hash. The same content may stand in two blocks; each of them is announced
//! when stored and again when removed.
//!
//! With a [host tier](super::host) behind it, what falls out of the cache is found there, and brought
//! back when a sequence needs it.

mod reserve;

use std::collections::HashMap;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use super::host::{Content, HostTier};

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// In the memory of the GPU.
    Gpu,
    /// In that of its host.
    Host,
}

/// What happened in the cache, in order; the material of vLLM's KV events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// Blocks became full and can be reused from now on.
    Stored {
        /// Hash of each block, along the chain.
        block_hashes: Vec<u64>,
        /// Hash of the block before the first one; `None` at the start of a sequence.
        parent_block_hash: Option<u64>,
        /// The ids of all blocks, one after the other.
        token_ids: Vec<u32>,
        /// Ids in a block.
        block_size: usize,
        /// The adapter they were computed with.
        lora_name: Option<Arc<str>>,
        /// The salt of their chain.
        cache_salt: Option<Arc<str>>,
        /// For each block what else went into its hash: the adapter, and the salt at the first block.
        extra_keys: Vec<Option<Vec<Arc<str>>>>,
        /// Where they are now, too.
        medium: Medium,
    },
    /// A block was given to something else.
    Removed {
        /// One hash: there is one event for each block.
        block_hashes: Vec<u64>,
        /// Where they are no longer.
        medium: Medium,
    },
    /// The whole cache was emptied on request.
    Cleared,
}

/// What separates equal ids from each other in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Name of the adapter.
    pub lora: Option<Arc<str>>,
    /// `cache_salt` of the request.
    pub salt: Option<Arc<str>>,
}

/// The blocks of one sequence.
#[derive(Debug, Default)]
pub struct SequenceBlocks {
    namespace: Namespace,
    blocks: Vec<u32>,
    hashes: Vec<u64>,
    /// How many leading blocks are in the index.
    indexed: usize,
    /// Whether they are nobody else's: neither found nor left to be found.
    private: bool,
}

impl SequenceBlocks {
    /// No blocks yet.
    pub fn new(namespace: Namespace) -> Self {
        Self { namespace, ..Self::default() }
    }

    fn hash_full_blocks(&mut self, tokens: &[u32], block_size: usize) {
        for block in tokens.chunks_exact(block_size).skip(self.hashes.len()) {
            let mut hasher = Xxh3::with_seed(self.hashes.last().copied().unwrap_or(0));
            for token in block {
                hasher.update(&token.to_le_bytes());
            }
            for extra in self.namespace.extra_keys(self.hashes.len()).unwrap_or_default() {
                hasher.update(extra.as_bytes());
                hasher.update(&[0xff]);
            }
            self.hashes.push(hasher.digest());
        }
    }
}

impl Namespace {
    fn extra_keys(&self, block: usize) -> Option<Vec<Arc<str>>> {
        let salt = if block == 0 { self.salt.clone() } else { None };
        let keys: Vec<_> = self.lora.clone().into_iter().chain(salt).collect();
        (!keys.is_empty()).then_some(keys)
    }
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Block {
    holders: u32,
    hash: Option<u64>,
    /// What the host tier needs to know, if there is one.
    content: Option<Arc<Content>>,
    previous: u32,
    next: u32,
}

/// The cache of one engine.
#[derive(Debug)]
pub struct KvCache {
    block_size: usize,
    blocks: Vec<Block>,
    /// Oldest free block, the next to be taken.
    head: u32,
    tail: u32,
    free: usize,
    index: HashMap<u64, Vec<u32>>,
    /// What is behind it; with room for nothing, unless the flags say so.
    host: HostTier,
    events: Vec<KvEvent>,
}

impl KvCache {
    /// An empty cache of `blocks` blocks of `block_size` ids; both are taken as at least 1.
    pub fn new(blocks: u32, block_size: usize) -> Self {
        let count = blocks.max(1);
        let mut cache = Self {
            block_size: block_size.max(1),
            blocks: vec![
                Block { holders: 0, hash: None, content: None, previous: NONE, next: NONE };
                count as usize
            ],
            head: NONE,
            tail: NONE,
            free: 0,
            index: HashMap::new(),
            host: HostTier::default(),
            events: Vec::new(),
        };
        (0..count).for_each(|block| cache.append_free(block));
        cache
    }

    /// The same with a host tier of so many blocks.
    #[must_use]
    pub fn with_host(mut self, blocks: u32) -> Self {
        self.host = HostTier::new(blocks as usize);
        self
    }

    /// Share of the blocks that sequences hold, 0 to 1.
    pub fn usage(&self) -> f64 {
        1.0 - self.free as f64 / self.blocks.len() as f64
    }

    /// How many blocks nobody holds.
    pub fn free_blocks(&self) -> usize {
        self.free
    }

    /// How many leading ids of a new sequence are in the cache: whole blocks, and never all of
    /// the ids, because the last one has to be computed for the next token to come out.
    pub fn cached_tokens(&self, sequence: &mut SequenceBlocks, tokens: &[u32]) -> usize {
        if sequence.private {
            return 0;
        }
        sequence.hash_full_blocks(tokens, self.block_size);
        let usable = tokens.len().saturating_sub(1) / self.block_size;
        let is_there = |hash: &&u64| self.index.contains_key(hash) || self.host.has(**hash);
        let hits = sequence.hashes.iter().take(usable).take_while(is_there);
        hits.count() * self.block_size
    }

    /// Gives a sequence without blocks its `cached` leading ids (as [`KvCache::cached_tokens`] said)
    /// and room for ids up to `upto`. Changes nothing and returns false if there is no room.
    pub fn admit(
        &mut self,
        sequence: &mut SequenceBlocks,
        tokens: &[u32],
        cached: usize,
        upto: usize,
    ) -> bool {
        debug_assert!(sequence.blocks.is_empty(), "a sequence is admitted once");
        let here = |hash: &u64| self.index.get(hash).and_then(|blocks| blocks.first().copied());
        let hits: Vec<Option<u32>> = sequence.hashes[..cached / self.block_size].iter().map(here).collect();
        let held: Vec<u32> = hits.iter().copied().flatten().collect();
        let idle_hits = held.iter().filter(|block| self.blocks[**block as usize].holders == 0).count();
        if upto.div_ceil(self.block_size) - held.len() > self.free - idle_hits {
            return false;
        }
        for &block in &held {
            if self.blocks[block as usize].holders == 0 {
                self.unlink_free(block);
            }
            self.blocks[block as usize].holders += 1;
        }
        // Before room is made for them, which may push them out of the host tier.
        let missing = hits.iter().zip(&sequence.hashes).filter(|(hit, _)| hit.is_none());
        let contents: Vec<_> = missing.filter_map(|(_, hash)| self.host.take_up(*hash)).collect();
        let mut contents = contents.into_iter();
        sequence.blocks = Vec::with_capacity(upto.div_ceil(self.block_size));
        for (place, hit) in hits.into_iter().enumerate() {
            let block = match hit {
                Some(block) => block,
                None => self.bring_back(sequence.hashes[place], contents.next()),
            };
            sequence.blocks.push(block);
        }
        sequence.indexed = sequence.blocks.len();
        self.grow(sequence, tokens, upto)
    }

    /// A free block with what the host tier had, announced as any block that can be found again.
    fn bring_back(&mut self, hash: u64, content: Option<Arc<Content>>) -> u32 {
        let block = self.take_free();
        if let Some(content) = content {
            self.events.push(content.stored(hash, Medium::Gpu));
            self.blocks[block as usize].content = Some(content);
        }
        self.blocks[block as usize].hash = Some(hash);
        self.index.entry(hash).or_default().push(block);
        block
    }

    /// Makes room for ids up to `upto` and indexes the blocks that are full by then. Changes
    /// nothing and returns false if there is no room.
    pub fn grow(&mut self, sequence: &mut SequenceBlocks, tokens: &[u32], upto: usize) -> bool {
        if !self.make_room(sequence, upto) {
            return false;
        }
        let full = upto / self.block_size;
        if full > sequence.indexed && !sequence.private {
            self.index_blocks(sequence, tokens, full);
        }
        true
    }

    fn make_room(&mut self, sequence: &mut SequenceBlocks, upto: usize) -> bool {
        let missing = upto.div_ceil(self.block_size).saturating_sub(sequence.blocks.len());
        if missing > self.free {
            return false;
        }
        for _ in 0..missing {
            let block = self.take_free();
            sequence.blocks.push(block);
        }
        true
    }

    fn index_blocks(&mut self, sequence: &mut SequenceBlocks, tokens: &[u32], full: usize) {
        sequence.hash_full_blocks(&tokens[..full * self.block_size], self.block_size);
        let new = sequence.indexed..full;
        for place in new.clone() {
            let (block, hash) = (sequence.blocks[place], sequence.hashes[place]);
            self.blocks[block as usize].hash = Some(hash);
            self.index.entry(hash).or_default().push(block);
            if self.host.has_room_for_any() {
                self.blocks[block as usize].content = Some(Arc::new(Content {
                    parent: place.checked_sub(1).map(|parent| sequence.hashes[parent]),
                    tokens: tokens[place * self.block_size..(place + 1) * self.block_size].to_vec(),
                    lora: sequence.namespace.lora.clone(),
                    salt: sequence.namespace.salt.clone(),
                    extra_keys: sequence.namespace.extra_keys(place),
                }));
            }
        }
        self.events.push(KvEvent::Stored {
            block_hashes: sequence.hashes[new.clone()].to_vec(),
            parent_block_hash: new.start.checked_sub(1).map(|parent| sequence.hashes[parent]),
            token_ids: tokens[new.start * self.block_size..new.end * self.block_size].to_vec(),
            block_size: self.block_size,
            lora_name: sequence.namespace.lora.clone(),
            cache_salt: sequence.namespace.salt.clone(),
            extra_keys: new.map(|place| sequence.namespace.extra_keys(place)).collect(),
            medium: Medium::Gpu,
        });
        sequence.indexed = full;
    }

    /// Takes all blocks back, the last one first; their content stays until the room is needed.
    pub fn release(&mut self, sequence: &mut SequenceBlocks) {
        for block in std::mem::take(&mut sequence.blocks).into_iter().rev() {
            let holders = &mut self.blocks[block as usize].holders;
            *holders -= 1;
            if *holders == 0 {
                self.append_free(block);
            }
        }
        sequence.indexed = 0;
    }

    /// Forgets all content. Refused, as in the real engine, while a sequence holds blocks.
    pub fn clear(&mut self) -> bool {
        if self.free < self.blocks.len() {
            return false;
        }
        self.index.clear();
        self.host.clear();
        self.blocks.iter_mut().for_each(|block| (block.hash, block.content) = (None, None));
        self.events.push(KvEvent::Cleared);
        true
    }

    /// Hashes of all blocks that can be found again, in order.
    pub fn indexed(&self) -> Vec<u64> {
        let mut hashes: Vec<u64> = self.index.keys().copied().chain(self.host.hashes()).collect();
        hashes.sort_unstable();
        hashes.dedup();
        hashes
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<KvEvent> {
        std::mem::take(&mut self.events)
    }

    fn append_free(&mut self, block: u32) {
        let tail = std::mem::replace(&mut self.tail, block);
        self.blocks[block as usize].previous = tail;
        self.blocks[block as usize].next = NONE;
        match tail {
            NONE => self.head = block,
            tail => self.blocks[tail as usize].next = block,
        }
        self.free += 1;
    }

    fn unlink_free(&mut self, block: u32) {
        let Block { previous, next, .. } = &self.blocks[block as usize];
        let (previous, next) = (*previous, *next);
        match previous {
            NONE => self.head = next,
            previous => self.blocks[previous as usize].next = next,
        }
        match next {
            NONE => self.tail = previous,
            next => self.blocks[next as usize].previous = previous,
        }
        self.free -= 1;
    }

    /// The oldest free block, its content evicted, held once. There must be one.
    fn take_free(&mut self) -> u32 {
        let block = self.head;
        self.unlink_free(block);
        self.blocks[block as usize].holders = 1;
        if let Some(hash) = self.blocks[block as usize].hash.take() {
            if let Some(blocks) = self.index.get_mut(&hash) {
                blocks.retain(|indexed| *indexed != block);
                if blocks.is_empty() {
                    self.index.remove(&hash);
                }
            }
            if let Some(content) = self.blocks[block as usize].content.take() {
                self.host.put(hash, content, &mut self.events);
            }
            self.events.push(KvEvent::Removed { block_hashes: vec![hash], medium: Medium::Gpu });
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn admit(cache: &mut KvCache, tokens: &[u32]) -> Option<(SequenceBlocks, usize)> {
        let mut sequence = SequenceBlocks::default();
        let cached = cache.cached_tokens(&mut sequence, tokens);
        cache.admit(&mut sequence, tokens, cached, tokens.len()).then_some((sequence, cached))
    }

    #[test]
    fn a_prefix_is_found_again_but_never_the_whole_prompt() {
        let mut cache = KvCache::new(8, 4);
        let prompt: Vec<u32> = (0..12).collect();
        let (mut first, cached) = admit(&mut cache, &prompt).unwrap();
        assert_eq!(cached, 0);
        cache.release(&mut first);
        let (_, cached) = admit(&mut cache, &prompt).unwrap();
        assert_eq!(cached, 8);
    }

    #[test]
    fn events_tell_what_was_stored_with_parents_and_what_was_evicted_tail_first() {
        let mut cache = KvCache::new(3, 2);
        let tokens = [1, 2, 3, 4, 5];
        let mut sequence = SequenceBlocks::new(Namespace { lora: None, salt: Some("s".into()) });
        assert_eq!(cache.cached_tokens(&mut sequence, &tokens), 0);
        assert!(cache.admit(&mut sequence, &tokens, 0, 3));
        assert!(cache.grow(&mut sequence, &tokens, 5));
        let events = cache.take_events();
        let [KvEvent::Stored { block_hashes: a, parent_block_hash: None, extra_keys, .. }, second] =
            &events[..]
        else {
            panic!("{events:?}");
        };
        assert_eq!(extra_keys, &[Some(vec!["s".into()])]);
        let KvEvent::Stored { block_hashes: b, parent_block_hash, token_ids, extra_keys, .. } = second else {
            panic!("{events:?}");
        };
        assert_eq!(
            (parent_block_hash, &token_ids[..], &extra_keys[..]),
            (&Some(a[0]), &[3, 4][..], &[None][..])
        );
        cache.release(&mut sequence);
        // The block without a hash was given back first, then the tail, then the root.
        let (_other, _) = admit(&mut cache, &[9, 9, 9, 9, 9, 9]).unwrap();
        let removed: Vec<_> = cache.take_events();
        assert_eq!(removed[0], KvEvent::Removed { block_hashes: b.clone(), medium: Medium::Gpu });
        assert_eq!(removed[1], KvEvent::Removed { block_hashes: a.clone(), medium: Medium::Gpu });
    }

    #[test]
    fn adapter_and_salt_keep_equal_ids_apart() {
        let mut cache = KvCache::new(8, 2);
        let tokens = [1, 2, 3, 4, 5];
        admit(&mut cache, &tokens).unwrap();
        for namespace in [
            Namespace { lora: Some("a".into()), salt: None },
            Namespace { lora: None, salt: Some("a-salt".into()) },
        ] {
            assert_eq!(cache.cached_tokens(&mut SequenceBlocks::new(namespace), &tokens), 0);
        }
    }

    #[test]
    fn clearing_is_refused_while_blocks_are_held() {
        let mut cache = KvCache::new(4, 2);
        let (mut held, _) = admit(&mut cache, &[1, 2, 3]).unwrap();
        assert!(!cache.clear());
        cache.release(&mut held);
        assert!(cache.clear());
        assert_eq!(cache.take_events().last(), Some(&KvEvent::Cleared));
        assert_eq!(admit(&mut cache, &[1, 2, 3]).unwrap().1, 0);
    }

    #[test]
    fn what_falls_out_is_found_in_the_host_tier_and_brought_back() {
        let mut cache = KvCache::new(2, 2).with_host(2);
        let (first, second) = ([1, 2, 3, 4], [5, 6, 7, 8]);
        let ask = |cache: &mut KvCache, tokens: &[u32]| {
            let (mut sequence, cached) = admit(cache, tokens).unwrap();
            cache.release(&mut sequence);
            (cached, cache.take_events())
        };
        assert_eq!(ask(&mut cache, &first).0, 0);
        let (_, events) = ask(&mut cache, &second);
        let moved: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                KvEvent::Stored { medium, token_ids, .. } => Some((true, *medium, token_ids.clone())),
                KvEvent::Removed { medium, .. } => Some((false, *medium, Vec::new())),
                KvEvent::Cleared => None,
            })
            .collect();
        // It is in the one place before it leaves the other; the tail goes first.
        assert_eq!(
            moved,
            [
                (true, Medium::Host, vec![3, 4]),
                (false, Medium::Gpu, vec![]),
                (true, Medium::Host, vec![1, 2]),
                (false, Medium::Gpu, vec![]),
                (true, Medium::Gpu, vec![5, 6, 7, 8]),
            ]
        );
        // Its last id has to be computed, so that only its first block is of use.
        let (cached, events) = ask(&mut cache, &first);
        assert_eq!(cached, 2);
        let is_back = |event: &KvEvent| match event {
            KvEvent::Stored { medium: Medium::Gpu, token_ids, parent_block_hash, .. } => {
                *token_ids == [1, 2] && parent_block_hash.is_none()
            }
            _ => false,
        };
        assert!(events.iter().any(is_back), "{events:?}");
    }

    proptest! {
        /// What is told of both tiers is what can be found in them.
        #[test]
        fn events_of_two_tiers_replayed_equal_what_is_in_them(
            steps in proptest::collection::vec((0u32..5, 1usize..14), 1..80)
        ) {
            let mut cache = KvCache::new(7, 2).with_host(5);
            // The same content may be in two blocks of the GPU, and is on the host once.
            let mut tiers = [HashMap::<u64, usize>::new(), HashMap::new()];
            for (family, length) in steps {
                let tokens: Vec<u32> = (0..length as u32).map(|at| if at < 3 { at } else { at * 10 + family }).collect();
                let mut sequence = SequenceBlocks::default();
                let cached = cache.cached_tokens(&mut sequence, &tokens);
                let is_told = |hash: &&u64| tiers.iter().any(|tier| tier.contains_key(*hash));
                let told = sequence.hashes.iter().take((length - 1) / 2).take_while(is_told).count();
                prop_assert_eq!(cached, told * 2);
                if cache.admit(&mut sequence, &tokens, cached, length) {
                    prop_assert_eq!(sequence.blocks.len(), length.div_ceil(2));
                    cache.release(&mut sequence);
                }
                for event in cache.take_events() {
                    let (hashes, medium, here) = match event {
                        KvEvent::Stored { block_hashes, medium, token_ids, .. } => {
                            prop_assert_eq!(token_ids.len(), block_hashes.len() * 2);
                            (block_hashes, medium, true)
                        }
                        KvEvent::Removed { block_hashes, medium } => (block_hashes, medium, false),
                        KvEvent::Cleared => unreachable!("nobody cleared it"),
                    };
                    let tier = &mut tiers[usize::from(medium == Medium::Host)];
                    for hash in hashes {
                        let copies = tier.entry(hash).or_default();
                        *copies = if here { *copies + 1 } else { copies.checked_sub(1).expect("it was there") };
                        if *copies == 0 {
                            tier.remove(&hash);
                        }
                    }
                }
                let on_gpu: HashMap<u64, usize> =
                    cache.index.iter().map(|(hash, blocks)| (*hash, blocks.len())).collect();
                prop_assert_eq!(&tiers[0], &on_gpu);
                prop_assert_eq!(&tiers[1], &cache.host.hashes().map(|hash| (hash, 1)).collect());
                prop_assert_eq!(cache.free, 7);
            }
        }

        /// A listener that replays the events knows exactly what can be hit.
        #[test]
        fn events_replayed_equal_the_index(
            steps in proptest::collection::vec((0u32..4, 1usize..14, any::<bool>()), 1..60)
        ) {
            let mut cache = KvCache::new(10, 2);
            let mut live: Vec<SequenceBlocks> = Vec::new();
            let mut known: HashMap<u64, usize> = HashMap::new();
            for (family, length, release) in steps {
                if release && !live.is_empty() {
                    cache.release(&mut live.remove(0));
                }
                let tokens: Vec<u32> = (0..length as u32).map(|at| if at < 3 { at } else { at * 10 + family }).collect();
                if let Some((sequence, _)) = admit(&mut cache, &tokens) {
                    live.push(sequence);
                }
                for event in cache.take_events() {
                    match event {
                        KvEvent::Stored { block_hashes, token_ids, parent_block_hash, .. } => {
                            prop_assert_eq!(token_ids.len(), block_hashes.len() * 2);
                            prop_assert!(parent_block_hash.is_none_or(|parent| known.contains_key(&parent)));
                            block_hashes.iter().for_each(|hash| *known.entry(*hash).or_default() += 1);
                        }
                        KvEvent::Removed { block_hashes, .. } => {
                            let copies = known.get_mut(&block_hashes[0]).expect("only what was stored is removed");
                            *copies -= 1;
                            if *copies == 0 {
                                known.remove(&block_hashes[0]);
                            }
                        }
                        KvEvent::Cleared => known.clear(),
                    }
                }
                let indexed: HashMap<u64, usize> =
                    cache.index.iter().map(|(hash, blocks)| (*hash, blocks.len())).collect();
                prop_assert_eq!(&indexed, &known);
                let held = cache.blocks.iter().filter(|block| block.holders > 0).count();
                prop_assert_eq!(held + cache.free, 10);
            }
        }
    }
}
