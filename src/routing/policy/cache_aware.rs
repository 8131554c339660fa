//! `cache_aware`: the rule of the SGLang router, on the shared index instead of a tree of its own.
//!
//! While the loads are balanced, the request goes where most of its prompt is, if that is enough
//! of it; else to where the fewest requests are.

use rand::Rng;

use super::{Candidate, Parameters, Policy, RouteRequest, least, longer_queue, queue};

/// Longest prefix while balanced, shortest queue otherwise. The defaults are those of the SGLang
/// router.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CacheAware {
    /// Share of the prompt that must be held somewhere to go by it: 0.5.
    pub cache_threshold: f64,
    /// Requests by which the longest queue must exceed the shortest to be unbalanced: 32.
    pub balance_abs_threshold: f64,
    /// And how many times it must be as long: 1.0001.
    pub balance_rel_threshold: f64,
}

impl Default for CacheAware {
    fn default() -> Self {
        Self { cache_threshold: 0.5, balance_abs_threshold: 32.0, balance_rel_threshold: 1.0001 }
    }
}

impl CacheAware {
    pub(super) fn from_parameters(parameters: &Parameters<'_>) -> Result<Self, String> {
        let mut made = Self::default();
        parameters.fill(&mut [
            ("cache_threshold", &mut made.cache_threshold),
            ("balance_abs_threshold", &mut made.balance_abs_threshold),
            ("balance_rel_threshold", &mut made.balance_rel_threshold),
        ])?;
        if !(0.0..=1.0).contains(&made.cache_threshold) {
            return Err("policy cache_aware: cache_threshold must lie in 0 to 1".to_owned());
        }
        if made.balance_abs_threshold < 0.0 || made.balance_rel_threshold < 1.0 {
            return Err("policy cache_aware: balance_abs_threshold must be at least 0, \
                        balance_rel_threshold at least 1"
                .to_owned());
        }
        Ok(made)
    }

    fn is_enough(&self, most: f64, request: &RouteRequest<'_>) -> bool {
        most > 0.0 && most > self.cache_threshold * f64::from(request.prompt_tokens)
    }

    fn unbalanced(&self, candidates: &[Candidate<'_>]) -> bool {
        let queues = || candidates.iter().map(|c| c.load.requests.max(0) as f64);
        let (longest, shortest) = (queues().fold(0.0, f64::max), queues().fold(f64::INFINITY, f64::min));
        longest - shortest > self.balance_abs_threshold && longest > self.balance_rel_threshold * shortest
    }
}

/// Tokens of the prompt that a candidate holds, or will.
fn held(candidate: &Candidate<'_>) -> f64 {
    f64::from(candidate.overlap.blocks + candidate.coming) * f64::from(candidate.worker.block_size())
}

impl Policy for CacheAware {
    fn name(&self) -> &'static str {
        "cache_aware"
    }

    fn wants_overlap(&self) -> bool {
        true
    }

    fn pick(&self, candidates: &[Candidate<'_>], request: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize {
        let most = candidates.iter().map(held).fold(0.0, f64::max);
        if !self.is_enough(most, request) || self.unbalanced(candidates) {
            return least(candidates.iter().map(queue), rng);
        }
        // Of those that hold the same, the one with the shortest queue.
        let cost = |c: &Candidate<'_>| if held(c) < most { f64::INFINITY } else { queue(c) };
        least(candidates.iter().map(cost), rng)
    }

    fn behind(
        &self,
        candidates: &[Candidate<'_>],
        chosen: usize,
        other: usize,
        request: &RouteRequest<'_>,
    ) -> String {
        let most = candidates.iter().map(held).fold(0.0, f64::max);
        let (chosen, other) = (&candidates[chosen], &candidates[other]);
        if !self.is_enough(most, request) {
            let share = self.cache_threshold * 100.0;
            let why = longer_queue(chosen, other);
            format!("nobody holds over {share:.0} % of the prompt (cache_threshold): {why}")
        } else if self.unbalanced(candidates) {
            format!("queues are unbalanced, fewest requests win: {}", longer_queue(chosen, other))
        } else if held(other) < held(chosen) {
            format!(
                "holds {:.0} tokens of the prompt fewer than {}",
                held(chosen) - held(other),
                chosen.name()
            )
        } else {
            longer_queue(chosen, other)
        }
    }
}
