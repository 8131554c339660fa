//! What a run came to: times, hit rate, and how evenly the work was spread, also over time.

use serde::Serialize;

use super::trace::Request;

/// One request of a run.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Done {
    /// When it was sent, in seconds.
    pub at: f64,
    /// Seconds to its first token; `None` if it failed.
    pub ttft: Option<f64>,
    /// Mean seconds between its tokens, if it had several.
    pub itl: Option<f64>,
    /// Prompt tokens.
    pub prompt: u32,
    /// Of those, found in a cache.
    pub cached: u32,
}

/// How evenly requests were spread at one time.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Spread {
    /// When, in seconds.
    pub at: f64,
    /// Most requests of a worker as a multiple of the mean; 1 is even.
    pub most_to_mean: f64,
}

/// All that a run left.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Run {
    /// Each request, in the order of the trace.
    pub requests: Vec<Done>,
    /// How evenly they were spread, every few seconds.
    pub spread: Vec<Spread>,
    /// Seconds from the first request to the last token.
    pub seconds: f64,
}

/// The figures of a run, as they are printed.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Summary {
    /// Requests sent.
    pub requests: usize,
    /// Of those, failed.
    pub errors: usize,
    /// That as a share of all.
    pub error_rate: f64,
    /// Seconds to the first token: the mean.
    pub mean_ttft_s: f64,
    /// The median.
    pub p50_ttft_s: f64,
    /// 90 %.
    pub p90_ttft_s: f64,
    /// 99 %.
    pub p99_ttft_s: f64,
    /// Seconds between tokens: the mean over requests.
    pub mean_itl_s: f64,
    /// The median.
    pub p50_itl_s: f64,
    /// 99 %.
    pub p99_itl_s: f64,
    /// Share of prompt tokens found in a cache.
    pub hit_rate: f64,
    /// That as a share of what one pooled cache reaches, where it was reckoned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hit_rate_of_bound: Option<f64>,
    /// Mean over time of the longest queue as a multiple of the mean one, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub imbalance: Option<f64>,
    /// Seconds from the first request to the last token.
    pub seconds: f64,
}

fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// The value below which a share of `sorted` lies, by nearest rank; 0 of nothing.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).or(sorted.last()).copied().unwrap_or(0.0)
}

impl Run {
    /// Times to the first token, sorted.
    pub fn ttfts(&self) -> Vec<f64> {
        let mut times: Vec<f64> = self.requests.iter().filter_map(|r| r.ttft).collect();
        times.sort_by(f64::total_cmp);
        times
    }

    /// Share of prompt tokens found in a cache.
    pub fn hit_rate(&self) -> f64 {
        hit_rate(self.requests.iter())
    }

    /// Hit rate of the requests of each part of the run, with the part's middle in seconds.
    pub fn hit_rates(&self, parts: usize) -> Vec<(f64, f64)> {
        let end = self.requests.iter().map(|r| r.at).fold(0.0, f64::max);
        let width = end / parts.max(1) as f64;
        let of = |part: usize| {
            let (from, to) = (part as f64 * width, (part + 1) as f64 * width);
            let inside = |at: f64| at >= from && (at < to || part + 1 == parts);
            (from + width / 2.0, hit_rate(self.requests.iter().filter(|r| inside(r.at))))
        };
        (0..parts).map(of).collect()
    }

