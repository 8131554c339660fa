//! Registration, heartbeats, the admin plane, health and metrics.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::streams::keep_in;
use super::support::*;
use crate::http::{FrontConfig, Metrics, TokenDigests, run_prober};
use crate::relay;
use crate::relay::alone::Alone;
use crate::state::worker::{EngineKind, Liveness, WorkerSource};

async fn send(front: &Running, method: &str, path: &str, body: Value) -> String {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    exchange(front.address, request(method, path, "", &body)).await
}

/// An engine that answers health, models and metrics like vLLM.
async fn engine() -> std::net::SocketAddr {
    worker(|mut stream| async move {
        use tokio::io::AsyncWriteExt;
        while let Some((head, _)) = read_message(&mut stream).await {
            let answer = match head.split(' ').nth(1).unwrap() {
                "/health" => ok("text/plain", ""),
                "/v1/models" => ok(
                    "application/json",
                    r#"{"data":[{"id":"m","max_model_len":2048},{"id":"lora","parent":"m"}]}"#,
                ),
                "/metrics" => {
                    ok("text/plain", "vllm:cache_config_info{block_size=\"32\",num_gpu_blocks=\"256\"} 1.0\n")
                }
                _ => "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned(),
            };
            if stream.write_all(answer.as_bytes()).await.is_err() {
                break;
            }
        }
    })
    .await
}

#[tokio::test]
async fn registration_asks_the_worker_and_fills_in_what_was_not_given() {
    let front = start(FrontConfig::default());
    let address = engine().await;
    let response = send(&front, "POST", "/v1/nodes", json!({"url": format!("http://{address}/")})).await;
    assert_eq!(status(&response), 201, "{response}");
    let id = body(&response)["id"].as_str().unwrap().to_owned();
    assert_eq!(id, address.to_string());
    let record = front.cluster.worker(&id).unwrap().record.clone();
    assert_eq!((record.spec.block_size, record.spec.capacity_blocks), (Some(32), Some(256)));
    assert_eq!(record.spec.models.len(), 2);
    assert_eq!((record.spec.engine, record.spec.source), (EngineKind::Vllm, WorkerSource::Node));
    assert_eq!(record.liveness, Liveness::Heartbeat);

    // What was given wins over what the worker says; again is 200.
    let given = json!({"url": format!("http://{address}"), "models": ["x"], "block_size": 16, "heartbeat": false,
        "engine": "sglang", "labels": {"zone": "a"}, "weight": 50});
    let response = send(&front, "POST", "/v1/nodes", given).await;
    assert_eq!((status(&response), &body(&response)["generation"]), (200, &json!(2)));
    let record = front.cluster.worker(&id).unwrap().record.clone();
    assert_eq!((record.spec.block_size, record.spec.models[0].name.as_str()), (Some(16), "x"));
    assert_eq!((record.spec.engine, record.liveness), (EngineKind::Sglang, Liveness::Probe));

    let shown = send(&front, "GET", &format!("/v1/nodes/{id}"), Value::Null).await;
    assert_eq!(body(&shown)["weight"], 50);
    let listed = send(&front, "GET", "/v1/nodes", Value::Null).await;
    assert_eq!(body(&listed)["data"].as_array().unwrap().len(), 1);
    let left = send(&front, "DELETE", &format!("/v1/nodes/{id}"), Value::Null).await;
    assert_eq!(status(&left), 200);
    let left = send(&front, "DELETE", &format!("/v1/nodes/{id}"), Value::Null).await;
    assert_eq!((status(&left), code(&left).as_str()), (404, "worker_not_found"));
}

