//! A simulated engine in virtual time: continuous batching with chunked prefill.
//!
//! ```text
//! step = base + per_sequence · sequences + per_kv_token · tokens in context of those decoding
//!      + Σ prefill chunk / rate · (1 + context before the chunk's middle / doubling)
//! ```
//!
//! A step takes at most `chunk` prompt tokens, in the order of arrival, and one token of each
//! request that decodes.

use std::collections::VecDeque;

use super::cache::BlockCache;
use super::trace::Request;

/// How fast an engine is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct EngineModel {
    /// Tokens in a KV block.
    pub block_size: u32,
    /// Seconds that any step takes.
    pub base: f64,
    /// Seconds more for each sequence.
    pub per_sequence: f64,
    /// Seconds more for each token in the context of a sequence that decodes.
    pub per_kv_token: f64,
    /// Prompt tokens a second, without context.
    pub rate: f64,
    /// Tokens of context at which prefill is half as fast.
    pub doubling: f64,
    /// Most prompt tokens in a step.
    pub chunk: u32,
    /// Most requests at once.
    pub sequences: usize,
}

impl EngineModel {
    /// The model of the published figures.
    pub fn new(block_size: u32) -> Self {
        Self {
            block_size,
            base: 8e-3,
            per_sequence: 30e-6,
            per_kv_token: 24e-9,
            rate: 12_000.0,
            doubling: 53_000.0,
            chunk: 8192,
            sequences: 256,
        }
    }
}

/// What a step brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A request's first token, with how many of its prompt's tokens were cached.
    FirstToken {
        /// Which request.
        request: usize,
        /// Prompt tokens found in the cache.
        cached: u32,
    },
    /// Its output fills another block.
    Grown {
        /// Which request.
        request: usize,
    },
    /// Its last token.
    Ended {
        /// Which request.
        request: usize,
    },
}

#[derive(Debug)]
struct Running {
    request: usize,
    /// Prompt tokens in the cache or computed.
    done: u32,
    cached: u32,
    /// Blocks of the prompt that are held by name.
    named: usize,
    output: u32,
    /// Blocks without a name that it keeps to its end.
    nameless: u64,
    chunk: u32,
}

/// One engine, without its cache, which several may share in a bound.
#[derive(Debug)]
pub struct Engine {
    model: EngineModel,
    waiting: VecDeque<usize>,
    running: Vec<Running>,
}

impl Engine {
    /// An idle one.
    pub fn new(model: EngineModel) -> Self {
        Self { model, waiting: VecDeque::new(), running: Vec::new() }
    }

    /// A request comes.
    pub fn push(&mut self, request: usize) {
        self.waiting.push_back(request);
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Requests it has.
    pub fn requests(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    /// Prompt tokens it has still to compute, if what waits finds nothing in the cache.
    pub fn backlog(&self, requests: &[Request]) -> u64 {
        let waiting = self.waiting.iter().map(|at| u64::from(requests[*at].input));
        let running = self.running.iter().map(|r| u64::from(requests[r.request].input - r.done));
        waiting.chain(running).sum()
    }

    /// Begins a step; how long it takes, or `None` if nothing can be done. Requests that can never
    /// fit into the cache are given to `refused`.
    pub fn begin(
        &mut self,
        requests: &[Request],
        cache: &mut BlockCache,
        refused: &mut Vec<usize>,
    ) -> Option<f64> {
        let model = self.model;
        let mut budget = model.chunk;
        let mut time = model.base;
        let mut prefill = |running: &mut Running, budget: &mut u32| {
            let chunk = (requests[running.request].input - running.done).min(*budget);
            *budget -= chunk;
            running.chunk = chunk;
            let context = f64::from(running.done) + f64::from(chunk) / 2.0;
            time += f64::from(chunk) / model.rate * (1.0 + context / model.doubling);
        };
        for running in &mut self.running {
            prefill(running, &mut budget);
        }
        while budget > 0 && self.running.len() < model.sequences {
            let Some(&request) = self.waiting.front() else { break };
            let asked = &requests[request];
            let matching = cache.matching(&asked.hashes);
            // One token at least must be computed to say what comes after it.
            let mut cached = matching;
            if cached as u64 * u64::from(model.block_size) >= u64::from(asked.input) {
                cached -= 1;
            }
            let blocks = u64::from(asked.input + asked.output).div_ceil(u64::from(model.block_size));
            let more = blocks - cached as u64;
            if !cache.admit(&asked.hashes, cached, more) {
                if !self.running.is_empty() || cache.in_use() > 0 {
                    break;
                }
                refused.push(request);
                self.waiting.pop_front();
                continue;
            }
            self.waiting.pop_front();
            let done = cached as u32 * model.block_size;
            let nameless = blocks - asked.hashes.len() as u64;
            let mut running =
                Running { request, done, cached: done, named: cached, output: 0, nameless, chunk: 0 };
            prefill(&mut running, &mut budget);
            self.running.push(running);
        }
        if self.running.is_empty() {
            return None;
        }
        let context: f64 = self
            .running
            .iter()
            .filter(|r| r.output > 0)
            .map(|r| f64::from(requests[r.request].input) + f64::from(r.output))
            .sum();
        Some(time + model.per_sequence * self.running.len() as f64 + model.per_kv_token * context)
    }

    /// Ends the step that was begun.
    pub fn end(&mut self, requests: &[Request], cache: &mut BlockCache, outcomes: &mut Vec<Outcome>) {
        let block = self.model.block_size;
        for running in &mut self.running {
            let asked = &requests[running.request];
            let request = running.request;
            if running.output == 0 {
                running.done += running.chunk;
                let computed = (running.done / block) as usize;
                for hash in &asked.hashes[running.named..computed.min(asked.hashes.len())] {
                    cache.computed(*hash);
                }
                running.named = running.named.max(computed.min(asked.hashes.len()));
                if running.done < asked.input {
                    continue;
                }
                outcomes.push(Outcome::FirstToken { request, cached: running.cached });
            }
            running.output += 1;
            if running.output == asked.output {
                outcomes.push(Outcome::Ended { request });
                let full = u64::from((asked.input + running.output) / block) - asked.hashes.len() as u64;
                cache.release(&asked.hashes, running.nameless, full);
            } else if (asked.input + running.output).is_multiple_of(block) {
                outcomes.push(Outcome::Grown { request });
            }
        }
        self.running.retain(|r| r.output < requests[r.request].output);
    }
}
