//! What a client may do with streams that it has begun: read on, look, list, cancel, forget, and hand
//! out the right to read one.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::answer::{Coming, resume};
use super::background;
use super::create::{After, EventId, RESUMABLE, STREAM, last_event_id};
use super::owner::{not_found, owned, unavailable};
use crate::http::body::{BodyLimits, FrontBody, collect};
use crate::http::call::{Call, misrouted};
use crate::http::errors::{ApiError, Code};
use crate::http::front::{Front, Shard};
use crate::http::routes::Route;
use crate::ids::StreamId;
use crate::relay::hub::Relays;
use crate::relay::reach::Glance;
use crate::relay::secret::{self, MOST_CAPABILITY_S};
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// Streams in one page of a list, if the client does not say.
const PAGE: usize = 20;
/// Most streams in one page.
const MOST_PAGE: usize = 100;
/// How long a capability is good, if the client does not say, seconds.
const CAPABILITY_S: u64 = 300;
/// Largest body of a request for a capability.
const TOKEN_BODY: usize = 1024;

/// A query string. Values are short words and numbers: nothing in them is encoded.
#[derive(Clone, Copy)]
pub(in crate::http) struct Query<'a>(pub(in crate::http) Option<&'a str>);

impl<'a> Query<'a> {
    pub(in crate::http) fn get(self, name: &str) -> Option<&'a str> {
        let pairs = self.0.unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        pairs.into_iter().find(|(is, _)| *is == name).map(|(_, value)| value)
    }

    /// A number without sign, of at most 19 digits.
    pub(super) fn number(self, name: &'static str) -> Result<Option<u64>, ApiError> {
        let Some(text) = self.get(name).filter(|text| !text.is_empty()) else { return Ok(None) };
        let digits = text.len() <= 19 && text.bytes().all(|byte| byte.is_ascii_digit());
        match digits.then(|| text.parse().ok()).flatten() {
            Some(number) => Ok(Some(number)),
            None => {
                let text = format!("`{name}` must be a number");
                Err(ApiError::new(Code::BadEventId, text).param(name).no_retry())
            }
        }
    }
}

/// Answers it.
pub(in crate::http) async fn answer(call: Call) -> Response<FrontBody> {
    try_answer(call).await.unwrap_or_else(|error| error.response())
}

async fn try_answer(call: Call) -> Result<Response<FrontBody>, ApiError> {
    let shard = Arc::clone(&call.shard);
    if call.route == Route::Streams {
        return list(&call);
    }
    let relays = shard.front.streams.get().ok_or_else(not_found)?;
    match (call.route, call.method().clone()) {
        (Route::Stream, Method::GET) => read(&call, relays).await,
        (Route::Stream, Method::DELETE) => {
            let id = stream_id(&call)?;
            owned(&shard, relays, id, &call.caller).await?;
            if !relays.end(id, true).await {
                return Err(unavailable());
            }
            let deleted = json!({"id": id.to_string(), "object": "stream", "deleted": true});
            Ok(json_of(StatusCode::OK, deleted.to_string()))
        }
        (Route::StreamCancel, Method::POST) => cancel(&call, relays).await,
        (Route::StreamToken, Method::POST) => token(call, relays).await,
        (Route::Response | Route::ResponseCancel, _) => background::answer(&call, relays).await,
        (route, _) => Err(misrouted(route)),
    }
}

fn stream_id(call: &Call) -> Result<StreamId, ApiError> {
    call.parameter().and_then(|id| StreamId::parse(&id)).ok_or_else(not_found)
}

/// Whether the capability in a request's query is good for the stream in its path. `None` where there
/// is none.
pub(in crate::http) fn capability(
    front: &Front,
    path: &str,
    query: Option<&str>,
) -> Option<Result<(), ApiError>> {
    let shown = Query(query).get("cap")?;
    let id = path.rsplit('/').next().and_then(StreamId::parse);
    let Some(secret) = front.streams.get().and_then(|relays| relays.directory.secret()) else {
        return Some(Err(no_cluster()));
    };
    let is_good = id.is_some_and(|id| secret::capability_is_good(&secret, id, shown));
    Some(if is_good { Ok(()) } else { Err(bad_capability()) })
}

fn bad_capability() -> ApiError {
    let text = "the capability in `cap` is not good for this stream, or not any more; ask for another with \
                POST /v1/streams/{id}/token";
    ApiError::new(Code::BadCapability, text).no_retry()
}

fn no_cluster() -> ApiError {
    let text = "this replica does not know the cluster yet; try again";
    ApiError::new(Code::ReplicaDown, text).retry_after(1)
}

