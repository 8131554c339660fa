//! Cut and cached, texts have the same ids as whole.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use tokenizers::Tokenizer;

use super::golden;
use crate::tokens::conversation::MEDIA;
use crate::tokens::segments::Segments;
use crate::tokens::tokenizer::TextTokenizer;

const KINDS: [&str; 5] = ["tiny/tokenizer", "metaspace_first", "prepend", "wordpiece", "unigram"];

fn reference(kind: &str) -> Tokenizer {
    Tokenizer::from_file(golden("tokenizer").join(format!("{kind}.json"))).unwrap()
}

fn ids(tokenizer: &Tokenizer, text: &str, special: bool) -> Vec<u32> {
    tokenizer.encode(text, special).unwrap().get_ids().to_vec()
}

/// Words between which a tokenizer splits, does not split, or swallows blanks.
fn text() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        4 => prop::sample::select(vec![
            "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "[INST]", "[/INST]",
            "<s>", "</s>", "<mask>", "<end>", "<end>x", "word", "wordy", "Normal Ised", "normal ised", "<|im_", "end|>",
        ]).prop_map(str::to_owned),
        3 => prop::sample::select(vec![" ", "\n", "  ", "\n\n", "\t", "\u{a0}", "\u{2028}", "▁"]).prop_map(str::to_owned),
        3 => "[a-zA-Z0-9 .,'\\n]{0,40}",
        1 => "\\PC{0,10}",
        // Long enough for a cut.
        2 => "[a-z ]{250,300}",
    ];
    prop::collection::vec(word, 0..40).prop_map(|words| words.concat())
}

/// A tokenizer as the library has it, and ours with a cache so small that pieces are thrown out
/// and come back.
fn kind(name: &'static str) -> &'static (Tokenizer, TextTokenizer) {
    static ALL: LazyLock<HashMap<&str, (Tokenizer, TextTokenizer)>> = LazyLock::new(|| {
        let both = KINDS.map(|name| {
            let whole = reference(name);
            let segments = Arc::new(Segments::new(16 << 10));
            let pieces = TextTokenizer::new(whole.clone(), None, segments, 7).unwrap();
            (name, (whole, pieces))
        });
        both.into_iter().collect()
    });
    &ALL[name]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_text_in_pieces_has_the_ids_of_the_whole(texts in prop::collection::vec(text(), 1..3), special: bool) {
        for name in KINDS {
            let (whole, pieces) = kind(name);
            // A conversation that grows.
            let mut grown = String::new();
            for text in &texts {
                grown.push_str(text);
                let expected = ids(whole, &grown, special);
                prop_assert_eq!(&pieces.encode(&grown, special).unwrap(), &expected, "{}", name);
                prop_assert_eq!(&pieces.encode(&grown, special).unwrap(), &expected, "{} again", name);
            }
        }
    }

    #[test]
    fn open_ids_begin_every_longer_text(text in text(), more in text(), special: bool) {
        for name in KINDS {
            let (whole, pieces) = kind(name);
            let open = pieces.encode_open(&text, special).unwrap();
            // What follows is the mark of a picture, which begins with no part of a token.
            let longer = ids(whole, &format!("{text}{MEDIA}{more}"), special);
            prop_assert!(longer.starts_with(&open), "{}: {:?} {:?}", name, open, longer);
        }
    }
}

#[test]
fn a_text_behind_others_is_not_treated_as_the_beginning_of_one() {
    for (name, turn) in [("tiny/tokenizer", "<|im_start|>assistant\n"), ("metaspace_first", "<s>")] {
        let (whole, pieces) = kind(name);
        for text in ["word and word", " word", "\n\nword", "", "7"] {
            let before = ids(whole, turn, false);
            let all = [before, pieces.encode_behind(text).unwrap()].concat();
            assert_eq!(all, ids(whole, &format!("{turn}{text}"), false), "{name} {text:?}");
        }
    }
    let (_, first) = kind("metaspace_first");
    let differs = |text| first.encode_behind(text).unwrap() != first.encode(text, false).unwrap();
    assert!(["a", "the", "word", "turn", "user"].into_iter().any(differs));
}

#[test]
fn a_conversations_next_turn_finds_its_beginning_in_the_cache() {
    let segments = Arc::new(Segments::new(1 << 20));
    let whole = reference("tiny/tokenizer");
    let pieces = TextTokenizer::new(whole.clone(), None, Arc::clone(&segments), 7).unwrap();
    let mut text = String::new();
    for turn in 0..10 {
        let words = format!("turn {turn} and some words more ").repeat(20);
        text.push_str(&format!("<|im_start|>user\n{words}<|im_end|>\n"));
        let before = segments.figures();
        assert_eq!(pieces.encode(&text, false).unwrap(), ids(&whole, &text, false));
        let after = segments.figures();
        assert!(after.missed_bytes - before.missed_bytes < 1500, "{before:?} {after:?}");
        if turn > 2 {
            assert!(after.hit_bytes - before.hit_bytes > 600 * (turn - 1), "{before:?} {after:?}");
        }
    }
}
