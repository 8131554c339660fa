//! Corrections: when they are made, how large they are, and when they end.

use bytes::Bytes;
use serde_json::json;

use super::*;
use crate::routing::book::{Booking, Share};
use crate::serve::feeds::Feeds;
use crate::serve::testing::{Alone, Scripted, eventually};
use crate::state::worker::{Liveness, WorkerRecord, WorkerSource, WorkerSpec};
use crate::zmtp::{Endpoint, Publisher};

fn load(requests: i64, decode_blocks: i64) -> LoadSum {
    LoadSum { requests, decode_blocks, prefill_tokens: 0 }
}

/// What is in force after each look, and how often something was told.
fn after(looks: &[(i64, i64)], booked: LoadSum) -> (Vec<LoadSum>, usize) {
    let (mut state, mut now, mut told) = (Looks::default(), Correction::default(), 0);
    let each = looks.iter().map(|(requests, blocks)| {
        let said = Said { requests: *requests, blocks: Some(*blocks) };
        if let Some(extra) = state.note(difference(said, booked, LoadSum::default()), &[], &now) {
            told += 1;
            now = extra;
        }
        assert!(now.ranks.is_empty());
        now.whole
    });
    (each.collect(), told)
}

#[test]
fn more_counts_when_it_was_there_three_times_and_no_longer_than_it_is() {
    let none = LoadSum::default();
    let (each, told) = after(&[(9, 50), (12, 60), (9, 70), (9, 70), (1, 5), (9, 50)], load(1, 5));
    assert_eq!(each, [none, none, load(8, 45), load(8, 55), none, none]);
    assert_eq!(told, 3);
    let (each, _) = after(&[(9, 5), (1, 5), (9, 5), (9, 5), (1, 5)], load(1, 5));
    assert!(each.iter().all(LoadSum::is_zero), "a peak is none");
}

#[test]
fn less_counts_when_it_was_there_five_times_and_no_longer_than_it_is() {
    let none = LoadSum::default();
    let looks = [(1, 5), (0, 0), (2, 9), (1, 5), (1, 5), (1, 5), (10, 50), (1, 5)];
    let (each, told) = after(&looks, load(10, 50));
    assert_eq!(each[..4], [none; 4]);
    assert_eq!(each[4..6], [load(-8, -40); 2], "the least of what was missing");
    assert_eq!(each[6..], [none; 2], "requests that are there again count again at once");
    assert_eq!(told, 2);
    let (each, _) = after(&[(1, 5), (1, 5), (1, 5), (1, 5), (9, 45), (1, 5)], load(10, 50));
    assert!(each.iter().all(LoadSum::is_zero), "requests that were on their way for a while");
}

#[test]
fn little_more_or_less_is_nothing_and_small_changes_are_not_told() {
    for said in [(3, 7), (1, 5), (1, 0)] {
        assert_eq!(after(&[said; 9], load(1, 5)).1, 0, "{said:?}");
    }
    assert_eq!(after(&[(119, 0); 9], load(100, 0)).1, 0);
    assert_eq!(after(&[(68, 0); 9], load(100, 0)).1, 0, "a third may be on its way");
    assert_eq!(after(&[(40, 0), (41, 0), (40, 0), (42, 0), (43, 0), (42, 0)], load(0, 0)).1, 1);
    assert_eq!(after(&[(40, 0), (41, 0), (40, 0), (42, 0), (43, 0), (40, 0), (41, 0)], load(100, 0)).1, 1);
}

#[test]
fn an_engine_with_nothing_to_do_is_believed_however_little_is_booked() {
    let (each, told) = after(&[(0, 0); 7], load(1, 5));
    assert_eq!((each[3], each[4], told), (LoadSum::default(), load(-1, -5), 1));
}

