//! Streams of real vLLMs that are cut in the middle: is what a client reads the same as what the
//! engine says when nobody is hurt? Only where a vLLM is installed, see `chaos-tests/real-engine/`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::streams::{Broken, Heard, Manner, Progress, Question, Reader, Said};
use chaos_tests::vllm::{Events, MODEL, Vllm, installed};
use chaos_tests::wait::{check, until};
use everline::admin_types::RegisterRequest;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// KV blocks of an engine: all streams at once fit.
const BLOCKS: u32 = 512;
/// Tokens of an answer.
const TOKENS: u32 = 240;
/// Tokens of an answer that is cut twice.
const LONG: u32 = 900;
/// How long anything but an engine's start may take; much more than it does.
const SETTLED: Duration = Duration::from_secs(60);
/// How far log probabilities may be apart: what one engine computes token by token the other one
/// computes at once.
const NEAR: f64 = 1e-3;

const PROMPTS: [&str; 6] =
    ["naïve café 日本", "0123456789", "def main(): return 1", "Привет, мир", "a b c d", "rain"];

/// A question, and what is said when nobody is hurt.
struct Known {
    name: String,
    question: Question,
    said: Said,
    /// So many events were there when a part of a character was, and not its end.
    inside: Vec<u64>,
}

/// What came of the cuts of a kind.
#[derive(Default)]
struct Tally {
    streams: u32,
    cut: u32,
    inside: u32,
    pauses: Vec<Duration>,
}

struct Trial {
    fleet: Fleet,
    engines: Vec<Vllm>,
    http: Http,
    known: Vec<Arc<Known>>,
    wrong: Vec<String>,
    tallies: BTreeMap<&'static str, Tally>,
}

/// Questions of all kinds, each with and without what keeps the text to characters of several bytes.
fn questions(letters: &[u64]) -> Vec<(String, Question, bool)> {
    let mut all = Vec::new();
    for at in 0..14_usize {
        let (is_chat, kind) = (at % 2 == 0, at / 2);
        let is_long = kind == 6;
        let stops = matches!(kind, 2 | 3 | 5);
        let mut body = json!({"model": MODEL, "max_tokens": if is_long { LONG } else { TOKENS },
            "stream": true, "temperature": 0});
        let prompt = PROMPTS[at % PROMPTS.len()];
        let mut name = match is_chat {
            true => "chat".to_owned(),
            false => "completion".to_owned(),
        };
        match is_chat {
            true => body["messages"] = json!([{"role": "user", "content": prompt}]),
            false => body["prompt"] = json!(prompt),
        }
        if matches!(kind, 1 | 3 | 5 | 6) {
            body["stream_options"] = json!({"include_usage": true});
            name += ", usage";
        }
        match kind {
            4 | 5 if is_chat => (body["logprobs"], body["top_logprobs"]) = (json!(true), json!(2)),
            4 | 5 => body["logprobs"] = json!(2),
            _ => {}
        }
        if is_long {
            name += ", long";
        }
        if matches!(kind, 4 | 5) {
            name += ", log probabilities";
        }
        if stops {
            name += ", stop";
        }
        if is_long || (at / 2 + at) % 2 == 1 {
            body["allowed_token_ids"] = json!(letters);
            name += ", letters";
        }
        let path = if is_chat { "/v1/chat/completions" } else { "/v1/completions" };
        all.push((name, Question { path, body }, stops));
    }
    all
}

/// Tokens of one byte each that together are characters of two to four bytes, if they come in the
/// right order.
fn letters(installed: &Path) -> Vec<u64> {
    let file = std::fs::read(installed.join("tiny-model/tokenizer.json")).expect("the model has a tokenizer");
    let file: Value = serde_json::from_slice(&file).expect("JSON");
    // Its names of the bytes C3, D0, E2 and F0, and of some that may follow.
    let names = ["Ã", "Ð", "â", "ð", "©", "¡", "¥", "°", "¨"];
    names.iter().map(|name| file["model"]["vocab"][name].as_u64().expect("each byte has a token")).collect()
}

