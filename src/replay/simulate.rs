//! The simulation: a trace, simulated engines, and the product's own selection in virtual time.
//!
//! ```text
//!             ┌─ router 0: view, bookings, predictions ─┐  select   ┌─ engine 0 + cache ─┐
//! arrivals ──▶│  ... own bookings at once, those of     │──────────▶│  ...               │
//!  (in turn)  └─ router r: the others after the lag ────┘           └─ engine w + cache ─┘
//!                          ▲                                                  │
//!                          └──────────── block events, after the lag ─────────┘
//! ```
//!
//! Nothing depends on the order of a map or on a clock: equal options give equal results.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::cache::{BlockCache, Change};
use super::engine::{Engine, EngineModel, Outcome};
use super::index::{MAX_RANKS, PrefixMap, overlaps};
use super::stats::{Recorder, Run};
use super::trace::Request;
use crate::ids::{WorkerId, WorkerIx};
use crate::kv::hash::{LocalHash, Seed};
use crate::kv::types::RankIx;
use crate::routing::book::{Booking, Bookings, Share};
use crate::routing::breaker::BreakerOptions;
use crate::routing::policy::{Policy, RouteRequest, from_spec};
use crate::routing::recent::{Key, Recent, TURN};
use crate::routing::select::{Limits, Overload, select};
use crate::routing::view::{RegistryView, WorkerLive, WorkerView};
use crate::state::load::LoadDelta;
use crate::state::ranks::RankKey;
use crate::state::worker::{Liveness, WorkerRecord, WorkerRole, WorkerSource, WorkerSpec};

/// What is simulated.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Options {
    /// Engines, 1 to 256.
    pub workers: u32,
    /// Blocks in the cache of each.
    pub blocks: u64,
    /// Replicas of the router, which take requests in turn.
    pub routers: u32,
    /// Seconds until what one replica books, and what an engine says of its blocks, is known to
    /// the others.
    pub lag: f64,
    /// Arrivals come so many times as fast.
    pub speed: f64,
    /// Where chance begins.
    pub seed: u64,
    /// How fast engines are.
    pub engine: EngineModel,
}

impl Options {
    /// Checks bounds; the error names the option.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=MAX_RANKS).contains(&self.workers) {
            return Err(format!("workers must be 1 to {MAX_RANKS}, not {}", self.workers));
        }
        if !(1..=64).contains(&self.routers) {
            return Err(format!("routers must be 1 to 64, not {}", self.routers));
        }
        if !(1..=1 << 32).contains(&self.blocks) {
            return Err(format!("blocks must be 1 to {}, not {}", 1_u64 << 32, self.blocks));
        }
        if !(0.0..=60.0).contains(&self.lag) {
            return Err("the lag must lie in 0 to 60,000 ms".to_owned());
        }
        if !(1e-3..=1e6).contains(&self.speed) {
            return Err(format!("speed must lie in 0.001 to 1,000,000, not {}", self.speed));
        }
        Ok(())
    }
}

/// How requests find their engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Router<'a> {
    /// By a policy, as the product does: its name and parameters.
    Policy(&'a str),
    /// The bound: all engines share one cache as large as all of theirs, and a request goes to the
    /// one that truly has the least prefill before it.
    Pooled,
}

enum Event {
    Arrival(usize),
    StepEnds(usize),
    Booked { at: usize, deltas: Arc<Vec<(RankKey, LoadDelta)>> },
    Blocks { rank: RankIx, changes: Vec<Change> },
    Sent { by: usize, rank: RankIx, request: usize },
    Turn { at: usize },
    StillWait { by: usize, keys: Arc<Vec<Key>> },
}

/// One replica.
struct Replica {
    view: RegistryView,
    bookings: Bookings,
    policy: Arc<dyn Policy>,
    recent: Recent,
    /// By request.
    booked: HashMap<usize, Booking>,
}

struct Simulation<'a> {
    options: Options,
    requests: &'a [Request],
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    /// What happens, by the last member of the queue's entries; taken out when it happens.
    events: HashMap<usize, Event>,
    next: usize,
    now: u64,
    engines: Vec<Engine>,
    stepping: Vec<bool>,
    caches: Vec<BlockCache>,
    replicas: Vec<Replica>,
    index: PrefixMap,
    /// Router and engine of each request.
    placed: Vec<(usize, usize)>,
    recorder: Recorder,
    rng: StdRng,
}

const NANOS: f64 = 1e9;

