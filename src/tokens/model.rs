//! One model: from a request to its prompt, on the thread that asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use bytes::Bytes;

use super::ModelOptions;
use super::content::{ContentFormat, detect};
use super::conversation::{Conversation, Dialect, MEDIA, normalise};
use super::engine::Question;
use super::ids::Lifted;
use super::json::Json;
use super::load::{LoadError, Loaded, load};
use super::prompt::{Prompt, Source, estimate};
use super::request::{Chat, Form, Input, Request, read};
use super::segments::Segments;
use super::template::{ChatTemplate, Variables};
use crate::kv::hash::Seed;

/// Text of a prompt that is hashed where nobody tokenises: a quarter of a million tokens.
pub const MAX_TEXT: usize = 1 << 20;

/// Tokens that a picture or the like counts as: one of 500 × 500 pixels has about as many.
const MEDIA_TOKENS: usize = 256;

/// Where a model's token ids come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// From its own files, here.
    Tokenizer,
    /// From an engine that serves it: `POST /tokenize`.
    Engine,
    /// From nowhere: pieces of text are hashed.
    #[default]
    Text,
}

/// What of reading a request depends on the engines that serve the model now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct How {
    /// Where token ids come from; [`Mode::Text`] too where no engine could be asked.
    pub(super) mode: Mode,
    /// Whose idea of messages it is.
    pub(super) dialect: Dialect,
}

/// A request that was read, or a question to an engine.
#[derive(Debug)]
pub(super) enum Outcome {
    Known(Prompt),
    Ask {
        question: Question,
        seed: Seed,
        /// Tokens, if no engine answers.
        estimate: usize,
        /// The request's other prompts.
        others: Vec<Prompt>,
    },
}

/// A model and what was counted for it.
#[derive(Debug)]
pub(super) struct Model {
    options: ModelOptions,
    local: Option<Local>,
    sources: [AtomicU64; Source::ALL.len()],
    failures: AtomicU64,
    warned: AtomicBool,
}

#[derive(Debug)]
struct Local {
    loaded: Loaded,
    default: Option<Template>,
    tool_use: Option<Template>,
}

/// What is known of a template besides itself.
#[derive(Debug)]
struct Template {
    template: ChatTemplate,
    /// As the operator said.
    given: Option<ContentFormat>,
    /// By vLLM's rule.
    detected: ContentFormat,
    /// SGLang takes any template that speaks of pictures for one that wants parts.
    speaks_of_media: bool,
    knows_developers: bool,
}

/// What was counted for a model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModelFigures {
    /// Its name; empty for all that are not configured.
    pub model: String,
    /// Prompts, by [`Source::ALL`].
    pub sources: [u64; Source::ALL.len()],
    /// Prompts whose template or tokenizer failed.
    pub failures: u64,
}

impl Model {
    pub(super) fn load(
        options: ModelOptions,
        segments: &Arc<Segments>,
        seed: u64,
    ) -> Result<Self, LoadError> {
        let local = match (options.mode, &options.directory) {
            (Mode::Tokenizer, None) => return Err(LoadError::NoDirectory(options.name)),
            (Mode::Tokenizer, Some(directory)) => {
                let template = options.chat_template.as_deref();
                let mut loaded = load(&options.name, directory, template, Arc::clone(segments), seed)?;
                let known = |template: Option<ChatTemplate>| {
                    template.map(|template| Template::new(template, options.content_format))
                };
                let (default, tool_use) = (loaded.templates.default.take(), loaded.templates.tool_use.take());
                Some(Local { loaded, default: known(default), tool_use: known(tool_use) })
            }
            _ => None,
        };
        Ok(Self {
            options,
            local,
            sources: Default::default(),
            failures: AtomicU64::new(0),
            warned: AtomicBool::new(false),
        })
    }

    pub(super) fn figures(&self) -> ModelFigures {
        ModelFigures {
            model: self.options.name.clone(),
            sources: std::array::from_fn(|at| self.sources[at].load(Ordering::Relaxed)),
            failures: self.failures.load(Ordering::Relaxed),
        }
    }

    pub(super) fn mode(&self) -> Mode {
        self.options.mode
    }

    /// The dialect, if it is configured.
    pub(super) fn dialect(&self) -> Option<Dialect> {
        self.options.dialect
    }

