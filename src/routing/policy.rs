//! Policies: one object-safe function from candidates to a choice. Filters come before it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use rand::{Rng, RngExt};

use super::view::WorkerView;
use crate::ids::WorkerId;

/// What a policy may know of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteRequest<'a> {
    /// Model or adapter asked for; `None` if any worker will do.
    pub model: Option<&'a str>,
    /// Prompt length in tokens, estimated where it is not known.
    pub prompt_tokens: u32,
    /// Longest output asked for, where the client says so.
    pub max_tokens: Option<u32>,
}

/// A worker as a candidate.
pub type Candidate<'a> = &'a Arc<WorkerView>;

/// Chooses one of several workers, all of which may be chosen.
///
/// An implementation MUST answer an index below `candidates.len()`, MUST NOT block, and steers
/// only: it has no way to refuse. `candidates` is never empty.
pub trait Policy: Send + Sync {
    /// Name in configuration and metrics.
    fn name(&self) -> &'static str;

    /// The position of the chosen worker.
    fn pick(&self, candidates: &[Candidate<'_>], request: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize;
}

/// Names that [`by_name`] knows.
pub const POLICY_NAMES: [&str; 4] = ["round_robin", "random", "power_of_two", "least_loaded"];

/// Makes a policy; `None` for a name that is not one of [`POLICY_NAMES`].
pub fn by_name(name: &str) -> Option<Arc<dyn Policy>> {
    match name {
        "round_robin" => Some(Arc::new(RoundRobin::default())),
        "random" => Some(Arc::new(Random)),
        "power_of_two" => Some(Arc::new(PowerOfTwo)),
        "least_loaded" => Some(Arc::new(LeastLoaded)),
        _ => None,
    }
}

/// Tokens in a block where the worker does not say.
const ORDINARY_BLOCK: u32 = 16;

/// Outstanding work in KV blocks per unit of weight: blocks still to be prefilled plus blocks
/// held, plus one a request, so that a request without a known prompt counts too.
pub fn weighted_load(worker: &WorkerView) -> f64 {
    let load = worker.live.load();
    let block = worker.record.spec.block_size.unwrap_or(ORDINARY_BLOCK).max(1);
    let prefill_blocks = load.prefill_tokens as f64 / f64::from(block);
    let work = prefill_blocks + load.decode_blocks as f64 + load.requests as f64;
    work / f64::from(weight(worker))
}

fn weight(worker: &WorkerView) -> u32 {
    worker.record.spec.weight.max(1)
}

/// Each in turn. With unequal weights "smooth": a worker of weight 2 among three of weight 1
/// comes up twice in five, never twice in a row.
#[derive(Debug, Default)]
pub struct RoundRobin {
    turn: AtomicUsize,
    /// Credit by worker, used only with unequal weights. Emptied when it holds more entries
    /// than [`RoundRobin::MOST_CREDITS`], so workers long gone do not pile up.
    credits: Mutex<HashMap<WorkerId, i64>>,
}

impl RoundRobin {
    const MOST_CREDITS: usize = 4096;

    fn smooth(&self, candidates: &[Candidate<'_>]) -> usize {
        let mut credits = self.credits.lock();
        if credits.len() > Self::MOST_CREDITS {
            credits.clear();
        }
        let mut total = 0;
        let mut best = (0, i64::MIN);
        for (position, worker) in candidates.iter().enumerate() {
            let share = i64::from(weight(worker));
            total += share;
            let credit = match credits.get_mut(worker.id()) {
                Some(credit) => credit,
                None => credits.entry(worker.id().clone()).or_default(),
            };
            *credit += share;
            if *credit > best.1 {
                best = (position, *credit);
            }
        }
        if let Some(credit) = credits.get_mut(candidates[best.0].id()) {
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
        let first = weight(candidates[0]);
        if candidates.iter().all(|w| weight(w) == first) {
            return self.turn.fetch_add(1, Ordering::Relaxed) % candidates.len();
        }
        self.smooth(candidates)
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
        let total: u64 = candidates.iter().map(|w| u64::from(weight(w))).sum();
        let mut ticket = rng.random_range(0..total);
        for (position, worker) in candidates.iter().enumerate() {
            let share = u64::from(weight(worker));
            if ticket < share {
                return position;
            }
            ticket -= share;
        }
        candidates.len() - 1
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
        if weighted_load(candidates[other]) < weighted_load(candidates[one]) { other } else { one }
    }
}

/// The least loaded by [`weighted_load`]; ties at random, so that replicas with equal views do
/// not all choose the first.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn name(&self) -> &'static str {
        "least_loaded"
    }

    fn pick(&self, candidates: &[Candidate<'_>], _: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize {
        let mut best = (0, f64::INFINITY);
        let mut ties = 0_u32;
        for (position, worker) in candidates.iter().enumerate() {
            let load = weighted_load(worker);
            if load < best.1 {
                best = (position, load);
                ties = 1;
            } else if load == best.1 {
                // Reservoir of one: every tie ends up chosen with the same probability.
                ties += 1;
                if rng.random_range(0..ties) == 0 {
                    best.0 = position;
                }
            }
        }
        best.0
    }
}
