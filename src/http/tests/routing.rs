//! What clients and operators hear of a choice, and may say about it.

use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::Semaphore;

use super::support::*;
use crate::cluster::api::ControlPlane as _;
use crate::http::FrontConfig;
use crate::kv::hash::{LocalHash, Seed, local_hashes};
use crate::kv::types::{EngineHash, KvOp, RankIx, Tier};
use crate::routing::policy::by_name;
use crate::state::command::CacheCommand;
use crate::tokens::{Options, Tokenizers};

/// The ids of four blocks and a half.
fn ids() -> Vec<u32> {
    (0..72).collect()
}

/// A front that routes by prefixes, with workers `a` and `b`, of which `b` holds three blocks of
/// [`ids`], the third in the host's memory.
async fn knowing() -> (Running, Vec<SocketAddr>) {
    let tokenizers = Tokenizers::load(Vec::new(), &Options::default(), None).unwrap();
    let config = FrontConfig {
        policy: by_name("kv_cost").unwrap(),
        tokenizers: Some(Arc::new(tokenizers)),
        ..FrontConfig::default()
    };
    let front = start(config);
    let mut addresses = Vec::new();
    for (at, name) in ["a", "b"].into_iter().enumerate() {
        addresses.push(answering(ok("application/json", "{}")).await);
        front.cluster.add(name, addresses[at]);
        front.cluster.worker(name).unwrap().live.set_ranks(vec![RankIx(at as u32)]);
    }
    let blocks = local_hashes(&ids()[..48], 16, Seed::default());
    let name = |at: usize| EngineHash(at as u64 + 1);
    let store = |tier, range: std::ops::Range<usize>| KvOp::Store {
        parent: range.start.checked_sub(1).map(name),
        tier,
        seed: Seed::default(),
        blocks: range.map(|at| (blocks[at], name(at))).collect(),
    };
    let ops = [store(Tier::Gpu, 0..2), store(Tier::Host, 2..3)];
    front.cluster.blocks().index.load().apply(RankIx(1), &ops);
    (front, addresses)
}

fn completion(extra: &Value) -> String {
    let mut body = json!({"model": "m", "prompt": ids()});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body.to_string()
}

async fn send(front: &Running, headers: &str, extra: &Value) -> String {
    exchange(front.address, request("POST", "/v1/completions", headers, &completion(extra))).await
}

#[tokio::test]
async fn an_answer_says_which_worker_it_is_of_and_what_was_cached_there() {
    let (front, _) = knowing().await;
    let answer = send(&front, "", &json!({})).await;
    assert_eq!(header(&answer, "everline-worker"), Some("b"), "{answer}");
    assert_eq!(header(&answer, "everline-cached-tokens"), Some("48"), "{answer}");
    assert_eq!(header(&answer, "everline-overlap-blocks"), Some("3"), "{answer}");
    assert_eq!(header(&answer, "everline-trace"), None, "nobody asked");
    let pinned = send(&front, "everline-worker: a\r\n", &json!({})).await;
    assert_eq!(header(&pinned, "everline-worker"), Some("a"), "{pinned}");
    assert_eq!(header(&pinned, "everline-cached-tokens"), Some("0"), "{pinned}");
}

