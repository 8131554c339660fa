//! Policies that do not look at the prompt: round robin, random, power of two, least loaded.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use rand::{Rng, RngExt};

use super::{Candidate, Policy, RouteRequest, least};
use crate::ids::WorkerId;

/// Each in turn. With unequal weights "smooth": a worker of weight 2 among three of weight 1
/// comes up twice in five, never twice in a row.
#[derive(Debug, Default)]
pub struct RoundRobin {
    turn: AtomicUsize,
    /// Credit by rank, used only with unequal weights. Emptied when it holds more entries
    /// than [`RoundRobin::MOST_CREDITS`], so workers long gone do not pile up.
    credits: Mutex<HashMap<(WorkerId, u32), i64>>,
}

impl RoundRobin {
    const MOST_CREDITS: usize = 4096;

    fn key(candidate: &Candidate<'_>) -> (WorkerId, u32) {
        (candidate.worker.id().clone(), candidate.rank)
    }

    fn smooth(&self, candidates: &[Candidate<'_>]) -> usize {
        let mut credits = self.credits.lock();
        if credits.len() > Self::MOST_CREDITS {
            credits.clear();
        }
        let mut total = 0;
        let mut best = (0, i64::MIN);
        for (position, candidate) in candidates.iter().enumerate() {
            let share = i64::from(candidate.weight());
            total += share;
            let credit = credits.entry(Self::key(candidate)).or_default();
            *credit += share;
            if *credit > best.1 {
                best = (position, *credit);
            }
        }
        if let Some(credit) = credits.get_mut(&Self::key(&candidates[best.0])) {
            *credit -= total;
        }
        best.0
    }
}

impl Policy for RoundRobin {
    fn name(&self) -> &'static str {
        "round_robin"
    }

    fn pick(&self, candidates: &[Candidate<'_>], _: &RouteRequest<'_>, _: &mut dyn Rng) -> usize {
        let first = candidates[0].weight();
        if candidates.iter().all(|c| c.weight() == first) {
            return self.turn.fetch_add(1, Ordering::Relaxed) % candidates.len();
        }
        self.smooth(candidates)
    }

    fn stand_in(&self) -> Option<Arc<dyn Policy>> {
        Some(Arc::new(Self::default()))
    }

    fn behind(&self, candidates: &[Candidate<'_>], chosen: usize, _: usize, _: &RouteRequest<'_>) -> String {
        format!("it was the turn of {}", candidates[chosen].name())
    }
}

/// At random, in proportion to weight.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn pick(&self, candidates: &[Candidate<'_>], _: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize {
        let total: u64 = candidates.iter().map(|c| u64::from(c.weight())).sum();
        let mut ticket = rng.random_range(0..total);
        for (position, candidate) in candidates.iter().enumerate() {
            let share = u64::from(candidate.weight());
            if ticket < share {
                return position;
            }
            ticket -= share;
        }
        candidates.len() - 1
    }

    fn behind(&self, candidates: &[Candidate<'_>], chosen: usize, _: usize, _: &RouteRequest<'_>) -> String {
        format!("chance chose {}", candidates[chosen].name())
    }
}

/// The less loaded of two different workers drawn at random.
#[derive(Clone, Copy, Debug, Default)]
pub struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn name(&self) -> &'static str {
        "power_of_two"
    }

    fn pick(&self, candidates: &[Candidate<'_>], _: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize {
        if candidates.len() == 1 {
            return 0;
        }
        let one = rng.random_range(0..candidates.len());
        let other = (one + rng.random_range(1..candidates.len())) % candidates.len();
        if candidates[other].weighted_load() < candidates[one].weighted_load() { other } else { one }
    }

    fn behind(
        &self,
        candidates: &[Candidate<'_>],
        chosen: usize,
        other: usize,
        _: &RouteRequest<'_>,
    ) -> String {
        let name = candidates[chosen].name();
        match more_work(&candidates[chosen], &candidates[other]) {
            Some(more) => format!("{more}, or was not one of the two drawn"),
            None => format!("was not drawn beside {name}: the less loaded of two drawn at random wins"),
        }
    }
}

/// The least loaded by [`Candidate::weighted_load`]; ties at random.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn name(&self) -> &'static str {
        "least_loaded"
    }

    fn pick(&self, candidates: &[Candidate<'_>], _: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize {
        least(candidates.iter().map(Candidate::weighted_load), rng)
    }

    fn behind(
        &self,
        candidates: &[Candidate<'_>],
        chosen: usize,
        other: usize,
        _: &RouteRequest<'_>,
    ) -> String {
        more_work(&candidates[chosen], &candidates[other]).unwrap_or_else(|| {
            format!("has as little to do as {}, which chance chose", candidates[chosen].name())
        })
    }
}

/// Why a candidate came behind another that has less to do, if it has.
fn more_work(chosen: &Candidate<'_>, other: &Candidate<'_>) -> Option<String> {
    // As of ordinary weight, in which loads are in blocks.
    let more = (other.weighted_load() - chosen.weighted_load()) * 100.0;
    (more > 0.0).then(|| format!("has {more:.1} blocks of work more than {}", chosen.name()))
}
