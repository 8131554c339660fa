//! The engine task: takes requests in, steps the scheduler at the pace of the timing model.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::{Notify, broadcast, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::events::KvPublisher;
use super::faults::{FaultChange, FaultState, Faults};
use super::kv::KvEvent;
use super::options::EngineSimArgs;
use super::outbox::{Failure, Outbox};
use super::pd::Desk;
use super::scheduler::{Scheduler, Submission};
use super::stats::Stats;

/// Batches of KV events that a slow subscriber may lag behind before it loses some.
const KV_EVENT_BACKLOG: usize = 10_000;

/// How far the pace may fall behind before the lost time is forgotten instead of made up for.
const MAX_LAG: Duration = Duration::from_millis(50);

/// The KV events of one step.
#[derive(Clone, Debug)]
pub struct KvEventBatch {
    /// Starts at 0 with the engine process and counts up by one.
    pub sequence: u64,
    /// Seconds since the epoch.
    pub timestamp: f64,
    /// What happened, in order.
    pub events: Vec<KvEvent>,
}

/// Something to do with the scheduler, at this time since the start.
type AtScheduler = Box<dyn FnOnce(&mut Scheduler, Duration) + Send>;

enum Command {
    Submit(Vec<Submission>),
    AbortAll,
    Abort(Vec<String>),
    Kill,
    ResetPrefixCache(oneshot::Sender<bool>),
    IndexedBlocks(oneshot::Sender<Vec<u64>>),
    WakeReaders,
    With(AtScheduler),
}

/// Why a request was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `--max-waiting` sequences wait already.
    QueueFull,
}

/// Handle to the engine task, shared by all connections.
pub struct Engine {
    /// The flags it was started with.
    pub args: EngineSimArgs,
    /// Which data-parallel rank it is.
    pub rank: u32,
    /// What it counted.
    pub stats: Arc<Stats>,
    /// Time since the epoch at the start.
    pub started: Duration,
    faults: Faults,
    /// Bound: the queue limit for submissions; the rest are operator's commands.
    inbox: Mutex<Vec<Command>>,
    wake: Notify,
    closed: AtomicBool,
    cancellations: Arc<AtomicU64>,
    kv_events: broadcast::Sender<Arc<KvEventBatch>>,
    kv_publisher: OnceLock<KvPublisher>,
    desk: OnceLock<Arc<Desk>>,
    /// Ids of SGLang's requests in flight. Bound: as many as there are requests.
    pub(super) rids: Mutex<HashSet<String>>,
}

impl Engine {
    /// A handle; [`Engine::drive`] has to run for anything to happen.
    pub fn new(args: EngineSimArgs, rank: u32) -> Arc<Self> {
        Arc::new(Self {
            args,
            rank,
            stats: Arc::default(),
            started: unix_time(),
            faults: Faults::default(),
            inbox: Mutex::default(),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
            cancellations: Arc::default(),
            kv_events: broadcast::channel(KV_EVENT_BACKLOG).0,
            kv_publisher: OnceLock::new(),
            desk: OnceLock::new(),
            rids: Mutex::default(),
        })
    }

    /// An empty outbox for a request to this engine.
    pub fn outbox(&self) -> Arc<Outbox> {
        Arc::new(Outbox::new(!self.args.no_coalesce, self.cancellations.clone()))
    }

    /// Hands the sequences of one request over.
    pub fn submit(&self, sequences: Vec<Submission>) -> Result<(), Refusal> {
        if self.faults.get().engine_dead {
            sequences.iter().for_each(|sequence| sequence.outbox.fail(Failure::EngineDead));
            return Ok(());
        }
        let mut inbox = self.inbox.lock();
        let arriving = arriving(&inbox);
        let free_slots = u64::from(self.args.max_running).saturating_sub(self.stats.running.get());
        let limit = u64::from(self.args.max_waiting) + free_slots;
        if self.stats.waiting.get() + (arriving + sequences.len()) as u64 > limit {
            self.stats.rejected.add(1);
            return Err(Refusal::QueueFull);
        }
        inbox.push(Command::Submit(sequences));
        drop(inbox);
        self.wake.notify_one();
        Ok(())
    }

