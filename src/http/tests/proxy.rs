//! The proxy path against workers that behave, and workers that do not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use super::support::*;
use crate::http::retry::RetryOptions;
use crate::http::{FrontConfig, ProxyOptions};
use crate::state::load::LoadSum;

const SSE_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\
                        transfer-encoding: chunked\r\n\r\n";

fn chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

/// Decodes a chunked body that has its last chunk.
fn dechunk(mut body: &str) -> (String, Vec<String>) {
    let mut pieces = Vec::new();
    loop {
        let (size, rest) = body.split_once("\r\n").expect("a chunk size");
        let size = usize::from_str_radix(size, 16).expect("a hexadecimal size");
        if size == 0 {
            return (pieces.concat(), pieces);
        }
        pieces.push(rest[..size].to_owned());
        body = &rest[size + 2..];
    }
}

fn impatient() -> FrontConfig {
    let mut config = FrontConfig::default();
    config.proxy.first_byte_timeout = Duration::from_millis(100);
    config.proxy.idle_timeout = Duration::from_millis(100);
    config.pool.connect_timeout = Duration::from_millis(500);
    config
}

#[tokio::test]
async fn an_answer_passes_through_byte_for_byte_with_status_and_headers() {
    let body = "{ \"odd\" :  [1.0e0,\"\\u00e9\"],\n\t\"model\":\"m\"}";
    let front = start(FrontConfig::default());
    let answer = format!(
        "HTTP/1.1 418 Teapot\r\nContent-Type: application/json\r\nX-Own: 1\r\nConnection: keep-alive, x-hop\r\n\
         X-Hop: 2\r\nKeep-Alive: timeout=5\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    front.cluster.add("w", answering(answer).await);
    let response = exchange(front.address, chat()).await;
    let (head, got) = response.split_once("\r\n\r\n").unwrap();
    assert_eq!((status(&response), got), (418, body));
    assert_eq!(header(head, "x-own"), Some("1"));
    assert_eq!(header(head, "x-hop"), None);
    assert_eq!(header(head, "keep-alive"), None);
    assert_eq!(header(head, "everline-worker"), Some("w"));
    assert_eq!(header(head, "everline-replica"), Some("everline"));
    assert_eq!(header(head, "x-request-id").map(str::len), Some(32));
}

#[tokio::test]
async fn a_request_reaches_the_worker_untouched_but_without_credentials() {
    let (tell, mut seen) = mpsc::channel(1);
    let address = worker(move |mut stream| {
        let tell = tell.clone();
        async move {
            let message = read_message(&mut stream).await.unwrap();
            tell.send(message).await.unwrap();
            stream.write_all(ok("application/json", "{}").as_bytes()).await.unwrap();
        }
    })
    .await;
    let front = start(FrontConfig::default());
    front.cluster.add("w", address);
    let body = "{\"model\" : \"m\" , \"prompt\":[1,2,3], \"unknown\": {\"a\": 1.50}}  ";
    let extra = "authorization: Bearer secret\r\nx-request-id: mine-1\r\nx-forwarded-for: 1.2.3.4\r\n\
                 content-type: application/json\r\nx-session-id: s\r\n";
    let response = exchange(front.address, request("POST", "/v1/completions?v=1%202", extra, body)).await;
    let (head, got) = seen.recv().await.unwrap();
    assert!(head.starts_with("POST /v1/completions?v=1%202 HTTP/1.1\r\n"), "{head}");
    assert_eq!(got, body.as_bytes());
    assert_eq!(header(&head, "host"), Some(address.to_string().as_str()));
    assert_eq!(header(&head, "authorization"), None);
    assert_eq!(header(&head, "x-forwarded-for"), None);
    assert_eq!(header(&head, "connection"), None);
    assert_eq!(header(&head, "x-session-id"), Some("s"));
    assert_eq!(header(&head, "x-request-id"), Some("mine-1"));
    assert_eq!(header(&response, "x-request-id"), Some("mine-1"));
}

#[tokio::test]
async fn events_are_relayed_one_by_one_as_they_come_and_load_follows() {
    let (release, mut gate) = mpsc::channel::<()>(1);
    let gate_rx = Arc::new(tokio::sync::Mutex::new({
        let (tx, rx) = mpsc::channel::<()>(1);
        tokio::spawn(async move {
            while gate.recv().await.is_some() {
                tx.send(()).await.unwrap();
            }
        });
        rx
    }));
    let address = worker(move |mut stream| {
        let gate = gate_rx.clone();
        async move {
            read_message(&mut stream).await.unwrap();
            gate.lock().await.recv().await;
            stream.write_all(SSE_HEAD.as_bytes()).await.unwrap();
            for event in ["data: {\"n\":1}\n\n", "data: {\"n\":2}\n\n", "data: [DONE]\n\n"] {
                stream.write_all(chunk(event).as_bytes()).await.unwrap();
                gate.lock().await.recv().await;
            }
            stream.write_all(b"0\r\n\r\n").await.unwrap();
        }
    })
    .await;
    let front = start(FrontConfig::default());
    front.cluster.add("w", address);
    let mut client = TcpStream::connect(front.address).await.unwrap();
    let body = r#"{"model":"m","stream":true,"prompt":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}"#;
    client.write_all(post("/v1/completions", body).as_bytes()).await.unwrap();

    // Booked before the worker answers: the whole prompt, in tokens and in blocks.
    let own = || front.cluster.worker("w").unwrap().live.own.get();
    eventually("booked", || own() == LoadSum { requests: 1, prefill_tokens: 17, decode_blocks: 2 }).await;
    release.send(()).await.unwrap();

    // The first event arrives while the worker waits for us before it sends the second.
    let mut got = String::new();
    while !got.contains("\"n\":1}\n\n") {
        let mut bytes = [0; 1024];
        let count = client.read(&mut bytes).await.unwrap();
        got.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }
    assert!(!got.contains("\"n\":2"));
    assert_eq!(own(), LoadSum { requests: 1, prefill_tokens: 0, decode_blocks: 2 });
    for _ in 0..3 {
        release.send(()).await.unwrap();
    }
    got.push_str(&read_to_close(&mut client).await);
    let (head, body) = got.split_once("\r\n\r\n").unwrap();
    assert_eq!(header(head, "content-type"), Some("text/event-stream; charset=utf-8"));
    let (whole, pieces) = dechunk(body);
    assert_eq!(whole, "data: {\"n\":1}\n\ndata: {\"n\":2}\n\ndata: [DONE]\n\n");
    assert_eq!(pieces.len(), 3, "frames are neither joined nor cut");
    eventually("freed", || own() == LoadSum::default()).await;
}

#[tokio::test]
async fn blocks_are_booked_as_the_output_grows_and_freed_with_the_rest() {
    let (tell, released) = mpsc::channel::<usize>(4);
    let released = Arc::new(tokio::sync::Mutex::new(released));
    let address = worker(move |mut stream| {
        let released = released.clone();
        async move {
            read_message(&mut stream).await.unwrap();
            stream.write_all(SSE_HEAD.as_bytes()).await.unwrap();
            while let Some(events) = released.lock().await.recv().await {
                let all = "data: {\"choices\":[{}]}\n\n".repeat(events);
                stream.write_all(chunk(&all).as_bytes()).await.unwrap();
            }
            let end = format!("{}0\r\n\r\n", chunk("data: [DONE]\n\n"));
            stream.write_all(end.as_bytes()).await.unwrap();
        }
    })
    .await;
    let front = start(FrontConfig::default());
    front.cluster.add("w", address);
    let body = r#"{"model":"m","stream":true,"prompt":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}"#;
    let request = post("/v1/completions", body);
    let got = tokio::spawn(exchange(front.address, request));
    // 17 tokens have two blocks of 16, in which 15 more fit.
    let own = || front.cluster.worker("w").unwrap().live.own.get();
    let now = |blocks| LoadSum { requests: 1, prefill_tokens: 0, decode_blocks: blocks };
    for (events, blocks) in [(15, 2), (1, 3), (15, 3), (33, 6)] {
        tell.send(events).await.unwrap();
        eventually("grown", || own() == now(blocks)).await;
    }
    drop(tell);
    assert!(got.await.unwrap().contains("[DONE]"));
    eventually("freed", || own() == LoadSum::default()).await;
}

#[tokio::test]
async fn a_client_that_leaves_closes_the_worker_connection_within_100_ms() {
    for streaming in [true, false] {
        let (tell, mut closed) = mpsc::channel(1);
        let (reached, mut was_reached) = mpsc::channel(1);
        let address = worker(move |mut stream| {
            let (tell, reached) = (tell.clone(), reached.clone());
            async move {
                read_message(&mut stream).await.unwrap();
                if streaming {
                    let begin = format!("{SSE_HEAD}{}", chunk("data: {}\n\n"));
                    stream.write_all(begin.as_bytes()).await.unwrap();
                }
                reached.send(()).await.unwrap();
                let end = stream.read(&mut [0; 1]).await;
                assert!(matches!(end, Ok(0) | Err(_)), "the upstream socket must close");
                tell.send(Instant::now()).await.unwrap();
            }
        })
        .await;
        let front = start(FrontConfig::default());
        front.cluster.add("w", address);
        let mut client = TcpStream::connect(front.address).await.unwrap();
        client.write_all(chat().as_bytes()).await.unwrap();
        was_reached.recv().await.unwrap();
        if streaming {
            assert!(client.read(&mut [0; 256]).await.unwrap() > 0);
        }
        let left = Instant::now();
        drop(client);
        let took = closed.recv().await.unwrap() - left;
        assert!(took < Duration::from_millis(100), "streaming {streaming}: {took:?}");
        let live = &front.cluster.worker("w").unwrap().live;
        eventually("freed", || live.own.get() == LoadSum::default()).await;
    }
}

#[tokio::test]
async fn a_refused_connection_is_retried_elsewhere_and_remembered() {
    let front = start(FrontConfig::default());
    front.cluster.add("dead", refusing().await);
    front.cluster.add("live", answering(ok("application/json", "{}")).await);
    for _ in 0..8 {
        let response = exchange(front.address, chat()).await;
        assert_eq!((status(&response), header(&response, "everline-worker")), (200, Some("live")));
    }
    let is_marked = |id: &str| front.cluster.worker(id).unwrap().live.unreachable.load(Ordering::Relaxed);
    assert!(is_marked("dead") && !is_marked("live"));
    assert!(front.front.metrics.retries() >= 1);
}

#[tokio::test]
async fn several_that_are_dead_at_once_leave_the_one_that_is_well_its_request() {
    for _ in 0..4 {
        let front = start(FrontConfig::default());
        for dead in 0..6 {
            front.cluster.add(&format!("dead{dead}"), refusing().await);
        }
        front.cluster.add("live", answering(ok("application/json", "{}")).await);
        let response = exchange(front.address, chat()).await;
        assert_eq!((status(&response), header(&response, "everline-worker")), (200, Some("live")));
    }
    // Whoever wants no retries has none.
    let retry = RetryOptions { attempts: 0, ..RetryOptions::default() };
    let front = start(FrontConfig {
        proxy: ProxyOptions { retry, ..ProxyOptions::default() },
        ..FrontConfig::default()
    });
    front.cluster.add("dead", refusing().await);
    front.cluster.add("dead too", refusing().await);
    assert_eq!(status(&exchange(front.address, chat()).await), 502);
    assert_eq!(front.front.metrics.retries(), 0);
}

#[tokio::test]
async fn when_all_are_dead_the_error_names_them_and_says_when_to_come_back() {
    let front = start(FrontConfig::default());
    front.cluster.add("a", refusing().await);
    front.cluster.add("b", refusing().await);
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (502, "upstream_connect_failed"));
    assert!(response.contains("a: ") && response.contains("b: "), "{response}");
    assert_eq!(header(&response, "retry-after"), Some("1"));
    // Marked unreachable both: tried again all the same, and found alive again.
    let revived = answering(ok("application/json", "{}")).await;
    front.cluster.change("a", |record| {
        record.spec.url = format!("http://{revived}");
        record.generation += 1;
    });
    assert_eq!(status(&exchange(front.address, chat()).await), 200);
    assert!(!front.cluster.worker("a").unwrap().live.unreachable.load(Ordering::Relaxed));
}

