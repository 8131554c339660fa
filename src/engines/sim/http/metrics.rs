//! `/metrics` with vLLM's names, labels and help texts.

use std::fmt::Write;

use crate::engines::sim::engine::Engine;
use crate::engines::sim::stats::Histogram;

/// Text in the exposition format; writing to a string cannot fail, so results are dropped.
struct Page {
    text: String,
    model: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.text, "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}");
    }

    /// One sample; labels in alphabetical order, as Python's client writes them.
    fn sample(&mut self, name: &str, before: &str, after: &str, value: f64) {
        let model = &self.model;
        let _ = writeln!(self.text, "vllm:{name}{{{before}model_name=\"{model}\"{after}}} {value:?}");
    }

    fn plain(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        self.sample(name, "engine=\"0\",", "", value);
    }

    fn split(&mut self, name: &str, kind: &str, help: &str, label: &str, values: &[(&str, f64)]) {
        self.head(name, kind, help);
        for (case, value) in values {
            let label_text = format!("{label}=\"{case}\",");
            if label < "model_name" {
                self.sample(name, &format!("engine=\"0\",{label_text}"), "", *value);
            } else {
                let after = format!(",{label}=\"{case}\"");
                self.sample(name, "engine=\"0\",", &after, *value);
            }
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        for (bound, count) in histogram.buckets() {
            self.sample(&bucket, &format!("engine=\"0\",le=\"{bound:?}\","), "", count as f64);
        }
        let (count, sum) = histogram.totals();
        self.sample(&bucket, "engine=\"0\",le=\"+Inf\",", "", count as f64);
        self.sample(&format!("{name}_count"), "engine=\"0\",", "", count as f64);
        self.sample(&format!("{name}_sum"), "engine=\"0\",", "", sum);
    }
}

/// The page.
pub(super) fn render(engine: &Engine) -> String {
    let model = engine.args.models[0].replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let mut page = Page { text: String::with_capacity(16 << 10), model };
    gauges(&mut page, engine);
    counters(&mut page, engine);
    histograms(&mut page, engine);
    cache_config(&mut page, engine);
    page.text
}

fn gauges(page: &mut Page, engine: &Engine) {
    let stats = &engine.stats;
    let waiting = stats.waiting.get() as f64;
    page.plain(
        "num_requests_running",
        "gauge",
        "Number of requests in model execution batches.",
        stats.running.get() as f64,
    );
    page.plain("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", waiting);
    page.split(
        "num_requests_waiting_by_reason",
        "gauge",
        "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; \
         'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). Sum of all \
         reasons equals vllm:num_requests_waiting.",
        "reason",
        &[("capacity", waiting), ("deferred", 0.0)],
    );
    page.split(
        "engine_sleep_state",
        "gauge",
        "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; \
         weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.",
        "sleep_state",
        &[("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)],
    );
    page.plain(
        "kv_cache_usage_perc",
        "gauge",
        "KV-cache usage. 1 means 100 percent usage.",
        stats.kv_usage_ppm.get() as f64 / 1e6,
    );
}

fn counters(page: &mut Page, engine: &Engine) {
    let stats = &engine.stats;
    let cached = stats.cached_tokens.get() as f64;
    let prompt = stats.prompt_tokens.get() as f64;
    let mut counter = |name: &str, help: &str, value: f64| page.plain(name, "counter", help, value);
    counter(
        "prefix_cache_queries_total",
        "Prefix cache queries, in terms of number of queried tokens.",
        stats.cache_queries.get() as f64,
    );
    counter("prefix_cache_hits_total", "Prefix cache hits, in terms of number of cached tokens.", cached);
    let external = "from KV connector cross-instance cache sharing, in terms of number of";
    counter(
        "external_prefix_cache_queries_total",
        &format!("External prefix cache queries {external} queried tokens."),
        0.0,
    );
    counter(
        "external_prefix_cache_hits_total",
        &format!("External prefix cache hits {external} cached tokens."),
        0.0,
    );
    counter(
        "num_preemptions_total",
        "Cumulative number of preemption from the engine.",
        stats.preemptions.get() as f64,
    );
    counter("prompt_tokens_total", "Number of prefill tokens processed.", prompt);
    page.split(
        "prompt_tokens_by_source_total",
        "counter",
        "Number of prompt tokens by source.",
        "source",
        &[
            ("local_compute", stats.prefill_tokens.get() as f64),
            ("local_cache_hit", cached),
            ("external_kv_transfer", 0.0),
        ],
    );
    page.plain(
        "prompt_tokens_cached_total",
        "counter",
        "Number of cached prompt tokens (local + external).",
        cached,
    );
    page.plain(
        "generation_tokens_total",
        "counter",
        "Number of generation tokens processed.",
        stats.generated_tokens.get() as f64,
    );
    let [stop, length, abort, error] = [0, 1, 2, 3].map(|index| stats.finished[index].get() as f64);
    page.split(
        "request_success_total",
        "counter",
        "Count of successfully processed requests.",
        "finished_reason",
        &[("stop", stop), ("length", length), ("abort", abort), ("error", error), ("repetition", 0.0)],
    );
    page.head(
        "admission_rejections_total",
        "counter",
        "Number of admission attempts rejected by a queue limit, by reason.",
    );
    let rejected = stats.rejected.get() as f64;
    page.sample("admission_rejections_total", "", ",reason=\"max_num_queued_reqs\"", rejected);
    page.sample("admission_rejections_total", "", ",reason=\"max_num_queued_tokens\"", 0.0);
}

fn histograms(page: &mut Page, engine: &Engine) {
    let all = engine.stats.histograms.lock();
    page.histogram("request_prompt_tokens", "Number of prefill tokens processed.", &all.prompt_tokens);
    page.histogram(
        "request_generation_tokens",
        "Number of generation tokens processed.",
        &all.generation_tokens,
    );
    page.histogram(
        "iteration_tokens_total",
        "Histogram of number of tokens per engine_step.",
        &all.iteration_tokens,
    );
    page.histogram(
        "time_to_first_token_seconds",
        "Histogram of time to first token in seconds.",
        &all.time_to_first_token,
    );
    page.histogram(
        "inter_token_latency_seconds",
        "Histogram of inter-token latency in seconds.",
        &all.inter_token_latency,
    );
    page.histogram(
        "e2e_request_latency_seconds",
        "Histogram of e2e request latency in seconds.",
        &all.e2e_latency,
    );
    page.histogram(
        "request_queue_time_seconds",
        "Histogram of time spent in WAITING phase for request.",
        &all.queue_time,
    );
}

fn cache_config(page: &mut Page, engine: &Engine) {
    let (block_size, blocks) = (engine.args.block_size, engine.args.blocks);
    let tokens = u64::from(block_size) * u64::from(blocks);
    page.head("cache_config_info", "gauge", "Information of the LLMEngine CacheConfig");
    let _ = writeln!(
        page.text,
        "vllm:cache_config_info{{_block_size_resolved=\"True\",block_size=\"{block_size}\",cache_dtype=\"auto\",\
         effective_attention_block_size=\"{block_size}\",enable_prefix_caching=\"True\",engine=\"0\",\
         gpu_memory_utilization=\"0.92\",is_attention_free=\"False\",kv_cache_size_tokens=\"{tokens}\",\
         num_cpu_blocks=\"None\",num_gpu_blocks=\"{blocks}\",num_gpu_blocks_override=\"{blocks}\",\
         prefix_caching_hash_algo=\"xxh3\",sliding_window=\"None\",user_specified_block_size=\"True\"}} 1.0"
    );
}
