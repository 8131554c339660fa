//! What has begun, what has ended, and what is still on its way, where processes die in between.

use super::*;
use crate::relay::find::Missing;
use crate::relay::link::caller::Wanted;
use crate::relay::log::Log;

fn events(range: std::ops::Range<u64>) -> Vec<Event> {
    range.map(|seq| Event { lines: number(seq, 0), journal: Bytes::new(), terminal: false }).collect()
}

#[tokio::test]
async fn a_resumption_waits_for_a_copy_that_is_being_filled() {
    let cluster = Cluster::new(3, numbers(100_000), &Options::default()).await;
    let (_, listener) = cluster.begin(1, true, 5000).await;
    let id = secret::random_id();
    let parts = (Log::default(), Default::default());
    let copy = Copy::new(id, Arc::clone(&listener.order), Role::Mirror, 1, parts, 1 << 20);
    copy.promise(50);
    cluster.hub(0).put(Arc::clone(&copy));
    let hub = Arc::clone(cluster.hub(0));
    let resumed = tokio::spawn(async move { hub.resume(id, 50, None).await.map(|listener| listener.at()) });
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(!resumed.is_finished(), "it is not refused while events are still to come");
    copy.push(1, 0, events(0..50));
    assert_eq!(resumed.await.unwrap(), Ok(50));
    // Nobody feeds this copy: what comes next may be elsewhere.
    let unavailable = Some(Refused::Missing(Missing::Unavailable));
    assert_eq!(cluster.hub(0).resume(id, 60, None).await.err(), unavailable);
}

#[tokio::test]
async fn an_event_that_is_known_to_be_elsewhere_is_not_said_to_be_none() {
    let cluster = Cluster::new(3, numbers(100_000), &Options::default()).await;
    let (id, mut listener) = cluster.begin(1, true, 5000).await;
    read(&mut listener, 20).await;
    let ahead = cluster.hub(1).resume(id, 1_000_000, None).await.err();
    assert!(matches!(ahead, Some(Refused::Ahead { next: 20.. })), "{ahead:?}");
    // Its source said that it has so many, and then nothing more.
    let entry = cluster.entry(1, id);
    entry.copy.promise(2_000_000);
    let later = cluster.hub(1).resume(id, 1_000_000, None).await.err();
    assert_eq!(later, Some(Refused::Missing(Missing::Unavailable)));
}

#[tokio::test]
async fn the_end_is_noted_when_those_who_read_along_have_it() {
    let cluster = Cluster::new(3, numbers(60), &Options::default()).await;
    let (id, mut listener) = cluster.begin(1, true, 5000).await;
    let holder = Holder::Replica(ReplicaId(cluster.holder(id) as u64 + 1));
    // One that has no room for events yet.
    let link = cluster.hub(0).link_to(holder).await.expect("both live");
    let (ticket, _) = link.attach(id, Wanted::default(), Duration::from_secs(5)).await.expect("it is there");
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 60);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let ended = cluster.world.record(id).unwrap().ended;
    assert_eq!(ended, None, "who reads along would have nothing to go on with");
    drop(ticket);
    eventually("its end is known", || cluster.world.record(id).is_some_and(|r| r.ended.is_some())).await;
}

#[tokio::test]
async fn what_is_not_listed_is_had_from_who_has_it() {
    let cluster = Cluster::new(3, numbers(100_000), &Options::default()).await;
    let (id, mut listener) = cluster.begin(1, true, 5000).await;
    let at = read(&mut listener, 20).await;
    // As it is while a leader is being elected: nobody has noted that it began.
    cluster.world.apply(ReplicaId(1), CacheCommand::PurgeStream { id });
    assert!(cluster.world.record(id).is_none());
    let again = cluster.hub(0).resume(id, at, None).await;
    let mut again = again.unwrap_or_else(|refused| panic!("{refused:?}"));
    read(&mut again, 20).await;
    let nobodys = cluster.hub(0).whereabouts(secret::random_id()).await;
    assert_eq!(nobodys, Ok(None), "what nobody has is not there");
}

#[tokio::test]
async fn a_stream_whose_end_died_with_its_holder_is_finished_again() {
    let mut cluster = Cluster::new(3, numbers(300), &Options::default()).await;
    let (id, mut listener) = cluster.begin(1, true, 60_000).await;
    read(&mut listener, 20).await;
    // The replica of the client was away when the stream ended, and when it is back its holder is dead.
    let end = CacheCommand::EndStream { id, attempt: 1, how: StreamEnd::Complete, keep_ms: 60_000 };
    cluster.world.apply(ReplicaId(3), end);
    cluster.kill(cluster.holder(id));
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 300);
    let began: Vec<u32> = cluster.engines.began.lock().iter().map(|(attempt, _)| *attempt).collect();
    assert!(began.len() == 2 && began[1] > 1, "{began:?}");
}

