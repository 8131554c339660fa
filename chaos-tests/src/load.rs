//! Clients that ask all the time and check every answer.
//!
//! Engines with equal weights say equal things, so that the right answer to every prompt is
//! known before anything is hurt. A stream counts only when it ends in a `finish_reason` and
//! `[DONE]`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::client::{Http, Reply};
use crate::figures::Figures;
use crate::fleet::MODEL;

/// How long one answer may take.
const LIMIT: Duration = Duration::from_secs(60);
const PROMPTS: [&str; 4] = ["why is the sea salt", "tell a story", "count the stars", "naïve café 日本"];

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    /// `/v1/chat/completions`, else `/v1/completions`.
    pub chat: bool,
    /// As events.
    pub stream: bool,
}

/// All four kinds.
pub const KINDS: [Kind; 4] = [
    Kind { chat: false, stream: false },
    Kind { chat: false, stream: true },
    Kind { chat: true, stream: false },
    Kind { chat: true, stream: true },
];

impl Kind {
    fn path(self) -> &'static str {
        if self.chat { "/v1/chat/completions" } else { "/v1/completions" }
    }

    fn body(self, model: &str, prompt: &str, tokens: u32) -> Value {
        let mut body = json!({"model": model, "max_tokens": tokens, "stream": self.stream});
        match self.chat {
            true => body["messages"] = json!([{"role": "user", "content": prompt}]),
            false => body["prompt"] = json!(prompt),
        }
        body
    }

    fn text(self, choice: &Value) -> Option<&str> {
        match (self.chat, self.stream) {
            (false, _) => choice["text"].as_str(),
            (true, false) => choice["message"]["content"].as_str(),
            (true, true) => choice["delta"]["content"].as_str(),
        }
    }

    /// The text of a complete answer.
    fn read(self, reply: &Reply) -> Result<String, String> {
        if reply.status != http::StatusCode::OK {
            return Err(format!("{}: {}", reply.status, reply.text()));
        }
        if !self.stream {
            let whole: Value = reply.json()?;
            let text = self.text(&whole["choices"][0]);
            return text.map(str::to_owned).ok_or_else(|| format!("no text in {whole}"));
        }
        let all = reply.text();
        let (mut text, mut finished, mut done) = (String::new(), false, false);
        for data in all.lines().filter_map(|line| line.strip_prefix("data: ")) {
            if done {
                return Err("something follows [DONE]".to_owned());
            }
            if data == "[DONE]" {
                done = true;
                continue;
            }
            let event: Value = serde_json::from_str(data).map_err(|e| format!("{e} in {data:?}"))?;
            if event.get("error").is_some() {
                return Err(data.to_owned());
            }
            let choice = &event["choices"][0];
            text.push_str(self.text(choice).unwrap_or_default());
            finished |= choice["finish_reason"].is_string();
        }
        if finished && done { Ok(text) } else { Err(format!("the stream ended early, after {text:?}")) }
    }
}

/// Asks once; the text of the whole answer.
pub async fn ask(http: &Http, base: &str, kind: Kind, prompt: &str, tokens: u32) -> Result<String, String> {
    ask_model(http, base, MODEL, kind, prompt, tokens).await
}

/// [`ask`] for another model than the fleets'.
pub async fn ask_model(
    http: &Http,
    base: &str,
    model: &str,
    kind: Kind,
    prompt: &str,
    tokens: u32,
) -> Result<String, String> {
    let url = format!("{base}{}", kind.path());
    kind.read(&http.post(&url, &kind.body(model, prompt, tokens), LIMIT).await?)
}

/// The right answers.
#[derive(Clone, Debug)]
pub struct Answers {
    tokens: u32,
    texts: Arc<BTreeMap<(bool, usize), String>>,
}

impl Answers {
    /// Asks an engine, or whoever else is to be believed, for all of them.
    pub async fn of(base: &str, tokens: u32) -> Self {
        let http = Http::pooled();
        let mut texts = BTreeMap::new();
        for chat in [false, true] {
            for (at, prompt) in PROMPTS.iter().enumerate() {
                let kind = Kind { chat, stream: false };
                let text = ask(&http, base, kind, prompt, tokens).await.expect("a reference answer");
                assert!(!text.is_empty(), "an empty answer proves nothing");
                texts.insert((chat, at), text);
            }
        }
        Self { tokens, texts: Arc::new(texts) }
    }

    /// Asks for one of them and compares.
    pub async fn check(&self, http: &Http, base: &str, kind: Kind, prompt: usize) -> Result<(), String> {
        let at = prompt % PROMPTS.len();
        let text = ask(http, base, kind, PROMPTS[at], self.tokens).await?;
        let right = &self.texts[&(kind.chat, at)];
        if text == *right { Ok(()) } else { Err(format!("WRONG: {text:?} instead of {right:?}")) }
    }
}