#[tokio::test]
async fn an_sglang_without_metrics_says_what_it_is_and_is_told_the_rank_on_its_own_route() {
    use crate::engines::sim::events::EventFormat;
    use crate::engines::sim::{EngineSimArgs, Simulator};
    let mut args = EngineSimArgs::defaults();
    (args.instant, args.kv_events_format) = (true, EventFormat::Sglang);
    (args.dp, args.block_size, args.blocks) = (3, 64, 50);
    let engine = Simulator::start(args).await.unwrap();
    let front = start(FrontConfig::default());
    let told = json!({"url": format!("http://{}", engine.address()), "id": "w"});
    assert_eq!(status(&send(&front, "POST", "/v1/nodes", told).await), 201);
    let spec = front.cluster.worker("w").unwrap().record.spec.clone();
    assert_eq!((spec.block_size, spec.capacity_blocks), (Some(64), Some(150)));
    assert_eq!((spec.dp_ranks, spec.engine), (3, EngineKind::Sglang));
    for rank in [2, 0, 2, 2] {
        let body = json!({"model": "sim-model", "input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1},
                          "everline": {"worker": format!("w/{rank}")}});
        let answer = send(&front, "POST", "/generate", body).await;
        assert_eq!(status(&answer), 200, "{answer}");
    }
    let prompts = engine.ranks().iter().map(|rank| rank.stats.prompt_tokens.get());
    assert_eq!(prompts.collect::<Vec<_>>(), [3, 0, 9]);
    // What is said counts.
    let told =
        json!({"url": format!("http://{}", engine.address()), "id": "x", "dp_ranks": 1, "block_size": 32});
    assert_eq!(status(&send(&front, "POST", "/v1/nodes", told).await), 201);
    let spec = front.cluster.worker("x").unwrap().record.spec.clone();
    assert_eq!((spec.dp_ranks, spec.block_size), (1, Some(32)));
}

#[tokio::test]
async fn a_worker_that_does_not_answer_is_not_registered_unless_told_so() {
    let front = start(FrontConfig::default());
    let url = format!("http://{}", refusing().await);
    let response = send(&front, "POST", "/v1/nodes", json!({"url": url, "id": "w"})).await;
    assert_eq!((status(&response), code(&response).as_str()), (422, "probe_failed"));
    assert!(response.contains("/health"), "{response}");
    let response = send(&front, "POST", "/v1/nodes", json!({"url": url, "id": "w", "probe": false})).await;
    assert_eq!((status(&response), code(&response).as_str()), (400, "invalid_value"));
    let told = json!({"url": url, "id": "w", "probe": false, "models": [{"name": "m", "max_model_len": 5}]});
    assert_eq!(status(&send(&front, "POST", "/v1/nodes", told.clone()).await), 201);
    front.cluster.without_quorum.store(true, Ordering::Relaxed);
    let response = send(&front, "POST", "/v1/nodes", told).await;
    assert_eq!((status(&response), code(&response).as_str()), (503, "cluster_unavailable"));
    assert_eq!(header(&response, "retry-after"), Some("1"));
}

#[tokio::test]
async fn bad_registrations_are_explained() {
    let front = start(FrontConfig::default());
    for (bad, expected) in [
        (json!({}), (400, "invalid_value")),
        (json!({"url": "http://127.0.0.1:1", "surprise": 1}), (400, "invalid_value")),
        (json!({"url": "ftp://127.0.0.1"}), (400, "invalid_value")),
        (json!({"url": "ftp://127.0.0.1:1"}), (400, "invalid_value")),
        (json!({"url": "http://127.0.0.1:99999"}), (400, "invalid_value")),
        (json!({"url": "http://u:p@127.0.0.1"}), (400, "invalid_value")),
        (json!({"url": "http://127.0.0.1:1/path"}), (400, "invalid_value")),
        (json!({"url": "http://127.0.0.1:1", "id": "a b"}), (400, "invalid_value")),
        (json!({"url": "http://127.0.0.1:1", "weight": 0}), (400, "invalid_value")),
        (json!({"url": "http://127.0.0.1:1", "labels": {"a": "x".repeat(70_000)}}), (413, "body_too_large")),
    ] {
        let response = send(&front, "POST", "/v1/nodes", bad.clone()).await;
        assert_eq!((status(&response), code(&response).as_str()), expected, "{bad}");
    }
    let twice = r#"{"url":"http://127.0.0.1:1","url":"http://127.0.0.1:2"}"#;
    let response = exchange(front.address, post("/v1/nodes", twice)).await;
    assert_eq!((status(&response), code(&response).as_str()), (400, "invalid_value"));
    let response = exchange(front.address, post("/v1/nodes", "{")).await;
    assert_eq!((status(&response), code(&response).as_str()), (400, "invalid_json"));
    let response = send(&front, "GET", "/v1/nodes/%ff", Value::Null).await;
    assert_eq!((status(&response), code(&response).as_str()), (400, "invalid_value"));
}

