//! Streams as operators see them: what the cluster says of one, and what of it is at this replica.
//! Never anything of its content.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{Method, StatusCode};
use serde_json::json;

use super::calls::{Query, name_of, state};
use super::owner::unavailable;
use crate::admin_types::{StreamAtAgent, StreamCopy, StreamReply, StreamStatus, StreamsReply};
use crate::http::call::{Call, misrouted};
use crate::http::errors::{ApiError, Code};
use crate::http::front::Front;
use crate::http::routes::{Route, percent_decoded};
use crate::ids::StreamId;
use crate::relay::copy::{Copy, Role, Summary};
use crate::relay::hub::Relays;
use crate::state::streams::{Holder, StreamRecord};

/// Most streams in one answer.
const MOST_LISTED: usize = 1000;

/// Answers an operator.
pub(in crate::http) async fn answer(call: Call) -> Result<Response, ApiError> {
    let front = &call.shard.front;
    match (call.route, call.method()) {
        (Route::AdminStreams, &Method::GET) => {
            let page = Page::read(Query(call.query()))?;
            let mut wanted = |id: StreamId, record: &StreamRecord| page.has(id, record);
            let mut found = front.control.streams(&mut wanted, page.limit + 1);
            let more = found.len() > page.limit;
            found.truncate(page.limit);
            let streams = found.iter().map(|(id, record)| listed(front, *id, record)).collect();
            Ok(Json(StreamsReply { streams, more }).into_response())
        }
        (Route::AdminStream, &Method::GET) => {
            let id = stream_id(&call)?;
            let record = front.control.stream(id);
            let relays = front.streams.get();
            let entry = relays.and_then(|relays| relays.get(id));
            let copy = entry.map(|entry| copy_of(&entry.copy, &entry.copy.summary()));
            if record.is_none() && copy.is_none() {
                return Err(unknown(id));
            }
            let agent = match (&record, relays) {
                (Some(record), Some(relays)) => at_agent(front, relays, id, record.holder).await,
                _ => None,
            };
            let stream = record.map(|record| listed(front, id, &record));
            let replica = front.config.replica.clone();
            Ok(Json(StreamReply { replica, stream, copy, agent }).into_response())
        }
        (Route::AdminStreamCancel, &Method::POST) => {
            let id = stream_id(&call)?;
            let relays = front.streams.get().ok_or_else(|| unknown(id))?;
            cancel(front, relays, id).await
        }
        (route, _) => Err(misrouted(route)),
    }
}

/// Which streams are listed. It depends on what the cluster says alone, so that every replica has the
/// same page.
struct Page {
    /// Of these states; empty is of those that run.
    states: Vec<String>,
    all: bool,
    model: Option<String>,
    after: Option<StreamId>,
    limit: usize,
}

impl Page {
    fn read(query: Query<'_>) -> Result<Self, ApiError> {
        let bad = |name: &'static str, text: String| ApiError::new(Code::InvalidValue, text).param(name);
        let named = |name| query.get(name).filter(|text| !text.is_empty());
        let states: Vec<String> =
            named("state").map(|states| states.split(',').map(str::to_owned).collect()).unwrap_or_default();
        let known = ["running", "completed", "failed", "cancelled"];
        if !states.iter().all(|state| known.contains(&state.as_str())) {
            return Err(bad("state", format!("`state` must be some of {}", known.join(","))));
        }
        let model = match named("model").map(percent_decoded) {
            Some(None) => return Err(bad("model", "`model` is not valid text".to_owned())),
            model => model.flatten(),
        };
        let after = match named("after").map(StreamId::parse) {
            Some(None) => return Err(bad("after", "`after` must be a stream's id".to_owned())),
            after => after.flatten(),
        };
        let limit = match named("limit").map(str::parse) {
            None => MOST_LISTED,
            Some(Ok(limit @ 1..=MOST_LISTED)) => limit,
            Some(_) => {
                return Err(bad("limit", format!("`limit` must be a number from 1 to {MOST_LISTED}")));
            }
        };
        Ok(Self { all: query.get("all") == Some("true"), states, model, after, limit })
    }