#[test]
fn what_is_missing_is_like_the_rest_but_for_what_the_engine_uses_and_what_certainly_runs() {
    let booked = LoadSum { requests: 10, prefill_tokens: 5000, decode_blocks: 400 };
    let said = |requests, blocks| Said { requests, blocks };
    let none = LoadSum::default();
    let of = |requests, prefill_tokens, decode_blocks| LoadSum { requests, prefill_tokens, decode_blocks };
    assert_eq!(difference(said(4, Some(10)), booked, none), of(-6, -3000, -240));
    assert_eq!(difference(said(4, None), booked, none), of(-6, -3000, -240));
    assert_eq!(difference(said(4, Some(300)), booked, none), of(-6, -3000, -100), "they are in use");
    assert_eq!(difference(said(4, Some(900)), booked, none), of(-6, -3000, 0));
    // Blocks that are booked for requests that wait are free in the engine.
    assert_eq!(difference(said(10, Some(10)), booked, none), none);
    let certain = of(5, 4000, 390);
    assert_eq!(difference(said(0, Some(0)), booked, certain), of(-5, -1000, -10));
    assert_eq!(difference(said(0, Some(0)), booked, booked), none, "all of them certainly run");
    assert_eq!(difference(said(0, Some(0)), none, none), none);
}

#[test]
fn the_load_of_published_ranks_is_summed_if_all_of_them_say_it() {
    let spec = WorkerSpec {
        id: crate::ids::WorkerId("w".into()),
        url: "http://127.0.0.1:9".to_owned(),
        engine: Default::default(),
        models: Vec::new(),
        role: Default::default(),
        transfer: Default::default(),
        dp_ranks: 2,
        block_size: None,
        capacity_blocks: Some(200),
        labels: Default::default(),
        weight: 100,
        http2: false,
        max_requests: None,
        owner: None,
        source: WorkerSource::Admin,
    };
    let record = WorkerRecord {
        spec,
        ix: WorkerIx(4),
        drain: false,
        online: true,
        liveness: Liveness::Probe,
        last_heard_ms: 0,
        generation: 1,
        failed_by: Default::default(),
    };
    let worker = WorkerView { record, live: Arc::default() };
    let key = |rank| RankKey { worker: WorkerIx(4), rank };
    let stat = |running, waiting, tokens| LoadStat {
        running,
        waiting,
        tokens,
        max_tokens: 1000,
        rank: None,
        waiting_uncached_tokens: None,
    };
    let mut ranks = HashMap::from([(key(0), stat(3, 1, 500))]);
    assert_eq!(published(&ranks, &worker), None);
    ranks.insert(key(1), stat(2, 0, 250));
    let sum = published(&ranks, &worker).unwrap();
    assert_eq!(sum.whole, RankLoad { requests: 6, kv_usage: Some(0.75) });
    assert_eq!(said(&sum.whole, &worker), Said { requests: 6, blocks: Some(75) }, "of 100 blocks a rank");
    worker.live.set_peers([(0, load(4, 50)), (1, load(9, 90))].into_iter());
    let (whole, by_rank) = differences(&sum, &worker);
    assert_eq!((whole, by_rank), (load(-7, -65), vec![load(0, 0), load(-7, -65)]));
}

#[test]
fn ranks_are_judged_each_by_itself_and_the_worker_beside_them() {
    let (mut looks, mut now) = (Looks::default(), Correction::default());
    let mut note = |whole, ranks: &[LoadSum]| {
        let told = looks.note(whole, ranks, &now);
        now = told.clone().unwrap_or(std::mem::take(&mut now));
        (told.is_some(), now.clone())
    };
    let (none, lost) = (load(0, 0), load(-5, -20));
    // Requests that went to another rank than they are booked on.
    for _ in 1..MORE_IN_A_ROW {
        assert_eq!(note(none, &[lost, none, load(6, 20)]), (false, Correction::default()));
    }
    let more = Correction { whole: none, ranks: vec![(2, load(5, 20))] };
    assert_eq!(note(none, &[lost, none, load(5, 20)]), (true, more.clone()), "the least of them");
    assert_eq!(note(none, &[lost, none, load(6, 20)]), (false, more));
    let both = Correction { whole: none, ranks: vec![(0, lost), (2, load(5, 20))] };
    assert_eq!(note(none, &[lost, none, load(5, 20)]), (true, both.clone()));
    // It is over on one of them.
    let less = Correction { whole: none, ranks: vec![(0, lost)] };
    assert_eq!(note(none, &[lost, none, none]), (true, less.clone()));
    assert_eq!(note(none, &[lost, none, none]), (false, less));
    // They are not told apart any more: what was said of one counts no more.
    assert_eq!(note(none, &[]), (true, Correction::default()));
    assert_eq!(note(none, &[lost]), (false, Correction::default()), "nor again at once");
}