#[tokio::test]
async fn a_live_identity_cannot_be_taken_over() {
    let front = start(FrontConfig::default());
    let at = |port: u16| json!({"url": format!("http://127.0.0.1:{port}"), "id": "w", "models": ["m"], "probe": false});
    assert_eq!(status(&send(&front, "POST", "/v1/nodes", at(1)).await), 201);
    let response = send(&front, "POST", "/v1/nodes", at(2)).await;
    assert_eq!((status(&response), code(&response).as_str()), (409, "worker_exists"));
    assert_eq!(front.cluster.worker("w").unwrap().record.spec.url, "http://127.0.0.1:1");
    assert_eq!(status(&send(&front, "POST", "/v1/nodes", at(1)).await), 200);
    front.cluster.change("w", |record| record.online = false);
    assert_eq!(status(&send(&front, "POST", "/v1/nodes", at(2)).await), 200);
    // What an operator put there a node cannot take away.
    front.cluster.change("w", |record| record.spec.source = WorkerSource::Admin);
    let response = send(&front, "DELETE", "/v1/nodes/w", Value::Null).await;
    assert_eq!((status(&response), code(&response).as_str()), (409, "refused"));
}

#[tokio::test]
async fn heartbeats_are_taken_note_of_and_unknown_ones_looked_up_twice() {
    let front = start(FrontConfig::default());
    front.cluster.add("w", refusing().await);
    front.cluster.change("w", |record| record.drain = true);
    let response = send(&front, "POST", "/v1/nodes/w/heartbeat", Value::Null).await;
    let expected = json!({"id": "w", "online": true, "drain": true, "interval_ms": 1000});
    assert_eq!((status(&response), body(&response)), (200, expected));
    assert_eq!(front.cluster.barriers.load(Ordering::Relaxed), 0);
    let response = send(&front, "POST", "/v1/nodes/nobody/heartbeat", Value::Null).await;
    assert_eq!((status(&response), code(&response).as_str()), (404, "worker_not_found"));
    assert_eq!(front.cluster.barriers.load(Ordering::Relaxed), 1);
    assert_eq!(front.cluster.heartbeats.lock().len(), 3);
}

#[tokio::test]
async fn node_routes_need_a_token_when_there_are_tokens() {
    let mut config = FrontConfig::default();
    config.nodes.tokens = TokenDigests::of_tokens(["first", "second"]);
    let front = start(config);
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    for (method, path) in [
        ("GET", "/v1/nodes"),
        ("POST", "/v1/nodes"),
        ("GET", "/v1/nodes/w"),
        ("DELETE", "/v1/nodes/w"),
        ("POST", "/v1/nodes/w/heartbeat"),
    ] {
        for (credentials, expected) in [
            ("", (401, "unauthorized")),
            ("authorization: Basic Zmlyc3Q=\r\n", (401, "unauthorized")),
            ("authorization: Bearer \r\n", (401, "unauthorized")),
            ("authorization: Bearer third\r\n", (403, "forbidden")),
            ("authorization: Bearer firs\r\n", (403, "forbidden")),
        ] {
            let response = exchange(front.address, request(method, path, credentials, "")).await;
            assert_eq!(
                (status(&response), code(&response).as_str()),
                expected,
                "{method} {path} {credentials}"
            );
        }
    }
    let good = "authorization: Bearer second\r\n";
    let response = exchange(front.address, request("POST", "/v1/nodes/w/heartbeat", good, "")).await;
    assert_eq!(status(&response), 200);
    // Clients need none.
    assert_eq!(status(&exchange(front.address, chat()).await), 200);
}

