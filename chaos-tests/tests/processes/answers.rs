//! What an engine without events has generated is known to every replica as soon as it was said:
//! of a conversation's next prompt the router foretells what the engine reports.

use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::fleet::{Builder, Fleet, MODEL};
use chaos_tests::ports::free_address;
use chaos_tests::process::Process;
use chaos_tests::wait::until;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

use super::kv::settled;

/// Tokens in a block of the simulated engines.
const BLOCK: u64 = 16;

const LIMIT: Duration = Duration::from_secs(60);

/// An answer, and what was said of its prompt.
struct Answer {
    text: String,
    ids: Vec<u32>,
    foretold: u64,
    cached: u64,
    /// Tokens of prompt and answer.
    tokens: u64,
}

/// Sends a request and reads its answer, whole or with events.
async fn ask(http: &Http, url: &str, body: &Value) -> Answer {
    let reply = http.post(url, body, LIMIT).await.expect("an answer");
    assert!(reply.status.is_success(), "{}", reply.text());
    let foretold = reply.headers.get("everline-cached-tokens").and_then(|value| value.to_str().ok());
    let foretold = foretold.map_or(0, |text| text.parse().expect("a number"));
    let all = reply.text();
    let events: Vec<Value> = match body["stream"].as_bool() {
        Some(true) => all
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .filter(|data| *data != "[DONE]")
            .map(|data| serde_json::from_str(data).expect("an event"))
            .collect(),
        _ => vec![reply.json().expect("a good answer")],
    };
    let mut answer = Answer { text: String::new(), ids: Vec::new(), foretold, cached: 0, tokens: 0 };
    for event in &events {
        let choice = &event["choices"][0];
        let texts = [&choice["text"], &choice["delta"]["content"], &choice["message"]["content"]];
        texts.into_iter().filter_map(Value::as_str).for_each(|text| answer.text.push_str(text));
        let ids = choice["token_ids"].as_array().into_iter().flatten();
        answer.ids.extend(ids.filter_map(Value::as_u64).map(|id| id as u32));
        if let Some(info) = event["meta_info"].as_object() {
            // Each event of SGLang's own route has all so far.
            let number = |name: &str| info[name].as_u64().expect("a number");
            answer.cached = number("cached_tokens");
            answer.tokens = number("prompt_tokens") + number("completion_tokens");
            let ids = event["output_ids"].as_array().into_iter().flatten();
            answer.ids = ids.filter_map(Value::as_u64).map(|id| id as u32).collect();
        }
        if let Some(total) = event["usage"]["total_tokens"].as_u64() {
            answer.tokens = total;
            answer.cached = event["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        }
    }
    answer
}

/// Every replica foretells what the engine reports, and that is all it has computed before.
fn assert_known(turn: usize, before: u64, answer: &Answer) {
    assert_eq!(answer.foretold, answer.cached, "turn {turn}: foretold, and reported");
    let had = before.saturating_sub(1) / BLOCK * BLOCK;
    assert_eq!(answer.cached, had, "turn {turn}: prompt and answer were {before} tokens");
}

fn fleet_of(mode: &str) -> Builder {
    let config = format!("[[model]]\nname = \"{MODEL}\"\nmode = \"{mode}\"\n");
    Fleet::of(3).engines(2).engine_arg("--instant").set("proxy.policy=kv_cost").config(&config)
}

async fn fleet(mode: &str) -> Fleet {
    fleet_of(mode).start().await
}

fn with_events(body: &mut Value, turn: usize) {
    if turn % 2 == 1 {
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn token_ids_of_an_answer_are_known_to_the_next_replica() {
    let mut rng = StdRng::seed_from_u64(crate::seed());
    let (fleet, http) = (fleet("text").await, Http::pooled());
    let mut prompt: Vec<u32> = Vec::new();
    let mut before = 0;
    for turn in 0..8 {
        prompt.extend((0..rng.random_range(20..60)).map(|_| rng.random_range(300..20_000)));
        let mut body = json!({"model": MODEL, "prompt": prompt, "max_tokens": rng.random_range(1..70),
            "return_token_ids": true});
        with_events(&mut body, turn);
        settled(&fleet).await;
        let answer = ask(&http, &fleet.replicas[turn % 3].http_url("/v1/completions"), &body).await;
        assert_known(turn, before, &answer);
        prompt.extend(&answer.ids);
        before = answer.tokens;
        assert_eq!(before, prompt.len() as u64);
    }
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_of_sglangs_own_route_is_known_to_the_next_replica() {
    let mut rng = StdRng::seed_from_u64(crate::seed());
    let sglang = fleet_of("text").engine_arg("--kv-events-format").engine_arg("sglang");
    let (fleet, http) = (sglang.start().await, Http::pooled());
    let mut prompt: Vec<u32> = Vec::new();
    let mut before = 0;
    for turn in 0..8 {
        prompt.extend((0..rng.random_range(20..60)).map(|_| rng.random_range(300..20_000)));
        // As its clients ask: of the model that is there.
        let mut body =
            json!({"input_ids": prompt, "sampling_params": {"max_new_tokens": rng.random_range(1..70)}});
        body["stream"] = (turn % 2 == 1).into();
        settled(&fleet).await;
        let answer = ask(&http, &fleet.replicas[turn % 3].http_url("/generate"), &body).await;
        assert_known(turn, before, &answer);
        prompt.extend(&answer.ids);
        before = answer.tokens;
        assert_eq!(before, prompt.len() as u64);
    }
    fleet.agree().await;
}

/// An engine of nobody: it answers what any other would.
struct Rehearsal {
    http: Http,
    url: String,
    _process: Process,
}

impl Rehearsal {
    async fn start(fleet: &Fleet) -> Self {
        let address = free_address();
        let args = ["engine-sim", "--listen", &address.to_string(), "--model", MODEL, "--instant"];
        let process = Process::start(&args.map(str::to_owned), &fleet.folder().join("rehearsal.log"));
        let (http, url) = (Http::pooled(), format!("http://{address}"));
        let models = format!("{url}/v1/models");
        until("the rehearsal engine", LIMIT, async || http.get(&models, LIMIT).await).await;
        Self { http, url, _process: process }
    }

    /// Whether the answer's text has the ids that it was generated as. Models keep to that; the
    /// simulated one takes any piece now and then.
    async fn is_ordinary(&self, body: &Value) -> bool {
        let mut body = body.clone();
        body["return_token_ids"] = json!(true);
        body["stream"] = json!(false);
        body.as_object_mut().expect("an object").remove("stream_options");
        let answer = ask(&self.http, &format!("{}/v1/chat/completions", self.url), &body).await;
        let question = json!({"model": MODEL, "prompt": answer.text, "add_special_tokens": false});
        let told = self.http.post(&format!("{}/tokenize", self.url), &question, LIMIT).await;
        let told: Value = told.expect("an answer").json().expect("ids");
        let shown = answer.ids.iter().take_while(|id| **id > 3).count();
        told["tokens"] == json!(answer.ids[..shown])
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_text_of_an_answer_is_known_to_the_next_replica_by_its_token_ids() {
    let mut rng = StdRng::seed_from_u64(crate::seed());
    let (fleet, http) = (fleet("engine").await, Http::pooled());
    let rehearsal = Rehearsal::start(&fleet).await;
    let mut messages: Vec<Value> = Vec::new();
    let (mut before, mut grown) = (0, 0);
    for turn in 0..8 {
        let mut body = loop {
            let words: Vec<String> =
                (0..rng.random_range(9..30)).map(|_| rng.random_range(0..1000).to_string()).collect();
            let said = json!({"role": "user", "content": words.join(" and ")});
            let all: Vec<&Value> = messages.iter().chain([&said]).collect();
            let body = json!({"model": MODEL, "messages": all, "max_tokens": rng.random_range(4..24),
                "temperature": 0});
            if rehearsal.is_ordinary(&body).await {
                messages.push(said);
                break body;
            }
        };
        with_events(&mut body, turn);
        settled(&fleet).await;
        let answer = ask(&http, &fleet.replicas[turn % 3].http_url("/v1/chat/completions"), &body).await;
        assert_known(turn, before, &answer);
        messages.push(json!({"role": "assistant", "content": answer.text}));
        before = answer.tokens;
        grown += usize::from(!answer.text.is_empty());
    }
    assert!(grown > 4, "only {grown} answers had any text");
    fleet.agree().await;
}
