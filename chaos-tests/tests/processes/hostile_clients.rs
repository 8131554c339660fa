//! Clients that send nonsense, too much, or nothing for too long: a clear 4xx or a closed
//! connection, and nobody else notices.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, MODEL};
use chaos_tests::raw::{Answer, exchange};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// No answer takes longer; slack for two busy cores included.
const LIMIT: Duration = Duration::from_secs(60);

fn nested(depth: usize) -> String {
    // The object around it is one level more.
    format!("{{\"model\":\"{MODEL}\",\"prompt\":{}{}}}", "[".repeat(depth - 1), "]".repeat(depth - 1))
}

/// Bodies and the `code` of the answer; `None` where the engine says what is wrong.
fn bodies() -> Vec<(&'static str, Vec<u8>, u16, Option<&'static str>)> {
    let mut all = Vec::new();
    let mut add = |name, body: &[u8], status, code| all.push((name, body.to_vec(), status, code));
    let named = |rest: &str| format!("{{\"model\":\"{MODEL}\",{rest}}}");
    for (name, body) in [
        ("empty", ""),
        ("blanks", " \r\n\t "),
        ("an open brace", "{"),
        ("a closed brace", "}"),
        ("a list", "[]"),
        ("text", "\"model\""),
        ("a number", "17"),
        ("null", "null"),
        ("a list of requests", "[{\"model\":\"m\"}]"),
        ("two documents", "{\"model\":\"m\"}{\"model\":\"m\"}"),
        ("a comma too many", "{\"model\":\"m\",}"),
        ("a comma too few", "{\"model\":\"m\" \"prompt\":\"x\"}"),
        ("single quotes", "{'model':'m'}"),
        ("no quotes", "{model:m}"),
        ("a comment", "{\"model\":\"m\"/* */}"),
        ("NaN", "{\"model\":NaN}"),
        ("a leading zero", "{\"model\":\"m\",\"max_tokens\":01}"),
        ("a raw line end in text", "{\"model\":\"m\n\"}"),
        ("an escape that is none", "{\"model\":\"\\x41\"}"),
        ("half a surrogate pair", "{\"model\":\"\\ud800\"}"),
        ("the model twice", "{\"model\":\"m\",\"model\":\"n\"}"),
        ("the model twice, once escaped", "{\"model\":\"m\",\"m\\u006fdel\":\"n\"}"),
        ("a form", "model=m&prompt=x"),
        ("xml", "<model>m</model>"),
    ] {
        add(name, body.as_bytes(), 400, Some("invalid_json"));
    }
    add("invalid UTF-8 in the model", b"{\"model\":\"\xff\xfe\"}", 400, Some("invalid_json"));
    add("invalid UTF-8 in a key", b"{\"\xc3\x28\":1,\"model\":\"m\"}", 400, Some("invalid_json"));
    add(
        "invalid UTF-8 in the prompt",
        b"{\"model\":\"m\",\"prompt\":\"\xed\xa0\x80\"}",
        400,
        Some("invalid_json"),
    );
    add("a byte order mark", b"\xef\xbb\xbf{\"model\":\"m\"}", 400, Some("invalid_json"));
    add("UTF-16", b"\xff\xfe{\0\"\0m\0\"\0:\x001\0}\0", 400, Some("invalid_json"));
    add("zeros", &[0; 1024], 400, Some("invalid_json"));
    add("65 levels", nested(65).as_bytes(), 400, Some("invalid_json"));
    add("200 levels", nested(200).as_bytes(), 400, Some("invalid_json"));
    add("a million levels", nested(1_000_000).as_bytes(), 400, Some("invalid_json"));
    add("a million levels, open", "[".repeat(1_000_000).as_bytes(), 400, Some("invalid_json"));
    add("a million objects, open", "{\"a\":".repeat(1_000_000).as_bytes(), 400, Some("invalid_json"));
    for (name, body) in [
        ("no model", "{}"),
        ("a null model", "{\"model\":null}"),
        ("a number for a model", "{\"model\":1}"),
        ("a list for a model", "{\"model\":[\"m\"]}"),
        ("an object for a model", "{\"model\":{\"m\":1}}"),
        ("an empty model", "{\"model\":\"\"}"),
    ] {
        add(name, body.as_bytes(), 400, Some("missing_model"));
    }
    for (name, model) in [
        ("another model", "nobody"),
        ("a model with line ends", "a\\r\\nX-Evil: b"),
        ("a model with dots", "../../etc/passwd"),
        ("a model of NULs", "\\u0000\\u0000"),
    ] {
        add(name, format!("{{\"model\":\"{model}\"}}").as_bytes(), 404, Some("model_not_found"));
    }
    let long = format!("{{\"model\":\"{}\"}}", "é".repeat(1 << 20));
    add("a model of 2 MiB", long.as_bytes(), 404, Some("model_not_found"));
    for (name, rest) in [
        ("no prompt", "\"max_tokens\":1".to_owned()),
        ("an object for a prompt", "\"prompt\":{}".to_owned()),
        ("text for a number", "\"prompt\":\"x\",\"max_tokens\":\"many\"".to_owned()),
        ("less than nothing", "\"prompt\":\"x\",\"max_tokens\":-1".to_owned()),
        ("a number beyond all", "\"prompt\":\"x\",\"temperature\":1e400".to_owned()),
        ("text for a flag", "\"prompt\":\"x\",\"stream\":\"yes\"".to_owned()),
        ("ids that are none", format!("\"prompt\":[{}1]", "4294967295,".repeat(10))),
    ] {
        add(name, named(&rest).as_bytes(), 400, None);
    }
    let huge = named(&format!("\"prompt\":\"{}\"", "x".repeat(33 << 20)));
    add("33 MiB", huge.as_bytes(), 413, Some("body_too_large"));
    all
}

