//! `[[model]]`: how the prompts of a model become token ids.

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
}

impl ModelEntry {
    /// The names of its fields.
    pub const FIELDS: &[&str] = &["name", "mode", "directory", "chat_template", "content_format"];

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
        for wrong in
            ["name = ''", "name = 'm'\nmode = 'tokenizer'", "name = 'm'\nmode = 'text'\ndirectory = '/m'"]
        {
            assert!(read(wrong).check().is_err(), "{wrong}");
        }
    }
}
