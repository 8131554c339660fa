//! A request: a pair is chosen, both of its groups get it, and their answers become one. Here in strict
//! mode, in `fixed` otherwise; of a client that can come back, in `held`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use tokio::time::timeout;

use super::fixed::nobody;
use super::legs::{Heads, Sending, send};
use super::prompt::Prompt;
use super::stream::{Strict, Unpacking};
use super::{Ksana, failure, fixed, held, of_error};
use crate::http::body::{BodyError, BodyLimits, FrontBody, collect};
use crate::http::front::Shard;
use crate::http::headers::{is_hop_by_hop, request_id};
use crate::http::keys::Caller;
use crate::http::metrics::{Outcome, Tracked};
use crate::http::routes::Route;
use crate::http::streams::create::may_come_back;
use crate::http::upstream::UpstreamBody;
use crate::ids::Group;
use crate::ksana::json::Json;

/// How long a request of strict mode waits to be sure that it knows all pairs.
const SETTLE: Duration = Duration::from_millis(300);
/// Largest answer that is read as a whole: one of strict mode that is no stream, or an error.
pub(super) const MAX_ANSWER: usize = 64 << 20;
/// How long an answer whose length is wrong stays open, so that what there is of it is on its way.
const LINGER: Duration = Duration::from_millis(20);

/// Serves a request of `caller`. Dropping the future, as happens when the client goes away, closes both legs; in
/// strict mode only once both have answered, as the reference notices no sooner.
pub(super) async fn forward(
    shard: &Arc<Shard>,
    ksana: &Ksana,
    route: Route,
    caller: Caller,
    request: Request<Incoming>,
) -> Response<FrontBody> {
    let mut tracked = shard.front.metrics.track(route);
    let id = request_id(request.headers());
    tracked.set_request_id(id.clone());
    let (head, body) = request.into_parts();
    let body = match collect(body, &shard.front.config.proxy.body).await {
        Ok(body) => body,
        Err(why) => return finished(tracked, of_error(&why)),
    };
    tracked.body_read();
    let options = &shard.front.config.proxy;
    let strict = ksana.options.strict;
    if let Some(relays) = shard.front.streams.get().filter(|_| !strict && may_come_back(&head.headers)) {
        // Counted where it is generated.
        let (route, trace) = tracked.pass_to_stream();
        let asked = held::Asked { route, head: &head, body: &body, request_id: &id, caller: &caller, trace };
        return match Box::pin(held::stream_out(shard, relays, asked)).await {
            Ok(response) => response,
            Err(why) => finished(shard.front.metrics.track(route), of_error(&why)),
        };
    }
    let target = match strict {
        true => head.uri.path(),
        false => head.uri.path_and_query().map_or(head.uri.path(), PathAndQuery::as_str),
    };
    let sending = Sending {
        strict,
        target: target.to_owned(),
        client: head.headers,
        request_id: id,
        passes_credentials: !shard.front.config.keys.is_closed(),
        body,
        head_limit: if strict { options.total_timeout } else { options.first_byte_timeout },
    };
    let is_generate = head.uri.path() == Route::KsanaGenerate.path();
    match strict {
        true => as_the_reference(shard, ksana, sending, is_generate, tracked).await,
        false => fixed::answer(shard, ksana, sending, is_generate, tracked).await,
    }
}

/// An answer whose end is known.
pub(super) fn finished(mut tracked: Tracked, response: Response<FrontBody>) -> Response<FrontBody> {
    tracked.set_status(response.status());
    let outcome = match response.status() {
        StatusCode::SERVICE_UNAVAILABLE => Outcome::NoWorker,
        status => Outcome::of(status),
    };
    tracked.finish(outcome);
    response
}

/// Waits until all is known here that was committed, for a while.
pub(super) async fn settle(shard: &Shard, limit: Duration) {
    let _ = timeout(limit, shard.front.control.read_barrier(Group::Control)).await;
}

