//! Request bodies of the two generation routes, checked and brought to one form.

use std::sync::Arc;

use http::StatusCode;
use serde_json::Value;

use super::error::ApiError;
use super::split::Split;
use crate::engines::sim::kv::Namespace;
use crate::engines::sim::options::EngineSimArgs;
use crate::engines::sim::outbox::Outbox;
use crate::engines::sim::scheduler::{StopRules, Submission};
use crate::engines::sim::text::{TextState, mix};
use crate::engines::sim::tokenizer::{self, ChatEnd, Message};

/// Which of the two routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

/// A checked request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Where it came in.
    pub route: Route,
    /// The model as the client named it.
    pub model: String,
    /// Its prompts; more than one only on `/v1/completions`.
    pub prompts: Vec<Arc<[u32]>>,
    /// Choices for each prompt.
    pub n: usize,
    /// Server-sent events or one reply.
    pub stream: bool,
    /// A last event with the usage.
    pub include_usage: bool,
    /// The usage so far in every event.
    pub continuous_usage: bool,
    /// Ids of prompt and output in the reply.
    pub return_token_ids: bool,
    /// Log probabilities, with this many alternatives.
    pub logprobs: Option<usize>,
    /// Text to put in front of each prompt's output.
    pub echo: Option<Vec<String>>,
    seed: Option<u64>,
    greedy: bool,
    namespace: Namespace,
    rules: StopRules,
    max_tokens: Option<usize>,
    /// What it has to do with another engine.
    split: Split,
}

/// Most choices and prompts of one request.
const MAX_SEQUENCES: usize = 4096;

struct Fields<'a>(&'a Value);

impl<'a> Fields<'a> {
    fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, ApiError> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(ApiError::field("bool_type", name, "Input should be a valid boolean", other)),
        }
    }

    fn integer(&self, name: &str) -> Result<Option<i64>, ApiError> {
        self.get(name)
            .map(|value| {
                value.as_i64().ok_or_else(|| {
                    ApiError::field("int_type", name, "Input should be a valid integer", value)
                })
            })
            .transpose()
    }

    fn count(&self, name: &str, least: i64) -> Result<Option<usize>, ApiError> {
        let Some(number) = self.integer(name)? else { return Ok(None) };
        if number < least {
            return Err(ApiError::bad_request(
                format!("{name} must be at least {least}, got {number}."),
                Some(name),
            ));
        }
        Ok(Some(usize::try_from(number).unwrap_or(usize::MAX)))
    }

    fn text(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.get(name)
            .map(|value| {
                value.as_str().ok_or_else(|| {
                    ApiError::field("string_type", name, "Input should be a valid string", value)
                })
            })
            .transpose()
    }
}

impl Request {
    /// Reads a body; all that is wrong with it comes out as vLLM's reply.
    pub fn parse(route: Route, body: &[u8], args: &EngineSimArgs) -> Result<Self, ApiError> {
        Self::from_value(route, &object(body)?, args)
    }

    /// Reads a body that was taken apart already.
    pub fn from_value(route: Route, body: &Value, args: &EngineSimArgs) -> Result<Self, ApiError> {
        let fields = Fields(body);
        let (prompts, echo_texts) = match route {
            Route::Chat => chat_prompt(&fields)?,
            Route::Completions => completion_prompts(&fields)?,
        };
        let model = fields.text("model")?.unwrap_or(&args.models[0]).to_owned();
        let namespace =
            Namespace { lora: check_model(&model, args)?, salt: fields.text("cache_salt")?.map(Into::into) };
        fields.integer("priority")?;
        let n = fields.count("n", 1)?.unwrap_or(1);
        if n.saturating_mul(prompts.len()) > MAX_SEQUENCES {
            return Err(ApiError::bad_request(
                format!("n must be at most {MAX_SEQUENCES}, got {n}."),
                Some("n"),
            ));
        }
        let greedy = fields.get("temperature").and_then(Value::as_f64).is_some_and(|heat| heat < 1e-5);
        if greedy && n > 1 {
            return Err(ApiError::bad_request(
                format!("n must be 1 when using greedy sampling, got {n}."),
                None,
            ));
        }
        let max_tokens = match route {
            Route::Chat => fields.count("max_completion_tokens", 1)?.or(fields.count("max_tokens", 1)?),
            Route::Completions => Some(fields.count("max_tokens", 1)?.unwrap_or(16)),
        };
        for prompt in &prompts {
            check_length(prompt, args)?;
        }
        let options = fields.get("stream_options").cloned().unwrap_or_default();
        let options = Fields(&options);
        let include_usage = options.flag("include_usage", false)?;
        let seed = fields.integer("seed")?.map(|seed| mix(seed as u64 ^ 0x5eed));
        Ok(Self {
            route,
            model,
            n,
            stream: fields.flag("stream", false)?,
            include_usage,
            continuous_usage: include_usage && options.flag("continuous_usage_stats", false)?,
            return_token_ids: fields.flag("return_token_ids", false)?,
            logprobs: logprobs(route, &fields)?,
            echo: fields.flag("echo", false)?.then_some(echo_texts),
            seed,
            greedy,
            namespace,
            rules: stop_rules(&fields)?,
            max_tokens,
            split: Split::read(body, n * prompts.len(), args)?,
            prompts,
        })
    }