async fn read(call: &Call, relays: &Arc<Relays>) -> Result<Response<FrontBody>, ApiError> {
    let (shard, headers) = (&call.shard, &call.head.headers);
    let status = wants_status(headers);
    // What cannot be meant is said before anything is looked up: of every stream, be it there or not.
    let reads = !status && call.head.method != Method::HEAD;
    let cursor = if reads { cursor(headers, call.query())? } else { None };
    let id = stream_id(call)?;
    if let Some((Some(stream), _)) = cursor
        && stream != id
    {
        let text = "the event id is of another stream than the one asked for";
        return Err(ApiError::new(Code::BadEventId, text).no_retry());
    }
    let record = match call.by_capability {
        true => {
            let record = relays.whereabouts(id).await.map_err(|_| unavailable())?;
            let here = || relays.get(id).map(|entry| entry.copy.order.principal);
            // It is not good for longer than the key that it was made with.
            let principal = record.as_ref().map(|record| record.principal).or_else(here);
            if principal.is_some_and(|principal| !shard.front.config.keys.has(&principal)) {
                return Err(bad_capability());
            }
            record
        }
        false => owned(shard, relays, id, &call.caller).await?,
    };
    if !reads {
        let glance = relays.glance(id, record.as_ref()).await;
        let mut response =
            json_of(StatusCode::OK, describe(shard, id, record.as_ref(), glance.as_ref())?.to_string());
        let map = response.headers_mut();
        if !status {
            // Nothing is attached for who only asks what there would be.
            map.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        }
        if let Ok(id) = HeaderValue::try_from(id.to_string()) {
            map.insert(STREAM, id);
        }
        let resumable = glance.and_then(|glance| glance.head?.resumable.name());
        if let Some(resumable) = resumable {
            map.insert(RESUMABLE, HeaderValue::from_static(resumable));
        }
        return Ok(response);
    }
    resume(shard, relays, id, Coming::Back(cursor.map(|(_, place)| place))).await
}

/// After which event a client reads on, and of which stream that is, if it says so: `Last-Event-ID`,
/// or else `?after=`, a number or a whole event id.
fn cursor(headers: &HeaderMap, query: Option<&str>) -> Result<Option<(Option<StreamId>, After)>, ApiError> {
    let query = Query(query);
    let event = match last_event_id(headers)? {
        None => query.get("after").and_then(EventId::parse),
        last => last,
    };
    match event {
        Some(event) => Ok(Some((Some(event.stream), event.place()))),
        None => Ok(query.number("after")?.map(|seq| (None, After { seq, of: None }))),
    }
}

/// Whether a client asks about a stream, not for its events.
fn wants_status(headers: &HeaderMap) -> bool {
    let accepted = || headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let names = |kind: &str| accepted().any(|value| value.to_ascii_lowercase().contains(kind));
    names("application/json") && !names("text/event-stream")
}

/// A stream for its client.
fn describe(
    shard: &Shard,
    id: StreamId,
    record: Option<&StreamRecord>,
    glance: Option<&Glance>,
) -> Result<Value, ApiError> {
    if record.is_none() && glance.is_none() {
        return Err(not_found());
    }
    let ended = glance.and_then(|glance| glance.ended).or(record.and_then(|record| record.ended));
    let order = glance.map(|glance| &glance.order);
    let head = glance.and_then(|glance| glance.head.as_deref());
    let path = |order: &str| order.split('?').next().unwrap_or_default().to_owned();
    Ok(json!({
        "id": id.to_string(),
        "object": "stream",
        "state": state(ended),
        "model": order.map(|order| order.model.as_str()).or(record.map(|record| &*record.model)),
        "route": order.map(|order| path(&order.target)),
        "worker": head.map(|head| head.worker.as_str()),
        "holder": record.map(|record| name_of(&shard.front, record.holder)),
        "attempt": glance.map(|glance| glance.attempt).or(record.map(|record| record.attempt)),
        "events": glance.map(|glance| glance.events),
        "resumable": head.and_then(|head| head.resumable.name()),
        "created": order.map(|order| order.created_s),
    }))
}

pub(super) fn state(ended: Option<StreamEnd>) -> &'static str {
    match ended {
        None => "running",
        Some(StreamEnd::Complete) => "completed",
        Some(StreamEnd::Failed) => "failed",
        Some(StreamEnd::Cancelled) => "cancelled",
    }
}

