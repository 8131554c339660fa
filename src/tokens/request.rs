//! From a body to a prompt's parts: what each route calls them, and no more than that.
//!
//! One pass over the body, borrowing; only what a prompt is made of is taken out. A body that
//! cannot be read, or says something that the engine would understand in a way not known here,
//! yields no prompt at all: better no prefix than a wrong one.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::json::Json;
use super::{anthropic, responses};

/// How a route writes its prompt.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Form {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/responses`.
    Responses,
    /// `/v1/messages`.
    Messages,
    /// `/v1/embeddings`, and the other routes that take `input`.
    Embeddings,
    /// `/tokenize`: a prompt or messages.
    Tokenize,
    /// `/inference/v1/generate`: token ids.
    TokenIds,
    /// SGLang's `/generate`: `text` or `input_ids`.
    Generate,
    /// KsanaLLM's `/generate`: `input_tokens`, `prompt` or `messages`. No path is this form's alone.
    Ksana,
}

impl Form {
    /// Of a route; `None` for one without a prompt.
    pub fn of_path(path: &str) -> Option<Self> {
        Some(match path {
            "/v1/chat/completions" | "/v1/chat/completions/render" => Form::Chat,
            "/v1/completions" | "/v1/completions/render" => Form::Completions,
            "/v1/responses" => Form::Responses,
            "/v1/messages" | "/v1/messages/count_tokens" => Form::Messages,
            "/v1/embeddings" | "/pooling" | "/classify" | "/v1/classify" => Form::Embeddings,
            "/tokenize" | "/v1/tokenize" => Form::Tokenize,
            "/inference/v1/generate" => Form::TokenIds,
            "/generate" => Form::Generate,
            _ => return None,
        })
    }
}

/// What a prompt is made of.
#[derive(Clone, PartialEq, Debug)]
pub enum Input {
    /// A conversation, for a chat template.
    Chat(Chat),
    /// A text; `special` asks for the tokens that the tokenizer puts around it.
    Text {
        /// It.
        text: String,
        /// Whether BOS and the like belong to it.
        special: bool,
        /// The request's other prompts.
        others: Vec<String>,
    },
    /// Token ids.
    Ids {
        /// They.
        ids: Vec<u32>,
        /// The request's other prompts.
        others: Vec<Vec<u32>>,
    },
    /// Nothing that can be known here: unreadable, embeddings, a template of the client's own,
    /// a prompt that the engine truncates or fetches.
    Opaque,
}

/// A conversation as OpenAI's chat route writes it.
#[derive(Clone, PartialEq, Debug)]
pub struct Chat {
    /// Messages, as they came.
    pub messages: Vec<Json>,
    /// Tools, each `{type, function: {name, …}}`.
    pub tools: Option<Vec<Json>>,
    /// Whether the client said `tool_choice: "none"`.
    pub no_tool_choice: bool,
    /// Whether the template opens the answer.
    pub add_generation_prompt: bool,
    /// Whether the last message is to be continued, not answered.
    pub continue_final_message: bool,
    /// `add_special_tokens`: off unless asked for, because templates write them.
    pub special: bool,
    /// Further variables of the template, without those that are unset.
    pub kwargs: Vec<(String, Json)>,
}

impl Chat {
    /// Of messages alone.
    pub fn new(messages: Vec<Json>) -> Self {
        Self {
            messages,
            tools: None,
            no_tool_choice: false,
            add_generation_prompt: true,
            continue_final_message: false,
            special: false,
            kwargs: Vec::new(),
        }
    }

    /// Sets a variable of the template, unless it is unset: a variable that is there counts as
    /// defined for the template.
    pub fn set(&mut self, name: &str, value: Json) {
        if value.is_null() || value.as_str() == Some("auto") {
            return;
        }
        match self.kwargs.iter_mut().find(|(key, _)| key == name) {
            Some((_, old)) => *old = value,
            None => self.kwargs.push((name.to_owned(), value)),
        }
    }

