//! Edges, replicas and agents: each tier dies on its own, and clients of edges do not notice.

use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::edges::Edges;
use chaos_tests::fleet::{Fleet, MODEL, ready};
use chaos_tests::streams::{Broken, Heard, Manner, Question, Said, read};
use chaos_tests::wait::{check, until};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(60);
/// Streams at a time.
const STREAMS: usize = 8;
/// Tokens of each.
const TOKENS: u32 = 320;
/// Milliseconds of each token while nobody is hurt, and then: so long that all replicas can die and come
/// back meanwhile, on a machine that has other work.
const QUICK: &str = "4";
const SLOW: &str = "75";

pub fn builder() -> chaos_tests::fleet::Builder {
    Fleet::of(3).engines(2).agents().engine_arg("--decode-step-ms").engine_arg(QUICK)
}

type Reading = JoinSet<(usize, Result<Heard, Broken>)>;

fn begin(base: &str, manner: Manner) -> Reading {
    let mut set = JoinSet::new();
    for at in 0..STREAMS {
        let (base, question) = (base.to_owned(), Question::whole(at, TOKENS));
        set.spawn(async move { (at, read(&base, &question, manner).await) });
    }
    set
}

async fn all(reading: Reading) -> Vec<Heard> {
    let mut all = reading.join_all().await;
    all.sort_by_key(|(at, _)| *at);
    let broken: Vec<String> =
        all.iter().filter_map(|(at, read)| Some((at, read.as_ref().err()?))).map(told).collect();
    assert!(broken.is_empty(), "{} of {STREAMS} broken:\n{}", broken.len(), broken.join("\n"));
    all.into_iter().filter_map(|(_, read)| read.ok()).collect()
}

fn told((at, Broken { why, heard, .. }): (&usize, &Broken)) -> String {
    let Heard { id, events, returns, seams, stall, edges, worker, .. } = &**heard;
    format!(
        "{at} {id}: {why}, after {events} events of {worker:?} at {edges:?}, {returns} returns, {seams} seams, {stall:?}"
    )
}

/// What they say when nobody is hurt, and how many tokens that takes. Engines are slow from then on.
async fn unhurt(fleet: &mut Fleet, base: &str) -> (Vec<Said>, u64) {
    let before = fleet.generated().await;
    let said = all(begin(base, Manner::Plain)).await.into_iter().map(|heard| heard.said).collect();
    let tokens = fleet.generated().await - before;
    slow_down(fleet).await;
    (said, tokens)
}

/// Starts the engines again, as slow ones.
async fn slow_down(fleet: &mut Fleet) {
    for engine in &mut fleet.engines {
        engine.kill9();
        engine.set_arg("--decode-step-ms", SLOW);
        engine.start();
    }
    for engine in &fleet.engines {
        let url = format!("http://{}/health", engine.address);
        until("the engine is back", LIMIT, async || {
            let reply = Http::fresh().get(&url, LIMIT).await?;
            check(reply.status == 200, || reply.text())
        })
        .await;
    }
    all_ready(fleet).await;
}

fn assert_same(heard: &[Heard], expected: &[Said]) {
    assert_eq!(heard.len(), expected.len());
    for (at, heard) in heard.iter().enumerate() {
        assert_eq!(heard.said.choices, expected[at].choices, "{at}");
    }
}

/// Waits until so many tokens were generated since.
async fn generated_since(fleet: &Fleet, before: u64, tokens: u64) {
    until("streams run", LIMIT, async || {
        let now = fleet.generated().await - before;
        check(now >= tokens, || format!("{now} of {tokens} tokens"))
    })
    .await;
}

/// Waits until every replica's view has these many requests on all engines, and blocks for them.
async fn loads_are(fleet: &Fleet, requests: i64) {
    until(&format!("loads of {requests} requests everywhere"), LIMIT, async || {
        for replica in &fleet.replicas {
            let workers = replica.local_workers().await?;
            let sum: i64 = workers.iter().map(|worker| worker.requests).sum();
            let blocks: i64 = workers.iter().map(|worker| worker.decode_blocks).sum();
            let good = sum == requests && (blocks > requests || requests == 0 && blocks == 0);
            check(good, || format!("{}: {sum} requests, {blocks} blocks", replica.name))?;
        }
        Ok(())
    })
    .await;
}

