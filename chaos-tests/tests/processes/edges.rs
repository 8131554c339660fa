//! Edges: clients' requests through processes without a part in the cluster, while those and the
//! replicas behind them die.

use std::time::{Duration, Instant};

use chaos_tests::binary::{run, run_ok};
use chaos_tests::client::Http;
use chaos_tests::edges::Edges;
use chaos_tests::fleet::Fleet;
use chaos_tests::load::{Answers, Load};
use chaos_tests::streams::{Broken, Heard, Manner, Question, Said, read};
use rustix::process::Signal;
use serde_json::Value;
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(60);
/// Streams at a time.
const STREAMS: usize = 12;

async fn fleet() -> Fleet {
    Fleet::of(3).engines(2).engine_arg("--decode-step-ms").engine_arg("40").start().await
}

type Read = (usize, Instant, Result<Heard, Broken>);

/// Begins to read all of them.
fn begin(base: &str, tokens: u32, manner: impl Fn(usize) -> Manner) -> JoinSet<Read> {
    let mut set = JoinSet::new();
    for at in 0..STREAMS {
        let (base, question, manner) = (base.to_owned(), Question::whole(at, tokens), manner(at));
        set.spawn(async move {
            let read = read(&base, &question, manner).await;
            (at, Instant::now(), read)
        });
    }
    set
}

/// What they say when nobody is hurt.
async fn unhurt(base: &str, tokens: u32) -> Vec<Said> {
    let mut all = begin(base, tokens, |_| Manner::Plain).join_all().await;
    all.sort_by_key(|(at, ..)| *at);
    all.into_iter().map(|(_, _, read)| read.expect("nobody is hurt").said).collect()
}

