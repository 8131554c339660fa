//! Either of two workers fails, at every phase: another attempt is always a new prefill.

use std::time::Duration;

use serde_json::{Value, json};

use super::fleet::*;
use crate::http::tests::streams::keep;
use crate::http::tests::support::*;
use crate::http::{FrontConfig, PdOptions};
use crate::relay::Options;
use crate::state::worker::{Connector, WorkerRole};

/// `d0` is the one to be chosen while it lives: `d1` has much to do.
fn prefer_first(front: &Running, ids: &[&str]) -> Vec<crate::routing::book::Booking> {
    use crate::cluster::api::ControlPlane as _;
    let book = |id: &&str| front.cluster.bookings().book(front.cluster.worker(id).unwrap(), 100_000, 10_000);
    ids.iter().map(book).collect()
}

#[tokio::test]
async fn a_prefill_worker_that_fails_is_replaced_whatever_it_does() {
    let answer = |text: &str| Do::Say(ok("application/json", text));
    let broken =
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"choi".to_owned();
    for (what, does) in [
        ("closes", Do::Close),
        ("is unavailable", error("503 Service Unavailable")),
        ("has a fault", error("500 Internal Server Error")),
        ("breaks off", Do::Pieces(vec![broken])),
        ("talks nonsense", answer("oops")),
        ("gave up", prefilled_as("abort", 0)),
        (
            "hands nothing over",
            answer(r#"{"choices":[{"finish_reason":"length"}],"kv_transfer_params":null}"#),
        ),
        ("speaks no HTTP", Do::Say("oops oops oops\r\n\r\n".to_owned())),
    ] {
        for streams in [false, true] {
            let front = start(quick());
            let (p, d) = fleet(&front, 2, 1).await;
            let _busy = prefer_first(&front, &["p1"]);
            p[0].will([does.clone()]);
            p[0].permits.add_permits(1);
            let answer = if streams { stream(&front).await } else { complete(&front).await };
            assert_eq!(status(&answer), 200, "{what}: {answer}");
            assert_eq!(header(&answer, "everline-prefill-worker"), Some("p1"), "{what}: {answer}");
            assert_eq!((p[0].count(), p[1].count(), d[0].count()), (1, 1, 1), "{what}");
            assert_eq!(shown(&[&d[0]]).len(), 1);
        }
    }
}

#[tokio::test]
async fn a_prefill_worker_that_is_not_there_is_replaced_and_the_last_one_is_done_without() {
    let front = start(quick());
    let d = Fake::new(decoded).await;
    add(&front, "p0", refusing().await, WorkerRole::Prefill, Connector::Nixl);
    add(&front, "d0", d.address, WorkerRole::Decode, Connector::Nixl);
    let answer = complete(&front).await;
    assert_eq!((status(&answer), header(&answer, "everline-prefill-worker")), (200, None), "{answer}");
    assert_eq!(d.bodies()[0].get("kv_transfer_params"), None);

    let p = Fake::new(prefilled).await;
    add(&front, "p1", p.address, WorkerRole::Prefill, Connector::Nixl);
    let answer = complete(&front).await;
    assert_eq!(header(&answer, "everline-prefill-worker"), Some("p1"), "{answer}");
}

#[tokio::test]
async fn a_decode_worker_that_fails_costs_a_new_prefill() {
    let event = |json: &str| Do::Pieces(vec![format!("{EVENTS}data: {json}\n\ndata: [DONE]\n\n")]);
    let fault = r#"{"error":{"message":"Internal server error","type":"InternalServerError","param":null,"code":500}}"#;
    for (what, does, only_streams) in [
        ("closes", Do::Close, false),
        ("is unavailable", error("503 Service Unavailable"), false),
        ("has a fault", error("500 Internal Server Error"), false),
        ("speaks no HTTP", Do::Say("oops oops oops\r\n\r\n".to_owned()), false),
        ("says in an event that it got nothing", event(fault), true),
        ("ends before it began", Do::Pieces(vec![EVENTS.to_owned()]), true),
        ("breaks off in its first event", Do::Pieces(vec![format!("{EVENTS}data: {{\"id\"")]), true),
    ] {
        for (streams, relayed) in [(false, false), (true, false), (true, true)] {
            if only_streams && !streams {
                continue;
            }
            let front = start(quick());
            if relayed {
                keep(&front, Options::default());
            }
            let (p, d) = fleet(&front, 1, 2).await;
            let _busy = prefer_first(&front, &["d1"]);
            d[0].will([does.clone(), does.clone()]);
            d[0].permits.add_permits(4);
            let answer = if streams { stream(&front).await } else { complete(&front).await };
            assert_eq!(status(&answer), 200, "{what}: {answer}");
            assert_eq!(header(&answer, "everline-worker"), Some("d1"), "{what}: {answer}");
            assert!(
                answer.contains("one ") && answer.contains("two") && !answer.contains("error"),
                "{what}: {answer}"
            );
            // Where nobody can say whose fault it was, another pair is preferred: there is none without
            // this prefill worker, so it is asked again.
            assert_eq!((p[0].count(), d[0].count(), d[1].count()), (2, 1, 1), "{what}");
            assert_eq!(shown(&[&d[0], &d[1]]), ["r1", "r2"], "{what}");
        }
    }
}

#[tokio::test]
async fn a_decode_worker_that_is_not_there_costs_a_new_prefill() {
    let front = start(quick());
    let (p, d) = fleet(&front, 1, 1).await;
    add(&front, "a", refusing().await, WorkerRole::Decode, Connector::Nixl);
    let _busy = prefer_first(&front, &["d0"]);
    let answer = stream(&front).await;
    assert_eq!((status(&answer), header(&answer, "everline-worker")), (200, Some("d0")), "{answer}");
    assert_eq!(p[0].count(), 2);
    assert_eq!(shown(&[&d[0]]), ["r2"]);
}

#[tokio::test]
async fn the_only_pair_gets_another_chance_with_a_new_prefill() {
    let front = start(quick());
    let (p, d) = fleet(&front, 1, 1).await;
    let fault = Do::Pieces(vec![format!("{EVENTS}data: {{\"error\":{{\"message\":\"x\"}}}}\n\n")]);
    d[0].permits.add_permits(10);
    d[0].will([fault.clone()]);
    let answer = stream(&front).await;
    assert_eq!((status(&answer), said(&answer).as_str()), (200, "one two"), "{answer}");
    assert_eq!(shown(&[&d[0]]), ["r1", "r2"]);
    // But not for ever.
    d[0].will([fault.clone(), fault.clone(), fault]);
    let answer = stream(&front).await;
    assert_eq!((status(&answer), code(&answer).as_str()), (502, "upstream_failed"), "{answer}");
    assert!(answer.contains("d0: did not get what p0 prefilled (x)"), "{answer}");
    assert_eq!((p[0].count(), d[0].count()), (4, 4), "{answer}");
    shown(&[&d[0]]);
    is_idle(&front).await;
}

#[tokio::test]
async fn an_engines_error_is_passed_on_if_nobody_does_better() {
    let front = start(quick());
    let (p, d) = fleet(&front, 1, 1).await;
    d[0].will([error("500 Internal Server Error"), error("500 Internal Server Error")]);
    let answer = complete(&front).await;
    assert_eq!((status(&answer), code(&answer).as_str()), (500, "x"), "{answer}");
    assert_eq!((p[0].count(), d[0].count()), (2, 2));
    shown(&[&d[0]]);
    is_idle(&front).await;
}

#[tokio::test]
async fn a_request_that_is_at_fault_is_told_so_by_either_and_not_tried_again() {
    let front = start(quick());
    let (p, d) = fleet(&front, 2, 2).await;
    for fake in &p {
        fake.will([error("400 Bad Request")]);
    }
    let answer = stream(&front).await;
    assert_eq!((status(&answer), code(&answer).as_str()), (400, "x"), "{answer}");
    assert_eq!(p[0].count() + p[1].count(), 1);
    assert_eq!(d[0].count() + d[1].count(), 0);
    p.iter().for_each(|fake| fake.script.lock().clear());
    for fake in &d {
        fake.will([error("400 Bad Request")]);
    }
    let answer = stream(&front).await;
    assert_eq!((status(&answer), code(&answer).as_str()), (400, "x"), "{answer}");
    assert_eq!(d[0].count() + d[1].count(), 1);
    is_idle(&front).await;
}

#[tokio::test]
async fn what_waited_too_long_is_not_shown_to_anybody() {
    let pd = PdOptions { handoff_age: Duration::from_millis(30), ..PdOptions::default() };
    let front = start(FrontConfig { pd, ..quick() });
    let (p, d) = fleet(&front, 1, 1).await;
    let Do::Say(whole) = prefilled_as("length", 1) else { unreachable!() };
    let (head, rest) = whole.split_once("\r\n\r\n").unwrap();
    p[0].will([Do::Pieces(vec![format!("{head}\r\n\r\n"), rest.to_owned()])]);
    p[0].permits.add_permits(1);
    let permits = p[0].permits.clone();
    let seen = p[0].seen.clone();
    let late = tokio::spawn(async move {
        eventually("the prefill is asked for", || !seen.lock().is_empty()).await;
        // The head is on its way; the lease runs out before the body comes.
        tokio::time::sleep(Duration::from_millis(120)).await;
        permits.add_permits(1);
    });
    let answer = complete(&front).await;
    late.await.unwrap();
    assert_eq!(status(&answer), 200, "{answer}");
    assert_eq!((p[0].count(), shown(&[&d[0]])), (2, vec!["r2".to_owned()]));
}

#[tokio::test]
async fn a_stream_whose_decode_worker_dies_goes_on_with_a_prefill_of_its_own() {
    let front = start(quick());
    keep(&front, Options::default());
    let (p, d) = fleet(&front, 1, 2).await;
    let busy = prefer_first(&front, &["d1"]);
    let word = |text: &str, id: u32, prompt: Value| {
        let choice = json!({"index": 0, "text": text, "finish_reason": null, "token_ids": [id], "prompt_token_ids": prompt});
        format!(
            "data: {}\n\n",
            json!({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})
        )
    };
    let begun = vec![format!("{EVENTS}{}{}", word("a ", 6, json!([5])), word("b ", 7, Value::Null))];
    d[0].will([Do::Pieces(begun)]);
    d[0].permits.add_permits(1);
    let rest = format!("{EVENTS}{}{}data: [DONE]\n\n", word("c ", 8, Value::Null), event("d", json!("stop")));
    d[1].will([Do::Pieces(vec![rest])]);
    d[1].permits.add_permits(1);
    let answer = stream(&front).await;
    drop(busy);
    assert_eq!(said(&answer), "a b c d", "{answer}");
    assert_eq!((p[0].count(), d[0].count(), d[1].count()), (2, 1, 1), "{answer}");
    assert_eq!(shown(&[&d[0], &d[1]]), ["r1", "r2"]);
    // What was said is part of the second one's prompt, at both.
    for body in [&p[0].bodies()[1], &d[1].bodies()[0]] {
        assert_eq!(body["prompt"], json!([5, 6, 7]), "{body}");
    }
    assert_eq!((&p[0].bodies()[1]["max_tokens"], &d[1].bodies()[0]["max_tokens"]), (&json!(1), &json!(7)));
    is_idle(&front).await;
}
