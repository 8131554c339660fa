//! Asking an engine for token ids, where the model's files are not at hand.
//!
//! A round trip before every request that was not seen before. So: answers are kept in a bounded
//! cache, few questions are open at once, each has a time limit, and whoever finds no room goes
//! without a prefix at once.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::conversation::Dialect;
use super::json::Json;
use super::request::Chat;

/// Longest answer that is read: ids of a million tokens, as JSON.
pub const MAX_ANSWER: usize = 16 << 20;

/// What an engine answers, or why it does not.
pub type Answer<'a> = Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send + 'a>>;

/// Sends a question to an engine that serves the model.
pub trait Engines: Send + Sync + 'static {
    /// `POST /tokenize` with this JSON to any engine of `model`; the body of a 200, of at most
    /// [`MAX_ANSWER`] bytes. The future is dropped when it takes too long.
    fn tokenize<'a>(&'a self, model: &'a str, question: Bytes) -> Answer<'a>;

    /// Whether there is nobody to ask: no engine of the model tells token ids, and none tells what it
    /// has cached, which would be by token ids. Then all of them may be routed by text.
    fn only_text(&self, model: &str) -> bool;

    /// Whose idea of messages the engines of the model have, where all have the same.
    fn dialect(&self, model: &str) -> Option<Dialect>;
}

/// A question, as JSON.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question(Bytes);

#[derive(Serialize)]
struct TextQuestion<'a> {
    model: &'a str,
    prompt: &'a str,
    add_special_tokens: bool,
}

#[derive(Serialize)]
struct ChatQuestion<'a> {
    model: &'a str,
    messages: &'a [Json],
    add_generation_prompt: bool,
    continue_final_message: bool,
    add_special_tokens: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    tools: Option<&'a [Json]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chat_template_kwargs: Option<Json>,
}

impl Question {
    pub(super) fn of_text(model: &str, prompt: &str, special: bool) -> Self {
        Self::of(&TextQuestion { model, prompt, add_special_tokens: special })
    }

    pub(super) fn of_chat(model: &str, chat: &Chat) -> Self {
        Self::of(&ChatQuestion {
            model,
            messages: &chat.messages,
            add_generation_prompt: chat.add_generation_prompt,
            continue_final_message: chat.continue_final_message,
            add_special_tokens: chat.special,
            tools: chat.tools.as_deref(),
            // Documents and effort have no field of their own there, and are variables anyway.
            chat_template_kwargs: (!chat.kwargs.is_empty()).then(|| Json::Object(chat.kwargs.clone())),
        })
    }

    fn of(question: &impl Serialize) -> Self {
        // Of text, lists and numbers: nothing in it can fail to be written.
        Self(serde_json::to_vec(question).unwrap_or_default().into())
    }
}

/// Bounds of asking.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AskOptions {
    /// Questions open at once.
    pub concurrency: usize,
    /// Time for an answer.
    pub timeout: Duration,
    /// Bytes of kept answers.
    pub cache_bytes: usize,
}

impl Default for AskOptions {
    fn default() -> Self {
        Self { concurrency: 32, timeout: Duration::from_millis(500), cache_bytes: 64 << 20 }
    }
}

#[derive(Clone, Debug)]
struct Weight;

impl Weighter<u128, Arc<[u32]>> for Weight {
    fn weight(&self, _: &u128, ids: &Arc<[u32]>) -> u64 {
        96 + 4 * ids.len() as u64
    }
}

/// Asks, and remembers.
pub(super) struct Asker {
    engines: Option<Arc<dyn Engines>>,
    open: Semaphore,
    timeout: Duration,
    answers: Cache<u128, Arc<[u32]>, Weight>,
    seed: u64,
    counts: [AtomicU64; 4],
}

impl std::fmt::Debug for Asker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asker").field("figures", &self.figures()).finish_non_exhaustive()
    }
}

/// What came of asking engines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AskFigures {
    /// Answers that were still known.
    pub remembered: u64,
    /// Answers of engines.
    pub answered: u64,
    /// Questions that failed or took too long.
    pub failed: u64,
    /// Questions for which too many others were open.
    pub refused: u64,
}

impl Asker {
    pub(super) fn new(engines: Option<Arc<dyn Engines>>, options: AskOptions, seed: u64) -> Self {
        let expected = (options.cache_bytes / 4096).clamp(16, 1 << 16);
        Self {
            engines,
            open: Semaphore::new(options.concurrency.min(Semaphore::MAX_PERMITS)),
            timeout: options.timeout,
            answers: Cache::with_weighter(expected, options.cache_bytes as u64, Weight),
            seed,
            counts: Default::default(),
        }
    }

    /// See [`Engines::only_text`].
    pub(super) fn only_text(&self, model: &str) -> bool {
        self.engines.as_ref().is_some_and(|engines| engines.only_text(model))
    }

    /// See [`Engines::dialect`].
    pub(super) fn dialect(&self, model: &str) -> Option<Dialect> {
        self.engines.as_ref()?.dialect(model)
    }

    /// Token ids, or `None` for one of the reasons that are counted.
    pub(super) async fn ask(&self, model: &str, question: Question) -> Option<Arc<[u32]>> {
        let key = xxh3_128_with_seed(&question.0, self.seed);
        if let Some(known) = self.answers.get(&key) {
            self.count(0);
            return Some(known);
        }
        let engines = self.engines.as_ref()?;
        let Ok(_open) = self.open.try_acquire() else {
            self.count(3);
            return None;
        };
        let answer = tokio::time::timeout(self.timeout, engines.tokenize(model, question.0)).await;
        let ids = answer
            .map_err(|_| format!("no answer within {} ms", self.timeout.as_millis()))
            .and_then(|answer| answer)
            .and_then(|answer| ids_of(&answer));
        match ids {
            Ok(ids) => {
                let ids: Arc<[u32]> = ids.into();
                self.answers.insert(key, Arc::clone(&ids));
                self.count(1);
                Some(ids)
            }
            Err(why) => {
                self.count(2);
                tracing::debug!(model, why, "no engine told the token ids of a prompt");
                None
            }
        }
    }

    fn count(&self, which: usize) {
        self.counts[which].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn figures(&self) -> AskFigures {
        let [remembered, answered, failed, refused] =
            std::array::from_fn(|at| self.counts[at].load(Ordering::Relaxed));
        AskFigures { remembered, answered, failed, refused }
    }
}

#[derive(Deserialize)]
struct Told {
    tokens: Vec<u32>,
}

fn ids_of(answer: &[u8]) -> Result<Vec<u32>, String> {
    if answer.len() > MAX_ANSWER {
        return Err("the answer is too long".to_owned());
    }
    let told: Told =
        serde_json::from_slice(answer).map_err(|_| "the answer has no list `tokens`".to_owned())?;
    Ok(told.tokens)
}
