//! Which engines this replica listens to. One task: it looks at the workers and at who owns their
//! feeds, asks engines where their events are to be had, claims feeds that nobody has, and starts
//! and stops [`FeedHandle`]s.
//!
//! Of the live replicas each rank prefers one (rendezvous hashing), which claims its feed; the
//! others do only after it has not for [`PATIENCE`]. A feed stays where it is while its owner lives.
//! Whether a claim is right is decided by the replicated state alone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64;

use super::sources::{self, Found};
use crate::cluster::api::{ClusterError, ControlPlane};
use crate::engines::probe::EngineFacts;
use crate::http::{Allowed, Shard};
use crate::ids::{ReplicaId, WorkerIx};
use crate::ingest::discover::{RankSource, Sources};
use crate::ingest::hub::{Claim, Hub};
use crate::ingest::load::LoadFeed;
use crate::ingest::{Delivery, FeedBatch, FeedBoard, FeedConfig, FeedHandle, FeedSink, Source};
use crate::kv::event::{Format, LoadStat};
use crate::kv::feed::Cursor;
use crate::kv::hash::Seed;
use crate::kv::types::EngineHash;
use crate::kv::wire;
use crate::routing::view::{ORDINARY_CAPACITY, WorkerView};
use crate::state::command::{CacheCommand, CacheOutcome, ControlCommand};
use crate::state::ranks::{Knowledge, RankKey, Ranks};

/// How often everything is looked at where nothing says that it changed.
const ROUND: Duration = Duration::from_millis(500);

/// How long the preferred replica has to claim a feed before any other does.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long an engine's word on where its events are holds; much shorter where it has none, or
/// did not answer.
const WORD_HOLDS: Duration = Duration::from_secs(300);
const NO_WORD_HOLDS: Duration = Duration::from_secs(15);

/// How often an engine is asked anew whose feed lost its connection, until it answers: it may have
/// begun anew, at other ports or with other blocks.
const LOST_WORD_HOLDS: Duration = Duration::from_secs(1);

/// How long a worker must have been out of the registry until its blocks are forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(5);

/// Claims and questions to engines under way at once.
const AT_ONCE: usize = 16;

/// What the ranks that we listen to said last of their load, where they publish it.
pub type LoadBoard = Arc<parking_lot::Mutex<HashMap<RankKey, LoadStat>>>;

/// What an engine said, and until when that holds.
struct Word {
    /// The registration it belongs to.
    generation: u64,
    found: Found,
    asked: Instant,
    until: Instant,
}

/// How to listen to a rank.
#[derive(Clone, PartialEq, Eq)]
struct Plan {
    source: RankSource,
    block_size: u32,
    /// Blocks that the rank can hold. One that nobody tells is taken for an ordinary one: a rank of which
    /// something was lost would otherwise not be scored until its engine clears.
    capacity: u64,
    /// The rank that batches must be of.
    only: Option<u32>,
}

impl Plan {
    fn new(source: &RankSource, worker: &WorkerView) -> Self {
        Self {
            source: source.clone(),
            block_size: worker.block_size(),
            capacity: worker.rank_capacity().unwrap_or(ORDINARY_CAPACITY),
            only: (worker.dp_ranks() > 1).then_some(source.rank),
        }
    }
}

/// A feed of ours.
struct Running {
    feed: FeedHandle,
    /// What it was started with.
    plan: Plan,
    /// How often it had lost its connection, or not got one, when its engine last answered.
    disconnects: u64,
    /// Its load, if it publishes that.
    load: Option<LoadFeed>,
}

/// See the module.
pub struct Feeds {
    shard: Arc<Shard>,
    plane: Arc<dyn ControlPlane>,
    allow: Arc<Allowed>,
    running: HashMap<RankKey, Running>,
    /// Where engines connect to that are told to.
    hub: Option<Hub>,
    /// Feeds of such engines. Every replica waits for all of them; the one that an engine happens
    /// to be connected to takes the feed with the first message.
    awaited: HashMap<RankKey, Running>,
    words: HashMap<WorkerIx, Word>,
    /// Since when a feed has had no owner.
    orphaned: HashMap<RankKey, Instant>,
    /// Since when a worker with ranks has been out of the registry.
    missing: HashMap<WorkerIx, Instant>,
    board: FeedBoard,
    loads: LoadBoard,
}

