//! From the configuration to tokenizers, and asking engines for token ids.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::config::{Config, ContentForm, ModelEntry, PromptMode};
use crate::http::{Shard, post_to_worker};
use crate::tokens::engine::Answer;
use crate::tokens::{AskOptions, ContentFormat, Engines, Mode, ModelOptions, Options, Tokenizers};

/// How long an engine may take to answer, and how long it is left alone when it did not, or has
/// no such route.
const LIMIT: Duration = Duration::from_millis(500);
const REST: Duration = Duration::from_secs(30);

/// Models that are left alone at once; beyond it all are asked again.
const MOST_RESTING: usize = 1024;

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
        ..ModelOptions::default()
    }
}

/// Asks one of the workers that serve the model.
#[derive(Default)]
pub struct ByWorkers {
    /// Set once the front is there, which has the tokenizers.
    shard: OnceLock<(Arc<Shard>, tokio::runtime::Handle)>,
    resting: Mutex<HashMap<String, Instant>>,
}

impl ByWorkers {
    /// Asks through `shard`, on the runtime of the caller.
    pub fn begin(&self, shard: Arc<Shard>) {
        let _ = self.shard.set((shard, tokio::runtime::Handle::current()));
    }

    fn is_resting(&self, model: &str) -> bool {
        self.resting.lock().get(model).is_some_and(|until| *until > Instant::now())
    }

    fn rest(&self, model: &str) {
        let mut resting = self.resting.lock();
        if resting.len() >= MOST_RESTING {
            resting.clear();
        }
        resting.insert(model.to_owned(), Instant::now() + REST);
    }
}

impl Engines for ByWorkers {
    fn tokenize<'a>(&'a self, model: &'a str, question: Bytes) -> Answer<'a> {
        Box::pin(async move {
            let (shard, runtime) = self.shard.get().ok_or("not started yet")?;
            if self.is_resting(model) {
                return Err("its engines did not answer lately".to_owned());
            }
            let view = shard.front.control.registry();
            let serving = view.by_model.get(model).map_or(&[][..], |positions| positions);
            let routable: Vec<_> =
                serving.iter().map(|at| &view.workers[*at]).filter(|worker| worker.is_routable()).collect();
            if routable.is_empty() {
                return Err("no worker serves it now".to_owned());
            }
            let worker = Arc::clone(routable[rand::random_range(0..routable.len())]);
            // On the runtime that the connections of this shard belong to.
            let shard = Arc::clone(shard);
            let asked = runtime
                .spawn(async move { post_to_worker(&shard, &worker, "/tokenize", question, LIMIT).await })
                .await
                .map_err(|error| error.to_string())
                .flatten();
            let told = asked.and_then(|answer| match memchr::memmem::find(&answer, b"\"tokens\"") {
                Some(_) => Ok(answer),
                None => Err("the answer has no list `tokens`".to_owned()),
            });
            if told.is_err() {
                self.rest(model);
            }
            told
        })
    }
}
