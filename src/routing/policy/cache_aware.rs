//! `cache_aware`: the rule of the SGLang router, on the shared index instead of a tree of its own.
//!
//! While the loads are balanced, the request goes where most of its prompt is, if that is enough
//! of it; else to where the fewest requests are.

use rand::Rng;

use super::{Candidate, Parameters, Policy, RouteRequest, least};

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

    fn unbalanced(&self, candidates: &[Candidate<'_>]) -> bool {
        let queues = || candidates.iter().map(|c| c.load.requests.max(0) as f64);
        let (longest, shortest) = (queues().fold(0.0, f64::max), queues().fold(f64::INFINITY, f64::min));
        longest - shortest > self.balance_abs_threshold && longest > self.balance_rel_threshold * shortest
    }
}

/// The shortest queue for its weight.
fn shortest(candidate: &Candidate<'_>) -> f64 {
    candidate.load.requests.max(0) as f64 / f64::from(candidate.weight())
}

impl Policy for CacheAware {
    fn name(&self) -> &'static str {
        "cache_aware"
    }

    fn wants_overlap(&self) -> bool {
        true
    }

    fn pick(&self, candidates: &[Candidate<'_>], request: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize {
        let held =
            |c: &Candidate<'_>| f64::from(c.overlap.blocks + c.coming) * f64::from(c.worker.block_size());
        let most = candidates.iter().map(held).fold(0.0, f64::max);
        let enough = most > self.cache_threshold * f64::from(request.prompt_tokens);
        if !enough || most == 0.0 || self.unbalanced(candidates) {
            return least(candidates.iter().map(shortest), rng);
        }
        // Of those that hold the same, the one with the shortest queue.
        let cost = |c: &Candidate<'_>| if held(c) < most { f64::INFINITY } else { shortest(c) };
        least(candidates.iter().map(cost), rng)
    }
}