    /// Ids of a text that stands behind a prompt.
    pub(super) fn encode_behind(&self, text: &str) -> Option<Vec<u32>> {
        let encoded = self.local.as_ref()?.loaded.tokenizer.encode_behind(text);
        encoded.map_err(|error| self.failed(&error)).ok()
    }

    pub(super) fn count(&self, source: Source) {
        self.sources[source as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Reads a request whose prompt's ids are read already: they need no tokenizer.
    pub(super) fn lifted(&self, form: Form, lifted: &Lifted, lora: Option<&str>) -> Prompt {
        let Request { input, salt } = read(form, &lifted.rest);
        let seed = Seed::new(lora, salt.as_deref());
        match input {
            // That is where they were.
            Input::Ids { ids, others } if ids.is_empty() && others.is_empty() => {
                Prompt::of_ids(Arc::clone(&lifted.ids), seed, Source::Ids)
            }
            _ => Prompt::unknown(estimate(lifted.length), seed),
        }
    }

    /// Reads a request and does all that can be done without asking anybody.
    /// `name` is what engines call the model: this may stand for all that are not configured.
    pub(super) fn prompt(
        &self,
        name: &str,
        form: Form,
        body: &Bytes,
        lora: Option<&str>,
        now: SystemTime,
        how: How,
    ) -> Outcome {
        let Request { input, salt } = read(form, body);
        let seed = Seed::new(lora, salt.as_deref());
        let known = match input {
            Input::Opaque if how.mode == Mode::Text => {
                let kept = body[..body.len().min(MAX_TEXT)].to_vec();
                let length = kept.len();
                Prompt::of_text(kept, seed).certain_up_to(length, estimate(body.len()))
            }
            Input::Opaque => Prompt::unknown(estimate(body.len()), seed),
            Input::Ids { ids, others } => {
                let of = |ids: Vec<u32>| Prompt::of_ids(ids, seed, Source::Ids);
                of(ids).with_others(others.into_iter().map(of).collect())
            }
            Input::Text { text, special, others } => match (how.mode, &self.local) {
                (Mode::Tokenizer, Some(local)) => {
                    let of = |text: String| {
                        let ids = local.loaded.tokenizer.encode(&text, special);
                        let ids = ids.map(|ids| Prompt::of_ids(ids, seed, Source::Tokenizer));
                        ids.unwrap_or_else(|error| {
                            self.failed(&error);
                            Prompt::of_text(bounded(text.into_bytes()), seed)
                        })
                    };
                    of(text).with_others(others.into_iter().map(of).collect())
                }
                (Mode::Engine, _) => {
                    let question = Question::of_text(name, &text, special);
                    // One question a request: of the others only the length is reckoned with.
                    let others =
                        others.iter().map(|text| Prompt::unknown(estimate(text.len()), seed)).collect();
                    return Outcome::Ask { question, seed, estimate: estimate(text.len()), others };
                }
                _ => {
                    let of = |text: String| of_text(text.into_bytes(), seed);
                    of(text).with_others(others.into_iter().map(of).collect())
                }
            },
            Input::Chat(chat) => match (how.mode, &self.local) {
                (Mode::Tokenizer, Some(local)) => self.converse(local, &chat, seed, now, how.dialect),
                (Mode::Engine, _) if !has_media(&chat) => {
                    let estimate = estimate(flat(&chat).len());
                    let question = Question::of_chat(name, &chat);
                    return Outcome::Ask { question, seed, estimate, others: Vec::new() };
                }
                // Engines put other ids where pictures are than they tell.
                (Mode::Engine, _) => Prompt::unknown(estimate(body.len()), seed),
                _ => of_text(flat(&chat), seed),
            },
        };
        Outcome::Known(known)
    }

    fn converse(&self, local: &Local, chat: &Chat, seed: Seed, now: SystemTime, dialect: Dialect) -> Prompt {
        match self.rendered(local, chat, seed, now, dialect) {
            Ok(prompt) => prompt,
            Err(why) => {
                self.failed(&why);
                of_text(flat(chat), seed)
            }
        }
    }

    fn rendered(
        &self,
        local: &Local,
        chat: &Chat,
        seed: Seed,
        now: SystemTime,
        dialect: Dialect,
    ) -> Result<Prompt, String> {
        let template = match (&local.tool_use, &chat.tools) {
            (Some(template), Some(_)) => template,
            _ => local.default.as_ref().ok_or("the model's directory has no chat template")?,
        };
        let Conversation { messages, mut tools } =
            normalise(chat, template.format(dialect), dialect, template.knows_developers)
                .ok_or("the conversation has a form that the engine's types do not know")?;
        if chat.no_tool_choice && self.options.exclude_tools_when_none {
            tools = None;
        }
        // SGLang opens every answer, and puts what is to be continued behind it as ids.
        let mut shown = &messages[..];
        let mut behind = None;
        let sglang = dialect == Dialect::Sglang;
        if let (true, Some((last, before))) = (sglang && chat.continue_final_message, shown.split_last())
            && last.text("role") == Some("assistant")
        {
            behind = Some(last.text("content").ok_or("what is to be continued is no text")?);
            shown = before;
        }
        let text = template.template.render(&Variables {
            messages: shown,
            tools: tools.as_deref(),
            add_generation_prompt: chat.add_generation_prompt || sglang,
            continue_final_message: chat.continue_final_message && !sglang,
            others: &[&local.loaded.special, &self.options.template_kwargs, &chat.kwargs],
            now,
        });
        let text = text.map_err(|error| format!("the chat template failed: {error}"))?;
        let tokenizer = &local.loaded.tokenizer;
        if let Some(media_at) = text.find(MEDIA) {
            let ids = tokenizer.encode_open(&text[..media_at], chat.special).map_err(|e| e.to_string())?;
            let certain = ids.len();
            let media = text.matches(MEDIA).count() * MEDIA_TOKENS;
            let tokens = certain + estimate(text.len() - media_at) + media;
            return Ok(Prompt::of_ids(ids, seed, Source::Tokenizer).certain_up_to(certain, tokens));
        }
        let mut ids = tokenizer.encode(&text, chat.special).map_err(|e| e.to_string())?;
        if let Some(behind) = behind {
            ids.extend(tokenizer.encode(behind, false).map_err(|e| e.to_string())?);
        }
        Ok(Prompt::of_ids(ids, seed, Source::Tokenizer))
    }

    fn failed(&self, why: &dyn std::fmt::Display) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                model = self.options.name,
                %why,
                "a prompt could not be rendered or tokenised as the engine does it, and is routed by its \
                 text; further ones are only counted"
            );
        }
    }
}

