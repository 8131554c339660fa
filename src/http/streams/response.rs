//! A response of the Responses API as an object, put together from its stream's events; and the id
//! by which clients know it.
//!
//! A response in the background is called `resp_` and the 26 characters of its stream's id. Its
//! events are given that id as they come from the engine, so that whatever a client has read of it
//! names something that can be asked for.

use std::borrow::Cow;
use std::collections::BTreeMap;

use bytes::Bytes;
use memchr::memmem;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::fields::Fields;
use crate::ids::StreamId;
use crate::relay::log::Event;
use crate::relay::order::{Framing, Head, Order};
use crate::state::streams::StreamEnd;

const PREFIX: &str = "resp_";

/// The id of a stream's response.
pub(super) fn id_of(stream: StreamId) -> String {
    let chars: String = stream.chars().iter().map(|char| char::from(*char)).collect();
    format!("{PREFIX}{chars}")
}

/// Reads such an id; `None` for one of an engine's own.
pub(in crate::http) fn stream_of(id: &str) -> Option<StreamId> {
    StreamId::parse(&format!("st_{}", id.strip_prefix(PREFIX)?))
}

/// What an event says, as far as it matters here.
#[derive(Deserialize)]
struct Said<'a> {
    #[serde(rename = "type", borrow, default)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    response: Option<&'a RawValue>,
    #[serde(borrow, default)]
    item: Option<&'a RawValue>,
    #[serde(default)]
    output_index: Option<u64>,
    #[serde(default)]
    sequence_number: Option<u64>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

/// Where an event's data is, if it is on one line.
fn data_at(lines: &[u8]) -> Option<std::ops::Range<usize>> {
    const DATA: &[u8] = b"data: ";
    let begin = match lines.starts_with(DATA) {
        true => DATA.len(),
        false => memmem::find(lines, b"\ndata: ")? + 1 + DATA.len(),
    };
    let end = begin + memchr::memchr(b'\n', &lines[begin..])?;
    // Nothing but the line's end comes after it.
    (end + 1 == lines.len()).then_some(begin..end)
}

fn said(lines: &[u8]) -> Option<Said<'_>> {
    serde_json::from_slice(&lines[data_at(lines)?]).ok()
}

/// An event whose response has the stream's id.
pub(super) fn named(id: StreamId, lines: Bytes) -> Bytes {
    rename(id, &lines).map_or(lines, Bytes::from)
}

fn rename(id: StreamId, lines: &[u8]) -> Option<Vec<u8>> {
    let data = data_at(lines)?;
    memmem::find(&lines[data.clone()], b"\"response\"")?;
    let mut event = Fields::read(&lines[data.clone()])?;
    let mut response = Fields::read(event.get("response")?.as_bytes())?;
    own(&mut response, id);
    let response = response.write();
    event.set("response", response);
    Some([&lines[..data.start], event.write().as_bytes(), &lines[data.end..]].concat())
}

fn own(response: &mut Fields<'_>, id: StreamId) {
    response.set("id", Value::from(id_of(id)).to_string());
    response.set("background", "true".to_owned());
}

/// The first event after the one of this `sequence_number`; the error says which number comes next.
pub(super) fn after_number(first: u64, events: &[Event], number: u64) -> Result<u64, u64> {
    // Engines count their events from 0, as streams do. Where one does not, its own numbers count.
    let mut later = None;
    for (at, event) in events.iter().enumerate().rev() {
        let seq = first + at as u64;
        let Some(is) = said(&event.lines).and_then(|said| said.sequence_number) else { continue };
        if is == number {
            return Ok(seq + 1);
        }
        if is < number {
            return later.ok_or(is + 1);
        }
        later = Some(seq);
    }
    Ok(later.unwrap_or(number.saturating_add(1)))
}

/// How far a response is.
struct State<'a> {
    order: &'a Order,
    ended: Option<StreamEnd>,
    /// The newest word of the engine about the whole.
    whole: Option<&'a str>,
    /// Parts of the output that are done, by their index.
    items: BTreeMap<u64, &'a str>,
    error: Option<Value>,
    begun: bool,
}

/// The response of a stream as it stands, JSON.
pub(super) fn object(
    id: StreamId,
    order: &Order,
    head: Option<&Head>,
    events: &[Event],
    ended: Option<StreamEnd>,
) -> String {
    if let Some(head) = head.filter(|head| head.framing == Framing::Raw) {
        return in_one_piece(id, order, head, events, ended);
    }
    let last = events.iter().rev().take(3).find_map(|event| {
        let said = said(&event.lines)?;
        let kind = said.kind?;
        let is_last = matches!(&*kind, "response.completed" | "response.incomplete" | "response.failed");
        said.response.filter(|_| is_last)
    });
    if let Some(mut whole) = last.and_then(|whole| Fields::read(whole.get().as_bytes())) {
        own(&mut whole, id);
        return whole.write();
    }
    let begun = head.is_some();
    let mut state = State { order, ended, whole: None, items: BTreeMap::new(), error: None, begun };
    for event in events {
        state.hear(&event.lines);
    }
    state.write(id)
}

