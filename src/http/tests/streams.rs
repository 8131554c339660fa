//! Streams over real sockets: reading on in every form, whose they are, ending them, responses in the
//! background.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::metrics::Logged;
use super::support::*;
use crate::cluster::api::ControlPlane as _;
use crate::cluster::peer::dial::Dialer;
use crate::http::auth::digest_of;
use crate::http::{ClientKey, FrontConfig, Generator, KeyRing, Metrics, Origins, Shard};
use crate::relay::directory::{Directory, OfReplica};
use crate::relay::hub::Relays;
use crate::relay::{Durability, Options};
use crate::routing::policy::by_name;

/// Two keys, `a` and `b`.
pub(super) fn with_keys() -> FrontConfig {
    let key = |id: &str| ClientKey {
        id: id.into(),
        digest: digest_of(format!("secret-{id}").as_bytes()),
        models: None,
        rate: None,
        max_concurrent: None,
        expires: None,
    };
    FrontConfig { keys: Arc::new(KeyRing::new(Some(vec![key("a"), key("b")]))), ..FrontConfig::default() }
}

/// A front that keeps streams, all by itself.
pub(super) fn keeping(config: FrontConfig) -> Running {
    keeping_with(config, Options::default())
}

fn keeping_with(config: FrontConfig, options: Options) -> Running {
    let front = start_with(config, MemoryCluster::new(), Metrics::default());
    keep(&front, options);
    front
}

/// Has a front keep streams.
pub(super) fn keep(front: &Running, options: Options) {
    keep_in(front, options, OfReplica::new(front.cluster.clone()));
}

/// Has a front keep streams that are listed there.
pub(super) fn keep_in(front: &Running, options: Options, directory: Arc<dyn Directory>) {
    let options = Options { durability: Durability::Local, ..options };
    let relays = Relays::new(options, directory, Dialer::new(None), tokio::runtime::Handle::current());
    relays.set_engines(Generator::new(Shard::new(front.front.clone()), Arc::clone(&relays)));
    relays.look();
    let _ = front.front.streams.set(Arc::clone(&relays));
    tokio::spawn(relays.run(front.stop.clone()));
}

/// An engine that says one event for each permit, and the last one at once when all others are said.
pub(super) struct Engine {
    pub(super) address: SocketAddr,
    pub(super) permits: Arc<Semaphore>,
    /// Connections that were closed before all was said.
    pub(super) broken_off: Arc<AtomicUsize>,
    pub(super) bodies: Arc<parking_lot::Mutex<Vec<Value>>>,
}

pub(super) async fn engine(events: Vec<String>) -> Engine {
    let (permits, broken_off) = (Arc::new(Semaphore::new(0)), Arc::<AtomicUsize>::default());
    let bodies = Arc::<parking_lot::Mutex<Vec<Value>>>::default();
    let (go, broken, kept) = (permits.clone(), broken_off.clone(), bodies.clone());
    let address = worker(move |mut stream| {
        let (go, broken, kept, events) = (go.clone(), broken.clone(), kept.clone(), events.clone());
        async move {
            let Some((_, body)) = read_message(&mut stream).await else { return };
            kept.lock().push(serde_json::from_slice(&body).unwrap_or_default());
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
            let _ = stream.write_all(head.as_bytes()).await;
            let (mut read, mut write) = stream.split();
            let speak = async {
                for event in &events {
                    go.acquire().await.unwrap().forget();
                    let piece = format!("{event}\n\n");
                    let _ = write.write_all(format!("{:x}\r\n{piece}\r\n", piece.len()).as_bytes()).await;
                }
                let _ = write.write_all(b"0\r\n\r\n").await;
            };
            let mut byte = [0];
            tokio::select! {
                () = speak => {}
                _ = read.read(&mut byte) => { broken.fetch_add(1, Ordering::SeqCst); }
            }
        }
    })
    .await;
    Engine { address, permits, broken_off, bodies }
}

