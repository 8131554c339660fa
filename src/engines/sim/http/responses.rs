//! `/v1/responses`: the envelope and the order of events as recorded from vLLM, around a message
//! of text. (The recorded model thinks aloud; the simulated one does not.)

use std::collections::VecDeque;

use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;

use super::error::ApiError;
use super::gathered::{Gathered, chat_body, chat_message, event};
use super::request::{Request, Route};
use super::stream::Dialect;
use crate::engines::sim::options::EngineSimArgs;
use crate::engines::sim::outbox::Delta;

/// Members that mean the same on both routes.
const MEMBERS: [(&str, &str); 9] = [
    ("model", "model"),
    ("stream", "stream"),
    ("max_output_tokens", "max_tokens"),
    ("temperature", "temperature"),
    ("cache_salt", "cache_salt"),
    ("seed", "seed"),
    ("stop", "stop"),
    ("ignore_eos", "ignore_eos"),
    ("priority", "priority"),
];

/// Types of text parts.
const TEXTS: [&str; 4] = ["input_text", "output_text", "text", "refusal"];

/// Answers one request.
pub(super) struct Responses {
    id: String,
    item: String,
    created: u64,
    model: String,
    instructions: Option<String>,
    metadata: Option<Value>,
    temperature: f64,
    top_p: f64,
    budget: usize,
    choice: Gathered,
    events: usize,
}

/// Reads a body.
pub(super) fn parse(body: &Value, args: &EngineSimArgs) -> Result<Request, ApiError> {
    let mut messages = Vec::new();
    if let Some(instructions) = body.get("instructions").filter(|text| !text.is_null()) {
        messages.push(chat_message(&"system".into(), Some(instructions), &TEXTS)?);
    }
    match body.get("input") {
        Some(Value::Array(items)) => {
            for item in items {
                if item.get("type").is_some_and(|kind| kind != "message") {
                    let message = "this model takes messages only";
                    return Err(ApiError::bad_request(message, Some("input")));
                }
                messages.push(chat_message(&item["role"], item.get("content"), &TEXTS)?);
            }
        }
        Some(text @ Value::String(_)) => messages.push(chat_message(&"user".into(), Some(text), &TEXTS)?),
        Some(other) => {
            return Err(ApiError::field("string_type", "input", "Input should be a valid string", other));
        }
        None => return Err(ApiError::missing("input", body)),
    }
    Request::from_value(Route::Chat, &chat_body(body, messages, &MEMBERS), args)
}

impl Responses {
    /// For a request that [`parse`] has read from `body`.
    pub(super) fn new(request: &Request, body: &Value, created: u64, args: &EngineSimArgs) -> Self {
        let number = |name: &str| body.get(name).and_then(Value::as_f64).unwrap_or(1.0);
        Self {
            id: format!("resp_{:016x}", super::random()),
            item: format!("msg_{:016x}", super::random()),
            created,
            model: request.model.clone(),
            instructions: body.get("instructions").and_then(Value::as_str).map(ToOwned::to_owned),
            metadata: body.get("metadata").filter(|metadata| !metadata.is_null()).cloned(),
            temperature: number("temperature"),
            top_p: number("top_p"),
            budget: request.budget(args),
            choice: Gathered::new(request),
            events: 0,
        }
    }

    fn text(&self, done: bool) -> Part<'_> {
        let text = if done { self.choice.text.as_str() } else { "" };
        Part { annotations: [], text, r#type: "output_text", logprobs: None }
    }