    /// Sequences that were handed over and that the engine task has not seen yet.
    pub fn arriving(&self) -> usize {
        arriving(&self.inbox.lock())
    }

    /// Drops a request whose client is gone, within a step.
    pub fn cancel(&self, outbox: &Outbox) {
        outbox.cancel();
        self.wake.notify_one();
    }

    /// Ends everything with `finish_reason` `abort`, and whatever still comes as well.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.abort_all();
    }

    /// Ends everything with `finish_reason` `abort`.
    pub fn abort_all(&self) {
        self.command(Command::AbortAll);
    }

    /// Ends the named sequences with `finish_reason` `abort`.
    pub fn abort(&self, ids: Vec<String>) {
        self.command(Command::Abort(ids));
    }

    /// Empties the prefix cache; false while blocks are in use, or without a live engine.
    pub async fn reset_prefix_cache(&self) -> bool {
        let (reply, done) = oneshot::channel();
        self.command(Command::ResetPrefixCache(reply));
        done.await.unwrap_or(false)
    }

    /// The engine's own hashes of all blocks that a prompt can find again, in order.
    pub async fn indexed_blocks(&self) -> Vec<u64> {
        let (reply, done) = oneshot::channel();
        self.command(Command::IndexedBlocks(reply));
        done.await.unwrap_or_default()
    }

    /// Publishes KV events through these sockets from now on. Once; later ones are ignored.
    pub fn publish_through(&self, publisher: KvPublisher) {
        let _ = self.kv_publisher.set(publisher);
    }

    /// The sockets that KV events are published through, if there are any.
    pub fn kv_publisher(&self) -> Option<&KvPublisher> {
        self.kv_publisher.get()
    }

    /// The fault switches now.
    pub fn faults(&self) -> FaultState {
        self.faults.get()
    }

    /// Sets fault switches and makes them felt by what is running.
    pub fn set_faults(&self, change: &FaultChange) -> Result<FaultState, String> {
        let state = self.faults.apply(change)?;
        if state.engine_dead {
            self.command(Command::Kill);
        }
        if change.abort_all {
            self.command(Command::AbortAll);
        }
        self.command(Command::WakeReaders);
        Ok(state)
    }

    /// Batches of KV events from now on.
    pub fn subscribe_kv_events(&self) -> broadcast::Receiver<Arc<KvEventBatch>> {
        self.kv_events.subscribe()
    }

    /// Hands requests over and takes them on by this; once, before [`Engine::drive`].
    pub fn hand_over_by(&self, desk: Arc<Desk>) {
        // Set once, by who started the engine.
        let _ = self.desk.set(desk);
    }

    /// What it hands requests over by, if it does.
    pub fn desk(&self) -> Option<&Arc<Desk>> {
        self.desk.get()
    }

    /// Does something between two steps.
    pub(super) fn with_scheduler(&self, act: impl FnOnce(&mut Scheduler, Duration) + Send + 'static) {
        self.command(Command::With(Box::new(act)));
    }

    fn command(&self, command: Command) {
        self.inbox.lock().push(command);
        self.wake.notify_one();
    }

    /// Steps until `stop`; the one task behind all streams.
    pub async fn drive(self: Arc<Self>, stop: CancellationToken) {
        let args = &self.args;
        let start = Instant::now();
        let (running, batched) = (args.max_running, args.max_batched_tokens);
        let mut scheduler =
            Scheduler::new(args.blocks, args.block_size, running, batched, self.stats.clone())
                .with_host(args.host_blocks);
        let desk = self.desk.get().cloned();
        if let Some(desk) = &desk {
            scheduler = scheduler.with_handover(desk.handover());
        }
        let mut next_heartbeat = Duration::ZERO;
        let mut next_batch = 0;
        let mut cancellations = 0;
        let mut deadline = Instant::now();
        loop {
            self.take_commands(&mut scheduler, start.elapsed(), &mut next_batch);
            let seen = self.cancellations.load(Ordering::Acquire);
            if seen != cancellations {
                cancellations = seen;
                scheduler.drop_cancelled();
            }
            let plan = if self.faults.get().hang { None } else { scheduler.plan(start.elapsed()) };
            self.publish(&mut scheduler, &mut next_batch, plan.is_some());
            let mut look_again = None;
            if let Some(desk) = &desk {
                look_again = self.attend(desk, &mut scheduler, start.elapsed(), &mut next_heartbeat);
            }
            let Some(plan) = plan else {
                tokio::select! {
                    () = self.wake.notified() => {}
                    () = sleep_until(look_again.map(|at| start + at)) => {}
                    () = stop.cancelled() => return,
                }
                deadline = Instant::now();
                continue;
            };
            let now = Instant::now();
            deadline = deadline.max(now.checked_sub(MAX_LAG).unwrap_or(now));
            deadline += args.step_time(plan.prefill_tokens, plan.sequences);
            if deadline > now {
                tokio::select! {
                    () = tokio::time::sleep_until(deadline) => {}
                    () = stop.cancelled() => return,
                }
            } else {
                // Lets the connections write what the last step produced.
                tokio::task::yield_now().await;
                if stop.is_cancelled() {
                    return;
                }
            }
            scheduler.complete(start.elapsed());
        }
    }

    fn take_commands(&self, scheduler: &mut Scheduler, now: Duration, next_batch: &mut u64) {
        let commands = std::mem::take(&mut *self.inbox.lock());
        for command in commands {
            match command {
                // Sent just before the engine died.
                Command::Submit(sequences) if self.faults.get().engine_dead => {
                    sequences.iter().for_each(|sequence| sequence.outbox.fail(Failure::EngineDead));
                }
                Command::Submit(sequences) => {
                    sequences.into_iter().for_each(|sequence| scheduler.submit(sequence, now));
                }
                Command::AbortAll => scheduler.abort(|_| true),
                Command::Abort(ids) => scheduler.abort(|id| ids.iter().any(|wanted| wanted == id)),
                Command::Kill => {
                    scheduler.kill();
                    *next_batch = 0;
                    if let Some(publisher) = self.kv_publisher.get() {
                        publisher.restart();
                    }
                }
                Command::IndexedBlocks(reply) => {
                    // The asker may be gone; then nobody minds.
                    let _ = reply.send(scheduler.kv().indexed());
                }
                Command::ResetPrefixCache(reply) => {
                    // The asker may be gone; then nobody minds.
                    let _ = reply.send(scheduler.kv().clear());
                }
                Command::WakeReaders => scheduler.wake_readers(),
                Command::With(act) => act(scheduler, now),
            }
        }
        if self.closed.load(Ordering::Acquire) && !scheduler.is_empty() {
            scheduler.abort(|_| true);
        }
    }

    /// Does what hand-overs need beside the steps, and says when that is next needed.
    fn attend(
        self: &Arc<Self>,
        desk: &Arc<Desk>,
        scheduler: &mut Scheduler,
        now: Duration,
        next_heartbeat: &mut Duration,
    ) -> Option<Duration> {
        for happening in scheduler.take_happenings() {
            desk.react(self, happening);
        }
        let missed = desk.give_up(scheduler).map(|at| now + at.saturating_duration_since(Instant::now()));
        let expiry = scheduler.expire(now);
        if now >= *next_heartbeat && desk.heartbeat(scheduler) {
            *next_heartbeat = now + desk.heartbeat_interval();
        }
        let heartbeat = (*next_heartbeat > now).then_some(*next_heartbeat);
        expiry.into_iter().chain(heartbeat).chain(missed).min()
    }

    /// Publishes the events of a step. Without a step they stay queued, as in the real engine.
    fn publish(&self, scheduler: &mut Scheduler, next_batch: &mut u64, stepping: bool) {
        if !stepping {
            return;
        }
        let events = scheduler.kv().take_events();
        if events.is_empty() {
            return;
        }
        let batch = KvEventBatch { sequence: *next_batch, timestamp: unix_time().as_secs_f64(), events };
        *next_batch += 1;
        if let Some(publisher) = self.kv_publisher.get() {
            publisher.publish(&batch);
        }
        // Nobody may be subscribed.
        let _ = self.kv_events.send(Arc::new(batch));
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn arriving(inbox: &[Command]) -> usize {
    let sequences = |command: &Command| match command {
        Command::Submit(sequences) => sequences.len(),
        _ => 0,
    };
    inbox.iter().map(sequences).sum()
}

/// Time since the epoch; zero on a clock set before it.
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
