//! HTTP/2 to a worker, where its registration asks for it: one connection a shard, its requests
//! side by side, driven by hyper in a task of its own.

use std::time::{Duration, Instant};

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
use crate::http::headers::is_hop_by_hop;

/// An idle connection is asked for a sign of life after this time, and given up when there is
/// none for as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Bytes of an answer that may wait here unread: as much of memory, at most, as each request under
/// way may take.
const STREAM_WINDOW: u32 = 128 * 1024;
/// The same for all answers of a connection: so much that the streams' own windows are the bound.
/// Were it less, some clients that do not read would hold up everybody's answers.
const CONNECTION_WINDOW: u32 = 1 << 30;

/// A handle to a connection.
pub(super) type Sender = SendRequest<Full<Bytes>>;

/// A worker's connection, shared by all requests of a shard.
#[derive(Debug, Default)]
pub(super) struct Shared {
    sender: Option<Sender>,
    /// Counts connections, to tell one from the next.
    number: u64,
    /// When a request last began on it.
    used: Option<Instant>,
    /// When a connection could last not be made, and why.
    failed: Option<(Instant, SendError)>,
}

impl Shared {
    /// The connection, if it is open, and its number.
    pub(super) fn open(&mut self) -> Option<(Sender, u64)> {
        let sender = self.sender.as_ref().filter(|sender| !sender.is_closed())?;
        self.used = Some(Instant::now());
        Some((sender.clone(), self.number))
    }

    /// Why somebody else could not connect since `began`: who waited for that need not try, too.
    pub(super) fn failed_since(&self, began: Instant) -> Option<SendError> {
        self.failed.as_ref().filter(|(at, _)| *at >= began).map(|(_, why)| why.clone())
    }

    /// Takes note of how connecting went.
    pub(super) fn made(&mut self, made: Result<Sender, SendError>) -> Result<(Sender, u64), SendError> {
        match made {
            Ok(sender) => {
                self.number += 1;
                self.failed = None;
                self.used = Some(Instant::now());
                Ok((self.sender.insert(sender).clone(), self.number))
            }
            Err(why) => {
                self.failed = Some((Instant::now(), why.clone()));
                Err(why)
            }
        }
    }

    /// Lets go of the connection of this number, if it is still the one: it turned out bad.
    pub(super) fn forget(&mut self, number: u64) {
        if self.number == number {
            self.sender = None;
        }
    }

    /// Lets go of a connection that broke, or on which nothing was begun for `idle`; what is
    /// under way on it ends first. Whether there still is one.
    pub(super) fn sweep(&mut self, idle: Duration) -> bool {
        let is_due = self.used.is_none_or(|used| used.elapsed() >= idle);
        if is_due || self.sender.as_ref().is_some_and(Sender::is_closed) {
            self.sender = None;
        }
        self.sender.is_some()
    }
}

/// Speaks first on a fresh connection.
pub(super) async fn handshake(stream: Stream, max_head: usize) -> Result<Sender, SendError> {
    let (sender, connection) = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
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
    let mut response = sender.send_request(request).await.map_err(|error| classify(&error, reused))?;
    let fields = response.headers_mut();
    let for_this_hop: Vec<_> = fields.keys().filter(|name| is_hop_by_hop(name)).cloned().collect();
    for name in for_this_hop {
        fields.remove(name);
    }
    Ok(response)
}

fn classify(error: &hyper::Error, reused: bool) -> SendError {
    let reason = std::error::Error::source(error).map(ToString::to_string);
    match reason {
        _ if error.is_canceled() || (reused && error.is_closed()) => SendError::Stale,
        Some(why) if !error.is_closed() && !error.is_incomplete_message() => SendError::Garbage(why),
        _ => SendError::Closed,
    }
}
