//! What the death of a replica costs in tokens that engines compute once more: of an edge nothing, of a
//! holder the unfinished block of each of its streams.

use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::streams::{Heard, Manner, Question, read};
use chaos_tests::wait::{check, until};
use serde_json::json;
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(60);
/// Streams at a time.
const STREAMS: usize = 12;
/// Tokens of each: six seconds.
const TOKENS: u32 = 150;
/// Between two tokens, milliseconds.
const STEP: &str = "40";
/// Tokens of a block of an engine's cache.
const BLOCK: u64 = 16;

/// Texts whose prompts have nothing in common, and are several blocks long.
fn questions() -> Vec<Question> {
    let question = |at| {
        let mut question = Question::whole(at, TOKENS);
        let prompt = format!("{at}: {}", "the stars that nobody has counted yet ".repeat(20));
        match question.body.get("prompt") {
            Some(_) => question.body["prompt"] = json!(prompt),
            None => question.body["messages"] = json!([{"role": "user", "content": prompt}]),
        }
        question
    };
    (0..STREAMS).map(question).collect()
}

/// Sum of a counter over all engines.
async fn counted(fleet: &Fleet, name: &str) -> u64 {
    let mut sum = 0.0;
    for engine in &fleet.engines {
        let url = format!("http://{}/metrics", engine.address);
        let page = Http::fresh().get(&url, LIMIT).await.expect("an engine that runs").text();
        let lines = page.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        let numbers: Vec<f64> = lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        assert!(!numbers.is_empty(), "no {name}");
        sum += numbers.iter().sum::<f64>();
    }
    sum as u64
}

/// Tokens whose keys and values engines have computed for prompts, and so not found in their caches.
async fn prefilled(fleet: &Fleet) -> u64 {
    let asked = counted(fleet, "vllm:prefix_cache_queries_total").await;
    asked - counted(fleet, "vllm:prefix_cache_hits_total").await
}

/// Streams of clients of the first replica, each well on its way: what was generated before they began,
/// what their prompts took, and their clients.
async fn running(fleet: &Fleet) -> (u64, u64, JoinSet<(usize, Heard)>) {
    let base = fleet.replicas[0].http_url("");
    let generated = fleet.generated().await;
    let mut streams = JoinSet::new();
    for (at, question) in questions().into_iter().enumerate() {
        let base = base.clone();
        streams.spawn(async move {
            let heard = read(&base, &question, Manner::Get).await;
            (at, heard.unwrap_or_else(|broken| panic!("{at}: {broken:?}")))
        });
    }
    // Engines take turns in lockstep: so all of them have begun.
    until("streams run", LIMIT, async || {
        let tokens = fleet.generated().await - generated;
        check(tokens >= STREAMS as u64 * 30, || format!("{tokens} tokens"))
    })
    .await;
    (generated, prefilled(fleet).await, streams)
}

/// How many streams a replica holds.
async fn held(fleet: &Fleet, replica: usize) -> u64 {
    let page = Http::fresh().get(&fleet.replicas[replica].admin_url("/metrics"), LIMIT).await;
    let page = page.expect("a replica that runs").text();
    let line = page.lines().find(|line| line.starts_with(r#"everline_stream_active{role="holder"}"#));
    line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).unwrap_or_default() as u64
}

async fn fleet() -> Fleet {
    Fleet::of(3).engines(2).engine_arg("--decode-step-ms").engine_arg(STEP).start().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_death_of_an_edge_costs_no_token() {
    let mut fleet = fleet().await;
    let (generated, prefill, mut streams) = running(&fleet).await;
    assert!(prefill >= STREAMS as u64 * 5 * BLOCK, "prompts of {prefill} tokens in all");
    assert_eq!(held(&fleet, 0).await, 0, "clients are at one replica and their streams at others");
    fleet.replicas[0].kill9();
    fleet.replicas[0].start();
    let mut returns = 0;
    while let Some(stream) = streams.join_next().await {
        let (at, heard) = stream.expect("clients do not panic");
        assert_eq!(heard.seams, 0, "{at}: its holder lives");
        returns += heard.returns;
    }
    assert!(returns >= STREAMS as u32, "{returns} of {STREAMS} were hurt");
    assert_eq!(fleet.generated().await - generated, STREAMS as u64 * u64::from(TOKENS), "not a token more");
    assert_eq!(prefilled(&fleet).await, prefill, "nothing was prefilled again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_death_of_a_holder_costs_each_stream_a_block_at_most() {
    let mut fleet = fleet().await;
    let (generated, prefill, mut streams) = running(&fleet).await;
    let of = [held(&fleet, 1).await, held(&fleet, 2).await];
    let dead = if of[0] >= of[1] { 1 } else { 2 };
    let hurt = of[dead - 1];
    assert!(hurt > 0, "nobody holds any");
    fleet.replicas[dead].kill9();
    let mut seams = 0;
    while let Some(stream) = streams.join_next().await {
        let (at, heard) = stream.expect("clients do not panic");
        assert_eq!(heard.returns, 0, "{at}: its edge lives");
        seams += u64::from(heard.seams > 0);
    }
    assert_eq!(seams, hurt, "those that it held go on elsewhere, and no others");
    let again = prefilled(&fleet).await - prefill;
    assert!(again <= hurt * BLOCK, "{again} tokens prefilled again for {hurt} streams");
    let more = fleet.generated().await - generated - STREAMS as u64 * u64::from(TOKENS);
    println!("{hurt} streams: {again} tokens prefilled again, {more} generated again");
    fleet.replicas[dead].start();
    ready(&fleet.replicas[dead], LIMIT).await;
    fleet.agree().await;
}
