//! The demo's other profiles, as a script sees them: they come up, answer what one engine alone would answer,
//! by both kinds of their engines, and come down.

use std::path::Path;
use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::endpoint::LIMIT;
use chaos_tests::fleet::turn;
use chaos_tests::load::{Kind, ask_model};
use chaos_tests::process::{Process, tail};
use everline::engines::sim::{EngineSimArgs, Simulator};
use rustix::process::{Pid, Signal, test_kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

struct Demo {
    process: Process,
    state: Value,
    folder: TempDir,
}

impl Demo {
    async fn start(profile: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (file, log) = (folder.path().join("state.json"), folder.path().join("demo.log"));
        let args = ["demo", "--profile", profile, "--port", "0", "--run-for", "180", "--state-file"];
        let mut args = args.map(str::to_owned).to_vec();
        args.push(file.display().to_string());
        let started = Instant::now();
        let mut process = Process::start(&args, &log);
        while !file.exists() {
            let ended = process.ended();
            let in_time = started.elapsed() < Duration::from_secs(90);
            assert!(ended.is_none() && in_time, "{ended:?} {}", tail(&log));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        println!("{profile} ready after {} ms", started.elapsed().as_millis());
        let state: Value =
            serde_json::from_slice(&std::fs::read(&file).expect("a state file")).expect("JSON");
        assert_eq!(state["profile"], profile);
        Self { process, state, folder }
    }

    fn list(&self, name: &str) -> Vec<Value> {
        self.state[name].as_array().cloned().expect("a list")
    }

    fn text(&self, entry: &Value, member: &str) -> String {
        entry[member].as_str().unwrap_or_else(|| panic!("no {member}: {entry}")).to_owned()
    }

    fn url(&self) -> String {
        self.text(&self.state["balancer"], "url")
    }

    /// Requests that each engine of a role has had.
    async fn served(&self, role: &str) -> Vec<u64> {
        let mut served = Vec::new();
        for engine in self.list("engines").iter().filter(|engine| engine["role"] == role) {
            let url = format!("{}/sim/stats", self.text(engine, "url"));
            let stats: Value =
                Http::fresh().get(&url, LIMIT).await.expect("an answer").json().expect("its figures");
            served.push(stats["total_requests"].as_u64().expect("a number"));
        }
        served
    }

    /// Stops it; nothing of it is left.
    fn stop(mut self) {
        let lists = ["replicas", "engines"].map(|name| self.list(name));
        let all = lists.into_iter().flatten().chain([self.state["balancer"].clone()]);
        let pids: Vec<i64> = all.map(|entry| entry["pid"].as_i64().expect("a pid")).collect();
        assert_eq!(pids.len(), 3 + 4 + 1);
        self.process.signal(Signal::INT);
        let status = self.process.wait(Duration::from_secs(20));
        assert!(status.success(), "{status}: {}", tail(&self.folder.path().join("demo.log")));
        let lives = |pid: &i64| {
            let pid = i32::try_from(*pid).ok().and_then(Pid::from_raw).expect("a pid");
            test_kill_process(pid).is_ok()
        };
        let left: Vec<&i64> = pids.iter().filter(|pid| lives(pid)).collect();
        assert!(left.is_empty(), "still alive: {left:?}");
        let data = self.text(&self.state, "data_dir");
        assert!(!Path::new(&data).exists(), "{data} is left behind");
    }
}

/// An engine that does everything by itself, and says what all of them are to say.
async fn alone(model: &str) -> Simulator {
    let mut args = EngineSimArgs::defaults();
    (args.models, args.instant) = (vec![model.to_owned()], true);
    Simulator::start(args).await.expect("an engine")
}

const STORY: &str = "a story of two engines, the one of which reads while the other one writes, and of the \
    router between them, that knows which of them has read what, and is told by neither what it means";

/// Chats through the balancer, streamed or not, say what one engine says, and every request was on both sides.
async fn splits_requests(profile: &str) {
    let _turn = turn().await;
    let demo = Demo::start(profile).await;
    let (http, model) = (Http::fresh(), demo.text(&demo.state, "model"));
    let alone = alone(&model).await;
    let engine = format!("http://{}", alone.address());
    const ROUNDS: u64 = 6;
    for round in 0..ROUNDS {
        let kind = Kind { chat: round % 3 > 0, stream: round % 2 == 0 };
        let prompt = format!("{STORY}, {round}");
        let said = ask_model(&http, &demo.url(), &model, kind, &prompt, 24).await;
        let expected = ask_model(&http, &engine, &model, kind, &prompt, 24).await;
        assert_eq!(said.expect("an answer"), expected.expect("an answer"), "{kind:?}");
    }
    for role in ["prefill", "decode"] {
        let served = demo.served(role).await;
        assert_eq!(served.len(), 2);
        assert!(served.iter().sum::<u64>() >= ROUNDS, "{role}: {served:?}");
    }
    demo.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_vllm_pd_profile_splits_requests_between_prefill_and_decode_engines() {
    splits_requests("vllm-pd").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sglang_pd_profile_splits_requests_between_prefill_and_decode_engines() {
    splits_requests("sglang-pd").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ksana_profile_serves_management_and_requests_at_one_address_of_each_replica() {
    let _turn = turn().await;
    let demo = Demo::start("ksana").await;
    let (http, model) = (Http::fresh(), demo.text(&demo.state, "model"));
    let alone = alone(&model).await;
    let body = json!({"prompt": STORY, "max_tokens": 20, "temperature": 0});
    let url = format!("http://{}/v1/completions", alone.address());
    let whole: Value = http.post(&url, &body, LIMIT).await.expect("an answer").json().expect("JSON");
    let expected = whole["choices"][0]["text"].as_str().expect("a text");

    let replicas = demo.list("replicas");
    let urls = replicas.iter().map(|replica| demo.text(replica, "http")).chain([demo.url()]);
    let body = json!({"prompt": STORY, "sampling_config": {"max_new_tokens": 20, "temperature": 0}});
    for url in urls {
        let reply = http.post(&format!("{url}/generate"), &body, LIMIT).await.expect("an answer");
        assert_eq!(reply.status, 200, "{}", reply.text());
        let text = reply.text();
        let frames: Vec<&str> = text.split('\0').filter(|frame| !frame.is_empty()).collect();
        let Some((&"[DONE]", frames)) = frames.split_last() else { panic!("{text:?}") };
        let last: Value = serde_json::from_str(frames.last().expect("a frame")).expect("JSON");
        assert_eq!(last["texts"][0], expected, "{url}");
        // The same address takes nodes.
        let reply = http.post(&format!("{url}/Heartbeat"), &json!({"node_id": "nobody"}), LIMIT).await;
        assert_eq!(reply.expect("an answer").status, 404);
    }
    for role in ["prefill", "decode"] {
        assert_eq!(demo.served(role).await.iter().sum::<u64>(), 4, "{role}");
    }
    demo.stop();
}
