//! What a client understands of a stream, however it was cut into events.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::splice::sse::Event;

/// One choice, all events joined.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Choice {
    pub(super) roles: usize,
    pub(super) text: String,
    pub(super) reasoning: String,
    pub(super) ids: Vec<u64>,
    pub(super) logprobs: BTreeMap<String, Vec<Value>>,
    pub(super) finish: Option<Value>,
    pub(super) stop: Option<Value>,
    /// Running counts, of the last event that had them.
    pub(super) running: Option<Value>,
}

/// All of a stream.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct View {
    pub(super) choices: BTreeMap<u64, Choice>,
    pub(super) usage: Option<(u64, u64)>,
    pub(super) names: Vec<(Value, Value, Value, Value)>,
    pub(super) prompt_ids: bool,
    pub(super) fingerprint: bool,
    pub(super) done: bool,
}

impl View {
    pub(super) fn of<'a>(events: impl IntoIterator<Item = &'a Event>) -> Self {
        let mut view = Self::default();
        for event in events {
            view.take(event);
        }
        view
    }

    fn take(&mut self, event: &Event) {
        assert!(!self.done, "something after the end: {event:?}");
        if &event.data[..] == b"[DONE]" {
            self.done = true;
            return;
        }
        let value: Value = serde_json::from_slice(&event.data).expect("every event is JSON");
        assert!(value.get("error").is_none());
        let name = ["id", "object", "created", "model"].map(|key| value[key].clone());
        let [id, object, created, model] = name;
        let name = (id, object, created, model);
        if !self.names.contains(&name) {
            self.names.push(name);
        }
        self.prompt_ids |= value["prompt_token_ids"].is_array();
        self.fingerprint |= value["system_fingerprint"].is_string();
        let choices = value["choices"].as_array().unwrap();
        if choices.is_empty() {
            assert!(self.usage.is_none(), "usage twice");
            let count = |key: &str| value["usage"][key].as_u64().unwrap();
            assert_eq!(count("total_tokens"), count("prompt_tokens") + count("completion_tokens"));
            self.usage = Some((count("prompt_tokens"), count("completion_tokens")));
        }
        for said in choices {
            let choice = self.choices.entry(said["index"].as_u64().unwrap()).or_default();
            assert!(choice.finish.is_none(), "something after the finish: {value}");
            self.prompt_ids |= said["prompt_token_ids"].is_array();
            let delta = &said["delta"];
            choice.roles += usize::from(delta["role"].is_string());
            choice.text += said["text"].as_str().or(delta["content"].as_str()).unwrap_or_default();
            choice.reasoning += delta["reasoning"].as_str().unwrap_or_default();
            choice.ids.extend(said["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
            for (list, values) in said["logprobs"].as_object().into_iter().flatten() {
                choice
                    .logprobs
                    .entry(list.clone())
                    .or_default()
                    .extend(values.as_array().unwrap().iter().cloned());
            }
            if value["usage"].is_object() {
                let mut counts = value["usage"].clone();
                counts.as_object_mut().unwrap().remove("completion_tokens_details");
                let now = counts["completion_tokens"].as_u64();
                let before =
                    choice.running.as_ref().and_then(|running| running["completion_tokens"].as_u64());
                assert!(now >= before, "counts go back");
                choice.running = Some(counts);
            }
            if !said["finish_reason"].is_null() {
                choice.finish = Some(said["finish_reason"].clone());
                choice.stop = Some(said["stop_reason"].clone());
            }
        }
    }
}
