//! `/generate`: SGLang's own route, with one prompt or several. Each event has all that was generated so far
//! for one of them, or with `--incremental-streaming-output` what is new.

use std::collections::VecDeque;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::logprobs;
use super::request::{Request, Route};
use super::stream::Dialect;
use crate::engines::sim::options::EngineSimArgs;
use crate::engines::sim::outbox::{Delta, FinishReason, StopReason};

/// Sampling parameters, and the member of `/v1/completions` that means the same.
const PARAMETERS: [(&str, &str); 9] = [
    ("max_new_tokens", "max_tokens"),
    ("min_new_tokens", "min_tokens"),
    ("temperature", "temperature"),
    ("sampling_seed", "seed"),
    ("stop", "stop"),
    ("stop_token_ids", "stop_token_ids"),
    ("ignore_eos", "ignore_eos"),
    ("skip_special_tokens", "skip_special_tokens"),
    ("n", "n"),
];

/// Members that are the same there.
const SAME: [&str; 7] =
    ["stream", "model", "cache_salt", "rid", "bootstrap_host", "bootstrap_port", "bootstrap_room"];

/// Most new tokens where the request does not say.
const MAX_NEW_TOKENS: u64 = 128;

/// One result of a request.
#[derive(Default)]
struct Choice {
    id: String,
    prompt: usize,
    cached: usize,
    text: String,
    ids: Vec<u32>,
    finish: Option<(FinishReason, Option<StopReason>)>,
    /// With `return_logprob`: those of the prompt that were asked for.
    input_logprobs: Option<Vec<Value>>,
}

/// Answers one request.
pub(super) struct Native {
    choices: Vec<Choice>,
    unfinished: usize,
    /// Whether the answer is a list.
    batch: bool,
    incremental: bool,
    prefill: bool,
}

/// Whether the prompt of this body is a list of prompts.
fn is_batch(body: &Value) -> bool {
    match (&body["text"], &body["input_ids"]) {
        (Value::Array(_), _) => true,
        (_, Value::Array(ids)) => ids.first().is_some_and(Value::is_array),
        _ => false,
    }
}

/// Reads a body.
pub(super) fn parse(body: &Value, args: &EngineSimArgs) -> Result<Request, ApiError> {
    let given = |name: &str| body.get(name).filter(|value| !value.is_null());
    let prompt = match (given("text"), given("input_ids")) {
        (Some(prompt), None) | (None, Some(prompt)) => prompt,
        (None, None) => {
            return Err(ApiError::bad_request("Either text or input_ids should be provided.", None));
        }
        (Some(_), Some(_)) => {
            return Err(ApiError::bad_request("text and input_ids cannot both be provided.", None));
        }
    };
    let mut completion = Map::new();
    completion.insert("prompt".into(), prompt.clone());
    completion.insert("max_tokens".into(), MAX_NEW_TOKENS.into());
    let parameters = given("sampling_params");
    if let Some(other) = parameters.filter(|value| !value.is_object()) {
        let message = "Input should be a valid dictionary";
        return Err(ApiError::field("dict_type", "sampling_params", message, other));
    }
    for (theirs, ours) in PARAMETERS {
        let value = parameters.and_then(|parameters| parameters.get(theirs));
        if let Some(value) = value.filter(|value| !value.is_null()) {
            completion.insert(ours.into(), value.clone());
        }
    }
    for same in SAME {
        if let Some(value) = given(same) {
            completion.insert(same.into(), value.clone());
        }
    }
    Request::from_value(Route::Completions, &Value::Object(completion), args)
}

impl Native {
    /// For a request that [`parse`] has read.
    pub(super) fn new(request: &Request, body: &Value, id: &str, args: &EngineSimArgs) -> Self {
        let count = request.prompts.len() * request.n;
        let batch = is_batch(body) || request.n > 1;
        let from = body["logprob_start_len"].as_i64().unwrap_or(-1);
        let logprobs = body["return_logprob"].as_bool().unwrap_or(false);
        let choice = |at: usize| {
            let prompt = &request.prompts[at / request.n];
            let rid = match &body["rid"] {
                Value::String(rid) if !batch => rid.clone(),
                Value::Array(rids) => rids.get(at).and_then(Value::as_str).unwrap_or(id).to_owned(),
                _ if batch => format!("{id}-{at}"),
                _ => id.to_owned(),
            };
            let start = usize::try_from(from).unwrap_or(prompt.len()).min(prompt.len());
            let input_logprobs = logprobs.then(|| logprobs::native_of_prompt(prompt, start));
            Choice { id: rid, prompt: prompt.len(), input_logprobs, ..Choice::default() }
        };
        Self {
            choices: (0..count).map(choice).collect(),
            unfinished: count,
            batch,
            incremental: args.incremental_streaming_output,
            prefill: args.pd.is_prefill(),
        }
    }

