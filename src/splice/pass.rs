//! Routes whose events are passed on unread, but for what ends them.

use super::journal::Op;
use super::json;
use super::plan::StreamRoute;
use super::scan;
use super::sse::Event;
use super::stream::{Failure, Out, Progress, Splice};

impl Splice {
    /// An event of a route that is not read.
    pub(super) fn pass(&mut self, event: &Event, out: &mut Vec<Out>) -> Progress {
        let kind = match &event.name {
            Some(name) => Some(name.to_vec()),
            None if self.plan.route == StreamRoute::Other => None,
            None => kind_of(&event.data),
        };
        let kind = kind.as_deref();
        let done = &event.data[..] == b"[DONE]";
        let terminal = match self.plan.route {
            StreamRoute::Messages => kind == Some(b"message_stop"),
            StreamRoute::Responses => {
                matches!(kind, Some(b"response.completed" | b"response.incomplete" | b"response.failed"))
            }
            _ => done,
        };
        let error = match self.plan.route {
            StreamRoute::Other => {
                scan::scan(&event.data).is_some_and(|scan| scan::some(&event.data, scan.error).is_some())
            }
            // Neither of them ends like this; the end was not seen.
            _ if done => return Progress::Failed(Failure::Truncated),
            _ => kind == Some(b"error"),
        };
        if error {
            return Progress::Failed(Failure::Error(message(&event.data)));
        }
        let mut entry = Vec::new();
        self.write_version(&mut entry);
        if terminal { Op::Done } else { Op::Passed }.write(&mut entry);
        self.delivered = true;
        self.done = terminal;
        out.push(Out { lines: event.lines.clone(), journal: entry.into(), terminal, tokens: 0 });
        if terminal { Progress::Done } else { Progress::Going }
    }
}

/// `type` of an event's data.
fn kind_of(data: &[u8]) -> Option<Vec<u8>> {
    let mut kind = None;
    json::object(data, json::skip_space(data, 0), |key, at| match key {
        b"type" => json::take(data, at, &mut kind),
        _ => json::skip_value(data, at),
    })?;
    Some(json::string(kind?.of(data))?.as_bytes().to_vec())
}

/// What an error event says, cut to what a log line bears.
pub(super) fn message(data: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(data).unwrap_or_default();
    let error = value.get("error").unwrap_or(&value);
    let text = error.get("message").unwrap_or(error);
    let text = text.as_str().map_or_else(|| text.to_string(), str::to_owned);
    text.chars().take(200).collect()
}
