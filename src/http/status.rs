//! What the admin plane tells of workers and of this replica.

use std::sync::atomic::Ordering;

use super::front::Front;
use super::index::{caches, index};
use super::names;
use super::streams::gauges;
use crate::admin_types::{BreakerState, RecentError, StatusReply, WorkerStatus};
use crate::routing::breaker;
use crate::routing::view::{WorkerLive, WorkerView};
use crate::state::worker::WorkerRole;

/// A worker's breaker at a moment of [`Front::now_ms`]. One failed connection keeps requests
/// away as well, until a probe succeeds.
pub(super) fn breaker(live: &WorkerLive, now_ms: u64) -> BreakerState {
    match live.breaker.state(now_ms) {
        breaker::BreakerState::Open => BreakerState::Open,
        _ if live.unreachable.load(Ordering::Relaxed) => BreakerState::Open,
        breaker::BreakerState::HalfOpen => BreakerState::HalfOpen,
        breaker::BreakerState::Closed => BreakerState::Closed,
    }
}

/// One worker for people and tools.
pub(super) fn worker_status(worker: &WorkerView, now_ms: u64) -> WorkerStatus {
    let record = &worker.record;
    let load = worker.live.booked();
    WorkerStatus {
        id: record.spec.id.clone(),
        url: record.spec.url.clone(),
        engine: record.spec.engine,
        role: record.spec.role,
        connector: (record.spec.role != WorkerRole::Aggregated).then(|| record.spec.connector()),
        models: record.spec.models.iter().map(|m| m.name.clone()).collect(),
        online: record.online,
        drain: record.drain,
        source: record.spec.source,
        liveness: record.liveness,
        requests: load.requests,
        prefill_tokens: load.prefill_tokens,
        decode_blocks: load.decode_blocks,
        breaker: breaker(&worker.live, now_ms),
        reachable: !worker.live.unreachable.load(Ordering::Relaxed),
        generation: record.generation,
        weight: record.spec.weight,
        http2: record.spec.http2,
        max_requests: record.spec.max_requests,
        block_size: record.spec.block_size,
        capacity_blocks: record.spec.capacity_blocks,
        cache: None,
    }
}

/// Errors in a status; the newest.
const RECENT_ERRORS: usize = 16;

/// Everything about this replica and the cluster as it sees it.
pub(super) fn status(front: &Front) -> StatusReply {
    let errors = front.metrics.recent().list();
    let now_ms = front.now_ms();
    let mut caches = caches(&index(front).ranks);
    StatusReply {
        cluster: front.control.status(),
        workers: front
            .control
            .registry()
            .workers
            .iter()
            .map(|worker| WorkerStatus { cache: caches.remove(worker.id()), ..worker_status(worker, now_ms) })
            .collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_s: front.started.elapsed().as_secs(),
        requests_total: front.metrics.requests_taken(),
        name_troubles: names::troubles(front),
        streams: front.streams.get().map(|relays| gauges::numbers(relays)),
        recent_errors: errors
            .into_iter()
            .take(RECENT_ERRORS)
            .map(|(at_ms_ago, what)| RecentError { at_ms_ago, what })
            .collect(),
    }
}