pub(super) fn chat_events(words: usize) -> Vec<String> {
    let chunk = |delta: Value, finish: Value| {
        let choice = json!({"index": 0, "delta": delta, "finish_reason": finish});
        let chunk = json!({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]});
        format!("data: {chunk}")
    };
    let mut events: Vec<String> =
        (0..words).map(|n| chunk(json!({"content": format!("w{n} ")}), Value::Null)).collect();
    events.push(chunk(json!({}), json!("stop")));
    events.push("data: [DONE]".to_owned());
    events
}

pub(super) fn key_of(id: &str) -> String {
    format!("authorization: Bearer secret-{id}\r\n")
}

const CHAT: &str = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;

pub(super) fn ask(extra: &str) -> String {
    request("POST", "/v1/chat/completions", &format!("everline-resume: 1\r\n{extra}"), CHAT)
}

pub(super) async fn get(front: &Running, path: &str, extra: &str) -> String {
    exchange(front.address, request("GET", path, extra, "")).await
}

/// The ids of the events in an answer.
fn ids(response: &str) -> Vec<String> {
    response.lines().filter_map(|line| line.strip_prefix("id: ")).map(str::to_owned).collect()
}

/// What was said in an answer, without chunks' sizes and ids.
fn data(response: &str) -> Vec<String> {
    response.lines().filter(|line| line.starts_with("data: ")).map(str::to_owned).collect()
}

