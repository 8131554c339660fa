//! Several copies of a stream that know different amounts of it when its holder is lost. Here each
//! attempt says something else, so that whatever is joined wrongly is seen.

use super::beginnings::held_by_third;
use super::*;
use crate::relay::copy::{Sink, Stop};
use crate::relay::gather::ASK;
use crate::relay::line::Line;
use crate::relay::link::server::Host as _;
use crate::relay::log::Log;

/// A holder that is no more.
const LOST: Holder = Holder::Replica(ReplicaId(9));

fn varying(events: u64) -> Numbers {
    Numbers { varies: true, ..numbers(events) }
}

/// So many events, said by whom the line says.
fn had(events: u64, line: &Line) -> Log {
    let mut log = Log::default();
    for seq in 0..events {
        let (lines, journal) = (said(seq, line.said_by(seq)), seq.to_le_bytes().to_vec().into());
        log.push(Event { lines, journal, terminal: false });
    }
    log
}

impl Cluster {
    /// Lists a stream whose first holder is lost.
    fn lost_stream(&self) -> StreamId {
        let id = secret::random_id();
        let record = self.hub(0).record(&self.order(0, 60_000), LOST);
        self.world.apply(ReplicaId(9), CacheCommand::OpenStream { id, record });
        id
    }

    /// Gives a replica a copy of the first events of a stream.
    fn plant(&self, at: usize, id: StreamId, events: u64) -> Arc<Entry> {
        self.plant_with(at, id, events, 1, Line::default())
    }

    fn plant_with(&self, at: usize, id: StreamId, events: u64, attempt: u32, line: Line) -> Arc<Entry> {
        let order = Arc::new(self.order(at, 60_000));
        let log = had(events, &line);
        self.hub(at).put(Copy::new(id, order, Role::Mirror, attempt, (log, line), 8 << 20))
    }
}

/// Reads until there are `count` lines, or until the listener hears nothing more.
pub(super) async fn hear(listener: &mut Listener, heard: &mut Vec<String>, count: usize) -> Option<Over> {
    while heard.len() < count {
        let got = tokio::time::timeout(Duration::from_secs(20), poll_fn(|cx| listener.poll_read(cx)));
        match got.await.expect("a stream stands still") {
            Ok(read) => {
                assert_eq!(read.first, heard.len() as u64, "no gap and nothing twice");
                let lines =
                    read.events.iter().map(|event| String::from_utf8_lossy(&event.lines).into_owned());
                heard.extend(lines);
            }
            Err(over) => return Some(over),
        }
    }
    None
}

/// The first `base` lines of the first attempt, the rest of the second.
fn joined(base: u64, events: u64) -> Vec<String> {
    let of = |seq| said(seq, if seq < base { 1 } else { 2 });
    (0..events).map(|seq| String::from_utf8(of(seq).to_vec()).unwrap()).collect()
}

#[tokio::test]
async fn the_copy_that_is_behind_goes_on_from_what_the_one_ahead_knows() {
    // With three, the new holder is who knows more; with four it is somebody else.
    for replicas in [2, 4] {
        let cluster = Cluster::new(replicas, varying(200), &Options::default()).await;
        let id = cluster.lost_stream();
        let (ahead, behind) = (cluster.plant(0, id, 100), cluster.plant(1, id, 95));
        let mut clients = [(0, Arc::clone(&ahead)), (1, Arc::clone(&behind))]
            .map(|(at, entry)| (cluster.hub(at).listen(entry, true), Vec::new()));
        for ((listener, heard), count) in clients.iter_mut().zip([100, 95]) {
            assert_eq!(hear(listener, heard, count).await, None);
        }
        cluster.hub(1).recover(behind, Some(LOST)).await;
        cluster.hub(0).recover(ahead, Some(LOST)).await;
        for (listener, heard) in &mut clients {
            assert_eq!(hear(listener, heard, usize::MAX).await, Some(Over::Ended));
            assert_eq!(*heard, joined(100, 200));
        }
        assert_eq!(cluster.engines.began.lock().as_slice(), [(2, 100)], "of {replicas}");
    }
}

