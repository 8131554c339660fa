//! An engine whose next token is a function of all ids before it, with vLLM's events.

use std::sync::LazyLock;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::engines::sim::detok::Detokenizer;
use crate::engines::sim::text::{TextState, mix};
use crate::engines::sim::tokenizer::{EOS, FIRST_BYTE, token_str};
use crate::splice::StreamRoute;
use crate::splice::sse::Event;

/// What the model says besides what it makes up: these ids from this place on.
#[derive(Clone, Debug, Default)]
pub(super) struct Engine {
    pub(super) prompt: Vec<u32>,
    pub(super) script: Option<(usize, Vec<u32>)>,
    /// One in so many tokens ends the text.
    pub(super) eos_every: u64,
    /// Chats are parsed for reasoning, which begins at once and ends with this.
    pub(super) closes: Option<String>,
    /// Most tokens in an event; how many there are is made up.
    pub(super) coalesce: usize,
}

/// What a client or router asks, as the engine reads it.
struct Asked {
    body: Value,
    chat: bool,
}

impl Asked {
    fn number(&self, key: &str) -> Option<u64> {
        self.body.get(key).and_then(Value::as_u64)
    }
    fn yes(&self, key: &str) -> bool {
        self.body.get(key).and_then(Value::as_bool).unwrap_or(false)
    }
    fn stops(&self) -> Vec<String> {
        match &self.body["stop"] {
            Value::String(one) => vec![one.clone()],
            Value::Array(list) => list.iter().map(|stop| stop.as_str().unwrap().to_owned()).collect(),
            _ => Vec::new(),
        }
    }
}

#[derive(Clone, Default)]
struct Delta {
    ids: Vec<u32>,
    text: String,
    /// Where each token begins, in characters.
    offsets: Vec<usize>,
    /// How many tokens came before.
    position: usize,
    finish: Option<(&'static str, Value)>,
}

impl Engine {
    /// The events of a request; `draw` makes the choices differ.
    pub(super) fn run(&self, route: StreamRoute, body: &[u8], name: &str, draw: u64) -> Vec<Event> {
        let chat = route == StreamRoute::Chat;
        let asked = Asked { body: serde_json::from_slice(body).unwrap(), chat };
        let n = asked.number("n").unwrap_or(1) as usize;
        let prompt: Vec<u32> = match &asked.body["prompt"] {
            Value::Array(ids) => ids.iter().map(|id| id.as_u64().unwrap() as u32).collect(),
            _ => self.prompt.clone(),
        };
        let mut lines: Vec<Vec<Value>> = Vec::new();
        let mut total = 0;
        for choice in 0..n {
            let deltas = self.generate(&asked, &prompt, draw + choice as u64);
            total += deltas.iter().map(|delta| delta.ids.len()).sum::<usize>();
            lines.push(self.shape(&asked, &prompt, choice, &deltas));
        }
        // Choices in turn, as they come out of a batch.
        let longest = lines.iter().map(Vec::len).max().unwrap_or(0);
        let mut all: Vec<Value> =
            (0..longest).flat_map(|at| lines.iter().filter_map(move |line| line.get(at).cloned())).collect();
        let options = &asked.body["stream_options"];
        let fingerprint = json!("fp-1");
        if options["include_usage"] == json!(true) {
            all.push(json!({
                "choices": [],
                "usage": {"prompt_tokens": prompt.len(), "total_tokens": prompt.len() + total,
                    "completion_tokens": total, "prompt_tokens_details": {"cached_tokens": 5}},
                "system_fingerprint": fingerprint,
            }));
        } else if let Some(last) = all.last_mut() {
            last["system_fingerprint"] = fingerprint;
        }
        let mut events: Vec<Event> = all
            .into_iter()
            .map(|mut event| {
                event["id"] = json!(name);
                event["object"] = json!(if chat { "chat.completion.chunk" } else { "text_completion" });
                event["created"] = json!(name.len());
                event["model"] = json!("m");
                Event::unnamed(Bytes::from(event.to_string()))
            })
            .collect();
        events.push(Event::unnamed(Bytes::from_static(b"[DONE]")));
        events
    }

