//! What API keys, bound node tokens and the newer routes do over real sockets.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::support::*;
use crate::http::auth::digest_of;
use crate::http::{ClientKey, FrontConfig, KeyRing, Metrics, NodeToken, Rate, TokenDigests};
use crate::state::worker::WorkerRole;

fn key(id: &str) -> ClientKey {
    ClientKey {
        id: id.into(),
        digest: digest_of(format!("secret-{id}").as_bytes()),
        models: None,
        rate: None,
        max_concurrent: None,
        expires: None,
    }
}

fn with_keys(keys: Vec<ClientKey>) -> FrontConfig {
    FrontConfig { keys: Arc::new(KeyRing::new(Some(keys))), ..FrontConfig::default() }
}

fn as_key(id: &str, method: &str, path: &str, body: &str) -> String {
    request(method, path, &format!("authorization: Bearer secret-{id}\r\n"), body)
}

const CHAT: &str = r#"{"model":"m","messages":[]}"#;

fn chat_as(id: &str) -> String {
    as_key(id, "POST", "/v1/chat/completions", CHAT)
}

#[tokio::test]
async fn secrets_do_not_reach_workers_logs_of_keys_or_metrics() {
    let cluster = MemoryCluster::new();
    let config = with_keys(vec![key("a"), key("b")]);
    let metrics = Metrics::default();
    let front = start_with(config, cluster, metrics);
    let (address, seen) = remembering().await;
    front.cluster.add("w", address);
    assert_eq!(status(&exchange(front.address, chat_as("a")).await), 200);
    let other = request("POST", "/v1/messages", "x-api-key: secret-b\r\n", CHAT);
    assert_eq!(status(&exchange(front.address, other).await), 200);
    assert_eq!(status(&exchange(front.address, chat_as("nobody")).await), 401);
    assert_eq!(front.front.metrics.requests_taken(), 2, "who is refused does not count as taken");
    let seen = seen.lock().join("\n");
    assert!(seen.contains(CHAT) && !seen.contains("secret"), "{seen}");
    let text = exchange(front.address, request("GET", "/metrics", "", "")).await;
    for line in [
        "everline_key_requests_total{key=\"a\"} 1",
        "everline_key_limited_total{key=\"b\"} 0",
        "everline_key_requests_in_flight{key=\"a\"} 0",
        "everline_rejected_total{reason=\"invalid_api_key\"} 1",
        "everline_requests_total{route=\"/v1/messages\",outcome=\"ok\"} 1",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    assert!(!text.contains("secret"));
}

#[tokio::test]
async fn all_inference_routes_reach_a_worker_with_path_and_body_untouched() {
    let front = start(FrontConfig::default());
    let (address, seen) = remembering().await;
    front.cluster.add("w", address);
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages?beta=true",
        "/v1/rerank",
        "/v1/score",
        "/tokenize",
        "/detokenize",
        "/v1/audio/speech?voice=a%20b",
        "/v1/messages/count_tokens",
    ] {
        let body = r#"{ "model" : "m", "x": [1,  2] }"#;
        let response = exchange(front.address, post(path, body)).await;
        assert_eq!(status(&response), 200, "{path}: {response}");
        assert_eq!(header(&response, "everline-worker"), Some("w"));
        let seen = seen.lock().pop().unwrap();
        assert!(seen.starts_with(&format!("POST {path} HTTP/1.1\r\n")) && seen.ends_with(body), "{seen}");
    }
}

