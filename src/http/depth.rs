//! How deeply a JSON body is nested, told without building it: readers behind us may recurse.

/// Deepest nesting of a request body; ordinary requests with tool schemas stay below 20.
pub(super) const MAX_DEPTH: usize = 64;

/// Whether lists and objects are nested at most [`MAX_DEPTH`] deep. Means nothing for what is no
/// JSON.
pub(super) fn is_shallow(body: &[u8]) -> bool {
    // Few brackets cannot nest deeply, wherever they are. Counting is many times faster than
    // following, and enough for most bodies.
    let opened = memchr::memchr2_iter(b'[', b'{', body).take(MAX_DEPTH + 1).count();
    opened <= MAX_DEPTH || depth(body) <= MAX_DEPTH
}

/// The deepest nesting.
fn depth(body: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let mut bytes = body.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => skip_text(&mut bytes),
            _ => {}
        }
    }
    deepest
}

/// Goes on behind the quote that ends a text.
fn skip_text(bytes: &mut std::slice::Iter<'_, u8>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            // Whatever is escaped, it is no end.
            b'\\' => {
                bytes.next();
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn naive(value: &Value) -> usize {
        match value {
            Value::Array(items) => 1 + items.iter().map(naive).max().unwrap_or(0),
            Value::Object(members) => 1 + members.values().map(naive).max().unwrap_or(0),
            _ => 0,
        }
    }

    fn json() -> impl Strategy<Value = Value> {
        let text = || "[\\[\\]{}\"\\\\a/é]{0,6}";
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            text().prop_map(Value::from),
        ];
        leaf.prop_recursive(8, 64, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(text(), inner, 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_depth_is_that_of_the_parsed_value(value in json(), pretty: bool) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            prop_assert_eq!(depth(text.unwrap().as_bytes()), naive(&value));
        }

        #[test]
        fn any_bytes_are_looked_at_without_harm(bytes: Vec<u8>) {
            let opened = bytes.iter().filter(|b| matches!(b, b'[' | b'{')).count();
            prop_assert!(depth(&bytes) <= opened);
        }
    }

    #[test]
    fn the_limit_is_exact_and_brackets_in_texts_do_not_count() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(is_shallow(nested(MAX_DEPTH).as_bytes()));
        assert!(!is_shallow(nested(MAX_DEPTH + 1).as_bytes()));
        assert!(is_shallow(format!("\"{}\"", "[".repeat(1000)).as_bytes()));
        assert!(is_shallow(format!("[{}[]]", "[],".repeat(1000)).as_bytes()));
        assert!(!is_shallow("[".repeat(1_000_000).as_bytes()));
    }
}
