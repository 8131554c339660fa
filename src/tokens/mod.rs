//! From a request's body to the hashes of its prompt's blocks.
//!
//! ```text
//!   body ── request ──▶ ids ───────────────────────────────┐
//!             │                                            ▼
//!             ├──▶ text ─────────────── tokenizer ──────▶ Prompt ──▶ PromptKey
//!             │                            ▲               ▲         (per block size)
//!             └──▶ chat ─ conversation ─ template          │
//!                    └──────── an engine, or plain text ───┘
//! ```
//!
//! [`ids`] lifts long prompts of ids out of the body first. [`request`] reads what a route calls its prompt, [`conversation`] puts messages as the engine
//! would, [`template`] renders them, [`tokenizer`] makes ids of the text with the help of
//! [`segments`], and [`prompt`] has the hashes. [`Tokenizers`] puts it together for all models,
//! on the threads of [`pool`]. [`answer`] collects what comes behind a prompt. A prompt that cannot be known exactly as the engine knows it is
//! known by less, never wrongly.

pub mod answer;
pub mod content;
pub mod conversation;
pub mod engine;
pub mod ids;
pub mod json;
pub mod load;
pub mod model;
pub mod pool;
pub mod prompt;
pub mod request;
pub mod segments;
pub mod template;
pub mod tokenizer;

mod anthropic;
mod behind;
mod native;
mod responses;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;

pub use self::answer::Collector;
pub use self::behind::Answered;
pub use self::content::ContentFormat;
pub use self::conversation::Dialect;
pub use self::engine::{AskFigures, AskOptions, Engines};
pub use self::ids::{Lifted, lift};
pub use self::load::LoadError;
pub use self::model::{Mode, ModelFigures};
pub use self::prompt::{Prompt, PromptKey, Source};
pub use self::request::Form;
pub use self::segments::SegmentFigures;

use self::engine::Asker;
use self::json::Json;
use self::model::{How, Model, Outcome};
use self::pool::Pool;
use self::prompt::estimate;
use self::segments::Segments;
use crate::kv::hash::Seed;

/// What there is to know of a model.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct ModelOptions {
    /// Its name in requests.
    pub name: String,
    /// Where its token ids come from.
    pub mode: Mode,
    /// Its files; needed for [`Mode::Tokenizer`].
    pub directory: Option<PathBuf>,
    /// A chat template instead of the directory's, as engines are given one.
    pub chat_template: Option<PathBuf>,
    /// How the template takes content, if the engine was told; otherwise found out.
    pub content_format: Option<ContentFormat>,
    /// Variables that the engine sets in every template unless a request does.
    pub template_kwargs: Vec<(String, Json)>,
    /// Whose idea of messages it is; where left out, that of the engines that serve it.
    pub dialect: Option<Dialect>,
    /// Whether the engine leaves out tools when the client says `tool_choice: "none"`.
    pub exclude_tools_when_none: bool,
}

/// Bounds of the whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// Threads that tokenise.
    pub threads: usize,
    /// Requests that wait for one of them; one more has no prefix.
    pub queue: usize,
    /// Bodies of at most this many bytes are done where they arrive: less than a hop to another
    /// thread and back would cost in delay.
    pub inline_bytes: usize,
    /// Bytes of the cache of tokenised pieces.
    pub cache_bytes: usize,
    /// Asking engines.
    pub ask: AskOptions,
    /// Where the token ids of models come from that are not configured. [`Mode::Tokenizer`] has no
    /// files for them, and is [`Mode::Text`].
    pub other: Mode,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: 2,
            queue: 256,
            inline_bytes: 2048,
            cache_bytes: 256 << 20,
            ask: AskOptions::default(),
            other: Mode::Text,
        }
    }
}

/// A request whose prompt is to be known.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// The model, by the name under which it is configured: for an adapter its base.
    pub model: &'a str,
    /// The adapter, if the client asked for one.
    pub lora: Option<&'a str>,
    /// How the route writes prompts.
    pub form: Form,
    /// The body as it came.
    pub body: &'a Bytes,
    /// The same without the ids of its prompt, which are at the top of it; if they were lifted.
    pub lifted: Option<&'a Lifted>,
    /// What templates see as the time.
    pub now: SystemTime,
}

/// All models' tokenizers. Lives as long as the process.
#[derive(Debug)]
pub struct Tokenizers {
    models: HashMap<String, Arc<Model>>,
    /// For models that are not configured: text.
    other: Arc<Model>,
    pool: Pool,
    inline_bytes: usize,
    segments: Arc<Segments>,
    asker: Asker,
}

/// What all of it did so far.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Figures {
    /// By model; the last one stands for all that are not configured.
    pub models: Vec<ModelFigures>,
    /// Prompts that found the queue full.
    pub refused: u64,
    /// The cache of pieces.
    pub segments: SegmentFigures,
    /// Engines asked.
    pub asked: AskFigures,
}

