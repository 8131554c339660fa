//! Routes for the operator of the simulator, and abort by id.

use http::StatusCode;
use serde::Serialize;
use serde_json::Value;

use super::Reply;
use super::error::ApiError;
use crate::engines::sim::engine::Engine;
use crate::engines::sim::faults::FaultChange;
use crate::engines::sim::stats::LogEntry;

/// `POST /sim/faults`: sets what the body names and answers with all switches.
pub(super) fn set_faults(engine: &Engine, body: &[u8]) -> Reply {
    let change = match serde_json::from_slice::<FaultChange>(body) {
        Ok(change) => change,
        Err(error) => return Reply::error(&ApiError::bad_request(error.to_string(), None)),
    };
    match engine.set_faults(&change) {
        Ok(state) => Reply::ok(&state),
        Err(message) => Reply::error(&ApiError::bad_request(message, None)),
    }
}

#[derive(Serialize)]
struct StatsReply {
    running: u64,
    waiting: u64,
    total_requests: u64,
    aborted: u64,
    disconnected: u64,
    rejected: u64,
    preemptions: u64,
    generated_tokens: u64,
    prompt_tokens: u64,
    prefill_tokens: u64,
    cached_tokens: u64,
    kv_usage: f64,
    steps: u64,
    requests: Vec<LogEntry>,
}

/// `GET /sim/stats`. `aborted` counts disconnects too.
pub(super) fn stats(engine: &Engine) -> Reply {
    let stats = &engine.stats;
    Reply::ok(&StatsReply {
        running: stats.running.get(),
        waiting: stats.waiting.get(),
        total_requests: stats.requests.get(),
        aborted: stats.finished[2].get() + stats.disconnected.get(),
        disconnected: stats.disconnected.get(),
        rejected: stats.rejected.get(),
        preemptions: stats.preemptions.get(),
        generated_tokens: stats.generated_tokens.get(),
        prompt_tokens: stats.prompt_tokens.get(),
        prefill_tokens: stats.prefill_tokens.get(),
        cached_tokens: stats.cached_tokens.get(),
        kv_usage: stats.kv_usage_ppm.get() as f64 / 1e6,
        steps: stats.steps.get(),
        requests: stats.log_entries(),
    })
}

/// `POST /inference/v1/abort_requests`: always 200, whether or not an id matched.
pub(super) fn abort_requests(engine: &Engine, body: &[u8]) -> Reply {
    if !engine.args.enable_scale_out {
        let message =
            "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.";
        return Reply::error(&ApiError::with_status(StatusCode::FORBIDDEN, message));
    }
    let body: Value = match serde_json::from_slice(body) {
        Ok(body) => body,
        Err(error) => return Reply::error(&ApiError::not_json(body, &error)),
    };
    let Some(ids) = body.get("request_ids").and_then(Value::as_array) else {
        return Reply::error(&ApiError::missing("request_ids", &body));
    };
    engine.abort(ids.iter().filter_map(|id| id.as_str().map(ToOwned::to_owned)).collect());
    Reply::empty(StatusCode::OK)
}
