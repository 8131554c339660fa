//! Events of a leg that speaks the client's dialect: what the router asked for is taken out again,
//! and nothing is handed out that could be said otherwise after a cut. What becomes of a choice is in
//! [`super::delta`].

use std::sync::Arc;

use bytes::Bytes;

use super::json::{self, Span};
use super::pass::message;
use super::render::{Head, Patch};
use super::scan::{self, Choice as Said, Scan, scan, some};
use super::sse::Event;
use super::stream::{Failure, LegId, MAYBE_TOOL, Out, Progress, Splice};

impl Splice {
    pub(super) fn push_own(&mut self, leg: LegId, event: &Event, out: &mut Vec<Out>) -> Progress {
        let data = &event.data;
        if &data[..] == b"[DONE]" {
            return self.own_done(out);
        }
        let Some(scan) = scan(data).filter(|_| std::str::from_utf8(data).is_ok()) else {
            return Progress::Failed(Failure::Malformed("it is no JSON object"));
        };
        if some(data, scan.error).is_some() {
            return Progress::Failed(Failure::Error(message(data)));
        }
        if scan.more.is_empty() {
            return self.own_event(leg, event, &scan, out);
        }
        // Several choices in one event: as many events with one each.
        let all = scan.choices.unwrap_or_default();
        for choice in scan.first.iter().chain(&scan.more) {
            let parts = [&data[..=all.start], choice.span.of(data), &data[all.end - 1..]];
            let one = Event::unnamed(Bytes::from(parts.concat()));
            let Some(scan) = scan::scan(&one.data) else {
                return Progress::Failed(Failure::Malformed("it is no JSON object"));
            };
            match self.own_event(leg, &one, &scan, out) {
                Progress::Going => {}
                other => return other,
            }
        }
        Progress::Going
    }

    fn own_event(&mut self, leg: LegId, event: &Event, scan: &Scan, out: &mut Vec<Out>) -> Progress {
        let data = &event.data;
        let head = self.head.get_or_insert_with(|| {
            let value = |place: Option<Span>| some(data, place).unwrap_or(b"null").to_vec();
            self.unwritten.head = true;
            self.unwritten.any = true;
            let sglang = scan.first.is_some_and(|choice| choice.is_sglang);
            let (id, created) = (value(scan.id), value(scan.created));
            Arc::new(Head { id, created, model: value(scan.model), sglang })
        });
        let head = head.clone();
        match &scan.first {
            Some(choice) => self.own_choice(leg, event, scan, choice, &head, out),
            None => self.own_other(event, scan, named(leg, data, scan, &head), out),
        }
    }

    /// An event without choices: usage, or something that the client asked for.
    fn own_other(
        &mut self,
        event: &Event,
        scan: &Scan,
        mut patch: Patch<'_>,
        out: &mut Vec<Out>,
    ) -> Progress {
        let data = &event.data;
        if let Some(usage) = some(data, scan.usage) {
            self.note_usage(usage);
            if let Some(value) = some(data, scan.fingerprint) {
                self.fingerprint = Some(value.to_vec());
                self.unwritten.fingerprint = true;
                self.unwritten.any = true;
            }
            if self.plan.continues() && !self.plan.usage {
                self.flush_last(out);
                return Progress::Going;
            }
            self.flush_last(out);
            let line = patch.line(data);
            self.emit_usage(line, out);
            return Progress::Going;
        }
        self.flush_last(out);
        match patch.is_empty() {
            true => self.emit_lines(None, event.lines.clone(), out),
            false => {
                let line = patch.line(data);
                self.emit(None, line, out);
            }
        }
        Progress::Going
    }

    fn note_usage(&mut self, raw: &[u8]) {
        #[derive(serde::Deserialize)]
        struct Usage {
            prompt_tokens: Option<u64>,
            prompt_tokens_details: Option<Details>,
        }
        #[derive(serde::Deserialize)]
        struct Details {
            cached_tokens: Option<u64>,
        }
        if let Ok(usage) = serde_json::from_slice::<Usage>(raw)
            && usage.prompt_tokens.is_some()
        {
            self.prompt_tokens = usage.prompt_tokens;
            self.cached_tokens = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
            self.unwritten.prompt_tokens = true;
            self.unwritten.any = true;
        }
    }

    fn own_done(&mut self, out: &mut Vec<Out>) -> Progress {
        if !self.all_finished() {
            return Progress::Failed(Failure::Truncated);
        }
        // An engine that says no usage although it was asked has none to say.
        self.usage_sent = true;
        self.finish(out);
        Progress::Done
    }

    /// Keeps the prompt's ids. A chat tells them beside its choices, completions in each.
    pub(super) fn own_prompt(&mut self, at: usize, data: &[u8], scan: &Scan, choice: &Said) {
        let place = some(data, scan.prompt_token_ids).or(some(data, choice.prompt_token_ids));
        let Some(raw) = place.filter(|raw| raw.first() == Some(&b'[')) else { return };
        let prompt = self.prompt_of(at);
        if self.prompts.get(prompt).is_some_and(Option::is_some) {
            return;
        }
        let mut ids = Vec::new();
        if json::ids(raw, &mut ids).is_some() {
            self.put_prompt(prompt, ids);
            self.unwritten.prompts = true;
            self.unwritten.any = true;
        }
    }

    /// Looks at how the content begins: what looks like JSON may be a tool call.
    pub(super) fn note_opening(&mut self, at: usize, content: &[u8]) {
        if self.choices[at].opening.is_some() {
            return;
        }
        let text = json::string(content).unwrap_or_default();
        self.note_opening_text(at, &text);
    }

    pub(super) fn note_opening_text(&mut self, at: usize, text: &str) {
        let state = &mut self.choices[at];
        if state.opening.is_none()
            && let Some(first) = text.chars().find(|c| !c.is_whitespace())
        {
            state.opening = Some(first);
            state.dirty.opening = true;
            if matches!(first, '{' | '[') {
                self.break_off(MAYBE_TOOL);
            }
        }
    }

    /// Hands out held text in an event of its own, because what comes goes elsewhere.
    pub(super) fn flush_held(&mut self, at: usize, out: &mut Vec<Out>) {
        let state = &mut self.choices[at];
        let text = std::mem::take(&mut state.held);
        state.dirty.held = true;
        self.emit_text(at, &text, out);
    }
}

/// The changes that make an event of a later attempt one of the first: its names.
pub(super) fn named<'a>(leg: LegId, data: &[u8], scan: &Scan, head: &'a Head) -> Patch<'a> {
    let mut patch = Patch::default();
    if leg != LegId::FIRST {
        patch.set(data, scan.id, &head.id);
        patch.set(data, scan.created, &head.created);
        patch.set(data, scan.model, &head.model);
    }
    patch
}
