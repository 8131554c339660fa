//! Response bodies of the front, and reading request bodies within bounds.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

use super::conn::InFlight;
use super::errors::{ApiError, Code};
use super::keys::Pass;
use super::pump::Pumped;
use super::relay::Relay;
use super::streams::body::StreamBody;

/// An error inside a body; hyper answers it by breaking the connection or the h2 stream.
pub(super) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Longest body held in memory that nobody looks after: as much as waits for a client in any case.
const SHORT: usize = 16 * 1024;

/// What a response carries. Holds the connection's in-flight mark until the last byte is
/// handed over, so that idle timeouts do not run meanwhile; and the request's place among those
/// in flight of its API key.
#[derive(Debug)]
pub struct FrontBody {
    kind: Kind,
    in_flight: Option<InFlight>,
    pass: Pass,
}

#[derive(Debug)]
enum Kind {
    Full(Option<Bytes>),
    Relay(Box<Relay>),
    Axum(axum::body::Body),
    Legs(axum::body::Body),
    Pumped(Pumped),
    Stream(Box<StreamBody>),
}

impl FrontBody {
    /// A body held in memory.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self {
            kind: Kind::Full(Some(bytes).filter(|b| !b.is_empty())),
            in_flight: None,
            pass: Pass::default(),
        }
    }

    /// An upstream response on its way through.
    pub(super) fn relay(relay: Relay) -> Self {
        Self { kind: Kind::Relay(Box::new(relay)), in_flight: None, pass: Pass::default() }
    }

    /// A stream that a client listens to.
    pub(super) fn stream(body: StreamBody) -> Self {
        Self { kind: Kind::Stream(Box::new(body)), in_flight: None, pass: Pass::default() }
    }

    /// The answer of an axum handler.
    pub(super) fn axum(body: axum::body::Body) -> Self {
        Self { kind: Kind::Axum(body), in_flight: None, pass: Pass::default() }
    }

    /// What comes of two engines at once, as long as that takes.
    pub(super) fn legs(body: axum::body::Body) -> Self {
        Self { kind: Kind::Legs(body), in_flight: None, pass: Pass::default() }
    }

    pub(super) fn holding(mut self, in_flight: InFlight) -> Self {
        self.in_flight = Some(in_flight);
        self
    }

    /// Has a body that takes time or memory read by a task of its own, which lets go of the worker and
    /// of the HTTP/2 stream when the client takes nothing for `stall`. The task holds the in-flight
    /// mark and the pass, too.
    pub(super) fn pumped(self, stall: Duration) -> Self {
        match &self.kind {
            Kind::Relay(relay) if relay.is_end_stream() => self,
            Kind::Full(Some(bytes)) if bytes.len() <= SHORT => self,
            Kind::Relay(_) | Kind::Stream(_) | Kind::Legs(_) | Kind::Full(Some(_)) => {
                let kind = Kind::Pumped(Pumped::new(self, stall));
                Self { kind, in_flight: None, pass: Pass::default() }
            }
            _ => self,
        }
    }

    pub(super) fn holding_pass(mut self, pass: Pass) -> Self {
        self.pass = pass;
        self
    }
}

impl Body for FrontBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.kind {
            Kind::Full(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Kind::Relay(relay) => Pin::new(relay.as_mut()).poll_frame(cx),
            Kind::Axum(body) | Kind::Legs(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Kind::Pumped(body) => Pin::new(body).poll_frame(cx),
            Kind::Stream(body) => Pin::new(body.as_mut()).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Full(bytes) => bytes.is_none(),
            Kind::Relay(relay) => relay.is_end_stream(),
            Kind::Axum(body) | Kind::Legs(body) => body.is_end_stream(),
            Kind::Pumped(body) => body.is_end_stream(),
            Kind::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Kind::Relay(relay) => relay.size_hint(),
            Kind::Axum(body) | Kind::Legs(body) => body.size_hint(),
            Kind::Pumped(body) => body.size_hint(),
            Kind::Stream(body) => body.size_hint(),
        }
    }
}

