//! What routing needs of a request body, read in one pass without copying; the rest is the
//! engine's business and passes through untouched.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;
use serde_json::value::RawValue;

use super::depth::{MAX_DEPTH, is_shallow};
use super::errors::{ApiError, Code};
use crate::tokens::Lifted;

/// A request as routing sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peek<'a> {
    /// Model or adapter asked for.
    pub model: Cow<'a, str>,
    /// Whether the client wants events.
    pub stream: bool,
    /// `max_tokens`, or what newer routes call it.
    pub max_tokens: Option<u32>,
    /// Length of the prompt, estimated: text counts a token for four bytes, ids count as
    /// they are.
    pub prompt_tokens: u32,
    /// The member `everline`, as it is written: what the client wants of routing.
    pub everline: Option<&'a str>,
}

/// Reads a body. Never quotes any part of it in an error.
pub fn peek(body: &[u8]) -> Result<Peek<'_>, ApiError> {
    if !is_shallow(body) {
        let text = format!("the body is nested deeper than {MAX_DEPTH} levels, or is no JSON");
        return Err(ApiError::new(Code::InvalidJson, text));
    }
    look(read(body, None).map_err(|error| invalid(&error))?)
}

/// Reads a body whose prompt's ids were lifted out of it. `None` if they were not its prompt, or
/// anything is wrong with it: then the body is to be read as it came, for what is wrong to be told
/// as usual.
pub fn peek_around(lifted: &Lifted) -> Option<Peek<'_>> {
    if !is_shallow(&lifted.rest) {
        return None;
    }
    let mut raw = read(&lifted.rest, Some(lifted.key)).ok().filter(|raw| raw.around)?;
    if is_prompt(lifted.key) {
        raw.size.ids += lifted.ids.len() as u64;
    }
    look(raw).ok()
}

fn read<'a>(body: &'a [u8], around: Option<&'static str>) -> serde_json::Result<Raw<'a>> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let raw = reader.deserialize_map(RawVisitor { around })?;
    reader.end()?;
    Ok(raw)
}

fn look(raw: Raw<'_>) -> Result<Peek<'_>, ApiError> {
    let model = match raw.model {
        Model::Named(name) if !name.is_empty() => name,
        Model::Absent => return Err(missing("you must provide a `model`: the name of a served model")),
        _ => return Err(missing("`model` must be text: the name of a served model")),
    };
    let prompt_tokens = raw.size.ids.saturating_add(raw.size.text_bytes.div_ceil(4));
    Ok(Peek {
        model,
        stream: raw.stream,
        max_tokens: raw.max_tokens,
        prompt_tokens: u32::try_from(prompt_tokens).unwrap_or(u32::MAX),
        everline: raw.everline.map(RawValue::get),
    })
}

fn missing(text: &'static str) -> ApiError {
    ApiError::new(Code::MissingModel, text).param("model")
}

fn invalid(error: &serde_json::Error) -> ApiError {
    let (line, column) = (error.line(), error.column());
    let text = match error.classify() {
        Category::Eof => "the body is not valid JSON: it ends early".to_owned(),
        Category::Data if line <= 1 && column <= 1 => "the body must be a JSON object".to_owned(),
        Category::Data => {
            format!("the body must be a JSON object with each member once (line {line}, column {column})")
        }
        _ => format!("the body is not valid JSON (line {line}, column {column})"),
    };
    ApiError::new(Code::InvalidJson, text)
}

enum Model<'a> {
    Absent,
    NotText,
    Named(Cow<'a, str>),
}

struct Raw<'a> {
    model: Model<'a>,
    stream: bool,
    max_tokens: Option<u32>,
    size: PromptSize,
    everline: Option<&'a RawValue>,
    /// The member whose value was lifted is here.
    around: bool,
}

#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// `around`: the member whose value was lifted.
struct RawVisitor {
    around: Option<&'static str>,
}

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw<'de>, A::Error> {
        let mut raw = Raw {
            model: Model::Absent,
            stream: false,
            max_tokens: None,
            size: PromptSize::default(),
            everline: None,
            around: false,
        };
        while let Some(Key(key)) = map.next_key()? {
            // Written with escapes it is another one.
            raw.around |= matches!(key, Cow::Borrowed(key) if Some(key) == self.around);
            match key.as_ref() {
                "model" => {
                    // Two models would let an engine serve another than the one routed by.
                    if !matches!(raw.model, Model::Absent) {
                        return Err(serde::de::Error::duplicate_field("model"));
                    }
                    raw.model = match map.next_value::<Scalar<'de>>()? {
                        Scalar::Text(name) => Model::Named(name),
                        _ => Model::NotText,
                    };
                }
                "stream" => raw.stream = matches!(map.next_value()?, Scalar::Bool(true)),
                "max_tokens" | "max_completion_tokens" | "max_output_tokens" => {
                    if let Scalar::Count(count) = map.next_value()? {
                        raw.max_tokens = Some(u32::try_from(count).unwrap_or(u32::MAX));
                    }
                }
                "everline" => {
                    if raw.everline.replace(map.next_value()?).is_some() {
                        return Err(serde::de::Error::duplicate_field("everline"));
                    }
                }
                key if is_prompt(key) => raw.size.add(map.next_value()?),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(raw)
    }
}

