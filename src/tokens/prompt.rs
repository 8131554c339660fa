//! What is known of a request's prompt, and the hashes of its blocks.

use std::sync::Arc;

use crate::kv::hash::{LocalHash, Seed, local_hashes, text_hashes};

/// Bytes of text that count as one token where nobody counted: of English prose a token has a
/// little more, of code and other languages less.
pub const BYTES_PER_TOKEN: usize = 4;

/// Tokens of this many bytes, estimated.
pub fn estimate(bytes: usize) -> usize {
    bytes.div_ceil(BYTES_PER_TOKEN)
}

/// What the hashes are made of. Hashes of different sources never meet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Source {
    /// Token ids that the client sent.
    Ids,
    /// Token ids, from the tokenizer here.
    Tokenizer,
    /// Token ids that an engine told.
    Engine,
    /// Pieces of text.
    Text,
    /// Nothing: no prefix is known, and the length is an estimate.
    Unknown,
}

impl Source {
    /// All of them, in the order of their numbers.
    pub const ALL: [Source; 5] =
        [Source::Ids, Source::Tokenizer, Source::Engine, Source::Text, Source::Unknown];

    /// As it is called in metrics and traces.
    pub fn name(self) -> &'static str {
        match self {
            Source::Ids => "ids",
            Source::Tokenizer => "tokenizer",
            Source::Engine => "engine",
            Source::Text => "text",
            Source::Unknown => "unknown",
        }
    }
}

/// What of the prompt can be hashed.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Content {
    Ids(Arc<[u32]>),
    Text(Arc<[u8]>),
    Nothing,
}

/// A request's prompt as routing sees it. Cheap to clone.
///
/// Of several prompts in one request, which go to one worker together, the longest one stands for
/// all: it is what is looked up, with the length of all. The others come with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prompt {
    content: Content,
    /// Leading ids (or bytes of text) that are certain. What comes after stands behind a picture
    /// or the like, and the engine has other ids there.
    certain: usize,
    tokens: usize,
    /// The request's other prompts; `tokens` are theirs, too.
    others: Arc<[Prompt]>,
    /// Whether the certain ids are the whole prompt.
    whole: bool,
    seed: Seed,
    source: Source,
}

impl Prompt {
    /// Of token ids, all of them certain.
    pub fn of_ids(ids: impl Into<Arc<[u32]>>, seed: Seed, source: Source) -> Self {
        let ids = ids.into();
        Self {
            certain: ids.len(),
            tokens: ids.len(),
            others: Arc::default(),
            content: Content::Ids(ids),
            whole: true,
            seed,
            source,
        }
    }

    /// Of a text that nobody tokenises.
    pub fn of_text(text: impl Into<Arc<[u8]>>, seed: Seed) -> Self {
        let text = text.into();
        Self {
            certain: text.len(),
            tokens: estimate(text.len()),
            others: Arc::default(),
            content: Content::Text(text),
            whole: false,
            seed,
            source: Source::Text,
        }
    }

    /// Of nothing but an estimated length.
    pub fn unknown(tokens: usize, seed: Seed) -> Self {
        Self {
            content: Content::Nothing,
            certain: 0,
            tokens,
            others: Arc::default(),
            whole: false,
            seed,
            source: Source::Unknown,
        }
    }

    /// The same as the beginning of a longer one, of which the first `certain` ids (or bytes) are
    /// what the engine has, and which is estimated as `tokens` long.
    #[must_use]
    pub fn certain_up_to(mut self, certain: usize, tokens: usize) -> Self {
        self.certain = certain.min(self.certain);
        self.tokens = tokens.max(self.certain_tokens());
        self.whole = false;
        self
    }

    /// The same, with the other prompts of its request.
    #[must_use]
    pub fn with_others(mut self, others: Vec<Prompt>) -> Self {
        if !others.is_empty() {
            self.tokens = others.iter().fold(self.tokens, |sum, other| sum.saturating_add(other.tokens));
            self.whole = false;
            self.others = others.into();
        }
        self
    }

    /// The other prompts of its request.
    pub fn others(&self) -> &[Prompt] {
        &self.others
    }

    /// Tokens of the prompt that [`Prompt::key`] is of, without the other ones of the request.
    pub fn own_tokens(&self) -> usize {
        self.others.iter().fold(self.tokens, |rest, other| rest.saturating_sub(other.tokens))
    }

    fn certain_tokens(&self) -> usize {
        match self.content {
            Content::Ids(_) => self.certain,
            Content::Text(_) => estimate(self.certain),
            Content::Nothing => 0,
        }
    }

    /// Token ids, if there are any: all, including what is not certain.
    pub fn ids(&self) -> Option<&Arc<[u32]>> {
        match &self.content {
            Content::Ids(ids) => Some(ids),
            _ => None,
        }
    }

    /// Length of the whole request's prompts in tokens, counted or estimated.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// What the hashes are made of.
    pub fn source(&self) -> Source {
        self.source
    }

    /// What its blocks are kept apart by.
    pub fn seed(&self) -> Seed {
        self.seed
    }

    /// Whether the whole prompt is known by its token ids.
    pub fn is_exact(&self) -> bool {
        self.whole
    }

    /// Whether what comes behind it is known to come behind all of it: it is one prompt, whole.
    pub fn can_go_on(&self) -> bool {
        match &self.content {
            Content::Ids(_) => self.whole,
            Content::Text(text) => self.certain == text.len() && self.tokens == estimate(text.len()),
            Content::Nothing => false,
        }
    }

