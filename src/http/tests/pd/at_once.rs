//! Prefill and decode at once: SGLang, and vLLM with Mooncake.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::fleet::*;
use crate::cluster::api::ControlPlane as _;
use crate::http::tests::streams::keep;
use crate::http::tests::support::*;
use crate::relay::Options;
use crate::state::worker::{Connector, WorkerRole};

async fn sglang(front: &Running, prefills: usize, decodes: usize) -> (Vec<Fake>, Vec<Fake>) {
    let (mut p, mut d) = (Vec::new(), Vec::new());
    for at in 0..prefills {
        p.push(Fake::new(decoded).await);
        add(front, &format!("p{at}"), p[at].address, WorkerRole::Prefill, Connector::Sglang);
    }
    for at in 0..decodes {
        d.push(Fake::new(decoded).await);
        add(front, &format!("d{at}"), d[at].address, WorkerRole::Decode, Connector::Sglang);
    }
    (p, d)
}

fn rooms(fakes: &[&Fake]) -> Vec<u64> {
    fakes.iter().flat_map(|fake| fake.bodies()).map(|body| body["bootstrap_room"].as_u64().unwrap()).collect()
}

fn busy(front: &Running, id: &str) -> crate::routing::book::Booking {
    front.cluster.bookings().book(front.cluster.worker(id).unwrap(), 100_000, 10_000)
}

#[tokio::test]
async fn both_are_asked_at_once_and_meet_in_a_room_of_their_own() {
    for (streams, relayed) in [(false, false), (true, false), (true, true)] {
        let front = start(quick());
        if relayed {
            keep(&front, Options::default());
        }
        let (p, d) = sglang(&front, 1, 1).await;
        front.cluster.change("p0", |record| record.spec.transfer.bootstrap_port = Some(9123));
        // Neither says a word before both were asked.
        let Do::Say(answer) = decoded(&json!({"stream": streams}), 0) else { unreachable!() };
        for fake in [&p[0], &d[0]] {
            fake.will([Do::Pieces(vec![answer.clone()])]);
        }
        let (asked, permits) =
            ([p[0].seen.clone(), d[0].seen.clone()], [p[0].permits.clone(), d[0].permits.clone()]);
        let release = tokio::spawn(async move {
            eventually("both are asked", || asked.iter().all(|seen| !seen.lock().is_empty())).await;
            permits.iter().for_each(|permits| permits.add_permits(1));
        });
        let answer = if streams { stream(&front).await } else { complete(&front).await };
        release.await.unwrap();
        assert!(status(&answer) == 200 && answer.contains("one ") && answer.contains("two"), "{answer}");
        assert_eq!(header(&answer, "everline-worker"), Some("d0"), "{answer}");
        assert_eq!(header(&answer, "everline-prefill-worker"), Some("p0"), "{answer}");
        let (first, second) = (p[0].bodies().remove(0), d[0].bodies().remove(0));
        assert_eq!(first, second);
        assert_eq!((&first["bootstrap_host"], &first["bootstrap_port"]), (&json!("127.0.0.1"), &json!(9123)));
        assert_eq!((&first["max_tokens"], first["stream"] == true), (&json!(9), streams));
        complete(&front).await;
        let all = rooms(&[&p[0]]);
        assert!(all[0] != all[1] && all.iter().all(|room| *room < 1 << 63), "{all:?}");
        is_idle(&front).await;
    }
}