/// One that is frozen is connected to all the same, and says nothing.
#[tokio::test]
async fn what_has_ended_is_not_taken_for_forgotten_while_somebody_does_not_answer() {
    let options = Options { takeover: Duration::from_millis(1500), ..Options::default() };
    let mut cluster = Cluster::new(3, numbers(30), &options).await;
    let (id, mut listener) = cluster.begin(1, true, 60_000).await;
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 30);
    eventually("its end is known", || cluster.world.record(id).is_some_and(|r| r.ended.is_some())).await;
    let holder = cluster.holder(id);
    let other = (0..3).find(|at| ![1, holder].contains(at)).unwrap();
    let mut frozen = cluster.world.members.lock()[holder].clone();
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    frozen.address = mute.local_addr().unwrap().to_string();
    cluster.kill(holder);
    cluster.kill(1);
    cluster.world.members.lock().push(frozen);
    cluster.hub(other).look();
    let refused = cluster.hub(other).resume(id, 10, None).await.err();
    assert_eq!(refused, Some(Refused::Missing(Missing::Unavailable)), "it may have it");
    drop(mute);
    let refused = cluster.hub(other).resume(id, 10, None).await.err();
    assert_eq!(refused, Some(Refused::Missing(Missing::Forgotten)), "it has died");
}

#[tokio::test]
async fn what_has_ended_is_copied_again_when_one_of_two_who_have_it_dies() {
    let mut cluster = Cluster::new(3, numbers(30), &Options::default()).await;
    let (id, mut listener) = cluster.begin(1, true, 60_000).await;
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 30);
    eventually("its end is known", || cluster.world.record(id).is_some_and(|r| r.ended.is_some())).await;
    let holder = cluster.holder(id);
    let other = (0..3).find(|at| ![1, holder].contains(at)).unwrap();
    assert!(cluster.hub(other).get(id).is_none(), "two are enough while both live");
    let mut dead = cluster.world.members.lock()[holder].clone();
    dead.alive = false;
    cluster.kill(holder);
    cluster.world.members.lock().push(dead);
    eventually("the third has it", || {
        cluster.hub(other).get(id).is_some_and(|entry| entry.copy.ended() && entry.copy.next() == 30)
    })
    .await;
    assert_eq!(cluster.world.record(id).unwrap().mirror, Some(ReplicaId(other as u64 + 1)));
    cluster.kill(1);
    let again = cluster.hub(other).resume(id, 10, None).await;
    let mut again = again.unwrap_or_else(|refused| panic!("{refused:?}"));
    assert_eq!(read(&mut again, u64::MAX / 2).await, 30);
}

#[tokio::test]
async fn a_stream_that_nobody_has_any_more_is_begun_again_for_who_has_read_nothing() {
    let cluster = Cluster::new(3, numbers(50), &Options::default()).await;
    let (id, listener) = cluster.begin(1, true, 60_000).await;
    let (order, holder) = ((*listener.order).clone(), cluster.holder(id));
    drop(listener);
    for at in [1, holder] {
        let entry = cluster.entry(at, id);
        cluster.hub(at).remove(&entry);
    }
    let lost = cluster.world.record(id).unwrap().attempt;
    let entry = cluster.hub(0).begin_again(id, order, lost, true).await;
    let mut again = cluster.hub(0).listen(entry, true);
    assert_eq!(read(&mut again, u64::MAX / 2).await, 50);
    assert!(cluster.world.record(id).unwrap().attempt > lost);
}

#[tokio::test]
async fn who_is_leaving_costs_a_new_stream_no_attempt() {
    let cluster = Cluster::new(3, numbers(50), &Options::default()).await;
    cluster.hub(2).leave();
    let (id, mut listener) = cluster.begin(1, false, 1000).await;
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 50);
    assert_eq!((cluster.holder(id), cluster.world.record(id).unwrap().attempt), (0, 1));
}

#[tokio::test]
async fn a_process_that_is_gone_is_told_from_one_that_only_closed_its_links() {
    let mut cluster = Cluster::new(2, numbers(10), &Options::default()).await;
    let other = Holder::Replica(ReplicaId(2));
    assert!(!cluster.hub(0).is_dead(other).await, "it listens");
    // Gone, and known all the same.
    let known = cluster.world.members.lock().clone();
    cluster.kill(1);
    *cluster.world.members.lock() = known;
    cluster.hub(0).look();
    let until = std::time::Instant::now() + Duration::from_secs(10);
    while !cluster.hub(0).is_dead(other).await {
        assert!(std::time::Instant::now() < until, "its socket is closed by now");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!cluster.hub(0).is_dead(Holder::Replica(ReplicaId(9))).await, "of a stranger nothing is known");
}