/// Members that hold text or ids for the model to read: of completions, chat, responses
/// (`instructions`), messages (`system`), embeddings, rerank, score, detokenize and SGLang's own.
fn is_prompt(key: &str) -> bool {
    matches!(
        key,
        "prompt"
            | "messages"
            | "input"
            | "instructions"
            | "system"
            | "query"
            | "queries"
            | "documents"
            | "items"
            | "text_1"
            | "text_2"
            | "data_1"
            | "data_2"
            | "tokens"
            | "text"
            | "input_ids"
    )
}

/// A value of which only simple kinds matter.
enum Scalar<'a> {
    Text(Cow<'a, str>),
    Bool(bool),
    Count(u64),
    Other,
}

impl<'de> Deserialize<'de> for Scalar<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScalarVisitor)
    }
}

struct ScalarVisitor;

impl<'de> Visitor<'de> for ScalarVisitor {
    type Value = Scalar<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Scalar::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Scalar::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Scalar::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Scalar::Count(value))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Scalar::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Scalar::Other)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Scalar::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Scalar::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Scalar::Other)
    }
}

/// Size of a prompt in any of its shapes: text, ids, lists of either, messages with parts.
#[derive(Clone, Copy, Default)]
struct PromptSize {
    text_bytes: u64,
    ids: u64,
}

impl PromptSize {
    fn add(&mut self, other: PromptSize) {
        self.text_bytes += other.text_bytes;
        self.ids += other.ids;
    }
}

impl<'de> Deserialize<'de> for PromptSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

struct SizeVisitor;

impl<'de> Visitor<'de> for SizeVisitor {
    type Value = PromptSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_str<E>(self, text: &str) -> Result<PromptSize, E> {
        Ok(PromptSize { text_bytes: text.len() as u64, ids: 0 })
    }

    fn visit_u64<E>(self, _: u64) -> Result<PromptSize, E> {
        Ok(PromptSize { text_bytes: 0, ids: 1 })
    }

    fn visit_i64<E>(self, _: i64) -> Result<PromptSize, E> {
        Ok(PromptSize::default())
    }

    fn visit_f64<E>(self, _: f64) -> Result<PromptSize, E> {
        Ok(PromptSize::default())
    }

    fn visit_bool<E>(self, _: bool) -> Result<PromptSize, E> {
        Ok(PromptSize::default())
    }

