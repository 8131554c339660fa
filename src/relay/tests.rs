//! Streams between processes: each replica a runtime of its own with real sockets, the directory the
//! real state behind a lock. Killing a replica is dropping its runtime.

mod beginnings;
mod copies;
mod edges;
mod knowledge;
mod links;

use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::begin::Manner;
use super::copy::{Copy, Role, Sink};
use super::directory::{Address, Directory, Known, Look, Member, Peer, Soon, Taken};
use super::hub::{Entry, Relays};
use super::link::server::Service;
use super::listener::{Listener, Over, Refused};
use super::log::Event;
use super::order::{Framing, Head, Order, Resumable};
use super::placing::Placer;
use super::{Durability, Engines, Failure, Options, secret};
use crate::cluster::api::ClusterError;
use crate::cluster::peer::dial::Dialer;
use crate::cluster::peer::incoming;
use crate::ids::{Incarnation, ReplicaId, StreamId};
use crate::state::cache::CacheState;
use crate::state::command::{CacheCommand, CacheOutcome};
use crate::state::replicated::State;
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// The cluster: state that outlives replicas, and who lives.
#[derive(Default)]
struct World {
    state: Mutex<CacheState>,
    members: Mutex<Vec<Peer>>,
    hubs: Mutex<Vec<Weak<Relays>>>,
    /// Nothing is listed for now, as without a quorum.
    is_down: watch::Sender<bool>,
    /// It says so.
    is_broken: AtomicBool,
    /// Who has just started, and knows little.
    behind: Mutex<HashSet<ReplicaId>>,
}

impl World {
    fn apply(&self, origin: ReplicaId, command: CacheCommand) -> CacheOutcome {
        let (outcome, moved) = {
            let mut state = self.state.lock();
            (state.apply(origin, command), state.take_moved_streams())
        };
        let hubs: Vec<_> = self.hubs.lock().iter().filter_map(Weak::upgrade).collect();
        for (id, attempt) in moved {
            hubs.iter().for_each(|hub| hub.moved(id, attempt));
        }
        outcome
    }

    fn record(&self, id: StreamId) -> Option<StreamRecord> {
        self.state.lock().streams().get(id).cloned()
    }
}

struct OfWorld {
    world: Arc<World>,
    me: ReplicaId,
}

impl OfWorld {
    fn soon<T: Send + 'static>(value: T) -> Soon<T> {
        Box::pin(std::future::ready(value))
    }
}

impl Directory for OfWorld {
    fn me(&self) -> Option<ReplicaId> {
        Some(self.me)
    }
    fn cluster(&self) -> String {
        "c".to_owned()
    }
    fn is_current(&self) -> bool {
        !self.world.behind.lock().contains(&self.me)
    }
    fn peers(&self) -> Vec<Peer> {
        self.world.members.lock().iter().filter(|peer| peer.id != self.me).cloned().collect()
    }
    fn find(&self, id: StreamId) -> Soon<Option<StreamRecord>> {
        Self::soon(self.world.record(id))
    }
    fn find_surely(&self, id: StreamId) -> Soon<Result<Option<StreamRecord>, ClusterError>> {
        Self::soon(Ok(self.world.record(id)))
    }
    fn open(
        &self,
        id: StreamId,
        record: StreamRecord,
    ) -> Soon<Result<Option<Box<StreamRecord>>, ClusterError>> {
        let (world, me, mut down) = (Arc::clone(&self.world), self.me, self.world.is_down.subscribe());
        Box::pin(async move {
            // Its sender is kept by the world.
            let _ = down.wait_for(|is_down| !is_down).await;
            if world.is_broken.load(Ordering::Relaxed) {
                return Err(ClusterError::Down("no quorum".to_owned()));
            }
            Ok(match world.apply(me, CacheCommand::OpenStream { id, record }) {
                CacheOutcome::Stream(record) => Some(record),
                _ => None,
            })
        })
    }
    fn take(
        &self,
        id: StreamId,
        from_attempt: u32,
        record: StreamRecord,
    ) -> Soon<Result<Taken, ClusterError>> {
        let outcome = self.world.apply(self.me, CacheCommand::TakeStream { id, from_attempt, record });
        Self::soon(Ok(match outcome {
            CacheOutcome::Done => Taken::Won,
            CacheOutcome::Stream(record) => Taken::Lost(record),
            _ => Taken::Refused,
        }))
    }
    fn mirror(&self, id: StreamId, attempt: u32) {
        self.world.apply(self.me, CacheCommand::MirrorStream { id, attempt });
    }
    fn end(&self, id: StreamId, attempt: u32, how: StreamEnd, keep_ms: u32) {
        self.world.apply(self.me, CacheCommand::EndStream { id, attempt, how, keep_ms });
    }
    fn purge(&self, id: StreamId) {
        self.world.apply(self.me, CacheCommand::PurgeStream { id });
    }
    fn secret(&self) -> Option<[u8; 32]> {
        Some([1; 32])
    }
    fn address(&self, _: Holder) -> Soon<Option<Address>> {
        Self::soon(None)
    }
}

