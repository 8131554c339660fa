//! Messages and tools as an engine hands them to its chat template.
//!
//! Between a request and the template stands the engine's own idea of messages: content is
//! flattened or wrapped, members are put in the order of its types and others dropped, arguments
//! of tool calls become objects. A template that prints any of it shows the difference, so the
//! engine's idea is followed here: vLLM's, which was tried out and read, and SGLang's, which was
//! read.

use super::anthropic::BILLING;
use super::content::ContentFormat;
use super::json::Json;
use super::request::Chat;

/// Stands where a picture, a sound or the like begins, beyond which nothing is certain. No text
/// in its right mind contains it; one that does is certain up to there only.
pub const MEDIA: &str = "\u{f8fe}everline-media\u{f8fe}";

/// Whose idea of messages it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    /// vLLM and what descends from it.
    #[default]
    Vllm,
    /// SGLang.
    Sglang,
}

/// A conversation, ready for a template.
#[derive(Clone, PartialEq, Debug)]
pub struct Conversation {
    /// Messages.
    pub messages: Vec<Json>,
    /// Tools.
    pub tools: Option<Vec<Json>>,
}

/// `None` for what the engine would refuse, or understand in a way not known here.
pub fn normalise(
    chat: &Chat,
    format: ContentFormat,
    dialect: Dialect,
    developer: bool,
) -> Option<Conversation> {
    let mut messages: Vec<Json> =
        chat.messages.iter().map(|m| message(m, format, dialect)).collect::<Option<_>>()?;
    if !developer && messages.iter().any(|m| m.text("role") == Some("developer")) {
        messages = developer_as_system(messages);
    }
    let silenced = dialect == Dialect::Sglang && chat.no_tool_choice;
    let tools = match &chat.tools {
        // An empty list is none for SGLang, and an empty list for vLLM; templates see no difference.
        Some(tools) if !silenced => Some(tools.iter().map(|t| tool(t, dialect)).collect::<Option<_>>()?),
        _ => None,
    };
    Some(Conversation { messages, tools })
}

fn message(from: &Json, format: ContentFormat, dialect: Dialect) -> Option<Json> {
    let role = from.text("role")?;
    let system = role == "system" && dialect == Dialect::Vllm;
    let content = content(from.get("content"), format, system)?;
    let mut to = vec![("role".to_owned(), Json::from(role))];
    let flat = role == "tool" && format == ContentFormat::OpenAi;
    to.push(("content".to_owned(), if flat { flattened(content) } else { content }));
    match role {
        "assistant" => {
            if let Some(calls) = from.list("tool_calls").filter(|calls| !calls.is_empty()) {
                let calls = calls.iter().map(|call| tool_call(call, dialect)).collect::<Option<_>>()?;
                to.push(("tool_calls".to_owned(), Json::List(calls)));
            }
            // vLLM's types have no message with thoughts whose content is null.
            let null =
                matches!(from, Json::Object(m) if m.iter().any(|(k, v)| k == "content" && v.is_null()));
            let thoughts = from.get("reasoning").or_else(|| from.get("reasoning_content"));
            if let Some(thoughts) = thoughts.filter(|_| !null || dialect == Dialect::Sglang) {
                to.push(("reasoning".to_owned(), thoughts.clone()));
                to.push(("reasoning_content".to_owned(), thoughts.clone()));
            }
        }
        "tool" => to.extend(from.get("tool_call_id").map(|id| ("tool_call_id".to_owned(), id.clone()))),
        "developer" => to.push(("tools".to_owned(), from.get("tools").cloned().unwrap_or_default())),
        _ => {}
    }
    for key in ["name", "task"] {
        to.extend(from.text(key).map(|text| (key.to_owned(), Json::from(text))));
    }
    Some(Json::Object(to))
}

