//! Log probabilities: taken apart, joined, and turned from the shape of one route into the other's.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::json::{array, object, quote, skip_value};

/// What is between the brackets of the lists of one event, without the brackets. A chat has one
/// list, `content`; completions have four, in the order of [`LISTS`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Piece {
    lists: [Vec<u8>; 4],
}

const LISTS: [&str; 4] = ["text_offset", "token_logprobs", "tokens", "top_logprobs"];

/// Where the next token's text begins in the text of a completion, as its engine counts.
///
/// vLLM counts the characters of the tokens' own texts, and it did count those of the text that it
/// had shown: tokens that are parts of characters make a difference. Which it is shows with the
/// first offset behind such a token.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Offsets {
    behind_token: u64,
    behind_text: u64,
    by_text: bool,
}

impl Offsets {
    /// Known from somewhere else.
    pub(super) fn at(next: u64, by_text: bool) -> Self {
        Self { behind_token: next, behind_text: next, by_text }
    }

    /// Where the next token begins.
    pub(super) fn next(self) -> u64 {
        if self.by_text { self.behind_text } else { self.behind_token }
    }

    /// Whether it counts the text that it has shown.
    pub(super) fn by_text(self) -> bool {
        self.by_text
    }

    /// Notes an event whose text has so many characters. An engine that tells no offsets tells -1.
    pub(super) fn note(&mut self, piece: &Piece, characters: u64) {
        let list = |place: usize| [b"[", &piece.lists[place][..], b"]"].concat();
        let offsets: Option<Vec<u64>> = serde_json::from_slice(&list(0)).ok();
        let tokens: Option<Vec<String>> = serde_json::from_slice(&list(2)).ok();
        let (Some(offsets), Some(tokens)) = (offsets, tokens) else { return };
        let (Some(first), Some(last), Some(token)) = (offsets.first(), offsets.last(), tokens.last()) else {
            return;
        };
        if self.behind_text != self.behind_token {
            self.by_text = *first == self.behind_text || self.by_text && *first != self.behind_token;
        }
        self.behind_text = first + characters;
        self.behind_token = last + token.chars().count() as u64;
    }
}

/// The lists of an event in the client's own shape; `None` if they are not what is known.
pub(super) fn take(chat: bool, raw: &[u8]) -> Option<Piece> {
    let mut piece = Piece::default();
    object(raw, 0, |key, at| {
        let end = skip_value(raw, at)?;
        let place = match chat {
            true => (key == b"content").then_some(0),
            false => LISTS.iter().position(|name| name.as_bytes() == key),
        };
        if let (Some(place), Some(b'[')) = (place, raw.get(at)) {
            piece.lists[place] = raw[at + 1..end - 1].to_vec();
        }
        Some(end)
    })?;
    Some(piece)
}

/// Pieces as one `logprobs` value.
pub(super) fn join<'a>(chat: bool, pieces: impl Iterator<Item = &'a Piece> + Clone) -> Vec<u8> {
    let names = if chat { &["content"][..] } else { &LISTS };
    let mut out = Vec::new();
    for (place, name) in names.iter().enumerate() {
        out.push(if place == 0 { b'{' } else { b',' });
        quote(name, &mut out);
        out.extend_from_slice(b":[");
        let mut any = false;
        for piece in pieces.clone().map(|piece| &piece.lists[place]).filter(|list| !list.is_empty()) {
            if any {
                out.push(b',');
            }
            any = true;
            out.extend_from_slice(piece);
        }
        out.push(b']');
    }
    out.push(b'}');
    out
}

/// Members in their order; the numbers as they are written.
struct Ordered<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Ordered<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members<'a>(std::marker::PhantomData<&'a ()>);
        impl<'de: 'a, 'a> serde::de::Visitor<'de> for Members<'a> {
            type Value = Ordered<'a>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<M: serde::de::MapAccess<'de>>(self, mut map: M) -> Result<Ordered<'a>, M::Error> {
                let mut all = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    all.push((Cow::Owned(key), map.next_value()?));
                }
                Ok(Ordered(all))
            }
        }
        deserializer.deserialize_map(Members(std::marker::PhantomData))
    }
}

#[derive(Deserialize)]
struct Completions<'a> {
    #[serde(borrow)]
    token_logprobs: Vec<Option<&'a RawValue>>,
    tokens: Vec<String>,
    #[serde(borrow, default)]
    top_logprobs: Option<Vec<Option<Ordered<'a>>>>,
}