#[tokio::test]
async fn drained_and_offline_workers_and_an_empty_registry_are_explained() {
    let front = start(FrontConfig::default());
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (503, "no_workers"));
    assert!(response.contains("everline worker add"), "{response}");
    front.cluster.add("a", refusing().await);
    front.cluster.add("b", refusing().await);
    front.cluster.change("a", |record| record.drain = true);
    front.cluster.change("b", |record| record.online = false);
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (503, "no_worker_available"));
    assert!(response.contains("a: draining") && response.contains("b: offline"), "{response}");
    assert_eq!(header(&response, "retry-after"), Some("1"));
}

#[tokio::test]
async fn who_comes_to_a_replica_that_has_just_started_waits_until_it_knows_its_workers() {
    let front = start(FrontConfig::default());
    front.cluster.is_behind.store(true, Ordering::Relaxed);
    let waiting = tokio::spawn(exchange(front.address, chat()));
    let unknown = post("/v1/completions", r#"{"model":"nobody's","prompt":"hello"}"#);
    let refused = tokio::spawn(exchange(front.address, unknown));
    eventually("both have come", || front.front.metrics.requests_taken() == 2).await;
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    assert_eq!(status(&waiting.await.unwrap()), 200, "as soon as it knows of one");
    assert!(!refused.is_finished());
    front.cluster.is_behind.store(false, Ordering::Relaxed);
    let response = refused.await.unwrap();
    assert_eq!((status(&response), code(&response).as_str()), (404, "model_not_found"));
    // Nobody waits for ever.
    let front = start(FrontConfig::default());
    front.cluster.is_behind.store(true, Ordering::Relaxed);
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (503, "no_workers"));
}