impl Template {
    fn new(template: ChatTemplate, given: Option<ContentFormat>) -> Self {
        let source = template.source();
        Self {
            given,
            detected: detect(source),
            speaks_of_media: ["image", "audio", "video", "vision"].iter().any(|word| source.contains(word)),
            knows_developers: source.contains("\"developer\"") || source.contains("'developer'"),
            template,
        }
    }

    fn format(&self, dialect: Dialect) -> ContentFormat {
        let found = match dialect {
            Dialect::Sglang if self.speaks_of_media => ContentFormat::OpenAi,
            _ => self.detected,
        };
        self.given.unwrap_or(found)
    }
}

fn bounded(mut text: Vec<u8>) -> Vec<u8> {
    text.truncate(MAX_TEXT);
    text
}

/// A prompt of text, of which the beginning is kept and the whole is counted.
fn of_text(text: Vec<u8>, seed: Seed) -> Prompt {
    let tokens = estimate(text.len());
    let kept = bounded(text);
    let length = kept.len();
    Prompt::of_text(kept, seed).certain_up_to(length, tokens)
}

/// A conversation as bytes of which a longer one of the same beginning has the same beginning:
/// tools, then messages, a line of JSON each.
fn flat(chat: &Chat) -> Vec<u8> {
    let mut out = Vec::new();
    for line in chat.tools.iter().flatten().chain(&chat.messages) {
        // Writing JSON to memory fails for nothing that came from JSON.
        let _ = serde_json::to_writer(&mut out, line);
        out.push(b'\n');
    }
    out
}

fn has_media(chat: &Chat) -> bool {
    let parts = chat.messages.iter().filter_map(|message| message.list("content")).flatten();
    parts.into_iter().any(|part| {
        let kind = part.text("type").unwrap_or_default();
        !matches!(part, Json::Text(_))
            && !matches!(
                kind,
                "text" | "input_text" | "output_text" | "refusal" | "thinking" | "tool_reference"
            )
    })
}
