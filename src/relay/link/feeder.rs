//! Feeds a copy's events into a channel, as its window allows; without a task of its own.

use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use parking_lot::Mutex;

use super::outbox::Outbox;
use super::proto::frame::What;
use super::proto::{Events, Refused};
use super::{Why, frame, line_to_wire, to_wire};
use crate::codec;
use crate::relay::copy::{Copy, Seat, Sink, Stop};
use crate::relay::log::Event;

struct State {
    seat: Option<Seat>,
    credit: usize,
    /// The attempt of the last events that were sent.
    attempt: Option<u32>,
    head_sent: bool,
    leave_sent: bool,
    /// Nothing more is sent.
    over: bool,
    /// All was sent. It keeps its seat until the other end says that it has all, or is gone.
    sent_all: bool,
}

/// See the module.
pub struct Feeder {
    channel: u64,
    /// What it feeds from.
    pub copy: Arc<Copy>,
    outbox: Arc<Outbox>,
    state: Mutex<State>,
}

impl Feeder {
    /// Feeds from event `at` on; the caller knows the head already if `head_sent`. Begins when there
    /// is credit.
    pub fn begin(
        channel: u64,
        copy: &Arc<Copy>,
        outbox: &Arc<Outbox>,
        at: u64,
        head_sent: bool,
    ) -> Result<Arc<Self>, Stop> {
        let (leave_sent, over, sent_all) = (false, false, false);
        let state = State { seat: None, credit: 0, attempt: None, head_sent, leave_sent, over, sent_all };
        let state = Mutex::new(state);
        let feeder = Arc::new(Self { channel, copy: Arc::clone(copy), outbox: Arc::clone(outbox), state });
        let seat = copy.seat(at, None, Some(Arc::clone(&feeder) as Arc<dyn Sink>), false)?;
        feeder.state.lock().seat = Some(seat);
        Ok(feeder)
    }

    /// There is room for so many more bytes.
    pub fn credit(&self, bytes: usize) {
        let mut state = self.state.lock();
        state.credit = state.credit.saturating_add(bytes);
        self.pump(&mut state);
    }

    /// The channel is over.
    pub fn stop(&self) {
        let mut state = self.state.lock();
        state.over = true;
        if let Some(seat) = state.seat.take() {
            self.copy.leave(seat);
        }
    }

    fn pump(&self, state: &mut State) {
        let Some(seat) = state.seat else { return };
        if !state.head_sent
            && let Some(head) = self.copy.head()
        {
            state.head_sent = true;
            self.send(What::Head(Bytes::from(codec::encode(&*head))));
        }
        if !state.leave_sent && self.copy.wants_to_leave() {
            state.leave_sent = true;
            self.send(What::Leave(0));
        }
        while !state.over && state.credit > 0 {
            match self.copy.read(seat, state.credit, None) {
                Poll::Pending => return,
                Poll::Ready(Ok(read)) => {
                    let bytes: usize = read.events.iter().map(Event::bytes).sum();
                    state.credit = state.credit.saturating_sub(bytes);
                    let is_new = state.attempt.replace(read.attempt) != Some(read.attempt);
                    let line = is_new.then(|| line_to_wire(&read.line));
                    let events = read.events.into_iter().map(to_wire).collect();
                    let (first, attempt) = (read.first, read.attempt);
                    if !self.send(What::Events(Events { first, events, attempt, line })) {
                        state.over = true;
                    }
                }
                Poll::Ready(Err(stop)) => {
                    state.over = true;
                    match stop {
                        // The caller closes the channel when it has the terminal event.
                        Stop::Ended => state.sent_all = true,
                        Stop::Behind => self.refuse(Why::Behind, "what comes next was forgotten"),
                        Stop::Closed | Stop::Stray => self.refuse(Why::Overtaken, "this copy is closed"),
                    }
                }
            }
        }
        if state.over && !state.sent_all {
            self.copy.leave(seat);
            state.seat = None;
        }
    }

    fn refuse(&self, why: Why, text: &str) {
        self.send(What::Refused(Refused { why: why as u32, text: text.to_owned() }));
    }

    /// Sends a frame in this channel.
    pub fn send(&self, what: What) -> bool {
        self.outbox.send(frame(self.channel, what))
    }
}

impl Sink for Feeder {
    fn ready(&self) {
        self.pump(&mut self.state.lock());
    }
}
