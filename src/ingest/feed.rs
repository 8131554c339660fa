//! One rank's feed: a task that listens, asks again for what is missing, and delivers.

use std::future::ready;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::batch::Gathering;
use super::hub::HubFeed;
use super::live::{Live, LiveEvent, Rejected, message};
pub use super::replay::SILENCE;
use super::replay::{Answer, Question, Replay};
use super::{Delivery, FeedSink};
use crate::kv::event::{Decoder, Format, Skipped, skim};
use crate::kv::feed::{Action, Cursor, Feed, FeedStats, Message};
use crate::zmtp::{Endpoint, Limits, Resolve};

/// After this long without a message the engine is asked whether there was none, and again after twice
/// as long each time: the loss of a burst's last message shows in nothing else.
pub const QUIET: Duration = Duration::from_secs(2);

/// Longest pause between two such questions.
pub const LONGEST_QUIET: Duration = Duration::from_secs(30);

/// Pause before a replay is asked for again after one that failed; doubled each time.
const REPLAY_PAUSE: Duration = Duration::from_millis(100);

/// Longest such pause.
const LONGEST_REPLAY_PAUSE: Duration = Duration::from_secs(2);

/// Where live messages come from.
pub enum Source {
    /// The engine listens, we connect.
    Connect(Endpoint),
    /// The engine connects to a [`super::hub::Hub`] of ours.
    Hub(HubFeed),
}

/// What a feed has to know.
pub struct FeedConfig {
    /// Where live messages come from.
    pub source: Source,
    /// The engine's replay socket, if it has one.
    pub replay: Option<Endpoint>,
    /// Beginning of the topics wanted; the engine filters by it.
    pub topic: String,
    /// What of the events is followed.
    pub format: Format,
    /// DP rank that batches must be of, if they say one; others are dropped and counted.
    pub rank: Option<u32>,
    /// Blocks that the rank can hold, if known: when so many were stored, what a recovering rank
    /// held before must be gone.
    pub capacity: Option<u64>,
    /// What may be connected to.
    pub resolve: Arc<dyn Resolve>,
    /// How long a message may be.
    pub limits: Limits,
    /// After this long without a message the engine is asked whether there was none; [`QUIET`].
    pub quiet: Duration,
    /// A replay that says nothing at first for so long has ended; [`SILENCE`].
    pub silence: Duration,
}

impl FeedConfig {
    /// For a rank without a topic of its own, with bounds as usual.
    pub fn new(source: Source, replay: Option<Endpoint>, format: Format, resolve: Arc<dyn Resolve>) -> Self {
        Self {
            source,
            replay,
            topic: String::new(),
            format,
            rank: None,
            capacity: None,
            resolve,
            limits: Limits::default(),
            quiet: QUIET,
            silence: SILENCE,
        }
    }
}

/// What a feed did and how it is, for metrics and `status`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FeedCounters {
    /// Whether the subscription stands.
    pub connected: bool,
    /// Whether a replay is under way.
    pub replaying: bool,
    /// How far the sink has it.
    pub cursor: Cursor,
    /// Connections made.
    pub connects: u64,
    /// Connections that ended or could not be made.
    pub disconnects: u64,
    /// Why the last one did.
    pub last_error: Option<String>,
    /// Live messages read.
    pub messages: u64,
    /// Bytes of live messages and replays.
    pub bytes: u64,
    /// Messages that are none: wrong parts, no batch of events.
    pub garbage: u64,
    /// Messages of another DP rank.
    pub other_rank: u64,
    /// Events read.
    pub events: u64,
    /// Blocks stored or copied.
    pub stored: u64,
    /// Events that were not used.
    pub skipped: Skipped,
    /// What the state machine did.
    pub stats: FeedStats,
    /// Batches that the sink took.
    pub batches: u64,
    /// Times somebody else had moved the cursor.
    pub moved: u64,
}

/// A running feed. Dropping it ends it at once.
pub struct FeedHandle {
    counters: Arc<Mutex<FeedCounters>>,
    task: AbortOnDropHandle<()>,
}

impl FeedHandle {
    /// Starts a feed behind `cursor`. It runs until the handle is dropped, the sink says
    /// [`Delivery::Stop`], or its hub is gone.
    pub fn spawn<S: FeedSink>(config: FeedConfig, cursor: Cursor, sink: S) -> Self {
        let counters = Arc::new(Mutex::new(FeedCounters { cursor, ..FeedCounters::default() }));
        let task = AbortOnDropHandle::new(tokio::spawn(run(config, cursor, sink, counters.clone())));
        Self { counters, task }
    }

    /// What it did so far.
    pub fn counters(&self) -> FeedCounters {
        self.counters.lock().clone()
    }

    /// Whether it has ended by itself.
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    /// Ends it and waits until nothing of it runs any more.
    pub async fn stop(self) {
        self.task.abort();
        // Aborted, or ended before.
        let _ = self.task.await;
    }
}