    /// Has it share its prompt with another engine as that engine's router says.
    pub(super) fn split_by(&mut self, split: Split) {
        self.split = split;
    }

    /// The rank of an SGLang engine that it belongs to: by its first room.
    pub(super) fn rank_of_room(&self, args: &EngineSimArgs) -> Option<i64> {
        let rank = self.split.first_room()? % u64::from(args.dp);
        i64::try_from(rank).ok().filter(|_| self.split.is_prefill())
    }

    /// Most tokens that may be generated for its first prompt.
    pub fn budget(&self, args: &EngineSimArgs) -> usize {
        let room = args.context_length() - self.prompts.first().map_or(0, |prompt| prompt.len());
        self.max_tokens.unwrap_or(room).min(room)
    }

    /// The sequences to generate, for the engine; `id` is the reply's id.
    pub fn submissions(&self, id: &str, args: &EngineSimArgs, outbox: &Arc<Outbox>) -> Vec<Submission> {
        let lora = self.namespace.lora.as_deref().unwrap_or("");
        let weights = lora.bytes().fold(args.seed, |hash, byte| mix(hash ^ u64::from(byte)));
        let count = self.prompts.len() * self.n;
        (0..count)
            .map(|choice| {
                let prompt = &self.prompts[choice / self.n];
                let sample = (choice % self.n) as u64;
                let draw = match self.seed {
                    Some(seed) if !self.greedy => seed.wrapping_add(sample) | 1 << 63,
                    _ => 0,
                };
                let room = args.context_length() - prompt.len();
                let suffix =
                    if self.route == Route::Chat { String::new() } else { format!("-{}", choice / self.n) };
                let id = format!("{id}{suffix}");
                let (leg, private) = (self.split.leg(choice, &id), self.split.keeps_to_itself());
                let asked = self.max_tokens.unwrap_or(room).min(room);
                let mut rules = StopRules { max_tokens: asked, ..self.rules.clone() };
                if self.split.is_prefill() {
                    // One id, whatever it is.
                    (rules.max_tokens, rules.ignore_eos) = (1, true);
                    (rules.stop, rules.stop_token_ids) = ([].into(), [].into());
                }
                Submission {
                    leg,
                    private,
                    id,
                    prompt: prompt.clone(),
                    choice,
                    outbox: outbox.clone(),
                    namespace: self.namespace.clone(),
                    text: TextState::new(weights, draw, args.eos_every).of_choice(sample, prompt.len()),
                    rules,
                }
            })
            .collect()
    }
}

/// The adapter that a model name stands for, or none for the base model.
pub fn check_model(name: &str, args: &EngineSimArgs) -> Result<Option<Arc<str>>, ApiError> {
    if args.loras.iter().any(|lora| lora == name) {
        return Ok(Some(name.into()));
    }
    if args.models.iter().any(|model| model == name) {
        return Ok(None);
    }
    Err(ApiError::unknown_model(name, &args.models))
}

fn check_length(prompt: &[u32], args: &EngineSimArgs) -> Result<(), ApiError> {
    if prompt.is_empty() {
        return Err(ApiError::bad_request("The decoder prompt cannot be empty", None));
    }
    if let Some(id) = prompt.iter().find(|id| **id >= tokenizer::VOCABULARY) {
        return Err(ApiError::bad_request(format!("Token id {id} is out of vocabulary"), None));
    }
    let (limit, length) = (args.context_length(), prompt.len());
    if length >= limit {
        let message = format!(
            "This model's maximum context length is {limit} tokens. However, your prompt contains {length} input \
             tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input \
             prompt. (parameter=input_tokens, value={length})"
        );
        return Err(ApiError::bad_request(message, Some("input_tokens")));
    }
    Ok(())
}

fn logprobs(route: Route, fields: &Fields<'_>) -> Result<Option<usize>, ApiError> {
    let wanted = match route {
        Route::Completions => fields.count("logprobs", 0)?,
        Route::Chat if fields.flag("logprobs", false)? => Some(fields.count("top_logprobs", 0)?.unwrap_or(0)),
        Route::Chat => None,
    };
    if let Some(wanted) = wanted.filter(|wanted| *wanted > 20) {
        let message = format!("Requested sample logprobs of {wanted}, which is greater than max allowed: 20");
        return Err(ApiError::bad_request(message, Some("logprobs")));
    }
    Ok(wanted)
}

