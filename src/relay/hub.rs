//! All streams of one process: begins them, holds them, forgets them.
//!
//! **Who may hold.** A stream's attempt is held by whoever the directory says. A holder that learns
//! of a later attempt stops at once; its copy is closed, and who read it looks elsewhere.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::attempts::Had;
use super::copy::{Copy, Role, Summary};
use super::counts::Counts;
use super::directory::{Directory, Peer};
use super::line::Line;
use super::link::caller::Ticket;
use super::links::Links;
use super::log::Log;
use super::order::{Head, Order};
use super::past::Pasts;
use super::placing::Placer;
use super::presence::Presence;
use super::{Durability, Engines, Options};
use crate::cluster::peer::dial::Dialer;
use crate::codec;
use crate::ids::{ReplicaId, StreamId};
use crate::state::streams::{Holder, StreamRecord};

/// How often the peers are looked up.
const LOOK: Duration = Duration::from_millis(100);
/// How often what is due is forgotten.
const SWEEP: Duration = Duration::from_millis(500);
/// How long a peer may take to accept an order.
pub(super) const ORDER_TIMEOUT: Duration = Duration::from_millis(1000);
/// How long an edge keeps a stream after its end: nobody comes here for it, and nobody would tell an
/// edge that it is to be forgotten.
const KEPT_AT_EDGES_MS: u32 = 5_000;

/// A stream at this process.
pub struct Entry {
    /// What there is of it.
    pub copy: Arc<Copy>,
    /// Its channel to where it comes from, and who that is.
    pub(super) ticket: Mutex<Option<(Ticket, Holder)>>,
    /// Whom this process has asked last to begin it, and who has not said that it does. Locked behind
    /// `ticket`.
    pub(super) asked: Mutex<Option<Holder>>,
    /// Stops the generation here.
    pub(super) holding: Mutex<Option<(u32, CancellationToken)>>,
    /// Somebody else generates it now.
    pub(super) fenced: AtomicBool,
    /// Its source is lost, and somebody sees to that already.
    pub(super) recovering: AtomicBool,
    /// Forgotten as soon as it has ended.
    pub(super) purged: AtomicBool,
    /// An agent generates it, which tells the directory nothing.
    pub(super) is_agents: AtomicBool,
    /// It shall be at this process only.
    pub(super) local: AtomicBool,
    /// Others may begin it, too: see [`Manner::shared`](super::begin::Manner::shared).
    pub(super) shared: AtomicBool,
    /// Another replica is being asked to get a copy.
    pub(super) spreading: AtomicBool,
    /// Another replica that has a copy of what has ended, having been asked to; this one, where nobody took
    /// it; 0 before anybody was asked.
    pub(super) second: AtomicU64,
    /// Clients here that listen to it by way of another replica's copy.
    pub(super) detours: AtomicU32,
}

impl Entry {
    fn new(copy: Arc<Copy>) -> Arc<Self> {
        Arc::new(Self {
            copy,
            ticket: Mutex::default(),
            asked: Mutex::default(),
            holding: Mutex::default(),
            fenced: AtomicBool::new(false),
            recovering: AtomicBool::new(false),
            purged: AtomicBool::new(false),
            is_agents: AtomicBool::new(false),
            local: AtomicBool::new(false),
            shared: AtomicBool::new(false),
            spreading: AtomicBool::new(false),
            second: AtomicU64::new(0),
            detours: AtomicU32::new(0),
        })
    }

    /// Who its copy came from, where nothing can come from there any more and something should.
    pub(super) fn lost_source(&self) -> Option<Holder> {
        // Looked at first: a channel is over as soon as the copy has its end.
        let ticket = self.ticket.lock();
        let (_, holder) = ticket.as_ref().filter(|(ticket, _)| !ticket.is_open())?;
        (!self.copy.ended() && !self.copy.is_closed()).then_some(*holder)
    }
}

/// The cluster, as of a moment ago.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// This replica; `None` where this process is none, and holds nothing.
    pub me: Option<ReplicaId>,
    /// The cluster's id.
    pub cluster: String,
    /// The others.
    pub peers: Vec<Peer>,
    /// It may do things for others: see [`Directory::is_current`].
    pub current: bool,
}

