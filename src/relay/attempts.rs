//! What becomes of a copy when another attempt begins: what it keeps, what it takes from others, and
//! which of its readers have read something else.

use std::time::Instant;

use bytes::Bytes;

use super::copy::{Copy, Inner, Role};
use super::line::Line;
use super::log::Event;

/// What another process had of a stream.
#[derive(Debug, Default)]
pub struct Had {
    /// Number of the first event.
    pub first: u64,
    /// Journal of those before it.
    pub journal: Bytes,
    /// The events.
    pub events: Vec<Event>,
    /// Who said them.
    pub line: Line,
}

impl Copy {
    /// Begins a later attempt here: this process generates what comes. False when it is no later one.
    pub fn begin_attempt(&self, attempt: u32) -> bool {
        let woken = {
            let mut inner = self.inner.lock();
            if attempt <= inner.attempt || inner.closed {
                return false;
            }
            let base = inner.log.next();
            (inner.attempt, inner.role) = (attempt, Role::Holder);
            inner.line.begin(attempt, base);
            inner.note_strays();
            inner.wake()
        };
        woken.call();
        true
    }

    /// Waits for a later attempt that another process is given: nothing of earlier ones is taken any
    /// more. Where it begins, that process says with its first events. False when it is no later one.
    pub fn expect_attempt(&self, attempt: u32) -> bool {
        let woken = {
            let mut inner = self.inner.lock();
            if attempt <= inner.attempt || inner.closed {
                return false;
            }
            (inner.attempt, inner.role) = (attempt, Role::Mirror);
            inner.wake()
        };
        woken.call();
        true
    }

    /// Whoever was to begin the stream has not: somebody else may. False when it has begun, or begins here.
    pub fn expect_nobody(&self) -> bool {
        let mut inner = self.inner.lock();
        let nobody =
            inner.attempt == 1 && inner.role == Role::Mirror && inner.log.next() == 0 && !inner.closed;
        if nobody {
            inner.attempt = 0;
        }
        nobody
    }

    /// Takes nothing of attempts before this one any more: what it has of them is all that it will
    /// have.
    pub fn seal(&self, attempt: u32) {
        let mut inner = self.inner.lock();
        inner.sealed = inner.sealed.max(attempt);
    }

    /// Whether nothing of this attempt is taken any more.
    pub fn is_sealed(&self, attempt: u32) -> bool {
        self.inner.lock().sealed > attempt
    }

    /// Goes on with what another process says in this attempt, in which the events were said as `line`
    /// says. What is here and was said otherwise since is forgotten, and who has read it is told.
    /// False where that cannot be, when it is an attempt that is over, or when where it begins is known here
    /// and not there.
    pub fn follow(&self, attempt: u32, line: &Line) -> bool {
        let woken = {
            let mut inner = self.inner.lock();
            if attempt < inner.attempt || attempt < inner.sealed || inner.closed {
                return false;
            }
            if attempt == inner.attempt && *line == inner.line {
                return true;
            }
            if inner.knows_more_than(attempt, line) {
                return false;
            }
            if let Some(from) = inner.line.parts_from(line)
                && from < inner.log.next()
            {
                if inner.role == Role::Holder || !inner.log.cut(from) {
                    return false;
                }
                (inner.ended_at, inner.how) = (None, None);
            }
            if inner.role == Role::Holder {
                inner.role = Role::Mirror;
            }
            inner.attempt = attempt;
            inner.line = line.clone();
            inner.note_strays();
            inner.wake()
        };
        woken.call();
        true
    }

    /// Whether it is known here where this attempt begins, and not where events were said as `line` says:
    /// those may be of earlier ones, and be said anew in what is here.
    pub fn knows_more_than(&self, attempt: u32, line: &Line) -> bool {
        self.inner.lock().knows_more_than(attempt, line)
    }

    /// Adds what another process had in this attempt or before, and this one has not. What both have
    /// and were said otherwise is taken from there, unless it was said later here. False where the two cannot
    /// be made one.
    pub fn take_in(&self, had: &Had) -> bool {
        let woken = {
            let mut inner = self.inner.lock();
            let there = had.first + had.events.len() as u64;
            let from = inner.line.parts_from(&had.line).unwrap_or(u64::MAX);
            let contradicts = from < inner.log.next().min(there);
            if inner.closed || inner.log.old_journal().is_none() {
                return false;
            }
            if contradicts && inner.line.reach(inner.log.next()) > had.line.reach(there) {
                return true;
            }
            let joins = had.first <= if contradicts { from } else { inner.log.next() };
            if !joins || (contradicts && !inner.log.cut(from)) {
                return false;
            }
            let skip = (inner.log.next() - had.first) as usize;
            if contradicts || there >= inner.log.next() {
                had.events.iter().skip(skip).for_each(|event| inner.log.push(event.clone()));
                inner.line = had.line.clone();
            }
            inner.ended_at = inner.log.ended().then(Instant::now);
            inner.note_strays();
            inner.wake()
        };
        woken.call();
        true
    }

    /// What there is, for another process to go on with. `None` where too much was forgotten.
    pub fn past(&self) -> Option<Had> {
        let inner = self.inner.lock();
        let log = &inner.log;
        let journal = Bytes::copy_from_slice(log.old_journal()?);
        let events = (log.first()..log.next()).filter_map(|seq| log.get(seq).cloned()).collect();
        Some(Had { first: log.first(), journal, events, line: inner.line.clone() })
    }

    /// How far it is, to be compared with what others have; see [`Line::reach`].
    pub fn reach(&self) -> (u32, u64) {
        let inner = self.inner.lock();
        inner.line.reach(inner.log.next())
    }

    /// Whether this process generates it, in this attempt.
    pub fn is_held_in(&self, attempt: u32) -> bool {
        let inner = self.inner.lock();
        inner.role == Role::Holder && inner.attempt == attempt
    }

    /// Whether this process generates it, in an attempt before this one, and it has not ended.
    pub fn begins_before(&self, attempt: u32) -> bool {
        let inner = self.inner.lock();
        inner.role == Role::Holder && inner.attempt < attempt && !inner.log.ended()
    }

    /// The first attempt of which it takes anything.
    pub fn least_attempt(&self) -> u32 {
        let inner = self.inner.lock();
        inner.attempt.max(inner.sealed)
    }

    /// Whether a reader that has read up to event `at`, the last one said by attempt `of`, has read
    /// something else than there is here.
    pub fn is_stray(&self, at: u64, of: Option<u32>) -> bool {
        self.inner.lock().said_otherwise(at, of)
    }
}

impl Inner {
    /// Whether the event before `at`, of attempt `of`, was said anew since. Of an attempt that is not
    /// known here yet nothing can be said.
    pub(super) fn said_otherwise(&self, at: u64, of: Option<u32>) -> bool {
        let known = of.filter(|of| *of <= self.attempt);
        known.zip(at.checked_sub(1)).is_some_and(|(of, last)| self.line.said_by(last) != of)
    }

    fn knows_more_than(&self, attempt: u32, line: &Line) -> bool {
        attempt == self.attempt && self.line.has_begun(attempt) && !line.has_begun(attempt)
    }

    fn note_strays(&mut self) {
        let mut seats = std::mem::take(&mut self.seats);
        for seated in &mut seats {
            seated.stray |= self.said_otherwise(seated.at, seated.of);
        }
        self.seats = seats;
    }
}
