//! Work that an engine does for others counts on every replica, and stops counting.

use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::endpoint::Endpoint;
use chaos_tests::fleet::{Engine, Fleet, MODEL};
use chaos_tests::wait::{check, until};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(60);

/// Requests that another router sends.
const FOREIGN: i64 = 24;

/// What a replica adds to the load of a worker.
async fn foreign(replica: &Endpoint, worker: &str) -> Result<i64, String> {
    let page = Http::fresh().get(&replica.admin_url("/metrics"), LIMIT).await?.text();
    let name = format!("everline_worker_foreign_requests{{worker=\"{worker}\"}} ");
    let line = page.lines().find_map(|line| line.strip_prefix(&name)).ok_or("not there")?;
    line.parse().map_err(|_| format!("{line} is no number"))
}

/// The worker that answers a prompt which nobody has sent before.
async fn answers(replica: &Endpoint, prompt: &str) -> String {
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 1});
    let reply =
        Http::fresh().post(&replica.http_url("/v1/completions"), &body, LIMIT).await.expect("an answer");
    assert!(reply.status.is_success(), "{}", reply.text());
    reply.headers["everline-worker"].to_str().expect("a name").to_owned()
}

/// Requests on each rank of a worker, and how many of them its engine's own figures add or take off,
/// as a replica has it.
async fn by_rank(replica: &Endpoint, worker: &str) -> Result<Vec<(i64, i64)>, String> {
    let body = json!({"route": "/v1/completions", "body": {"model": MODEL, "prompt": "x"}});
    let reply: Value =
        Http::fresh().post(&replica.admin_url("/v1/admin/explain"), &body, LIMIT).await?.json()?;
    let candidates = reply["candidates"].as_array().ok_or_else(|| reply.to_string())?;
    let of = |one: &Value| {
        let correction = one["correction"]["requests"].as_i64().unwrap_or_default();
        Some((one["rank"].as_u64()?, (one["load"]["requests"].as_i64()?, correction)))
    };
    let mut ranks: Vec<_> = candidates.iter().filter(|one| one["worker"] == worker).filter_map(of).collect();
    ranks.sort_unstable();
    Ok(ranks.into_iter().map(|(_, requests)| requests).collect())
}

/// Prompt tokens that each rank of an engine has read.
async fn read_by_rank(engine: &Engine, ranks: usize) -> Vec<f64> {
    let url = format!("http://{}/metrics", engine.address);
    let page = Http::fresh().get(&url, LIMIT).await.expect("figures").text();
    let of = |rank| {
        let start = format!("vllm:prompt_tokens_total{{engine=\"{rank}\",");
        let line = page.lines().find(|line| line.starts_with(&start)).expect("one of each rank");
        line.rsplit_once(' ').and_then(|(_, value)| value.parse().ok()).expect("a number")
    };
    (0..ranks).map(of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_works_for_others_is_avoided_by_all_replicas_and_the_one_beside_it_is_not() {
    let fleet = Fleet::of(3).engines(1).ranks(2).set("kv.scrape_ms=200").start().await;
    let engine = &fleet.engines[0];
    // Another router keeps the second rank busy.
    let mut others = Vec::new();
    for n in 0..FOREIGN {
        let body =
            json!({"model": MODEL, "prompt": format!("other {n}"), "max_tokens": 8000, "stream": true});
        let body = body.to_string();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: engine\r\nx-data-parallel-rank: 1\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(engine.address).await.expect("a connection");
        stream.write_all(request.as_bytes()).await.expect("a request");
        others.push(tokio::spawn(async move { tokio::io::copy(&mut stream, &mut tokio::io::sink()).await }));
    }
    for replica in &fleet.replicas {
        until("the foreign requests on their rank in every view", LIMIT, async || {
            let seen = by_rank(replica, "e1").await?;
            check(seen == [(0, 0), (FOREIGN, FOREIGN)], || format!("{} sees {seen:?}", replica.name))
        })
        .await;
    }
    let before = read_by_rank(engine, 2).await;
    for (n, replica) in fleet.replicas.iter().cycle().take(12).enumerate() {
        answers(replica, &format!("ours {n}")).await;
    }
    let after = read_by_rank(engine, 2).await;
    assert!(after[0] > before[0] && after[1] == before[1], "{before:?} {after:?}");
    // It is done with that.
    for other in others {
        other.abort();
    }
    for replica in &fleet.replicas {
        until("it counts no more", LIMIT, async || {
            let seen = by_rank(replica, "e1").await?;
            check(seen == [(0, 0), (0, 0)], || format!("{} sees {seen:?}", replica.name))
        })
        .await;
    }
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_works_for_others_is_avoided_by_all_replicas_until_it_is_done() {
    let fleet = Fleet::of(3).engines(2).set("kv.scrape_ms=200").start().await;
    // Another router keeps the first engine busy.
    let mut others = JoinSet::new();
    for n in 0..FOREIGN {
        let url = format!("http://{}/v1/completions", fleet.engines[0].address);
        let body =
            json!({"model": MODEL, "prompt": format!("other {n}"), "max_tokens": 8000, "stream": true});
        others.spawn(async move { Http::fresh().post(&url, &body, Duration::from_secs(120)).await });
    }
    for replica in &fleet.replicas {
        until("the foreign requests in every view", LIMIT, async || {
            let seen = foreign(replica, "e1").await?;
            check(seen == FOREIGN, || format!("{} sees {seen}", replica.name))
        })
        .await;
    }
    for (n, replica) in fleet.replicas.iter().cycle().take(12).enumerate() {
        assert_eq!(answers(replica, &format!("ours {n}")).await, "e2");
        assert_eq!(foreign(replica, "e2").await, Ok(0), "what was booked here is not foreign");
    }
    // It is done with that.
    others.shutdown().await;
    for replica in &fleet.replicas {
        until("it counts no more", LIMIT, async || {
            let seen = foreign(replica, "e1").await?;
            check(seen == 0, || format!("{} sees {seen}", replica.name))
        })
        .await;
    }
    let mut used = false;
    for (n, replica) in fleet.replicas.iter().cycle().take(30).enumerate() {
        used |= answers(replica, &format!("again {n}")).await == "e1";
    }
    assert!(used, "idle workers are chosen at random, and this one never was");
    fleet.agree().await;
}
