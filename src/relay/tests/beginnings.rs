//! Streams that are begun by several at once, or for clients that are gone before they have begun; and
//! the end of those that nobody wants any more.

use super::copies::hear;
use super::*;
use crate::relay::alone::Alone;
use crate::relay::begin::KeyReused;

/// Begins one at the first replica, held by the third.
pub(super) async fn held_by_third(cluster: &Cluster) -> (StreamId, Listener) {
    loop {
        let (id, listener) = cluster.begin(0, true, 60_000).await;
        eventually("it is listed", || cluster.world.record(id).is_some()).await;
        if cluster.holder(id) == 2 {
            return (id, listener);
        }
    }
}

#[tokio::test]
async fn what_was_begun_for_a_client_that_is_gone_ends_as_if_it_had_left() {
    let cluster = Cluster::new(3, numbers(1_000_000), &Options::default()).await;
    for _ in 0..5 {
        let id = secret::random_id();
        let order = cluster.order(0, 60_000);
        let begin = cluster.hub(0).begin(id, order, manner(false));
        tokio::select! {
            biased;
            begun = begin => panic!("{:?} before anybody could be asked", begun.map(|entry| entry.copy.id)),
            () = std::future::ready(()) => {}
        }
        let cancelled =
            || cluster.world.record(id).is_some_and(|record| record.ended == Some(StreamEnd::Cancelled));
        eventually("nobody generates it", cancelled).await;
        let ended =
            || cluster.hub(0).get(id).is_none_or(|entry| entry.copy.ended() || entry.copy.is_closed());
        eventually("its copy knows", ended).await;
    }
}

#[tokio::test]
async fn of_two_who_begin_the_same_elsewhere_one_reads_what_the_other_has_begun() {
    let cluster = Cluster::new(3, numbers(400), &Options::default()).await;
    let (id, mut listener) = held_by_third(&cluster).await;
    let began = cluster.engines.began.lock().len();
    // As it is for whoever asks before the holder is listed.
    cluster.world.apply(ReplicaId(3), CacheCommand::PurgeStream { id });
    let entry = cluster.hub(1).begin(id, cluster.order(1, 60_000), manner(true)).await.unwrap();
    let mut other = cluster.hub(1).listen(entry, true);
    assert_eq!(read(&mut other, u64::MAX / 2).await, 400);
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 400);
    assert_eq!(cluster.engines.began.lock().len(), began, "nothing was begun twice");
}

impl Cluster {
    /// Begins one that others may begin, too, at a replica that sees only one other.
    async fn begin_apart(&self, id: StreamId, at: usize, other: usize, request: u8) -> Listener {
        let all = self.world.members.lock().clone();
        let is_seen = |peer: &Peer| [at, other].contains(&(peer.id.0 as usize - 1));
        self.world.members.lock().retain(is_seen);
        self.hub(at).look();
        let order = Order { request: [request; 16], ..self.order(at, 60_000) };
        let manner = Manner { shared: true, ..manner(true) };
        let entry = self.hub(at).begin(id, order, manner).await.unwrap();
        *self.world.members.lock() = all;
        self.hub(at).look();
        self.hub(at).listen(entry, true)
    }
}

#[tokio::test]
async fn of_two_who_begin_the_same_and_do_not_see_each_other_only_one_is_ever_read() {
    for other in [2, 3] {
        let cluster = Cluster::new(4, numbers(400), &Options::default()).await;
        cluster.world.is_down.send_replace(true);
        let id = secret::random_id();
        let mut first = cluster.begin_apart(id, 0, 1, 2).await;
        // The second asks for the same, or for something else.
        let mut second = cluster.begin_apart(id, 2, 3, other).await;
        let began = || cluster.engines.began.lock().len() == 2;
        eventually("both have begun", began).await;
        let early = tokio::time::timeout(Duration::from_millis(300), read(&mut first, 1)).await;
        assert!(early.is_err(), "something was read before it was listed");
        assert_eq!(cluster.engines.said.load(Ordering::Relaxed), 0);
        cluster.world.is_down.send_replace(false);
        eventually("one is listed", || cluster.world.record(id).is_some()).await;
        let winner = cluster.holder(id);
        if other == 2 {
            assert_eq!(read(&mut first, u64::MAX / 2).await, 400);
            assert_eq!(read(&mut second, u64::MAX / 2).await, 400);
        } else {
            let (won, lost) = if winner == 1 { (&mut first, &mut second) } else { (&mut second, &mut first) };
            assert_eq!(read(won, u64::MAX / 2).await, 400);
            let mut heard = Vec::new();
            hear(lost, &mut heard, 1).await;
            assert_eq!(heard, ["data: Lost\n"]);
        }
        let stands = cluster.world.record(id).unwrap();
        assert_eq!((stands.attempt, cluster.engines.said.load(Ordering::Relaxed)), (1, 400), "{stands:?}");
    }
}