/// A string that ends the text in its last part, with a character of several bytes if there is one,
/// and one that never comes, but always might.
fn stops(text: &str) -> [String; 2] {
    let chars: Vec<char> = text.chars().collect();
    let windows = chars.windows(3).enumerate().skip(chars.len() / 2);
    let late = windows.map(|(at, window)| (at, window.iter().collect::<String>()));
    let late = late.filter(|(_, stop)| text.find(stop.as_str()).is_some_and(|at| at >= text.len() / 2));
    let real = |stop: &str| stop.chars().any(|c| !c.is_ascii() && c != '\u{fffd}');
    let (_, stop) = late.max_by_key(|(_, stop)| real(stop)).expect("a text does not only repeat itself");
    let mut counts = BTreeMap::<char, u32>::new();
    chars.iter().for_each(|c| *counts.entry(*c).or_default() += 1);
    let (common, _) = counts.into_iter().max_by_key(|(_, count)| *count).expect("there is text");
    [stop, format!("{common}\u{1}\u{2}")]
}

/// Whether a token's log probabilities are what they should be. A continuation is a completion,
/// which tells alternatives by their text: of several that have none, because they are parts of
/// characters, it tells one, and in the places of the others those that come next.
fn alike(expected: &Value, got: &Value) -> bool {
    let split = |logprob: &Value| {
        let mut logprob = logprob.clone();
        let tops = logprob.as_object_mut().and_then(|object| object.remove("top_logprobs"));
        let tops = tops.and_then(|tops| tops.as_array().cloned()).unwrap_or_default();
        let (blank, told): (Vec<Value>, Vec<Value>) = tops.into_iter().partition(|top| top["token"] == "");
        (logprob, blank.len(), told)
    };
    let ((one, blank, tops), (other, _, told)) = (split(expected), split(got));
    let prefix = tops.len() <= told.len() && tops.iter().zip(&told).all(|(one, other)| near(one, other));
    near(expected, got) || near(&one, &other) && blank > 0 && prefix
}

/// Whether two values are the same, but for numbers that are near.
fn near(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            one.as_f64().zip(other.as_f64()).is_some_and(|(one, other)| (one - other).abs() < NEAR)
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| near(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(key, one)| other.get(key).is_some_and(|other| near(one, other)))
        }
        _ => one == other,
    }
}

/// Whether all that is different of a token is that it has no text, though it ends a character: vLLM puts
/// that together from the tokens before, which behind a cut inside a character are in the prompt.
fn untold(expected: &Value, got: &Value) -> bool {
    let take = |logprob: &Value| {
        let mut rest = logprob.clone();
        let text = match &mut rest {
            Value::Array(all) => all.first_mut().map(Value::take),
            Value::Object(all) => {
                // Of alternatives this one is told without a text, too.
                for name in ["bytes", "top_logprobs"] {
                    all.remove(name);
                }
                all.get_mut("token").map(Value::take)
            }
            _ => None,
        };
        (rest, text.and_then(|text| text.as_str().map(str::to_owned)).unwrap_or_default())
    };
    let ((one, character), (other, nothing)) = (take(expected), take(got));
    near(&one, &other) && character.len() > 1 && character.chars().count() == 1 && nothing.is_empty()
}

