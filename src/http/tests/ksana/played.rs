//! A proxied request recorded from the reference router, played again with the recorded nodes. Used by
//! the process tests too, so that it names nothing of this crate.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::nodes::{node, script};

/// What comes back, until the connection ends or `enough` does.
async fn ask(
    front: SocketAddr,
    request: &[u8],
    until: impl Fn(&[u8]) -> bool,
    gives_up: impl Future<Output = ()>,
) -> Vec<u8> {
    let mut stream = TcpStream::connect(front).await.expect("a connection");
    stream.write_all(request).await.expect("the request is sent");
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    let reading = async {
        while let Ok(count @ 1..) = stream.read(&mut chunk).await {
            all.extend_from_slice(&chunk[..count]);
            if until(&all) {
                break;
            }
        }
    };
    tokio::select! {
        () = reading => {}
        () = gives_up => {}
    }
    all
}

fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(is, _)| is.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

/// A body without the marks of its chunks.
fn dechunked(head: &str, body: &[u8]) -> Vec<u8> {
    if field(head, "transfer-encoding") != Some("chunked") {
        return body.to_vec();
    }
    let (mut out, mut rest) = (Vec::new(), body);
    while let Some(at) = rest.windows(2).position(|two| two == b"\r\n") {
        let size =
            std::str::from_utf8(&rest[..at]).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
        let end = (at + 2 + size.expect("a size")).min(rest.len());
        out.extend_from_slice(&rest[at + 2..end]);
        rest = &rest[(end + 2).min(rest.len())..];
    }
    out
}

/// Plays a vector: `front` is who is asked, once `pair` has had the two nodes form a pair and said its key.
pub(super) async fn play(
    vector: &Value,
    front: SocketAddr,
    pair: impl AsyncFnOnce(SocketAddr, SocketAddr) -> String,
) {
    let name = vector["scenario"].as_str().expect("a name");
    let script_of =
        |leg: &str| vector[leg].as_array().expect("requests").iter().map(script).collect::<Vec<_>>();
    let (mut prefill, prefill_seen) = node(script_of("prefill")).await;
    let (decode, decode_seen) = node(script_of("decode")).await;
    if name == "q01_prefill_refused" {
        // Nobody listens there any more.
        let gone = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        prefill = gone.local_addr().expect("an address");
    }
    let key = pair(prefill, decode).await;

    let client = &vector["client"];
    let body = client["body"].as_str().expect("a body");
    let lines = client["headers"].as_array().expect("headers").iter().filter_map(Value::as_str);
    let request = format!(
        "{} {} HTTP/1.1\r\nHost: router\r\n{}\r\nContent-Length: {}\r\n\r\n{body}",
        client["method"].as_str().expect("a method"),
        client["path"].as_str().expect("a path"),
        lines.collect::<Vec<_>>().join("\r\n"),
        body.len()
    );
    let expect = &vector["expect"];
    let expected = expect["body"].as_str().expect("a body").as_bytes();
    let ended = expect["ended"].as_str().expect("an end");
    let leaves_early = ended == "client_closed";
    let gives_up = async {
        if ended != "client_timeout" {
            return tokio::time::sleep(Duration::from_secs(15)).await;
        }
        let is_reached =
            || !prefill_seen.lock().requests.is_empty() && !decode_seen.lock().requests.is_empty();
        for _ in 0..5000 {
            if is_reached() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    let enough = |all: &[u8]| {
        let last = expected.rsplit(|byte| *byte == 0).nth(1).unwrap_or(b"\xff");
        leaves_early && all.windows(last.len().max(1)).any(|part| part == last)
    };
    let response = ask(front, request.as_bytes(), enough, gives_up).await;

    let at = response.windows(4).position(|four| four == b"\r\n\r\n");
    match (expect["status"].as_u64(), at) {
        (None, None) => assert!(response.is_empty(), "{name}"),
        (Some(code), Some(at)) => {
            let head = String::from_utf8_lossy(&response[..at]).into_owned();
            assert_eq!(head.get(9..12), Some(code.to_string().as_str()), "{name}: {head}");
            for (header, values) in expect["headers"].as_object().expect("headers") {
                // Two ways to say where the body ends are one too many: what reads both differently is
                // an attack.
                let contradicts = name == "p17_prefill_500_decode_stream"
                    && matches!(header.as_str(), "transfer-encoding" | "content-length");
                let values = values.as_array().expect("values").iter().filter_map(Value::as_str);
                let values: Vec<&str> = values.collect();
                let found: Vec<&str> = head
                    .lines()
                    .filter_map(|line| line.split_once(": "))
                    .filter(|(is, _)| is.eq_ignore_ascii_case(header))
                    .map(|(_, value)| value)
                    .collect();
                assert!(contradicts || found == values, "{name}: {header}: {values:?}\n{head}");
            }
            let body = dechunked(&head, &response[at + 4..]);
            assert_eq!(String::from_utf8_lossy(&body), String::from_utf8_lossy(expected), "{name}");
        }
        other => panic!("{name}: {other:?} {}", String::from_utf8_lossy(&response)),
    }

    for (leg, seen, address) in [("prefill", &prefill_seen, prefill), ("decode", &decode_seen, decode)] {
        let Some(recorded) = vector[leg].as_array().expect("requests").first() else { continue };
        let looks = recorded["script"].as_array().expect("steps").iter();
        let looks: Vec<bool> = looks.filter_map(|step| step["peer_closed"].as_bool()).collect();
        for _ in 0..3000 {
            if seen.lock().closed.len() >= looks.len() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let seen = seen.lock();
        assert_eq!(seen.closed, looks, "{name}: {leg}");
        let [(head, body)] = &seen.requests[..] else { panic!("{name}: {leg}: {:?}", seen.requests) };
        let recorded_body = recorded["request_body"].as_str().expect("a body");
        assert_eq!(String::from_utf8_lossy(body), recorded_body, "{name}: {leg}");
        let number = field(head, "kv-comm-request-id").unwrap_or_default();
        let lines = recorded["request_head_lines"].as_array().expect("lines").iter();
        let lines = lines.filter_map(Value::as_str).map(|line| match line.split_once(": ") {
            Some(("Host", _)) => format!("Host: {address}"),
            Some(("kv-comm-group-key", _)) => format!("kv-comm-group-key: {key}"),
            Some(("kv-comm-request-id", _)) => format!("kv-comm-request-id: {number}"),
            _ => line.to_owned(),
        });
        let lines: Vec<String> = lines.collect();
        assert_eq!(head.trim_end().split("\r\n").collect::<Vec<_>>(), lines, "{name}: {leg}");
        let number: u32 = number.parse().expect("a number");
        assert!((1..=i32::MAX as u32).contains(&number), "{name}");
    }
}
