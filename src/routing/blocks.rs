//! What routing knows of cached blocks: the replicated index, and what was just sent.

use std::cell::RefCell;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::recent::Recent;
use super::view::NOT_SCORED;
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

    /// Whether it is news to any replica that a prompt of these blocks goes to a rank of which
    /// `held` of them are known; to [`None`], of which nobody knows anything, everything is.
    /// See [`Recent::is_news`].
    pub fn is_news(&self, rank: Option<RankIx>, locals: &[LocalHash], held: u32, reckoned: bool) -> bool {
        match rank {
            None => true,
            // Nobody asks what it holds until all of that is known.
            Some(NOT_SCORED) if !reckoned => false,
            Some(rank) => {
                BUFFER.with_borrow_mut(|buffer| self.recent.is_news(rank, locals, held, reckoned, buffer))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::hash::Seed;

    #[test]
    fn a_prompt_is_news_until_the_index_has_it_or_it_was_said_a_moment_ago() {
        let blocks = Blocks::default();
        let locals: Vec<LocalHash> = (1..=4).map(LocalHash).collect();
        let rank = RankIx(2);
        let is_news = |held, reckoned| blocks.is_news(Some(rank), &locals, held, reckoned);
        assert!(is_news(3, false) && is_news(3, true));
        assert!(!is_news(4, false), "all replicas have the index");
        assert!(is_news(4, true), "that it is used is not in the index");
        blocks.recent.note(rank, Seed::default(), &locals);
        assert!(!is_news(0, false) && !is_news(4, true));
        assert!(is_news(3, true), "what was reckoned to be gone is there again");
        blocks.recent.turn();
        assert!(is_news(0, false) && is_news(4, true), "to be said again before it is forgotten");
        assert!(!blocks.is_news(Some(NOT_SCORED), &locals, 0, false));
        assert!(blocks.is_news(None, &locals, 0, true));
    }
}
