//! The host tier: blocks that fell out of the GPU, the newest ones, until the room is needed.
//!
//! A block that is brought back stays here as well, as with vLLM's offloading and SGLang's hierarchical
//! cache. **Invariant:** each block is in `order` once, and in `blocks` with its place there.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::kv::{KvEvent, Medium};

/// What there is to say of a block, wherever it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// Hash of the block before it.
    pub(super) parent: Option<u64>,
    /// Its ids.
    pub(super) tokens: Vec<u32>,
    /// The adapter it was computed with.
    pub(super) lora: Option<Arc<str>>,
    /// The salt of its chain.
    pub(super) salt: Option<Arc<str>>,
    /// What else went into its hash.
    pub(super) extra_keys: Option<Vec<Arc<str>>>,
}

impl Content {
    /// The event that it is somewhere now.
    pub(super) fn stored(&self, hash: u64, medium: Medium) -> KvEvent {
        KvEvent::Stored {
            block_hashes: vec![hash],
            parent_block_hash: self.parent,
            block_size: self.tokens.len(),
            token_ids: self.tokens.clone(),
            lora_name: self.lora.clone(),
            cache_salt: self.salt.clone(),
            extra_keys: vec![self.extra_keys.clone()],
            medium,
        }
    }
}

/// Blocks by hash, forgotten in the order of their last use.
#[derive(Debug, Default)]
pub(super) struct HostTier {
    capacity: usize,
    blocks: HashMap<u64, (u64, Arc<Content>)>,
    /// By time of last use.
    order: BTreeMap<u64, u64>,
    clock: u64,
}

impl HostTier {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// Whether there is a host tier at all.
    pub(super) fn has_room_for_any(&self) -> bool {
        self.capacity > 0
    }

    pub(super) fn has(&self, hash: u64) -> bool {
        self.blocks.contains_key(&hash)
    }

    pub(super) fn hashes(&self) -> impl Iterator<Item = u64> {
        self.blocks.keys().copied()
    }

    /// What is there, used just now.
    pub(super) fn take_up(&mut self, hash: u64) -> Option<Arc<Content>> {
        let (used, content) = self.blocks.get_mut(&hash)?;
        self.clock += 1;
        self.order.remove(used);
        self.order.insert(self.clock, hash);
        *used = self.clock;
        Some(Arc::clone(content))
    }

    /// Puts a block here, and the one that was not used for longest out, where there is no room.
    pub(super) fn put(&mut self, hash: u64, content: Arc<Content>, events: &mut Vec<KvEvent>) {
        if self.capacity == 0 || self.take_up(hash).is_some() {
            return;
        }
        if self.blocks.len() >= self.capacity
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.blocks.remove(&oldest);
            events.push(KvEvent::Removed { block_hashes: vec![oldest], medium: Medium::Host });
        }
        self.clock += 1;
        events.push(content.stored(hash, Medium::Host));
        self.order.insert(self.clock, hash);
        self.blocks.insert(hash, (self.clock, content));
    }

    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.order.clear();
    }
}