#[test]
fn a_correction_that_another_replica_made_is_taken_back_at_once_when_it_is_not_true() {
    for sign in [1, -1] {
        let (eight, none) = (load(8 * sign, 0), load(0, 0));
        let in_force = Correction { whole: eight, ranks: vec![(1, eight)] };
        let look = |one| Looks::default().note(one, &[none, one], &in_force);
        assert_eq!(look(eight), None, "one look confirms it");
        assert_eq!(look(none), Some(Correction::default()));
        assert_eq!(look(load(-9 * sign, 0)), Some(Correction::default()), "nor the other way round");
        let elsewhere = Looks::default().note(eight, &[eight, none], &in_force);
        assert_eq!(elsewhere, Some(Correction::of_whole(eight)), "on this rank it is the first look");
    }
}

/// So many requests of which nothing is heard any more.
fn book(alone: &Alone, worker: &Arc<WorkerView>, requests: usize) -> Vec<Booking> {
    (0..requests).map(|_| alone.plane.bookings().book(Arc::clone(worker), 1000, 50)).collect()
}

/// Looks often.
fn look(alone: &Alone, sockets: LoadBoard) {
    let loads = Loads::new(alone.shard(), Arc::clone(&alone.plane), Duration::from_millis(10), sockets);
    tokio::spawn(loads.run(alone.stop.clone()));
}

#[tokio::test]
async fn bookings_of_requests_that_an_engine_does_not_have_count_no_more_until_it_has_them() {
    let (alone, engine) = (Alone::start().await, Scripted::start().await);
    engine.runs(2);
    let worker = alone.add("w", engine.address, EngineKind::Vllm).await;
    let mut bookings = book(&alone, &worker, 10);
    look(&alone, LoadBoard::default());
    let live = Arc::clone(&worker.live);
    let all = LoadSum { requests: 10, prefill_tokens: 10_000, decode_blocks: 500 };
    assert_eq!(live.load(), all);
    let fifth = LoadSum { requests: 2, prefill_tokens: 2000, decode_blocks: 100 };
    eventually("the missing ones taken off", || live.load() == fifth).await;
    let asked = engine.asked("/metrics");
    assert!(asked >= LESS_IN_A_ROW, "after {asked} looks");
    assert_eq!(live.booked(), all, "they stay booked");
    // Of these something is heard, whatever the engine says.
    eventually("what certainly runs counts", || {
        bookings[..6].iter_mut().for_each(Booking::heard);
        live.load().requests >= 6
    })
    .await;
    // The engine has them.
    engine.runs(10);
    eventually("all of them again", || live.foreign.get().is_zero() && live.load() == all).await;
    engine.runs(0);
    eventually("an idle engine", || live.load().is_zero()).await;
    bookings.clear();
    eventually("nothing left to take off", || live.foreign.get().is_zero()).await;
    assert!(live.load().is_zero());
}

#[tokio::test]
async fn a_rank_whose_engine_has_less_counts_less_and_the_rank_beside_it_as_before() {
    let (alone, engine) = (Alone::start().await, Scripted::start().await);
    let runs = |ranks: [u32; 2]| {
        let line = |rank: usize| format!("vllm:num_requests_running{{engine=\"{rank}\"}} {}\n", ranks[rank]);
        engine.says("/metrics", line(0) + &line(1));
    };
    runs([6, 0]);
    let worker = alone.add_ranks("w", engine.address, EngineKind::Vllm, 2).await;
    let share = |rank| Share { rank, prefill_tokens: 1000, decode_blocks: 50, chain: None };
    let book = |rank| alone.plane.bookings().book_share(Arc::clone(&worker), share(rank));
    let held: Vec<Booking> = [0, 1].into_iter().flat_map(|rank| [rank; 6]).map(book).collect();
    let six = LoadSum { requests: 6, prefill_tokens: 6000, decode_blocks: 300 };
    let seen = || [0, 1].map(|rank| worker.rank_load(rank, true));
    assert_eq!(seen(), [six; 2]);
    look(&alone, LoadBoard::default());
    eventually("the idle rank's taken off", || seen() == [six, LoadSum::default()]).await;
    assert_eq!(worker.live.load(), six);
    assert_eq!([0, 1].map(|rank| worker.rank_booked(rank, true)), [six; 2], "they stay booked");
    // Another router sends to it.
    runs([6, 26]);
    let more = LoadSum { requests: 26, ..six };
    eventually("what is there beyond the booked ones", || seen() == [six, more]).await;
    assert_eq!(worker.live.correction().ranks, [(1, load(20, 0))]);
    runs([6, 6]);
    eventually("taken back", || worker.live.correction().is_zero()).await;
    assert_eq!(seen(), [six; 2]);
    drop(held);
}

