//! `/v1/messages`: Anthropic's Messages API as vLLM answers it, text only.

use std::collections::VecDeque;

use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;

use super::error::ApiError;
use super::gathered::{Gathered, chat_body, chat_message, event};
use super::request::{Request, Route};
use super::stream::Dialect;
use crate::engines::sim::options::EngineSimArgs;
use crate::engines::sim::outbox::{Delta, StopReason};

/// Members that mean the same on both routes.
const MEMBERS: [(&str, &str); 5] = [
    ("model", "model"),
    ("stream", "stream"),
    ("max_tokens", "max_tokens"),
    ("temperature", "temperature"),
    ("stop_sequences", "stop"),
];

/// Answers one request.
pub(super) struct Messages {
    id: String,
    model: String,
    choice: Gathered,
    started: bool,
}

/// Reads a body.
pub(super) fn parse(body: &Value, args: &EngineSimArgs) -> Result<Request, ApiError> {
    for required in ["model", "messages", "max_tokens"] {
        if body.get(required).is_none() {
            return Err(ApiError::missing(required, body));
        }
    }
    let mut messages = Vec::new();
    if let Some(system) = body.get("system").filter(|system| !system.is_null()) {
        messages.push(chat_message(&"system".into(), Some(system), &["text"])?);
    }
    let list = body["messages"].as_array().ok_or_else(|| {
        ApiError::field("list_type", "messages", "Input should be a valid list", &body["messages"])
    })?;
    for message in list {
        messages.push(chat_message(&message["role"], message.get("content"), &["text"])?);
    }
    Request::from_value(Route::Chat, &chat_body(body, messages, &MEMBERS), args)
}

/// The body of an error.
pub(super) fn error_body(error: &ApiError) -> Vec<u8> {
    #[derive(Serialize)]
    struct Outer<'a> {
        r#type: &'a str,
        error: Inner<'a>,
    }
    #[derive(Serialize)]
    struct Inner<'a> {
        r#type: &'a str,
        message: &'a str,
    }
    let inner = Inner { r#type: error.kind, message: &error.message };
    serde_json::to_vec(&Outer { r#type: "error", error: inner }).unwrap_or_default()
}

impl Messages {
    /// For a request that [`parse`] has read.
    pub(super) fn new(request: &Request, id: &str) -> Self {
        let id = id.to_owned();
        Self { id, model: request.model.clone(), choice: Gathered::new(request), started: false }
    }

    fn usage(&self) -> Usage {
        Usage {
            input_tokens: self.choice.prompt - self.choice.cached.min(self.choice.prompt),
            output_tokens: self.choice.output,
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: self.choice.cached,
        }
    }

    fn message<'a>(&'a self, content: &'a [Block<'a>]) -> Message<'a> {
        let (stop_reason, stop_sequence) = self.stop();
        Message {
            id: &self.id,
            r#type: "message",
            role: "assistant",
            content,
            model: &self.model,
            stop_reason,
            stop_sequence,
            usage: self.usage(),
        }
    }

    fn stop(&self) -> (Option<&str>, Option<&str>) {
        match &self.choice.finish {
            None => (None, None),
            Some(_) if self.choice.is_cut() => (Some("max_tokens"), None),
            Some((_, Some(StopReason::Text(text)))) => (Some("stop_sequence"), Some(text)),
            Some(_) => (Some("end_turn"), None),
        }
    }
}

impl Dialect for Messages {
    fn is_finished(&self) -> bool {
        self.choice.finish.is_some()
    }

    fn collect(&mut self, delta: Delta) {
        self.choice.take(&delta);
    }

    fn reply(&self) -> Vec<u8> {
        let content = [Block { r#type: "text", text: &self.choice.text }];
        serde_json::to_vec(&self.message(&content)).unwrap_or_default()
    }

    fn stream(&mut self, delta: &Delta, out: &mut VecDeque<Bytes>) {
        if !self.started {
            self.started = true;
            // The start speaks of the prompt only.
            self.choice.cached = delta.cached_tokens;
            let start = Start { r#type: "message_start", message: self.message(&[]) };
            out.push_back(event("message_start", &start));
            let block = Block { r#type: "text", text: "" };
            let start = BlockStart { r#type: "content_block_start", content_block: block, index: 0 };
            out.push_back(event("content_block_start", &start));
        }
        self.choice.take(delta);
        if !delta.text.is_empty() {
            let text = TextDelta { r#type: "text_delta", text: &delta.text };
            let data = BlockDelta { r#type: "content_block_delta", delta: text, index: 0 };
            out.push_back(event("content_block_delta", &data));
        }
    }

    fn stream_end(&mut self, out: &mut VecDeque<Bytes>) {
        let stop = BlockStop { r#type: "content_block_stop", index: 0 };
        out.push_back(event("content_block_stop", &stop));
        let (stop_reason, stop_sequence) = self.stop();
        let delta = MessageDelta {
            r#type: "message_delta",
            delta: End { stop_reason, stop_sequence },
            usage: self.usage(),
        };
        out.push_back(event("message_delta", &delta));
        out.push_back(event("message_stop", &Stop { r#type: "message_stop" }));
    }

    fn stream_failed(&mut self, error: &ApiError, out: &mut VecDeque<Bytes>) {
        let body = error_body(error);
        out.push_back([b"event: error\ndata: ", body.as_slice(), b"\n\n"].concat().into());
    }
}

#[derive(Serialize)]
struct Usage {
    input_tokens: usize,
    output_tokens: usize,
    cache_creation_input_tokens: usize,
    cache_read_input_tokens: usize,
}

#[derive(Serialize)]
struct Block<'a> {
    r#type: &'a str,
    text: &'a str,
}

#[derive(Serialize)]
struct Message<'a> {
    id: &'a str,
    r#type: &'a str,
    role: &'a str,
    content: &'a [Block<'a>],
    model: &'a str,
    stop_reason: Option<&'a str>,
    stop_sequence: Option<&'a str>,
    usage: Usage,
}

#[derive(Serialize)]
struct Start<'a> {
    r#type: &'a str,
    message: Message<'a>,
}

#[derive(Serialize)]
struct BlockStart<'a> {
    r#type: &'a str,
    content_block: Block<'a>,
    index: usize,
}

#[derive(Serialize)]
struct TextDelta<'a> {
    r#type: &'a str,
    text: &'a str,
}

#[derive(Serialize)]
struct BlockDelta<'a> {
    r#type: &'a str,
    delta: TextDelta<'a>,
    index: usize,
}

#[derive(Serialize)]
struct BlockStop<'a> {
    r#type: &'a str,
    index: usize,
}

#[derive(Serialize)]
struct End<'a> {
    stop_reason: Option<&'a str>,
    stop_sequence: Option<&'a str>,
}

#[derive(Serialize)]
struct MessageDelta<'a> {
    r#type: &'a str,
    delta: End<'a>,
    usage: Usage,
}

#[derive(Serialize)]
struct Stop<'a> {
    r#type: &'a str,
}
