//! Streams whose engine is lost in the middle, and whose next one says what cannot be told apart.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::streams::keep;
use super::support::*;
use super::traces::{collector, flush, spans, texts, traced};
use crate::http::{FrontConfig, ProxyOptions};
use crate::relay::Options;
use crate::routing::breaker::{BreakerOptions, BreakerState};

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

async fn say(stream: &mut TcpStream, events: &[serde_json::Value]) {
    let pieces = events.iter().map(|event| format!("data: {event}\n\n"));
    let chunks: String = pieces.map(|piece| format!("{:x}\r\n{piece}\r\n", piece.len())).collect();
    let _ = stream.write_all(format!("{HEAD}{chunks}").as_bytes()).await;
}

/// The text of its last token is in one piece with what came before: which part is whose nobody knows.
fn unclear() -> serde_json::Value {
    json!({"id": "c", "choices": [{"index": 0, "text": "c<eos>", "token_ids": [8, 2], "finish_reason": "stop", "stop_reason": null}]})
}

fn clear() -> [serde_json::Value; 2] {
    let choice = |text: &str, id: u32, finish: serde_json::Value| json!({"id": "c", "choices": [{"index": 0, "text": text, "token_ids": [id], "finish_reason": finish}]});
    [choice("c", 8, serde_json::Value::Null), choice("<eos>", 2, json!("stop"))]
}

/// An engine that dies after two words of a chat, and whose first answers to continuations are
/// unclear. How many it was asked for.
async fn engine(unclear_answers: usize) -> (SocketAddr, Arc<AtomicUsize>) {
    let asked = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&asked);
    let address = worker(move |mut stream| {
        let count = Arc::clone(&count);
        async move {
            let Some((head, _)) = read_message(&mut stream).await else { return };
            if head.starts_with("POST /v1/chat/completions") {
                let word = |text: &str, id: u32, prompt: serde_json::Value| {
                    let choice = json!({"index": 0, "delta": {"content": text}, "finish_reason": null, "token_ids": [id]});
                    json!({"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m",
                        "prompt_token_ids": prompt, "choices": [choice]})
                };
                return say(&mut stream, &[word("a", 6, json!([5])), word("b", 7, json!(null))]).await;
            }
            match count.fetch_add(1, Ordering::SeqCst) < unclear_answers {
                true => say(&mut stream, &[unclear()]).await,
                false => say(&mut stream, &clear()).await,
            }
            // It would go on, if it were let.
            let _ = read_message(&mut stream).await;
        }
    })
    .await;
    (address, asked)
}

fn ask() -> String {
    ask_with("")
}

fn ask_with(extra: &str) -> String {
    let body = format!(
        r#"{{"model":"m","stream":true,"stop":["END"],"skip_special_tokens":false,{extra}"messages":[{{"role":"user","content":"hi"}}]}}"#
    );
    request("POST", "/v1/chat/completions", "everline-resume: 1\r\n", &body)
}

#[tokio::test]
async fn a_client_is_told_where_another_engine_went_on_and_whether_the_text_may_differ() {
    for (extra, note) in [
        ("", ": everline continued=exact"),
        (r#""seed":7,"temperature":1,"#, ": everline continued=inexact"),
        (r#""presence_penalty":0.5,"#, ": everline continued=inexact"),
    ] {
        let front = start(FrontConfig::default());
        keep(&front, Options::default());
        for name in ["a", "b"] {
            front.cluster.add(name, engine(1).await.0);
        }
        let answer = exchange(front.address, ask_with(extra)).await;
        let (before, after) = answer.split_once(note).expect(&answer);
        assert!(before.contains(r#""content":"b""#), "{answer}");
        assert!(after.starts_with("\ndata: ") && after.contains(r#""content":"c""#), "{answer}");
        assert!(!after.contains("continued="), "once for each seam: {answer}");
        // And whoever reads it again.
        let id = header(&answer, "everline-stream").unwrap();
        let again = exchange(front.address, request("GET", &format!("/v1/streams/{id}"), "", "")).await;
        assert!(again.contains(&format!("{note}\ndata: ")), "{again}");
    }
}

#[tokio::test]
async fn the_seams_of_a_stream_are_events_of_its_span_and_pauses_that_are_measured() {
    let (endpoint, mut collected) = collector().await;
    let front = traced(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]);
    keep(&front, Options::default());
    for name in ["a", "b"] {
        front.cluster.add(name, engine(1).await.0);
    }
    let answer = exchange(front.address, ask()).await;
    assert_eq!(status(&answer), 200, "{answer}");
    assert!(answer.contains(r#""content":"c""#) && answer.contains("data: [DONE]"), "{answer}");
    assert!(!answer.contains("eos"), "{answer}");
    let counts = &front.front.streams.get().unwrap().counts;
    assert_eq!(counts.worker_stall.snapshot().count(), 1, "one pause, whatever it took");
    assert!(counts.worker_stall.snapshot().sum() > 0.0);
    assert_eq!(counts.continued.load(Ordering::Relaxed), 2);
    flush(&front).await;

    let (_, exported) = collected.recv().await.unwrap();
    let all = spans(&exported);
    let stream = header(&answer, "everline-stream").unwrap();
    let attempt = all.iter().find(|span| texts(&span.attributes).contains_key("everline.attempt"));
    let attempt = attempt.expect("a span for the attempt");
    let attributes = texts(&attempt.attributes);
    assert_eq!(
        (attributes["everline.stream"].as_str(), attributes["everline.attempt"].as_str()),
        (stream, "1")
    );
    let seams: Vec<String> = attempt
        .events
        .iter()
        .filter(|event| event.name == "takeover")
        .map(|event| texts(&event.attributes)["everline.lost"].clone())
        .collect();
    assert_eq!(seams, ["worker", "answer"]);
}

#[tokio::test]
async fn what_cannot_be_told_apart_ends_the_stream_and_is_not_held_against_the_worker() {
    let breaker = BreakerOptions { failures: 1, open_ms: 60_000, max_open_ms: 60_000 };
    let config =
        FrontConfig { proxy: ProxyOptions { breaker, ..ProxyOptions::default() }, ..FrontConfig::default() };
    let front = start(config);
    keep(&front, Options::default());
    let mut asked = Vec::new();
    for name in ["a", "b"] {
        let (address, count) = engine(usize::MAX).await;
        front.cluster.add(name, address);
        asked.push((name, count));
    }
    let answer = exchange(front.address, ask()).await;
    assert!(answer.contains("stream_lost") && !answer.contains("eos"), "{answer}");
    let state = |name: &str| front.cluster.worker(name).unwrap().live.breaker.state(front.front.now_ms());
    // One died, the other did what it was asked, three times: with the dead one that is enough.
    let (well, lost): (Vec<_>, Vec<_>) =
        asked.iter().partition(|(_, count)| count.load(Ordering::SeqCst) > 0);
    assert_eq!((well.len(), lost.len()), (1, 1));
    assert_eq!(well[0].1.load(Ordering::SeqCst), 3);
    assert_eq!((state(well[0].0), state(lost[0].0)), (BreakerState::Closed, BreakerState::Open));
}
