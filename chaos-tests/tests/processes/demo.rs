//! `everline demo` as a script sees it.

use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::fleet::turn;
use chaos_tests::load::{Kind, ask_model};
use chaos_tests::process::{Process, tail};
use rustix::process::{Pid, Signal, test_kill_process};
use serde_json::Value;

fn pids(state: &Value) -> Vec<i64> {
    let lists = ["replicas", "engines"].map(|key| state[key].as_array().cloned().unwrap_or_default());
    let all = lists.into_iter().flatten().chain([state["balancer"].clone()]);
    all.map(|entry| entry["pid"].as_i64().expect("a pid")).collect()
}

fn lives(pid: i64) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
    test_kill_process(pid).is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_says_where_everything_is_and_takes_it_all_down() {
    let _turn = turn().await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (file, log) = (folder.path().join("state.json"), folder.path().join("demo.log"));
    let mut args = ["demo", "--port", "0", "--run-for", "120", "--state-file"].map(str::to_owned).to_vec();
    args.push(file.display().to_string());
    let started = Instant::now();
    let mut demo = Process::start(&args, &log);
    while !file.exists() {
        let ended = demo.ended();
        assert!(ended.is_none() && started.elapsed() < Duration::from_secs(60), "{ended:?} {}", tail(&log));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("demo ready after {} ms", started.elapsed().as_millis());
    let state: Value = serde_json::from_slice(&std::fs::read(&file).expect("a state file")).expect("JSON");
    let all = pids(&state);
    assert_eq!(all.len(), 3 + 4 + 1, "{state:#}");
    assert!(all.iter().all(|pid| lives(*pid)), "{state:#}");

    let url = |entry: &Value, key: &str| entry[key].as_str().expect("a URL").to_owned();
    let http = Http::fresh();
    for replica in state["replicas"].as_array().expect("a list") {
        for listener in ["http", "admin"] {
            let reply = http.get(&format!("{}/readyz", url(replica, listener)), Duration::from_secs(5)).await;
            assert!(reply.as_ref().is_ok_and(|r| r.status == 200), "{listener}: {reply:?}");
        }
    }
    let model = url(&state, "model");
    let kind = Kind { chat: true, stream: true };
    let balancer = url(&state["balancer"], "url");
    let streamed = ask_model(&http, &balancer, &model, kind, "hello", 16).await.expect("a stream");
    let engine = url(&state["engines"][0], "url");
    let plain = Kind { chat: true, stream: false };
    let said = ask_model(&http, &engine, &model, plain, "hello", 16).await.expect("an answer");
    assert_eq!(streamed, said);

    demo.signal(Signal::INT);
    let status = demo.wait(Duration::from_secs(15));
    assert!(status.success(), "{status}: {}", tail(&log));
    let left: Vec<i64> = all.into_iter().filter(|pid| lives(*pid)).collect();
    assert!(left.is_empty(), "still alive: {left:?}");
    let data = url(&state, "data_dir");
    assert!(!std::path::Path::new(&data).exists(), "{data} is left behind");
    assert!(!file.exists(), "the state file says what is no longer true");
}