    /// Effort, and what follows from it for templates that have thinking as a switch.
    pub fn set_effort(&mut self, effort: Option<&Json>) {
        let Some(effort) = effort else { return };
        let switched = self.kwargs.iter().any(|(key, _)| key == "enable_thinking");
        if !switched {
            self.set("enable_thinking", Json::Bool(effort.as_str() != Some("none")));
        }
        self.set("reasoning_effort", effort.clone());
    }
}

/// A body, taken apart.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// The prompt.
    pub input: Input,
    /// `cache_salt`.
    pub salt: Option<String>,
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow, default)]
    messages: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tools: Option<&'a RawValue>,
    #[serde(default)]
    tool_choice: Option<Json>,
    #[serde(default)]
    add_generation_prompt: Option<bool>,
    #[serde(default)]
    continue_final_message: Option<bool>,
    #[serde(default)]
    add_special_tokens: Option<bool>,
    #[serde(borrow, default)]
    documents: Option<&'a RawValue>,
    #[serde(default)]
    chat_template: Option<IgnoredAny>,
    #[serde(default)]
    chat_template_kwargs: Option<Json>,
    #[serde(default)]
    reasoning_effort: Option<Json>,
    #[serde(borrow, default)]
    prompt: Option<&'a RawValue>,
    #[serde(default)]
    prompt_embeds: Option<IgnoredAny>,
    #[serde(default)]
    truncate_prompt_tokens: Option<IgnoredAny>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input_ids: Option<&'a RawValue>,
    #[serde(borrow, default)]
    token_ids: Option<&'a RawValue>,
    // Of KsanaLLM's own route.
    #[serde(borrow, default)]
    input_tokens: Option<&'a RawValue>,
    #[serde(default)]
    use_chat_template: Option<bool>,
    #[serde(default)]
    input_refit_embedding: Option<IgnoredAny>,
    #[serde(borrow, default)]
    cache_salt: Option<Cow<'a, str>>,
    // Of responses.
    #[serde(default)]
    instructions: Option<Json>,
    #[serde(default)]
    previous_response_id: Option<IgnoredAny>,
    #[serde(default)]
    previous_input_messages: Option<IgnoredAny>,
    #[serde(default)]
    reasoning: Option<Json>,
    // Of Anthropic's messages.
    #[serde(default)]
    system: Option<Json>,
    #[serde(default)]
    thinking: Option<Json>,
    #[serde(default)]
    output_config: Option<Json>,
}

/// Takes a body apart.
pub fn read(form: Form, body: &[u8]) -> Request {
    let Ok(body) = serde_json::from_slice::<Body<'_>>(body) else {
        return Request { input: Input::Opaque, salt: None };
    };
    let salt = body.cache_salt.as_ref().map(|salt| salt.as_ref().to_owned());
    Request { input: input(form, &body).unwrap_or(Input::Opaque), salt }
}

fn input(form: Form, body: &Body<'_>) -> Option<Input> {
    let altered = body.truncate_prompt_tokens.is_some() || body.prompt_embeds.is_some();
    if altered || body.chat_template.is_some() {
        return None;
    }
    match form {
        Form::Chat => match body.input_ids {
            Some(ids) => prompts(ids, body),
            None => chat(body),
        },
        Form::Completions => prompts(body.prompt?, body),
        Form::Tokenize if body.messages.is_some() => chat(body),
        Form::Tokenize => prompts(body.prompt?, body),
        Form::Embeddings if body.messages.is_some() => chat(body),
        Form::Embeddings => prompts(body.input?, body),
        Form::TokenIds => prompts(body.token_ids?, body),
        Form::Generate => prompts(body.input_ids.or(body.text)?, body),
        Form::Ksana => ksana(body),
        Form::Responses => {
            if body.previous_response_id.is_some() || body.previous_input_messages.is_some() {
                return None;
            }
            let input: Json = serde_json::from_str(body.input?.get()).ok()?;
            let tools: Option<Vec<Json>> = optional(body.tools)?;
            let mut chat = responses::chat(body.instructions.as_ref(), &input, tools.as_deref())?;
            chat.no_tool_choice = says_none(body.tool_choice.as_ref());
            kwargs(&mut chat, body)?;
            chat.set_effort(body.reasoning.as_ref().and_then(|r| r.get("effort")));
            Some(Input::Chat(chat))
        }
        Form::Messages => {
            let messages: Vec<Json> = serde_json::from_str(body.messages?.get()).ok()?;
            let tools: Option<Vec<Json>> = optional(body.tools)?;
            let mut chat = anthropic::chat(body.system.as_ref(), &messages, tools.as_deref())?;
            kwargs(&mut chat, body)?;
            if body.thinking.as_ref().and_then(|t| t.text("type")) == Some("disabled") {
                chat.set_effort(Some(&Json::from("none")));
            } else {
                chat.set_effort(body.output_config.as_ref().and_then(|c| c.get("effort")));
            }
            Some(Input::Chat(chat))
        }
    }
}

