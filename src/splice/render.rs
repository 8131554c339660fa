//! Events in the client's shape, written anew, and events changed in place.

use bytes::Bytes;

use super::choice::Channel;
use super::json::{Span, quote, write_ids};

/// What every event of a stream has, as JSON.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Head {
    pub(super) id: Vec<u8>,
    pub(super) created: Vec<u8>,
    pub(super) model: Vec<u8>,
    pub(super) sglang: bool,
}

/// What one event has of its own. JSON where it is bytes; `None` is null.
pub(super) struct Parts<'a> {
    pub(super) index: u32,
    pub(super) channel: Channel,
    pub(super) text: &'a str,
    pub(super) logprobs: Option<&'a [u8]>,
    pub(super) finish: Option<(&'a [u8], &'a [u8])>,
    pub(super) ids: Option<&'a [u32]>,
    /// Tokens of the prompt and of this choice.
    pub(super) usage: Option<(u64, u64)>,
    pub(super) fingerprint: Option<&'a [u8]>,
}

fn open(head: &Head, chat: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: {\"id\":");
    out.extend_from_slice(&head.id);
    out.extend_from_slice(match chat {
        true => b",\"object\":\"chat.completion.chunk\",\"created\":",
        false => b",\"object\":\"text_completion\",\"created\":",
    });
    out.extend_from_slice(&head.created);
    out.extend_from_slice(b",\"model\":");
    out.extend_from_slice(&head.model);
    out.extend_from_slice(b",\"choices\":[");
}

fn fingerprint(value: Option<&[u8]>, out: &mut Vec<u8>) {
    if let Some(value) = value {
        out.extend_from_slice(b",\"system_fingerprint\":");
        out.extend_from_slice(value);
    }
}

/// A chat's delta; `quoted` is its text as JSON, empty for none.
pub(super) fn delta(channel: Channel, quoted: &[u8]) -> Vec<u8> {
    let names: &[&[u8]] = match channel {
        _ if quoted.is_empty() => &[],
        Channel::Reasoning => &[b"\"reasoning\":"],
        Channel::ReasoningContent => &[b"\"reasoning_content\":"],
        Channel::Both => &[b"\"reasoning\":", b",\"reasoning_content\":"],
        Channel::Unset | Channel::Content => &[b"\"content\":"],
    };
    let mut out = vec![b'{'];
    for name in names {
        out.extend_from_slice(name);
        out.extend_from_slice(quoted);
    }
    out.push(b'}');
    out
}

/// The line of an event with one choice.
pub(super) fn event(head: &Head, chat: bool, parts: &Parts<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(288 + parts.text.len());
    open(head, chat, &mut out);
    out.extend_from_slice(format!("{{\"index\":{},", parts.index).as_bytes());
    if chat {
        let mut quoted = Vec::new();
        if !(parts.text.is_empty() && parts.channel.reasons()) {
            quote(parts.text, &mut quoted);
        }
        out.extend_from_slice(b"\"delta\":");
        out.extend_from_slice(&delta(parts.channel, &quoted));
    } else {
        out.extend_from_slice(b"\"text\":");
        quote(parts.text, &mut out);
    }
    out.extend_from_slice(b",\"logprobs\":");
    out.extend_from_slice(parts.logprobs.unwrap_or(b"null"));
    let (finish, stop) = parts.finish.unwrap_or((b"null", b"null"));
    out.extend_from_slice(b",\"finish_reason\":");
    out.extend_from_slice(finish);
    if head.sglang || !chat || parts.finish.is_some() {
        out.extend_from_slice(if head.sglang { b",\"matched_stop\":" } else { b",\"stop_reason\":" });
        out.extend_from_slice(stop);
    }
    if !head.sglang && !chat {
        out.extend_from_slice(b",\"prompt_token_ids\":null");
    }
    match parts.ids {
        Some(ids) => {
            out.extend_from_slice(b",\"token_ids\":");
            write_ids(ids, &mut out);
        }
        None if head.sglang => {}
        None => out.extend_from_slice(b",\"token_ids\":null"),
    }
    out.extend_from_slice(b"}]");
    if let Some((prompt, completion)) = parts.usage {
        usage_counts(prompt, completion, &mut out);
        out.extend_from_slice(if chat { b",\"completion_tokens_details\":null}" } else { b"}" });
    }
    fingerprint(parts.fingerprint, &mut out);
    out.extend_from_slice(b"}\n");
    out
}

