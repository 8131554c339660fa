//! The batching proposer: gathers a replica's mutations of one group into numbered segments and
//! sees them into the log, exactly once, whoever leads.
//!
//! ```text
//!  submit ──▶ queue ──seal──▶ in flight (≤ 8) ──▶ leader's intake ──▶ log ──▶ applied here
//!             bounded          numbered, kept                                  │
//!                              until applied  ◀──────── acknowledged ──────────┘
//! ```
//!
//! A segment is acknowledged by nothing but its application to *this* replica's state, so a
//! caller who has its answer also reads its own write. Whenever it is not clear what became of
//! a segment (another leader, a broken link, silence), it is sent again; the state skips what it
//! has seen.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;

use super::api::ClusterError;
use super::peer::lane::Lane;
use super::peer::wire::{Kind, ProposeReply};
use super::stats::GroupCounters;
use super::types::Segment;
use crate::codec::{self, ListEncoder};
use crate::ids::{Group, Incarnation, ReplicaId};
use crate::state::replicated::State;

/// Segments on their way at most; more would only wait elsewhere.
const IN_FLIGHT: usize = 8;
/// Silence after which all in flight is sent again: first and longest.
const RESEND: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(400));

/// How long to wait for the link to the leader before looking again who leads.
const OPEN_PATIENCE: Duration = Duration::from_millis(200);

/// How to batch.
#[derive(Clone, Copy, Debug)]
pub struct Batching {
    /// Gather at most this long while something is in flight.
    pub window: Duration,
    /// Least time between two segments that carry nothing but what nobody waits for: summed loads,
    /// which [`Driver::fill`] gives, and what was told ([`Proposer::tell`]). Each segment costs
    /// every replica a disk sync.
    pub load_window: Duration,
    /// Seal a segment at this many bytes.
    pub bytes: usize,
    /// Refuse more than this many bytes waiting.
    pub queue_bytes: usize,
}

impl Default for Batching {
    fn default() -> Self {
        Self {
            window: Duration::from_millis(2),
            load_window: Duration::from_millis(4),
            bytes: 64 << 10,
            queue_bytes: 8 << 20,
        }
    }
}

/// Where the leader is.
#[derive(Clone)]
pub enum Route {
    /// Nobody leads, as far as this replica knows.
    Nowhere,
    /// This replica leads.
    Here,
    /// The lane to the leader.
    Peer(Arc<Lane>),
}

type Waiter<O> = oneshot::Sender<Vec<O>>;

struct Batch<O> {
    list: ListEncoder,
    mutations: u64,
    waiters: Vec<(std::ops::Range<usize>, Waiter<O>)>,
    /// Somebody waits for it and does nothing else meanwhile.
    urgent: bool,
}

impl<O> Default for Batch<O> {
    fn default() -> Self {
        Self { list: ListEncoder::default(), mutations: 0, waiters: Vec::new(), urgent: false }
    }
}

struct InFlight<O> {
    segment: Segment,
    sealed: Instant,
    waiters: Vec<(std::ops::Range<usize>, Waiter<O>)>,
}

struct Queue<O> {
    /// Sealed by size, waiting for a place in flight; the last is still open.
    waiting: VecDeque<Batch<O>>,
    in_flight: VecDeque<InFlight<O>>,
    bytes: usize,
    next_number: u64,
    /// When the first of what nobody waits for came, of what is not in a segment yet: here, or where
    /// [`Driver::fill`] takes it from. Whoever sets it sees to it that the driver wakes in time.
    gathers_since: Option<Instant>,
    /// When the last segment was sealed.
    sealed_at: Option<Instant>,
}

struct Shared<S: State> {
    queue: Mutex<Queue<S::Outcome>>,
    batching: Batching,
    wake: Notify,
    counters: Arc<GroupCounters>,
}

/// Handle to a group's proposer. Cheap to clone.
pub struct Proposer<S: State> {
    shared: Arc<Shared<S>>,
}

