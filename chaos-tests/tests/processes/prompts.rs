//! Chats, adapters and salts: what is foretold of prompts that have to be rendered and tokenised, and
//! of equal texts that share nothing, is what the engine reports.

use std::collections::BTreeMap;
use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, MODEL};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

use crate::kv::settled;

/// Longest that one request may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What was foretold and reported, of every kind of request.
#[derive(Default)]
struct Tried {
    /// Requests, and how many of them were foretold exactly.
    requests: BTreeMap<&'static str, (u32, u32)>,
    /// Tokens that were cached.
    cached: BTreeMap<&'static str, u64>,
    wrong: Vec<String>,
}

struct Trial {
    fleet: Fleet,
    http: Http,
    rng: StdRng,
    next: usize,
    tried: Tried,
}

impl Trial {
    fn words(&mut self, count: usize) -> String {
        let words = ["The", "cat", "returns", "value", "of", "Lists", "näive", "42", "default", "class\n"];
        (0..count)
            .map(|_| format!("{} {} ", words[self.rng.random_range(0..10)], self.rng.random_range(0..1000)))
            .collect()
    }

    /// Asks the next replica, and waits until what that did is known everywhere; the cached tokens.
    async fn ask(&mut self, kind: &'static str, path: &str, body: &Value) -> u64 {
        let url = self.fleet.replicas[self.next % 3].http_url(path);
        self.next += 1;
        let reply = self.http.post(&url, body, LIMIT).await.expect("an answer");
        assert!(reply.status.is_success(), "{kind}: {}", reply.text());
        let foretold = reply.headers.get("everline-cached-tokens").and_then(|v| v.to_str().ok());
        let foretold: Option<u64> = foretold.and_then(|text| text.parse().ok());
        let answer: Value = reply.json().expect("JSON");
        let usage = &answer["usage"];
        let details = ["prompt_tokens_details", "input_tokens_details"];
        let detailed = details.iter().find_map(|name| usage[name]["cached_tokens"].as_u64());
        let reported = detailed.or(usage["cache_read_input_tokens"].as_u64()).unwrap_or(0);
        let count = self.tried.requests.entry(kind).or_default();
        count.0 += 1;
        *self.tried.cached.entry(kind).or_default() += reported;
        if foretold == Some(reported) {
            count.1 += 1;
        } else {
            self.tried.wrong.push(format!("{kind}: {foretold:?} foretold, {reported} reported"));
        }
        settled(&self.fleet).await;
        reported
    }

    /// A conversation whose answers come back, with an adapter and a salt or without.
    async fn chat(&mut self, kind: &'static str, model: &str, salt: Option<&str>, system: &str) {
        let mut messages = vec![json!({"role": "system", "content": system})];
        for turn in 0..3 {
            let words = self.words(15);
            let content = if turn == 1 { json!([{"type": "text", "text": words}]) } else { json!(words) };
            messages.push(json!({"role": "user", "content": content}));
            let mut body = json!({"model": model, "messages": messages, "max_tokens": 20});
            if let Some(salt) = salt {
                body["cache_salt"] = salt.into();
            }
            self.ask(kind, "/v1/chat/completions", &body).await;
            let said = self.words(5);
            messages.push(json!({"role": "assistant", "content": said}));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chats_adapters_and_salts_are_foretold_as_the_engine_reports_them() {
    let fleet = Fleet::of(3)
        .engines(3)
        .kv_events()
        .loras(&["ad-one", "ad-two"])
        .tokenizer()
        .engine_arg("--instant")
        .start()
        .await;
    let rng = StdRng::seed_from_u64(crate::seed());
    let mut trial = Trial { fleet, http: Http::pooled(), rng, next: 0, tried: Tried::default() };
    let systems = [trial.words(60), trial.words(60)];
    let kinds = [
        ("a chat", MODEL, None),
        ("a chat with an adapter", "ad-one", None),
        ("a chat with the other adapter", "ad-two", None),
        ("a chat with a salt", MODEL, Some("red")),
        ("a chat with an adapter and a salt", "ad-one", Some("blue")),
    ];
    for round in 0..4 {
        for (kind, model, salt) in kinds {
            let system = systems[round % 2].clone();
            trial.chat(kind, model, salt, &system).await;
        }
    }
    // Equal texts share nothing under another adapter or salt; the second time, everything.
    let text = trial.words(80);
    let mut first = Vec::new();
    for _ in 0..2 {
        for (model, salt) in [
            (MODEL, None),
            (MODEL, Some("red")),
            (MODEL, Some("blue")),
            ("ad-one", None),
            ("ad-one", Some("red")),
            ("ad-two", None),
        ] {
            let mut body = json!({"model": model, "prompt": text, "max_tokens": 2});
            if let Some(salt) = salt {
                body["cache_salt"] = salt.into();
            }
            first.push(trial.ask("a completion", "/v1/completions", &body).await);
        }
    }
    let input = json!([{"role": "user", "content": systems[0]}]);
    for _ in 0..2 {
        let body = json!({"model": "ad-two", "input": input, "max_output_tokens": 2});
        trial.ask("a response", "/v1/responses", &body).await;
    }
    for _ in 0..2 {
        let messages = json!([{"role": "user", "content": systems[1]}]);
        let body = json!({"model": "ad-one", "system": "short", "messages": messages, "max_tokens": 2});
        trial.ask("a message", "/v1/messages", &body).await;
    }
    let Trial { tried, fleet, .. } = trial;
    for (kind, (all, exact)) in &tried.requests {
        println!("{kind}: {exact} of {all} foretold exactly, {} tokens cached", tried.cached[kind]);
    }
    assert!(tried.wrong.is_empty(), "{:#?}", tried.wrong);
    assert!(tried.cached.values().all(|cached| *cached > 0), "{:?}", tried.cached);
    let (new, again) = first.split_at(6);
    assert!(new.iter().all(|cached| *cached == 0), "{new:?}");
    assert!(again.iter().all(|cached| *cached > 80), "{again:?}");
    fleet.agree().await;
}
