//! The node plane: engines and their agents register, heartbeat and leave.

use std::sync::Arc;

use axum::extract::{FromRequestParts, Path, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use serde_json::json;

use super::errors::{ApiError, Code};
use super::front::Shard;
use super::register::{MAX_NODE_BODY, read_json, register};
use super::status::worker_status;
use crate::admin_types::RegisterRequest;
use crate::ids::{Group, WorkerId};
use crate::routing::view::WorkerView;
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::worker::WorkerSource;

/// The routes, all behind the node token.
pub(super) fn router(shard: &Arc<Shard>) -> Router<Arc<Shard>> {
    Router::new()
        .route("/v1/nodes", get(list).post(join))
        .route("/v1/nodes/{id}", get(show).delete(leave))
        .route("/v1/nodes/{id}/heartbeat", post(heartbeat))
        .route_layer(from_fn_with_state(Arc::clone(shard), authenticate))
}

async fn authenticate(State(shard): State<Arc<Shard>>, request: Request, next: Next) -> Response {
    match shard.front.config.nodes.tokens.check(request.headers(), "node") {
        Ok(()) => next.run(request).await,
        Err(error) => {
            shard.front.metrics.reject(error.code.as_str());
            error.into_response()
        }
    }
}

async fn join(State(shard): State<Arc<Shard>>, request: Request) -> Result<Response, ApiError> {
    let wanted: RegisterRequest = read_json(request.into_body(), MAX_NODE_BODY).await?;
    let reply = register(&shard, wanted, WorkerSource::Node).await?;
    let status = if reply.replaced { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(reply)).into_response())
}

async fn heartbeat(
    State(shard): State<Arc<Shard>>,
    PathId(id): PathId,
) -> Result<Json<serde_json::Value>, ApiError> {
    let control = &shard.front.control;
    let mut known = control.heartbeat(&id);
    if !known {
        // It may have registered at another replica a moment ago.
        control.read_barrier(Group::Control).await?;
        known = control.heartbeat(&id);
    }
    let view = control.registry();
    let worker = view.worker(&id).filter(|_| known).ok_or_else(|| not_found(&id))?;
    Ok(Json(json!({
        "id": id,
        "online": worker.record.online,
        "drain": worker.record.drain,
        "interval_ms": shard.front.config.nodes.heartbeat_interval.as_millis() as u64,
    })))
}

async fn leave(
    State(shard): State<Arc<Shard>>,
    PathId(id): PathId,
) -> Result<Json<serde_json::Value>, ApiError> {
    remove(&shard, id, Some(WorkerSource::Node)).await
}

/// Removes a worker, for both planes.
pub(super) async fn remove(
    shard: &Shard,
    id: WorkerId,
    only_source: Option<WorkerSource>,
) -> Result<Json<serde_json::Value>, ApiError> {
    let command = ControlCommand::RemoveWorker { id: id.clone(), only_source };
    match shard.front.control.propose(command).await? {
        ControlOutcome::UnknownWorker => Err(not_found(&id)),
        ControlOutcome::Refused(why) => Err(ApiError::new(Code::Refused, why)),
        _ => {
            let message = format!("worker {id} is removed");
            Ok(Json(json!({"id": id, "removed": true, "message": message})))
        }
    }
}

async fn list(State(shard): State<Arc<Shard>>) -> Json<serde_json::Value> {
    let view = shard.front.control.registry();
    let nodes: Vec<_> =
        view.workers.iter().map(|worker| worker_status(worker, shard.front.now_ms())).collect();
    Json(json!({"object": "list", "data": nodes}))
}

async fn show(State(shard): State<Arc<Shard>>, PathId(id): PathId) -> Result<Response, ApiError> {
    let worker = find(&shard, id)?;
    Ok(Json(worker_status(&worker, shard.front.now_ms())).into_response())
}

/// Finds a worker by the id in a path.
pub(super) fn find(shard: &Shard, id: WorkerId) -> Result<Arc<WorkerView>, ApiError> {
    shard.front.control.registry().worker(&id).cloned().ok_or_else(|| not_found(&id))
}

/// A worker id from a path; what cannot be one is refused in the front's own shape.
pub(super) struct PathId(pub(super) WorkerId);

impl<S: Send + Sync> FromRequestParts<S> for PathId {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut http::request::Parts, state: &S) -> Result<Self, ApiError> {
        let invalid = |why: String| ApiError::new(Code::InvalidValue, why).param("id");
        let Path(id) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|_| invalid("the worker id in the path is not valid text".to_owned()))?;
        Ok(Self(WorkerId::parse(&id).map_err(invalid)?))
    }
}

/// No such worker.
pub(super) fn not_found(id: &WorkerId) -> ApiError {
    let text = format!(
        "worker {id} is not registered; register it with POST /v1/nodes, or see `everline worker list`"
    );
    ApiError::new(Code::WorkerNotFound, text).param("id")
}
