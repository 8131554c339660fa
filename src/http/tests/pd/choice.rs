//! Who does what: roles, load, prompts that are not worth a transfer, requests that cannot be split.

use serde_json::json;

use super::fleet::*;
use crate::cluster::api::ControlPlane as _;
use crate::http::tests::support::*;
use crate::http::{FrontConfig, PdOptions};
use crate::state::worker::{Connector, WorkerRole};

#[tokio::test]
async fn a_worker_that_only_prefills_is_never_asked_for_a_whole_request() {
    let front = start(quick());
    let (p, _) = fleet(&front, 1, 0).await;
    for asking in [
        chat(),
        post("/v1/completions", &format!("{{{PROMPT}}}")),
        post("/v1/embeddings", r#"{"model":"m","input":"a"}"#),
    ] {
        let answer = exchange(front.address, asking).await;
        assert_eq!((status(&answer), code(&answer).as_str()), (503, "no_worker_available"), "{answer}");
        assert!(answer.contains("p0: serves the prefill role only"), "{answer}");
    }
    assert_eq!(p[0].count(), 0);
}

#[tokio::test]
async fn requests_that_cannot_be_split_are_done_by_one_worker() {
    let front = start(quick());
    let (p, d) = fleet(&front, 1, 1).await;
    let a = Fake::new(decoded).await;
    for (path, body) in [
        ("/v1/embeddings", r#"{"model":"m","input":"a"}"#.to_owned()),
        ("/v1/completions", format!(r#"{{{PROMPT},"n":2}}"#)),
        ("/v1/completions", r#"{"model":"m","prompt":["a","b"]}"#.to_owned()),
        ("/v1/chat/completions", r#"{"model":"m","messages":[],"prompt_logprobs":1}"#.to_owned()),
    ] {
        let answer = exchange(front.address, post(path, &body)).await;
        assert_eq!((status(&answer), header(&answer, "everline-worker")), (200, Some("d0")), "{answer}");
    }
    assert_eq!((p[0].count(), d[0].count()), (0, 4));
    // Nor do clients say whose blocks are read.
    let body = format!(r#"{{{PROMPT},"n":2,"kv_transfer_params":{{"remote_block_ids":[[7]]}}}}"#);
    exchange(front.address, post("/v1/completions", &body)).await;
    let seen = d[0].bodies().pop().unwrap();
    assert_eq!((seen.get("kv_transfer_params"), &seen["n"]), (None, &json!(2)));
    // Of those who do whole requests, if there are some.
    add(&front, "a", a.address, WorkerRole::Aggregated, Connector::Nixl);
    front.cluster.change("a", |record| record.spec.transfer = Default::default());
    let answer = exchange(front.address, post("/v1/completions", &format!(r#"{{{PROMPT},"n":2}}"#))).await;
    assert_eq!((status(&answer), header(&answer, "everline-worker")), (200, Some("a")), "{answer}");
    assert!(a.bodies()[0].get("kv_transfer_params").is_none());
    // All others are split.
    let answer = complete(&front).await;
    assert_eq!(header(&answer, "everline-prefill-worker"), Some("p0"), "{answer}");
}

#[tokio::test]
async fn pairs_are_of_workers_that_hand_over_in_the_same_way() {
    let front = start(quick());
    let (p, d) = fleet(&front, 1, 0).await;
    let other = Fake::new(decoded).await;
    add(&front, "d", other.address, WorkerRole::Decode, Connector::Shared);
    let answer = complete(&front).await;
    assert_eq!((status(&answer), header(&answer, "everline-prefill-worker")), (200, None), "{answer}");
    assert_eq!((p[0].count(), d.len(), other.count()), (0, 0, 1));
}

#[tokio::test]
async fn the_decode_worker_with_the_least_to_do_is_chosen_and_any_number_of_either_will_do() {
    let front = start(quick());
    let (p, d) = fleet(&front, 2, 3).await;
    let busy = |id: &str| front.cluster.bookings().book(front.cluster.worker(id).unwrap(), 0, 5_000);
    let _busy = [busy("d0"), busy("d2"), busy("p1")];
    for _ in 0..4 {
        let answer = complete(&front).await;
        assert_eq!(header(&answer, "everline-worker"), Some("d1"), "{answer}");
    }
    assert_eq!(p.iter().chain(&d).map(Fake::count).collect::<Vec<_>>(), [4, 0, 0, 4, 0]);
}

#[tokio::test]
async fn a_short_prompt_is_done_by_one_worker_where_that_is_wanted() {
    let pd = PdOptions { bypass_tokens: 100, ..PdOptions::default() };
    let front = start(FrontConfig { pd, ..quick() });
    let (p, d) = fleet(&front, 1, 1).await;
    let answer = complete(&front).await;
    assert_eq!((status(&answer), header(&answer, "everline-prefill-worker")), (200, None), "{answer}");
    assert_eq!((p[0].count(), d[0].bodies()[0].get("kv_transfer_params")), (0, None));
    let ids: Vec<u32> = (0..101).collect();
    let body = json!({"model": "m", "prompt": ids, "max_tokens": 9});
    let answer = exchange(front.address, post("/v1/completions", &body.to_string())).await;
    assert_eq!(header(&answer, "everline-prefill-worker"), Some("p0"), "{answer}");
    let metrics = exchange(front.address, request("GET", "/metrics", "", "")).await;
    for line in [
        r#"everline_pd_plans_total{plan="bypass"} 1"#,
        r#"everline_pd_plans_total{plan="pair"} 1"#,
        r#"everline_pd_legs_total{leg="prefill",outcome="ok"} 1"#,
        r#"everline_pd_legs_total{leg="decode",outcome="ok"} 1"#,
        "everline_pd_prefill_seconds_count 1",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

#[tokio::test]
async fn a_client_may_name_either_of_the_two() {
    let front = start(quick());
    let (p, d) = fleet(&front, 2, 2).await;
    for (named, at) in [("p1", "everline-prefill-worker"), ("d1", "everline-worker")] {
        for _ in 0..3 {
            let extra = format!("everline-worker: {named}\r\n");
            let answer =
                exchange(front.address, request("POST", "/v1/completions", &extra, &format!("{{{PROMPT}}}")))
                    .await;
            assert_eq!((status(&answer), header(&answer, at)), (200, Some(named)), "{answer}");
            assert!(header(&answer, "everline-prefill-worker").is_some(), "{answer}");
        }
    }
    assert_eq!(p.iter().chain(&d).map(Fake::count).sum::<usize>(), 12);
}

#[tokio::test]
async fn a_trace_and_an_explanation_tell_of_both_choices() {
    let front = start(quick());
    let admin = admin_of(&front);
    let _fleet = fleet(&front, 2, 1).await;
    let extra = "everline-trace: 1\r\n";
    let answer =
        exchange(front.address, request("POST", "/v1/completions", extra, &format!("{{{PROMPT}}}"))).await;
    let trace: serde_json::Value = serde_json::from_str(header(&answer, "everline-trace").unwrap()).unwrap();
    assert_eq!((&trace["chosen"]["worker"], &trace["policy"]), (&json!("d0"), &json!("least_loaded")));
    let prefill = &trace["prefill"];
    assert_eq!(prefill["chosen"]["worker"], header(&answer, "everline-prefill-worker").unwrap());
    assert_eq!(prefill["candidates"].as_array().map(Vec::len), Some(3), "{trace}");

    let body = format!(r#"{{"route":"/v1/completions","body":{{{PROMPT}}}}}"#);
    let reply = body_of(&exchange(admin, post("/v1/admin/explain", &body)).await);
    assert_eq!(reply["candidates"][0]["worker"], "d0", "{reply}");
    let chosen = reply["prefill"]["candidates"][0]["worker"].as_str().unwrap();
    assert!(
        chosen.starts_with('p') && reply["prefill"]["candidates"][0]["share"].as_f64() > Some(0.0),
        "{reply}"
    );
}

fn body_of(response: &str) -> serde_json::Value {
    body(response)
}
