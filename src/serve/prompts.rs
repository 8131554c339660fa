//! From the configuration to tokenizers, and asking engines for token ids.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use http::StatusCode;
use parking_lot::Mutex;

use crate::config::{Config, ContentForm, ModelEntry, PromptDialect, PromptMode};
use crate::http::{FetchError, Shard, post_to_worker};
use crate::ids::WorkerIx;
use crate::routing::view::{RegistryView, WorkerView};
use crate::state::worker::EngineKind;
use crate::tokens::engine::Answer;
use crate::tokens::json::Json;
use crate::tokens::{AskOptions, ContentFormat, Dialect, Engines, Mode, ModelOptions, Options, Tokenizers};

/// How long an engine may take to answer, and how long a worker is left alone that did not, or that
/// has no such route.
const LIMIT: Duration = Duration::from_millis(500);
const REST: Duration = Duration::from_secs(30);

/// Workers that are left alone at once; beyond it all are asked again.
const MOST_RESTING: usize = 4096;

/// Workers asked for one prompt, the first and those after one that had trouble.
const MOST_ASKED: usize = 4;

/// Loads the tokenizers of all configured models.
pub fn load(config: &Config, engines: Arc<ByWorkers>) -> anyhow::Result<Arc<Tokenizers>> {
    let kv = &config.kv;
    let options = Options {
        threads: kv.tokenize_threads as usize,
        queue: kv.tokenize_queue as usize,
        inline_bytes: kv.tokenize_inline_bytes as usize,
        cache_bytes: kv.tokenize_cache_bytes as usize,
        ask: AskOptions { timeout: LIMIT, ..AskOptions::default() },
        other: mode(kv.default_mode),
    };
    let models = config.model.iter().map(options_of).collect();
    let loaded = Tokenizers::load(models, &options, Some(engines)).context("cannot load a [[model]]")?;
    Ok(Arc::new(loaded))
}

fn mode(mode: PromptMode) -> Mode {
    match mode {
        PromptMode::Tokenizer => Mode::Tokenizer,
        PromptMode::Engine => Mode::Engine,
        PromptMode::Text => Mode::Text,
    }
}

fn options_of(entry: &ModelEntry) -> ModelOptions {
    ModelOptions {
        name: entry.name.clone(),
        mode: mode(entry.mode()),
        directory: entry.directory.clone(),
        chat_template: entry.chat_template.clone(),
        content_format: entry.content_format.map(|form| match form {
            ContentForm::String => ContentFormat::String,
            ContentForm::OpenAi => ContentFormat::OpenAi,
        }),
        dialect: entry.dialect.map(|dialect| match dialect {
            PromptDialect::Vllm => Dialect::Vllm,
            PromptDialect::Sglang => Dialect::Sglang,
        }),
        template_kwargs: entry.template_kwargs.iter().map(variable).collect(),
        exclude_tools_when_none: entry.exclude_tools_when_none,
    }
}

fn variable((name, value): (&String, &serde_json::Value)) -> (String, Json) {
    // JSON in one form is JSON in the other.
    let value = serde_json::from_value(value.clone()).unwrap_or_default();
    (name.clone(), value)
}

/// Asks one of the workers that serve the model.
#[derive(Default)]
pub struct ByWorkers {
    /// Set once the front is there, which has the tokenizers.
    shard: OnceLock<(Arc<Shard>, tokio::runtime::Handle)>,
    resting: Arc<Resting>,
}

impl ByWorkers {
    /// Asks through `shard`, on the runtime of the caller.
    pub fn begin(&self, shard: Arc<Shard>) {
        let _ = self.shard.set((shard, tokio::runtime::Handle::current()));
    }
}

/// A worker in one of its registrations.
type Registered = (WorkerIx, u64);

/// Why a worker is not asked now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Why {
    /// It did not answer, or not well.
    Trouble,
    /// It has no such route.
    NoRoute,
}

/// Workers that are left alone. Each by itself: what one cannot do, another may.
#[derive(Default)]
struct Resting(Mutex<HashMap<Registered, (Instant, Why)>>);

impl Resting {
    fn why(&self, worker: &WorkerView) -> Option<Why> {
        let resting = self.0.lock();
        let (until, why) = resting.get(&registered(worker))?;
        (*until > Instant::now()).then_some(*why)
    }

    fn add(&self, worker: &WorkerView, why: Why) {
        let mut resting = self.0.lock();
        if resting.len() >= MOST_RESTING {
            resting.clear();
        }
        resting.insert(registered(worker), (Instant::now() + REST, why));
    }