/// Where two answers differ, of which the second has so many seams.
fn same(expected: &Said, got: &Said, seams: usize) -> Result<(), String> {
    let usage = |said: &Said| {
        let usage = said.usage.as_ref()?;
        Some(["prompt_tokens", "completion_tokens", "total_tokens"].map(|name| usage[name].clone()))
    };
    check(usage(expected) == usage(got), || format!("usage {:?} for {:?}", usage(got), usage(expected)))?;
    check(expected.choices.len() == got.choices.len(), || format!("{} choices", got.choices.len()))?;
    for (index, expected) in &expected.choices {
        let got = got.choices.get(index).ok_or("another choice")?;
        check(expected.text == got.text, || {
            let at = expected.text.bytes().zip(got.text.bytes()).position(|(one, other)| one != other);
            format!("from byte {at:?}: {:?} for {:?}", got.text, expected.text)
        })?;
        let (end, roles) = (&got.end, got.roles);
        check((&expected.end, expected.roles) == (end, roles), || {
            format!("{end:?} and {roles} roles for {:?}", expected.end)
        })?;
        let pairs = expected.logprobs.iter().zip(&got.logprobs);
        let other: Vec<_> = pairs.filter(|(one, other)| !alike(one, other)).collect();
        let lengths = (got.logprobs.len(), expected.logprobs.len());
        let untold = other.len() <= seams && other.iter().all(|(one, other)| untold(one, other));
        check(lengths.0 == lengths.1 && untold, || {
            format!("log probabilities {lengths:?}: {} others, such as {:?}", other.len(), other.first())
        })?;
    }
    Ok(())
}

type Reading = (JoinHandle<Result<Heard, Broken>>, watch::Receiver<Progress>);

impl Trial {
    async fn start(engines: Vec<Vllm>, model: &Path) -> Self {
        let model = model.display();
        let config = format!("[[model]]\nname = \"{MODEL}\"\ndirectory = \"{model}\"\n");
        let fleet = Fleet::of(3).config(&config).start().await;
        for engine in &engines {
            let mut request = RegisterRequest::new(engine.url(""));
            request.id = Some(engine.id.clone());
            let reply = fleet.replicas[0].add_worker(&request, SETTLED).await.expect("an answer");
            assert!(reply.status.is_success(), "{}", reply.text());
        }
        let (http, known, wrong) = (Http::fresh(), Vec::new(), Vec::new());
        let trial = Self { fleet, engines, http, known, wrong, tallies: BTreeMap::new() };
        trial.online().await;
        trial
    }

    async fn online(&self) {
        for replica in &self.fleet.replicas {
            until("all engines online", SETTLED, async || {
                let workers = replica.local_workers().await?;
                let online = workers.iter().filter(|worker| worker.online && worker.reachable).count();
                check(online == self.engines.len(), || format!("{} sees {online}", replica.name))
            })
            .await;
        }
    }

    fn begin(&self, base: String, question: &Question) -> Reading {
        let (progress, seen) = watch::channel(Progress::default());
        let question = question.clone();
        let reading = tokio::spawn(async move {
            // Others decide here who is dead.
            Reader { base, key: None, manner: Manner::Get, stall: SETTLED, progress }.read(&question).await
        });
        (reading, seen)
    }

    async fn undisturbed(&self, edge: usize, question: &Question) -> Heard {
        let base = self.fleet.replicas[edge].http_url("");
        let heard = self.begin(base, question).0.await.expect("a reader does not panic");
        heard.unwrap_or_else(|broken| panic!("nobody was hurt: {}", broken.why))
    }

