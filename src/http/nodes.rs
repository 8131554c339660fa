//! The node plane: engines and their agents register, heartbeat and leave.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{Method, StatusCode};
use serde_json::json;

use super::announced;
use super::body::{BodyLimits, collect};
use super::call::{Call, misrouted};
use super::errors::{ApiError, Code};
use super::front::Shard;
use super::register::register;
use super::routes::{HEARTBEAT_BYTES, Route};
use super::status::worker_status;
use crate::admin_types::{HeartbeatRequest, RegisterRequest};
use crate::ids::{Group, WorkerId};
use crate::routing::view::WorkerView;
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::worker::WorkerSource;

/// Answers a node.
pub(super) async fn answer(call: Call) -> Result<Response, ApiError> {
    let shard = Arc::clone(&call.shard);
    match (call.route, call.method()) {
        (Route::Nodes, &Method::GET) => {
            let view = shard.front.control.registry();
            let now_ms = shard.front.now_ms();
            let nodes: Vec<_> = view.workers.iter().map(|worker| worker_status(worker, now_ms)).collect();
            Ok(Json(json!({"object": "list", "data": nodes})).into_response())
        }
        (Route::Nodes, &Method::POST) => join(&shard, call).await,
        (Route::Node, &Method::GET) => {
            Ok(Json(worker_status(&*find(&shard, call.worker_id()?)?, shard.front.now_ms())).into_response())
        }
        (Route::Node, &Method::DELETE) => {
            let id = call.worker_id()?;
            check_grant(&shard, &call, &id)?;
            remove(&shard, id, Some(WorkerSource::Node), call.node.owner).await
        }
        (Route::Heartbeat, &Method::POST) => heartbeat(&shard, call).await,
        (route, _) => Err(misrouted(route)),
    }
}

async fn join(shard: &Shard, call: Call) -> Result<Response, ApiError> {
    let node = call.node.clone();
    let wanted: RegisterRequest = call.json().await?;
    node.check_role(wanted.role.unwrap_or_default())?;
    let reply = register(shard, wanted, WorkerSource::Node, node.owner).await?;
    let status = if reply.replaced { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(reply)).into_response())
}

async fn heartbeat(shard: &Shard, mut call: Call) -> Result<Response, ApiError> {
    let id = call.worker_id()?;
    let control = &shard.front.control;
    check_grant(shard, &call, &id)?;
    let said = heartbeat_request(&mut call).await?;
    let mut known = control.heartbeat(&id);
    if !known {
        // It may have registered at another replica a moment ago.
        control.read_barrier(Group::Control).await?;
        check_grant(shard, &call, &id)?;
        known = control.heartbeat(&id);
    }
    let view = control.registry();
    let worker = view.worker(&id).filter(|_| known).ok_or_else(|| not_found(&id))?;
    announced::hear(&shard.front, worker, &said)?;
    let body = json!({
        "id": id,
        "online": worker.record.online,
        "drain": worker.record.drain,
        "interval_ms": shard.front.config.nodes.heartbeat_interval.as_millis() as u64,
    });
    Ok(Json(body).into_response())
}

/// What it says besides. Members of a later version are left out.
async fn heartbeat_request(call: &mut Call) -> Result<HeartbeatRequest, ApiError> {
    let body = collect(&mut call.body, &BodyLimits::of(HEARTBEAT_BYTES)).await?;
    match body.trim_ascii() {
        [] => Ok(HeartbeatRequest::default()),
        json => serde_json::from_slice(json).map_err(|error| {
            let text = format!("the body must be empty, or an object with `running` and `ended`: {error}");
            ApiError::new(Code::InvalidValue, text)
        }),
    }
}

/// A token has no say about workers of other roles, nor about those of other tokens.
fn check_grant(shard: &Shard, call: &Call, id: &WorkerId) -> Result<(), ApiError> {
    match shard.front.control.registry().worker(id) {
        Some(worker) => {
            call.node.check_role(worker.record.spec.role)?;
            call.node.check_owner(&worker.record)
        }
        None => Ok(()),
    }
}

/// Removes a worker, for both planes.
pub(super) async fn remove(
    shard: &Shard,
    id: WorkerId,
    only_source: Option<WorkerSource>,
    owner: Option<String>,
) -> Result<Response, ApiError> {
    let command = ControlCommand::RemoveWorker { id: id.clone(), only_source, owner };
    match shard.front.control.propose(command).await? {
        ControlOutcome::UnknownWorker => Err(not_found(&id)),
        ControlOutcome::Refused(why) => Err(ApiError::new(Code::Refused, why)),
        _ => {
            let message = format!("worker {id} is removed");
            Ok(Json(json!({"id": id, "removed": true, "message": message})).into_response())
        }
    }
}

/// Finds a worker by the id in a path.
pub(super) fn find(shard: &Shard, id: WorkerId) -> Result<Arc<WorkerView>, ApiError> {
    shard.front.control.registry().worker(&id).cloned().ok_or_else(|| not_found(&id))
}

/// No such worker.
pub(super) fn not_found(id: &WorkerId) -> ApiError {
    let text = format!(
        "worker {id} is not registered; register it with POST /v1/nodes, or see `everline worker list`"
    );
    ApiError::new(Code::WorkerNotFound, text).param("id")
}
