//! The proxy path: body in, worker chosen, bytes forwarded untouched, answer relayed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::time::{Instant, timeout_at};

use super::body::{FrontBody, collect, discard};
use super::errors::{ApiError, Code};
use super::front::Shard;
use super::headers::{self, REPLICA, REQUEST_ID, WORKER};
use super::metrics::{Outcome, Retry, Route, Tracked};
use super::peek::{Peek, peek};
use super::relay::{Relay, RelayLimits};
use super::upstream::SendError;
use crate::ids::WorkerId;
use crate::routing::book::Booking;
use crate::routing::policy::RouteRequest;
use crate::routing::select::{NoWorker, select};
use crate::routing::view::WorkerView;

/// Tokens in a KV block where the worker does not say.
const ORDINARY_BLOCK: u32 = 16;

/// Serves one proxied request. Dropping the future, as hyper does when the client goes away,
/// frees the booking and closes the connection to the worker.
pub(super) async fn forward(shard: &Shard, route: Route, request: Request<Incoming>) -> Response<FrontBody> {
    let mut tracked = shard.front.metrics.track(route);
    let request_id = headers::request_id(request.headers());
    tracked.set_request_id(request_id.clone());
    tracked.begin_span(request.headers());
    let mut response = match try_forward(shard, tracked, request, &request_id).await {
        Ok(response) => response,
        Err(failed) => failed.into_response(shard),
    };
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID.clone(), request_id);
    headers.insert(REPLICA.clone(), shard.front.replica_header());
    response
}

/// A request that ends with an error of ours.
struct Failed {
    error: ApiError,
    tracked: Tracked,
}

impl Failed {
    fn into_response(mut self, shard: &Shard) -> Response<FrontBody> {
        let code = self.error.code;
        let outcome = match code {
            Code::NoWorkers | Code::NoWorkerAvailable => Outcome::NoWorker,
            _ => Outcome::of(code.status()),
        };
        self.tracked.set_status(code.status());
        self.tracked.finish(outcome);
        shard.front.metrics.reject(code.as_str());
        if code.status().is_server_error() {
            self.tracked.note_error(format!("{}: {}", self.tracked.route().path(), self.error.message));
        }
        self.error.response()
    }
}

async fn try_forward(
    shard: &Shard,
    mut tracked: Tracked,
    request: Request<Incoming>,
    request_id: &HeaderValue,
) -> Result<Response<FrontBody>, Failed> {
    let options = &shard.front.config.proxy;
    let deadline = Instant::now() + options.total_timeout;
    let (head, mut body) = request.into_parts();
    if head.headers.get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        let text = "compressed request bodies are not accepted; send the body without Content-Encoding";
        let error = ApiError::new(Code::UnsupportedEncoding, text).close();
        return Err(Failed { error, tracked });
    }
    let body = match collect(&mut body, &options.body).await {
        Ok(body) => body,
        Err(error) => {
            // Who expects a 100 has not sent the body yet, and reading would ask for it.
            if error.code == Code::BodyTooLarge && !head.headers.contains_key(EXPECT) {
                discard(&mut body, &options.body).await;
            }
            return Err(Failed { error, tracked });
        }
    };
    tracked.body_read();
    let asked = match peek(&body) {
        Ok(asked) => asked,
        Err(error) => return Err(Failed { error, tracked }),
    };
    let mut headers = headers::to_worker(&head.headers, request_id.clone());
    tracked.put_span_into(&mut headers);
    let attempts = Attempts {
        shard,
        target: head.uri.path_and_query().map_or(tracked.route().path(), PathAndQuery::as_str),
        tracked: &mut tracked,
        asked: &asked,
        headers,
        body: body.clone(),
        deadline,
        tried: Vec::new(),
        failures: Vec::new(),
        trouble: Retry::Connect,
        reached: 0,
        stale: false,
    };
    match attempts.run().await {
        Ok((response, booking)) => Ok(relayed(shard, response, booking, tracked, deadline)),
        Err(error) => Err(Failed { error, tracked }),
    }
}

/// Attempts at workers, one after the other, for one request.
struct Attempts<'a> {
    shard: &'a Shard,
    /// Path and query, as the client sent them.
    target: &'a str,
    tracked: &'a mut Tracked,
    asked: &'a Peek<'a>,
    headers: HeaderMap,
    body: Bytes,
    deadline: Instant,
    /// Not to be tried again.
    tried: Vec<WorkerId>,
    /// What went wrong so far, for the error text; bounded by the number of attempts.
    failures: Vec<String>,
    /// What went wrong last, for the metrics.
    trouble: Retry,
    /// Workers that have seen the request.
    reached: u32,
    /// A kept-alive connection has failed already.
    stale: bool,
}

type Answered = (Response<Incoming>, Booking);