    /// Asks everything, and compares with what an engine says in one piece.
    async fn learn(&mut self, letters: &[u64]) {
        for (at, (name, mut question, with_stops)) in questions(letters).into_iter().enumerate() {
            let mut heard = self.undisturbed(at % 3, &question).await;
            if with_stops {
                question.body["stop"] = json!(stops(&heard.said.choices[&0].text));
                heard = self.undisturbed(at % 3, &question).await;
            }
            let said = heard.said;
            let choice = &said.choices[&0];
            let (reason, stop) = choice.end.clone().expect("an end");
            assert_eq!(reason, if with_stops { "stop" } else { "length" }, "{name}: {:?}", choice.text);

            let mut body = question.body.clone();
            for key in ["stream", "stream_options"] {
                body.as_object_mut().expect("an object").remove(key);
            }
            let url = self.engines[0].url(question.path);
            let reply = self.http.post(&url, &body, SETTLED).await.expect("an answer");
            let reply: Value = reply.json().expect("JSON");
            let whole = &reply["choices"][0];
            let text = whole["text"].as_str().or(whole["message"]["content"].as_str());
            assert_eq!(text, Some(choice.text.as_str()), "{name}: {reply}");
            assert_eq!((&whole["finish_reason"], &whole["stop_reason"]), (&json!(reason), &stop), "{name}");
            if let Some(usage) = &said.usage {
                for key in ["prompt_tokens", "completion_tokens"] {
                    assert_eq!(usage[key], reply["usage"][key], "{name}: {key}");
                }
            }

            // Blank events are parts of characters where no text is held; where they are not told,
            // the event that ends the character has the log probabilities of all.
            let marks = &heard.marks;
            let parts = (1..marks.len()).filter(|at| match name.contains("log") {
                true => marks[*at].tokens > 1,
                false => marks[*at - 1].blank,
            });
            let inside: Vec<u64> = parts.map(|at| at as u64).collect();
            let multi = choice.text.chars().filter(|c| c.len_utf8() > 1 && *c != '\u{fffd}').count();
            println!(
                "{name}: {} events, {} of them inside characters; {} characters, {multi} of several bytes",
                heard.events,
                inside.len(),
                choice.text.chars().count(),
            );
            self.known.push(Arc::new(Known { name, question, said, inside }));
        }
        let inside = self.known.iter().filter(|known| known.inside.len() > 1).count();
        assert!(inside * 2 > self.known.len(), "too few characters of several tokens");
    }

    /// Who generates a stream.
    async fn holder(&self, edge: usize, id: &str) -> usize {
        let url = self.fleet.replicas[edge].http_url(&format!("/v1/streams/{id}"));
        let look = async || {
            let status: Value = self.http.get_json(&url, SETTLED).await?.json()?;
            let holder = status["holder"].as_str().map(str::to_owned);
            let found = self.fleet.replicas.iter().position(|replica| Some(&replica.name) == holder.as_ref());
            found.ok_or_else(|| status.to_string())
        };
        until("a holder", SETTLED, look).await.0
    }

    /// Compares, and writes down where it was cut.
    fn judge(&mut self, kind: &'static str, known: &Known, got: Result<Heard, Broken>, cuts: &[Instant]) {
        let mut line = format!("{kind}: {}", known.name);
        let tally = self.tallies.entry(kind).or_default();
        tally.streams += 1;
        let verdict = match &got {
            Ok(heard) => same(&known.said, &heard.said, cuts.len()),
            Err(broken) => Err(format!("broke after {} events: {}", broken.heard.events, broken.why)),
        };
        let heard = got.unwrap_or_else(|broken| *broken.heard);
        for (number, cut) in cuts.iter().enumerate() {
            let until = cuts.get(number + 1).copied();
            let Some((events, pause)) = heard.pause(*cut, until) else { continue };
            let told = known.name.contains("log") && heard.marks[events].tokens > 1;
            let inside = heard.marks[events - 1].blank || told;
            tally.cut += 1;
            tally.inside += u32::from(inside);
            tally.pauses.push(pause);
            let place = if inside { ", inside a character" } else { "" };
            let _ = write!(
                line,
                "; cut after event {events} of {}{place}, {} ms",
                heard.events,
                pause.as_millis()
            );
        }
        println!("{line}");
        if let Err(why) = verdict {
            println!("  WRONG {why}");
            self.wrong.push(format!("{line}: {why}"));
        }
    }

    fn freeze(&self) {
        self.engines.iter().for_each(Vllm::sigstop);
    }

    fn thaw(&self) {
        self.engines.iter().for_each(Vllm::sigcont);
    }

