//! From a prompt and the answer to it to the blocks that the answer has filled.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::Tokenizers;
use super::answer::{Collector, Said};
use super::engine::Question;
use super::model::Mode;
use super::prompt::Prompt;
use super::request::Form;
use crate::kv::hash::LocalHash;

/// An answer that has ended, and to what.
#[derive(Debug)]
pub struct Answered {
    /// The model, by the name under which it is configured.
    pub model: String,
    /// How the route writes prompts.
    pub form: Form,
    /// The prompt; one that [can go on](Prompt::can_go_on).
    pub prompt: Prompt,
    /// What was collected.
    pub answer: Collector,
}

impl Tokenizers {
    /// Hashes of the full blocks behind those of the prompt. None if nothing is known of them.
    pub async fn behind(&self, answered: Answered, block_size: usize) -> Vec<LocalHash> {
        let Answered { model: name, form, prompt, answer } = answered;
        let said = if answer.unread() <= self.inline_bytes {
            answer.finish()
        } else {
            self.pool.run(move || answer.finish()).await.unwrap_or(Said::Nothing)
        };
        let (text, beyond) = match said {
            Said::Nothing => return Vec::new(),
            Said::Ids(ids) => return prompt.key_behind(&ids, block_size),
            Said::Text { text, beyond } => (text, beyond),
        };
        if prompt.ids().is_none() {
            return prompt.text_key_behind(&flat(form, text), block_size);
        }
        let model = self.models.get(&name).unwrap_or(&self.other);
        let ids: Option<Arc<[u32]>> = match model.mode() {
            Mode::Tokenizer if text.len() <= self.inline_bytes => {
                catch_unwind(AssertUnwindSafe(|| model.encode_behind(&text))).ok().flatten().map(Arc::from)
            }
            Mode::Tokenizer => {
                let model = Arc::clone(model);
                self.pool.run(move || model.encode_behind(&text)).await.flatten().map(Arc::from)
            }
            Mode::Engine => self.asker.ask(&name, Question::of_text(&name, &text, false)).await,
            Mode::Text => None,
        };
        let Some(mut ids) = ids.as_deref() else { return Vec::new() };
        if !beyond {
            // The last token was not computed.
            ids = ids.split_last().map_or(ids, |(_, before)| before);
        }
        prompt.key_behind(ids, block_size)
    }
}

/// The answer as the next prompt's text will have it: see what a conversation is hashed as where
/// nobody tokenises. What else its message has, and how it ends, is not known.
fn flat(form: Form, text: String) -> Vec<u8> {
    match form {
        Form::Chat | Form::Responses | Form::Messages => {
            // Of text: nothing in it can fail to be written.
            let quoted = serde_json::to_string(&text).unwrap_or_default();
            format!("{{\"role\":\"assistant\",\"content\":{quoted}").into_bytes()
        }
        _ => text.into_bytes(),
    }
}