fn usage_counts(prompt: u64, completion: u64, out: &mut Vec<u8>) {
    let total = prompt + completion;
    let text = format!(
        ",\"usage\":{{\"prompt_tokens\":{prompt},\"total_tokens\":{total},\"completion_tokens\":{completion}"
    );
    out.extend_from_slice(text.as_bytes());
}

/// The line of the usage event.
pub(super) fn usage(
    head: &Head,
    chat: bool,
    usage: super::stream::Usage,
    system_fingerprint: Option<&[u8]>,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(320);
    open(head, chat, &mut out);
    out.push(b']');
    usage_counts(usage.prompt_tokens, usage.completion_tokens, &mut out);
    match usage.cached_tokens {
        Some(cached) => {
            let text = format!(",\"prompt_tokens_details\":{{\"cached_tokens\":{cached}}}}}");
            out.extend_from_slice(text.as_bytes());
        }
        None => out.extend_from_slice(b",\"prompt_tokens_details\":null}"),
    }
    fingerprint(system_fingerprint, &mut out);
    out.extend_from_slice(b"}\n");
    out
}

/// Most changes of one event.
const MAX_CHANGES: usize = 12;

/// Changes to an event, which otherwise stays as it is.
#[derive(Default)]
pub(super) struct Patch<'a> {
    list: [(Span, &'a [u8]); MAX_CHANGES],
    length: usize,
}

impl<'a> Patch<'a> {
    /// Puts `value` in the place of what is there.
    pub(super) fn set(&mut self, text: &[u8], place: Option<Span>, value: &'a [u8]) {
        let Some(place) = place else { return };
        if place.of(text) != value && self.length < MAX_CHANGES {
            self.list[self.length] = (place, value);
            self.length += 1;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The line of the changed event.
    pub(super) fn line(&mut self, text: &[u8]) -> Vec<u8> {
        let list = &mut self.list[..self.length];
        list.sort_unstable_by_key(|(place, _)| place.start);
        let added: usize = list.iter().map(|(_, value)| value.len()).sum();
        let mut out = Vec::with_capacity(text.len() + added + 24);
        out.extend_from_slice(b"data: ");
        let mut at = 0;
        for (place, value) in list.iter() {
            out.extend_from_slice(&text[at..place.start]);
            out.extend_from_slice(value);
            at = place.end;
        }
        out.extend_from_slice(&text[at..]);
        out.push(b'\n');
        out
    }
}

/// Where a member is, its key and a comma included, given its key and where its value is.
pub(super) fn whole_member(text: &[u8], key: &str, value: Span) -> Span {
    let space = |byte: &u8| matches!(byte, b' ' | b'\n' | b'\r' | b'\t');
    let back = |mut at: usize| {
        while at > 0 && space(&text[at - 1]) {
            at -= 1;
        }
        at
    };
    // Before the value: a colon, before that the key with its quotes.
    let colon = back(value.start).saturating_sub(1);
    let start = back(back(colon).saturating_sub(key.len() + 2));
    if start > 0 && text[start - 1] == b',' {
        return Span { start: start - 1, end: value.end };
    }
    let end = super::json::skip_space(text, value.end);
    Span { start, end: if text.get(end) == Some(&b',') { end + 1 } else { value.end } }
}

/// A line and what it is made known with, from one allocation.
pub(super) fn split(line: Vec<u8>, length: usize) -> (Bytes, Bytes) {
    let mut lines = Bytes::from(line);
    let journal = lines.split_off(length);
    (lines, journal)
}
