//! One connection's service: checks the head, finds the route, asks for its credentials, then
//! takes the proxy path or answers here.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use http::header::CONNECTION;
use http::{HeaderValue, Method, Request, Response};
use hyper::body::Incoming;

use super::auth::{NodeGrant, Shown, client_secret};
use super::body::{BodyLimits, FrontBody, discard};
use super::call::Call;
use super::checks::check_head;
use super::conn::ConnState;
use super::cors::{Cors, preflight};
use super::edge;
use super::errors::ApiError;
use super::front::{Front, Shard};
use super::headers::{self, REPLICA, REQUEST_ID};
use super::keys::Pass;
use super::ksana;
use super::metrics::Outcome;
use super::proxy;
use super::routes::{self, Access, Listener, Miss, Route};
use super::streams;

/// Most bytes read of the body of a request that is refused for its route or credentials: enough
/// that a client hears why instead of a reset, too little to be worth an attack.
const REFUSED_BODY: usize = 256 * 1024;

/// Serves the requests of one connection.
#[derive(Clone, Debug)]
pub(super) struct FrontService {
    shard: Arc<Shard>,
    listener: Listener,
    peer: SocketAddr,
    state: Arc<ConnState>,
}

/// What the credentials of a request allow.
#[derive(Default)]
pub(super) struct Grant {
    pub(super) pass: Pass,
    pub(super) node: NodeGrant,
    pub(super) by_capability: bool,
}

impl FrontService {
    pub(super) fn new(shard: Arc<Shard>, listener: Listener, peer: SocketAddr) -> Self {
        Self { shard, listener, peer, state: Arc::default() }
    }

    pub(super) fn state(&self) -> &Arc<ConnState> {
        &self.state
    }

    async fn answer(self, mut request: Request<Incoming>) -> Response<FrontBody> {
        // Only what HTTP/1 put on the wire is judged; h2 frames its messages without doubt.
        let verdict = self.state.take_verdict();
        let front = &self.shard.front;
        if let Err(error) = check_head(&request, verdict) {
            front.metrics.reject(error.code.as_str());
            return error.response();
        }
        let path = request.uri().path();
        if let Some(answer) =
            preflight(&front.config.cors, self.listener, request.method(), path, request.headers())
        {
            return answer;
        }
        if self.listener == Listener::Client && front.ksana.is_some() {
            return Box::pin(ksana::answer(&self.shard, self.peer.ip(), request)).await;
        }
        let found = routes::find(self.listener, front.config.metrics_on_client, request.method(), path);
        let route = match found {
            Ok(route) => match &front.config.edge {
                Some(remote) if !edge::has(route) => {
                    let error = edge::not_here(remote, self.listener);
                    return Box::pin(self.refuse(Route::Unknown, error, request)).await;
                }
                _ => route,
            },
            Err(Miss { route, error }) => return Box::pin(self.refuse(route, error, request)).await,
        };
        let grant = match check(front, self.listener, route, &request, self.peer.ip()) {
            Ok(grant) => grant,
            Err(error) => return Box::pin(self.refuse(route, error, request)).await,
        };
        if route.is_proxied() || (front.config.edge.is_some() && edge::passes(route)) {
            request.extensions_mut().insert(grant.pass.caller());
            let response = proxy::forward(&self.shard, route, request).await;
            return response.map(|body| body.holding_pass(grant.pass));
        }
        let mut tracked = front.metrics.track(route);
        let is_head = request.method() == Method::HEAD;
        let (head, body) = request.into_parts();
        let (shard, caller) = (Arc::clone(&self.shard), grant.pass.caller());
        let Grant { pass, node, by_capability } = grant;
        let request_id = headers::request_id(&head.headers);
        let call = Call { shard, listener: self.listener, route, head, body, caller, node, by_capability };
        // Boxed like the refusals: the proxy path's future is made for each request and had better
        // be small.
        let response = match route.is_about_streams() {
            true => {
                let mut response = Box::pin(streams::calls::answer(call)).await;
                response.headers_mut().insert(REQUEST_ID, request_id);
                response.headers_mut().insert(REPLICA, front.replica_header());
                response
            }
            false => Box::pin(call.answer()).await.map(FrontBody::axum),
        };
        tracked.set_status(response.status());
        tracked.finish(Outcome::of(response.status()));
        let body = |body| if is_head { FrontBody::full("") } else { body };
        response.map(|answer| body(answer).holding_pass(pass))
    }

