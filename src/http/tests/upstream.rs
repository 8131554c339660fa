//! Workers behind TLS and HTTP/2, engines that want a key, saturation and breakers, over real
//! sockets. Another front plays the worker: it speaks all of these.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::HeaderValue;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::support::*;
use crate::http::{FrontConfig, PoolOptions, ProxyOptions, QueueOptions, WorkerTls};
use crate::routing::breaker::{BreakerOptions, BreakerState};
use crate::tls::listener::ListenerTls;
use crate::tls::testing::{Certs, client};

const SSE: &str = "data: {\"n\":1}\n\ndata: [DONE]\n\n";

/// A front with a worker behind it that answers with events.
async fn inner(config: FrontConfig) -> Running {
    let front = start(config);
    front.cluster.add("engine", answering(ok("text/event-stream", SSE)).await);
    front
}

#[tokio::test]
async fn workers_are_spoken_to_in_either_version_with_and_without_tls() {
    let certs = Certs::new("prod");
    let listener = ListenerTls::open("http", &certs.server("r1"), Duration::from_secs(5)).unwrap();
    let secure = inner(FrontConfig { client_tls: Some(Arc::new(listener)), ..FrontConfig::default() }).await;
    let plain = inner(FrontConfig::default()).await;

    let tls = Some(WorkerTls::new(client(&certs.ca_file(), None, &[])));
    let front =
        start(FrontConfig { pool: PoolOptions { tls, ..PoolOptions::default() }, ..FrontConfig::default() });
    front.cluster.add("w", plain.address);
    for (scheme, address) in [("http", plain.address), ("https", secure.address)] {
        for http2 in [false, true] {
            front.cluster.change("w", |record| {
                record.spec.url = format!("{scheme}://{address}");
                record.spec.http2 = http2;
                record.generation += 1;
            });
            // Twice: the second time over the connection that is there.
            for _ in 0..2 {
                let response = exchange(front.address, chat()).await;
                assert_eq!(status(&response), 200, "{scheme} {http2}: {response}");
                assert!(response.contains("data: [DONE]"), "{response}");
            }
        }
    }

    // A certificate of somebody else's authority.
    let stranger = Certs::new("prod");
    let tls = Some(WorkerTls::new(client(&stranger.ca_file(), None, &[])));
    let front =
        start(FrontConfig { pool: PoolOptions { tls, ..PoolOptions::default() }, ..FrontConfig::default() });
    front.cluster.add("w", secure.address);
    front.cluster.change("w", |record| record.spec.url = format!("https://{}", secure.address));
    let response = exchange(front.address, chat()).await;
    assert_eq!((status(&response), code(&response).as_str()), (502, "upstream_connect_failed"));
    assert!(response.contains("certificate"), "{response}");
}

#[tokio::test]
async fn an_h2_worker_that_goes_away_is_an_error_and_one_that_is_back_is_found() {
    let front = start(FrontConfig::default());
    let mut first = inner(FrontConfig::default()).await;
    front.cluster.add("w", first.address);
    front.cluster.change("w", |record| record.spec.http2 = true);
    assert_eq!(status(&exchange(front.address, chat()).await), 200);
    first.stop.cancel();
    first.served.take().unwrap().await.unwrap().unwrap();
    assert_eq!(status(&exchange(front.address, chat()).await), 502);
    let second = inner(FrontConfig::default()).await;
    front.cluster.change("w", |record| {
        record.spec.url = format!("http://{}", second.address);
        record.generation += 1;
    });
    assert_eq!(status(&exchange(front.address, chat()).await), 200);
}

#[tokio::test]
async fn engines_are_shown_the_key_they_want_and_never_the_clients() {
    let pool = PoolOptions {
        authorization: Some(HeaderValue::from_static("Bearer engine-key")),
        ..PoolOptions::default()
    };
    let front = start(FrontConfig { pool, ..FrontConfig::default() });
    let (address, seen) = remembering().await;
    front.cluster.add("w", address);
    let body = r#"{"model":"m"}"#;
    let request = request("POST", "/v1/chat/completions", "authorization: Bearer client-key\r\n", body);
    assert_eq!(status(&exchange(front.address, request).await), 200);
    let seen = seen.lock().pop().unwrap();
    assert!(seen.contains("authorization: Bearer engine-key") && !seen.contains("client-key"), "{seen}");
}