    /// Kills whoever generates a stream when the client has so many events; again with each number.
    async fn holders_die(&mut self, edge: usize, known: &Arc<Known>, after: &[u64]) {
        let (reading, mut progress) = self.begin(self.fleet.replicas[edge].http_url(""), &known.question);
        let mut cuts = Vec::new();
        let mut dead: Option<usize> = None;
        for after in after {
            // These engines are through before a question is answered, if they are let.
            let more = if dead.is_none() { 1 } else { progress.borrow().events + 5 };
            if progress.wait_for(|progress| progress.events >= more).await.is_err() {
                break;
            }
            self.freeze();
            if let Some(dead) = dead {
                self.revive(dead).await;
            }
            let id = progress.borrow().id.clone();
            let holder = self.holder(edge, &id).await;
            assert_ne!(holder, edge, "the client's own replica generates");
            self.thaw();
            if progress.wait_for(|progress| progress.events >= *after).await.is_err() {
                break;
            }
            cuts.push(Instant::now());
            self.fleet.replicas[holder].kill9();
            dead = Some(holder);
        }
        let got = reading.await.expect("a reader does not panic");
        // It may have been generated to its end when it was to be cut.
        cuts.truncate(got.as_ref().map_or(usize::MAX, |heard| heard.seams as usize));
        let kind = if after.len() == 1 { "holder killed" } else { "two holders killed" };
        self.judge(kind, known, got, &cuts);
        if let Some(dead) = dead {
            self.revive(dead).await;
        }
    }

    async fn revive(&mut self, replica: usize) {
        self.fleet.replicas[replica].start();
        ready(&self.fleet.replicas[replica], SETTLED).await;
        self.online().await;
    }

    /// Streams of which replicas have written that they lost their engine, and whether because that
    /// gave them up.
    fn losses(&self) -> BTreeMap<String, bool> {
        let mut lost = BTreeMap::new();
        for replica in &self.fleet.replicas {
            let log = std::fs::read_to_string(replica.log()).unwrap_or_default();
            for line in log.lines().filter(|line| line.contains("a stream lost its engine")) {
                let id = line.split_once("stream=").map_or("", |(_, rest)| rest);
                let id = id.split_whitespace().next().unwrap_or_default();
                lost.insert(id.to_owned(), line.contains("abort"));
            }
        }
        lost
    }

    /// Asks everything at once, and hurts the engine of the first stream that is well inside its text
    /// and inside a character.
    async fn engine_dies(&mut self, kind: &'static str, how: How) {
        let known = self.known.clone();
        let base = format!("http://{}", self.fleet.balancer);
        let all: Vec<Reading> = known.iter().map(|known| self.begin(base.clone(), &known.question)).collect();
        let mut inside = JoinSet::new();
        for (_, progress) in &all {
            let mut progress = progress.clone();
            inside.spawn(async move {
                let there = |progress: &Progress| {
                    progress.events >= 30 && progress.blank && progress.worker.is_some()
                };
                progress.wait_for(there).await.ok().map(|progress| progress.clone())
            });
        }
        let mut first = None;
        while first.is_none()
            && let Some(ended) = inside.join_next().await
        {
            first = ended.expect("it does not panic");
        }
        let first = first.expect("a stream that is inside a character");
        let worker = first.worker.clone().expect("waited for");
        let at = self.engines.iter().position(|engine| engine.id == worker).expect("one of ours");
        let mut dead = None;
        if how == How::KillWithHolder {
            self.freeze();
            dead = Some(self.holder(0, &first.id).await);
        }
        let moment = Instant::now();
        match how {
            How::Term => self.engines[at].sigterm(),
            How::Kill | How::KillWithHolder => self.engines[at].kill9(),
        }
        if let Some(dead) = dead {
            self.fleet.replicas[dead].kill9();
            self.thaw();
        }
        let mut heard = Vec::new();
        for (reading, _) in all {
            heard.push(reading.await.expect("a reader does not panic"));
        }
        let losses = self.losses();
        let (mut cut, mut aborted, mut hurt) = (0, 0, 0);
        for (known, got) in known.iter().zip(heard) {
            let (id, by, seams) = match &got {
                Ok(heard) => (&heard.id, &heard.worker, heard.seams),
                Err(broken) => (&broken.heard.id, &broken.heard.worker, broken.heard.seams),
            };
            let loss = losses.get(id);
            hurt += u32::from(*by == first.worker);
            aborted += u32::from(loss.is_some_and(|aborted| *aborted));
            let was_cut = loss.is_some() || seams > 0;
            cut += u32::from(was_cut);
            self.judge(kind, known, got, &[moment][..usize::from(was_cut)]);
        }
        if let Some(dead) = dead {
            self.fleet.replicas[dead].start();
            ready(&self.fleet.replicas[dead], SETTLED).await;
        }
        println!("{kind}: of {hurt} streams of {worker}, {cut} cut, {aborted} because it gave up");
        assert!(cut > 0, "no stream was cut");
        if how == How::Term && aborted == 0 {
            // Its core had been killed before it could: what it leaves in the air is lost the same way.
            println!("the engine never said that it gave up");
        }
    }