    /// Answers a request that gets no further.
    async fn refuse(&self, route: Route, error: ApiError, request: Request<Incoming>) -> Response<FrontBody> {
        let front = &self.shard.front;
        let mut tracked = front.metrics.track_refused(route);
        let request_id = headers::request_id(request.headers());
        front.metrics.reject(error.code.as_str());
        tracked.set_request_id(request_id.clone());
        tracked.set_status(error.code.status());
        tracked.finish(Outcome::of(error.code.status()));
        let (head, mut body) = request.into_parts();
        // Who expects a 100 has not sent the body yet, and reading would ask for it.
        if !head.headers.contains_key(http::header::EXPECT) {
            discard(&mut body, &BodyLimits::of(REFUSED_BODY)).await;
        }
        let mut response = error.response_in(route.dialect());
        response.headers_mut().insert(REQUEST_ID, request_id);
        response.headers_mut().insert(REPLICA, front.replica_header());
        response
    }
}

/// Asks for what the matched route needs.
pub(super) fn check(
    front: &Front,
    listener: Listener,
    route: Route,
    request: &Request<Incoming>,
    peer: IpAddr,
) -> Result<Grant, ApiError> {
    let headers = request.headers();
    let mut grant = Grant::default();
    // A route without a row is never found; should it be, it is locked.
    match route.entry().map_or(Access::AdminToken, |entry| entry.access) {
        Access::Open => {}
        Access::Key => grant.pass = front.config.keys.admit(headers)?,
        Access::KeyOrCapability => match shown_capability(front, request) {
            None => grant.pass = front.config.keys.admit(headers)?,
            Some(shown) => {
                shown?;
                grant.by_capability = true;
            }
        },
        Access::NodeToken => grant.node = front.node_tokens.check(headers, peer)?,
        Access::AdminToken => front.config.admin_tokens.check_admin(headers)?,
        Access::Scrape if listener == Listener::Admin && !front.config.metrics_open_on_admin => {
            front.config.admin_tokens.check_admin(headers)?;
        }
        Access::Scrape => {}
    }
    Ok(grant)
}

/// Whether the capability that a request shows is good; `None` where it shows none, does more than
/// read, or shows a key besides.
fn shown_capability(front: &Front, request: &Request<Incoming>) -> Option<Result<(), ApiError>> {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if !reads || client_secret(request.headers()) != Shown::Nothing {
        return None;
    }
    streams::calls::capability(front, request.uri().path(), request.uri().query())
}

impl hyper::service::Service<Request<Incoming>> for FrontService {
    type Response = Response<FrontBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let in_flight = self.state.begin();
        self.shard.awake.stir();
        let is_http1 = request.version() <= http::Version::HTTP_11;
        let (service, shard) = (self.clone(), Arc::clone(&self.shard));
        let stall = self.shard.front.config.accept.timeouts.write_stall;
        let cors = Cors::of(&self.shard.front.config.cors, self.listener, request.headers());
        let comes_back = streams::event_source::asks(&request);
        Box::pin(async move {
            let mut response = service.answer(request).await;
            if comes_back {
                response = streams::event_source::come_back(response);
            }
            let mut response = response.map(|body| body.holding(in_flight));
            cors.add_to(response.headers_mut());
            if !is_http1 {
                response.headers_mut().remove(CONNECTION);
                // A stalled HTTP/1 client stalls its socket, which `conn` watches; a stream
                // without window stalls nothing that could be seen there.
                response = response.map(|body| body.pumped(stall));
            } else if shard.front.draining.is_cancelled() {
                // Its connection goes elsewhere before this listener closes. Asked only now: the
                // answer may have taken longer than the drain.
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok(response)
        })
    }
}
