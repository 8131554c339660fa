//! Workers that do what no worker should: each must become a clear error or a retry, never a
//! hang, never a panic, never somebody else's answer.

mod behaviours;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::endpoint::{Endpoint, LIMIT, engine_worker};
use chaos_tests::fleet::Fleet;
use chaos_tests::raw::{Answer, RawWorker, Seen, Then, exchange, post};
use everline::admin_types::{ModelEntry, RegisterRequest};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use behaviours::Outcome::{self, Broken, Ended, Error, Passed};
use behaviours::{GARBAGE, act, behaviours};

/// A client is never left waiting longer: the total time of these fleets, and slack for two
/// busy cores.
const NEVER_LONGER: Duration = Duration::from_secs(10);

async fn register(replica: &Endpoint, id: &str, worker: &RawWorker, models: &[&str]) {
    let mut request: RegisterRequest = engine_worker(id, worker.address);
    request.models = models.iter().map(|name| ModelEntry::Name((*name).to_owned())).collect();
    request.probe = Some(false);
    let reply = replica.add_worker(&request, LIMIT).await.expect("an answer");
    assert!(reply.status.is_success(), "{}", reply.text());
}

fn body(model: &str, stream: bool) -> String {
    json!({"model": model, "prompt": "hello", "stream": stream, "max_tokens": 4}).to_string()
}

/// What a client has got, as one of [`Outcome`].
fn outcome_of(answer: &Answer) -> Result<Outcome, String> {
    let seen = || format!("{answer:?}");
    if !answer.rest.is_empty() {
        return Err(format!("bytes after the answer: {}", seen()));
    }
    if answer.head.contains("text/event-stream") && answer.status == 200 && answer.complete {
        let text = answer.text();
        let failed = text.contains("\"code\":\"upstream_failed\"") && text.contains("\ndata: [DONE]\n");
        return if failed { Ok(Ended) } else { Err(format!("a stream without its end: {}", seen())) };
    }
    match answer.status {
        0 => Err(format!("no answer: {}", seen())),
        // Ours have a code of text.
        status => match answer.code() {
            Ok(code) if code == "upstream_failed" => Ok(Error(status, "upstream_failed")),
            Ok(code) if code == "upstream_timeout" => Ok(Error(status, "upstream_timeout")),
            Ok(code) => Err(format!("an error of another kind, {code}: {}", seen())),
            Err(_) if answer.complete => Ok(Passed(status)),
            Err(_) => Ok(Broken),
        },
    }
}

async fn hostile_fleet() -> Fleet {
    let mut builder = Fleet::of(1);
    for setting in [
        "proxy.first_byte_timeout_ms=1000",
        "proxy.idle_timeout_ms=1000",
        "proxy.total_timeout_ms=3000",
        "workers.timeout_ms=600000",
    ] {
        builder = builder.set(setting);
    }
    builder.start().await
}