fn stop_rules(fields: &Fields<'_>) -> Result<StopRules, ApiError> {
    let stop_error = |value| ApiError::field("string_type", "stop", "Input should be a valid string", value);
    let stop: Vec<String> = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| item.as_str().map(ToOwned::to_owned).ok_or_else(|| stop_error(item)))
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(stop_error(other)),
    };
    if stop.iter().any(String::is_empty) {
        return Err(ApiError::bad_request("stop cannot contain an empty string.", None));
    }
    let stop_token_ids = match fields.get("stop_token_ids") {
        None => Vec::new(),
        Some(value) => token_ids(value).ok_or_else(|| {
            ApiError::field("list_type", "stop_token_ids", "Input should be a valid list", value)
        })?,
    };
    Ok(StopRules {
        max_tokens: 1,
        min_tokens: fields.count("min_tokens", 0)?.unwrap_or(0),
        stop: stop.into(),
        stop_token_ids: stop_token_ids.into(),
        include_stop: fields.flag("include_stop_str_in_output", false)?,
        ignore_eos: fields.flag("ignore_eos", false)?,
        skip_special: fields.flag("skip_special_tokens", true)?,
    })
}

/// A list of ids, or nothing if it is something else.
pub fn token_ids(value: &Value) -> Option<Vec<u32>> {
    value.as_array()?.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

type Prompts = (Vec<Arc<[u32]>>, Vec<String>);

fn completion_prompts(fields: &Fields<'_>) -> Result<Prompts, ApiError> {
    let wrong =
        || ApiError::bad_request("Prompt must be a string, token ids or a list of these", Some("prompt"));
    let value = fields.get("prompt").ok_or_else(|| ApiError::missing("prompt", fields.0))?;
    let one = |value: &Value| match value {
        Value::String(text) => Some((text_prompt(text).into(), text.clone())),
        list => token_ids(list).map(|ids| {
            let text = tokenizer::decode(&ids, true);
            (ids.into(), text)
        }),
    };
    let list_of_prompts =
        value.as_array().filter(|items| items.first().is_some_and(|item| !item.is_number()));
    match list_of_prompts {
        Some(items) => items.iter().map(|item| one(item).ok_or_else(wrong)).collect(),
        None => one(value).map(|(ids, text)| (vec![ids], vec![text])).ok_or_else(wrong),
    }
}

/// The ids of a text prompt: with the begin-of-sequence id.
pub fn text_prompt(text: &str) -> Vec<u32> {
    let mut ids = vec![tokenizer::BOS];
    ids.extend(tokenizer::encode(text));
    ids
}

fn chat_prompt(fields: &Fields<'_>) -> Result<Prompts, ApiError> {
    let messages = messages(fields.0)?;
    let end = chat_end(fields.0)?;
    let ids = tokenizer::encode(&tokenizer::render_chat(&messages, end));
    let last = messages.into_iter().next_back().map(|message| message.content).unwrap_or_default();
    Ok((vec![ids.into()], vec![last]))
}

/// How a chat body wants its prompt to end.
pub fn chat_end(body: &Value) -> Result<ChatEnd, ApiError> {
    let fields = Fields(body);
    let generation_prompt = fields.flag("add_generation_prompt", true)?;
    match (fields.flag("continue_final_message", false)?, generation_prompt) {
        (true, true) => Err(ApiError::schema(
            "value_error",
            "body",
            "Value error, Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
            &format!("'<dict of {} items>'", body.as_object().map_or(0, serde_json::Map::len)),
            None,
        )),
        (true, false) => Ok(ChatEnd::ContinueFinal),
        (false, true) => Ok(ChatEnd::GenerationPrompt),
        (false, false) => Ok(ChatEnd::Closed),
    }
}

/// The messages of a chat body.
pub fn messages(body: &Value) -> Result<Vec<Message>, ApiError> {
    let list = body.get("messages").ok_or_else(|| ApiError::missing("messages", body))?;
    let items = list
        .as_array()
        .ok_or_else(|| ApiError::field("list_type", "messages", "Input should be a valid list", list))?;
    items.iter().enumerate().map(|(index, item)| message(index, item)).collect()
}

fn message(index: usize, item: &Value) -> Result<Message, ApiError> {
    let location = |field: &str| format!("messages.{index}.{field}");
    let role =
        item.get("role").and_then(Value::as_str).ok_or_else(|| ApiError::missing(&location("role"), item))?;
    let content = match item.get("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let texts: Vec<&str> =
                parts.iter().filter_map(|part| part.get("text").and_then(Value::as_str)).collect();
            if texts.len() < parts.len() {
                let message = "this model takes text parts only";
                return Err(ApiError::bad_request(message, Some("messages")));
            }
            texts.join("\n")
        }
        Some(other) => {
            let message = "Input should be a valid string";
            return Err(ApiError::field("string_type", &location("content"), message, other));
        }
    };
    Ok(Message { role: role.to_owned(), content })
}

/// A body that is a JSON object.
pub fn object(body: &[u8]) -> Result<Value, ApiError> {
    let value: Value = serde_json::from_slice(body).map_err(|error| ApiError::not_json(body, &error))?;
    if value.is_object() {
        return Ok(value);
    }
    let message = "Input should be a valid dictionary or object to extract fields from";
    Err(ApiError::schema("model_attributes_type", "body", message, "'<list of 0 items>'", None))
}

/// The reply to a request that found the queue full.
pub fn queue_full() -> ApiError {
    ApiError::with_status(StatusCode::SERVICE_UNAVAILABLE, "The request queue of the engine is full.")
}