    fn take(&mut self, delta: &Delta) {
        let choice = &mut self.choices[delta.choice];
        choice.cached = delta.cached_tokens;
        choice.text.push_str(&delta.text);
        choice.ids.extend_from_slice(&delta.token_ids);
        if delta.finish.is_some() && choice.finish.is_none() {
            choice.finish.clone_from(&delta.finish);
            self.unfinished -= 1;
        }
    }

    /// What is said of a choice, with this text and these ids of it.
    fn result(&self, choice: &Choice, text: &str, ids: &[u32]) -> Value {
        let mut result = json!({
            "text": text,
            "output_ids": ids,
            "meta_info": {
                "id": choice.id,
                "finish_reason": self.finish_reason(choice),
                "prompt_tokens": choice.prompt,
                "weight_version": "default",
                "completion_tokens": choice.ids.len(),
                "cached_tokens": choice.cached,
            },
        });
        if let Some(input) = &choice.input_logprobs {
            let meta = &mut result["meta_info"];
            meta["input_token_logprobs"] = input.clone().into();
            meta["output_token_logprobs"] = logprobs::native(ids).into();
        }
        result
    }

    fn finish_reason(&self, choice: &Choice) -> Value {
        match &choice.finish {
            None => Value::Null,
            // SGLang's prefill engines say this of every request.
            Some((FinishReason::Stop | FinishReason::Length, _)) if self.prefill => {
                json!({"type": "length", "length": 0})
            }
            Some((FinishReason::Length, _)) => json!({"type": "length", "length": choice.ids.len()}),
            Some((FinishReason::Abort, _)) => json!({"type": "abort", "message": "Aborted"}),
            Some((FinishReason::Stop, Some(StopReason::Text(text)))) => {
                json!({"type": "stop", "matched": text})
            }
            Some((FinishReason::Stop, _)) => json!({"type": "stop", "matched": choice.ids.last()}),
        }
    }
}

impl Dialect for Native {
    fn is_finished(&self) -> bool {
        self.unfinished == 0
    }

    fn collect(&mut self, delta: Delta) {
        self.take(&delta);
    }

    fn reply(&self) -> Vec<u8> {
        let result = |choice: &Choice| self.result(choice, &choice.text, &choice.ids);
        let reply = match (self.batch, self.choices.first()) {
            (false, Some(choice)) => result(choice),
            _ => self.choices.iter().map(result).collect(),
        };
        reply.to_string().into_bytes()
    }

    fn stream(&mut self, delta: &Delta, out: &mut VecDeque<Bytes>) {
        self.take(delta);
        let choice = &self.choices[delta.choice];
        let mut event = match self.incremental {
            true => self.result(choice, &delta.text, &delta.token_ids),
            false => self.result(choice, &choice.text, &choice.ids),
        };
        if self.batch {
            event["index"] = delta.choice.into();
        }
        out.push_back(format!("data: {event}\n\n").into());
    }

    fn stream_end(&mut self, out: &mut VecDeque<Bytes>) {
        out.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
    }

    fn stream_failed(&mut self, error: &ApiError, out: &mut VecDeque<Bytes>) {
        if error.is_sglang() {
            // An ordinary event, whose finish reason says it.
            for at in 0..self.choices.len() {
                let choice = &self.choices[at];
                if choice.finish.is_some() {
                    continue;
                }
                let mut event = self.result(choice, &choice.text, &choice.ids);
                event["meta_info"]["finish_reason"] = json!({
                    "type": "abort", "message": error.message, "status_code": error.status.as_u16(), "err_type": null,
                });
                if self.batch {
                    event["index"] = at.into();
                }
                out.push_back(format!("data: {event}\n\n").into());
            }
        } else {
            out.push_back([b"data: ", error.body().as_slice(), b"\n\n"].concat().into());
        }
        self.stream_end(out);
    }
}