#[tokio::test]
async fn bad_requests_get_openai_errors() {
    let front = start(FrontConfig::default());
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    let path = "/v1/chat/completions";
    for (request, expected) in [
        (post(path, "{"), (400, "invalid_json")),
        (post(path, ""), (400, "invalid_json")),
        (post(path, "[1]"), (400, "invalid_json")),
        (post(path, "{}"), (400, "missing_model")),
        (post(path, "{\"model\":\"nope\"}"), (404, "model_not_found")),
        (request("POST", path, "content-encoding: gzip\r\n", "x"), (415, "unsupported_encoding")),
        (request("GET", path, "", ""), (405, "method_not_allowed")),
        (request("POST", "/v1/models", "", ""), (405, "method_not_allowed")),
        (request("GET", "/nothing", "", ""), (404, "unknown_route")),
        (request("GET", "/v1/admin/status", "", ""), (404, "unknown_route")),
    ] {
        let response = exchange(front.address, &request).await;
        assert_eq!((status(&response), code(&response).as_str()), expected, "{request}");
    }
    let response = exchange(front.address, post(path, "{\"model\":\"nope\"}")).await;
    assert!(response.contains("served models: m, m-lora"), "{response}");
}

#[tokio::test]
async fn models_are_merged_in_openai_shape() {
    let front = start(FrontConfig::default());
    front.cluster.add("a", refusing().await);
    front.cluster.add("b", refusing().await);
    front.cluster.change("b", |record| record.spec.models[0].max_model_len = Some(1024));
    let response = exchange(front.address, request("GET", "/v1/models", "", "")).await;
    let list: serde_json::Value = serde_json::from_str(response.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    assert_eq!((&list["data"][0]["id"], &list["data"][0]["max_model_len"]), (&"m".into(), &1024.into()));
    assert_eq!((&list["data"][1]["id"], &list["data"][1]["parent"]), (&"m-lora".into(), &"m".into()));
}

#[tokio::test]
async fn a_503_is_tried_once_elsewhere_and_passed_on_when_nobody_does_better() {
    let busy = "HTTP/1.1 503 Service Unavailable\r\nretry-after: 7\r\ncontent-length: 4\r\n\r\nbusy";
    let front = start(FrontConfig::default());
    front.cluster.add("busy", answering(busy).await);
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), header(&response, "retry-after")), (503, Some("7")));
    assert!(response.ends_with("busy"));
    front.cluster.add("idle", answering(ok("text/plain", "idle")).await);
    for _ in 0..6 {
        assert!(exchange(front.address, chat()).await.ends_with("idle"));
    }
    front.cluster.add("idle", refusing().await);
    assert_eq!(status(&exchange(front.address, chat()).await), 503);
    // A 500 is the worker's answer, not a sign that another would do better.
    let broken = start(FrontConfig::default());
    broken.cluster.add("a", answering("HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n").await);
    assert_eq!(status(&exchange(broken.address, chat()).await), 500);
    assert_eq!(broken.front.metrics.retries(), 0);
}

