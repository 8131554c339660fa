//! A stream as a client reads it: events with their ids, signs of life between them, an end that
//! can be told from a truncation.

use std::fmt::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::answer::{ending_of, refusal};
use super::failing::{last_frame, late_error};
use crate::http::body::BodyError;
use crate::http::errors::{ApiError, Code};
use crate::http::relay::Ending;
use crate::ids::StreamId;
use crate::relay::copy::Read;
use crate::relay::find::Missing;
use crate::relay::listener::{Listener, Over, Refused};
use crate::relay::order::{Framing, Head};

/// A sign of life: a comment, and nothing that closes an event.
const PING: &[u8] = b": ping\n";

/// Most bytes that are read of an error that came in place of events.
const MOST_ERROR: usize = 64 << 10;

/// How a body ends before its stream does.
enum Leave {
    /// Without a word: the client comes back elsewhere.
    Silently,
    /// With an error event.
    WithError,
}

/// Where a body's events come from.
pub(super) enum Source {
    /// The stream was found.
    Reading(Listener),
    /// It is being looked for, by a client that has come back.
    Looking(Pin<Box<dyn Future<Output = Result<Listener, Refused>> + Send>>),
}

/// What a body is made of.
enum Form {
    /// Nobody knows yet; the client was told that there are events.
    Open,
    Events,
    /// Frames, which end with NUL: there is nothing between them.
    Frames,
    /// Passed on as it comes.
    Raw,
    /// The client was told that there are events, and there is an error in their place: its status, and
    /// what there is of its body.
    Late(u16, BytesMut),
}

impl Form {
    /// Of a head that the client was not sent; `None` where there is none.
    fn after_the_fact(head: Option<&Head>) -> Self {
        match head {
            Some(head) if head.framing == Framing::Raw => Form::Late(head.status, BytesMut::new()),
            _ => Form::Events,
        }
    }
}

/// See the module.
pub(in crate::http) struct StreamBody {
    source: Source,
    id: StreamId,
    form: Form,
    /// The stream's end in its client's dialect, if it fails here.
    ending: Ending,
    heartbeat: Duration,
    timer: Pin<Box<Sleep>>,
    last: Instant,
    attempt: Option<u32>,
    /// Events so far, for this client.
    began: bool,
    ended: bool,
    /// Read before there was a body.
    first: Option<Read>,
    /// When this is ready the body ends between two events.
    leave: Option<Pin<Box<dyn Future<Output = Leave> + Send>>>,
}

impl std::fmt::Debug for StreamBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StreamBody({})", self.id)
    }
}

impl StreamBody {
    /// Of a stream whose head is not known: its client is told of events, and gets them whatever the
    /// head turns out to be.
    pub(super) fn new(source: Source, id: StreamId, ending: Ending, heartbeat: Duration) -> Self {
        let now = Instant::now();
        Self {
            id,
            source,
            form: Form::Open,
            ending,
            heartbeat,
            timer: Box::pin(sleep_until(now + heartbeat)),
            last: now,
            attempt: None,
            began: false,
            ended: false,
            first: None,
            leave: None,
        }
    }

    /// The client gets this head, which is the stream's own.
    pub(super) fn knowing(mut self, head: &Head) -> Self {
        self.form = match head.framing {
            Framing::Events => Form::Events,
            Framing::Frames => Form::Frames,
            Framing::Raw => Form::Raw,
        };
        self
    }

    /// This was read already.
    pub(super) fn beginning_with(mut self, first: Read) -> Self {
        self.first = Some(first);
        self
    }

    /// Ends the body at an event boundary: when this replica is `leaving`, for a client that can come
    /// back; with an error when it is `ending`, for one that cannot.
    pub(super) fn leaving(mut self, leaving: CancellationToken, ending: CancellationToken) -> Self {
        let aware = match &self.source {
            Source::Reading(listener) => listener.is_aware(),
            Source::Looking(_) => true,
        };
        if !matches!(self.form, Form::Raw) {
            self.leave = Some(Box::pin(async move {
                if aware {
                    leaving.cancelled_owned().await;
                    return Leave::Silently;
                }
                ending.cancelled_owned().await;
                Leave::WithError
            }));
        }
        self
    }