impl Known for OfWorld {
    fn look(&self) -> Look {
        let members = self.world.members.lock().clone();
        let members =
            members.into_iter().map(|peer| Member { peer, http: String::new(), admin: String::new() });
        Look { cluster: self.cluster(), members: members.collect(), leader: true, quorum: true, agents: true }
    }
}

/// An engine that says numbers, on from where the copy is; one at each step of the test, or every
/// millisecond.
struct Numbers {
    /// How many events a stream has.
    events: u64,
    /// Bytes of each.
    padding: usize,
    /// Each attempt says something else.
    varies: bool,
    /// It never says anything.
    mute: bool,
    /// Attempts and where they began.
    began: Mutex<Vec<(u32, u64)>>,
    said: AtomicU64,
    /// Attempts that ended because nothing was taken of them.
    untaken: AtomicU64,
}

/// What an attempt says where each says something else.
fn said(seq: u64, attempt: u32) -> Bytes {
    format!("data: {seq} by {attempt}\n").into()
}

fn number(seq: u64, padding: usize) -> Bytes {
    format!("data: {seq}{}\n", " ".repeat(padding)).into()
}

impl Engines for Numbers {
    fn generate(self: Arc<Self>, copy: Arc<Copy>, attempt: u32, _: CancellationToken) -> Soon<()> {
        Box::pin(async move {
            self.began.lock().push((attempt, copy.next()));
            copy.set_head(Arc::new(Head {
                status: 200,
                headers: Vec::new(),
                framing: Framing::Events,
                resumable: Resumable::Continue,
                worker: "w".to_owned(),
            }));
            if self.mute {
                return std::future::pending().await;
            }
            while !copy.ended() {
                copy.room().await;
                tokio::time::sleep(Duration::from_millis(1)).await;
                let seq = copy.next();
                let lines = match self.varies {
                    true => said(seq, attempt),
                    false => number(seq, self.padding),
                };
                let journal = seq.to_le_bytes().to_vec().into();
                if !copy.append(attempt, Event { lines, journal, terminal: seq + 1 == self.events }) {
                    return;
                }
                if copy.next() == seq {
                    // Nobody takes it: it might as well have been the last.
                    self.untaken.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                self.said.fetch_add(1, Ordering::Relaxed);
            }
        })
    }

    fn failure(&self, _: &Copy, failure: Failure, _: &str) -> Vec<Event> {
        vec![Event { lines: format!("data: {failure:?}\n").into(), journal: Bytes::new(), terminal: true }]
    }
}

struct Replica {
    hub: Arc<Relays>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Replica {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Cluster {
    world: Arc<World>,
    engines: Arc<Numbers>,
    replicas: Vec<Replica>,
    /// What is booked, by replica.
    books: Vec<Arc<edges::Books>>,
}

impl Cluster {
    async fn new(count: u64, engines: Numbers, options: &Options) -> Self {
        let (world, engines) = (Arc::<World>::default(), Arc::new(engines));
        let (mut replicas, mut books) = (Vec::new(), Vec::new());
        for id in (1..=count).map(ReplicaId) {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            world.apply(id, CacheCommand::ReplicaUp { id, incarnation: Incarnation(1) });
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap().to_string();
            listener.set_nonblocking(true).unwrap();
            let name = format!("r{id}");
            world.members.lock().push(Peer { id, name, address, alive: true, leads: id.0 == 1 });
            let directory = Arc::new(OfWorld { world: Arc::clone(&world), me: id });
            let desk =
                super::remote::server::Service::serve(Arc::new(OnceLock::from(Arc::clone(&directory))));
            let hub = Relays::new(options.clone(), directory, Dialer::default(), runtime.handle().clone());
            hub.set_engines(Arc::clone(&engines) as Arc<dyn Engines>);
            let book = Arc::<edges::Books>::default();
            hub.set_placer(Arc::clone(&book) as Arc<dyn Placer>);
            books.push(book);
            world.hubs.lock().push(Arc::downgrade(&hub));
            let late = Arc::new(OnceLock::from(Arc::clone(&hub)));
            runtime.spawn(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let incoming = incoming::incoming(listener, None, CancellationToken::new());
                let places = super::remote::places::Service::serve(Arc::clone(&late));
                let mut server = incoming::server();
                let server = server.add_service(Service::serve(late)).add_service(desk).add_service(places);
                server.serve_with_incoming(incoming).await.unwrap();
            });
            runtime.spawn(Arc::clone(&hub).run(CancellationToken::new()));
            replicas.push(Replica { hub, runtime: Some(runtime) });
        }
        for replica in &replicas {
            replica.hub.look();
        }
        Self { world, engines, replicas, books }
    }

    fn hub(&self, at: usize) -> &Arc<Relays> {
        &self.replicas[at].hub
    }

    /// Kills a replica: its tasks end and its sockets close.
    fn kill(&mut self, at: usize) {
        self.world.members.lock().retain(|peer| peer.id.0 != at as u64 + 1);
        if let Some(runtime) = self.replicas[at].runtime.take() {
            runtime.shutdown_background();
        }
    }

    fn order(&self, at: usize, orphan_ms: u32) -> Order {
        Order { edge: self.hub(at).view().me, orphan_ms, ..order() }
    }

    async fn begin(&self, at: usize, aware: bool, orphan_ms: u32) -> (StreamId, Listener) {
        let id = secret::random_id();
        let entry = self.hub(at).begin(id, self.order(at, orphan_ms), manner(aware)).await.unwrap();
        (id, self.hub(at).listen(entry, aware))
    }

    fn holder(&self, id: StreamId) -> usize {
        match self.world.record(id).unwrap().holder {
            Holder::Replica(id) => id.0 as usize - 1,
            Holder::Agent(_) => unreachable!("there are no agents here"),
        }
    }

    fn entry(&self, at: usize, id: StreamId) -> Arc<Entry> {
        self.hub(at).get(id).unwrap()
    }
}

fn manner(aware: bool) -> Manner {
    Manner { durability: Durability::Peer, agent: None, shared: false, aware }
}

/// Of anybody's stream.
pub(super) fn order() -> Order {
    Order {
        created_s: 0,
        edge: None,
        background: false,
        principal: [1; 16],
        request: [2; 16],
        target: "/v1/completions".to_owned(),
        headers: Vec::new(),
        body: Bytes::from_static(b"{}"),
        key: None,
        request_id: "r".to_owned(),
        model: "m".to_owned(),
        orphan_ms: 1000,
        keep_ms: 60_000,
        total_ms: 60_000,
    }
}

fn numbers(events: u64) -> Numbers {
    let (began, said, untaken) = (Mutex::default(), AtomicU64::new(0), AtomicU64::new(0));
    Numbers { events, padding: 0, varies: false, mute: false, began, said, untaken }
}

/// Reads until `count` events were read, or the end. Checks that they are the ones due.
async fn read(listener: &mut Listener, count: u64) -> u64 {
    let until = listener.at() + count;
    while listener.at() < until {
        let next = listener.at();
        let got = tokio::time::timeout(Duration::from_secs(20), poll_fn(|cx| listener.poll_read(cx)));
        match got.await.expect("a stream stands still") {
            Ok(read) => {
                assert_eq!(read.first, next, "no gap and nothing twice");
                for (seq, event) in (read.first..).zip(&read.events) {
                    let text = std::str::from_utf8(&event.lines).unwrap();
                    assert_eq!(text.trim_end(), format!("data: {seq}"));
                }
            }
            Err(Over::Ended) => break,
            Err(over) => panic!("{over:?} at {next}"),
        }
    }
    listener.at()
}

async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within 10 s: {what}");
}

#[tokio::test]
async fn a_stream_is_held_by_another_replica_than_its_clients_and_not_by_a_leader() {
    let cluster = Cluster::new(3, numbers(50), &Options::default()).await;
    for at in 0..3 {
        let (id, mut listener) = cluster.begin(at, false, 1000).await;
        assert_eq!(read(&mut listener, u64::MAX / 2).await, 50);
        let holder = cluster.holder(id);
        assert!(holder != at && holder != 0, "{holder} holds what {at} reads");
        assert_eq!(cluster.entry(at, id).copy.role(), Role::Mirror);
    }
    assert_eq!(cluster.engines.began.lock().as_slice(), [(1, 0); 3]);
}

#[tokio::test]
async fn the_death_of_a_holder_is_a_pause() {
    let mut cluster = Cluster::new(3, numbers(300), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, false, 1000).await;
    read(&mut listener, 50).await;
    let first = cluster.holder(id);
    cluster.kill(first);
    read(&mut listener, 50).await;
    let second = cluster.holder(id);
    assert!(second != first && second != 0, "again not where its client is");
    cluster.kill(second);
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 300);
    assert_eq!(cluster.holder(id), 0, "nobody else is left");
    assert_eq!(cluster.world.record(id).unwrap().attempt, 3);
    let began: Vec<u32> = cluster.engines.began.lock().iter().map(|(attempt, _)| *attempt).collect();
    assert_eq!(began, [1, 2, 3]);
}