/// Kills all replicas at once and starts them again after a while.
async fn kill_all(fleet: &mut Fleet, away: Duration) {
    fleet.replicas.iter_mut().for_each(|replica| replica.kill9_at_once());
    fleet.replicas.iter_mut().for_each(|replica| replica.kill9());
    tokio::time::sleep(away).await;
    fleet.replicas.iter_mut().for_each(|replica| replica.start());
}

/// Waits until all replicas serve, and know all engines.
async fn all_ready(fleet: &Fleet) {
    for replica in &fleet.replicas {
        ready(replica, LIMIT).await;
        until("all engines are online", LIMIT, async || {
            let online = replica.local_workers().await?.iter().filter(|worker| worker.online).count();
            check(online == fleet.engines.len(), || format!("{online} online"))
        })
        .await;
    }
}

/// The holders of running streams, as an edge lists them.
async fn holders(edges: &Edges, running: usize) -> Vec<String> {
    let list = until("the streams are listed", LIMIT, async || {
        let url = edges.edges[0].url("/v1/streams?limit=100");
        let list: Value = Http::fresh().get(&url, LIMIT).await?.json()?;
        let data = list["data"].as_array().ok_or("no list")?;
        let holders = data.iter().filter(|one| one["state"] == "running").map(|one| one["holder"].clone());
        let holders: Vec<Value> = holders.collect();
        check(holders.len() == running, || format!("{} streams", holders.len()))?;
        Ok(holders)
    });
    list.await.0.iter().map(|holder| holder.as_str().unwrap_or_default().to_owned()).collect()
}

