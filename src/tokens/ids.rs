//! A prompt of token ids, lifted out of the body that it is in: thousands of numbers are read once,
//! by a loop that knows nothing but digits, and whoever reads the rest of the body finds an empty
//! list in their place.

use std::sync::Arc;

use memchr::memmem::Finder;

use super::request::Form;

/// Largest body that is looked at: some ten thousand ids, read within 100 µs.
pub const MOST_LIFTED: usize = 64 << 10;

/// Below this many bytes it is not worth while.
const LEAST_LIFTED: usize = 256;

/// A body without the ids of its prompt, and the ids.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lifted {
    /// The body with `[]` in place of the ids.
    pub rest: Vec<u8>,
    /// The member whose value they are. It stands in the body once, written just so; whether at the
    /// top of it, the reader of the rest has to see.
    pub key: &'static str,
    /// They.
    pub ids: Arc<[u32]>,
    /// Length of the body as it came.
    pub length: usize,
}

/// Takes the ids out of a body. `None` where there are none, or anything about them is not as
/// usual: then the whole body is to be read as it is.
pub fn lift(form: Form, body: &[u8]) -> Option<Lifted> {
    let (key, quoted) = match form {
        Form::Completions => ("prompt", "\"prompt\""),
        Form::TokenIds => ("token_ids", "\"token_ids\""),
        Form::Generate => ("input_ids", "\"input_ids\""),
        _ => return None,
    };
    if !(LEAST_LIFTED..=MOST_LIFTED).contains(&body.len()) {
        return None;
    }
    let finder = Finder::new(quoted);
    let at = finder.find(body)?;
    // A quote that is part of a text; any other place makes it a member's name, or the body no JSON,
    // which whoever reads the rest will see.
    if at.checked_sub(1).is_some_and(|before| body[before] == b'\\') {
        return None;
    }
    let colon = skip_blanks(body, at + quoted.len());
    if body.get(colon) != Some(&b':') {
        return None;
    }
    let from = skip_blanks(body, colon + 1);
    let (ids, length) = scan(body.get(from..)?)?;
    let (before, behind) = (&body[..from], &body[from + length..]);
    if finder.find(behind).is_some() {
        return None;
    }
    let rest = [before, b"[]", behind].concat();
    Some(Lifted { rest, key, ids: ids.into(), length: body.len() })
}

/// Reads a list of token ids that a text begins with, and how long it is. `None` for an empty one,
/// and for anything that is not a plain list of whole numbers of 32 bits as JSON writes them.
pub fn scan(text: &[u8]) -> Option<(Vec<u32>, usize)> {
    if text.first() != Some(&b'[') {
        return None;
    }
    let mut ids = Vec::with_capacity(text.len().min(MOST_LIFTED) / 6);
    let mut at = 1;
    loop {
        at = skip_blanks(text, at);
        let begin = at;
        let mut id = 0_u64;
        while let Some(digit) = text.get(at).map(|byte| byte.wrapping_sub(b'0')).filter(|digit| *digit <= 9) {
            id = id * 10 + u64::from(digit);
            // Before it can overflow.
            if id > u64::from(u32::MAX) {
                return None;
            }
            at += 1;
        }
        let digits = at - begin;
        if digits == 0 || (digits > 1 && text[begin] == b'0') {
            return None;
        }
        ids.push(id as u32);
        at = skip_blanks(text, at);
        match text.get(at)? {
            b',' => at += 1,
            b']' => return Some((ids, at + 1)),
            _ => return None,
        }
    }
}

/// The next byte from `at` on that is no blank.
#[inline]
fn skip_blanks(text: &[u8], mut at: usize) -> usize {
    while matches!(text.get(at), Some(b' ' | b'\n' | b'\t' | b'\r')) {
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_lists_are_read_and_nothing_else() {
        assert_eq!(scan(b"[0]"), Some((vec![0], 3)));
        assert_eq!(scan(b"[ 1,\n\t20 , 4294967295 ] , x"), Some((vec![1, 20, u32::MAX], 23)));
        for other in [
            "",
            "[",
            "[]",
            "[ ]",
            "[1",
            "[1,",
            "[1,]",
            "[,1]",
            "[1 2]",
            "[01]",
            "[00]",
            "[-1]",
            "[-0]",
            "[1.0]",
            "[1e3]",
            "[4294967296]",
            "[99999999999999999999999]",
            "[\"1\"]",
            "[[1]]",
            "[1,[2]]",
            "[null]",
            "[true]",
            "1",
            " [1]",
            "[+1]",
            "[1;2]",
            "[0x1]",
            "[\u{a0}1]",
        ] {
            assert_eq!(scan(other.as_bytes()), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_a_reader_of_json_reads(text in "\\[[0-9 ,.\\-e\\]\\[]{0,30}") {
            let mut reader = serde_json::Deserializer::from_str(&text).into_iter::<Vec<u32>>();
            match (scan(text.as_bytes()), reader.next()) {
                (Some((ids, length)), Some(Ok(read))) => {
                    prop_assert_eq!(ids, read);
                    prop_assert_eq!(length, reader.byte_offset());
                }
                (Some(_), _) => prop_assert!(false, "{} is no list of ids", text),
                // Empty lists, and nothing that would be a list of ids.
                (None, Some(Ok(read))) => prop_assert!(read.is_empty(), "{}", text),
                (None, _) => {}
            }
        }

        #[test]
        fn lists_of_ids_are_read(ids in prop::collection::vec(any::<u32>(), 1..50), blank in "[ \n]{0,2}") {
            let numbers: Vec<String> = ids.iter().map(u32::to_string).collect();
            let text = format!("[{blank}{}{blank}]", numbers.join(&format!("{blank},{blank}")));
            let length = text.len();
            prop_assert_eq!(scan(text.as_bytes()), Some((ids, length)));
        }
    }

    fn padded(body: &str) -> String {
        format!("{body}{}", " ".repeat(LEAST_LIFTED))
    }

    #[test]
    fn ids_are_lifted_where_they_can_be_no_other_members() {
        let lifted = lift(Form::Completions, padded(r#"{"model":"m","prompt" : [7,8], "n":1}"#).as_bytes());
        let lifted = lifted.unwrap();
        assert_eq!((lifted.key, &lifted.ids[..]), ("prompt", &[7, 8][..]));
        assert_eq!(lifted.rest, padded(r#"{"model":"m","prompt" : [], "n":1}"#).as_bytes());
        for other in [
            r#"{"prompt":"text"}"#,
            r#"{"prompt":[[1],[2]]}"#,
            r#"{"prompt":[1,-2]}"#,
            r#"{"prompt":[1],"prompt":[2]}"#,
            r#"{"prompt":[1],"stop":"prompt"}"#,
            r#"{"x\"prompt":[1]}"#,
            r#"{"input":[1]}"#,
        ] {
            assert_eq!(lift(Form::Completions, padded(other).as_bytes()), None, "{other}");
        }
        assert_eq!(lift(Form::Completions, br#"{"prompt":[1]}"#), None, "not worth while");
        assert_eq!(lift(Form::Chat, padded(r#"{"prompt":[1]}"#).as_bytes()), None);
        let large = format!(r#"{{"prompt":[1]{}}}"#, " ".repeat(MOST_LIFTED));
        assert_eq!(lift(Form::Completions, large.as_bytes()), None);
    }
}
