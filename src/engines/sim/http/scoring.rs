//! `/v1/score` and `/v1/rerank`: how much two texts have in common, in vLLM's shapes.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value;

use super::Reply;
use super::error::ApiError;
use super::models::{answer, parse};
use crate::engines::sim::engine::{Engine, unix_time};
use crate::engines::sim::text::mix;
use crate::engines::sim::tokenizer;

/// Most pairs of one request.
const MAX_PAIRS: usize = 4096;

/// Under which names a score request may have its two sides.
const SIDES: [(&str, &str); 4] =
    [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")];

#[derive(Serialize)]
struct Scores<'a> {
    id: String,
    object: &'a str,
    created: u64,
    model: &'a str,
    data: Vec<Score<'a>>,
    usage: ScoreUsage,
}

#[derive(Serialize)]
struct Score<'a> {
    index: usize,
    object: &'a str,
    score: f64,
}

#[derive(Serialize)]
struct ScoreUsage {
    prompt_tokens: usize,
    total_tokens: usize,
    completion_tokens: usize,
    prompt_tokens_details: (),
}

#[derive(Serialize)]
struct Ranking<'a> {
    id: String,
    model: &'a str,
    usage: RankUsage,
    results: Vec<Ranked<'a>>,
}

#[derive(Serialize)]
struct RankUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize)]
struct Ranked<'a> {
    index: usize,
    document: Document<'a>,
    relevance_score: f64,
}

#[derive(Serialize)]
struct Document<'a> {
    text: &'a str,
    multi_modal: (),
}

/// `POST /v1/score`.
pub(super) fn score(engine: &Engine, body: &[u8], client_id: Option<&str>) -> Reply {
    let body = match parse(engine, body) {
        Ok(body) => body,
        Err(error) => return Reply::error(&error),
    };
    answer(scores(engine, &body, client_id))
}

fn scores<'a>(engine: &'a Engine, body: &'a Value, client_id: Option<&str>) -> Result<Scores<'a>, ApiError> {
    let (one, other) = SIDES
        .iter()
        .find_map(|(one, other)| Some((body.get(*one)?, body.get(*other)?)))
        .ok_or_else(|| ApiError::missing("text_1", body))?;
    let (queries, texts) = (texts(one, "text_1")?, texts(other, "text_2")?);
    if queries.len() != 1 && queries.len() != texts.len() {
        return Err(ApiError::bad_request("Input lengths must be either 1:1, 1:N or N:N", None));
    }
    let pairs = texts.iter().enumerate().map(|(n, text)| (queries[n.min(queries.len() - 1)], *text));
    let (scores, tokens) = relevance(engine, pairs)?;
    let data = scores.into_iter().enumerate();
    Ok(Scores {
        id: id("score", client_id),
        object: "list",
        created: unix_time().as_secs(),
        model: model(engine, body),
        data: data.map(|(index, score)| Score { index, object: "score", score }).collect(),
        usage: ScoreUsage {
            prompt_tokens: tokens,
            total_tokens: tokens,
            completion_tokens: 0,
            prompt_tokens_details: (),
        },
    })
}

/// `POST /v1/rerank`.
pub(super) fn rerank(engine: &Engine, body: &[u8], client_id: Option<&str>) -> Reply {
    let body = match parse(engine, body) {
        Ok(body) => body,
        Err(error) => return Reply::error(&error),
    };
    answer(ranking(engine, &body, client_id))
}