#[tokio::test]
async fn what_a_later_attempt_has_said_is_gone_on_from_though_an_earlier_one_was_further() {
    // With two, the new holder is who knows of the later attempt; with four it may be somebody else.
    for replicas in [2, 4] {
        let cluster = Cluster::new(replicas, varying(200), &Options::default()).await;
        let id = cluster.lost_stream();
        let mut record = cluster.world.record(id).unwrap();
        record.holder = LOST;
        let taken = CacheCommand::TakeStream { id, from_attempt: 1, record };
        assert_eq!(cluster.world.apply(ReplicaId(9), taken), CacheOutcome::Done);
        // One has read along with the first attempt, further than the second one knew when it began.
        let early = cluster.plant(0, id, 100);
        let mut line = Line::default();
        line.begin(2, 90);
        let late = cluster.plant_with(1, id, 95, 2, line);
        let mut client = (cluster.hub(1).listen(Arc::clone(&late), true), Vec::new());
        assert_eq!(hear(&mut client.0, &mut client.1, 95).await, None);
        // The first one, whose clients have read less, is the quicker one.
        let mut slow = (cluster.hub(0).listen(Arc::clone(&early), true), Vec::new());
        assert_eq!(hear(&mut slow.0, &mut slow.1, 1).await, None);
        assert_eq!(slow.1.len(), 64);
        cluster.hub(0).recover(early, Some(LOST)).await;
        cluster.hub(1).recover(late, Some(LOST)).await;
        let of = |seq| [1, 2, 3][usize::from(seq >= 90) + usize::from(seq >= 95)];
        let text = (0..200).map(|seq| String::from_utf8(said(seq, of(seq)).to_vec()).unwrap());
        let text: Vec<String> = text.collect();
        for (listener, heard) in [&mut client, &mut slow] {
            assert_eq!(hear(listener, heard, usize::MAX).await, Some(Over::Ended), "of {replicas}");
            assert_eq!(*heard, text, "of {replicas}");
        }
        assert_eq!(cluster.engines.began.lock().as_slice(), [(3, 95)], "of {replicas}");
    }
}

/// Only that it waits shows here: at least so long, however slow the machine.
#[tokio::test]
async fn a_holder_that_is_only_leaving_is_given_the_time_of_one_that_lives() {
    let cluster = Cluster::new(2, varying(200), &Options::default()).await;
    let id = cluster.lost_stream();
    let behind = cluster.plant(1, id, 95);
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut busy = cluster.world.members.lock()[0].clone();
    (busy.id, busy.address) = (ReplicaId(9), mute.local_addr().unwrap().to_string());
    cluster.world.members.lock().push(busy);
    cluster.hub(1).look();
    let began = std::time::Instant::now();
    cluster.hub(1).recover_from(Arc::clone(&behind), Some(LOST), true).await;
    assert!(began.elapsed() >= ASK, "{:?}", began.elapsed());
    assert!(cluster.world.record(id).unwrap().attempt > 1, "it goes on without");
}

#[tokio::test]
async fn who_was_away_gives_those_it_takes_to_be_lost_the_time_of_one_that_lives() {
    let cluster = Cluster::new(2, varying(200), &Options::default()).await;
    let id = cluster.lost_stream();
    let behind = cluster.plant(1, id, 95);
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut busy = cluster.world.members.lock()[0].clone();
    (busy.id, busy.address) = (ReplicaId(9), mute.local_addr().unwrap().to_string());
    cluster.world.members.lock().push(busy);
    cluster.hub(1).look();
    let began = std::time::Instant::now();
    cluster.hub(1).presence.tick(began - Duration::from_secs(2));
    cluster.hub(1).recover(Arc::clone(&behind), Some(LOST)).await;
    assert!(began.elapsed() >= ASK, "{:?}", began.elapsed());
    assert!(cluster.world.record(id).unwrap().attempt > 1, "it goes on without");
}

