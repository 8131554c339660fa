//! The cost of sending a request to a candidate: how much work stands before it, how much it
//! brings, and what else it disturbs. Pure; lower is better.
//!
//! All terms are in KV blocks of the worker, so that a weight means the same on every machine:
//! a block of work is the time that the prefill of one block takes. `docs/explanation/routing.md`
//! derives the formula, `docs/performance.md` says what else was tried.

use rand::{Rng, RngExt};
use serde::Serialize;

use crate::kv::types::Overlap;

/// What the cost of one candidate is made of.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct CostInput {
    /// Leading blocks of the prompt that the rank holds; from the prefix index.
    pub overlap: Overlap,
    /// Blocks after those that are being computed there for other requests, or will be before this
    /// one; from the predictions of all replicas.
    pub coming: u32,
    /// Tokens of the prompt; counted by the tokenizer or estimated.
    pub prompt_tokens: u32,
    /// Tokens in a block; from the worker's registration. Must not be 0.
    pub block_size: u32,
    /// Tokens booked on the rank whose prefill is outstanding, cached ones left out; from the
    /// bookings of all replicas.
    pub active_prefill_tokens: u64,
    /// Blocks that running requests hold on the rank; from the bookings of all replicas.
    pub active_decode_blocks: u64,
    /// Requests in flight on the rank; from the bookings of all replicas.
    pub requests: u64,
    /// Relative speed, 100 is ordinary; from the worker's registration. Must not be 0.
    pub weight: u32,
}

/// How much a block that lies in a tier is worth, against computing it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TierCredits {
    /// On the accelerator: nothing is left to do. 1.
    pub gpu: f64,
    /// In the host's memory: it is copied. 0.75.
    pub host: f64,
    /// Anything slower. 0.25.
    pub disk: f64,
}

impl Default for TierCredits {
    fn default() -> Self {
        Self { gpu: 1.0, host: 0.75, disk: 0.25 }
    }
}

impl TierCredits {
    /// Blocks that need not be computed, tiers weighed.
    pub fn credit(&self, overlap: &Overlap) -> f64 {
        f64::from(overlap.gpu) * self.gpu
            + f64::from(overlap.host) * self.host
            + f64::from(overlap.disk()) * self.disk
    }
}

/// Weights of the cost's terms.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CostOptions {
    /// Weight of the prompt's own uncached blocks.
    pub overlap_weight: f64,
    /// Weight of the blocks whose prefill stands before it.
    pub queue_weight: f64,
    /// Weight of blocks that are being computed there; at most `overlap_weight`. They save their
    /// own computation, but are no copy yet whose double would push other blocks out.
    pub coming_weight: f64,
    /// Weight of a block that a running request holds. A request in flight counts as one more, so
    /// that one of unknown length counts too.
    pub decode_weight: f64,
    /// Credits of the tiers.
    pub credits: TierCredits,
    /// 0 chooses the least cost. Above that, candidates are drawn with a probability of
    /// `exp(-cost / temperature)`, costs first scaled to 0 (least) to 1 (most).
    pub temperature: f64,
}

impl Default for CostOptions {
    fn default() -> Self {
        Self {
            overlap_weight: 3.3,
            queue_weight: 1.0,
            coming_weight: 1.0,
            decode_weight: 0.07,
            credits: TierCredits::default(),
            temperature: 0.0,
        }
    }
}

/// A cost, term by term, each weighed already and divided by the worker's relative speed.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Terms {
    /// The prefill that stands before this request.
    pub queued: f64,
    /// This prompt's prefill, if nothing were cached.
    pub prompt: f64,
    /// What is cached of it; at most `prompt`, and subtracted.
    pub credit: f64,
    /// What running requests hold, and how many they are.
    pub decode: f64,
}

impl Terms {
    /// The cost.
    pub fn total(&self) -> f64 {
        self.queued + (self.prompt - self.credit) + self.decode
    }
}

impl CostOptions {
    /// Largest weight that is accepted.
    pub const MAX_WEIGHT: f64 = 1000.0;
    /// Highest temperature that is accepted; beyond that it is random anyway.
    pub const MAX_TEMPERATURE: f64 = 100.0;

    /// Checks a weight.
    pub fn check_weight(weight: f64) -> Result<(), String> {
        if (0.0..=Self::MAX_WEIGHT).contains(&weight) {
            return Ok(());
        }
        Err(format!("overlap weight must lie in 0 to {}, not {weight}", Self::MAX_WEIGHT))
    }

    /// Checks a temperature.
    pub fn check_temperature(temperature: f64) -> Result<(), String> {
        if (0.0..=Self::MAX_TEMPERATURE).contains(&temperature) {
            return Ok(());
        }
        Err(format!("temperature must lie in 0 to {}, not {temperature}", Self::MAX_TEMPERATURE))
    }

    /// Checks all of them.
    pub fn check(&self) -> Result<(), String> {
        for (name, weight) in
            [("weight", self.overlap_weight), ("queue", self.queue_weight), ("decode", self.decode_weight)]
        {
            if !(0.0..=Self::MAX_WEIGHT).contains(&weight) {
                return Err(format!("{name} must lie in 0 to {}, not {weight}", Self::MAX_WEIGHT));
            }
        }
        for (name, credit) in [("host", self.credits.host), ("disk", self.credits.disk)] {
            if !(0.0..=1.0).contains(&credit) {
                return Err(format!("{name} must lie in 0 to 1, not {credit}"));
            }
        }
        Self::check_temperature(self.temperature)
    }

    /// The cost of a candidate, term by term.
    pub fn terms(&self, input: &CostInput) -> Terms {
        let block = f64::from(input.block_size.max(1));
        // 100 is ordinary.
        let speed = f64::from(input.weight.max(1)) / 100.0;
        let prompt = f64::from(input.prompt_tokens) / block;
        let held = self.credits.credit(&input.overlap).min(prompt);
        let coming = f64::from(input.coming).min(prompt - held);
        let coming_weight = self.coming_weight.min(self.overlap_weight);
        Terms {
            queued: self.queue_weight * (input.active_prefill_tokens as f64 / block) / speed,
            prompt: self.overlap_weight * prompt / speed,
            credit: (self.overlap_weight * held + coming_weight * coming) / speed,
            decode: self.decode_weight * (input.active_decode_blocks + input.requests) as f64 / speed,
        }
    }
}

/// The position of the choice: by chance among all within `tolerance` (a share) of the least, or
/// by softmax where `temperature` is above 0. `costs` must not be empty.
pub fn choose(costs: &[f64], temperature: f64, tolerance: f64, rng: &mut dyn Rng) -> usize {
    let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let most = costs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if temperature > 0.0 && most > least {
        let odds = |cost: f64| (-(cost - least) / ((most - least) * temperature)).exp();
        let mut ticket = rng.random_range(0.0..costs.iter().map(|c| odds(*c)).sum::<f64>());
        for (position, cost) in costs.iter().enumerate() {
            ticket -= odds(*cost);
            if ticket < 0.0 {
                return position;
            }
        }
        return costs.len().saturating_sub(1);
    }
    let good = least + tolerance * least.abs();
    super::policy::least(costs.iter().map(|cost| if *cost <= good { 0.0 } else { 1.0 }), rng)
}
