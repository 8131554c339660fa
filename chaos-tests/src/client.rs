//! A small HTTP client.

use std::error::Error as _;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long an answer may take where nothing else is said.
const LIMIT: Duration = Duration::from_secs(60);

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its head.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Reply {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body read as JSON; an answer that is not 2xx is an error.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, String> {
        if !self.status.is_success() {
            return Err(format!("{}: {}", self.status, self.text()));
        }
        serde_json::from_slice(&self.body).map_err(|e| format!("{e} in {}", self.text()))
    }
}

/// Sends requests.
#[derive(Clone, Debug)]
pub struct Http(Client<HttpConnector, Full<Bytes>>);

impl Http {
    /// A client with a new connection for each request.
    pub fn fresh() -> Self {
        Self::with_idle(0)
    }

    /// A client that keeps connections.
    pub fn pooled() -> Self {
        Self::with_idle(64)
    }

    fn with_idle(idle: usize) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let mut builder = Client::builder(TokioExecutor::new());
        Self(builder.pool_max_idle_per_host(idle).build(connector))
    }

    /// Sends a request and reads the answer to its end, all within `limit`.
    pub async fn send(
        &self,
        method: Method,
        url: &str,
        body: Option<&impl Serialize>,
        limit: Duration,
    ) -> Result<Reply, String> {
        let request = Request::builder().method(method).uri(url);
        self.exchange(request, body, limit).await
    }

    async fn exchange(
        &self,
        request: http::request::Builder,
        body: Option<&impl Serialize>,
        limit: Duration,
    ) -> Result<Reply, String> {
        let body =
            body.map_or_else(Vec::new, |body| serde_json::to_vec(body).expect("a body can be written"));
        let request = request.header(header::CONTENT_TYPE, "application/json");
        let request = request.body(Full::new(Bytes::from(body))).map_err(|e| e.to_string())?;
        let exchange = async {
            let reply = self.0.request(request).await.map_err(|e| match e.source() {
                Some(source) => format!("{e}: {source}"),
                None => e.to_string(),
            })?;
            let (head, body) = reply.into_parts();
            let body = body.collect().await.map_err(|e| format!("the answer broke off: {e}"))?.to_bytes();
            Ok(Reply { status: head.status, headers: head.headers, body })
        };
        let sent = tokio::time::timeout(limit, exchange).await;
        sent.map_err(|_| format!("no answer within {} ms", limit.as_millis()))?
    }

    /// `GET`.
    pub async fn get(&self, url: &str, limit: Duration) -> Result<Reply, String> {
        self.send(Method::GET, url, None::<&()>, limit).await
    }

    /// `GET` of JSON, where something else is to be had, too.
    pub async fn get_json(&self, url: &str, limit: Duration) -> Result<Reply, String> {
        let request = Request::builder().uri(url).header(header::ACCEPT, "application/json");
        self.exchange(request, None::<&()>, limit).await
    }

    /// `POST` of JSON with an API key or a token.
    pub async fn post_as(
        &self,
        secret: &str,
        url: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> Result<Reply, String> {
        let request = Request::builder().method(Method::POST).uri(url);
        let request = request.header(header::AUTHORIZATION, format!("Bearer {secret}"));
        self.exchange(request, Some(body), limit).await
    }

    /// `POST` of JSON.
    pub async fn post(&self, url: &str, body: &impl Serialize, limit: Duration) -> Result<Reply, String> {
        self.send(Method::POST, url, Some(body), limit).await
    }

    /// `POST` of JSON with more headers, within [`LIMIT`].
    pub async fn post_with(
        &self,
        url: &str,
        headers: &[(&str, &str)],
        body: &impl Serialize,
    ) -> Result<Reply, String> {
        let request = Request::builder().method(Method::POST).uri(url);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        self.exchange(request, Some(body), LIMIT).await
    }
}
