//! Routes that need no engine step: models, tokenizing, embeddings.

use serde::Serialize;
use serde_json::Value;

use super::Reply;
use super::error::ApiError;
use super::request::{chat_end, check_model, messages, text_prompt, token_ids};
use crate::engines::sim::engine::{Engine, unix_time};
use crate::engines::sim::ranks::Ranks;
use crate::engines::sim::text::mix;
use crate::engines::sim::tokenizer::{self, ChatEnd, render_chat};

/// Numbers in an embedding if the body names no `dimensions`.
const DIMENSIONS: u64 = 64;
/// Most `dimensions`.
const MAX_DIMENSIONS: u64 = 4096;

/// `GET /kv_event_sources`: where KV events are published; nowhere, without `--kv-events-config`.
pub(super) fn kv_event_sources(ranks: &Ranks) -> Reply {
    let publishers = ranks.iter().filter_map(|engine| engine.kv_publisher());
    let entries = publishers.filter_map(|publisher| match publisher.sources() {
        Value::Object(entry) => Some(entry),
        _ => None,
    });
    Reply::ok(&Value::Object(entries.flatten().collect()))
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'a str,
    created: u64,
    owned_by: &'a str,
    root: &'a str,
    parent: Option<&'a str>,
    max_model_len: Option<usize>,
    permission: [Permission<'a>; 1],
}

#[derive(Serialize)]
struct Permission<'a> {
    id: String,
    object: &'a str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'a str,
    group: (),
    is_blocking: bool,
}

#[derive(Serialize)]
struct List<'a, T> {
    object: &'a str,
    data: Vec<T>,
}

/// `GET /v1/models`: aliases with their context length, then adapters with their parent.
pub(super) fn list(engine: &Engine) -> Reply {
    let args = &engine.args;
    let root = &args.models[0];
    let model = |id, parent: Option<_>, max_model_len| Model {
        id,
        object: "model",
        created: engine.started.as_secs(),
        owned_by: "vllm",
        root: if parent.is_none() { root } else { id },
        parent,
        max_model_len,
        permission: [Permission {
            id: format!("modelperm-{:016x}", mix(engine.started.as_secs())),
            object: "model_permission",
            created: engine.started.as_secs(),
            allow_create_engine: false,
            allow_sampling: true,
            allow_logprobs: true,
            allow_search_indices: false,
            allow_view: true,
            allow_fine_tuning: false,
            organization: "*",
            group: (),
            is_blocking: false,
        }],
    };
    let bases = args.models.iter().map(|name| model(name.as_str(), None, Some(args.context_length())));
    let adapters = args.loras.iter().map(|name| model(name.as_str(), Some(root.as_str()), None));
    Reply::ok(&List { object: "list", data: bases.chain(adapters).collect() })
}

/// A JSON body whose model, if it names one, is served.
pub(super) fn parse(engine: &Engine, body: &[u8]) -> Result<Value, ApiError> {
    let value: Value = serde_json::from_slice(body).map_err(|error| ApiError::not_json(body, &error))?;
    if let Some(name) = value.get("model").and_then(Value::as_str) {
        check_model(name, &engine.args)?;
    }
    Ok(value)
}

/// A value or an error as a reply.
pub(super) fn answer<T: Serialize>(result: Result<T, ApiError>) -> Reply {
    match result {
        Ok(value) => Reply::ok(&value),
        Err(error) => Reply::error(&error),
    }
}

#[derive(Serialize)]
struct Tokens {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

/// `POST /tokenize` with a prompt or with messages.
pub(super) fn tokenize(engine: &Engine, body: &[u8]) -> Reply {
    let flag = |body: &Value, name, default| body.get(name).and_then(Value::as_bool).unwrap_or(default);
    answer(parse(engine, body).and_then(|body| {
        let tokens = match body.get("prompt") {
            Some(Value::String(text)) if flag(&body, "add_special_tokens", true) => text_prompt(text),
            Some(Value::String(text)) => tokenizer::encode(text),
            Some(other) => {
                return Err(ApiError::field(
                    "string_type",
                    "prompt",
                    "Input should be a valid string",
                    other,
                ));
            }
            None => {
                let end: ChatEnd = chat_end(&body)?;
                tokenizer::encode(&render_chat(&messages(&body)?, end))
            }
        };
        Ok(Tokens {
            count: tokens.len(),
            max_model_len: engine.args.context_length(),
            token_strs: flag(&body, "return_token_strs", false)
                .then(|| tokens.iter().map(|id| tokenizer::token_str(*id)).collect()),
            tokens,
        })
    }))
}

#[derive(Serialize)]
struct Text {
    prompt: String,
}

/// `POST /detokenize`.
pub(super) fn detokenize(engine: &Engine, body: &[u8]) -> Reply {
    answer(parse(engine, body).and_then(|body| {
        let tokens = body.get("tokens").ok_or_else(|| ApiError::missing("tokens", &body))?;
        let ids = token_ids(tokens)
            .ok_or_else(|| ApiError::field("list_type", "tokens", "Input should be a valid list", tokens))?;
        Ok(Text { prompt: tokenizer::decode(&ids, false) })
    }))
}

#[derive(Serialize)]
struct Embeddings<'a> {
    id: String,
    object: &'a str,
    created: u64,
    model: &'a str,
    data: Vec<Embedding<'a>>,
    usage: EmbeddingUsage,
}