#[tokio::test]
async fn operators_see_and_change_workers() {
    let front = start(FrontConfig::default());
    let admin = admin_of(&front);
    let send = |method: &'static str, path: &'static str, json: Value| async move {
        let text = if json.is_null() { String::new() } else { json.to_string() };
        exchange(admin, request(method, path, "", &text)).await
    };
    let add = json!({"url": format!("http://{}", engine().await), "id": "w"});
    assert_eq!(status(&send("POST", "/v1/admin/workers", add).await), 201);
    let record = front.cluster.worker("w").unwrap().record.clone();
    assert_eq!((record.spec.source, record.liveness), (WorkerSource::Admin, Liveness::Probe));
    // An operator may move a live worker.
    let moved = json!({"url": "http://127.0.0.1:9", "id": "w", "models": ["m"], "probe": false});
    assert_eq!(status(&send("POST", "/v1/admin/workers", moved).await), 200);

    let drained = send("POST", "/v1/admin/workers/w/drain", json!({"drain": true})).await;
    assert_eq!((&body(&drained)["id"], &body(&drained)["drain"]), (&json!("w"), &json!(true)));
    let shown = send("GET", "/v1/admin/workers/w?consistency=linearizable", Value::Null).await;
    assert_eq!((&body(&shown)["drain"], &body(&shown)["requests"]), (&json!(true), &json!(0)));
    assert_eq!(front.cluster.barriers.load(Ordering::Relaxed), 1);
    assert_eq!(status(&send("GET", "/v1/admin/workers?consistency=maybe", Value::Null).await), 400);
    assert_eq!(
        body(&send("GET", "/v1/admin/workers", Value::Null).await)["workers"].as_array().unwrap().len(),
        1
    );

    front.front.metrics.recent().push("something".into());
    let status_reply = body(&send("GET", "/v1/admin/status", Value::Null).await);
    assert_eq!(status_reply["cluster"]["cluster_id"], "c0ffee");
    assert_eq!(status_reply["recent_errors"][0]["what"], "something");
    assert_eq!(status_reply["workers"][0]["id"], "w");

    let message = send("POST", "/v1/admin/members", json!({"op": "add", "peer": "127.0.0.1:1"})).await;
    assert_eq!(body(&message), json!({"message": "done"}));
    let refused = send("POST", "/v1/admin/members", json!({"op": "promote", "member": "x"})).await;
    assert_eq!((status(&refused), code(&refused).as_str()), (409, "refused"));
    assert_eq!(status(&send("GET", "/v1/admin/members", Value::Null).await), 200);
    assert_eq!(status(&send("DELETE", "/v1/admin/workers/w", Value::Null).await), 200);
    assert_eq!(status(&send("DELETE", "/v1/admin/workers/w", Value::Null).await), 404);
    // The planes do not serve each other's routes.
    assert_eq!(status(&exchange(admin, chat()).await), 404);
    assert_eq!(status(&send("GET", "/v1/nodes", Value::Null).await), 404);
}

#[tokio::test]
async fn admin_routes_need_a_token_when_there_are_tokens() {
    let config = FrontConfig { admin_tokens: TokenDigests::of_tokens(["root"]), ..FrontConfig::default() };
    let front = start(config);
    let admin = admin_of(&front);
    for path in ["/v1/admin/status", "/v1/admin/workers", "/v1/admin/members"] {
        assert_eq!(status(&exchange(admin, request("GET", path, "", "")).await), 401);
        let good = request("GET", path, "authorization: bearer root\r\n", "");
        assert_eq!(status(&exchange(admin, good).await), 200);
    }
    assert_eq!(status(&exchange(admin, request("GET", "/readyz", "", "")).await), 200);
}

