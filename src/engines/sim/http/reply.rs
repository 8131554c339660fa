//! The one reply to a request without a stream.

use serde::Serialize;
use serde::ser::SerializeMap;

use super::logprobs::{self, ChatLogprobs, CompletionLogprobs};
use super::shape::{Choice, FINGERPRINT, Shaper, Usage, UsageDetails};
use crate::engines::sim::outbox::{FinishReason, StopReason};

impl Shaper {
    /// The one reply.
    pub(super) fn whole(&self) -> Vec<u8> {
        let chat = self.is_chat();
        let usage = Usage {
            prompt: self.prompt_tokens(),
            completion: self.completion_tokens(),
            details: Some(UsageDetails {
                cached: self.cached_tokens,
                created: Some(chat.then_some(self.created_tokens)),
                multimodal: true,
            }),
            completion_details: true,
        };
        let ids = self.request.return_token_ids;
        let reply = Reply { shaper: self, usage, ids };
        serde_json::to_vec(&reply).unwrap_or_default()
    }
}

struct Reply<'a> {
    shaper: &'a Shaper,
    usage: Usage,
    ids: bool,
}

#[derive(Serialize)]
struct ChatMessage<'a> {
    role: &'a str,
    content: String,
    refusal: (),
    annotations: (),
    audio: (),
    function_call: (),
    reasoning: (),
}

#[derive(Serialize)]
struct ChatReplyChoice<'a> {
    index: usize,
    message: ChatMessage<'a>,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<FinishReason>,
    stop_reason: Option<&'a StopReason>,
    token_ids: Option<&'a [u32]>,
    routed_experts: (),
}

#[derive(Serialize)]
struct CompletionReplyChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<CompletionLogprobs>,
    finish_reason: Option<FinishReason>,
    stop_reason: Option<&'a StopReason>,
    token_ids: Option<&'a [u32]>,
    prompt_logprobs: (),
    prompt_token_ids: Option<&'a [u32]>,
    routed_experts: (),
}

impl Serialize for Reply<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let shaper = self.shaper;
        let request = &shaper.request;
        let chat = shaper.is_chat();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("id", &shaper.id)?;
        map.serialize_entry("object", if chat { "chat.completion" } else { "text_completion" })?;
        map.serialize_entry("created", &shaper.created)?;
        map.serialize_entry("model", &request.model)?;
        if chat {
            let choices: Vec<_> = shaper
                .choices
                .iter()
                .enumerate()
                .map(|(index, choice)| self.chat_choice(index, choice))
                .collect();
            map.serialize_entry("choices", &choices)?;
        } else {
            let texts: Vec<_> = (0..shaper.choices.len()).map(|index| self.echoed(index)).collect();
            let choices: Vec<_> =
                texts.iter().enumerate().map(|(index, text)| self.completion_choice(index, text)).collect();
            map.serialize_entry("choices", &choices)?;
        }
        map.serialize_entry("service_tier", &())?;
        map.serialize_entry("system_fingerprint", FINGERPRINT)?;
        map.serialize_entry("usage", &self.usage)?;
        if chat {
            let prompt = shaper.prompt(0);
            map.serialize_entry("prompt_logprobs", &())?;
            map.serialize_entry("prompt_token_ids", &self.ids.then_some(&prompt[..]))?;
            map.serialize_entry("prompt_text", &())?;
        }
        let transfer = shaper.choices.first().and_then(|choice| choice.transfer.as_deref());
        map.serialize_entry("kv_transfer_params", &transfer)?;
        for absent in ["ec_transfer_params", "metrics"] {
            map.serialize_entry(absent, &())?;
        }
        map.end()
    }
}

impl Reply<'_> {
    fn echo(&self, index: usize) -> &str {
        let request = &self.shaper.request;
        request.echo.as_ref().map_or("", |texts| &texts[index / request.n])
    }

    fn echoed(&self, index: usize) -> String {
        format!("{}{}", self.echo(index), self.shaper.choices[index].text)
    }

    fn chat_choice<'a>(&'a self, index: usize, choice: &'a Choice) -> ChatReplyChoice<'a> {
        let top = self.shaper.request.logprobs;
        ChatReplyChoice {
            index,
            message: ChatMessage {
                role: "assistant",
                content: self.echoed(index),
                refusal: (),
                annotations: (),
                audio: (),
                function_call: (),
                reasoning: (),
            },
            logprobs: top.map(|top| logprobs::chat(&choice.token_ids, top)),
            finish_reason: choice.finish,
            stop_reason: choice.stop.as_ref(),
            token_ids: self.ids.then_some(&choice.token_ids[..]),
            routed_experts: (),
        }
    }

    fn completion_choice<'a>(&'a self, index: usize, text: &'a str) -> CompletionReplyChoice<'a> {
        let request = &self.shaper.request;
        let choice = &self.shaper.choices[index];
        let logprobs = request.logprobs.map(|top| logprobs::completion(&choice.token_ids, top, &mut 0));
        CompletionReplyChoice {
            index,
            text,
            logprobs,
            finish_reason: choice.finish,
            stop_reason: choice.stop.as_ref(),
            token_ids: self.ids.then_some(&choice.token_ids[..]),
            prompt_logprobs: (),
            prompt_token_ids: self.ids.then_some(&request.prompts[index / request.n][..]),
            routed_experts: (),
        }
    }
}