#[derive(Serialize)]
struct Embedding<'a> {
    index: usize,
    object: &'a str,
    embedding: Numbers,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Numbers {
    Floats(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: (),
}

/// `POST /v1/embeddings`: unit vectors that depend on the ids alone.
pub(super) fn embeddings(engine: &Engine, body: &[u8], client_id: Option<&str>) -> Reply {
    let result = parse(engine, body).and_then(|body| {
        let input = body.get("input").ok_or_else(|| ApiError::missing("input", &body))?;
        let one = |value: &Value| match value {
            Value::String(text) => Some(text_prompt(text)),
            list => token_ids(list),
        };
        let several = input.as_array().filter(|items| items.first().is_some_and(|item| !item.is_number()));
        let prompts: Option<Vec<_>> = match several {
            Some(items) => items.iter().map(one).collect(),
            None => one(input).map(|prompt| vec![prompt]),
        };
        let prompts = prompts.ok_or_else(|| {
            ApiError::field("string_type", "input", "Input should be a valid string", input)
        })?;
        let count = body.get("dimensions").and_then(Value::as_u64).unwrap_or(DIMENSIONS);
        if !(1..=MAX_DIMENSIONS).contains(&count) {
            let message = format!("dimensions must be 1 to {MAX_DIMENSIONS}, got {count}.");
            return Err(ApiError::bad_request(message, Some("dimensions")));
        }
        let base64 = body.get("encoding_format").and_then(Value::as_str) == Some("base64");
        let data = prompts.iter().enumerate().map(|(index, ids)| {
            let vector = vector(ids, engine.args.seed, count);
            let embedding =
                if base64 { Numbers::Base64(base64_of(&vector)) } else { Numbers::Floats(vector) };
            Embedding { index, object: "embedding", embedding }
        });
        let prompt_tokens = prompts.iter().map(Vec::len).sum();
        let id = client_id.map_or_else(|| format!("{:016x}", super::random()), ToOwned::to_owned);
        let reply = Embeddings {
            id: format!("embd-{id}"),
            object: "list",
            created: unix_time().as_secs(),
            model: body.get("model").and_then(Value::as_str).unwrap_or(&engine.args.models[0]),
            data: data.collect(),
            usage: EmbeddingUsage {
                prompt_tokens,
                total_tokens: prompt_tokens,
                completion_tokens: 0,
                prompt_tokens_details: (),
            },
        };
        Ok(Reply::ok(&reply))
    });
    result.unwrap_or_else(|error| Reply::error(&error))
}

fn vector(ids: &[u32], seed: u64, count: u64) -> Vec<f32> {
    let hash = ids.iter().fold(mix(seed), |hash, id| mix(hash ^ u64::from(*id)));
    let raw: Vec<f64> =
        (0..count).map(|place| (mix(hash ^ place) >> 11) as f64 / (1u64 << 52) as f64 - 1.0).collect();
    let length = raw.iter().map(|number| number * number).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    raw.iter().map(|number| (number / length) as f32).collect()
}

/// The little-endian bytes of the numbers in base64.
fn base64_of(numbers: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits =
            group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            let letter = ALPHABET[(bits >> (18 - 6 * place)) as usize & 63];
            out.push(if place <= group.len() { char::from(letter) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        assert_eq!(base64_of(&[1.0]), "AACAPw==");
        assert_eq!(base64_of(&[1.0, -2.5, 0.1]), "AACAPwAAIMDNzMw9");
    }

    #[test]
    fn vectors_have_unit_length() {
        let length: f32 = vector(&[1, 2, 3], 0, 64).iter().map(|number| number * number).sum();
        assert!((length - 1.0).abs() < 1e-4);
    }
}
