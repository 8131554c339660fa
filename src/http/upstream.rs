//! The connection pool to workers: HTTP/1.1 keep-alive, addresses checked at every connect,
//! no redirects, never half-closed.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::allowed::{Allowed, Forbidden};

/// Bounds of a pool.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    /// Longest time to resolve and connect: 2 s.
    pub connect_timeout: Duration,
    /// Idle connections kept for a worker: 64.
    pub max_idle_per_worker: usize,
    /// How long an idle connection is kept: 4 s, less than the 5 s of uvicorn, which vLLM and
    /// SGLang run on, so that a request seldom meets a connection just being closed.
    pub idle_timeout: Duration,
    /// Longest response head: 64 KiB.
    pub max_head_bytes: usize,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            max_idle_per_worker: 64,
            idle_timeout: Duration::from_secs(4),
            max_head_bytes: 64 * 1024,
        }
    }
}

/// Connections to workers, owned by one shard.
#[derive(Clone)]
pub struct Pool {
    client: Client<Connector, Full<Bytes>>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pool")
    }
}

/// How a request failed before its response head.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SendError {
    /// No connection: refused, unreachable or timed out. Nothing was sent.
    Connect(String),
    /// The worker's address may not be connected to. Nothing was sent.
    Forbidden(String),
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
            SendError::Stale => f.write_str("a kept-alive connection was closed"),
            SendError::Closed => f.write_str("closed the connection without an answer"),
            SendError::Garbage(why) => write!(f, "did not answer in HTTP ({why})"),
        }
    }
}

impl Pool {
    /// A pool whose connections may go to `allowed` addresses.
    pub fn new(options: &PoolOptions, allowed: Arc<Allowed>) -> Self {
        let connector = Connector { allowed, connect_timeout: options.connect_timeout };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .pool_idle_timeout(options.idle_timeout)
            .pool_max_idle_per_host(options.max_idle_per_worker)
            .http1_max_buf_size(options.max_head_bytes)
            .build(connector);
        Self { client }
    }

    /// Sends a request and waits for the response head. Dropping the future aborts the request
    /// and closes its connection.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, SendError> {
        let response = self.client.request(request).await.map_err(|error| classify(&error))?;
        if let Some(served) = response.extensions().get::<Served>() {
            served.0.fetch_add(1, Ordering::Relaxed);
        }
        Ok(response)
    }
}

fn classify(error: &Error) -> SendError {
    let root = root_cause(error);
    if error.is_connect() {
        return match root.downcast_ref::<Forbidden>() {
            Some(why) => SendError::Forbidden(why.to_string()),
            None => SendError::Connect(root.to_string()),
        };
    }
    let mut extras = http::Extensions::new();
    if let Some(connected) = error.connect_info() {
        connected.get_extras(&mut extras);
    }
    let reused = extras.get::<Served>().is_some_and(|served| served.0.load(Ordering::Relaxed) > 0);
    let hyper = std::error::Error::source(error).and_then(|source| source.downcast_ref::<hyper::Error>());
    match hyper {
        Some(e) if e.is_parse() => SendError::Garbage(e.to_string()),
        _ if reused => SendError::Stale,
        _ => SendError::Closed,
    }
}

fn root_cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> &'a (dyn std::error::Error + 'static) {
    let mut root = error;
    while let Some(source) = deeper(root) {
        root = source;
    }
    root
}

/// The cause of an error. `io::Error` skips the error it was made from, which is the one of
/// interest here.
fn deeper<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a (dyn std::error::Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

/// Responses that came over a connection: tells a reused connection from a fresh one.
#[derive(Clone, Debug, Default)]
struct Served(Arc<AtomicU32>);

/// Connects to allowed addresses only.
#[derive(Clone, Debug)]
struct Connector {
    allowed: Arc<Allowed>,
    connect_timeout: Duration,
}

impl tower::Service<Uri> for Connector {
    type Response = UpstreamIo;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<UpstreamIo>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let allowed = Arc::clone(&self.allowed);
        let limit = self.connect_timeout;
        Box::pin(async move {
            let connected = timeout(limit, connect(&allowed, &uri)).await;
            connected.unwrap_or_else(|_| {
                let text = format!("no connection within {} ms", limit.as_millis());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            })
        })
    }
}

/// The port of a worker's URL, 80 when it names none; `None` when it names one that cannot be.
pub(super) fn port_of(uri: &Uri) -> Option<u16> {
    let authority = uri.authority()?;
    match authority.port_u16() {
        Some(port) => Some(port).filter(|port| *port != 0),
        None => (authority.as_str() == authority.host()).then_some(80),
    }
}

async fn connect(allowed: &Allowed, uri: &Uri) -> io::Result<UpstreamIo> {
    if uri.scheme_str() != Some("http") {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "only http:// workers can be connected to"));
    }
    let host = uri.host().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no host"))?;
    let port = port_of(uri).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "invalid port"))?;
    let mut last = None;
    for address in allowed.resolve(host, port).await? {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(UpstreamIo { io: TokioIo::new(stream), served: Served::default() });
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
}

/// A connection to a worker.
#[derive(Debug)]
struct UpstreamIo {
    io: TokioIo<TcpStream>,
    served: Served,
}

impl Connection for UpstreamIo {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.served.clone())
    }
}

impl Read for UpstreamIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl Write for UpstreamIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }
}
