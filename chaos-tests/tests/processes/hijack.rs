//! A stranger wants a live worker's prompts: it is refused on every replica and gets none.

use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::endpoint::{Endpoint, LIMIT, engine_worker};
use chaos_tests::fleet::Fleet;
use chaos_tests::raw::{RawWorker, Then};
use chaos_tests::wait::{check, until};
use everline::admin_types::{ModelEntry, RegisterRequest};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::task::JoinSet;

const LONG: Duration = Duration::from_secs(20);

async fn answering(text: &'static str) -> RawWorker {
    RawWorker::start(move |mut stream, _| async move {
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        let sent = stream.write_all(answer.as_bytes()).await;
        (stream, if sent.is_ok() { Then::KeepAlive } else { Then::Close })
    })
    .await
}

/// A worker that registers itself under this id and is probed.
fn node(id: &str, worker: &RawWorker) -> RegisterRequest {
    let mut request = engine_worker(id, worker.address);
    request.models = vec![ModelEntry::Name("secret".to_owned())];
    request.heartbeat = Some(false);
    request
}

/// Registers and says the status of the answer.
async fn registered(at: &Endpoint, request: &RegisterRequest) -> u16 {
    at.add_node(request, LIMIT).await.expect("an answer").status.as_u16()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_takes_over_a_live_workers_name_and_no_prompt_goes_astray() {
    // Workers count what reaches them; nobody shall ask them for token ids besides.
    let fleet = Fleet::of(3).set("kv.default_mode=text").start().await;
    let all = fleet.endpoints(&[0, 1, 2]);
    let (honest, rogue) = (answering("honest").await, answering("rogue").await);
    assert_eq!(registered(&all[0], &node("gpu", &honest)).await, 201);
    // Every replica at once, again and again: what one of them knows late it must not decide.
    let mut tries = JoinSet::new();
    for n in 0..30 {
        let (at, request) = (all[n % 3].clone(), node("gpu", &rogue));
        tries.spawn(async move { registered(&at, &request).await });
    }
    let statuses = tries.join_all().await;
    assert!(statuses.iter().all(|status| *status == 409), "{statuses:?}");
    for at in &all {
        until("the worker is known", LONG, async || {
            let worker = at.worker("gpu").await?;
            check(worker.online && worker.url.ends_with(&honest.address.to_string()), || {
                format!("{worker:?}")
            })
        })
        .await;
        for n in 0..10 {
            let body = json!({"model": "secret", "prompt": format!("a secret {n}")});
            let reply = Http::fresh().post(&at.http_url("/v1/completions"), &body, LIMIT).await;
            assert_eq!(reply.expect("an answer").text(), "honest");
        }
    }
    let prompts = |worker: &RawWorker| worker.seen().iter().filter(|s| s.head.starts_with("POST ")).count();
    assert_eq!((prompts(&honest), rogue.seen().len()), (30, 0));

    // What an operator has put there a node cannot take, dead or alive.
    let mut operators = node("operators", &honest);
    operators.probe = Some(false);
    let reply = all[0].add_worker(&operators, LIMIT).await.expect("an answer");
    assert!(reply.status.is_success(), "{}", reply.text());
    assert_eq!(registered(&all[1], &node("operators", &rogue)).await, 409);

    // A name whose owner is gone is free again.
    drop(honest);
    until("the dead worker's name is free", LONG, async || {
        let status = registered(&all[2], &node("gpu", &rogue)).await;
        check(status == 200, || status.to_string())
    })
    .await;
}