fn ranking<'a>(
    engine: &'a Engine,
    body: &'a Value,
    client_id: Option<&str>,
) -> Result<Ranking<'a>, ApiError> {
    let query = body.get("query").ok_or_else(|| ApiError::missing("query", body))?;
    let query = query
        .as_str()
        .ok_or_else(|| ApiError::field("string_type", "query", "Input should be a valid string", query))?;
    let documents = body.get("documents").ok_or_else(|| ApiError::missing("documents", body))?;
    let documents = texts(documents, "documents")?;
    let top = match body.get("top_n") {
        None | Some(Value::Null) => 0,
        Some(top) => top
            .as_u64()
            .ok_or_else(|| ApiError::field("int_type", "top_n", "Input should be a valid integer", top))?,
    };
    let (scores, tokens) = relevance(engine, documents.iter().map(|document| (query, *document)))?;
    let ranked = scores.into_iter().zip(&documents).enumerate();
    let mut results: Vec<_> = ranked
        .map(|(index, (relevance_score, text))| Ranked {
            index,
            document: Document { text, multi_modal: () },
            relevance_score,
        })
        .collect();
    results.sort_by(|a, b| b.relevance_score.total_cmp(&a.relevance_score));
    if top > 0 {
        results.truncate(usize::try_from(top).unwrap_or(usize::MAX));
    }
    Ok(Ranking {
        id: id("rerank", client_id),
        model: model(engine, body),
        usage: RankUsage { prompt_tokens: tokens, total_tokens: tokens },
        results,
    })
}

fn id(prefix: &str, client_id: Option<&str>) -> String {
    client_id.map_or_else(|| format!("{prefix}-{:016x}", super::random()), |id| format!("{prefix}-{id}"))
}

fn model<'a>(engine: &'a Engine, body: &'a Value) -> &'a str {
    body.get("model").and_then(Value::as_str).unwrap_or(&engine.args.models[0])
}

/// A text or a list of them.
fn texts<'a>(value: &'a Value, name: &str) -> Result<Vec<&'a str>, ApiError> {
    let wrong = || ApiError::field("string_type", name, "Input should be a valid string", value);
    let texts: Option<Vec<&str>> = match value {
        Value::String(text) => Some(vec![text.as_str()]),
        Value::Array(items) => items.iter().map(Value::as_str).collect(),
        _ => None,
    };
    let texts = texts.ok_or_else(wrong)?;
    match texts.len() {
        0 => Err(ApiError::bad_request(format!("{name} must not be empty"), Some(name))),
        1..=MAX_PAIRS => Ok(texts),
        more => {
            Err(ApiError::bad_request(format!("{name} must be at most {MAX_PAIRS}, got {more}"), Some(name)))
        }
    }
}

/// Scores between 0 and 1, and the tokens of all pairs together.
fn relevance<'a>(
    engine: &Engine,
    pairs: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<(Vec<f64>, usize), ApiError> {
    let (mut scores, mut tokens) = (Vec::new(), 0);
    for (query, text) in pairs {
        let (query, text) = (tokenizer::encode(query), tokenizer::encode(text));
        let length = query.len() + text.len();
        let limit = engine.args.context_length();
        if length > limit {
            let message =
                format!("This model's maximum context length is {limit} tokens, a pair has {length}.");
            return Err(ApiError::bad_request(message, None));
        }
        tokens += length;
        scores.push(overlap(&query, &text, engine.args.seed));
    }
    Ok((scores, tokens))
}

/// The share of the query's ids that the text has, and a little that depends on both, so that no
/// two texts are equally good by chance.
fn overlap(query: &[u32], text: &[u32], seed: u64) -> f64 {
    let (wanted, there): (BTreeSet<_>, BTreeSet<_>) = (query.iter().collect(), text.iter().collect());
    let share = wanted.intersection(&there).count() as f64 / wanted.len().max(1) as f64;
    let hash = query.iter().chain(text).fold(mix(seed), |hash, id| mix(hash ^ u64::from(*id)));
    0.98 * share + 0.02 * (hash >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_has_the_querys_words_is_more_relevant() {
        let ids = |text| tokenizer::encode(text);
        let of = |text| overlap(&ids("why is the sea salt"), &ids(text), 0);
        assert!(of("the sea is salt, and why") > of("the sea"));
        assert!(of("the sea") > of("bread and butter"));
        assert!((0.0..=1.0).contains(&of("why is the sea salt")));
    }
}
