//! Engines that tell nothing and begin anew: what was known of their blocks is forgotten on every
//! replica.

use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, MODEL};
use chaos_tests::wait::{check, until};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// What a replica takes an engine to hold: how that is known, and how many blocks.
async fn known(http: &Http, fleet: &Fleet, replica: usize, engine: &str) -> Result<(String, u64), String> {
    let reply = http.get(&fleet.replicas[replica].admin_url("/v1/admin/index"), LIMIT).await?;
    let index: Value = reply.json()?;
    let ranks = index["ranks"].as_array().ok_or("no ranks")?;
    let rank = ranks.iter().find(|rank| rank["worker"] == engine).ok_or("nothing is known of it")?;
    Ok((rank["known"].as_str().unwrap_or_default().to_owned(), rank["blocks"].as_u64().unwrap_or(0)))
}

/// All replicas take an engine to hold so many blocks.
async fn all_know(fleet: &Fleet, engine: &str, what: &str, blocks: u64) {
    let http = Http::pooled();
    for replica in 0..fleet.replicas.len() {
        until(&format!("{blocks} blocks of {engine}, {what}"), LIMIT, async || {
            let now = known(&http, fleet, replica, engine).await?;
            check(now == (what.to_owned(), blocks), || format!("{now:?}"))
        })
        .await;
    }
}

/// Sends a prompt of ten blocks; what was foretold and what was reported of it, in blocks.
async fn ask(fleet: &Fleet, engine: &str) -> Result<(u64, u64), String> {
    let prompt: Vec<u32> = (1000..1170).collect();
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 1});
    let url = fleet.replicas[0].http_url("/v1/completions");
    let reply = Http::fresh().post_with(&url, &[("everline-worker", engine)], &body).await?;
    let foretold = reply.headers.get("everline-cached-tokens").and_then(|value| value.to_str().ok());
    let foretold = foretold.and_then(|text| text.parse::<u64>().ok()).ok_or("no header")?;
    let answer: Value = reply.json()?;
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    Ok((foretold / 16, cached / 16))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_without_events_that_begins_anew_holds_nothing() {
    let fleet = Fleet::of(3).engines(2).engine_arg("--instant").set("proxy.policy=kv_cost");
    let mut fleet = fleet.set("kv.scrape_ms=200").start().await;
    for engine in ["e1", "e2"] {
        until("the first answer", LIMIT, async || ask(&fleet, engine).await).await;
        all_know(&fleet, engine, "predicted", 10).await;
    }
    // Another process is known by this one.
    until("its process is known", LIMIT, async || {
        let logs =
            fleet.replicas.iter().map(|replica| std::fs::read_to_string(replica.log()).unwrap_or_default());
        let told = |log: &str| {
            log.lines().any(|line| line.contains("whose blocks are reckoned") && line.contains("e1"))
        };
        check(logs.into_iter().any(|log| told(&log)), || "no replica says so".to_owned())
    })
    .await;
    fleet.engines[0].kill9();
    fleet.engines[0].start();
    all_know(&fleet, "e1", "predicted", 0).await;
    all_know(&fleet, "e2", "predicted", 10).await;
    let (asked, _) = until("an answer of the new one", LIMIT, async || ask(&fleet, "e1").await).await;
    assert_eq!(asked, (0, 0));
    assert_eq!(ask(&fleet, "e2").await, Ok((10, 10)));
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_comes_back_without_events_is_reckoned_from_nothing_on() {
    let fleet = Fleet::of(3).engines(2).kv_events().engine_arg("--instant").set("proxy.policy=kv_cost");
    let mut fleet = fleet.start().await;
    for engine in ["e1", "e2"] {
        until("the first answer", LIMIT, async || ask(&fleet, engine).await).await;
        all_know(&fleet, engine, "events", 10).await;
    }
    fleet.engines[0].kill9();
    fleet.engines[0].without_kv_events();
    fleet.engines[0].start();
    all_know(&fleet, "e1", "predicted", 0).await;
    let (asked, _) = until("an answer of the new one", LIMIT, async || ask(&fleet, "e1").await).await;
    assert_eq!(asked, (0, 0));
    all_know(&fleet, "e1", "predicted", 10).await;
    assert_eq!(ask(&fleet, "e1").await, Ok((10, 10)));
    assert_eq!(ask(&fleet, "e2").await, Ok((10, 10)));
    fleet.agree().await;
}