/// Whether it is an OpenAI error object with all its members.
fn error_of(answer: &Answer) -> Option<Value> {
    let body: Value = serde_json::from_slice(&answer.body).ok()?;
    let error = body.get("error")?.clone();
    let whole = error["message"].is_string()
        && error["type"].is_string()
        && error.get("param").is_some()
        && error.get("code").is_some();
    whole.then_some(error)
}

fn request(line: &str, fields: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "{line} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{fields}content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_is_answered_with_an_openai_error() {
    let mut fleet = Fleet::of(1).engines(1).engine_arg("--instant").start().await;
    let http = fleet.replicas[0].http;
    let mut complaints = Vec::new();
    let mut expect = |what: String, got: Result<Vec<u8>, Vec<u8>>, status: u16, code: Option<&str>| {
        let Ok(got) = got else {
            complaints.push(format!("{what}: hangs"));
            return;
        };
        let answer = Answer::parse(&got);
        let error = error_of(&answer);
        let right_code = code.is_none_or(|code| error.as_ref().is_some_and(|error| error["code"] == code));
        if answer.status != status || error.is_none() || !right_code {
            complaints.push(format!("{what}: expected {status} {code:?}, got {answer:?}"));
        }
    };
    for path in ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"] {
        for (name, body, status, code) in bodies() {
            if code.is_none() && path != "/v1/completions" {
                continue;
            }
            let got = exchange(http, &request(&format!("POST {path}"), "", &body), LIMIT).await;
            expect(format!("{name} at {path}"), got, status, code);
        }
    }
    let good = json!({"model": MODEL, "prompt": "x"}).to_string();
    for (line, fields, status, code) in [
        ("POST /nothing", "", 404, "unknown_route"),
        ("GET /", "", 404, "unknown_route"),
        ("GET /v1/completions", "", 405, "method_not_allowed"),
        ("DELETE /v1/completions", "", 405, "method_not_allowed"),
        ("BREW /v1/completions", "", 405, "method_not_allowed"),
        ("POST /v1/models", "", 405, "method_not_allowed"),
        ("GET /v1/admin/status", "", 404, "unknown_route"),
        ("POST //v1/completions", "", 404, "unknown_route"),
        ("POST /v1/%63ompletions", "", 404, "unknown_route"),
        ("POST /V1/COMPLETIONS", "", 404, "unknown_route"),
        ("POST /v1/completions", "content-encoding: gzip\r\n", 415, "unsupported_encoding"),
        ("POST /v1/completions", "content-encoding: br, gzip\r\n", 415, "unsupported_encoding"),
    ] {
        let got = exchange(http, &request(line, fields, good.as_bytes()), LIMIT).await;
        expect(format!("{line} {fields}"), got, status, Some(code));
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    // 64 levels are few enough for us; that they are no prompt is the engine's to say.
    let got = exchange(http, &request("POST /v1/completions", "", nested(64).as_bytes()), LIMIT).await;
    let answer = Answer::parse(&got.expect("an end"));
    assert!(answer.head.contains("everline-worker: e1"), "{answer:?}");
    // And after all that a request is a request.
    let got = exchange(http, &request("POST /v1/completions", "", good.as_bytes()), LIMIT).await;
    assert_eq!(Answer::parse(&got.expect("an end")).status, 200);
    assert!(fleet.replicas[0].is_running());
    let log = String::from_utf8_lossy(&std::fs::read(fleet.replicas[0].log()).expect("a log")).into_owned();
    assert!(!log.contains("panicked"), "{log}");
}

