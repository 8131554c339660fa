//! Nodes that play a script against whoever sends them a request, as the recording's did. Used by the
//! process tests too, so that it names nothing of this crate.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

/// What a node has seen.
#[derive(Default)]
pub(super) struct Seen {
    /// Heads and bodies of its requests.
    pub(super) requests: Vec<(String, Vec<u8>)>,
    /// Whether the other side had closed, each time that the script asked.
    pub(super) closed: Vec<bool>,
}

/// A step of a script.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Send(Vec<u8>),
    Close,
    Abort,
    /// Looks whether the other side has closed, waiting for that for so long.
    Look(Duration),
}

/// Steps, each with the time since the request when it is due.
pub(super) type Script = Vec<(Duration, Step)>;

/// The bytes of a recorded text, in which those that are no UTF-8 stand as `\xNN`.
fn bytes_of(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("\\x") {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        bytes.push(u8::from_str_radix(&rest[at + 2..at + 4], 16).expect("two digits"));
        rest = &rest[at + 4..];
    }
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

/// A recorded script.
pub(super) fn script(recorded: &Value) -> Script {
    let steps = recorded["script"].as_array().expect("steps").iter();
    steps
        .map(|step| {
            // What takes seconds there need not take seconds here.
            let at = Duration::from_secs_f64(step["t_ms"].as_f64().expect("a time").min(900.0) / 1000.0);
            let step = match step {
                step if step["send"].is_string() => {
                    Step::Send(bytes_of(step["send"].as_str().expect("text")))
                }
                step if step["abort"] == true => Step::Abort,
                step if step["close"] == true => Step::Close,
                step if step["peer_closed"] == true => Step::Look(Duration::from_secs(5)),
                step if step["peer_closed"] == false => Step::Look(Duration::ZERO),
                // The other side was gone.
                step if step.get("error").is_some() => Step::Close,
                other => panic!("{other}"),
            };
            (at, step)
        })
        .collect()
}

/// A node that plays the next of its scripts for each request, the last one for ever.
pub(super) async fn node(scripts: Vec<Script>) -> (SocketAddr, Arc<Mutex<Seen>>) {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let kept = Arc::clone(&seen);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(play(stream, scripts.clone(), Arc::clone(&kept)));
        }
    });
    (address, seen)
}

/// Reads one request whose length is said; `None` at the end of the connection.
async fn read_request(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).expect("text");
    let lines = head.lines().filter_map(|line| line.split_once(':'));
    let mut lengths = lines.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length = lengths.next().map_or(0, |(_, value)| value.trim().parse().expect("a number"));
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((head, body))
}

/// A node that answers every request with these bytes and closes.
pub(super) async fn saying(bytes: impl Into<Vec<u8>>) -> (SocketAddr, Arc<Mutex<Seen>>) {
    node(vec![vec![(Duration::ZERO, Step::Send(bytes.into())), (Duration::ZERO, Step::Close)]]).await
}

async fn play(mut stream: TcpStream, scripts: Vec<Script>, seen: Arc<Mutex<Seen>>) {
    let Some(request) = read_request(&mut stream).await else { return };
    let began = Instant::now();
    let number = {
        let mut seen = seen.lock();
        seen.requests.push(request);
        seen.requests.len() - 1
    };
    let Some(script) = scripts.get(number.min(scripts.len().saturating_sub(1))) else { return };
    for (at, step) in script.clone() {
        tokio::time::sleep_until(began + at).await;
        match step {
            Step::Send(bytes) => {
                if stream.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            Step::Close => return,
            Step::Abort => {
                let _ = stream.set_zero_linger();
                return;
            }
            Step::Look(limit) => {
                let end = tokio::time::timeout(limit.max(Duration::from_millis(1)), stream.read_u8()).await;
                seen.lock().closed.push(end.is_ok_and(|read| read.is_err()));
            }
        }
    }
}
