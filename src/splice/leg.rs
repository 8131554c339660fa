//! The body that asks another engine for the rest of a choice.

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use super::json::write_ids;
use super::plan::{Plan, StreamRoute};

/// Where continuations are asked for, whatever the client asked.
pub(super) const PATH: &str = "/v1/completions";

/// As much as any context holds; engines cut it down to theirs.
const UNBOUNDED: u64 = 1 << 20;

/// Members that a continuation has its own of, that it has no use for, or that must be used once.
const LEFT_OUT: &[&str] = &[
    "messages",
    "prompt",
    "prompt_embeds",
    "input_ids",
    "stream",
    "stream_options",
    "stream_interval",
    "n",
    "best_of",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "seed",
    "stop",
    "include_stop_str_in_output",
    "no_stop_trim",
    "return_token_ids",
    "return_prompt_token_ids",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "echo",
    "suffix",
    "use_beam_search",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "documents",
    "reasoning_effort",
    "reasoning",
    "include_reasoning",
    "separate_reasoning",
    "stream_reasoning",
    "thinking",
    "response_format",
    "structured_outputs",
    "structural_tag",
    "truncate_prompt_tokens",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "modalities",
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
    "request_id",
    "rid",
];

/// How many tokens a choice may still have; `None` if it has had all.
pub(super) fn remaining(plan: &Plan, prompt: usize, kept: usize) -> Option<u64> {
    let kept = kept as u64;
    let most = plan.max_tokens.map(|most| most.saturating_sub(kept));
    let room = plan.options.context.map(|context| u64::from(context).saturating_sub(prompt as u64 + kept));
    let left = match (most, room) {
        (Some(most), Some(room)) => most.min(room),
        (Some(left), None) | (None, Some(left)) => left,
        (None, None) => UNBOUNDED,
    };
    (left > 0).then_some(left)
}

/// The body for a choice whose prompt and generated ids are given.
pub(super) fn body(plan: &Plan, choice: u32, prompt: &[u32], kept: &[u32], left: u64) -> Bytes {
    let body = &plan.body[..];
    let mut out = Vec::with_capacity(256 + 6 * (prompt.len() + kept.len()));
    out.push(b'{');
    let member = |out: &mut Vec<u8>, key: &str, value: &[u8]| {
        if out.len() > 1 {
            out.push(b',');
        }
        super::json::quote(key, out);
        out.push(b':');
        out.extend_from_slice(value);
    };
    for (key, span) in plan.members.each() {
        let constrains = key.starts_with("guided_");
        if !LEFT_OUT.contains(&key) && !constrains {
            member(&mut out, key, span.of(body));
        }
    }
    let mut ids = Vec::new();
    let all = [prompt, kept].concat();
    write_ids(&all, &mut ids);
    member(&mut out, "prompt", &ids);
    member(&mut out, "max_tokens", left.to_string().as_bytes());
    let least = plan.min_tokens.saturating_sub(kept.len() as u64);
    if least > 0 {
        member(&mut out, "min_tokens", least.to_string().as_bytes());
    }
    if let Some(seed) = plan.members.raw(body, "seed") {
        member(&mut out, "seed", next_seed(seed, choice, kept.len()).to_string().as_bytes());
    }
    if plan.logprobs {
        let logprobs = match plan.route {
            StreamRoute::Chat => plan.top_logprobs.to_string().into_bytes(),
            _ => plan.members.raw(body, "logprobs").unwrap_or(b"0").to_vec(),
        };
        member(&mut out, "logprobs", &logprobs);
    }
    if !plan.stops.is_empty() {
        member(&mut out, "stop", plan.members.raw(body, "stop").unwrap_or(b"[]"));
        // Each engine knows one of the names and ignores the other.
        member(&mut out, "include_stop_str_in_output", b"true");
        member(&mut out, "no_stop_trim", b"true");
    }
    member(&mut out, "stream", b"true");
    member(&mut out, "return_token_ids", b"true");
    out.push(b'}');
    out.into()
}

/// Another seed for what comes behind a cut: the same one would draw the same numbers again.
fn next_seed(seed: &[u8], choice: u32, cut: usize) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(seed);
    hash.update(&choice.to_le_bytes());
    hash.update(&(cut as u64).to_le_bytes());
    // Engines take what fits a signed number; 31 bits fit everywhere.
    hash.digest() & 0x7fff_ffff
}
