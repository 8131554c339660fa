//! An upstream response body on its way to the client: frame by frame as it comes, with the
//! worker's booking held until the end and a decent ending when the worker breaks off.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::body::BodyError;
use super::errors::{ApiError, Code};
use super::growth::Growth;
use super::metrics::{Outcome, Tracked};
use super::queue::Held;
use super::routes::{Dialect, Route};
use super::sequel::Sequel;
use super::upstream::UpstreamBody;

/// How a relayed body is watched over.
#[derive(Debug)]
pub(super) struct RelayLimits {
    /// Longest pause between two frames.
    pub(super) idle: Duration,
    /// When the whole request must be over.
    pub(super) deadline: Instant,
    /// How the response ends, if it is an event stream: its failure can be told in an event.
    pub(super) ending: Option<Ending>,
    /// How the output fills blocks, if it is an event stream of a known prompt's answer.
    pub(super) growth: Option<Growth>,
    /// Learns what the answer adds to the engine's cache, if nobody else tells.
    pub(super) sequel: Option<Sequel>,
}

/// How event streams of a route end, well or badly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ending {
    /// With `data: [DONE]`; an error is an object in a `data` line before it.
    Done,
    /// With the last event; an error is an `error` event in OpenAI's shape.
    ErrorEvent,
    /// With the last event; an error is an `error` event in Anthropic's shape.
    AnthropicError,
}

impl Ending {
    /// The ending of a route's streams.
    pub(super) fn of(route: Route) -> Self {
        match route {
            Route::ChatCompletions | Route::Completions | Route::Generate => Ending::Done,
            Route::Messages => Ending::AnthropicError,
            _ => Ending::ErrorEvent,
        }
    }

    /// The events that tell a client that its stream has failed, each without the empty line at its
    /// end.
    pub(super) fn failure_lines(self, error: &ApiError) -> Vec<Bytes> {
        match self {
            Ending::Done | Ending::ErrorEvent => self.failure_lines_of(&error.json()),
            Ending::AnthropicError => self.failure_lines_of(&error.json_in(Dialect::Anthropic)),
        }
    }

    /// The same of an error as JSON in one line.
    pub(super) fn failure_lines_of(self, json: &str) -> Vec<Bytes> {
        match self {
            Ending::Done => vec![format!("data: {json}\n").into(), Bytes::from_static(b"data: [DONE]\n")],
            Ending::ErrorEvent | Ending::AnthropicError => {
                vec![format!("event: error\ndata: {json}\n").into()]
            }
        }
    }

    /// The same, whole.
    fn failure(self, error: &ApiError) -> Bytes {
        let mut text = self.failure_lines(error).join(&b"\n"[..]);
        text.extend_from_slice(b"\n");
        text.into()
    }
}

/// A body on its way. Dropping it drops the upstream body, which closes that connection and so
/// aborts the request there.
#[derive(Debug)]
pub(super) struct Relay {
    upstream: Option<UpstreamBody>,
    /// At the worker; nothing for what comes from a replica, which has booked it.
    booking: Option<Held>,
    tracked: Tracked,
    limits: RelayLimits,
    last_frame: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    tail: Tail,
    seen_data: bool,
    /// Breaks the response off with the next poll.
    breaking: Option<ApiError>,
}

impl Relay {
    pub(super) fn new(
        upstream: UpstreamBody,
        booking: Option<Held>,
        tracked: Tracked,
        limits: RelayLimits,
    ) -> Self {
        let mut relay = Self {
            upstream: Some(upstream),
            booking,
            tracked,
            limits,
            last_frame: Instant::now(),
            timer: None,
            tail: Tail::default(),
            seen_data: false,
            breaking: None,
        };
        if relay.limits.ending.is_none() && relay.upstream.as_ref().is_some_and(Body::is_end_stream) {
            // hyper never polls a body that says it is over.
            relay.tracked.finish_with_status();
        }
        relay
    }