/// Runs a trace to its end. The error says what is wrong with the options or the policy.
pub fn simulate(requests: &[Request], options: &Options, router: Router<'_>) -> Result<Run, String> {
    options.check()?;
    let workers = options.workers as usize;
    let pooled = matches!(router, Router::Pooled);
    let caches = if pooled {
        vec![BlockCache::new(options.blocks * u64::from(options.workers))]
    } else {
        (0..workers).map(|_| BlockCache::new(options.blocks)).collect()
    };
    let replicas = match router {
        Router::Pooled => Vec::new(),
        // Each replica has one of its own.
        Router::Policy(spec) => (0..options.routers)
            .map(|_| from_spec(spec).map(|policy| replica(options, policy)))
            .collect::<Result<_, _>>()?,
    };
    let mut simulation = Simulation {
        options: *options,
        requests,
        queue: BinaryHeap::new(),
        events: HashMap::new(),
        next: 0,
        now: 0,
        engines: (0..workers).map(|_| Engine::new(options.engine)).collect(),
        stepping: vec![false; workers],
        caches,
        replicas,
        index: PrefixMap::default(),
        placed: vec![(0, 0); requests.len()],
        recorder: Recorder::new(requests.len(), workers),
        rng: StdRng::seed_from_u64(options.seed),
    };
    for (at, request) in requests.iter().enumerate() {
        simulation.schedule((request.at / options.speed * NANOS) as u64, Event::Arrival(at));
    }
    // Replicas do not begin their turns together.
    for at in 0..simulation.replicas.len() {
        let first = TURN.as_nanos() as u64 * (at as u64 + 1) / simulation.replicas.len() as u64;
        simulation.schedule(first, Event::Turn { at });
    }
    while let Some(Reverse((time, _, id))) = simulation.queue.pop() {
        simulation.now = time;
        if let Some(event) = simulation.events.remove(&id) {
            simulation.happens(event);
        }
    }
    Ok(simulation.recorder.finish(requests))
}

/// A request's blocks as the product's own index takes them: a sequence hash names all that comes
/// before it, too.
fn locals(request: &Request) -> Vec<LocalHash> {
    request.hashes.iter().map(|hash| LocalHash(hash.0)).collect()
}

fn replica(options: &Options, policy: Arc<dyn Policy>) -> Replica {
    let workers = (0..options.workers).map(|n| worker(n, options)).collect();
    Replica {
        view: RegistryView::new(1, workers),
        bookings: Bookings::new(|| {}),
        policy,
        recent: Recent::default(),
        booked: HashMap::new(),
    }
}

fn worker(n: u32, options: &Options) -> Arc<WorkerView> {
    let spec = WorkerSpec {
        id: WorkerId(format!("w{n:03}").into()),
        url: format!("http://w{n:03}"),
        engine: Default::default(),
        models: Vec::new(),
        role: WorkerRole::Aggregated,
        transfer: Default::default(),
        dp_ranks: 1,
        block_size: Some(options.engine.block_size),
        capacity_blocks: Some(options.blocks),
        labels: Default::default(),
        weight: 100,
        http2: false,
        max_requests: None,
        owner: None,
        source: WorkerSource::Admin,
    };
    let record = WorkerRecord {
        spec,
        drain: false,
        online: true,
        liveness: Liveness::Probe,
        last_heard_ms: 0,
        generation: 1,
        ix: WorkerIx(n),
        failed_by: Default::default(),
    };
    let live = Arc::new(WorkerLive::default());
    live.set_ranks(vec![RankIx(n)]);
    Arc::new(WorkerView { record, live })
}

