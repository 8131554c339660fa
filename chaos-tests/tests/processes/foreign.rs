//! Work that an engine does for others counts on every replica, and stops counting.

use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::endpoint::Endpoint;
use chaos_tests::fleet::{Fleet, MODEL};
use chaos_tests::wait::{check, until};
use serde_json::json;
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(20);

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
