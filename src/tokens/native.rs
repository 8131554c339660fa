//! What SGLang has generated, picked out of an answer of its own route `/generate`: one result, or
//! events of which each has all of it so far, or (`--incremental-streaming-output`) what is new.
//!
//! Where each event has it all, only the last one is read: a long answer would be read a thousand
//! times over otherwise. Which of the two it is shows in the second event, by the number of tokens
//! that the engine says it has generated. Where that cannot be, nothing is added any more.

use std::borrow::Cow;

use memchr::memmem;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::answer::{MOST_IDS, MOST_LINE, MOST_TEXT, Said};

/// How events follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Flow {
    /// There was one at most.
    #[default]
    Unknown,
    /// Each has all so far.
    Whole,
    /// Each has what is new.
    Pieces,
}

/// The first result of an answer, as far as it is known.
#[derive(Debug, Default)]
pub(super) struct Native {
    ids: Vec<u32>,
    text: String,
    flow: Flow,
    /// The last event, unread, where each has all so far.
    latest: Vec<u8>,
    /// The engine ended by itself.
    ended: bool,
    /// There is more than is known.
    cut: bool,
    /// There is more text than is known.
    text_cut: bool,
}

/// Whether more may come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Goes {
    /// It may.
    On,
    /// Nothing is added any more.
    NoFurther,
}

impl Native {
    /// Takes note of an event's data.
    pub(super) fn event(&mut self, data: &[u8]) -> Goes {
        if data.len() > MOST_LINE {
            return Goes::NoFurther;
        }
        if self.flow == Flow::Whole && is_plain(data) {
            self.latest.clear();
            self.latest.extend_from_slice(data);
            return Goes::On;
        }
        match serde_json::from_slice::<Piece<'_>>(data) {
            // Of several answers the first one counts.
            Ok(piece) if piece.index.is_some_and(|index| index > 0) => Goes::On,
            Ok(piece) if piece.error.is_none() => self.piece(&piece),
            _ => Goes::NoFurther,
        }
    }

    /// Takes the answer in one piece.
    pub(super) fn whole(&mut self, body: &[u8]) {
        let first = match body.trim_ascii_start().first() {
            Some(b'[') => serde_json::from_slice::<Vec<Piece<'_>>>(body).ok().and_then(|mut all| {
                all.truncate(1);
                all.pop()
            }),
            _ => serde_json::from_slice(body).ok(),
        };
        if let Some(piece) = first.filter(|piece| piece.error.is_none()) {
            self.replace(&piece);
        }
    }

    /// Bytes that are unread.
    pub(super) fn unread(&self) -> usize {
        self.latest.len()
    }

    /// Whether nothing is known.
    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty() && self.text.is_empty() && self.latest.is_empty()
    }

    /// It has ended, by itself or not. `only_text` where ids are of no use; `over` if there was more
    /// that was not taken note of.
    pub(super) fn finish(mut self, only_text: bool, over: bool) -> Said {
        let latest = std::mem::take(&mut self.latest);
        if let Ok(piece) = serde_json::from_slice::<Piece<'_>>(&latest)
            && self.continues(&piece)
        {
            self.replace(&piece);
        }
        if !only_text && !self.ids.is_empty() {
            // The last one was not computed.
            self.ids.pop();
            return Said::Ids(self.ids);
        }
        match self.text.is_empty() {
            true => Said::Nothing,
            false => Said::Text { text: self.text, beyond: self.ended || self.cut || self.text_cut || over },
        }
    }

    fn piece(&mut self, piece: &Piece<'_>) -> Goes {
        let (ids, text) = (piece.ids(), piece.text());
        if self.flow == Flow::Unknown && (!self.ids.is_empty() || !self.text.is_empty()) {
            self.flow = match () {
                () if self.is_new(piece) => Flow::Pieces,
                () if self.continues(piece) => Flow::Whole,
                () => return Goes::NoFurther,
            };
        }
        match self.flow {
            Flow::Whole if !self.continues(piece) => Goes::NoFurther,
            Flow::Unknown | Flow::Whole => {
                self.replace(piece);
                Goes::On
            }
            Flow::Pieces => {
                if !self.is_new(piece) {
                    return Goes::NoFurther;
                }
                // Some versions have new ids and all of the text: what looks like that may be it.
                self.text_cut |= !text.is_empty() && text.starts_with(&self.text);
                if self.ids.len() + ids.len() > MOST_IDS || self.text.len() + text.len() > MOST_TEXT {
                    self.cut = true;
                    return Goes::NoFurther;
                }
                self.ids.extend_from_slice(ids);
                if !self.text_cut {
                    self.text.push_str(text);
                }
                self.ended |= piece.meta_info.stopped();
                Goes::On
            }
        }
    }

    /// Whether these tokens come behind those that are known.
    fn is_new(&self, piece: &Piece<'_>) -> bool {
        let (known, new) = (self.ids.len() as u64, piece.ids().len() as u64);
        known > 0 && piece.meta_info.completion_tokens == Some(known + new)
    }

    /// Whether what is known is the beginning of this.
    fn continues(&self, piece: &Piece<'_>) -> bool {
        piece.ids().starts_with(&self.ids) && piece.text().starts_with(&self.text)
    }

    fn replace(&mut self, piece: &Piece<'_>) {
        let (ids, text) = (piece.ids(), piece.text());
        let mut end = text.len().min(MOST_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.latest.clear();
        self.cut = ids.len() > MOST_IDS || end < text.len();
        self.ids = ids[..ids.len().min(MOST_IDS)].to_vec();
        self.text = text[..end].to_owned();
        self.ended = piece.meta_info.stopped();
    }
}

