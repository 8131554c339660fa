//! One stream as one process has it, shared by whoever adds to it and all who read it.
//!
//! Whoever adds asks for room first; readers that are attached and behind keep what they have not
//! read, so a stream never takes more than its bound and what one step adds. What nobody reads is
//! forgotten from the front.

mod outside;

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use parking_lot::Mutex;

use super::line::Line;
use super::log::{Event, Log};
use super::order::{Head, Order};
use crate::ids::StreamId;
use crate::state::streams::StreamEnd;

/// Bytes that whoever generates a stream adds before others have their turn.
const TURN: usize = 64 << 10;

/// Events handed to a reader at a time.
const AT_ONCE: usize = 64;

/// Who adds to a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// This process generates it.
    Holder,
    /// Another process has it, and this one would go on with it.
    Mirror,
    /// Another process has it; this one only passes it on.
    Shadow,
}

/// Reads along without a task of its own: told when there is something new.
pub trait Sink: Send + Sync {
    /// There are new events, or a head, or a new attempt, or this is the end. Called without locks,
    /// by whoever added them; must not block.
    fn ready(&self);
}

/// Number of a reader within its copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seat(u64);

/// What a reader was given.
#[derive(Debug, Default)]
pub struct Read {
    /// Number of the first event.
    pub first: u64,
    /// Events in order.
    pub events: Vec<Event>,
    /// In which attempt the copy is.
    pub attempt: u32,
    /// Which attempt said which events.
    pub line: Line,
}

/// Why a reader gets nothing more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// It has read the terminal event.
    Ended,
    /// What it would read next was forgotten.
    Behind,
    /// The copy is closed: whoever reads it has to look elsewhere.
    Closed,
    /// The stream went on from an earlier event than this reader has read: what comes here now may
    /// contradict it.
    Stray,
}

pub(super) struct Seated {
    seat: Seat,
    /// Next event it reads.
    pub(super) at: u64,
    /// Which attempt said the event before, as far as is known.
    pub(super) of: Option<u32>,
    /// That event is another one now.
    pub(super) stray: bool,
    waker: Option<Waker>,
    sink: Option<Arc<dyn Sink>>,
    /// A client's, not another process's.
    is_client: bool,
}

pub(super) struct Inner {
    pub(super) log: Log,
    head: Option<Arc<Head>>,
    pub(super) attempt: u32,
    /// Events of earlier attempts than this are not taken any more.
    pub(super) sealed: u32,
    pub(super) line: Line,
    pub(super) role: Role,
    pub(super) seats: Vec<Seated>,
    next_seat: u64,
    waiting_for_room: Vec<Waker>,
    pub(super) closed: bool,
    leaving: bool,
    pub(super) how: Option<StreamEnd>,
    pub(super) ended_at: Option<Instant>,
    /// Clients that listen through other processes, by who those are.
    watchers: Vec<((u64, u64), u32)>,
    /// Since when no client listens.
    orphan_since: Option<Instant>,
    /// Who has the load of the stream booked, among those who read along.
    bookers: Vec<(u64, u64)>,
    /// Somebody else has the terminal event.
    is_end_known: bool,
    /// There is no room for anything yet.
    is_held_back: bool,
    /// Bytes that were added since others had their turn.
    in_turn: usize,
}

/// See the module.
pub struct Copy {
    /// Which stream.
    pub id: StreamId,
    /// What was asked.
    pub order: Arc<Order>,
    /// Since when it is here.
    pub since: Instant,
    bound: usize,
    pub(super) inner: Mutex<Inner>,
    /// This process has the load booked of what another one generates.
    is_booked_here: AtomicBool,
    /// Number of the event after those that the source had when this copy was made.
    promised: AtomicU64,
}

impl std::fmt::Debug for Copy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Copy({})", self.id)
    }
}

/// What to look at from outside.
#[derive(Clone, Debug)]
pub struct Summary {
    /// See [`Role`].
    pub role: Role,
    /// Counts take-overs.
    pub attempt: u32,
    /// Events so far.
    pub events: u64,
    /// Memory.
    pub bytes: usize,
    /// Clients here and elsewhere, as far as is known.
    pub clients: u32,
    /// Whether and how it has ended.
    pub ended: Option<StreamEnd>,
    /// Since when.
    pub ended_at: Option<Instant>,
    /// Since when no client listens.
    pub orphan_since: Option<Instant>,
    /// Whether the head is there.
    pub has_head: bool,
}

