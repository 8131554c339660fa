//! What was just sent where, before the engines have told of it.
//!
//! A burst of equal prompts would scatter over the workers until the first event arrives, and an
//! engine's events come a step later at best. So every prompt is taken for cached where it was
//! sent, by whichever replica, for one to two turns (a turn is a second), whatever becomes of it.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::kv::hash::{LocalHash, Seed};
use crate::kv::index::{Index, Options};
use crate::kv::types::{Overlap, RankIx};

/// Most blocks of one rank in a turn; the least recently sent go first.
const MOST_BLOCKS: u64 = 1 << 18;

/// Most memory of one turn, for all ranks.
const MOST_BYTES: u64 = 64 << 20;

/// The prompts of this turn and the one before.
#[derive(Debug)]
pub struct Recent {
    /// The newer one first.
    turns: ArcSwap<[Arc<Index>; 2]>,
}

fn empty() -> Arc<Index> {
    Arc::new(Index::new(Options { bytes: MOST_BYTES }))
}

impl Default for Recent {
    fn default() -> Self {
        Self { turns: ArcSwap::from_pointee([empty(), empty()]) }
    }
}

impl Recent {
    /// A prompt of these blocks was sent to a rank.
    pub fn note(&self, rank: RankIx, seed: Seed, locals: &[LocalHash]) {
        if !locals.is_empty() {
            self.turns.load()[0].predict(rank, seed, locals, MOST_BLOCKS);
        }
    }

    /// Whether the rank was sent all of these blocks in this turn already: then to note it again
    /// would change nothing. `buffer` is scratch.
    pub fn knows(&self, rank: RankIx, locals: &[LocalHash], buffer: &mut Vec<Overlap>) -> bool {
        self.turns.load()[0].lookup(locals, buffer);
        let sent = buffer.binary_search_by_key(&rank, |sent| sent.rank);
        sent.is_ok_and(|at| buffer[at].blocks as usize == locals.len())
    }

    /// Raises `overlaps` (sorted by rank, as [`Index::lookup`] leaves them) to what was just sent.
    /// `buffer` is scratch.
    pub fn raise(&self, locals: &[LocalHash], overlaps: &mut Vec<Overlap>, buffer: &mut Vec<Overlap>) {
        for turn in self.turns.load().iter() {
            turn.lookup(locals, buffer);
            for sent in buffer.iter() {
                match overlaps.binary_search_by_key(&sent.rank, |known| known.rank) {
                    Ok(at) if overlaps[at].blocks < sent.blocks => overlaps[at] = *sent,
                    Ok(_) => {}
                    Err(at) => overlaps.insert(at, *sent),
                }
            }
        }
    }

    /// Begins the next turn and forgets the last but one.
    pub fn turn(&self) {
        let turns = self.turns.load();
        // Nothing was sent for two turns: as empty as can be.
        if turns.iter().all(|turn| turn.counters().blocks == 0) {
            return;
        }
        self.turns.store(Arc::new([empty(), turns[0].clone()]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_counts_for_two_turns_beside_what_is_known() {
        let recent = Recent::default();
        let locals: Vec<LocalHash> = (1..=8).map(LocalHash).collect();
        recent.note(RankIx(3), Seed::default(), &locals[..6]);
        let known = Overlap { rank: RankIx(1), blocks: 2, gpu: 2, host: 0 };
        let raised = |recent: &Recent| {
            let mut overlaps = vec![known, Overlap { rank: RankIx(3), blocks: 4, gpu: 1, host: 3 }];
            recent.raise(&locals, &mut overlaps, &mut Vec::new());
            overlaps
        };
        let sent = Overlap { rank: RankIx(3), blocks: 6, gpu: 6, host: 0 };
        assert_eq!(raised(&recent), [known, sent]);
        let knows = |rank, blocks| recent.knows(RankIx(rank), &locals[..blocks], &mut Vec::new());
        assert!(knows(3, 6) && knows(3, 2) && !knows(3, 7) && !knows(1, 2));
        recent.turn();
        assert!(!knows(3, 6), "it is to be noted again before it is forgotten");
        assert_eq!(raised(&recent), [known, sent]);
        recent.turn();
        assert_eq!(raised(&recent)[1].blocks, 4, "forgotten after two turns");
        recent.turn();
        let mut overlaps = Vec::new();
        recent.raise(&locals, &mut overlaps, &mut Vec::new());
        assert!(overlaps.is_empty());
    }
}
