//! What the engine counts, for `/metrics` and `/sim/stats`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

/// How many finished requests the log keeps.
pub const LOG_LENGTH: usize = 1024;

/// A number that goes up, or a gauge.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it.
    pub fn add(&self, count: usize) {
        self.0.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Takes away from it.
    pub fn sub(&self, count: usize) {
        self.0.fetch_sub(count as u64, Ordering::Relaxed);
    }

    /// Replaces it.
    pub fn set(&self, value: usize) {
        self.0.store(value as u64, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A histogram with fixed bounds.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    sum: f64,
    count: u64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len()], sum: 0.0, count: 0 }
    }

    /// Counts a value in.
    pub fn observe(&mut self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum += value;
        self.count += 1;
    }

    /// Upper bounds with the number of values up to each.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        self.bounds.iter().zip(&self.counts).scan(0, |sum, (bound, count)| {
            *sum += count;
            Some((*bound, *sum))
        })
    }

    /// Number and sum of all values.
    pub fn totals(&self) -> (u64, f64) {
        (self.count, self.sum)
    }
}

const TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0];
const ITERATION: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16_384.0];
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const INTER_TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];

/// The histograms, locked once a step.
#[derive(Debug)]
pub struct Histograms {
    /// Prompt length of finished requests.
    pub prompt_tokens: Histogram,
    /// Output length of finished requests.
    pub generation_tokens: Histogram,
    /// Tokens in a step.
    pub iteration_tokens: Histogram,
    /// Arrival to first token.
    pub time_to_first_token: Histogram,
    /// One token to the next.
    pub inter_token_latency: Histogram,
    /// Arrival to end.
    pub e2e_latency: Histogram,
    /// Arrival to admission.
    pub queue_time: Histogram,
}

/// A finished request, as the log keeps it.
#[derive(Clone, Debug, Serialize)]
pub struct LogEntry {
    /// Id within the engine: `chatcmpl-…`, `cmpl-…-<prompt index>`.
    pub id: String,
    /// Prompt ids.
    pub prompt_tokens: usize,
    /// Of these out of the prefix cache.
    pub cached_tokens: usize,
    /// Generated ids.
    pub generated_tokens: usize,
    /// `stop`, `length`, `abort`; `disconnect` if the client went, `error` if the engine died.
    pub finish_reason: &'static str,
}

/// All counters of an engine.
#[derive(Debug)]
pub struct Stats {
    /// Sequences in the batch.
    pub running: Counter,
    /// Sequences waiting.
    pub waiting: Counter,
    /// KV usage in millionths.
    pub kv_usage_ppm: Counter,
    /// Sequences ever accepted.
    pub requests: Counter,
    /// Sequences dropped because the client went away.
    pub disconnected: Counter,
    /// Sequences that ended with `stop`, `length`, `abort`, and by the death of the engine.
    pub finished: [Counter; 4],
    /// Requests refused because too many waited.
    pub rejected: Counter,
    /// Sequences put back into the queue for want of blocks.
    pub preemptions: Counter,
    /// Ids generated.
    pub generated_tokens: Counter,
    /// Prompt ids of admitted sequences.
    pub prompt_tokens: Counter,
    /// Of these computed.
    pub prefill_tokens: Counter,
    /// Of these out of the prefix cache.
    pub cached_tokens: Counter,
    /// Ids looked up in the prefix cache.
    pub cache_queries: Counter,
    /// Prompt ids whose KV came from another engine.
    pub external_tokens: Counter,
    /// Prompt ids that another engine was asked for, or might have been.
    pub external_queries: Counter,
    /// Prompt ids that were computed although their KV had come: the last one of each prompt.
    pub recomputed_tokens: Counter,
    /// Sequences that wait for another engine; among `waiting`.
    pub deferred: Counter,
    /// Prefilled requests whose KV nobody fetched in time.
    pub transfers_expired: Counter,
    /// Transfers from another engine that failed.
    pub transfers_failed: Counter,
    /// Steps made.
    pub steps: Counter,
    /// HTTP handlers at work on inference.
    pub server_load: Counter,
    /// Distributions.
    pub histograms: Mutex<Histograms>,
    log: Mutex<VecDeque<LogEntry>>,
}

impl Default for Stats {
    fn default() -> Self {
        let zero = Counter::default;
        Self {
            running: zero(),
            waiting: zero(),
            kv_usage_ppm: zero(),
            requests: zero(),
            disconnected: zero(),
            finished: Default::default(),
            rejected: zero(),
            preemptions: zero(),
            generated_tokens: zero(),
            prompt_tokens: zero(),
            prefill_tokens: zero(),
            cached_tokens: zero(),
            cache_queries: zero(),
            external_tokens: zero(),
            external_queries: zero(),
            recomputed_tokens: zero(),
            deferred: zero(),
            transfers_expired: zero(),
            transfers_failed: zero(),
            steps: zero(),
            server_load: zero(),
            histograms: Mutex::new(Histograms {
                prompt_tokens: Histogram::new(TOKENS),
                generation_tokens: Histogram::new(TOKENS),
                iteration_tokens: Histogram::new(ITERATION),
                time_to_first_token: Histogram::new(FIRST_TOKEN),
                inter_token_latency: Histogram::new(INTER_TOKEN),
                e2e_latency: Histogram::new(REQUEST),
                queue_time: Histogram::new(REQUEST),
            }),
            log: Mutex::default(),
        }
    }
}

impl Stats {
    /// Notes a finished request; the oldest one falls out.
    pub fn log(&self, entry: LogEntry) {
        let mut log = self.log.lock();
        if log.len() == LOG_LENGTH {
            log.pop_front();
        }
        log.push_back(entry);
    }

    /// The finished requests that are still remembered, oldest first.
    pub fn log_entries(&self) -> Vec<LogEntry> {
        self.log.lock().iter().cloned().collect()
    }
}