/// A prompt of KsanaLLM's own route. Ids count before text, text before messages.
fn ksana(body: &Body<'_>) -> Option<Input> {
    if body.input_refit_embedding.is_some() {
        return None;
    }
    match (body.input_tokens, body.prompt) {
        (Some(ids), _) => prompts(ids, body),
        // The engine makes a conversation of it.
        (None, Some(prompt)) if body.use_chat_template == Some(true) => {
            let content: String = serde_json::from_str(prompt.get()).ok()?;
            let message = [("role", Json::from("user")), ("content", Json::Text(content))];
            Some(Input::Chat(Chat::new(vec![Json::object(message)])))
        }
        (None, Some(prompt)) => prompts(prompt, body),
        (None, None) => chat(body),
    }
}

fn optional<'a, T: Deserialize<'a>>(raw: Option<&'a RawValue>) -> Option<Option<T>> {
    match raw {
        None => Some(None),
        Some(raw) => serde_json::from_str(raw.get()).ok(),
    }
}

fn says_none(choice: Option<&Json>) -> bool {
    choice.and_then(Json::as_str) == Some("none")
}

fn chat(body: &Body<'_>) -> Option<Input> {
    let mut chat = Chat::new(serde_json::from_str(body.messages?.get()).ok()?);
    chat.tools = optional(body.tools)?;
    chat.no_tool_choice = says_none(body.tool_choice.as_ref());
    chat.add_generation_prompt = body.add_generation_prompt.unwrap_or(true);
    chat.continue_final_message = body.continue_final_message.unwrap_or(false);
    chat.special = body.add_special_tokens.unwrap_or(false);
    kwargs(&mut chat, body)?;
    if let Some(documents) = body.documents {
        chat.set("documents", serde_json::from_str(documents.get()).ok()?);
    }
    chat.set_effort(body.reasoning_effort.as_ref());
    Some(Input::Chat(chat))
}

/// Variables of the client's own. Some are not variables: a template, or arguments of the
/// function that the engine calls.
fn kwargs(chat: &mut Chat, body: &Body<'_>) -> Option<()> {
    let members = match &body.chat_template_kwargs {
        None | Some(Json::Null) => return Some(()),
        Some(Json::Object(members)) => members,
        Some(_) => return None,
    };
    for (key, value) in members {
        match (key.as_str(), value) {
            ("chat_template" | "tokenize", Json::Null) => {}
            ("chat_template" | "tokenize" | "messages" | "tools" | "conversation", _) => return None,
            ("truncation" | "max_length" | "padding" | "tokenizer_kwargs", _) => return None,
            // Those of the request itself come later and win.
            ("add_generation_prompt" | "continue_final_message", _) => {}
            _ => chat.kwargs.push((key.clone(), value.clone())),
        }
    }
    Some(())
}

/// Most prompts of one request that are told apart.
pub const MAX_BATCH: usize = 4096;