#[tokio::test]
async fn the_death_of_an_edge_costs_nothing_but_a_reconnect() {
    let mut cluster = Cluster::new(3, numbers(300), &Options::default()).await;
    let (id, mut listener) = cluster.begin(1, true, 5000).await;
    let at = read(&mut listener, 50).await;
    let holder = cluster.holder(id);
    assert_eq!(holder, 2);
    cluster.kill(1);
    drop(listener);
    let mut again = cluster.hub(0).resume(id, at, None).await.unwrap_or_else(|refused| panic!("{refused:?}"));
    assert!(read(&mut again, 50).await >= at + 50);
    // And now its holder: the new edge has everything that is needed.
    cluster.kill(holder);
    assert_eq!(read(&mut again, u64::MAX / 2).await, 300);
    assert_eq!(cluster.engines.began.lock().len(), 2);
}

#[tokio::test]
async fn who_comes_back_to_the_holder_reads_by_way_of_another_replica() {
    let mut cluster = Cluster::new(3, numbers(400), &Options::default()).await;
    let (id, mut listener) = cluster.begin(1, true, 5000).await;
    let at = read(&mut listener, 50).await;
    drop(listener);
    cluster.kill(1);
    let mut again = cluster.hub(2).resume(id, at, None).await.unwrap_or_else(|refused| panic!("{refused:?}"));
    let at = read(&mut again, 50).await;
    assert_eq!(cluster.entry(0, id).copy.role(), Role::Mirror, "the third one has a copy");
    drop(again);
    // The holder, which is the edge too, dies: what the client has seen is still there.
    cluster.kill(2);
    let mut again = cluster.hub(0).resume(id, at, None).await.unwrap_or_else(|refused| panic!("{refused:?}"));
    assert_eq!(read(&mut again, u64::MAX / 2).await, 400);
}

