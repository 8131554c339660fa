//! Log probabilities in the shapes of both routes. The numbers are made up, but always the same.

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use crate::engines::sim::text::mix;
use crate::engines::sim::tokenizer;

/// One token of a chat reply.
#[derive(Serialize)]
pub(super) struct ChatToken {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
    top_logprobs: Vec<ChatAlternative>,
}

#[derive(Serialize)]
struct ChatAlternative {
    token: String,
    logprob: f64,
    bytes: Vec<u8>,
}

/// `logprobs` of a chat choice.
#[derive(Serialize)]
pub(super) struct ChatLogprobs {
    /// One for each token.
    pub(super) content: Vec<ChatToken>,
}

/// `logprobs` of a completion choice.
#[derive(Default, Serialize)]
pub(super) struct CompletionLogprobs {
    text_offset: Vec<usize>,
    token_logprobs: Vec<f64>,
    tokens: Vec<String>,
    top_logprobs: Vec<Ranked>,
}

/// Tokens and log probabilities as an object, most probable first.
struct Ranked(Vec<(String, f64)>);

impl Serialize for Ranked {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

/// The sampled id and `top` more, each with its log probability, most probable first.
fn candidates(id: u32, top: usize) -> Vec<(u32, f64)> {
    let seed = mix(id.into());
    let mut logprob = -((seed % 1000) as f64) / 2000.0;
    let mut candidates = vec![(id, logprob)];
    for rank in 1..=top.saturating_sub(1) as u64 {
        let other = mix(seed ^ rank);
        logprob -= 0.25 + (other % 1000) as f64 / 1000.0;
        let words = tokenizer::WORD_TOKENS;
        candidates.push((tokenizer::SPACED_WORDS + (other >> 32) as u32 % words, logprob));
    }
    candidates
}

/// The text of a token, and its bytes: those of the text, which for a part of a character is U+FFFD,
/// as in vLLM's `_create_chat_logprobs`.
fn token(id: u32) -> (String, Vec<u8>) {
    let mut bytes = Vec::new();
    tokenizer::push_bytes(id, &mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let bytes = text.clone().into_bytes();
    (text, bytes)
}

/// For chat.
pub(super) fn chat(ids: &[u32], top: usize) -> ChatLogprobs {
    let content = ids.iter().map(|&id| {
        let candidates = candidates(id, top);
        let logprob = candidates[0].1;
        let top_logprobs = candidates
            .into_iter()
            .take(top)
            .map(|(id, logprob)| {
                let (token, bytes) = token(id);
                ChatAlternative { token, logprob, bytes }
            })
            .collect();
        let (token, bytes) = token(id);
        ChatToken { token, logprob, bytes, top_logprobs }
    });
    ChatLogprobs { content: content.collect() }
}

/// For completions: `offset` counts the characters of the tokens before.
pub(super) fn completion(ids: &[u32], top: usize, offset: &mut usize) -> CompletionLogprobs {
    let mut out = CompletionLogprobs::default();
    for &id in ids {
        let candidates = candidates(id, top);
        let (text, _) = token(id);
        out.text_offset.push(*offset);
        *offset += text.chars().count();
        out.token_logprobs.push(candidates[0].1);
        out.tokens.push(text);
        out.top_logprobs
            .push(Ranked(candidates.into_iter().map(|(id, logprob)| (token(id).0, logprob)).collect()));
    }
    out
}

/// For SGLang's own route: log probability, id and no text of each.
pub(super) fn native(ids: &[u32]) -> Vec<Value> {
    ids.iter().map(|&id| json!([candidates(id, 0)[0].1, id, null])).collect()
}

/// The same of a prompt from `start` on; the first id of a prompt has no probability.
pub(super) fn native_of_prompt(prompt: &[u32], start: usize) -> Vec<Value> {
    let mut list = native(&prompt[start..]);
    if start == 0
        && let Some(first) = list.first_mut()
    {
        first[0] = Value::Null;
    }
    list
}
