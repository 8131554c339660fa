//! The engine task: takes requests in, steps the scheduler at the pace of the timing model.

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
use super::outbox::Outbox;
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

enum Command {
    Submit(Vec<Submission>),
    AbortAll,
    Abort(Vec<String>),
    Kill,
    ResetPrefixCache(oneshot::Sender<bool>),
    IndexedBlocks(oneshot::Sender<Vec<u64>>),
    WakeReaders,
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
    /// What it counted.
    pub stats: Arc<Stats>,
    /// Seconds since the epoch at the start.
    pub started: u64,
    faults: Faults,
    /// Bound: the queue limit for submissions; the rest are operator's commands.
    inbox: Mutex<Vec<Command>>,
    wake: Notify,
    closed: AtomicBool,
    cancellations: Arc<AtomicU64>,
    kv_events: broadcast::Sender<Arc<KvEventBatch>>,
    kv_publisher: OnceLock<KvPublisher>,
}

impl Engine {
    /// A handle; [`Engine::drive`] has to run for anything to happen.
    pub fn new(args: EngineSimArgs) -> Arc<Self> {
        Arc::new(Self {
            args,
            stats: Arc::default(),
            started: unix_time().as_secs(),
            faults: Faults::default(),
            inbox: Mutex::default(),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
            cancellations: Arc::default(),
            kv_events: broadcast::channel(KV_EVENT_BACKLOG).0,
            kv_publisher: OnceLock::new(),
        })
    }

    /// An empty outbox for a request to this engine.
    pub fn outbox(&self) -> Arc<Outbox> {
        Arc::new(Outbox::new(!self.args.no_coalesce, self.cancellations.clone()))
    }

    /// Hands the sequences of one request over.
    pub fn submit(&self, sequences: Vec<Submission>) -> Result<(), Refusal> {
        if self.faults.get().engine_dead {
            sequences.iter().for_each(|sequence| sequence.outbox.fail());
            return Ok(());
        }
        let mut inbox = self.inbox.lock();
        let arriving: usize = inbox
            .iter()
            .map(|command| if let Command::Submit(sequences) = command { sequences.len() } else { 0 })
            .sum();
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
            Scheduler::new(args.blocks, args.block_size, running, batched, self.stats.clone());
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
            let Some(plan) = plan else {
                tokio::select! {
                    () = self.wake.notified() => {}
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
                    sequences.iter().for_each(|sequence| sequence.outbox.fail());
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
            }
        }
        if self.closed.load(Ordering::Acquire) && !scheduler.is_empty() {
            scheduler.abort(|_| true);
        }
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

/// Time since the epoch; zero on a clock set before it.
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