#[tokio::test]
async fn a_trace_has_the_candidates_best_first_and_is_bounded() {
    let (front, addresses) = knowing().await;
    let answer = send(&front, "everline-trace: 1\r\n", &json!({})).await;
    let trace: Value = serde_json::from_str(header(&answer, "everline-trace").expect(&answer)).unwrap();
    assert_eq!((&trace["policy"], &trace["prompt_tokens"]), (&json!("kv_cost"), &json!(72)), "{trace}");
    assert_eq!((&trace["source"], &trace["more"]), (&json!("ids"), &json!(0)), "{trace}");
    let best = &trace["candidates"][0];
    assert_eq!(best["worker"], "b");
    assert_eq!(best["overlap"], json!({"gpu": 2, "host": 1, "disk": 0}));
    assert_eq!(trace["chosen"], json!({"worker": "b", "rank": 0}));
    assert_eq!(best["not_chosen"], Value::Null);
    let why = trace["candidates"][1]["not_chosen"].as_str().unwrap();
    assert!(why.starts_with("costs ") && why.ends_with(" more than b"), "{why}");
    // 3.3 a block: two whole, and three quarters of one.
    assert_eq!(best["terms"]["credit"], json!(9.075));

    // Ids as long as they may be.
    for n in 0..40 {
        front.cluster.add(&format!("{n:0>128}"), addresses[0]);
    }
    let answer = send(&front, "everline-trace: 1\r\n", &json!({})).await;
    let trace = header(&answer, "everline-trace").expect(&answer);
    assert!(trace.len() <= 8 << 10, "{} bytes", trace.len());
    let trace: Value = serde_json::from_str(trace).unwrap();
    let listed = trace["candidates"].as_array().unwrap().len() as u64;
    assert!((5..=16).contains(&listed), "{listed}");
    assert_eq!(trace["more"], json!(42 - listed));
}

#[tokio::test]
async fn wishes_in_the_body_are_heeded_and_pass_through() {
    let (front, _) = knowing().await;
    let (address, seen) = remembering().await;
    front.cluster.add("c", address);
    let wishes = json!({"everline": {"worker": "c", "trace": true, "overlap_weight": 2}});
    let answer = send(&front, "", &wishes).await;
    assert_eq!(header(&answer, "everline-worker"), Some("c"), "{answer}");
    assert!(header(&answer, "everline-trace").is_some(), "{answer}");
    assert!(seen.lock()[0].ends_with(&completion(&wishes)), "as it came: {}", seen.lock()[0]);
    let answer = send(&front, "everline-worker: a\r\neverline-trace: 0\r\n", &wishes).await;
    assert_eq!(header(&answer, "everline-worker"), Some("a"), "the header counts");
    assert_eq!(header(&answer, "everline-trace"), None);
}

#[tokio::test]
async fn wrong_wishes_are_refused_by_name_on_every_route() {
    let (front, _) = knowing().await;
    let param = |answer: &str| body(answer)["error"]["param"].as_str().map(str::to_owned);
    let answer = send(&front, "everline-temperature: hot\r\n", &json!({})).await;
    assert_eq!((status(&answer), code(&answer).as_str()), (400, "invalid_value"));
    assert_eq!(param(&answer).as_deref(), Some("everline-temperature"));
    for path in ["/v1/completions", "/v1/anything/else"] {
        let wrong = completion(&json!({"everline": {"policy": "best"}}));
        let json = "content-type: application/json\r\n";
        let answer = exchange(front.address, request("POST", path, json, &wrong)).await;
        assert_eq!((status(&answer), code(&answer).as_str()), (400, "invalid_value"), "{path}: {answer}");
        assert_eq!(param(&answer).as_deref(), Some("everline.policy"));
    }
}

async fn explained(admin: SocketAddr, question: &Value) -> Value {
    let answer = exchange(admin, post("/v1/admin/explain", &question.to_string())).await;
    assert_eq!(status(&answer), 200, "{answer}");
    body(&answer)
}

