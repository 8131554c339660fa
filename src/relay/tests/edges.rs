//! Edges: hubs whose directory is asked of replicas, and which hold nothing.

use std::sync::atomic::AtomicBool;

use super::*;
use crate::ids::WorkerIx;
use crate::relay::placing::{Booked, Place, Placed, Running, Share};
use crate::relay::remote::place::Placing;
use crate::relay::remote::{OfRemote, Remote};

/// What one replica has booked for edges, in requests, outstanding tokens and blocks; and what it was
/// told.
#[derive(Default)]
pub(super) struct Books {
    booked: Mutex<(i64, i64, i64)>,
    text: Mutex<String>,
    ended: AtomicU64,
    is_full: AtomicBool,
}

impl Books {
    fn booked(&self) -> (i64, i64, i64) {
        *self.booked.lock()
    }

    fn hold(self: &Arc<Self>, share: Share) -> Box<dyn Booked> {
        let held = (1, share.prefill_tokens.into(), share.decode_blocks.into());
        self.add(held);
        Box::new(Held { books: Arc::clone(self), held })
    }

    fn add(&self, load: (i64, i64, i64)) {
        let mut booked = self.booked.lock();
        *booked = (booked.0 + load.0, booked.1 + load.1, booked.2 + load.2);
    }
}

impl Placer for Books {
    fn place(self: Arc<Self>, order: Order) -> Soon<Placed> {
        let placed = match order.model.as_str() {
            "none" => Placed::Elsewhere,
            _ if self.is_full.load(Ordering::Relaxed) => Placed::Refused(Bytes::from_static(b"full")),
            _ => {
                let share = Share { prefill_tokens: 100, decode_blocks: 7 };
                let place = Place {
                    worker: WorkerIx(3),
                    id: "w".to_owned(),
                    agent: ("127.0.0.1:1".to_owned(), None),
                    rank: 1,
                    block_size: 16,
                    prompt_tokens: 112,
                    cached: Some(12),
                    share,
                    wants_text: true,
                    trace: None,
                };
                Placed::At(place, self.hold(share))
            }
        };
        Box::pin(std::future::ready(placed))
    }

    fn book(self: Arc<Self>, running: Running) -> Option<Box<dyn Booked>> {
        assert_eq!((running.worker, running.rank), (WorkerIx(3), 1));
        Some(self.hold(running.share))
    }
}

struct Held {
    books: Arc<Books>,
    held: (i64, i64, i64),
}

impl Held {
    fn change(&mut self, load: (i64, i64, i64)) {
        self.held = (self.held.0 + load.0, self.held.1 + load.1, self.held.2 + load.2);
        self.books.add(load);
    }
}

impl Booked for Held {
    fn began(&mut self) {
        self.change((0, -self.held.1, 0));
    }
    fn grew(&mut self, blocks: u32) {
        self.change((0, 0, blocks.into()));
    }
    fn said(&mut self, piece: &[u8]) {
        self.books.text.lock().push_str(&String::from_utf8_lossy(piece));
    }
    fn ended(self: Box<Self>) {
        self.books.ended.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.change((-self.held.0, -self.held.1, -self.held.2));
    }
}

fn placed(placing: Placing) -> (Place, crate::relay::remote::place::Kept) {
    match placing {
        Placing::At(place, kept) => (place, kept),
        Placing::Elsewhere => panic!("elsewhere"),
        Placing::Refused(why) => panic!("{why:?}"),
    }
}

