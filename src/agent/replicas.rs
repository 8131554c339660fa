//! Asking any replica: the one that answered last, and the others in turn when it does not.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::admin_types::ErrorReply;
use crate::tls::client_config;

/// Longest time to connect.
const CONNECT: Duration = Duration::from_millis(1000);
/// Largest answer read.
const MOST_ANSWER: usize = 1 << 20;

/// The replicas' client listeners.
pub(super) struct Replicas {
    urls: Vec<String>,
    /// Who answered last.
    at: AtomicUsize,
    authorization: Option<HeaderValue>,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// A replica's answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
    /// Which replica.
    pub(super) by: String,
}

impl Reply {
    /// What it says is wrong.
    pub(super) fn complaint(&self) -> String {
        let text = serde_json::from_slice::<ErrorReply>(&self.body).map(|reply| reply.error.message);
        format!("{} answered {}: {}", self.by, self.status, text.unwrap_or_else(|_| "no reason".to_owned()))
    }
}

impl Replicas {
    /// Those at `urls` (`http://` may be left out), with a node token where they want one, and the
    /// authority of their certificates.
    pub(super) fn new(urls: &[String], token: Option<&str>, ca: Option<&Path>) -> anyhow::Result<Self> {
        let urls: Vec<String> = urls.iter().map(|url| base_of(url)).collect::<Result<_, _>>()?;
        anyhow::ensure!(!urls.is_empty(), "name at least one replica with --replica");
        let authorization = match token {
            None => None,
            Some(token) => {
                let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                    .context("the node token has characters that cannot be sent")?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_nodelay(true);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(client_config(ca).context("--ca")?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        // Agents that start together do not all ask the same.
        let at = AtomicUsize::new(rand::random_range(0..urls.len()));
        Ok(Self { urls, at, authorization, client })
    }

    /// Asks one after the other, each for at most `limit`, until one answers other than that it
    /// cannot: the error says what was wrong with each.
    pub(super) async fn ask(
        &self,
        method: &Method,
        path: &str,
        json: &Bytes,
        limit: Duration,
    ) -> Result<Reply, String> {
        let first = self.at.load(Ordering::Relaxed);
        let mut wrong = Vec::new();
        for step in 0..self.urls.len() {
            let at = (first + step) % self.urls.len();
            let url = &self.urls[at];
            match tokio::time::timeout(limit, self.exchange(url, method, path, json)).await {
                Ok(Ok(reply)) if reply.status.is_server_error() => wrong.push(reply.complaint()),
                Ok(Ok(reply)) => {
                    self.at.store(at, Ordering::Relaxed);
                    return Ok(reply);
                }
                Ok(Err(why)) => wrong.push(format!("{url}: {why}")),
                Err(_) => wrong.push(format!("{url}: no answer within {} ms", limit.as_millis())),
            }
        }
        Err(wrong.join("; "))
    }

    async fn exchange(&self, url: &str, method: &Method, path: &str, json: &Bytes) -> Result<Reply, String> {
        let mut request = Request::builder().method(method).uri(format!("{url}{path}"));
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        if !json.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(json.clone())).map_err(|error| error.to_string())?;
        let response = self.client.request(request).await.map_err(|error| causes(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MOST_ANSWER).collect().await;
        let body = body.map_err(|error| format!("the answer broke off ({error})"))?.to_bytes();
        Ok(Reply { status, body, by: url.to_owned() })
    }
}

fn base_of(url: &str) -> anyhow::Result<String> {
    let url = url.trim().trim_end_matches('/');
    let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let is_http = url.starts_with("http://") || url.starts_with("https://");
    anyhow::ensure!(is_http, "--replica {url}: only http:// and https:// URLs are spoken here");
    Ok(url)
}

fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = inner.to_string();
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// Answers everything with this.
    async fn replica(answer: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        url
    }

    #[tokio::test]
    async fn who_does_not_answer_or_cannot_is_passed_over_and_who_answered_is_asked_again() {
        const WELL: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
        const NOT: &str = "HTTP/1.1 503 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let gone = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            format!("{}", listener.local_addr().unwrap())
        };
        let (ill, well) = (replica(NOT).await, replica(WELL).await);
        let all = Replicas::new(&[gone, ill.clone(), well.clone()], Some("t"), None).unwrap();
        for _ in 0..2 {
            let limit = Duration::from_secs(5);
            let reply = all.ask(&Method::POST, "/x", &Bytes::from_static(b"{}"), limit).await.unwrap();
            assert_eq!((reply.status, &reply.by), (StatusCode::OK, &well));
            assert_eq!(all.at.load(Ordering::Relaxed), 2);
        }
        let none = Replicas::new(&[ill], None, None).unwrap();
        let error = none.ask(&Method::GET, "/x", &Bytes::new(), Duration::from_secs(5)).await.unwrap_err();
        assert!(error.contains("503"), "{error}");
        assert!(Replicas::new(&["ftp://x".to_owned()], None, None).is_err());
    }
}
