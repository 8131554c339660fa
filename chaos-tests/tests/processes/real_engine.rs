//! Three replicas and three real vLLMs: is what Everline expects to be cached what the engine says
//! was cached? Only where a vLLM is installed, see `chaos-tests/real-engine/`.

use std::fmt;
use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::endpoint::LIMIT;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::ports::free_address;
use chaos_tests::vllm::{Events, MODEL, TOPIC, Vllm, installed};
use chaos_tests::wait::{check, until};
use everline::admin_types::RegisterRequest;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

/// KV blocks of an engine: the least that a prompt of the longest length fits into, and some.
const BLOCKS: u32 = 96;

/// Tokens in a block.
const BLOCK: usize = 32;

/// How long anything may take to be known everywhere; much more than it does.
const SETTLED: Duration = Duration::from_secs(30);

/// One request, and both opinions on it.
struct Seen {
    what: &'static str,
    replica: usize,
    worker: String,
    /// `None` where the prompt was not known.
    expected: Option<usize>,
    cached: usize,
    prompt: usize,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, replica, worker, expected, cached, prompt } = self;
        write!(
            f,
            "{what} by replica {replica} to {worker}: {expected:?} expected, {cached} cached of {prompt}"
        )
    }
}

/// Sends requests, each to another replica than the one before.
struct Trial {
    fleet: Fleet,
    http: Http,
    rng: StdRng,
    /// Replicas that are asked, in turn.
    alive: Vec<usize>,
    next: usize,
    seen: Vec<Seen>,
}

/// An answer, as far as it matters.
struct Answer {
    text: String,
    ids: Vec<u32>,
}

impl Trial {
    async fn start(engines: &[Vllm], model: &str, seed: u64) -> Self {
        let config = format!("[[model]]\nname = \"{MODEL}\"\n{model}\n");
        let mut fleet = Fleet::of(3).config(&config);
        for engine in engines {
            if let Events::Connects(address) = engine.events {
                fleet = fleet.kv_listen(&[address]);
            }
        }
        let fleet = fleet.start().await;
        for engine in engines {
            let mut request = RegisterRequest::new(engine.url(""));
            request.id = Some(engine.id.clone());
            if matches!(engine.events, Events::Connects(_)) {
                let labels = [("kv-events", "hub"), ("kv-topic", TOPIC), ("kv-replay", &engine.replay)];
                request.labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
            }
            let reply = fleet.replicas[0].add_worker(&request, LIMIT).await.expect("an answer");
            assert!(reply.status.is_success(), "{}", reply.text());
        }
        let mut trial = Self {
            fleet,
            http: Http::pooled(),
            rng: StdRng::seed_from_u64(seed),
            alive: vec![0, 1, 2],
            next: 0,
            seen: Vec::new(),
        };
        trial.online(engines).await;
        trial.heard(engines).await;
        trial
    }

    async fn online(&mut self, engines: &[Vllm]) {
        for replica in &self.fleet.replicas {
            until("all engines online", SETTLED, async || {
                let online =
                    replica.local_workers().await?.iter().filter(|w| w.online && w.reachable).count();
                check(online == engines.len(), || format!("{} sees {online}", replica.name))
            })
            .await;
        }
    }

    /// Waits until what each engine tells is heard: blocks of answers, which nothing else tells of.
    async fn heard(&mut self, engines: &[Vllm]) {
        let before = self.seen.len();
        for engine in engines {
            let since = Instant::now();
            loop {
                let ids = self.ids(40);
                let pin = [("everline-worker", engine.id.as_str())];
                let body = json!({"model": MODEL, "prompt": ids, "max_tokens": 70, "ignore_eos": true,
                    "return_token_ids": true});
                let answer = self.ask("ids", "/v1/completions", body, &pin).await;
                let more = [ids, answer.ids].concat();
                let body = json!({"model": MODEL, "prompt": more, "max_tokens": 1});
                self.ask("ids", "/v1/completions", body, &pin).await;
                let last = self.seen.last().expect("one was just sent");
                assert!(last.cached >= 3 * BLOCK, "{last}");
                if last.expected == Some(last.cached) {
                    println!("{} heard {} ms after it was online", engine.id, since.elapsed().as_millis());
                    break;
                }
                assert!(since.elapsed() < SETTLED, "{last}");
            }
        }
        self.seen.truncate(before);
    }