/// Whether a response can still change.
pub(super) fn is_over(object: &str) -> bool {
    let status = Fields::read(object.as_bytes()).and_then(|fields| fields.get("status").map(str::to_owned));
    !matches!(status.as_deref(), Some("\"queued\"" | "\"in_progress\""))
}

impl<'a> State<'a> {
    fn hear(&mut self, lines: &'a [u8]) {
        // Most events are pieces of text, which the whole has at its end.
        let matters = ["\"response\"", "\"response.output_item.done\"", "\"error\""];
        if !matters.iter().any(|word| memmem::find(lines, word.as_bytes()).is_some()) {
            return;
        }
        let Some(said) = said(lines) else { return };
        if let Some(whole) = said.response {
            self.whole = Some(whole.get());
        }
        if let (Some("response.output_item.done"), Some(item)) = (said.kind.as_deref(), said.item) {
            self.items.insert(said.output_index.unwrap_or(self.items.len() as u64), item.get());
        }
        if said.kind.as_deref().is_none_or(|kind| kind == "error")
            && let Some(error) = said.error
        {
            self.error = serde_json::from_str(error.get()).ok();
        }
    }

    fn write(self, id: StreamId) -> String {
        let status = match self.ended {
            None if self.begun => "in_progress",
            None => "queued",
            Some(StreamEnd::Cancelled) => "cancelled",
            Some(StreamEnd::Complete | StreamEnd::Failed) => "failed",
        };
        let empty = json!({
            "object": "response",
            "created_at": self.order.created_s,
            "model": self.order.model,
            "error": null,
            "incomplete_details": null,
            "instructions": null,
            "metadata": {},
            "parallel_tool_calls": true,
            "tool_choice": "auto",
            "tools": [],
            "usage": null,
        })
        .to_string();
        let Some(mut fields) = Fields::read(self.whole.unwrap_or(&empty).as_bytes()) else { return empty };
        own(&mut fields, id);
        fields.set("status", Value::from(status).to_string());
        let items: Vec<&str> = self.items.into_values().collect();
        fields.set("output", format!("[{}]", items.join(",")));
        if status == "failed" {
            let error = self.error.unwrap_or_default();
            let text = |name: &str, otherwise: &str| match &error[name] {
                Value::String(text) => text.clone(),
                _ => otherwise.to_owned(),
            };
            let message = text("message", "the stream ended before the response was complete");
            fields
                .set("error", json!({"code": text("code", "server_error"), "message": message}).to_string());
        }
        fields.write()
    }
}

