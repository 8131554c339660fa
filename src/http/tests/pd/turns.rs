//! Prefill and decode in turn, when all goes well: vLLM with NIXL, a store, P2pNccl and MoRI-IO.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::fleet::*;
use crate::http::tests::streams::keep;
use crate::http::tests::support::*;
use crate::relay::Options;
use crate::state::load::LoadSum;
use crate::state::worker::{Connector, WorkerRole};

#[tokio::test]
async fn the_prefills_answer_goes_to_the_decode_worker_whose_answer_is_the_clients() {
    let front = start(quick());
    let (p, d) = fleet(&front, 1, 1).await;
    let extra = "x-request-id: mine\r\ncontent-type: application/json\r\n";
    let body = format!(r#"{{{PROMPT},"seed":12345678901234567890,"kv_transfer_params":{{"mine":1}}}}"#);
    let answer = exchange(front.address, request("POST", "/v1/completions?a=1", extra, &body)).await;
    assert_eq!((status(&answer), &body_text(&answer)), (200, &json!("one two")), "{answer}");
    assert_eq!(header(&answer, "everline-worker"), Some("d0"));
    assert_eq!(header(&answer, "everline-prefill-worker"), Some("p0"));
    assert_eq!(header(&answer, "x-request-id"), Some("mine"));
    let (p, d) = (p[0].seen.lock().clone(), d[0].seen.lock().clone());
    assert_eq!((p.len(), d.len()), (1, 1));
    for seen in [&p[0], &d[0]] {
        assert!(seen.head.starts_with("POST /v1/completions?a=1 HTTP/1.1\r\n"), "{}", seen.head);
        assert_eq!(header(&seen.head, "x-request-id"), Some("mine"));
        assert_eq!(seen.body["seed"], json!(12345678901234567890_u64));
    }
    assert_eq!((&p[0].body["max_tokens"], &p[0].body["stream"]), (&json!(1), &json!(false)));
    assert_eq!(p[0].body["kv_transfer_params"]["do_remote_decode"], true);
    assert_eq!((&d[0].body["max_tokens"], d[0].body.get("stream")), (&json!(9), None));
    let params = &d[0].body["kv_transfer_params"];
    assert_eq!((&params["remote_request_id"], params.get("mine")), (&json!("r1"), None));
    is_idle(&front).await;
}

fn body_text(answer: &str) -> Value {
    body(answer)["choices"][0]["text"].clone()
}

#[tokio::test]
async fn a_stream_is_shared_with_a_relay_and_without() {
    for relayed in [false, true] {
        let front = start(quick());
        if relayed {
            keep(&front, Options::default());
        }
        let (p, d) = fleet(&front, 1, 1).await;
        let answer = stream(&front).await;
        assert_eq!((status(&answer), said(&answer).as_str()), (200, "one two"), "{answer}");
        assert!(answer.contains("data: [DONE]"), "{answer}");
        assert_eq!(header(&answer, "everline-worker"), Some("d0"), "{answer}");
        assert_eq!(header(&answer, "everline-prefill-worker"), Some("p0"), "{answer}");
        assert_eq!(p[0].bodies()[0]["stream"], false);
        assert_eq!(d[0].bodies()[0]["stream"], true);
        assert_eq!(shown(&[&d[0]]), ["r1"]);
        is_idle(&front).await;
    }
}

#[tokio::test]
async fn events_of_the_decode_worker_come_one_by_one() {
    let front = start(quick());
    let (_, d) = fleet(&front, 1, 1).await;
    let pieces = [
        format!("{EVENTS}{}", event("one ", Value::Null)),
        event("two", json!("stop")),
        "data: [DONE]\n\n".into(),
    ];
    d[0].will([Do::Pieces(pieces.to_vec())]);
    let mut client = TcpStream::connect(front.address).await.unwrap();
    let asking = post("/v1/completions", &format!("{{{PROMPT},\"stream\":true}}"));
    client.write_all(asking.as_bytes()).await.unwrap();
    let mut got = String::new();
    for text in ["one ", "two", "[DONE]"] {
        d[0].permits.add_permits(1);
        while !got.contains(text) {
            let mut bytes = [0; 1024];
            let count = client.read(&mut bytes).await.unwrap();
            assert!(count > 0, "{got}");
            got.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        assert_eq!(got.contains("two"), text != "one ", "{got}");
    }
}

#[tokio::test]
async fn an_answer_that_ended_with_the_prefill_is_complete() {
    let front = start(quick());
    let (p, d) = fleet(&front, 1, 1).await;
    p[0].will([prefilled_as("stop", 1), prefilled_as("stop", 2)]);
    let answer = complete(&front).await;
    assert_eq!((status(&answer), &body_text(&answer)), (200, &json!("one ")), "{answer}");
    assert!(!answer.contains("kv_transfer_params"), "{answer}");
    assert_eq!(
        (header(&answer, "everline-worker"), header(&answer, "everline-prefill-worker")),
        (Some("p0"), None)
    );
    let answer = stream(&front).await;
    assert_eq!((said(&answer).as_str(), status(&answer)), ("one ", 200), "{answer}");
    assert_eq!(header(&answer, "content-type"), Some("text/event-stream; charset=utf-8"));
    assert!(answer.contains(r#""finish_reason":"stop""#) && answer.contains("data: [DONE]"), "{answer}");
    assert_eq!((p[0].count(), d[0].count()), (2, 0));
    is_idle(&front).await;

    let relayed = start(quick());
    keep(&relayed, Options::default());
    let (p, d) = fleet(&relayed, 1, 1).await;
    p[0].will([prefilled_as("stop", 1)]);
    let answer = stream(&relayed).await;
    assert_eq!((said(&answer).as_str(), d[0].count()), ("one ", 0), "{answer}");
    assert!(answer.contains("data: [DONE]"), "{answer}");
}

#[tokio::test]
async fn the_prefill_is_booked_until_its_end_and_the_blocks_of_the_decode_from_the_start() {
    let front = start(quick());
    let (p, d) = fleet(&front, 1, 1).await;
    let Do::Say(answer) = prefilled_as("length", 1) else { unreachable!() };
    p[0].will([Do::Pieces(vec![answer])]);
    d[0].will([Do::Hang]);
    let asking = post("/v1/completions", &format!("{{{PROMPT}}}"));
    let mut client = TcpStream::connect(front.address).await.unwrap();
    client.write_all(asking.as_bytes()).await.unwrap();
    p[0].has_seen(1).await;
    let load = |id: &str| front.cluster.worker(id).unwrap().live.booked();
    let (at_p, at_d) = (load("p0"), load("d0"));
    assert!(at_p.requests == 1 && at_p.prefill_tokens > 0, "{at_p:?}");
    assert!(at_d.requests == 1 && at_d.prefill_tokens == 0 && at_d.decode_blocks > 0, "{at_d:?}");
    p[0].permits.add_permits(1);
    d[0].has_seen(1).await;
    assert_eq!((load("p0"), load("d0")), (LoadSum::default(), at_d));
    drop(client);
    d[0].has_lost(1).await;
    is_idle(&front).await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_request_at_whoever_has_it() {
    let front = start(quick());
    let (p, d) = fleet(&front, 1, 1).await;
    let ask = async || {
        let mut client = TcpStream::connect(front.address).await.unwrap();
        let asking = post("/v1/completions", &format!("{{{PROMPT},\"stream\":true}}"));
        client.write_all(asking.as_bytes()).await.unwrap();
        client
    };
    // In the prefill.
    p[0].will([Do::Hang]);
    let client = ask().await;
    p[0].has_seen(1).await;
    drop(client);
    p[0].has_lost(1).await;
    assert_eq!(d[0].count(), 0);
    // Before the decode worker says anything.
    d[0].will([Do::Hang]);
    let client = ask().await;
    d[0].has_seen(1).await;
    drop(client);
    d[0].has_lost(1).await;
    // In the middle of its answer.
    d[0].will([Do::Pieces(vec![
        format!("{EVENTS}{}", event("one ", Value::Null)),
        event("two", Value::Null),
    ])]);
    d[0].permits.add_permits(1);
    let mut client = ask().await;
    let mut byte = [0];
    client.read_exact(&mut byte).await.unwrap();
    drop(client);
    d[0].has_lost(2).await;
    is_idle(&front).await;
    assert_eq!(p[0].left.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_store_that_both_know_needs_no_parameters() {
    let front = start(quick());
    let (p, d) = (Fake::new(prefilled).await, Fake::new(decoded).await);
    add(&front, "p", p.address, WorkerRole::Prefill, Connector::Shared);
    add(&front, "d", d.address, WorkerRole::Decode, Connector::Shared);
    let answer = complete(&front).await;
    assert_eq!(
        (body_text(&answer), header(&answer, "everline-prefill-worker")),
        (json!("one two"), Some("p"))
    );
    assert_eq!((&p.bodies()[0]["max_tokens"], &d.bodies()[0]["max_tokens"]), (&json!(1), &json!(9)));
    for body in [&p.bodies()[0], &d.bodies()[0]] {
        assert!(body.get("kv_transfer_params").is_none(), "{body}");
    }
}

#[tokio::test]
async fn engines_that_find_each_other_by_the_requests_id_are_told_it() {
    for connector in [Connector::P2pNccl, Connector::Moriio] {
        let front = start(quick());
        let (p, d) = (Fake::new(prefilled).await, Fake::new(decoded).await);
        add(&front, "p", p.address, WorkerRole::Prefill, connector);
        add(&front, "d", d.address, WorkerRole::Decode, connector);
        for (id, address) in [("p", "10.0.0.1:1"), ("d", "10.0.0.2:2")] {
            front.cluster.change(id, |record| record.spec.transfer.side_channel = Some(address.to_owned()));
        }
        let mut ids = Vec::new();
        for _ in 0..2 {
            let extra = "x-request-id: mine\r\n";
            let answer =
                exchange(front.address, request("POST", "/v1/completions", extra, &format!("{{{PROMPT}}}")))
                    .await;
            assert_eq!((status(&answer), header(&answer, "x-request-id")), (200, Some("mine")), "{answer}");
            let id = |seen: &Fake| {
                header(&seen.seen.lock().last().unwrap().head, "x-request-id").unwrap().to_owned()
            };
            let own = id(&p);
            assert_eq!(own, id(&d));
            let unique =
                own.strip_prefix("___prefill_addr_10.0.0.1:1___decode_addr_10.0.0.2:2_").expect(&own);
            assert_eq!(unique.len(), 32);
            ids.push(own);
        }
        assert_ne!(ids[0], ids[1]);
        let params = |fake: &Fake| fake.bodies()[0]["kv_transfer_params"].clone();
        match connector {
            Connector::Moriio => {
                assert!(params(&p)["transfer_id"].is_string());
                assert_eq!(params(&d)["remote_request_id"], "r1");
            }
            _ => assert_eq!((params(&p), params(&d)), (Value::Null, Value::Null)),
        }
    }
}