#[tokio::test]
async fn streams_that_end_in_their_own_way_are_left_as_they_are() {
    let front = start(FrontConfig::default());
    let events = "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
    front.cluster.add("w", answering(ok("text/event-stream", events)).await);
    for path in ["/v1/messages", "/v1/responses"] {
        let response = exchange(front.address, post(path, r#"{"model":"m","stream":true}"#)).await;
        let body = response.split_once("\r\n\r\n").unwrap().1;
        assert!(body.contains(events) && !body.contains("error"), "{path}: {body}");
    }
}

#[tokio::test]
async fn what_needs_no_model_goes_to_any_worker_with_its_method() {
    let front = start(with_keys(vec![key("a")]));
    let (address, seen) = remembering().await;
    front.cluster.add("w", address);
    for (method, path, body) in [
        ("GET", "/v1/files?limit=2", ""),
        ("DELETE", "/v1/responses/resp_1", ""),
        ("POST", "/v1/audio/transcriptions", "--b\r\nnot json\r\n--b--"),
        ("PUT", "/v1/x/y/", "{}"),
    ] {
        let response = exchange(front.address, as_key("a", method, path, body)).await;
        assert_eq!(status(&response), 200, "{method} {path}: {response}");
        let seen = seen.lock().pop().unwrap();
        assert!(seen.starts_with(&format!("{method} {path} HTTP/1.1\r\n")) && seen.ends_with(body), "{seen}");
    }
    // A model that is named still decides who gets it.
    let response = exchange(front.address, as_key("a", "POST", "/v1/audio/speech", r#"{"model":"x"}"#)).await;
    assert_eq!((status(&response), code(&response).as_str()), (404, "model_not_found"));
}

#[tokio::test]
async fn anthropic_clients_get_errors_of_their_own_shape() {
    let front = start(with_keys(vec![key("a")]));
    for (request, code, kind) in [
        (post("/v1/messages", CHAT), 401, "authentication_error"),
        (as_key("a", "POST", "/v1/messages", CHAT), 503, "overloaded_error"),
        (as_key("a", "POST", "/v1/messages", "{}"), 400, "invalid_request_error"),
        (as_key("a", "GET", "/v1/messages", ""), 405, "invalid_request_error"),
    ] {
        let response = exchange(front.address, request).await;
        assert_eq!(status(&response), code, "{response}");
        let body = body(&response);
        assert_eq!((&body["type"], &body["error"]["type"]), (&json!("error"), &json!(kind)), "{response}");
    }
}

#[tokio::test]
async fn a_key_sees_and_uses_its_models_only() {
    let limited = ClientKey { models: Some(vec!["m-*".into()]), ..key("a") };
    let front = start(with_keys(vec![limited, key("b")]));
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    let names = |response: &str| -> Vec<String> {
        let body = body(response);
        body["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap().to_owned()).collect()
    };
    let all = exchange(front.address, as_key("b", "GET", "/v1/models", "")).await;
    assert_eq!(names(&all), ["m", "m-lora"]);
    let some = exchange(front.address, as_key("a", "GET", "/v1/models", "")).await;
    assert_eq!(names(&some), ["m-lora"]);
    let refused = exchange(front.address, chat_as("a")).await;
    assert_eq!((status(&refused), code(&refused).as_str()), (403, "model_not_allowed"));
    assert!(refused.contains("m-*"), "{refused}");
    for (path, expected) in [("m-lora", 200), ("m", 403), ("%6d-lora", 200), ("m-none", 404), ("%zz", 400)] {
        let path = format!("/v1/models/{path}");
        let response = exchange(front.address, as_key("a", "GET", &path, "")).await;
        assert_eq!(status(&response), expected, "{path}: {response}");
    }
    let shown = exchange(front.address, as_key("b", "GET", "/v1/models/m", "")).await;
    assert_eq!(body(&shown)["max_model_len"], 2048);
}

#[tokio::test]
async fn a_key_for_some_models_cannot_send_what_names_none() {
    let limited = ClientKey { models: Some(vec!["m".into()]), ..key("a") };
    let front = start(with_keys(vec![limited]));
    let (address, seen) = remembering().await;
    front.cluster.add("w", address);
    for (method, path, body) in [
        ("GET", "/v1/files", ""),
        ("POST", "/v1/audio/speech", "{}"),
        ("POST", "/v1/audio/speech", r#"{"model":"m-lora"}"#),
        ("DELETE", "/v1/responses/x", ""),
        ("POST", "/v1/chat/completions/", r#"{"model":["m"]}"#),
        ("POST", "/v1/audio/speech", r#"{"model":"m","model":"m-lora"}"#),
    ] {
        let response = exchange(front.address, as_key("a", method, path, body)).await;
        assert_eq!((status(&response), code(&response).as_str()), (403, "model_not_allowed"), "{path}");
    }
    // What a form says in a part that looks like JSON is not what the worker reads.
    let form = "authorization: Bearer secret-a\r\ncontent-type: application/x-www-form-urlencoded\r\n";
    let body = r#"{"model":"m","x":"&model=m-lora&"}"#;
    let response = exchange(front.address, request("POST", "/v1/audio/speech", form, body)).await;
    assert_eq!(status(&response), 403, "{response}");
    // Nor is a form good that names two.
    let form = "authorization: Bearer secret-a\r\ncontent-type: multipart/form-data; boundary=x\r\n";
    let model =
        |name: &str| format!("--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{name}\r\n");
    let body = format!("{}{}--x--\r\n", model("m"), model("m-lora"));
    let response = exchange(front.address, request("POST", "/v1/audio/transcriptions", form, &body)).await;
    assert_eq!(status(&response), 403, "{response}");
    assert!(seen.lock().is_empty(), "nothing reached the worker");
    let response = exchange(front.address, as_key("a", "POST", "/v1/audio/speech", CHAT)).await;
    assert_eq!(status(&response), 200, "{response}");
}

#[tokio::test]
async fn who_is_too_fast_is_told_when_to_come_back_and_others_are_not_held_up() {
    let slow = ClientKey { rate: Some(Rate::new(0.5, 2)), ..key("slow") };
    let front = start(with_keys(vec![slow, key("other")]));
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    for expected in [200, 200, 429] {
        let response = exchange(front.address, chat_as("slow")).await;
        assert_eq!(status(&response), expected, "{response}");
        if expected == 429 {
            assert_eq!(code(&response), "rate_limit_exceeded");
            assert_eq!(header(&response, "retry-after"), Some("2"));
            assert_eq!(header(&response, "x-ratelimit-limit-requests"), Some("2"));
            assert_eq!(header(&response, "x-ratelimit-remaining-requests"), Some("0"));
            assert!(header(&response, "x-ratelimit-reset-requests").unwrap().ends_with('s'));
        }
    }
    assert_eq!(status(&exchange(front.address, chat_as("other")).await), 200);
}

#[tokio::test]
async fn a_request_is_in_flight_until_its_last_byte_and_gives_its_place_back() {
    let narrow = ClientKey { max_concurrent: Some(1), ..key("a") };
    let front = start(with_keys(vec![narrow]));
    // Answers the head and half of the body, and the rest when the test says so.
    let (go, gate) = tokio::sync::watch::channel(false);
    let address = worker(move |mut stream| {
        let mut gate = gate.clone();
        async move {
            while read_message(&mut stream).await.is_some() {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{").await;
                let _ = gate.wait_for(|open| *open).await;
                let _ = stream.write_all(b"}").await;
            }
        }
    })
    .await;
    front.cluster.add("w", address);
    let mut first = TcpStream::connect(front.address).await.unwrap();
    first.write_all(chat_as("a").as_bytes()).await.unwrap();
    let mut begun = Vec::new();
    while !begun.ends_with(b"\r\n\r\n{") {
        begun.push(first.read_u8().await.unwrap());
    }
    let second = exchange(front.address, chat_as("a")).await;
    assert_eq!((status(&second), code(&second).as_str()), (429, "too_many_in_flight"));
    assert_eq!(header(&second, "retry-after"), Some("1"));
    go.send(true).unwrap();
    assert_eq!(read_to_close(&mut first).await, "}");
    let in_flight = || front.front.config.keys.list()[0].in_flight;
    eventually("the place is given back", || in_flight() == 0).await;
    assert_eq!(status(&exchange(front.address, chat_as("a")).await), 200);

    // A client that leaves gives it back too.
    go.send(false).unwrap();
    let mut third = TcpStream::connect(front.address).await.unwrap();
    third.write_all(chat_as("a").as_bytes()).await.unwrap();
    eventually("in flight", || in_flight() == 1).await;
    drop(third);
    eventually("the place is given back", || in_flight() == 0).await;
}

#[tokio::test]
async fn a_revoked_key_is_refused_on_a_connection_that_stays_open() {
    let front = start(with_keys(vec![key("a"), key("b")]));
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    let request = chat_as("a").replace("connection: close\r\n", "");
    stream.write_all(request.as_bytes()).await.unwrap();
    assert!(read_message(&mut stream).await.unwrap().0.starts_with("HTTP/1.1 200"));
    front.front.config.keys.replace(vec![key("b")]);
    stream.write_all(request.as_bytes()).await.unwrap();
    assert!(read_message(&mut stream).await.unwrap().0.starts_with("HTTP/1.1 401"));
}

#[tokio::test]
async fn operators_see_keys_without_secrets() {
    let limited = ClientKey { models: Some(vec!["m".into()]), max_concurrent: Some(3), ..key("a") };
    let front = start(with_keys(vec![limited, key("b")]));
    let admin = admin_of(&front);
    exchange(front.address, chat_as("a")).await;
    let response = exchange(admin, request("GET", "/v1/admin/keys", "", "")).await;
    let shown = body(&response);
    assert_eq!((&shown["required"], &shown["keys"][0]["models"]), (&json!(true), &json!(["m"])));
    assert_eq!((&shown["keys"][0]["admitted"], &shown["keys"][1]["admitted"]), (&json!(1), &json!(0)));
    let open = start(FrontConfig::default());
    let response = exchange(admin_of(&open), request("GET", "/v1/admin/keys", "", "")).await;
    assert_eq!(body(&response), json!({"required": false, "keys": []}));
}

#[tokio::test]
async fn bound_node_tokens_stay_in_their_networks_and_roles() {
    let token = |id: &str, network: &str, role| NodeToken {
        id: id.into(),
        digest: digest_of(id.as_bytes()),
        networks: vec![network.parse().unwrap()],
        roles: vec![role],
    };
    let mut config = FrontConfig::default();
    config.nodes.tokens = TokenDigests::of_tokens(["free"]);
    config.nodes.bound_tokens = vec![
        token("here", "127.0.0.0/8", WorkerRole::Decode),
        token("elsewhere", "10.0.0.0/8", WorkerRole::Decode),
    ];
    let front = start(config);
    let send = |token: &str, method: &'static str, path: &'static str, body: String| {
        let headers = format!("authorization: Bearer {token}\r\n");
        exchange(front.address, request(method, path, &headers, &body))
    };
    let node = |id: &str, role: &str| {
        json!({"url": "http://127.0.0.1:1", "id": id, "role": role, "models": ["m"], "probe": false})
            .to_string()
    };
    let refused = send("elsewhere", "GET", "/v1/nodes", String::new()).await;
    assert_eq!((status(&refused), code(&refused).as_str()), (403, "token_not_for_this"));
    assert_eq!(status(&send("here", "POST", "/v1/nodes", node("d", "decode")).await), 201);
    let refused = send("here", "POST", "/v1/nodes", node("p", "prefill")).await;
    assert_eq!((status(&refused), code(&refused).as_str()), (403, "token_not_for_this"));
    assert!(front.cluster.worker("p").is_none());
    // Nor does it speak for workers of other roles.
    assert_eq!(status(&send("free", "POST", "/v1/nodes", node("p", "prefill")).await), 201);
    assert_eq!(status(&send("here", "POST", "/v1/nodes/p/heartbeat", String::new()).await), 403);
    assert_eq!(status(&send("here", "DELETE", "/v1/nodes/p", String::new()).await), 403);
    assert!(front.cluster.heartbeats.lock().is_empty());
    assert_eq!(status(&send("here", "POST", "/v1/nodes/d/heartbeat", String::new()).await), 200);
    assert_eq!(status(&send("here", "DELETE", "/v1/nodes/d", String::new()).await), 200);
    assert_eq!(front.cluster.barriers.load(Ordering::Relaxed), 2, "one for each registration");
}

#[tokio::test]
async fn a_live_worker_belongs_to_the_node_token_it_came_with() {
    let mut config = FrontConfig::default();
    config.nodes.tokens = TokenDigests::of_tokens(["one", "two"]);
    let front = start(config);
    let send = |token: &str, method: &'static str, path: &'static str, body: &str| {
        let headers = format!("authorization: Bearer {token}\r\n");
        exchange(front.address, request(method, path, &headers, body))
    };
    let node = r#"{"url": "http://127.0.0.1:1", "id": "w", "models": ["m"], "probe": false}"#;
    assert_eq!(status(&send("one", "POST", "/v1/nodes", node).await), 201);
    // Not even at its own address: who may register it may also change what it serves.
    let refused = send("two", "POST", "/v1/nodes", node).await;
    assert_eq!((status(&refused), code(&refused).as_str()), (409, "worker_exists"));
    assert_eq!(status(&send("two", "POST", "/v1/nodes/w/heartbeat", "").await), 403);
    assert_eq!(status(&send("two", "DELETE", "/v1/nodes/w", "").await), 403);
    assert_eq!(status(&send("one", "POST", "/v1/nodes/w/heartbeat", "").await), 200);
    assert_eq!(status(&send("one", "POST", "/v1/nodes", node).await), 200);
    // Offline, its name is free.
    front.cluster.change("w", |record| record.online = false);
    assert_eq!(status(&send("two", "POST", "/v1/nodes", node).await), 200);
}

#[tokio::test]
async fn metrics_of_the_admin_listener_can_be_left_open() {
    let config = FrontConfig {
        admin_tokens: TokenDigests::of_tokens(["root"]),
        metrics_open_on_admin: true,
        ..FrontConfig::default()
    };
    let front = start(config);
    let admin = admin_of(&front);
    assert_eq!(status(&exchange(admin, request("GET", "/metrics", "", "")).await), 200);
    assert_eq!(status(&exchange(admin, request("GET", "/v1/admin/status", "", "")).await), 401);
}

#[tokio::test]
async fn each_listener_describes_itself_and_heads_have_no_body() {
    let front = start(FrontConfig::default());
    for (address, there, not_there) in [
        (front.address, "/v1/chat/completions", "/v1/admin/status"),
        (admin_of(&front), "/v1/admin/status", "/v1/chat/completions"),
    ] {
        let response = exchange(address, request("GET", "/openapi.json", "", "")).await;
        assert_eq!(header(&response, "content-type"), Some("application/json"));
        let document = body(&response);
        assert_eq!(document["openapi"], "3.1.0");
        assert!(document["paths"].get(there).is_some() && document["paths"].get(not_there).is_none());
        let response = exchange(address, request("HEAD", "/readyz", "", "")).await;
        assert_eq!((status(&response), response.split_once("\r\n\r\n").unwrap().1), (200, ""));
    }
}

#[tokio::test]
async fn a_large_body_that_is_refused_for_its_key_is_answered_not_reset() {
    let front = start(with_keys(vec![key("a")]));
    let response = exchange(front.address, post("/v1/chat/completions", &"x".repeat(200_000))).await;
    assert_eq!((status(&response), code(&response).as_str()), (401, "missing_api_key"));
    // Who waits for a 100 is told before the body is sent.
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    let head =
        "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let (head, _) = read_message(&mut stream).await.unwrap();
    assert!(head.starts_with("HTTP/1.1 401"), "{head}");
}