impl Tokenizers {
    /// Loads all models' files and starts the threads. `engines` answers for [`Mode::Engine`].
    ///
    /// Reads files of tens of megabytes and takes up to a second for each model: not on a thread
    /// that moves bytes.
    pub fn load(
        models: Vec<ModelOptions>,
        options: &Options,
        engines: Option<Arc<dyn Engines>>,
    ) -> Result<Self, LoadError> {
        let segments = Arc::new(Segments::new(options.cache_bytes));
        let seed: u64 = rand::random();
        let mut by_name = HashMap::with_capacity(models.len());
        for (number, options) in models.into_iter().enumerate() {
            let name = options.name.clone();
            // Two seeds each: see `TextTokenizer::pieces`.
            let model = Model::load(options, &segments, seed.wrapping_add(2 * number as u64))?;
            if by_name.insert(name.clone(), Arc::new(model)).is_some() {
                return Err(LoadError::Twice(name));
            }
        }
        let mode = if options.other == Mode::Engine { Mode::Engine } else { Mode::Text };
        let other = Arc::new(Model::load(ModelOptions { mode, ..ModelOptions::default() }, &segments, seed)?);
        Ok(Self {
            models: by_name,
            other,
            pool: Pool::new(options.threads, options.queue).map_err(LoadError::Threads)?,
            inline_bytes: options.inline_bytes,
            segments,
            asker: Asker::new(engines, options.ask, seed),
        })
    }

    /// What is known of a request's prompt. Never fails: what cannot be known is left out, and
    /// counted.
    pub async fn prompt(&self, ask: Ask<'_>) -> Prompt {
        let how = self.how(self.model(ask.model), ask.model);
        self.known(ask, how).await
    }

    /// The same where there is no engine to be asked: of a model without files its text is known.
    pub async fn prompt_unasked(&self, ask: Ask<'_>) -> Prompt {
        let how = self.how(self.model(ask.model), ask.model);
        let mode = if how.mode == Mode::Engine { Mode::Text } else { how.mode };
        self.known(ask, How { mode, ..how }).await
    }

    fn model(&self, name: &str) -> &Arc<Model> {
        self.models.get(name).unwrap_or(&self.other)
    }

    async fn known(&self, ask: Ask<'_>, how: How) -> Prompt {
        let model = self.model(ask.model);
        let outcome = self.read(model, &ask, how).await;
        let prompt = match outcome {
            Some(Outcome::Known(prompt)) => prompt,
            Some(Outcome::Ask { question, seed, estimate, others }) => {
                match self.asker.ask(ask.model, question).await {
                    Some(ids) => Prompt::of_ids(ids, seed, Source::Engine).with_others(others),
                    // That is what was learnt by asking.
                    None if self.asker.only_text(ask.model) => {
                        match self.read(model, &ask, How { mode: Mode::Text, ..how }).await {
                            Some(Outcome::Known(prompt)) => prompt,
                            _ => Prompt::unknown(estimate, seed).with_others(others),
                        }
                    }
                    None => Prompt::unknown(estimate, seed).with_others(others),
                }
            }
            None => Prompt::unknown(estimate(ask.body.len()), Seed::new(ask.lora, None)),
        };
        model.count(prompt.source());
        prompt
    }

    /// What depends on the engines that serve the model now.
    fn how(&self, model: &Model, name: &str) -> How {
        let mode = match model.mode() {
            Mode::Engine if self.asker.only_text(name) => Mode::Text,
            mode => mode,
        };
        let by_engines = || self.asker.dialect(name).filter(|_| mode == Mode::Tokenizer);
        How { mode, dialect: model.dialect().or_else(by_engines).unwrap_or_default() }
    }

    /// Reads the request here or on the threads, as long as it is. `None` if neither was possible.
    async fn read(&self, model: &Arc<Model>, ask: &Ask<'_>, how: How) -> Option<Outcome> {
        if let Some(lifted) = ask.lifted.filter(|it| it.rest.len() <= self.inline_bytes) {
            let work = || model.lifted(ask.form, lifted, ask.lora);
            let prompt = catch_unwind(AssertUnwindSafe(work)).ok()?;
            // What is not understood by its ids has a beginning as text.
            if how.mode != Mode::Text || prompt.source() != Source::Unknown {
                return Some(Outcome::Known(prompt));
            }
        }
        if ask.body.len() <= self.inline_bytes {
            let work = || model.prompt(ask.model, ask.form, ask.body, ask.lora, ask.now, how);
            catch_unwind(AssertUnwindSafe(work)).ok()
        } else {
            let (model, body) = (Arc::clone(model), ask.body.clone());
            let (form, lora, now) = (ask.form, ask.lora.map(str::to_owned), ask.now);
            let name = ask.model.to_owned();
            self.pool.run(move || model.prompt(&name, form, &body, lora.as_deref(), now, how)).await
        }
    }

    /// What it did so far.
    pub fn figures(&self) -> Figures {
        let mut models: Vec<ModelFigures> = self.models.values().map(|model| model.figures()).collect();
        models.sort_by(|a, b| a.model.cmp(&b.model));
        models.push(self.other.figures());
        Figures {
            models,
            refused: self.pool.refused(),
            segments: self.segments.figures(),
            asked: self.asker.figures(),
        }
    }
}