#[tokio::test]
async fn what_a_living_holder_had_is_not_lost_with_the_stream_that_is_taken_from_it() {
    let cluster = Cluster::new(2, varying(3_000), &Options::default()).await;
    let (id, listener) = cluster.begin(0, true, 60_000).await;
    let held = cluster.entry(1, id);
    eventually("it is listed", || cluster.world.record(id).is_some()).await;
    assert_eq!(cluster.holder(id), 1);
    // A client that reads at the holder, more than anybody else will know.
    let mut client = cluster.hub(1).listen(held, true);
    let mut heard = Vec::new();
    assert_eq!(hear(&mut client, &mut heard, 60).await, None);
    drop(listener);
    // The other one was away, has little of it, and does not see the holder.
    let behind = cluster.plant(0, id, 10);
    cluster.hub(0).recover(behind, Some(Holder::Replica(ReplicaId(2)))).await;
    assert_eq!(cluster.world.record(id).unwrap().attempt, 2, "it was taken");
    let before = heard.len();
    assert_eq!(hear(&mut client, &mut heard, before + 60).await, None, "it reads on");
    let base = cluster.engines.began.lock().last().unwrap().1;
    assert!(base >= before as u64, "what was read is not said again: {base}");
    assert_eq!(heard, joined(base, heard.len() as u64));
}

#[tokio::test]
async fn what_was_taken_from_a_holder_is_shown_until_somebody_says_more() {
    let cluster = Cluster::new(1, varying(1), &Options::default()).await;
    let (hub, id) = (cluster.hub(0), secret::random_id());
    let held = Arc::clone(&cluster.plant(0, id, 100).copy);
    hub.pasts.keep(&held, 2);
    // It reads along with the next attempt, which goes on from less, and has said nothing yet.
    assert!(cluster.plant(0, id, 90).copy.expect_attempt(2));
    assert_eq!(hub.remains(id, 3).unwrap().next(), 100);
    let mut line = Line::default();
    line.begin(2, 90);
    for (events, shown) in [(90, 100), (91, 91)] {
        cluster.plant_with(0, id, events, 2, line.clone());
        assert_eq!(hub.remains(id, 3).unwrap().next(), shown);
    }
}

#[tokio::test]
async fn whoever_was_asked_takes_nothing_more_of_what_is_over() {
    let cluster = Cluster::new(4, varying(200), &Options::default()).await;
    let id = cluster.lost_stream();
    let (ahead, behind) = (cluster.plant(0, id, 100), cluster.plant(1, id, 95));
    cluster.hub(1).recover(behind, Some(LOST)).await;
    // What was still on its way from the old holder.
    let late = Event { lines: said(100, 1), ..Event::default() };
    assert!(ahead.copy.push(1, 100, [late]), "it is no gap, but of no use");
    assert_eq!(ahead.copy.next(), 100);
}

#[tokio::test]
async fn an_end_that_another_copy_has_is_not_generated_again() {
    for replicas in [2, 4] {
        let cluster = Cluster::new(replicas, varying(200), &Options::default()).await;
        let id = cluster.lost_stream();
        let (ahead, behind) = (cluster.plant(0, id, 100), cluster.plant(1, id, 95));
        ahead.copy.append(1, Event { lines: said(100, 1), journal: Bytes::new(), terminal: true });
        let mut listener = cluster.hub(1).listen(Arc::clone(&behind), true);
        let mut heard = Vec::new();
        cluster.hub(1).recover(behind, Some(LOST)).await;
        assert_eq!(hear(&mut listener, &mut heard, usize::MAX).await, Some(Over::Ended));
        assert_eq!(heard, joined(101, 101));
        let world = &cluster.world;
        let ended = || world.record(id).is_some_and(|record| record.ended == Some(StreamEnd::Complete));
        eventually("the directory knows of the end", ended).await;
        assert!(cluster.engines.began.lock().is_empty());
    }
}

