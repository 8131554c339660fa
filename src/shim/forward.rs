//! Everything that is not resumed: requests and answers on their way through, frame by frame.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Sleep, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;

use super::Shared;
use super::request::{Trouble, without_hop_by_hop};
use super::resume::Patience;
use super::upstream::{AnyBody, BoxError, Call, SendError};

/// Pieces of a body that wait for a client, each at most a read or an event: enough that reading
/// and writing overlap, and a client that takes nothing holds the upstream back.
const AHEAD: usize = 4;

/// What a body's pieces go through to the client.
pub(super) type Pieces = mpsc::Sender<Result<Frame<Bytes>, BoxError>>;

/// A body that is fed from elsewhere.
pub(super) fn fed() -> (Pieces, AnyBody) {
    let (pieces, taken) = mpsc::channel(AHEAD);
    (pieces, StreamBody::new(ReceiverStream::new(taken)).boxed_unsync())
}

/// A body held in memory.
pub(super) fn full(bytes: impl Into<Bytes>) -> AnyBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// The body of a request that is passed on.
pub(super) enum Upload {
    /// As it comes from the client.
    Coming(Coming),
    /// Read already.
    Read(Bytes),
}

/// Sends a request on and its answer back. Connecting is tried again, at one address after the
/// other, as long as nothing of the request was sent.
pub(super) async fn pass(
    shared: &Arc<Shared>,
    method: Method,
    path: &PathAndQuery,
    headers: HeaderMap,
    upload: Upload,
) -> Result<Response<AnyBody>, Trouble> {
    let settings = &shared.settings;
    let mut patience = Patience::new(settings.connect_budget);
    let mut turn = shared.turn.load(Ordering::Relaxed);
    loop {
        let body = match &upload {
            Upload::Coming(coming) => coming.again().boxed_unsync(),
            Upload::Read(bytes) => full(bytes.clone()),
        };
        let call = Call { turn, path, fresh: false, head_timeout: settings.head_timeout };
        let error = match shared.upstream.send(call, method.clone(), headers.clone(), body).await {
            Ok(response) => {
                shared.turn.store(turn, Ordering::Relaxed);
                return Ok(answer(shared, response));
            }
            Err(error) => error,
        };
        let pause = match &error {
            SendError::Unsent { .. } => patience.next_pause(Instant::now(), rand::random()),
            SendError::Broken { .. } => return Err(Trouble::new("upstream_failed", error.to_string())),
        };
        let Some(pause) = pause else {
            return Err(Trouble::new("upstream_connect_failed", error.to_string()));
        };
        turn = turn.wrapping_add(1);
        sleep(pause).await;
    }
}

/// An answer on its way to the client. A task reads it, so that neither a silent upstream nor a
/// client that takes nothing holds a connection for longer than `idle_timeout`.
pub(super) fn answer(shared: &Arc<Shared>, response: Response<Incoming>) -> Response<AnyBody> {
    let (mut parts, body) = response.into_parts();
    parts.headers = without_hop_by_hop(&parts.headers);
    if body.is_end_stream() {
        return Response::from_parts(parts, Empty::new().map_err(|never| match never {}).boxed_unsync());
    }
    let (pieces, fed) = fed();
    let idle = shared.settings.idle_timeout;
    let cut = shared.cut.clone();
    shared.tasks.spawn(async move {
        tokio::select! {
            () = copy(body, &pieces, idle) => {}
            () = cut.cancelled() => {
                let _ = pieces.try_send(Err("the shim was stopped".into()));
            }
        }
    });
    Response::from_parts(parts, fed)
}

async fn copy(mut body: Incoming, pieces: &Pieces, idle: Duration) {
    loop {
        let read = tokio::select! {
            read = timeout(idle, body.frame()) => read,
            () = pieces.closed() => return,
        };
        let piece = match read {
            Ok(None) => return,
            Ok(Some(piece)) => piece.map_err(BoxError::from),
            Err(_) => Err(BoxError::from("the upstream was silent for too long")),
        };
        let is_last = piece.is_err();
        match timeout(idle, pieces.send(piece)).await {
            Ok(Ok(())) if !is_last => {}
            _ => return,
        }
    }
}

/// A client's body, which can be sent again as long as nobody has begun to read it.
#[derive(Debug)]
pub(super) struct Coming {
    body: Arc<Mutex<Incoming>>,
    idle: Duration,
    /// Runs while the client sends nothing.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Coming {
    pub(super) fn new(body: Incoming, idle: Duration) -> Self {
        Self { body: Arc::new(Mutex::new(body)), idle, timer: None }
    }

    /// Another handle on the same body.
    fn again(&self) -> Self {
        Self { body: Arc::clone(&self.body), idle: self.idle, timer: None }
    }
}

impl Body for Coming {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut *self.body.lock()).poll_frame(cx);
        if let Poll::Ready(frame) = polled {
            self.timer = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(BoxError::from)));
        }
        let idle = self.idle;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(idle)));
        timer.as_mut().poll(cx).map(|()| Some(Err("the client was silent for too long".into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.lock().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.lock().size_hint()
    }
}