/// Whether an event is of the one answer and no error. In texts these have other quotes.
fn is_plain(data: &[u8]) -> bool {
    memmem::find(data, b"\"index\":").is_none() && memmem::find(data, b"\"error\":").is_none()
}

/// A result, or an event.
#[derive(Deserialize)]
struct Piece<'a> {
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
    #[serde(default)]
    output_ids: Option<Vec<u32>>,
    #[serde(default)]
    meta_info: Meta,
    /// Which of several answers, where there are several.
    #[serde(default)]
    index: Option<u64>,
    #[serde(default)]
    error: Option<IgnoredAny>,
}

impl Piece<'_> {
    fn ids(&self) -> &[u32] {
        self.output_ids.as_deref().unwrap_or_default()
    }

    fn text(&self) -> &str {
        self.text.as_deref().unwrap_or_default()
    }
}

#[derive(Deserialize, Default)]
struct Meta {
    /// Generated so far, whatever the event has of it.
    #[serde(default)]
    completion_tokens: Option<u64>,
    #[serde(default)]
    finish_reason: Option<serde_json::Value>,
}

impl Meta {
    fn stopped(&self) -> bool {
        self.finish_reason
            .as_ref()
            .is_some_and(|reason| reason.get("type").is_some_and(|kind| kind == "stop"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// All so far, or what is new; text without ids where `ids` is none.
    fn event(text: &str, ids: Option<&[u32]>, count: usize, finish: Value) -> Value {
        let mut event = json!({"text": text, "meta_info": {"id": "r", "prompt_tokens": 3,
            "completion_tokens": count, "cached_tokens": 0, "finish_reason": finish}});
        if let Some(ids) = ids {
            event["output_ids"] = json!(ids);
        }
        event
    }

    fn said(events: &[Value], only_text: bool) -> (Said, usize) {
        let mut native = Native::default();
        let taken = events.iter().take_while(|event| native.event(event.to_string().as_bytes()) == Goes::On);
        let taken = taken.count();
        (native.finish(only_text, taken < events.len()), taken)
    }

    fn text(text: &str, beyond: bool) -> Said {
        Said::Text { text: text.to_owned(), beyond }
    }

    const STOP: &str = r#"{"type":"stop","matched":2}"#;

    fn stop() -> Value {
        serde_json::from_str(STOP).unwrap()
    }

    #[test]
    fn events_with_all_so_far_and_events_with_what_is_new_say_the_same() {
        let whole = [
            event("a", Some(&[5]), 1, Value::Null),
            // What is sent by reference may have grown since it was counted.
            event("ab\"index\":", Some(&[5, 6, 7]), 2, Value::Null),
            event("ab\"index\":c", Some(&[5, 6, 7, 8]), 4, Value::Null),
            event("ab\"index\":cd", Some(&[5, 6, 7, 8, 2]), 5, stop()),
        ];
        let pieces = [
            event("a", Some(&[5]), 1, Value::Null),
            event("b\"index\":", Some(&[6, 7]), 3, Value::Null),
            event("c", Some(&[8]), 4, Value::Null),
            event("d", Some(&[2]), 5, stop()),
        ];
        for events in [whole, pieces] {
            assert_eq!(said(&events, false), (Said::Ids(vec![5, 6, 7, 8]), 4));
            assert_eq!(said(&events, true), (text("ab\"index\":cd", true), 4));
            assert_eq!(said(&events[..3], false), (Said::Ids(vec![5, 6, 7]), 3), "the client went");
            assert_eq!(said(&events[..3], true), (text("ab\"index\":c", false), 3));
        }
    }

    #[test]
    fn of_events_with_all_so_far_only_the_last_one_is_read() {
        let mut native = Native::default();
        for n in 1..=3 {
            let ids: Vec<u32> = (0..n).collect();
            native.event(event("", Some(&ids), ids.len(), Value::Null).to_string().as_bytes());
        }
        assert_eq!(native.ids, [0, 1]);
        let unread = native.unread();
        // Not even well-formed: and the one before is gone.
        assert_eq!(native.event(b"{\"text\": \"..."), Goes::On);
        assert!(native.unread() < unread);
        assert_eq!(native.finish(false, false), Said::Ids(vec![0]));
    }

    #[test]
    fn without_ids_each_event_has_all_of_the_text() {
        let events = ["a", "ab", "abc"].map(|text| event(text, None, text.len(), Value::Null));
        assert_eq!(said(&events, false), (text("abc", false), 3));
        let other = ["a", "b", "c"].map(|text| event(text, None, 1, Value::Null));
        assert_eq!(said(&other, false), (text("a", true), 1), "these are none of any version");
    }

    #[test]
    fn what_does_not_follow_ends_the_collecting_and_what_is_known_stays() {
        let first = event("a", Some(&[5, 6]), 2, Value::Null);
        let second = event("b", Some(&[7]), 3, Value::Null);
        for other in [
            event("c", Some(&[8]), 9, Value::Null),
            json!({"error": {"message": "out of memory"}}),
            json!({"text": 7}),
        ] {
            let events = [first.clone(), second.clone(), other, event("x", Some(&[9]), 5, Value::Null)];
            assert_eq!(said(&events, false), (Said::Ids(vec![5, 6]), 2), "{events:?}");
            assert_eq!(said(&events, true), (text("ab", true), 2), "{events:?}");
        }
        // All of the text with new ids.
        let mixed = [first.clone(), event("ab", Some(&[7]), 3, Value::Null)];
        assert_eq!(said(&mixed, false), (Said::Ids(vec![5, 6]), 2));
        assert_eq!(said(&mixed, true), (text("a", true), 2));
        // An error behind all so far.
        let grown = event("ab", Some(&[5, 6, 7]), 3, Value::Null);
        let failed = [first.clone(), grown.clone(), grown, json!({"error": {"message": "x"}})];
        assert_eq!(said(&failed, false), (Said::Ids(vec![5, 6]), 3));
        assert_eq!(said(&[json!({"error": {}})], false), (Said::Nothing, 0));
    }

    #[test]
    fn of_several_answers_the_first_one_counts() {
        let of = |index: u32, ids: &[u32]| {
            let mut event = event("", Some(ids), ids.len(), Value::Null);
            event["index"] = index.into();
            event
        };
        let events =
            [of(1, &[9]), of(0, &[5]), of(1, &[9, 9]), of(0, &[5, 6]), of(0, &[5, 6, 7]), of(1, &[9])];
        assert_eq!(said(&events, false), (Said::Ids(vec![5, 6]), 6));
        let whole = |body: Value| {
            let mut native = Native::default();
            native.whole(body.to_string().as_bytes());
            native.finish(false, false)
        };
        let (one, other) = (event("a", Some(&[5, 6]), 2, stop()), event("b", Some(&[7]), 1, stop()));
        assert_eq!(whole(json!([one, other])), Said::Ids(vec![5]));
        assert_eq!(whole(one), Said::Ids(vec![5]));
        assert_eq!(whole(event("a", None, 2, stop())), text("a", true));
        for nothing in [json!([]), json!({}), json!("x"), json!({"error": {}, "text": "x"})] {
            assert_eq!(whole(nothing), Said::Nothing);
        }
    }

    #[test]
    fn nothing_grows_beyond_its_bound() {
        let ids = vec![1; MOST_IDS / 2 + 1];
        let pieces = [1, 2].map(|n| event("é", Some(&ids), n * ids.len(), Value::Null));
        let mut other = pieces[1].clone();
        other["text"] = "x".into();
        assert_eq!(said(&[pieces[0].clone(), other], true), (text("é", true), 1));
        let mut native = Native::default();
        native.whole(
            event(&"é".repeat(MOST_TEXT), Some(&vec![1; MOST_IDS + 2]), 1, stop()).to_string().as_bytes(),
        );
        assert_eq!((native.ids.len(), native.text.len(), native.cut), (MOST_IDS, MOST_TEXT, true));
        assert_eq!(Native::default().event(&vec![b' '; MOST_LINE + 1]), Goes::NoFurther);
    }
}
