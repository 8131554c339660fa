//! A reversible tokenizer: words, letter triples and numbers have ids, everything else goes byte by byte.
//!
//! Ids: `0` unknown, `1` `<|im_start|>`, `2` `<|im_end|>` (end of sequence), `3` `<s>` (begin of
//! sequence), `4..260` the 256 bytes, then the word list bare and with a leading space, the numbers
//! `00..99` and `000..999`, and all groups of one to three lower-case letters. A character outside
//! ASCII therefore takes two to four ids, and a cut between them leaves an incomplete character.

use std::collections::HashMap;
use std::sync::OnceLock;

use super::words::WORDS;

/// `<|im_start|>`: opens a message of the chat template.
pub const IM_START: u32 = 1;
/// `<|im_end|>`: closes a message; generated, it ends the sequence.
pub const EOS: u32 = 2;
/// `<s>`: put before every text prompt of `/v1/completions`.
pub const BOS: u32 = 3;
/// Id of byte 0; the others follow.
pub const FIRST_BYTE: u32 = 4;

const SPECIALS: [&str; 4] = ["<unk>", "<|im_start|>", "<|im_end|>", "<s>"];
const WORD_COUNT: u32 = WORDS.len() as u32;
const BARE_WORDS: u32 = FIRST_BYTE + 256;
/// Id of the first word with a leading space; the others follow.
pub const SPACED_WORDS: u32 = BARE_WORDS + WORD_COUNT;
const PAIRS_OF_DIGITS: u32 = SPACED_WORDS + WORD_COUNT;
const TRIPLES_OF_DIGITS: u32 = PAIRS_OF_DIGITS + 100;
const BARE_3: u32 = TRIPLES_OF_DIGITS + 1000;
const SPACED_3: u32 = BARE_3 + 26 * 26 * 26;
const BARE_2: u32 = SPACED_3 + 26 * 26 * 26;
const SPACED_2: u32 = BARE_2 + 26 * 26;
const SPACED_1: u32 = SPACED_2 + 26 * 26;
/// Number of ids; an id from here on is refused.
pub const VOCABULARY: u32 = SPACED_1 + 26;
/// How many words have ids of their own.
pub const WORD_TOKENS: u32 = WORD_COUNT;

fn word_ids() -> &'static HashMap<&'static [u8], u32> {
    static IDS: OnceLock<HashMap<&'static [u8], u32>> = OnceLock::new();
    IDS.get_or_init(|| WORDS.iter().zip(0..).map(|(word, index)| (word.as_bytes(), index)).collect())
}

/// Whether the id stands for a marker that never shows in generated text.
pub fn is_special(id: u32) -> bool {
    id < FIRST_BYTE
}

/// The ids of a text; markers of the chat template written out in it become their own ids.
pub fn encode(text: &str) -> Vec<u32> {
    let bytes = text.as_bytes();
    let mut ids = Vec::with_capacity(bytes.len() / 3 + 4);
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let (id, length) = next_token(&bytes[at..], byte);
        ids.push(id);
        at += length;
    }
    ids
}

/// The id of the piece that a non-empty text begins with, and how many bytes it takes.
fn next_token(rest: &[u8], byte: u8) -> (u32, usize) {
    if byte == b'<' {
        for (special, id) in SPECIALS.iter().zip(0..) {
            if rest.starts_with(special.as_bytes()) {
                return (id, special.len());
            }
        }
    }
    let space = usize::from(byte == b' ');
    let letters = run(&rest[space..], u8::is_ascii_lowercase);
    if letters > 0 {
        let word = &rest[space..space + letters];
        if let Some(index) = word_ids().get(word) {
            return (if space == 1 { SPACED_WORDS } else { BARE_WORDS } + index, space + letters);
        }
        let take = letters.min(3);
        // A text goes by one id, whatever follows it.
        if let Some(index) = word_ids().get(&word[..take]) {
            return (if space == 1 { SPACED_WORDS } else { BARE_WORDS } + index, space + take);
        }
        let code = word[..take].iter().fold(0, |code, letter| code * 26 + u32::from(letter - b'a'));
        let base = match (take, space) {
            (3, 0) => BARE_3,
            (3, _) => SPACED_3,
            (2, 0) => BARE_2,
            (2, _) => SPACED_2,
            (_, 0) => return (FIRST_BYTE + u32::from(byte), 1),
            _ => SPACED_1,
        };
        return (base + code, space + take);
    }
    let digits = run(rest, u8::is_ascii_digit).min(3);
    let number = rest[..digits].iter().fold(0, |number, digit| number * 10 + u32::from(digit - b'0'));
    match digits {
        3 => (TRIPLES_OF_DIGITS + number, 3),
        2 => (PAIRS_OF_DIGITS + number, 2),
        _ => (FIRST_BYTE + u32::from(byte), 1),
    }
}

