//! Reply bodies: a server-sent event stream out of an outbox, and how the fault switches cut it.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::error::ApiError;
use super::rids::Rids;
use crate::engines::sim::engine::Engine;
use crate::engines::sim::outbox::{Delta, Outbox, Output};

/// Whether a connection is to be closed with a reset; shared by its socket and its requests.
pub type ResetFlag = Arc<AtomicBool>;

/// Turns what the engine says about a request into the words of its route.
pub trait Dialect: Send {
    /// Whether every choice has its finish reason.
    fn is_finished(&self) -> bool;

    /// Keeps a delta for the one reply.
    fn collect(&mut self, delta: Delta);

    /// The one reply.
    fn reply(&self) -> Vec<u8>;

    /// The events of a delta.
    fn stream(&mut self, delta: &Delta, out: &mut VecDeque<Bytes>);

    /// The events after the last delta.
    fn stream_end(&mut self, out: &mut VecDeque<Bytes>);

    /// The last events of a stream that failed.
    fn stream_failed(&mut self, error: &ApiError, out: &mut VecDeque<Bytes>);
}

/// A request in the engine; dropping it before its end aborts it.
pub struct Running {
    engine: Arc<Engine>,
    outbox: Arc<Outbox>,
    finished: bool,
    _rids: Rids,
}

impl Running {
    /// For a request that was submitted with this outbox.
    pub(super) fn new(engine: Arc<Engine>, outbox: Arc<Outbox>, rids: Rids) -> Self {
        engine.stats.server_load.add(1);
        Self { engine, outbox, finished: false, _rids: rids }
    }

    /// Reads all of it. The error means that the connection is to be cut.
    pub async fn collect(
        mut self,
        shaper: &mut dyn Dialect,
        reset: &ResetFlag,
    ) -> io::Result<Result<(), ApiError>> {
        while !shaper.is_finished() {
            let output = std::future::poll_fn(|context| {
                if self.engine.faults().reset {
                    return Poll::Ready(None);
                }
                self.outbox.poll_next(context).map(Some)
            });
            match output.await {
                None => return Err(reset_connection(reset)),
                Some(Output::Delta(delta)) => shaper.collect(delta),
                Some(Output::Failed(failure)) => {
                    self.finished = true;
                    return Ok(Err(ApiError::failure(&failure)));
                }
            }
        }
        std::future::poll_fn(|context| self.outbox.poll_parted(context)).await;
        self.finished = true;
        Ok(Ok(()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let load = &self.engine.stats.server_load;
        load.sub(1);
        if !self.finished {
            self.engine.cancel(&self.outbox);
        }
    }
}

/// Marks the connection and makes the error that ends it.
pub fn reset_connection(reset: &ResetFlag) -> io::Error {
    reset.store(true, Ordering::Release);
    io::ErrorKind::ConnectionReset.into()
}

/// The events of one request.
pub struct EventStream {
    running: Running,
    shaper: Box<dyn Dialect>,
    pending: VecDeque<Bytes>,
    sent: u64,
    ended: bool,
    cutting: bool,
    reset: ResetFlag,
}

impl EventStream {
    /// For a submitted request.
    pub fn new(running: Running, shaper: Box<dyn Dialect>, reset: ResetFlag) -> Self {
        Self { running, shaper, pending: VecDeque::new(), sent: 0, ended: false, cutting: false, reset }
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            let faults = self.running.engine.faults();
            if faults.reset {
                return Poll::Ready(Some(Err(reset_connection(&self.reset))));
            }
            if faults.close_after_events.is_some_and(|events| self.sent >= events) {
                if !std::mem::replace(&mut self.cutting, true) {
                    // One turn for the connection to write what it has; an error would discard that.
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                return Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())));
            }
            if faults.garbage && !self.ended {
                self.ended = true;
                self.pending = [Bytes::from_static(b"data: {\"id\":\"cmpl-\xff\xfe,\n\n")].into();
            }
            if let Some(event) = self.pending.pop_front() {
                self.sent += 1;
                return Poll::Ready(Some(Ok(event)));
            }
            if self.ended {
                return self.running.outbox.poll_parted(context).map(|()| {
                    self.running.finished = true;
                    None
                });
            }
            match self.running.outbox.poll_next(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Output::Delta(delta)) => {
                    self.shaper.stream(&delta, &mut self.pending);
                    if self.shaper.is_finished() {
                        self.shaper.stream_end(&mut self.pending);
                        self.end();
                    }
                }
                Poll::Ready(Output::Failed(failure)) => {
                    self.shaper.stream_failed(&ApiError::failure(&failure), &mut self.pending);
                    self.end();
                }
            }
        }
    }

    fn end(&mut self) {
        self.ended = true;
    }
}

/// The body of any reply.
pub enum ReplyBody {
    /// All at once.
    Full(Option<Bytes>),
    /// Event by event.
    Events(Box<EventStream>),
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            ReplyBody::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            ReplyBody::Events(stream) => {
                stream.poll_event(context).map(|event| event.map(|event| event.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ReplyBody::Full(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            ReplyBody::Events(stream) => stream.running.finished && stream.pending.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ReplyBody::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            ReplyBody::Events(_) => SizeHint::default(),
        }
    }
}
