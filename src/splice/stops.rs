//! Strings that are looked for in text that comes in pieces.

/// A string that was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Hit {
    /// Which one.
    pub(super) which: usize,
    /// Where it begins and ends, in bytes.
    pub(super) start: usize,
    pub(super) end: usize,
}

/// The first of `needles`, in their order, that ends behind the first `old` bytes of `text`.
pub(super) fn find(needles: &[String], text: &str, old: usize) -> Option<Hit> {
    each(needles, text, old).next()
}

/// Where each of `needles` that ends behind the first `old` bytes of `text` does so first, in their order.
pub(super) fn each<'a>(needles: &'a [String], text: &'a str, old: usize) -> impl Iterator<Item = Hit> + 'a {
    needles.iter().enumerate().filter_map(move |(which, needle)| {
        let mut from = (old + 1).saturating_sub(needle.len());
        while !text.is_char_boundary(from) {
            from -= 1;
        }
        let mut start = from + text.get(from..)?.find(needle.as_str())?;
        while start + needle.len() <= old {
            let next = start + text[start..].chars().next().map_or(1, char::len_utf8);
            start = next + text[next..].find(needle.as_str())?;
        }
        Some(Hit { which, start, end: start + needle.len() })
    })
}

/// Where the longest end of `text` begins that may still become one of `needles`; its length if
/// there is none.
pub(super) fn held<'a>(needles: impl Iterator<Item = &'a str>, text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut held = 0;
    for needle in needles {
        let needle = needle.as_bytes();
        let longest = needle.len().saturating_sub(1).min(bytes.len());
        // A needle is text, and so is what is held of it: characters are never cut, as no
        // character's end is the beginning of another.
        if let Some(found) = (held + 1..=longest).rev().find(|length| bytes.ends_with(&needle[..*length])) {
            held = found;
        }
    }
    let mut at = text.len() - held;
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_what_may_still_become_a_needle_is_held() {
        let held_of = |needles: &[&str], text: &str| text[held(needles.iter().copied(), text)..].to_owned();
        assert_eq!(held_of(&["END"], "text"), "");
        assert_eq!(held_of(&["END"], "text EN"), "EN");
        assert_eq!(held_of(&["END"], "END"), "");
        assert_eq!(held_of(&["aab"], "aaa"), "aa");
        assert_eq!(held_of(&["xy", "abcd"], "zabc"), "abc");
        assert_eq!(held_of(&["日本"], "a日"), "日");
        assert_eq!(held_of(&["x"], "x"), "");
        assert_eq!(held_of(&[], "x"), "");
    }

    #[test]
    fn a_needle_counts_where_it_ends_in_new_text_and_the_first_in_the_list_wins() {
        let needles = strings(&["lo w", "hello"]);
        assert_eq!(find(&needles, "hello world", 0).map(|hit| hit.which), Some(0));
        assert_eq!(find(&needles, "hello", 4), Some(Hit { which: 1, start: 0, end: 5 }));
        assert_eq!(find(&needles, "hello", 5), None);
        let both: Vec<_> = each(&needles, "hello world", 0).map(|hit| (hit.which, hit.end)).collect();
        assert_eq!(both, [(0, 7), (1, 5)]);
        assert_eq!(find(&strings(&["aa"]), "aaaa", 2), Some(Hit { which: 0, start: 1, end: 3 }));
        assert_eq!(find(&strings(&["é"]), "éé", 2), Some(Hit { which: 0, start: 2, end: 4 }));
        assert_eq!(find(&strings(&["b"]), "日本b", 3), Some(Hit { which: 0, start: 6, end: 7 }));
    }
}
