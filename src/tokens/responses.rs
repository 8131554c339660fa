//! OpenAI's responses as a conversation, the way vLLM turns them into one.
//!
//! Only what the request itself holds: items that the engine would look up elsewhere, and tools
//! that the service runs, make the prompt unknown.

use super::json::Json;
use super::request::Chat;

/// `None` for what cannot be known here.
pub(super) fn chat(instructions: Option<&Json>, input: &Json, tools: Option<&[Json]>) -> Option<Chat> {
    let mut messages: Vec<Json> = Vec::new();
    match instructions {
        None | Some(Json::Null) => {}
        Some(Json::Text(text)) if text.is_empty() => {}
        Some(text @ Json::Text(_)) => messages.push(message("system", text.clone())),
        Some(_) => return None,
    }
    match input {
        Json::Text(_) => messages.push(message("user", input.clone())),
        Json::List(items) => items.iter().try_for_each(|item| add(item, &mut messages))?,
        _ => return None,
    }
    let mut chat = Chat::new(messages);
    if let Json::List(items) = input
        && items.last().is_some_and(is_unfinished)
    {
        (chat.add_generation_prompt, chat.continue_final_message) = (false, true);
    }
    chat.tools = match tools {
        Some(tools) if !tools.is_empty() => Some(tools.iter().map(tool).collect::<Option<_>>()?),
        _ => None,
    };
    Some(chat)
}

fn message(role: &str, content: Json) -> Json {
    Json::object([("role", Json::from(role)), ("content", content)])
}

/// An answer that the client wants continued.
fn is_unfinished(item: &Json) -> bool {
    let spoken = item.text("role") == Some("assistant") || item.text("type") == Some("reasoning");
    spoken && matches!(item.text("status"), Some("in_progress" | "incomplete"))
}

fn add(item: &Json, messages: &mut Vec<Json>) -> Option<()> {
    match item.text("type") {
        Some("function_call") => {
            let function = [
                ("name", Json::from(item.text("name")?)),
                ("arguments", Json::from(item.text("arguments").unwrap_or_default())),
            ];
            let call = Json::object([
                ("id", Json::from(item.text("call_id")?)),
                ("function", Json::object(function)),
                ("type", Json::from("function")),
            ]);
            if let Some(Json::Object(members)) = answer(messages) {
                match members.iter_mut().find(|(key, _)| key == "tool_calls") {
                    Some((_, Json::List(calls))) => calls.push(call),
                    Some(_) => return None,
                    None => members.push(("tool_calls".to_owned(), Json::List(vec![call]))),
                }
            } else {
                let calls = Json::List(vec![call]);
                messages.push(Json::object([("role", Json::from("assistant")), ("tool_calls", calls)]));
            }
        }
        Some("function_call_output") => messages.push(Json::object([
            ("role", Json::from("tool")),
            ("content", item.get("output").cloned().unwrap_or_default()),
            ("tool_call_id", item.get("call_id").cloned().unwrap_or_default()),
        ])),
        Some("reasoning") => {
            if item.get("encrypted_content").is_some() {
                return None;
            }
            let first = |key| item.list(key).and_then(<[Json]>::first).and_then(|part| part.text("text"));
            let text = first("content").or_else(|| first("summary")).unwrap_or_default();
            join(messages, "reasoning", text);
        }
        None | Some("message") => {
            let role = item.text("role")?;
            if role == "assistant" {
                let text = match item.get("content")? {
                    Json::Text(text) => text,
                    Json::List(parts) => parts.first()?.text("text")?,
                    _ => return None,
                };
                join(messages, "content", text);
            } else {
                messages.push(message(role, item.get("content")?.clone()));
            }
        }
        Some(_) => return None,
    }
    Some(())
}

/// The last message, if it is the assistant's.
fn answer(messages: &mut [Json]) -> Option<&mut Json> {
    messages.last_mut().filter(|last| last.text("role") == Some("assistant"))
}

/// An item of the assistant's joins the message before it, if that has none of its kind yet.
fn join(messages: &mut Vec<Json>, key: &str, text: &str) {
    if let Some(last) = answer(messages)
        && last.get(key).is_none()
        && let Json::Object(members) = last
    {
        members.push((key.to_owned(), Json::from(text)));
        return;
    }
    messages.push(Json::object([("role", Json::from("assistant")), (key, Json::from(text))]));
}

fn tool(from: &Json) -> Option<Json> {
    if from.text("type") != Some("function") {
        return None;
    }
    let Json::Object(members) = from else { return None };
    let function = members.iter().filter(|(key, _)| key != "type").cloned().collect();
    Some(Json::object([("type", Json::from("function")), ("function", Json::Object(function))]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(instructions: &str, input: &str) -> Option<String> {
        let input: Json = serde_json::from_str(input).unwrap();
        let chat = chat(Some(&Json::from(instructions)), &input, None)?;
        Some(serde_json::to_string(&chat.messages).unwrap())
    }

    #[test]
    fn items_of_one_turn_join_to_one_message() {
        let input = r#"[{"role":"user","content":"q"},
            {"type":"reasoning","content":[{"type":"reasoning_text","text":"hm"}],"summary":[]},
            {"type":"message","role":"assistant","content":[{"type":"output_text","text":"a"}]},
            {"type":"function_call","call_id":"c","name":"f","arguments":"{}"},
            {"type":"function_call_output","call_id":"c","output":"1"}]"#;
        assert_eq!(
            converted("be", input).unwrap(),
            concat!(
                r#"[{"role":"system","content":"be"},{"role":"user","content":"q"},"#,
                r#"{"role":"assistant","reasoning":"hm","content":"a","tool_calls":[{"id":"c","#,
                r#""function":{"name":"f","arguments":"{}"},"type":"function"}]},"#,
                r#"{"role":"tool","content":"1","tool_call_id":"c"}]"#
            )
        );
    }

    #[test]
    fn what_the_engine_would_look_up_makes_the_prompt_unknown() {
        assert_eq!(converted("", r#"[{"type":"item_reference","id":"x"}]"#), None);
        assert_eq!(converted("", r#"[{"type":"reasoning","encrypted_content":"x"}]"#), None);
        assert!(converted("", r#""plain""#).is_some());
    }
}