/// Bounds on reading a request body.
#[derive(Clone, Copy, Debug)]
pub struct BodyLimits {
    /// Most bytes; more is answered with 413.
    pub max_bytes: usize,
    /// Longest time from head to last byte.
    pub total: Duration,
    /// Time allowed before `floor` counts, so that a short pause does no harm.
    pub grace: Duration,
    /// Least bytes a second after the grace; slower is answered with 408.
    pub floor: u64,
}

impl BodyLimits {
    /// Bounds with the ordinary times: 60 s in all, 1 KiB/s after 10 s.
    pub fn of(max_bytes: usize) -> Self {
        Self { max_bytes, total: Duration::from_secs(60), grace: Duration::from_secs(10), floor: 1024 }
    }
}

/// Reads a whole body. A body of one frame is not copied.
pub(super) async fn collect<B>(mut body: B, limits: &BodyLimits) -> Result<Bytes, ApiError>
where
    B: Body<Data = Bytes> + Unpin,
{
    let announced = body.size_hint().lower();
    if announced > limits.max_bytes as u64 {
        return Err(too_large(limits));
    }
    let started = Instant::now();
    let mut first = Bytes::new();
    let mut rest: Option<BytesMut> = None;
    let mut received = 0_usize;
    loop {
        let earned = Duration::from_millis(received as u64 * 1000 / limits.floor.max(1));
        let deadline = started + limits.total.min(limits.grace + earned);
        let frame = match timeout_at(deadline, body.frame()).await {
            Err(_) => return Err(too_slow(limits)),
            Ok(None) => break,
            Ok(Some(Err(_))) => {
                return Err(
                    ApiError::new(Code::BodyTruncated, "the body ended early or is malformed").close()
                );
            }
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        received += data.len();
        if received > limits.max_bytes {
            return Err(too_large(limits));
        }
        match &mut rest {
            Some(rest) => rest.extend_from_slice(&data),
            None if first.is_empty() => first = data,
            None => {
                // Room for what is announced, but never more than 1 MiB on somebody's word.
                let room = (announced as usize).min(1 << 20).max(first.len() + data.len());
                let mut joined = BytesMut::with_capacity(room);
                joined.extend_from_slice(&first);
                joined.extend_from_slice(&data);
                rest = Some(joined);
            }
        }
    }
    Ok(rest.map_or(first, BytesMut::freeze))
}

fn too_large(limits: &BodyLimits) -> ApiError {
    ApiError::new(
        Code::BodyTooLarge,
        format!("the body is larger than the {} bytes this route accepts", limits.max_bytes),
    )
    .close()
}

fn too_slow(limits: &BodyLimits) -> ApiError {
    let seconds = limits.total.as_secs_f32();
    let floor = limits.floor;
    let text = format!("the body must arrive within {seconds} s and no slower than {floor} bytes a second");
    ApiError::new(Code::BodyTimeout, text).close()
}

/// Longest time spent on [`discard`].
const DISCARD_TOTAL: Duration = Duration::from_secs(2);
/// Longest pause in a body that is being discarded.
const DISCARD_PAUSE: Duration = Duration::from_millis(100);

/// Reads on for a little while after a body was refused for its size, at most as much again,
/// because closing a socket with unread bytes resets it and the client may never see why.
pub(super) async fn discard<B>(mut body: B, limits: &BodyLimits)
where
    B: Body<Data = Bytes> + Unpin,
{
    let end = Instant::now() + DISCARD_TOTAL;
    let mut left = limits.max_bytes;
    while let Ok(Some(Ok(frame))) = timeout_at(end.min(Instant::now() + DISCARD_PAUSE), body.frame()).await {
        let length = frame.data_ref().map_or(0, Bytes::len);
        if length > left {
            return;
        }
        left -= length;
    }
}