/// Whether a feed goes on.
#[derive(PartialEq, Eq)]
enum Next {
    On,
    /// The cursor was moved: what the machine wanted before is void, what it wants now is in
    /// `actions`.
    Void,
    Over,
}

struct Runner<S> {
    machine: Feed<Bytes>,
    actions: Vec<Action<Bytes>>,
    decoder: Decoder,
    gathering: Gathering,
    replay: Option<Replay>,
    replay_at: Option<Endpoint>,
    replay_failures: u32,
    /// Whether there is a live connection.
    linked: bool,
    /// When the engine is asked whether it was silent.
    quiet_at: Option<Instant>,
    /// How often it was since its last message.
    quiets: u32,
    rank: Option<u32>,
    capacity: Option<u64>,
    resolve: Arc<dyn Resolve>,
    limits: Limits,
    quiet: Duration,
    silence: Duration,
    sink: S,
    counters: Arc<Mutex<FeedCounters>>,
}

async fn run<S: FeedSink>(config: FeedConfig, cursor: Cursor, sink: S, counters: Arc<Mutex<FeedCounters>>) {
    let FeedConfig { source, replay, topic, format, rank, capacity, resolve, limits, quiet, silence } =
        config;
    let mut live = match source {
        Source::Connect(endpoint) => Live::connect(endpoint, topic, resolve.clone(), limits),
        Source::Hub(feed) => Live::Hub(feed),
    };
    let mut runner = Runner {
        machine: Feed::new(cursor, replay.is_some()),
        actions: Vec::new(),
        decoder: Decoder::new(format),
        gathering: Gathering::new(cursor, capacity),
        replay: None,
        replay_at: replay,
        replay_failures: 0,
        linked: false,
        quiet_at: None,
        quiets: 0,
        rank,
        capacity,
        resolve,
        limits,
        quiet,
        silence,
        sink,
        counters,
    };
    // Who listens for an engine can ask it before it has come.
    let can_ask = matches!(live, Live::Hub(_)) && runner.replay_at.is_some();
    if can_ask {
        runner.listening();
        if runner.act().await == Next::Over {
            return;
        }
    }
    loop {
        let next = if can_ask || runner.linked {
            runner.turn(&mut live, can_ask).await
        } else {
            runner.wait(&mut live).await
        };
        if next == Next::Over || runner.act().await == Next::Over {
            return;
        }
    }
}

impl<S: FeedSink> Runner<S> {
    fn connected(&mut self) {
        {
            let mut counters = self.counters.lock();
            counters.connected = true;
            counters.connects += 1;
        }
        self.linked = true;
        self.replay_failures = 0;
        self.heard();
        self.machine.connected(&mut self.actions);
    }

    /// The engine said something, or could.
    fn heard(&mut self) {
        self.quiets = 0;
        self.quiet_at = Some(Instant::now() + self.quiet);
    }

    /// Nobody is connected, but can be asked; not at once, because it may just be starting.
    fn listening(&mut self) {
        self.replay_failures = 1;
        self.quiet_at = Some(Instant::now() + self.quiet);
        self.machine.connected(&mut self.actions);
    }

    fn gone(&mut self, why: String) {
        self.machine.away();
        self.replay = None;
        self.linked = false;
        let mut counters = self.counters.lock();
        counters.connected = false;
        counters.replaying = false;
        counters.disconnects += 1;
        counters.last_error = Some(why);
    }

    /// Waits for a connection.
    async fn wait(&mut self, live: &mut Live) -> Next {
        match live.next().await {
            LiveEvent::Connected => self.connected(),
            LiveEvent::Gone(why) => self.gone(why),
            // Of a connection that was given up.
            LiveEvent::Message(_) => {}
            LiveEvent::Over => return Next::Over,
        }
        Next::On
    }

    /// Waits for one thing to happen and takes it in. `can_ask`: also without a connection.
    async fn turn(&mut self, live: &mut Live, can_ask: bool) -> Next {
        let has_room = self.machine.has_room();
        let gathered = !self.gathering.is_empty();
        let quiet_at = self.quiet_at.filter(|_| !self.machine.is_replaying());
        tokio::select! {
            biased;
            answer = next_answer(&mut self.replay) => self.answered(answer),
            event = live.next(), if has_room => match event {
                LiveEvent::Message(parts) => {
                    self.counters.lock().messages += 1;
                    self.heard();
                    if let Some(message) = self.accepted(message(&parts)) {
                        self.machine.live(message, &mut self.actions);
                    }
                }
                // A newer connection has taken the place of the last.
                LiveEvent::Connected => self.connected(),
                LiveEvent::Gone(why) => {
                    self.gone(why);
                    if can_ask {
                        self.listening();
                    }
                }
                LiveEvent::Over => return Next::Over,
            },
            () = sleep_until(quiet_at.unwrap_or_else(Instant::now)), if quiet_at.is_some() => {
                // Without a connection nothing else would say that there is an engine again.
                self.quiets = if self.linked { self.quiets + 1 } else { 0 };
                let pause = self.quiet.saturating_mul(1 << self.quiets.min(8));
                self.quiet_at = Some(Instant::now() + pause.min(LONGEST_QUIET.max(self.quiet)));
                self.machine.quiet(&mut self.actions);
            }
            // Nothing more is there at once: what was gathered goes out.
            () = ready(()), if gathered => {}
        }
        Next::On
    }

