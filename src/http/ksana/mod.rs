//! The client listener as KsanaLLM's engines and clients know it: the management routes and the proxy
//! to pairs of a prefill and a decode group.
//!
//! Reading order: here (which route, whose credentials) → `manage` (nodes that register and
//! heartbeat) → `proxy`, `fixed` and `held` (a request) → `prompt` (what of it counts), `pairs` and `named`
//! (which pair), `ids` (its number), `legs` and `stream`.
//!
//! In strict mode everything is as the reference router does it, faults included; in fixed mode the
//! wire is the same without them. What is different is said where it is.

pub(super) mod admin;
mod fixed;
pub(super) mod held;
mod ids;
mod legs;
mod manage;
mod named;
mod pairs;
mod prompt;
mod proxy;
mod registry;
mod stream;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{ALLOW, CONTENT_TYPE, HOST, LOCATION, SERVER};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;

use self::ids::RequestIds;
use self::pairs::Pairs;
pub(in crate::http) use self::registry::RegistryNames;
use super::body::{BodyLimits, FrontBody, discard};
use super::call::Call;
use super::errors::{ApiError, Code};
use super::front::{Front, Shard};
use super::headers::{self, REPLICA, REQUEST_ID};
use super::metrics::Outcome;
use super::routes::{self, Listener, Miss, Route};
use super::service::{Grant, check};
use super::streams;
use crate::ids::StreamId;
use crate::ksana::reply::detail;
use crate::state::ksana::Rules;

/// How KsanaLLM is served.
#[derive(Clone, Debug)]
pub struct KsanaOptions {
    /// As the reference router does it, faults included.
    pub strict: bool,
    /// The cluster that nodes must be of.
    pub cluster: String,
    /// After how long without a heartbeat a node is offline.
    pub heartbeat_timeout: Duration,
}

impl KsanaOptions {
    /// How commands of this replica are to be understood.
    pub fn rules(&self) -> Rules {
        let timeout_ms = u32::try_from(self.heartbeat_timeout.as_millis()).unwrap_or(u32::MAX);
        Rules { strict: self.strict, timeout_ms }
    }
}

/// KsanaLLM's part of a front.
#[derive(Debug)]
pub(in crate::http) struct Ksana {
    options: KsanaOptions,
    ids: Arc<RequestIds>,
    pairs: Pairs,
}

impl Ksana {
    pub(in crate::http) fn new(options: KsanaOptions) -> Self {
        Self { options, ids: Arc::default(), pairs: Pairs::default() }
    }

    fn rules(&self) -> Rules {
        self.options.rules()
    }
}

/// Most bytes read of the body of a request that is refused.
const REFUSED_BODY: usize = 256 * 1024;

/// Answers a request of the listener.
pub(super) async fn answer(
    shard: &Arc<Shard>,
    peer: IpAddr,
    request: Request<Incoming>,
) -> Response<FrontBody> {
    let front = &shard.front;
    let Some(ksana) = &front.ksana else {
        return ApiError::new(Code::UnknownRoute, "KsanaLLM is not served here").response();
    };
    let request_id = headers::request_id(request.headers());
    let mut response = route(shard, ksana, peer, request).await;
    let fields = response.headers_mut();
    match ksana.options.strict {
        // In front of what an engine calls itself, as the reference has it.
        true => {
            let theirs: Vec<HeaderValue> = fields.get_all(SERVER).iter().cloned().collect();
            fields.insert(SERVER, HeaderValue::from_static("uvicorn"));
            for server in theirs {
                fields.append(SERVER, server);
            }
        }
        false => {
            fields.insert(REQUEST_ID, request_id);
            fields.insert(REPLICA, front.replica_header());
        }
    }
    response
}

async fn route(
    shard: &Arc<Shard>,
    ksana: &Ksana,
    peer: IpAddr,
    request: Request<Incoming>,
) -> Response<FrontBody> {
    let front = &shard.front;
    let (method, path) = (request.method(), request.uri().path());
    let metrics_here = front.config.metrics_on_client;
    if let Some(route) = about_stream(front, ksana, method, path) {
        return of_stream(shard, route, peer, request).await;
    }
    let route = match routes::find(Listener::Ksana, metrics_here, method, path) {
        Ok(route) => route,
        Err(miss) => {
            let answer = missed(miss, metrics_here, &request);
            return refuse(shard, answer.0, answer.1, request).await;
        }
    };
    let grant = match check(front, Listener::Ksana, route, &request, peer) {
        Ok(grant) => grant,
        Err(error) => return refuse(shard, route, of_error(&error), request).await,
    };
    let Grant { pass, node, .. } = grant;
    match route {
        Route::KsanaGenerate | Route::KsanaV1 | Route::KsanaV2 => {
            let caller = pass.caller();
            let response = proxy::forward(shard, ksana, route, caller, request).await;
            response.map(|body| body.holding_pass(pass))
        }
        _ => {
            let mut tracked = front.metrics.track(route);
            let is_head = *method == Method::HEAD;
            let response = match route {
                Route::KsanaRegister => manage::register(shard, ksana, request).await,
                Route::KsanaHeartbeat => manage::heartbeat(shard, ksana, request).await,
                Route::KsanaCommId => manage::comm_id(shard, ksana, request).await,
                Route::KsanaDocs | Route::KsanaRedoc => page(),
                _ => {
                    let (head, body) = request.into_parts();
                    let (shard, caller) = (Arc::clone(shard), pass.caller());
                    let listener = Listener::Ksana;
                    let call =
                        Call { shard, listener, route, head, body, caller, node, by_capability: false };
                    Box::pin(call.answer()).await.map(FrontBody::axum)
                }
            };
            tracked.set_status(response.status());
            tracked.finish(Outcome::of(response.status()));
            let body = |body| if is_head { FrontBody::full("") } else { body };
            response.map(|answer| body(answer).holding_pass(pass))
        }
    }
}

