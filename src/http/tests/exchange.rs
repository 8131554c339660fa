//! Exchanges with workers that are early, late, silent or endless, and what becomes of the
//! connection afterwards.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::StreamBody;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::support::*;
use crate::http::{FrontConfig, PoolOptions, ProxyOptions, WorkerTls};
use crate::tls::testing::{Certs, client};

#[tokio::test]
async fn methods_that_mirror_or_tunnel_are_refused_on_pass_through() {
    let pool = PoolOptions {
        authorization: Some(HeaderValue::from_static("Bearer engine-key")),
        ..PoolOptions::default()
    };
    let front = start(FrontConfig { pool, ..FrontConfig::default() });
    let (address, seen) = remembering().await;
    front.cluster.add("w", address);
    for method in ["TRACE", "CONNECT"] {
        let response = exchange(front.address, request(method, "/v1/audio/x", "", "")).await;
        assert_eq!(status(&response), 405, "{method}: {response}");
        assert!(header(&response, "allow").is_some_and(|allow| allow.contains("POST")), "{response}");
    }
    assert!(seen.lock().is_empty(), "a worker was shown {:?}", seen.lock());
    let response = exchange(front.address, request("OPTIONS", "/v1/audio/x", "", "")).await;
    assert_eq!(status(&response), 200, "{response}");
}

