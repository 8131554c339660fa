//! The simulated model's tokenizer and chat template in the files that real models come with, so
//! that whoever reads those makes the same ids of a prompt as the engine does.
//!
//! The rules of [`super::tokenizer`] as a pre-tokeniser (a regular expression cuts the text into
//! words, groups of letters and numbers) before a vocabulary without merges, with bytes for the rest.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde_json::{Value, json};

use super::tokenizer::{self, BOS, EOS, FIRST_BYTE, VOCABULARY, decode};
use super::words::WORDS;

/// What [`super::tokenizer::render_chat`] does.
const CHAT_TEMPLATE: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' -}}\
    {%- endfor -%}\
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// Writes `tokenizer.json` and `tokenizer_config.json` into a folder, which is made if need be.
pub fn write(folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, content) in [("tokenizer.json", tokenizer_json()), ("tokenizer_config.json", config_json())] {
        let path = folder.join(name);
        let bytes = serde_json::to_vec(&content)?;
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn config_json() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": decode(&[BOS], false),
        "eos_token": decode(&[EOS], false),
        "unk_token": decode(&[0], false),
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    })
}

/// The tokenizer as the `tokenizers` library has it.
pub fn tokenizer_json() -> Value {
    let special = |id: u32| {
        json!({"id": id, "content": decode(&[id], false), "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    let bos = decode(&[BOS], false);
    let (first, text) = (
        json!({"SpecialToken": {"id": bos, "type_id": 0}}),
        |id| json!({"Sequence": {"id": id, "type_id": 0}}),
    );
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": (0..FIRST_BYTE).map(special).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": pieces()}, "behavior": "Isolated", "invert": false,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text("A")],
            "pair": [first, text("A"), text("B")],
            "special_tokens": {bos.clone(): {"id": bos, "ids": [BOS], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "ignore_merges": true,
            "vocab": vocabulary(), "merges": [],
        },
    })
}

/// A word that no letter follows, else letters by the three, else digits by the three.
fn pieces() -> String {
    format!(" ?(?:{})(?![a-z])| ?[a-z]{{1,3}}|[0-9]{{1,3}}", WORDS.join("|"))
}

/// Each text once: a group of letters that is a word goes by the word's id.
fn vocabulary() -> BTreeMap<String, u32> {
    let mut ids = BTreeMap::new();
    for id in 0..VOCABULARY {
        let text = match id.checked_sub(FIRST_BYTE) {
            Some(byte @ 0..=255) => format!("<0x{byte:02X}>"),
            _ => decode(&[id], false),
        };
        debug_assert!(id < FIRST_BYTE + 256 || tokenizer::encode(&text).len() == 1);
        ids.entry(text).or_insert(id);
    }
    ids
}
