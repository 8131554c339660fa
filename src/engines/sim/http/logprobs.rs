//! Log probabilities in the shapes of both routes. The numbers are made up, but always the same.

use serde::Serialize;
use serde_json::{Map, Value};

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
    top_logprobs: Vec<Map<String, Value>>,
}

/// The sampled id and `top` more, each with its log probability, most probable first.
fn candidates(id: u32, position: usize, top: usize) -> Vec<(u32, f64)> {
    let seed = mix(u64::from(id) ^ (position as u64) << 32);
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

fn token(id: u32) -> (String, Vec<u8>) {
    let mut bytes = Vec::new();
    tokenizer::push_bytes(id, &mut bytes);
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

/// For chat: `position` is that of the first id within the choice.
pub(super) fn chat(ids: &[u32], position: usize, top: usize) -> ChatLogprobs {
    let content = ids.iter().zip(position..).map(|(&id, position)| {
        let candidates = candidates(id, position, top);
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
pub(super) fn completion(ids: &[u32], position: usize, top: usize, offset: &mut usize) -> CompletionLogprobs {
    let mut out = CompletionLogprobs::default();
    for (&id, position) in ids.iter().zip(position..) {
        let candidates = candidates(id, position, top);
        let (text, _) = token(id);
        out.text_offset.push(*offset);
        *offset += text.chars().count();
        out.token_logprobs.push(candidates[0].1);
        out.tokens.push(text);
        out.top_logprobs
            .push(candidates.into_iter().map(|(id, logprob)| (token(id).0, Value::from(logprob))).collect());
    }
    out
}
