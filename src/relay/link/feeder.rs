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
use crate::relay::copy::{Copy, Read, Seat, Sink, Stop};
use crate::relay::line::Line;
use crate::relay::log::Event;

struct State {
    seat: Option<Seat>,
    credit: usize,
    /// The attempt of the last events that were sent, and who had said which as far as was known then: where
    /// an attempt begins is known later than that there is one.
    told: Option<(u32, Line)>,
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
        let state = State { seat: None, credit: 0, told: None, head_sent, leave_sent, over, sent_all };
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
                    let Read { first, events, attempt, line } = read;
                    let told = (attempt, line);
                    let is_new = state.told.as_ref() != Some(&told);
                    let line = is_new.then(|| line_to_wire(&told.1));
                    state.told = Some(told);
                    let events = events.into_iter().map(to_wire).collect();
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

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, StreamExt as _};

    use super::super::line_from_wire;
    use super::*;
    use crate::relay::copy::Role;
    use crate::relay::line::Turn;
    use crate::relay::secret::random_id;
    use crate::relay::tests::order;

    #[tokio::test]
    async fn where_an_attempt_begins_is_told_even_if_something_was_sent_in_it_before() {
        let copy = Copy::new(random_id(), Arc::new(order()), Role::Mirror, 1, Default::default(), 1 << 20);
        let event = || Event { lines: Bytes::from_static(b"data: x\n"), ..Event::default() };
        assert!(copy.push(1, 0, [event(), event(), event()]));
        // It is given to somebody, who has not said yet that he begins, and where.
        assert!(copy.expect_attempt(2));
        let outbox = Arc::<Outbox>::default();
        let mut batches = outbox.batches();
        let feeder = Feeder::begin(7, &copy, &outbox, 0, false).unwrap();
        feeder.credit(1 << 20);
        let mut line = Line::default();
        line.begin(2, 3);
        assert!(copy.follow(2, &line));
        assert!(copy.push(2, 3, [event()]) && copy.push(2, 4, [event()]));
        let mut told = Vec::new();
        while let Some(Some(batch)) = batches.next().now_or_never() {
            for frame in batch.frames {
                let Some(What::Events(events)) = frame.what else { panic!("{frame:?}") };
                let line = events.line.is_some().then(|| line_from_wire(events.line).unwrap());
                let turns = line.map(|line| line.turns().to_vec());
                told.push((events.first, events.attempt, turns));
            }
        }
        let begins = vec![Turn { attempt: 2, base: 3 }];
        assert_eq!(told, [(0, 2, Some(vec![])), (3, 2, Some(begins)), (4, 2, None)]);
    }
}