    /// The end of a stream that this process cannot go on with.
    fn write_failure(&self, error: &ApiError) -> Bytes {
        if matches!(self.form, Form::Frames) {
            return last_frame(error);
        }
        let mut written = BytesMut::new();
        for lines in self.ending.failure_lines(error) {
            written.extend_from_slice(&lines);
            written.extend_from_slice(b"\n");
        }
        written.freeze()
    }

    fn write_lost(&self, text: &'static str) -> Bytes {
        self.write_failure(&ApiError::new(Code::StreamLost, text))
    }

    fn write(&mut self, read: &Read) -> Bytes {
        if matches!(self.form, Form::Frames) {
            return read.events.iter().map(|event| &*event.lines).collect::<Vec<_>>().concat().into();
        }
        let size: usize = read.events.iter().map(|event| event.lines.len() + StreamId::LEN + 32).sum();
        let mut text = BytesMut::with_capacity(size + 64);
        if self.attempt.replace(read.attempt).is_some_and(|attempt| attempt != read.attempt) && self.began {
            let _ = writeln!(text, ": everline attempt={}", read.attempt);
        }
        for (seq, event) in (read.first..).zip(&read.events) {
            self.write_event(&mut text, &event.lines, seq, read.line.said_by(seq));
        }
        text.freeze()
    }

    fn write_event(&mut self, text: &mut BytesMut, lines: &[u8], seq: u64, said_by: u32) {
        text.extend_from_slice(lines);
        if !std::mem::replace(&mut self.began, true) {
            text.extend_from_slice(b"retry: 500\n");
        }
        // The id comes last: there are clients that take note of it as soon as its line is whole, and
        // would ask for what comes after an event which they do not have.
        let _ = match said_by {
            1 => write!(text, "id: {}.{seq}\n\n", self.id),
            attempt => write!(text, "id: {}.{seq}.{attempt}\n\n", self.id),
        };
    }

    /// An error that came in place of events, as events. The first one has the number that who comes
    /// back is told the end by; what closes the stream behind it is none of the stream's.
    fn write_late(&mut self, status: u16, body: &[u8], said_by: u32) -> Bytes {
        let mut text = BytesMut::new();
        for lines in late_error(self.ending, status, body) {
            if self.began {
                text.extend_from_slice(&lines);
                text.extend_from_slice(b"\n");
            } else {
                self.write_event(&mut text, &lines, 0, said_by);
            }
        }
        text.freeze()
    }

    fn poll_sign_of_life(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let (now, due) = (Instant::now(), self.last + self.heartbeat);
            if now >= due {
                self.last = now;
                self.timer.as_mut().reset(now + self.heartbeat);
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(due);
        }
    }
}

type Polled = Poll<Option<Result<Frame<Bytes>, BodyError>>>;

fn frame(bytes: Bytes) -> Polled {
    Poll::Ready(Some(Ok(Frame::data(bytes))))
}

impl StreamBody {
    /// The last words.
    fn end_with(&mut self, bytes: Bytes) -> Polled {
        self.ended = true;
        frame(bytes)
    }

    fn end(&mut self) -> Polled {
        self.ended = true;
        Poll::Ready(None)
    }