    fn accepted(&self, read: Result<Message<Bytes>, Rejected>) -> Option<Message<Bytes>> {
        let mut counters = self.counters.lock();
        let Ok(message) = read else {
            counters.garbage += 1;
            return None;
        };
        counters.bytes += message.size as u64;
        if let Some(rank) = self.rank {
            let said = skim(&message.body).ok().flatten();
            if said.is_some_and(|said| said != rank) {
                counters.other_rank += 1;
                return None;
            }
        }
        Some(message)
    }

    fn answered(&mut self, answer: Answer) {
        match answer {
            Answer::Message(message, _permit) => {
                self.replay_failures = 0;
                if let Some(message) = self.accepted(Ok(message)) {
                    self.machine.replayed(message, &mut self.actions);
                }
            }
            Answer::Garbage => self.counters.lock().garbage += 1,
            Answer::End => {
                self.replay = None;
                self.replay_failures = 0;
                self.machine.replay_ended(&mut self.actions);
            }
            Answer::Failed(why) => {
                self.replay = None;
                self.replay_failures += 1;
                self.counters.lock().last_error = Some(format!("replay: {why}"));
                self.machine.replay_failed(&mut self.actions);
            }
        }
    }

    /// Does what the machine wants, and delivers what is gathered when it is due.
    async fn act(&mut self) -> Next {
        let mut due = self.actions.is_empty();
        loop {
            match self.act_once(due).await {
                Next::Void => due = false,
                next => {
                    let mut counters = self.counters.lock();
                    counters.stats = self.machine.stats();
                    counters.replaying = self.machine.is_replaying();
                    return next;
                }
            }
        }
    }

    async fn act_once(&mut self, due: bool) -> Next {
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::Apply(message) => {
                    self.apply(&message);
                    if self.gathering.is_full() {
                        match self.deliver().await {
                            Next::On => {}
                            other => return other,
                        }
                    }
                }
                Action::Clear { whole } => {
                    self.decoder.settled();
                    self.gathering.clear(whole);
                }
                Action::Replay { from } => self.ask(from),
            }
        }
        if due && !self.gathering.is_empty() { self.deliver().await } else { Next::On }
    }

    fn apply(&mut self, message: &Message<Bytes>) {
        self.quiet_at.get_or_insert(Instant::now() + self.quiet);
        let seed_of = |block| self.sink.seed_of(block);
        // It was skimmed when it came in, so that it is a batch.
        let decoded = self.decoder.decode(&message.body, &seed_of).unwrap_or_default();
        let mut counters = self.counters.lock();
        counters.events += decoded.events;
        counters.stored += decoded.stored;
        counters.skipped.add(&decoded.skipped);
        drop(counters);
        self.gathering.add(message.seq, message.print, decoded);
    }

    fn ask(&mut self, from: u64) {
        let Some(endpoint) = self.replay_at.clone() else { return };
        let pause = match self.replay_failures {
            0 => Duration::ZERO,
            failures => (REPLAY_PAUSE * 2_u32.saturating_pow(failures - 1)).min(LONGEST_REPLAY_PAUSE),
        };
        self.replay = Some(Replay::start(Question {
            endpoint,
            resolve: self.resolve.clone(),
            limits: self.limits,
            from,
            pause,
            silence: self.silence,
        }));
    }

    async fn deliver(&mut self) -> Next {
        let batch = self.gathering.take();
        let cursor = batch.cursor;
        match self.sink.deliver(batch).await {
            Delivery::Applied => {
                self.decoder.settled();
                let mut counters = self.counters.lock();
                counters.batches += 1;
                counters.cursor = cursor;
                Next::On
            }
            Delivery::Moved(cursor) => {
                self.decoder.settled();
                self.gathering = Gathering::new(cursor, self.capacity);
                {
                    let mut counters = self.counters.lock();
                    counters.moved += 1;
                    counters.cursor = cursor;
                }
                self.replay = None;
                self.machine.moved(cursor, &mut self.actions);
                Next::Void
            }
            Delivery::Stop => Next::Over,
        }
    }
}

/// The next answer of a replay; never comes if there is none.
async fn next_answer(replay: &mut Option<Replay>) -> Answer {
    match replay {
        Some(replay) => replay.next().await,
        None => std::future::pending().await,
    }
}
