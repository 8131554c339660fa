//! Replies of the two generation routes: key order and null-or-absent exactly as vLLM sends them.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use serde::ser::SerializeMap;

use super::error::ApiError;
use super::logprobs::{self, ChatLogprobs, CompletionLogprobs};
use super::request::{Request, Route};
use super::stream::Dialect;
use crate::engines::sim::outbox::{Delta, FinishReason, StopReason};
use crate::engines::sim::pd::Told;

/// The engine's version, as in its file name and replies.
pub const VERSION: &str = "0.32.0";
pub(super) const FINGERPRINT: &str = "vllm-0.32.0-645c23ca";

#[derive(Default)]
pub(super) struct Choice {
    started: bool,
    generated: usize,
    offset: usize,
    finished: bool,
    pub(super) text: String,
    pub(super) token_ids: Vec<u32>,
    pub(super) finish: Option<FinishReason>,
    pub(super) stop: Option<StopReason>,
    pub(super) transfer: Option<Arc<Told>>,
}

/// Turns deltas into the events or the one reply of a request.
pub struct Shaper {
    pub(super) request: Request,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) choices: Vec<Choice>,
    unfinished: usize,
    pub(super) cached_tokens: usize,
    pub(super) created_tokens: usize,
}

pub(super) struct Usage {
    pub(super) prompt: usize,
    pub(super) completion: usize,
    pub(super) details: Option<UsageDetails>,
    pub(super) completion_details: bool,
}

pub(super) struct UsageDetails {
    pub(super) cached: usize,
    /// Absent, null or a number.
    pub(super) created: Option<Option<usize>>,
    pub(super) multimodal: bool,
}

impl Serialize for UsageDetails {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("cached_tokens", &self.cached)?;
        if let Some(created) = &self.created {
            map.serialize_entry("created_cache_tokens", created)?;
        }
        if self.multimodal {
            map.serialize_entry("multimodal_tokens", &())?;
        }
        map.end()
    }
}

impl Serialize for Usage {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("prompt_tokens", &self.prompt)?;
        map.serialize_entry("total_tokens", &(self.prompt + self.completion))?;
        map.serialize_entry("completion_tokens", &self.completion)?;
        if let Some(details) = &self.details {
            map.serialize_entry("prompt_tokens_details", details)?;
        }
        if self.completion_details {
            map.serialize_entry("completion_tokens_details", &())?;
        }
        map.end()
    }
}

impl Serialize for StopReason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            StopReason::Text(text) => serializer.serialize_str(text),
            StopReason::Token(id) => serializer.serialize_u32(*id),
        }
    }
}

impl Serialize for FinishReason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// What an event ends with after its choices.
#[derive(Serialize)]
struct Tail<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    system_fingerprint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Option<&'a [u32]>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_text: Option<Option<&'a str>>,
}

impl Tail<'_> {
    const EMPTY: Tail<'static> =
        Tail { usage: None, system_fingerprint: None, prompt_token_ids: None, prompt_text: None };
}

#[derive(Serialize)]
struct Event<'a, C: Serialize> {
    id: &'a str,
    object: &'a str,
    created: u64,
    model: &'a str,
    choices: &'a [C],
    #[serde(flatten)]
    tail: Tail<'a>,
}

#[derive(Serialize)]
struct ChatDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'a str>,
    content: &'a str,
}

#[derive(Serialize)]
struct ChatEventChoice<'a> {
    index: usize,
    delta: ChatDelta<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<FinishReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Option<&'a StopReason>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Option<&'a [u32]>>,
}

#[derive(Serialize)]
struct CompletionEventChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<FinishReason>,
    stop_reason: Option<&'a StopReason>,
    prompt_token_ids: Option<&'a [u32]>,
    token_ids: Option<&'a [u32]>,
}

impl Shaper {
    /// For the reply `id` to a request.
    pub fn new(request: Request, id: String, created: u64) -> Self {
        let count = request.prompts.len() * request.n;
        Self {
            request,
            id,
            created,
            choices: (0..count).map(|_| Choice::default()).collect(),
            unfinished: count,
            cached_tokens: 0,
            created_tokens: 0,
        }
    }

    pub(super) fn prompt(&self, choice: usize) -> Arc<[u32]> {
        self.request.prompts[choice / self.request.n].clone()
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.request.prompts.iter().map(|prompt| prompt.len()).sum()
    }

    pub(super) fn completion_tokens(&self) -> usize {
        self.choices.iter().map(|choice| choice.generated).sum()
    }

    pub(super) fn is_chat(&self) -> bool {
        self.request.route == Route::Chat
    }

    fn note(&mut self, delta: &Delta) {
        let choice = &mut self.choices[delta.choice];
        if !choice.started && delta.choice.is_multiple_of(self.request.n) {
            self.cached_tokens += delta.cached_tokens;
            self.created_tokens += delta.created_tokens;
        }
        choice.started = true;
        choice.generated += delta.token_ids.len();
        if delta.finish.is_some() && !choice.finished {
            choice.finished = true;
            self.unfinished -= 1;
        }
    }

    fn running_usage(&self, choice: usize, generated: usize) -> Option<Usage> {
        self.request.continuous_usage.then(|| Usage {
            prompt: self.prompt(choice).len(),
            completion: generated,
            details: None,
            completion_details: self.is_chat(),
        })
    }