#[tokio::test]
async fn a_request_that_kills_workers_reaches_at_most_two() {
    let front = start(FrontConfig::default());
    let reached = Arc::new(AtomicUsize::new(0));
    for id in ["a", "b", "c", "d"] {
        let reached = reached.clone();
        let address = worker(move |mut stream| {
            let reached = reached.clone();
            async move {
                if read_message(&mut stream).await.is_some() {
                    reached.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
        .await;
        front.cluster.add(id, address);
    }
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (502, "upstream_failed"));
    assert_eq!(reached.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_request_that_kills_workers_over_kept_connections_reaches_no_more() {
    let front = start(FrontConfig::default());
    let died = Arc::new(parking_lot::Mutex::new(std::collections::BTreeSet::new()));
    for id in ["a", "b", "c", "d"] {
        let died = died.clone();
        let address = worker(move |mut stream| {
            let died = died.clone();
            async move {
                while let Some((_, body)) = read_message(&mut stream).await {
                    if body.windows(6).any(|window| window == b"poison") {
                        died.lock().insert(id);
                        return;
                    }
                    let _ = stream.write_all(ok("text/plain", "well").as_bytes()).await;
                }
            }
        })
        .await;
        front.cluster.add(id, address);
    }
    for _ in 0..10 {
        // Each gets a connection that is kept.
        for _ in 0..20 {
            assert_eq!(status(&exchange(front.address, chat()).await), 200);
        }
        let poison = post("/v1/completions", r#"{"model":"m","prompt":"poison"}"#);
        assert_eq!(status(&exchange(front.address, poison).await), 502);
        let died = std::mem::take(&mut *died.lock());
        assert!((1..=2).contains(&died.len()), "{died:?}");
    }
}

#[tokio::test]
async fn a_kept_alive_connection_that_was_closed_is_no_error() {
    // The worker answers once on each connection and closes when the second request arrives.
    let address = worker(|mut stream| async move {
        read_message(&mut stream).await;
        let _ = stream.write_all(ok("text/plain", "once").as_bytes()).await;
        read_message(&mut stream).await;
    })
    .await;
    let front = start(FrontConfig::default());
    front.cluster.add("w", address);
    for _ in 0..6 {
        let response = exchange(front.address, chat()).await;
        assert!(status(&response) == 200, "{response}");
    }
}

#[tokio::test]
async fn garbage_silence_and_truncation_become_errors() {
    let front = start(impatient());
    front.cluster.add("w", answering("SSH-2.0-OpenSSH_9.6\r\n\r\n").await);
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (502, "upstream_failed"));

    // Silence before the head: 504.
    front.cluster.add("w", answering("").await);
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (504, "upstream_timeout"));

    // Half a body of known length, then the end: the client sees fewer bytes than announced.
    let half = worker(|mut stream| async move {
        read_message(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await;
    });
    front.cluster.add("w", half.await);
    let response = exchange(front.address, chat()).await;
    assert!(response.contains("content-length: 10") && response.ends_with("\r\n\r\nhalf"), "{response}");

    // The same with chunks: no last chunk arrives.
    front
        .cluster
        .add("w", answering("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n").await);
    let response = exchange(front.address, chat()).await;
    assert!(response.contains("half") && !response.ends_with("0\r\n\r\n"), "{response}");
    assert_eq!(front.cluster.worker("w").unwrap().live.own.get(), LoadSum::default());
    assert!(front.front.metrics.recent().list().len() >= 4);
}

#[tokio::test]
async fn an_event_stream_that_fails_ends_with_an_error_event_and_done() {
    let whole = "data: {\"n\":1}\n\n";
    let cut = "data: {\"n\":1}\n\ndata: {\"n";
    let reset = |text: &'static str| {
        worker(move |mut stream| async move {
            read_message(&mut stream).await;
            let begin = format!("{SSE_HEAD}{}", chunk(text));
            let _ = stream.write_all(begin.as_bytes()).await;
            let mut all = [0; 1];
            let _ = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut all)).await;
        })
    };
    let front = start(impatient());
    let ended = format!("{SSE_HEAD}{}0\r\n\r\n", chunk(whole));
    let silent = format!("{SSE_HEAD}{}", chunk(whole));
    for (address, sent) in [
        (reset(whole).await, whole),
        (reset(cut).await, cut),
        (answering(ended).await, whole),
        (answering(silent).await, whole),
    ] {
        front.cluster.add("w", address);
        let response = exchange(front.address, chat()).await;
        let (events, _) = dechunk(response.split_once("\r\n\r\n").unwrap().1);
        let rest = events.strip_prefix(sent).expect(&events);
        assert_eq!(rest.starts_with("\n\n"), sent == cut, "{events}");
        let event = rest.trim_start().strip_prefix("data: ").expect(&events);
        let event = event.strip_suffix("\n\ndata: [DONE]\n\n").expect(&events);
        let error: serde_json::Value = serde_json::from_str(event).expect(&events);
        assert_eq!(error["error"]["code"], "upstream_failed");
    }
}

#[tokio::test]
async fn a_worker_outside_the_allowed_networks_gets_no_prompt() {
    let (tell, mut reached) = oneshot::channel::<()>();
    let tell = Arc::new(parking_lot::Mutex::new(Some(tell)));
    let address = worker(move |_| {
        tell.lock().take();
        async {}
    })
    .await;
    let config = FrontConfig {
        allow: Arc::new(crate::http::Allowed::new(vec!["10.0.0.0/8".parse().unwrap()])),
        ..FrontConfig::default()
    };
    let front = start(config);
    front.cluster.add("w", address);
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (502, "upstream_connect_failed"));
    assert!(response.contains("outside workers.allow"), "{response}");
    assert!(reached.try_recv().is_err_and(|e| e == oneshot::error::TryRecvError::Empty), "no connection");
}

#[tokio::test]
async fn http2_clients_get_events_and_cancel_alike() {
    use http_body_util::{BodyExt, Full};
    use hyper_util::client::legacy::Client;
    use hyper_util::rt::{TokioExecutor, TokioTimer};

    let front = start(FrontConfig::default());
    let events = format!("{SSE_HEAD}{}{}0\r\n\r\n", chunk("data: {}\n\n"), chunk("data: [DONE]\n\n"));
    front.cluster.add("w", answering(events).await);
    let client = Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_only(true)
        .build_http::<Full<bytes::Bytes>>();
    let ask = || {
        let uri = format!("http://{}/v1/completions", front.address);
        http::Request::post(uri).body(Full::from(r#"{"model":"m","stream":true}"#)).unwrap()
    };
    let response = client.request(ask()).await.unwrap();
    assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "data: {}\n\ndata: [DONE]\n\n");

    // A reset stream closes the worker's connection; the h2 connection lives on.
    let endless = worker(|mut stream| async move {
        read_message(&mut stream).await;
        let begin = format!("{SSE_HEAD}{}", chunk("data: {}\n\n"));
        let _ = stream.write_all(begin.as_bytes()).await;
        let _ = stream.read(&mut [0; 1]).await;
    });
    front.cluster.add("w", endless.await);
    let live = front.cluster.worker("w").unwrap().live.clone();
    let mut response = client.request(ask()).await.unwrap();
    assert!(response.body_mut().frame().await.unwrap().is_ok());
    assert_eq!(live.own.get().requests, 1);
    drop(response);
    eventually("freed", || live.own.get() == LoadSum::default()).await;
    assert_eq!(front.front.metrics.connections.get(), 1);
}