impl Feeds {
    /// Listens through `plane`; asks engines through `shard`, and tells of its feeds on the board
    /// of its front, refreshed with every round.
    pub fn new(shard: Arc<Shard>, plane: Arc<dyn ControlPlane>, allow: Arc<Allowed>) -> Self {
        let board = Arc::clone(&shard.front.feeds);
        Self {
            shard,
            plane,
            allow,
            running: HashMap::new(),
            hub: None,
            awaited: HashMap::new(),
            words: HashMap::new(),
            orphaned: HashMap::new(),
            missing: HashMap::new(),
            board,
            loads: LoadBoard::default(),
        }
    }

    /// Lets engines connect to `hub`.
    #[must_use]
    pub fn with_hub(self, hub: Option<Hub>) -> Self {
        Self { hub, ..self }
    }

    /// What the ranks said last of their load, refreshed with every round.
    pub fn loads(&self) -> LoadBoard {
        Arc::clone(&self.loads)
    }

    /// Runs until `shutdown`; then gives the feeds up, so that others need not wait for the lease.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut ranks = self.plane.ranks();
        loop {
            let round = self.round(&mut ranks);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = round => {}
            }
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                changed = ranks.changed() => if changed.is_err() { break },
                () = tokio::time::sleep(ROUND) => {}
            }
        }
        for (rank, running) in self.running.drain().chain(self.awaited.drain()) {
            running.feed.stop().await;
            self.plane.tell_cache(CacheCommand::ReleaseFeed { rank });
        }
    }

    async fn round(&mut self, changed: &mut watch::Receiver<Arc<Ranks>>) {
        let ranks = changed.borrow_and_update().clone();
        let status = self.plane.status();
        let live: Vec<ReplicaId> = status.members.iter().filter(|m| m.alive).map(|m| m.id).collect();
        if !live.contains(&status.me) {
            // No place in the cluster, or no lease: what is owned will be taken away.
            return;
        }
        let view = self.plane.registry();
        self.stop_what_is_not_ours(&ranks, status.me);
        self.await_engines(&view.workers);
        let leads = status.members.iter().any(|m| m.id == status.me && m.leads_cache);
        self.forget_the_removed(&ranks, &view.workers, leads);
        self.ask_engines(&view.workers, &ranks, status.me, &live).await;
        // With what was learnt by asking.
        let view = self.plane.registry();
        let mut claims = Vec::new();
        for worker in view.workers.iter().filter(|worker| worker.record.online && !sources::connects(worker))
        {
            for rank in 0..worker.dp_ranks() {
                let key = RankKey { worker: worker.record.ix, rank };
                if self.is_wanted(key, &ranks, status.me, &live) {
                    claims.push((key, Arc::clone(worker)));
                }
            }
        }
        for (key, worker) in claims.into_iter().take(AT_ONCE) {
            self.claim(key, &worker, &ranks, status.me).await;
        }
        *self.loads.lock() = self
            .running
            .iter()
            .filter_map(|(key, running)| Some((*key, running.load.as_ref()?.newest()?)))
            .collect();
        *self.board.lock() = self
            .running
            .iter()
            .chain(&self.awaited)
            .map(|(key, running)| (*key, running.feed.counters()))
            .collect();
    }

    /// A feed that was taken away, whose worker is gone, or that ended by itself.
    fn stop_what_is_not_ours(&mut self, ranks: &Ranks, me: ReplicaId) {
        self.running.retain(|key, running| {
            let ours = ranks.get(*key).is_some_and(|record| record.owner == Some(me));
            ours && !running.feed.is_finished()
        });
    }

    /// Waits for the messages of engines that connect to us.
    fn await_engines(&mut self, workers: &[Arc<WorkerView>]) {
        let Some(hub) = &self.hub else { return };
        let mut wanted = HashMap::new();
        for worker in workers.iter().filter(|worker| sources::connects(worker)) {
            let Some(source) = sources::by_hub(worker) else { continue };
            for rank in 0..worker.dp_ranks() {
                let plan = Plan::new(&RankSource { rank, ..source.clone() }, worker);
                wanted.insert(RankKey { worker: worker.record.ix, rank }, (plan, Arc::clone(worker)));
            }
        }
        self.awaited.retain(|key, running| {
            wanted.get(key).is_some_and(|(plan, _)| *plan == running.plan) && !running.feed.is_finished()
        });
        for (key, (plan, worker)) in wanted {
            if self.awaited.contains_key(&key) {
                continue;
            }
            let claim = Claim { topic: plan.source.topic.clone(), rank: plan.only };
            let Some(messages) = hub.claim(claim) else {
                tracing::warn!(worker = %worker.id(), topic = plan.source.topic, "another worker has this topic (label kv-topic)");
                continue;
            };
            let cursor = self.plane.feed_cursor(key).unwrap_or_default();
            let feed = self.spawn(key, &plan, &worker, Source::Hub(messages), cursor, true);
            self.awaited.insert(key, Running { feed, plan, disconnects: 0, load: None });
        }
    }

    fn spawn(
        &self,
        key: RankKey,
        plan: &Plan,
        worker: &WorkerView,
        source: Source,
        cursor: Cursor,
        takes: bool,
    ) -> FeedHandle {
        let format = Format { block_size: plan.block_size, group: 0 };
        let resolve = Arc::new(sources::OnlyAllowed::new(Arc::clone(&self.allow), &worker.record.spec.url));
        let config = FeedConfig {
            topic: plan.source.topic.clone(),
            rank: plan.only,
            capacity: Some(plan.capacity),
            ..FeedConfig::new(source, plan.source.replay.clone(), format, resolve)
        };
        FeedHandle::spawn(config, cursor, Sink { plane: Arc::clone(&self.plane), key, takes })
    }

    /// The leader forgets workers that left the registry. Not at once: this replica may not have
    /// heard of a worker that another one listens to already.
    fn forget_the_removed(&mut self, ranks: &Ranks, workers: &[Arc<WorkerView>], leads: bool) {
        let groups = self.plane.ksana_groups();
        let known = |ix: WorkerIx| workers.iter().any(|worker| worker.record.ix == ix) || groups.has(ix);
        let now = Instant::now();
        self.words.retain(|ix, _| known(*ix));
        self.missing.retain(|ix, _| !known(*ix) && ranks.of(*ix).next().is_some());
        for (key, _) in ranks.iter().filter(|(key, _)| !known(key.worker)) {
            let since = *self.missing.entry(key.worker).or_insert(now);
            if leads && key.rank == 0 && now.duration_since(since) >= FORGET_AFTER {
                self.plane.tell_cache(CacheCommand::ForgetWorker { worker: key.worker });
            }
        }
    }

    /// Whether this replica should claim the feed now.
    fn is_wanted(&mut self, key: RankKey, ranks: &Ranks, me: ReplicaId, live: &[ReplicaId]) -> bool {
        let owner = ranks.get(key).and_then(|record| record.owner);
        if owner.is_some_and(|owner| owner != me) {
            self.orphaned.remove(&key);
            return false;
        }
        if owner == Some(me) {
            self.orphaned.remove(&key);
            return !self.running.contains_key(&key);
        }
        let since = *self.orphaned.entry(key).or_insert_with(Instant::now);
        preferred(key, live) == Some(me) || since.elapsed() >= PATIENCE
    }

    /// Whether an engine has to be asked about a rank that is ours, or should be.
    fn is_due(&self, key: RankKey, worker: &WorkerView, now: Instant) -> bool {
        let word = self.words.get(&key.worker).filter(|word| word.generation == worker.record.generation);
        match (word, self.running.get(&key)) {
            (None, _) => true,
            (Some(word), None) => word.until <= now,
            (Some(word), Some(running)) => {
                let lost = running.feed.counters().disconnects > running.disconnects;
                lost && now.duration_since(word.asked) >= LOST_WORD_HOLDS
            }
        }
    }

    /// Asks the engines whose feeds this replica may have to claim, and of which it knows nothing, or
    /// that may have begun anew.
    async fn ask_engines(
        &mut self,
        workers: &[Arc<WorkerView>],
        ranks: &Ranks,
        me: ReplicaId,
        live: &[ReplicaId],
    ) {
        use futures_util::StreamExt as _;
        let now = Instant::now();
        let mut due = Vec::new();
        for worker in workers.iter().filter(|worker| worker.record.online && !sources::connects(worker)) {
            let mut keys = (0..worker.dp_ranks()).map(|rank| RankKey { worker: worker.record.ix, rank });
            let is_due = keys.any(|key| {
                let owner = ranks.get(key).and_then(|record| record.owner);
                let ours = owner == Some(me) || (owner.is_none() && self.is_wanted(key, ranks, me, live));
                ours && self.is_due(key, worker, now)
            });
            if is_due {
                due.push(Arc::clone(worker));
            }
        }
        let shard = &self.shard;
        let words: Vec<_> = futures_util::stream::iter(due)
            .map(|worker| async move {
                let found = sources::of(shard, &worker).await;
                let spec = &worker.record.spec;
                let is_known = spec.block_size.is_some() && spec.capacity_blocks.is_some();
                let facts = match &found {
                    Found::Silence => None,
                    _ if is_known || sources::is_off(&worker) => None,
                    _ => Some(sources::facts(shard, &worker).await),
                };
                (worker, found, facts)
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        for (worker, found, facts) in words {
            let worker = match facts {
                Some(facts) => self.learn(worker, &found, facts).await,
                None => worker,
            };
            self.note_word(&worker, found);
        }
    }

    /// Tells all replicas what nobody said when the worker was registered: without the size of its
    /// engine's blocks neither its events nor prompts can be read.
    async fn learn(&self, worker: Arc<WorkerView>, found: &Found, facts: EngineFacts) -> Arc<WorkerView> {
        let spec = &worker.record.spec;
        // That of the events, if it says that.
        let told = if let Found::Sources(sources) = found { sources.block_size } else { None };
        let (block_size, capacity_blocks) = (told.or(facts.block_size), facts.capacity_blocks);
        let is_news = |known: bool, told: bool| !known && told;
        if !is_news(spec.block_size.is_some(), block_size.is_some())
            && !is_news(spec.capacity_blocks.is_some(), capacity_blocks.is_some())
        {
            return worker;
        }
        tracing::info!(worker = %worker.id(), ?block_size, ?capacity_blocks, "learnt from the engine");
        let (id, generation) = (worker.id().clone(), worker.record.generation);
        let learned = ControlCommand::Learned { id, generation, block_size, capacity_blocks };
        if let Err(error) = self.plane.propose(learned).await {
            tracing::debug!(worker = %worker.id(), %error, "cannot tell the others");
        }
        let now = self.plane.registry().worker(worker.id()).cloned();
        now.filter(|now| now.record.generation == generation).unwrap_or(worker)
    }

    /// What the engine says and the registry does not is worth a word: otherwise all that is seen of it
    /// is that nothing is known of the rank.
    fn compare(worker: &WorkerView, sources: &Sources) {
        let (given, told) = (worker.block_size(), sources.block_size);
        if let Some(told) = told.filter(|told| *told != given) {
            tracing::warn!(
                worker = %worker.id(), given, told,
                "the engine's events have another block size than the worker, and are skipped; register it with \
                 the engine's block_size, or with none"
            );
        }
        let (given, told) = (worker.dp_ranks() as usize, sources.ranks.len());
        if given != told {
            tracing::warn!(
                worker = %worker.id(), given, told,
                "the engine tells of another number of data-parallel ranks than the worker has; register it with \
                 dp_ranks = {told}"
            );
        }
    }

    /// Keeps what an engine said, and stops its feeds that were started with something else.
    fn note_word(&mut self, worker: &WorkerView, found: Found) {
        let (ix, generation, now) = (worker.record.ix, worker.record.generation, Instant::now());
        let word = self.words.get_mut(&ix).filter(|word| word.generation == generation);
        match (word, &found) {
            // Not up yet; what it said before is the best there is.
            (Some(word), Found::Silence) if matches!(word.found, Found::Sources(_)) => {
                word.asked = now;
                word.until = word.until.max(now + LOST_WORD_HOLDS);
                return;
            }
            (_, Found::Sources(sources)) => {
                Self::compare(worker, sources);
                self.running.retain(|key, running| {
                    let source = sources.of_rank(key.rank, worker.dp_ranks());
                    let Some(source) = source.filter(|_| key.worker == ix) else { return true };
                    running.disconnects = running.feed.counters().disconnects;
                    running.plan == Plan::new(source, worker)
                });
            }
            // It has begun anew, without events. A feed that still speaks knows better.
            (_, Found::Nothing) => {
                self.running.retain(|key, running| key.worker != ix || running.feed.counters().connected);
            }
            _ => {}
        }
        let holds = if matches!(found, Found::Sources(_)) { WORD_HOLDS } else { NO_WORD_HOLDS };
        self.words.insert(ix, Word { generation, found, asked: now, until: now + holds });
    }

    async fn claim(&mut self, key: RankKey, worker: &Arc<WorkerView>, ranks: &Ranks, me: ReplicaId) {
        let Some(word) = self.words.get(&key.worker) else { return };
        let source = match &word.found {
            Found::Sources(found) => found.of_rank(key.rank, worker.dp_ranks()),
            Found::Nothing => None,
            // It may yet tell.
            Found::Silence => return,
        };
        let Some(source) = source.filter(|source| source.listens) else {
            match ranks.get(key).map(|record| record.knowledge) {
                None => self.reckon(key, worker),
                Some(Knowledge::Events) => {
                    tracing::info!(worker = %worker.id(), rank = key.rank, "the engine has no KV events any more");
                    self.plane.tell_cache(CacheCommand::LoseFeed { rank: key });
                }
                Some(Knowledge::Predicted) => {}
            }
            return;
        };
        let from = ranks.get(key).and_then(|record| record.owner).filter(|owner| *owner == me);
        let claim = CacheCommand::ClaimFeed { rank: key, from };
        let cursor = match self.plane.propose_cache(claim).await {
            Ok(CacheOutcome::Feed(cursor)) => cursor,
            Ok(other) => {
                return tracing::debug!(worker = %worker.id(), rank = key.rank, ?other, "feed not claimed");
            }
            Err(error) => return tracing::debug!(worker = %worker.id(), %error, "feed not claimed"),
        };
        tracing::info!(worker = %worker.id(), rank = key.rank, ?cursor, "listening to the engine's KV events");
        let plan = Plan::new(source, worker);
        let load = plan.source.load.clone().map(|(endpoint, topic)| {
            let resolve = sources::OnlyAllowed::new(Arc::clone(&self.allow), &worker.record.spec.url);
            LoadFeed::spawn(endpoint, &topic, Arc::new(resolve))
        });
        let from = Source::Connect(plan.source.endpoint.clone());
        let feed = self.spawn(key, &plan, worker, from, cursor, false);
        self.running.insert(key, Running { feed, plan, disconnects: 0, load });
    }

    /// An engine that tells nothing: its blocks are reckoned from what is sent to it.
    fn reckon(&self, rank: RankKey, worker: &WorkerView) {
        let capacity = Some(worker.rank_capacity().unwrap_or(ORDINARY_CAPACITY));
        let seed = Seed::default();
        self.plane.tell_cache(CacheCommand::Routed { rank, seed, locals: Bytes::new(), capacity });
    }
}

/// The replica that a feed had best be with; the same wherever it is reckoned, and few feeds
/// move when a replica comes or goes.
pub(super) fn preferred(key: RankKey, live: &[ReplicaId]) -> Option<ReplicaId> {
    live.iter().copied().max_by_key(|id| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&key.worker.0.to_le_bytes());
        bytes[4..8].copy_from_slice(&key.rank.to_le_bytes());
        bytes[8..].copy_from_slice(&id.0.to_le_bytes());
        xxh3_64(&bytes)
    })
}

