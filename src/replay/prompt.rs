//! Prompts for a trace's ids: equal ids make equal text, or equal token ids.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::trace::Request;

/// Short common words, each of which is one token, with the space before it, for about every
/// tokenizer.
const WORDS: [&str; 64] = [
    "the", "of", "and", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with", "as",
    "his", "they", "be", "at", "one", "have", "this", "from", "or", "had", "by", "not", "but", "what",
    "some", "we", "can", "out", "other", "were", "all", "there", "when", "up", "use", "your", "how", "said",
    "an", "each", "she", "which", "do", "their", "time", "if", "will", "way", "about", "many", "then",
    "them", "would", "write", "like", "so", "these", "her",
];

/// The `nth` number of a block, below `below`.
fn draw(id: u64, nth: u64, below: u64) -> u64 {
    xxh3_64_with_seed(&nth.to_le_bytes(), id) % below
}

/// The same trace with other prompts: what one run leaves in caches, another one does not find.
pub fn of_run(run: u64, requests: &[Request]) -> Vec<Request> {
    let mut requests = requests.to_vec();
    let ids = requests.iter_mut().flat_map(|request| &mut request.ids).filter(|_| run > 0);
    ids.for_each(|id| *id = xxh3_64_with_seed(&id.to_le_bytes(), run));
    requests
}

/// How much of each block a prompt has: all of it, but of the last.
fn parts(request: &Request, block_size: u32, tokens: u32) -> impl Iterator<Item = (u64, u64)> {
    let mut left = request.input;
    request.ids.iter().map(move |id| {
        let part = left.min(block_size);
        left -= part;
        // Never nothing, so that each prompt has something in it.
        (*id, (u64::from(part) * u64::from(tokens)).div_ceil(u64::from(block_size)))
    })
}

/// The prompt as words, `tokens` for each full block of the trace.
pub fn text(request: &Request, block_size: u32, tokens: u32) -> String {
    let mut text = String::new();
    for (id, part) in parts(request, block_size, tokens) {
        for nth in 0..part {
            if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(WORDS[draw(id, nth, WORDS.len() as u64) as usize]);
        }
    }
    text
}

/// The prompt as token ids below `vocabulary`, without the first few, which tend to be special.
pub fn token_ids(request: &Request, block_size: u32, tokens: u32, vocabulary: u32) -> Vec<u32> {
    let first = SPECIAL.min(vocabulary.saturating_sub(1));
    let below = u64::from(vocabulary - first).max(1);
    parts(request, block_size, tokens)
        .flat_map(|(id, part)| (0..part).map(move |nth| first + draw(id, nth, below) as u32))
        .collect()
}

/// Ids that are left out: those of special tokens, in many vocabularies.
const SPECIAL: u32 = 300;

#[cfg(test)]
mod tests {
    use super::*;

    fn request(ids: &[u64], input: u32) -> Request {
        Request { at: 0.0, input, output: 1, ids: ids.to_vec(), hashes: Vec::new() }
    }

    #[test]
    fn another_run_has_prompts_of_its_own_that_share_as_much_with_each_other() {
        let request =
            |ids: &[u64]| Request { at: 0.0, input: 32, output: 1, ids: ids.to_vec(), hashes: Vec::new() };
        let trace = [request(&[1, 2]), request(&[1, 3])];
        assert_eq!(of_run(0, &trace), trace);
        let texts = |run| of_run(run, &trace).iter().map(|r| text(r, 16, 16)).collect::<Vec<_>>();
        let (first, second) = (texts(0), texts(1));
        let half = |text: &str| text.split(' ').take(16).collect::<Vec<_>>().join(" ");
        assert!(half(&first[0]) != half(&second[0]) && half(&second[0]) == half(&second[1]));
        assert_ne!(second[0], second[1]);
    }

    #[test]
    fn equal_ids_make_equal_beginnings_and_others_do_not() {
        let (a, b) = (request(&[1, 2, 3], 20), request(&[1, 2, 9], 24));
        let (a, b) = (token_ids(&a, 8, 8, 1000), token_ids(&b, 8, 8, 1000));
        assert_eq!((a.len(), b.len()), (20, 24));
        assert_eq!(a[..16], b[..16]);
        assert_ne!(a[16..20], b[16..20]);
        assert!(a.iter().all(|id| (300..1000).contains(id)));
    }

    #[test]
    fn text_has_a_word_a_token_and_can_be_shrunk() {
        let asked = request(&[1, 2, 3], 20);
        assert_eq!(text(&asked, 8, 8).split(' ').count(), 20);
        assert_eq!(text(&asked, 8, 4).split(' ').count(), 10);
        assert_eq!(text(&request(&[1], 1), 8, 1), text(&request(&[1], 8), 8, 1));
        assert_eq!(token_ids(&asked, 8, 8, 1).len(), 20);
    }
}
