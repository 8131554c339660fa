//! Routes for the operator of the simulator, and abort by id.

use http::StatusCode;
use serde::Serialize;
use serde_json::Value;

use super::Reply;
use super::error::ApiError;
use crate::engines::sim::faults::FaultChange;
use crate::engines::sim::ranks::Ranks;
use crate::engines::sim::stats::LogEntry;
use crate::engines::sim::stats::{Counter, Stats};

/// `POST /sim/faults`: sets what the body names and answers with all switches.
pub(super) fn set_faults(ranks: &Ranks, body: &[u8]) -> Reply {
    let change = match serde_json::from_slice::<FaultChange>(body) {
        Ok(change) => change,
        Err(error) => return Reply::error(&ApiError::bad_request(error.to_string(), None)),
    };
    match ranks.set_faults(&change) {
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

/// `GET /sim/stats`, of all ranks together. `aborted` counts disconnects too.
pub(super) fn stats(ranks: &Ranks) -> Reply {
    let sum = |of: fn(&Stats) -> &Counter| ranks.iter().map(|engine| of(&engine.stats).get()).sum::<u64>();
    let disconnected = sum(|stats| &stats.disconnected);
    Reply::ok(&StatsReply {
        running: sum(|stats| &stats.running),
        waiting: sum(|stats| &stats.waiting),
        total_requests: sum(|stats| &stats.requests),
        aborted: sum(|stats| &stats.finished[2]) + disconnected,
        disconnected,
        rejected: sum(|stats| &stats.rejected),
        preemptions: sum(|stats| &stats.preemptions),
        generated_tokens: sum(|stats| &stats.generated_tokens),
        prompt_tokens: sum(|stats| &stats.prompt_tokens),
        prefill_tokens: sum(|stats| &stats.prefill_tokens),
        cached_tokens: sum(|stats| &stats.cached_tokens),
        kv_usage: sum(|stats| &stats.kv_usage_ppm) as f64 / 1e6 / ranks.count() as f64,
        steps: sum(|stats| &stats.steps),
        requests: ranks.iter().flat_map(|engine| engine.stats.log_entries()).collect(),
    })
}

/// `POST /inference/v1/abort_requests`: always 200, whether or not an id matched.
pub(super) fn abort_requests(ranks: &Ranks, body: &[u8]) -> Reply {
    if !ranks.first().args.enable_scale_out {
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
    let ids: Vec<String> = ids.iter().filter_map(|id| id.as_str().map(ToOwned::to_owned)).collect();
    ranks.iter().for_each(|engine| engine.abort(ids.clone()));
    Reply::empty(StatusCode::OK)
}
