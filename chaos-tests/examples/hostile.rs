//! What hostile clients cost honest ones: latencies of the same load without and with an attack.
//!
//! `benches/hostile.sh` runs it; the first argument is the length of a phase in seconds.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::figures::Figures;
use chaos_tests::fleet::{Fleet, MODEL};
use chaos_tests::h2::{END_HEADERS, Raw, frame, kind, post, post_head};
use chaos_tests::raw;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Honest clients, each with a request every [`PAUSE`].
const HONEST: usize = 8;
const PAUSE: Duration = Duration::from_millis(20);
/// Connections that send a byte of their head now and then.
const SLOW: usize = 400;
/// Phases with and without attack, in turn.
const ROUNDS: usize = 3;
/// Clients for each kind of fast attack, each with a pause of [`BREATH`] between two attacks.
const FAST: usize = 2;
const BREATH: Duration = Duration::from_millis(20);
/// The same for HTTP/2 floods, whose megabytes would otherwise be more than a network has.
const H2_BREATH: Duration = Duration::from_millis(200);
const PATH: &str = "/v1/completions";

/// Asks until the end; the times of good answers go to the caller, the others are counted.
async fn honest(url: String, until: Instant, failed: Arc<AtomicU64>) -> Vec<Duration> {
    let (http, mut times) = (Http::pooled(), Vec::new());
    let body = json!({"model": MODEL, "prompt": "honest", "max_tokens": 4});
    while Instant::now() < until {
        let asked = Instant::now();
        match http.post(&url, &body, Duration::from_secs(10)).await {
            Ok(reply) if reply.status.is_success() => times.push(asked.elapsed()),
            _ => {
                failed.fetch_add(1, Ordering::Relaxed);
            }
        }
        tokio::time::sleep(PAUSE.saturating_sub(asked.elapsed())).await;
    }
    times
}

async fn phase(name: &str, url: &str, length: Duration) -> Figures {
    let failed = Arc::new(AtomicU64::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..HONEST {
        clients.spawn(honest(url.to_owned(), Instant::now() + length, failed.clone()));
    }
    let mut figures = Figures::default();
    clients.join_all().await.into_iter().flatten().for_each(|took| figures.add(took));
    let micros = |percent| figures.percentile(percent).as_micros();
    println!(
        "{name:<15} n {:<6} p50 {:>6} us  p99 {:>6} us  failed {}",
        figures.count(),
        micros(50),
        micros(99),
        failed.load(Ordering::Relaxed)
    );
    figures
}

async fn drip(front: SocketAddr) {
    loop {
        if let Ok(mut stream) = TcpStream::connect(front).await {
            let begun = stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nx: ").await;
            while begun.is_ok() && stream.write_all(b"a").await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        tokio::time::sleep(BREATH).await;
    }
}

/// Requests that are refused, of many kinds, again and again.
async fn nonsense(front: SocketAddr, refused: Arc<AtomicU64>) {
    let deep = format!("{{\"model\":{}", "[".repeat(100_000));
    let both = "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n";
    let flood = format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: a\r\n".repeat(5000));
    let requests = [
        raw::post(PATH, "{\"model\":"),
        raw::post(PATH, &deep),
        raw::post(PATH, "{\"model\":\"nobody\"}"),
        both.as_bytes().to_vec(),
        flood.into_bytes(),
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n".to_vec(),
    ];
    for n in 0.. {
        let request: &Vec<u8> = &requests[n % requests.len()];
        if raw::exchange(front, request, Duration::from_secs(5)).await.is_ok() {
            refused.fetch_add(1, Ordering::Relaxed);
        }
        tokio::time::sleep(BREATH).await;
    }
}

async fn h2(front: SocketAddr, continuation: bool, closed: Arc<AtomicU64>) {
    let body = json!({"model": MODEL, "prompt": "x", "max_tokens": 4}).to_string();
    loop {
        let body = body.clone();
        let frames = move |n: u32| match (continuation, n) {
            (_, 10_000..) => None,
            (true, 0) => Some(frame(kind::HEADERS, 0, 1, &post_head(PATH))),
            (true, _) => Some(frame(kind::CONTINUATION, 0, 1, &[b'\0'; 1000])),
            (false, n) => {
                let reset = frame(kind::RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8]);
                let asked = match n % 2 {
                    0 => post(2 * n + 1, PATH, &body),
                    _ => frame(kind::HEADERS, END_HEADERS, 2 * n + 1, &post_head(PATH)),
                };
                Some([asked, reset].concat())
            }
        };
        if let Ok(raw) = Raw::connect(front, &[]).await
            && raw.flood(frames, Duration::from_secs(5)).await.closed
        {
            closed.fetch_add(1, Ordering::Relaxed);
        }
        tokio::time::sleep(H2_BREATH).await;
    }
}

/// All attacks at once, until the standard input ends; then says what it did.
async fn attack(front: SocketAddr) {
    let (refused, closed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut attackers = JoinSet::new();
    for _ in 0..SLOW {
        attackers.spawn(drip(front));
    }
    for _ in 0..FAST {
        attackers.spawn(nonsense(front, refused.clone()));
        attackers.spawn(h2(front, false, closed.clone()));
        attackers.spawn(h2(front, true, closed.clone()));
    }
    let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
    println!(
        "attack: {SLOW} slow heads, {} refused requests, {} HTTP/2 connections closed on us",
        refused.load(Ordering::Relaxed),
        closed.load(Ordering::Relaxed)
    );
}

/// Attackers are elsewhere: here, in a process of their own that gets what processor time nobody
/// else wants. What they make the router do is not lowered by that.
fn start_attack(front: SocketAddr) -> std::io::Result<Child> {
    Command::new("nice")
        .args(["-n", "19"])
        .arg(std::env::current_exe()?)
        .args(["attack", &front.to_string()])
        .stdin(Stdio::piped())
        .spawn()
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [attacker, front] = arguments.as_slice()
        && attacker == "attack"
    {
        return attack(front.parse().expect("an address")).await;
    }
    let seconds = arguments.first().and_then(|text| text.parse().ok()).unwrap_or(10);
    let length = Duration::from_secs(seconds);
    let fleet = Fleet::of(1).engines(1).engine_arg("--instant").start().await;
    let (front, url) = (fleet.replicas[0].http, fleet.replicas[0].http_url(PATH));
    phase("warm-up", &url, Duration::from_secs(2)).await;
    let (mut quiet, mut attacked) = (Figures::default(), Figures::default());
    for _ in 0..ROUNDS {
        quiet.merge(&phase("without attack", &url, length).await);
        let mut attackers = start_attack(front).expect("the attackers start");
        attacked.merge(&phase("with attack", &url, length).await);
        drop(attackers.stdin.take());
        let _ = attackers.wait();
    }
    let [before, after] = [&quiet, &attacked].map(|figures| figures.percentile(99).as_secs_f64());
    println!("p99 with attack: {:+.0} %", (after / before.max(f64::MIN_POSITIVE) - 1.0) * 100.0);
}