async fn as_the_reference(
    shard: &Arc<Shard>,
    ksana: &Ksana,
    mut sending: Sending,
    is_generate: bool,
    tracked: Tracked,
) -> Response<FrontBody> {
    // A heartbeat that another replica has just answered may have changed what is active.
    settle(shard, SETTLE).await;
    let Some(pair) = ksana.pairs.any(&shard.front, &ksana.options.cluster) else {
        return finished(tracked, nobody().into_response());
    };
    let text = std::str::from_utf8(&sending.body).ok();
    let rewritten = text.and_then(|text| Json::parse(text).ok()).and_then(|json| json.to_text().ok());
    let (Some(body), Ok(id)) = (rewritten, ksana.ids.next(&shard.front.control).await) else {
        return finished(tracked, failure());
    };
    sending.body = body.into();
    // Goes on without the client.
    let booked = pair.book(&shard.front, &Prompt::default());
    let heads = tokio::spawn(send(Arc::clone(shard), sending, Arc::clone(&pair.route), id)).await;
    let Ok(Ok(heads)) = heads else { return finished(tracked, failure()) };
    for (role, ended) in heads.ended() {
        pair.ended(&shard.front, role, ended);
    }
    let Heads { prefill, decode, .. } = heads;
    let unpacking = Unpacking::of(decode.headers());
    if !prefill.body().is_chunked() {
        drop(prefill);
        let limit = shard.front.config.proxy.total_timeout;
        let whole = timeout(limit, whole(decode, unpacking)).await;
        return finished(tracked, whole.ok().flatten().unwrap_or_else(failure));
    }
    let merged = Strict::new(prefill.into_body(), decode.into_body(), unpacking, is_generate);
    let state = (merged, tracked, booked);
    let chunks = stream::unfold(state, |(mut merged, mut tracked, booked)| async move {
        match merged.next().await {
            Some(chunk) => Some((Ok::<_, BodyError>(chunk), (merged, tracked, booked))),
            None => {
                tracked.set_status(StatusCode::OK);
                tracked.finish(Outcome::Ok);
                None
            }
        }
    });
    streamed(HeaderValue::from_static("application/octet-stream"), Body::from_stream(chunks))
}

/// A decode node's answer with the reference's faults: its headers are repeated although the body was
/// unpacked, its length among them.
async fn whole(decode: Response<UpstreamBody>, mut unpacking: Unpacking) -> Option<Response<FrontBody>> {
    let (head, body) = decode.into_parts();
    let packed = collect(body, &unhurried()).await.ok()?;
    let bytes = Bytes::from(unpacking.take(&packed).ok()?);
    let said = head.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let body = match said {
        Some(said) if said != bytes.len() => {
            // The end comes a little later, and as the end of the connection.
            let pieces = stream::unfold(Some(bytes), |bytes| async move {
                match bytes {
                    Some(bytes) => Some((Ok::<_, BodyError>(bytes), None)),
                    None => {
                        tokio::time::sleep(LINGER).await;
                        None
                    }
                }
            });
            FrontBody::legs(Body::from_stream(pieces))
        }
        _ => FrontBody::full(bytes),
    };
    let mut response = Response::new(body);
    *response.status_mut() = head.status;
    for (name, value) in &head.headers {
        if !is_hop_by_hop(name) && *name != TRANSFER_ENCODING {
            response.headers_mut().insert(name.clone(), value.clone());
        }
    }
    Some(response)
}

fn unhurried() -> BodyLimits {
    // A node generates as slowly as it must.
    BodyLimits {
        total: Duration::from_secs(24 * 3600),
        grace: Duration::from_secs(24 * 3600),
        ..BodyLimits::of(MAX_ANSWER)
    }
}

fn streamed(content_type: HeaderValue, body: Body) -> Response<FrontBody> {
    let mut response = Response::new(FrontBody::legs(body));
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}
