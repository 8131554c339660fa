//! Anthropic's messages as a conversation, the way vLLM turns them into one.

use super::json::Json;
use super::request::Chat;

/// A line that a client adds to its system prompt with another number each time; engines drop it.
pub(super) const BILLING: &str = "x-anthropic-billing-header";

/// `None` for what cannot be read.
pub(super) fn chat(system: Option<&Json>, messages: &[Json], tools: Option<&[Json]>) -> Option<Chat> {
    let mut out = Vec::with_capacity(messages.len() + 1);
    if let Some(text) = system.and_then(system_text) {
        out.push(message("system", Json::Text(text)));
    }
    for message in messages {
        convert(message, &mut out)?;
    }
    let mut chat = Chat::new(out);
    chat.tools = match tools {
        Some(tools) if !tools.is_empty() => Some(tools.iter().map(tool).collect::<Option<_>>()?),
        _ => None,
    };
    Some(chat)
}

fn message(role: &str, content: Json) -> Json {
    Json::object([("role", Json::from(role)), ("content", content)])
}

fn system_text(system: &Json) -> Option<String> {
    let text = match system {
        Json::Text(text) => text.clone(),
        Json::List(blocks) => blocks
            .iter()
            .filter(|block| block.text("type") == Some("text"))
            .filter_map(|block| block.text("text"))
            .filter(|text| !text.starts_with(BILLING))
            .collect(),
        _ => return None,
    };
    (!text.is_empty()).then_some(text)
}

fn convert(from: &Json, out: &mut Vec<Json>) -> Option<()> {
    let role = from.text("role")?;
    let content = from.get("content")?;
    if role == "system" {
        let dropped = content.as_str().is_some_and(|text| text.starts_with(BILLING));
        if let Some(text) = system_text(content).filter(|_| !dropped) {
            out.push(message(role, Json::Text(text)));
        }
        return Some(());
    }
    let blocks = match content {
        Json::Text(_) => {
            out.push(message(role, content.clone()));
            return Some(());
        }
        Json::List(blocks) => blocks,
        _ => return None,
    };
    let (mut parts, mut calls, mut thoughts) = (Vec::new(), Vec::new(), String::new());
    for block in blocks {
        match block.text("type")? {
            "text" => {
                if let Some(text) = block.text("text").filter(|text| !text.is_empty()) {
                    parts.push(text_part(text));
                }
            }
            "image" => parts.push(image()),
            "thinking" => thoughts.push_str(block.text("thinking").unwrap_or_default()),
            "tool_use" => calls.push(call(block)),
            "tool_result" if role == "user" => result(block, out),
            "redacted_thinking" | "tool_reference" => {}
            // Documents, searches, tools of the service: engines refuse them or do as they like.
            _ => return None,
        }
    }
    let mut members = vec![("role".to_owned(), Json::from(role))];
    match parts.len() {
        0 => {}
        1 if parts[0].text("type") == Some("text") => {
            let text = parts[0].text("text").unwrap_or_default();
            members.push(("content".to_owned(), Json::from(text)));
        }
        _ => members.push(("content".to_owned(), Json::List(parts))),
    }
    let silent = members.len() == 1;
    if !calls.is_empty() {
        members.push(("tool_calls".to_owned(), Json::List(calls)));
    }
    if !thoughts.is_empty() {
        members.push(("reasoning".to_owned(), Json::Text(thoughts)));
    }
    if !(silent && role == "user") {
        out.push(Json::Object(members));
    }
    Some(())
}

fn text_part(text: &str) -> Json {
    Json::object([("type", Json::from("text")), ("text", Json::from(text))])
}

/// That there is a picture is all that counts here.
fn image() -> Json {
    Json::object([("type", Json::from("image_url")), ("image_url", Json::Object(Vec::new()))])
}

