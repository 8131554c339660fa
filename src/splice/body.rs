//! The members of a client's body, and changing some of them without touching the rest.

use bytes::Bytes;

use super::json::{Span, object, skip_space, skip_value, string};

/// The members of an object in a body, in order. Of equal ones the last counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Members {
    list: Vec<(String, Span)>,
    /// Behind the opening brace.
    open: usize,
}

impl Members {
    /// Reads the object that begins at `at`.
    pub(super) fn read(body: &[u8], at: usize) -> Option<Self> {
        let mut list = Vec::new();
        let at = skip_space(body, at);
        object(body, at, |key, at| {
            let end = skip_value(body, at)?;
            let quoted = [b"\"", key, b"\""].concat();
            list.push((string(&quoted)?.into_owned(), Span { start: at, end }));
            Some(end)
        })?;
        Some(Self { list, open: at + 1 })
    }

    /// Where a member's value is.
    pub(super) fn get(&self, key: &str) -> Option<Span> {
        self.list.iter().rev().find(|(name, _)| name == key).map(|(_, span)| *span)
    }

    /// A member's value as it is written, if it is there and not null.
    pub(super) fn raw<'a>(&self, body: &'a [u8], key: &str) -> Option<&'a [u8]> {
        self.get(key).map(|span| span.of(body)).filter(|value| *value != b"null")
    }

    /// Whether a member is there, not null, and not empty or false.
    pub(super) fn is_set(&self, body: &[u8], key: &str) -> bool {
        let value = self.raw(body, key);
        value.is_some_and(|value| !matches!(value, b"false" | b"0" | b"[]" | b"{}" | b"\"\""))
    }

    /// A member that is `true`.
    pub(super) fn is_true(&self, body: &[u8], key: &str) -> bool {
        matches!(self.raw(body, key), Some(b"true" | b"1"))
    }

    /// A number, however it is written.
    pub(super) fn number(&self, body: &[u8], key: &str) -> Option<f64> {
        serde_json::from_slice(self.raw(body, key)?).ok()
    }

    /// A count; what is no count is none.
    pub(super) fn count(&self, body: &[u8], key: &str) -> Option<u64> {
        serde_json::from_slice(self.raw(body, key)?).ok()
    }

    /// The members that count, in order, each once.
    pub(super) fn each(&self) -> impl Iterator<Item = (&str, Span)> {
        let last = |at: usize, key: &str| !self.list[at + 1..].iter().any(|(name, _)| name == key);
        let kept = self.list.iter().enumerate().filter(move |(at, (key, _))| last(*at, key));
        kept.map(|(_, (key, span))| (key.as_str(), *span))
    }
}

/// Changes to a body, which otherwise stays as it is, byte by byte.
#[derive(Default)]
pub(super) struct Edits {
    list: Vec<(Span, Vec<u8>)>,
}

impl Edits {
    /// Gives a member of `members` a value: in place of the one it has, else as the first member.
    pub(super) fn set(&mut self, body: &[u8], members: &Members, key: &str, value: &[u8]) {
        if let Some(span) = members.get(key) {
            if span.of(body) != value {
                self.list.push((span, value.to_vec()));
            }
            return;
        }
        let comma: &[u8] = if members.list.is_empty() { b"" } else { b"," };
        let place = Span { start: members.open, end: members.open };
        self.list.push((place, [b"\"", key.as_bytes(), b"\":", value, comma].concat()));
    }

    /// The changed body.
    pub(super) fn apply(mut self, body: &Bytes) -> Bytes {
        if self.list.is_empty() {
            return body.clone();
        }
        // Stable: what is inserted at one place stays in the order it was asked for.
        self.list.sort_by_key(|(span, _)| span.start);
        let mut out = Vec::with_capacity(body.len() + 128);
        let mut at = 0;
        for (span, value) in &self.list {
            out.extend_from_slice(&body[at..span.start]);
            out.extend_from_slice(value);
            at = span.end;
        }
        out.extend_from_slice(&body[at..]);
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_set_without_touching_others() {
        let cases = [
            (r#"{"model": "m"}"#, r#"{"x":true,"model": "m"}"#),
            (r#" { "x" : false , "y":1 }"#, r#" { "x" : true , "y":1 }"#),
            (r#"{}"#, r#"{"x":true}"#),
            (r#"{"\u0078":null}"#, r#"{"\u0078":true}"#),
            (r#"{"x":1,"x":2}"#, r#"{"x":1,"x":true}"#),
            (r#"{"x":true}"#, r#"{"x":true}"#),
        ];
        for (body, wanted) in cases {
            let body = Bytes::from_static(body.as_bytes());
            let members = Members::read(&body, 0).unwrap();
            let mut edits = Edits::default();
            edits.set(&body, &members, "x", b"true");
            assert_eq!(edits.apply(&body), wanted);
        }
    }

    #[test]
    fn of_equal_members_the_last_counts() {
        let body = br#"{"a":1,"b":2,"a":null}"#;
        let members = Members::read(body, 0).unwrap();
        assert_eq!(members.raw(body, "a"), None);
        assert_eq!(members.each().map(|(key, _)| key).collect::<Vec<_>>(), ["b", "a"]);
        assert!(members.is_set(body, "b") && !members.is_true(body, "b"));
    }
}
