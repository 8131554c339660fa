//! Active health: asks workers that do not heartbeat how they are, and workers this replica
//! failed to connect to whether they are back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use tokio_util::sync::CancellationToken;

use super::fetch::{self, FetchError};
use super::front::{Front, Shard};
use super::upstream::Endpoint;
use crate::routing::view::WorkerView;
use crate::state::worker::Liveness;

/// Probes under way at once.
const MOST_AT_ONCE: usize = 32;

/// Probes until `shutdown`: one task for a replica. Each round starts a probe interval after
/// the last one began, give or take a tenth, so that replicas do not fall into step.
pub async fn run_prober(front: Arc<Front>, shutdown: CancellationToken) {
    let shard = Shard::new(front);
    let interval = shard.front.config.nodes.probe_interval;
    loop {
        let pause = interval.mul_f64(rand::random_range(0.9..1.1));
        let round = async {
            tokio::join!(probe_round(&shard), tokio::time::sleep(pause));
        };
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = round => {}
        }
    }
}

/// Asks a worker for `path`, for what it says about itself. `None` if it answers that there is
/// no such thing; an error if it does not answer, or something that cannot be used.
pub async fn ask_worker(
    shard: &Shard,
    worker: &WorkerView,
    path: &str,
    limit: Duration,
) -> Result<Option<Bytes>, String> {
    let spec = &worker.record.spec;
    let endpoint = Endpoint::parse(&spec.url, spec.http2).map_err(|why| why.to_string())?;
    match fetch::get(&shard.pool, &endpoint, path, limit).await {
        Ok(body) => Ok(Some(body)),
        Err(FetchError::Refused(status)) if status.is_client_error() => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// Posts JSON to a worker, for what it knows; an answer other than 2xx is an error.
pub async fn post_to_worker(
    shard: &Shard,
    worker: &WorkerView,
    path: &str,
    json: Bytes,
    limit: Duration,
) -> Result<Bytes, FetchError> {
    let spec = &worker.record.spec;
    let endpoint =
        Endpoint::parse(&spec.url, spec.http2).map_err(|why| FetchError::Connect(why.to_string()))?;
    fetch::post(&shard.pool, &endpoint, path, json, limit).await
}

async fn probe_round(shard: &Shard) {
    let view = shard.front.control.registry();
    let due = view.workers.iter().filter(|worker| is_due(worker)).cloned();
    let limit = shard.front.config.nodes.probe_timeout;
    stream::iter(due).for_each_concurrent(MOST_AT_ONCE, |worker| probe(shard, worker, limit)).await;
}

fn is_due(worker: &WorkerView) -> bool {
    worker.record.liveness == Liveness::Probe || worker.live.unreachable.load(Ordering::Relaxed)
}

async fn probe(shard: &Shard, worker: Arc<WorkerView>, limit: Duration) {
    let spec = &worker.record.spec;
    let answer = match Endpoint::parse(&spec.url, spec.http2) {
        Ok(endpoint) => fetch::get(&shard.pool, &endpoint, "/health", limit).await,
        Err(why) => Err(FetchError::Connect(why.to_string())),
    };
    match &answer {
        Ok(_) => worker.live.unreachable.store(false, Ordering::Relaxed),
        Err(FetchError::Connect(_)) => worker.live.unreachable.store(true, Ordering::Relaxed),
        Err(error) => tracing::debug!(worker = %worker.id(), %error, "probe failed"),
    }
    if worker.record.liveness == Liveness::Probe {
        shard.front.control.probed(worker.id(), answer.is_ok());
    }
}