#[tokio::test]
async fn a_place_is_booked_for_as_long_as_the_edge_holds_on_to_it() {
    let mut cluster = Cluster::new(1, numbers(1), &Options::default()).await;
    let (_, remote) = cluster.add_edge().await;
    assert!(remote.has_agents());
    let books = Arc::clone(&cluster.books[0]);
    let (place, kept) = placed(remote.place(&order()).await);
    assert_eq!((place.holder(), place.rank), (Holder::Agent(WorkerIx(3)), 1));
    let at = OfRemote(Arc::clone(&remote)).address(place.holder()).await;
    assert_eq!(at, Some(("127.0.0.1:1".to_owned(), None)), "known without another question");
    assert_eq!(books.booked(), (1, 100, 7));
    kept.began();
    kept.grew(2);
    kept.grew(1);
    kept.said(b"one ");
    kept.said(b"two");
    eventually("it is told", || books.booked() == (1, 0, 10) && *books.text.lock() == "one two").await;
    kept.ended();
    eventually("it is free", || books.booked() == (0, 0, 0)).await;
    assert_eq!(books.ended.load(Ordering::Relaxed), 1);

    let (_, kept) = placed(remote.place(&order()).await);
    drop(kept);
    eventually("it is free", || books.booked() == (0, 0, 0)).await;
    assert_eq!(books.ended.load(Ordering::Relaxed), 1, "nothing is learned of an answer that was cut off");
    let nowhere = Order { model: "none".to_owned(), ..order() };
    assert!(matches!(remote.place(&nowhere).await, Placing::Elsewhere));
    books.is_full.store(true, Ordering::Relaxed);
    assert!(matches!(remote.place(&order()).await, Placing::Refused(why) if &why[..] == b"full"));
    cluster.kill(0);
    assert!(matches!(remote.place(&order()).await, Placing::Elsewhere), "nobody answers");
}

#[tokio::test]
async fn who_has_just_started_chooses_no_places() {
    let mut cluster = Cluster::new(2, numbers(1), &Options::default()).await;
    let (_, remote) = cluster.add_edge().await;
    eventually("the edge knows both", || remote.replicas().len() == 2).await;
    for behind in [1, 0] {
        cluster.world.behind.lock().insert(ReplicaId(behind as u64 + 1));
        cluster.hub(behind).look();
        for _ in 0..8 {
            let (_, kept) = placed(remote.place(&order()).await);
            let booked = [0, 1].map(|at| cluster.books[at].booked().0);
            assert_eq!((booked[behind], booked[1 - behind]), (0, 1), "it could only say what it knows");
            drop(kept);
            eventually("it is free", || cluster.books[1 - behind].booked().0 == 0).await;
        }
        // From the moment on at which it says that it is ready.
        cluster.world.behind.lock().clear();
    }
}

#[tokio::test]
async fn what_an_edge_runs_is_booked_anew_where_its_replica_dies() {
    let mut cluster = Cluster::new(2, numbers(1), &Options::default()).await;
    let (_, remote) = cluster.add_edge().await;
    let (_, kept) = placed(remote.place(&order()).await);
    kept.began();
    kept.grew(5);
    let booked = |cluster: &Cluster, at: usize| cluster.books[at].booked();
    eventually("it is told", || (0..2).any(|at| booked(&cluster, at) == (1, 0, 12))).await;
    let first = usize::from(booked(&cluster, 0).0 == 0);
    cluster.kill(first);
    eventually("the other one has it booked", || booked(&cluster, 1 - first) == (1, 0, 12)).await;
    kept.grew(1);
    eventually("and is told what is new", || booked(&cluster, 1 - first) == (1, 0, 13)).await;
    drop(kept);
    eventually("it is free", || booked(&cluster, 1 - first) == (0, 0, 0)).await;
}

impl Cluster {
    /// Adds an edge that knows the first replica and learns of the others. Its number as a client's
    /// process.
    async fn add_edge(&mut self) -> (usize, Arc<Remote>) {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let first = self.world.members.lock()[0].address.clone();
        let handle = runtime.handle().clone();
        let remote = Remote::new(Dialer::default(), vec![(first, None)], handle.clone());
        let looking = Arc::clone(&remote);
        // Connections live where they were opened.
        runtime.spawn(async move { looking.run(CancellationToken::new()).await });
        eventually("the edge sees the cluster", || remote.reach().replica).await;
        let directory = Arc::new(OfRemote(Arc::clone(&remote)));
        let hub = Relays::new(Options::default(), directory, Dialer::default(), handle);
        // It could generate, if it would.
        hub.set_engines(Arc::clone(&self.engines) as Arc<dyn Engines>);
        hub.look();
        runtime.spawn(Arc::clone(&hub).run(CancellationToken::new()));
        self.replicas.push(Replica { hub, runtime: Some(runtime) });
        (self.replicas.len() - 1, remote)
    }
}