/// What a holder is called.
pub(super) fn name_of(front: &Front, holder: Holder) -> String {
    match holder {
        Holder::Replica(id) => {
            let status = front.control.status();
            if id == status.me {
                return status.name;
            }
            let member = status.members.into_iter().find(|member| member.id == id);
            member.map_or_else(|| id.to_string(), |member| member.info.name)
        }
        Holder::Agent(ix) => {
            let view = front.control.registry();
            let worker = view.workers.iter().find(|worker| worker.record.ix == ix);
            worker.map_or_else(|| "agent".to_owned(), |worker| format!("agent of {}", worker.id()))
        }
    }
}

/// The caller's own streams, by id, a page at a time.
fn list(call: &Call) -> Result<Response<FrontBody>, ApiError> {
    let front = &call.shard.front;
    let query = Query(call.query());
    let limit = match query.number("limit") {
        Ok(None) => PAGE,
        Ok(Some(limit @ 1..)) => usize::try_from(limit).unwrap_or(MOST_PAGE).min(MOST_PAGE),
        _ => {
            let text = format!("`limit` must be a number from 1 to {MOST_PAGE}");
            return Err(ApiError::new(Code::InvalidValue, text).param("limit").no_retry());
        }
    };
    let cursor = match query.get("after").filter(|text| !text.is_empty()).map(StreamId::parse) {
        Some(None) => {
            let text = "`after` must be the id of the last stream of the page before";
            return Err(ApiError::new(Code::InvalidValue, text).param("after").no_retry());
        }
        cursor => cursor.flatten(),
    };
    let principal = secret::principal(call.caller.key_id());
    let mut wanted = |id: StreamId, record: &StreamRecord| {
        cursor.is_none_or(|cursor| id > cursor) && secret::same(&record.principal, &principal)
    };
    let mut found = front.control.streams(&mut wanted, limit + 1);
    let has_more = found.len() > limit;
    found.truncate(limit);
    let data: Vec<Value> = found
        .iter()
        .map(|(id, record)| {
            json!({
                "id": id.to_string(),
                "object": "stream",
                "state": state(record.ended),
                "model": &*record.model,
                "holder": name_of(front, record.holder),
                "attempt": record.attempt,
            })
        })
        .collect();
    let last = found.last().map(|(id, _)| id.to_string());
    let page = json!({"object": "list", "data": data, "has_more": has_more, "last_id": last});
    Ok(json_of(StatusCode::OK, page.to_string()))
}

async fn cancel(call: &Call, relays: &Arc<Relays>) -> Result<Response<FrontBody>, ApiError> {
    let id = stream_id(call)?;
    let record = owned(&call.shard, relays, id, &call.caller).await?;
    let glance = relays.glance(id, record.as_ref()).await;
    let mut described = describe(&call.shard, id, record.as_ref(), glance.as_ref())?;
    if described["state"] == "running" {
        if !relays.end(id, false).await {
            return Err(unavailable());
        }
        described["state"] = state(Some(StreamEnd::Cancelled)).into();
    }
    Ok(json_of(StatusCode::OK, described.to_string()))
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct TokenRequest {
    expires_in: Option<u64>,
}

async fn token(mut call: Call, relays: &Arc<Relays>) -> Result<Response<FrontBody>, ApiError> {
    let id = stream_id(&call)?;
    owned(&call.shard, relays, id, &call.caller).await?;
    let body = collect(&mut call.body, &BodyLimits::of(TOKEN_BODY)).await?;
    let wanted = match body.trim_ascii() {
        [] => TokenRequest::default(),
        json => serde_json::from_slice(json).map_err(|_| {
            let text = "the body must be empty, or an object with `expires_in`, a number of seconds";
            ApiError::new(Code::InvalidValue, text).param("expires_in").no_retry()
        })?,
    };
    let seconds = wanted.expires_in.unwrap_or(CAPABILITY_S);
    if !(1..=MOST_CAPABILITY_S).contains(&seconds) {
        let text = format!("`expires_in` must be a number of seconds from 1 to {MOST_CAPABILITY_S}");
        return Err(ApiError::new(Code::InvalidValue, text).param("expires_in").no_retry());
    }
    let secret = relays.directory.secret().ok_or_else(no_cluster)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let granted = json!({"cap": secret::capability(&secret, id, seconds), "expires_at": now + seconds});
    Ok(json_of(StatusCode::OK, granted.to_string()))
}

/// A JSON answer that nobody keeps.
pub(super) fn json_of(status: StatusCode, json: String) -> Response<FrontBody> {
    let mut response = Response::new(FrontBody::full(json));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
