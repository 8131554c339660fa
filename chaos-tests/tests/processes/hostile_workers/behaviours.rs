//! What hostile workers do, and what may come of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use chaos_tests::raw::Then;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What a worker does after it has read a request, in order.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Writes this; `{type}` is the content type that goes with the request.
    Send(Vec<u8>),
    /// Waits so many milliseconds.
    Pause(u64),
    /// Writes this again and again until the other end has had enough.
    Flood(Vec<u8>),
    /// Writes this again and again with a pause of 50 ms.
    Trickle(Vec<u8>),
    /// Waits until the other end leaves.
    Hang,
}

/// What a client gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// An error of ours.
    Error(u16, &'static str),
    /// The worker's answer, whole.
    Passed(u16),
    /// An answer that visibly breaks off.
    Broken,
    /// An event stream whose last event is an error, and then `[DONE]`.
    Ended,
}
use Outcome::{Broken, Ended, Error, Passed};

pub(super) const GARBAGE: Outcome = Error(502, "upstream_failed");
const LATE: Outcome = Error(504, "upstream_timeout");

pub(super) struct Behaviour {
    pub(super) name: &'static str,
    pub(super) steps: Vec<Step>,
    pub(super) then: Then,
    /// Any of these without a stream.
    pub(super) plain: &'static [Outcome],
    /// Any of these with one.
    pub(super) stream: &'static [Outcome],
}