/// One prompt, or several of which the longest one stands for all.
fn prompts(raw: &RawValue, body: &Body<'_>) -> Option<Input> {
    let special = body.add_special_tokens.unwrap_or(true);
    Some(match serde_json::from_str::<Prompts<'_>>(raw.get()).ok()? {
        Prompts::Text(text) => Input::Text { text: text.into_owned(), special, others: Vec::new() },
        Prompts::Ids(ids) => Input::Ids { ids, others: Vec::new() },
        Prompts::Texts(texts) => {
            let (text, others) = longest(texts.into_iter().map(Cow::into_owned).collect(), String::len)?;
            Input::Text { text, special, others }
        }
        Prompts::ManyIds(many) => {
            let (ids, others) = longest(many, Vec::len)?;
            Input::Ids { ids, others }
        }
    })
}

/// The first of the longest ones, and the others.
fn longest<T>(mut all: Vec<T>, length: fn(&T) -> usize) -> Option<(T, Vec<T>)> {
    let at = (0..all.len()).rev().max_by_key(|at| length(&all[*at]))?;
    let found = all.remove(at);
    Some((found, all))
}

enum Prompts<'a> {
    Text(Cow<'a, str>),
    Ids(Vec<u32>),
    Texts(Vec<Cow<'a, str>>),
    ManyIds(Vec<Vec<u32>>),
}

/// One item of a list of prompts.
enum Item<'a> {
    Id(u32),
    Text(Cow<'a, str>),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Prompts<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptsVisitor)
    }
}

struct PromptsVisitor;

impl<'de> Visitor<'de> for PromptsVisitor {
    type Value = Prompts<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, token ids, or a list of either")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Prompts::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Prompts::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        use serde::de::Error;
        let mut prompts = match seq.next_element()? {
            None => return Ok(Prompts::Ids(Vec::new())),
            Some(Item::Id(id)) => Prompts::Ids(vec![id]),
            Some(Item::Text(text)) => Prompts::Texts(vec![text]),
            Some(Item::Ids(ids)) => Prompts::ManyIds(vec![ids]),
        };
        loop {
            match &mut prompts {
                Prompts::Ids(ids) => match seq.next_element()? {
                    Some(id) => ids.push(id),
                    None => break,
                },
                Prompts::Texts(texts) if texts.len() < MAX_BATCH => match seq.next_element()? {
                    Some(Item::Text(text)) => texts.push(text),
                    Some(_) => return Err(A::Error::custom("a list of prompts of two kinds")),
                    None => break,
                },
                Prompts::ManyIds(many) if many.len() < MAX_BATCH => match seq.next_element()? {
                    Some(Item::Ids(ids)) => many.push(ids),
                    Some(_) => return Err(A::Error::custom("a list of prompts of two kinds")),
                    None => break,
                },
                _ => return Err(A::Error::custom("too many prompts to look at")),
            }
        }
        Ok(prompts)
    }
}