/// One request's fate.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Whom it was sent to.
    pub target: String,
    /// What it was.
    pub kind: Kind,
    /// When it was sent.
    pub sent: Instant,
    /// How long it took.
    pub took: Duration,
    /// What was wrong, if anything.
    pub result: Result<(), String>,
}

/// Running clients.
#[derive(Debug)]
pub struct Load {
    stop: watch::Sender<bool>,
    clients: JoinSet<Vec<Outcome>>,
}

impl Load {
    /// `clients` tasks that ask the targets in turn until they are told to stop. With
    /// `keep_connections` each client keeps its own.
    pub fn start(
        targets: &[String],
        clients: usize,
        answers: &Answers,
        seed: u64,
        keep_connections: bool,
    ) -> Self {
        println!("load: {clients} clients, seed {seed}");
        let (stop, stopped) = watch::channel(false);
        let mut set = JoinSet::new();
        for client in 0..clients {
            let (targets, answers, stopped) = (targets.to_vec(), answers.clone(), stopped.clone());
            let mut rng = SmallRng::seed_from_u64(seed.wrapping_add(client as u64));
            let http = if keep_connections { Http::pooled() } else { Http::fresh() };
            set.spawn(async move {
                let mut outcomes = Vec::new();
                for n in client.. {
                    if *stopped.borrow() {
                        break;
                    }
                    let kind = KINDS[rng.random_range(0..KINDS.len())];
                    let (prompt, target) =
                        (rng.random_range(0..PROMPTS.len()), targets[n % targets.len()].clone());
                    let sent = Instant::now();
                    let result = answers.check(&http, &target, kind, prompt).await;
                    let is_failure = result.is_err();
                    outcomes.push(Outcome { target, kind, sent, took: sent.elapsed(), result });
                    if is_failure {
                        // Whoever is refused at once must not ask a thousand times a second.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                outcomes
            });
        }
        Self { stop, clients: set }
    }

    /// Lets every client finish what it is at.
    pub async fn stop(mut self) -> Report {
        // Nobody listens when there are no clients.
        let _ = self.stop.send(true);
        let mut outcomes = Vec::new();
        while let Some(done) = self.clients.join_next().await {
            outcomes.extend(done.expect("a client does not panic"));
        }
        Report(outcomes)
    }
}

/// What became of all requests.
#[derive(Clone, Debug)]
pub struct Report(pub Vec<Outcome>);

impl Report {
    /// The failed ones.
    pub fn failures(&self) -> Vec<&Outcome> {
        self.0.iter().filter(|o| o.result.is_err()).collect()
    }

    /// Those whose answer was complete and wrong.
    pub fn wrong(&self) -> Vec<&Outcome> {
        let is_wrong = |o: &&Outcome| o.result.as_ref().is_err_and(|why| why.starts_with("WRONG"));
        self.0.iter().filter(is_wrong).collect()
    }

    /// Times of the good ones.
    pub fn figures(&self) -> Figures {
        let mut figures = Figures::default();
        self.0.iter().filter(|o| o.result.is_ok()).for_each(|o| figures.add(o.took));
        figures
    }

    /// There were enough to mean something, and all were right.
    pub fn assert_all_good(&self, at_least: usize) {
        let failures = self.failures();
        assert!(
            failures.is_empty(),
            "{} of {} failed: {:#?}",
            failures.len(),
            self.0.len(),
            failures.first()
        );
        assert!(self.0.len() >= at_least, "only {} requests were made", self.0.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAMED: Kind = Kind { chat: false, stream: true };

    fn reply(body: &'static str) -> Reply {
        Reply { status: http::StatusCode::OK, headers: Default::default(), body: body.into() }
    }

    #[test]
    fn only_a_whole_stream_counts() {
        const A: &str = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n";
        const B: &str = "data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"stop\"}]}\n\n";
        const DONE: &str = "data: [DONE]\n\n";
        let read = |parts: &[&str]| STREAMED.read(&reply(parts.concat().leak()));
        assert_eq!(read(&[A, B, DONE]).as_deref(), Ok("ab"));
        assert!(read(&[A, B]).is_err(), "no [DONE]");
        assert!(read(&[A, DONE]).is_err(), "no finish_reason");
        assert!(read(&[A, B, DONE, A]).is_err(), "something follows");
        assert!(read(&[A, "data: {\"error\":{}}\n\n", DONE]).is_err(), "an error inside");
    }
}
