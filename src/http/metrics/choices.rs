//! What is counted of choices: by which policy, how long they took, and how much of the prompts was
//! taken to be cached.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

use crate::routing::policy::POLICY_NAMES;
use crate::telemetry::histogram::{Histogram, OVERHEAD, TOKENS};

#[derive(Debug)]
pub(super) struct Choices {
    by_policy: [AtomicU64; POLICY_NAMES.len()],
    duration: Histogram,
    prompt: Histogram,
    cached: Histogram,
}

impl Default for Choices {
    fn default() -> Self {
        Self {
            by_policy: Default::default(),
            duration: Histogram::new(&OVERHEAD),
            prompt: Histogram::new(&TOKENS),
            cached: Histogram::new(&TOKENS),
        }
    }
}

impl Choices {
    /// A policy was asked, and it took so long with the look-up of the prompt.
    pub(super) fn made(&self, policy: &str, after: Duration) {
        self.duration.observe_time(after);
        if let Some(at) = POLICY_NAMES.iter().position(|name| *name == policy) {
            self.by_policy[at].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A prompt goes to a worker that has so much of it.
    pub(super) fn placed(&self, prompt_tokens: u32, cached: u32) {
        self.prompt.observe(prompt_tokens.into());
        self.cached.observe(cached.into());
    }

    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        let help = "Choices of a worker, those after a failed attempt too, by the policy that was asked";
        let mut family = encoder.encode_descriptor("selections", help, None, MetricType::Counter)?;
        for (name, count) in POLICY_NAMES.iter().zip(&self.by_policy) {
            let count = ConstCounter::new(count.load(Ordering::Relaxed));
            count.encode(family.encode_family(&[("policy", *name)])?)?;
        }
        let histograms = [
            ("selection_duration_seconds", "Looking a prompt up and choosing a worker", &self.duration),
            ("prompt_tokens", "Length of prompts that were looked at", &self.prompt),
            (
                "prompt_cached_tokens",
                "Of those, tokens that the chosen worker was taken to have cached",
                &self.cached,
            ),
        ];
        for (name, help, histogram) in histograms {
            let family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            histogram.snapshot().encode(family)?;
        }
        Ok(())
    }
}