/// Of an engine that answers with no events: an error, or the whole response at once.
fn in_one_piece(
    id: StreamId,
    order: &Order,
    head: &Head,
    events: &[Event],
    ended: Option<StreamEnd>,
) -> String {
    let body: Vec<u8> = events.iter().flat_map(|event| event.lines.iter().copied()).collect();
    let is_good = (200..300).contains(&head.status);
    if is_good
        && ended == Some(StreamEnd::Complete)
        && let Some(mut whole) = Fields::read(&body)
    {
        own(&mut whole, id);
        return whole.write();
    }
    let error = serde_json::from_slice::<Value>(&body).ok().map(|body| match &body["error"] {
        Value::Null => json!({"code": "server_error", "message": body["message"]}),
        error => error.clone(),
    });
    let ended = ended.filter(|_| is_good).or(Some(StreamEnd::Failed).filter(|_| !is_good));
    State { order, ended, whole: None, items: BTreeMap::new(), error, begun: true }.write(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: &str, number: u64, rest: &str) -> Event {
        let data = format!("{{\"type\":\"{kind}\",\"sequence_number\":{number}{rest}}}");
        Event { lines: format!("event: {kind}\ndata: {data}\n").into(), ..Event::default() }
    }

    fn order() -> Order {
        Order {
            principal: [0; 16],
            request: [0; 16],
            target: "/v1/responses".to_owned(),
            headers: Vec::new(),
            body: Bytes::new(),
            key: None,
            request_id: "r".to_owned(),
            model: "m".to_owned(),
            orphan_ms: 0,
            keep_ms: 0,
            total_ms: 0,
            created_s: 7,
            edge: None,
            background: true,
        }
    }

    fn head(status: u16, framing: Framing) -> Head {
        let resumable = crate::relay::order::Resumable::Replay;
        Head { status, headers: Vec::new(), framing, resumable, worker: "w".to_owned() }
    }

    fn value(id: StreamId, head: Option<&Head>, events: &[Event], ended: Option<StreamEnd>) -> Value {
        serde_json::from_str(&object(id, &order(), head, events, ended)).unwrap()
    }

    #[test]
    fn ids_are_read_as_they_are_written_and_those_of_engines_are_not_ours() {
        let id = StreamId::from_bits([9; 17]);
        assert_eq!(stream_of(&id_of(id)), Some(id));
        for other in ["resp_0123456789abcdef0123456789abcdef", "resp_", "st_aaaaaaaaaaaaaaaaaaaaaaaaaa", ""] {
            assert_eq!(stream_of(other), None, "{other}");
        }
    }

    #[test]
    fn events_get_the_id_and_stay_as_they_are_otherwise() {
        let id = StreamId::from_bits([9; 17]);
        let ours = id_of(id);
        let lines = Bytes::from(
            "event: response.created\ndata: {\"type\":\"response.created\", \"response\": {\"id\":\"resp_x\",\"t\": 1.0},\"n\":[ 1 ]}\n",
        );
        let renamed = named(id, lines);
        let expected = format!(
            "event: response.created\ndata: {{\"type\":\"response.created\",\"response\":{{\"id\":\"{ours}\",\"t\":1.0,\"background\":true}},\"n\":[ 1 ]}}\n"
        );
        assert_eq!(renamed, expected.as_bytes());
        for untouched in
            ["data: {\"delta\":\"\\\"response\\\"\"}\n", "data: [DONE]\n", "data: {\ndata: }\n", ": x\n"]
        {
            assert_eq!(named(id, Bytes::from(untouched)), untouched.as_bytes());
        }
    }

    #[test]
    fn a_response_is_put_together_as_far_as_it_is() {
        let id = StreamId::from_bits([9; 17]);
        let events = head(200, Framing::Events);
        let waiting = value(id, None, &[], None);
        assert_eq!((&waiting["status"], &waiting["id"]), (&json!("queued"), &json!(id_of(id))));
        assert_eq!((&waiting["created_at"], &waiting["output"]), (&json!(7), &json!([])));

        let mut log = vec![
            event("response.created", 0, r#","response":{"id":"x","status":"in_progress","model":"big"}"#),
            event("response.output_text.delta", 1, r#","delta":"a \"response\" to it""#),
            event("response.output_item.done", 2, r#","output_index":0,"item":{"type":"message"}"#),
        ];
        let running = value(id, Some(&events), &log, None);
        assert_eq!((&running["status"], &running["model"]), (&json!("in_progress"), &json!("big")));
        assert_eq!(running["output"], json!([{"type": "message"}]));
        let cancelled = value(id, Some(&events), &log, Some(StreamEnd::Cancelled));
        assert_eq!((&cancelled["status"], &cancelled["id"]), (&json!("cancelled"), &json!(id_of(id))));

        let mut lost = log.clone();
        lost.push(Event {
            lines: Bytes::from(
                "event: error\ndata: {\"error\":{\"message\":\"gone\",\"code\":\"stream_lost\"}}\n",
            ),
            ..Event::default()
        });
        let failed = value(id, Some(&events), &lost, Some(StreamEnd::Failed));
        assert_eq!(failed["error"], json!({"code": "stream_lost", "message": "gone"}));

        log.push(event(
            "response.completed",
            3,
            r#","response":{"id":"x","status":"completed","usage":{"a":1}}"#,
        ));
        let done = value(id, Some(&events), &log, Some(StreamEnd::Complete));
        assert_eq!(
            (&done["status"], &done["usage"]["a"], &done["id"]),
            (&json!("completed"), &json!(1), &json!(id_of(id)))
        );
        assert!(is_over(&done.to_string()) && !is_over(&running.to_string()));
    }

    #[test]
    fn an_engine_that_refuses_makes_a_failed_response() {
        let id = StreamId::from_bits([9; 17]);
        let body = Event {
            lines: Bytes::from(r#"{"error":{"message":"too long","code":"context"}}"#),
            ..Event::default()
        };
        let failed = value(id, Some(&head(400, Framing::Raw)), &[body], Some(StreamEnd::Complete));
        assert_eq!((&failed["status"], &failed["error"]["message"]), (&json!("failed"), &json!("too long")));
        let body = Event { lines: Bytes::from(r#"{"id":"x","status":"completed"}"#), ..Event::default() };
        let whole = value(id, Some(&head(200, Framing::Raw)), &[body], Some(StreamEnd::Complete));
        assert_eq!((&whole["status"], &whole["id"]), (&json!("completed"), &json!(id_of(id))));
    }

    #[test]
    fn a_cursor_is_found_by_the_engines_own_numbers() {
        let same: Vec<Event> = (0..5).map(|n| event("x", n, "")).collect();
        assert_eq!(after_number(0, &same, 2), Ok(3));
        assert_eq!(after_number(0, &same, 4), Ok(5));
        assert_eq!(after_number(0, &same, 9), Err(5));
        let shifted: Vec<Event> = (1..6).map(|n| event("x", n, "")).collect();
        assert_eq!(after_number(0, &shifted, 2), Ok(2));
        assert_eq!(after_number(0, &shifted, 0), Ok(0), "all of it");
        assert_eq!(after_number(3, &same[3..], 3), Ok(4));
        assert_eq!(after_number(0, &[], 3), Ok(4), "told apart when there are events");
        let mut ended = same.clone();
        ended.push(Event { lines: Bytes::from("data: [DONE]\n"), terminal: true, ..Event::default() });
        assert_eq!(after_number(0, &ended, 4), Ok(5), "the end is still to come");
    }
}
