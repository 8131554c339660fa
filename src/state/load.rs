//! Loads: what the replicas have booked on each rank of each worker.

use serde::{Deserialize, Serialize};

/// A change of what one replica has booked on one rank. Deltas commute, so a batch may sum
/// them; the sum of all deltas of a replica's life is what it holds right now.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct LoadDelta {
    /// Requests in flight.
    pub requests: i32,
    /// Prompt tokens whose prefill is outstanding.
    pub prefill_tokens: i64,
    /// KV blocks held.
    pub decode_blocks: i64,
}

impl LoadDelta {
    /// Adds another delta for the same rank.
    pub fn merge(&mut self, other: &LoadDelta) {
        self.requests += other.requests;
        self.prefill_tokens += other.prefill_tokens;
        self.decode_blocks += other.decode_blocks;
    }

    /// The delta that undoes this one.
    pub fn negated(&self) -> Self {
        Self {
            requests: -self.requests,
            prefill_tokens: -self.prefill_tokens,
            decode_blocks: -self.decode_blocks,
        }
    }

    /// Whether it changes nothing.
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

/// What is booked on one rank or worker, by one replica or by all.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct LoadSum {
    /// Requests in flight.
    pub requests: i64,
    /// Prompt tokens whose prefill is not known to be done.
    pub prefill_tokens: i64,
    /// KV blocks held by running requests, predicted.
    pub decode_blocks: i64,
}

impl LoadSum {
    /// The sum after a delta.
    pub fn plus(&self, d: &LoadDelta) -> Self {
        Self {
            requests: self.requests + i64::from(d.requests),
            prefill_tokens: self.prefill_tokens + d.prefill_tokens,
            decode_blocks: self.decode_blocks + d.decode_blocks,
        }
    }

    /// Both together.
    pub fn with(&self, other: &LoadSum) -> Self {
        Self {
            requests: self.requests + other.requests,
            prefill_tokens: self.prefill_tokens + other.prefill_tokens,
            decode_blocks: self.decode_blocks + other.decode_blocks,
        }
    }

    /// The sum without another's part.
    pub fn minus(&self, other: &LoadSum) -> Self {
        Self {
            requests: self.requests - other.requests,
            prefill_tokens: self.prefill_tokens - other.prefill_tokens,
            decode_blocks: self.decode_blocks - other.decode_blocks,
        }
    }

    /// Its share: `some` out of `of`; nothing where there are none.
    pub fn part(&self, some: i64, of: i64) -> Self {
        Self {
            requests: part(self.requests, some, of),
            prefill_tokens: part(self.prefill_tokens, some, of),
            decode_blocks: part(self.decode_blocks, some, of),
        }
    }

    /// The delta that brings it to zero. Requests beyond 2^31 do not occur (connections are
    /// bounded far below) and are cut to that.
    pub fn undo(&self) -> LoadDelta {
        LoadDelta {
            requests: i32::try_from(-self.requests).unwrap_or(if self.requests < 0 {
                i32::MAX
            } else {
                -i32::MAX
            }),
            prefill_tokens: -self.prefill_tokens,
            decode_blocks: -self.decode_blocks,
        }
    }

    /// Whether nothing is booked.
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    /// Without what is below zero.
    pub fn not_below_zero(&self) -> Self {
        Self {
            requests: self.requests.max(0),
            prefill_tokens: self.prefill_tokens.max(0),
            decode_blocks: self.decode_blocks.max(0),
        }
    }

    /// The members in order, for digests.
    pub fn as_array(&self) -> [i64; 3] {
        [self.requests, self.prefill_tokens, self.decode_blocks]
    }
}

/// The share of `n` that `some` out of `of` have; nothing where there are none.
pub fn part(n: i64, some: i64, of: i64) -> i64 {
    if of <= 0 {
        return 0;
    }
    // In more bits: these are tokens times tokens.
    i64::try_from(i128::from(n) * i128::from(some) / i128::from(of)).unwrap_or(n)
}