    /// There is nothing to be said at the moment.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Polled {
        if matches!(self.form, Form::Raw | Form::Frames) {
            return Poll::Pending;
        }
        match self.poll_sign_of_life(cx) {
            Poll::Ready(()) => frame(Bytes::from_static(PING)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// What is said where the stream was looked for in vain.
    fn refused(&mut self, refused: Refused) -> Polled {
        match refused {
            // Who comes back once more is told so by the status.
            Refused::Over => self.end(),
            // It may pass: without an end the client comes back.
            Refused::Missing(Missing::Unavailable) | Refused::TooMany | Refused::Ahead { .. } => self.end(),
            refused => {
                let failure = self.write_failure(&refusal(refused));
                self.end_with(failure)
            }
        }
    }

    fn over(&mut self, over: Over) -> Polled {
        match over {
            Over::Ended => self.end(),
            Over::Gone | Over::Stray if matches!(self.form, Form::Raw) => {
                self.ended = true;
                Poll::Ready(Some(Err("the stream was lost".into())))
            }
            Over::Stray => {
                let text = "the replicas that had what was read are gone; it went on differently";
                let lost = self.write_lost(text);
                self.end_with(lost)
            }
            // Not found from here, which may have been away itself: who can come back asks another replica,
            // and is told by its status if nobody has it.
            Over::Gone if matches!(&self.source, Source::Reading(listener) if listener.is_aware()) => {
                self.end()
            }
            Over::Gone => {
                let lost = self.write_lost("the replicas that had this stream are gone");
                self.end_with(lost)
            }
        }
    }

    fn take(&mut self, read: &Read) -> Polled {
        self.last = Instant::now();
        let last = read.events.last();
        self.ended = last.is_some_and(|event| event.terminal);
        if !matches!(self.form, Form::Raw) {
            return frame(self.write(read));
        }
        let has_failed = matches!(&self.source, Source::Reading(listener) if listener.has_failed());
        if self.ended && last.is_some_and(|event| event.lines.is_empty()) && has_failed {
            return Poll::Ready(Some(Err("the worker broke off in the middle of its answer".into())));
        }
        let lines: Vec<&[u8]> = read.events.iter().map(|event| &*event.lines).collect();
        frame(lines.concat().into())
    }

    /// Takes a piece of an error that came in place of events; it is said when it is whole.
    fn take_late(&mut self, read: &Read) -> Option<Polled> {
        let Form::Late(status, body) = &mut self.form else { return None };
        for event in &read.events {
            let room = MOST_ERROR.saturating_sub(body.len());
            body.extend_from_slice(&event.lines[..event.lines.len().min(room)]);
        }
        if !read.events.last().is_some_and(|event| event.terminal) {
            return None;
        }
        let (status, body) = (*status, std::mem::take(body).freeze());
        let said = self.write_late(status, &body, read.line.said_by(0));
        Some(self.end_with(said))
    }
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        if let Some(leave) = &mut this.leave
            && let Poll::Ready(leave) = leave.as_mut().poll(cx)
        {
            return match leave {
                Leave::Silently => this.end(),
                Leave::WithError => {
                    let failure = this.write_lost("this replica is stopping");
                    this.end_with(failure)
                }
            };
        }
        if let Some(first) = this.first.take() {
            return this.take(&first);
        }
        loop {
            let listener = match &mut this.source {
                Source::Reading(listener) => listener,
                Source::Looking(looking) => match looking.as_mut().poll(cx) {
                    Poll::Ready(Ok(listener)) => {
                        this.ending = ending_of(&listener.order);
                        this.source = Source::Reading(listener);
                        continue;
                    }
                    Poll::Ready(Err(refused)) => return this.refused(refused),
                    Poll::Pending => return this.poll_silence(cx),
                },
            };
            if matches!(this.form, Form::Open) {
                let Poll::Ready(head) = listener.poll_head(cx) else { return this.poll_silence(cx) };
                this.form = Form::after_the_fact(head.as_deref());
                if matches!(this.form, Form::Late(..)) && listener.at() > 0 {
                    // It has read the error already, in place of the event that it names.
                    return this.end();
                }
            }
            return match listener.poll_read(cx) {
                Poll::Ready(Ok(read)) if matches!(this.form, Form::Late(..)) => match this.take_late(&read) {
                    Some(said) => said,
                    None => continue,
                },
                Poll::Ready(Ok(read)) => this.take(&read),
                Poll::Ready(Err(over)) => this.over(over),
                Poll::Pending => this.poll_silence(cx),
            };
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}
