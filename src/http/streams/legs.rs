//! Requests to engines that run at the same time on behalf of one stream.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http_body::Body as _;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::http::queue::Held;
use crate::http::sequel::Sequel;
use crate::http::upstream::UpstreamBody;
use crate::routing::view::WorkerView;
use crate::splice::LegId;
use crate::splice::sse::{Parser, TooLong};

/// Largest event of an engine: a chunk with log probabilities of a long prompt.
const MOST_EVENT: usize = 8 << 20;

/// How long a leg may say nothing while its worker cannot be connected to. An engine that is told
/// to stop may close its port, keep its connections, and never say another word.
const DESERTED: Duration = Duration::from_secs(3);

/// How often legs are looked at for that.
const LOOK: Duration = Duration::from_secs(1);

/// How the output of a leg fills blocks of its engine's cache.
struct Filling {
    block: u64,
    /// Tokens that fit into what is booked.
    room: u64,
    tokens: u64,
}

/// One of them.
pub(super) struct Leg {
    pub(super) id: LegId,
    pub(super) worker: Arc<WorkerView>,
    pub(super) parser: Parser,
    body: UpstreamBody,
    booking: Held,
    /// Learns what the answer adds to the engine's cache, if nobody else tells.
    sequel: Option<Sequel>,
    filling: Filling,
    has_output: bool,
    heard: Instant,
}

impl Leg {
    /// That has just begun to answer, after a prompt of so many tokens.
    pub(super) fn new(
        id: LegId,
        body: UpstreamBody,
        booking: Held,
        worker: Arc<WorkerView>,
        prompt_tokens: u32,
        sequel: Option<Sequel>,
    ) -> Self {
        let (prompt, block) = (u64::from(prompt_tokens), u64::from(worker.block_size().max(1)));
        let filling = Filling { block, room: prompt.next_multiple_of(block), tokens: prompt };
        Self {
            id,
            worker,
            parser: Parser::new(MOST_EVENT),
            body,
            booking,
            sequel,
            filling,
            has_output: false,
            heard: Instant::now(),
        }
    }

    /// Takes a piece of the answer.
    pub(super) fn heard(&mut self, data: Bytes) -> Result<(), TooLong> {
        self.booking.heard();
        self.heard = Instant::now();
        if let Some(sequel) = &mut self.sequel {
            sequel.push(&data);
        }
        self.parser.push(data)
    }

    /// Whether nobody is there any more to say anything.
    fn is_deserted(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.heard) >= DESERTED
            && self.worker.live.unreachable.load(Ordering::Relaxed)
    }

    /// Takes note of output. True the first time.
    pub(super) fn note_output(&mut self, tokens: u32) -> bool {
        let filling = &mut self.filling;
        filling.tokens += u64::from(tokens);
        if filling.tokens > filling.room {
            let blocks = (filling.tokens - filling.room).div_ceil(filling.block);
            filling.room += blocks * filling.block;
            self.booking.grow(u32::try_from(blocks).unwrap_or(u32::MAX));
        }
        let first = !std::mem::replace(&mut self.has_output, true);
        if first {
            self.booking.prefill_done();
        }
        first
    }
}

/// What came of a leg.
pub(super) enum Piece {
    /// Bytes.
    Data(Bytes),
    /// Its end.
    End,
    /// It broke off.
    Broken,
    /// Nothing came of any leg for too long, or the whole takes too long.
    Silence,
}

/// All that run.
pub(super) struct Legs {
    running: Vec<Leg>,
    /// Longest time without anything.
    idle: Duration,
    deadline: Instant,
    last: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    /// Who is asked first, so that all get their turn.
    turn: usize,
}

impl Legs {
    pub(super) fn new(idle: Duration, deadline: Instant) -> Self {
        Self { running: Vec::new(), idle, deadline, last: Instant::now(), timer: None, turn: 0 }
    }

    pub(super) fn add(&mut self, leg: Leg) {
        self.last = Instant::now();
        self.running.push(leg);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    pub(super) fn get(&mut self, at: usize) -> &mut Leg {
        &mut self.running[at]
    }

    /// Takes a leg out, of whose engine nothing more is known: its connection is closed, which ends it at the engine too.
    pub(super) fn remove(&mut self, at: usize) -> Leg {
        self.running.swap_remove(at)
    }

    /// Ends a leg that has given all it had to.
    pub(super) fn finish(&mut self, at: usize) {
        if let Some(sequel) = self.running.swap_remove(at).sequel {
            sequel.finish();
        }
    }

    /// Ends all: what was generated until here stays in their engines' caches.
    pub(super) fn clear(&mut self) {
        for leg in self.running.drain(..) {
            if let Some(sequel) = leg.sequel {
                sequel.finish();
            }
        }
    }

    /// What comes next, and of which leg. Cancel-safe: what is not returned is not read.
    pub(super) async fn next(&mut self) -> (usize, Piece) {
        poll_fn(|cx| {
            let count = self.running.len();
            for step in 0..count {
                let at = (self.turn + step) % count;
                let piece = loop {
                    match Pin::new(&mut self.running[at].body).poll_frame(cx) {
                        Poll::Pending => break None,
                        Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                            Ok(data) => break Some(Piece::Data(data)),
                            // Trailers.
                            Err(_) => continue,
                        },
                        Poll::Ready(Some(Err(_))) => break Some(Piece::Broken),
                        Poll::Ready(None) => break Some(Piece::End),
                    }
                };
                if let Some(piece) = piece {
                    self.turn = at + 1;
                    self.last = Instant::now();
                    if self.last < self.deadline {
                        return Poll::Ready((at, piece));
                    }
                    return Poll::Ready((at, Piece::Silence));
                }
            }
            loop {
                let until = self.deadline.min(self.last + self.idle);
                let look = || Instant::now() + LOOK;
                let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(until.min(look()))));
                if timer.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                // The timer is not moved with every piece: it looks up when it rings.
                let now = Instant::now();
                if now >= until {
                    return Poll::Ready((0, Piece::Silence));
                }
                timer.as_mut().reset(until.min(look()));
                if let Some(at) = self.running.iter().position(|leg| leg.is_deserted(now)) {
                    return Poll::Ready((at, Piece::Broken));
                }
            }
        })
        .await
    }
}

impl Drop for Legs {
    fn drop(&mut self) {
        self.clear();
    }
}
