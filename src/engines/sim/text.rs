//! What the model says: the next token is a hash of the whole sequence so far and of nothing else.
//!
//! Generating `k` tokens and then continuing from prompt + `k` ids therefore yields exactly the
//! tokens that would have come. A sampling seed is mixed in when a token is drawn, never into the
//! sequence hash, so the same holds for a seeded request that is continued with its seed.

use super::tokenizer::{EOS, FIRST_BYTE, SPACED_WORDS, VOCABULARY, WORD_TOKENS};

/// Characters of more than one byte that the model likes to say.
const WIDE: [&str; 12] = ["é", "ß", "ñ", "Ω", "→", "€", "日", "本", "語", "😀", "🚀", "🦀"];
const PUNCTUATION: &[u8] = b".,;:!?-()\"'=*/";

/// Spreads the bits of a number over all of the result (splitmix64's finalizer).
pub fn mix(number: u64) -> u64 {
    let mut x = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A sequence as the model sees it: a hash over all ids, and the bytes of an unfinished character.
#[derive(Clone, Debug)]
pub struct TextState {
    hash: u64,
    pending: [u8; 4],
    pending_len: usize,
    draw: u64,
    /// What tells the choices of a request apart, by their first token only: behind it each goes on by itself,
    /// and so does whoever continues it. The length of the prompt, and which choice.
    first: (usize, u64),
    pushed: usize,
    eos_every: u64,
    /// What is wrong with the KV that the text is computed on; 0 if nothing is.
    twist: u64,
}

impl TextState {
    /// An empty sequence. `weights` stands for the model (and adapter), `draw` for the sampling
    /// seed (0 is greedy); one in `eos_every` tokens ends the text, 0 means none does.
    pub fn new(weights: u64, draw: u64, eos_every: u64) -> Self {
        Self {
            hash: mix(weights),
            pending: [0; 4],
            pending_len: 0,
            draw,
            first: (0, 0),
            pushed: 0,
            eos_every,
            twist: 0,
        }
    }

    /// Of the choice of this number, behind a prompt of this length.
    pub fn of_choice(self, choice: u64, prompt: usize) -> Self {
        Self { first: (prompt, choice), ..self }
    }

    /// The hash of what was appended so far: what the KV of the last id stands for.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// That hash with one more id.
    pub fn step(hash: u64, id: u32) -> u64 {
        mix(hash ^ u64::from(id))
    }

    /// Computes on from KV that is not what it should be, by this difference; 0 is none.
    pub fn twist(&mut self, difference: u64) {
        self.twist = difference;
    }

    /// Appends an id, of the prompt or generated.
    pub fn push(&mut self, id: u32) {
        self.hash = Self::step(self.hash, id);
        self.pushed += 1;
        let byte = id.checked_sub(FIRST_BYTE).and_then(|byte| u8::try_from(byte).ok());
        match byte {
            Some(lead @ 0xc2..=0xf4) => {
                self.pending[0] = lead;
                self.pending_len = 1;
            }
            Some(tail @ 0x80..=0xbf) if self.pending_len > 0 => {
                self.pending[self.pending_len] = tail;
                self.pending_len += 1;
                let pending = &self.pending[..self.pending_len];
                let incomplete = std::str::from_utf8(pending).is_err_and(|error| error.error_len().is_none());
                if !incomplete {
                    self.pending_len = 0;
                }
            }
            _ => self.pending_len = 0,
        }
    }

    /// The token that comes next; without `eos_allowed` never the end of the sequence.
    pub fn next(&self, eos_allowed: bool) -> u32 {
        let choice = if self.pushed == self.first.0 { self.first.1 } else { 0 };
        let dice = mix(self.hash ^ self.twist ^ mix(self.draw.wrapping_add(choice)));
        if self.pending_len > 0 {
            return FIRST_BYTE + u32::from(self.continuation_byte(dice));
        }
        if eos_allowed && self.eos_every > 0 && dice.is_multiple_of(self.eos_every) {
            return EOS;
        }
        let pick = (dice >> 32) as usize;
        let byte = match (dice >> 8) & 0x7f {
            0..3 => b'\n',
            3..8 => WIDE[pick % WIDE.len()].as_bytes()[0],
            8..16 => PUNCTUATION[pick % PUNCTUATION.len()],
            // Any piece at all, markers and bytes left out.
            16..24 => {
                let first = FIRST_BYTE + 256;
                return first + (dice >> 32) as u32 % (VOCABULARY - first);
            }
            _ => return SPACED_WORDS + (dice >> 32) as u32 % WORD_TOKENS,
        };
        FIRST_BYTE + u32::from(byte)
    }

    /// A byte that makes the pending ones a character, a favourite one if any begins like that.
    fn continuation_byte(&self, dice: u64) -> u8 {
        let pending = &self.pending[..self.pending_len];
        let known: Vec<u8> = WIDE
            .iter()
            .filter_map(|wide| wide.as_bytes().strip_prefix(pending).and_then(|rest| rest.first().copied()))
            .collect();
        if !known.is_empty() {
            return known[(dice >> 32) as usize % known.len()];
        }
        let (low, count) = match pending {
            [0xe0] => (0xa0, 0x20),
            [0xed] => (0x80, 0x20),
            [0xf0] => (0x90, 0x30),
            [0xf4] => (0x80, 0x10),
            _ => (0x80, 0x40),
        };
        low + ((dice >> 32) % count) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::decode;
    use super::*;

    fn generate(prompt: &[u32], count: usize, draw: u64) -> Vec<u32> {
        let mut state = TextState::new(7, draw, 0);
        prompt.iter().for_each(|id| state.push(*id));
        (0..count)
            .map(|_| {
                let id = state.next(true);
                state.push(id);
                id
            })
            .collect()
    }

    #[test]
    fn a_continuation_from_any_cut_says_the_same() {
        for draw in [0, 99] {
            let prompt = [1, 2, 300];
            let whole = generate(&prompt, 200, draw);
            for cut in 0..200 {
                let longer = [&prompt[..], &whole[..cut]].concat();
                assert_eq!(generate(&longer, 200 - cut, draw), whole[cut..]);
            }
        }
    }

    #[test]
    fn long_texts_are_valid_and_have_wide_characters_and_newlines() {
        let text = decode(&generate(&[5], 2000, 0)[..1990], false);
        assert!(!text.trim_end_matches('\u{fffd}').contains('\u{fffd}'));
        assert!(text.contains('\n') && !text.is_ascii());
    }

    #[test]
    fn an_end_comes_only_where_it_is_allowed() {
        let state = TextState::new(0, 0, 1);
        assert_eq!(state.next(true), EOS);
        assert_ne!(state.next(false), EOS);
    }
}