#[tokio::test]
async fn what_has_ended_is_had_from_the_other_copy_when_its_holder_is_dead() {
    let mut cluster = Cluster::new(3, numbers(60), &Options::default()).await;
    let (id, mut listener) = cluster.begin(1, true, 5000).await;
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 60);
    eventually("its end is known", || cluster.world.record(id).is_some_and(|r| r.ended.is_some())).await;
    drop(listener);
    let holder = cluster.holder(id);
    assert_eq!(holder, 2);
    cluster.kill(holder);
    let mut again = cluster.hub(0).resume(id, 10, None).await.unwrap_or_else(|refused| panic!("{refused:?}"));
    assert_eq!(read(&mut again, u64::MAX / 2).await, 60);
}

#[tokio::test]
async fn a_holder_that_was_taken_over_stops() {
    let cluster = Cluster::new(3, numbers(100_000), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, false, 1000).await;
    read(&mut listener, 20).await;
    let old = cluster.holder(id);
    let held = cluster.entry(old, id);
    // Somebody believes it dead.
    let mut record = cluster.world.record(id).unwrap();
    record.holder = Holder::Replica(ReplicaId(1));
    let taken = cluster.world.apply(ReplicaId(1), CacheCommand::TakeStream { id, from_attempt: 1, record });
    assert_eq!(taken, CacheOutcome::Done);
    eventually("the old holder stops", || held.copy.is_closed() && cluster.hub(old).get(id).is_none()).await;
    // Nobody was given the order, so the client's replica has somebody go on.
    read(&mut listener, 100).await;
    assert!(cluster.world.record(id).unwrap().attempt > 2);
}