    fn generate(&self, asked: &Asked, prompt: &[u32], draw: u64) -> Vec<Delta> {
        let stops = asked.stops();
        let include = asked.yes("include_stop_str_in_output");
        let special = asked.body["skip_special_tokens"] != json!(false);
        let stop_ids: Vec<u32> = asked.body["stop_token_ids"]
            .as_array()
            .map(|ids| ids.iter().map(|id| id.as_u64().unwrap() as u32).collect())
            .unwrap_or_default();
        let most = match asked.chat {
            true => asked.number("max_completion_tokens").or(asked.number("max_tokens")).unwrap_or(60),
            false => asked.number("max_tokens").unwrap_or(16),
        } as usize;
        let least = asked.number("min_tokens").unwrap_or(0) as usize;
        let mut state = TextState::new(1, draw, self.eos_every);
        prompt.iter().for_each(|id| state.push(*id));
        let mut detok = Detokenizer::new(prompt, &stops, include, special);
        let (mut deltas, mut said, mut characters) = (Vec::<Delta>::new(), 0, 0);
        loop {
            let index = prompt.len() + said - self.prompt.len();
            let scripted = self.script.as_ref().and_then(|(from, ids)| ids.get(index.checked_sub(*from)?));
            let id = scripted.copied().unwrap_or_else(|| state.next(said >= least));
            state.push(id);
            said += 1;
            let ends = said > least && (id == EOS || stop_ids.contains(&id));
            let before = characters;
            let mut hit = None;
            if !ends || include {
                let grown = detok.push(id);
                if said > least {
                    hit = detok.find_stop(&stops, grown, include);
                }
            }
            // As vLLM counts: what the tokens are called, not what was shown.
            characters += token_str(id).chars().count();
            let finish = match hit {
                Some(which) => Some(("stop", json!(stops[which]))),
                None if ends && id == EOS => Some(("stop", Value::Null)),
                None if ends => Some(("stop", json!(id))),
                None if said >= most => Some(("length", Value::Null)),
                None => None,
            };
            let text = detok.take(finish.is_some()).to_owned();
            let over = finish.is_some();
            let one = Delta { ids: vec![id], text, offsets: vec![before], position: said - 1, finish };
            let size = 1 + mix(said as u64 ^ draw) as usize % self.coalesce.max(1);
            match deltas.last_mut() {
                Some(last) if last.ids.len() < size && last.finish.is_none() => {
                    last.ids.push(id);
                    last.text.push_str(&one.text);
                    last.offsets.push(before);
                    last.finish = one.finish;
                }
                _ => deltas.push(one),
            }
            if over {
                return deltas;
            }
        }
    }