/// The lists of a continuation, which has the shape of completions, as the client's. `shift` is
/// how many characters came before the continuation and how many of its own are not counted,
/// `top` how many alternatives a chat wants.
pub(super) fn convert(chat: bool, raw: &[u8], shift: (u64, u64), top: usize) -> Option<Piece> {
    if !chat {
        let mut piece = take(false, raw)?;
        let offsets = [b"[", &piece.lists[0][..], b"]"].concat();
        let mut shifted = Vec::new();
        array(&offsets, 0, |at| {
            let end = skip_value(&offsets, at)?;
            let told = &offsets[at..end];
            if !shifted.is_empty() {
                shifted.push(b',');
            }
            if told.starts_with(b"-") {
                // SGLang tells none.
                shifted.extend_from_slice(told);
                return Some(end);
            }
            let offset: u64 = std::str::from_utf8(told).ok()?.parse().ok()?;
            shifted.extend_from_slice((offset.saturating_sub(shift.1) + shift.0).to_string().as_bytes());
            Some(end)
        })?;
        piece.lists[0] = shifted;
        return Some(piece);
    }
    let all: Completions<'_> = serde_json::from_slice(raw).ok()?;
    if all.token_logprobs.len() != all.tokens.len() {
        return None;
    }
    let mut out = Vec::new();
    for (at, (token, logprob)) in all.tokens.iter().zip(&all.token_logprobs).enumerate() {
        if at > 0 {
            out.push(b',');
        }
        out.push(b'{');
        entry(token, logprob.map_or("-9999.0", |raw| raw.get()), &mut out);
        out.extend_from_slice(b",\"top_logprobs\":[");
        let others = all.top_logprobs.as_ref().and_then(|tops| tops.get(at)?.as_ref());
        for (place, (token, logprob)) in others.iter().flat_map(|others| &others.0).take(top).enumerate() {
            out.extend_from_slice(if place > 0 { b",{" } else { b"{" });
            entry(token, logprob.get(), &mut out);
            out.push(b'}');
        }
        out.extend_from_slice(b"]}");
    }
    Some(Piece { lists: [out, Vec::new(), Vec::new(), Vec::new()] })
}

fn entry(token: &str, logprob: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"\"token\":");
    quote(token, out);
    out.extend_from_slice(b",\"logprob\":");
    out.extend_from_slice(logprob.as_bytes());
    out.extend_from_slice(b",\"bytes\":");
    // Numbers into memory cannot fail.
    let _ = serde_json::to_writer(out, token.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: &[u8] = br#"{"text_offset":[0,1],"token_logprobs":[-0.50,-1e-05],"tokens":["a","\u00e9"],"top_logprobs":[{"a":-0.50,"b":-2.0},{"\u00e9":-1e-05,"a":-3.25}]}"#;

    #[test]
    fn offsets_count_on_behind_the_cut() {
        let piece = convert(false, RAW, (7, 0), 0).unwrap();
        let joined = join(false, [&take(false, RAW).unwrap(), &piece].into_iter());
        let text = String::from_utf8(joined).unwrap();
        assert!(
            text.starts_with(r#"{"text_offset":[0,1,7,8],"token_logprobs":[-0.50,-1e-05,-0.50,-1e-05],"#)
        );
        assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok());
    }

    #[test]
    fn where_the_next_token_begins_is_what_its_engine_counts() {
        let event = |offset: u64, token: &str| {
            let raw =
                serde_json::json!({"text_offset": [offset], "token_logprobs": [-1.0], "tokens": [token]});
            take(false, raw.to_string().as_bytes()).unwrap()
        };
        // A character of two tokens behind a damaged one, all shown with the last.
        let mut tokens = Offsets::default();
        for (at, token, shown) in [(0, "a", 1), (1, "", 0), (1, "é", 2)] {
            tokens.note(&event(at, token), shown);
        }
        assert_eq!(tokens.next(), 2);
        let mut text = tokens;
        tokens.note(&event(2, "b"), 1);
        assert_eq!((tokens.next(), tokens.by_text()), (3, false));
        // The other way of counting shows with the next one.
        text.note(&event(3, "b"), 1);
        assert_eq!((text.next(), text.by_text()), (4, true));
        for (at, token, shown) in [(4, "", 0), (4, "é", 2)] {
            text.note(&event(at, token), shown);
        }
        assert_eq!(text.next(), 6);
        let none = take(false, br#"{"text_offset":[-1],"token_logprobs":[-1.0],"tokens":["a"]}"#).unwrap();
        text.note(&none, 1);
        assert_eq!(text.next(), 6, "nothing was told");
    }

    #[test]
    fn an_engine_that_tells_no_offsets_is_not_corrected() {
        let raw =
            br#"{"text_offset":[-1,-1],"token_logprobs":[-1.0,-2.0],"tokens":["a","b"],"top_logprobs":[]}"#;
        let text =
            String::from_utf8(join(false, [&convert(false, raw, (7, 0), 0).unwrap()].into_iter())).unwrap();
        assert!(text.starts_with(r#"{"text_offset":[-1,-1],"#), "{text}");
    }

    #[test]
    fn a_chat_gets_its_own_shape_with_the_numbers_as_they_were_written() {
        let piece = convert(true, RAW, (7, 0), 1).unwrap();
        let text = String::from_utf8(join(true, [&piece].into_iter())).unwrap();
        let wanted = r#"{"content":[{"token":"a","logprob":-0.50,"bytes":[97],"top_logprobs":[{"token":"a","logprob":-0.50,"bytes":[97]}]},{"token":"é","logprob":-1e-05,"bytes":[195,169],"top_logprobs":[{"token":"é","logprob":-1e-05,"bytes":[195,169]}]}]}"#;
        assert_eq!(text, wanted);
        assert_eq!(take(true, wanted.as_bytes()), Some(piece));
        assert_eq!(convert(true, b"{}", (0, 0), 0), None);
    }
}
