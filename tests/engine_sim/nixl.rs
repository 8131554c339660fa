//! vLLM's prefill and decode by NIXL: two simulated engines, and who stands between them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use everline::engines::sim::pd::Protocol;
use everline::engines::sim::{EngineSimArgs, Simulator};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::{Reply, Shape, call, get, post, quick, start};

pub(crate) fn engine() -> EngineSimArgs {
    let mut args = quick();
    args.pd.protocol = Some(Protocol::VllmNixl);
    args.pd.side_channel_host = "127.0.0.1".into();
    args.pd.side_channel_port = 0;
    args
}

fn prompt() -> Vec<u32> {
    (0..300).map(|at| 300 + at * 7).collect()
}

fn body(prompt: &[u32], max_tokens: u32) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0})
}

/// What the prefill engine says for the decode engine.
async fn prefill(engine: SocketAddr, prompt: &[u32]) -> Value {
    let reply = prefilled(engine, prompt).await;
    assert_eq!(reply.status(), 200, "{}", reply.body());
    reply.json()["kv_transfer_params"].clone()
}

async fn prefilled(engine: SocketAddr, prompt: &[u32]) -> Reply {
    let mut body = body(prompt, 1);
    body["kv_transfer_params"] = json!({"do_remote_decode": true, "do_remote_prefill": false});
    post(engine, "/v1/completions", body).await
}

async fn decode(engine: SocketAddr, prompt: &[u32], params: &Value) -> Reply {
    let mut body = body(prompt, 40);
    body["kv_transfer_params"] = params.clone();
    post(engine, "/v1/completions", body).await
}

fn text(reply: &Reply) -> String {
    assert_eq!(reply.status(), 200, "{}", reply.body());
    reply.json()["choices"][0]["text"].as_str().unwrap().to_owned()
}

