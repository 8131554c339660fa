//! Just enough JSON to find values in text without making anything of it.
//!
//! Every function takes the place where a value begins and says where it ends; `None` means that
//! the text is no JSON. Values that nobody asks for are skipped, not checked.

use std::borrow::Cow;
use std::ops::Range;

use memchr::memchr2;

/// Where a value is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Span {
    pub(super) fn range(self) -> Range<usize> {
        self.start..self.end
    }

    pub(super) fn of(self, text: &[u8]) -> &[u8] {
        &text[self.range()]
    }
}

pub(super) fn skip_space(text: &[u8], mut at: usize) -> usize {
    while matches!(text.get(at), Some(b' ' | b'\n' | b'\r' | b'\t')) {
        at += 1;
    }
    at
}

/// `at` is the opening quote.
pub(super) fn skip_string(text: &[u8], at: usize) -> Option<usize> {
    let mut at = at + 1;
    loop {
        at += memchr2(b'"', b'\\', text.get(at..)?)?;
        if text[at] == b'"' {
            return Some(at + 1);
        }
        at += 2;
    }
}

pub(super) fn skip_value(text: &[u8], at: usize) -> Option<usize> {
    match text.get(at)? {
        b'"' => skip_string(text, at),
        b'{' | b'[' => {
            let mut depth = 0_usize;
            let mut at = at;
            loop {
                match text.get(at)? {
                    b'"' => {
                        at = skip_string(text, at)?;
                        continue;
                    }
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => {
                        depth -= 1;
                        if depth == 0 {
                            return Some(at + 1);
                        }
                    }
                    _ => {}
                }
                at += 1;
            }
        }
        b',' | b':' | b'}' | b']' => None,
        _ => {
            let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t');
            Some(text[at..].iter().position(ends).map_or(text.len(), |length| at + length))
        }
    }
}

/// Goes through an object. `member` gets each key as it is written, without quotes, with the place
/// of its value, and says where the value ends.
pub(super) fn object<'a>(
    text: &'a [u8],
    at: usize,
    mut member: impl FnMut(&'a [u8], usize) -> Option<usize>,
) -> Option<usize> {
    if text.get(at) != Some(&b'{') {
        return None;
    }
    let mut at = skip_space(text, at + 1);
    if text.get(at) == Some(&b'}') {
        return Some(at + 1);
    }
    loop {
        if text.get(at) != Some(&b'"') {
            return None;
        }
        let end = skip_string(text, at)?;
        let key = &text[at + 1..end - 1];
        at = skip_space(text, end);
        if text.get(at) != Some(&b':') {
            return None;
        }
        at = skip_space(text, at + 1);
        at = skip_space(text, member(key, at)?);
        match text.get(at)? {
            b',' => at = skip_space(text, at + 1),
            b'}' => return Some(at + 1),
            _ => return None,
        }
    }
}

/// Goes through an array. `item` gets the place of each item and says where it ends.
pub(super) fn array(text: &[u8], at: usize, mut item: impl FnMut(usize) -> Option<usize>) -> Option<usize> {
    if text.get(at) != Some(&b'[') {
        return None;
    }
    let mut at = skip_space(text, at + 1);
    if text.get(at) == Some(&b']') {
        return Some(at + 1);
    }
    loop {
        at = skip_space(text, item(at)?);
        match text.get(at)? {
            b',' => at = skip_space(text, at + 1),
            b']' => return Some(at + 1),
            _ => return None,
        }
    }
}

/// Skips a value and says where it was.
pub(super) fn take(text: &[u8], at: usize, place: &mut Option<Span>) -> Option<usize> {
    let end = skip_value(text, at)?;
    *place = Some(Span { start: at, end });
    Some(end)
}

/// Numbers of an array, added to `ids`; `None` if it is no array of token ids.
pub(super) fn ids(text: &[u8], ids: &mut Vec<u32>) -> Option<()> {
    array(text, 0, |at| {
        let end = skip_value(text, at)?;
        ids.push(number(&text[at..end])?);
        Some(end)
    })?;
    Some(())
}

/// A number without sign, fraction and exponent.
pub(super) fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 10 {
        return None;
    }
    let mut number = 0_u64;
    for byte in text {
        number = number * 10 + u64::from(byte.is_ascii_digit().then(|| byte - b'0')?);
    }
    u32::try_from(number).ok()
}

/// The text of a string with its quotes.
pub(super) fn string(quoted: &[u8]) -> Option<Cow<'_, str>> {
    let inner = quoted.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    if memchr::memchr(b'\\', inner).is_none() {
        return std::str::from_utf8(inner).ok().map(Cow::Borrowed);
    }
    serde_json::from_slice::<String>(quoted).ok().map(Cow::Owned)
}

/// How many characters a string with its quotes has.
pub(super) fn characters(quoted: &[u8]) -> u64 {
    let inner = quoted.get(1..quoted.len().saturating_sub(1)).unwrap_or_default();
    if memchr::memchr(b'\\', inner).is_none() {
        return inner.iter().filter(|byte| **byte & 0xc0 != 0x80).count() as u64;
    }
    string(quoted).map_or(0, |text| text.chars().count() as u64)
}

/// Writes text as a JSON string.
pub(super) fn quote(text: &str, out: &mut Vec<u8>) {
    // Text into memory: neither can fail.
    let _ = serde_json::to_writer(out, text);
}

/// Writes numbers as a JSON array.
pub(super) fn write_ids(ids: &[u32], out: &mut Vec<u8>) {
    let _ = serde_json::to_writer(out, ids);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_wherever_they_are() {
        let text = br#" { "a" : [1, {"b":"]}\""}] , "c":null,"d":-1.5e3 }"#;
        let mut found = Vec::new();
        let end = object(text, 1, |key, at| {
            let mut place = None;
            let end = take(text, at, &mut place)?;
            found.push((key.to_vec(), place?.of(text).to_vec()));
            Some(end)
        });
        assert_eq!(end, Some(text.len()));
        let found: Vec<(&[u8], &[u8])> = found.iter().map(|(key, value)| (&key[..], &value[..])).collect();
        assert_eq!(found[0], (&b"a"[..], &br#"[1, {"b":"]}\""}]"#[..]));
        assert_eq!(found[1..], [(&b"c"[..], &b"null"[..]), (&b"d"[..], &b"-1.5e3"[..])]);
    }

    #[test]
    fn what_is_cut_off_is_no_json() {
        let text = br#"{"a":[1,{"b":"\"x"}],"c":"d"}"#;
        let whole = |text: &[u8]| object(text, 0, |_, at| skip_value(text, at));
        assert_eq!(whole(text), Some(text.len()));
        for cut in 0..text.len() {
            assert_eq!(whole(&text[..cut]), None, "cut at {cut}");
        }
        assert_eq!(whole(br#"{"a"}"#), None);
        assert_eq!(whole(br#"{"a":}"#), None);
    }

    #[test]
    fn ids_are_numbers_that_fit() {
        let read = |text: &[u8]| {
            let mut out = Vec::new();
            ids(text, &mut out).map(|()| out)
        };
        assert_eq!(read(b"[1, 4294967295]"), Some(vec![1, u32::MAX]));
        assert_eq!(read(b"[]"), Some(vec![]));
        for bad in [&b"null"[..], b"[4294967296]", b"[-1]", b"[1.0]", b"[\"1\"]", b"[1"] {
            assert_eq!(read(bad), None);
        }
    }
}