    /// Whether the worker is known to tell no token ids.
    fn is_mute(&self, worker: &WorkerView) -> bool {
        // Of an engine of no kind that we know, the route of that name may be any.
        worker.record.spec.engine == EngineKind::OpenaiCompatible || self.why(worker) == Some(Why::NoRoute)
    }

    /// Asks workers at random, until one tells, one says that the question is at fault, or
    /// [`MOST_ASKED`] had trouble.
    async fn ask(&self, shard: &Shard, model: &str, question: Bytes) -> Result<Bytes, String> {
        let mut last = None;
        for _ in 0..MOST_ASKED {
            let view = shard.front.control.registry();
            let willing: Vec<_> = serving(&view, model)
                .filter(|worker| !self.is_mute(worker) && self.why(worker).is_none())
                .collect();
            if willing.is_empty() {
                break;
            }
            let worker = willing[rand::random_range(0..willing.len())];
            let answer = post_to_worker(shard, worker, "/tokenize", question.clone(), LIMIT).await;
            let (why, text) = match answer {
                Ok(answer) if memchr::memmem::find(&answer, b"\"tokens\"").is_some() => return Ok(answer),
                Ok(_) => (Why::NoRoute, "the answer has no list `tokens`".to_owned()),
                Err(error) => {
                    let text = error.to_string();
                    // The client's own fault, which no other engine would forgive.
                    (troubled_by(&error).ok_or_else(|| text.clone())?, text)
                }
            };
            self.add(worker, why);
            tracing::debug!(worker = %worker.id(), ?why, text, "the worker is not asked for token ids for a while");
            last = Some(text);
        }
        Err(last.unwrap_or_else(|| "no worker that serves it now and that answered lately".to_owned()))
    }
}

/// What this says of the worker; `None` if it speaks of the question alone.
fn troubled_by(error: &FetchError) -> Option<Why> {
    match error {
        FetchError::Refused(StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED) => Some(Why::NoRoute),
        FetchError::Refused(status) if status.is_client_error() => None,
        FetchError::Refused(_) | FetchError::Connect(_) | FetchError::Timeout(_) | FetchError::Bad(_) => {
            Some(Why::Trouble)
        }
    }
}

fn registered(worker: &WorkerView) -> Registered {
    (worker.record.ix, worker.record.generation)
}

/// The workers that could be sent a request for the model.
fn serving<'a>(view: &'a RegistryView, model: &str) -> impl Iterator<Item = &'a Arc<WorkerView>> {
    let positions = view.by_model.get(model).map_or(&[][..], |positions| positions);
    positions.iter().map(|at| &view.workers[*at]).filter(|worker| worker.is_routable())
}

impl Engines for ByWorkers {
    fn tokenize<'a>(&'a self, model: &'a str, question: Bytes) -> Answer<'a> {
        Box::pin(async move {
            let (shard, runtime) = self.shard.get().ok_or("not started yet")?;
            let (shard, resting, model) = (Arc::clone(shard), Arc::clone(&self.resting), model.to_owned());
            // On the runtime that the connections of this shard belong to; and to its end, whether or not
            // somebody still waits, for what is learnt of the workers.
            let asked = runtime.spawn(async move { resting.ask(&shard, &model, question).await });
            asked.await.map_err(|error| error.to_string()).flatten()
        })
    }

    fn only_text(&self, model: &str) -> bool {
        let Some((shard, _)) = self.shard.get() else { return false };
        let view = shard.front.control.registry();
        let mut workers = serving(&view, model).peekable();
        workers.peek().is_some()
            && workers.all(|worker| self.resting.is_mute(worker) && worker.reckoned_capacity(0).is_some())
    }

    fn dialect(&self, model: &str) -> Option<Dialect> {
        let (shard, _) = self.shard.get()?;
        let view = shard.front.control.registry();
        let mut dialects = serving(&view, model).map(|worker| match worker.record.spec.engine {
            EngineKind::Sglang => Dialect::Sglang,
            EngineKind::Vllm | EngineKind::OpenaiCompatible => Dialect::Vllm,
        });
        let first = dialects.next()?;
        dialects.all(|dialect| dialect == first).then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Alone, Scripted, eventually};
    use super::*;
    use crate::state::command::CacheCommand;
    use crate::state::ranks::RankKey;

    const IDS: &str = r#"{"count":2,"tokens":[7,8]}"#;

    async fn asking(alone: &Alone) -> ByWorkers {
        let workers = ByWorkers::default();
        workers.begin(alone.shard());
        workers
    }

    async fn ask(workers: &ByWorkers) -> Result<Bytes, String> {
        workers.tokenize("m", Bytes::from_static(b"{\"prompt\":\"x\"}")).await
    }

