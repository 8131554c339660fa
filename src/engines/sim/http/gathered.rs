//! What routes with one choice keep of it: text, counts, and how it ended.

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::request::Request;
use crate::engines::sim::outbox::{Delta, FinishReason, StopReason};

/// The one choice so far.
#[derive(Debug)]
pub(super) struct Gathered {
    /// Ids of the prompt.
    pub(super) prompt: usize,
    /// Of these, out of the prefix cache.
    pub(super) cached: usize,
    /// Ids generated.
    pub(super) output: usize,
    /// Their text.
    pub(super) text: String,
    /// Set at the end.
    pub(super) finish: Option<(FinishReason, Option<StopReason>)>,
}

impl Gathered {
    /// Nothing yet.
    pub(super) fn new(request: &Request) -> Self {
        let prompt = request.prompts.first().map_or(0, |prompt| prompt.len());
        Self { prompt, cached: 0, output: 0, text: String::new(), finish: None }
    }

    /// Takes note of a delta.
    pub(super) fn take(&mut self, delta: &Delta) {
        // Every delta says it again.
        self.cached = delta.cached_tokens;
        self.output += delta.token_ids.len();
        self.text.push_str(&delta.text);
        if delta.finish.is_some() {
            self.finish.clone_from(&delta.finish);
        }
    }

    /// Whether it ran out of tokens.
    pub(super) fn is_cut(&self) -> bool {
        matches!(self.finish, Some((FinishReason::Length, _)))
    }
}

/// An event with a name.
pub(super) fn event(name: &str, data: &impl Serialize) -> Bytes {
    let mut bytes = format!("event: {name}\ndata: ").into_bytes();
    // Writing plain structs to memory cannot fail.
    let _ = serde_json::to_writer(&mut bytes, data);
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// Makes a chat body of a body in another dialect: `messages` as given, these members under
/// their chat names, and nothing else.
pub(super) fn chat_body(body: &Value, messages: Vec<Value>, members: &[(&str, &str)]) -> Value {
    let mut chat = Map::new();
    chat.insert("messages".into(), messages.into());
    for (theirs, ours) in members {
        if let Some(value) = body.get(*theirs) {
            chat.insert((*ours).into(), value.clone());
        }
    }
    Value::Object(chat)
}

/// A chat message of text, or of the text parts that have one of these types.
pub(super) fn chat_message(role: &Value, content: Option<&Value>, types: &[&str]) -> Result<Value, ApiError> {
    let text = match content {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| {
                let is_text = part["type"].as_str().is_some_and(|kind| types.contains(&kind));
                part["text"].as_str().filter(|_| is_text).map(ToOwned::to_owned)
            };
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            let unknown = || ApiError::bad_request("this model takes text parts only", Some("content"));
            texts.ok_or_else(unknown)?.join("\n")
        }
        _ => return Err(ApiError::bad_request("content must be text or a list of parts", Some("content"))),
    };
    let role = if role == "developer" { &Value::String("system".into()) } else { role };
    Ok(serde_json::json!({"role": role, "content": text}))
}
