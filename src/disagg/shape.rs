//! Which requests can be split, and between which engines.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::Members;
use crate::routing::part::Connectors;
use crate::state::worker::Connector;

/// Most sequences of one request that are split; each gets a room of its own.
const MOST_SEQUENCES: usize = 1024;

/// What of a request matters for splitting it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Sequences that it asks for.
    pub sequences: usize,
    /// Whether it must be said for each of several: a list, even if that has one item.
    pub is_list: bool,
    connectors: Connectors,
}

impl Shape {
    /// Of a request for this path; `None` if no engine does it in two parts.
    ///
    /// vLLM transfers one sequence a request: where several are asked for, its engines would read the
    /// blocks of the first for all, so they are done by one worker. So is what is asked of the prompt's
    /// own tokens, which a worker that does not compute them does not know.
    pub fn of(path: &str, members: &Members<'_>) -> Option<Self> {
        let (prompts, is_generate) = match path {
            "/v1/completions" => (members.get("prompt").and_then(prompts), false),
            "/v1/chat/completions" => (None, false),
            "/generate" => {
                let text = members.get("text").and_then(prompts);
                (text.or_else(|| members.get("input_ids").and_then(prompts)), true)
            }
            _ => return None,
        };
        let each = if is_generate { sampled(members) } else { members.number("n") };
        let each = usize::try_from(each.unwrap_or(1)).unwrap_or(usize::MAX).max(1);
        let sequences = prompts.unwrap_or(1).saturating_mul(each);
        if sequences == 0 || sequences > MOST_SEQUENCES {
            return None;
        }
        let mut connectors = Connectors::default().with(Connector::Sglang);
        let is_one = sequences == 1
            && members.number("best_of").is_none_or(|best| best == 1)
            && !members.is_true("use_beam_search");
        let asks_of_prompt = members.get("prompt_logprobs").is_some()
            || (members.is_true("echo") && members.get("logprobs").is_some());
        if is_one && !asks_of_prompt && !is_generate {
            let of_vllm = Connector::ALL.into_iter().filter(|connector| *connector != Connector::Sglang);
            connectors = of_vllm.fold(connectors, Connectors::with);
        }
        Some(Self { sequences, is_list: prompts.is_some() || each > 1, connectors })
    }

    /// The ways in which it can be handed on.
    pub fn connectors(&self) -> Connectors {
        self.connectors
    }
}

/// How many prompts there are in a list of them; `None` for a single one, be it text or token ids.
fn prompts(json: &str) -> Option<usize> {
    let inside = json.strip_prefix('[')?.trim_ascii_start();
    if inside.starts_with(|first: char| first.is_ascii_digit() || first == '-') {
        return None;
    }
    let list: Vec<&RawValue> = serde_json::from_str(json).ok()?;
    Some(list.len())
}

/// Samples of each prompt on SGLang's own route.
fn sampled(members: &Members<'_>) -> Option<u64> {
    #[derive(Deserialize)]
    struct Sampling {
        n: Option<u64>,
    }
    serde_json::from_str::<Sampling>(members.get("sampling_params")?).ok()?.n
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(path: &str, body: &str) -> Option<(usize, bool, bool, bool)> {
        let shape = Shape::of(path, &Members::parse(body.as_bytes()).unwrap())?;
        let has = |connector| shape.connectors().has(connector);
        Some((shape.sequences, shape.is_list, has(Connector::Nixl), has(Connector::Sglang)))
    }

    #[test]
    fn one_sequence_is_for_every_engine_and_several_are_for_sglang() {
        let (completions, chat) = ("/v1/completions", "/v1/chat/completions");
        for (path, body, wanted) in [
            (completions, r#"{"prompt":"a"}"#, (1, false, true, true)),
            (completions, r#"{"prompt":[1,2,3]}"#, (1, false, true, true)),
            (completions, r#"{"prompt":[ "a" ]}"#, (1, true, true, true)),
            (completions, r#"{"prompt":[[1],[2]]}"#, (2, true, false, true)),
            (completions, r#"{"prompt":["a","b"],"n":3}"#, (6, true, false, true)),
            (completions, r#"{"prompt":"a","best_of":2}"#, (1, false, false, true)),
            (completions, r#"{"prompt":"a","echo":true}"#, (1, false, true, true)),
            (completions, r#"{"prompt":"a","echo":true,"logprobs":1}"#, (1, false, false, true)),
            (completions, r#"{"prompt":"a","prompt_logprobs":1}"#, (1, false, false, true)),
            (chat, r#"{"messages":[]}"#, (1, false, true, true)),
            (chat, r#"{"messages":[],"n":2}"#, (2, true, false, true)),
            (chat, r#"{"messages":[],"n":null,"prompt_logprobs":null}"#, (1, false, true, true)),
            (chat, r#"{"messages":[],"use_beam_search":true}"#, (1, false, false, true)),
            ("/generate", r#"{"text":"a"}"#, (1, false, false, true)),
            ("/generate", r#"{"input_ids":[[1],[2]]}"#, (2, true, false, true)),
            ("/generate", r#"{"text":["a","b"],"sampling_params":{"n":2}}"#, (4, true, false, true)),
        ] {
            assert_eq!(shape(path, body), Some(wanted), "{body}");
        }
    }

    #[test]
    fn what_nobody_splits_is_none() {
        assert_eq!(shape("/v1/embeddings", r#"{"input":"a"}"#), None);
        assert_eq!(shape("/v1/completions", r#"{"prompt":[]}"#), None);
        assert_eq!(shape("/v1/completions", r#"{"prompt":"a","n":1000000000000}"#), None);
    }
}