/// The route about a stream that was begun before, in fixed mode, where the path has the id of one.
fn about_stream(front: &Front, ksana: &Ksana, method: &Method, path: &str) -> Option<Route> {
    let id = path.strip_prefix("/v1/streams/")?.split('/').next()?;
    let is_stream = front.streams.get().is_some() && StreamId::parse(id).is_some();
    let found = routes::find(Listener::Client, false, method, path).ok()?;
    (is_stream && !ksana.options.strict && found.is_about_streams()).then_some(found)
}

/// Answers a request about a stream.
async fn of_stream(
    shard: &Arc<Shard>,
    route: Route,
    peer: IpAddr,
    request: Request<Incoming>,
) -> Response<FrontBody> {
    let grant = match check(&shard.front, Listener::Ksana, route, &request, peer) {
        Ok(grant) => grant,
        Err(error) => return refuse(shard, route, of_error(&error), request).await,
    };
    let mut tracked = shard.front.metrics.track(route);
    let Grant { pass, node, by_capability } = grant;
    let (head, body) = request.into_parts();
    let (shard, caller, listener) = (Arc::clone(shard), pass.caller(), Listener::Ksana);
    let call = Call { shard, listener, route, head, body, caller, node, by_capability };
    let response = Box::pin(streams::calls::answer(call)).await;
    tracked.set_status(response.status());
    tracked.finish(Outcome::of(response.status()));
    response.map(|body| body.holding_pass(pass))
}

/// What a request gets that no route serves: a redirection where only a slash at the end is wrong.
fn missed(miss: Miss, metrics_here: bool, request: &Request<Incoming>) -> (Route, Response<FrontBody>) {
    if miss.error.code == Code::MethodNotAllowed {
        let mut response = json(StatusCode::METHOD_NOT_ALLOWED, detail("Method Not Allowed"));
        let allow = miss.error.allow.as_deref().and_then(|allow| HeaderValue::from_str(allow).ok());
        if let Some(allow) = allow {
            response.headers_mut().insert(ALLOW, allow);
        }
        return (miss.route, response);
    }
    let path = request.uri().path();
    let other = match path.strip_suffix('/') {
        Some(without) => without.to_owned(),
        None => format!("{path}/"),
    };
    let exists = match routes::find(Listener::Ksana, metrics_here, request.method(), &other) {
        Ok(_) => true,
        Err(other) => other.route != Route::Unknown,
    };
    if exists && path != "/" {
        let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
        let mut response = Response::new(FrontBody::full(""));
        *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
        if let Ok(location) = HeaderValue::from_str(&format!("http://{host}{other}{query}")) {
            response.headers_mut().insert(LOCATION, location);
        }
        return (Route::Unknown, response);
    }
    (Route::Unknown, json(StatusCode::NOT_FOUND, detail("Not Found")))
}

/// Answers a request that gets no further, once it has been read a little: who still sends when the
/// connection closes may never see why.
async fn refuse(
    shard: &Shard,
    route: Route,
    response: Response<FrontBody>,
    request: Request<Incoming>,
) -> Response<FrontBody> {
    let mut tracked = shard.front.metrics.track_refused(route);
    tracked.set_status(response.status());
    tracked.finish(Outcome::of(response.status()));
    let is_head = *request.method() == Method::HEAD;
    let (head, mut body) = request.into_parts();
    if !head.headers.contains_key(http::header::EXPECT) {
        discard(&mut body, &BodyLimits::of(REFUSED_BODY)).await;
    }
    if is_head { response.map(|_| FrontBody::full("")) } else { response }
}

/// An answer in JSON.
fn json(status: StatusCode, body: String) -> Response<FrontBody> {
    let mut response = Response::new(FrontBody::full(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// `{"detail":…}` with a status.
fn error(status: StatusCode, text: &str) -> Response<FrontBody> {
    json(status, detail(text))
}

/// What the reference answers when it fails without knowing how.
fn failure() -> Response<FrontBody> {
    let mut response = Response::new(FrontBody::full("Internal Server Error"));
    *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

/// An error of ours in the words of this listener.
fn of_error(error: &ApiError) -> Response<FrontBody> {
    let mut response = self::error(error.code.status(), &error.message);
    error.add_headers(response.headers_mut());
    response
}

fn page() -> Response<FrontBody> {
    const PAGE: &str = "<!DOCTYPE html>\n<html><head><title>Prefill-Decode Router</title></head>\n\
        <body><h1>Prefill-Decode Router</h1><p>The routes are described in \
        <a href=\"/openapi.json\">/openapi.json</a>.</p></body></html>\n";
    let mut response = Response::new(FrontBody::full(PAGE));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    response
}