async fn metric(engine: SocketAddr, name: &str) -> f64 {
    let page = get(engine, "/metrics").await.body();
    let line = page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Waits until a metric has this value.
async fn becomes(engine: SocketAddr, name: &str, value: f64) {
    let until = Instant::now() + Duration::from_secs(20);
    while metric(engine, name).await != value {
        assert!(Instant::now() < until, "{name} is {}", metric(engine, name).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What one engine says to it alone.
async fn aggregated(prompt: &[u32]) -> String {
    let sim = start(quick()).await;
    text(&post(sim.address(), "/v1/completions", body(prompt, 40)).await)
}

async fn blocks(sim: &Simulator) -> Vec<u64> {
    sim.engine().indexed_blocks().await
}

#[tokio::test]
async fn a_prompt_computed_there_and_gone_on_with_here_says_what_one_engine_says() {
    let (p, d) = (start(engine()).await, start(engine()).await);
    let reply = prefilled(p.address(), &prompt()).await;
    let params = reply.json()["kv_transfer_params"].clone();
    let recorded = r#"{"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,
        "remote_block_ids":[[1]],"remote_engine_id":"u","remote_request_id":"cmpl-x-0-9c3a8dac","remote_host":"h",
        "remote_port":1,"tp_size":1,"dcp_size":1,"pp_size":1,"remote_num_tokens":300,
        "remote_blocks_expiry_time":null,"transfer_mode":"pull","remote_prefill_cached_tokens":0},
        "ec_transfer_params":null,"metrics":null}"#;
    let told = format!("{{{}", &reply.body()[reply.body().find("\"kv_transfer_params").unwrap()..]);
    assert_eq!(Shape::of(&told), Shape::of(recorded));
    assert_eq!(params["remote_block_ids"][0].as_array().unwrap().len(), 19);
    assert_eq!(params["remote_num_tokens"], 300);
    // The blocks are kept until they were fetched.
    assert!(metric(p.address(), "vllm:kv_cache_usage_perc").await > 0.0);
    let reply = decode(d.address(), &prompt(), &params).await;
    assert_eq!(text(&reply), aggregated(&prompt()).await);
    assert_eq!(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "the prefill engine's");
    assert_eq!(reply.json()["kv_transfer_params"], Value::Null);
    becomes(p.address(), "vllm:kv_cache_usage_perc", 0.0).await;
    let address = d.address();
    let source = |source| {
        let name = format!(
            "vllm:prompt_tokens_by_source_total{{engine=\"0\",model_name=\"tiny\",source=\"{source}\"}}"
        );
        async move { metric(address, &name).await }
    };
    assert_eq!(source("external_kv_transfer").await, 300.0);
    assert_eq!((source("local_compute").await, source("local_cache_hit").await), (1.0, 0.0));
    assert_eq!(metric(p.address(), "vllm:nixl_num_kv_expired_reqs_total").await, 0.0);
    // Both have announced the prompt's blocks; the decode engine those of the text, too.
    let (there, here) = (blocks(&p).await, blocks(&d).await);
    assert_eq!(there.len(), 300 / 16);
    assert!(there.iter().all(|block| here.contains(block)) && here.len() > there.len());
}

#[tokio::test]
async fn chats_and_streams_are_handed_over_too_and_only_what_is_missing_is_fetched() {
    let (p, d) = (start(engine()).await, start(engine()).await);
    let question = |words: &str| json!([{"role": "user", "content": "a long story about nothing at all ".repeat(9) + words}]);
    for (round, words) in ["one", "two"].iter().enumerate() {
        let mut asked = json!({"messages": question(words), "max_tokens": 1, "max_completion_tokens": 1,
            "kv_transfer_params": {"do_remote_decode": true}});
        let first = post(p.address(), "/v1/chat/completions", asked.clone()).await.json();
        asked["kv_transfer_params"] = first["kv_transfer_params"].clone();
        asked["max_tokens"] = 30.into();
        asked["max_completion_tokens"] = 30.into();
        asked["stream"] = true.into();
        let said: String = post(d.address(), "/v1/chat/completions", asked.clone())
            .await
            .events()
            .iter()
            .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
            .collect();
        let alone = start(quick()).await;
        (asked["stream"], asked["kv_transfer_params"]) = (false.into(), Value::Null);
        let whole = post(alone.address(), "/v1/chat/completions", asked).await.json();
        assert_eq!(whole["choices"][0]["message"]["content"], said.as_str(), "{round}");
    }
    let all = metric(d.address(), "vllm:prompt_tokens_total").await;
    let fetched = metric(d.address(), "vllm:external_prefix_cache_hits_total").await;
    let hits = metric(d.address(), "vllm:prefix_cache_hits_total").await;
    assert!(hits > 0.0 && fetched + hits == all, "{fetched} + {hits} of {all}");
}

#[tokio::test]
async fn parameters_used_again_once_the_blocks_hold_something_else_give_another_text_and_no_error() {
    let mut args = engine();
    args.blocks = 24;
    let (p, d, other) = (start(args).await, start(engine()).await, start(engine()).await);
    let right = aggregated(&prompt()).await;
    let params = prefill(p.address(), &prompt()).await;
    assert_eq!(text(&decode(d.address(), &prompt(), &params).await), right);
    becomes(p.address(), "vllm:kv_cache_usage_perc", 0.0).await;
    // Freed, but still as they were.
    assert_eq!(text(&decode(other.address(), &prompt(), &params).await), right);
    let others: Vec<u32> = (0..350).map(|at| 900 + at).collect();
    text(&post(p.address(), "/v1/completions", body(&others, 1)).await);
    let third = start(engine()).await;
    let wrong = decode(third.address(), &prompt(), &params).await;
    assert_ne!(text(&wrong), right);
    assert!(text(&wrong).len() > 20);
    // What it fetched is in its cache, and no better than it was.
    assert_ne!(text(&post(third.address(), "/v1/completions", body(&prompt(), 40)).await), right);
    // As is what the same one has from before.
    assert_eq!(text(&post(d.address(), "/v1/completions", body(&prompt(), 40)).await), right);
}

#[tokio::test]
async fn an_engine_that_cannot_be_reached_ends_the_stream_with_an_error_before_any_token() {
    let (p, d) = (start(engine()).await, start(engine()).await);
    let params = prefill(p.address(), &prompt()).await;
    drop(p);
    let mut asked = body(&prompt(), 40);
    (asked["kv_transfer_params"], asked["stream"]) = (params.clone(), true.into());
    let before = Instant::now();
    let reply = post(d.address(), "/v1/completions", asked).await;
    let took = before.elapsed();
    assert_eq!(reply.status(), 200);
    let error = "data: {\"error\": {\"message\": \"Internal server error\", \"type\": \"InternalServerError\", \
        \"param\": null, \"code\": 500}}\n\n";
    assert_eq!(reply.chunks, [error, "data: [DONE]\n\n"]);
    assert!((5.0..8.0).contains(&took.as_secs_f64()), "{took:?}");
    assert_eq!(metric(d.address(), "vllm:nixl_num_failed_transfers_total").await, 1.0);
    assert_eq!(metric(d.address(), "vllm:kv_cache_usage_perc").await, 0.0);
    // Where another engine answers in its place, that is known at once.
    let stranger = start(engine()).await;
    let mut elsewhere = params;
    elsewhere["remote_port"] = stranger.engine().desk().unwrap().side_channel_port().into();
    let reply = decode(d.address(), &prompt(), &elsewhere).await;
    assert_eq!(reply.status(), 500);
    let shape = r#"{"error":{"message":"x","type":"InternalServerError","param":null,"code":500}}"#;
    assert_eq!(Shape::of(&reply.body()), Shape::of(shape));
}

#[tokio::test]
async fn blocks_that_nobody_fetches_are_given_up_when_the_lease_ends() {
    let mut args = engine();
    args.pd.kv_lease_seconds = 0.3;
    let p = start(args).await;
    let params = prefill(p.address(), &prompt()).await;
    assert_eq!(metric(p.address(), "vllm:nixl_num_kv_expired_reqs_total").await, 0.0);
    becomes(p.address(), "vllm:nixl_num_kv_expired_reqs_total", 1.0).await;
    becomes(p.address(), "vllm:kv_cache_usage_perc", 0.0).await;
    // Fetched too late, but before anything else came: the real one does not know better either.
    let d = start(engine()).await;
    assert_eq!(text(&decode(d.address(), &prompt(), &params).await), aggregated(&prompt()).await);
}

#[tokio::test]
async fn a_decode_engine_that_is_busy_keeps_the_lease_alive() {
    let (mut prefills, mut decodes) = (engine(), engine());
    (prefills.pd.kv_lease_seconds, decodes.pd.kv_lease_seconds) = (0.6, 0.6);
    (decodes.max_running, decodes.instant, decodes.decode_step_ms) = (1, false, 20.0);
    let (p, d) = (start(prefills).await, start(decodes).await);
    let address = d.address();
    let busy = tokio::spawn(async move { post(address, "/v1/completions", body(&[5, 6, 7], 100)).await });
    becomes(address, "vllm:num_requests_running", 1.0).await;
    let params = prefill(p.address(), &prompt()).await;
    let reply = decode(address, &prompt(), &params).await;
    assert_eq!(text(&reply), aggregated(&prompt()).await);
    assert!(!text(&busy.await.unwrap()).is_empty());
    assert_eq!(metric(p.address(), "vllm:nixl_num_kv_expired_reqs_total").await, 0.0);
}

#[tokio::test]
async fn a_request_with_one_side_only_does_what_it_does_to_the_real_engine() {
    let d = start(engine()).await;
    // Nothing said: it computes the prompt by itself.
    assert_eq!(text(&decode(d.address(), &prompt(), &Value::Null).await), aggregated(&prompt()).await);
    // Blocks, but not where: it waits for ever, and leaves with its client.
    let placeless = json!({"do_remote_prefill": true, "remote_block_ids": [[1, 2]], "remote_engine_id": "x"});
    let others = vec![9; 200];
    let waiting = tokio::time::timeout(Duration::from_millis(300), decode(d.address(), &others, &placeless));
    assert!(waiting.await.is_err());
    becomes(d.address(), "vllm:num_requests_waiting", 0.0).await;
    becomes(d.address(), "vllm:kv_cache_usage_perc", 0.0).await;
    // Neither: an assertion ends the engine's process.
    let reply = decode(d.address(), &others, &json!({"do_remote_prefill": true})).await;
    assert_eq!(reply.status(), 500);
    assert_eq!(get(d.address(), "/health").await.status(), 503);
    // No object at all is the client's fault.
    let fresh = start(engine()).await;
    let reply = decode(fresh.address(), &others, &json!("x")).await;
    assert_eq!(
        (reply.status(), reply.json()["error"]["param"].as_str()),
        (400, Some("body.kv_transfer_params"))
    );
}

#[tokio::test]
async fn one_request_id_twice_at_once_is_two_transfers() {
    let (p, d) = (start(engine()).await, start(engine()).await);
    let (mine, yours) = (prompt(), (0..200).map(|at| 5000 + at).collect::<Vec<u32>>());
    let mut params = Vec::new();
    for prompt in [&mine, &yours] {
        let mut body = body(prompt, 1);
        body["kv_transfer_params"] = json!({"do_remote_decode": true});
        let id = [("x-request-id", "same")];
        let reply = call(p.address(), "POST", "/v1/completions", &id, &body.to_string()).await;
        let told = reply.json()["kv_transfer_params"].clone();
        assert!(told["remote_request_id"].as_str().unwrap().starts_with("cmpl-same-0-"));
        params.push(told);
    }
    let (first, second) =
        tokio::join!(decode(d.address(), &mine, &params[0]), decode(d.address(), &yours, &params[1]));
    assert_eq!(text(&first), aggregated(&mine).await);
    assert_eq!(text(&second), aggregated(&yours).await);
}

#[tokio::test]
async fn an_engine_that_died_gives_nothing_away_and_a_new_one_has_another_name() {
    let (p, d) = (start(engine()).await, start(engine()).await);
    let params = prefill(p.address(), &prompt()).await;
    assert_eq!(text(&decode(d.address(), &prompt(), &params).await), aggregated(&prompt()).await);
    let kept = prefill(p.address(), &prompt()[1..]).await;
    for dead in [true, false] {
        post(p.address(), "/sim/faults", json!({"engine_dead": dead})).await;
    }
    let reply = decode(d.address(), &prompt()[1..], &kept).await;
    assert_eq!(reply.status(), 500, "{}", reply.body());
    let anew = prefill(p.address(), &prompt()[1..]).await;
    assert_ne!(anew["remote_engine_id"], kept["remote_engine_id"]);
    assert_eq!(text(&decode(d.address(), &prompt()[1..], &anew).await), aggregated(&prompt()[1..]).await);
}

#[tokio::test]
async fn a_side_channel_that_is_taken_is_explained() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut args = engine();
    args.pd.side_channel_port = taken.local_addr().unwrap().port();
    let error = Simulator::start(args).await.err().map(|error| format!("{error:#}")).unwrap();
    assert!(error.contains("--side-channel-port"), "{error}");
}

/// Both legs of a push: the decode leg knows the prefill engine, and both have one request id.
fn pushed(p: &Simulator, max_tokens: u32) -> Value {
    let desk = p.engine().desk().unwrap();
    let mut asked = body(&prompt(), max_tokens);
    asked["kv_transfer_params"] = json!({"do_remote_prefill": true, "do_remote_decode": false, "tp_size": 1,
        "remote_engine_id": desk.engine_id(), "remote_host": "127.0.0.1", "remote_port": desk.side_channel_port()});
    asked
}

#[tokio::test]
async fn a_push_goes_to_the_leg_with_the_same_request_id_whichever_comes_first() {
    let mut args = engine();
    args.pd.protocol = Some(Protocol::VllmNixlPush);
    let (p, d) = (start(args.clone()).await, start(args).await);
    let right = aggregated(&prompt()).await;
    let leg = |sim: &Simulator, id: &'static str, body: Value| {
        let address = sim.address();
        async move { call(address, "POST", "/v1/completions", &[("x-request-id", id)], &body.to_string()).await }
    };
    let mut first = body(&prompt(), 1);
    first["kv_transfer_params"] = json!({"do_remote_decode": true});
    let told = leg(&p, "one", first.clone()).await.json()["kv_transfer_params"].clone();
    assert_eq!((&told["transfer_mode"], told.get("dcp_size")), (&json!("push"), None));
    assert_eq!(text(&leg(&d, "one", pushed(&p, 40)).await), right);
    let others = start(engine_like(&d)).await;
    let (early, _) = tokio::join!(leg(&others, "two", pushed(&p, 40)), leg(&p, "two", first));
    assert_eq!(text(&early), right);
    // Nothing is left to write for one that comes again, or by another name.
    let late = start(engine_like(&d)).await;
    for id in ["two", "three"] {
        let waiting = tokio::time::timeout(Duration::from_millis(300), leg(&late, id, pushed(&p, 40)));
        assert!(waiting.await.is_err(), "{id}");
    }
    // What it has to know, and does not.
    let mut asked = pushed(&p, 4);
    asked["kv_transfer_params"]["remote_host"] = Value::Null;
    assert_eq!(leg(&late, "four", asked).await.status(), 500);
}