pub async fn clients_of_edges_outlive_all_replicas(mut fleet: Fleet) {
    let edges = Edges::start(&fleet).await;
    let (expected, tokens) = unhurt(&mut fleet, &edges.base).await;
    loads_are(&fleet, 0).await;

    let before = fleet.generated().await;
    // These do not come back: whoever is cut off fails.
    let reading = begin(&edges.base, Manner::Plain);
    generated_since(&fleet, before, tokens / 16).await;
    let holders = holders(&edges, STREAMS).await;
    assert!(holders.iter().all(|holder| holder.starts_with("agent of e")), "{holders:?}");
    loads_are(&fleet, STREAMS as i64).await;
    kill_all(&mut fleet, Duration::from_millis(1500)).await;
    all_ready(&fleet).await;
    // Nobody who had booked them lives, and they still run.
    loads_are(&fleet, STREAMS as i64).await;
    assert!(fleet.generated().await - before < tokens, "they ran until then");
    let heard = all(reading).await;
    assert_same(&heard, &expected);
    for heard in &heard {
        assert_eq!((heard.seams, heard.returns), (0, 0), "{}: nobody had to do anything", heard.id);
    }
    assert_eq!(fleet.generated().await - before, tokens, "not a token more");
    let stall = heard.iter().map(|heard| heard.stall).max().expect("streams");
    println!("longest pause {} ms", stall.as_millis());
    assert!(stall < Duration::from_secs(2), "a pause of {stall:?}");
    loads_are(&fleet, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_replicas_killed_at_once_are_nothing_to_clients_of_edges_whose_streams_agents_hold() {
    clients_of_edges_outlive_all_replicas(builder().start().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_dies_costs_no_token_and_no_view_of_what_its_streams_take() {
    let mut fleet = builder().start().await;
    let mut edges = Edges::start(&fleet).await;
    // What the replica that chose a place knew is told at the edge.
    let asking = json!({"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2, "stream": true});
    let url = format!("{}/v1/completions", edges.base);
    let reply = Http::fresh().post_with(&url, &[("everline-trace", "1")], &asking).await.expect("an answer");
    let trace: Value = serde_json::from_str(reply.headers["everline-trace"].to_str().unwrap()).unwrap();
    assert_eq!(trace["chosen"]["worker"], reply.headers["everline-worker"].to_str().unwrap(), "{trace}");
    let (expected, tokens) = unhurt(&mut fleet, &edges.base).await;
    let before = fleet.generated().await;
    let reading = begin(&edges.base, Manner::Get);
    generated_since(&fleet, before, tokens / 16).await;
    let killed = Instant::now();
    edges.edges[0].signal(Signal::KILL);
    // Its bookings went with it; the agents say what still runs.
    tokio::time::sleep(Duration::from_millis(500)).await;
    loads_are(&fleet, STREAMS as i64).await;
    println!("booked again after {} ms at most", killed.elapsed().as_millis());
    // The replica that hears the agents goes, too.
    let leader = fleet.leader().await;
    fleet.replicas[leader].kill9();
    fleet.replicas[leader].start();
    all_ready(&fleet).await;
    loads_are(&fleet, STREAMS as i64).await;
    let heard = all(reading).await;
    assert_same(&heard, &expected);
    let returned = heard.iter().filter(|heard| heard.returns > 0).count();
    assert!(returned > 0 && returned < STREAMS, "{returned} of {STREAMS} were at one of two edges");
    assert_eq!(heard.iter().map(|heard| heard.seams).sum::<u32>(), 0, "their holders did not die");
    assert_eq!(fleet.generated().await - before, tokens, "not a token more");
    loads_are(&fleet, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_dies_is_a_pause_for_clients_of_edges() {
    let mut fleet = builder().start().await;
    let edges = Edges::start(&fleet).await;
    let (expected, tokens) = unhurt(&mut fleet, &edges.base).await;
    let before = fleet.generated().await;
    let reading = begin(&edges.base, Manner::Plain);
    generated_since(&fleet, before, tokens / 16).await;
    let of: Vec<String> = holders(&edges, STREAMS).await;
    let victim = fleet.engines.iter().position(|engine| of[0].ends_with(&engine.id)).expect("an engine");
    let hit = of.iter().filter(|holder| **holder == of[0]).count();
    if let Some(agent) = &mut fleet.engines[victim].agent {
        agent.kill9();
    }
    let heard = all(reading).await;
    assert_same(&heard, &expected);
    let seams = heard.iter().filter(|heard| heard.seams > 0).count();
    assert_eq!(seams, hit, "those that it held, and no others");
    assert!(heard.iter().all(|heard| heard.returns == 0));
    loads_are(&fleet, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_stream_that_nobody_came_back_for_is_known_to_replicas_that_come_back() {
    let mut fleet = builder().start().await;
    slow_down(&mut fleet).await;
    let question = Question::whole(0, TOKENS);
    let url = fleet.replicas[0].http_url(question.path);
    let headers = [("everline-resume", "1"), ("everline-orphan", "1")];
    let client = tokio::spawn(async move { Http::fresh().post_with(&url, &headers, &question.body).await });
    let states = async |replica: &chaos_tests::endpoint::Endpoint| -> Result<Vec<Value>, String> {
        let list: Value = Http::fresh().get(&replica.http_url("/v1/streams"), LIMIT).await?.json()?;
        let data = list["data"].as_array().ok_or("no list")?;
        Ok(data.iter().map(|one| one["state"].clone()).collect())
    };
    until("the stream is listed", LIMIT, async || {
        let states = states(&fleet.replicas[1]).await?;
        check(states == ["running"], || format!("{states:?}"))
    })
    .await;
    kill_all(&mut fleet, Duration::ZERO).await;
    assert!(client.await.expect("it does not panic").is_err(), "cut off");
    all_ready(&fleet).await;
    for replica in &fleet.replicas {
        until("its end is known", LIMIT, async || {
            let states = states(replica).await?;
            check(states == ["cancelled"], || format!("{states:?}"))
        })
        .await;
    }
    loads_are(&fleet, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_agents_generate_is_in_the_views_of_replicas_that_come_back() {
    let mut fleet = builder().start().await;
    let base = format!("http://{}", fleet.balancer);
    let (expected, tokens) = unhurt(&mut fleet, &base).await;
    let before = fleet.generated().await;
    let reading = begin(&base, Manner::Get);
    generated_since(&fleet, before, tokens / 16).await;
    loads_are(&fleet, STREAMS as i64).await;
    kill_all(&mut fleet, Duration::ZERO).await;
    all_ready(&fleet).await;
    loads_are(&fleet, STREAMS as i64).await;
    assert!(fleet.generated().await - before < tokens, "they ran until then");
    assert_same(&all(reading).await, &expected);
    assert_eq!(fleet.generated().await - before, tokens, "not a token more");
    loads_are(&fleet, 0).await;
}
