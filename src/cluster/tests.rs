//! Whole replicas in one process: real links, real log, real folders.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::api::{ClusterError, ControlPlane, MemberOp};
use super::identity::Identity;
use super::inner::NodeConfig;
use super::node::Cluster;
use super::peer::dial::Dialer;
use super::peer::incoming::{incoming, server};
use super::peer::link::call_address;
use super::peer::server::{Host, Served, Service};
use super::peer::wire::{Call, Reply};
use super::types::PeerNode;
use crate::ids::{Group, ReplicaId, WorkerId, WorkerIx};
use crate::kv::hash::{LocalHash, Seed};
use crate::routing::recent::TURN;
use crate::state::command::{CacheCommand, CacheOutcome, ControlCommand, ControlOutcome};
use crate::state::ranks::RankKey;
use crate::state::worker::{WorkerSource, WorkerSpec};

pub(super) struct Replica {
    pub(super) config: NodeConfig,
    pub(super) cluster: Option<Cluster>,
}

impl Replica {
    pub(super) fn start(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        // The crashed one lets go of its folder when its last task has ended.
        self.cluster = loop {
            match Cluster::start(self.config.clone(), bind(&self.config.info.peer)) {
                Ok(cluster) => break Some(cluster),
                Err(error) if error.to_string().contains("in use") && Instant::now() < deadline => {}
                Err(error) => panic!("{error}"),
            }
            std::thread::yield_now();
        };
    }

    fn plane(&self) -> Arc<dyn ControlPlane> {
        self.cluster.as_ref().unwrap().control_plane()
    }

    /// Like a crash, as far as one process can have one.
    pub(super) fn crash(&mut self) {
        self.cluster = None;
    }
}

fn bind(address: &str) -> TcpListener {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let address: std::net::SocketAddr = address.parse().unwrap();
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        match socket.bind(&address.into()).and_then(|()| socket.listen(128)) {
            Ok(()) => return socket.into(),
            // The crashed one's runtime is still letting go of it.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::yield_now();
    }
}

pub(super) struct Replicas {
    pub(super) all: Vec<Replica>,
    pub(super) runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

impl Replicas {
    fn new(n: usize) -> Self {
        Self::with(n, |_| {})
    }

