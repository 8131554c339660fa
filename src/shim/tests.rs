//! A shim between a client made of a socket and replicas that break.

mod fake;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use self::fake::{Fake, Fault, How, STREAM};
use super::*;

const CHAT: &str = "/v1/chat/completions";
const ASK: &str = r#"{"model":"m","stream":true}"#;
const LIMIT: Duration = Duration::from_secs(20);

/// The events of most tests: text in several scripts, and the one that closes.
const DATA: [&str; 6] = [
    r#"data: {"a":"once"}"#,
    r#"data: {"a":"über"}"#,
    r#"data: {"a":"日本"}"#,
    "data: 🦀",
    "data: x",
    "data: [DONE]",
];

async fn fake(faults: &[Fault]) -> Fake {
    Fake::start(&DATA, Duration::ZERO, 7, faults).await
}

/// A running shim.
struct Running {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

fn settings(upstreams: &[SocketAddr]) -> Settings {
    let addresses = upstreams.iter().map(|address| address.to_string().parse().unwrap()).collect();
    Settings {
        retry_budget: Duration::from_secs(2),
        connect_budget: Duration::from_millis(300),
        stall_timeout: Duration::from_millis(300),
        ..Settings::new(addresses, crate::tls::client_config(None).unwrap())
    }
}

async fn shim(settings: Settings) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(run(settings, listener, async {
        let _ = stopped.await;
    }));
    Running { address, stop: Some(stop), task }
}

fn request(path: &str, more: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: shim\r\n{more}content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// Head and decoded body of the answer to a request; the body must be whole.
async fn ask(address: SocketAddr, request: &str) -> (String, String) {
    let exchange = async {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), if head.contains("chunked") { dechunked(body) } else { body.to_owned() })
    };
    timeout(LIMIT, exchange).await.unwrap()
}

fn dechunked(mut body: &str) -> String {
    let mut out = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").expect("the body is whole");
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return out;
        }
        out.push_str(&rest[..size]);
        body = rest[size..].strip_prefix("\r\n").unwrap();
    }
}

/// Asks for the stream through a shim of its own.
async fn streamed(fake: &Fake) -> (String, String) {
    let shim = shim(settings(&[fake.address])).await;
    ask(shim.address, &request(CHAT, "authorization: Bearer k\r\n", ASK)).await
}

fn resumptions(fake: &Fake) -> usize {
    fake.whats().iter().filter(|what| **what == format!("GET /v1/streams/{STREAM}")).count()
}

#[tokio::test]
async fn cut_anywhere_in_any_way_the_body_is_the_same() {
    for how in [How::Fin, How::Rst, How::End] {
        for at in (0..330).step_by(13) {
            let fake = fake(&[Fault::Cut(at, how)]).await;
            let (head, body) = streamed(&fake).await;
            assert!(head.starts_with("HTTP/1.1 200"), "{head}");
            assert_eq!(body, fake.whole(), "{how:?} {at}");
            let asked = fake.asked();
            // Once the last event is there, nothing more is asked for; a reset may take it away again.
            let is_whole = at >= fake.whole().len();
            if !(is_whole && how == How::Rst) {
                let expected = if is_whole { (1, 0) } else { (2, 1) };
                assert_eq!((asked.len(), resumptions(&fake)), expected, "{how:?} {at}");
            }
            assert!(asked.iter().all(|one| one.header("authorization") == Some("Bearer k")));
            assert!(asked.iter().all(|one| one.header("everline-resume") == Some("1")));
        }
    }
}

#[tokio::test]
async fn many_cuts_are_as_good_as_one_and_each_connection_is_new() {
    let cuts = [80, 1, 0, 130, 60, 75];
    let faults: Vec<Fault> =
        cuts.iter().flat_map(|&at| [How::Rst, How::End, How::Fin].map(|how| Fault::Cut(at, how))).collect();
    let fake = fake(&faults).await;
    let (_, body) = streamed(&fake).await;
    assert_eq!(body, fake.whole());
    let asked = fake.asked();
    assert!(asked.len() > 4, "{}", asked.len());
    let connections: std::collections::BTreeSet<_> = asked.iter().map(|one| one.from).collect();
    assert_eq!(connections.len(), asked.len());
}