#[tokio::test]
async fn readiness_follows_joining_and_draining_but_not_quorum() {
    let front = start(FrontConfig::default());
    let ready = || async { status(&send(&front, "GET", "/readyz", Value::Null).await) };
    assert_eq!(ready().await, 200);
    front.cluster.without_quorum.store(true, Ordering::Relaxed);
    let verbose = send(&front, "GET", "/readyz?verbose", Value::Null).await;
    assert_eq!((status(&verbose), &body(&verbose)["checks"]["quorum"]), (200, &json!("degraded: no quorum")));
    front.cluster.joined.store(false, Ordering::Relaxed);
    assert_eq!(ready().await, 503);
    front.cluster.joined.store(true, Ordering::Relaxed);
    front.cluster.is_behind.store(true, Ordering::Relaxed);
    let verbose = send(&front, "GET", "/readyz?verbose", Value::Null).await;
    let why = json!("has not applied yet what was committed before it started");
    assert_eq!((status(&verbose), &body(&verbose)["checks"]["caught_up"]), (503, &why));
    front.cluster.is_behind.store(false, Ordering::Relaxed);
    front.front.draining.cancel();
    let verbose = send(&front, "GET", "/readyz?verbose", Value::Null).await;
    assert_eq!((status(&verbose), &body(&verbose)["checks"]["not_draining"]), (503, &json!("draining")));
    assert_eq!(status(&send(&front, "GET", "/livez", Value::Null).await), 200);
}

#[tokio::test]
async fn who_does_not_know_what_ids_are_derived_from_is_not_ready_while_others_may() {
    let front = start_with(FrontConfig::default(), MemoryCluster::new(), Metrics::default());
    keep_in(&front, relay::Options::default(), Arc::<Alone>::default());
    let verbose = send(&front, "GET", "/readyz?verbose", Value::Null).await;
    assert_eq!(
        (status(&verbose), &body(&verbose)["checks"]["streams_secret"]),
        (503, &json!("not agreed on yet"))
    );
    // Nobody can agree on one now, and streams are kept without.
    front.cluster.without_quorum.store(true, Ordering::Relaxed);
    assert_eq!(status(&send(&front, "GET", "/readyz", Value::Null).await), 200);
}

#[tokio::test]
async fn metrics_speak_of_requests_workers_and_raft() {
    let front = start(FrontConfig::default());
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    exchange(front.address, chat()).await;
    exchange(front.address, post("/v1/completions", "{")).await;
    let text = send(&front, "GET", "/metrics", Value::Null).await;
    for line in [
        "everline_requests_total{route=\"/v1/chat/completions\",outcome=\"ok\"} 1",
        "everline_requests_total{route=\"/v1/completions\",outcome=\"client_error\"} 1",
        "everline_rejected_total{reason=\"invalid_json\"} 1",
        "everline_retries_total{reason=\"connect\"} 0",
        "everline_worker_online{worker=\"w\"} 1",
        "everline_worker_requests{worker=\"w\"} 0",
        "everline_raft_term{group=\"\"} 0",
        "everline_request_duration_seconds_count{route=\"/v1/chat/completions\"} 1",
        "everline_time_to_first_byte_seconds_count{route=\"/v1/chat/completions\"} 1",
        "everline_connections 1",
        "everline_build_info{version=",
        "# EOF",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    let config = FrontConfig { metrics_on_client: false, ..FrontConfig::default() };
    let quiet = start(config);
    assert_eq!(status(&send(&quiet, "GET", "/metrics", Value::Null).await), 404);
}

#[tokio::test]
async fn workers_that_do_not_heartbeat_are_probed_and_unreachable_ones_found_again() {
    let mut config = FrontConfig::default();
    config.nodes.probe_interval = std::time::Duration::from_millis(20);
    let front = start(config);
    front.cluster.add("good", engine().await);
    front.cluster.add("bad", refusing().await);
    front.cluster.add("beats", engine().await);
    front.cluster.change("beats", |record| record.liveness = Liveness::Heartbeat);
    let beats = front.cluster.worker("beats").unwrap().live.clone();
    beats.unreachable.store(true, Ordering::Relaxed);
    let stop = CancellationToken::new();
    let prober = tokio::spawn(run_prober(front.front.clone(), stop.clone()));
    eventually("two rounds", || front.cluster.probes.lock().len() >= 4).await;
    eventually("found again", || !beats.unreachable.load(Ordering::Relaxed)).await;
    stop.cancel();
    prober.await.unwrap();
    for (id, healthy) in front.cluster.probes.lock().iter() {
        assert_eq!(*healthy, id.as_str() == "good", "{id}");
        assert_ne!(id.as_str(), "beats");
    }
    assert!(front.cluster.worker("bad").unwrap().live.unreachable.load(Ordering::Relaxed));
}
