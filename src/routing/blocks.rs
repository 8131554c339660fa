//! What routing knows of cached blocks: the replicated index, and what was just sent.

use std::cell::RefCell;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::recent::Recent;
use crate::kv::hash::LocalHash;
use crate::kv::index::Index;
use crate::kv::types::{Overlap, RankIx};

/// See the module. Look-ups wait for nobody.
#[derive(Debug, Default)]
pub struct Blocks {
    /// The prefix index as applied here; another one after a snapshot was installed.
    pub index: ArcSwap<Index>,
    /// What was just sent, by whichever replica.
    pub recent: Recent,
}

thread_local! {
    static BUFFER: RefCell<Vec<Overlap>> = const { RefCell::new(Vec::new()) };
}

impl Blocks {
    /// Takes another index in place of the one before.
    pub fn set_index(&self, index: &Arc<Index>) {
        if !Arc::ptr_eq(&self.index.load(), index) {
            self.index.store(Arc::clone(index));
        }
    }

    /// How much of a prompt each rank holds, and how much of it was just sent there; both sorted
    /// by rank and emptied first.
    pub fn overlaps(&self, locals: &[LocalHash], held: &mut Vec<Overlap>, sent: &mut Vec<Overlap>) {
        self.index.load().lookup(locals, held);
        sent.clear();
        BUFFER.with_borrow_mut(|buffer| self.recent.raise(locals, sent, buffer));
    }

    /// Whether the rank was sent all of these blocks a moment ago; see [`Recent::knows`].
    pub fn was_just_sent(&self, rank: RankIx, locals: &[LocalHash]) -> bool {
        BUFFER.with_borrow_mut(|buffer| self.recent.knows(rank, locals, buffer))
    }
}
