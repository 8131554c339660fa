//! A request in fixed mode. Nothing is sent to the client before a node has said something; until then a
//! failure costs another attempt, at another pair and under a new number. Afterwards it is told.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use tokio::time::Instant;

use super::Ksana;
use super::legs::{Heads, Sending, send};
use super::named::Ended;
use super::pairs::{Booked, Pair};
use super::prompt;
use super::proxy::{MAX_ANSWER, finished, settle};
use super::stream::{Merged, Next};
use crate::http::body::{BodyError, BodyLimits, FrontBody, collect};
use crate::http::errors::ApiError;
use crate::http::front::Shard;
use crate::http::growth::Growth;
use crate::http::headers::is_hop_by_hop;
use crate::http::metrics::{Outcome, Tracked};
use crate::http::upstream::UpstreamBody;
use crate::ksana::json::Json;
use crate::ksana::merge::DONE;
use crate::ksana::reply::detail;
use crate::state::ksana::Role;

/// How long a request waits that knows no pair: its replica may have just started.
const CATCH_UP: Duration = Duration::from_millis(1500);

const TOO_LONG: &str = "the request took longer than it may";

/// Why a request did not begin.
pub(super) enum Refusal {
    /// Ours.
    Ours(StatusCode, String),
    /// The cluster's.
    Cluster(ApiError),
    /// The engine's own word on the request.
    Engine(StatusCode, Option<HeaderValue>, Bytes),
}

impl Refusal {
    /// As an answer has it.
    pub(super) fn into_parts(self) -> (StatusCode, HeaderMap, Bytes) {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self {
            Self::Ours(status, text) => (status, headers, detail(&text).into()),
            Self::Cluster(error) => {
                error.add_headers(&mut headers);
                (error.code.status(), headers, detail(&error.message).into())
            }
            Self::Engine(status, content_type, body) => {
                headers.remove(CONTENT_TYPE);
                headers.extend(content_type.map(|content_type| (CONTENT_TYPE, content_type)));
                (status, headers, body)
            }
        }
    }

    /// As an answer.
    pub(super) fn into_response(self) -> Response<FrontBody> {
        let (status, headers, body) = self.into_parts();
        let mut response = Response::new(FrontBody::full(body));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }
}

/// What the reference says where there is no pair.
pub(super) fn nobody() -> Refusal {
    Refusal::Ours(StatusCode::SERVICE_UNAVAILABLE, "No available nodes for processing".to_owned())
}

/// Why an attempt brought nothing.
enum Failed {
    /// Another pair may do better; whether a node has seen the request.
    Retry(String, bool),
    /// Nothing will.
    Refused(Refusal),
}

/// Answers a request.
pub(super) async fn answer(
    shard: &Arc<Shard>,
    ksana: &Ksana,
    sending: Sending,
    is_generate: bool,
    mut tracked: Tracked,
) -> Response<FrontBody> {
    let deadline = Instant::now() + shard.front.config.proxy.total_timeout;
    match begin(shard, ksana, sending, is_generate, &mut tracked, deadline).await {
        Ok(begun) => begun.into_response(tracked, deadline),
        Err(refusal) => finished(tracked, refusal.into_response()),
    }
}