impl Copy {
    /// An empty copy, or one of what there was before, said by whom `line` says. Events take at most
    /// `bound` bytes.
    pub fn new(
        id: StreamId,
        order: Arc<Order>,
        role: Role,
        attempt: u32,
        (log, line): (Log, Line),
        bound: usize,
    ) -> Arc<Self> {
        let inner = Inner {
            ended_at: log.ended().then(Instant::now),
            log,
            head: None,
            attempt,
            sealed: 0,
            line,
            role,
            seats: Vec::new(),
            next_seat: 0,
            waiting_for_room: Vec::new(),
            closed: false,
            leaving: false,
            how: None,
            watchers: Vec::new(),
            orphan_since: Some(Instant::now()),
            bookers: Vec::new(),
            is_end_known: false,
            is_held_back: false,
            in_turn: 0,
        };
        Arc::new(Self {
            id,
            order,
            since: Instant::now(),
            bound,
            inner: Mutex::new(inner),
            is_booked_here: AtomicBool::new(false),
            promised: AtomicU64::new(0),
        })
    }

    /// Adds events of an attempt; those of one that is over, or that are there already, are left
    /// out. False when there is a gap before them, or when this copy is closed.
    pub fn push(&self, attempt: u32, first: u64, events: impl IntoIterator<Item = Event>) -> bool {
        let woken = {
            let mut inner = self.inner.lock();
            let is_over = inner.attempt != attempt || attempt < inner.sealed;
            if inner.closed || is_over || first > inner.log.next() {
                return is_over && !inner.closed;
            }
            let skip = (inner.log.next() - first) as usize;
            let before = inner.log.next();
            for event in events.into_iter().skip(skip) {
                inner.in_turn += event.bytes();
                inner.log.push(event);
            }
            if inner.log.next() == before {
                return true;
            }
            if inner.log.ended() && inner.ended_at.is_none() {
                inner.ended_at = Some(Instant::now());
            }
            self.trim(&mut inner);
            inner.wake()
        };
        woken.call();
        true
    }

    /// Adds one event of an attempt at the end.
    pub fn append(&self, attempt: u32, event: Event) -> bool {
        let next = self.inner.lock().log.next();
        self.push(attempt, next, [event])
    }

    /// Adds the last events of a stream that fails here, whatever attempt it is in.
    pub fn fail(&self, events: impl IntoIterator<Item = Event>) {
        let woken = {
            let mut inner = self.inner.lock();
            if inner.closed || inner.log.ended() {
                return;
            }
            events.into_iter().for_each(|event| inner.log.push(event));
            inner.ended_at = inner.log.ended().then(Instant::now);
            if inner.role != Role::Holder {
                // What one process could not go on with, others may.
                inner.seats.iter_mut().for_each(|seated| seated.stray |= seated.sink.is_some());
            }
            inner.wake()
        };
        woken.call();
    }

    /// Says how the stream ended; the first word counts.
    pub fn ended_as(&self, how: StreamEnd) {
        self.inner.lock().how.get_or_insert(how);
    }

    /// Sets the head, where there is one, as [`Copy::set_head`].
    pub fn set_head_if_any(&self, head: Option<Arc<Head>>) {
        if let Some(head) = head {
            self.set_head(head);
        }
    }

    /// Sets the head, once: clients may have read it.
    pub fn set_head(&self, head: Arc<Head>) {
        let woken = {
            let mut inner = self.inner.lock();
            if inner.head.is_some() {
                return;
            }
            inner.head = Some(head);
            inner.wake()
        };
        woken.call();
    }

    /// The head.
    pub fn head(&self) -> Option<Arc<Head>> {
        self.inner.lock().head.clone()
    }

    /// Which attempt it is in.
    pub fn attempt(&self) -> u32 {
        self.inner.lock().attempt
    }

    /// Which attempt said which events.
    pub fn line(&self) -> Line {
        self.inner.lock().line.clone()
    }

    /// Who adds to it.
    pub fn role(&self) -> Role {
        self.inner.lock().role
    }

    /// Number of the next event.
    pub fn next(&self) -> u64 {
        self.inner.lock().log.next()
    }

    /// Whether the terminal event is there.
    pub fn ended(&self) -> bool {
        self.inner.lock().log.ended()
    }

    /// The events that are kept, and the number of the first.
    pub fn window(&self) -> (u64, Vec<Event>) {
        let inner = self.inner.lock();
        let log = &inner.log;
        (log.first(), (log.first()..log.next()).filter_map(|seq| log.get(seq).cloned()).collect())
    }

