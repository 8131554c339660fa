//! A model's directory: which files there are, and what they say.
//!
//! The same files that the engine reads: `tokenizer.json`, `tokenizer_config.json`, and chat
//! templates in `chat_template.jinja`, in `additional_chat_templates/`, inside
//! `tokenizer_config.json` or, of processors, in `chat_template.json`, the first found winning.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::normalizers::NFC;
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer};

use super::json::Json;
use super::segments::Segments;
use super::template::ChatTemplate;
use super::tokenizer::TextTokenizer;

/// Why a model's files could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is not there or cannot be read.
    #[error("model {model}: cannot read {}: {error}; {fix}", path.display())]
    Read {
        /// Which model.
        model: String,
        /// Which file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
        /// What to do.
        fix: &'static str,
    },
    /// A file is there and makes no sense.
    #[error("model {model}: {} cannot be used: {why}; {fix}", path.display())]
    Invalid {
        /// Which model.
        model: String,
        /// Which file.
        path: PathBuf,
        /// Why.
        why: String,
        /// What to do.
        fix: &'static str,
    },
    /// Two models of one name.
    #[error("model {0} is given twice; give each model once")]
    Twice(String),
    /// A model that is to be tokenised here, without a directory.
    #[error("model {0}: mode \"tokenizer\" needs `directory`, with the tokenizer.json of the model")]
    NoDirectory(String),
    /// The threads could not be started.
    #[error("cannot start the threads that tokenise: {0}")]
    Threads(std::io::Error),
}

/// The templates of a model.
#[derive(Debug, Default)]
pub(super) struct Templates {
    /// The one for everything.
    pub default: Option<ChatTemplate>,
    /// The one for conversations with tools.
    pub tool_use: Option<ChatTemplate>,
}

/// What a directory holds.
#[derive(Debug)]
pub(super) struct Loaded {
    pub tokenizer: TextTokenizer,
    pub templates: Templates,
    /// `bos_token` and the like, for templates.
    pub special: Vec<(String, Json)>,
}

const SAVE: &str = "point `directory` to what the engine loads: it must hold the files of `save_pretrained`";
const NO_FAST: &str = "save the model's fast tokenizer there, or set mode = \"engine\" or \"text\"";
const TEMPLATE: &str = "correct the template, or set mode = \"engine\" so that the engine renders it";

/// Names under which a configuration has special tokens.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

pub(super) fn load(
    model: &str,
    directory: &Path,
    template: Option<&Path>,
    segments: Arc<Segments>,
    seed: u64,
) -> Result<Loaded, LoadError> {
    let invalid = |path: &Path, why: String, fix| LoadError::Invalid {
        model: model.to_owned(),
        path: path.to_owned(),
        why,
        fix,
    };
    let path = directory.join("tokenizer.json");
    let bytes = fs::read(&path).map_err(|error| LoadError::Read {
        model: model.to_owned(),
        path: path.clone(),
        error,
        fix: NO_FAST,
    })?;
    let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|e| invalid(&path, e.to_string(), NO_FAST))?;
    let config_path = directory.join("tokenizer_config.json");
    let config = match optional(model, &config_path)? {
        None => Json::Null,
        Some(text) => serde_json::from_str(&text).map_err(|e| invalid(&config_path, e.to_string(), SAVE))?,
    };
    let model_type = model_type(model, directory)?;
    as_transformers_builds(&model_type, &mut tokenizer).map_err(|why| invalid(&path, why, SAVE))?;
    add_missing(&mut tokenizer, &config).map_err(|why| invalid(&config_path, why, SAVE))?;

    let special = special_tokens(&config);
    let bos = special.iter().find(|(key, _)| key == "bos_token").and_then(|(_, value)| value.as_str());
    let bos = match config.get("add_bos_token") {
        Some(Json::Bool(false)) => Some(None),
        Some(Json::Bool(true)) => bos.and_then(|bos| tokenizer.token_to_id(bos)).map(Some),
        _ => None,
    };
    let templates = if template.is_none() && is_rendered_by_code(&model_type, directory) {
        tracing::warn!(
            model,
            "engines render this model's conversations by code of their own, so these are routed by their \
             text; completions and token ids are hashed exactly"
        );
        Templates::default()
    } else {
        templates(model, directory, template, &config)?
    };
    let tokenizer = TextTokenizer::new(tokenizer, bos, segments, seed)
        .map_err(|e| invalid(&path, e.to_string(), NO_FAST))?;
    Ok(Loaded { tokenizer, templates, special })
}

fn optional(model: &str, path: &Path) -> Result<Option<String>, LoadError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(LoadError::Read { model: model.to_owned(), path: path.to_owned(), error, fix: SAVE })
        }
    }
}

/// Types of models whose conversations vLLM renders by code, whatever template there is.
const BY_CODE: [&str; 6] = ["gpt_oss", "deepseek_v32", "deepseek_v4", "deepseek_v41", "kimi_k3", "inkling"];

/// `model_type` of `config.json`; empty if there is none.
fn model_type(model: &str, directory: &Path) -> Result<String, LoadError> {
    let path = directory.join("config.json");
    let Some(text) = optional(model, &path)? else { return Ok(String::new()) };
    let config: Json = serde_json::from_str(&text).map_err(|e| LoadError::Invalid {
        model: model.to_owned(),
        path,
        why: e.to_string(),
        fix: SAVE,
    })?;
    Ok(config.text("model_type").unwrap_or_default().to_owned())
}

/// Whether an engine goes by code of its own where a template would do: for models of such a type,
/// and for those with a vocabulary in Mistral's format.
fn is_rendered_by_code(model_type: &str, directory: &Path) -> bool {
    BY_CODE.contains(&model_type) || directory.join("tekken.json").exists()
}

