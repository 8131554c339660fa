//! Corrections: what the engines of workers have to do beyond what is booked there, or short of it,
//! and which replica says so. They add to nobody's booking and are gone with the lease of whoever
//! said it.
//!
//! An engine whose figures tell its ranks apart is corrected on each of them. The worker's sum is
//! said beside that, as it was judged for itself: many ranks with a little more each are clearly more
//! together, and requests that went to another rank than they are booked on are neither.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::load::LoadSum;
use super::ranks::{MOST_RANKS, RankKey};
use super::worker::WorkerSpec;
use crate::ids::{ReplicaId, WorkerIx};

/// What one worker's engine has to do beyond what is booked; below zero for what it has not.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct Correction {
    /// On all ranks together.
    pub whole: LoadSum,
    /// On those ranks that differ by themselves, ascending. With none, wherever on the worker:
    /// because its engine does not tell its ranks apart, or no single one differs enough.
    pub ranks: Vec<(u32, LoadSum)>,
}

impl Correction {
    /// One that does not tell ranks apart.
    pub fn of_whole(whole: LoadSum) -> Self {
        Self { whole, ranks: Vec::new() }
    }

    /// Whether it corrects nothing.
    pub fn is_zero(&self) -> bool {
        self.whole.is_zero() && self.ranks.is_empty()
    }

    /// What it says of one rank by itself; nothing for those it does not name.
    pub fn of_rank(&self, rank: u32) -> LoadSum {
        let found = self.ranks.binary_search_by_key(&rank, |(rank, _)| *rank);
        found.map(|at| self.ranks[at].1).unwrap_or_default()
    }

    /// Whether it is as the state keeps it: ranks that a worker may have, each once, in order, and
    /// none that says nothing.
    fn is_proper(&self) -> bool {
        let known = |(rank, extra): &(u32, LoadSum)| *rank < WorkerSpec::MAX_RANKS && !extra.is_zero();
        self.ranks.iter().all(known) && self.ranks.is_sorted_by(|(one, _), (next, _)| one < next)
    }

    /// Takes nothing off any more, on the worker and on this rank.
    fn take_nothing_off(&mut self, rank: u32) {
        self.whole = self.whole.not_below_zero();
        for (_, extra) in self.ranks.iter_mut().filter(|(named, _)| *named == rank) {
            *extra = extra.not_below_zero();
        }
        self.ranks.retain(|(_, extra)| !extra.is_zero());
    }
}

/// All corrections, by worker. At most as many as there are workers, and of no more ranks than the
/// cluster may have.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub(super) struct Corrections(BTreeMap<WorkerIx, (ReplicaId, Correction)>);

/// Workers with a correction; there are no more in the registry.
const MOST_CORRECTED: usize = super::control::MAX_WORKERS;

impl Corrections {
    /// What is said of a worker.
    pub(super) fn of(&self, worker: WorkerIx) -> Option<&Correction> {
        self.0.get(&worker).map(|(_, correction)| correction)
    }

    /// Replaces what is said of a worker; whether it was taken.
    pub(super) fn set(&mut self, worker: WorkerIx, by: ReplicaId, correction: Correction) -> bool {
        // Few of them, and seldom another: counted rather than kept count of.
        let others = self.0.iter().filter(|(other, _)| **other != worker);
        let (workers, ranks) =
            others.fold((0, 0), |(workers, ranks), (_, (_, other))| (workers + 1, ranks + other.ranks.len()));
        let fits = workers < MOST_CORRECTED && ranks + correction.ranks.len() <= MOST_RANKS;
        if !fits || !correction.is_proper() {
            return false;
        }
        self.0.insert(worker, (by, correction));
        true
    }

    /// Forgets what is said of a worker; whether something was.
    pub(super) fn remove(&mut self, worker: WorkerIx) -> bool {
        self.0.remove(&worker).is_some()
    }

    /// Forgets what a replica has said; of which workers.
    pub(super) fn disown(&mut self, replica: ReplicaId) -> Vec<WorkerIx> {
        let mut theirs = Vec::new();
        self.0.retain(|worker, (by, _)| {
            if *by == replica {
                theirs.push(*worker);
            }
            *by != replica
        });
        theirs
    }