/// Takes a feed's batches through the log.
struct Sink {
    plane: Arc<dyn ControlPlane>,
    key: RankKey,
    /// Whether to take the feed from whoever has it: the engine speaks to this replica.
    takes: bool,
}

/// Pause before a batch is proposed again that could not be.
const AGAIN: Duration = Duration::from_millis(100);

impl FeedSink for Sink {
    async fn deliver(&self, batch: FeedBatch) -> Delivery {
        let ops = Bytes::from(wire::encode(&batch.ops));
        loop {
            let command = CacheCommand::Events {
                rank: self.key,
                after: batch.after,
                cursor: batch.cursor,
                ops: ops.clone(),
            };
            match self.plane.propose_cache(command).await {
                Ok(CacheOutcome::Done) => return Delivery::Applied,
                // Perhaps by an earlier attempt whose answer was lost.
                Ok(CacheOutcome::Moved(cursor)) if cursor == batch.cursor => return Delivery::Applied,
                Ok(CacheOutcome::Moved(cursor)) => return Delivery::Moved(cursor),
                Ok(CacheOutcome::Unknown) => match self.plane.feed_cursor(self.key) {
                    Some(cursor) => return Delivery::Moved(cursor),
                    None => return Delivery::Stop,
                },
                Ok(CacheOutcome::NotOwner(from)) if self.takes => {
                    let claim = CacheCommand::ClaimFeed { rank: self.key, from };
                    match self.plane.propose_cache(claim).await {
                        Ok(CacheOutcome::Feed(cursor)) if cursor != batch.after => {
                            return Delivery::Moved(cursor);
                        }
                        Ok(CacheOutcome::Feed(_)) => {}
                        // Somebody was quicker, or nobody leads.
                        _ => tokio::time::sleep(AGAIN).await,
                    }
                }
                Ok(_) => return Delivery::Stop,
                // No leader, or no room: the engine keeps what we do not read.
                Err(ClusterError::Unavailable { .. } | ClusterError::Overloaded { .. }) => {
                    tokio::time::sleep(AGAIN).await;
                }
                Err(_) => return Delivery::Stop,
            }
        }
    }

    fn seed_of(&self, block: EngineHash) -> Option<Seed> {
        let ix = self.plane.ranks().borrow().get(self.key)?.ix;
        self.plane.blocks().index.load().seed_of(ix, block)
    }
}

#[cfg(test)]
#[path = "feeds_tests.rs"]
mod tests;