fn assert_no_panic(fleet: &Fleet) {
    for replica in &fleet.replicas {
        let log = std::fs::read(replica.log()).expect("a log");
        let log = String::from_utf8_lossy(&log);
        assert!(!log.contains("panicked"), "{} panicked:\n{log}", replica.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_worker_does_the_client_gets_a_clear_end_in_time() {
    let mut fleet = hostile_fleet().await;
    let replica = (*fleet.replicas[0]).clone();
    let mut tries = JoinSet::new();
    for behaviour in behaviours() {
        let flooded = Arc::new(AtomicU64::new(0));
        let (steps, then, count) = (Arc::new(behaviour.steps), behaviour.then, flooded.clone());
        let worker = RawWorker::start(move |mut stream: TcpStream, seen: Seen| {
            let (steps, count) = (steps.clone(), count.clone());
            async move {
                act(&mut stream, &steps, seen.is_stream(), &count).await;
                (stream, then)
            }
        });
        let worker = worker.await;
        register(&replica, &worker.address.to_string(), &worker, &[behaviour.name]).await;
        let http = replica.http;
        tries.spawn(async move {
            let _worker = worker;
            let mut complaints = Vec::new();
            for (stream, expected) in [(false, behaviour.plain), (true, behaviour.stream)] {
                let request = post("/v1/completions", &body(behaviour.name, stream));
                let asked = Instant::now();
                let got = exchange(http, &request, NEVER_LONGER).await;
                let which = format!("{} (stream: {stream}, {:?})", behaviour.name, asked.elapsed());
                match got.map(|bytes| outcome_of(&Answer::parse(&bytes))) {
                    Ok(Ok(outcome)) if expected.contains(&outcome) => {}
                    Ok(Ok(outcome)) => complaints.push(format!("{which}: {outcome:?}, not {expected:?}")),
                    Ok(Err(why)) => complaints.push(format!("{which}: {why}, not {expected:?}")),
                    Err(bytes) => complaints.push(format!("{which}: HANGS after {} bytes", bytes.len())),
                }
            }
            // Socket buffers on both sides are in this figure, too. (100s are no part of the
            // answer's head; time bounds them.)
            let flooded = flooded.load(Ordering::Relaxed) >> 20;
            if flooded > 32 && !behaviour.name.starts_with("100s") {
                complaints.push(format!("{}: took {flooded} MiB", behaviour.name));
            }
            complaints
        });
    }
    let complaints: Vec<String> = tries.join_all().await.into_iter().flatten().collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    assert!(fleet.replicas[0].is_running());
    assert_no_panic(&fleet);
    let status = replica.status().await.expect("a status");
    let busy: Vec<_> = status.workers.iter().filter(|w| w.requests != 0).collect();
    assert!(busy.is_empty(), "bookings that nobody gave back: {busy:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_such_a_worker_has_not_answered_is_tried_at_another() {
    let fleet = hostile_fleet().await;
    let replica = (*fleet.replicas[0]).clone();
    let behaviours = behaviours();
    // Those whose failure is certain before anything went to the client, and may be tried again.
    let retried: Vec<_> = behaviours.into_iter().filter(|b| b.plain == [GARBAGE]).collect();
    assert!(retried.len() > 20);
    let names: Vec<&str> = retried.iter().map(|b| b.name).collect();
    let good = RawWorker::start(|mut stream, _| async move {
        let sent = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ngood").await;
        (stream, if sent.is_ok() { Then::KeepAlive } else { Then::Close })
    })
    .await;
    register(&replica, "good", &good, &names).await;
    let mut workers = Vec::new();
    for behaviour in retried {
        let (steps, then) = (Arc::new(behaviour.steps), behaviour.then);
        let worker = RawWorker::start(move |mut stream: TcpStream, seen: Seen| {
            let steps = steps.clone();
            async move {
                act(&mut stream, &steps, seen.is_stream(), &AtomicU64::new(0)).await;
                (stream, then)
            }
        })
        .await;
        register(&replica, &worker.address.to_string(), &worker, &[behaviour.name]).await;
        workers.push((behaviour.name, worker));
    }
    for (name, worker) in &workers {
        let mut asked = 0;
        // Until the bad one had its chance; which of the two is first is a matter of chance.
        while worker.seen().is_empty() {
            asked += 1;
            assert!(asked < 100, "{name}: never chosen");
            let request = post("/v1/completions", &body(name, asked % 2 == 0));
            let got = exchange(replica.http, &request, NEVER_LONGER).await.expect("an end");
            let answer = Answer::parse(&got);
            assert_eq!((answer.status, answer.text().as_str()), (200, "good"), "{name}: {answer:?}");
        }
    }
    assert_no_panic(&fleet);
}

/// Answers with the request's own id, and then says more than was asked, in the same breath or
/// a little later; `said` counts how often it has said it all.
async fn double_talk(
    mut stream: TcpStream,
    seen: Seen,
    extra: &'static str,
    late: bool,
    said: Arc<AtomicU64>,
) -> (TcpStream, Then) {
    let id = seen.header("x-request-id").unwrap_or("none").to_owned();
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{id}", id.len());
    let sent = if late {
        let first = stream.write_all(answer.as_bytes()).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        first.and(stream.write_all(extra.as_bytes()).await)
    } else {
        stream.write_all(format!("{answer}{extra}").as_bytes()).await
    };
    said.fetch_add(1, Ordering::Release);
    (stream, if sent.is_ok() { Then::KeepAlive } else { Then::Close })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_worker_says_after_its_answer_never_becomes_the_next_answer() {
    const EVIL: &str = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
    const TWO_MORE: &str = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil\
                            HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
    let fleet = hostile_fleet().await;
    let replica = (*fleet.replicas[0]).clone();
    let mut workers = Vec::new();
    for (name, extra) in [
        ("a second answer", EVIL),
        ("two more", TWO_MORE),
        ("the half of one", "HTTP/1.1 200 OK\r\ncontent-length: 400\r\n\r\nevil"),
        ("rubbish", "evil"),
        ("line ends", "\r\n\r\n"),
    ] {
        for late in [false, true] {
            let said = Arc::new(AtomicU64::new(0));
            let count = said.clone();
            let answer = move |stream, seen| double_talk(stream, seen, extra, late, count.clone());
            workers.push((format!("{name}, late: {late}"), RawWorker::start(answer).await, said));
        }
    }
    // The same after answers that end with their heads, whatever else these say.
    for status in ["204 Nothing", "304 Same"] {
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{EVIL}", EVIL.len());
        let said = Arc::new(AtomicU64::new(0));
        let count = said.clone();
        let worker = RawWorker::start(move |mut stream: TcpStream, seen: Seen| {
            let (answer, count) = (answer.clone(), count.clone());
            async move {
                if !seen.nth.is_multiple_of(2) {
                    return double_talk(stream, seen, "", false, count).await;
                }
                let sent = stream.write_all(answer.as_bytes()).await;
                count.fetch_add(1, Ordering::Release);
                (stream, if sent.is_ok() { Then::KeepAlive } else { Then::Close })
            }
        });
        workers.push((status.to_owned(), worker.await, said));
    }
    let mut clients = JoinSet::new();
    for (model, worker, said) in workers {
        register(&replica, &worker.address.to_string(), &worker, &[&model]).await;
        let url = replica.http_url("/v1/completions");
        clients.spawn(async move {
            let (http, mut right) = (Http::pooled(), 0);
            let body = json!({"model": model, "prompt": "x"});
            for n in 0..50 {
                let id = format!("{n}-{}", rand::random::<u32>());
                let reply = http.post_with(&url, &[("x-request-id", &id)], &body).await;
                let reply = reply.unwrap_or_else(|why| panic!("{model}: {why}"));
                match reply.status.as_u16() {
                    200 => assert_eq!(reply.text(), id, "{model}: another answer than its own"),
                    204 | 304 => assert!(reply.body.is_empty(), "{model}: {}", reply.text()),
                    // Who keeps breaking the protocol is an error, in the client's dialect.
                    502 => assert!(reply.text().contains("\"upstream_failed\""), "{model}: {}", reply.text()),
                    other => panic!("{model}: {other}"),
                }
                right += u32::from(reply.status == 200);
                // Everything it had to say lies in the socket before the connection is used
                // again; what comes after that nobody could tell from an answer.
                let all_said = async {
                    while worker.seen().len() as u64 != said.load(Ordering::Acquire) {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                };
                tokio::time::timeout(LIMIT, all_said).await.expect("the worker goes on");
            }
            (model, right)
        });
    }
    for (model, right) in clients.join_all().await {
        assert!(right > 0 || model.starts_with(['2', '3']), "{model}: no right answer at all");
    }
    assert_no_panic(&fleet);
}