    fn has(&self, id: StreamId, record: &StreamRecord) -> bool {
        let state = state(record.ended);
        let is_of = match self.states.is_empty() {
            true => self.all || record.ended.is_none(),
            false => self.states.iter().any(|wanted| wanted == state),
        };
        is_of
            && self.after.is_none_or(|after| id > after)
            && self.model.as_deref().is_none_or(|model| *model == *record.model)
    }
}

/// What the agent has of a stream that it holds.
async fn at_agent(front: &Front, relays: &Relays, id: StreamId, holder: Holder) -> Option<StreamAtAgent> {
    let Holder::Agent(_) = holder else { return None };
    let there = relays.glance_at(id, holder).await?;
    Some(StreamAtAgent {
        name: name_of(front, holder),
        state: state(there.ended).to_owned(),
        attempt: there.attempt,
        events: there.events,
        worker: there.head.map(|head| head.worker.clone()),
    })
}

async fn cancel(front: &Front, relays: &Arc<Relays>, id: StreamId) -> Result<Response, ApiError> {
    let record = front.control.stream(id);
    let here = relays.get(id);
    if record.is_none() && here.is_none() {
        return Err(unknown(id));
    }
    let ended = here.map(|entry| entry.copy.ended()).unwrap_or_default()
        || record.is_some_and(|record| record.ended.is_some());
    if !ended && !relays.end(id, false).await {
        return Err(unavailable());
    }
    let message = match ended {
        true => format!("stream {id} had ended already"),
        false => format!("stream {id} is cancelled"),
    };
    Ok((StatusCode::OK, Json(json!({"message": message}))).into_response())
}

fn stream_id(call: &Call) -> Result<StreamId, ApiError> {
    call.parameter().and_then(|id| StreamId::parse(&id)).ok_or_else(|| {
        let text = "the stream's id in the path must be st_ and 26 characters";
        ApiError::new(Code::InvalidValue, text).param("id")
    })
}

fn unknown(id: StreamId) -> ApiError {
    ApiError::new(Code::StreamNotFound, format!("there is no stream {id}, or it is forgotten"))
}

fn listed(front: &Front, id: StreamId, record: &StreamRecord) -> StreamStatus {
    let copy = front.streams.get().and_then(|relays| relays.get(id)).map(|entry| Arc::clone(&entry.copy));
    let order = copy.as_ref().map(|copy| &copy.order);
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    StreamStatus {
        id: id.to_string(),
        state: state(record.ended).to_owned(),
        model: record.model.to_string(),
        holder: name_of(front, record.holder),
        mirror: record.mirror.map(|id| name_of(front, Holder::Replica(id))),
        attempt: record.attempt,
        worker: copy.as_ref().and_then(|copy| worker_of(copy)),
        key: order.and_then(|order| order.key.clone()),
        age_s: order.map(|order| now_s.saturating_sub(order.created_s)),
    }
}

fn worker_of(copy: &Copy) -> Option<String> {
    copy.head().map(|head| head.worker.clone()).filter(|worker| !worker.is_empty())
}

fn copy_of(copy: &Copy, summary: &Summary) -> StreamCopy {
    let order = &copy.order;
    StreamCopy {
        role: match summary.role {
            Role::Holder => "holder",
            Role::Mirror => "copy",
            Role::Shadow => "passing",
        }
        .to_owned(),
        state: state(summary.ended).to_owned(),
        attempt: summary.attempt,
        events: summary.events,
        bytes: summary.bytes as u64,
        clients: summary.clients,
        age_ms: copy.since.elapsed().as_millis() as u64,
        worker: worker_of(copy),
        resumable: copy.head().and_then(|head| head.resumable.name()).map(str::to_owned),
        route: order.target.split('?').next().unwrap_or_default().to_owned(),
        key: order.key.clone(),
        request_id: order.request_id.clone(),
    }
}