    /// Starts again what is dead.
    async fn heal(&mut self) {
        for engine in &mut self.engines {
            if !self
                .http
                .get(&engine.url("/health"), SETTLED)
                .await
                .is_ok_and(|reply| reply.status.is_success())
            {
                engine.start();
                let took = engine.ready().await;
                println!("{} well again after {:.0} s", engine.id, took.as_secs_f32());
            }
        }
        self.online().await;
    }

    fn print(&mut self) {
        for (kind, tally) in &mut self.tallies {
            tally.pauses.sort();
            let at = |percent: usize| {
                let last = tally.pauses.len().saturating_sub(1);
                tally.pauses.get(last * percent / 100).map_or(0, Duration::as_millis)
            };
            println!(
                "{kind}: {} streams, {} cuts, {} inside a character; pauses {} to {} ms, median {}",
                tally.streams,
                tally.cut,
                tally.inside,
                at(0),
                at(100),
                at(50),
            );
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// It gives up all it has, and says so.
    Term,
    Kill,
    /// And with it a replica that generates one of its streams.
    KillWithHolder,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_a_real_vllm_are_the_same_when_they_are_cut_anywhere() {
    let Some(installed) = installed() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut engines =
        ["one", "other"].map(|id| Vllm::new(id, &installed, folder.path(), BLOCKS, &Events::File));
    engines.iter_mut().for_each(Vllm::start);
    for engine in &mut engines {
        let took = engine.ready().await;
        println!("{} well after {:.0} s", engine.id, took.as_secs_f32());
    }
    let mut trial = Trial::start(engines.into(), &installed.join("tiny-model")).await;
    trial.learn(&letters(&installed)).await;

    // All at once, and nobody is hurt: what is computed together is what is computed alone.
    let known = trial.known.clone();
    let base = format!("http://{}", trial.fleet.balancer);
    let all: Vec<Reading> = known.iter().map(|known| trial.begin(base.clone(), &known.question)).collect();
    for (known, (reading, _)) in known.iter().zip(all) {
        trial.judge("nobody hurt", known, reading.await.expect("a reader does not panic"), &[]);
    }

    // At the beginning, and inside characters.
    for (at, known) in known.iter().enumerate() {
        let inside = |part: usize| known.inside.get(known.inside.len() * part / 8).copied();
        let cuts = [Some(1), inside(1), inside(4)];
        match known.name.contains("long") {
            true => trial.holders_die(at % 3, known, &[20, 40]).await,
            false => {
                for (turn, cut) in cuts.into_iter().flatten().enumerate() {
                    trial.holders_die((at + turn) % 3, known, &[cut]).await;
                }
            }
        }
    }
    trial.print();
    trial.engine_dies("engine asked to stop", How::Term).await;
    trial.heal().await;
    trial.engine_dies("engine killed", How::Kill).await;
    trial.heal().await;
    trial.engine_dies("engine and holder killed", How::KillWithHolder).await;

    trial.print();
    assert!(trial.wrong.is_empty(), "{} wrong: {:#?}", trial.wrong.len(), trial.wrong);
    for (kind, tally) in trial.tallies.iter().filter(|(kind, _)| **kind != "nobody hurt") {
        assert!(tally.cut > 0, "{kind}: no stream was cut");
        let inside = tally.inside > 0 || *kind == "two holders killed";
        assert!(inside, "{kind}: no stream was cut inside a character");
    }
}