impl<S: State> Clone for Proposer<S> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<S: State> Proposer<S> {
    /// A proposer that gathers until [`run`] drives it.
    pub fn new(batching: Batching) -> Self {
        let queue = Queue {
            waiting: VecDeque::new(),
            in_flight: VecDeque::new(),
            bytes: 0,
            next_number: 1,
            // The first segment may have something to say of this replica itself.
            gathers_since: Some(Instant::now()),
            sealed_at: None,
        };
        let (queue, wake) = (Mutex::new(queue), Notify::new());
        Self { shared: Arc::new(Shared { queue, batching, wake, counters: Arc::default() }) }
    }

    /// How long the oldest segment that is on its way has been on it.
    pub fn oldest_in_flight(&self) -> Option<Duration> {
        self.shared.queue.lock().in_flight.front().map(|flight| flight.sealed.elapsed())
    }

    /// Puts commands into the queue as one unbroken run. The receiver gets their outcomes when
    /// they are applied here; dropping it takes nothing back.
    pub fn submit(
        &self,
        commands: &[S::Command],
    ) -> Result<oneshot::Receiver<Vec<S::Outcome>>, ClusterError> {
        let (tx, rx) = oneshot::channel();
        self.enqueue(commands, Some(tx), true)?;
        Ok(rx)
    }

    /// Like [`Proposer::submit`], for outcomes that nobody waits for with anything else: they may
    /// gather for as long as summed loads do.
    pub fn submit_unhurried(
        &self,
        commands: &[S::Command],
    ) -> Result<oneshot::Receiver<Vec<S::Outcome>>, ClusterError> {
        let (tx, rx) = oneshot::channel();
        self.enqueue(commands, Some(tx), false)?;
        Ok(rx)
    }

    /// Puts commands into the queue that nobody waits for: they may gather for as long as summed
    /// loads do.
    pub fn tell(&self, commands: &[S::Command]) -> Result<(), ClusterError> {
        self.enqueue(commands, None, false)
    }

    fn enqueue(
        &self,
        commands: &[S::Command],
        waiter: Option<Waiter<S::Outcome>>,
        urgent: bool,
    ) -> Result<(), ClusterError> {
        let mut queue = self.shared.queue.lock();
        if queue.bytes >= self.shared.batching.queue_bytes {
            return Err(ClusterError::Overloaded { bytes: queue.bytes });
        }
        // The driver knows when what waits is due, unless this changes it: a batch is full, or somebody
        // waits where nobody did. Waking it for each of ten thousand prompts a second would cost more than
        // the log does.
        let sooner = urgent && !queue.waiting.iter().any(|batch| batch.urgent);
        let needs_new =
            queue.waiting.back().is_none_or(|batch| batch.list.len() >= self.shared.batching.bytes);
        if needs_new {
            queue.waiting.push_back(Batch::default());
        }
        // Invariant: pushed above if there was none.
        let Some(batch) = queue.waiting.back_mut() else { unreachable!("a batch was just pushed") };
        let (start, before) = (batch.list.count() as usize, batch.list.len());
        for command in commands {
            batch.list.push(command);
            batch.mutations += S::mutations(command);
        }
        let count = batch.list.count() as usize;
        batch.waiters.extend(waiter.map(|waiter| (start..count, waiter)));
        batch.urgent |= urgent;
        let is_full = batch.list.len() >= self.shared.batching.bytes;
        let grown = batch.list.len() - before;
        queue.bytes += grown;
        if sooner || is_full {
            drop(queue);
            self.shared.wake.notify_one();
        } else if !urgent {
            self.gather(&mut queue);
        }
        Ok(())
    }

    /// Something has come that nobody waits for. It is looked at when it is due, and the driver sleeps
    /// until then: a thread more that wakes at once, only to sleep again, would take the processor from
    /// the request that has just come.
    fn gather(&self, queue: &mut Queue<S::Outcome>) {
        if queue.gathers_since.is_some() {
            return;
        }
        let now = Instant::now();
        queue.gathers_since = Some(now);
        let due = due_at(now, queue.sealed_at, self.shared.batching.load_window);
        let shared = Arc::clone(&self.shared);
        match tokio::runtime::Handle::try_current() {
            // If that runtime ends first, the driver looks by itself.
            Ok(here) => drop(here.spawn(async move {
                tokio::time::sleep_until(due).await;
                shared.wake.notify_one();
            })),
            Err(_) => shared.wake.notify_one(),
        }
    }