impl Attempts<'_> {
    async fn run(mut self) -> Result<Answered, ApiError> {
        let options = &self.shard.front.config.proxy;
        // A 502, 503 or 504 of a worker, kept in case nobody else does better.
        let mut held: Option<Answered> = None;
        for attempt in 0..=options.retries {
            let worker = match self.choose() {
                Ok(worker) => worker,
                Err(refusal) => return held.ok_or_else(|| self.refuse(&refusal)),
            };
            if attempt > 0 {
                self.tracked.retrying(self.trouble);
            }
            self.tracked.set_model(&self.asked.model);
            let booking = self.book(&worker);
            self.tracked.sent_upstream();
            match self.send(&worker).await {
                Ok(response) => {
                    worker.live.unreachable.store(false, Ordering::Relaxed);
                    self.reached += 1;
                    let last = held.is_some() || self.reached >= options.max_workers_reached;
                    if last || !is_gateway_trouble(response.status()) {
                        return Ok((response, booking));
                    }
                    self.tried.push(worker.id().clone());
                    self.trouble = Retry::Status;
                    held = Some((response, booking));
                }
                Err(Attempt::Timeout(error)) => return Err(error),
                Err(Attempt::Failed(why)) => self.note(&worker, &why),
            }
            if self.reached >= options.max_workers_reached {
                break;
            }
        }
        held.ok_or_else(|| self.give_up())
    }

    fn choose(&self) -> Result<Arc<WorkerView>, NoWorker> {
        let view = self.shard.front.control.registry();
        let request = RouteRequest {
            model: &self.asked.model,
            prompt_tokens: self.asked.prompt_tokens,
            max_tokens: self.asked.max_tokens,
        };
        let policy = self.shard.front.config.policy.as_ref();
        select(&view, policy, &request, &self.tried, &mut rand::rng()).map(|selection| selection.worker)
    }

    fn book(&self, worker: &Arc<WorkerView>) -> Booking {
        let tokens = self.asked.prompt_tokens;
        let block = worker.record.spec.block_size.unwrap_or(ORDINARY_BLOCK).max(1);
        self.shard.front.control.bookings().book(Arc::clone(worker), tokens, tokens.div_ceil(block))
    }

    async fn send(&self, worker: &WorkerView) -> Result<Response<Incoming>, Attempt> {
        let uri: Uri = format!("{}{}", worker.record.spec.url, self.target)
            .parse()
            .map_err(|_| Attempt::Failed(SendError::Connect("its url is not valid".to_owned())))?;
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri;
        *request.headers_mut() = self.headers.clone();
        let limit = self.shard.front.config.proxy.first_byte_timeout;
        let deadline = self.deadline.min(Instant::now() + limit);
        match timeout_at(deadline, self.shard.pool.send(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(why)) => Err(Attempt::Failed(why)),
            Err(_) => {
                let text = format!("worker {} did not begin to answer within the time allowed", worker.id());
                Err(Attempt::Timeout(ApiError::new(Code::UpstreamTimeout, text)))
            }
        }
    }

    fn note(&mut self, worker: &WorkerView, why: &SendError) {
        self.trouble = match why {
            SendError::Connect(_) | SendError::Forbidden(_) => Retry::Connect,
            SendError::Stale => Retry::Stale,
            SendError::Closed => Retry::Closed,
            SendError::Garbage(_) => Retry::Garbage,
        };
        match why {
            SendError::Connect(_) => {
                worker.live.unreachable.store(true, Ordering::Relaxed);
                self.tried.push(worker.id().clone());
            }
            SendError::Forbidden(_) => self.tried.push(worker.id().clone()),
            // The worker itself may be well: it closed an idle connection just then. Twice is
            // no accident.
            SendError::Stale if !self.stale => self.stale = true,
            SendError::Stale | SendError::Closed | SendError::Garbage(_) => {
                self.reached += 1;
                self.tried.push(worker.id().clone());
            }
        }
        self.failures.push(format!("{}: {why}", worker.id()));
    }

    fn refuse(&self, refusal: &NoWorker) -> ApiError {
        if !self.failures.is_empty() {
            return self.give_up();
        }
        let model = printable(&self.asked.model);
        match refusal {
            NoWorker::RegistryEmpty => ApiError::new(
                Code::NoWorkers,
                "no worker is registered; add one with `everline worker add http://host:port` or POST /v1/nodes",
            )
            .retry_after(5),
            NoWorker::UnknownModel { .. } => {
                ApiError::new(Code::ModelNotFound, format!("no worker serves the model {model:?}; {refusal}"))
                    .param("model")
            }
            NoWorker::AllFiltered { .. } => ApiError::new(
                Code::NoWorkerAvailable,
                format!("no worker for the model {model:?} can take requests now ({refusal})"),
            )
            .retry_after(1),
        }
    }

    fn give_up(&self) -> ApiError {
        let text = format!("every worker tried has failed ({})", self.failures.join("; "));
        let code = if self.reached > 0 { Code::UpstreamFailed } else { Code::UpstreamConnectFailed };
        ApiError::new(code, text).retry_after(1)
    }
}

enum Attempt {
    /// Another worker may do better.
    Failed(SendError),
    /// The worker may still be at it: not tried elsewhere.
    Timeout(ApiError),
}

fn is_gateway_trouble(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT)
}

/// A model name short enough for an error.
fn printable(model: &str) -> &str {
    let mut end = model.len().min(128);
    while !model.is_char_boundary(end) {
        end -= 1;
    }
    &model[..end]
}

fn relayed(
    shard: &Shard,
    response: Response<Incoming>,
    booking: Booking,
    mut tracked: Tracked,
    deadline: Instant,
) -> Response<FrontBody> {
    let (mut head, body) = response.into_parts();
    tracked.set_status(head.status);
    tracked.set_worker(booking.worker().id().clone());
    let content_type = head.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let events = content_type.starts_with(b"text/event-stream")
        && head.status.is_success()
        && !head.headers.contains_key(CONTENT_ENCODING);
    headers::strip_response(&mut head.headers);
    if events {
        tracked.set_events();
        // The ending may have to differ from what the worker announced.
        head.headers.remove(CONTENT_LENGTH);
    }
    let id = HeaderValue::from_str(booking.worker().id().as_str());
    head.headers.insert(WORKER.clone(), id.unwrap_or(HeaderValue::from_static("unprintable")));
    let limits = RelayLimits { idle: shard.front.config.proxy.idle_timeout, deadline, events };
    let relay = Relay::new(body, booking, tracked, limits);
    let mut response = Response::new(FrontBody::relay(relay));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}
