//! Policies that send equal keys to equal places: `prefix_hash` and `consistent_hash`.
//!
//! Both go by rendezvous hashing: every rank draws a number from the key and its own name, and the
//! highest number wins. When a worker comes or goes, only the keys that it wins or had won move;
//! no ring has to be kept, so that any subset of workers that the filters leave will do.

use rand::Rng;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Candidate, Parameters, Policy, RouteRequest, least, longer_queue, queue};

/// What a rank draws for a key, larger is better: shares of keys are as the weights are
/// (`-weight / ln u`, with `u` uniform in 0 to 1).
fn draw(key: u64, candidate: &Candidate<'_>) -> f64 {
    let seed = key.wrapping_add(u64::from(candidate.rank).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let hash = xxh3_64_with_seed(candidate.worker.id().as_str().as_bytes(), seed);
    // 53 bits and a half: never 0, never 1.
    let uniform = ((hash >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -f64::from(candidate.weight()) / uniform.ln()
}

/// The highest draw among the candidates for which `may` holds.
fn highest(key: u64, candidates: &[Candidate<'_>], may: impl Fn(&Candidate<'_>) -> bool) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (position, candidate) in candidates.iter().enumerate().filter(|(_, c)| may(c)) {
        let drawn = draw(key, candidate);
        if best.is_none_or(|(_, most)| drawn > most) {
            best = Some((position, drawn));
        }
    }
    best.map(|(position, _)| position)
}

/// As many requests as a candidate may have, this one included, so that none has more than
/// `factor` times its share.
fn bound(candidates: &[Candidate<'_>], factor: f64) -> impl Fn(&Candidate<'_>) -> bool {
    let total: i64 = candidates.iter().map(|c| c.load.requests.max(0)).sum();
    let weights: f64 = candidates.iter().map(|c| f64::from(c.weight())).sum();
    move |candidate| {
        let share = (total + 1) as f64 * f64::from(candidate.weight()) / weights;
        (candidate.load.requests.max(0) + 1) as f64 <= (factor * share).ceil()
    }
}

fn least_requests(candidates: &[Candidate<'_>], rng: &mut dyn Rng) -> usize {
    least(candidates.iter().map(queue), rng)
}

/// Requests whose prompts begin alike go to the same rank, unless it has more than its share of
/// requests; then to the next in the order of the draw.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PrefixHash {
    /// Tokens of the prompt's beginning that are the key: 2,048, rounded to full blocks, at least
    /// one. Shorter prompts go by what full blocks they have.
    pub tokens: f64,
    /// How many times its share of requests a rank may have: 1.25.
    pub load_factor: f64,
}

impl Default for PrefixHash {
    fn default() -> Self {
        Self { tokens: 2048.0, load_factor: 1.25 }
    }
}

impl PrefixHash {
    pub(super) fn from_parameters(parameters: &Parameters<'_>) -> Result<Self, String> {
        let mut made = Self::default();
        parameters.fill(&mut [("tokens", &mut made.tokens), ("load_factor", &mut made.load_factor)])?;
        if !(1.0..=1e9).contains(&made.tokens) || !(1.0..=1e3).contains(&made.load_factor) {
            return Err(
                "policy prefix_hash: tokens must lie in 1 to 1e9, load_factor in 1 to 1000".to_owned()
            );
        }
        Ok(made)
    }

    /// What the prompt's beginning is known by.
    fn key(&self, candidates: &[Candidate<'_>], request: &RouteRequest<'_>) -> Option<u64> {
        // The chain makes the last hash of the beginning speak for all of it.
        let blocks = (self.tokens / f64::from(candidates[0].worker.block_size())).max(1.0) as usize;
        let last = blocks.min(request.hashes.len()).checked_sub(1);
        last.map(|at| request.hashes[at].0).or(request.session)
    }
}

impl Policy for PrefixHash {
    fn name(&self) -> &'static str {
        "prefix_hash"
    }

    fn wants_overlap(&self) -> bool {
        true
    }

    fn pick(&self, candidates: &[Candidate<'_>], request: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize {
        let Some(key) = self.key(candidates, request) else {
            return least_requests(candidates, rng);
        };
        highest(key, candidates, bound(candidates, self.load_factor))
            .unwrap_or_else(|| least_requests(candidates, rng))
    }

    fn behind(
        &self,
        candidates: &[Candidate<'_>],
        chosen: usize,
        other: usize,
        request: &RouteRequest<'_>,
    ) -> String {
        let may = bound(candidates, self.load_factor);
        let (chosen, other) = (&candidates[chosen], &candidates[other]);
        if self.key(candidates, request).is_none() {
            format!("the prompt has no full block to go by: {}", longer_queue(chosen, other))
        } else if !may(other) {
            let share = self.load_factor;
            format!("over load_factor: with this one it has more than {share} times its share of requests")
        } else {
            format!("the prompt's beginning belongs to {}, which drew higher for it", chosen.name())
        }
    }
}

/// Requests of one session go to the same rank while it may be chosen, however much it has to do;
/// those without a session to where the fewest requests are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ConsistentHash;

impl ConsistentHash {
    pub(super) fn from_parameters(parameters: &Parameters<'_>) -> Result<Self, String> {
        parameters.none().map(|()| Self)
    }
}

impl Policy for ConsistentHash {
    fn name(&self) -> &'static str {
        "consistent_hash"
    }

    fn binds_sessions(&self) -> bool {
        true
    }

    fn pick(&self, candidates: &[Candidate<'_>], request: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize {
        let at_home = |c: &Candidate<'_>| request.bound.is_some_and(|worker| worker == c.worker.record.ix);
        let chosen = request
            .session
            .and_then(|key| highest(key, candidates, at_home).or_else(|| highest(key, candidates, |_| true)));
        chosen.unwrap_or_else(|| least_requests(candidates, rng))
    }

    fn behind(
        &self,
        candidates: &[Candidate<'_>],
        chosen: usize,
        other: usize,
        request: &RouteRequest<'_>,
    ) -> String {
        let (chosen, other) = (&candidates[chosen], &candidates[other]);
        let ix = |candidate: &Candidate<'_>| candidate.worker.record.ix;
        if request.session.is_none() {
            return format!("the request names no session: {}", longer_queue(chosen, other));
        }
        let name = chosen.name();
        match request.bound {
            Some(bound) if bound == ix(chosen) && bound != ix(other) => {
                format!("the session is bound to {}", chosen.worker.id())
            }
            Some(bound) if bound != ix(chosen) => {
                format!("the session's worker cannot take it, and {name} drew higher for the session")
            }
            _ => format!("{name} drew higher for the session"),
        }
    }
}
