//! HTTP/2 to a worker, where its registration asks for it: one connection a shard, its requests
//! side by side, driven by hyper in a task of its own.

use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};

use super::SendError;
use super::Slot;
use super::connect::Stream;
use super::request::Outgoing;

/// An idle connection is asked for a sign of life after this time, and given up when there is
/// none for as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// A handle to a connection.
pub(super) type Sender = SendRequest<Full<Bytes>>;

/// Speaks first on a fresh connection.
pub(super) async fn handshake(stream: Stream, max_head: usize) -> Result<Sender, SendError> {
    let (sender, connection) = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .max_header_list_size(u32::try_from(max_head).unwrap_or(u32::MAX))
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| classify(&error, false))?;
    // Ends when the last handle is gone or the connection breaks.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "an h2 connection to a worker ended");
        }
    });
    Ok(sender)
}

/// Sends a request over a connection; `reused` tells whether it has served before.
pub(super) async fn send(
    sender: &mut Sender,
    request: &Outgoing<'_>,
    slot: &Slot,
    reused: bool,
) -> Result<Response<Incoming>, SendError> {
    let request = request
        .to_h2(&slot.endpoint)
        .ok_or_else(|| SendError::Garbage("the request target cannot be sent over HTTP/2".to_owned()))?;
    sender.ready().await.map_err(|error| classify(&error, reused))?;
    sender.send_request(request).await.map_err(|error| classify(&error, reused))
}

fn classify(error: &hyper::Error, reused: bool) -> SendError {
    let reason = std::error::Error::source(error).map(ToString::to_string);
    match reason {
        _ if error.is_canceled() || (reused && error.is_closed()) => SendError::Stale,
        Some(why) if !error.is_closed() && !error.is_incomplete_message() => SendError::Garbage(why),
        _ => SendError::Closed,
    }
}
