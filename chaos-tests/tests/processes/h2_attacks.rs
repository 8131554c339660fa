//! HTTP/2 used against its server: each attack ends within a bound, and nobody else notices.

use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, MODEL};
use chaos_tests::h2::{
    END_HEADERS, END_STREAM, INITIAL_WINDOW_SIZE, Raw, frame, kind, post, post_head, setting,
};
use chaos_tests::wait::{check, until};
use serde_json::json;

/// An attack that must end with the connection ends it within this time.
const CLOSED_WITHIN: Duration = Duration::from_secs(15);
/// How long an attack may go on that is only a waste of the attacker's time.
const TOLERATED_FOR: Duration = Duration::from_secs(3);
/// What a replica may grow by under one attack, MiB.
const GROWTH: usize = 96;

const PATH: &str = "/v1/completions";

fn body() -> String {
    json!({"model": MODEL, "prompt": "hello", "max_tokens": 400, "stream": true}).to_string()
}

/// The stream of the n-th request.
fn stream(n: u32) -> u32 {
    2 * n + 1
}

type Next = Box<dyn FnMut(u32) -> Option<Vec<u8>> + Send>;

/// A name, whether the connection must be closed, and the frames.
fn attacks() -> Vec<(&'static str, bool, Next)> {
    let flood = |count: u32, frame: Box<dyn Fn(u32) -> Vec<u8> + Send>| -> Next {
        Box::new(move |n| (n < count).then(|| frame(n)))
    };
    let whole = body();
    let request = move |n: u32| post(stream(n), PATH, &whole);
    let ask = request.clone();
    let rapid_reset =
        move |n: u32| [request(n), frame(kind::RST_STREAM, 0, stream(n), &[0, 0, 0, 8])].concat();
    let heads = |n: u32| {
        let head = frame(kind::HEADERS, END_HEADERS, stream(n), &post_head(PATH));
        [head, frame(kind::RST_STREAM, 0, stream(n), &[0, 0, 0, 8])].concat()
    };
    // Resets that the server itself is made to send: a window that overflows, a frame too many.
    let first = ask.clone();
    let made_window = move |n: u32| {
        let overflow = frame(kind::WINDOW_UPDATE, 0, stream(n), &0x7fff_ffff_u32.to_be_bytes());
        [first(n), overflow.clone(), overflow].concat()
    };
    let second = ask.clone();
    let made_zero = move |n: u32| [second(n), frame(kind::WINDOW_UPDATE, 0, stream(n), &[0; 4])].concat();
    let unread_body = ask.clone();
    let unread = move |n: u32| match n {
        0 => frame(kind::SETTINGS, 0, 0, &setting(INITIAL_WINDOW_SIZE, 0)),
        _ => unread_body(n),
    };
    let made_late = move |n: u32| [ask(n), frame(kind::DATA, END_STREAM, stream(n), b"late")].concat();
    let continuation = |n: u32| match n {
        0 => frame(kind::HEADERS, 0, 1, &post_head(PATH)),
        // A literal header without indexing: `x: aaa...`, again and again.
        _ => frame(kind::CONTINUATION, 0, 1, &[&[0, 1, b'x', 100][..], &[b'a'; 100]].concat().repeat(100)),
    };
    let empty_continuation = |n: u32| match n {
        0 => frame(kind::HEADERS, 0, 1, &post_head(PATH)),
        _ => frame(kind::CONTINUATION, 0, 1, &[]).repeat(1000),
    };
    let empty_data = |n: u32| match n {
        0 => frame(kind::HEADERS, END_HEADERS, 1, &post_head(PATH)),
        _ => frame(kind::DATA, 0, 1, &[]).repeat(1000),
    };
    vec![
        ("rapid reset", true, flood(50_000, Box::new(rapid_reset))),
        ("rapid reset of heads", true, flood(50_000, Box::new(heads))),
        ("made to reset: overflowing windows", true, flood(50_000, Box::new(made_window))),
        ("made to reset: empty windows", true, flood(50_000, Box::new(made_zero))),
        ("made to reset: data after the end", true, flood(50_000, Box::new(made_late))),
        ("CONTINUATION flood", true, flood(50_000, Box::new(continuation))),
        ("empty CONTINUATION flood", true, flood(50_000, Box::new(empty_continuation))),
        (
            "SETTINGS flood",
            false,
            flood(2_000, Box::new(|_| frame(kind::SETTINGS, 0, 0, &setting(3, 100)).repeat(100))),
        ),
        ("PING flood", false, flood(2_000, Box::new(|_| frame(kind::PING, 0, 0, &[7; 8]).repeat(100)))),
        ("empty DATA flood", false, flood(2_000, Box::new(empty_data))),
        ("no window at all", false, flood(100, Box::new(unread))),
        ("frames of a size not allowed", true, flood(1, Box::new(|_| frame(kind::DATA, 0, 1, &[0; 20_000])))),
        (
            "a stream that is even",
            true,
            flood(1, Box::new(|_| frame(kind::HEADERS, END_HEADERS, 2, &post_head(PATH)))),
        ),
        (
            "a head that is no HPACK",
            true,
            flood(1, Box::new(|_| frame(kind::HEADERS, END_HEADERS, 1, &[0xff; 64]))),
        ),
    ]
}

/// Resident memory of a process, MiB.
fn resident(pid: u32) -> usize {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).expect("a process that lives");
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("a figure");
    pages * 4 / 1024
}

async fn all_idle(fleet: &Fleet) {
    until("nothing in flight any more", CLOSED_WITHIN, async || {
        let status = fleet.replicas[0].status().await?;
        let busy: i64 = status.workers.iter().map(|w| w.requests).sum();
        check(busy == 0, || format!("{busy} requests in flight"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_http2_attack_ends_and_honest_clients_do_not_notice() {
    let mut fleet = Fleet::of(1).engines(1).start().await;
    let (http, pid) = (fleet.replicas[0].http, fleet.replicas[0].id());
    let url = fleet.replicas[0].http_url(PATH);
    let honest = tokio::spawn(async move {
        let (client, mut count) = (Http::fresh(), 0);
        let body = json!({"model": MODEL, "prompt": "honest", "max_tokens": 4});
        loop {
            let reply = client.post(&url, &body, CLOSED_WITHIN).await.expect("an answer");
            assert_eq!(reply.status, 200, "{}", reply.text());
            count += 1;
            if count == u32::MAX {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let mut complaints = Vec::new();
    for (name, must_close, frames) in attacks() {
        let before = resident(pid);
        let raw = Raw::connect(http, &[]).await.expect("a connection");
        let ended = raw.flood(frames, if must_close { CLOSED_WITHIN } else { TOLERATED_FOR }).await;
        let grown = resident(pid).saturating_sub(before);
        println!("{name}: {ended:?}, grown by {grown} MiB");
        if must_close && !ended.closed {
            complaints.push(format!("{name}: the connection stays open ({ended:?})"));
        }
        if grown > GROWTH {
            complaints.push(format!("{name}: {grown} MiB more"));
        }
        assert!(!honest.is_finished(), "{name}: an honest client has failed: {:?}", honest.await);
    }
    honest.abort();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    assert!(fleet.replicas[0].is_running());
    all_idle(&fleet).await;
    let log = String::from_utf8_lossy(&std::fs::read(fleet.replicas[0].log()).expect("a log")).into_owned();
    assert!(!log.contains("panicked"), "{log}");
}
