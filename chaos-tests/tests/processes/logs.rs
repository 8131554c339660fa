//! Logs that nobody reads.

use std::fs::OpenOptions;
use std::io::Read;
use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::endpoint::{Endpoint, LIMIT};
use chaos_tests::fleet::turn;
use chaos_tests::process::Process;
use chaos_tests::wait::{check, until};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::Signal;
use serde_json::json;
use tokio::task::JoinSet;

/// What Linux lets wait in a pipe.
const PIPE: usize = 64 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_log_nobody_reads_goes_on_and_says_how_much_of_it_is_missing() {
    let _turn = turn().await;
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("r1.log");
    mkfifoat(CWD, &pipe, Mode::RUSR | Mode::WUSR).unwrap();
    // Open, and never read: as with a collector of logs that has stopped.
    let mut reader = OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let replica = Endpoint::new("r1");
    let mut args =
        ["serve", "--name", "r1", "--log-filter", "trace,hyper=trace,h2=trace"].map(str::to_owned).to_vec();
    args.extend(["--data-dir".to_owned(), folder.path().join("r1").display().to_string()]);
    let listeners = [("--http", replica.http), ("--admin", replica.admin), ("--peer", replica.peer)];
    args.extend(listeners.iter().flat_map(|(flag, address)| [(*flag).to_owned(), address.to_string()]));
    let mut process = Process::start(&args, &pipe);
    until("it is ready", Duration::from_secs(30), async || {
        let reply = replica.ready().await?;
        check(reply.status == 200, || reply.text())
    })
    .await;
    let left_out = async || -> Result<u64, String> {
        let metrics = Http::fresh().get(&replica.admin_url("/metrics"), LIMIT).await?.text();
        let line = metrics.lines().find_map(|line| line.strip_prefix("everline_log_lines_left_out_total "));
        line.and_then(|value| value.parse().ok()).ok_or(metrics)
    };
    // A model that nobody serves: answered, and logged.
    let body = json!({"model": "m", "prompt": "x"});
    until("lines are left out", Duration::from_secs(180), async || {
        let url = replica.http_url("/v1/completions");
        let mut asking = JoinSet::new();
        for _ in 0..8 {
            let (url, body) = (url.clone(), body.clone());
            asking.spawn(async move {
                for _ in 0..50 {
                    let reply = Http::fresh().post(&url, &body, LIMIT).await?;
                    check(reply.status.is_client_error() || reply.status.is_server_error(), || reply.text())?;
                }
                Ok::<_, String>(())
            });
        }
        asking.join_all().await.into_iter().collect::<Result<(), _>>()?;
        let lines = left_out().await?;
        check(lines > 0, || "none so far".to_owned())
    })
    .await;
    // Who begins to read again is told.
    let mut read = String::new();
    let mut bytes = vec![0; PIPE];
    tokio::task::spawn_blocking(move || {
        while !read.contains("lines of this log were left out") {
            let count = reader.read(&mut bytes).unwrap();
            read.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    })
    .await
    .unwrap();
    assert_eq!(replica.ready().await.unwrap().status, 200);
    process.signal(Signal::TERM);
    assert!(process.wait(Duration::from_secs(30)).success());
}