    #[tokio::test]
    async fn what_one_worker_cannot_do_another_is_asked_for() {
        let alone = Alone::start().await;
        let (good, bad, gone) = (Scripted::start().await, Scripted::start().await, Scripted::start().await);
        good.says("/tokenize", IDS);
        bad.refuses("/tokenize", 500);
        for (id, engine) in [("good", &good), ("bad", &bad), ("gone", &gone)] {
            alone.add_serving(id, engine.address, EngineKind::Vllm, "m").await;
        }
        drop(gone);
        let workers = asking(&alone).await;
        for _ in 0..40 {
            assert_eq!(ask(&workers).await.unwrap(), IDS);
        }
        // Trouble once, and then it is left alone.
        assert!(bad.asked("/tokenize") <= 1);
        assert!(!workers.only_text("m"));
    }

    #[tokio::test]
    async fn a_question_that_is_at_fault_says_nothing_of_the_worker() {
        let alone = Alone::start().await;
        let engine = Scripted::start().await;
        alone.add_serving("a", engine.address, EngineKind::Vllm, "m").await;
        let workers = asking(&alone).await;
        for status in [400, 422, 413, 401] {
            engine.refuses("/tokenize", status);
            assert!(ask(&workers).await.unwrap_err().contains(&status.to_string()));
        }
        engine.says("/tokenize", IDS);
        assert_eq!(ask(&workers).await.unwrap(), IDS);
        assert_eq!(engine.asked("/tokenize"), 5);
    }

    #[tokio::test]
    async fn a_model_is_only_text_if_none_of_its_workers_tells_ids_or_events() {
        let alone = Alone::start().await;
        let (mute, other, third) =
            (Scripted::start().await, Scripted::start().await, Scripted::start().await);
        alone.add_serving("mute", mute.address, EngineKind::Vllm, "m").await;
        let workers = asking(&alone).await;
        assert!(!workers.only_text("m"), "nobody knows yet");
        assert!(ask(&workers).await.unwrap_err().contains("404"));
        assert!(workers.only_text("m") && !workers.only_text("another"));
        // Asked no more.
        assert!(ask(&workers).await.is_err());
        assert_eq!(mute.asked("/tokenize"), 1);
        // An engine of no known kind is not asked at all.
        let worker = alone.add_serving("other", other.address, EngineKind::OpenaiCompatible, "m").await;
        assert!(workers.only_text("m"));
        assert!(ask(&workers).await.is_err());
        assert_eq!(other.asked("/tokenize"), 0);
        // One with events has blocks that are known by token ids.
        let rank = RankKey { worker: worker.record.ix, rank: 0 };
        alone.plane.propose_cache(CacheCommand::ClaimFeed { rank, from: None }).await.unwrap();
        eventually("the feed is known", || !workers.only_text("m")).await;
        // So has a model of which one worker tells.
        alone.add_serving("n", third.address, EngineKind::Vllm, "n").await;
        assert!(!workers.only_text("n"));
    }

    #[tokio::test]
    async fn the_dialect_is_that_of_all_workers_of_the_model_or_of_none() {
        let alone = Alone::start().await;
        let engine = Scripted::start().await;
        let workers = asking(&alone).await;
        assert_eq!(workers.dialect("m"), None);
        alone.add_serving("a", engine.address, EngineKind::Sglang, "m").await;
        assert_eq!(workers.dialect("m"), Some(Dialect::Sglang));
        alone.add_serving("b", engine.address, EngineKind::Vllm, "m").await;
        assert_eq!(workers.dialect("m"), None);
        alone.add_serving("c", engine.address, EngineKind::Vllm, "n").await;
        assert_eq!(workers.dialect("n"), Some(Dialect::Vllm));
    }

    #[test]
    fn the_settings_of_a_model_reach_its_template() {
        let entry: ModelEntry = toml::from_str(
            "name = 'm'\ndirectory = '/m'\ndialect = 'sglang'\nexclude_tools_when_none = true\n\
             [template_kwargs]\nenable_thinking = false\nlevels = [1, 2]",
        )
        .unwrap();
        let options = options_of(&entry);
        assert_eq!((options.dialect, options.exclude_tools_when_none), (Some(Dialect::Sglang), true));
        let list = Json::List(vec![Json::Number(1.into()), Json::Number(2.into())]);
        let kwargs = [("enable_thinking".to_owned(), Json::Bool(false)), ("levels".to_owned(), list)];
        assert_eq!(options.template_kwargs, kwargs);
        let plain = options_of(&toml::from_str("name = 'm'").unwrap());
        assert_eq!(
            (plain.dialect, plain.template_kwargs, plain.exclude_tools_when_none),
            (None, vec![], false)
        );
    }
}
