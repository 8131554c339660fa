//! Text to token ids: the tokenizer of a model, and where its texts may be cut.
//!
//! A tokenizer first splits a text at its added tokens (`<|im_end|>` and the like) and then
//! treats what stands between them each by itself. So a text may be cut behind such a token and
//! both parts tokenised alone, with the same ids as the whole, provided that
//!
//! - the cuts are where the tokenizer itself splits: found with the same rule, leftmost and
//!   longest first, over the same set of tokens;
//! - the token stands in the text as it is (not normalised), needs no word's edge beside it, and
//!   swallows no blanks around it;
//! - a part other than the first one still does not stand at the beginning of a text, which some
//!   tokenizers treat specially: each is tokenised together with the token before it, whose id is
//!   dropped afterwards.
//!
//! Which tokens these are is tried out when a tokenizer is loaded.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::Tokenizer;

use super::segments::Segments;

/// Least bytes between two cuts: a chat's turns are longer, and an entry of the cache must be
/// worth its while.
const STEP: usize = 256;

/// The last piece of a text is kept from this length on. Only the very same prompt meets it
/// again, and the conversation's next turn cuts elsewhere.
const KEPT_TAIL: usize = 1024;

/// Ids before and behind a text.
type Around = (Vec<u32>, Vec<u32>);

/// A tokenizer that could not do its work.
#[derive(Debug, thiserror::Error)]
#[error("the tokenizer failed: {0}")]
pub struct EncodeError(String);

/// A model's tokenizer.
#[derive(Debug)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    splitter: Option<Splitter>,
    /// What `add_special_tokens` puts before and behind, where it is the same for every text.
    around: Option<Around>,
    segments: Arc<Segments>,
    seed: u64,
}

#[derive(Debug)]
struct Splitter {
    automaton: AhoCorasick,
    /// By pattern: the id of a token behind which a text may be cut.
    cuttable: Vec<Option<u32>>,
    /// One of them, with its text.
    one: (String, u32),
}

/// A piece of a text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    /// Where its tokenising begins: at the token before it, if there is one.
    from: usize,
    /// The id of that token.
    before: Option<u32>,
    /// Where it ends.
    to: usize,
}

