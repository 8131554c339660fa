//! When the head of a stream's answer goes out, and what a client gets whose head was given before
//! anybody knew how the stream would turn out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::streams::*;
use super::support::*;
use crate::http::{FrontConfig, ProxyOptions, QueueOptions};
use crate::ids::{ReplicaId, StreamId};
use crate::relay::Options;
use crate::state::streams::{Holder, StreamRecord};

/// An engine that says these bytes to each request as soon as there is a permit.
async fn gated(bytes: String) -> (SocketAddr, Arc<Semaphore>) {
    let permits = Arc::new(Semaphore::new(0));
    let go = Arc::clone(&permits);
    let address = worker(move |mut stream| {
        let (go, bytes) = (Arc::clone(&go), bytes.clone());
        async move {
            while read_message(&mut stream).await.is_some() {
                go.acquire().await.unwrap().forget();
                if stream.write_all(bytes.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    (address, permits)
}

/// Sends a request and reads the head of its answer.
async fn head_of(front: &Running, request: &str) -> (TcpStream, String) {
    let mut client = TcpStream::connect(front.address).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.unwrap());
    }
    (client, String::from_utf8(head).unwrap())
}

fn lines_of<'a>(text: &'a str, start: &str) -> Vec<&'a str> {
    text.lines().filter(|line| line.starts_with(start)).collect()
}

/// That a body has these `data` lines and, if it has one, this id at the first event; and nothing in it
/// that is no line of an event.
fn assert_events(text: &str, data: &[String], id: &str) {
    assert_eq!(lines_of(text, "data: "), data, "{text}");
    assert_eq!(lines_of(text, "id: "), [format!("id: {id}.0")], "{text}");
    for line in text.lines().filter(|line| line.contains('{')) {
        assert!(line.starts_with("data: "), "{line:?} in {text}");
    }
}

const BAD: &str = r#"{"error":{"code":400,"message":"too long","param":null,"type":"BadRequestError"}}"#;

#[tokio::test]
async fn an_error_that_comes_after_the_head_is_an_event_and_an_end() {
    let front = keeping(FrontConfig::default());
    let bad = ok("application/json", BAD).replacen("200 OK", "400 Bad Request", 1);
    let (address, permits) = gated(bad).await;
    front.cluster.add("w", address);
    let asked = ask("idempotency-key: once\r\n");
    let (mut client, head) = head_of(&front, &asked).await;
    assert_eq!(
        (status(&head), header(&head, "content-type")),
        (200, Some("text/event-stream; charset=utf-8"))
    );
    let id = header(&head, "everline-stream").unwrap().to_owned();
    permits.add_permits(10);
    let said = read_to_close(&mut client).await;
    let events = [format!("data: {BAD}"), "data: [DONE]".to_owned()];
    assert_events(&said, &events, &id);
    assert!(said.contains(&format!("retry: 500\nid: {id}.0\n\n")), "{said}");

    // Who comes back gets the same; behind it there is nothing; who asks anew gets what was answered.
    let path = format!("/v1/streams/{id}");
    let again = get(&front, &path, "").await;
    assert_eq!(status(&again), 200);
    assert_events(&again, &events, &id);
    let over = get(&front, &path, &format!("last-event-id: {id}.0\r\n")).await;
    assert_eq!(status(&over), 204, "{over}");
    let resent = exchange(front.address, ask(&format!("last-event-id: {id}.0\r\n"))).await;
    assert_eq!(status(&resent), 204, "{resent}");
    let attached = exchange(front.address, asked).await;
    assert_eq!((status(&attached), header(&attached, "everline-attached")), (400, Some("1")));
    assert!(attached.contains(BAD), "{attached}");
}

#[tokio::test]
async fn what_waited_for_a_worker_in_vain_is_told_so_in_its_dialect() {
    let queue = QueueOptions { most: 8, patience: Duration::from_millis(1300) };
    let proxy = ProxyOptions { queue, max_requests_per_worker: 1, ..ProxyOptions::default() };
    let front = keeping(FrontConfig { proxy, ..FrontConfig::default() });
    let (address, _permits) = gated(String::new()).await;
    front.cluster.add("w", address);
    let (_first, _) = head_of(&front, &ask("")).await;
    let message = json!({"model": "m", "stream": true, "max_tokens": 1, "messages": []}).to_string();
    let asked = request("POST", "/v1/messages", "everline-resume: 1\r\n", &message);
    let (mut client, head) = head_of(&front, &asked).await;
    assert_eq!(status(&head), 200);
    let id = header(&head, "everline-stream").unwrap().to_owned();
    let said = read_to_close(&mut client).await;
    let data = lines_of(&said, "data: ");
    assert_events(&said, &[data[0].to_owned()], &id);
    assert_eq!(lines_of(&said, "event: "), ["event: error"], "{said}");
    let error: Value = serde_json::from_str(&data[0][6..]).unwrap();
    assert_eq!((&error["type"], &error["error"]["code"]), (&json!("error"), &json!("workers_saturated")));
    let again = get(&front, &format!("/v1/streams/{id}"), "").await;
    assert_eq!((status(&again), lines_of(&again, "data: ")), (200, data), "{again}");
}

#[tokio::test]
async fn who_cannot_come_back_gets_no_head_before_the_first_event() {
    let front = keeping(FrontConfig::default());
    // Its head comes at once.
    let engine = engine(chat_events(1)).await;
    front.cluster.add("w", engine.address);
    let chat = json!({"model": "m", "stream": true, "messages": [{"role": "user", "content": "hi"}]});
    let asked = request("POST", "/v1/chat/completions", "", &chat.to_string());
    let relays = front.front.streams.get().unwrap();
    let heads = || relays.all().iter().filter(|(_, summary)| summary.has_head).count();
    let begin = async |at: usize| {
        let mut client = TcpStream::connect(front.address).await.unwrap();
        client.write_all(asked.as_bytes()).await.unwrap();
        eventually("the engine's head", || heads() == at).await;
        let early = tokio::time::timeout(Duration::from_millis(100), client.read(&mut [0])).await;
        assert!(early.is_err(), "a head before there was an event");
        client
    };
    let mut client = begin(1).await;
    engine.permits.add_permits(3);
    let answered = read_to_close(&mut client).await;
    assert_eq!(status(&answered), 200, "{answered}");
    assert!(answered.contains("w0") && answered.contains("[DONE]"), "{answered}");
    // The replica stops before the engine says anything: the client is told to ask another one.
    let mut client = begin(2).await;
    front.front.ending.cancel();
    let refused = read_to_close(&mut client).await;
    assert_eq!((status(&refused), code(&refused).as_str()), (503, "replica_down"), "{refused}");
}

#[tokio::test]
async fn who_comes_back_while_the_stream_is_looked_for_gets_signs_of_life_and_then_why() {
    let mut config = FrontConfig::default();
    config.streams.heartbeat = Duration::from_millis(100);
    let front = start(config);
    keep(&front, Options { takeover: Duration::from_millis(2500), ..Options::default() });
    ended(&front, "").await;
    // Another replica's, which cannot be reached.
    let lost = StreamId::parse("st_aaaaaaaaaaaaaaaaaaaaaaaaaa").unwrap();
    {
        let mut streams = front.cluster.streams.lock();
        let own = streams.values().next().unwrap().clone();
        let holder = Holder::Replica(ReplicaId(77));
        streams.insert(lost, StreamRecord { holder, mirror: None, ended: None, ..own });
    }
    let began = std::time::Instant::now();
    let asked = request("GET", &format!("/v1/streams/{lost}"), &format!("last-event-id: {lost}.3\r\n"), "");
    let (mut client, head) = head_of(&front, &asked).await;
    assert!(began.elapsed() < Duration::from_millis(2000), "{:?}", began.elapsed());
    assert_eq!((status(&head), header(&head, "everline-stream")), (200, Some(&*lost.to_string())), "{head}");
    let said = read_to_close(&mut client).await;
    assert!(said.contains(": ping\n"), "{said}");
    let data = lines_of(&said, "data: ");
    assert!(data[0].contains("\"code\":\"stream_lost\"") && data[1..] == ["data: [DONE]"], "{said}");
}

#[tokio::test]
async fn what_is_refused_for_good_says_that_asking_again_is_of_no_use() {
    let front = keeping(FrontConfig::default());
    let (id, _) = ended(&front, "idempotency-key: once\r\n").await;
    let path = format!("/v1/streams/{id}");
    let other = "st_aaaaaaaaaaaaaaaaaaaaaaaaaa";
    let reused = ask("idempotency-key: once\r\n").replace("hi", "ho");
    let background = r#"{"model":"m","input":"hi","background":1}"#;
    let long = "x".repeat(256);
    for (asked, is) in [
        (reused, "idempotency_key_reused"),
        (ask("last-event-id: 7\r\n"), "bad_event_id"),
        (request("GET", &path, "last-event-id: 7\r\n", ""), "bad_event_id"),
        (request("GET", &path, &format!("last-event-id: {other}.1\r\n"), ""), "bad_event_id"),
        (request("GET", &format!("{path}?after=x"), "", ""), "bad_event_id"),
        (request("GET", &format!("{path}?after=9"), "", ""), "cursor_ahead"),
        (request("GET", &format!("/v1/streams/{other}"), "", ""), "stream_not_found"),
        (ask(&format!("idempotency-key: {long}\r\n")), "invalid_value"),
        (ask("everline-orphan: x\r\n"), "invalid_value"),
        (ask("everline-durability: x\r\n"), "invalid_value"),
        (request("GET", "/v1/streams?limit=x", "", ""), "invalid_value"),
        (request("GET", "/v1/streams?after=x", "", ""), "invalid_value"),
        (request("POST", &format!("{path}/token"), "", r#"{"expires_in":0}"#), "invalid_value"),
        (request("POST", &format!("{path}/token"), "", "x"), "invalid_value"),
        (request("POST", "/v1/responses", "", background), "invalid_value"),
    ] {
        let refused = exchange(front.address, asked).await;
        assert_eq!(
            (code(&refused).as_str(), header(&refused, "x-should-retry")),
            (is, Some("false")),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn without_memory_nothing_is_promised() {
    let front = start(FrontConfig::default());
    keep(&front, Options { process_bytes: 0, ..Options::default() });
    let (id, whole) = ended(&front, "").await;
    assert_eq!((status(&whole), header(&whole, "everline-resumable")), (200, None), "{whole}");
    let path = format!("/v1/streams/{id}");
    let stands = body(&get(&front, &path, "accept: application/json\r\n").await);
    assert_eq!(stands["resumable"], Value::Null, "{stands}");
    let front = keeping(FrontConfig::default());
    let (_, whole) = ended(&front, "").await;
    assert_eq!(header(&whole, "everline-resumable"), Some("continue"), "{whole}");
}
