//! The admin plane: what operators and the command line use.

use std::sync::Arc;

use axum::extract::{RawQuery, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use serde_json::json;

use super::errors::{ApiError, Code};
use super::front::Shard;
use super::nodes::{PathId, find, not_found, remove};
use super::register::{read_json, register};
use super::status::{status, worker_status};
use crate::admin_types::{
    DrainRequest, MembersReply, MessageReply, RegisterRequest, StatusReply, WorkerStatus, WorkersReply,
};
use crate::cluster::api::MemberOp;
use crate::ids::Group;
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::worker::WorkerSource;

/// Largest body of the admin plane.
const MAX_ADMIN_BODY: usize = 1 << 20;

/// The routes, all behind the admin token.
pub(super) fn router(shard: &Arc<Shard>) -> Router<Arc<Shard>> {
    Router::new()
        .route("/v1/admin/status", get(show_status))
        .route("/v1/admin/workers", get(list_workers).post(add_worker))
        .route("/v1/admin/workers/{id}", get(show_worker).delete(remove_worker))
        .route("/v1/admin/workers/{id}/drain", post(drain_worker))
        .route("/v1/admin/members", get(list_members).post(change_members))
        .route_layer(from_fn_with_state(Arc::clone(shard), authenticate))
}

async fn authenticate(State(shard): State<Arc<Shard>>, request: Request, next: Next) -> Response {
    match shard.front.config.admin_tokens.check(request.headers(), "admin") {
        Ok(()) => next.run(request).await,
        Err(error) => {
            shard.front.metrics.reject(error.code.as_str());
            error.into_response()
        }
    }
}

/// With `?consistency=linearizable` waits until everything committed before is applied here.
async fn settle(shard: &Shard, query: Option<String>) -> Result<(), ApiError> {
    let query = query.unwrap_or_default();
    let asked = query.split('&').find_map(|pair| pair.strip_prefix("consistency="));
    match asked {
        None | Some("local") => Ok(()),
        Some("linearizable") => Ok(shard.front.control.read_barrier(Group::Control).await?),
        Some(_) => {
            let text = "`consistency` must be `local` or `linearizable`";
            Err(ApiError::new(Code::InvalidValue, text).param("consistency"))
        }
    }
}

async fn show_status(
    State(shard): State<Arc<Shard>>,
    RawQuery(query): RawQuery,
) -> Result<Json<StatusReply>, ApiError> {
    settle(&shard, query).await?;
    Ok(Json(status(&shard.front)))
}

async fn list_workers(
    State(shard): State<Arc<Shard>>,
    RawQuery(query): RawQuery,
) -> Result<Json<WorkersReply>, ApiError> {
    settle(&shard, query).await?;
    let (view, now_ms) = (shard.front.control.registry(), shard.front.now_ms());
    Ok(Json(WorkersReply {
        workers: view.workers.iter().map(|worker| worker_status(worker, now_ms)).collect(),
    }))
}

async fn show_worker(
    State(shard): State<Arc<Shard>>,
    PathId(id): PathId,
    RawQuery(query): RawQuery,
) -> Result<Json<WorkerStatus>, ApiError> {
    settle(&shard, query).await?;
    Ok(Json(worker_status(&*find(&shard, id)?, shard.front.now_ms())))
}

async fn add_worker(State(shard): State<Arc<Shard>>, request: Request) -> Result<Response, ApiError> {
    let wanted: RegisterRequest = read_json(request.into_body(), MAX_ADMIN_BODY).await?;
    let reply = register(&shard, wanted, WorkerSource::Admin).await?;
    let status = if reply.replaced { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(reply)).into_response())
}

async fn remove_worker(
    State(shard): State<Arc<Shard>>,
    PathId(id): PathId,
) -> Result<Json<serde_json::Value>, ApiError> {
    remove(&shard, id, None).await
}

async fn drain_worker(
    State(shard): State<Arc<Shard>>,
    PathId(id): PathId,
    request: Request,
) -> Result<Json<serde_json::Value>, ApiError> {
    let DrainRequest { drain } = read_json(request.into_body(), MAX_ADMIN_BODY).await?;
    let command = ControlCommand::DrainWorker { id: id.clone(), drain };
    match shard.front.control.propose(command).await? {
        ControlOutcome::UnknownWorker => Err(not_found(&id)),
        ControlOutcome::Refused(why) => Err(ApiError::new(Code::Refused, why)),
        _ => {
            let now = if drain { "gets no new requests" } else { "gets requests again" };
            Ok(Json(json!({"id": id, "drain": drain, "message": format!("worker {id} {now}")})))
        }
    }
}

async fn list_members(
    State(shard): State<Arc<Shard>>,
    RawQuery(query): RawQuery,
) -> Result<Json<MembersReply>, ApiError> {
    settle(&shard, query).await?;
    Ok(Json(MembersReply { members: shard.front.control.status().members }))
}

async fn change_members(
    State(shard): State<Arc<Shard>>,
    request: Request,
) -> Result<Json<MessageReply>, ApiError> {
    let op: MemberOp = read_json(request.into_body(), MAX_ADMIN_BODY).await?;
    let message = shard.front.control.member(op).await?;
    Ok(Json(MessageReply { message }))
}
