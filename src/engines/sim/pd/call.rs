//! One HTTP request on a connection of its own, as engines make them to bootstrap servers and routers.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

/// Longest answer that is read.
const MAX_ANSWER: usize = 16 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(in crate::engines::sim) enum CallError {
    #[error("{0}")]
    Connect(#[from] std::io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    Request(#[from] http::Error),
    #[error("the answer cannot be read: {0}")]
    Answer(Box<dyn std::error::Error + Send + Sync>),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

/// Asks `authority` (`host:port`); JSON goes out and comes back, or nothing.
pub(in crate::engines::sim) async fn call(
    authority: &str,
    method: Method,
    path: &str,
    body: Bytes,
    within: Duration,
) -> Result<(StatusCode, Bytes), CallError> {
    let calling = async {
        let stream = TcpStream::connect(authority).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Ends with the call.
        let _connection = AbortOnDropHandle::new(tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a call's connection ended");
            }
        }));
        let request = Request::builder().method(method).uri(path);
        let request = request.header(header::HOST, authority).header(header::ACCEPT, "application/json");
        let request = match body.is_empty() {
            true => request,
            false => request.header(header::CONTENT_TYPE, "application/json"),
        };
        let answer = sender.send_request(request.body(Full::new(body))?).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await.map_err(CallError::Answer)?;
        Ok((status, body.to_bytes()))
    };
    timeout(within, calling).await.unwrap_or(Err(CallError::Timeout(within)))
}