    /// What is taken off a rank's load may be what was just released there: it is not to be taken
    /// off twice.
    pub(super) fn take_nothing_off(&mut self, rank: RankKey) {
        let Some((_, correction)) = self.0.get_mut(&rank.worker) else { return };
        correction.take_nothing_off(rank.rank);
        if correction.is_zero() {
            self.0.remove(&rank.worker);
        }
    }

    /// Says which content this is; 0 for none.
    pub(super) fn digest(&self) -> u64 {
        match self.0.is_empty() {
            true => 0,
            false => xxhash_rust::xxh3::xxh3_64(&crate::codec::encode(self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(requests: i64) -> LoadSum {
        LoadSum { requests, ..LoadSum::default() }
    }

    #[test]
    fn only_ranks_that_a_worker_may_have_are_taken_each_once_and_in_order() {
        let mut all = Corrections::default();
        let mut takes = |ranks: &[(u32, i64)]| {
            let ranks = ranks.iter().map(|(rank, requests)| (*rank, load(*requests))).collect();
            all.set(WorkerIx(1), ReplicaId(1), Correction { whole: load(1), ranks })
        };
        assert!(takes(&[]) && takes(&[(0, 1)]) && takes(&[(0, -1), (7, 2), (1023, 3)]));
        assert!(!takes(&[(1024, 1)]) && !takes(&[(1, 1), (1, 1)]) && !takes(&[(2, 1), (1, 1)]));
        assert!(!takes(&[(1, 0)]), "it says nothing");
        assert_eq!(all.of(WorkerIx(1)).unwrap().of_rank(7), load(2), "what was refused changed nothing");
        assert_eq!(all.of(WorkerIx(1)).unwrap().of_rank(8), load(0));
    }

    #[test]
    fn workers_and_ranks_are_bounded_and_what_is_there_can_still_change() {
        let mut all = Corrections::default();
        let every = |count| Correction { whole: load(1), ranks: (0..count).map(|r| (r, load(1))).collect() };
        let full = MOST_RANKS as u32 / WorkerSpec::MAX_RANKS;
        for worker in 0..full {
            assert!(all.set(WorkerIx(worker), ReplicaId(1), every(WorkerSpec::MAX_RANKS)));
        }
        let next = WorkerIx(full);
        assert!(!all.set(next, ReplicaId(1), every(1)), "no rank more");
        assert!(all.set(next, ReplicaId(1), every(0)), "but a worker");
        assert!(all.set(WorkerIx(0), ReplicaId(2), every(1023)) && all.set(next, ReplicaId(1), every(1)));
        for worker in full + 1..MOST_CORRECTED as u32 {
            assert!(all.set(WorkerIx(worker), ReplicaId(1), every(0)));
        }
        assert!(!all.set(WorkerIx(u32::MAX), ReplicaId(1), every(0)));
        assert!(all.set(next, ReplicaId(1), every(0)));
        assert_eq!(all.disown(ReplicaId(2)), [WorkerIx(0)]);
        assert!(all.set(WorkerIx(u32::MAX), ReplicaId(1), every(0)));
    }

    #[test]
    fn a_release_ends_what_is_taken_off_its_rank_and_the_worker_and_off_no_other_rank() {
        let mut all = Corrections::default();
        let (worker, mixed) = (WorkerIx(1), LoadSum { requests: -3, prefill_tokens: -30, decode_blocks: 40 });
        let ranks = vec![(0, load(-2)), (1, mixed), (2, load(-1))];
        all.set(worker, ReplicaId(1), Correction { whole: mixed, ranks });
        all.take_nothing_off(RankKey { worker, rank: 1 });
        let left = LoadSum { decode_blocks: 40, ..LoadSum::default() };
        let ranks = vec![(0, load(-2)), (1, left), (2, load(-1))];
        assert_eq!(all.of(worker), Some(&Correction { whole: left, ranks }));
        all.take_nothing_off(RankKey { worker, rank: 0 });
        assert_eq!(all.of(worker).unwrap().ranks, [(1, left), (2, load(-1))]);
        all.set(worker, ReplicaId(1), Correction { whole: load(-2), ranks: vec![(0, load(-2))] });
        all.take_nothing_off(RankKey { worker, rank: 0 });
        assert_eq!((all.of(worker), all.digest()), (None, 0));
    }
}
