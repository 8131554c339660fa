//! `[[model]]`: how the prompts of a model become token ids.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Where the token ids of a model's prompts come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptMode {
    /// From files here.
    Tokenizer,
    /// From an engine that serves it.
    Engine,
    /// From nowhere: pieces of text are compared.
    Text,
}

impl PromptMode {
    /// Their names in the file, for a model that is not configured: it has no files.
    pub const WITHOUT_FILES: &[&str] = &["engine", "text"];
}

/// How a template takes the content of messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContentForm {
    /// As text.
    String,
    /// As a list of parts.
    OpenAi,
}

/// Whose idea of messages a template is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptDialect {
    /// vLLM's.
    Vllm,
    /// SGLang's.
    Sglang,
}

/// An entry of `[[model]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelEntry {
    /// Its name in requests; adapters go by their base model.
    pub name: String,
    /// Where token ids come from: `tokenizer` where a directory is named, else `engine`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<PromptMode>,
    /// Directory with `tokenizer.json`, `tokenizer_config.json` and the chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// A chat template instead of the directory's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<PathBuf>,
    /// How the template takes content, if the engine was told; otherwise found out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_format: Option<ContentForm>,
    /// Whose idea of messages the template is given; where left out, that of the engines that serve the
    /// model, and vLLM's where they are of several kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dialect: Option<PromptDialect>,
    /// Variables of the template that the engine sets unless a request does
    /// (`--default-chat-template-kwargs`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub template_kwargs: BTreeMap<String, serde_json::Value>,
    /// Whether the engine leaves tools out where a request says `tool_choice: "none"`
    /// (`--exclude-tools-when-tool-choice-none`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub exclude_tools_when_none: bool,
    /// What opens and closes the model's reasoning in its raw text, where that is not `<think>` and
    /// `</think>`: streams are continued by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<[String; 2]>,
    /// Id of the token that closes its reasoning. Without it a stream is not continued of which the last
    /// event had several tokens of reasoning, or one whose text the engine kept back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_end: Option<u32>,
    /// What opens a tool call in its raw text, where that is none of the usual ones: within one, a
    /// stream is not continued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_markers: Option<Vec<String>>,
}

impl ModelEntry {
    /// The names of its fields.
    pub const FIELDS: &[&str] = &[
        "name",
        "mode",
        "directory",
        "chat_template",
        "content_format",
        "dialect",
        "template_kwargs",
        "exclude_tools_when_none",
        "reasoning",
        "reasoning_end",
        "tool_markers",
    ];

    /// Where token ids come from.
    pub fn mode(&self) -> PromptMode {
        let by_files = if self.directory.is_some() { PromptMode::Tokenizer } else { PromptMode::Engine };
        self.mode.unwrap_or(by_files)
    }

    /// Says what is wrong with it by itself.
    pub fn check(&self) -> Result<(), String> {
        if self.name.is_empty() {
            return Err("name is empty: it is the model's name in requests".to_owned());
        }
        let markers = self.reasoning.iter().flatten().chain(self.tool_markers.iter().flatten());
        if markers.into_iter().any(String::is_empty) {
            return Err(
                "a marker in `reasoning` or `tool_markers` is empty: it would be everywhere".to_owned()
            );
        }
        let template = [
            ("dialect", self.dialect.is_some()),
            ("template_kwargs", !self.template_kwargs.is_empty()),
            ("exclude_tools_when_none", self.exclude_tools_when_none),
        ];
        if let Some((name, _)) = template.iter().find(|(_, given)| *given)
            && self.mode() != PromptMode::Tokenizer
        {
            return Err(format!("`{name}` is for mode = \"tokenizer\", where templates are rendered here"));
        }
        match (self.mode(), &self.directory) {
            (PromptMode::Tokenizer, None) => {
                Err("mode = \"tokenizer\" needs `directory`, with the model's tokenizer.json".to_owned())
            }
            (PromptMode::Engine | PromptMode::Text, Some(_)) => {
                Err("`directory` is for mode = \"tokenizer\"; leave one of the two out".to_owned())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_follows_from_the_directory_and_must_not_contradict_it() {
        let read = |text: &str| toml::from_str::<ModelEntry>(text).unwrap();
        assert_eq!(read("name = 'm'\ndirectory = '/m'").mode(), PromptMode::Tokenizer);
        assert_eq!(read("name = 'm'").mode(), PromptMode::Engine);
        assert!(read("name = 'm'\nmode = 'text'").check().is_ok());
        for wrong in [
            "name = ''",
            "name = 'm'\nreasoning = ['<a>', '']",
            "name = 'm'\nmode = 'tokenizer'",
            "name = 'm'\nmode = 'text'\ndirectory = '/m'",
            "name = 'm'\ndialect = 'sglang'",
            "name = 'm'\nmode = 'text'\nexclude_tools_when_none = true",
            "name = 'm'\nmode = 'engine'\n[template_kwargs]\nx = 1",
        ] {
            assert!(read(wrong).check().is_err(), "{wrong}");
        }
    }
}