#[tokio::test]
async fn several_sequences_are_shared_too() {
    let front = start(quick());
    let (p, d) = sglang(&front, 1, 1).await;
    let answer = exchange(front.address, post("/v1/completions", &format!(r#"{{{PROMPT},"n":3}}"#))).await;
    assert_eq!(status(&answer), 200, "{answer}");
    let body = &d[0].bodies()[0];
    assert_eq!(body["bootstrap_room"].as_array().map(Vec::len), Some(3), "{body}");
    assert_eq!(p[0].bodies()[0], *body);
}

#[tokio::test]
async fn an_engine_that_wants_a_room_is_never_asked_alone() {
    let front = start(quick());
    let (_, d) = sglang(&front, 0, 1).await;
    let answer = complete(&front).await;
    assert_eq!((status(&answer), code(&answer).as_str()), (503, "no_worker_available"), "{answer}");
    assert!(answer.contains("d0: serves the decode role only"), "{answer}");
    assert_eq!(d[0].count(), 0);
}

#[tokio::test]
async fn a_prefill_that_fails_ends_the_decode_and_both_are_tried_anew_in_another_room() {
    let broken =
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{".to_owned();
    for (what, does) in [
        ("closes", Do::Close),
        ("is unavailable", error("503 Service Unavailable")),
        ("has a fault", error("500 Internal Server Error")),
        ("breaks off", Do::Pieces(vec![broken])),
    ] {
        let front = start(quick());
        let (p, d) = sglang(&front, 2, 1).await;
        let busy = busy(&front, "p1");
        p[0].will([does.clone()]);
        p[0].permits.add_permits(1);
        d[0].will([Do::Hang]);
        let answer = stream(&front).await;
        assert_eq!(status(&answer), 200, "{what}: {answer}");
        assert_eq!(header(&answer, "everline-prefill-worker"), Some("p1"), "{what}: {answer}");
        d[0].has_lost(1).await;
        let all: BTreeSet<u64> = rooms(&[&d[0]]).into_iter().collect();
        assert_eq!((d[0].count(), all.len()), (2, 2), "{what}");
        drop(busy);
        is_idle(&front).await;
    }
}

#[tokio::test]
async fn a_decode_that_fails_ends_the_prefill_and_both_are_tried_anew_in_another_room() {
    let fault = format!("{EVENTS}data: {{\"error\":{{\"message\":\"x\"}}}}\n\n");
    for (what, does) in [
        ("closes", Do::Close),
        ("has a fault", error("500 Internal Server Error")),
        ("says so in an event", Do::Pieces(vec![fault])),
    ] {
        let front = start(quick());
        let (p, d) = sglang(&front, 1, 2).await;
        let busy = busy(&front, "d1");
        p[0].will([Do::Hang]);
        d[0].will([does.clone()]);
        d[0].permits.add_permits(1);
        // A prefill that has not answered at all must not hold up what the decode says of it.
        let head = EVENTS.to_owned();
        p[0].script.lock()[0] = match what {
            "says so in an event" => Do::Pieces(vec![head, "never".to_owned()]),
            _ => Do::Hang,
        };
        p[0].permits.add_permits(1);
        let answer = stream(&front).await;
        assert_eq!(
            (status(&answer), header(&answer, "everline-worker")),
            (200, Some("d1")),
            "{what}: {answer}"
        );
        p[0].has_lost(1).await;
        let all: BTreeSet<u64> = rooms(&[&p[0]]).into_iter().collect();
        assert_eq!((p[0].count(), all.len()), (2, 2), "{what}");
        drop(busy);
        is_idle(&front).await;
    }
}

#[tokio::test]
async fn a_request_that_is_at_fault_is_told_so_by_either() {
    for by_prefill in [true, false] {
        let front = start(quick());
        let (p, d) = sglang(&front, 1, 1).await;
        let (fails, hangs) = if by_prefill { (&p[0], &d[0]) } else { (&d[0], &p[0]) };
        fails.will([error("400 Bad Request")]);
        hangs.will([Do::Hang]);
        let answer = stream(&front).await;
        assert_eq!((status(&answer), code(&answer).as_str()), (400, "x"), "{answer}");
        hangs.has_lost(1).await;
        assert_eq!((p[0].count(), d[0].count()), (1, 1));
        is_idle(&front).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_both() {
    let front = start(quick());
    let (p, d) = sglang(&front, 1, 1).await;
    for fake in [&p[0], &d[0]] {
        fake.will([Do::Hang]);
    }
    let mut client = TcpStream::connect(front.address).await.unwrap();
    client.write_all(post("/v1/completions", &format!("{{{PROMPT}}}")).as_bytes()).await.unwrap();
    for fake in [&p[0], &d[0]] {
        fake.has_seen(1).await;
    }
    drop(client);
    for fake in [&p[0], &d[0]] {
        fake.has_lost(1).await;
    }
    is_idle(&front).await;
}

#[tokio::test]
async fn what_the_prefill_knows_of_the_prompt_is_in_the_answer() {
    let said =
        |text: &str, logprobs: Value| json!({"text": text, "meta_info": {"input_token_logprobs": logprobs}});
    let (of_prefill, of_decode) = (said("x", json!([[null, 1], [-0.5, 2]])), said("xyz", json!([])));
    for streams in [false, true] {
        let front = start(quick());
        let (p, d) = sglang(&front, 1, 1).await;
        let does = |value: &Value| match streams {
            false => json_of(value),
            true => Do::Pieces(vec![format!("{EVENTS}data: {value}\n\ndata: [DONE]\n\n")]),
        };
        p[0].will([does(&of_prefill)]);
        d[0].will([does(&of_decode)]);
        for fake in [&p[0], &d[0]] {
            fake.permits.add_permits(1);
        }
        let body = format!(r#"{{"text":"a b","return_logprob":true,"stream":{streams}}}"#);
        let answer = exchange(front.address, post("/generate", &body)).await;
        assert!(answer.contains(r#""input_token_logprobs":[[null,1],[-0.5,2]]"#), "{answer}");
        assert!(answer.contains(r#""text":"xyz""#) && answer.contains("[DONE]") == streams, "{answer}");
        assert_eq!(header(&answer, "everline-prefill-worker"), Some("p0"), "{answer}");
    }
}

/// A bootstrap server, and how often it was asked.
async fn bootstrap(engine: &'static str) -> Fake {
    Fake::new(move |_, _| {
        json_of(&json!({"0": {"engine_id": engine, "worker_addr": {"0": {"0": "tcp://x:1"}}}}))
    })
    .await
}

#[tokio::test]
async fn mooncake_is_told_an_id_for_both_and_where_the_prefills_engine_is() {
    let front = start(quick());
    let (p, d, server) = (Fake::new(prefilled).await, Fake::new(decoded).await, bootstrap("e1").await);
    add(&front, "p", p.address, WorkerRole::Prefill, Connector::Mooncake);
    add(&front, "d", d.address, WorkerRole::Decode, Connector::Mooncake);
    front.cluster.change("p", |record| record.spec.transfer.bootstrap_port = Some(server.address.port()));
    for _ in 0..2 {
        let answer = stream(&front).await;
        assert_eq!((status(&answer), said(&answer).as_str()), (200, "one two"), "{answer}");
        assert_eq!(header(&answer, "everline-prefill-worker"), Some("p"));
    }
    assert_eq!(server.count(), 1, "it is believed for a while");
    let params = |fake: &Fake, at: usize| fake.bodies()[at]["kv_transfer_params"].clone();
    let id = |fake: &Fake, at: usize| params(fake, at)["transfer_id"].as_str().unwrap().to_owned();
    assert_eq!((id(&p, 0), id(&p, 1)), (id(&d, 0), id(&d, 1)));
    assert_ne!(id(&p, 0), id(&p, 1));
    assert_eq!(params(&d, 0)["remote_engine_id"], "e1");
    assert_eq!(params(&d, 0)["remote_bootstrap_addr"], format!("http://127.0.0.1:{}", server.address.port()));
    assert_eq!((&p.bodies()[0]["max_tokens"], &p.bodies()[0]["stream"]), (&json!(1), &json!(false)));
}

#[tokio::test]
async fn mooncakes_decode_does_not_wait_for_a_prefill_that_ended_the_answer() {
    let front = start(quick());
    let (p, d, server) = (Fake::new(prefilled).await, Fake::new(decoded).await, bootstrap("e1").await);
    add(&front, "p", p.address, WorkerRole::Prefill, Connector::Mooncake);
    add(&front, "d", d.address, WorkerRole::Decode, Connector::Mooncake);
    front.cluster.change("p", |record| record.spec.transfer.bootstrap_port = Some(server.address.port()));
    p.will([prefilled_as("stop", 1)]);
    d.will([Do::Hang]);
    let answer = stream(&front).await;
    assert_eq!((status(&answer), said(&answer).as_str()), (200, "one "), "{answer}");
    d.has_lost(1).await;
    is_idle(&front).await;
}

#[tokio::test]
async fn a_mooncake_worker_without_a_bootstrap_server_is_done_without() {
    let front = start(quick());
    let (p, d) = (Fake::new(prefilled).await, Fake::new(decoded).await);
    add(&front, "p", p.address, WorkerRole::Prefill, Connector::Mooncake);
    add(&front, "d", d.address, WorkerRole::Decode, Connector::Mooncake);
    let port = refusing().await.port();
    front.cluster.change("p", |record| record.spec.transfer.bootstrap_port = Some(port));
    let answer = complete(&front).await;
    assert_eq!((status(&answer), header(&answer, "everline-prefill-worker")), (200, None), "{answer}");
    assert_eq!((p.count(), d.bodies()[0].get("kv_transfer_params")), (0, None));
}