    /// What is counted of the group.
    pub fn counters(&self) -> &Arc<GroupCounters> {
        &self.shared.counters
    }

    /// Bytes waiting and in flight.
    pub fn queued_bytes(&self) -> usize {
        self.shared.queue.lock().bytes
    }

    /// Makes the driver look for work that is not in the queue (see [`Driver::fill`]), as soon as what is
    /// told would be due.
    pub fn wake(&self) {
        self.gather(&mut self.shared.queue.lock());
    }

    /// A segment was applied here.
    pub fn acknowledged(&self, number: u64, mut outcomes: Vec<S::Outcome>) {
        let mut queue = self.shared.queue.lock();
        while let Some(front) = queue.in_flight.front() {
            if front.segment.number > number {
                break;
            }
            let Some(done) = queue.in_flight.pop_front() else { break };
            queue.bytes = queue.bytes.saturating_sub(done.segment.commands.len());
            self.shared.counters.applied(done.sealed.elapsed());
            let known = done.segment.number == number;
            for (range, waiter) in done.waiters {
                let answer = if known && range.end <= outcomes.len() {
                    outcomes[range].to_vec()
                } else {
                    range.map(|_| S::unknown()).collect()
                };
                let _ = waiter.send(answer);
            }
            if known {
                outcomes = Vec::new();
            }
        }
        drop(queue);
        self.shared.wake.notify_one();
    }

    /// Everything up to `number` is known to be applied, with unknown outcomes.
    pub fn caught_up(&self, number: u64) {
        self.acknowledged(number, Vec::new());
    }
}

/// What a driver needs to know of its surroundings.
pub struct Driver<S: State> {
    /// The proposer driven.
    pub proposer: Proposer<S>,
    /// Its group.
    pub group: Group,
    /// This replica.
    pub me: ReplicaId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Where the leader is.
    pub route: watch::Receiver<Route>,
    /// This replica's own intake, for when it leads.
    pub intake: mpsc::Sender<Segment>,
    /// Called when a segment is about to be sealed: commands that wait elsewhere, already summed.
    pub fill: Box<dyn Fn() -> Vec<S::Command> + Send + Sync>,
    /// Whether any other replica wants to know.
    pub has_peers: Box<dyn Fn() -> bool + Send + Sync>,
}

/// [`Batching::load_window`] of a replica without peers: only its own log hears of its loads.
const LONELY_WINDOW: Duration = Duration::from_millis(100);

/// A driver looks for what there is to say after this time at the latest, though nobody woke it.
const LOOK: Duration = Duration::from_secs(1);

/// When something is said that nobody waits for: half a window after the first of it came, so that
/// others have the processors first and more comes with it, and a window after the last segment.
fn due_at(since: Instant, sealed_at: Option<Instant>, window: Duration) -> Instant {
    let gathered = since + window / 2;
    sealed_at.map_or(gathered, |sealed| gathered.max(sealed + window))
}

/// Drives a proposer until the route's sender is gone.
pub async fn run<S: State>(mut driver: Driver<S>) {
    let shared = driver.proposer.shared.clone();
    let mut resend_after = RESEND.0;
    let mut sent_at = Instant::now();
    let mut acked = 0u64;
    let trouble = Arc::new(Notify::new());
    loop {
        // Seal and send what is due.
        let mut due = None;
        while shared.queue.lock().in_flight.len() < IN_FLIGHT {
            let wait = patience(&driver, &shared);
            if wait != Some(Duration::ZERO) {
                due = wait;
                break;
            }
            let Some(segment) = seal(&driver, &shared) else { break };
            if shared.queue.lock().in_flight.len() == 1 {
                sent_at = Instant::now();
            }
            send(&driver, &[segment], &trouble).await;
        }

        // Send again what has been silent for too long.
        let (front, flying) = {
            let queue = shared.queue.lock();
            (queue.in_flight.front().map(|f| f.segment.number), queue.in_flight.len())
        };
        if let Some(front) = front {
            if front != acked {
                // Progress: patience starts over.
                acked = front;
                resend_after = RESEND.0;
                sent_at = Instant::now();
            } else if sent_at.elapsed() >= resend_after {
                resend(&driver, &shared, &trouble).await;
                sent_at = Instant::now();
                resend_after = (resend_after * 2).min(RESEND.1);
            }
        }

        let nap = match (flying, due) {
            (0, None) => LOOK,
            (0, Some(due)) => due,
            (_, due) => due.unwrap_or(RESEND.1).min(resend_after.saturating_sub(sent_at.elapsed())),
        };
        tokio::select! {
            // All arms only wake the loop up; nothing is lost when another one wins.
            () = shared.wake.notified() => {}
            () = trouble.notified() => {
                // The leader said no or the link broke: a moment, then again.
                sent_at = sent_at.min(Instant::now() - resend_after + Duration::from_millis(5));
            }
            changed = driver.route.changed() => {
                if changed.is_err() {
                    return;
                }
                resend_after = RESEND.0;
                resend(&driver, &shared, &trouble).await;
                sent_at = Instant::now();
            }
            () = tokio::time::sleep(nap) => {}
        }
    }
}