fn content(from: Option<&Json>, format: ContentFormat, system: bool) -> Option<Json> {
    let single;
    let parts = match from {
        None => &[][..],
        Some(text @ Json::Text(_)) => {
            single = [text.clone()];
            &single[..]
        }
        Some(Json::List(parts)) => parts,
        Some(_) => return None,
    };
    let mut texts: Vec<Json> = Vec::with_capacity(parts.len());
    let mut media = false;
    for part in parts {
        let (mut text, extra) = match part {
            Json::Text(text) => (text.clone(), Vec::new()),
            Json::Object(members) => match words(part)? {
                Words::Text(text) => (text, extra_of(members)),
                Words::Nothing => continue,
                Words::Media => {
                    media = true;
                    (MEDIA.to_owned(), Vec::new())
                }
                Words::Reference(name) if format == ContentFormat::String => (name, Vec::new()),
                Words::Reference(name) => {
                    let part = [("type", Json::from("tool_reference")), ("name", Json::from(name))];
                    texts.push(Json::object(part));
                    continue;
                }
            },
            _ => return None,
        };
        if system && text.starts_with(BILLING) {
            let Some((_, rest)) = text.split_once('\n').filter(|(_, rest)| !rest.is_empty()) else {
                continue;
            };
            text = rest.to_owned();
        }
        texts.push(match format {
            ContentFormat::String => Json::Text(text),
            ContentFormat::OpenAi => {
                let mut part =
                    vec![("type".to_owned(), Json::from("text")), ("text".to_owned(), Json::Text(text))];
                part.extend(extra);
                Json::Object(part)
            }
        });
    }
    if format == ContentFormat::OpenAi {
        return Some(Json::List(texts));
    }
    // Into flat text engines put pictures first, wherever they stood.
    let mut joined = if media { MEDIA.to_owned() } else { String::new() };
    for (at, text) in texts.iter().filter_map(Json::as_str).enumerate() {
        if at > 0 {
            joined.push('\n');
        }
        joined.push_str(text);
    }
    Some(Json::Text(joined))
}

enum Words {
    Text(String),
    Reference(String),
    Nothing,
    Media,
}

fn words(part: &Json) -> Option<Words> {
    let kind = part.text("type");
    Some(match kind {
        Some("text" | "input_text" | "output_text") => match part.get("text") {
            Some(Json::Text(text)) => Words::Text(text.clone()),
            None if kind == Some("text") => Words::Nothing,
            _ => return None,
        },
        Some("refusal") => part.text("refusal").map_or(Words::Nothing, |text| Words::Text(text.to_owned())),
        Some("thinking") => Words::Text(part.text("thinking")?.to_owned()),
        Some("tool_reference") => Words::Reference(part.text("name")?.to_owned()),
        // Pictures, sounds, embeddings, files, and whatever comes next.
        _ => Words::Media,
    })
}

/// Members that vLLM knows in parts of whatever type; it passes all others on to the template.
fn extra_of(members: &[(String, Json)]) -> Vec<(String, Json)> {
    const KNOWN: [&str; 20] = [
        "type",
        "text",
        "refusal",
        "thinking",
        "closed",
        "image_url",
        "image_pil",
        "image_embeds",
        "audio_url",
        "audio_embeds",
        "video_url",
        "video_embeds",
        "input_audio",
        "prompt_embeds",
        "data",
        "file",
        "uuid",
        "name",
        "tool_reference",
        "cache_control",
    ];
    members.iter().filter(|(key, _)| !KNOWN.contains(&key.as_str())).cloned().collect()
}

/// Results of tools as text, unless there is more than text in them.
fn flattened(content: Json) -> Json {
    let Json::List(parts) = &content else { return content };
    if parts.iter().any(|part| part.text("type") != Some("text")) {
        return content;
    }
    let texts: Vec<&str> = parts.iter().filter_map(|part| part.text("text")).collect();
    Json::Text(texts.join("\n"))
}

fn tool_call(from: &Json, dialect: Dialect) -> Option<Json> {
    if from.text("type").is_some_and(|kind| kind != "function") {
        return None;
    }
    let function = from.get("function")?;
    let empty = || Json::Object(Vec::new());
    let arguments = match function.get("arguments") {
        Some(object @ Json::Object(_)) => object.clone(),
        Some(Json::Text(text)) => match serde_json::from_str(text) {
            Ok(object @ Json::Object(_)) => object,
            _ => empty(),
        },
        _ => empty(),
    };
    let name = function.get("name")?.clone();
    let id = from.get("id").map(|id| ("id", id.clone()));
    let members = match dialect {
        Dialect::Vllm => vec![("arguments", arguments), ("name", name)],
        Dialect::Sglang => vec![("name", name), ("arguments", arguments)],
    };
    let function = ("function", Json::object(members));
    let kind = ("type", Json::from("function"));
    Some(Json::object(match dialect {
        Dialect::Vllm => id.into_iter().chain([function, kind]).collect::<Vec<_>>(),
        Dialect::Sglang => id.into_iter().chain([kind, function]).collect::<Vec<_>>(),
    }))
}

/// A tool as the engine's types print it: members in their order, unset ones as null or left out.
fn tool(from: &Json, dialect: Dialect) -> Option<Json> {
    if from.text("type").is_some_and(|kind| kind != "function") {
        return None;
    }
    let function = from.get("function")?;
    let member = |key: &str| function.get(key).cloned().unwrap_or_default();
    let name = Json::from(function.text("name")?);
    if dialect == Dialect::Sglang {
        let strict = function.get("strict").cloned().unwrap_or(Json::Bool(false));
        return Some(Json::object([
            ("description", member("description")),
            ("name", name),
            ("parameters", member("parameters")),
            ("strict", strict),
        ]));
    }
    let mut members =
        vec![("name", name), ("description", member("description")), ("parameters", member("parameters"))];
    let deferred = from.get("defer_loading");
    members.extend(function.get("strict").map(|strict| ("strict", strict.clone())));
    let within = function.get("defer_loading").or(deferred);
    members.extend(within.map(|deferred| ("defer_loading", deferred.clone())));
    let mut tool = vec![("type", Json::from("function")), ("function", Json::object(members))];
    tool.extend(deferred.map(|deferred| ("defer_loading", deferred.clone())));
    Some(Json::object(tool))
}

