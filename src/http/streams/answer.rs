//! How a client that listens to a stream is answered: when its head goes out, and what is in it.
//!
//! A client that cannot come back gets no head before there is an event for it: whatever dies until
//! then, it asks again by itself. One that can come back gets the stream's id after a second at the
//! latest, though nobody knows yet how an engine will answer; what that turns out to be, or why there
//! is none, it reads in the body.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use tokio::time::{Instant, timeout_at};

use super::body::{Source, StreamBody};
use super::create::{After, RESUMABLE, STREAM};
use super::owner::{not_found, unavailable};
use crate::http::body::FrontBody;
use crate::http::errors::{ApiError, Code};
use crate::http::front::Shard;
use crate::http::relay::Ending;
use crate::http::routes::Route;
use crate::ids::StreamId;
use crate::relay::find::Missing;
use crate::relay::hub::Relays;
use crate::relay::listener::{Listener, Refused};
use crate::relay::order::{Framing, Head, Order};

const BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Longest wait for the head, and for the stream, before a client that can come back gets the stream's
/// id without it.
const EARLY: Duration = Duration::from_millis(1000);

/// How a client comes to a stream that has begun.
#[derive(Clone, Copy)]
pub(super) enum Coming {
    /// To read on, behind the event that it names.
    Back(Option<After>),
    /// With the request that began it, and the same key.
    Again,
}

/// Which route's a stream is.
fn route_of(order: &Order) -> Route {
    super::failing::route_of(order)
}

/// How a stream ends, in its client's dialect.
pub(super) fn ending_of(order: &Order) -> Ending {
    Ending::of(route_of(order))
}

/// Lets a client whose stream it is listen to it again.
pub(super) async fn resume(
    shard: &Shard,
    relays: &Arc<Relays>,
    id: StreamId,
    coming: Coming,
) -> Result<Response<FrontBody>, ApiError> {
    let after = match coming {
        Coming::Back(after) => after,
        Coming::Again => None,
    };
    let from = after.map_or(0, |after| after.seq.saturating_add(1));
    // Whether there are events is not known there before the head is.
    let early = match shard.front.ksana.is_some() {
        true => Instant::now() + relays.options.takeover + EARLY,
        false => Instant::now() + EARLY,
    };
    let mut looking = {
        let relays = Arc::clone(relays);
        Box::pin(async move { relays.resume(id, from, after.and_then(|after| after.of)).await })
    };
    let mut listener = match timeout_at(early, &mut looking).await {
        Ok(Ok(listener)) => listener,
        Ok(Err(Refused::Over)) => return Ok(nothing_more()),
        Ok(Err(refused)) => return Err(refusal(refused)),
        // Somebody is taking it over, or has to be found.
        Err(_) => return Ok(before_head(shard, id, Source::Looking(looking), Ending::Done)),
    };
    let route = route_of(&listener.order);
    let ending = Ending::of(route);
    let head = {
        let wait = poll_fn(|cx| listener.poll_head(cx));
        match has_events(route) {
            true => timeout_at(early, wait).await,
            false => Ok(wait.await),
        }
    };
    match head {
        Ok(Some(head)) if is_error(&head) => match coming {
            // Who names an event has read the error in its place.
            Coming::Back(Some(_)) => Ok(nothing_more()),
            Coming::Back(None) => Ok(before_head(shard, id, Source::Reading(listener), ending)),
            Coming::Again => Ok(with_head(shard, listener, &head, ending)),
        },
        Ok(Some(head)) => Ok(with_head(shard, listener, &head, ending)),
        Ok(None) => Err(lost_before_it_began()),
        Err(_) => Ok(before_head(shard, id, Source::Reading(listener), ending)),
    }
}

/// The answer to whoever began a stream.
pub(super) async fn first_answer(
    shard: &Shard,
    mut listener: Listener,
    route: Route,
    aware: bool,
) -> Response<FrontBody> {
    let (id, ending) = (listener.id, Ending::of(route));
    let wait = poll_fn(|cx| listener.poll_head(cx));
    let known = match aware && has_events(route) {
        true => timeout_at(Instant::now() + EARLY, wait).await,
        false => Ok(wait.await),
    };
    let head = match known {
        Ok(Some(head)) => head,
        Ok(None) => return lost_before_it_began().response_in(route.dialect()),
        Err(_) => return before_head(shard, id, Source::Reading(listener), ending),
    };
    if aware || head.framing == Framing::Raw {
        return with_head(shard, listener, &head, ending);
    }
    let first = tokio::select! {
        first = poll_fn(|cx| listener.poll_read(cx)) => first,
        () = shard.front.ending.cancelled() => {
            let stopping = ApiError::new(Code::ReplicaDown, "this replica is stopping; try again");
            return stopping.retry_after(1).response_in(route.dialect());
        }
    };
    match first {
        Ok(first) => {
            let body = StreamBody::new(Source::Reading(listener), id, ending, heartbeat(shard));
            answer(shard, id, &head, body.knowing(&head).beginning_with(first))
        }
        Err(_) => lost_before_it_began().response_in(route.dialect()),
    }
}