/// How long what has gathered may go on gathering: not at all when nothing is in flight or a
/// segment is full, else until a window has passed since the last was sealed. Where nobody waits
/// for anything, see [`due_at`]: a request that comes after a rest so has the processors to itself
/// until it has its answer, or is at least on its way; what the log makes all replicas do comes
/// after it. `None` while there is nothing to say.
fn patience<S: State>(driver: &Driver<S>, shared: &Shared<S>) -> Option<Duration> {
    let queue = shared.queue.lock();
    let full = queue.waiting.front().is_some_and(|batch| batch.list.len() >= shared.batching.bytes);
    let urgent = queue.waiting.iter().any(|batch| batch.urgent);
    let sealed_at = queue.sealed_at;
    if full || urgent {
        return Some(match sealed_at {
            Some(sealed_at) if !full && !queue.in_flight.is_empty() => {
                shared.batching.window.saturating_sub(sealed_at.elapsed())
            }
            _ => Duration::ZERO,
        });
    }
    let since = queue.gathers_since?;
    drop(queue);
    let window = if (driver.has_peers)() { shared.batching.load_window } else { LONELY_WINDOW };
    Some(due_at(since, sealed_at, window).saturating_duration_since(Instant::now()))
}

/// Numbers the next segment and moves it in flight; `None` when there is nothing to say.
fn seal<S: State>(driver: &Driver<S>, shared: &Shared<S>) -> Option<Segment> {
    // Before anything is taken: what comes from here on is looked for again, taken or not.
    shared.queue.lock().gathers_since = None;
    let extra = (driver.fill)();
    let mut queue = shared.queue.lock();
    if queue.waiting.is_empty() && extra.is_empty() {
        return None;
    }
    let mut batch = queue.waiting.pop_front().unwrap_or_default();
    let before = batch.list.len();
    for command in &extra {
        batch.list.push(command);
        batch.mutations += S::mutations(command);
    }
    if batch.list.is_empty() {
        return None;
    }
    let commands = bytes::Bytes::from(batch.list.finish());
    // From here on the segment counts with its encoded length.
    queue.bytes = queue.bytes.saturating_sub(before) + commands.len();
    let number = queue.next_number;
    queue.next_number += 1;
    let segment = Segment { origin: driver.me, incarnation: driver.incarnation, number, commands };
    shared.counters.sealed(batch.mutations, segment.commands.len());
    let sealed = Instant::now();
    queue.sealed_at = Some(sealed);
    if !queue.waiting.is_empty() {
        queue.gathers_since.get_or_insert(sealed);
    }
    queue.in_flight.push_back(InFlight { segment: segment.clone(), sealed, waiters: batch.waiters });
    Some(segment)
}

async fn resend<S: State>(driver: &Driver<S>, shared: &Shared<S>, trouble: &Arc<Notify>) {
    let segments: Vec<Segment> = shared.queue.lock().in_flight.iter().map(|f| f.segment.clone()).collect();
    if !segments.is_empty() {
        if !matches!(*driver.route.borrow(), Route::Nowhere) {
            shared.counters.resent(segments.len());
        }
        send(driver, &segments, trouble).await;
    }
}