/// For templates that know no developers: system messages, all in one at the front.
fn developer_as_system(messages: Vec<Json>) -> Vec<Json> {
    let mut said = Vec::new();
    let mut rest = Vec::new();
    let mut scattered = false;
    for (at, message) in messages.into_iter().enumerate() {
        let Json::Object(mut members) = message else { continue };
        let role = members.iter().find(|(key, _)| key == "role").and_then(|(_, role)| role.as_str());
        if !matches!(role, Some("system" | "developer")) {
            rest.push(Json::Object(members));
            continue;
        }
        if role == Some("developer") {
            members.retain(|(key, _)| key != "tools");
            members.iter_mut().filter(|(key, _)| key == "role").for_each(|(_, r)| *r = Json::from("system"));
        }
        scattered |= at > 0 || !said.is_empty();
        said.push(Json::Object(members));
    }
    if scattered {
        let texts: Vec<String> = said.iter().map(text_of).filter(|text| !text.is_empty()).collect();
        said =
            vec![Json::object([("role", Json::from("system")), ("content", Json::from(texts.join("\n\n")))])];
    }
    said.extend(rest);
    said
}

fn text_of(message: &Json) -> String {
    match message.get("content") {
        Some(Json::Text(text)) => text.clone(),
        Some(Json::List(parts)) => {
            let texts: Vec<&str> = parts.iter().filter_map(|part| part.text("text")).collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(messages: &str, format: ContentFormat) -> Option<String> {
        let chat = Chat::new(serde_json::from_str(messages).unwrap());
        let conversation = normalise(&chat, format, Dialect::Vllm, false)?;
        Some(serde_json::to_string(&conversation.messages).unwrap())
    }

    #[test]
    fn content_is_flattened_or_wrapped_as_the_template_wants_it() {
        let messages = r#"[{"role":"user","content":[{"type":"text","text":"a"},"b",{"type":"text"}]},{"role":"assistant","content":null}]"#;
        assert_eq!(
            said(messages, ContentFormat::String).unwrap(),
            r#"[{"role":"user","content":"a\nb"},{"role":"assistant","content":""}]"#
        );
        assert_eq!(
            said(messages, ContentFormat::OpenAi).unwrap(),
            r#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},{"role":"assistant","content":[]}]"#
        );
    }

    #[test]
    fn arguments_of_tool_calls_become_objects_in_the_engines_order() {
        let call = |arguments: &str| {
            format!(
                r#"[{{"role":"assistant","content":"","tool_calls":[{{"type":"function","x":1,"id":"c","function":{{"name":"f","arguments":{arguments}}}}}]}}]"#
            )
        };
        let expected = |arguments: &str| {
            format!(
                r#"[{{"role":"assistant","content":"","tool_calls":[{{"id":"c","function":{{"arguments":{arguments},"name":"f"}},"type":"function"}}]}}]"#
            )
        };
        for (arguments, parsed) in [
            (r#""{\"b\":1,\"a\":2}""#, r#"{"b":1,"a":2}"#),
            (r#""[]""#, "{}"),
            (r#""{x""#, "{}"),
            ("null", "{}"),
        ] {
            assert_eq!(said(&call(arguments), ContentFormat::String).unwrap(), expected(parsed));
        }
    }

    #[test]
    fn a_picture_is_marked_where_the_engine_would_put_it() {
        let messages =
            r#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{}}]}]"#;
        let flat = said(messages, ContentFormat::String).unwrap();
        assert!(flat.contains(&format!("\"content\":\"{MEDIA}a")), "{flat}");
        let wrapped = said(messages, ContentFormat::OpenAi).unwrap();
        assert!(wrapped.find("\"a\"").unwrap() < wrapped.find(MEDIA).unwrap(), "{wrapped}");
    }

    #[test]
    fn developers_are_systems_where_the_template_knows_none() {
        let messages = r#"[{"role":"system","content":"s"},{"role":"developer","content":"d"},{"role":"user","content":"u"}]"#;
        assert_eq!(
            said(messages, ContentFormat::String).unwrap(),
            r#"[{"role":"system","content":"s\n\nd"},{"role":"user","content":"u"}]"#
        );
    }
}
