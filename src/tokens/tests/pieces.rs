//! Cut and cached, texts have the same ids as whole.

use std::sync::Arc;

use proptest::prelude::*;
use tokenizers::Tokenizer;

use super::golden;
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_text_in_pieces_has_the_ids_of_the_whole(texts in prop::collection::vec(text(), 1..4), special: bool) {
        for kind in KINDS {
            let whole = reference_of(kind);
            // Small enough that pieces are thrown out and come back.
            let segments = Arc::new(Segments::new(4096));
            let pieces = TextTokenizer::new(whole.clone(), None, segments, 7).unwrap();
            for text in &texts {
                prop_assert_eq!(pieces.encode(text, special).unwrap(), ids(&whole, text, special), "{}", kind);
            }
            // A conversation that grows.
            let grown = texts.concat();
            for _ in 0..2 {
                prop_assert_eq!(pieces.encode(&grown, special).unwrap(), ids(&whole, &grown, special), "{}", kind);
            }
        }
    }

    #[test]
    fn open_ids_begin_every_longer_text(text in text(), more in text(), special: bool) {
        for kind in KINDS {
            let whole = reference_of(kind);
            let pieces = TextTokenizer::new(whole.clone(), None, Arc::new(Segments::new(0)), 7).unwrap();
            let open = pieces.encode_open(&text, special).unwrap();
            // What follows is the engine's mark of a picture, which begins with no part of a token.
            let longer = ids(&whole, &format!("{text}{}{more}", crate::tokens::conversation::MEDIA), special);
            prop_assert!(longer.starts_with(&open), "{}: {:?} {:?}", kind, open, longer);
        }
    }
}

fn reference_of(kind: &'static str) -> Tokenizer {
    use std::collections::HashMap;
    use std::sync::{LazyLock, Mutex};
    static LOADED: LazyLock<Mutex<HashMap<&str, Tokenizer>>> = LazyLock::new(Mutex::default);
    let mut loaded = LOADED.lock().unwrap();
    loaded.entry(kind).or_insert_with(|| reference(kind)).clone()
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