#[tokio::test]
async fn who_has_read_more_than_anybody_knew_is_told_and_everybody_else_reads_on() {
    let cluster = Cluster::new(4, varying(200), &Options::default()).await;
    let id = cluster.lost_stream();
    let (ahead, behind) = (cluster.plant(0, id, 100), cluster.plant(1, id, 95));
    let mut clients: Vec<_> = [100, 95, 40]
        .map(|count| (cluster.hub(0).listen(Arc::clone(&ahead), true), Vec::new(), count))
        .into_iter()
        .collect();
    for (listener, heard, count) in &mut clients {
        // Events come in heaps; the last client gets one, which is 64.
        hear(listener, heard, *count).await;
    }
    let mut read: Vec<usize> = clients.iter().map(|(_, heard, _)| heard.len()).collect();
    assert_eq!(read.pop(), Some(64));
    // Nobody sees the first replica for the moment.
    let hidden = cluster.world.members.lock().remove(0);
    cluster.hub(1).look();
    cluster.hub(1).recover(behind, Some(LOST)).await;
    cluster.world.members.lock().insert(0, hidden);
    cluster.hub(0).recover(Arc::clone(&ahead), Some(LOST)).await;
    let mut overs = Vec::new();
    for (listener, heard, _) in &mut clients {
        overs.push(hear(listener, heard, usize::MAX).await.unwrap());
        match overs.last() {
            Some(Over::Ended) => assert_eq!(*heard, joined(95, 200)),
            _ => assert_eq!(*heard, joined(100, 100), "nothing that contradicts what it had"),
        }
    }
    assert_eq!(overs, [Over::Stray, Over::Stray, Over::Ended]);
    assert_eq!(cluster.hub(0).counts.lost.load(Ordering::Relaxed), 2);
    // It is a good copy again, for whoever comes.
    let mut again = cluster.hub(0).resume(id, 0, None).await.unwrap_or_else(|refused| panic!("{refused:?}"));
    let mut heard = Vec::new();
    assert_eq!(hear(&mut again, &mut heard, usize::MAX).await, Some(Over::Ended));
    assert_eq!(heard, joined(95, 200));
}

#[tokio::test]
async fn a_client_that_read_what_is_lost_with_edge_and_holder_never_reads_on_in_another_text() {
    let cluster = Cluster::new(3, varying(10_000), &Options::default()).await;
    let id = cluster.lost_stream();
    let behind = cluster.plant(1, id, 50);
    cluster.hub(1).recover(behind, Some(LOST)).await;
    let copy = Arc::clone(&cluster.entry(1, id).copy);
    eventually("the second attempt is further on", || copy.next() > 70).await;
    for at in 0..3 {
        // Event 57 of the first attempt is one that nobody has any more.
        assert_eq!(cluster.hub(at).resume(id, 58, Some(1)).await.err(), Some(Refused::Stray), "at {at}");
        assert_eq!(cluster.hub(at).resume(id, 51, Some(1)).await.err(), Some(Refused::Stray));
        for (from, of) in [(50, 1), (51, 2), (58, 2)] {
            let again = cluster.hub(at).resume(id, from, Some(of)).await;
            let mut again = again.unwrap_or_else(|refused| panic!("{refused:?} at {at}"));
            let read = poll_fn(|cx| again.poll_read(cx)).await.unwrap();
            assert_eq!((read.first, &read.events[0].lines), (from, &said(from, 2)));
        }
    }
    // An attempt that there has not been.
    assert!(matches!(cluster.hub(1).resume(id, 58, Some(3)).await.err(), Some(Refused::Ahead { .. })));
}

#[tokio::test]
async fn who_reads_at_a_copy_that_is_behind_waits_for_it_and_is_told_if_it_goes_on_otherwise() {
    let cluster = Cluster::new(3, varying(200), &Options::default()).await;
    let id = cluster.lost_stream();
    let behind = cluster.plant(1, id, 50);
    // It has read event 57 elsewhere, and was put here when that process died.
    let stray = behind.copy.seat(58, Some(1), None, true).unwrap();
    let fine = behind.copy.seat(50, Some(1), None, true).unwrap();
    assert!(poll_fn(|cx| std::task::Poll::Ready(behind.copy.read(stray, 1, Some(cx)).is_pending())).await);
    cluster.hub(1).recover(Arc::clone(&behind), Some(LOST)).await;
    let wait = |seat| {
        let copy = Arc::clone(&behind.copy);
        async move { poll_fn(|cx| copy.read(seat, 1, Some(cx))).await.map(|read| read.events[0].lines.clone()) }
    };
    assert_eq!(wait(fine).await, Ok(said(50, 2)));
    assert_eq!(wait(stray).await, Err(Stop::Stray));
}