    pub(super) fn with(n: usize, adjust: impl Fn(&mut NodeConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ports: Vec<TcpListener> = (0..n).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let peers: BTreeMap<String, String> = ports
            .iter()
            .enumerate()
            .map(|(i, port)| (format!("r{}", i + 1), port.local_addr().unwrap().to_string()))
            .collect();
        drop(ports);
        let all = peers
            .iter()
            .map(|(name, peer)| {
                let mut config = NodeConfig::new(name, dir.path().join(name));
                config.info.peer = peer.clone();
                config.peers = peers.clone();
                config.wal_segment_bytes = 1 << 20;
                config.digest_every = 16;
                adjust(&mut config);
                Replica { config, cluster: None }
            })
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut replicas = Self { all, runtime, _dir: dir };
        replicas.all.iter_mut().for_each(Replica::start);
        replicas
    }

    pub(super) fn plane(&self, i: usize) -> Arc<dyn ControlPlane> {
        self.all[i].plane()
    }

    pub(super) fn until(&self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        self.runtime.block_on(async {
            while !done() {
                assert!(Instant::now() < deadline, "waited 20 s for {what}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
    }

    pub(super) fn register(&self, i: usize, id: &str) {
        let command = ControlCommand::RegisterWorker { spec: spec(id), heartbeats: true };
        let deadline = Instant::now() + Duration::from_secs(20);
        let outcome = loop {
            match self.runtime.block_on(self.plane(i).propose(command.clone())) {
                // A busy machine may need longer to elect its first leader than a proposal waits.
                Err(ClusterError::Unavailable { .. }) if Instant::now() < deadline => {}
                other => break other.unwrap(),
            }
        };
        assert!(matches!(outcome, ControlOutcome::Registered { .. }), "{outcome:?}");
        assert!(
            self.plane(i).registry().worker(&WorkerId::parse(id).unwrap()).is_some(),
            "reads its own write"
        );
    }

    pub(super) fn leader(&self) -> Option<usize> {
        let up: Vec<usize> = (0..self.all.len()).filter(|i| self.all[*i].cluster.is_some()).collect();
        up.iter()
            .copied()
            .find(|i| self.plane(*i).status().groups.first().is_some_and(|g| g.role == "leader"))
    }
}

pub(super) fn spec(id: &str) -> WorkerSpec {
    WorkerSpec {
        id: WorkerId::parse(id).unwrap(),
        url: "http://127.0.0.1:9".to_owned(),
        engine: Default::default(),
        models: vec![],
        role: Default::default(),
        transfer: Default::default(),
        dp_ranks: 1,
        block_size: None,
        capacity_blocks: None,
        labels: Default::default(),
        weight: 100,
        http2: false,
        max_requests: None,
        owner: None,
        source: WorkerSource::Node,
    }
}

pub(super) fn knows(plane: &Arc<dyn ControlPlane>, id: &str) -> bool {
    plane.registry().worker(&WorkerId::parse(id).unwrap()).is_some()
}

#[test]
fn three_replicas_form_agree_survive_their_leader_and_take_it_back() {
    let mut r = Replicas::new(3);
    // Each replica takes a registration while the cluster is still forming: held, not refused.
    for i in 0..3 {
        r.register(i, &format!("w{i}"));
    }
    for i in 0..3 {
        r.until("all registrations everywhere", || (0..3).all(|w| knows(&r.plane(i), &format!("w{w}"))));
        r.runtime.block_on(r.plane(i).read_barrier(Group::Control)).unwrap();
    }

    // Load booked at one shows at the others, and is gone when it is freed.
    let view = r.plane(0).registry();
    let worker = view.worker(&WorkerId::parse("w1").unwrap()).unwrap().clone();
    let booking = r.plane(0).bookings().book(worker, 100, 7);
    let planes: Vec<_> = (0..3).map(|i| r.plane(i)).collect();
    let seen = |i: usize| planes[i].registry().worker(&WorkerId::parse("w1").unwrap()).unwrap().live.load();
    assert_eq!(seen(0).requests, 1, "at once at home");
    for i in 1..3 {
        r.until("the booking at the others", || seen(i).requests == 1 && seen(i).prefill_tokens == 100);
    }
    drop(booking);
    for i in 0..3 {
        r.until("the booking gone", || seen(i) == Default::default());
    }

    drop(planes);

    // The leader crashes with something booked.
    r.until("a leader", || r.leader().is_some());
    let leader = r.leader().unwrap();
    let other = (leader + 1) % 3;
    let worker = r.plane(leader).registry().worker(&WorkerId::parse("w1").unwrap()).unwrap().clone();
    let lost = r.plane(leader).bookings().book(worker, 50, 5);
    let plane = r.plane(other);
    let seen = |plane: &Arc<dyn ControlPlane>| {
        plane.registry().worker(&WorkerId::parse("w1").unwrap()).unwrap().live.load()
    };
    r.until("the booking at another", || seen(&plane).requests == 1);
    r.all[leader].crash();
    // What it held in memory is gone with it; nobody will free it.
    std::mem::forget(lost);
    let crashed = Instant::now();
    r.register(other, "after");
    println!("first write {} ms after the leader's crash", crashed.elapsed().as_millis());
    r.until("its bookings released", || seen(&plane) == Default::default());
    println!("bookings released after {} ms", crashed.elapsed().as_millis());

    // It comes back with everything.
    r.all[leader].start();
    r.until("the returned one has it all", || {
        (0..3).all(|w| knows(&r.plane(leader), &format!("w{w}"))) && knows(&r.plane(leader), "after")
    });
    assert_eq!(r.plane(leader).status().incarnation.0, 2);
    let digest = |i: usize| {
        let status = r.plane(i).status();
        (status.groups[0].applied, status.groups[0].digest.clone())
    };
    r.until("equal digests at equal indexes", || digest(0) == digest(1) && digest(1) == digest(2));
}

#[test]
fn a_replica_that_is_down_is_looked_for_a_few_times_a_second_and_not_without_a_pause() {
    let mut r = Replicas::new(3);
    r.register(0, "before");
    r.until("a leader", || r.leader().is_some());
    let leader = r.leader().unwrap();
    let gone = (leader + 1) % 3;
    r.all[gone].crash();
    // Whoever looks for it is let in and sent away, as often as he comes.
    let door = bind(&r.all[gone].config.info.peer);
    door.set_nonblocking(true).unwrap();
    let callers = r.runtime.block_on(async {
        let door = tokio::net::TcpListener::from_std(door).unwrap();
        let plane = r.plane(leader);
        // There is something for it in the log.
        let registered =
            plane.propose(ControlCommand::RegisterWorker { spec: spec("after"), heartbeats: true });
        let counting = async {
            let (mut callers, until) = (0, tokio::time::Instant::now() + Duration::from_secs(2));
            while let Ok(caller) = tokio::time::timeout_at(until, door.accept()).await {
                caller.unwrap();
                callers += 1;
            }
            callers
        };
        let (registered, callers) = tokio::join!(registered, counting);
        assert!(matches!(registered.unwrap(), ControlOutcome::Registered { .. }));
        callers
    });
    // Two groups that append every 100 ms, and who asks how it is; without a pause it is thousands.
    println!("asked {callers} times in two seconds");
    assert!((1..400).contains(&callers), "{callers} in two seconds");
}

#[test]
fn a_replica_without_its_folder_rejoins_under_a_new_id() {
    let mut r = Replicas::new(3);
    r.register(0, "w");
    r.until("known to the third", || knows(&r.plane(2), "w"));
    let old = r.plane(2).status().me;
    r.all[2].crash();
    let folder = r.all[2].config.data_dir.clone();
    r.until("the folder gone", || std::fs::remove_dir_all(&folder).is_ok() || !folder.exists());
    r.all[2].start();
    r.until("it votes again under a new id", || {
        let status = r.plane(2).status();
        assert!(!status.current || knows(&r.plane(2), "w"), "it says that it knows what there is");
        status.me != old && status.members.iter().any(|m| m.id == status.me && m.membership == "voter")
    });
    assert!(knows(&r.plane(2), "w") && r.plane(2).status().current);
    r.until("its old self is forgotten", || {
        let members = r.plane(0).status().members;
        members.len() == 3 && members.iter().all(|m| m.id != old)
    });
    // And it counts: with another one gone, the two are a quorum.
    r.all[1].crash();
    r.register(2, "with-the-newcomers-vote");
}

/// Forms a cluster with whoever asks to join it, and answers as if that had not been.
struct Hasty {
    other: PeerNode,
    formed: Mutex<Option<Reply>>,
}

impl Host for Hasty {
    fn served(&self) -> Option<Arc<Served>> {
        None
    }

    fn call(self: Arc<Self>, call: Call) -> Pin<Box<dyn Future<Output = Reply> + Send>> {
        Box::pin(async move {
            match call {
                Call::Hello { .. } => {
                    Reply::Hello { name: "r1".to_owned(), member: Some((7, ReplicaId(1))), initialized: true }
                }
                Call::Join { node, .. } => {
                    let members = vec![(ReplicaId(1), self.other.clone()), (ReplicaId(2), node.clone())];
                    let form = Call::Form { cluster: 7, members };
                    let (dialer, within) = (Dialer::new(None), Duration::from_secs(5));
                    let formed = call_address(&dialer, &node.peer, None, &form, within).await;
                    *self.formed.lock() = formed.ok();
                    Reply::Joined { cluster: 7, id: ReplicaId(101) }
                }
                other => Reply::Later(format!("{other:?}")),
            }
        })
    }
}

#[test]
fn who_is_counted_in_while_it_asks_to_join_stays_who_the_others_count_on() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let ports = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let [first, second] = ports.each_ref().map(|port| port.local_addr().unwrap().to_string());
    let other = PeerNode { name: "r1".to_owned(), peer: first.clone() };
    let host = Arc::new(Hasty { other, formed: Mutex::default() });
    let [port, mine] = ports;
    port.set_nonblocking(true).unwrap();
    let serving = host.clone();
    runtime.spawn(async move {
        let port = tokio::net::TcpListener::from_std(port).unwrap();
        let incoming = incoming(port, None, CancellationToken::new());
        server().add_service(Service::serve(serving)).serve_with_incoming(incoming).await
    });
    let mut config = NodeConfig::new("r2", dir.path().join("r2"));
    config.info.peer = second.clone();
    config.peers = [("r1".to_owned(), first), ("r2".to_owned(), second)].into();
    let cluster = Cluster::start(config, mine).unwrap();
    let plane = cluster.control_plane();
    let deadline = Instant::now() + Duration::from_secs(20);
    while host.formed.lock().is_none() || plane.status().groups.is_empty() {
        assert!(Instant::now() < deadline, "no place: {:?}", plane.status());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(*host.formed.lock(), Some(Reply::Done), "counted in as member 2 of cluster 7");
    assert_eq!(plane.status().me, ReplicaId(2));
    let written = Identity::open(&dir.path().join("r2"), "r2", 0).unwrap();
    assert_eq!((written.member(), written.joining), (Some((7, ReplicaId(2))), false));
}

#[test]
fn leadership_moves_on_demand_and_members_come_and_go() {
    let mut r = Replicas::new(3);
    r.register(0, "w");
    r.until("a leader", || r.leader().is_some());
    let target = r.all.iter().map(|x| x.config.info.name.clone()).nth((r.leader().unwrap() + 1) % 3).unwrap();
    let asked = Instant::now();
    r.runtime.block_on(r.plane(0).member(MemberOp::TransferLeader { member: Some(target.clone()) })).unwrap();
    println!("leadership of both groups moved in {} ms", asked.elapsed().as_millis());
    r.until("the new leader", || r.leader().is_some_and(|l| r.all[l].config.info.name == target));
    r.register(1, "after-the-move");

    let gone = (r.leader().unwrap() + 1) % 3;
    let name = r.all[gone].config.info.name.clone();
    let asker = r.leader().unwrap();
    r.runtime.block_on(r.plane(asker).member(MemberOp::Remove { member: name.clone() })).unwrap();
    r.until("two members", || r.plane(asker).status().members.len() == 2);
    r.all[gone].crash();
    r.register(asker, "with-two");
    let again = r.runtime.block_on(r.plane(asker).member(MemberOp::Remove { member: name }));
    assert!(again.unwrap_err().to_string().contains("member list"));
}

#[test]
fn who_hears_of_no_quorum_serves_with_what_it_has_after_a_while() {
    let mut r = Replicas::with(3, |config| config.propose_timeout = Duration::from_millis(500));
    r.register(0, "w");
    r.until("all know", || (0..3).all(|i| knows(&r.plane(i), "w") && r.plane(i).status().current));
    r.all.iter_mut().for_each(Replica::crash);
    let began = Instant::now();
    r.all[0].start();
    assert!(!r.plane(0).status().current || began.elapsed() >= Duration::from_millis(500));
    r.until("it has waited", || r.plane(0).status().current);
    assert!(began.elapsed() >= Duration::from_millis(500) && !r.plane(0).status().quorum);
    r.all[1].start();
    r.until("a quorum", || (0..2).all(|i| r.plane(i).status().quorum && r.plane(i).status().current));
}

#[test]
fn a_cluster_of_one_survives_its_restarts() {
    let mut r = Replicas::new(1);
    for life in 1..=3u64 {
        r.register(0, &format!("w{life}"));
        let status = r.plane(0).status();
        assert_eq!(status.incarnation.0, life);
        assert!(status.groups[0].term >= life, "nobody leads on from an earlier life: {status:?}");
        r.all[0].crash();
        r.all[0].start();
        r.until("all registrations back", || (1..=life).all(|w| knows(&r.plane(0), &format!("w{w}"))));
    }
}

#[test]
fn a_cluster_of_one_is_a_quorum_for_as_long_as_it_runs() {
    let r = Replicas::new(1);
    r.until("a leader", || r.leader() == Some(0));
    // Idle, and longer than what is heard of others counts as fresh.
    let end = Instant::now() + Duration::from_millis(2500);
    r.until("the time to pass", || {
        let status = r.plane(0).status();
        assert!(status.quorum, "{:?}", status.groups);
        Instant::now() > end
    });
}

#[test]
fn a_replica_that_was_away_too_long_gets_a_snapshot_and_all_restart_from_checkpoints() {
    away_too_long(Replicas::new(3));
}

pub(super) fn away_too_long(mut r: Replicas) {
    for replica in &mut r.all {
        replica.crash();
        replica.config.checkpoint_interval = Duration::from_millis(100);
    }
    r.all.iter_mut().for_each(Replica::start);
    r.register(0, "before");
    r.until("known to the third", || knows(&r.plane(2), "before"));
    r.all[2].crash();
    // The others go on until the log that the third would need is purged.
    let away_at = r.plane(0).status().groups[0].applied;
    let mut n = 0;
    while (0..2).any(|i| r.plane(i).status().groups[0].first_log <= away_at + 1) {
        n += 1;
        r.register(n % 2, &format!("w{n}"));
        assert!(n < 4000, "the log is not purged: {:?}", r.plane(0).status().groups);
    }
    r.all[2].start();
    r.until("the third has it all", || (1..=n).all(|w| knows(&r.plane(2), &format!("w{w}"))));
    let digest = |i: usize| {
        let status = r.plane(i).status();
        (status.groups[0].applied, status.groups[0].digest.clone())
    };
    r.until("equal digests at equal indexes", || digest(0) == digest(1) && digest(1) == digest(2));

    // Everybody at once, from checkpoint and log.
    r.all.iter_mut().for_each(Replica::crash);
    r.all.iter_mut().for_each(Replica::start);
    for i in 0..3 {
        r.until("all is back", || {
            knows(&r.plane(i), "before") && (1..=n).all(|w| knows(&r.plane(i), &format!("w{w}")))
        });
        assert!(r.plane(i).status().groups[0].first_log > 1, "the log was purged");
    }
    r.register(1, "after");
}

#[test]
fn what_is_counted_tells_of_batches_flushes_leaders_and_how_old_the_view_is() {
    let mut r = Replicas::new(3);
    r.until("a cluster", || (0..3).all(|i| r.plane(i).status().quorum));
    for (i, id) in [(0, "a"), (1, "b"), (2, "c")] {
        r.register(i, id);
    }
    for i in 0..3 {
        let stats = r.plane(i).stats();
        let control = &stats.groups[Group::Control.index()];
        assert_eq!(control.group, Group::Control);
        assert!(control.batch_mutations.count() >= 1 && control.proposals.count() >= 1, "{control:?}");
        assert!(control.batch_mutations.sum() >= control.batch_mutations.count() as f64);
        assert!(control.batch_bytes.sum() > 0.0 && control.leader_changes >= 1, "{control:?}");
        let log = stats.log.unwrap();
        assert!(log.syncs.count() > 0 && log.syncs.sum() > 0.0, "{log:?}");
        assert!(log.batches > 0 && log.bytes > 0, "{log:?}");
    }
    // Everybody knows of everybody else, and of nobody but itself does it say nothing.
    let ages = |of: usize| -> Vec<Option<u64>> {
        r.plane(of).status().members.iter().map(|member| member.view_age_ms).collect()
    };
    r.until("fresh views", || {
        (0..3).all(|of| {
            let ages = ages(of);
            ages.len() == 3
                && ages[of].is_none()
                && ages.iter().flatten().filter(|age| **age < 2000).count() == 2
        })
    });
    // One that is gone gets older, with a quorum that still tells the time; the other does not.
    let gone = (0..3).find(|i| r.plane(*i).status().groups[0].role == "follower").unwrap();
    let other = (0..3).find(|i| *i != gone).unwrap();
    r.all[gone].crash();
    r.until("an old view", || {
        r.plane(other).status().members[gone].view_age_ms.is_some_and(|age| age > 2500)
    });
    let ages = r.plane(other).status().members;
    let rest = (0..3).find(|i| *i != gone && *i != other).unwrap();
    assert!(ages[rest].view_age_ms.is_some_and(|age| age < 2500), "{ages:?}");
}

#[test]
fn reservations_of_different_replicas_never_share_a_worker_that_has_room_for_one() {
    use crate::routing::book::{Booking, Share};
    use crate::routing::policy::{RouteRequest, by_name};
    use crate::routing::select::{Limits, Overload, select};

    const WORKERS: usize = 6;
    let r = Replicas::new(3);
    for n in 0..WORKERS {
        r.register(n % 3, &format!("w{n}"));
    }
    for i in 0..3 {
        r.until("all workers everywhere", || (0..WORKERS).all(|w| knows(&r.plane(i), &format!("w{w}"))));
    }
    let limits =
        Limits { now_ms: 1, breaker: Default::default(), max_requests: 1, overload: Overload::default() };
    // The policy prefers the same worker everywhere, so that they do meet.
    let reserve = async |plane: Arc<dyn ControlPlane>| -> (Booking, u32) {
        let policy = by_name("consistent_hash").unwrap();
        for late in 0.. {
            let request = RouteRequest { prompt_tokens: 100, session: Some(7), ..RouteRequest::default() };
            let selection = {
                let view = plane.registry();
                select(&view, policy.as_ref(), &request, &limits, &[], &mut rand::rng()).unwrap()
            };
            let share = Share { prefill_tokens: 100, decode_blocks: 7, ..Share::default() };
            let tentative = plane.bookings().try_book(selection.worker, share, selection.seen);
            if let Some(booking) = plane.reserve(tentative).await.unwrap() {
                return (booking, late);
            }
        }
        unreachable!("tried for ever")
    };
    let planes: Vec<_> = (0..WORKERS).map(|n| r.plane(n % 3)).collect();
    let mut met = 0;
    for round in 0..10 {
        let all = planes.iter().cloned().map(&reserve);
        let taken = r.runtime.block_on(futures_util::future::join_all(all));
        let mut workers: Vec<_> = taken.iter().map(|(booking, _)| booking.worker().id().clone()).collect();
        workers.sort();
        workers.dedup();
        assert_eq!(workers.len(), WORKERS, "round {round}: two share a worker: {workers:?}");
        assert!(
            taken.iter().all(|(_, late)| *late < WORKERS as u32),
            "each loses to another one at most once"
        );
        met += taken.iter().map(|(_, late)| late).sum::<u32>();
        drop(taken);
        for plane in &planes {
            let load = |n: usize| {
                let id = WorkerId::parse(&format!("w{n}")).unwrap();
                plane.registry().worker(&id).unwrap().live.load()
            };
            r.until("all is freed", || (0..WORKERS).all(|n| load(n) == Default::default()));
        }
    }
    assert!(met > 0, "they never wanted the same worker, so nothing was shown");

    // One whose asker went away is booked by the cluster, and freed.
    let plane = r.plane(0);
    let worker = plane.registry().workers[0].clone();
    let share = Share { prefill_tokens: 100, decode_blocks: 7, ..Share::default() };
    let tentative = plane.bookings().try_book(worker, share, Default::default());
    drop(plane.reserve(tentative));
    r.until("freed with nobody waiting", || plane.registry().workers[0].live.load() == Default::default());
    r.runtime.block_on(r.plane(1).read_barrier(Group::Cache)).unwrap();
    r.until("freed at the others", || r.plane(1).registry().workers[0].live.load() == Default::default());
}

#[test]
fn replicas_tell_equal_digests_of_equal_indexes_of_the_log() {
    let r = Replicas::new(3);
    r.until("a cluster", || (0..3).all(|i| r.plane(i).status().quorum));
    r.register(0, "a");
    let worker = r.plane(0).registry().workers[0].record.ix;
    let rank = RankKey { worker, rank: 0 };
    let before = r.plane(0).cache_digest();
    let locals: Vec<u8> = (1..5_u64).flat_map(u64::to_le_bytes).collect();
    let routed =
        CacheCommand::Routed { rank, seed: Seed::default(), locals: locals.into(), capacity: Some(64) };
    r.runtime.block_on(r.plane(1).propose_cache(routed)).unwrap();
    // The clock of the group alone moves the log on, and everybody comes by the same indexes.
    type Told = BTreeMap<usize, (String, String)>;
    let told: RefCell<BTreeMap<u64, Told>> = RefCell::default();
    let since = r.plane(1).cache_digest().applied;
    r.until("an index that all have told of", || {
        for i in 0..3 {
            let digest = r.plane(i).cache_digest();
            told.borrow_mut().entry(digest.applied).or_default().insert(i, (digest.state, digest.index));
        }
        told.borrow().range(since..).any(|(_, told)| told.len() == 3)
    });
    let told = told.into_inner();
    let (_, of_one) = told.range(since..).find(|(_, told)| told.len() == 3).unwrap();
    assert!(of_one.values().all(|told| *told == of_one[&0]), "{of_one:?}");
    assert_ne!((&of_one[&0].0, &of_one[&0].1), (&before.state, &before.index), "the blocks are in it");
    r.until("a round of reports", || {
        r.plane(2).cache_digest().rounds.iter().any(|round| round.states.len() == 3)
    });
    for round in r.plane(2).cache_digest().rounds {
        let states: Vec<&String> = round.states.values().collect();
        assert!(states.windows(2).all(|pair| pair[0] == pair[1]), "{round:?}");
    }
}

#[test]
fn the_leaders_bound_of_the_index_holds_on_all_replicas_however_they_are_configured() {
    let r = Replicas::with(3, |config| {
        let number: u64 = config.info.name[1..].parse().unwrap();
        config.index.bytes = number * (16 << 20);
    });
    r.until("a leader", || r.leader().is_some());
    // A rank, so that the index is looked at.
    let rank = RankKey { worker: WorkerIx(1), rank: 0 };
    let (seed, locals) = (Seed::default(), bytes::Bytes::new());
    let routed = CacheCommand::Routed { rank, seed, locals, capacity: Some(8) };
    let outcome = r.runtime.block_on(r.plane(0).propose_cache(routed)).unwrap();
    assert_eq!(outcome, CacheOutcome::Done);
    r.until("one bound, the leader's", || {
        let leader = (0..3).find(|i| r.plane(*i).status().groups.get(1).is_some_and(|g| g.role == "leader"));
        let Some(leader) = leader else { return false };
        let bound = |i| r.plane(i).blocks().index.load().options().bytes;
        (0..3).all(|i| bound(i) == (leader as u64 + 1) * (16 << 20))
    });
}

#[test]
fn a_prompt_that_waits_is_coming_on_all_replicas_until_it_waits_no_more() {
    let r = Replicas::new(3);
    r.until("a cluster", || (0..3).all(|i| r.plane(i).status().quorum));
    r.register(0, "a");
    let worker = r.plane(0).registry().workers[0].record.ix;
    let rank = RankKey { worker, rank: 0 };
    // A rank with events.
    let claim = CacheCommand::ClaimFeed { rank, from: None };
    assert!(matches!(r.runtime.block_on(r.plane(0).propose_cache(claim)), Ok(CacheOutcome::Feed(_))));
    let ix = r.plane(0).ranks().borrow().get(rank).unwrap().ix;
    let locals: Vec<LocalHash> = (1..=4).map(LocalHash).collect();
    let plane = r.plane(0);
    let recent = &plane.blocks().recent;
    recent.note(ix, Seed::default(), &locals);
    let awaited = recent.until_first_token(ix, Seed::default(), &locals);
    let bytes: Vec<u8> = locals.iter().flat_map(|local| local.0.to_le_bytes()).collect();
    r.plane(0).tell_cache(CacheCommand::Routed {
        rank,
        seed: Seed::default(),
        locals: bytes.into(),
        capacity: None,
    });
    let coming = |i: usize| {
        let mut sent = Vec::new();
        r.plane(i).blocks().overlaps(&locals, &mut Vec::new(), &mut sent);
        sent.first().map_or(0, |sent| sent.blocks)
    };
    r.until("known to all", || (0..3).all(|i| coming(i) == 4));
    let began = Instant::now();
    // Longer than what nobody names would stay.
    while began.elapsed() < TURN * 6 {
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(coming(0), 4, "here, after {:?}", began.elapsed());
    }
    assert!((1..3).all(|i| coming(i) == 4), "elsewhere, too");
    drop(awaited);
    r.until("forgotten by all", || (0..3).all(|i| coming(i) == 0));
}
