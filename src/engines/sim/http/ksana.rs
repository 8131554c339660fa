//! KsanaLLM's own route, `/generate`: frames that end in a NUL, each with all of the output so far; and the
//! headers by which its router joins two engines.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;
use serde::Serialize;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::request::{Request, Route};
use super::split::Split;
use super::stream::Dialect;
use crate::engines::sim::options::EngineSimArgs;
use crate::engines::sim::outbox::Delta;

/// Sampling settings, and the member of `/v1/completions` that means the same.
const SETTINGS: [(&str, &str); 6] = [
    ("max_new_tokens", "max_tokens"),
    ("temperature", "temperature"),
    ("stop_strings", "stop"),
    ("stop_token_ids", "stop_token_ids"),
    ("ignore_eos", "ignore_eos"),
    ("num_return_sequences", "n"),
];

/// Most new tokens where the request does not say.
const MAX_NEW_TOKENS: u64 = 1024;

/// What the router tells both engines, by the request's headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Joined {
    group: String,
    /// The request's number; `None` is one that the engine does not wait for anybody with.
    id: Option<i32>,
}

impl Joined {
    /// Reads the headers; the error is that of C++'s `stoll`.
    pub(super) fn read(headers: &HeaderMap) -> Result<Self, ApiError> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let group = text("kv-comm-group-key").unwrap_or_default().to_owned();
        let id = match text("kv-comm-request-id") {
            None => 0,
            Some(id) => id.trim().parse::<i64>().map_err(|_| {
                ApiError::with_status(http::StatusCode::INTERNAL_SERVER_ERROR, "stoll").of_ksana()
            })?,
        };
        // It is cut to 32 bits; what is negative then is not waited for.
        let id = id as i32;
        Ok(Self { group, id: (id >= 0).then_some(id) })
    }

    /// What a request has to do with another engine by it.
    pub(super) fn split(self, args: &EngineSimArgs) -> Split {
        match (self.id, args.pd.is_prefill()) {
            (None, _) => Split::Stranded,
            (Some(id), true) => Split::CommPrefill { id },
            (Some(id), false) => Split::CommDecode { id, group: self.group },
        }
    }
}

/// Reads a body.
pub(super) fn parse(body: &Value, args: &EngineSimArgs) -> Result<Request, ApiError> {
    let given = |name: &str| body.get(name).filter(|value| !value.is_null());
    let mut completion = Map::new();
    let prompt = given("input_tokens").or_else(|| given("prompt"));
    if let Some(prompt) = prompt {
        completion.insert("prompt".into(), prompt.clone());
    }
    completion.insert("max_tokens".into(), MAX_NEW_TOKENS.into());
    let settings = given("sampling_config").unwrap_or(&Value::Null);
    for (theirs, ours) in SETTINGS {
        if let Some(value) = settings.get(theirs).filter(|value| !value.is_null()) {
            completion.insert(ours.into(), value.clone());
        }
    }
    completion.insert("stream".into(), given("stream").cloned().unwrap_or(Value::Bool(true)));
    completion.insert("include_stop_str_in_output".into(), Value::Bool(true));
    Request::from_value(Route::Completions, &Value::Object(completion), args).map_err(ApiError::of_ksana)
}

/// The output so far, in the engine's order.
#[derive(Serialize)]
struct Frame<'a> {
    texts: &'a [String],
    output_token_ids: &'a [Vec<u32>],
    logprobs: [(); 0],
    input_token_ids: &'a [u32],
}

/// Answers one request.
pub(super) struct Generated {
    prompt: Arc<[u32]>,
    texts: Vec<String>,
    ids: Vec<Vec<u32>>,
    finished: Vec<bool>,
}

impl Generated {
    /// For a request that [`parse`] has read.
    pub(super) fn new(request: &Request) -> Self {
        let count = request.prompts.len() * request.n;
        Self {
            prompt: request.prompts.first().cloned().unwrap_or_default(),
            texts: vec![String::new(); count],
            ids: vec![Vec::new(); count],
            finished: vec![false; count],
        }
    }

    fn take(&mut self, delta: &Delta) {
        self.texts[delta.choice].push_str(&delta.text);
        self.ids[delta.choice].extend_from_slice(&delta.token_ids);
        self.finished[delta.choice] |= delta.finish.is_some();
    }

    fn frame(&self) -> Vec<u8> {
        let frame = Frame {
            texts: &self.texts,
            output_token_ids: &self.ids,
            logprobs: [],
            input_token_ids: &self.prompt,
        };
        // Writing plain structs to memory cannot fail.
        serde_json::to_vec(&frame).unwrap_or_default()
    }
}

impl Dialect for Generated {
    fn is_finished(&self) -> bool {
        self.finished.iter().all(|finished| *finished)
    }

    fn collect(&mut self, delta: Delta) {
        self.take(&delta);
    }

    fn reply(&self) -> Vec<u8> {
        self.frame()
    }

    fn stream(&mut self, delta: &Delta, out: &mut VecDeque<Bytes>) {
        self.take(delta);
        let mut frame = self.frame();
        frame.push(0);
        out.push_back(frame.into());
    }

    fn stream_end(&mut self, _: &mut VecDeque<Bytes>) {}

    /// The engine ends such a stream as if it were complete.
    fn stream_failed(&mut self, _: &ApiError, _: &mut VecDeque<Bytes>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(id: Option<&str>) -> Result<Joined, ApiError> {
        let mut headers = HeaderMap::new();
        headers.insert("kv-comm-group-key", "p__d".parse().unwrap());
        if let Some(id) = id {
            headers.insert("kv-comm-request-id", id.parse().unwrap());
        }
        Joined::read(&headers)
    }

    #[test]
    fn request_ids_are_read_as_the_engine_reads_them() {
        assert_eq!(read(Some("989665711")).unwrap().id, Some(989_665_711));
        assert_eq!(read(None).unwrap().id, Some(0));
        assert_eq!(read(Some("-5")).unwrap().id, None);
        // 2^31 is negative as an int32.
        assert_eq!(read(Some("2147483648")).unwrap().id, None);
        let error = read(Some("x")).unwrap_err();
        assert_eq!((error.status.as_u16(), error.body()), (500, br#"{"detail":"stoll"}"#.to_vec()));
        assert_eq!(read(Some("7")).unwrap().group, "p__d");
    }
}