/// Answers each connection when told to.
async fn holding() -> (std::net::SocketAddr, Arc<tokio::sync::Semaphore>) {
    let permits = Arc::new(tokio::sync::Semaphore::new(0));
    let held = Arc::clone(&permits);
    let address = worker(move |mut stream| {
        let permits = Arc::clone(&permits);
        async move {
            read_message(&mut stream).await;
            permits.acquire().await.unwrap().forget();
            let _ = stream.write_all(ok("application/json", "{}").as_bytes()).await;
        }
    });
    (address.await, held)
}

fn queueing(most: usize, patience: Duration) -> FrontConfig {
    let queue = QueueOptions { most, patience };
    FrontConfig { proxy: ProxyOptions { queue, ..ProxyOptions::default() }, ..FrontConfig::default() }
}

#[tokio::test]
async fn when_all_workers_are_saturated_requests_wait_in_line_up_to_a_bound() {
    let front = start(queueing(2, Duration::from_secs(20)));
    let (address, permits) = holding().await;
    front.cluster.add("w", address);
    front.cluster.change("w", |record| record.spec.max_requests = Some(1));
    let send = || tokio::spawn(exchange(front.address, chat()));
    let running = send();
    let live = Arc::clone(&front.cluster.worker("w").unwrap().live);
    eventually("one runs", || live.load().requests == 1).await;
    let waiting = [send(), send()];
    eventually("two wait", || front.front.queue.waiting() == 2).await;

    let refused = exchange(front.address, chat()).await;
    assert_eq!((status(&refused), code(&refused).as_str()), (429, "workers_saturated"));
    assert_eq!(header(&refused, "retry-after"), Some("1"));

    // Never more at the worker than it should have, and everybody gets an answer.
    for done in 1..=3 {
        assert!(live.load().requests <= 1);
        permits.add_permits(1);
        eventually("the next one goes on", || front.front.queue.waiting() == 2_usize.saturating_sub(done))
            .await;
    }
    assert_eq!(status(&running.await.unwrap()), 200);
    for waited in waiting {
        assert_eq!(status(&waited.await.unwrap()), 200);
    }
    assert_eq!(live.load().requests, 0);
}

#[tokio::test]
async fn waiting_ends_with_patience_or_with_the_client() {
    let front = start(queueing(8, Duration::from_millis(150)));
    let (address, permits) = holding().await;
    front.cluster.add("w", address);
    front.cluster.change("w", |record| record.spec.max_requests = Some(1));
    let running = tokio::spawn(exchange(front.address, chat()));
    let live = Arc::clone(&front.cluster.worker("w").unwrap().live);
    eventually("one runs", || live.load().requests == 1).await;
    let refused = exchange(front.address, chat()).await;
    assert_eq!((status(&refused), code(&refused).as_str()), (429, "workers_saturated"));

    let front = start(queueing(8, Duration::from_secs(20)));
    front.cluster.add("w", address);
    front.cluster.change("w", |record| record.spec.max_requests = Some(1));
    let live = Arc::clone(&front.cluster.worker("w").unwrap().live);
    let other = tokio::spawn(exchange(front.address, chat()));
    eventually("one runs", || live.load().requests == 1).await;
    let mut leaving = TcpStream::connect(front.address).await.unwrap();
    leaving.write_all(chat().as_bytes()).await.unwrap();
    eventually("it waits", || front.front.queue.waiting() == 1).await;
    drop(leaving);
    eventually("it waits no more", || front.front.queue.waiting() == 0).await;
    permits.add_permits(2);
    assert_eq!(status(&running.await.unwrap()), 200);
    assert_eq!(status(&other.await.unwrap()), 200);
}

#[tokio::test]
async fn a_worker_that_keeps_failing_is_left_alone_and_tried_again_later() {
    let breaker = BreakerOptions { failures: 3, open_ms: 60_000, max_open_ms: 60_000 };
    let proxy = ProxyOptions { breaker, ..ProxyOptions::default() };
    let front = start(FrontConfig { proxy, ..FrontConfig::default() });
    front.cluster.add("bad", answering("nonsense\r\n\r\n").await);
    front.cluster.add("good", answering(ok("application/json", "{}")).await);
    let bad = Arc::clone(&front.cluster.worker("bad").unwrap().live);
    // Every request is answered: what the bad one spoils is tried at the good one.
    for _ in 0..200 {
        assert_eq!(status(&exchange(front.address, chat()).await), 200);
    }
    assert_eq!(bad.breaker.state(front.front.now_ms()), BreakerState::Open);
    assert!(!bad.unreachable.load(Ordering::Relaxed));
    assert_eq!(front.front.metrics.retries(), 3, "three failures, then it was left alone");

    // Where nobody else is left, it is tried all the same.
    front.cluster.change("good", |record| record.drain = true);
    assert_eq!(status(&exchange(front.address, chat()).await), 502);
}