fn send(text: impl AsRef<[u8]>) -> Step {
    Step::Send(text.as_ref().to_vec())
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\ncontent-type: {type}\r\ntransfer-encoding: chunked\r\n\r\n";
const EVENT: &str = "data: {\"choices\":[]}\n\n";

fn chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

pub(super) fn behaviours() -> Vec<Behaviour> {
    let mut all = Vec::new();
    let mut row = |name, steps: Vec<Step>, then, plain, stream| {
        all.push(Behaviour { name, steps, then, plain, stream });
    };
    let begun = format!("{CHUNKED}{}", chunk(EVENT));
    let head = |extra: &str| format!("HTTP/1.1 200 OK\r\ncontent-type: {{type}}\r\n{extra}\r\n");
    let whole = |extra: &str| format!("{}{{}}", head(&format!("content-length: 2\r\n{extra}")));
    // No answer.
    row("hangs", vec![Step::Hang], Then::Close, &[LATE], &[LATE]);
    row("closes", vec![], Then::Close, &[GARBAGE], &[GARBAGE]);
    row("resets", vec![], Then::Reset, &[GARBAGE], &[GARBAGE]);
    row("half a status line", vec![send("HTTP/1.1 2")], Then::Close, &[GARBAGE], &[GARBAGE]);
    row("half a head", vec![send("HTTP/1.1 200 OK\r\nx: ")], Then::Close, &[GARBAGE], &[GARBAGE]);
    row(
        "half a head, then nothing",
        vec![send("HTTP/1.1 200 OK\r\nx: "), Step::Hang],
        Then::Close,
        &[LATE],
        &[LATE],
    );
    row(
        "a trickling head",
        vec![send("HTTP/1.1 200 OK\r\nx: "), Step::Trickle(b"a".into())],
        Then::Close,
        &[LATE],
        &[LATE],
    );
    // No HTTP.
    for (name, bytes) in [
        ("garbage", b"\x00\xff\xfegarbage\r\n\r\n".as_slice()),
        ("tls", b"\x15\x03\x01\x00\x02\x02\x28\r\n\r\n"),
        ("http/2", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64\x00\x04\x00\x10\x00\x00"),
        ("a request", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("http/9.9", b"HTTP/9.9 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("status 99", b"HTTP/1.1 99 Low\r\ncontent-length: 0\r\n\r\n"),
        ("status 2x0", b"HTTP/1.1 2x0 OK\r\ncontent-length: 0\r\n\r\n"),
        ("length that is none", b"HTTP/1.1 200 OK\r\ncontent-length: abc\r\n\r\nabc"),
        ("negative length", b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"),
        ("length with a plus", b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\n{}"),
        ("length beyond 64 bits", b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n"),
        ("two lengths", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 4\r\n\r\n{}{}"),
        ("a list of lengths", b"HTTP/1.1 200 OK\r\ncontent-length: 2, 4\r\n\r\n{}{}"),
        ("NUL in a header", b"HTTP/1.1 200 OK\r\nx: a\0b\r\ncontent-length: 0\r\n\r\n"),
        ("bare CR in a header", b"HTTP/1.1 200 OK\r\nx: a\rset-cookie: b\r\ncontent-length: 0\r\n\r\n"),
        ("space in a header name", b"HTTP/1.1 200 OK\r\nx y: a\r\ncontent-length: 0\r\n\r\n"),
        ("a header without a colon", b"HTTP/1.1 200 OK\r\nnonsense\r\ncontent-length: 0\r\n\r\n"),
        ("a folded header", b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\ncontent-length: 0\r\n\r\n"),
        (
            "an upgrade nobody asked for",
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nhello",
        ),
    ] {
        row(name, vec![Step::Send(bytes.into())], Then::Close, &[GARBAGE], &[GARBAGE]);
    }
    // Too much head.
    let long = |byte: &str| Step::Flood(byte.repeat(64 << 10).into_bytes());
    row(
        "a header without end",
        vec![send("HTTP/1.1 200 OK\r\nx: "), long("a")],
        Then::Close,
        &[GARBAGE],
        &[GARBAGE],
    );
    row(
        "headers without end",
        vec![send("HTTP/1.1 200 OK\r\n"), long("x: a\r\n")],
        Then::Close,
        &[GARBAGE],
        &[GARBAGE],
    );
    row(
        "a status line without end",
        vec![send("HTTP/1.1 200 "), long("a")],
        Then::Close,
        &[GARBAGE],
        &[GARBAGE],
    );
    row("200 headers", vec![send(whole(&"x: a\r\n".repeat(200)))], Then::Close, &[GARBAGE], &[GARBAGE]);
    let informed = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n".repeat(3);
    row("three early hints", vec![send(informed), send(whole(""))], Then::Close, &[Passed(200)], &[Ended]);
    row(
        "100s without end",
        vec![long("HTTP/1.1 100 Continue\r\n\r\n")],
        Then::Close,
        &[LATE, GARBAGE],
        &[LATE, GARBAGE],
    );
    row(
        "slow 100s without end",
        vec![Step::Trickle(b"HTTP/1.1 100 Continue\r\n\r\n".into())],
        Then::Close,
        &[LATE, GARBAGE],
        &[LATE, GARBAGE],
    );
    // Answers that are answers.
    row("a slow head", vec![Step::Pause(300), send(whole(""))], Then::KeepAlive, &[Passed(200)], &[Ended]);
    row(
        "500",
        vec![send("HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\nno")],
        Then::KeepAlive,
        &[Passed(500)],
        &[Passed(500)],
    );
    row(
        "500 until close",
        vec![send("HTTP/1.1 500 Oops\r\n\r\nno")],
        Then::Close,
        &[Passed(500)],
        &[Passed(500)],
    );
    row(
        "429",
        vec![send("HTTP/1.1 429 Slow\r\ncontent-length: 2\r\n\r\nno")],
        Then::KeepAlive,
        &[Passed(429)],
        &[Passed(429)],
    );
    row(
        "status 999",
        vec![send("HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n")],
        Then::Close,
        &[Passed(999), GARBAGE],
        &[Passed(999), GARBAGE],
    );
    row(
        "no reason",
        vec![send("HTTP/1.1 200\r\ncontent-length: 2\r\n\r\n{}")],
        Then::KeepAlive,
        &[Passed(200)],
        &[Passed(200)],
    );
    row(
        "http/1.0 until close",
        vec![send("HTTP/1.0 200 OK\r\n\r\n{}")],
        Then::Close,
        &[Passed(200)],
        &[Passed(200)],
    );
    row(
        "http/1.0 with a length",
        vec![send("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n{}")],
        Then::Close,
        &[Passed(200)],
        &[Passed(200)],
    );
    row("until close", vec![send("HTTP/1.1 200 OK\r\n\r\n{}")], Then::Close, &[Passed(200)], &[Passed(200)]);
    row(
        "204 with a body",
        vec![send("HTTP/1.1 204 Nothing\r\ncontent-length: 2\r\n\r\n{}")],
        Then::KeepAlive,
        &[Passed(204)],
        &[Passed(204)],
    );
    row(
        "304 with a body",
        vec![send("HTTP/1.1 304 Same\r\ncontent-length: 2\r\n\r\n{}")],
        Then::KeepAlive,
        &[Passed(304)],
        &[Passed(304)],
    );
    let both = "transfer-encoding: chunked\r\ncontent-length: 2\r\n";
    row(
        "both lengths",
        vec![send(head(both)), send("5\r\n{   }\r\n0\r\n\r\n")],
        Then::Close,
        &[Passed(200), GARBAGE],
        &[Ended, GARBAGE],
    );
    row(
        "a coding nobody asked for",
        vec![send(head("transfer-encoding: gzip\r\n")), send("xx")],
        Then::Close,
        &[GARBAGE, Passed(200)],
        &[GARBAGE, Ended],
    );
    // Answers that break off.
    let short = head("content-length: 100\r\n");
    row(
        "closes in its body",
        vec![send(&short), send(EVENT), Step::Pause(50)],
        Then::Close,
        &[Broken],
        &[Ended],
    );
    row(
        "resets in its body",
        vec![send(&short), send(EVENT), Step::Pause(50)],
        Then::Reset,
        &[Broken],
        &[Ended],
    );
    row("closes after its head", vec![send(&short), Step::Pause(50)], Then::Close, &[Broken], &[Ended]);
    row("closes between chunks", vec![send(&begun), Step::Pause(50)], Then::Close, &[Broken], &[Ended]);
    row(
        "closes in a chunk",
        vec![send(&begun), send("ff\r\ndata: {"), Step::Pause(50)],
        Then::Close,
        &[Broken],
        &[Ended],
    );
    row("falls silent", vec![send(&begun), Step::Hang], Then::Close, &[Broken], &[Ended]);
    row(
        "trickles for ever",
        vec![send(head("content-length: 1000000\r\n")), Step::Trickle(b" ".into())],
        Then::Close,
        &[Broken],
        &[Ended],
    );
    row(
        "trickles chunks for ever",
        vec![send(CHUNKED), Step::Trickle(b"1\r\n \r\n".into())],
        Then::Close,
        &[Broken],
        &[Ended],
    );
    row("no [DONE]", vec![send(&begun), send("0\r\n\r\n")], Then::KeepAlive, &[Passed(200)], &[Ended]);
    row(
        "events that are no text",
        vec![send(format!("{CHUNKED}4\r\n")), send(b"\xff\xfe\x00\x01\r\n0\r\n\r\n")],
        Then::Close,
        &[Passed(200)],
        &[Ended],
    );
    // Chunks that are none.
    for (name, bytes) in [
        ("a chunk size that is none", "zz\r\nab\r\n"),
        ("a negative chunk size", "-2\r\nab\r\n"),
        ("a chunk size beyond 64 bits", "fffffffffffffffff\r\nab\r\n"),
        ("a chunk longer than its size", "2\r\nabcd\r\n0\r\n\r\n"),
        ("no chunk size", "\r\nab\r\n"),
        ("a huge chunk, hardly begun", "7fffffffffffffff\r\nab"),
    ] {
        row(
            name,
            vec![send(&begun), Step::Pause(20), send(bytes), Step::Pause(20)],
            Then::Close,
            &[Broken],
            &[Ended],
        );
    }
    row(
        "a chunk extension without end",
        vec![send(&begun), send("2;a="), long("x")],
        Then::Close,
        &[Broken],
        &[Ended],
    );
    row(
        "trailers without end",
        vec![send(&begun), send("0\r\n"), long("x: a\r\n")],
        Then::Close,
        &[Broken],
        &[Ended],
    );
    row("a chunk size without end", vec![send(&begun), long("0")], Then::Close, &[Broken], &[Ended]);
    all
}

/// Does the steps; the bytes that a flood got rid of go to `flooded`.
pub(super) async fn act(stream: &mut TcpStream, steps: &[Step], is_stream: bool, flooded: &AtomicU64) {
    let kind = if is_stream { "text/event-stream" } else { "application/json" };
    for step in steps {
        let gone = match step {
            Step::Send(bytes) => {
                let bytes = match std::str::from_utf8(bytes) {
                    Ok(text) => text.replace("{type}", kind).into_bytes(),
                    Err(_) => bytes.clone(),
                };
                stream.write_all(&bytes).await.is_err()
            }
            Step::Pause(ms) => {
                tokio::time::sleep(Duration::from_millis(*ms)).await;
                false
            }
            Step::Flood(bytes) => {
                while stream.write_all(bytes).await.is_ok() {
                    flooded.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                }
                true
            }
            Step::Trickle(bytes) => {
                while stream.write_all(bytes).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                true
            }
            Step::Hang => {
                let _ = stream.read(&mut [0; 1]).await;
                true
            }
        };
        if gone {
            return;
        }
    }
}