fn call(block: &Json) -> Json {
    let input = block.get("input").cloned().unwrap_or(Json::Object(Vec::new()));
    let function = [("name", Json::from(block.text("name").unwrap_or_default())), ("arguments", input)];
    Json::object([
        ("id", Json::from(block.text("id").unwrap_or_default())),
        ("type", Json::from("function")),
        ("function", Json::object(function)),
    ])
}

fn result(block: &Json, out: &mut Vec<Json>) {
    let (mut text, mut images, mut references) = (String::new(), Vec::new(), Vec::new());
    match block.get("content") {
        Some(Json::Text(whole)) => text.clone_from(whole),
        Some(Json::List(items)) => {
            let mut first = true;
            for item in items {
                match item.text("type") {
                    Some("text") => {
                        if !std::mem::take(&mut first) {
                            text.push('\n');
                        }
                        text.push_str(item.text("text").unwrap_or_default());
                    }
                    Some("image") => images.push(image()),
                    Some("tool_reference") => {
                        let name = item.text("tool_name").or_else(|| item.text("name"));
                        references.extend(name.map(|name| {
                            Json::object([("type", Json::from("tool_reference")), ("name", Json::from(name))])
                        }));
                    }
                    _ => {}
                }
            }
        }
        _ => {}
    }
    let id = Json::from(block.text("tool_use_id").unwrap_or_default());
    let tool = |content: Json| {
        Json::object([("role", Json::from("tool")), ("tool_call_id", id.clone()), ("content", content)])
    };
    out.push(tool(Json::Text(text)));
    if !images.is_empty() {
        out.push(message("user", Json::List(images)));
    }
    if !references.is_empty() {
        out.push(tool(Json::List(references)));
    }
}

fn tool(from: &Json) -> Option<Json> {
    let Json::Object(schema) = from.get("input_schema")? else { return None };
    let mut schema = schema.clone();
    if !schema.iter().any(|(key, _)| key == "type") {
        schema.push(("type".to_owned(), Json::from("object")));
    }
    let mut function = vec![("name".to_owned(), Json::from(from.text("name")?))];
    for key in ["description", "strict", "defer_loading"] {
        function.extend(from.get(key).map(|value| (key.to_owned(), value.clone())));
    }
    function.push(("parameters".to_owned(), Json::Object(schema)));
    Some(Json::object([("type", Json::from("function")), ("function", Json::Object(function))]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(system: &str, messages: &str) -> String {
        let system: Json = serde_json::from_str(system).unwrap();
        let messages: Vec<Json> = serde_json::from_str(messages).unwrap();
        serde_json::to_string(&chat(Some(&system), &messages, None).unwrap().messages).unwrap()
    }

    #[test]
    fn blocks_become_messages_parts_and_tool_calls() {
        let system =
            r#"[{"type":"text","text":"x-anthropic-billing-header: 1"},{"type":"text","text":"be"}]"#;
        let messages = r#"[{"role":"user","content":"hi"},
            {"role":"assistant","content":[{"type":"thinking","thinking":"hm"},{"type":"text","text":"so"},
              {"type":"tool_use","id":"c","name":"f","input":{"a":1}}]},
            {"role":"user","content":[{"type":"tool_result","tool_use_id":"c","content":[{"type":"text","text":"1"},{"type":"text","text":"2"}]}]}]"#;
        assert_eq!(
            converted(system, messages),
            concat!(
                r#"[{"role":"system","content":"be"},{"role":"user","content":"hi"},"#,
                r#"{"role":"assistant","content":"so","tool_calls":[{"id":"c","type":"function","#,
                r#""function":{"name":"f","arguments":{"a":1}}}],"reasoning":"hm"},"#,
                r#"{"role":"tool","tool_call_id":"c","content":"1\n2"}]"#
            )
        );
    }

    #[test]
    fn a_block_of_an_unknown_kind_makes_the_prompt_unknown() {
        let messages: Vec<Json> =
            serde_json::from_str(r#"[{"role":"user","content":[{"type":"document"}]}]"#).unwrap();
        assert_eq!(chat(None, &messages, None), None);
    }
}