    /// Hashes of the full blocks that `more` ids bring behind those of [`Prompt::key`], of a prompt
    /// of ids that [can go on](Prompt::can_go_on). Reads the prompt's last block only.
    pub fn key_behind(&self, more: &[u32], block_size: usize) -> Vec<LocalHash> {
        let Content::Ids(ids) = &self.content else { return Vec::new() };
        local_hashes(&behind(ids, more, block_size), block_size, self.seed)
    }

    /// The same for a prompt of text.
    pub fn text_key_behind(&self, more: &[u8], block_size: usize) -> Vec<LocalHash> {
        let Content::Text(text) = &self.content else { return Vec::new() };
        let chunk = block_size.saturating_mul(BYTES_PER_TOKEN);
        text_hashes(&behind(text, more, chunk), chunk, self.seed)
    }

    /// Hashes for an engine with blocks of `block_size` tokens; none for 0. Costs one pass over
    /// the ids, some microseconds for thousands of tokens, and can be asked again for another
    /// size.
    pub fn key(&self, block_size: usize) -> PromptKey {
        let hashes = match &self.content {
            Content::Ids(ids) => local_hashes(&ids[..self.certain], block_size, self.seed),
            Content::Text(text) => {
                text_hashes(&text[..self.certain], block_size.saturating_mul(BYTES_PER_TOKEN), self.seed)
            }
            Content::Nothing => Vec::new(),
        };
        PromptKey {
            tokens: self.tokens,
            hashes,
            block_size,
            seed: self.seed,
            exact: self.is_exact(),
            source: self.source,
        }
    }
}

/// What of `whole` is in no full block, and `more`.
fn behind<T: Copy>(whole: &[T], more: &[T], block: usize) -> Vec<T> {
    let rest = whole.len().checked_rem(block).unwrap_or(0);
    [&whole[whole.len() - rest..], more].concat()
}

/// The blocks of a prompt, for one block size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PromptKey {
    /// Length in tokens, counted or estimated.
    pub tokens: usize,
    /// The full blocks that are certain, from the first one on.
    pub hashes: Vec<LocalHash>,
    /// Tokens of a block; of text it is [`BYTES_PER_TOKEN`] times as many bytes.
    pub block_size: usize,
    /// What the hashes were made with (text has a further term of its own).
    pub seed: Seed,
    /// Whether the whole prompt is known by its token ids, so that what the engine has cached
    /// can be foretold.
    pub exact: bool,
    /// What the hashes are made of.
    pub source: Source,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_prompt_serves_every_block_size() {
        let prompt = Prompt::of_ids((0..70).collect::<Vec<u32>>(), Seed::default(), Source::Ids);
        assert_eq!(prompt.key(16).hashes.len(), 4);
        assert_eq!(prompt.key(16).hashes[0], LocalHash(15310707395893867146));
        assert_eq!(prompt.key(32).hashes.len(), 2);
        assert_eq!(prompt.key(128).hashes, []);
        assert_eq!(prompt.key(0).hashes, []);
        assert!(prompt.key(16).exact);
    }

    #[test]
    fn what_stands_behind_a_picture_is_not_hashed() {
        let prompt = Prompt::of_ids((0..70).collect::<Vec<u32>>(), Seed::default(), Source::Tokenizer);
        let whole = prompt.key(16);
        let cut = prompt.certain_up_to(40, 900);
        assert_eq!(cut.key(16).hashes, whole.hashes[..2]);
        assert_eq!(cut.tokens(), 900);
        assert!(!cut.is_exact());
    }

    #[test]
    fn an_answer_goes_on_where_the_prompt_ends() {
        let ids: Vec<u32> = (0..200).collect();
        let text: Vec<u8> = (0..200).collect();
        for cut in [0, 1, 15, 16, 17, 64, 199, 200] {
            let prompt = Prompt::of_ids(&ids[..cut], Seed::new(Some("a"), None), Source::Ids);
            let whole = Prompt::of_ids(&ids[..], Seed::new(Some("a"), None), Source::Ids).key(16).hashes;
            let both = [prompt.key(16).hashes, prompt.key_behind(&ids[cut..], 16)].concat();
            assert_eq!(both, whole, "{cut}");
            let prompt = Prompt::of_text(&text[..cut], Seed::default());
            let whole = Prompt::of_text(&text[..], Seed::default()).key(4).hashes;
            let both = [prompt.key(4).hashes, prompt.text_key_behind(&text[cut..], 4)].concat();
            assert_eq!(both, whole, "{cut}");
            assert!(prompt.can_go_on() && prompt.key_behind(&ids, 16).is_empty());
            assert!(!prompt.clone().with_others(vec![Prompt::unknown(9, Seed::default())]).can_go_on());
        }
        assert!(Prompt::of_ids(&ids[..], Seed::default(), Source::Ids).key_behind(&ids, 0).is_empty());
        assert!(!Prompt::unknown(7, Seed::default()).can_go_on());
        assert!(!Prompt::of_ids(&ids[..], Seed::default(), Source::Ids).certain_up_to(50, 300).can_go_on());
    }

    #[test]
    fn text_has_blocks_of_its_own() {
        let prompt = Prompt::of_text(&b"a".repeat(200)[..], Seed::default());
        assert_eq!(prompt.key(16).hashes.len(), 3);
        assert_eq!(prompt.tokens(), 50);
        assert!(!prompt.is_exact());
        assert_eq!(Prompt::unknown(7, Seed::default()).key(16).hashes, []);
    }
}