/// Sends in order, without waiting for answers: those only matter when they are bad.
async fn send<S: State>(driver: &Driver<S>, segments: &[Segment], trouble: &Arc<Notify>) {
    let route = driver.route.borrow().clone();
    match route {
        Route::Nowhere => {}
        Route::Here => {
            for segment in segments {
                if driver.intake.try_send(segment.clone()).is_err() {
                    trouble.notify_one();
                    return;
                }
            }
        }
        Route::Peer(lane) => {
            // Not for long: another leader may be known by then.
            let open = match tokio::time::timeout(OPEN_PATIENCE, lane.open()).await {
                Ok(Ok(open)) => open,
                other => {
                    tracing::debug!(group = %driver.group, error = ?other.err(), "cannot reach the leader");
                    trouble.notify_one();
                    return;
                }
            };
            for segment in segments {
                match open.ask(Kind::Propose, driver.group, codec::encode(segment)) {
                    Ok(answer) => {
                        let trouble = trouble.clone();
                        // Ends with the lane at the latest.
                        tokio::spawn(async move {
                            let reply =
                                answer.await.ok().and_then(|b| codec::decode::<ProposeReply>(&b).ok());
                            if reply != Some(ProposeReply::Taken) {
                                trouble.notify_one();
                            }
                        });
                    }
                    Err(_) => {
                        trouble.notify_one();
                        return;
                    }
                }
            }
        }
    }
}

/// Most segments put into one log entry.
const ENTRY_SEGMENTS: usize = 64;
/// Segments that may wait at a leader.
pub const INTAKE: usize = 256;