    /// The figures, with the hit rate of the bound if there is one.
    pub fn summary(&self, bound: Option<f64>) -> Summary {
        let ttfts = self.ttfts();
        let mut itls: Vec<f64> = self.requests.iter().filter_map(|r| r.itl).collect();
        itls.sort_by(f64::total_cmp);
        let spread: Vec<f64> = self.spread.iter().map(|s| s.most_to_mean).collect();
        let errors = self.requests.len() - ttfts.len();
        Summary {
            requests: self.requests.len(),
            errors,
            error_rate: errors as f64 / self.requests.len().max(1) as f64,
            mean_ttft_s: mean(&ttfts),
            p50_ttft_s: quantile(&ttfts, 0.5),
            p90_ttft_s: quantile(&ttfts, 0.9),
            p99_ttft_s: quantile(&ttfts, 0.99),
            mean_itl_s: mean(&itls),
            p50_itl_s: quantile(&itls, 0.5),
            p99_itl_s: quantile(&itls, 0.99),
            hit_rate: self.hit_rate(),
            hit_rate_of_bound: bound.filter(|b| *b > 0.0).map(|bound| self.hit_rate() / bound),
            imbalance: (!spread.is_empty()).then(|| mean(&spread)),
            seconds: self.seconds,
        }
    }
}

fn hit_rate<'a>(requests: impl Iterator<Item = &'a Done>) -> f64 {
    let (mut prompt, mut cached) = (0_u64, 0_u64);
    for request in requests.filter(|r| r.ttft.is_some()) {
        prompt += u64::from(request.prompt);
        cached += u64::from(request.cached);
    }
    if prompt == 0 { 0.0 } else { cached as f64 / prompt as f64 }
}

/// Takes notes of a simulation, whose time is in nanoseconds.
#[derive(Debug)]
pub(super) struct Recorder {
    requests: Vec<Done>,
    first: Vec<u64>,
    arrived: Vec<u64>,
    /// Requests on each worker.
    queues: Vec<u32>,
    spread: Vec<Spread>,
    next_look: u64,
    last: u64,
}

/// Between two looks at how even it is.
const LOOK: u64 = 5_000_000_000;

impl Recorder {
    pub(super) fn new(requests: usize, workers: usize) -> Self {
        Self {
            requests: vec![Done::default(); requests],
            first: vec![0; requests],
            arrived: vec![0; requests],
            queues: vec![0; workers],
            spread: Vec::new(),
            next_look: LOOK,
            last: 0,
        }
    }

    pub(super) fn arrived(&mut self, request: usize, now: u64) {
        self.arrived[request] = now;
        self.requests[request].at = now as f64 / 1e9;
    }

    pub(super) fn placed(&mut self, worker: usize, now: u64) {
        self.look(now);
        self.queues[worker] += 1;
    }

    fn look(&mut self, now: u64) {
        if now < self.next_look {
            return;
        }
        self.next_look = now - now % LOOK + LOOK;
        let total: u32 = self.queues.iter().sum();
        if total > 0 {
            let most = self.queues.iter().copied().max().unwrap_or(0);
            let most_to_mean = f64::from(most) * self.queues.len() as f64 / f64::from(total);
            self.spread.push(Spread { at: now as f64 / 1e9, most_to_mean });
        }
    }

    pub(super) fn first_token(&mut self, request: usize, cached: u32, now: u64) {
        self.first[request] = now;
        self.requests[request].ttft = Some((now - self.arrived[request]) as f64 / 1e9);
        self.requests[request].cached = cached;
    }

    pub(super) fn ended(&mut self, request: usize, worker: usize, now: u64) {
        self.look(now);
        self.last = now;
        self.queues[worker] = self.queues[worker].saturating_sub(1);
        // Until the token counts are known: the sum, divided in `finish`.
        self.requests[request].itl = Some((now - self.first[request]) as f64 / 1e9);
    }

    pub(super) fn failed(&mut self, request: usize, worker: usize) {
        self.queues[worker] = self.queues[worker].saturating_sub(1);
        self.requests[request].ttft = None;
    }

    pub(super) fn finish(mut self, asked: &[Request]) -> Run {
        for (done, asked) in self.requests.iter_mut().zip(asked) {
            done.prompt = asked.input;
            done.itl = done.itl.filter(|_| asked.output > 1).map(|sum| sum / f64::from(asked.output - 1));
        }
        Run { requests: self.requests, spread: self.spread, seconds: self.last as f64 / 1e9 }
    }
}