    /// The body ended well.
    fn end(&mut self) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.upstream = None;
        if let Some(sequel) = self.limits.sequel.take() {
            sequel.finish();
        }
        self.tracked.finish_with_status();
        Poll::Ready(None)
    }

    /// The worker broke off or fell silent: the last event of an event stream, an error (which
    /// truncates the response visibly) of anything else.
    fn fail(
        &mut self,
        cx: &mut Context<'_>,
        error: ApiError,
        outcome: Outcome,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.upstream = None;
        // Nobody knows what the worker still has.
        self.limits.sequel = None;
        let worker = self.booking.as_ref().and_then(Held::worker).map(ToString::to_string);
        let who = worker.map_or_else(|| "a replica".to_owned(), |worker| format!("worker {worker}"));
        self.tracked.note_error(format!("{who}: {}", error.message));
        self.tracked.finish(outcome);
        let Some(ending) = self.limits.ending else {
            // Not at once: with the error goes what was not flushed yet, and hyper flushes when
            // there is nothing to read.
            self.breaking = Some(error);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        };
        let event = ending.failure(&error);
        if self.tail.at_event_boundary() {
            return Poll::Ready(Some(Ok(Frame::data(event))));
        }
        let ended = [b"\n\n", event.as_ref()].concat();
        Poll::Ready(Some(Ok(Frame::data(ended.into()))))
    }

    fn time_out(
        &mut self,
        cx: &mut Context<'_>,
        error: ApiError,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let in_event = self.limits.ending.is_some();
        let error = if in_event { ApiError { code: Code::UpstreamFailed, ..error } } else { error };
        self.fail(cx, error, Outcome::Timeout)
    }

    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<ApiError> {
        loop {
            let deadline = self.limits.deadline.min(self.last_frame + self.limits.idle);
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            // The timer is not moved with every frame: it looks up when it rings.
            let now = Instant::now();
            if now < deadline {
                timer.as_mut().reset(deadline);
                continue;
            }
            if now >= self.limits.deadline {
                return Poll::Ready(out_of_time());
            }
            let text = format!("the worker sent nothing for {} ms", self.limits.idle.as_millis());
            return Poll::Ready(ApiError::new(Code::UpstreamTimeout, text));
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The client has gone, or hyper knew the length and saw no need to poll again.
        if let Some(sequel) = self.limits.sequel.take() {
            sequel.finish();
        }
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(error) = this.breaking.take() {
            return Poll::Ready(Some(Err(error.into())));
        }
        let Some(upstream) = &mut this.upstream else { return Poll::Ready(None) };
        match Pin::new(upstream).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.last_frame = Instant::now();
                if this.last_frame >= this.limits.deadline {
                    // A worker that never pauses does not get to the timer below.
                    return this.time_out(cx, out_of_time());
                }
                if let Some(data) = frame.data_ref() {
                    if let Some(booking) = &mut this.booking {
                        booking.heard();
                    }
                    if !this.seen_data && !data.is_empty() {
                        this.seen_data = true;
                        if let Some(booking) = &mut this.booking {
                            booking.prefill_done();
                        }
                        this.tracked.first_byte(this.last_frame.into_std());
                    } else if this.limits.ending.is_some() && !data.is_empty() {
                        this.tracked.chunk(this.last_frame.into_std());
                    }
                    if this.limits.ending.is_some() {
                        this.tail.push(data);
                    }
                    if let Some(sequel) = &mut this.limits.sequel {
                        sequel.push(data);
                    }
                    if let Some(growth) = &mut this.limits.growth {
                        let blocks = growth.push(data);
                        if let (Some(booking), true) = (&mut this.booking, blocks > 0) {
                            booking.grow(blocks);
                        }
                    }
                }
                if this.limits.ending.is_none() && this.upstream.as_ref().is_some_and(Body::is_end_stream) {
                    // A body of known length: hyper may not poll again.
                    this.tracked.finish_with_status();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(None) if this.limits.ending == Some(Ending::Done) && !this.tail.is_done() => {
                let text = "the worker ended the stream without [DONE]";
                this.fail(cx, ApiError::new(Code::UpstreamFailed, text), Outcome::UpstreamError)
            }
            Poll::Ready(None) => this.end(),
            Poll::Ready(Some(Err(_))) => {
                let text = "the worker broke off in the middle of its answer";
                this.fail(cx, ApiError::new(Code::UpstreamFailed, text), Outcome::UpstreamError)
            }
            Poll::Pending => match this.poll_silence(cx) {
                Poll::Ready(error) => this.time_out(cx, error),
                Poll::Pending => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        // An event stream is not over before it was looked at for its [DONE].
        self.breaking.is_none()
            && self.upstream.as_ref().is_none_or(|u| u.is_end_stream() && self.limits.ending.is_none())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.upstream {
            Some(upstream) if self.limits.ending.is_none() => upstream.size_hint(),
            Some(_) => SizeHint::default(),
            None if self.breaking.is_some() => SizeHint::default(),
            None => SizeHint::with_exact(0),
        }
    }
}

fn out_of_time() -> ApiError {
    ApiError::new(Code::UpstreamTimeout, "the request took longer than the total time allowed")
}

/// The last bytes of an event stream, enough to see how it ends.
#[derive(Debug, Default)]
struct Tail {
    bytes: [u8; Tail::ROOM],
    length: usize,
}

impl Tail {
    const ROOM: usize = 24;

    fn push(&mut self, data: &[u8]) {
        let data = &data[data.len().saturating_sub(Self::ROOM)..];
        let keep = self.length.min(Self::ROOM - data.len());
        self.bytes.copy_within(self.length - keep..self.length, 0);
        self.bytes[keep..keep + data.len()].copy_from_slice(data);
        self.length = keep + data.len();
    }

    fn seen(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn at_event_boundary(&self) -> bool {
        let seen = self.seen();
        seen.is_empty() || seen.ends_with(b"\n\n") || seen.ends_with(b"\r\n\r\n")
    }

    fn is_done(&self) -> bool {
        self.seen().trim_ascii_end().ends_with(b"[DONE]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_keeps_the_last_bytes_however_they_come() {
        let text = b"data: {\"a\":1}\n\ndata: {\"b\":22222222222222222222}\n\ndata: [DONE]\n\n";
        for step in 1..text.len() {
            let mut tail = Tail::default();
            for chunk in text.chunks(step) {
                tail.push(chunk);
            }
            assert!(tail.is_done() && tail.at_event_boundary(), "{step}");
            assert_eq!(tail.seen(), &text[text.len() - Tail::ROOM..], "{step}");
        }
        let mut tail = Tail::default();
        assert!(tail.at_event_boundary() && !tail.is_done());
        tail.push(b"data: {");
        assert!(!tail.at_event_boundary());
    }
}