#[tokio::test]
async fn an_sglang_without_metrics_is_asked_for_its_loads() {
    let (alone, engine) = (Alone::start().await, Scripted::start().await);
    let loads = |requests: [u64; 2]| {
        let of = |rank: usize| json!({"dp_rank": rank, "num_running_reqs": requests[rank]});
        engine.says("/v1/loads?include=core", json!({"loads": [of(0), of(1)]}).to_string());
    };
    loads([0, 7]);
    let worker = alone.add_ranks("w", engine.address, EngineKind::Sglang, 2).await;
    look(&alone, LoadBoard::default());
    let seven = Correction { whole: load(7, 0), ranks: vec![(1, load(7, 0))] };
    eventually("seven requests that nobody booked", || worker.live.correction() == seven).await;
    assert!(engine.asked("/metrics") >= MORE_IN_A_ROW, "it might have them by now");
    loads([0, 0]);
    eventually("taken back", || worker.live.correction().is_zero()).await;
    // Another engine has no such route, and is not asked for it.
    let vllm = Scripted::start().await;
    alone.add("v", vllm.address, EngineKind::Vllm).await;
    eventually("looked at", || vllm.asked("/metrics") > MORE_IN_A_ROW).await;
    assert_eq!(vllm.asked("/v1/loads?include=core"), 0);
}

#[tokio::test]
async fn what_ranks_publish_of_their_load_gets_from_their_socket_into_the_view() {
    let (alone, engine) = (Alone::start().await, Scripted::start().await);
    let bind = async || Publisher::bind(&Endpoint::parse("tcp://127.0.0.1:0").unwrap(), 16).await.unwrap();
    let (events, loads) = (bind().await, bind().await);
    let port = |publisher: &Publisher| match publisher.endpoint() {
        Endpoint::Tcp { port, .. } => *port,
        other => panic!("{other}"),
    };
    let info = json!({"kv_events": {
        "publisher": "zmq", "endpoint_host": "*", "endpoint_port_base": port(&events), "dp_size": 1,
        "block_size": 16, "load_endpoint_port_base": port(&loads), "load_topic": "load",
    }});
    engine.says("/server_info", info.to_string());
    let worker = alone.add("w", engine.address, EngineKind::Sglang).await;
    let feeds = Feeds::new(alone.shard(), Arc::clone(&alone.plane), Arc::clone(&alone.front.config.allow));
    let board = feeds.loads();
    tokio::spawn(feeds.run(alone.stop.clone()));
    // As recorded from SGLang: 3 run, 1 waits, 4096 of 100,000 tokens are in use.
    const GOLDEN: &str = "9ba84c6f6164537461740301cd1000ce000186a000cd0200cd1770cd0100ce0001e240ce000c0a08";
    let byte = |at: usize| u8::from_str_radix(&GOLDEN[at..at + 2], 16).unwrap();
    let recorded: Vec<u8> = (0..GOLDEN.len()).step_by(2).map(byte).collect();
    let mut number = 0_u64;
    let mut publish = |payload: &[u8]| {
        let head = [Bytes::from_static(b"load"), Bytes::copy_from_slice(&number.to_be_bytes())];
        loads.send(head.into_iter().chain([Bytes::copy_from_slice(payload)]).collect());
        number += 1;
    };
    let key = RankKey { worker: worker.record.ix, rank: 0 };
    let said = |board: &LoadBoard| board.lock().get(&key).map(|stat| (stat.running, stat.waiting));
    let waiting = async {
        while said(&board) != Some((3, 1)) {
            // Nobody is told what was said before they came.
            publish(&recorded);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("the load on the board");
    look(&alone, Arc::clone(&board));
    let live = Arc::clone(&worker.live);
    // 4.096 % of its 1000 blocks.
    eventually("four requests that nobody booked", || live.load() == load(4, 40)).await;
    assert_eq!(engine.asked("/metrics"), 0, "an engine that publishes is not asked");
    // It goes away: what it said is true no more, and it is asked again.
    drop(loads);
    engine.runs(0);
    eventually("taken back", || live.load().is_zero()).await;
    assert!(said(&board).is_none() && engine.asked("/metrics") > 0);
}