#[tokio::test]
async fn what_one_has_begun_runs_on_where_nobody_lists_it() {
    let cluster = Cluster::new(3, numbers(50), &Options::default()).await;
    cluster.world.is_broken.store(true, Ordering::Relaxed);
    let id = secret::random_id();
    let manner = Manner { shared: true, ..manner(true) };
    let entry = cluster.hub(0).begin(id, cluster.order(0, 60_000), manner).await.unwrap();
    assert_eq!(read(&mut cluster.hub(0).listen(entry, true), u64::MAX / 2).await, 50);
    assert!(cluster.world.record(id).is_none());
}

#[tokio::test]
async fn of_two_who_ask_for_different_things_under_one_key_the_second_is_refused() {
    let cluster = Cluster::new(3, numbers(100_000), &Options::default()).await;
    let (id, mut listener) = held_by_third(&cluster).await;
    cluster.world.apply(ReplicaId(3), CacheCommand::PurgeStream { id });
    let other = || Order { request: [9; 16], ..cluster.order(1, 60_000) };
    // At a replica that knows nothing of it, and at one that has it.
    for at in [1, 0] {
        let refused = cluster.hub(at).begin(id, other(), manner(true)).await;
        assert_eq!(refused.err(), Some(KeyReused));
    }
    read(&mut listener, 50).await;
    assert!(cluster.hub(1).get(id).is_none(), "nothing is left of it");
}

#[tokio::test]
async fn a_client_that_leaves_for_good_leaves_others_their_stream() {
    let cluster = Cluster::new(3, numbers(1_000_000), &Options::default()).await;
    let (id, mut gone) = cluster.begin(0, false, 60_000).await;
    let at = read(&mut gone, 5).await;
    eventually("it is listed", || cluster.world.record(id).is_some()).await;
    let elsewhere = 3 - cluster.holder(id);
    let resumed = cluster.hub(elsewhere).resume(id, at, None).await;
    let mut other = resumed.unwrap_or_else(|refused| panic!("{refused:?}"));
    read(&mut other, 5).await;
    let held = cluster.entry(cluster.holder(id), id);
    eventually("the holder knows of both", || held.copy.clients() == 2).await;
    drop(gone);
    read(&mut other, 300).await;
    assert_eq!(cluster.world.record(id).unwrap().ended, None);
}

#[tokio::test]
async fn a_client_that_leaves_for_good_in_a_seam_ends_what_is_taken_over() {
    let mut cluster = Cluster::new(3, numbers(1_000_000), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, false, 600_000).await;
    read(&mut listener, 5).await;
    eventually("it is listed", || cluster.world.record(id).is_some()).await;
    let holder = cluster.holder(id);
    cluster.kill(holder);
    let entry = cluster.entry(0, id);
    let is_open = || entry.ticket.lock().as_ref().is_some_and(|(ticket, _)| ticket.is_open());
    // Or found again already, which is as good.
    eventually("its source is lost", || !is_open() || entry.copy.attempt() > 1).await;
    drop(listener);
    let cancelled =
        || cluster.world.record(id).is_some_and(|record| record.ended == Some(StreamEnd::Cancelled));
    eventually("nobody goes on with it", cancelled).await;
}

#[tokio::test]
async fn what_is_deleted_is_deleted_wherever_there_is_a_copy() {
    let cluster = Cluster::new(3, numbers(50), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, true, 60_000).await;
    let at = read(&mut listener, 5).await;
    eventually("it is listed", || cluster.world.record(id).is_some()).await;
    let elsewhere = 3 - cluster.holder(id);
    let resumed = cluster.hub(elsewhere).resume(id, at, None).await;
    let mut other = resumed.unwrap_or_else(|refused| panic!("{refused:?}"));
    assert_eq!(read(&mut other, u64::MAX / 2).await, 50);
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 50);
    // All three have it now.
    assert!((0..3).all(|at| cluster.hub(at).get(id).is_some()));
    assert!(cluster.hub(elsewhere).end(id, true).await);
    let gone = || (0..3).all(|at| cluster.hub(at).get(id).is_none_or(|entry| entry.is_purged()));
    eventually("nobody shows it any more", gone).await;
}

#[tokio::test]
async fn an_agent_keeps_what_has_ended_as_long_as_a_replica_does() {
    let handle = tokio::runtime::Handle::current();
    let agent = Relays::new(Options::default(), Arc::new(Alone::default()), Dialer::default(), handle);
    assert_eq!(agent.most_kept(), u32::MAX);
}

#[test]
fn what_may_pass_is_no_answer_that_a_key_stands_for() {
    for (status, is_refusal) in
        [(200, false), (400, false), (408, true), (422, false), (429, true), (503, true)]
    {
        let parts = (crate::relay::log::Log::default(), Default::default());
        let copy = Copy::new(secret::random_id(), Arc::new(order()), Role::Holder, 1, parts, 1 << 20);
        copy.set_head(Arc::new(Head {
            status,
            headers: Vec::new(),
            framing: Framing::Raw,
            resumable: Resumable::Replay,
            worker: "w".to_owned(),
        }));
        copy.push(1, 0, vec![Event { lines: "{}".into(), journal: Bytes::new(), terminal: true }]);
        assert_eq!(copy.is_refusal(), is_refusal, "{status}");
    }
}