#[tokio::test]
async fn a_copy_that_nobody_goes_on_with_is_not_kept_where_others_look_for_the_stream() {
    let cluster = Cluster::new(3, varying(300), &Options::default()).await;
    let (id, mut live) = cluster.begin(0, true, 60_000).await;
    let mut heard = Vec::new();
    assert_eq!(hear(&mut live, &mut heard, 20).await, None);
    let holder = cluster.holder(id);
    let other = if holder == 1 { 2 } else { 1 };
    // So many were lost without a word that this process gives it up.
    let mut line = Line::default();
    (2..12).for_each(|attempt| line.begin(attempt, 0));
    let entry = cluster.plant_with(other, id, 10, 11, line);
    let mut listener = cluster.hub(other).listen(Arc::clone(&entry), true);
    cluster.hub(other).recover(entry, Some(LOST)).await;
    let mut last = Vec::new();
    assert_eq!(hear(&mut listener, &mut last, usize::MAX).await, Some(Over::Ended));
    assert_eq!((last.len(), last[10].as_str()), (11, "data: Lost\n"), "who listened is told");
    assert!(cluster.hub(other).get(id).is_none());
    // Who comes now reads what lives elsewhere.
    let again = cluster.hub(other).resume(id, 0, None).await;
    let (mut again, mut all) = (again.unwrap_or_else(|refused| panic!("{refused:?}")), Vec::new());
    assert_eq!(hear(&mut again, &mut all, usize::MAX).await, Some(Over::Ended));
    assert_eq!(all, joined(300, 300));
}

