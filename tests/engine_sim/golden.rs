//! The simulated engine beside recordings of vLLM 0.32: heads, chunking, key order, nulls, errors.

use crate::support::{Shape, call, get, golden, golden_request, post, quick, start};
use serde_json::{Value, json};

/// Status line and headers without what differs from reply to reply.
fn head(text: &str) -> Vec<String> {
    let line = |line: &str| match line.split_once(": ") {
        Some((name @ ("date" | "content-length" | "x-request-id"), _)) => name.to_owned(),
        _ => line.to_owned(),
    };
    text.lines().filter(|text| !text.is_empty()).map(line).collect()
}

fn golden_text(file: &str) -> String {
    String::from_utf8(golden(file)).unwrap()
}

async fn replay(
    address: std::net::SocketAddr,
    name: &str,
    change: impl FnOnce(&mut Value),
) -> crate::support::Reply {
    let mut request = golden_request(name);
    change(&mut request["body"]);
    let headers: Vec<(String, String)> = request["headers"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()))
        .collect();
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (&name[..], &value[..])).collect();
    let body = match &request["body"] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let (method, path) = (request["method"].as_str().unwrap(), request["path"].as_str().unwrap());
    let reply = call(address, method, path, &headers, &body).await;
    let expected = golden_text(&format!("vllm_{name}.head.txt"));
    assert_eq!(head(&reply.head), head(&expected), "head of {name}");
    assert!(reply.complete, "{name} ends properly");
    reply
}

fn shapes(chunks: &[String]) -> Vec<Shape> {
    chunks
        .iter()
        .map(|chunk| {
            let event = chunk.strip_prefix("data: ").and_then(|rest| rest.strip_suffix("\n\n")).unwrap();
            assert!(!event.contains("\n\n"), "one event in a chunk: {chunk:?}");
            if event == "[DONE]" { Shape::Text(event.into()) } else { Shape::of(event) }
        })
        .collect()
}

fn golden_events(name: &str) -> Vec<String> {
    let text = golden_text(&format!("vllm_{name}.sse"));
    text.split_inclusive("\n\n").filter(|event| event.starts_with("data")).map(ToOwned::to_owned).collect()
}

#[tokio::test]
async fn streams_have_the_shape_of_the_recordings() {
    let sim = start(quick()).await;
    let names = [
        "chat_stream",
        "chat_stream_usage",
        "completions_n2",
        "completions_stream",
        "completions_stream_tokens",
    ];
    for name in names {
        let reply = replay(sim.address(), name, |_| {}).await;
        assert_eq!(shapes(&reply.chunks), shapes(&golden_events(name)), "{name}");
    }
    let reply = replay(sim.address(), "chat_stream", |_| {}).await;
    assert!(reply.chunks[0].contains(r#"{"id":"chatcmpl-client-req-1","#), "{}", reply.chunks[0]);
    assert!(reply.head.contains("x-request-id: client-req-1"));
}

#[tokio::test]
async fn a_stop_string_across_tokens_gives_the_recorded_sequence() {
    let sim = start(quick()).await;
    let free = replay(sim.address(), "completions_stop_hit", |body| body["stop"] = Value::Null).await;
    let texts: Vec<String> =
        free.events().iter().map(|event| event["choices"][0]["text"].as_str().unwrap().to_owned()).collect();
    // The last character of the sixth token and the first two of the seventh, as in the recording.
    let stop: String =
        texts[5].chars().rev().take(3).collect::<Vec<_>>().into_iter().rev().collect::<String>()
            + &texts[6].chars().take(2).collect::<String>();
    let before: String = texts[..6].concat();
    let reply = replay(sim.address(), "completions_stop_hit", |body| body["stop"] = json!([stop])).await;
    assert_eq!(
        shapes(&reply.chunks),
        shapes(&golden_events("completions_stop_hit")),
        "stop {stop:?} in {texts:?}"
    );
    let events = reply.events();
    let text: String = events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, before[..before.len() - 3]);
    assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], json!(stop));
}

#[tokio::test]
async fn replies_without_a_stream_have_the_shape_of_the_recordings() {
    let sim = start(quick()).await;
    for name in [
        "chat_nonstream",
        "chat_continue_final",
        "completions_nonstream_tokens",
        "err_maxtokens",
        "tokenize_chat",
        "tokenize_prompt",
        "detokenize",
    ] {
        let reply = replay(sim.address(), name, |_| {}).await;
        let expected = golden_text(&format!("vllm_{name}.body.json"));
        assert_eq!(Shape::of(&reply.body()), Shape::of(&expected), "{name}");
    }
}

