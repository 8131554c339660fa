//! The answer of a prefill worker that ended with its first token: it is the client's whole answer.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::Members;

/// As a client gets it that asked for one piece.
pub fn whole(answer: Bytes) -> Bytes {
    match Members::parse(&answer) {
        Some(mut members) => {
            members.remove("kv_transfer_params");
            members.to_bytes()
        }
        None => answer,
    }
}

/// As a client gets it that asked for events; `None` for what is no answer.
pub fn as_events(answer: &[u8], with_usage: bool) -> Option<Bytes> {
    let answer: Map<String, Value> = serde_json::from_slice(answer).ok()?;
    let choices = answer.get("choices")?.as_array()?;
    let is_chat = answer.get("object").and_then(Value::as_str) == Some("chat.completion");
    let mut head = Map::new();
    for name in ["id", "object", "created", "model", "system_fingerprint"] {
        if let Some(value) = answer.get(name).filter(|value| !value.is_null()) {
            head.insert(name.to_owned(), value.clone());
        }
    }
    if is_chat {
        head.insert("object".to_owned(), "chat.completion.chunk".into());
    }
    let mut events = String::new();
    let mut say = |members: Value| {
        let mut event = head.clone();
        event.extend(members.as_object().cloned().unwrap_or_default());
        events.push_str("data: ");
        events.push_str(&Value::Object(event).to_string());
        events.push_str("\n\n");
    };
    for choice in choices {
        let mut choice = choice.as_object()?.clone();
        if is_chat {
            let index = choice.get("index").cloned().unwrap_or(json!(0));
            let opening = json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null,
                                 "finish_reason": null});
            let mut event = json!({"choices": [opening]});
            if let Some(ids) = answer.get("prompt_token_ids").filter(|ids| !ids.is_null()) {
                event["prompt_token_ids"] = ids.clone();
            }
            say(event);
            choice.insert("delta".to_owned(), delta(choice.get("message")));
            choice.remove("message");
        }
        choice.remove("prompt_logprobs");
        say(json!({"choices": [choice]}));
    }
    if with_usage {
        say(json!({"choices": [], "usage": answer.get("usage")}));
    }
    events.push_str("data: [DONE]\n\n");
    Some(events.into())
}

/// What of a message is there, but for the role, which went before.
fn delta(message: Option<&Value>) -> Value {
    let members = message.and_then(Value::as_object).into_iter().flatten();
    let mut delta = Map::new();
    for (name, value) in members.filter(|(name, value)| *name != "role" && !value.is_null()) {
        let mut value = value.clone();
        if name == "tool_calls" {
            let calls = value.as_array_mut().map(Vec::as_mut_slice).unwrap_or_default();
            if calls.is_empty() {
                continue;
            }
            for (index, call) in calls.iter_mut().enumerate() {
                if let Some(call) = call.as_object_mut() {
                    call.insert("index".to_owned(), index.into());
                }
            }
        }
        delta.insert(name.clone(), value);
    }
    Value::Object(delta)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(answer: Value, with_usage: bool) -> Vec<Value> {
        let events = as_events(answer.to_string().as_bytes(), with_usage).unwrap();
        let text = String::from_utf8(events.to_vec()).unwrap();
        let text = text.strip_suffix("data: [DONE]\n\n").expect("an end");
        let datas = text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap());
        datas.map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    #[test]
    fn a_completion_becomes_one_event() {
        let choice = json!({"index": 0, "text": "x", "logprobs": null, "finish_reason": "stop", "stop_reason": 7,
                            "token_ids": [7], "prompt_token_ids": [1], "prompt_logprobs": null});
        let answer = json!({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice],
                            "usage": {"total_tokens": 2}, "kv_transfer_params": {"remote_host": "h"}});
        let said = events(answer.clone(), false);
        assert_eq!(said.len(), 1);
        let choice = &said[0]["choices"][0];
        assert_eq!(
            (&choice["text"], &choice["finish_reason"], &choice["stop_reason"]),
            (&"x".into(), &"stop".into(), &7.into())
        );
        assert_eq!((&choice["token_ids"], &choice["prompt_token_ids"]), (&json!([7]), &json!([1])));
        assert_eq!((&said[0]["id"], said[0].get("kv_transfer_params")), (&"c".into(), None));
        assert_eq!(events(answer.clone(), true)[1]["usage"]["total_tokens"], 2);
        let whole = whole(answer.to_string().into());
        let whole: Value = serde_json::from_slice(&whole).unwrap();
        assert_eq!((whole.get("kv_transfer_params"), &whole["choices"][0]["text"]), (None, &"x".into()));
    }

    #[test]
    fn a_message_becomes_a_role_and_a_delta() {
        let call = json!({"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}});
        let message = json!({"role": "assistant", "content": null, "refusal": null, "reasoning": "hm", "tool_calls": [call]});
        let answer = json!({"id": "c", "object": "chat.completion", "choices":
            [{"index": 0, "message": message, "logprobs": null, "finish_reason": "tool_calls"}], "prompt_token_ids": [1, 2]});
        let said = events(answer, false);
        assert_eq!(said.len(), 2);
        assert_eq!(said[0]["object"], "chat.completion.chunk");
        assert_eq!(
            (&said[0]["choices"][0]["delta"]["role"], &said[0]["prompt_token_ids"]),
            (&"assistant".into(), &json!([1, 2]))
        );
        let choice = &said[1]["choices"][0];
        assert_eq!((&choice["finish_reason"], choice.get("message")), (&"tool_calls".into(), None));
        assert_eq!(
            (&choice["delta"]["tool_calls"][0]["index"], &choice["delta"]["reasoning"]),
            (&0.into(), &"hm".into())
        );
        assert_eq!((choice["delta"].get("content"), choice["delta"].get("role")), (None, None));
    }

    #[test]
    fn what_is_no_answer_is_none() {
        assert!(as_events(b"{}", false).is_none() && as_events(b"oops", false).is_none());
        assert_eq!(whole(Bytes::from_static(b"oops")), "oops");
    }
}