#[tokio::test]
async fn a_choice_is_explained_and_nothing_changes() {
    let (front, _) = knowing().await;
    let admin = admin_of(&front);
    front.cluster.change("a", |record| record.drain = true);
    let question = json!({"route": "/v1/completions", "body": {"model": "m", "prompt": ids()}});
    let reply = explained(admin, &question).await;
    assert_eq!((&reply["policy"], &reply["source"]), (&json!("kv_cost"), &json!("ids")), "{reply}");
    let candidates = reply["candidates"].as_array().unwrap();
    let of =
        |at: usize| (candidates[at]["worker"].as_str().unwrap(), candidates[at]["share"].as_f64().unwrap());
    assert_eq!((of(0), of(1)), (("b", 1.0), ("a", 0.0)), "{reply}");
    assert_eq!(candidates[1]["not_chosen"], "draining");
    assert_eq!(candidates[0]["not_chosen"], Value::Null);
    assert_eq!(candidates[0]["overlap"], json!({"gpu": 2, "host": 1, "disk": 0}));
    assert!(front.cluster.told.lock().is_empty(), "nothing was said to have been sent");
    assert_eq!(front.cluster.worker("b").unwrap().live.load().requests, 0);

    // Both are equal to a policy that does not look at the prompt.
    front.cluster.change("a", |record| record.drain = false);
    let question = json!({"route": "/v1/completions", "headers": {"everline-policy": "round_robin"},
        "body": {"model": "m", "prompt": ids()}});
    for _ in 0..2 {
        let reply = explained(admin, &question).await;
        let shares: Vec<f64> =
            reply["candidates"].as_array().unwrap().iter().map(|c| c["share"].as_f64().unwrap()).collect();
        assert_eq!((shares, &reply["policy"]), (vec![0.5, 0.5], &json!("round_robin")));
    }

    // Nobody left but one that cannot be reached: it is tried all the same.
    front.cluster.change("a", |record| record.online = false);
    let live = Arc::clone(&front.cluster.worker("b").unwrap().live);
    live.unreachable.store(true, std::sync::atomic::Ordering::Relaxed);
    let reply = explained(admin, &question).await;
    assert_eq!((&reply["last_resort"], &reply["candidates"][0]["share"]), (&json!(true), &json!(1.0)));
}