#[tokio::test]
async fn a_silent_connection_is_given_up() {
    let fake = fake(&[Fault::Cut(100, How::Stall)]).await;
    let begun = Instant::now();
    let (_, body) = streamed(&fake).await;
    assert_eq!(body, fake.whole());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_request_that_died_before_its_head_is_sent_again_with_the_same_key() {
    let fake = fake(&[Fault::Dead, Fault::Refused(503, "x"), Fault::Dead]).await;
    let (_, body) = streamed(&fake).await;
    assert_eq!(body, fake.whole());
    let asked = fake.asked();
    assert_eq!(asked.len(), 4);
    let key = asked[0].header("idempotency-key").unwrap();
    assert!(asked.iter().all(|one| one.header("idempotency-key") == Some(key) && one.body == ASK));
}

#[tokio::test]
async fn answers_that_may_pass_are_waited_out() {
    let faults = [Fault::Cut(90, How::Rst), Fault::Refused(503, "x"), Fault::Refused(429, "x"), Fault::Dead];
    let fake = fake(&faults).await;
    let (_, body) = streamed(&fake).await;
    assert_eq!(body, fake.whole());
    assert_eq!(resumptions(&fake), 4);
}

#[tokio::test]
async fn a_first_answer_is_the_clients_whatever_it_is() {
    for status in [401, 429, 503] {
        let fake = fake(&[Fault::Refused(status, "some_code")]).await;
        let (head, body) = streamed(&fake).await;
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
        assert!(body.contains("some_code"));
        assert_eq!(fake.asked().len(), 1);
    }
}

#[tokio::test]
async fn what_is_lost_is_told_in_the_dialect_of_the_route() {
    for status in [204, 400, 403, 404, 410, 412] {
        for (path, mark) in [
            (CHAT, r#"data: {"error":{"#),
            ("/v1/responses", "event: error\ndata: {\"code\":"),
            ("/v1/messages", "event: error\ndata: {\"error\":"),
        ] {
            let fake = fake(&[Fault::Cut(90, How::Fin), Fault::Refused(status, "stream_expired")]).await;
            let shim = shim(settings(&[fake.address])).await;
            let (_, body) = ask(shim.address, &request(path, "", ASK)).await;
            let (events, end) = body.split_once(mark).unwrap_or_else(|| panic!("{path} {status}: {body}"));
            assert!(fake.whole().starts_with(events) && events.ends_with("\n\n"), "{events}");
            assert!(end.contains(if status == 204 { "stream_lost" } else { "stream_expired" }), "{end}");
            assert!(end.ends_with("\n\ndata: [DONE]\n\n"));
            assert_eq!(fake.asked().len(), 2, "asked once, and not cancelled");
        }
    }
}

#[tokio::test]
async fn no_progress_within_the_budget_is_an_error() {
    let mut faults = vec![Fault::Cut(90, How::Rst)];
    faults.extend(std::iter::repeat_n([Fault::Cut(0, How::End), Fault::Dead], 500).flatten());
    let fake = fake(&faults).await;
    let begun = Instant::now();
    let budget = Settings { retry_budget: Duration::from_millis(400), ..settings(&[fake.address]) };
    let shim = shim(budget).await;
    let (_, body) = ask(shim.address, &request(CHAT, "", ASK)).await;
    assert!(body.contains(r#""code":"stream_lost""#) && body.contains("no progress within 400ms"), "{body}");
    assert!(begun.elapsed() >= Duration::from_millis(400) && begun.elapsed() < Duration::from_secs(5));
    assert!(resumptions(&fake) > 4);
}

#[tokio::test]
async fn a_stream_without_a_name_that_breaks_is_an_error_and_not_an_end() {
    let fake = fake(&[Fault::Unnamed(90)]).await;
    let (_, body) = streamed(&fake).await;
    assert!(body.contains("cannot be resumed") && body.ends_with("data: [DONE]\n\n"), "{body}");
}

/// A stream that goes on for long, and a client that has read its beginning.
async fn leaving(drain: Duration) -> (Fake, Running, TcpStream) {
    let data: Vec<&str> = std::iter::repeat_n("data: x", 2000).collect();
    let fake = Fake::start(&data, Duration::from_millis(10), 100, &[]).await;
    let shim = shim(Settings { drain_timeout: drain, ..settings(&[fake.address]) }).await;
    let mut socket = TcpStream::connect(shim.address).await.unwrap();
    socket.write_all(request(CHAT, "authorization: Bearer k\r\n", ASK).as_bytes()).await.unwrap();
    let mut read = vec![0; 512];
    timeout(LIMIT, socket.read_exact(&mut read)).await.unwrap().unwrap();
    (fake, shim, socket)
}

async fn is_cancelled(fake: &Fake) {
    let told = async {
        loop {
            let asked = fake.asked();
            if let Some(cancel) = asked.iter().find(|one| one.what().ends_with("/cancel")) {
                assert_eq!(cancel.what(), format!("POST /v1/streams/{STREAM}/cancel"));
                assert_eq!(cancel.header("authorization"), Some("Bearer k"));
                return;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LIMIT, told).await.unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_stream() {
    let (fake, _shim, socket) = leaving(Duration::ZERO).await;
    drop(socket);
    is_cancelled(&fake).await;
}

#[tokio::test]
async fn stopping_lets_what_is_in_flight_end_and_takes_nothing_new() {
    let fake = Fake::start(&DATA, Duration::from_millis(60), 100, &[Fault::Cut(150, How::Rst)]).await;
    let mut shim = shim(settings(&[fake.address])).await;
    let asking = tokio::spawn({
        let address = shim.address;
        async move { ask(address, &request(CHAT, "", ASK)).await }
    });
    while fake.asked().is_empty() {
        sleep(Duration::from_millis(2)).await;
    }
    shim.stop.take().unwrap().send(()).unwrap();
    let (_, body) = asking.await.unwrap();
    assert_eq!(body, fake.whole());
    timeout(LIMIT, shim.task).await.unwrap().unwrap();
    assert!(TcpStream::connect(shim.address).await.is_err());
}

#[tokio::test]
async fn what_does_not_end_in_time_is_told_so_and_cancelled() {
    let (fake, mut shim, mut socket) = leaving(Duration::from_millis(100)).await;
    shim.stop.take().unwrap().send(()).unwrap();
    let mut rest = Vec::new();
    timeout(LIMIT, socket.read_to_end(&mut rest)).await.unwrap().unwrap();
    let rest = String::from_utf8_lossy(&rest);
    assert!(rest.contains("shim_stopped") && rest.contains("data: [DONE]"), "{rest}");
    is_cancelled(&fake).await;
    timeout(LIMIT, shim.task).await.unwrap().unwrap();
}

/// An address at which nobody listens.
async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn upstreams_are_tried_in_turn_for_first_requests_and_for_resumptions() {
    let fake = fake(&[Fault::Cut(90, How::Rst), Fault::Cut(90, How::Fin)]).await;
    let shim = shim(settings(&[nobody().await, fake.address, nobody().await])).await;
    let (_, body) = ask(shim.address, &request(CHAT, "", ASK)).await;
    assert_eq!(body, fake.whole());
    assert_eq!(fake.asked().len(), 3);
    let (head, _) =
        ask(shim.address, "GET /v1/models HTTP/1.1\r\nhost: shim\r\nconnection: close\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
}

#[tokio::test]
async fn with_nobody_there_the_answer_says_so_in_the_dialect_of_the_route() {
    let shim = shim(settings(&[nobody().await])).await;
    for (request, mark) in [
        (request(CHAT, "", ASK), r#"{"error":{"code":"upstream_connect_failed""#),
        (request("/v1/messages", "", "{}"), r#""type":"error""#),
        (request("/v1/embeddings", "", "{}"), r#"{"error":{"code":"upstream_connect_failed""#),
    ] {
        let (head, body) = ask(shim.address, &request).await;
        assert!(head.starts_with("HTTP/1.1 502"), "{head}");
        assert!(body.contains(mark) && body.contains("connection refused"), "{body}");
    }
}

#[tokio::test]
async fn everything_else_passes_as_it_is() {
    let fake = fake(&[]).await;
    let shim = shim(settings(&[fake.address])).await;
    let get = "GET /v1/models HTTP/1.1\r\nhost: shim\r\nx-a: 1\r\ncookie: c\r\nconnection: close, x-b\r\nx-b: 2\r\n\r\n";
    let (head, body) = ask(shim.address, get).await;
    assert!(head.contains("x-fake: 1") && body == "{}", "{head} {body}");
    let asked = fake.asked().remove(0);
    assert_eq!(
        (asked.header("x-a"), asked.header("cookie"), asked.header("x-b")),
        (Some("1"), Some("c"), None)
    );
    assert_eq!(asked.header("host"), Some(fake.address.to_string().as_str()));
    assert_eq!(asked.header("everline-resume"), None);

    // No stream was asked for, and a client that resumes by itself.
    ask(shim.address, &request(CHAT, "", r#"{"model":"m"}"#)).await;
    assert_eq!(fake.asked()[1].header("idempotency-key"), None);
    let (_, rest) = ask(shim.address, &request(CHAT, &format!("last-event-id: {STREAM}.3\r\n"), ASK)).await;
    let first = rest.split("\n\n").next().unwrap_or_default();
    assert!(fake.whole().ends_with(&rest) && first.ends_with(&format!("\nid: {STREAM}.4")), "{rest}");
    assert_eq!(fake.asked()[2].header("everline-resume"), None);
}

#[tokio::test]
async fn bodies_pass_while_they_come_in_both_directions() {
    let fake = fake(&[]).await;
    let shim = shim(settings(&[fake.address])).await;
    let mut socket = TcpStream::connect(shim.address).await.unwrap();
    let head = "POST /echo HTTP/1.1\r\nhost: shim\r\ncontent-length: 10\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut seen = String::new();
    for piece in ["hello", "world"] {
        socket.write_all(piece.as_bytes()).await.unwrap();
        // The first half is back before the second is sent.
        while !seen.contains(piece) {
            let mut read = [0; 512];
            let count = timeout(LIMIT, socket.read(&mut read)).await.unwrap().unwrap();
            assert!(count > 0, "{seen}");
            seen.push_str(std::str::from_utf8(&read[..count]).unwrap());
        }
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_to_keep_is_refused_with_the_remedy() {
    let fake = fake(&[]).await;
    let shim = shim(Settings { max_body: 100, ..settings(&[fake.address]) }).await;
    let (head, body) = ask(shim.address, &request(CHAT, "", &"x".repeat(101))).await;
    assert!(head.starts_with("HTTP/1.1 413") && body.contains("--max-body-mib"), "{head} {body}");
    assert!(fake.asked().is_empty());
}

#[tokio::test]
async fn a_client_that_takes_nothing_holds_the_cluster_back() {
    let large = format!("data: {}", "x".repeat(64 << 10));
    let data: Vec<&str> = std::iter::repeat_n(large.as_str(), 1000).collect();
    let fake = Fake::start(&data, Duration::ZERO, 64 << 10, &[]).await;
    let shim =
        shim(Settings { idle_timeout: Duration::from_millis(1500), ..settings(&[fake.address]) }).await;
    let mut socket = TcpStream::connect(shim.address).await.unwrap();
    socket.write_all(request(CHAT, "authorization: Bearer k\r\n", ASK).as_bytes()).await.unwrap();
    // It is given up in the end, which also shows that it was waited for.
    is_cancelled(&fake).await;
    assert!(fake.written() < fake.whole().len() / 2, "{} of {}", fake.written(), fake.whole().len());
}

#[test]
fn addresses_are_what_can_be_connected_to() {
    for (text, shown) in [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("https://r1.internal/", "https://r1.internal"),
        ("localhost:8080", "http://localhost:8080"),
        ("[::1]:8080", "http://[::1]:8080"),
    ] {
        assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
    }
    for bad in ["", "http://", "ftp://x", "http://x/v1", "http://x?y", "http://u:p@x", "/v1"] {
        let error = bad.parse::<Address>().unwrap_err().to_string();
        assert!(error.contains("write it like"), "{bad}: {error}");
    }
}
