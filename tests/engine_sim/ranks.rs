//! Data-parallel ranks behind one listener.

use std::sync::Arc;

use everline::engines::sim::events::{EventFormat, KvEventsConfig};
use everline::engines::sim::{EngineSimArgs, Simulator};
use everline::ingest::load::{LOAD_TOPIC, LoadFeed};
use everline::zmtp::{AnyAddress, Endpoint};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{Reply, call, get, quick, start};

/// An engine of three ranks that publish events.
fn ranked() -> EngineSimArgs {
    let mut args = quick();
    args.dp = 3;
    let config =
        json!({"enable_kv_cache_events": true, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"});
    args.kv_events_config = Some(KvEventsConfig::parse(&config.to_string()).unwrap());
    args
}

async fn ask(sim: &Simulator, path: &str, rank: Option<&str>, body: &Value) -> Reply {
    let header = rank.map(|rank| ("x-data-parallel-rank", rank));
    let headers: Vec<_> = header.into_iter().collect();
    call(sim.address(), "POST", path, &headers, &body.to_string()).await
}

/// How much of a prompt a rank has cached.
async fn cached(sim: &Simulator, rank: Option<&str>, prompt: &[u32]) -> u64 {
    let body = json!({"prompt": prompt, "max_tokens": 2});
    let reply = ask(sim, "/v1/completions", rank, &body).await;
    assert_eq!(reply.status(), 200, "{}", reply.body());
    reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// What a metric says of each rank.
async fn by_rank(sim: &Simulator, metric: &str) -> Vec<f64> {
    let page = get(sim.address(), "/metrics").await.body();
    let value = |rank: usize| {
        let start = format!("vllm:{metric}{{engine=\"{rank}\",");
        let line = page.lines().find(|line| line.starts_with(&start));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok()).unwrap_or_else(|| panic!("{start}"))
    };
    (0..sim.ranks().count()).map(value).collect()
}

#[tokio::test]
async fn each_rank_has_a_cache_of_its_own_and_the_header_names_it() {
    let sim = start(ranked()).await;
    let prompt: Vec<u32> = (100..164).collect();
    assert_eq!(cached(&sim, Some("1"), &prompt).await, 0);
    assert_eq!(cached(&sim, Some("2"), &prompt).await, 0);
    assert_eq!(cached(&sim, Some("1"), &prompt).await, 48);
    for (rank, blocks) in [(0, 0), (1, 4), (2, 4)] {
        let engine = sim.ranks().iter().nth(rank).unwrap();
        assert_eq!(engine.indexed_blocks().await.len(), blocks, "rank {rank}");
    }
    assert_eq!(by_rank(&sim, "prompt_tokens_total").await, [0.0, 128.0, 64.0]);
    let reset = ask(&sim, "/reset_prefix_cache", None, &json!({})).await;
    assert_eq!(reset.body(), r#"{"success":true}"#);
    assert_eq!(cached(&sim, Some("2"), &prompt).await, 0);
    let stats = get(sim.address(), "/sim/stats").await.json();
    assert_eq!((&stats["total_requests"], stats["requests"].as_array().unwrap().len()), (&json!(4), 4));
}

#[tokio::test]
async fn a_rank_that_is_not_there_is_refused_in_the_routes_own_words() {
    let sim = start(ranked()).await;
    let body = json!({"prompt": "x", "max_tokens": 1});
    for rank in ["3", "-1", "99999999999"] {
        let reply = ask(&sim, "/v1/completions", Some(rank), &body).await;
        assert_eq!(reply.status(), 400, "{rank}");
        let says = format!("data_parallel_rank {rank} is out of range [0, 3).");
        assert_eq!(reply.json()["error"]["message"], says);
    }
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "model": "tiny"});
    let reply = ask(&sim, "/v1/messages", Some("3"), &body).await;
    assert_eq!((reply.status(), &reply.json()["type"]), (400, &json!("error")));
    // What is no number is none.
    assert_eq!(ask(&sim, "/v1/chat/completions", Some("first"), &body).await.status(), 200);
    let alone = start(quick()).await;
    assert_eq!(ask(&alone, "/v1/chat/completions", Some("1"), &body).await.status(), 400);
    assert_eq!(ask(&alone, "/v1/chat/completions", Some("0"), &body).await.status(), 200);
}

/// Connections with an answer to come that is long; each of them is with its engine.
async fn long_answers(sim: &Simulator, ranks: &[Option<&str>]) -> Vec<TcpStream> {
    let long = json!({"prompt": "a long answer", "max_tokens": 2000, "stream": true}).to_string();
    let mut open = Vec::new();
    for rank in ranks {
        let header = rank.map(|rank| ("x-data-parallel-rank", rank));
        let headers: Vec<_> = header.into_iter().collect();
        let request = crate::support::request_bytes("POST", "/v1/completions", &headers, &long);
        let mut stream = TcpStream::connect(sim.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        // Its head is there when the engine has it.
        stream.read_u8().await.unwrap();
        open.push(stream);
    }
    open
}

#[tokio::test]
async fn requests_that_name_no_rank_are_shared_out_to_the_least_busy() {
    let mut args = ranked();
    args.instant = false;
    args.max_running = 2;
    let sim = start(args).await;
    let _open = long_answers(&sim, &[Some("0"), Some("0"), Some("0"), None, None, None, None]).await;
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    while by_rank(&sim, "num_requests_running").await != [2.0, 2.0, 2.0] {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", by_rank(&sim, "num_requests_running").await);
        tokio::task::yield_now().await;
    }
    assert_eq!(by_rank(&sim, "num_requests_waiting").await, [1.0, 0.0, 0.0]);
}

#[tokio::test]
async fn each_rank_says_where_its_events_are_and_of_which_rank_they_are() {
    let sim = start(ranked()).await;
    let sources = get(sim.address(), "/kv_event_sources").await.json();
    let sources = sources.as_object().unwrap();
    assert_eq!(sources.keys().collect::<Vec<_>>(), ["0", "1", "2"]);
    for (engine, source) in sim.ranks().iter().zip(sources.values()) {
        let publisher = engine.kv_publisher().unwrap();
        assert_eq!(source["endpoint"], publisher.endpoint().to_string());
        assert_eq!(source["replay_endpoint"], publisher.replay_endpoint().unwrap().to_string());
    }
    // Given ports count up.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let base = free.min(60_000);
    let mut args = ranked();
    let config = json!({"enable_kv_cache_events": true, "endpoint": format!("tcp://127.0.0.1:{base}")});
    let connecting = KvEventsConfig::parse(&config.to_string()).unwrap();
    args.kv_events_config = Some(connecting);
    let sim = start(args).await;
    let ports: Vec<String> =
        sim.ranks().iter().map(|engine| engine.kv_publisher().unwrap().endpoint().to_string()).collect();
    assert_eq!(ports, [0, 1, 2].map(|rank| format!("tcp://127.0.0.1:{}", base + rank)));
}

#[tokio::test]
async fn each_rank_publishes_its_own_load_with_its_number() {
    let mut args = ranked();
    (args.instant, args.max_running) = (false, 2);
    args.load_publish_endpoint = Some(Endpoint::parse("tcp://*:0").unwrap());
    let sim = start(args).await;
    let feed = |endpoint: &Endpoint| LoadFeed::spawn(endpoint.clone(), LOAD_TOPIC, Arc::new(AnyAddress));
    let feeds: Vec<_> = sim.load_endpoints().map(feed).collect();
    assert_eq!(feeds.len(), 3);
    let _open = long_answers(&sim, &[Some("1"), Some("1"), Some("1"), Some("2")]).await;
    for (mut feed, (rank, expected)) in feeds.into_iter().zip((0..).zip([(0, 0), (2, 1), (1, 0)])) {
        let said = async {
            loop {
                let stat = feed.changed().await;
                if let Some(stat) = stat.filter(|stat| (stat.running, stat.waiting) == expected) {
                    break stat.rank;
                }
            }
        };
        let limit = std::time::Duration::from_secs(20);
        assert_eq!(tokio::time::timeout(limit, said).await.unwrap(), Some(rank), "{expected:?}");
    }
}

#[tokio::test]
async fn ranks_that_nobody_could_find_are_refused_with_the_remedy() {
    let mut args = ranked();
    args.kv_events_format = EventFormat::Sglang;
    let error = Simulator::start(args).await.err().unwrap().to_string();
    assert!(error.contains("port") && error.contains("--kv-events-config"), "{error}");
    let mut args = ranked();
    let config = json!({"enable_kv_cache_events": true, "endpoint": "tcp://*:65534"});
    args.kv_events_config = Some(KvEventsConfig::parse(&config.to_string()).unwrap());
    let error = format!("{:#}", Simulator::start(args).await.err().unwrap());
    assert!(error.contains("rank 2"), "{error}");
}

#[tokio::test]
async fn an_sglang_is_told_the_rank_as_each_of_its_routes_reads_it() {
    let mut args = quick();
    (args.dp, args.kv_events_format) = (3, EventFormat::Sglang);
    let sim = start(args).await;
    let prompts = async || {
        let loads: Vec<u64> = sim.ranks().iter().map(|engine| engine.stats.prompt_tokens.get()).collect();
        loads
    };
    let native =
        json!({"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 1}, "routed_dp_rank": 2});
    for _ in 0..3 {
        // Its own route does not read the header.
        assert_eq!(ask(&sim, "/generate", Some("1"), &native).await.status(), 200);
    }
    assert_eq!(prompts().await, [0, 0, 9]);
    let mut completion = json!({"prompt": [1, 2, 3], "max_tokens": 1, "data_parallel_rank": 1});
    assert_eq!(ask(&sim, "/v1/completions", None, &completion).await.status(), 200);
    assert_eq!(prompts().await, [0, 3, 9]);
    completion["routed_dp_rank"] = json!(7);
    assert_eq!(ask(&sim, "/v1/completions", None, &completion).await.status(), 400);
    // A vLLM reads the header only.
    let vllm = start(ranked()).await;
    for _ in 0..3 {
        assert_eq!(ask(&vllm, "/v1/completions", Some("0"), &completion).await.status(), 200);
    }
    let first = vllm.ranks().first().stats.prompt_tokens.get();
    assert_eq!(first, 9);
}

#[tokio::test]
async fn an_sglang_says_what_it_does_in_its_own_words() {
    use everline::engines::probe::{EngineFacts, parse_load, parse_loads, parse_metrics};
    let mut args = quick();
    (args.dp, args.kv_events_format, args.block_size, args.blocks) = (2, EventFormat::Sglang, 32, 100);
    (args.instant, args.max_running) = (false, 1);
    let silent = start(args.clone()).await;
    assert_eq!(get(silent.address(), "/metrics").await.status(), 404);
    let info = get(silent.address(), "/server_info").await.body();
    let facts = EngineFacts::read(&[None, Some(info), None]);
    assert_eq!((facts.block_size, facts.capacity_blocks, facts.dp_ranks), (Some(32), Some(200), Some(2)));
    args.enable_metrics = true;
    let sim = start(args).await;
    let body = |rank: u32| json!({"prompt": "a long answer", "max_tokens": 2000, "stream": true, "routed_dp_rank": rank});
    let mut open = Vec::new();
    for rank in [1, 1] {
        let request = crate::support::request_bytes("POST", "/v1/completions", &[], &body(rank).to_string());
        let mut stream = TcpStream::connect(sim.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.read_u8().await.unwrap();
        open.push(stream);
    }
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let page = get(sim.address(), "/metrics").await.body();
        assert!(!page.contains("vllm:"), "{page}");
        let facts = parse_metrics(&page);
        assert_eq!((facts.block_size, facts.capacity_blocks, facts.dp_ranks), (Some(32), Some(200), Some(2)));
        let loads = get(sim.address(), "/v1/loads?include=core").await.body();
        let said = [parse_load(&page).unwrap(), parse_loads(loads.as_bytes()).unwrap()];
        let requests = said
            .each_ref()
            .map(|load| load.by_rank(2).unwrap().iter().map(|r| r.requests).collect::<Vec<_>>());
        if requests == [[0, 2], [0, 2]] {
            break;
        }
        assert!(tokio::time::Instant::now() < deadline, "{requests:?}");
        tokio::task::yield_now().await;
    }
    let vllm = start(quick()).await;
    assert_eq!(get(vllm.address(), "/v1/loads").await.status(), 404);
}