impl Simulation<'_> {
    fn schedule(&mut self, at: u64, event: Event) {
        let id = self.next;
        self.next += 1;
        self.events.insert(id, event);
        self.queue.push(Reverse((at, id as u64, id)));
    }

    fn later(&mut self, event: Event) {
        let lag = (self.options.lag * NANOS) as u64;
        self.schedule(self.now + lag, event);
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Arrival(request) => self.arrives(request),
            Event::StepEnds(engine) => self.step_ends(engine),
            Event::Booked { at, deltas } => {
                let workers = &self.replicas[at].view.workers;
                deltas.iter().for_each(|(key, delta)| workers[key.worker.0 as usize].live.peers.add(delta));
            }
            Event::Blocks { rank, changes } => {
                for change in changes {
                    match change {
                        Change::Stored(hash) => self.index.store(rank, hash),
                        Change::Removed(hash) => self.index.remove(rank, hash),
                    }
                }
            }
            Event::Sent { by, rank, request } => {
                let locals = locals(&self.requests[request]);
                for replica in self.others(by) {
                    replica.recent.note_told(rank, Seed::default(), locals.clone());
                }
            }
            Event::Turn { at } => {
                let keys = self.replicas[at].recent.turn();
                if !keys.is_empty() && self.replicas.len() > 1 {
                    self.later(Event::StillWait { by: at, keys: Arc::new(keys) });
                }
                // The last event of all is no turn.
                if self.events.values().any(|event| !matches!(event, Event::Turn { .. })) {
                    self.schedule(self.now + TURN.as_nanos() as u64, Event::Turn { at });
                }
            }
            Event::StillWait { by, keys } => {
                self.others(by).for_each(|replica| replica.recent.still_wait(&keys));
            }
        }
    }

    fn others(&self, than: usize) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().enumerate().filter(move |(at, _)| *at != than).map(|(_, replica)| replica)
    }

    fn arrives(&mut self, request: usize) {
        self.recorder.arrived(request, self.now);
        let (router, engine) = if self.replicas.is_empty() {
            let backlog = |engine: &usize| self.engines[*engine].backlog(self.requests);
            (0, (0..self.engines.len()).min_by_key(backlog).unwrap_or_default())
        } else {
            let router = request % self.replicas.len();
            (router, self.route(router, request))
        };
        self.placed[request] = (router, engine);
        self.recorder.placed(engine, self.now);
        self.engines[engine].push(request);
        if !self.stepping[engine] {
            self.begin(engine);
        }
    }

    /// Selects and books as a replica does.
    fn route(&mut self, router: usize, at: usize) -> usize {
        let request = &self.requests[at];
        let replica = &mut self.replicas[router];
        let locals = locals(request);
        let (mut held, mut sent, mut buffer) = (Vec::new(), Vec::new(), Vec::new());
        if replica.policy.wants_overlap() {
            held = overlaps(&self.index, &request.hashes);
            replica.recent.raise(&locals, &mut sent, &mut buffer);
        }
        let peers_late = if self.options.routers > 1 { self.options.lag * 1000.0 } else { 0.0 };
        let asked = RouteRequest {
            prompt_tokens: request.input,
            hashes: &request.hashes,
            overlaps: &held,
            predicted: &sent,
            session: request.ids.get(1).or(request.ids.first()).copied(),
            view_age_ms: peers_late as u64,
            ..RouteRequest::default()
        };
        let limits = Limits {
            now_ms: self.now / 1_000_000,
            breaker: BreakerOptions::default(),
            max_requests: u32::MAX,
            overload: Overload::default(),
        };
        let chosen = select(&replica.view, replica.policy.as_ref(), &asked, &limits, &[], &mut self.rng);
        // Nothing is drained, tried or saturated here: one is always chosen.
        let Ok(chosen) = chosen else { return 0 };
        let engine = chosen.worker.record.ix.0 as usize;
        let (prefill, blocks) = chosen.to_book(request.input);
        let share = Share { rank: chosen.rank, prefill_tokens: prefill, decode_blocks: blocks, chain: None };
        let mut booking = replica.bookings.book_share(chosen.worker, share);
        let (rank, seed, known) = (RankIx(engine as u32), Seed::default(), chosen.overlap.blocks);
        let looks = replica.policy.wants_overlap();
        let is_news = looks && replica.recent.is_news(rank, &locals, known, false, &mut buffer);
        if is_news {
            replica.recent.note(rank, seed, &locals);
        }
        if looks && (known as usize) < locals.len() {
            booking.awaits(replica.recent.until_first_token(rank, seed, &locals));
        }
        replica.booked.insert(at, booking);
        self.tell(router);
        if is_news && self.replicas.len() > 1 {
            self.later(Event::Sent { by: router, rank, request: at });
        }
        engine
    }

    /// Sends what a replica has booked to the others.
    fn tell(&mut self, router: usize) {
        let deltas = Arc::new(self.replicas[router].bookings.drain());
        if deltas.is_empty() {
            return;
        }
        for at in (0..self.replicas.len()).filter(|at| *at != router) {
            self.later(Event::Booked { at, deltas: deltas.clone() });
        }
    }

    fn begin(&mut self, engine: usize) {
        let cache = engine % self.caches.len();
        let mut refused = Vec::new();
        let time = self.engines[engine].begin(self.requests, &mut self.caches[cache], &mut refused);
        for request in refused {
            self.recorder.failed(request, engine);
            self.freed(request);
        }
        self.stepping[engine] = time.is_some();
        if let Some(time) = time {
            self.schedule(self.now + (time * NANOS) as u64, Event::StepEnds(engine));
        }
    }

    fn step_ends(&mut self, engine: usize) {
        let cache = engine % self.caches.len();
        let mut outcomes = Vec::new();
        self.engines[engine].end(self.requests, &mut self.caches[cache], &mut outcomes);
        let changes = self.caches[cache].changes();
        if !self.replicas.is_empty() && !changes.is_empty() {
            self.later(Event::Blocks { rank: RankIx(engine as u32), changes });
        }
        for outcome in outcomes {
            match outcome {
                Outcome::FirstToken { request, cached } => {
                    self.recorder.first_token(request, cached, self.now);
                    let by = self.placed[request].0;
                    if let Some(booking) = self.booking(request) {
                        booking.prefill_done();
                        self.tell(by);
                    }
                }
                Outcome::Grown { request } => {
                    if let Some(booking) = self.booking(request) {
                        booking.grow(1);
                        self.tell(self.placed[request].0);
                    }
                }
                Outcome::Ended { request } => {
                    self.recorder.ended(request, engine, self.now);
                    self.freed(request);
                }
            }
        }
        self.begin(engine);
    }

    fn booking(&mut self, request: usize) -> Option<&mut Booking> {
        self.replicas.get_mut(self.placed[request].0)?.booked.get_mut(&request)
    }

    fn freed(&mut self, request: usize) {
        let router = self.placed[request].0;
        if let Some(replica) = self.replicas.get_mut(router) {
            replica.booked.remove(&request);
            self.tell(router);
        }
    }
}
