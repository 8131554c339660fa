//! What SGLang says of itself where vLLM has other routes or other names: `/server_info`, `/v1/loads` and,
//! with `--enable-metrics`, `/metrics`.

use std::fmt::Write;

use serde_json::{Value, json};

use super::Reply;
use crate::engines::sim::engine::{Engine, unix_time};
use crate::engines::sim::events::{EventFormat, KvPublisher};
use crate::engines::sim::pd::{Protocol, Role};
use crate::engines::sim::ranks::Ranks;

/// The version whose words these are.
const VERSION: &str = "0.5.23";

/// Whether the engine is to speak as SGLang does.
pub(super) fn is_spoken(engine: &Engine) -> bool {
    engine.args.kv_events_format == EventFormat::Sglang || engine.args.pd.protocol == Some(Protocol::Sglang)
}

/// KV tokens that a rank can hold.
fn capacity(engine: &Engine) -> u64 {
    u64::from(engine.args.blocks) * u64::from(engine.args.block_size)
}

fn usage(engine: &Engine) -> f64 {
    engine.stats.kv_usage_ppm.get() as f64 / 1e6
}

fn used(engine: &Engine) -> u64 {
    capacity(engine) * engine.stats.kv_usage_ppm.get() / 1_000_000
}

/// Share of the ids looked up that were cached, since the start; the real one's is of the last batch.
fn hit_rate(engine: &Engine) -> f64 {
    engine.stats.cached_tokens.get() as f64 / engine.stats.cache_queries.get().max(1) as f64
}

/// `GET /server_info`, which vLLM has only in its development mode: its settings, and its word on its events.
pub(super) fn server_info(ranks: &Ranks) -> Reply {
    let engine = ranks.first();
    let args = &engine.args;
    let mut info = json!({
        "model_path": args.models[0],
        "served_model_name": args.models[0],
        "page_size": args.block_size,
        "dp_size": args.dp,
        "enable_metrics": args.enable_metrics,
        "max_running_requests": args.max_running,
        "status": "ready",
        "max_total_num_tokens": capacity(engine),
        "version": VERSION,
        "disaggregation_mode": mode(engine),
        "disaggregation_bootstrap_port": ranks.bootstrap_port().unwrap_or(args.pd.disaggregation_bootstrap_port),
        "disaggregation_transfer_backend": "mooncake",
    });
    if let Some(events) = engine.kv_publisher().and_then(KvPublisher::server_info) {
        info["kv_events"] = events;
    }
    Reply::ok(&info)
}

/// What it is for, in SGLang's words.
fn mode(engine: &Engine) -> &'static str {
    match (engine.args.pd.protocol, engine.args.pd.role) {
        (Some(Protocol::Sglang), Some(Role::Prefill)) => "prefill",
        (Some(Protocol::Sglang), Some(Role::Decode)) => "decode",
        _ => "null",
    }
}

/// `GET /v1/loads`: an entry for each rank.
pub(super) fn loads(ranks: &Ranks) -> Reply {
    let load = |engine: &std::sync::Arc<Engine>| -> Value {
        let stats = &engine.stats;
        json!({
            "dp_rank": engine.rank,
            "num_running_reqs": stats.running.get(),
            "num_waiting_reqs": stats.waiting.get(),
            "num_waiting_uncached_tokens": 0,
            "num_used_tokens": used(engine),
            "num_total_tokens": used(engine),
            "max_total_num_tokens": capacity(engine),
            "max_running_requests": engine.args.max_running,
            "token_usage": usage(engine),
            "gen_throughput": 0.0,
            "cache_hit_rate": hit_rate(engine),
            "utilization": stats.running.get() as f64 / f64::from(engine.args.max_running),
        })
    };
    Reply::ok(&json!({
        "timestamp": unix_time().as_secs_f64(),
        "version": VERSION,
        "accelerator": "none",
        "num_accelerators": ranks.count(),
        "loads": ranks.iter().map(load).collect::<Vec<_>>(),
    }))
}

/// A metric: its name, its kind, what it is, and its value for a rank.
type Metric = (&'static str, &'static str, &'static str, fn(&Engine) -> f64);

const METRICS: [Metric; 14] = [
    ("num_running_reqs", "gauge", "The number of running requests.", |e| e.stats.running.get() as f64),
    ("num_queue_reqs", "gauge", "The number of requests in the waiting queue.", |e| {
        e.stats.waiting.get() as f64
    }),
    ("token_usage", "gauge", "The token usage.", usage),
    ("num_used_tokens", "gauge", "The number of used tokens.", |e| used(e) as f64),
    ("max_total_num_tokens", "gauge", "Maximum total number of tokens in the KV cache pool.", |e| {
        capacity(e) as f64
    }),
    ("page_size", "gauge", "The number of tokens in a page.", |e| f64::from(e.args.block_size)),
    ("cache_hit_rate", "gauge", "The prefix cache hit rate.", hit_rate),
    ("gen_throughput", "gauge", "The generation throughput (token/s).", |_| 0.0),
    (
        "num_prefill_bootstrap_queue_reqs",
        "gauge",
        "The number of requests in the prefill bootstrap queue.",
        |e| {
            if e.args.pd.is_prefill() { e.stats.deferred.get() as f64 } else { 0.0 }
        },
    ),
    (
        "num_decode_transfer_queue_reqs",
        "gauge",
        "The number of requests in the decode transfer queue.",
        |e| {
            if e.args.pd.is_decode() { e.stats.deferred.get() as f64 } else { 0.0 }
        },
    ),
    ("num_transfer_failed_reqs_total", "counter", "The number of transfer failed requests.", |e| {
        e.stats.transfers_failed.get() as f64
    }),
    ("prompt_tokens_total", "counter", "Number of prefill tokens processed.", |e| {
        e.stats.prompt_tokens.get() as f64
    }),
    ("generation_tokens_total", "counter", "Number of generation tokens processed.", |e| {
        e.stats.generated_tokens.get() as f64
    }),
    ("cached_tokens_total", "counter", "Number of cached prompt tokens.", |e| {
        e.stats.cached_tokens.get() as f64
    }),
];

/// `GET /metrics`. Writing to a string cannot fail, so results are dropped.
pub(super) fn metrics(ranks: &Ranks) -> Reply {
    let model = super::metrics::label_value(&ranks.first().args.models[0]);
    let engine_type = match mode(ranks.first()) {
        "null" => "unified",
        mode => mode,
    };
    let mut text = String::new();
    for (name, kind, help, value) in METRICS {
        let _ = writeln!(text, "# HELP sglang:{name} {help}\n# TYPE sglang:{name} {kind}");
        for engine in ranks.iter() {
            // Only ranks that have others beside them are numbered.
            let rank =
                if ranks.count() > 1 { format!("dp_rank=\"{}\",", engine.rank) } else { String::new() };
            let _ = writeln!(
                text,
                "sglang:{name}{{{rank}engine_type=\"{engine_type}\",model_name=\"{model}\",pp_rank=\"0\",tp_rank=\"0\"}} {:?}",
                value(engine)
            );
        }
    }
    super::metrics::page(text)
}
