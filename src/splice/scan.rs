//! What an engine's event says, found in one pass over its bytes.

use super::json::{Span, array, number, object, skip_space, skip_value, take};

/// One choice of an event. Values that may be null are kept with their place all the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Choice {
    pub(super) span: Span,
    pub(super) index: u32,
    pub(super) delta: Option<Span>,
    pub(super) role: Option<Span>,
    pub(super) content: Option<Span>,
    pub(super) reasoning: Option<Span>,
    pub(super) reasoning_content: Option<Span>,
    /// A tool call, or a function call of old.
    pub(super) tool: bool,
    /// Something in the delta that is not known.
    pub(super) other: bool,
    pub(super) text: Option<Span>,
    pub(super) logprobs: Option<Span>,
    pub(super) finish: Option<Span>,
    /// `stop_reason`, or SGLang's `matched_stop`.
    pub(super) stop: Option<Span>,
    pub(super) is_sglang: bool,
    pub(super) token_ids: Option<Span>,
    pub(super) prompt_token_ids: Option<Span>,
}

/// An event. The choices but the first are in `more`, which nearly always is empty.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Scan {
    pub(super) id: Option<Span>,
    pub(super) created: Option<Span>,
    pub(super) model: Option<Span>,
    pub(super) fingerprint: Option<Span>,
    pub(super) usage: Option<Span>,
    pub(super) prompt_token_ids: Option<Span>,
    pub(super) error: Option<Span>,
    pub(super) choices: Option<Span>,
    pub(super) first: Option<Choice>,
    pub(super) more: Vec<Choice>,
    /// Behind the closing brace.
    pub(super) end: usize,
}

/// Reads an event's data.
pub(super) fn scan(text: &[u8]) -> Option<Scan> {
    let mut scan = Scan::default();
    let end = object(text, skip_space(text, 0), |key, at| match key {
        b"id" => take(text, at, &mut scan.id),
        b"created" => take(text, at, &mut scan.created),
        b"model" => take(text, at, &mut scan.model),
        b"system_fingerprint" => take(text, at, &mut scan.fingerprint),
        b"usage" => take(text, at, &mut scan.usage),
        b"prompt_token_ids" => take(text, at, &mut scan.prompt_token_ids),
        b"error" => take(text, at, &mut scan.error),
        b"choices" if text.get(at) == Some(&b'[') => {
            let end = array(text, at, |at| {
                let found = choice(text, at)?;
                match scan.first {
                    None => scan.first = Some(found),
                    Some(_) => scan.more.push(found),
                }
                Some(found.span.end)
            })?;
            scan.choices = Some(Span { start: at, end });
            Some(end)
        }
        _ => skip_value(text, at),
    })?;
    scan.end = end;
    (skip_space(text, end) == text.len()).then_some(scan)
}

fn choice(text: &[u8], at: usize) -> Option<Choice> {
    let mut found = Choice::default();
    let end = object(text, at, |key, at| match key {
        b"index" => {
            let end = skip_value(text, at)?;
            found.index = number(&text[at..end])?;
            Some(end)
        }
        b"delta" if text.get(at) == Some(&b'{') => {
            let end = object(text, at, |key, at| match key {
                b"content" => take(text, at, &mut found.content),
                b"reasoning" => take(text, at, &mut found.reasoning),
                b"reasoning_content" => take(text, at, &mut found.reasoning_content),
                b"role" => take(text, at, &mut found.role),
                b"tool_calls" | b"function_call" => {
                    let end = skip_value(text, at)?;
                    found.tool |= !matches!(&text[at..end], b"null" | b"[]");
                    Some(end)
                }
                _ => {
                    let end = skip_value(text, at)?;
                    found.other |= &text[at..end] != b"null";
                    Some(end)
                }
            })?;
            found.delta = Some(Span { start: at, end });
            Some(end)
        }
        b"text" => take(text, at, &mut found.text),
        b"logprobs" => take(text, at, &mut found.logprobs),
        b"finish_reason" => take(text, at, &mut found.finish),
        b"stop_reason" => take(text, at, &mut found.stop),
        b"matched_stop" => {
            found.is_sglang = true;
            take(text, at, &mut found.stop)
        }
        b"token_ids" => take(text, at, &mut found.token_ids),
        b"prompt_token_ids" => take(text, at, &mut found.prompt_token_ids),
        _ => skip_value(text, at),
    })?;
    found.span = Span { start: at, end };
    Some(found)
}

/// A value that is there and not null.
pub(super) fn some(text: &[u8], place: Option<Span>) -> Option<&[u8]> {
    place.map(|place| place.of(text)).filter(|value| *value != b"null")
}

/// A string that is not empty, with its quotes.
pub(super) fn said(text: &[u8], place: Option<Span>) -> Option<&[u8]> {
    some(text, place).filter(|value| value.len() > 2 && value[0] == b'"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chat_event_is_found_in_compact_and_in_spaced_json() {
        let compact = br#"{"id":"c-1","created":5,"model":"m","choices":[{"index":3,"delta":{"role":"assistant","content":"a\"}"},"logprobs":null,"finish_reason":null,"token_ids":[7,8]}],"prompt_token_ids":null}"#;
        let spaced = br#" { "id" : "c-1" , "created" : 5 , "model" : "m" , "choices" : [ { "index" : 3 , "delta" : { "role" : "assistant" , "content" : "a\"}" } , "logprobs" : null , "finish_reason" : null , "token_ids" : [7,8] } ] , "prompt_token_ids" : null } "#;
        for text in [&compact[..], spaced] {
            let scan = scan(text).unwrap();
            let choice = scan.first.unwrap();
            assert_eq!((choice.index, choice.tool, choice.is_sglang), (3, false, false));
            assert_eq!(said(text, choice.content), Some(&br#""a\"}""#[..]));
            assert_eq!(some(text, choice.token_ids), Some(&b"[7,8]"[..]));
            assert_eq!(some(text, scan.prompt_token_ids), None);
            assert!(scan.prompt_token_ids.is_some() && scan.more.is_empty());
        }
    }

    #[test]
    fn a_cut_event_is_none() {
        let text = br#"{"choices":[{"index":0,"text":"x"}]}"#;
        for cut in 0..text.len() {
            assert_eq!(scan(&text[..cut]), None);
        }
        assert_eq!(scan(br#"{"choices":[]} x"#), None);
    }
}