#[tokio::test]
async fn an_edge_holds_nothing_and_the_deaths_of_holders_are_pauses() {
    let mut cluster = Cluster::new(3, numbers(300), &Options::default()).await;
    let (edge, remote) = cluster.add_edge().await;
    assert_eq!(remote.replicas().len(), 3);
    let (id, mut listener) = cluster.begin(edge, false, 1000).await;
    read(&mut listener, 50).await;
    let first = cluster.holder(id);
    assert!(first == 1 || first == 2, "neither the leader nor the edge: {first}");
    assert_eq!(cluster.world.record(id).unwrap().mirror, None, "nobody could come to an edge");
    cluster.kill(first);
    read(&mut listener, 50).await;
    let second = cluster.holder(id);
    cluster.kill(second);
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 300);
    assert_eq!(cluster.holder(id), 0, "the last replica, although it leads");
    assert_eq!((cluster.hub(edge).holding(), cluster.world.record(id).unwrap().attempt), (0, 3));
    drop(listener);
    eventually("what has ended is forgotten soon", || cluster.hub(edge).get(id).is_none()).await;
}

#[tokio::test]
async fn an_edge_goes_on_with_a_stream_of_another_one() {
    let mut cluster = Cluster::new(3, numbers(300), &Options::default()).await;
    let (one, _) = cluster.add_edge().await;
    let (other, _) = cluster.add_edge().await;
    let (id, mut listener) = cluster.begin(one, true, 5000).await;
    let at = read(&mut listener, 50).await;
    let holder = cluster.holder(id);
    cluster.kill(one);
    drop(listener);
    let mut again =
        cluster.hub(other).resume(id, at, None).await.unwrap_or_else(|refused| panic!("{refused:?}"));
    let at = read(&mut again, 50).await;
    assert_eq!(cluster.engines.began.lock().len(), 1, "nothing was generated twice");
    // And now its holder: the new edge has everything that is needed.
    cluster.kill(holder);
    assert_eq!(read(&mut again, u64::MAX / 2).await, 300);
    assert!(at < 300 && cluster.holder(id) != holder);
}

#[tokio::test]
async fn a_take_over_that_was_asked_for_twice_is_won_once() {
    let mut cluster = Cluster::new(2, numbers(100_000), &Options::default()).await;
    let (edge, remote) = cluster.add_edge().await;
    let (id, mut listener) = cluster.begin(edge, true, 60_000).await;
    read(&mut listener, 5).await;
    let directory = OfRemote(Arc::clone(&remote));
    let mut record = cluster.world.record(id).unwrap();
    record.holder = Holder::Replica(ReplicaId(9));
    assert_eq!(directory.take(id, 1, record.clone()).await, Ok(Taken::Won));
    // Somebody else asks for the same: that it is like ours does not make it ours.
    let Ok(Taken::Lost(stands)) = directory.take(id, 1, record.clone()).await else { panic!("won twice") };
    // Nobody was given the order, so the edge may have taken the stream on already.
    assert!(stands.attempt >= 2, "{stands:?}");
    // The one that did it answers no more: the next one is asked, and knows.
    cluster.kill(0);
    let found = directory.find(id).await.unwrap();
    assert!(found.attempt >= 2);
    assert!(directory.find_surely(secret::random_id()).await.unwrap().is_none());
    cluster.kill(1);
    assert!(directory.find_surely(id).await.is_err(), "nobody is left");
    eventually("the edge notices", || !remote.reach().replica).await;
}
