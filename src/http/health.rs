//! `/livez`, `/readyz` and `/metrics`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde_json::json;

use super::errors::{ApiError, Code};
use super::front::{Front, Shard};
use super::gauges::Gauges;
use crate::relay::remote::Reach;

/// The process runs and answers; nothing else is looked at.
pub(super) async fn livez() -> &'static str {
    "ok\n"
}

/// Whether a load balancer should send requests here: joined, registry applied, all of it that there was
/// when this replica started, not draining, and what ids of streams are derived from known, which a new
/// cluster agrees on in its first moments. Without a quorum a replica keeps routing with what it knows, so it
/// stays ready.
pub(super) async fn readyz(State(shard): State<Arc<Shard>>, RawQuery(query): RawQuery) -> Response {
    let front = &shard.front;
    let verbose = query.is_some_and(|q| q.split('&').any(|p| p == "verbose" || p.starts_with("verbose=")));
    if let Some(remote) = &front.config.edge {
        return readyz_of_edge(front, remote.reach(), verbose);
    }
    let status = front.control.status();
    let draining = front.draining.is_cancelled();
    let joined = !status.cluster_id.is_empty() && status.down.is_none();
    let applied = front.control.registry().index > 0;
    let knows_secret = knows_secret(front);
    let ready = !draining && joined && applied && status.current && (knows_secret || !status.quorum);
    let check = |ok: bool, otherwise: &str| if ok { "ok".to_owned() } else { otherwise.to_owned() };
    let member = match &status.down {
        Some(why) => format!("down: {why}"),
        None => check(joined, "waiting to join a cluster"),
    };
    let checks = json!({
        "not_draining": check(!draining, "draining"),
        "cluster_joined": member,
        "registry_applied": check(applied, "nothing applied yet"),
        "caught_up": check(status.current, "has not applied yet what was committed before it started"),
        "streams_secret": check(knows_secret, "not agreed on yet"),
        "quorum": check(status.quorum, "degraded: no quorum"),
    });
    readiness(front, ready, verbose, checks)
}

/// The same of an edge: some replica answers, and there was a leader once. Without a quorum it stays
/// ready as replicas do, since streams run, and new ones begin.
fn readyz_of_edge(front: &Front, reach: Reach, verbose: bool) -> Response {
    let draining = front.draining.is_cancelled();
    let knows_secret = knows_secret(front);
    let check = |ok: bool, otherwise: &'static str| if ok { "ok" } else { otherwise };
    let checks = json!({
        "not_draining": check(!draining, "draining"),
        "replica_reachable": check(reach.replica, "no replica answers"),
        "leader_known": check(reach.led, "no leader was known yet"),
        "streams_secret": check(knows_secret, "not heard yet"),
        "quorum": check(reach.quorum, "degraded: no quorum"),
    });
    let ready = !draining && reach.replica && reach.led && (knows_secret || !reach.quorum);
    readiness(front, ready, verbose, checks)
}

/// Whether rights to read streams can be given and told, and streams be found by `Idempotency-Key`.
fn knows_secret(front: &Front) -> bool {
    front.streams.get().is_none_or(|relays| relays.directory.secret().is_some())
}

fn readiness(front: &Front, ready: bool, verbose: bool, checks: serde_json::Value) -> Response {
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if !verbose {
        return (code, if ready { "ok\n" } else { "not ready; see /readyz?verbose\n" }).into_response();
    }
    (code, Json(json!({"ready": ready, "replica": front.config.replica, "checks": checks}))).into_response()
}

/// The counters in OpenMetrics text.
pub(super) async fn metrics(State(shard): State<Arc<Shard>>) -> Response {
    let Ok(text) = shard.front.metrics.encode(Gauges(Arc::clone(&shard.front))) else {
        return ApiError::new(Code::Internal, "the metrics could not be encoded").into_response();
    };
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, content_type)], text).into_response()
}