#[tokio::test]
async fn an_explanation_of_nonsense_is_an_error_that_says_what_is_wrong() {
    let (front, _) = knowing().await;
    let admin = admin_of(&front);
    for (question, code_is, param) in [
        (json!({"route": "/v1/models", "body": {}}), "invalid_value", "route"),
        (json!({"route": "/v1/admin/status", "body": {}}), "invalid_value", "route"),
        (json!({"headers": {"a b": "c"}, "body": {"model": "m"}}), "invalid_value", "headers"),
        (
            json!({"headers": {"everline-policy": "x"}, "body": {"model": "m"}}),
            "invalid_value",
            "everline-policy",
        ),
        (json!({"body": {"model": "unknown"}}), "model_not_found", "model"),
        (json!({"body": {"prompt": "x"}}), "missing_model", "model"),
    ] {
        let answer = exchange(admin, post("/v1/admin/explain", &question.to_string())).await;
        assert_eq!(code(&answer), code_is, "{question}: {answer}");
        assert_eq!(body(&answer)["error"]["param"], json!(param), "{question}");
    }
    let answer = exchange(admin, post("/v1/admin/explain", r#"{"prompt": "secret"}"#)).await;
    assert_eq!(status(&answer), 400, "{answer}");
    assert!(!answer.contains("secret"), "{answer}");
}

#[tokio::test]
async fn the_index_is_shown_with_its_counts() {
    let (front, _) = knowing().await;
    let answer = exchange(admin_of(&front), request("GET", "/v1/admin/index", "", "")).await;
    let reply = body(&answer);
    assert_eq!((status(&answer), &reply["name"]), (200, &json!("r1")), "{answer}");
    assert_eq!((&reply["counters"]["blocks"], &reply["counters"]["worker_blocks"]), (&json!(3), &json!(3)));
}

#[tokio::test]
async fn choices_caches_and_feeds_are_counted() {
    use crate::ids::WorkerIx;
    use crate::ingest::FeedCounters;
    use crate::state::ranks::RankKey;
    let (front, _) = knowing().await;
    for headers in ["", "everline-policy: random\r\neverline-trace: 1\r\neverline-worker: b\r\n"] {
        send(&front, headers, &json!({})).await;
    }
    let key = RankKey { worker: WorkerIx(2), rank: 0 };
    let counters = FeedCounters { connected: true, messages: 7, ..FeedCounters::default() };
    let unknown = RankKey { worker: WorkerIx(99), rank: 0 };
    *front.front.feeds.lock() = vec![(unknown, counters.clone()), (key, counters)];
    let text = exchange(front.address, request("GET", "/metrics", "", "")).await;
    for sample in [
        "everline_selections_total{policy=\"kv_cost\"} 1",
        "everline_selections_total{policy=\"random\"} 1",
        "everline_selections_total{policy=\"least_loaded\"} 0",
        "everline_selection_duration_seconds_count 2",
        "everline_prompt_tokens_sum 144.0",
        "everline_prompt_cached_tokens_sum 96.0",
        "everline_index_blocks 3",
        "everline_feed_connected{worker=\"b\",rank=\"0\"} 1",
        "everline_feed_messages_total{worker=\"b\",rank=\"0\"} 7",
        "everline_tokenizer_prompts_total{model=\"_other\",source=\"ids\"} 2",
    ] {
        assert!(text.lines().any(|line| line == sample), "{sample} is missing in\n{text}");
    }
    assert_eq!(text.matches("everline_feed_connected{").count(), 1, "a worker that is gone has no label");
}

/// Waits for a permit before each answer.
async fn slow() -> (SocketAddr, Arc<Semaphore>) {
    let permits = Arc::new(Semaphore::new(0));
    let go = permits.clone();
    let address = worker(move |mut stream| {
        let go = go.clone();
        async move {
            while read_message(&mut stream).await.is_some() {
                go.acquire().await.unwrap().forget();
                let _ = stream.write_all(ok("application/json", "{}").as_bytes()).await;
            }
        }
    })
    .await;
    (address, permits)
}

#[tokio::test]
async fn what_was_sent_is_coming_until_the_answer_begins_or_fails_and_no_more_after_two_turns() {
    let (front, _) = knowing().await;
    let admin = admin_of(&front);
    let (address, permits) = slow().await;
    front.cluster.add("c", address);
    front.cluster.worker("c").unwrap().live.set_ranks(vec![RankIx(2)]);
    let question = json!({"route": "/v1/completions", "headers": {"everline-worker": "c"},
        "body": {"model": "m", "prompt": ids()}});
    let coming = || async {
        let reply = explained(admin, &question).await;
        let candidates = reply["candidates"].as_array().unwrap();
        candidates.iter().find(|c| c["worker"] == "c").unwrap()["coming"].as_u64().unwrap()
    };
    let recent = || &front.cluster.blocks().recent;
    for fails in [false, true] {
        assert_eq!(coming().await, 0);
        let sending = tokio::spawn(exchange(
            front.address,
            request("POST", "/v1/completions", "everline-worker: c\r\n", &completion(&json!({}))),
        ));
        let load = || front.cluster.worker("c").unwrap().live.load().requests;
        eventually("sent", || load() == 1).await;
        assert_eq!(coming().await, 4);
        for _ in 0..4 {
            assert_eq!(recent().turn().len(), 1, "it waits, and the others are told so");
            assert_eq!(coming().await, 4, "however long it takes");
        }
        if fails {
            sending.abort();
            eventually("given up", || load() == 0).await;
        } else {
            permits.add_permits(1);
            assert_eq!(status(&sending.await.unwrap()), 200);
        }
        eventually("freed", || load() == 0).await;
        assert!(recent().turn().is_empty(), "nothing waits");
        recent().turn();
    }
    assert_eq!(coming().await, 0);
}

#[tokio::test]
async fn a_prompt_that_is_asked_again_stays_with_an_engine_that_tells_nothing() {
    let (front, addresses) = knowing().await;
    front.cluster.add("c", addresses[0]);
    front.cluster.change("c", |record| record.spec.capacity_blocks = Some(6));
    let live = front.cluster.worker("c").unwrap().live.clone();
    live.set_ranks(vec![RankIx(2)]);
    live.set_reckoned(true);
    // As the state would on every replica.
    let apply = || {
        let told = std::mem::take(&mut *front.cluster.told.lock());
        let index = front.cluster.blocks().index.load();
        let routed = told.iter().filter_map(|command| match command {
            CacheCommand::Routed { seed, locals, capacity: Some(capacity), .. } => {
                let hashes = locals.as_chunks::<8>().0.iter();
                let hashes: Vec<LocalHash> = hashes.map(|b| LocalHash(u64::from_le_bytes(*b))).collect();
                Some(index.predict(RankIx(2), *seed, &hashes, *capacity))
            }
            _ => None,
        });
        routed.count()
    };
    let ids = |from: u32| (from..from + 48).collect::<Vec<u32>>();
    let ask_for = async |prompt: Value| {
        let body = json!({"model": "m", "prompt": prompt});
        let asked = request("POST", "/v1/completions", "everline-worker: c\r\n", &body.to_string());
        let answer = exchange(front.address, asked).await;
        (header(&answer, "everline-cached-tokens").map(str::to_owned), apply())
    };
    let ask = async |from: u32| ask_for(json!(ids(from))).await;
    let (hit, miss) = (Some("32".to_owned()), Some("0".to_owned()));
    assert_eq!(ask(1000).await, (miss.clone(), 1));
    assert_eq!(ask(2000).await, (miss.clone(), 1), "the cache is full of these two");
    assert_eq!(ask(1000).await, (hit.clone(), 0), "that it was used was said in this turn");
    front.cluster.blocks().recent.turn();
    assert_eq!(ask(1000).await, (hit.clone(), 1), "and is said again in the next");
    assert_eq!(ask(3000).await, (miss.clone(), 1), "the other one, used less lately, goes");
    assert_eq!(ask(1000).await.0, hit);
    assert_eq!(ask(2000).await.0, miss);

    // Of several prompts in one request it has all.
    let batch = json!([ids(4000), ids(5000)]);
    assert_eq!(ask_for(batch.clone()).await, (miss, 2));
    assert_eq!(ask_for(batch).await, (hit.clone(), 0), "all is known already");
    for from in [4000, 5000] {
        assert_eq!(ask(from).await, (hit.clone(), 0));
    }
}

#[tokio::test]
async fn of_several_prompts_no_more_is_foretold_than_the_one_that_is_known_can_have() {
    let (front, _) = knowing().await;
    let prompts = |first: u32| json!([(0..first).collect::<Vec<u32>>(), (500..520).collect::<Vec<u32>>()]);
    for (length, cached) in [(32, "16"), (48, "32"), (49, "48"), (60, "48")] {
        let answer = send(&front, "everline-worker: b\r\n", &json!({"prompt": prompts(length)})).await;
        assert_eq!(header(&answer, "everline-cached-tokens"), Some(cached), "{length}: {answer}");
    }
}

#[tokio::test]
async fn an_explanation_says_of_every_policy_why_another_one_is_chosen() {
    let (front, _) = knowing().await;
    let admin = admin_of(&front);
    for (policy, why) in [
        ("kv_cost", " more than b"),
        ("cache_aware", "holds 48 tokens of the prompt fewer than b"),
        ("least_loaded", "blocks of work more than b"),
    ] {
        let _booked = (policy == "least_loaded").then(|| {
            let worker = front.cluster.worker("a").unwrap();
            front.cluster.bookings().book(worker, 160, 10)
        });
        let question = json!({"route": "/v1/completions", "headers": {"everline-policy": policy},
            "body": {"model": "m", "prompt": ids()}});
        let reply = explained(admin, &question).await;
        let candidates = reply["candidates"].as_array().unwrap();
        assert_eq!((&candidates[0]["worker"], &candidates[0]["not_chosen"]), (&json!("b"), &Value::Null));
        let told = candidates[1]["not_chosen"].as_str().unwrap_or_default();
        assert!(told.contains(why), "{policy}: {told:?}");
    }
}
