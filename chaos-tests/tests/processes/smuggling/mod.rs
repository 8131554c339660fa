//! Requests that two readers could read in two ways: none reaches a worker but the one that was
//! meant.

mod corpus;

use std::time::Duration;

use chaos_tests::endpoint::{LIMIT, engine_worker};
use chaos_tests::fleet::Fleet;
use chaos_tests::raw::{Answer, RawWorker, Seen, Then, exchange};
use corpus::Fate;
use everline::admin_types::ModelEntry;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// The front waits 10 s for a body before it counts the bytes of a second; and slack.
const NEVER_LONGER: Duration = Duration::from_secs(20);

/// All answers on a connection, in order, and what is left when nothing more can be read as one.
fn answers(mut bytes: &[u8]) -> Vec<Answer> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let answer = Answer::parse(bytes);
        let used = bytes.len() - answer.rest.len();
        let is_end = !answer.complete || used == 0;
        bytes = &bytes[used..];
        all.push(answer);
        if is_end {
            break;
        }
    }
    all
}

/// What is wrong with the way a case ended, if anything.
fn complaint(number: usize, case: &corpus::Case, got: &[u8], seen: &[Seen]) -> Option<String> {
    // With the quote behind it: 1 is not 10.
    let of = |word: &str| {
        let mark = format!("{word}-{number}\"");
        let holds =
            |seen: &&Seen| seen.head.contains(&mark) || String::from_utf8_lossy(&seen.body).contains(&mark);
        seen.iter().filter(holds).count()
    };
    let (intended, smuggled) = (of("INTENDED"), of("SMUGGLED"));
    let answers = answers(got);
    let first = answers.first();
    let refused = first.is_none_or(|a| matches!(a.status, 400..=499));
    let is_right = match case.fate {
        Fate::Refused => intended == 0 && refused,
        Fate::Elsewhere => intended == 0 && first.is_some_and(|a| a.status < 500),
        Fate::AtMostOnce => intended <= 1,
        Fate::Once => intended == 1 && first.is_some_and(|a| a.status == 200 && a.complete),
    };
    if is_right && smuggled == 0 {
        return None;
    }
    let shown: Vec<_> = answers.iter().map(|a| (a.status, a.text())).collect();
    Some(format!(
        "{} ({:?}): {intended} intended and {smuggled} smuggled requests at the worker, answers {shown:?}",
        case.name, case.fate
    ))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_reaches_a_worker_but_what_was_meant() {
    // The worker counts what reaches it; nobody shall ask it for token ids besides.
    let mut builder = Fleet::of(1).set("kv.default_mode=text").set("kv.scrape_ms=0");
    for setting in
        ["http.header_timeout_ms=1500", "http.first_byte_timeout_ms=1500", "http.idle_timeout_ms=1500"]
    {
        builder = builder.set(setting);
    }
    let mut fleet = builder.start().await;
    let replica = (*fleet.replicas[0]).clone();
    let worker = RawWorker::start(|mut stream: TcpStream, _| async move {
        let sent = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
        (stream, if sent.is_ok() { Then::KeepAlive } else { Then::Close })
    })
    .await;
    let mut request = engine_worker("w", worker.address);
    request.models = vec![ModelEntry::Name("m".to_owned())];
    request.probe = Some(false);
    // It is not asked about its events either.
    request.labels.insert("kv-events".to_owned(), "none".to_owned());
    let reply = replica.add_worker(&request, LIMIT).await.expect("an answer");
    assert!(reply.status.is_success(), "{}", reply.text());

    let cases = corpus::cases();
    assert!(cases.len() >= 40);
    let mut sent = JoinSet::new();
    for (number, case) in cases.iter().enumerate() {
        let bytes = case.bytes.clone();
        sent.spawn(async move { (number, exchange(replica.http, &bytes, NEVER_LONGER).await) });
    }
    let got = sent.join_all().await;
    let seen = worker.seen();
    let mut complaints = Vec::new();
    for (number, got) in got {
        match got {
            Ok(got) => complaints.extend(complaint(number, &cases[number], &got, &seen)),
            Err(got) => {
                let got = String::from_utf8_lossy(&got).into_owned();
                complaints.push(format!("{}: the connection stays open, after {got}", cases[number].name));
            }
        }
    }
    // What did arrive is framed by us and says nothing of the client's connection.
    const NOT_FOR_WORKERS: [&str; 8] = [
        "upgrade",
        "expect",
        "te",
        "trailer",
        "transfer-encoding",
        "connection",
        "x-evil",
        "x-forwarded-host",
    ];
    for seen in &seen {
        let names: Vec<_> = seen.head.lines().skip(1).filter_map(|line| line.split_once(':')).collect();
        let times = |name: &str| names.iter().filter(|(is, _)| is.eq_ignore_ascii_case(name)).count();
        let is_ours = seen.head.starts_with("POST /v1/completions")
            && seen.header("host") == Some(worker.address.to_string().as_str())
            && times("host") == 1
            && times("content-length") == 1
            && NOT_FOR_WORKERS.iter().all(|name| times(name) == 0);
        if !is_ours {
            complaints.push(format!("a strange request at the worker: {}", seen.head));
        }
    }
    println!("{} cases, {} requests at the worker", cases.len(), seen.len());
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    assert!(fleet.replicas[0].is_running());
    let log = String::from_utf8_lossy(&std::fs::read(fleet.replicas[0].log()).expect("a log")).into_owned();
    assert!(!log.contains("panicked"), "{log}");
}