/// How a slow client is slow.
#[derive(Clone, Copy, Debug)]
enum Slow {
    /// Says nothing.
    Silent,
    /// Stops in its head.
    HalfHead,
    /// Sends a byte of its head each 100 ms.
    DrippingHead,
    /// Stops between two requests.
    Idle,
    /// Says it speaks HTTP/2, and no more.
    SilentH2,
    /// Stops in the preface of HTTP/2.
    HalfPreface,
}

/// Is slow until the front has had enough; how long that took.
async fn be_slow(front: SocketAddr, slow: Slow) -> Result<Duration, String> {
    let failed = |e: std::io::Error| format!("{slow:?}: {e}");
    let mut stream = TcpStream::connect(front).await.map_err(failed)?;
    let begun = Instant::now();
    let first: &[u8] = match slow {
        Slow::Silent => b"",
        Slow::HalfHead | Slow::DrippingHead => b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nx: ",
        Slow::Idle => b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n",
        Slow::SilentH2 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        Slow::HalfPreface => b"PRI * HTTP/2.0\r\n",
    };
    stream.write_all(first).await.map_err(failed)?;
    let (mut read, mut write) = stream.split();
    let drip = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            if matches!(slow, Slow::DrippingHead) && write.write_all(b"a").await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let read_to_end = async { while let Ok(1..) = read.read(&mut [0; 1024]).await {} };
    let ended = tokio::time::timeout(LIMIT, async {
        tokio::select! { () = drip => {}, () = read_to_end => {} }
    });
    ended.await.map(|()| begun.elapsed()).map_err(|_| format!("{slow:?}: never closed"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_clients_are_let_go_and_others_are_served_meanwhile() {
    let mut builder = Fleet::of(1).engines(1).engine_arg("--instant");
    for key in ["header_timeout_ms", "first_byte_timeout_ms", "idle_timeout_ms"] {
        builder = builder.set(&format!("http.{key}=2000"));
    }
    let fleet = builder.start().await;
    let front = fleet.replicas[0].http;
    let mut slow = JoinSet::new();
    let kinds =
        [Slow::Silent, Slow::HalfHead, Slow::DrippingHead, Slow::Idle, Slow::SilentH2, Slow::HalfPreface];
    for n in 0..300 {
        slow.spawn(be_slow(front, kinds[n % kinds.len()]));
    }
    let (url, http) = (fleet.replicas[0].http_url("/v1/completions"), Http::fresh());
    let mut served = 0;
    let mut ends = Vec::new();
    while !slow.is_empty() {
        let reply = http.post(&url, &json!({"model": MODEL, "prompt": "x"}), LIMIT).await.expect("an answer");
        assert_eq!(reply.status, 200, "{}", reply.text());
        served += 1;
        while let Some(end) = slow.try_join_next() {
            ends.push(end.expect("a client does not panic").unwrap_or_else(|why| panic!("{why}")));
        }
    }
    println!(
        "{served} requests were served; 300 slow clients were let go after at most {:?}",
        ends.iter().max()
    );
    assert!(served > 20, "{served}");
    // None was cut before its time either.
    assert!(ends.iter().all(|end| *end >= Duration::from_millis(1900)), "{:?}", ends.iter().min());
}