#[tokio::test]
async fn a_compressed_body_is_refused_wherever_its_encoding_is_named() {
    let front = start(FrontConfig::default());
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    let twice = "content-encoding: identity\r\ncontent-encoding: gzip\r\n";
    let response =
        exchange(front.address, request("POST", "/v1/completions", twice, r#"{"model":"m"}"#)).await;
    assert_eq!((status(&response), code(&response).as_str()), (415, "unsupported_encoding"));
}

/// Reads a head, begins to answer, reads the body, ends the answer; counts its connections.
async fn early(connections: Arc<AtomicUsize>) -> SocketAddr {
    worker(move |mut stream| {
        connections.fetch_add(1, Ordering::Relaxed);
        async move {
            loop {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    head.push(byte);
                }
                let head = String::from_utf8(head).unwrap();
                let mut left: usize = header(&head, "content-length").unwrap().parse().unwrap();
                let begin = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nbegun\r\n";
                stream.write_all(begin.as_bytes()).await.unwrap();
                // Long enough that the answer is certainly seen before the body is gone.
                tokio::time::sleep(Duration::from_millis(100)).await;
                let mut chunk = vec![0; 64 * 1024];
                while left > 0 {
                    left -= stream.read(&mut chunk[..left.min(64 * 1024)]).await.unwrap();
                }
                stream.write_all(b"5\r\nended\r\n0\r\n\r\n").await.unwrap();
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_worker_that_answers_before_it_has_read_the_body_gets_the_rest_of_it() {
    let front = start(FrontConfig::default());
    let connections = Arc::<AtomicUsize>::default();
    front.cluster.add("w", early(Arc::clone(&connections)).await);
    let body = "x".repeat(24 << 20);
    for _ in 0..2 {
        let octets = "content-type: application/octet-stream\r\n";
        let response = exchange(front.address, request("POST", "/v1/audio/x", octets, &body)).await;
        assert_eq!(status(&response), 200, "{response}");
        assert!(response.contains("begun") && response.contains("ended"), "{response}");
    }
    assert_eq!(connections.load(Ordering::Relaxed), 1, "all was sent and read, so it was kept");
}

#[tokio::test]
async fn an_endless_answer_is_cut_off_when_its_time_is_over_even_if_it_never_pauses() {
    let proxy = ProxyOptions { total_timeout: Duration::from_millis(400), ..ProxyOptions::default() };
    let front = start(FrontConfig { proxy, ..FrontConfig::default() });
    let endless = worker(|mut stream| async move {
        read_message(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\n\r\n").await;
        let chunk = vec![b'x'; 256 * 1024];
        while stream.write_all(&chunk).await.is_ok() {}
    });
    front.cluster.add("w", endless.await);
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    stream.write_all(chat().as_bytes()).await.unwrap();
    // Slower than the worker writes, so that there is always something to hand on.
    let mut chunk = vec![0; 64 * 1024];
    let reading = async {
        while let Ok(1..) = stream.read(&mut chunk).await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(8), reading).await.expect("it went on for ever");
}

#[tokio::test]
async fn a_kept_connection_that_breaks_late_has_reached_the_worker() {
    let proxy = ProxyOptions { max_workers_reached: 1, ..ProxyOptions::default() };
    let front = start(FrontConfig { proxy, ..FrontConfig::default() });
    let seen = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&seen);
    let dying = worker(move |mut stream| {
        let seen = Arc::clone(&count);
        async move {
            while read_message(&mut stream).await.is_some() {
                if seen.fetch_add(1, Ordering::Relaxed) > 0 {
                    // It works on the request for a while, and then crashes.
                    tokio::time::sleep(Duration::from_millis(1500)).await;
                    return;
                }
                let _ = stream.write_all(ok("application/json", "{}").as_bytes()).await;
            }
        }
    });
    front.cluster.add("w", dying.await);
    assert_eq!(status(&exchange(front.address, chat()).await), 200);
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (502, "upstream_failed"));
    assert_eq!(seen.load(Ordering::Relaxed), 2, "the request that kills is not sent to more workers");
}

#[tokio::test]
async fn a_worker_that_tired_of_an_idle_connection_is_asked_again_on_another() {
    let front = start(FrontConfig::default());
    let connections = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&connections);
    let tired = worker(move |mut stream| {
        count.fetch_add(1, Ordering::Relaxed);
        async move {
            read_message(&mut stream).await;
            let _ = stream.write_all(ok("application/json", "{}").as_bytes()).await;
            // What a server says that closes an idle connection crosses with the next request.
            read_message(&mut stream).await;
            let late = "HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
            let _ = stream.write_all(late.as_bytes()).await;
        }
    });
    front.cluster.add("w", tired.await);
    for _ in 0..2 {
        assert_eq!(status(&exchange(front.address, chat()).await), 200);
    }
    assert_eq!(connections.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn an_h2_connection_that_nobody_uses_is_closed_and_nothing_stays_of_a_worker_that_is_gone() {
    let pool = PoolOptions { h2_idle_timeout: Duration::from_millis(50), ..PoolOptions::default() };
    let front = start(FrontConfig { pool, ..FrontConfig::default() });
    let engine = start(FrontConfig::default());
    engine.cluster.add("e", answering(ok("application/json", "{}")).await);
    front.cluster.add("w", engine.address);
    front.cluster.change("w", |record| record.spec.http2 = true);
    assert_eq!(status(&exchange(front.address, chat()).await), 200);
    assert_eq!(engine.front.metrics.connections.get(), 1);
    front.cluster.forget("w");
    eventually("it is closed", || engine.front.metrics.connections.get() == 0).await;
}

#[tokio::test]
async fn requests_for_an_h2_worker_that_cannot_be_reached_fail_together_not_one_after_the_other() {
    let certs = Certs::new("prod");
    let pool = PoolOptions {
        tls: Some(WorkerTls::new(client(&certs.ca_file(), None, &[]))),
        connect_timeout: Duration::from_millis(400),
        ..PoolOptions::default()
    };
    let front = start(FrontConfig { pool, ..FrontConfig::default() });
    // It takes the connection and never says a word of TLS.
    let silent = worker(|mut stream| async move {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let address = silent.await;
    front.cluster.add("w", address);
    front.cluster.change("w", |record| {
        record.spec.url = format!("https://{address}");
        record.spec.http2 = true;
    });
    let since = Instant::now();
    let requests: Vec<_> = (0..16).map(|_| tokio::spawn(exchange(front.address, chat()))).collect();
    for request in requests {
        assert_eq!(code(&request.await.unwrap()), "upstream_connect_failed");
    }
    assert!(since.elapsed() < Duration::from_millis(400 * 8), "{:?}", since.elapsed());
}

type Frames = Response<StreamBody<futures_util::stream::Iter<std::vec::IntoIter<io::Result<Frame<Bytes>>>>>>;

fn frames(frames: Vec<Frame<Bytes>>) -> Frames {
    let frames: Vec<_> = frames.into_iter().map(Ok).collect();
    Response::new(StreamBody::new(futures_util::stream::iter(frames)))
}

/// A worker that speaks HTTP/2 only and does not wait for bodies.
async fn h2_worker(answer: fn(Request<Incoming>) -> Frames) -> SocketAddr {
    worker(move |stream| async move {
        let service = service_fn(move |request| async move { Ok::<_, io::Error>(answer(request)) });
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = builder.serve_connection(TokioIo::new(stream), service).await;
    })
    .await
}

#[tokio::test]
async fn clients_that_do_not_read_do_not_hold_up_others_on_the_same_h2_connection() {
    let address = h2_worker(|request| {
        if request.uri().path() == "/v1/audio/x" {
            let chunk = Bytes::from(vec![b'x'; 64 * 1024]);
            return frames(vec![(); 512].into_iter().map(|()| Frame::data(chunk.clone())).collect());
        }
        frames(vec![Frame::data("{}".into())])
    });
    let front = start(FrontConfig::default());
    front.cluster.add("w", address.await);
    front.cluster.change("w", |record| record.spec.http2 = true);
    let mut stalled = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(front.address).await.unwrap();
        stream.write_all(request("GET", "/v1/audio/x", "", "").as_bytes()).await.unwrap();
        stream.read_u8().await.unwrap();
        stalled.push(stream);
    }
    let live = Arc::clone(&front.cluster.worker("w").unwrap().live);
    assert_eq!(live.load().requests, 8);
    // They fill what there is of buffers; then nothing moves on those streams.
    tokio::time::sleep(Duration::from_millis(500)).await;
    for _ in 0..3 {
        let response = exchange(front.address, chat()).await;
        assert_eq!(status(&response), 200, "{response}");
    }
    drop(stalled);
}

#[tokio::test]
async fn a_stream_outlives_the_time_after_which_its_h2_connection_counts_as_idle() {
    let pool = PoolOptions { h2_idle_timeout: Duration::from_millis(50), ..PoolOptions::default() };
    let front = start(FrontConfig { pool, ..FrontConfig::default() });
    let engine = start(FrontConfig::default());
    let slow = worker(|mut stream| async move {
        read_message(&mut stream).await;
        let begin = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {}\n\n";
        stream.write_all(begin.as_bytes()).await.unwrap();
        // Two looks at idle connections.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let _ = stream.write_all(b"data: [DONE]\n\n").await;
    });
    engine.cluster.add("e", slow.await);
    front.cluster.add("w", engine.address);
    front.cluster.change("w", |record| record.spec.http2 = true);
    let response = exchange(front.address, chat()).await;
    assert!(response.contains("[DONE]") && !response.contains("error"), "{response}");
}

#[tokio::test]
async fn of_an_h2_answer_neither_headers_for_one_hop_nor_trailers_pass() {
    let address = h2_worker(|_| {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-trailer", HeaderValue::from_static("1"));
        let mut response = frames(vec![Frame::data("data: [DONE]\n\n".into()), Frame::trailers(trailers)]);
        response.headers_mut().insert("trailer", HeaderValue::from_static("x-trailer"));
        response.headers_mut().insert("content-type", HeaderValue::from_static("text/event-stream"));
        response
    })
    .await;
    let front = start(FrontConfig::default());
    front.cluster.add("w", address);
    front.cluster.change("w", |record| record.spec.http2 = true);
    let response =
        exchange(front.address, request("POST", "/v1/completions", "te: trailers\r\n", r#"{"model":"m"}"#))
            .await;
    assert!(response.contains("[DONE]"), "{response}");
    assert!(!response.contains("x-trailer"), "{response}");
}

#[tokio::test]
async fn the_grace_at_the_end_is_one_for_all_threads() {
    let mut config = FrontConfig::default();
    config.accept.threads = 4;
    config.accept.grace = Duration::from_millis(700);
    let mut front = start(config);
    let silent = worker(|mut stream| async move {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    front.cluster.add("w", silent.await);
    let live = Arc::clone(&front.cluster.worker("w").unwrap().live);
    let requests: Vec<_> = (0..8).map(|_| tokio::spawn(exchange(front.address, chat()))).collect();
    eventually("all run", || live.load().requests == 8).await;
    let since = Instant::now();
    front.stop.cancel();
    front.served.take().unwrap().await.unwrap().unwrap();
    assert!(since.elapsed() >= Duration::from_millis(700));
    assert!(since.elapsed() < Duration::from_millis(700 * 2), "{:?}", since.elapsed());
    drop(requests);
}

#[tokio::test]
async fn an_answer_begun_before_the_drain_ends_the_connection_too() {
    let front = start(FrontConfig::default());
    let (asked, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (tell, wait) = (Arc::clone(&asked), Arc::clone(&go));
    let held = worker(move |mut stream| {
        let (tell, wait) = (Arc::clone(&tell), Arc::clone(&wait));
        async move {
            read_message(&mut stream).await;
            tell.notify_one();
            wait.notified().await;
            let _ = stream.write_all(ok("application/json", "{}").as_bytes()).await;
        }
    });
    front.cluster.add("w", held.await);
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    stream.write_all(chat().replace("connection: close\r\n", "").as_bytes()).await.unwrap();
    asked.notified().await;
    front.front.draining.cancel();
    go.notify_one();
    let response = read_to_close(&mut stream).await;
    assert_eq!((status(&response), header(&response, "connection")), (200, Some("close")));
}
