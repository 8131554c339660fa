//! Ranks: what the prefix index calls each data-parallel rank of each worker, who listens to its
//! events, and how far.
//!
//! A feed has one owner, the replica that listens to the engine. Ownership ends with the owner's
//! lease; whoever takes it next goes on behind the cursor, which moves with the events in one step,
//! so that nothing is lost or applied twice.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::{ReplicaId, WorkerIx};
use crate::kv::feed::Cursor;
use crate::kv::types::RankIx;

/// A data-parallel rank of a worker.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
pub struct RankKey {
    /// The worker.
    pub worker: WorkerIx,
    /// Its rank, from 0.
    pub rank: u32,
}

/// How the blocks of a rank are known.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum Knowledge {
    /// The engine tells.
    Events,
    /// Reckoned from what was sent to it.
    Predicted,
}

/// What is known of a rank, beside its blocks.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct RankRecord {
    /// Its name in the index; given to another rank only after this one was forgotten.
    pub ix: RankIx,
    /// How its blocks are known.
    pub knowledge: Knowledge,
    /// Who listens to its events.
    pub owner: Option<ReplicaId>,
    /// How far they were applied.
    pub cursor: Cursor,
}

/// Most ranks of the cluster, as many as the index takes.
pub const MOST_RANKS: usize = crate::kv::index::MOST_RANKS as usize;

/// All ranks.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct Ranks {
    by_key: BTreeMap<RankKey, RankRecord>,
    /// Names given back, least first.
    free: BTreeSet<RankIx>,
}

impl Ranks {
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&RankKey, &RankRecord)> {
        self.by_key.iter()
    }

    /// A worker's, by rank.
    pub fn of(&self, worker: WorkerIx) -> impl Iterator<Item = (&RankKey, &RankRecord)> {
        let of = |rank| RankKey { worker, rank };
        self.by_key.range(of(0)..=of(u32::MAX))
    }

    /// One of them.
    pub fn get(&self, key: RankKey) -> Option<&RankRecord> {
        self.by_key.get(&key)
    }

    pub(super) fn get_mut(&mut self, key: RankKey) -> Option<&mut RankRecord> {
        self.by_key.get_mut(&key)
    }

    /// The record, made if there is none; `None` when there are too many.
    pub(super) fn entry(&mut self, key: RankKey, knowledge: Knowledge) -> Option<&mut RankRecord> {
        if !self.by_key.contains_key(&key) {
            let ix = self.free.pop_first().unwrap_or(RankIx(self.by_key.len() as u32));
            if ix.0 as usize >= MOST_RANKS {
                return None;
            }
            let record = RankRecord { ix, knowledge, owner: None, cursor: Cursor::default() };
            self.by_key.insert(key, record);
        }
        self.by_key.get_mut(&key)
    }

    /// Forgets a worker's ranks; their names, whose content has to go too.
    pub(super) fn forget(&mut self, worker: WorkerIx) -> Vec<RankIx> {
        let keys: Vec<RankKey> = self.of(worker).map(|(key, _)| *key).collect();
        let gone: Vec<RankIx> =
            keys.iter().filter_map(|key| self.by_key.remove(key)).map(|record| record.ix).collect();
        self.free.extend(&gone);
        gone
    }

    /// Takes all feeds away from a replica; whether it had any.
    pub(super) fn disown(&mut self, replica: ReplicaId) -> bool {
        let mut any = false;
        for record in self.by_key.values_mut().filter(|record| record.owner == Some(replica)) {
            record.owner = None;
            any = true;
        }
        any
    }

    /// Says which content this is.
    pub(super) fn digest(&self) -> u64 {
        if self.by_key.is_empty() && self.free.is_empty() {
            return 0;
        }
        xxhash_rust::xxh3::xxh3_64(&crate::codec::encode(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(worker: u32, rank: u32) -> RankKey {
        RankKey { worker: WorkerIx(worker), rank }
    }

    #[test]
    fn names_are_dense_and_come_back_only_after_they_were_forgotten() {
        let mut ranks = Ranks::default();
        let ix = |ranks: &mut Ranks, k| ranks.entry(k, Knowledge::Events).map(|r| r.ix.0);
        assert_eq!(ix(&mut ranks, key(7, 0)), Some(0));
        assert_eq!(ix(&mut ranks, key(7, 1)), Some(1));
        assert_eq!(ix(&mut ranks, key(9, 0)), Some(2));
        assert_eq!(ix(&mut ranks, key(7, 1)), Some(1));
        assert_eq!(ranks.forget(WorkerIx(7)), [RankIx(0), RankIx(1)]);
        assert_eq!(ix(&mut ranks, key(11, 0)), Some(0));
        assert_eq!(ix(&mut ranks, key(12, 0)), Some(1));
        assert_eq!(ix(&mut ranks, key(13, 0)), Some(3), "2 is still worker 9's");
    }
}