/// Begins a stream and reads until it has an id and this text.
pub(super) async fn begin(front: &Running, request: String, until: &str) -> (TcpStream, String, String) {
    let mut client = TcpStream::connect(front.address).await.unwrap();
    client.write_all(request.as_bytes()).await.unwrap();
    let mut got = String::new();
    while !got.contains(until) {
        let mut bytes = [0; 4096];
        let count = client.read(&mut bytes).await.unwrap();
        assert!(count > 0, "{got}");
        got.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    let id = header(&got, "everline-stream").expect(&got).to_owned();
    (client, id, got)
}

/// A stream of three words that has ended.
pub(super) async fn ended(front: &Running, extra: &str) -> (String, String) {
    let engine = engine(chat_events(3)).await;
    engine.permits.add_permits(100);
    front.cluster.add("w", engine.address);
    let whole = exchange(front.address, ask(extra)).await;
    let id = header(&whole, "everline-stream").expect(&whole).to_owned();
    (id, whole)
}

#[tokio::test]
async fn a_stream_is_read_on_from_any_event_in_every_form() {
    let front = keeping(FrontConfig::default());
    let (id, whole) = ended(&front, "").await;
    let all: Vec<String> = (0..5).map(|seq| format!("{id}.{seq}")).collect();
    assert_eq!(ids(&whole), all, "{whole}");
    assert!(header(&whole, "everline-resumable").is_some(), "{whole}");
    // The id is each event's last line.
    assert!(whole.contains(&format!("retry: 500\nid: {id}.0\n\n")), "{whole}");
    assert!(whole.contains(&format!("data: [DONE]\nid: {id}.4\n\n")), "{whole}");
    let path = format!("/v1/streams/{id}");

    let again = get(&front, &path, "").await;
    assert_eq!((ids(&again), data(&again)), (all.clone(), data(&whole)), "from the start");
    let rest = get(&front, &path, &format!("last-event-id: {id}.1\r\n")).await;
    assert_eq!((ids(&rest).as_slice(), data(&rest).as_slice()), (&all[2..], &data(&whole)[2..]));
    let rest = get(&front, &format!("{path}?after=2"), "").await;
    assert_eq!(ids(&rest), all[3..]);
    let rest = get(&front, &format!("{path}?after={id}.2"), "").await;
    assert_eq!(ids(&rest), all[3..]);
    let rest = get(&front, &format!("{path}?after=0"), &format!("last-event-id: {id}.3\r\n")).await;
    assert_eq!(ids(&rest), all[4..], "the header wins");
    let rest = exchange(front.address, ask(&format!("last-event-id: {id}.1\r\n"))).await;
    assert_eq!(ids(&rest), all[2..], "the same request once more");

    let over = get(&front, &path, &format!("last-event-id: {id}.4\r\n")).await;
    assert_eq!((status(&over), header(&over, "x-request-id").is_some()), (204, true), "{over}");
    let ahead = get(&front, &format!("{path}?after=9"), "").await;
    assert_eq!((status(&ahead), code(&ahead).as_str()), (412, "cursor_ahead"));
    assert_eq!(header(&ahead, "x-should-retry"), Some("false"));
    let other = "st_aaaaaaaaaaaaaaaaaaaaaaaaaa";
    for (query, extra) in [
        ("?after=x", String::new()),
        ("?after=-1", String::new()),
        ("", "last-event-id: 7\r\n".to_owned()),
        ("", format!("last-event-id: {other}.1\r\n")),
    ] {
        let bad = get(&front, &format!("{path}{query}"), &extra).await;
        assert_eq!((status(&bad), code(&bad).as_str()), (400, "bad_event_id"), "{query} {extra}");
    }
    // Of what is not there, no less: the answer must not tell whether it is.
    for (query, extra) in [("?after=x", ""), ("", "last-event-id: 7\r\n"), ("", "last-event-id: st_x.1\r\n")]
    {
        for unknown in [other, "st_", "x"] {
            let bad = get(&front, &format!("/v1/streams/{unknown}{query}"), extra).await;
            assert_eq!(
                (status(&bad), code(&bad).as_str()),
                (400, "bad_event_id"),
                "{unknown} {query} {extra}"
            );
        }
    }
    for unknown in [other, "st_", "x"] {
        let unknown = get(&front, &format!("/v1/streams/{unknown}"), "").await;
        assert_eq!((status(&unknown), code(&unknown).as_str()), (404, "stream_not_found"));
    }
    let text = get(&front, "/metrics", "").await;
    for line in
        ["everline_stream_resumed_total{result=\"ok\"} 6", "everline_stream_resumed_total{result=\"over\"} 1"]
    {
        assert!(text.contains(line), "{line} is missing in {text}");
    }
}

#[tokio::test]
async fn a_streamed_answer_says_why_it_comes_from_there_if_asked() {
    let front = keeping(FrontConfig { policy: by_name("least_loaded").unwrap(), ..FrontConfig::default() });
    let engine = engine(chat_events(1)).await;
    engine.permits.add_permits(100);
    for name in ["w", "x"] {
        front.cluster.add(name, engine.address);
    }
    let _busy = front.cluster.bookings().book(front.cluster.worker("w").unwrap(), 160, 10);
    let plain = exchange(front.address, request("POST", "/v1/chat/completions", "", CHAT)).await;
    assert_eq!((status(&plain), header(&plain, "everline-trace")), (200, None), "nobody asked");
    let asked = request("POST", "/v1/chat/completions", "everline-trace: 1\r\n", CHAT);
    let traced = exchange(front.address, asked).await;
    let trace: Value = serde_json::from_str(header(&traced, "everline-trace").expect(&traced)).unwrap();
    assert_eq!(header(&traced, "everline-worker"), Some("x"), "{traced}");
    assert_eq!(trace["chosen"], json!({"worker": "x", "rank": 0}));
    assert_eq!(
        (&trace["candidates"][0]["worker"], &trace["candidates"][1]["worker"]),
        (&json!("x"), &json!("w"))
    );
    assert_eq!(trace["candidates"][0]["load"]["requests"], 0, "as it was chosen, without this request");
    assert_eq!(trace["candidates"][1]["not_chosen"], "has 21.0 blocks of work more than x");
}

#[tokio::test]
async fn a_stream_says_how_it_stands_and_a_head_attaches_nobody() {
    let front = keeping(FrontConfig::default());
    let engine = engine(chat_events(2)).await;
    front.cluster.add("w", engine.address);
    engine.permits.add_permits(1);
    let (mut client, id, _) = begin(&front, ask(""), "w0").await;
    let path = format!("/v1/streams/{id}");
    let status_of = || async { body(&get(&front, &path, "accept: application/json\r\n").await) };
    let stands = status_of().await;
    for (name, value) in [
        ("id", json!(id)),
        ("state", json!("running")),
        ("model", json!("m")),
        ("route", json!("/v1/chat/completions")),
        ("worker", json!("w")),
        ("holder", json!("r1")),
        ("attempt", json!(1)),
        ("events", json!(1)),
    ] {
        assert_eq!(stands[name], value, "{name} in {stands}");
    }
    assert!(
        stands["created"].as_u64().unwrap() > 1_700_000_000 && stands["resumable"].is_string(),
        "{stands}"
    );
    let relays = front.front.streams.get().unwrap();
    let head = exchange(front.address, request("HEAD", &path, "", "")).await;
    assert_eq!((status(&head), head.split_once("\r\n\r\n").unwrap().1), (200, ""), "{head}");
    assert_eq!(header(&head, "content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(relays.all()[0].1.clients, 1);
    engine.permits.add_permits(10);
    let rest = read_to_close(&mut client).await;
    assert!(rest.contains("[DONE]"), "{rest}");
    assert_eq!(status_of().await["state"], "completed");
}

#[tokio::test]
async fn what_is_another_keys_is_not_there() {
    let front = keeping(with_keys());
    let (id, _) = ended(&front, &key_of("a")).await;
    let path = format!("/v1/streams/{id}");
    let nowhere = "/v1/streams/st_aaaaaaaaaaaaaaaaaaaaaaaaaa";
    for (method, ending, extra) in [
        ("GET", "", ""),
        ("GET", "", "accept: application/json\r\n"),
        ("GET", "?after=1", ""),
        ("HEAD", "", ""),
        ("DELETE", "", ""),
        ("POST", "/cancel", ""),
        ("POST", "/token", ""),
    ] {
        let headers = format!("{extra}{}x-request-id: x\r\n", key_of("b"));
        let of = |path: &str| request(method, &format!("{path}{ending}"), &headers, "");
        let his = exchange(front.address, of(&path)).await;
        let nobodys = exchange(front.address, of(nowhere)).await;
        let without_date =
            |text: &str| text.lines().filter(|l| !l.starts_with("date:")).collect::<Vec<_>>().join("\n");
        assert_eq!(status(&his), 404, "{method} {ending}");
        assert_eq!(without_date(&his), without_date(&nobodys), "{method} {ending}");
    }
    let resent = exchange(front.address, ask(&format!("{}last-event-id: {id}.0\r\n", key_of("b")))).await;
    assert_eq!((status(&resent), code(&resent).as_str()), (404, "stream_not_found"));
    let list = |key: &'static str| async { body(&get(&front, "/v1/streams", &key_of(key)).await) };
    assert_eq!(list("b").await["data"], json!([]));
    assert_eq!(list("a").await["data"][0]["id"], json!(id));
    assert_eq!(status(&get(&front, &path, &key_of("a")).await), 200, "it is still there");
    assert_eq!(status(&get(&front, &path, "").await), 401);
}

#[tokio::test]
async fn the_same_idempotency_key_of_two_keys_names_two_streams() {
    let front = keeping(with_keys());
    let extra = |key: &str| format!("{}idempotency-key: once\r\n", key_of(key));
    let (id, _) = ended(&front, &extra("a")).await;
    let again = exchange(front.address, ask(&extra("a"))).await;
    assert_eq!(
        (header(&again, "everline-stream"), header(&again, "everline-attached")),
        (Some(&*id), Some("1"))
    );
    let (other, whole) = ended(&front, &extra("b")).await;
    assert!(other != id && header(&whole, "everline-attached").is_none());
}

#[tokio::test]
async fn cancelling_ends_generation_once_and_deleting_forgets_it() {
    let front = keeping(FrontConfig::default());
    let engine = engine(chat_events(5)).await;
    front.cluster.add("w", engine.address);
    engine.permits.add_permits(2);
    let (mut client, id, _) = begin(&front, ask(""), "w1").await;
    let cancel = || exchange(front.address, request("POST", &format!("/v1/streams/{id}/cancel"), "", ""));
    let first = cancel().await;
    assert_eq!((status(&first), &body(&first)["state"]), (200, &json!("cancelled")));
    let rest = read_to_close(&mut client).await;
    assert!(rest.contains("\"code\":\"cancelled\"") && rest.contains("data: [DONE]"), "{rest}");
    eventually("the engine is let go", || engine.broken_off.load(Ordering::SeqCst) == 1).await;
    let again = cancel().await;
    assert_eq!((status(&again), &body(&again)["state"]), (200, &json!("cancelled")));
    let path = format!("/v1/streams/{id}");
    let kept = get(&front, &path, "").await;
    assert!(kept.contains("w1") && kept.contains("\"code\":\"cancelled\""), "{kept}");

    let deleted = exchange(front.address, request("DELETE", &path, "", "")).await;
    assert_eq!((status(&deleted), &body(&deleted)["deleted"]), (200, &json!(true)));
    assert_eq!(status(&get(&front, &path, "").await), 404);
    let relays = front.front.streams.get().unwrap();
    eventually("it is forgotten", || relays.all().is_empty()).await;
    assert_eq!(status(&exchange(front.address, request("DELETE", &path, "", "")).await), 404);
}

#[tokio::test]
async fn a_capability_reads_one_stream_for_a_while_and_does_nothing_else() {
    let logged = Logged::all_of_ours();
    let front = keeping(with_keys());
    let (id, _) = ended(&front, &key_of("a")).await;
    let (other, _) = ended(&front, &key_of("a")).await;
    let path = format!("/v1/streams/{id}");
    let token = |json: &'static str| {
        exchange(front.address, request("POST", &format!("{path}/token"), &key_of("a"), json))
    };
    let granted = token(r#"{"expires_in":60}"#).await;
    assert_eq!(status(&granted), 200, "{granted}");
    let cap = body(&granted)["cap"].as_str().unwrap().to_owned();
    assert!(body(&granted)["expires_at"].as_u64().is_some());
    assert_eq!(status(&token("").await), 200);
    for bad in [r#"{"expires_in":0}"#, r#"{"expires_in":601}"#, r#"{"for":1}"#, "x"] {
        let bad = token(bad).await;
        assert_eq!((status(&bad), code(&bad).as_str()), (400, "invalid_value"));
    }
    assert_eq!(ids(&get(&front, &format!("{path}?cap={cap}&after=2"), "").await).len(), 2);
    assert_eq!(status(&get(&front, &format!("/v1/streams/{other}?cap={cap}"), "").await), 401);
    let bad = get(&front, &format!("{path}?cap={cap}x"), "").await;
    assert_eq!((status(&bad), code(&bad).as_str()), (401, "bad_capability"));
    assert!(!bad.contains(&cap), "it is not said again");
    let head = exchange(front.address, request("HEAD", &format!("{path}?cap={cap}"), "", "")).await;
    assert_eq!(status(&head), 200);
    let text = logged.text();
    assert!(text.contains("everline::access") && !text.contains(&cap), "{text}");
    for (method, path) in [
        ("DELETE", path.clone()),
        ("POST", format!("{path}/cancel")),
        ("POST", format!("{path}/token")),
        ("GET", "/v1/streams".to_owned()),
    ] {
        let refused = exchange(front.address, request(method, &format!("{path}?cap={cap}"), "", "")).await;
        assert_eq!((status(&refused), code(&refused).as_str()), (401, "missing_api_key"), "{method} {path}");
    }
    let both = get(&front, &format!("{path}?cap={cap}"), &key_of("b")).await;
    assert_eq!(status(&both), 404, "a key that is shown counts");
}

#[tokio::test]
async fn own_streams_are_listed_a_page_at_a_time() {
    let front = keeping(FrontConfig::default());
    let mut made = BTreeSet::new();
    for _ in 0..5 {
        made.insert(ended(&front, "").await.0);
    }
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let page = body(&get(&front, &format!("/v1/streams?limit=2&after={after}"), "").await);
        let data = page["data"].as_array().unwrap();
        seen.extend(data.iter().map(|stream| stream["id"].as_str().unwrap().to_owned()));
        if page["has_more"] == json!(false) {
            break;
        }
        assert_eq!(data.len(), 2);
        after = page["last_id"].as_str().unwrap().to_owned();
    }
    assert_eq!(seen, made.into_iter().collect::<Vec<_>>());
    for bad in ["limit=0", "limit=x", "after=x"] {
        let bad = get(&front, &format!("/v1/streams?{bad}"), "").await;
        assert_eq!((status(&bad), code(&bad).as_str()), (400, "invalid_value"));
    }
}

#[tokio::test]
async fn the_ninth_listener_is_told_to_wait() {
    let front = keeping_with(FrontConfig::default(), Options { most_listeners: 2, ..Options::default() });
    let engine = engine(chat_events(2)).await;
    front.cluster.add("w", engine.address);
    engine.permits.add_permits(1);
    let (_client, id, _) = begin(&front, ask(""), "w0").await;
    let again = || request("GET", &format!("/v1/streams/{id}"), "", "");
    let (_second, ..) = begin(&front, again(), "w0").await;
    let third = exchange(front.address, again()).await;
    assert_eq!((status(&third), code(&third).as_str()), (429, "too_many_listeners"));
}

fn response_events() -> Vec<String> {
    let said = |kind: &str, number: u64, mut rest: Value| {
        rest["type"] = kind.into();
        rest["sequence_number"] = number.into();
        format!("event: {kind}\ndata: {rest}")
    };
    let item = json!({"type": "message", "content": [{"type": "output_text", "text": "hello"}]});
    vec![
        said(
            "response.created",
            0,
            json!({"response": {"id": "resp_engine", "status": "in_progress", "model": "m"}}),
        ),
        said("response.output_text.delta", 1, json!({"delta": "hel"})),
        said("response.output_text.delta", 2, json!({"delta": "lo"})),
        said("response.output_item.done", 3, json!({"output_index": 0, "item": item})),
        said(
            "response.completed",
            4,
            json!({"response": {"id": "resp_engine", "status": "completed", "output": [item]}}),
        ),
    ]
}

async fn respond(front: &Running, extra: &str) -> String {
    let body = format!(r#"{{"model":"m","input":"hi","background":true{extra}}}"#);
    exchange(front.address, post("/v1/responses", &body)).await
}

#[tokio::test]
async fn a_response_in_the_background_needs_no_client() {
    let front = keeping(FrontConfig::default());
    let engine = engine(response_events()).await;
    front.cluster.add("w", engine.address);
    let answer = respond(&front, "").await;
    assert_eq!(status(&answer), 200, "{answer}");
    let response = body(&answer);
    let id = response["id"].as_str().unwrap().to_owned();
    assert!(["queued", "in_progress"].contains(&response["status"].as_str().unwrap()), "{response}");
    assert_eq!((&response["object"], &response["background"]), (&json!("response"), &json!(true)));
    let path = format!("/v1/responses/{id}");
    let shown = || async { body(&get(&front, &path, "").await) };

    engine.permits.add_permits(4);
    let relays = front.front.streams.get().unwrap();
    eventually("four events", || relays.all()[0].1.events == 4).await;
    let running = shown().await;
    assert_eq!((&running["status"], &running["id"]), (&json!("in_progress"), &json!(id)), "{running}");
    assert_eq!(running["output"][0]["content"][0]["text"], "hello");
    let sent = engine.bodies.lock()[0].clone();
    assert_eq!((&sent["stream"], &sent["background"]), (&json!(true), &Value::Null), "{sent}");

    // Who reads on sees the end come.
    let reading = {
        let request = request("GET", &format!("{path}?stream=true&starting_after=1"), "", "");
        tokio::spawn(exchange(front.address, request))
    };
    engine.permits.add_permits(1);
    let rest = reading.await.unwrap();
    let numbers: Vec<u64> = data(&rest)
        .iter()
        .filter_map(|line| serde_json::from_str::<Value>(&line[6..]).ok()?["sequence_number"].as_u64())
        .collect();
    assert_eq!(numbers, [2, 3, 4], "{rest}");
    assert!(rest.contains(&id) && !rest.contains("resp_engine"), "{rest}");
    eventually("it is done", || relays.all()[0].1.ended.is_some()).await;
    let done = shown().await;
    assert_eq!(
        (&done["status"], &done["id"], &done["background"]),
        (&json!("completed"), &json!(id), &json!(true))
    );
    let ahead = get(&front, &format!("{path}?stream=true&starting_after=9"), "").await;
    assert_eq!((status(&ahead), code(&ahead).as_str()), (412, "cursor_ahead"));
    let cancelled = exchange(front.address, request("POST", &format!("{path}/cancel"), "", "")).await;
    assert_eq!(body(&cancelled)["status"], "completed", "it was too late for that");
    let deleted = exchange(front.address, request("DELETE", &path, "", "")).await;
    assert_eq!(body(&deleted), json!({"id": id, "object": "response", "deleted": true}));
    assert_eq!(status(&get(&front, &path, "").await), 404);
}

#[tokio::test]
async fn a_response_in_the_background_is_cancelled_and_may_be_streamed_from_the_start() {
    let front = keeping(FrontConfig::default());
    let engine = engine(response_events()).await;
    front.cluster.add("w", engine.address);
    engine.permits.add_permits(2);
    let ask = post("/v1/responses", r#"{"model":"m","input":"hi","background":true,"stream":true}"#);
    let (client, stream, got) = begin(&front, ask, "hel").await;
    let id = stream.replace("st_", "resp_");
    assert!(got.contains(&id) && !got.contains("resp_engine"), "{got}");
    // Its client's leaving ends nothing.
    drop(client);
    let relays = front.front.streams.get().unwrap();
    eventually("the client is gone", || relays.all()[0].1.clients == 0).await;
    engine.permits.add_permits(1);
    eventually("it goes on", || relays.all()[0].1.events == 3).await;
    let path = format!("/v1/responses/{id}");
    let cancel = || exchange(front.address, request("POST", &format!("{path}/cancel"), "", ""));
    assert_eq!(body(&cancel().await)["status"], "cancelled");
    eventually("the engine is let go", || engine.broken_off.load(Ordering::SeqCst) == 1).await;
    assert_eq!(body(&cancel().await)["status"], "cancelled");
    assert_eq!(body(&get(&front, &path, "").await)["status"], "cancelled");
}

#[tokio::test]
async fn pages_of_allowed_origins_get_answers_and_preflights_need_no_key() {
    let mut config = with_keys();
    config.cors = Origins::new(&["https://a.example".to_owned()]);
    let front = keeping(config);
    let asks = "origin: https://a.example\r\naccess-control-request-method: GET\r\naccess-control-request-headers: authorization,last-event-id\r\n";
    let path = "/v1/streams/st_aaaaaaaaaaaaaaaaaaaaaaaaaa";
    let preflight = exchange(front.address, request("OPTIONS", path, asks, "")).await;
    assert_eq!(status(&preflight), 204, "{preflight}");
    assert_eq!(header(&preflight, "access-control-allow-origin"), Some("https://a.example"));
    assert_eq!(header(&preflight, "access-control-allow-headers"), Some("authorization, last-event-id"));
    let (_, whole) = ended(&front, &format!("{}origin: https://a.example\r\n", key_of("a"))).await;
    assert!(header(&whole, "access-control-expose-headers").unwrap().contains("everline-stream"));
    let refused = get(&front, path, "origin: https://a.example\r\n").await;
    assert_eq!(
        (status(&refused), header(&refused, "access-control-allow-origin")),
        (401, Some("https://a.example"))
    );
    let other = get(&front, path, "origin: https://b.example\r\n").await;
    assert_eq!(
        (header(&other, "access-control-allow-origin"), header(&other, "vary")),
        (None, Some("origin"))
    );
}