fn run(bytes: &[u8], wanted: fn(&u8) -> bool) -> usize {
    bytes.iter().take_while(|byte| wanted(byte)).count()
}

/// Appends the bytes an id stands for; an id outside the vocabulary stands for none.
pub fn push_bytes(id: u32, out: &mut Vec<u8>) {
    let letters = |out: &mut Vec<u8>, spaced: bool, code: u32, count: u32| {
        if spaced {
            out.push(b' ');
        }
        for place in (0..count).rev() {
            // Always below 26, so the sum is a lower-case letter.
            out.push(b'a' + ((code / 26u32.pow(place)) % 26) as u8);
        }
    };
    match id {
        ..FIRST_BYTE => out.extend_from_slice(SPECIALS[id as usize].as_bytes()),
        FIRST_BYTE..BARE_WORDS => out.push((id - FIRST_BYTE) as u8),
        BARE_WORDS..SPACED_WORDS => out.extend_from_slice(WORDS[(id - BARE_WORDS) as usize].as_bytes()),
        SPACED_WORDS..PAIRS_OF_DIGITS => {
            out.push(b' ');
            out.extend_from_slice(WORDS[(id - SPACED_WORDS) as usize].as_bytes());
        }
        PAIRS_OF_DIGITS..TRIPLES_OF_DIGITS => {
            out.extend_from_slice(format!("{:02}", id - PAIRS_OF_DIGITS).as_bytes());
        }
        TRIPLES_OF_DIGITS..BARE_3 => {
            out.extend_from_slice(format!("{:03}", id - TRIPLES_OF_DIGITS).as_bytes());
        }
        BARE_3..SPACED_3 => letters(out, false, id - BARE_3, 3),
        SPACED_3..BARE_2 => letters(out, true, id - SPACED_3, 3),
        BARE_2..SPACED_2 => letters(out, false, id - BARE_2, 2),
        SPACED_2..SPACED_1 => letters(out, true, id - SPACED_2, 2),
        SPACED_1..VOCABULARY => letters(out, true, id - SPACED_1, 1),
        VOCABULARY.. => {}
    }
}

/// The text of a list of ids, incomplete characters replaced by U+FFFD.
pub fn decode(ids: &[u32], skip_special: bool) -> String {
    let mut bytes = Vec::with_capacity(ids.len() * 4);
    for &id in ids.iter().filter(|id| !(skip_special && is_special(**id))) {
        push_bytes(id, &mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The id as vLLM spells tokens in `token_strs`: byte-level BPE with `Ġ` for a space.
pub fn token_str(id: u32) -> String {
    let mut bytes = Vec::new();
    push_bytes(id, &mut bytes);
    bytes.iter().map(|byte| byte_char(*byte)).collect()
}

fn byte_char(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|lower| !printable(*lower)).count() as u32;
    char::from_u32(256 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`: taken as it is.
    pub role: String,
    /// Text parts, joined.
    pub content: String,
}

/// How the rendered chat ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatEnd {
    /// After the last message, closed.
    Closed,
    /// With an opened assistant message.
    GenerationPrompt,
    /// Inside the last message, which goes on.
    ContinueFinal,
}

/// The chat template: `<|im_start|>ROLE\nCONTENT<|im_end|>\n` for each message.
pub fn render_chat(messages: &[Message], end: ChatEnd) -> String {
    let mut text = String::new();
    for (index, message) in messages.iter().enumerate() {
        text.push_str("<|im_start|>");
        text.push_str(&message.role);
        text.push('\n');
        text.push_str(&message.content);
        if !(end == ChatEnd::ContinueFinal && index + 1 == messages.len()) {
            text.push_str("<|im_end|>\n");
        }
    }
    if end == ChatEnd::GenerationPrompt {
        text.push_str("<|im_start|>assistant\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_word_is_listed_once() {
        assert_eq!(word_ids().len(), WORDS.len());
    }

    #[test]
    fn characters_outside_ascii_take_several_ids() {
        assert_eq!(encode("日").len(), 3);
        assert_eq!(encode(" the"), vec![SPACED_WORDS]);
        assert_eq!(token_str(SPACED_WORDS), "Ġthe");
        assert_eq!(token_str(FIRST_BYTE + u32::from(b'\n')), "Ċ");
    }

    #[test]
    fn every_id_encodes_back_to_text_that_decodes_the_same() {
        for id in 0..VOCABULARY {
            let text = decode(&[id], false);
            if !text.contains('\u{fffd}') {
                assert_eq!(decode(&encode(&text), false), text, "id {id}");
            }
        }
    }

    proptest! {
        #[test]
        fn decoding_reverses_encoding(text in "\\PC*|[a-z0-9 \\n<>|_é日😀]{0,60}") {
            prop_assert_eq!(decode(&encode(&text), false), text);
        }
    }
}
