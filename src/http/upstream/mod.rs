//! Connections to workers: pooled by worker and shard, addresses checked at every connect, no
//! redirects, never half-closed. HTTP/1.1 is spoken here (`h1`), HTTP/2 by hyper (`h2`).

mod chunked;
mod connect;
mod endpoint;
mod h1;
mod h2;
mod head;
mod pair;
mod request;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use parking_lot::Mutex;

use self::h1::{Conn, Exchange, H1Body};
use super::allowed::Allowed;
use super::headers::HeaderRules;
use crate::ids::WorkerIx;
use crate::routing::view::WorkerView;

pub use self::connect::WorkerTls;
pub(super) use self::endpoint::{Endpoint, EndpointError};
pub(super) use self::pair::{Drain, PairBody};
pub(super) use self::request::{HeadersToWorker, Outgoing};

/// Bounds of a pool.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// Longest time to resolve and connect, TLS included: 1 s.
    pub connect_timeout: Duration,
    /// Idle connections kept for a worker by each shard: 256.
    pub max_idle_per_worker: usize,
    /// Open connections to a worker by each shard, idle or not: 4096.
    pub max_per_worker: usize,
    /// How long an idle connection is kept: 4 s, less than the 5 s of uvicorn, which vLLM and
    /// SGLang run on, so that a request seldom meets a connection just being closed.
    pub idle_timeout: Duration,
    /// How long an HTTP/2 connection is kept on which no request is begun; those under way on it
    /// end first: 60 s.
    pub h2_idle_timeout: Duration,
    /// Longest response head: 64 KiB.
    pub max_head_bytes: usize,
    /// For `https://` workers; without it they cannot be connected to.
    pub tls: Option<WorkerTls>,
    /// Sent to every worker as `Authorization`, in place of what clients send.
    pub authorization: Option<HeaderValue>,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(1),
            max_idle_per_worker: 256,
            max_per_worker: 4096,
            idle_timeout: Duration::from_secs(4),
            h2_idle_timeout: Duration::from_secs(60),
            max_head_bytes: 64 * 1024,
            tls: None,
            authorization: None,
        }
    }
}

/// How a request failed before its response head.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum SendError {
    /// No connection: refused, unreachable or timed out. Nothing was sent.
    Connect(String),
    /// The worker's address may not be connected to. Nothing was sent.
    Forbidden(String),
    /// This shard has as many connections to the worker as it may have. Nothing was sent.
    Full,
    /// A kept-alive connection turned out to be closed; the worker hardly read the request.
    Stale,
    /// The worker closed or reset a fresh connection without an answer.
    Closed,
    /// What came is not HTTP.
    Garbage(String),
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SendError::Connect(why) | SendError::Forbidden(why) => f.write_str(why),
            SendError::Full => f.write_str("all connections allowed to it are in use"),
            SendError::Stale => f.write_str("a kept-alive connection was closed"),
            SendError::Closed => f.write_str("closed the connection without an answer"),
            SendError::Garbage(why) => write!(f, "did not answer in HTTP ({why})"),
        }
    }
}

/// One worker's connections.
#[derive(Debug)]
pub(super) struct Slot {
    endpoint: Endpoint,
    /// The worker's id, as a header value.
    id: HeaderValue,
    // Boxed, because a connection is handed around more often than it is made.
    #[allow(clippy::vec_box)]
    idle: Mutex<Vec<Box<Conn>>>,
    max_idle: usize,
    /// HTTP/1 connections open, idle or not.
    open: Arc<AtomicUsize>,
    h2: tokio::sync::Mutex<h2::Shared>,
}

impl Slot {
    fn new(endpoint: Endpoint, id: &str, options: &PoolOptions) -> Arc<Self> {
        Arc::new(Self {
            endpoint,
            id: HeaderValue::from_str(id).unwrap_or(HeaderValue::from_static("unprintable")),
            idle: Mutex::default(),
            max_idle: options.max_idle_per_worker,
            open: Arc::default(),
            h2: tokio::sync::Mutex::default(),
        })
    }

    /// The worker's id, as a header value.
    pub(super) fn id(&self) -> &HeaderValue {
        &self.id
    }

    fn put(&self, conn: Box<Conn>) {
        let mut idle = self.idle.lock();
        if idle.len() < self.max_idle {
            idle.push(conn);
        }
    }

    /// The connection used last that is still good; bad ones are closed on the way.
    fn take(&self, not_before: Option<Instant>) -> Option<Box<Conn>> {
        loop {
            let mut conn = self.idle.lock().pop()?;
            if not_before.is_none_or(|limit| conn.idle_since >= limit) && conn.is_quiet() {
                return Some(conn);
            }
        }
    }

    /// Closes connections that were idle too long, or were closed by the worker.
    fn sweep(&self, not_before: Option<Instant>) {
        let mut idle = self.idle.lock();
        idle.retain_mut(|conn| not_before.is_none_or(|limit| conn.idle_since >= limit) && conn.is_quiet());
    }
}

