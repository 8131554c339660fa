//! Ranks: what the prefix index calls each data-parallel rank of each worker, who listens to its
//! events, and how far.
//!
//! A feed has one owner, the replica that listens to the engine. Ownership ends with the owner's
//! lease; whoever takes it next goes on behind the cursor, which moves with the events in one step,
//! so that nothing is lost or applied twice.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut, RangeInclusive};

use serde::{Deserialize, Serialize};

use super::digest::Digest;
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

impl RankKey {
    /// All that a worker may have.
    pub fn all_of(worker: WorkerIx) -> RangeInclusive<Self> {
        let of = |rank| Self { worker, rank };
        of(0)..=of(u32::MAX)
    }
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
#[serde(from = "Stored")]
pub struct Ranks {
    by_key: BTreeMap<RankKey, RankRecord>,
    /// Names given back, least first.
    free: BTreeSet<RankIx>,
    /// Of all of it, kept up with every change: every batch of events moves a cursor.
    #[serde(skip)]
    digest: Digest,
}

/// [`Ranks`] as they are written down.
#[derive(Deserialize)]
struct Stored {
    by_key: BTreeMap<RankKey, RankRecord>,
    free: BTreeSet<RankIx>,
}

impl From<Stored> for Ranks {
    fn from(Stored { by_key, free }: Stored) -> Self {
        let mut digest = Digest::default();
        by_key.iter().for_each(|record| digest.add(RECORD, &record));
        free.iter().for_each(|name| digest.add(FREE, name));
        Self { by_key, free, digest }
    }
}

/// Kinds of records in the digest.
const RECORD: u8 = 0;
const FREE: u8 = 1;

/// A rank's record while it is changed.
pub(super) struct RankMut<'a> {
    key: RankKey,
    record: &'a mut RankRecord,
    digest: &'a mut Digest,
}

impl<'a> RankMut<'a> {
    fn new(key: RankKey, record: &'a mut RankRecord, digest: &'a mut Digest) -> Self {
        digest.remove(RECORD, &(key, &*record));
        Self { key, record, digest }
    }
}

impl Deref for RankMut<'_> {
    type Target = RankRecord;

    fn deref(&self) -> &RankRecord {
        self.record
    }
}

impl DerefMut for RankMut<'_> {
    fn deref_mut(&mut self) -> &mut RankRecord {
        self.record
    }
}

impl Drop for RankMut<'_> {
    fn drop(&mut self) {
        self.digest.add(RECORD, &(self.key, &*self.record));
    }
}

impl Ranks {
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&RankKey, &RankRecord)> {
        self.by_key.iter()
    }

    /// A worker's, by rank.
    pub fn of(&self, worker: WorkerIx) -> impl Iterator<Item = (&RankKey, &RankRecord)> {
        self.by_key.range(RankKey::all_of(worker))
    }

    /// One of them.
    pub fn get(&self, key: RankKey) -> Option<&RankRecord> {
        self.by_key.get(&key)
    }

    pub(super) fn get_mut(&mut self, key: RankKey) -> Option<RankMut<'_>> {
        let record = self.by_key.get_mut(&key)?;
        Some(RankMut::new(key, record, &mut self.digest))
    }

    /// The record, made if there is none; `None` when there are too many.
    pub(super) fn entry(&mut self, key: RankKey, knowledge: Knowledge) -> Option<RankMut<'_>> {
        if !self.by_key.contains_key(&key) {
            let ix = match self.free.pop_first() {
                Some(given_back) => {
                    self.digest.remove(FREE, &given_back);
                    given_back
                }
                None => RankIx(self.by_key.len() as u32),
            };
            if ix.0 as usize >= MOST_RANKS {
                return None;
            }
            let record = RankRecord { ix, knowledge, owner: None, cursor: Cursor::default() };
            self.digest.add(RECORD, &(key, &record));
            self.by_key.insert(key, record);
        }
        self.get_mut(key)
    }

    /// Forgets a worker's ranks; their names, whose content has to go too.
    pub(super) fn forget(&mut self, worker: WorkerIx) -> Vec<RankIx> {
        let keys: Vec<RankKey> = self.of(worker).map(|(key, _)| *key).collect();
        let mut gone = Vec::with_capacity(keys.len());
        for key in keys {
            let Some(record) = self.by_key.remove(&key) else { continue };
            self.digest.remove(RECORD, &(key, &record));
            self.digest.add(FREE, &record.ix);
            self.free.insert(record.ix);
            gone.push(record.ix);
        }
        gone
    }

    /// Takes all feeds away from a replica; whether it had any.
    pub(super) fn disown(&mut self, replica: ReplicaId) -> bool {
        let mut any = false;
        for (key, record) in self.by_key.iter_mut().filter(|(_, record)| record.owner == Some(replica)) {
            RankMut::new(*key, record, &mut self.digest).owner = None;
            any = true;
        }
        any
    }

    /// Says which content this is.
    pub(super) fn digest(&self) -> u64 {
        self.digest.0
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

    #[test]
    fn the_digest_that_is_kept_up_is_that_of_the_content() {
        let mut ranks = Ranks::default();
        let mut seen = BTreeSet::from([ranks.digest()]);
        let mut check = |ranks: &Ranks| {
            let bytes = crate::codec::encode(ranks);
            let read: Ranks = crate::codec::decode(&bytes).unwrap();
            assert_eq!(&read, ranks);
            assert!(seen.insert(ranks.digest()), "a change that is not in the digest: {ranks:?}");
        };
        for worker in 0..3 {
            ranks.entry(key(worker, 0), Knowledge::Events).unwrap().owner = Some(ReplicaId(2));
            check(&ranks);
        }
        ranks.get_mut(key(1, 0)).unwrap().cursor.last = Some((7, 7));
        check(&ranks);
        assert_eq!(ranks.forget(WorkerIx(0)), [RankIx(0)]);
        check(&ranks);
        assert!(ranks.disown(ReplicaId(2)));
        check(&ranks);
        ranks.entry(key(9, 0), Knowledge::Predicted).unwrap();
        check(&ranks);
    }
}
