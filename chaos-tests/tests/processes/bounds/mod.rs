//! Who wants too much of streams: a million guessed ids, ten thousand who only listen, clients that
//! never read. None of them finds anything, grows a replica's memory past its bounds, or slows down
//! anybody else.

mod guesses;
mod listeners;
mod slow;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chaos_tests::binary::run_ok;
use chaos_tests::client::Http;
use chaos_tests::endpoint::{Endpoint, LIMIT, engine_worker};
use chaos_tests::fleet::Fleet;
use chaos_tests::h2;
use chaos_tests::raw::{RawWorker, Seen, Then, header};
use chaos_tests::replica::Replica;
use chaos_tests::streams::{Manner, Question, Said, read, read_as};
use chaos_tests::wait::{check, until};
use everline::admin_types::ModelEntry;
use everline::ids::StreamId;
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Longest that anything takes that has an end.
pub const LONG: Duration = Duration::from_secs(120);

pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

pub fn memory(fleet: &Fleet) -> Vec<u64> {
    fleet.replicas.iter().map(Replica::memory_kib).collect()
}

/// Readers who go on asking the same until they are told to stop, and compare what they get.
pub struct Honest {
    stop: watch::Sender<bool>,
    readers: JoinSet<(u32, Duration)>,
}

impl Honest {
    /// So many of them at `base`, with a key where one is wanted. Each of their streams takes some
    /// seconds.
    pub async fn begin(base: &str, key: Option<&str>, readers: usize) -> Self {
        let stop = watch::Sender::new(false);
        let mut set = JoinSet::new();
        for at in 0..readers {
            let (base, key, stopped) = (base.to_owned(), key.map(str::to_owned), stop.subscribe());
            set.spawn(async move {
                let question = Question::mixed(at, 40, None);
                let ask = async || {
                    let heard = match &key {
                        Some(key) => read_as(key, &base, &question, Manner::Get).await,
                        None => read(&base, &question, Manner::Get).await,
                    };
                    heard.unwrap_or_else(|broken| panic!("an honest stream broke: {broken:?}"))
                };
                let (mut read, mut stall, mut first) = (0, Duration::ZERO, None::<Said>);
                while !*stopped.borrow() {
                    let heard = ask().await;
                    let same = first.get_or_insert_with(|| heard.said.clone());
                    assert_eq!(same.choices, heard.said.choices, "an honest stream says something else");
                    read += 1;
                    stall = stall.max(heard.stall).max(heard.away);
                }
                (read, stall)
            });
        }
        Self { stop, readers: set }
    }

    /// Streams that were read, and the longest pause between two events of one.
    pub async fn end(mut self) -> (u32, Duration) {
        self.stop.send_replace(true);
        let (mut all, mut longest) = (0, Duration::ZERO);
        while let Some(reader) = self.readers.join_next().await {
            let (read, stall) = reader.expect("an honest reader is content");
            all += read;
            longest = longest.max(stall);
        }
        (all, longest)
    }
}

/// Asks for a stream that the client may come back to, and reads the head of the answer.
pub async fn begin(address: SocketAddr, key: Option<&str>, body: &Value) -> (TcpStream, String) {
    let (body, key) = (body.to_string(), key.map(|key| format!("authorization: Bearer {key}\r\n")));
    let asked = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\neverline-resume: 1\r\ncontent-type: application/json\r\n\
         {}content-length: {}\r\n\r\n{body}",
        key.unwrap_or_default(),
        body.len()
    );
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(asked.as_bytes()).await.expect("a request is taken");
    let mut head = String::new();
    read_until(&mut stream, &mut head, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    (stream, head)
}

/// Reads on until there is this in it.
pub async fn read_until(stream: &mut TcpStream, got: &mut String, until: &str) {
    let mut bytes = [0; 2048];
    while !got.contains(until) {
        let read = tokio::time::timeout(LONG, stream.read(&mut bytes)).await.expect("it goes on");
        let read = read.expect("the connection stays");
        assert!(read > 0, "it ended before {until:?}: {got}");
        got.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
}

/// Whether a replica was silent for so long that others took it to be dead, as on a machine that stands
/// still. What is generated by workers that nobody can go on with is lost then.
pub fn was_silent(fleet: &Fleet) -> bool {
    fleet.logs().contains("the other end of a stream link is silent")
}

pub fn event(text: &str, finish: Option<&str>) -> String {
    let choice = json!({"index": 0, "text": text, "finish_reason": finish});
    let event =
        json!({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]});
    format!("data: {event}\n\n")
}

pub async fn chunk(stream: &mut TcpStream, text: &str) -> bool {
    stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await.is_ok()
}

/// Whether it is none of the requests that a worker here knows; then it is told so.
pub async fn is_refused(stream: &mut TcpStream, seen: &Seen) -> bool {
    let is_known = seen.head.starts_with("POST /v1/completions ");
    if !is_known {
        // Who asked sees whether that arrived.
        let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
    }
    !is_known
}

pub const EVENTS: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// A worker that says one thing, and nothing more until it is told to go on.
pub async fn quiet(go: &watch::Sender<bool>) -> RawWorker {
    let go = go.subscribe();
    RawWorker::start(move |mut stream: TcpStream, seen| {
        let mut go = go.clone();
        async move {
            if is_refused(&mut stream, &seen).await {
                return (stream, Then::KeepAlive);
            }
            let mut well =
                stream.write_all(EVENTS).await.is_ok() && chunk(&mut stream, &event("a", None)).await;
            well = well && go.wait_for(|go| *go).await.is_ok();
            for text in [event("b", None), event("", Some("stop")), "data: [DONE]\n\n".to_owned()] {
                well = well && chunk(&mut stream, &text).await;
            }
            // Who is not there any more is not told.
            let _ = stream.write_all(b"0\r\n\r\n").await;
            (stream, Then::Close)
        }
    })
    .await
}

/// Registers a worker that serves this model only.
pub async fn register(fleet: &Fleet, model: &str, address: SocketAddr) {
    let mut request = engine_worker(model, address);
    request.models = vec![ModelEntry::Name(model.to_owned())];
    request.probe = Some(false);
    fleet.replicas[0]
        .add_worker(&request, LIMIT)
        .await
        .expect("an answer")
        .json::<Value>()
        .expect("registered");
    for replica in &fleet.replicas {
        until("it is known", LIMIT, async || {
            let known = replica
                .local_workers()
                .await?
                .iter()
                .any(|worker| worker.id.as_str() == model && worker.online);
            check(known, || format!("{} does not know {model}", replica.name))
        })
        .await;
    }
}