    fn message<'a>(&'a self, content: &'a [Part<'a>], status: &'a str) -> Item<'a> {
        Item { id: &self.item, content, role: "assistant", status, r#type: "message" }
    }

    fn response<'a>(&'a self, output: &'a [Item<'a>], done: bool) -> Response<'a> {
        let choice = &self.choice;
        let status = match (done, choice.is_cut()) {
            (false, _) => "in_progress",
            (true, true) => "incomplete",
            (true, false) => "completed",
        };
        Response {
            id: &self.id,
            created_at: self.created,
            incomplete_details: (status == "incomplete").then_some(Reason { reason: "max_output_tokens" }),
            instructions: self.instructions.as_deref(),
            metadata: self.metadata.as_ref(),
            model: &self.model,
            object: "response",
            output,
            parallel_tool_calls: true,
            temperature: self.temperature,
            tool_choice: "none",
            tools: [],
            top_p: self.top_p,
            background: false,
            max_output_tokens: self.budget,
            max_tool_calls: (),
            previous_response_id: (),
            prompt: (),
            reasoning: (),
            service_tier: "auto",
            status,
            text: (),
            top_logprobs: (),
            truncation: "disabled",
            usage: done.then(|| Usage {
                input_tokens: choice.prompt,
                input_tokens_details: InputDetails {
                    cached_tokens: choice.cached,
                    ..InputDetails::default()
                },
                output_tokens: choice.output,
                output_tokens_details: OutputDetails::default(),
                total_tokens: choice.prompt + choice.output,
            }),
            user: (),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            kv_transfer_params: (),
            ec_transfer_params: (),
            input_messages: (),
            output_messages: (),
        }
    }

    /// Numbers an event.
    fn next(&mut self) -> usize {
        self.events += 1;
        self.events - 1
    }

    /// `response.created`, `response.in_progress` or `response.completed`.
    fn whole(&mut self, name: &'static str, done: bool, out: &mut VecDeque<Bytes>) {
        let sequence_number = self.next();
        let content = [self.text(true)];
        let items = [self.message(&content, "completed")];
        let items: &[Item<'_>] = if done { &items } else { &[] };
        let response = self.response(items, done);
        out.push_back(event(name, &Whole { response, sequence_number, r#type: name }));
    }

    /// `response.output_item.added` or `.done`.
    fn item(&mut self, name: &'static str, done: bool, out: &mut VecDeque<Bytes>) {
        let sequence_number = self.next();
        let content = [self.text(true)];
        let content: &[Part<'_>] = if done { &content } else { &[] };
        let item = self.message(content, if done { "completed" } else { "in_progress" });
        out.push_back(event(name, &ItemEvent { item, output_index: 0, sequence_number, r#type: name }));
    }

    /// `response.content_part.added` or `.done`.
    fn part(&mut self, name: &'static str, done: bool, out: &mut VecDeque<Bytes>) {
        let sequence_number = self.next();
        let part = self.text(done);
        let data = PartEvent {
            content_index: 0,
            item_id: &self.item,
            output_index: 0,
            part,
            sequence_number,
            r#type: name,
        };
        out.push_back(event(name, &data));
    }
}

impl Dialect for Responses {
    fn is_finished(&self) -> bool {
        self.choice.finish.is_some()
    }

    fn collect(&mut self, delta: Delta) {
        self.choice.take(&delta);
    }

    fn reply(&self) -> Vec<u8> {
        let content = [self.text(true)];
        let items = [self.message(&content, "completed")];
        serde_json::to_vec(&self.response(&items, true)).unwrap_or_default()
    }

    fn stream(&mut self, delta: &Delta, out: &mut VecDeque<Bytes>) {
        if self.events == 0 {
            self.whole("response.created", false, out);
            self.whole("response.in_progress", false, out);
            self.item("response.output_item.added", false, out);
            self.part("response.content_part.added", false, out);
        }
        self.choice.take(delta);
        if !delta.text.is_empty() {
            let (sequence_number, name) = (self.next(), "response.output_text.delta");
            let data = TextDelta {
                content_index: 0,
                delta: &delta.text,
                item_id: &self.item,
                logprobs: [],
                output_index: 0,
                sequence_number,
                r#type: name,
            };
            out.push_back(event(name, &data));
        }
    }

    fn stream_end(&mut self, out: &mut VecDeque<Bytes>) {
        let (sequence_number, name) = (self.next(), "response.output_text.done");
        let data = TextDone {
            content_index: 0,
            item_id: &self.item,
            logprobs: [],
            output_index: 0,
            sequence_number,
            text: &self.choice.text,
            r#type: name,
        };
        out.push_back(event(name, &data));
        self.part("response.content_part.done", true, out);
        self.item("response.output_item.done", true, out);
        self.whole("response.completed", true, out);
    }

    fn stream_failed(&mut self, error: &ApiError, out: &mut VecDeque<Bytes>) {
        out.push_back(Bytes::from(error.event()));
    }
}

#[derive(Serialize)]
struct Part<'a> {
    annotations: [(); 0],
    text: &'a str,
    r#type: &'a str,
    logprobs: Option<()>,
}

#[derive(Serialize)]
struct Item<'a> {
    id: &'a str,
    content: &'a [Part<'a>],
    role: &'a str,
    status: &'a str,
    r#type: &'a str,
}

#[derive(Serialize)]
struct Reason<'a> {
    reason: &'a str,
}

#[derive(Default, Serialize)]
struct InputDetails {
    cached_tokens: usize,
    cache_write_tokens: usize,
    input_tokens_per_turn: [usize; 0],
    cached_tokens_per_turn: [usize; 0],
}

#[derive(Default, Serialize)]
struct OutputDetails {
    reasoning_tokens: usize,
    tool_output_tokens: usize,
    output_tokens_per_turn: [usize; 0],
    tool_output_tokens_per_turn: [usize; 0],
}

#[derive(Serialize)]
struct Usage {
    input_tokens: usize,
    input_tokens_details: InputDetails,
    output_tokens: usize,
    output_tokens_details: OutputDetails,
    total_tokens: usize,
}

#[derive(Serialize)]
struct Response<'a> {
    id: &'a str,
    created_at: u64,
    incomplete_details: Option<Reason<'a>>,
    instructions: Option<&'a str>,
    metadata: Option<&'a Value>,
    model: &'a str,
    object: &'a str,
    output: &'a [Item<'a>],
    parallel_tool_calls: bool,
    temperature: f64,
    tool_choice: &'a str,
    tools: [(); 0],
    top_p: f64,
    background: bool,
    max_output_tokens: usize,
    max_tool_calls: (),
    previous_response_id: (),
    prompt: (),
    reasoning: (),
    service_tier: &'a str,
    status: &'a str,
    text: (),
    top_logprobs: (),
    truncation: &'a str,
    usage: Option<Usage>,
    user: (),
    presence_penalty: f64,
    frequency_penalty: f64,
    kv_transfer_params: (),
    ec_transfer_params: (),
    input_messages: (),
    output_messages: (),
}

#[derive(Serialize)]
struct Whole<'a> {
    response: Response<'a>,
    sequence_number: usize,
    r#type: &'a str,
}

#[derive(Serialize)]
struct ItemEvent<'a> {
    item: Item<'a>,
    output_index: usize,
    sequence_number: usize,
    r#type: &'a str,
}

#[derive(Serialize)]
struct PartEvent<'a> {
    content_index: usize,
    item_id: &'a str,
    output_index: usize,
    part: Part<'a>,
    sequence_number: usize,
    r#type: &'a str,
}

#[derive(Serialize)]
struct TextDelta<'a> {
    content_index: usize,
    delta: &'a str,
    item_id: &'a str,
    logprobs: [(); 0],
    output_index: usize,
    sequence_number: usize,
    r#type: &'a str,
}

#[derive(Serialize)]
struct TextDone<'a> {
    content_index: usize,
    item_id: &'a str,
    logprobs: [(); 0],
    output_index: usize,
    sequence_number: usize,
    text: &'a str,
    r#type: &'a str,
}