#[tokio::test]
async fn errors_are_the_recorded_bytes() {
    let sim = start(quick()).await;
    for name in ["err_json", "err_model", "err_schema", "err_toolong"] {
        let reply = replay(sim.address(), name, |_| {}).await;
        assert_eq!(reply.body(), golden_text(&format!("vllm_{name}.body.json")), "{name}");
    }
    let reply = call(sim.address(), "POST", "/inference/v1/abort_requests", &[], "{}").await;
    assert_eq!(reply.body(), golden_text("vllm_scale_out_disabled.body.json"));
    assert_eq!(reply.status(), 403);
    let reply = get(sim.address(), "/nowhere").await;
    assert_eq!((reply.status(), reply.body().as_str()), (404, r#"{"detail":"Not Found"}"#));
    let reply = get(sim.address(), "/v1/completions").await;
    assert_eq!((reply.status(), reply.body().as_str()), (405, r#"{"detail":"Method Not Allowed"}"#));
    for (field, value) in [
        ("max_tokens", json!(0)),
        ("max_tokens", json!("x")),
        ("stop", json!([3])),
        ("n", json!(2)),
        ("stream", json!(1)),
    ] {
        let mut body = json!({"prompt": "a", "temperature": 0});
        body[field] = value;
        let reply = post(sim.address(), "/v1/completions", body).await;
        assert_eq!(reply.status(), 400, "{field}: {}", reply.body());
    }
    let both = json!({"messages": [], "continue_final_message": true, "add_generation_prompt": true});
    assert_eq!(post(sim.address(), "/v1/chat/completions", both).await.status(), 400);
}

#[tokio::test]
async fn a_dead_engine_answers_the_recorded_bytes_and_can_be_revived() {
    let sim = start(quick()).await;
    assert_eq!(post(sim.address(), "/sim/faults", json!({"engine_dead": true})).await.status(), 200);
    let reply = replay(sim.address(), "enginedead_chat_nonstream", |_| {}).await;
    assert_eq!(reply.body(), golden_text("vllm_enginedead_chat_nonstream.body.json"));
    let reply = replay(sim.address(), "enginedead_chat_stream", |_| {}).await;
    assert_eq!(reply.chunks, golden_events("enginedead_chat_stream"));
    assert_eq!(get(sim.address(), "/health").await.status(), 503);
    post(sim.address(), "/sim/faults", json!({"engine_dead": false})).await;
    assert_eq!(get(sim.address(), "/health").await.status(), 200);
    assert_eq!(replay(sim.address(), "chat_stream", |_| {}).await.chunks.len(), 10);
}

#[tokio::test]
async fn death_and_shutdown_in_the_middle_of_a_stream_end_it_as_recorded() {
    let mut args = quick();
    args.instant = false;
    args.decode_step_ms = 2.0;
    let sim = start(args.clone()).await;
    let address = sim.address();
    let stream = tokio::spawn(async move { replay(address, "enginecore_sigkill_midstream", |_| {}).await });
    tokio::time::sleep(std::time::Duration::from_millis(150)).await;
    post(address, "/sim/faults", json!({"engine_dead": true})).await;
    let reply = stream.await.unwrap();
    let expected = golden_events("enginecore_sigkill_midstream");
    assert!(reply.chunks.len() > 3);
    assert_eq!(reply.chunks[reply.chunks.len() - 2..], expected[expected.len() - 2..]);
    assert_eq!(shapes(&reply.chunks[..2]), shapes(&expected[..2]));

    let sim = start(args).await;
    let address = sim.address();
    let stream =
        tokio::spawn(async move { replay(address, "apiserver_sigterm_midstream_chat", |_| {}).await });
    tokio::time::sleep(std::time::Duration::from_millis(150)).await;
    sim.stop().await;
    let reply = stream.await.unwrap();
    let events = reply.events();
    let [.., last, usage] = &events[..] else { panic!("{events:?}") };
    assert_eq!(last["choices"][0]["finish_reason"], "abort");
    assert_eq!(usage["usage"]["completion_tokens"].as_u64().unwrap() as usize, ids(&events).len());
    assert_eq!(reply.chunks.last().unwrap(), "data: [DONE]\n\n");
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "the listener is closed");
}

fn ids(events: &[Value]) -> Vec<u64> {
    let lists = events.iter().filter_map(|event| event["choices"][0]["token_ids"].as_array());
    lists.flatten().map(|id| id.as_u64().unwrap()).collect()
}

#[tokio::test]
async fn metrics_have_the_names_labels_and_help_of_the_recording() {
    let sim = start(quick()).await;
    let reply = get(sim.address(), "/metrics").await;
    let recorded = golden_text("vllm_metrics_idle.txt");
    let name_of = |line: &str| line.rsplit_once(' ').unwrap().0.to_owned();
    let is_sample = |line: &&str| line.starts_with("vllm:") || line.starts_with("process_");
    let samples: Vec<String> = recorded.lines().filter(is_sample).map(name_of).collect();
    let comments: Vec<&str> = recorded.lines().filter(|line| line.starts_with("# ")).collect();
    let body = reply.body();
    assert!(body.lines().count() > 100);
    for line in body.lines().filter(|line| !line.contains("cache_config_info{")) {
        if line.starts_with('#') {
            assert!(comments.contains(&line), "{line}");
        } else if !line.contains("request_prompt_tokens_bucket")
            && !line.contains("request_generation_tokens_bucket")
        {
            assert!(samples.contains(&name_of(line)), "{line}");
        }
    }
    assert!(body.contains("block_size=\"16\"") && body.contains("num_gpu_blocks=\"4096\""));
}