/// Types of models for which transformers 5 takes vocabulary and merges out of `tokenizer.json`
/// and builds the rest itself. In the published models the file says the same; in models made
/// with a tokenizer of another kind it does not, and the engine goes by transformers.
const QWEN2: [&str; 4] = ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"];

/// The pre-tokenizer of `Qwen2Tokenizer`.
const QWEN2_SPLIT: &str = r#"{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]}"#;

fn as_transformers_builds(model_type: &str, tokenizer: &mut Tokenizer) -> Result<(), String> {
    if !QWEN2.contains(&model_type) {
        return Ok(());
    }
    let split: PreTokenizerWrapper = serde_json::from_str(QWEN2_SPLIT).map_err(|e| e.to_string())?;
    tokenizer.with_pre_tokenizer(Some(split));
    tokenizer.with_normalizer(Some(NFC)).map_err(|e| e.to_string())?;
    Ok(())
}

/// A token, written as text or as an object.
fn token_text(token: &Json) -> Option<&str> {
    token.as_str().or_else(|| token.text("content"))
}

fn special_tokens(config: &Json) -> Vec<(String, Json)> {
    let mut special: Vec<(String, Json)> = SPECIAL
        .into_iter()
        .filter_map(|key| Some((key.to_owned(), Json::from(token_text(config.get(key)?)?))))
        .collect();
    if let Some(tokens) = config.list("additional_special_tokens") {
        let texts = tokens.iter().filter_map(token_text).map(Json::from).collect();
        special.push(("additional_special_tokens".to_owned(), Json::List(texts)));
    }
    special
}

/// Adds tokens that only the configuration has. Where it says which ids they have, these must
/// come out.
fn add_missing(tokenizer: &mut Tokenizer, config: &Json) -> Result<(), String> {
    let flag = |token: &Json, key| matches!(token.get(key), Some(Json::Bool(true)));
    if let Some(Json::Object(tokens)) = config.get("added_tokens_decoder") {
        let mut numbered: Vec<(u32, &Json)> =
            tokens.iter().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
        numbered.sort_by_key(|(id, _)| *id);
        for (id, token) in numbered {
            let Some(text) = token_text(token) else { continue };
            if tokenizer.token_to_id(text).is_none() {
                let added = AddedToken::from(text, flag(token, "special"))
                    .lstrip(flag(token, "lstrip"))
                    .rstrip(flag(token, "rstrip"))
                    .single_word(flag(token, "single_word"))
                    .normalized(flag(token, "normalized"));
                tokenizer.add_tokens([added]).map_err(|e| e.to_string())?;
            }
            if tokenizer.token_to_id(text) != Some(id) {
                return Err(format!(
                    "token {text} should have the id {id}, and has another one in tokenizer.json"
                ));
            }
        }
    }
    let single = SPECIAL.into_iter().filter_map(|key| config.get(key));
    let lists = ["additional_special_tokens", "extra_special_tokens"];
    let listed = lists.into_iter().filter_map(|key| config.list(key)).flatten();
    for text in single.chain(listed).filter_map(token_text) {
        if tokenizer.token_to_id(text).is_none() {
            tokenizer.add_special_tokens([AddedToken::from(text, true)]).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

fn templates(
    model: &str,
    directory: &Path,
    given: Option<&Path>,
    config: &Json,
) -> Result<Templates, LoadError> {
    let mut found: Vec<(String, String, PathBuf)> = Vec::new();
    if let Some(path) = given {
        let source = fs::read_to_string(path).map_err(|error| LoadError::Read {
            model: model.to_owned(),
            path: path.to_owned(),
            error,
            fix: "correct `chat_template`",
        })?;
        found.push(("default".to_owned(), source, path.to_owned()));
    } else {
        let path = directory.join("chat_template.jinja");
        if let Some(source) = optional(model, &path)? {
            found.push(("default".to_owned(), source, path));
        }
        let path = directory.join("additional_chat_templates").join("tool_use.jinja");
        if let Some(source) = optional(model, &path)? {
            found.push(("tool_use".to_owned(), source, path));
        }
        if found.is_empty() {
            let path = directory.join("tokenizer_config.json");
            in_config(config, &path, &mut found);
        }
        let path = directory.join("chat_template.json");
        if found.is_empty()
            && let Some(text) = optional(model, &path)?
            && let Ok(json) = serde_json::from_str::<Json>(&text)
        {
            in_config(&json, &path, &mut found);
        }
    }
    let mut templates = Templates::default();
    for (name, source, path) in found {
        let compiled = ChatTemplate::new(&source).map_err(|error| LoadError::Invalid {
            model: model.to_owned(),
            path,
            why: format!("chat template {name}: {error}"),
            fix: TEMPLATE,
        })?;
        match name.as_str() {
            "default" => templates.default = Some(compiled),
            "tool_use" => templates.tool_use = Some(compiled),
            _ => {}
        }
    }
    Ok(templates)
}

/// One template, or a list of named ones.
fn in_config(config: &Json, path: &Path, found: &mut Vec<(String, String, PathBuf)>) {
    match config.get("chat_template") {
        Some(Json::Text(source)) => found.push(("default".to_owned(), source.clone(), path.to_owned())),
        Some(Json::List(named)) => {
            for template in named {
                if let (Some(name @ ("default" | "tool_use")), Some(source)) =
                    (template.text("name"), template.text("template"))
                {
                    found.push((name.to_owned(), source.to_owned(), path.to_owned()));
                }
            }
        }
        _ => {}
    }
}