/// What tells one registration of a worker from another: a slot lives as long as it. Or a replica's
/// client listener, which an edge sends to.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum SlotKey {
    Worker(WorkerIx, u64),
    Replica(String),
}

/// Connections to workers, owned by one shard.
#[derive(Debug)]
pub struct Pool {
    options: PoolOptions,
    allowed: Arc<Allowed>,
    slots: Mutex<Slots>,
}

#[derive(Debug)]
struct Slots {
    by_worker: HashMap<SlotKey, Arc<Slot>>,
    swept: Instant,
}

/// Time between two looks at idle connections.
const SWEEP: Duration = Duration::from_secs(1);

impl Pool {
    /// A pool whose connections may go to `allowed` addresses.
    pub fn new(options: &PoolOptions, allowed: Arc<Allowed>) -> Self {
        let slots = Slots { by_worker: HashMap::new(), swept: Instant::now() };
        Self { options: options.clone(), allowed, slots: Mutex::new(slots) }
    }

    /// The connections of a worker.
    pub(super) fn slot(&self, worker: &WorkerView) -> Result<Arc<Slot>, EndpointError> {
        let key = SlotKey::Worker(worker.record.ix, worker.record.generation);
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.by_worker.get(&key) {
            return Ok(Arc::clone(slot));
        }
        let spec = &worker.record.spec;
        let slot = Slot::new(Endpoint::parse(&spec.url, spec.http2)?, spec.id.as_str(), &self.options);
        slots.by_worker.insert(key, Arc::clone(&slot));
        Ok(slot)
    }

    /// The connections to a replica's client listener.
    pub(super) fn slot_of_replica(&self, name: &str, url: &str) -> Result<Arc<Slot>, EndpointError> {
        let key = SlotKey::Replica(url.to_owned());
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.by_worker.get(&key) {
            return Ok(Arc::clone(slot));
        }
        let slot = Slot::new(Endpoint::parse(url, false)?, name, &self.options);
        slots.by_worker.insert(key, Arc::clone(&slot));
        Ok(slot)
    }

    /// Closes idle connections that are due and forgets workers that are not in use any more.
    /// To be called now and then; looks at most once a second.
    pub(super) fn sweep(&self) {
        let mut slots = self.slots.lock();
        if slots.swept.elapsed() < SWEEP {
            return;
        }
        slots.swept = Instant::now();
        let not_before = self.not_before();
        slots.by_worker.retain(|_, slot| {
            slot.sweep(not_before);
            let in_use = Arc::strong_count(slot) > 1;
            // Without a connection it costs nothing to make anew; a worker that is gone leaves
            // nothing behind.
            let has_h2 = slot.h2.try_lock().is_ok_and(|mut h2| h2.sweep(self.options.h2_idle_timeout));
            in_use || has_h2 || !slot.idle.lock().is_empty()
        });
    }

    /// Connections idle since before this are too old; `None` when none can be.
    fn not_before(&self) -> Option<Instant> {
        Instant::now().checked_sub(self.options.idle_timeout)
    }

    /// What every worker is shown as `Authorization`.
    pub(super) fn authorization(&self) -> Option<&HeaderValue> {
        self.options.authorization.as_ref()
    }

    /// Sends a request and waits for the response head; over a new connection if `fresh`.
    /// Dropping the future aborts the request: it closes the connection, or resets the stream.
    pub(super) async fn send(
        &self,
        slot: &Arc<Slot>,
        request: &Outgoing<'_>,
        fresh: bool,
    ) -> Result<Response<UpstreamBody>, SendError> {
        if slot.endpoint.http2 {
            // A connection that turned out stale was forgotten: the next one is fresh anyway.
            return self.send_h2(slot, request).await;
        }
        let kept = if fresh { None } else { slot.take(self.not_before()) };
        let conn = match kept {
            Some(conn) => conn,
            None => self.open_h1(slot).await?,
        };
        let (head, body) = Exchange::new(conn, request, slot).await?;
        let mut response = Response::new(UpstreamBody::H1(body));
        *response.status_mut() = head.status;
        *response.headers_mut() = head.headers;
        Ok(response)
    }

    async fn connect(&self, slot: &Slot) -> Result<connect::Stream, SendError> {
        let options = &self.options;
        connect::connect(&self.allowed, options.tls.as_ref(), &slot.endpoint, options.connect_timeout).await
    }