impl<'de> Deserialize<'de> for Item<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;
        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = Item<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a token id, a text or a list of token ids")
            }

            fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<Item<'de>, E> {
                u32::try_from(id).map(Item::Id).map_err(|_| E::custom("no token id"))
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Item<'de>, E> {
                Ok(Item::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Item<'de>, E> {
                Ok(Item::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Item<'de>, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = seq.next_element()? {
                    ids.push(id);
                }
                Ok(Item::Ids(ids))
            }
        }
        deserializer.deserialize_any(ItemVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(form: Form, body: &str) -> Input {
        read(form, body.as_bytes()).input
    }

    #[test]
    fn completions_take_texts_ids_and_lists_of_both() {
        let text = |text: &str, others: &[&str]| Input::Text {
            text: text.to_owned(),
            special: true,
            others: others.iter().map(|other| (*other).to_owned()).collect(),
        };
        let f = Form::Completions;
        assert_eq!(text_of(f, r#"{"prompt":"a\nb"}"#), text("a\nb", &[]));
        assert_eq!(text_of(f, r#"{"prompt":["abcd","efghijkl","x"]}"#), text("efghijkl", &["abcd", "x"]));
        assert_eq!(text_of(f, r#"{"prompt":[1,2,3]}"#), Input::Ids { ids: vec![1, 2, 3], others: vec![] });
        assert_eq!(
            text_of(f, r#"{"prompt":[[1],[2,3],[4,5]]}"#),
            Input::Ids { ids: vec![2, 3], others: vec![vec![1], vec![4, 5]] }
        );
        assert_eq!(
            text_of(f, r#"{"prompt":"x","add_special_tokens":false}"#),
            Input::Text { text: "x".to_owned(), special: false, others: vec![] }
        );
        for opaque in [
            r#"{"prompt":[1,"a"]}"#,
            r#"{"prompt":["a",1]}"#,
            r#"{"prompt":[-1]}"#,
            r#"{"prompt":[4294967296]}"#,
            r#"{"prompt":{}}"#,
            r#"{"prompt":null}"#,
            r#"{"prompt":"a","prompt_embeds":"x"}"#,
            r#"{"prompt":"a","truncate_prompt_tokens":5}"#,
            r#"{"prompt":"a","prompt":"b"}"#,
            "{}",
            "",
            "[]",
        ] {
            assert_eq!(text_of(f, opaque), Input::Opaque, "{opaque}");
        }
    }

    #[test]
    fn every_route_names_its_prompt_its_own_way() {
        let ids = Input::Ids { ids: vec![5, 6], others: vec![] };
        assert_eq!(text_of(Form::Generate, r#"{"input_ids":[5,6],"text":null}"#), ids);
        assert_eq!(text_of(Form::Ksana, r#"{"input_tokens":[5,6],"prompt":"x"}"#), ids);
        assert_eq!(text_of(Form::TokenIds, r#"{"token_ids":[5,6]}"#), ids);
        assert_eq!(text_of(Form::Embeddings, r#"{"input":[5,6]}"#), ids);
        assert_eq!(text_of(Form::Chat, r#"{"messages":[],"input_ids":[5,6]}"#), ids);
        assert_eq!(text_of(Form::Tokenize, r#"{"prompt":[5,6]}"#), ids);
        let one = Input::Text { text: "t".to_owned(), special: true, others: vec![] };
        assert_eq!(text_of(Form::Generate, r#"{"text":"t"}"#), one);
        assert_eq!(text_of(Form::Ksana, r#"{"prompt":"t","input_tokens":null}"#), one);
        for chat in [r#"{"prompt":"t","use_chat_template":true}"#, r#"{"messages":[]}"#] {
            assert!(matches!(text_of(Form::Ksana, chat), Input::Chat(_)), "{chat}");
        }
        assert_eq!(text_of(Form::Ksana, r#"{"prompt":"t","input_refit_embedding":{}}"#), Input::Opaque);
        assert!(matches!(text_of(Form::Tokenize, r#"{"messages":[]}"#), Input::Chat(_)));
        assert_eq!(Form::of_path("/v1/responses"), Some(Form::Responses));
        assert_eq!(Form::of_path("/v1/models"), None);
    }

    #[test]
    fn a_conversation_keeps_what_the_template_may_ask_for() {
        let body = r#"{"messages":[{"role":"user","content":"x"}],"cache_salt":"s","reasoning_effort":"low",
            "documents":[{"title":"t"}],"tool_choice":"none","tools":null,"add_generation_prompt":false,
            "chat_template_kwargs":{"a":null,"b":[1]},"continue_final_message":true,"other":{"x":1}}"#;
        let request = read(Form::Chat, body.as_bytes());
        assert_eq!(request.salt.as_deref(), Some("s"));
        let Input::Chat(chat) = request.input else { panic!("a conversation") };
        let names: Vec<&str> = chat.kwargs.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(names, ["a", "b", "documents", "enable_thinking", "reasoning_effort"]);
        assert!(chat.continue_final_message && !chat.add_generation_prompt && chat.no_tool_choice);
        assert_eq!(chat.tools, None);
        for opaque in [
            r#"{"messages":[],"chat_template":"{{ 1 }}"}"#,
            r#"{"messages":[],"chat_template_kwargs":{"chat_template":"x"}}"#,
            r#"{"messages":[],"chat_template_kwargs":[]}"#,
            r#"{"messages":{}}"#,
        ] {
            assert_eq!(text_of(Form::Chat, opaque), Input::Opaque, "{opaque}");
        }
    }
}
