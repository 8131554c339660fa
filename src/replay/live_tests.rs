//! Replaying against a simulated engine over real sockets.

use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};

use super::generate::{Kind, generate};
use super::live::{Options, Outcome, replay};
use super::trace::{Request, requests};
use crate::engines::sim::{EngineSimArgs, Simulator};

const BLOCK: u32 = 16;

fn options(url: String) -> Options {
    Options {
        url,
        model: "sim-model".to_owned(),
        policy: None,
        key: None,
        tls: crate::tls::client_config(None).unwrap(),
        speed: 1e6,
        concurrency: 4,
        timeout: Duration::from_secs(60),
        block_size: BLOCK,
        tokens_per_block: BLOCK,
        max_output: 8,
        vocabulary: Some(3000),
    }
}

async fn engine() -> (Simulator, String) {
    let mut args = EngineSimArgs::defaults();
    args.instant = true;
    args.blocks = 100_000;
    let engine = Simulator::start(args).await.unwrap();
    let url = format!("http://{}", engine.address());
    (engine, url)
}

fn trace(count: usize) -> Vec<Request> {
    requests(generate(Kind::Chat, count, BLOCK, 4), BLOCK)
}

async fn sent(trace: &[Request], options: Options) -> Outcome {
    replay(trace, options).await.unwrap()
}

#[tokio::test]
async fn token_ids_arrive_as_they_are_and_the_second_time_they_are_cached() {
    let (engine, url) = engine().await;
    let trace = trace(30);
    let first = sent(&trace, options(url.clone())).await;
    assert!(first.failures.is_empty() && first.cached_known, "{first:?}");
    assert_eq!(first.run.requests.len(), 30);
    for (done, asked) in first.run.requests.iter().zip(&trace) {
        assert!(done.prompt == asked.input && done.ttft.is_some() && done.itl.is_some(), "{done:?}");
    }
    let again = sent(&trace, options(url)).await;
    assert!(again.run.hit_rate() > 0.9 && again.run.hit_rate() > first.run.hit_rate(), "{again:?}");
    engine.stop().await;
}

#[tokio::test]
async fn words_in_a_chat_are_cached_as_far_as_the_ids_are_equal() {
    let (engine, url) = engine().await;
    let trace = trace(20);
    let chat = |url| Options { vocabulary: None, tokens_per_block: 8, concurrency: 1, ..options(url) };
    let outcome = sent(&trace, chat(url.clone())).await;
    assert!(outcome.failures.is_empty(), "{:?}", outcome.failures);
    let again = sent(&trace, chat(url)).await;
    assert!(again.run.hit_rate() > 0.85, "{}", again.run.hit_rate());
    assert!(again.late > 0, "one place for twenty requests at once");
    engine.stop().await;
}

#[tokio::test]
async fn refusals_and_dead_servers_are_counted_by_reason() {
    let (engine, url) = engine().await;
    let outcome = sent(&trace(5), Options { model: "nobody".to_owned(), ..options(url.clone()) }).await;
    assert_eq!(outcome.failures.values().sum::<usize>(), 5);
    assert!(outcome.failures.keys().all(|why| why.starts_with("404")), "{:?}", outcome.failures);
    engine.stop().await;
    let outcome = sent(&trace(3), options(url)).await;
    assert_eq!(outcome.run.summary(None).errors, 3);
    assert!(outcome.failures.keys().all(|why| why.contains("cannot reach")), "{:?}", outcome.failures);
}

#[tokio::test]
async fn a_request_takes_no_longer_than_its_limit() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let options = Options { timeout: Duration::from_millis(50), ..options(url) };
    let outcome = sent(&trace(2), options).await;
    assert!(outcome.failures.keys().all(|why| why.contains("not done within")), "{:?}", outcome.failures);
    assert_eq!(outcome.run.summary(None).errors, 2);
}

#[tokio::test]
async fn the_policy_that_is_asked_for_goes_with_every_request() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move {
        let mut heads = Vec::new();
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = String::new();
            let mut reader = tokio::io::BufReader::new(&mut stream);
            while !head.ends_with("\r\n\r\n") {
                reader.read_line(&mut head).await.unwrap();
            }
            stream
                .write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                .await
                .unwrap();
            heads.push(head);
        }
        heads
    });
    for policy in [None, Some("cache_aware".to_owned())] {
        let options =
            Options { policy, concurrency: 1, timeout: Duration::from_secs(5), ..options(url.clone()) };
        let outcome = sent(&trace(1), options).await;
        let summary = outcome.run.summary(None);
        assert_eq!((summary.errors, summary.error_rate), (1, 1.0));
    }
    let heads = server.await.unwrap();
    assert!(!heads[0].contains("everline-policy"), "{}", heads[0]);
    assert!(heads[1].contains("everline-policy: cache_aware\r\n"), "{}", heads[1]);
}