/// The leader's side: gathers what has arrived into one entry after the other, each of at most
/// `entry_bytes` unless one segment alone is larger, without waiting for any of them; ends when
/// all senders are gone.
pub async fn intake(raft: super::machine::Raft, mut segments: mpsc::Receiver<Segment>, entry_bytes: usize) {
    let mut next = None;
    loop {
        let Some(first) = (match next.take() {
            Some(segment) => Some(segment),
            None => segments.recv().await,
        }) else {
            return;
        };
        let mut bytes = first.commands.len();
        let mut proposal = super::types::Proposal { segments: vec![first], clock: None };
        while proposal.segments.len() < ENTRY_SEGMENTS {
            let Ok(segment) = segments.try_recv() else { break };
            bytes += segment.commands.len();
            if bytes > entry_bytes {
                next = Some(segment);
                break;
            }
            proposal.segments.push(segment);
        }
        // Fire and forget: the proposers watch their own state for the outcome.
        if raft.client_write_ff(proposal, None).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::command::{ControlCommand, ControlOutcome};
    use crate::state::control::ControlState;

    /// A driver that proposes here, what it proposes, and its route, which must be kept.
    fn driver_of(
        proposer: &Proposer<ControlState>,
    ) -> (Driver<ControlState>, mpsc::Receiver<Segment>, watch::Sender<Route>) {
        let (intake, segments) = mpsc::channel(8);
        let (keep, route) = watch::channel(Route::Here);
        let driver = Driver {
            proposer: proposer.clone(),
            group: Group::Control,
            me: ReplicaId(1),
            incarnation: Incarnation(1),
            route,
            intake,
            fill: Box::new(Vec::new),
            has_peers: Box::new(|| true),
        };
        (driver, segments, keep)
    }

    #[test]
    fn a_queue_without_a_leader_is_bounded_and_empties_again() {
        let batching = Batching { queue_bytes: 100, ..Batching::default() };
        let proposer: Proposer<ControlState> = Proposer::new(batching);
        let mut taken = Vec::new();
        let refused = loop {
            match proposer.submit(&[ControlCommand::Noop]) {
                Ok(answer) => taken.push(answer),
                Err(error) => break error,
            }
            assert!(taken.len() < 1000, "never refused");
        };
        assert!(matches!(refused, ClusterError::Overloaded { bytes: 100.. }), "{refused:?}");
        assert!(refused.retryable());

        // What a driver would do: seal, send, see it applied.
        let (driver, mut segments, _keep) = driver_of(&proposer);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let driven = tokio::spawn(run(driver));
            let segment = segments.recv().await.unwrap();
            let commands: Vec<ControlCommand> = codec::decode(&segment.commands).unwrap();
            assert_eq!((segment.number, commands.len()), (1, taken.len()));
            // Silence: it is sent again, under the same number.
            assert_eq!(segments.recv().await.unwrap(), segment);
            let counted = proposer.counters().read(Group::Control, proposer.queued_bytes());
            assert!(counted.resends >= 1 && counted.queued_bytes > 0, "{counted:?}");
            assert_eq!(
                (counted.batch_mutations.count(), counted.batch_mutations.sum()),
                (1, taken.len() as f64)
            );
            assert_eq!(counted.batch_bytes.sum(), segment.commands.len() as f64);
            assert_eq!(counted.proposals.count(), 0, "not applied yet");
            proposer.acknowledged(1, vec![ControlOutcome::Done; commands.len()]);
            for answer in taken {
                assert_eq!(answer.await.unwrap(), vec![ControlOutcome::Done]);
            }
            assert_eq!(proposer.queued_bytes(), 0);
            assert!(proposer.submit(&[ControlCommand::Noop]).is_ok());
            // What a snapshot covers is answered, if not with its outcome.
            let unknown = proposer.submit(&[ControlCommand::Noop]).unwrap();
            proposer.wake();
            assert_eq!(segments.recv().await.unwrap().number, 2);
            proposer.caught_up(2);
            assert_eq!(unknown.await.unwrap(), vec![ControlOutcome::Unknown]);
            assert_eq!(proposer.counters().read(Group::Control, 0).proposals.count(), 2);
            driven.abort();
        });
    }

    #[tokio::test]
    async fn what_is_told_waits_for_company_and_what_is_asked_for_does_not() {
        let batching =
            Batching { load_window: Duration::from_secs(3600), bytes: 1000, ..Batching::default() };
        let proposer: Proposer<ControlState> = Proposer::new(batching);
        let (driver, mut segments, _keep) = driver_of(&proposer);
        let driven = tokio::spawn(run(driver));
        let count = |segment: &Segment| {
            let commands: Vec<ControlCommand> = codec::decode(&segment.commands).unwrap();
            commands.len()
        };
        let mut number = 0;
        let mut applied = |proposer: &Proposer<ControlState>, commands: usize| {
            number += 1;
            proposer.acknowledged(number, vec![ControlOutcome::Done; commands]);
        };
        for _ in 0..3 {
            // The driver sleeps by now, and again each time.
            proposer.tell(&[ControlCommand::Noop]).unwrap();
            tokio::time::timeout(Duration::from_millis(20), segments.recv()).await.unwrap_err();
        }
        let asked = proposer.submit(&[ControlCommand::Noop]).unwrap();
        assert_eq!(count(&segments.recv().await.unwrap()), 4);
        applied(&proposer, 4);
        assert_eq!(asked.await.unwrap(), vec![ControlOutcome::Done]);
        // Nobody waits, but it is enough for a segment.
        let mut told = 0;
        let segment = loop {
            proposer.tell(&[ControlCommand::Noop]).unwrap();
            told += 1;
            if let Ok(segment) = tokio::time::timeout(Duration::from_millis(1), segments.recv()).await {
                break segment.unwrap();
            }
        };
        assert!(segment.commands.len() >= 1000, "{}", segment.commands.len());
        assert_eq!(count(&segment), told);
        driven.abort();
    }

    #[tokio::test]
    async fn what_is_told_comes_through_though_whoever_told_it_ended() {
        let proposer: Proposer<ControlState> = Proposer::new(Batching::default());
        let (driver, mut segments, _keep) = driver_of(&proposer);
        let driven = tokio::spawn(run(driver));
        let told = proposer.clone();
        std::thread::spawn(move || told.tell(&[ControlCommand::Noop]).unwrap()).join().unwrap();
        let waited = tokio::time::timeout(20 * LOOK, segments.recv()).await;
        assert_eq!(waited.expect("the driver never looks").unwrap().number, 1);
        proposer.acknowledged(1, vec![ControlOutcome::Done]);
        let told = proposer.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            // What was to wake the driver ends with its runtime.
            runtime.block_on(async { told.tell(&[ControlCommand::Noop]).unwrap() });
        });
        thread.join().unwrap();
        let waited = tokio::time::timeout(20 * LOOK, segments.recv()).await;
        assert_eq!(waited.expect("the driver never looks").unwrap().number, 2);
        driven.abort();
    }
}
