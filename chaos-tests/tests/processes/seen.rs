//! What can be seen of running processes from outside: the status page, metrics, spans, logs.

use std::net::SocketAddr;
use std::time::Duration;

use chaos_tests::binary::run_ok;
use chaos_tests::client::Http;
use chaos_tests::endpoint::{Endpoint, LIMIT, engine_worker};
use chaos_tests::fleet::{Fleet, MODEL, turn};
use chaos_tests::process::Process;
use chaos_tests::wait::{check, until};
use rustix::process::Signal;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

const LONG: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_page_tells_what_each_replica_says_of_itself() {
    let mut fleet = Fleet::of(3).engines(2).start().await;
    let leader = fleet.leader().await;
    let (asked, gone) = ((leader + 1) % 3, (leader + 2) % 3);
    let server = fleet.replicas[asked].admin_url("");
    let names: Vec<String> = fleet.replicas.iter().map(|replica| replica.name.clone()).collect();
    let line = |page: &str, name: &str| {
        let found = page.lines().find(|line| line.split_whitespace().next() == Some(name));
        found.unwrap_or_else(|| panic!("{name} is not in\n{page}")).to_owned()
    };

    // Everybody is asked: no column is empty but the view of the replica that answers.
    until("a page without gaps", LONG, async || {
        let page = run_ok(&["status", "--server", &server]).await;
        for (at, name) in names.iter().enumerate() {
            let empty = line(&page, name).split_whitespace().filter(|cell| *cell == "-").count();
            check(empty == usize::from(at == asked), || page.clone())?;
        }
        Ok(())
    })
    .await;
    let local = run_ok(&["status", "--local", "--server", &server]).await;
    assert!(line(&local, &names[leader]).split_whitespace().any(|cell| cell == "-"), "{local}");
    let json: serde_json::Value =
        serde_json::from_str(&run_ok(&["status", "-o", "json", "--server", &server]).await).unwrap();
    assert_eq!(json["others"].as_array().map(Vec::len), Some(2), "{json}");
    assert_eq!(json["cluster"]["name"], names[asked].as_str());

    // One that is dead is silent, and the view of it gets old.
    fleet.replicas[gone].kill9();
    until("a silent replica", LONG, async || {
        let page = run_ok(&["status", "--server", &server]).await;
        let row = line(&page, &names[gone]);
        check(row.contains("silent") && row.contains(" - "), || page.clone())
    })
    .await;
    until("an old view", LONG, async || {
        let text = Http::fresh().get(&fleet.replicas[asked].admin_url("/metrics"), LIMIT).await?.text();
        let sample = format!("everline_view_lag_seconds{{replica=\"{}\"}} ", names[gone]);
        let age = text.lines().find_map(|line| line.strip_prefix(&sample)?.parse::<f64>().ok());
        check(age.is_some_and(|age| age > 2.0), || format!("{age:?}"))
    })
    .await;
}

/// A collector: tells what is posted to it.
async fn collector() -> (SocketAddr, mpsc::UnboundedReceiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut all = Vec::new();
            // One request a connection: its length is known when its head has come.
            loop {
                let text = String::from_utf8_lossy(&all).to_ascii_lowercase();
                let wanted = all.windows(4).position(|four| four == b"\r\n\r\n").map(|end| {
                    let length =
                        text.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
                    end + 4 + length.unwrap_or(0_usize)
                });
                if wanted.is_some_and(|wanted| all.len() >= wanted) {
                    break;
                }
                if stream.read_buf(&mut all).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            let _ = tell.send(all);
        }
    });
    (address, told)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_of_the_last_requests_are_sent_before_the_end_and_logs_hold_no_prompt() {
    let _turn = turn().await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (address, mut posted) = collector().await;
    let replica = Endpoint::new("r1");
    let engine: SocketAddr = Endpoint::new("engine").http;
    let owned = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
    let engine_args = owned(&["engine-sim", "--listen", &engine.to_string(), "--model", MODEL]);
    let _engine = Process::start(&engine_args, &folder.path().join("engine.log"));
    let log = folder.path().join("r1.log");
    let data = folder.path().join("r1").display().to_string();
    let args = owned(&[
        "serve",
        "--name",
        "r1",
        "--data-dir",
        &data,
        "--http",
        &replica.http.to_string(),
        "--admin",
        &replica.admin.to_string(),
        "--peer",
        &replica.peer.to_string(),
        "--log-format",
        "json",
        "--set",
        "log.access=all",
    ]);
    let endpoint = format!("http://{address}");
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_SERVICE_NAME", "seen"),
        // Long: only the end of the process sends.
        ("OTEL_BSP_SCHEDULE_DELAY", "600000"),
    ];
    let mut process = Process::start_with(&args, &log, &variables);
    until("a worker", LONG, async || {
        let reply = replica.add_worker(&engine_worker("e1", engine), LIMIT).await?;
        check(reply.status.is_success(), || reply.text())
    })
    .await;
    let body = json!({"model": MODEL, "max_tokens": 4, "stream": true, "prompt": "a-secret-prompt"});
    let reply = Http::fresh().post(&replica.http_url("/v1/completions"), &body, LIMIT).await.unwrap();
    assert!(reply.status.is_success(), "{}", reply.text());
    assert!(posted.try_recv().is_err(), "nothing is due yet");

    process.signal(Signal::TERM);
    assert!(process.wait(LONG).success());
    let request =
        tokio::time::timeout(LONG, posted.recv()).await.expect("spans in time").expect("a collector");
    let text = String::from_utf8_lossy(&request);
    for part in ["POST /v1/traces ", "seen", "POST /v1/completions", "gen_ai.request.model", MODEL, "e1"] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    let logged = std::fs::read_to_string(&log).expect("a log");
    let lines =
        logged.lines().filter(|line| line.contains("everline::access") && line.contains("/v1/completions"));
    let lines: Vec<&str> = lines.collect();
    assert!(matches!(lines[..], [line] if line.contains("\"worker\":\"e1\"")), "{lines:?}");
    for secret in [&logged, text.as_ref()] {
        assert!(!secret.contains("a-secret-prompt"));
    }
}
