//! What a choice goes by of a request: its prompt's blocks, from the body.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::http::front::Front;
use crate::kv::hash::{LocalHash, Seed, SequenceHash, sequence_hashes};
use crate::routing::groups::BLOCK;
use crate::state::cache::MOST_ROUTED;
use crate::tokens::{Ask, Form};

/// A request's prompt, as far as it is known.
#[derive(Clone, Debug, Default)]
pub(super) struct Prompt {
    /// Its length, counted or estimated.
    pub(super) tokens: u32,
    /// What its blocks are kept apart by.
    pub(super) seed: Seed,
    /// Its blocks, as many as routing looks at.
    pub(super) hashes: Arc<[LocalHash]>,
    /// The same, each with all that comes before it.
    pub(super) chain: Arc<[SequenceHash]>,
}

/// What the engines' routes call the model.
#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    model_name: Option<Cow<'a, str>>,
}

/// Looks at a body; the error says why it is no JSON.
pub(super) async fn look(
    front: &Front,
    path: &str,
    is_generate: bool,
    body: &Bytes,
) -> Result<Prompt, serde_json::Error> {
    let model = match serde_json::from_slice::<Named<'_>>(body) {
        Ok(named) => named.model_name.or(named.model).unwrap_or_default(),
        Err(_) => {
            serde_json::from_slice::<IgnoredAny>(body)?;
            return Ok(Prompt::default());
        }
    };
    let form = if is_generate { Some(Form::Ksana) } else { Form::of_path(path) };
    let (Some(tokenizers), Some(form)) = (&front.config.tokenizers, form) else {
        return Ok(Prompt::default());
    };
    let ask = Ask { model: &model, lora: None, form, body, lifted: None, now: SystemTime::now() };
    let prompt = tokenizers.prompt_unasked(ask).await;
    let mut key = prompt.key(BLOCK as usize);
    key.hashes.truncate(MOST_ROUTED);
    Ok(Prompt {
        tokens: u32::try_from(prompt.tokens()).unwrap_or(u32::MAX),
        seed: key.seed,
        chain: sequence_hashes(&key.hashes).into(),
        hashes: key.hashes.into(),
    })
}