    fn shape(&self, asked: &Asked, prompt: &[u32], choice: usize, deltas: &[Delta]) -> Vec<Value> {
        let ids = asked.yes("return_token_ids");
        let options = &asked.body["stream_options"];
        let running =
            options["include_usage"] == json!(true) && options["continuous_usage_stats"] == json!(true);
        let told = |told: bool, ids: &[u32]| if told { json!(ids) } else { Value::Null };
        let mut out = Vec::new();
        let usage = |event: &mut Value, tokens: usize| {
            if running {
                event["usage"] = json!({"prompt_tokens": prompt.len(), "total_tokens": prompt.len() + tokens,
                    "completion_tokens": tokens});
            }
        };
        if asked.chat {
            let mut event = json!({"choices": [{"index": choice, "delta": {"role": "assistant", "content": ""},
                "logprobs": null, "finish_reason": null}], "prompt_token_ids": told(ids, prompt), "prompt_text": null});
            usage(&mut event, 0);
            out.push(event);
        }
        let closes = self.closes.as_deref().unwrap_or_default();
        let (mut thinking, mut kept) = (!closes.is_empty(), String::new());
        let mut tokens = 0;
        for delta in deltas {
            tokens += delta.ids.len();
            let (reason, stop) =
                delta.finish.clone().map_or((Value::Null, Value::Null), |(r, s)| (json!(r), s));
            let mut one = json!({"index": choice, "logprobs": logprobs(asked, prompt, delta),
                "finish_reason": reason, "token_ids": told(ids, &delta.ids)});
            if asked.chat {
                let mut parts = Map::new();
                if thinking {
                    kept.push_str(&delta.text);
                    let mut now = kept.len();
                    if let Some(at) = kept.find(closes) {
                        thinking = false;
                        let content = kept[at + closes.len()..].to_owned();
                        now = at;
                        if !content.is_empty() {
                            parts.insert("content".to_owned(), json!(content));
                        }
                    } else if delta.finish.is_none() {
                        let partial =
                            (1..closes.len()).rev().find(|l| kept.ends_with(&closes[..*l])).unwrap_or(0);
                        now = kept.len() - partial;
                    }
                    if now > 0 {
                        parts.insert("reasoning".to_owned(), json!(kept[..now]));
                    }
                    kept.drain(..now);
                } else {
                    parts.insert("content".to_owned(), json!(delta.text));
                }
                one["delta"] = Value::Object(parts);
                if delta.finish.is_some() {
                    one["stop_reason"] = stop;
                }
            } else {
                one["text"] = json!(delta.text);
                one["stop_reason"] = stop;
                one["prompt_token_ids"] = told(ids && delta.position == 0, prompt);
            }
            let mut event = json!({"choices": [one]});
            usage(&mut event, tokens);
            out.push(event);
        }
        out
    }
}

fn logprobs(asked: &Asked, prompt: &[u32], delta: &Delta) -> Value {
    let number = |id: u32, at: usize, rank: u64| {
        -((mix(u64::from(id) ^ ((prompt.len() + delta.position + at) as u64) << 20 ^ rank) % 4000) as f64)
            / 1000.0
    };
    // The token itself first, then others; none of the same text. A map of `serde_json` sorts its
    // members, so the others are such as sort behind it.
    let others = |id: u32, at: usize, count: usize| -> Vec<(String, f64)> {
        static SORTED: LazyLock<Vec<(String, u32)>> = LazyLock::new(|| {
            let mut all: Vec<_> =
                (FIRST_BYTE + 0x80..FIRST_BYTE + 0x100).map(|id| (token_str(id), id)).collect();
            all.sort();
            all
        });
        let own = token_str(id);
        let behind = SORTED.partition_point(|(text, _)| *text <= own);
        std::iter::once((own, id))
            .chain(SORTED[behind..].iter().cloned())
            .take(count)
            .enumerate()
            .map(|(rank, (text, other))| (text, number(other, at, rank as u64)))
            .collect()
    };
    let entry = |(token, logprob): &(String, f64)| json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()});
    if asked.chat {
        if !asked.yes("logprobs") {
            return Value::Null;
        }
        let top = asked.number("top_logprobs").unwrap_or(0) as usize;
        let content: Vec<Value> = delta
            .ids
            .iter()
            .enumerate()
            .map(|(at, id)| {
                let mut one = entry(&others(*id, at, 1)[0]);
                one["top_logprobs"] = others(*id, at, top).iter().map(entry).collect();
                one
            })
            .collect();
        return json!({ "content": content });
    }
    let Some(top) = asked.number("logprobs") else { return Value::Null };
    let tops: Vec<Value> = delta
        .ids
        .iter()
        .enumerate()
        .map(|(at, id)| {
            others(*id, at, top as usize + 1)
                .into_iter()
                .map(|(token, logprob)| (token, json!(logprob)))
                .collect::<Map<_, _>>()
                .into()
        })
        .collect();
    json!({
        "text_offset": delta.offsets,
        "token_logprobs": delta.ids.iter().enumerate().map(|(at, id)| number(*id, at, 0)).collect::<Vec<_>>(),
        "tokens": delta.ids.iter().map(|id| token_str(*id)).collect::<Vec<_>>(),
        "top_logprobs": tops,
    })
}