/// See the module.
pub struct Relays {
    /// As configured.
    pub options: Options,
    /// What is known of the cluster.
    pub directory: Arc<dyn Directory>,
    /// What happened.
    pub counts: Counts,
    pub(super) engines: OnceLock<Arc<dyn Engines>>,
    placer: OnceLock<Arc<dyn Placer>>,
    pub(super) links: Links,
    pub(super) runtime: Handle,
    pub(super) presence: Presence,
    view: ArcSwap<View>,
    entries: Mutex<HashMap<StreamId, Arc<Entry>>>,
    /// What this process had of streams that others have taken from it while it lives: see [`super::past`].
    pub(super) pasts: Pasts,
    /// As of the last sweep.
    bytes: AtomicUsize,
    pub(super) leaving: AtomicBool,
    pub(super) this: Weak<Self>,
}

impl Relays {
    /// Of this process. Tasks run on `runtime`.
    pub fn new(
        options: Options,
        directory: Arc<dyn Directory>,
        dialer: Dialer,
        runtime: Handle,
    ) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            options,
            directory,
            counts: Counts::default(),
            engines: OnceLock::new(),
            placer: OnceLock::new(),
            links: Links::new(dialer),
            runtime,
            presence: Presence::default(),
            view: ArcSwap::default(),
            entries: Mutex::default(),
            pasts: Pasts::default(),
            bytes: AtomicUsize::new(0),
            leaving: AtomicBool::new(false),
            this: this.clone(),
        })
    }

    /// Who generates here. Before that, nothing can be held.
    pub fn set_engines(&self, engines: Arc<dyn Engines>) {
        let _ = self.engines.set(engines);
    }

    /// Who chooses places for the streams of edges. Before that, none are chosen.
    pub fn set_placer(&self, placer: Arc<dyn Placer>) {
        let _ = self.placer.set(placer);
    }

    pub(super) fn placer(&self) -> Option<Arc<dyn Placer>> {
        self.placer.get().cloned()
    }

    /// Looks after the streams until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let (mut look, mut sweep) = (tokio::time::interval(LOOK), tokio::time::interval(SWEEP));
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = look.tick() => {
                    self.presence.tick(Instant::now());
                    self.look();
                }
                _ = sweep.tick() => self.sweep(),
            }
        }
    }

    /// Looks the cluster up now.
    pub fn look(&self) {
        let directory = &self.directory;
        // Asked first: what is read after it is no older than it says.
        let current = directory.is_current();
        let view =
            View { me: directory.me(), cluster: directory.cluster(), peers: directory.peers(), current };
        if !view.cluster.is_empty() && directory.secret().is_none() {
            directory.offer_secret(super::secret::random_secret());
        }
        self.view.store(Arc::new(view));
    }

    /// The cluster, as of a moment ago.
    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// The cluster, for who wants something done here: what this process did not know a moment ago changes
    /// nothing, since it says that it is ready as soon as it knows.
    pub(super) fn view_to_serve(&self) -> Arc<View> {
        if !self.view.load().current {
            self.look();
        }
        self.view()
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }

    /// A stream that is here.
    pub fn get(&self, id: StreamId) -> Option<Arc<Entry>> {
        self.entries.lock().get(&id).cloned()
    }

    pub(super) fn entries(&self) -> Vec<Arc<Entry>> {
        self.entries.lock().values().cloned().collect()
    }

    /// All streams that are here.
    pub fn all(&self) -> Vec<(StreamId, Summary)> {
        self.entries().iter().map(|entry| (entry.copy.id, entry.copy.summary())).collect()
    }

    /// Memory that streams take, as of a moment ago.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Bytes of events that a new stream may keep: little, when there is no memory.
    pub(super) fn bound(&self) -> usize {
        match self.bytes() < self.options.process_bytes {
            true => self.options.stream_bytes,
            false => super::link::WINDOW,
        }
    }

    /// Keeps a copy, in place of any other of the same stream.
    pub(super) fn put(&self, copy: Arc<Copy>) -> Arc<Entry> {
        let entry = Entry::new(copy);
        let old = self.entries.lock().insert(entry.copy.id, Arc::clone(&entry));
        if let Some(old) = old {
            self.drop_entry(&old);
        }
        self.note_bytes(&entry);
        entry
    }

    /// Keeps a copy where there is none of the stream; the one that there is otherwise.
    pub(super) fn put_first(&self, copy: Arc<Copy>) -> Result<Arc<Entry>, Arc<Entry>> {
        let entry = Entry::new(copy);
        match self.entries.lock().entry(entry.copy.id) {
            Slot::Occupied(there) => return Err(Arc::clone(there.get())),
            Slot::Vacant(free) => free.insert(Arc::clone(&entry)),
        };
        self.note_bytes(&entry);
        Ok(entry)
    }

    fn note_bytes(&self, entry: &Entry) {
        self.bytes.fetch_add(entry.copy.order.bytes(), Ordering::Relaxed);
    }

    /// Who reads it looks elsewhere; who generates it stops.
    fn drop_entry(&self, entry: &Entry) {
        entry.fenced.store(true, Ordering::Release);
        entry.copy.close();
        if let Some((_, stop)) = entry.holding.lock().take() {
            stop.cancel();
        }
        entry.ticket.lock().take();
    }

    pub(super) fn remove(&self, entry: &Arc<Entry>) {
        self.detach(entry);
        self.drop_entry(entry);
    }

    /// Takes a stream out that has failed here: who reads it reads on, who comes looks elsewhere.
    pub(super) fn detach(&self, entry: &Arc<Entry>) {
        let mut entries = self.entries.lock();
        if entries.get(&entry.copy.id).is_some_and(|stands| Arc::ptr_eq(stands, entry)) {
            entries.remove(&entry.copy.id);
        }
    }

    /// What the directory should say of a stream.
    pub(super) fn record(&self, order: &Order, holder: Holder) -> StreamRecord {
        StreamRecord {
            principal: order.principal,
            request: order.request,
            holder,
            // Nobody could come to an edge for its copy.
            mirror: self.view.load().me.filter(|me| holder != Holder::Replica(*me)),
            attempt: 1,
            model: order.model.chars().take(128).collect::<String>().into(),
            opened_ms: 0,
            lasts_ms: order.total_ms.saturating_add(order.keep_ms.into()),
            ended: None,
        }
    }

    /// Who should hold a stream whose client is here: not this process, not a leader, none of `bad`,
    /// as far as there is a choice. `None` where nobody is left: never at a replica.
    pub(super) fn choose(&self, bad: &[ReplicaId]) -> Option<ReplicaId> {
        let view = self.view_to_serve();
        if self.options.durability == Durability::Local && view.me.is_some() {
            return view.me;
        }
        let fit = |peer: &&Peer| peer.alive && !bad.contains(&peer.id);
        let pick = |leads: bool| {
            let fit: Vec<&Peer> = view.peers.iter().filter(fit).filter(|peer| peer.leads == leads).collect();
            (!fit.is_empty()).then(|| fit[rand::random_range(0..fit.len())].id)
        };
        pick(false).or_else(|| pick(true)).or(view.me)
    }

    /// Longest time that a stream is kept here after its end, ms: what agents and replicas have is wanted
    /// by others.
    pub(super) fn most_kept(&self) -> u32 {
        if self.directory.is_elsewhere() { KEPT_AT_EDGES_MS } else { u32::MAX }
    }

    fn sweep(&self) {
        self.pasts.forget_old(Instant::now());
        let entries = self.entries();
        self.spread(&entries);
        let mut bytes = 0;
        let mut ended = Vec::new();
        let most_kept = self.most_kept();
        for entry in entries {
            if entry.copy.is_closed() {
                self.remove(&entry);
                continue;
            }
            let summary = entry.copy.summary();
            let order = &entry.copy.order;
            if let Some(at) = summary.ended_at {
                let keep = match entry.purged.load(Ordering::Acquire) {
                    true => 0,
                    false => order.keep_ms.min(most_kept),
                };
                if at.elapsed() >= Duration::from_millis(keep.into()) && summary.clients == 0 {
                    self.remove(&entry);
                    continue;
                }
                ended.push((at, summary.bytes, entry));
            } else if let (Role::Holder, Some(since)) = (summary.role, summary.orphan_since)
                // A new holder is told of clients after it has begun.
                && since.elapsed() >= Duration::from_millis(order.orphan_ms.into()).max(ORDER_TIMEOUT)
            {
                tracing::debug!(stream = %entry.copy.id, "no client came back");
                Counts::add(&self.counts.orphaned);
                self.cancel(&entry, false);
            }
            bytes += summary.bytes;
        }
        if bytes > self.options.process_bytes {
            // Who ended longest ago goes first; who runs stays.
            ended.sort_by_key(|(at, _, _)| *at);
            for (_, size, entry) in ended {
                if bytes <= self.options.process_bytes {
                    break;
                }
                Counts::add(&self.counts.evicted);
                self.remove(&entry);
                bytes = bytes.saturating_sub(size);
            }
        }
        self.bytes.store(bytes, Ordering::Relaxed);
    }
}

/// What another process gave.
pub(super) fn log_of(had: Had) -> (Log, Line) {
    let mut log = Log::after(had.first, &had.journal);
    had.events.into_iter().for_each(|event| log.push(event));
    (log, had.line)
}

/// A head as it was sent.
pub(super) fn head_of(bytes: &[u8]) -> Option<Arc<Head>> {
    codec::decode::<Head>(bytes).ok().map(Arc::new)
}