/// Hears of a later attempt the moment that this one begins.
struct Overtaking {
    hub: Arc<Relays>,
    copy: Weak<Copy>,
}

impl Sink for Overtaking {
    fn ready(&self) {
        if let Some(copy) = self.copy.upgrade().filter(|copy| copy.role() == Role::Holder) {
            self.hub.moved(copy.id, 2);
        }
    }
}

#[tokio::test]
async fn a_holder_that_is_taken_over_while_it_begins_does_not() {
    let cluster = Cluster::new(1, numbers(100_000), &Options::default()).await;
    let (hub, id) = (Arc::clone(cluster.hub(0)), secret::random_id());
    let copy =
        Copy::new(id, Arc::new(cluster.order(0, 1000)), Role::Mirror, 0, Default::default(), usize::MAX);
    let Ok(entry) = hub.put_first(Arc::clone(&copy)) else { panic!("it is here already") };
    let overtaking = Overtaking { hub: Arc::clone(&hub), copy: Arc::downgrade(&copy) };
    copy.seat(0, None, Some(Arc::new(overtaking)), false).unwrap();
    assert!(!hub.hold(&entry, 1), "nobody would ever stop it");
    assert!(copy.is_closed() && hub.get(id).is_none() && hub.holding() == 0);
    assert_eq!(cluster.world.record(id), None, "it was not listed");
}

#[tokio::test]
async fn the_end_of_what_was_called_off_is_not_the_streams() {
    let cluster = Cluster::new(3, numbers(100_000), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, true, 60_000).await;
    read(&mut listener, 20).await;
    let (old, entry) = (cluster.holder(id), cluster.entry(0, id));
    let held = cluster.entry(old, id);
    let (ticket, holder) = entry.ticket.lock().take().expect("it is generated elsewhere");
    ticket.call_off();
    eventually("the old holder stops", || held.copy.ended()).await;
    // An answer that is sent after it has to come after it.
    let link = cluster.hub(0).link_to(holder).await.expect("both live");
    let _ = link.glance(id, Duration::from_secs(5)).await;
    assert!(!entry.copy.ended());
    cluster.hub(0).recover(entry, Some(holder)).await;
    read(&mut listener, 100).await;
}

