//! Two real vLLMs that share requests: do they say what one of them says alone? Only where a vLLM with
//! NIXL is installed, see `chaos-tests/real-engine/`.

use std::time::Duration;

use chaos_tests::client::{Http, Reply};
use chaos_tests::fleet::Fleet;
use chaos_tests::streams::{Manner, Question, read};
use chaos_tests::vllm::{Events, MODEL, Vllm, has_nixl, installed};
use chaos_tests::wait::until;
use everline::admin_types::RegisterRequest;
use everline::state::worker::WorkerRole;
use serde_json::{Value, json};

/// How long anything but an engine's start may take: the first transfer has the engine compile what copies
/// blocks.
const LIMIT: Duration = Duration::from_secs(300);

fn questions() -> Vec<Question> {
    let ids: Vec<u32> = (0..300).map(|at| 1 + at * 7 % 250).collect();
    let words = "the rain in spain stays mainly in the plain. ".repeat(6);
    let chat = json!({"messages": [{"role": "user", "content": words}], "max_completion_tokens": 60});
    let logprobs = json!({"prompt": words, "max_tokens": 40, "logprobs": 2, "min_tokens": 10});
    let all = [
        ("/v1/completions", json!({"prompt": ids, "max_tokens": 80})),
        ("/v1/completions", json!({"prompt": words, "max_tokens": 80, "ignore_eos": true})),
        ("/v1/chat/completions", chat),
        ("/v1/completions", logprobs),
    ];
    let question = |(path, mut body): (&'static str, Value)| {
        (body["model"], body["temperature"]) = (json!(MODEL), json!(0));
        Question { path, body }
    };
    all.into_iter().map(question).collect()
}

fn text(reply: &Reply) -> String {
    let answer: Value = reply.json().expect("JSON");
    let choice = &answer["choices"][0];
    let text = choice["text"].as_str().or(choice["message"]["content"].as_str());
    text.unwrap_or_else(|| panic!("{answer}")).to_owned()
}

/// Tokens of prompts that an engine got from another one.
async fn fetched(http: &Http, engine: &Vllm) -> f64 {
    let page = http.get(&engine.url("/metrics"), LIMIT).await.expect("metrics").text();
    let lines = page.lines().filter(|line| line.starts_with("vllm:prompt_tokens_by_source_total"));
    let lines = lines.filter(|line| line.contains("external_kv_transfer"));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_real_engines_say_together_what_one_says() {
    let Some(installed) = installed().filter(|installed| has_nixl(installed)) else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut engines =
        ["p", "d"].map(|id| Vllm::new(id, &installed, folder.path(), 256, &Events::File).shares());
    engines.iter_mut().for_each(Vllm::start);
    for engine in &mut engines {
        engine.ready().await;
    }
    let fleet = Fleet::of(3).start().await;
    for (engine, role) in engines.iter().zip([WorkerRole::Prefill, WorkerRole::Decode]) {
        let mut request = RegisterRequest::new(engine.url(""));
        (request.id, request.role) = (Some(engine.id.clone()), Some(role));
        until("it is registered", LIMIT, async || {
            fleet.replicas[0].add_worker(&request, LIMIT).await?.json::<Value>()
        })
        .await;
    }
    let http = Http::fresh();
    let mut alone = Vec::new();
    for question in questions() {
        let reply =
            http.post(&engines[0].url(question.path), &question.body, LIMIT).await.expect("an answer");
        alone.push(text(&reply));
        // What one engine has cached it does not fetch: the other one begins with nothing.
        http.post(&engines[0].url("/reset_prefix_cache"), &json!({}), LIMIT).await.expect("it is reset");
    }
    let mut before = fetched(&http, &engines[1]).await;
    for (at, (question, wanted)) in questions().iter().zip(&alone).enumerate() {
        let url = fleet.replicas[at % 3].http_url(question.path);
        let reply = http.post(&url, &question.body, LIMIT).await.expect("an answer");
        assert_eq!(text(&reply), *wanted, "{}", question.body);
        let header =
            |name: &str| reply.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        assert_eq!(header("everline-prefill-worker").as_deref(), Some("p"));
        assert_eq!(header("everline-worker").as_deref(), Some("d"));
        let after = fetched(&http, &engines[1]).await;
        assert!(after > before, "nothing was fetched: {}", question.body);
        before = after;
        http.post(&engines[1].url("/reset_prefix_cache"), &json!({}), LIMIT).await.expect("it is reset");
    }
    for (question, wanted) in questions().iter().zip(&alone) {
        let mut question = question.clone();
        question.body["stream"] = json!(true);
        let base = format!("http://{}", fleet.balancer);
        let heard = read(&base, &question, Manner::Get).await.expect("nobody is hurt");
        assert_eq!(&heard.said.choices[&0].text, wanted, "{}", question.body);
        assert!(heard.worker.is_none_or(|worker| worker == "d"), "{}", question.body);
    }
}