    /// Hands the journal of all events to `with`; `None` where not all of it was kept.
    pub fn with_journal<R>(&self, with: impl FnOnce(&mut dyn Iterator<Item = &[u8]>) -> R) -> Option<R> {
        let inner = self.inner.lock();
        let mut journal = inner.log.journal()?;
        Some(with(&mut journal))
    }

    /// Closes it: readers look elsewhere, nothing is added.
    pub fn close(&self) {
        let woken = {
            let mut inner = self.inner.lock();
            inner.closed = true;
            inner.wake()
        };
        woken.call();
    }

    /// Whether it ended before it began: with an error in place of an answer, after which its client may
    /// ask again.
    pub fn is_refusal(&self) -> bool {
        let may_pass = |status: u16| status >= 500 || status == 429 || status == 408;
        self.ended() && self.head().is_some_and(|head| may_pass(head.status))
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.inner.lock().closed
    }

    /// Has readers told that this process would rather have another one go on.
    pub fn want_to_leave(&self) {
        let woken = {
            let mut inner = self.inner.lock();
            inner.leaving = !inner.log.ended();
            inner.wake()
        };
        woken.call();
    }

    /// Has clients that read here look for the stream anew: there is a better place now.
    pub fn send_clients_away(&self) {
        let wakers = self.inner.lock().take_clients();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Whether another process reads along.
    pub fn has_mirror(&self) -> bool {
        self.inner.lock().seats.iter().any(|seated| seated.sink.is_some())
    }

    /// Whether it would.
    pub fn wants_to_leave(&self) -> bool {
        self.inner.lock().leaving
    }

    /// Seats a reader that begins at event `at`, the one before being of attempt `of`, if that is
    /// known. The error says why that cannot be. When another process begins to read what is held here,
    /// clients that read here look for the stream anew: they shall never be ahead of it.
    pub fn seat(
        self: &Arc<Self>,
        at: u64,
        of: Option<u32>,
        sink: Option<Arc<dyn Sink>>,
        is_client: bool,
    ) -> Result<Seat, Stop> {
        let mut inner = self.inner.lock();
        if inner.closed {
            return Err(Stop::Closed);
        }
        if at < inner.log.first() {
            return Err(Stop::Behind);
        }
        let seat = Seat(inner.next_seat);
        let seated = Seated { seat, at, of, stray: false, waker: None, sink, is_client };
        if inner.said_otherwise(at, of) {
            return Err(Stop::Stray);
        }
        inner.next_seat += 1;
        let away = if seated.sink.is_some() && inner.role == Role::Holder {
            inner.take_clients()
        } else {
            Vec::new()
        };
        inner.seats.push(seated);
        inner.note_orphan();
        drop(inner);
        away.into_iter().for_each(Waker::wake);
        Ok(seat)
    }

    /// A reader leaves.
    pub fn leave(&self, seat: Seat) {
        let wakers = {
            let mut inner = self.inner.lock();
            inner.seats.retain(|seated| seated.seat != seat);
            inner.note_orphan();
            self.trim(&mut inner);
            inner.wake_for_room(self.bound)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The next events for a reader, of about `bytes` at most, but at least one if there is any. With
    /// `cx`, it is woken when there are some; a sink is told.
    pub fn read(&self, seat: Seat, bytes: usize, cx: Option<&mut Context<'_>>) -> Poll<Result<Read, Stop>> {
        let (read, wakers) = {
            let mut guard = self.inner.lock();
            let inner = &mut *guard;
            let (next, ended, closed) = (inner.log.next(), inner.log.ended(), inner.closed);
            let Some(seated) = inner.seats.iter_mut().find(|seated| seated.seat == seat) else {
                return Poll::Ready(Err(Stop::Closed));
            };
            if seated.stray {
                return Poll::Ready(Err(Stop::Stray));
            }
            // It has read what another process said in an attempt that is not known here yet.
            let is_ahead = seated.of.is_some_and(|of| of > inner.attempt);
            if is_ahead && ended && !closed {
                return Poll::Ready(Err(Stop::Stray));
            }
            if seated.at >= next || is_ahead {
                let stop = if closed {
                    Stop::Closed
                } else if ended {
                    Stop::Ended
                } else {
                    seated.waker = cx.map(|cx| cx.waker().clone());
                    return Poll::Pending;
                };
                return Poll::Ready(Err(stop));
            }
            let (attempt, line) = (inner.attempt, inner.line.clone());
            let mut read = Read { first: seated.at, events: Vec::new(), attempt, line };
            let mut taken = 0;
            while let Some(event) = inner.log.get(seated.at) {
                if read.events.len() == AT_ONCE || (taken > 0 && taken + event.bytes() > bytes) {
                    break;
                }
                taken += event.bytes();
                read.events.push(event.clone());
                seated.at += 1;
            }
            let Some(last) = read.events.last() else { return Poll::Ready(Err(Stop::Behind)) };
            inner.is_end_known |= last.terminal;
            seated.of = Some(read.line.said_by(seated.at - 1));
            self.trim(inner);
            (read, inner.wake_for_room(self.bound))
        };
        wakers.into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(read))
    }

    /// Ready when the head is there, when it is certain that there will be none, or when something
    /// else is to be noticed by the reader.
    pub fn poll_head(&self, seat: Seat, cx: &mut Context<'_>) -> Poll<Result<Arc<Head>, Stop>> {
        let mut inner = self.inner.lock();
        if let Some(head) = &inner.head {
            return Poll::Ready(Ok(head.clone()));
        }
        if inner.closed || inner.log.ended() {
            return Poll::Ready(Err(Stop::Closed));
        }
        if let Some(seated) = inner.seats.iter_mut().find(|seated| seated.seat == seat) {
            seated.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Waits until there is room for more. An engine that says much at once shares a thread with others,
    /// and with the signs of life to other processes: after each [`TURN`] bytes they go first.
    pub async fn room(&self) {
        let is_others_turn = {
            let mut inner = self.inner.lock();
            let is_over = inner.in_turn >= TURN;
            if is_over {
                inner.in_turn = 0;
            }
            is_over
        };
        if is_others_turn {
            tokio::task::yield_now().await;
        }
        poll_fn(|cx| self.poll_room(cx)).await;
    }

    /// Whether there is room for more; woken when there is.
    pub fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.inner.lock();
        if inner.has_room(self.bound) {
            return Poll::Ready(());
        }
        if !inner.waiting_for_room.iter().any(|waker| waker.will_wake(cx.waker())) {
            inner.waiting_for_room.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Whether there is room for more.
    pub fn has_room(&self) -> bool {
        self.inner.lock().has_room(self.bound)
    }

    /// Takes nothing until [`Copy::let_go`]: whether it is this stream or another one that its clients
    /// are to read is being found out.
    pub fn hold_back(&self) {
        self.inner.lock().is_held_back = true;
    }

    /// Takes what there is from now on.
    pub fn let_go(&self) {
        let wakers = {
            let mut inner = self.inner.lock();
            inner.is_held_back = false;
            inner.wake_for_room(self.bound)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    fn trim(&self, inner: &mut Inner) {
        if inner.log.window() > self.bound {
            let slowest = inner.seats.iter().map(|seated| seated.at).min();
            let keep = slowest.unwrap_or_else(|| inner.log.next());
            inner.log.trim(self.bound, keep);
        }
    }
}

impl Inner {
    /// Takes out the clients; what wakes them.
    fn take_clients(&mut self) -> Vec<Waker> {
        self.seats.extract_if(.., |seated| seated.is_client).filter_map(|seated| seated.waker).collect()
    }

    fn clients(&self) -> u32 {
        let here = self.seats.iter().filter(|seated| seated.is_client).count() as u32;
        self.watchers.iter().map(|(_, clients)| *clients).fold(here, u32::saturating_add)
    }

    fn note_orphan(&mut self) {
        if self.clients() > 0 {
            self.orphan_since = None;
        } else {
            self.orphan_since.get_or_insert_with(Instant::now);
        }
    }

    fn has_room(&self, bound: usize) -> bool {
        self.closed || (!self.is_held_back && self.log.window() <= bound)
    }

    fn wake_for_room(&mut self, bound: usize) -> Vec<Waker> {
        if self.waiting_for_room.is_empty() || !self.has_room(bound) {
            return Vec::new();
        }
        std::mem::take(&mut self.waiting_for_room)
    }

    pub(super) fn wake(&mut self) -> Woken {
        let mut woken = Woken::default();
        for seated in &mut self.seats {
            woken.wakers.extend(seated.waker.take());
            woken.sinks.extend(seated.sink.clone());
        }
        if self.closed {
            woken.wakers.append(&mut self.waiting_for_room);
        }
        woken
    }
}

/// Who has to be told, once the lock is free.
#[derive(Default)]
pub(super) struct Woken {
    wakers: Vec<Waker>,
    sinks: Vec<Arc<dyn Sink>>,
}

impl Woken {
    pub(super) fn call(self) {
        self.wakers.into_iter().for_each(Waker::wake);
        self.sinks.iter().for_each(|sink| sink.ready());
    }
}