#[tokio::test]
async fn who_leaves_for_good_ends_the_generation_and_who_may_come_back_does_not() {
    let cluster = Cluster::new(3, numbers(1_000_000), &Options::default()).await;
    let (gone, mut listener) = cluster.begin(0, false, 60_000).await;
    read(&mut listener, 5).await;
    drop(listener);
    let world = &cluster.world;
    let ended =
        |id| move || world.record(id).is_some_and(|record| record.ended == Some(StreamEnd::Cancelled));
    eventually("an unaware client's stream is cancelled", ended(gone)).await;
    let (kept, mut listener) = cluster.begin(0, true, 1500).await;
    let at = read(&mut listener, 5).await;
    drop(listener);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut again =
        cluster.hub(1).resume(kept, at, None).await.unwrap_or_else(|refused| panic!("{refused:?}"));
    read(&mut again, 5).await;
    // Somebody listens: the time begins anew when they leave.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(cluster.world.record(kept).unwrap().ended, None);
    drop(again);
    eventually("nobody came back", ended(kept)).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_takes_no_more_than_its_bound() {
    let options = Options { stream_bytes: 1 << 20, ..Options::default() };
    let engines = Numbers { padding: 30_000, ..numbers(2000) };
    let cluster = Cluster::new(3, engines, &options).await;
    let (id, mut listener) = cluster.begin(0, true, 60_000).await;
    read(&mut listener, 1).await;
    let holder = cluster.holder(id);
    let said = || cluster.engines.said.load(Ordering::Relaxed);
    let mut before = 0;
    eventually("generation stands still", || {
        let now = said();
        now > 30 && std::mem::replace(&mut before, now) == now
    })
    .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    for at in [0, holder] {
        let bytes = cluster.entry(at, id).copy.summary().bytes;
        assert!(bytes <= (1 << 20) + 2 * super::link::WINDOW + 64_000, "{at} keeps {bytes}");
    }
    // It reads again, and everything is there.
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 2000);
    // Another one that wants the beginning comes too late, and one from the future too early.
    let late = cluster.hub(0).resume(id, 0, None).await.err();
    assert_eq!(late, Some(Refused::Behind));
    assert_eq!(cluster.hub(0).resume(id, 2001, None).await.err(), Some(Refused::Ahead { next: 2000 }));
    assert_eq!(cluster.hub(0).resume(id, 2000, None).await.err(), Some(Refused::Over));
}

#[tokio::test]
async fn a_leaving_replica_hands_over_what_it_holds() {
    let cluster = Cluster::new(3, numbers(400), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, false, 1000).await;
    read(&mut listener, 20).await;
    let old = cluster.holder(id);
    cluster.hub(old).leave();
    eventually("it holds nothing", || cluster.hub(old).holding() == 0).await;
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 400);
    assert_ne!(cluster.holder(id), old);
}

#[tokio::test]
async fn a_cluster_of_one_resumes_too() {
    let cluster = Cluster::new(1, numbers(200), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, true, 5000).await;
    let at = read(&mut listener, 50).await;
    drop(listener);
    let mut again = cluster.hub(0).resume(id, at, None).await.unwrap_or_else(|refused| panic!("{refused:?}"));
    assert_eq!(read(&mut again, u64::MAX / 2).await, 200);
    let unknown = cluster.hub(0).resume(secret::random_id(), 0, None).await.err();
    assert_eq!(unknown, Some(Refused::Missing(super::find::Missing::Unknown)));
    let _: HashSet<StreamId> = cluster.hub(0).all().into_iter().map(|(id, _)| id).collect();
}