    fn ids(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.rng.random_range(300..1900)).collect()
    }

    /// Waits until nothing moves any more and all replicas have the same.
    async fn settle(&self) {
        let mut last = None;
        until("equal digests that stay", SETTLED, async || {
            let mut now = Vec::new();
            for at in &self.alive {
                let groups = self.fleet.replicas[*at].status().await?.cluster.groups;
                now.push(groups.into_iter().map(|g| (g.applied, g.digest)).collect::<Vec<_>>());
            }
            let same = now.windows(2).all(|pair| pair[0] == pair[1]);
            let quiet = same && last.replace(now.clone()).as_ref() == Some(&now);
            if !quiet {
                tokio::time::sleep(Duration::from_millis(40)).await;
            }
            check(quiet, || format!("{now:?}"))
        })
        .await;
    }

    fn words(&mut self, count: usize) -> String {
        let words =
            ["import", "return", "value", "self", "list", "while", "error", "default", "name", "class"];
        (0..count)
            .map(|_| format!("{} {} ", words[self.rng.random_range(0..10)], self.rng.random_range(0..1000)))
            .collect()
    }

    /// Sends a request to the next replica and waits until what it did is known everywhere.
    async fn ask(
        &mut self,
        what: &'static str,
        route: &str,
        body: Value,
        headers: &[(&str, &str)],
    ) -> Answer {
        let replica = self.alive[self.next % self.alive.len()];
        self.next += 1;
        let url = self.fleet.replicas[replica].http_url(route);
        let reply = self.http.post_with(&url, headers, &body).await.expect("an answer");
        assert!(reply.status.is_success(), "{what}: {} {}", reply.status, reply.text());
        let header = |name: &str| reply.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let (usage, text, ids) = if body["stream"] == true {
            let chunks: Vec<Value> = reply
                .text()
                .lines()
                .filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
                .collect();
            let text = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
            let usage = chunks.iter().rev().find(|c| c["usage"].is_object()).expect("a chunk with usage");
            (usage["usage"].clone(), text, Vec::new())
        } else {
            let reply: Value = reply.json().expect("JSON");
            let choice = &reply["choices"][0];
            let text = choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            let ids = choice["token_ids"].as_array().map(Vec::as_slice).unwrap_or_default();
            let ids = ids.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()).collect();
            (reply["usage"].clone(), text.to_owned(), ids)
        };
        let details = usage["prompt_tokens_details"]
            .get("cached_tokens")
            .or(usage["input_tokens_details"].get("cached_tokens"));
        let number =
            |value: Option<&Value>| value.and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let seen = Seen {
            what,
            replica,
            worker: header("everline-worker").to_owned(),
            expected: header("everline-cached-tokens").parse().ok(),
            cached: number(details).unwrap_or(0),
            prompt: number(usage.get("prompt_tokens").or(usage.get("input_tokens"))).expect("usage"),
        };
        self.seen.push(seen);
        self.settle().await;
        Answer { text, ids }
    }

    async fn chat(&mut self, what: &'static str, messages: &Value, more: Value) -> Answer {
        let mut body = json!({"model": MODEL, "messages": messages, "max_tokens": 48, "temperature": 0});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        self.ask(what, "/v1/chat/completions", body, &[]).await
    }

    /// A conversation of each kind, about one of a few beginnings.
    async fn mix(&mut self, beginnings: &[String]) {
        let pick = |rng: &mut StdRng| beginnings[rng.random_range(0..beginnings.len())].clone();
        // Turns of a conversation; the answer comes back as text.
        let system = pick(&mut self.rng);
        let mut messages = json!([{"role": "system", "content": system}]);
        for turn in 0..3 {
            let words = self.words(12);
            let list = messages.as_array_mut().expect("a list");
            list.push(json!({"role": "user", "content": words}));
            let more = if turn == 1 {
                json!({"stream": true, "stream_options": {"include_usage": true}})
            } else {
                json!({})
            };
            let asked = messages.clone();
            let answer = self.chat("a turn of a chat", &asked, more).await;
            messages
                .as_array_mut()
                .expect("a list")
                .push(json!({"role": "assistant", "content": answer.text}));
        }
        // Tools stand before everything else.
        let tools = json!([{"type": "function", "function": {"name": "look", "description": pick(&mut self.rng),
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}]);
        let question = json!([{"role": "user", "content": [{"type": "text", "text": self.words(6)}]}]);
        self.chat("a chat with tools", &question, json!({"tools": tools, "tool_choice": "none"})).await;
        // Equal texts under different salts share nothing.
        let (text, rest) = (pick(&mut self.rng), self.words(8));
        for salt in [None, Some("red"), Some("blue"), Some("red")] {
            let mut body = json!({"model": MODEL, "prompt": format!("{text}{rest}"), "max_tokens": 4});
            if let Some(salt) = salt {
                body["cache_salt"] = salt.into();
            }
            self.ask("a completion with or without salt", "/v1/completions", body, &[]).await;
        }
        // Ids go on exactly where the engine stopped: its answer's blocks are known from events only.
        let mut ids = self.ids(40);
        for _ in 0..3 {
            let body = json!({"model": MODEL, "prompt": ids, "max_tokens": 70, "temperature": 0,
                "ignore_eos": true, "return_token_ids": true});
            let answer = self.ask("ids that continue an answer", "/v1/completions", body, &[]).await;
            assert_eq!(answer.ids.len(), 70);
            ids.extend(answer.ids);
        }
        let input = json!([{"role": "user", "content": pick(&mut self.rng)}]);
        let body = json!({"model": MODEL, "input": input, "max_output_tokens": 4});
        self.ask("a response", "/v1/responses", body, &[]).await;
    }

    /// Prints what was seen since the last report; at least 99 % must have been expected.
    fn report(&mut self, phase: &str) -> Vec<Seen> {
        let seen = std::mem::take(&mut self.seen);
        let right = seen.iter().filter(|seen| seen.expected == Some(seen.cached)).count();
        let sum = |of: fn(&Seen) -> usize| seen.iter().map(of).sum::<usize>();
        println!(
            "{phase}: {right} of {} requests as expected; {} of {} prompt tokens cached, {} expected",
            seen.len(),
            sum(|s| s.cached),
            sum(|s| s.prompt),
            sum(|s| s.expected.unwrap_or(0)),
        );
        for wrong in seen.iter().filter(|seen| seen.expected != Some(seen.cached)) {
            println!("  not as expected: {wrong}");
        }
        assert!(right * 100 >= seen.len() * 99, "{phase}: too many not as expected");
        assert!(seen.iter().any(|seen| seen.cached > 0), "{phase}: nothing was ever cached");
        seen
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_expected_to_be_cached_is_what_a_real_vllm_has_cached() {
    let Some(installed) = installed() else { return };
    let seed = crate::seed();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut engines =
        [("file", Events::File), ("port", Events::AnyPort), ("connects", Events::Connects(free_address()))]
            .map(|(id, events)| Vllm::new(id, &installed, folder.path(), BLOCKS, &events));
    engines.iter_mut().for_each(Vllm::start);
    for engine in &mut engines {
        let took = engine.ready().await;
        println!("{} well after {:.0} s", engine.id, took.as_secs_f32());
    }

    let directory = format!("directory = \"{}\"", installed.join("tiny-model").display());
    let mut trial = Trial::start(&engines, &directory, seed).await;

    // Few beginnings, which fit.
    let few: Vec<String> = (0..2).map(|_| trial.words(40)).collect();
    for _ in 0..10 {
        trial.mix(&few).await;
    }
    let seen = trial.report("fits");
    for replica in 0..3 {
        assert!(seen.iter().any(|s| s.replica == replica && s.cached > 0), "replica {replica} had no hit");
    }
    for engine in &engines {
        assert!(seen.iter().any(|s| s.worker == engine.id), "{} got nothing", engine.id);
    }
    // The end of the answer before must be among what is cached: 40 ids, and 70 more with each turn.
    let long = seen.iter().filter(|s| s.what.starts_with("ids") && s.prompt == 180);
    assert!(long.clone().count() > 0 && long.clone().all(|s| s.cached >= 110 / BLOCK * BLOCK));

    // More than fits: engines evict, and say so.
    let many: Vec<String> = (0..24).map(|_| trial.words(60)).collect();
    for _ in 0..10 {
        trial.mix(&many).await;
    }
    trial.report("evictions");

    // A cache is emptied behind the cluster's back. The engine says so with its next step only.
    for engine in &engines {
        let reply = Http::fresh().post(&engine.url("/reset_prefix_cache"), &json!({}), LIMIT).await;
        let reply = reply.expect("an answer");
        assert!(reply.status.is_success(), "{}", reply.text());
        let body = json!({"model": MODEL, "prompt": "x", "max_tokens": 1});
        trial.ask("a step", "/v1/completions", body, &[("everline-worker", &engine.id)]).await;
    }
    for text in few.iter().chain(&many[..4]) {
        let body = json!({"model": MODEL, "prompt": text, "max_tokens": 1});
        trial.ask("a prompt after the reset", "/v1/completions", body, &[]).await;
    }
    assert!(trial.seen.iter().all(|s| s.cached == 0), "the reset did nothing");
    for text in few.iter().chain(&many[..4]) {
        let body = json!({"model": MODEL, "prompt": text, "max_tokens": 1});
        trial.ask("a prompt once more", "/v1/completions", body, &[]).await;
    }
    trial.report("reset");

    // A replica comes back from its disk.
    trial.fleet.replicas[1].kill9();
    trial.alive = vec![0, 2];
    trial.mix(&few).await;
    trial.fleet.replicas[1].start();
    ready(&trial.fleet.replicas[1], Duration::from_secs(30)).await;
    trial.alive = vec![1];
    for text in few.iter().chain(&many[..4]) {
        let body = json!({"model": MODEL, "prompt": text, "max_tokens": 1});
        trial.ask("a prompt at the replica that was dead", "/v1/completions", body, &[]).await;
    }
    trial.report("replica restarted");
    trial.alive = vec![0, 1, 2];

    // The engines come back, empty; their numbers begin at 0, nothing says that they are new.
    for engine in &mut engines {
        engine.kill9();
        engine.start();
    }
    for engine in &mut engines {
        engine.ready().await;
    }
    trial.online(&engines).await;
    trial.heard(&engines).await;
    for _ in 0..3 {
        trial.mix(&few).await;
    }
    trial.report("engines restarted");

    // Another cluster, which was told nothing yet and has no tokenizer.
    drop(trial);
    let mut trial = Trial::start(&engines, "mode = \"engine\"", seed + 1).await;
    trial.settle().await;
    for text in &few {
        let body = json!({"model": MODEL, "prompt": text, "max_tokens": 1});
        trial.ask("a prompt that the first cluster sent", "/v1/completions", body, &[]).await;
    }
    for _ in 0..4 {
        trial.mix(&few).await;
    }
    let seen = trial.report("engine mode");
    for engine in &engines {
        assert!(seen.iter().any(|s| s.worker == engine.id && s.cached > 0), "{} had no hit", engine.id);
    }
}