/// Checks each against what it should say.
async fn all_equal(reading: JoinSet<Read>, expected: &[Said]) -> Vec<Heard> {
    let mut all = Vec::new();
    for (at, _, read) in reading.join_all().await {
        let heard = read.unwrap_or_else(|broken| panic!("{at}: {broken:#?}"));
        assert_eq!(heard.said.choices, expected[at].choices, "{at}");
        all.push(heard);
    }
    assert_eq!(all.len(), STREAMS);
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_death_of_a_holder_is_a_pause_for_clients_of_edges() {
    let mut fleet = fleet().await;
    let edges = Edges::start(&fleet).await;
    let expected = unhurt(&edges.base, 80).await;
    let answers = Answers::of(&format!("http://{}", fleet.engines[0].address), 24).await;
    // These do not come back: whoever is cut off fails.
    let reading = begin(&edges.base, 80, |_| Manner::Plain);
    // And these are answered by replicas, in one piece or as they are generated.
    let load =
        Load::start(&[edges.edges[0].url(""), edges.edges[1].url("")], 4, &answers, crate::seed(), true);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let leader = fleet.leader().await;
    let victim = fleet.others(&[leader])[0];
    fleet.replicas[victim].kill9();
    let heard = all_equal(reading, &expected).await;
    load.stop().await.assert_all_good(8);
    let seams: u32 = heard.iter().map(|heard| heard.seams).sum();
    let stall = heard.iter().map(|heard| heard.stall).max().expect("streams");
    assert!(seams > 0, "nobody was held by the victim: {heard:#?}");
    assert!(heard.iter().all(|heard| heard.returns == 0 && heard.edges[0].starts_with("edge")));
    assert!(stall < Duration::from_secs(3), "a pause of {stall:?}");
    println!("{seams} streams taken over, longest pause {} ms", stall.as_millis());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_dead_edge_go_on_at_another_and_nothing_is_generated_twice() {
    let fleet = fleet().await;
    let mut edges = Edges::start(&fleet).await;
    let before = fleet.generated().await;
    let expected = unhurt(&edges.base, 80).await;
    let needed = fleet.generated().await - before;
    assert_eq!(needed, 80 * STREAMS as u64);

    let reading = begin(&edges.base, 80, |at| if at % 3 == 0 { Manner::Repost } else { Manner::Get });
    tokio::time::sleep(Duration::from_millis(1500)).await;
    edges.edges[0].signal(Signal::KILL);
    let heard = all_equal(reading, &expected).await;
    let returned = heard.iter().filter(|heard| heard.returns > 0).count();
    assert!(returned > 0 && returned < STREAMS, "{returned} of {STREAMS} were at one of two edges");
    for heard in heard.iter().filter(|heard| heard.returns > 0) {
        assert_eq!(heard.edges.last().map(String::as_str), Some("edge2"), "{heard:#?}");
        assert_eq!(heard.seams, 0, "its holder did not die");
    }
    assert_eq!(fleet.generated().await - before, 2 * needed, "not a token more");
    println!("{returned} streams read on at another edge");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_is_told_to_stop_lets_its_clients_go_or_finish() {
    let fleet = fleet().await;
    let mut edges = Edges::start(&fleet).await;
    let expected = unhurt(&edges.base, 60).await;
    let reading = begin(&edges.base, 60, |at| if at % 2 == 0 { Manner::Plain } else { Manner::Get });
    tokio::time::sleep(Duration::from_millis(1000)).await;
    edges.edges[0].signal(Signal::TERM);
    let heard = all_equal(reading, &expected).await;
    assert!(heard.iter().any(|heard| heard.returns > 0), "nobody was let go");
    let status = tokio::task::block_in_place(|| edges.edges[0].wait(LIMIT));
    assert!(status.success(), "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_streams_run_on_and_take_overs_wait() {
    let mut fleet = fleet().await;
    let edges = Edges::start(&fleet).await;
    let expected = unhurt(&edges.base, 120).await;
    // Who waits for a quorum hears signs of life only, and may lose patience and ask again.
    let mut reading = begin(&edges.base, 120, |_| Manner::Get);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    // One edge lists what clients of both read.
    let url = edges.edges[0].url("/v1/streams?limit=100");
    let list: Value = Http::fresh().get(&url, LIMIT).await.expect("a list").json().expect("a list");
    let running = list["data"].as_array().expect("a list").iter().filter(|one| one["state"] == "running");
    let holders: Vec<(String, String)> = running
        .map(|one| ["id", "holder"].map(|name| one[name].as_str().expect("text").to_owned()).into())
        .collect();
    assert_eq!(holders.len(), STREAMS, "{list:#}");
    let leader = fleet.leader().await;
    let survivor = fleet.others(&[leader])[0];
    let name = fleet.replicas[survivor].name.clone();
    let spared = holders.iter().filter(|(_, holder)| *holder == name).count();
    assert!(spared > 0, "{holders:?}");
    let dead = fleet.others(&[survivor]);
    dead.iter().for_each(|at| fleet.replicas[*at].kill9_at_once());
    dead.iter().for_each(|at| fleet.replicas[*at].kill9());

    let mut first = Vec::new();
    while first.len() < spared {
        let (at, _, read) = reading.join_next().await.expect("more of them").expect("clients do not panic");
        let heard = read.unwrap_or_else(|broken| panic!("{at}: {broken:#?}"));
        let holder = holders.iter().find(|(id, _)| *id == heard.id).map(|(_, holder)| holder);
        assert_eq!(holder, Some(&name), "only those can end by now");
        assert_eq!((heard.seams, heard.returns), (0, 0));
        assert_eq!(heard.said.choices, expected[at].choices);
        first.push(at);
    }
    // A new one begins, too, unlisted.
    let fresh = read(&edges.base, &Question::whole(0, 20), Manner::Plain).await;
    assert_eq!(fresh.map(|heard| heard.events > 20).ok(), Some(true));
    dead.iter().for_each(|at| fleet.replicas[*at].start());
    for (at, _, read) in reading.join_all().await {
        let heard = read.unwrap_or_else(|broken| panic!("{at}: {broken:#?}"));
        assert_eq!(heard.said.choices, expected[at].choices, "{at}");
        assert!(heard.seams + heard.returns > 0, "its holder died");
    }
    println!("{spared} of {STREAMS} streams ended without a quorum, the others with the next one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_an_edge_what_it_does_not_know_hears_whom_to_ask() {
    let fleet = fleet().await;
    let edges = Edges::start(&fleet).await;
    let edge = &edges.edges[0];
    let server = format!("http://{}", edge.admin);
    for command in [["stream", "list"], ["worker", "list"]] {
        let output = run(&[command[0], command[1], "--server", &server]).await;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains("this is an edge, for clients only"), "{text}");
        // As it says.
        let named = text.split("--server ").nth(1).and_then(|rest| rest.split_whitespace().next());
        let named = named.unwrap_or_else(|| panic!("{text}"));
        run_ok(&[command[0], command[1], "--server", named]).await;
    }
    let reply = Http::fresh().get(&edge.url("/v1/nodes"), LIMIT).await.expect("an answer");
    let text = reply.text();
    assert!(reply.status == 404 && text.contains("ask a replica") && !text.contains("--server"), "{text}");
}
