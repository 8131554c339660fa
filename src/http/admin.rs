//! The admin plane: what operators and the command line use.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{Method, StatusCode};
use serde_json::json;

use super::call::{Call, misrouted};
use super::errors::{ApiError, Code};
use super::front::Shard;
use super::index::index;
use super::names;
use super::nodes::{find, not_found, remove};
use super::register::register;
use super::routes::Route;
use super::status::{status, worker_status};
use crate::admin_types::{
    DrainRequest, KeysReply, MembersReply, MessageReply, RegisterRequest, WorkersReply,
};
use crate::cluster::api::MemberOp;
use crate::ids::Group;
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::worker::WorkerSource;

/// Answers an operator.
pub(super) async fn answer(call: Call) -> Result<Response, ApiError> {
    let shard = Arc::clone(&call.shard);
    if *call.method() == Method::GET {
        settle(&shard, call.query()).await?;
    }
    match (call.route, call.method()) {
        (Route::AdminStatus, &Method::GET) => Ok(Json(status(&shard.front)).into_response()),
        (Route::AdminWorkers, &Method::GET) => {
            let view = shard.front.control.registry();
            let now_ms = shard.front.now_ms();
            let workers = view.workers.iter().map(|worker| worker_status(worker, now_ms)).collect();
            Ok(Json(WorkersReply { workers }).into_response())
        }
        (Route::AdminWorkers, &Method::POST) => add_worker(&shard, call).await,
        (Route::AdminWorker, &Method::GET) => {
            Ok(Json(worker_status(&*find(&shard, call.worker_id()?)?, shard.front.now_ms())).into_response())
        }
        (Route::AdminWorker, &Method::DELETE) => remove(&shard, call.worker_id()?, None, None).await,
        (Route::AdminDrain, &Method::POST) => drain_worker(&shard, call).await,
        (Route::AdminStop, &Method::POST) => {
            shard.front.stop_asked.cancel();
            let message =
                "this replica stops as planned: it takes no new requests and hands its streams over".into();
            Ok(Json(MessageReply { message }).into_response())
        }
        (Route::AdminMembers, &Method::GET) => {
            Ok(Json(MembersReply { members: shard.front.control.status().members }).into_response())
        }
        (Route::AdminMembers, &Method::POST) => {
            let op: MemberOp = call.json().await?;
            let message = shard.front.control.member(op).await?;
            Ok(Json(MessageReply { message }).into_response())
        }
        (Route::AdminKeys, &Method::GET) => {
            let keys = &shard.front.config.keys;
            Ok(Json(KeysReply { required: keys.is_closed(), keys: keys.list() }).into_response())
        }
        (Route::AdminNames, &Method::GET) => Ok(names::show(&shard.front)),
        (Route::AdminIndex, &Method::GET) => Ok(Json(index(&shard.front)).into_response()),
        (route, _) => Err(misrouted(route)),
    }
}

/// With `?consistency=linearizable` waits until everything committed before is applied here.
pub(super) async fn settle(shard: &Shard, query: Option<&str>) -> Result<(), ApiError> {
    let asked = query.unwrap_or_default().split('&').find_map(|pair| pair.strip_prefix("consistency="));
    match asked {
        None | Some("local") => Ok(()),
        Some("linearizable") => Ok(shard.front.control.read_barrier(Group::Control).await?),
        Some(_) => {
            let text = "`consistency` must be `local` or `linearizable`";
            Err(ApiError::new(Code::InvalidValue, text).param("consistency"))
        }
    }
}

async fn add_worker(shard: &Shard, call: Call) -> Result<Response, ApiError> {
    let wanted: RegisterRequest = call.json().await?;
    let reply = register(shard, wanted, WorkerSource::Admin, None).await?;
    let status = if reply.replaced { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(reply)).into_response())
}

async fn drain_worker(shard: &Shard, call: Call) -> Result<Response, ApiError> {
    let id = call.worker_id()?;
    let DrainRequest { drain } = call.json().await?;
    let command = ControlCommand::DrainWorker { id: id.clone(), drain };
    match shard.front.control.propose(command).await? {
        ControlOutcome::UnknownWorker => Err(not_found(&id)),
        ControlOutcome::Refused(why) => Err(ApiError::new(Code::Refused, why)),
        _ => {
            let now = if drain { "gets no new requests" } else { "gets requests again" };
            let message = format!("worker {id} {now}");
            Ok(Json(json!({"id": id, "drain": drain, "message": message})).into_response())
        }
    }
}