fn engine_like(sim: &Simulator) -> EngineSimArgs {
    let mut args = sim.engine().args.clone();
    args.listen.set_port(0);
    args
}

#[tokio::test]
async fn mooncakes_legs_meet_by_the_id_of_the_transfer() {
    let mut args = engine();
    args.pd.protocol = Some(Protocol::VllmMooncake);
    args.pd.disaggregation_bootstrap_port = 0;
    args.pd.mooncake_abort_timeout = 1.0;
    let (p, d) = (start(args.clone()).await, start(args).await);
    let bootstrap = SocketAddr::from(([127, 0, 0, 1], p.ranks().bootstrap_port().unwrap()));
    let entries = get(bootstrap, "/query").await.json();
    assert!(entries["0"]["worker_addr"]["0"]["0"].as_str().unwrap().starts_with("tcp://"), "{entries}");
    let take = |id: &str| {
        let mut asked = body(&prompt(), 40);
        asked["kv_transfer_params"] = json!({"do_remote_prefill": true, "do_remote_decode": false, "transfer_id": id,
            "remote_engine_id": entries["0"]["engine_id"], "remote_bootstrap_addr": format!("http://{bootstrap}")});
        post(d.address(), "/v1/completions", asked)
    };
    let give = |id: &str| {
        let mut asked = body(&prompt(), 1);
        asked["kv_transfer_params"] = json!({"do_remote_decode": true, "transfer_id": id});
        post(p.address(), "/v1/completions", asked)
    };
    let (taken, gave) = tokio::join!(take("a"), give("a"));
    assert_eq!(text(&taken), aggregated(&prompt()).await);
    assert_eq!((gave.status(), gave.json()["kv_transfer_params"].clone()), (200, Value::Null));
    // Nobody gives it.
    assert_eq!(post(d.address(), "/reset_prefix_cache", json!({})).await.status(), 200);
    assert_eq!(take("b").await.status(), 500);
    // Nobody takes it.
    assert_eq!(give("c").await.status(), 200);
    becomes(p.address(), "vllm:kv_cache_usage_perc", 0.0).await;
}