    fn visit_unit<E>(self) -> Result<PromptSize, E> {
        Ok(PromptSize::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<PromptSize, A::Error> {
        let mut size = PromptSize::default();
        while let Some(element) = seq.next_element()? {
            size.add(element);
        }
        Ok(size)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<PromptSize, A::Error> {
        let mut size = PromptSize::default();
        while let Some(Key(key)) = map.next_key()? {
            // Of a message its text counts, and what tools have answered; image data and tool
            // schemas are no prompt text.
            if matches!(key.as_ref(), "content" | "text" | "output") {
                size.add(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(body: &str) -> u32 {
        peek(body.as_bytes()).unwrap().prompt_tokens
    }

    #[test]
    fn prompts_of_every_shape_are_measured() {
        assert_eq!(tokens(r#"{"model":"m","prompt":"12345678"}"#), 2);
        assert_eq!(tokens(r#"{"model":"m","prompt":[1,2,3]}"#), 3);
        assert_eq!(tokens(r#"{"model":"m","prompt":[[1,2],[3]]}"#), 3);
        assert_eq!(tokens(r#"{"model":"m","input":["1234","12"]}"#), 2);
        assert_eq!(tokens(r#"{"model":"m","messages":[{"role":"user","content":"1234"}]}"#), 1);
        let parts = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"12345"},
            {"type":"image_url","image_url":{"url":"data:aaaaaaaaaaaaaaaaaaaaa"}}]}]}"#;
        assert_eq!(tokens(parts), 2);
    }

    #[test]
    fn the_newer_routes_are_measured_too() {
        assert_eq!(tokens(r#"{"model":"m","instructions":"1234","input":"12345678"}"#), 3);
        let items = r#"{"model":"m","input":[{"role":"user","content":[{"type":"input_text","text":"1234"}]},
            {"type":"function_call_output","call_id":"x","output":"12345678"}]}"#;
        assert_eq!(tokens(items), 3);
        let messages = r#"{"model":"m","max_tokens":9,"system":[{"type":"text","text":"1234"}],
            "messages":[{"role":"user","content":[{"type":"tool_result","content":"12345678"}]}]}"#;
        assert_eq!(tokens(messages), 3);
        assert_eq!(tokens(r#"{"model":"m","query":"1234","documents":["1234",{"text":"1234"}]}"#), 3);
        assert_eq!(tokens(r#"{"model":"m","text_1":"1234","text_2":["1234","1234"]}"#), 3);
        assert_eq!(tokens(r#"{"model":"m","tokens":[1,2,3,4,5]}"#), 5);
        assert_eq!(tokens(r#"{"model":"m","metadata":{"text":"1234"},"tools":[{"text":"1234"}]}"#), 0);
        assert_eq!(peek(br#"{"model":"m","max_output_tokens":7}"#).unwrap().max_tokens, Some(7));
    }

    #[test]
    fn odd_values_are_left_to_the_engine() {
        let odd = br#"{"model":"m\u00e9","stream":"yes","max_tokens":-1,"prompt":null,"x":{"stream":true}}"#;
        let peek = peek(odd).unwrap();
        assert_eq!((peek.model.as_ref(), peek.stream, peek.max_tokens), ("mé", false, None));
    }

    #[test]
    fn around_lifted_ids_a_body_says_the_same() {
        use crate::tokens::{Form, lift};
        let pad = " ".repeat(300);
        let lifted = |body: &str| lift(Form::Completions, body.as_bytes()).expect(body);
        for body in [
            r#"{"model":"m","prompt":[1,2,3],"max_tokens":4,"stream":true,"everline":{"worker":"w"}}"#,
            r#"{"prompt":[5],"system":"12345678","model":"mé","stop":["x"]}"#,
            r#"{"prompt":[5],"model":"m\u00e9","pro\u006dpt":[6,7]}"#,
        ] {
            let body = format!("{body}{pad}");
            let lifted = lifted(&body);
            assert_eq!(peek_around(&lifted), Some(peek(body.as_bytes()).unwrap()), "{body}");
        }
        for other in [
            r#"{"model":"m","x":{"prompt":[1]}}"#,
            r#"{"model":"m","x":{"prompt":[1]},"pro\u006dpt":[]}"#,
            r#"{"model":"m","x":[{"prompt":[1]}],"y":"p"}"#,
            r#"{"model":"m","prompt":[1]"#,
            r#"{"model":"m","prompt":[1]} x"#,
            r#"{"model":"m","model":"m","prompt":[1]}"#,
            r#"{"prompt":[1]}"#,
            r#"{"model":7,"prompt":[1]}"#,
            r#"["model","prompt":[1]]"#,
        ] {
            let body = format!("{other}{pad}");
            assert_eq!(peek_around(&lifted(&body)), None, "{other}");
        }
    }

    #[test]
    fn errors_name_the_fault_and_never_quote_the_body() {
        for (body, code) in [
            ("", Code::InvalidJson),
            ("{", Code::InvalidJson),
            ("[]", Code::InvalidJson),
            ("\"secret\"", Code::InvalidJson),
            ("{\"prompt\":\"secret}", Code::InvalidJson),
            ("{\"model\":\"secret\",\"model\":\"m\"}", Code::InvalidJson),
            ("{\"model\":\"m\"} secret", Code::InvalidJson),
            ("{\"model\":\"m\",\"everline\":{\"secret\":1},\"everline\":{}}", Code::InvalidJson),
            ("{}", Code::MissingModel),
            ("{\"model\":7}", Code::MissingModel),
            ("{\"model\":[\"secret\"]}", Code::MissingModel),
            ("{\"model\":\"\"}", Code::MissingModel),
        ] {
            let error = peek(body.as_bytes()).unwrap_err();
            assert_eq!(error.code, code, "{body}");
            assert!(!error.message.contains("secret"), "{}", error.message);
        }
        let deep = format!("{{\"model\":\"m\",\"prompt\":{}{}}}", "[".repeat(300), "]".repeat(300));
        assert_eq!(peek(deep.as_bytes()).unwrap_err().code, Code::InvalidJson);
    }
}