/// Has a request answered by one pair or another, as far as its first output.
pub(super) async fn begin(
    shard: &Arc<Shard>,
    ksana: &Ksana,
    sending: Sending,
    is_generate: bool,
    tracked: &mut Tracked,
    deadline: Instant,
) -> Result<Begun, Refusal> {
    let front = &shard.front;
    let options = &front.config.proxy;
    let cluster = &ksana.options.cluster;
    if ksana.pairs.are_none(front, cluster) {
        // One that came up a moment ago may not be known here.
        settle(shard, CATCH_UP).await;
        if ksana.pairs.are_none(front, cluster) {
            return Err(nobody());
        }
    }
    let path = sending.target.split('?').next().unwrap_or_default();
    let prompt = prompt::look(front, path, is_generate, &sending.body).await.map_err(|why| {
        Refusal::Ours(StatusCode::BAD_REQUEST, format!("the body is not valid JSON: {why}"))
    })?;
    let mut tried: Vec<String> = Vec::new();
    let mut reason = None;
    let mut reached = 0;
    for _ in 0..=options.retry.attempts {
        let Some(pair) = ksana.pairs.best(front, cluster, &prompt, &tried) else { break };
        let booked = pair.book(front, &prompt);
        let id = ksana.ids.next(&front.control).await.map_err(|why| Refusal::Cluster(why.into()))?;
        tried.push(pair.route.comm_key.clone());
        tracked.sent_upstream();
        let trying = Attempt { pair: &pair, booked, prompt_tokens: prompt.tokens, id, is_generate };
        let trying = trying.run(shard, sending.clone());
        match tokio::time::timeout_at(deadline, trying).await {
            Ok(Ok(begun)) => return Ok(begun),
            Ok(Err(Failed::Refused(refusal))) => return Err(refusal),
            Ok(Err(Failed::Retry(why, was_reached))) => {
                tracing::debug!(pair = pair.route.comm_key, id, %why, "an attempt failed");
                reason = Some(why);
                reached += u32::from(was_reached);
                // A request that kills engines is to kill few of them.
                if reached >= options.max_workers_reached {
                    break;
                }
            }
            Err(_) => return Err(Refusal::Ours(StatusCode::GATEWAY_TIMEOUT, TOO_LONG.to_owned())),
        }
    }
    let Some(why) = reason else { return Err(nobody()) };
    tracked.note_error(format!("{}: {why}", tracked.route().path()));
    Err(Refusal::Ours(StatusCode::BAD_GATEWAY, why))
}

/// An answer of which something is there.
pub(super) struct Begun {
    merged: Merged,
    /// Read, and not handed out yet.
    first: Option<Next>,
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) ending: Ending,
}

/// How an answer ends, and how its client hears that it is cut short.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Frames, with a last one that says so.
    Frames,
    /// Events; the engine says their end itself.
    Events,
    /// Just so: it is of a known form or length.
    Plain,
}

/// A request at a pair.
struct Attempt<'a> {
    pair: &'a Pair,
    booked: Booked,
    prompt_tokens: u32,
    id: u32,
    is_generate: bool,
}

impl Attempt<'_> {
    async fn run(self, shard: &Arc<Shard>, sending: Sending) -> Result<Begun, Failed> {
        let Self { pair, booked, prompt_tokens, id, is_generate } = self;
        let (front, route) = (&shard.front, &pair.route);
        let heads = send(Arc::clone(shard), sending, Arc::clone(route), id).await;
        let heads = heads.map_err(|lost| {
            pair.failed(front, lost.role);
            // Of the other leg nothing is known: it was let go.
            pair.ended(front, lost.role, Ended { status: None, took: lost.took });
            Failed::Retry(lost.to_string(), lost.reached)
        })?;
        for (role, ended) in heads.ended() {
            pair.ended(front, role, ended);
        }
        let Heads { prefill, decode, .. } = heads;
        for (role, addr, answer) in
            [(Role::Decode, &route.decode_addr, &decode), (Role::Prefill, &route.prefill_addr, &prefill)]
        {
            let status = answer.status();
            if !status.is_success() && !status.is_client_error() {
                pair.failed(front, role);
                let why = format!("{} group {addr} answered {}", role.name(), status.as_u16());
                return Err(Failed::Retry(why, true));
            }
        }
        pair.answered();
        let refusal = [decode.status(), prefill.status()].iter().position(|status| status.is_client_error());
        if let Some(which) = refusal {
            let answer = if which == 0 { decode } else { prefill };
            return Err(Failed::Refused(refused(answer).await));
        }
        let is_stream = prefill.body().is_chunked() && !decode.headers().contains_key(CONTENT_LENGTH);
        let (head, decode) = decode.into_parts();
        let is_events =
            head.headers.get(CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"text/event-stream"));
        let ending = match (is_stream, is_events) {
            (_, true) => Ending::Events,
            (true, false) => Ending::Frames,
            (false, false) => Ending::Plain,
        };
        let growth = match ending {
            Ending::Events => Some(Growth::new(prompt_tokens, pair.block_size())),
            Ending::Frames => Some(Growth::of_frames(prompt_tokens, pair.block_size())),
            Ending::Plain => None,
        };
        let shows_prefill = is_generate && ending == Ending::Frames;
        let idle = front.config.proxy.idle_timeout;
        let mut merged = Merged::new(prefill.into_body(), decode, shows_prefill, idle, booked, growth);
        let first = merged.next().await;
        if let Next::Lost(why) = first {
            return Err(Failed::Retry(why, true));
        }
        let mut headers = HeaderMap::new();
        for (name, value) in &head.headers {
            if !is_hop_by_hop(name) && *name != TRANSFER_ENCODING {
                headers.append(name.clone(), value.clone());
            }
        }
        if ending == Ending::Frames {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        }
        Ok(Begun { merged, first: Some(first), status: head.status, headers, ending })
    }
}