#[tokio::test]
async fn a_stream_that_says_something_in_between_changes_hands_as_often_as_is_wanted() {
    let cluster = Cluster::new(3, varying(100_000), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, true, 60_000).await;
    let mut heard = Vec::new();
    for round in 0..20 {
        let count = heard.len() + 5;
        assert_eq!(hear(&mut listener, &mut heard, count).await, None);
        let (attempt, holder) = (cluster.world.record(id).unwrap().attempt, cluster.holder(id));
        let held = cluster.entry(holder, id);
        match round % 2 {
            0 => held.copy.want_to_leave(),
            // As if it had died: it says nothing more.
            _ => cluster.hub(holder).remove(&held),
        }
        let world = &cluster.world;
        eventually("it changes hands", || world.record(id).is_some_and(|now| now.attempt > attempt)).await;
    }
    let count = heard.len() + 5;
    assert_eq!(hear(&mut listener, &mut heard, count).await, None);
    assert!(cluster.world.record(id).unwrap().attempt > 20);
    let counts = &cluster.hub(0).counts;
    assert!(counts.taken_over.load(Ordering::Relaxed) >= 20);
    assert_eq!(counts.lost.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_stream_whose_holders_die_without_a_word_is_lost_after_a_few() {
    let cluster = Cluster::new(3, Numbers { mute: true, ..numbers(5) }, &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, true, 60_000).await;
    let mut deaths = 0;
    while cluster.hub(0).get(id).is_some() {
        assert!(deaths < 20, "it goes on for ever");
        let (attempt, holder) = (cluster.world.record(id).unwrap().attempt, cluster.holder(id));
        if let Some(held) = cluster.hub(holder).get(id).filter(|held| held.copy.role() == Role::Holder) {
            deaths += 1;
            cluster.hub(holder).remove(&held);
        }
        let gone = || {
            let moved = cluster.world.record(id).is_some_and(|now| now.attempt > attempt);
            moved || cluster.hub(0).get(id).is_none()
        };
        eventually("it changes hands, or is given up", gone).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!((8..12).contains(&deaths), "{deaths}");
    let mut heard = Vec::new();
    assert_eq!(hear(&mut listener, &mut heard, usize::MAX).await, Some(Over::Ended));
    assert_eq!(heard, ["data: Lost\n"]);
}

#[tokio::test]
async fn a_replica_that_has_nothing_of_a_stream_sees_and_ends_it_at_those_that_have() {
    let cluster = Cluster::new(3, numbers(1_000_000), &Options::default()).await;
    for purge in [false, true] {
        let (id, mut listener) = cluster.begin(0, true, 60_000).await;
        read(&mut listener, 5).await;
        let holder = cluster.holder(id);
        let third = if holder == 1 { 2 } else { 1 };
        let record = cluster.world.record(id);
        let glance = cluster.hub(third).glance(id, record.as_ref()).await.expect("others have it");
        assert_eq!((glance.attempt, glance.ended, glance.order.body.len()), (1, None, 0));
        assert!(glance.events >= 5 && glance.head.is_some());
        assert!(cluster.hub(third).get(id).is_none(), "nothing is copied for a look");
        assert!(cluster.hub(third).end(id, purge).await);
        let until = tokio::time::timeout(Duration::from_secs(20), async {
            while poll_fn(|cx| listener.poll_read(cx)).await.is_ok() {}
        });
        until.await.expect("its client hears the end");
        let held = || cluster.hub(holder).get(id).is_some_and(|entry| !entry.copy.ended());
        assert!(!held(), "nobody generates it");
        match purge {
            false => {
                let ended =
                    || cluster.world.record(id).is_some_and(|now| now.ended == Some(StreamEnd::Cancelled));
                eventually("the directory knows", ended).await;
                assert!(cluster.hub(third).end(id, false).await, "again, which changes nothing");
            }
            true => eventually("it is forgotten", || cluster.world.record(id).is_none()).await,
        }
    }
}

#[tokio::test]
async fn the_pause_that_a_client_sees_is_measured() {
    let mut cluster = Cluster::new(3, numbers(100_000), &Options::default()).await;
    let (id, mut listener) = cluster.begin(0, false, 1000).await;
    read(&mut listener, 50).await;
    let counts = &cluster.hub(0).counts;
    assert_eq!((counts.holder_stall.snapshot().count(), counts.takeover_time.snapshot().count()), (0, 0));
    let holder = cluster.holder(id);
    cluster.kill(holder);
    let began = std::time::Instant::now();
    read(&mut listener, 50).await;
    let counts = &cluster.hub(0).counts;
    assert_eq!((counts.holder_stall.snapshot().count(), counts.takeover_time.snapshot().count()), (1, 1));
    let pause = counts.holder_stall.snapshot().sum();
    assert!(pause > 0.0 && pause <= began.elapsed().as_secs_f64() + 0.1, "{pause} s");
}

#[tokio::test]
async fn a_process_that_was_away_believes_what_its_client_has_heard_and_not_its_own_end() {
    let cluster = Cluster::new(3, varying(10_000), &Options::default()).await;
    let id = cluster.lost_stream();
    let behind = cluster.plant(1, id, 50);
    cluster.hub(1).recover(behind, Some(LOST)).await;
    let mut listener = cluster.hub(0).resume(id, 0, None).await.unwrap_or_else(|why| panic!("{why:?}"));
    let mut heard = Vec::new();
    assert_eq!(hear(&mut listener, &mut heard, 70).await, None);
    // What it had generated itself when it stood still: all of it, in an attempt that is over.
    let own = cluster.plant(0, id, 60);
    own.copy.append(1, Event { lines: said(60, 1), journal: Bytes::new(), terminal: true });
    assert_eq!(hear(&mut listener, &mut heard, 2000).await, None);
    assert_eq!(heard, joined(50, heard.len() as u64));
    assert!(own.copy.is_closed());
}

#[test]
fn who_knows_where_an_attempt_begins_takes_nothing_from_who_does_not() {
    let copy = |attempt, events, line: &Line| {
        let parts = (had(events, line), line.clone());
        Copy::new(secret::random_id(), Arc::new(order()), Role::Mirror, attempt, parts, 8 << 20)
    };
    let (before, mut begun) = (Line::default(), Line::default());
    begun.begin(2, 3);
    let knows = copy(2, 5, &begun);
    let reader = knows.seat(0, None, None, true).unwrap();
    assert!(
        matches!(knows.read(reader, 1 << 20, None), std::task::Poll::Ready(Ok(read)) if read.events.len() == 5)
    );
    // Who has won the second attempt, and was not told yet where it begins, has more of the first one.
    assert!(knows.knows_more_than(2, &before) && !knows.follow(2, &before));
    assert_eq!((knows.next(), knows.line()), (5, begun.clone()));
    assert!(matches!(knows.read(reader, 1, None), std::task::Poll::Pending), "its reader reads on");
    // The other way round, what was said anew is forgotten.
    let waits = copy(1, 5, &before);
    assert!(waits.expect_attempt(2) && waits.follow(2, &begun));
    assert_eq!(waits.next(), 3);
    // A later attempt counts, wherever it begins.
    assert!(!knows.knows_more_than(3, &before) && knows.follow(3, &begun));
}

struct Deaf;

impl Sink for Deaf {
    fn ready(&self) {}
}

#[test]
fn who_reads_where_a_stream_is_held_moves_when_another_process_begins_to_read() {
    let parts = (had(3, &Line::default()), Line::default());
    let copy = Copy::new(secret::random_id(), Arc::new(order()), Role::Mirror, 1, parts, 8 << 20);
    let here = copy.seat(0, None, None, true).unwrap();
    let passed_on = || copy.seat(0, None, Some(Arc::new(Deaf)), false).unwrap();
    passed_on();
    assert_eq!(copy.clients_here(), 1, "it is held elsewhere");
    copy.begin_attempt(2);
    passed_on();
    assert_eq!(copy.clients_here(), 0);
    assert!(matches!(copy.read(here, 1, None), std::task::Poll::Ready(Err(Stop::Closed))));
}

#[tokio::test]
async fn a_holder_of_an_attempt_that_is_over_does_not_fail_the_stream_that_others_go_on_with() {
    let cluster = Cluster::new(3, varying(10_000), &Options::default()).await;
    let id = cluster.lost_stream();
    let held = cluster.plant(0, id, 50);
    assert!(cluster.hub(0).hold(&held, 2));
    eventually("it generates", || held.copy.next() > 60).await;
    // It hears of a third attempt before the cluster tells it to stop.
    let mut line = held.copy.line();
    line.begin(3, held.copy.next());
    while !held.copy.follow(3, &line) {
        line = held.copy.line();
        line.begin(3, held.copy.next());
    }
    let (_, stop) = held.holding.lock().clone().expect("it generates still");
    stop.cancel();
    eventually("it has stopped", || held.holding.lock().is_none()).await;
    assert!(!held.copy.ended(), "that is not for it to say");
}

#[tokio::test]
async fn who_says_much_at_once_lets_others_have_their_turn() {
    let copy =
        Copy::new(secret::random_id(), Arc::new(order()), Role::Holder, 1, Default::default(), usize::MAX);
    let saying = {
        let copy = Arc::clone(&copy);
        tokio::spawn(async move {
            for _ in 0..1000 {
                copy.room().await;
                let event = Event { lines: vec![b'x'; 16 << 10].into(), ..Event::default() };
                assert!(copy.append(1, event));
            }
        })
    };
    let mut turns = 0;
    while !saying.is_finished() {
        tokio::task::yield_now().await;
        turns += 1;
    }
    assert!(turns >= 200, "{turns} turns while 16 MiB were said");
}

#[tokio::test]
async fn who_read_along_at_one_that_read_along_goes_to_the_holder_when_that_one_dies() {
    let mut cluster = Cluster::new(3, numbers(400), &Options::default()).await;
    let (id, mut listener) = held_by_third(&cluster).await;
    read(&mut listener, 20).await;
    let entry = cluster.hub(1).mirror_from(id, Holder::Replica(ReplicaId(1))).await.unwrap();
    let mut other = cluster.hub(1).listen(entry, true);
    assert!(read(&mut other, 20).await >= 20);
    drop(listener);
    cluster.kill(0);
    assert_eq!(read(&mut other, u64::MAX / 2).await, 400);
    assert_eq!(cluster.world.record(id).unwrap().attempt, 1, "its holder lives");
}

#[tokio::test]
async fn a_holder_whose_last_words_came_too_late_does_not_end_the_stream() {
    let cluster = Cluster::new(3, numbers(400), &Options::default()).await;
    let (id, mut listener) = held_by_third(&cluster).await;
    read(&mut listener, 20).await;
    // As who has won it does before anybody else hears of that.
    cluster.entry(2, id).copy.seal(2);
    let ended = || cluster.engines.untaken.load(Ordering::Relaxed) > 0;
    eventually("its engine has ended", ended).await;
    let early = tokio::time::timeout(Duration::from_millis(200), read(&mut listener, u64::MAX / 2)).await;
    assert!(early.is_err(), "the stream has ended at {}", listener.at());
    let lost = Some(Holder::Replica(ReplicaId(3)));
    cluster.hub(0).recover(cluster.entry(0, id), lost).await;
    assert_eq!(read(&mut listener, u64::MAX / 2).await, 400);
}