#[tokio::test]
async fn what_is_held_by_one_process_only_is_copied_to_another_and_survives_the_first() {
    let mut cluster = Cluster::new(3, numbers(1_000_000), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, true, 60_000).await;
    let at = read(&mut listener, 20).await;
    eventually("it is listed", || cluster.world.record(id).is_some()).await;
    let holder = cluster.holder(id);
    drop(listener);
    // The replica that had the other copy dies, and the client comes to the holder, whose peers cannot be
    // seen yet.
    cluster.kill(0);
    let others: Vec<Peer> = cluster.world.members.lock().clone();
    cluster.world.members.lock().iter_mut().for_each(|peer| peer.alive = false);
    cluster.hub(holder).look();
    let resumed = cluster.hub(holder).resume(id, at, None).await;
    let mut listener = resumed.unwrap_or_else(|refused| panic!("{refused:?}"));
    let at = read(&mut listener, 20).await;
    *cluster.world.members.lock() = others;
    let third = 3 - holder;
    eventually("the third has a copy", || cluster.hub(third).get(id).is_some()).await;
    let read_here = || cluster.entry(holder, id).copy.clients_here();
    eventually("the client reads that one", || read_here() == 0).await;
    let seen = read(&mut listener, 20).await;
    assert!(seen > at);
    drop(listener);
    cluster.kill(holder);
    let resumed = cluster.hub(third).resume(id, seen, None).await;
    read(&mut resumed.unwrap_or_else(|refused| panic!("{refused:?}")), 20).await;
}

#[tokio::test]
async fn whom_everybody_else_refuses_generates_by_itself() {
    let mut cluster = Cluster::new(3, numbers(50), &Options::default()).await;
    cluster.kill(0);
    cluster.hub(2).leave();
    cluster.hub(1).look();
    let (id, mut listener) = cluster.begin(1, true, 60_000).await;
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 50);
    assert_eq!(cluster.entry(1, id).copy.role(), Role::Holder);
}

#[tokio::test]
async fn who_has_just_started_generates_nothing_for_others() {
    let cluster = Cluster::new(3, numbers(50), &Options::default()).await;
    // It could only say that it knows of no engine.
    cluster.world.behind.lock().insert(ReplicaId(3));
    cluster.hub(2).look();
    for _ in 0..8 {
        let (id, mut listener) = cluster.begin(1, true, 60_000).await;
        assert_eq!(read(&mut listener, u64::MAX / 2).await, 50);
        assert_eq!(cluster.holder(id), 0, "the leader rather than who knows little");
    }
    // From the moment on at which it says that it is ready.
    cluster.world.behind.lock().clear();
    let (id, mut listener) = cluster.begin(1, true, 60_000).await;
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 50);
    assert_eq!(cluster.holder(id), 2);
}

#[tokio::test]
async fn who_remembers_a_refusal_generates_what_is_asked_for_anew() {
    let mut cluster = Cluster::new(3, numbers(50), &Options::default()).await;
    cluster.kill(0);
    cluster.hub(1).look();
    let id = secret::random_id();
    let refusal =
        Copy::new(id, Arc::new(cluster.order(1, 60_000)), Role::Mirror, 1, Default::default(), 1 << 20);
    let (headers, framing) = (Vec::new(), Framing::Raw);
    let (resumable, worker) = (Resumable::Continue, String::new());
    refusal.set_head(Arc::new(Head { status: 503, headers, framing, resumable, worker }));
    let lines = Bytes::from_static(b"{}");
    assert!(refusal.append(1, Event { lines, journal: Bytes::new(), terminal: true }));
    assert!(refusal.is_refusal());
    cluster.hub(2).put(refusal);
    let entry = cluster.hub(1).begin(id, cluster.order(1, 60_000), manner(true)).await.unwrap();
    let mut listener = cluster.hub(1).listen(entry, true);
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 50);
    assert_eq!(cluster.holder(id), 2);
}

#[tokio::test]
async fn of_two_who_order_the_same_from_each_other_one_generates_it() {
    let cluster = Cluster::new(2, numbers(20), &Options::default()).await;
    for round in 0..100 {
        let id = secret::random_id();
        let begin = async |at: usize| {
            let entry = cluster.hub(at).begin(id, cluster.order(at, 60_000), manner(true)).await.unwrap();
            let mut listener = cluster.hub(at).listen(entry, true);
            read(&mut listener, u64::MAX / 2).await
        };
        assert_eq!(tokio::join!(begin(0), begin(1)), (20, 20), "round {round}");
    }
    let began = cluster.engines.began.lock();
    assert_eq!(began.len(), 100, "each was generated once: {began:?}");
}