async fn refused(answer: Response<UpstreamBody>) -> Refusal {
    let (head, body) = answer.into_parts();
    match collect(body, &BodyLimits::of(MAX_ANSWER)).await {
        Ok(bytes) => Refusal::Engine(head.status, head.headers.get(CONTENT_TYPE).cloned(), bytes),
        Err(_) => Refusal::Ours(StatusCode::BAD_GATEWAY, "a node's refusal was cut short".to_owned()),
    }
}

impl Begun {
    /// What comes next.
    pub(super) async fn next(&mut self, deadline: Instant) -> Next {
        if let Some(first) = self.first.take() {
            return first;
        }
        let next = tokio::time::timeout_at(deadline, self.merged.next()).await;
        next.unwrap_or_else(|_| Next::Lost(TOO_LONG.to_owned()))
    }

    fn into_response(mut self, mut tracked: Tracked, deadline: Instant) -> Response<FrontBody> {
        tracked.set_status(self.status);
        let mut response = Response::new(());
        *response.status_mut() = self.status;
        *response.headers_mut() = std::mem::take(&mut self.headers);
        // Boxed, as each piece takes it and gives it back.
        let rest = Box::new(Rest { begun: self, tracked, deadline });
        let body = Body::from_stream(stream::unfold(Some(rest), |rest| async move { rest?.piece().await }));
        response.map(|()| FrontBody::legs(body))
    }
}

/// What is still to be sent of an answer.
struct Rest {
    begun: Begun,
    tracked: Tracked,
    deadline: Instant,
}

impl Rest {
    /// The next piece, and what is left then.
    async fn piece(mut self: Box<Self>) -> Option<(Result<Bytes, BodyError>, Option<Box<Self>>)> {
        let ending = self.begun.ending;
        match self.begun.next(self.deadline).await {
            Next::Bytes(bytes) => Some((Ok(bytes), Some(self))),
            Next::End => {
                self.tracked.finish(Outcome::Ok);
                (ending == Ending::Frames).then(|| (Ok(Bytes::from_static(DONE)), None))
            }
            Next::Lost(why) => {
                self.tracked.note_error(format!("{}: {why}", self.tracked.route().path()));
                self.tracked.finish(Outcome::UpstreamError);
                let told = match ending {
                    Ending::Frames => Ok(format!("{}\0", detail(&why)).into()),
                    Ending::Events => {
                        let error = Json::object([
                            ("message", Json::text(why)),
                            ("type", Json::text("upstream_error")),
                            ("code", Json::int(502)),
                        ]);
                        let text = Json::object([("error", error)]).to_text().unwrap_or_default();
                        Ok(format!("data: {text}\n\n").into())
                    }
                    Ending::Plain => Err(why.into()),
                };
                Some((told, None))
            }
        }
    }
}
