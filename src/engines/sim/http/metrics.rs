//! `/metrics` with vLLM's names, labels and help texts.

use std::fmt::Write;

use http::StatusCode;

use super::Reply;
use crate::engines::sim::engine::Engine;
use crate::engines::sim::pd::Protocol;
use crate::engines::sim::ranks::Ranks;
use crate::engines::sim::stats::{Histogram, Histograms, Stats};

/// Text in the exposition format; writing to a string cannot fail, so results are dropped. Each
/// metric has a sample of each rank.
struct Page<'a> {
    text: String,
    model: String,
    ranks: &'a Ranks,
}

impl Page<'_> {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}");
    }

    /// One sample; labels in alphabetical order, as Python's client writes them.
    fn sample(&mut self, name: &str, before: &str, after: &str, value: f64) {
        let model = &self.model;
        let _ = writeln!(self.text, "vllm:{name}{{{before}model_name=\"{model}\"{after}}} {value:?}");
    }

    fn plain(&mut self, name: &str, kind: &str, help: &str, value: impl Fn(&Stats) -> f64) {
        self.head(name, kind, help);
        for engine in self.ranks.iter() {
            self.sample(name, &engine_label(engine), "", value(&engine.stats));
        }
    }

    fn split(&mut self, name: &str, kind: &str, help: &str, label: &str, values: &[(&str, Read<'_>)]) {
        self.head(name, kind, help);
        for engine in self.ranks.iter() {
            let engine_label = engine_label(engine);
            for (case, value) in values {
                let value = value(&engine.stats);
                if label < "model_name" {
                    self.sample(name, &format!("{engine_label}{label}=\"{case}\","), "", value);
                } else {
                    self.sample(name, &engine_label, &format!(",{label}=\"{case}\""), value);
                }
            }
        }
    }

    fn histogram(&mut self, name: &str, help: &str, of: impl Fn(&Histograms) -> &Histogram) {
        self.head(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        for engine in self.ranks.iter() {
            let engine_label = engine_label(engine);
            let all = engine.stats.histograms.lock();
            let histogram = of(&all);
            for (bound, count) in histogram.buckets() {
                self.sample(&bucket, &format!("{engine_label}le=\"{bound:?}\","), "", count as f64);
            }
            let (count, sum) = histogram.totals();
            self.sample(&bucket, &format!("{engine_label}le=\"+Inf\","), "", count as f64);
            self.sample(&format!("{name}_count"), &engine_label, "", count as f64);
            self.sample(&format!("{name}_sum"), &engine_label, "", sum);
        }
    }
}

/// Reads a number.
type Read<'a> = &'a dyn Fn(&Stats) -> f64;

fn engine_label(engine: &Engine) -> String {
    format!("engine=\"{}\",", engine.rank)
}

/// Text as a label has it.
pub(super) fn label_value(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Metrics as a reply.
pub(super) fn page(text: String) -> Reply {
    Reply::new(StatusCode::OK, Some("text/plain; version=1.0.0; charset=utf-8"), text)
}

/// The page.
pub(super) fn render(ranks: &Ranks) -> Reply {
    let model = label_value(&ranks.first().args.models[0]);
    let mut page = Page { text: String::with_capacity(ranks.count() * (16 << 10)), model, ranks };
    process(&mut page);
    gauges(&mut page);
    counters(&mut page);
    if matches!(ranks.first().args.pd.protocol, Some(Protocol::VllmNixl | Protocol::VllmNixlPush)) {
        nixl(&mut page);
    }
    histograms(&mut page);
    cache_config(&mut page);
    self::page(page.text)
}

/// Of what Python's client says of the process: its start.
fn process(page: &mut Page<'_>) {
    let (name, started) = ("process_start_time_seconds", page.ranks.first().started.as_secs_f64());
    let help = "Start time of the process since unix epoch in seconds.";
    let _ = writeln!(page.text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {started:?}");
}

fn gauges(page: &mut Page<'_>) {
    let waiting = |stats: &Stats| stats.waiting.get() as f64;
    page.plain("num_requests_running", "gauge", "Number of requests in model execution batches.", |stats| {
        stats.running.get() as f64
    });
    page.plain("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", waiting);
    page.split(
        "num_requests_waiting_by_reason",
        "gauge",
        "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; \
         'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). Sum of all \
         reasons equals vllm:num_requests_waiting.",
        "reason",
        &[
            ("capacity", &|stats| stats.waiting.get().saturating_sub(stats.deferred.get()) as f64),
            ("deferred", &|stats| stats.deferred.get() as f64),
        ],
    );
    page.split(
        "engine_sleep_state",
        "gauge",
        "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; \
         weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.",
        "sleep_state",
        &[("awake", &|_| 1.0), ("weights_offloaded", &|_| 0.0), ("discard_all", &|_| 0.0)],
    );
    page.plain("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", |stats| {
        stats.kv_usage_ppm.get() as f64 / 1e6
    });
}

fn counters(page: &mut Page<'_>) {
    let cached = |stats: &Stats| stats.cached_tokens.get() as f64;
    let mut counter = |name: &str, help: &str, value: Read<'_>| page.plain(name, "counter", help, value);
    counter(
        "prefix_cache_queries_total",
        "Prefix cache queries, in terms of number of queried tokens.",
        &|stats| stats.cache_queries.get() as f64,
    );
    counter("prefix_cache_hits_total", "Prefix cache hits, in terms of number of cached tokens.", &cached);
    let external = "from KV connector cross-instance cache sharing, in terms of number of";
    counter(
        "external_prefix_cache_queries_total",
        &format!("External prefix cache queries {external} queried tokens."),
        &|stats| stats.external_queries.get() as f64,
    );
    counter(
        "external_prefix_cache_hits_total",
        &format!("External prefix cache hits {external} cached tokens."),
        &|stats| stats.external_tokens.get() as f64,
    );
    counter("num_preemptions_total", "Cumulative number of preemption from the engine.", &|stats| {
        stats.preemptions.get() as f64
    });
    counter("prompt_tokens_total", "Number of prefill tokens processed.", &|stats| {
        stats.prompt_tokens.get() as f64
    });
    page.split(
        "prompt_tokens_by_source_total",
        "counter",
        "Number of prompt tokens by source.",
        "source",
        &[
            ("local_compute", &|stats| stats.prefill_tokens.get() as f64),
            ("local_cache_hit", &cached),
            ("external_kv_transfer", &|stats| stats.external_tokens.get() as f64),
        ],
    );
    page.plain(
        "prompt_tokens_cached_total",
        "counter",
        "Number of cached prompt tokens (local + external).",
        |stats| {
            (stats.cached_tokens.get() + stats.external_tokens.get() - stats.recomputed_tokens.get()) as f64
        },
    );
    page.plain("generation_tokens_total", "counter", "Number of generation tokens processed.", |stats| {
        stats.generated_tokens.get() as f64
    });
    let [stop, length, abort, error] =
        [0, 1, 2, 3].map(|index| move |stats: &Stats| stats.finished[index].get() as f64);
    page.split(
        "request_success_total",
        "counter",
        "Count of successfully processed requests.",
        "finished_reason",
        &[
            ("stop", &stop),
            ("length", &length),
            ("abort", &abort),
            ("error", &error),
            ("repetition", &|_| 0.0),
        ],
    );
    page.head(
        "admission_rejections_total",
        "counter",
        "Number of admission attempts rejected by a queue limit, by reason.",
    );
    let rejected = page.ranks.iter().map(|engine| engine.stats.rejected.get()).sum::<u64>() as f64;
    page.sample("admission_rejections_total", "", ",reason=\"max_num_queued_reqs\"", rejected);
    page.sample("admission_rejections_total", "", ",reason=\"max_num_queued_tokens\"", 0.0);
}

/// What the connector counts.
fn nixl(page: &mut Page<'_>) {
    page.plain(
        "nixl_num_failed_transfers_total",
        "counter",
        "Number of failed NIXL KV Cache transfers.",
        |stats| stats.transfers_failed.get() as f64,
    );
    let help = "Number of failed NIXL KV Cache notifications.";
    page.plain("nixl_num_failed_notifications_total", "counter", help, |_| 0.0);
    page.plain(
        "nixl_num_kv_expired_reqs_total",
        "counter",
        "Number of requests that had their KV expire. NOTE: This metric is tracked on the P instance.",
        |stats| stats.transfers_expired.get() as f64,
    );
}

fn histograms(page: &mut Page<'_>) {
    page.histogram("request_prompt_tokens", "Number of prefill tokens processed.", |all| &all.prompt_tokens);
    page.histogram("request_generation_tokens", "Number of generation tokens processed.", |all| {
        &all.generation_tokens
    });
    page.histogram("iteration_tokens_total", "Histogram of number of tokens per engine_step.", |all| {
        &all.iteration_tokens
    });
    page.histogram("time_to_first_token_seconds", "Histogram of time to first token in seconds.", |all| {
        &all.time_to_first_token
    });
    page.histogram("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", |all| {
        &all.inter_token_latency
    });
    page.histogram("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", |all| {
        &all.e2e_latency
    });
    page.histogram(
        "request_queue_time_seconds",
        "Histogram of time spent in WAITING phase for request.",
        |all| &all.queue_time,
    );
}

fn cache_config(page: &mut Page<'_>) {
    let args = &page.ranks.first().args;
    let (block_size, blocks) = (args.block_size, args.blocks);
    let tokens = u64::from(block_size) * u64::from(blocks);
    page.head("cache_config_info", "gauge", "Information of the LLMEngine CacheConfig");
    for rank in page.ranks.iter().map(|engine| engine.rank) {
        let _ = writeln!(
            page.text,
            "vllm:cache_config_info{{_block_size_resolved=\"True\",block_size=\"{block_size}\",cache_dtype=\"auto\",\
         effective_attention_block_size=\"{block_size}\",enable_prefix_caching=\"True\",engine=\"{rank}\",\
         gpu_memory_utilization=\"0.92\",is_attention_free=\"False\",kv_cache_size_tokens=\"{tokens}\",\
         num_cpu_blocks=\"None\",num_gpu_blocks=\"{blocks}\",num_gpu_blocks_override=\"{blocks}\",\
         prefix_caching_hash_algo=\"xxh3\",sliding_window=\"None\",user_specified_block_size=\"True\"}} 1.0"
        );
    }
}