    // Boxed: seldom needed, and large.
    fn open_h1<'a>(
        &'a self,
        slot: &'a Arc<Slot>,
    ) -> Pin<Box<dyn Future<Output = Result<Box<Conn>, SendError>> + Send + 'a>> {
        Box::pin(async move {
            let ticket = Ticket::take(slot, self.options.max_per_worker).ok_or(SendError::Full)?;
            let stream = self.connect(slot).await?;
            Ok(Conn::new(stream, self.options.max_head_bytes, ticket))
        })
    }

    async fn open_h2(&self, slot: &Slot) -> Result<h2::Sender, SendError> {
        let stream = self.connect(slot).await?;
        h2::handshake(stream, self.options.max_head_bytes).await
    }

    fn send_h2<'a>(
        &'a self,
        slot: &'a Arc<Slot>,
        request: &'a Outgoing<'_>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<UpstreamBody>, SendError>> + Send + 'a>> {
        Box::pin(async move {
            let began = Instant::now();
            let (mut sender, number, reused) = {
                let mut shared = slot.h2.lock().await;
                if let Some((sender, number)) = shared.open() {
                    (sender, number, true)
                } else if let Some(why) = shared.failed_since(began) {
                    return Err(why);
                } else {
                    let made = self.open_h2(slot).await;
                    let (sender, number) = shared.made(made)?;
                    (sender, number, false)
                }
            };
            let response = match h2::send(&mut sender, request, slot, reused).await {
                Ok(response) => response,
                Err(why) => {
                    if why == SendError::Stale {
                        slot.h2.lock().await.forget(number);
                    }
                    return Err(why);
                }
            };
            Ok(response.map(UpstreamBody::H2))
        })
    }

    /// `GET path`, or `POST` where there is JSON, over a connection of its own, for what is no
    /// client's request.
    pub(super) async fn fetch(
        &self,
        endpoint: &Endpoint,
        path: &str,
        json: Option<Bytes>,
    ) -> Result<(StatusCode, UpstreamBody), SendError> {
        let slot = Slot::new(endpoint.clone(), "", &self.options);
        let request_id = super::headers::new_request_id();
        let none = HeaderMap::new();
        let rules = HeaderRules::default();
        let mut headers = HeadersToWorker::own(&request_id, &none, &rules);
        if !endpoint.http2 {
            headers.ours.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(authorization) = &self.options.authorization {
            headers.ours.insert(http::header::AUTHORIZATION, authorization.clone());
        }
        let method = if json.is_some() { http::Method::POST } else { http::Method::GET };
        if json.is_some() {
            let json = HeaderValue::from_static("application/json");
            headers.ours.insert(http::header::CONTENT_TYPE, json);
        }
        let request = Outgoing::new(&method, path, headers, json.unwrap_or_default());
        let response = self.send(&slot, &request, true).await?;
        Ok((response.status(), response.into_body()))
    }
}

/// A place among the open connections of a worker; given back when dropped.
#[derive(Debug)]
struct Ticket(Arc<AtomicUsize>);

impl Ticket {
    fn take(slot: &Arc<Slot>, most: usize) -> Option<Self> {
        let ticket = Self(Arc::clone(&slot.open));
        (ticket.0.fetch_add(1, Ordering::AcqRel) < most).then_some(ticket)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The body of a worker's answer. Dropping it before its end aborts the request there.
#[derive(Debug)]
pub(super) enum UpstreamBody {
    /// Read here.
    H1(H1Body),
    /// Read by hyper.
    H2(Incoming),
    /// Made here, of an answer that was read to its end.
    Whole(Option<Bytes>),
    /// Of two workers.
    Pair(Box<PairBody>),
}

impl UpstreamBody {
    /// Whether nobody knows beforehand how long it is, and its end is marked all the same. To be asked
    /// before it is read.
    pub(super) fn is_chunked(&self) -> bool {
        match self {
            UpstreamBody::H1(body) => body.is_chunked(),
            UpstreamBody::H2(body) => body.size_hint().exact().is_none(),
            UpstreamBody::Whole(_) => false,
            UpstreamBody::Pair(body) => body.is_chunked(),
        }
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match self.get_mut() {
            UpstreamBody::H1(body) => body.poll_data(cx).map_ok(Frame::data),
            UpstreamBody::H2(body) => loop {
                match std::task::ready!(Pin::new(&mut *body).poll_frame(cx)) {
                    // Trailers are dropped, as over HTTP/1.
                    Some(Ok(frame)) if !frame.is_data() => {}
                    other => return Poll::Ready(other.map(|frame| frame.map_err(io::Error::other))),
                }
            },
            UpstreamBody::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            UpstreamBody::Pair(body) => body.poll(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            UpstreamBody::H1(body) => body.is_end(),
            UpstreamBody::H2(body) => body.is_end_stream(),
            UpstreamBody::Whole(bytes) => bytes.is_none(),
            UpstreamBody::Pair(body) => body.is_end(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            UpstreamBody::H1(body) => body.size_hint(),
            UpstreamBody::H2(body) => body.size_hint(),
            UpstreamBody::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            UpstreamBody::Pair(body) => body.size(),
        }
    }
}