    fn event<C: Serialize>(&self, choices: &[C], tail: Tail<'_>, out: &mut VecDeque<Bytes>) {
        let event = Event {
            id: &self.id,
            object: if self.is_chat() { "chat.completion.chunk" } else { "text_completion" },
            created: self.created,
            model: &self.request.model,
            choices,
            tail,
        };
        let mut bytes = Vec::with_capacity(320);
        bytes.extend_from_slice(b"data: ");
        // Writing plain structs to memory cannot fail.
        if serde_json::to_writer(&mut bytes, &event).is_ok() {
            bytes.extend_from_slice(b"\n\n");
            out.push_back(Bytes::from(bytes));
        }
    }

    /// The role event of a choice; a chat's echo follows in an event of its own.
    fn chat_opening(&self, index: usize, ids: Option<&[u32]>, echo: Option<&str>, out: &mut VecDeque<Bytes>) {
        let texts = [Some(("assistant", "")), echo.map(|echo| ("", echo))];
        for (role, content) in texts.into_iter().flatten() {
            let opening = !role.is_empty();
            let choice = ChatEventChoice {
                index,
                delta: ChatDelta { role: opening.then_some(role), content },
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
                token_ids: None,
            };
            let tail = Tail {
                usage: self.running_usage(index, 0),
                system_fingerprint: None,
                prompt_token_ids: opening.then_some(ids),
                prompt_text: opening.then_some(None),
            };
            self.event(&[choice], tail, out);
        }
    }
}

impl Dialect for Shaper {
    fn is_finished(&self) -> bool {
        self.unfinished == 0
    }

    fn collect(&mut self, delta: Delta) {
        self.note(&delta);
        let choice = &mut self.choices[delta.choice];
        choice.text.push_str(&delta.text);
        choice.token_ids.extend_from_slice(&delta.token_ids);
        choice.transfer = delta.transfer.or(choice.transfer.take());
        if let Some((reason, stop)) = delta.finish {
            choice.finish = Some(reason);
            choice.stop = stop;
        }
    }

    fn reply(&self) -> Vec<u8> {
        self.whole()
    }

    fn stream(&mut self, delta: &Delta, out: &mut VecDeque<Bytes>) {
        let before = &self.choices[delta.choice];
        let (first, position, mut offset) = (!before.started, before.generated, before.offset);
        self.note(delta);
        let prompt = self.prompt(delta.choice);
        let ids = self.request.return_token_ids;
        let finished = delta.finish.is_some();
        let fingerprint =
            (finished && self.is_finished() && !self.request.include_usage).then_some(FINGERPRINT);
        let usage = self.running_usage(delta.choice, position + delta.token_ids.len());
        let tail = Tail { usage, system_fingerprint: fingerprint, ..Tail::EMPTY };
        let finish_reason = delta.finish.as_ref().map(|(reason, _)| *reason);
        let stop = delta.finish.as_ref().and_then(|(_, stop)| stop.as_ref());
        let echo =
            self.request.echo.as_ref().filter(|_| first).map(|texts| &texts[delta.choice / self.request.n]);
        let top = self.request.logprobs;
        if self.is_chat() {
            if first {
                self.chat_opening(delta.choice, ids.then_some(&prompt[..]), echo.map(String::as_str), out);
            }
            let choice = ChatEventChoice {
                index: delta.choice,
                delta: ChatDelta { role: None, content: &delta.text },
                logprobs: top.map(|top| logprobs::chat(&delta.token_ids, top)),
                finish_reason,
                stop_reason: finished.then_some(stop),
                token_ids: Some(ids.then_some(&delta.token_ids[..])),
            };
            self.event(&[choice], tail, out);
        } else {
            let echoed = echo.map(|echo| format!("{echo}{}", delta.text));
            let choice = CompletionEventChoice {
                index: delta.choice,
                text: echoed.as_deref().unwrap_or(&delta.text),
                logprobs: top.map(|top| logprobs::completion(&delta.token_ids, top, &mut offset)),
                finish_reason,
                stop_reason: stop,
                prompt_token_ids: (ids && first).then_some(&prompt[..]),
                token_ids: ids.then_some(&delta.token_ids[..]),
            };
            self.event(&[choice], tail, out);
        }
        // The next piece begins behind the tokens of this one, as vLLM counts.
        self.choices[delta.choice].offset = offset;
    }

    fn stream_end(&mut self, out: &mut VecDeque<Bytes>) {
        if self.request.include_usage {
            let usage = Usage {
                prompt: self.prompt_tokens(),
                completion: self.completion_tokens(),
                details: Some(UsageDetails {
                    cached: self.cached_tokens,
                    created: self.is_chat().then_some(Some(self.created_tokens)),
                    multimodal: false,
                }),
                completion_details: false,
            };
            let tail = Tail { usage: Some(usage), system_fingerprint: Some(FINGERPRINT), ..Tail::EMPTY };
            self.event::<()>(&[], tail, out);
        }
        out.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
    }

    fn stream_failed(&mut self, error: &ApiError, out: &mut VecDeque<Bytes>) {
        out.push_back(Bytes::from(error.event()));
        out.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
    }
}