impl TextTokenizer {
    /// Over `segments`, in which `seed` keeps it apart from others. `bos` overrides what the
    /// tokenizer says of a token at the beginning: `Some(None)` for none.
    pub fn new(
        mut tokenizer: Tokenizer,
        bos: Option<Option<u32>>,
        segments: Arc<Segments>,
        seed: u64,
    ) -> Result<Self, EncodeError> {
        let failed = |error: tokenizers::Error| EncodeError(error.to_string());
        // Engines bound prompts themselves, and pad none.
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);
        let splitter = splitter(&tokenizer);
        let mut around = around(&tokenizer)?;
        match (bos, &mut around) {
            (Some(None), Some((before, _))) => before.clear(),
            (Some(Some(bos)), Some((before, _))) if before.is_empty() => before.push(bos),
            _ => {}
        }
        Ok(Self { tokenizer, splitter, around, segments, seed })
    }

    /// Ids of a text. `special` asks for BOS and the like.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, EncodeError> {
        if !special {
            return self.pieces(text);
        }
        let Some((before, behind)) = &self.around else { return self.whole(text, true) };
        let mut ids = before.clone();
        ids.extend(self.pieces(text)?);
        ids.extend(behind);
        Ok(ids)
    }

    /// Ids of as much of a text as will not change whatever comes behind it.
    pub fn encode_open(&self, text: &str, special: bool) -> Result<Vec<u32>, EncodeError> {
        let last = self.splitter.as_ref().and_then(|splitter| splitter.cuts(text).last());
        let Some((_, end, _)) = last else { return Ok(Vec::new()) };
        let mut ids = match (&self.around, special) {
            (Some((before, _)), true) => before.clone(),
            (None, true) => return Ok(Vec::new()),
            (_, false) => Vec::new(),
        };
        ids.extend(self.pieces(&text[..end])?);
        Ok(ids)
    }

    /// Ids of a text that stands behind ids: with nothing that is done at the beginning of a text
    /// only.
    pub fn encode_behind(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let Some(Splitter { one: (token, id), .. }) = &self.splitter else { return self.whole(text, false) };
        let mut ids = self.whole(&[token, text].concat(), false)?;
        if ids.first() != Some(id) {
            return Err(EncodeError("a token that splits did not split".to_owned()));
        }
        ids.remove(0);
        Ok(ids)
    }

    /// The id of one token.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    fn whole(&self, text: &str, special: bool) -> Result<Vec<u32>, EncodeError> {
        let encoding =
            self.tokenizer.encode_fast(text, special).map_err(|error| EncodeError(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn pieces(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        let Some(splitter) = &self.splitter else { return self.whole(text, false) };
        let mut ids = Vec::with_capacity(text.len() / 3);
        let pieces = splitter.pieces(text);
        let last = pieces.len() - 1;
        for (at, piece) in pieces.into_iter().enumerate() {
            let text = &text[piece.from..piece.to];
            // Whether the token before it is there makes it another piece.
            let seed = self.seed.wrapping_add(u64::from(piece.before.is_some()));
            let kept = at < last || text.len() >= KEPT_TAIL;
            if kept && let Some(found) = self.segments.get(text, seed) {
                ids.extend_from_slice(&found);
                continue;
            }
            let new = self.whole(text, false)?;
            let new = match piece.before {
                None => &new[..],
                Some(before) => match new.split_first() {
                    Some((first, rest)) if *first == before => rest,
                    _ => return Err(EncodeError("a token that splits did not split".to_owned())),
                },
            };
            if kept {
                self.segments.put(text, seed, new);
            }
            ids.extend_from_slice(new);
        }
        Ok(ids)
    }
}

impl Splitter {
    /// Start, end and id of each token behind which `text` may be cut.
    fn cuts<'t>(&'t self, text: &'t str) -> impl Iterator<Item = (usize, usize, u32)> + 't {
        self.automaton.find_iter(text).filter_map(|found| {
            Some((found.start(), found.end(), self.cuttable[found.pattern().as_usize()]?))
        })
    }

    /// The pieces of a text, at least one. Where they end depends on what stands before only, so
    /// that texts with a common beginning have the same pieces there.
    fn pieces(&self, text: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let (mut piece, mut begin) = (Piece { from: 0, before: None, to: text.len() }, 0);
        for (start, end, id) in self.cuts(text) {
            if end - begin < STEP || end == text.len() {
                continue;
            }
            pieces.push(Piece { to: end, ..piece });
            (piece, begin) = (Piece { from: start, before: Some(id), to: text.len() }, end);
        }
        pieces.push(piece);
        pieces
    }
}

fn splitter(tokenizer: &Tokenizer) -> Option<Splitter> {
    let mut tokens: Vec<_> = tokenizer
        .get_added_tokens_decoder()
        .into_iter()
        .filter(|(_, token)| !token.normalized && !token.content.is_empty())
        .collect();
    tokens.sort_by_key(|(id, _)| *id);
    let cuttable: Vec<Option<u32>> = tokens
        .iter()
        .map(|(id, token)| {
            let plain = !token.single_word && !token.lstrip && !token.rstrip;
            let edges = token.content.trim() == token.content;
            let alone = || tokenizer.encode_fast(token.content.as_str(), false).ok();
            (plain && edges && alone()?.get_ids() == [*id]).then_some(*id)
        })
        .collect();
    let one =
        tokens.iter().zip(&cuttable).find_map(|((_, token), id)| Some((token.content.clone(), (*id)?)))?;
    let automaton = AhoCorasick::builder()
        .match_kind(MatchKind::LeftmostLongest)
        .build(tokens.iter().map(|(_, token)| token.content.as_str()))
        .ok()?;
    Some(Splitter { automaton, cuttable, one })
}

/// What the tokenizer puts around every text, tried out with some; `None` if it differs.
fn around(tokenizer: &Tokenizer) -> Result<Option<Around>, EncodeError> {
    let mut same: Option<Around> = None;
    for text in ["a", "two words, 7", "\n"] {
        let ids = |special| {
            let encoding = tokenizer.encode_fast(text, special).map_err(|e| EncodeError(e.to_string()))?;
            Ok(encoding.get_ids().to_vec())
        };
        let (plain, with) = (ids(false)?, ids(true)?);
        let Some(more) = with.len().checked_sub(plain.len()) else { return Ok(None) };
        let place = (0..=more).find(|at| with[*at..*at + plain.len()] == plain);
        let Some(place) = place else { return Ok(None) };
        let found = (with[..place].to_vec(), with[place + plain.len()..].to_vec());
        if same.as_ref().is_some_and(|same| *same != found) {
            return Ok(None);
        }
        same = Some(found);
    }
    Ok(same)
}