/// Whether a route's streams are events whoever answers: an engine's own route may be anything else,
/// and then its head has to be known first.
fn has_events(route: Route) -> bool {
    use Route::{Generate, KsanaGenerate, KsanaV1, KsanaV2, Unknown};
    !matches!(route, Generate | KsanaGenerate | KsanaV1 | KsanaV2 | Unknown)
}

/// Whether an error came in place of a stream.
fn is_error(head: &Head) -> bool {
    head.framing == Framing::Raw && head.status >= 400
}

fn heartbeat(shard: &Shard) -> Duration {
    shard.front.config.streams.heartbeat
}

fn lost_before_it_began() -> ApiError {
    ApiError::new(Code::UpstreamFailed, "the stream was lost before it began; try again")
}

/// This is what stops an EventSource.
fn nothing_more() -> Response<FrontBody> {
    let mut response = Response::new(FrontBody::full(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

pub(super) fn refusal(refused: Refused) -> ApiError {
    match refused {
        Refused::Missing(Missing::Unknown) | Refused::Over => not_found(),
        Refused::Missing(Missing::Forgotten) => {
            let text = "the stream has ended, and its events are forgotten";
            ApiError::new(Code::StreamExpired, text).no_retry()
        }
        Refused::Missing(Missing::Gone) => {
            let text = "the replicas that had this stream are gone, and nobody could go on with it";
            ApiError::new(Code::StreamLost, text).no_retry()
        }
        Refused::Missing(Missing::Unavailable) => unavailable(),
        Refused::Ahead { next } => {
            let text = format!("the stream has {next} events, and the event id is of a later one");
            ApiError::new(Code::CursorAhead, text).no_retry()
        }
        Refused::Stray => {
            let text = "the replicas that had this event are gone, and the stream went on from an earlier \
                        one; read it again from its start";
            ApiError::new(Code::StreamLost, text).no_retry()
        }
        Refused::Behind => {
            let text = "the events after this one are forgotten";
            ApiError::new(Code::StreamExpired, text).no_retry()
        }
        Refused::TooMany => {
            let text = "too many clients listen to this stream";
            ApiError::new(Code::TooManyListeners, text).retry_after(1)
        }
    }
}

/// Answers with the stream's own head.
fn with_head(shard: &Shard, listener: Listener, head: &Head, ending: Ending) -> Response<FrontBody> {
    let id = listener.id;
    let body = StreamBody::new(Source::Reading(listener), id, ending, heartbeat(shard));
    answer(shard, id, head, body.knowing(head))
}

/// Answers with the stream's id alone: the client can come back with it. What there is to say of the
/// stream comes as events, whatever it is.
fn before_head(shard: &Shard, id: StreamId, source: Source, ending: Ending) -> Response<FrontBody> {
    let body = StreamBody::new(source, id, ending, heartbeat(shard));
    let mut map = HeaderMap::new();
    note_events(&mut map, id);
    finish(shard, StatusCode::OK, map, body)
}

fn answer(shard: &Shard, id: StreamId, head: &Head, body: StreamBody) -> Response<FrontBody> {
    let mut map = head.header_map();
    if head.framing != Framing::Raw {
        match head.framing {
            Framing::Events => note_events(&mut map, id),
            _ => note_stream(&mut map, id),
        }
        let here = shard.front.streams.get().and_then(|relays| Some((relays.get(id)?, relays)));
        // Where memory is short less is kept than whoever comes back may ask for.
        let is_kept = here.is_none_or(|(entry, relays)| entry.copy.bound() >= relays.options.stream_bytes);
        if let Some(resumable) = head.resumable.name().filter(|_| is_kept) {
            map.insert(RESUMABLE, HeaderValue::from_static(resumable));
        }
    }
    finish(shard, StatusCode::from_u16(head.status).unwrap_or(StatusCode::OK), map, body)
}

fn note_events(map: &mut HeaderMap, id: StreamId) {
    map.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    map.insert(BUFFERING, HeaderValue::from_static("no"));
    note_stream(map, id);
}

fn note_stream(map: &mut HeaderMap, id: StreamId) {
    map.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Ok(id) = HeaderValue::try_from(id.to_string()) {
        map.insert(STREAM, id);
    }
}

fn finish(shard: &Shard, status: StatusCode, map: HeaderMap, body: StreamBody) -> Response<FrontBody> {
    let front = &shard.front;
    let body = body.leaving(front.leaving.clone(), front.ending.clone());
    let mut response = Response::new(FrontBody::stream(body));
    *response.status_mut() = status;
    *response.headers_mut() = map;
    response
}
