//! What is refused, cut off or bounded before a worker hears of it.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::support::*;
use crate::http::FrontConfig;

const SHORT: Duration = Duration::from_millis(150);

fn strict() -> FrontConfig {
    let mut config = FrontConfig::default();
    config.accept.timeouts.first_byte = SHORT;
    config.accept.timeouts.head = SHORT;
    config.accept.timeouts.idle = SHORT * 4;
    config.proxy.body.max_bytes = 1000;
    config.proxy.body.total = SHORT;
    config
}

/// How long the front kept the connection open after these bytes.
async fn open_for(front: &Running, bytes: &str) -> Duration {
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    let since = Instant::now();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    read_to_close(&mut stream).await;
    since.elapsed()
}

#[tokio::test]
async fn heads_that_two_parsers_could_read_in_two_ways_are_refused() {
    let front = start(FrontConfig::default());
    let host = "host: a\r\n";
    for (head, expected) in [
        (format!("GET /livez HTTP/1.1\r\n{host}\r\n"), ""),
        ("GET /livez HTTP/1.0\r\n\r\n".to_owned(), ""),
        ("GET /livez HTTP/1.1\r\n\r\n".to_owned(), "invalid_host"),
        (format!("GET /livez HTTP/1.1\r\n{host}{host}\r\n"), "invalid_host"),
        ("GET /livez HTTP/1.1\r\nhost: foo?x=/y#\r\n\r\n".to_owned(), "invalid_host"),
        ("GET /livez HTTP/1.1\r\nhost: u@a\r\n\r\n".to_owned(), "invalid_host"),
        (format!("GET http://b/livez HTTP/1.1\r\n{host}\r\n"), "invalid_host"),
        (format!("GET http://a/livez HTTP/1.1\r\n{host}\r\n"), ""),
        (
            format!(
                "POST /v1/completions HTTP/1.1\r\n{host}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            "ambiguous_framing",
        ),
        (
            format!(
                "POST /v1/completions HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
            ),
            "ambiguous_framing",
        ),
        (format!("GET /livez HTTP/1.1\n{host}\n"), "ambiguous_framing"),
        (format!("GET /livez HTTP/1.1\r\n{host}x: 1\n\r\n"), "ambiguous_framing"),
    ] {
        let mut stream = TcpStream::connect(front.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        if expected.is_empty() {
            let mut bytes = [0; 512];
            let count = stream.read(&mut bytes).await.unwrap();
            assert_eq!(status(std::str::from_utf8(&bytes[..count]).unwrap()), 200, "{head}");
            continue;
        }
        // Refused, and the connection closed by the front.
        let response = read_to_close(&mut stream).await;
        assert_eq!((status(&response), code(&response).as_str()), (400, expected), "{head}");
        assert_eq!(header(&response, "connection"), Some("close"), "{head}");
    }
}

#[tokio::test]
async fn malformed_heads_are_refused_and_closed() {
    let front = start(FrontConfig::default());
    for head in [
        "GET /livez HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        "GET /livez HTTP/1.1\r\nhost: a\r\ncontent-length: +4\r\n\r\n",
        "GET /livez HTTP/1.1\r\nhost : a\r\n\r\n",
        "GET /livez HTTP/1.1\r\nhost: a\r\n folded\r\n\r\n",
        "GET /livez HTTP/1.1\r\nhost: a\r\nx: \0\r\n\r\n",
        "POST /livez HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n",
        "POST /livez HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n",
        "nonsense\r\n\r\n",
    ] {
        let response = exchange(front.address, head).await;
        assert_eq!(status(&response), 400, "{head:?}: {response}");
    }
}

#[tokio::test]
async fn floods_of_headers_are_cut() {
    let front = start(FrontConfig::default());
    let many = "x: 1\r\n".repeat(70);
    let response = exchange(front.address, request("GET", "/livez", &many, "")).await;
    assert_eq!(status(&response), 431, "{response}");
    let long = format!("x: {}\r\n", "y".repeat(100_000));
    let response = exchange(front.address, request("GET", "/livez", &long, "")).await;
    assert!(matches!(status(&response), 0 | 431), "{response}");
}

#[tokio::test]
async fn silent_and_slow_connections_are_closed() {
    let front = start(strict());
    for (bytes, least, most) in [
        ("", SHORT, SHORT * 3),
        ("GET /livez HTTP/1.1\r\nhost: a\r\n", SHORT, SHORT * 3),
        ("GET /livez HTTP/1.1\r\nhost: a\r\n\r\n", SHORT * 4, SHORT * 7),
        ("GET /livez HTTP/1.1\r\nhost: a\r\n\r\nGET /li", SHORT, SHORT * 7),
    ] {
        let open = open_for(&front, bytes).await;
        assert!(least <= open && open < most, "{bytes:?} stayed open for {open:?}");
    }
    // Dripping does not help: the time counts from the head's first byte.
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    let since = Instant::now();
    let mut closed = false;
    for byte in "GET /livez HTTP/1.1\r\nhost: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa".bytes() {
        closed = stream.write_all(&[byte]).await.is_err();
        if closed {
            break;
        }
        tokio::time::sleep(SHORT / 10).await;
    }
    assert!(closed && since.elapsed() < SHORT * 5, "{:?}", since.elapsed());
}

#[tokio::test]
async fn bodies_are_bounded_in_size_and_time() {
    let front = start(strict());
    let path = "/v1/completions";
    let response = exchange(front.address, post(path, &"x".repeat(1001))).await;
    assert_eq!((status(&response), code(&response).as_str()), (413, "body_too_large"));
    // An announcement is enough: nothing of the body is waited for.
    let announced = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n";
    let response = exchange(front.address, announced).await;
    assert_eq!((status(&response), code(&response).as_str()), (413, "body_too_large"));
    // A large body in full flow is read on for a while, so that the answer is not lost to a reset.
    for size in [1500, 1900] {
        let response = exchange(front.address, post(path, &"x".repeat(size))).await;
        assert_eq!(status(&response), 413);
    }
    let chunked = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunks = format!("{chunked}{}", format!("200\r\n{}\r\n", "x".repeat(512)).repeat(2));
    let response = exchange(front.address, chunks).await;
    assert_eq!((status(&response), code(&response).as_str()), (413, "body_too_large"));

    // Half a body and silence: 408 at the deadline, connection closed.
    let half = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n{\"mod";
    let since = Instant::now();
    let response = exchange(front.address, half).await;
    assert_eq!((status(&response), code(&response).as_str()), (408, "body_timeout"));
    assert!(since.elapsed() >= SHORT && since.elapsed() < SHORT * 4, "{:?}", since.elapsed());
}

#[tokio::test]
async fn slow_bodies_fall_below_the_floor() {
    let mut config = FrontConfig::default();
    config.proxy.body.grace = SHORT;
    config.proxy.body.floor = 1000;
    let front = start(config);
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let since = Instant::now();
    let drip = async {
        while stream.write_all(b"x").await.is_ok() && since.elapsed() < Duration::from_secs(5) {
            tokio::time::sleep(SHORT / 10).await;
        }
    };
    drip.await;
    assert!(since.elapsed() < SHORT * 5, "{:?}", since.elapsed());
}

#[tokio::test]
async fn connections_are_counted_and_given_back() {
    let mut config = FrontConfig::default();
    config.accept.max_connections = 2;
    let front = start(config);
    let held =
        [TcpStream::connect(front.address).await.unwrap(), TcpStream::connect(front.address).await.unwrap()];
    eventually("accepted", || front.front.metrics.connections.get() == 2).await;
    let response = exchange(front.address, "").await;
    assert_eq!((status(&response), code(&response).as_str()), (503, "too_many_connections"));
    drop(held);
    eventually("given back", || front.front.metrics.connections.get() == 0).await;
    assert_eq!(status(&exchange(front.address, request("GET", "/livez", "", "")).await), 200);
}

#[tokio::test]
async fn one_address_cannot_take_all_connections() {
    let mut config = FrontConfig::default();
    config.accept.max_connections_per_ip = 1;
    config.accept.per_ip_exempt = Vec::new();
    let front = start(config);
    let held = TcpStream::connect(front.address).await.unwrap();
    eventually("accepted", || front.front.metrics.connections.get() == 1).await;
    assert_eq!(status(&exchange(front.address, "").await), 503);
    drop(held);
    eventually("given back", || front.front.metrics.connections.get() == 0).await;
    assert_eq!(status(&exchange(front.address, request("GET", "/livez", "", "")).await), 200);
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_its_socket_and_frees_the_worker() {
    let mut config = FrontConfig::default();
    config.accept.timeouts.write_stall = SHORT;
    let front = start(config);
    let (tell, mut closed) = tokio::sync::mpsc::channel(1);
    let flood = worker(move |mut stream| {
        let tell = tell.clone();
        async move {
            read_message(&mut stream).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9999999999\r\n\r\n").await;
            while stream.write_all(&[0; 65536]).await.is_ok() {}
            tell.send(()).await.unwrap();
        }
    });
    front.cluster.add("w", flood.await);
    let mut client = TcpStream::connect(front.address).await.unwrap();
    client.write_all(chat().as_bytes()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), closed.recv()).await.expect("the worker was not let go");
}

#[tokio::test]
async fn at_shutdown_requests_in_flight_finish_and_idle_connections_close() {
    let (release, gate) = tokio::sync::oneshot::channel::<()>();
    let gate = std::sync::Arc::new(tokio::sync::Mutex::new(Some(gate)));
    let slow = worker(move |mut stream| {
        let gate = gate.clone();
        async move {
            read_message(&mut stream).await;
            let gate = gate.lock().await.take();
            gate.unwrap().await.unwrap();
            let _ = stream.write_all(ok("text/plain", "late").as_bytes()).await;
        }
    });
    let mut front = start(FrontConfig::default());
    front.cluster.add("w", slow.await);
    let mut idle = TcpStream::connect(front.address).await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut client = TcpStream::connect(front.address).await.unwrap();
    client.write_all(chat().as_bytes()).await.unwrap();
    let live = front.cluster.worker("w").unwrap().live.clone();
    eventually("in flight", || live.own.get().requests == 1).await;
    front.stop.cancel();
    read_to_close(&mut idle).await;
    assert!(front.front.draining.is_cancelled());
    release.send(()).unwrap();
    assert!(read_to_close(&mut client).await.ends_with("late"));
    front.served.take().unwrap().await.unwrap().unwrap();
    assert!(TcpStream::connect(front.address).await.is_err());
}

#[tokio::test]
async fn after_the_grace_time_what_is_left_is_closed() {
    let mut config = FrontConfig::default();
    config.accept.grace = SHORT;
    let mut front = start(config);
    front.cluster.add("w", answering("").await);
    let mut client = TcpStream::connect(front.address).await.unwrap();
    client.write_all(chat().as_bytes()).await.unwrap();
    let live = front.cluster.worker("w").unwrap().live.clone();
    eventually("in flight", || live.own.get().requests == 1).await;
    front.stop.cancel();
    assert_eq!(read_to_close(&mut client).await, "");
    front.served.take().unwrap().await.unwrap().unwrap();
    assert_eq!(live.own.get().requests, 0);
}

#[tokio::test]
async fn an_http2_stream_that_nobody_reads_frees_its_worker() {
    use hyper_util::client::legacy::Client;
    use hyper_util::rt::TokioExecutor;

    let mut config = FrontConfig::default();
    config.accept.timeouts.write_stall = SHORT;
    let front = start(config);
    let (tell, mut closed) = tokio::sync::mpsc::channel(1);
    let flood = worker(move |mut stream| {
        let tell = tell.clone();
        async move {
            read_message(&mut stream).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9999999999\r\n\r\n").await;
            while stream.write_all(&[0; 65536]).await.is_ok() {}
            tell.send(()).await.unwrap();
        }
    });
    front.cluster.add("w", flood.await);
    let client = Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http::<http_body_util::Full<bytes::Bytes>>();
    let request = http::Request::post(format!("http://{}/v1/completions", front.address));
    // The head is read, the body never is; the window of the stream is soon full.
    let held = client.request(request.body(r#"{"model":"m","prompt":"x"}"#.into()).unwrap()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), closed.recv()).await.expect("the worker was not let go");
    let live = front.cluster.worker("w").unwrap().live.clone();
    eventually("freed", || live.own.get().requests == 0).await;
    drop(held);
}
