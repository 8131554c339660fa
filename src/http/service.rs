//! One connection's service: checks the head, takes the proxy path at once, and leaves
//! everything else to the router.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use http::{Method, Request, Response};
use hyper::body::Incoming;
use tower::ServiceExt;

use super::body::FrontBody;
use super::checks::check_head;
use super::conn::ConnState;
use super::front::Shard;
use super::metrics::{Outcome, Route};
use super::proxy;

/// Serves the requests of one connection.
#[derive(Clone, Debug)]
pub(super) struct FrontService {
    shard: Arc<Shard>,
    router: Router,
    proxies: bool,
    state: Arc<ConnState>,
}

impl FrontService {
    pub(super) fn new(shard: Arc<Shard>, router: Router, proxies: bool) -> Self {
        Self { shard, router, proxies, state: Arc::default() }
    }

    pub(super) fn state(&self) -> &Arc<ConnState> {
        &self.state
    }

    /// The proxied route of a request, if it is one.
    fn proxied(&self, request: &Request<Incoming>) -> Option<Route> {
        if !self.proxies || request.method() != Method::POST {
            return None;
        }
        match Route::of(request.uri().path()) {
            route @ (Route::ChatCompletions | Route::Completions | Route::Embeddings) => Some(route),
            _ => None,
        }
    }

    async fn answer(self, request: Request<Incoming>) -> Response<FrontBody> {
        // Only what HTTP/1 put on the wire is judged; h2 frames its messages without doubt.
        let verdict = self.state.take_verdict();
        if let Err(error) = check_head(&request, verdict) {
            self.shard.front.metrics.reject(error.code.as_str());
            return error.response();
        }
        if let Some(route) = self.proxied(&request) {
            return proxy::forward(&self.shard, route, request).await;
        }
        let mut tracked = self.shard.front.metrics.track(Route::of(request.uri().path()));
        let request = request.map(axum::body::Body::new);
        let response = match self.router.oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        tracked.set_status(response.status());
        tracked.finish(Outcome::of(response.status()));
        response.map(FrontBody::axum)
    }
}

impl hyper::service::Service<Request<Incoming>> for FrontService {
    type Response = Response<FrontBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let in_flight = self.state.begin();
        let is_http1 = request.version() <= http::Version::HTTP_11;
        let service = self.clone();
        let timeouts = self.shard.front.config.accept.timeouts;
        Box::pin(async move {
            let mut response = service.answer(request).await.map(|body| body.holding(in_flight));
            if !is_http1 {
                response.headers_mut().remove(http::header::CONNECTION);
                // A stalled HTTP/1 client stalls its socket, which `conn` watches; a stream
                // without window stalls nothing that could be seen there.
                let stall = timeouts.write_stall;
                response = response.map(|body| body.pumped(stall));
            }
            Ok(response)
        })
    }
}
