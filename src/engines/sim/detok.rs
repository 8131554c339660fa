//! Ids to text as they come: incomplete characters wait, stop strings hold text back, as in vLLM.

use super::tokenizer;

/// Turns the ids of one sequence into text deltas.
#[derive(Debug)]
pub struct Detokenizer {
    /// Bytes not yet text, because their end is no whole character.
    pending: Vec<u8>,
    text: String,
    delivered: usize,
    /// Most characters that may still turn out to begin a stop string.
    hold_back: usize,
    skip_special: bool,
}

impl Detokenizer {
    /// For a sequence after `prompt`. As in the real engine, a prompt that ends inside a character
    /// makes the first delta repeat the whole prompt's text.
    pub fn new(prompt: &[u32], stop: &[String], include_stop: bool, skip_special: bool) -> Self {
        let longest = stop.iter().map(|stop| stop.chars().count()).max().unwrap_or(0);
        let hold_back = if include_stop { 0 } else { longest.saturating_sub(1) };
        let mut tail = Vec::new();
        for &id in &prompt[prompt.len().saturating_sub(8)..] {
            tokenizer::push_bytes(id, &mut tail);
        }
        let mut pending = Vec::new();
        if String::from_utf8_lossy(&tail).ends_with(char::REPLACEMENT_CHARACTER) {
            for &id in prompt.iter().filter(|id| !(skip_special && tokenizer::is_special(**id))) {
                tokenizer::push_bytes(id, &mut pending);
            }
        }
        Self { pending, text: String::new(), delivered: 0, hold_back, skip_special }
    }

    /// Takes one id in and returns how many bytes of text it completed.
    pub fn push(&mut self, id: u32) -> usize {
        if self.skip_special && tokenizer::is_special(id) {
            return 0;
        }
        tokenizer::push_bytes(id, &mut self.pending);
        let text = String::from_utf8_lossy(&self.pending);
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return 0;
        }
        let grown = text.len();
        self.text.push_str(&text);
        self.pending.clear();
        grown
    }

    /// Looks for a stop string that ends in the last `grown` bytes, cuts the text there and
    /// returns its index. The first one in list order wins.
    pub fn find_stop(&mut self, stop: &[String], grown: usize, include_stop: bool) -> Option<usize> {
        if grown == 0 {
            return None;
        }
        let old = self.text.len() - grown;
        let (index, end) = stop.iter().enumerate().find_map(|(index, stop)| {
            let mut from = old.saturating_sub(stop.len().saturating_sub(1));
            while !self.text.is_char_boundary(from) {
                from += 1;
            }
            let at = from + self.text[from..].find(stop.as_str())?;
            Some((index, if include_stop { at + stop.len() } else { at }))
        })?;
        self.text.truncate(end);
        Some(index)
    }

    /// The text that may be delivered now: everything once finished, else all but the held back end.
    pub fn take(&mut self, finished: bool) -> &str {
        let mut end = self.text.len();
        if !finished && self.hold_back > 0 {
            let held = self.text.char_indices().rev().nth(self.hold_back - 1);
            end = held.map_or(0, |(at, _)| at);
        }
        let start = self.delivered.min(self.text.len());
        if end <= start {
            return "";
        }
        self.delivered = end;
        &self.text[start..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deltas(text: &str, stop: &[&str], include: bool) -> (Vec<String>, Option<usize>) {
        let stop: Vec<String> = stop.iter().map(ToString::to_string).collect();
        let mut detok = Detokenizer::new(&[], &stop, include, true);
        let mut out = Vec::new();
        for id in tokenizer::encode(text) {
            let grown = detok.push(id);
            let hit = detok.find_stop(&stop, grown, include);
            out.push(detok.take(hit.is_some()).to_owned());
            if hit.is_some() {
                return (out, hit);
            }
        }
        out.push(detok.take(true).to_owned());
        (out, None)
    }

    #[test]
    fn an_incomplete_character_gives_an_empty_delta() {
        let (out, _) = deltas("a日b", &[], false);
        assert_eq!(out, ["a", "", "", "日", "b", ""]);
    }

    #[test]
    fn text_that_may_become_a_stop_string_is_held_back() {
        let (out, hit) = deltas("one-tw-three", &["-tw-"], false);
        assert_eq!((out.concat().as_str(), hit), ("one", Some(0)));
        let (out, hit) = deltas("one-tw-three", &["-tw-"], true);
        assert_eq!((out.concat().as_str(), hit), ("one-tw-", Some(0)));
        let (out, hit) = deltas("abcdef", &["xyz"], false);
        assert_eq!((out[0].as_str(), out.concat().as_str(), hit), ("a", "abcdef", None));
    }

    #[test]
    fn a_prompt_cut_inside_a_character_leaks_like_the_real_engine() {
        let ids = tokenizer::encode("the 日x");
        let mut detok = Detokenizer::new(&ids[..ids.len() - 2], &[], false, true);
        detok.push(ids[ids.len() - 2]);
        detok.push(ids[ids.len() - 1]);
        assert_eq!(detok.take(false), "the 日x");
    }
}
