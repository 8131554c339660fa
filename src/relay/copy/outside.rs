//! A copy as seen from outside: how far it is, who listens to it by way of whom, and who has it booked.

use std::sync::atomic::Ordering;

use super::{Copy, Summary};
use crate::relay::line::Line;
use crate::state::streams::StreamEnd;

impl Copy {
    /// What to look at from outside.
    pub fn summary(&self) -> Summary {
        self.summary_with_line().0
    }

    /// The same, and who said the events that it counts.
    pub fn summary_with_line(&self) -> (Summary, Line) {
        let inner = self.inner.lock();
        let summary = Summary {
            role: inner.role,
            attempt: inner.attempt,
            events: inner.log.next(),
            bytes: inner.log.bytes() + self.order.bytes(),
            clients: inner.clients(),
            ended: inner.log.ended().then(|| inner.how.unwrap_or(StreamEnd::Complete)),
            ended_at: inner.ended_at,
            orphan_since: inner.orphan_since,
            has_head: inner.head.is_some(),
        };
        (summary, inner.line.clone())
    }

    /// Most bytes of events that are kept, unless a reader is further behind.
    pub fn bound(&self) -> usize {
        self.bound
    }

    /// Clients that listen here.
    pub fn clients_here(&self) -> u32 {
        self.inner.lock().seats.iter().filter(|seated| seated.is_client).count() as u32
    }

    /// Clients that listen here, and at processes that have their copies from here.
    pub fn clients(&self) -> u32 {
        self.inner.lock().clients()
    }

    /// So many clients listen at another process, by way of this channel of this link.
    pub fn watch(&self, who: (u64, u64), clients: u32) {
        let mut inner = self.inner.lock();
        inner.watchers.retain(|(other, _)| *other != who);
        if clients > 0 {
            inner.watchers.push((who, clients));
        }
        inner.note_orphan();
    }

    /// Whoever reads by way of this channel of this link has the stream's load booked, or not any more.
    pub fn book(&self, who: (u64, u64), books: bool) {
        let mut inner = self.inner.lock();
        inner.bookers.retain(|other| *other != who);
        if books {
            inner.bookers.push(who);
        }
    }

    /// Whether somebody who reads along has its load booked.
    pub fn is_booked(&self) -> bool {
        !self.inner.lock().bookers.is_empty()
    }

    /// Whether somebody has read the terminal event, or was told of it.
    pub fn is_end_known(&self) -> bool {
        self.inner.lock().is_end_known
    }

    /// Somebody was told how it ended.
    pub fn end_was_told(&self) {
        self.inner.lock().is_end_known = true;
    }

    /// Its source has events up to this one, which is not among them.
    pub fn promise(&self, next: u64) {
        self.promised.store(next, Ordering::Release);
    }

    /// See [`Copy::promise`].
    pub fn promised(&self) -> u64 {
        self.promised.load(Ordering::Acquire)
    }

    /// This process has the load booked of what another one generates, or not any more.
    pub fn set_booked_here(&self, is: bool) {
        self.is_booked_here.store(is, Ordering::Release);
    }

    /// See [`Copy::set_booked_here`].
    pub fn is_booked_here(&self) -> bool {
        self.is_booked_here.load(Ordering::Acquire)
    }
}
