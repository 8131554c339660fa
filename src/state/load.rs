//! Loads: what the replicas have booked on each worker.

use serde::{Deserialize, Serialize};

/// A change of what one replica has booked on one worker. Deltas commute, so a batch may sum
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
    /// Adds another delta for the same worker.
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
