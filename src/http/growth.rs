//! How long the output of a running request is, as far as its event stream shows, and how many KV
//! blocks that fills.
//!
//! An event is taken for a token: events end with an empty line, and counting those is all that is
//! done with most chunks. An engine that puts several tokens into one event, and says how many
//! there were so far (`stream_options.continuous_usage_stats`), is believed; that is looked for
//! once in a block.

use memchr::{memchr_iter, memmem};

/// What engines call the length of the output so far.
const USAGE: &[u8] = b"\"completion_tokens\":";

/// The output of one request.
#[derive(Debug)]
pub(super) struct Growth {
    block: u64,
    /// Tokens that fit into the blocks that are booked.
    room: u64,
    /// Tokens of prompt and output so far.
    tokens: u64,
    prompt: u64,
    /// Something stands in the last line, which has not ended.
    in_line: bool,
    /// A line with something in it has ended since the last event did.
    in_event: bool,
    /// Each piece ends with NUL, and there are no lines.
    in_frames: bool,
}

impl Growth {
    /// After a prompt whose blocks, the last one perhaps not full, are booked.
    pub(super) fn new(prompt_tokens: u32, block_size: u32) -> Self {
        let (prompt, block) = (u64::from(prompt_tokens), u64::from(block_size.max(1)));
        Self {
            block,
            room: prompt.next_multiple_of(block),
            tokens: prompt,
            prompt,
            in_line: false,
            in_event: false,
            in_frames: false,
        }
    }

    /// The same of a stream of frames, each of which ends with NUL and has another token.
    pub(super) fn of_frames(prompt_tokens: u32, block_size: u32) -> Self {
        Self { in_frames: true, ..Self::new(prompt_tokens, block_size) }
    }

    /// Takes note of a piece of the stream; how many blocks more are needed now.
    pub(super) fn push(&mut self, data: &[u8]) -> u32 {
        self.tokens += match self.in_frames {
            true => memchr_iter(0, data).count() as u64,
            false => self.events(data),
        };
        if self.tokens <= self.room {
            return 0;
        }
        if let Some(told) = told(data).filter(|_| !self.in_frames) {
            self.tokens = self.tokens.max(self.prompt.saturating_add(told));
        }
        let blocks = (self.tokens - self.room).div_ceil(self.block);
        self.room += blocks * self.block;
        u32::try_from(blocks).unwrap_or(u32::MAX)
    }

    /// How many events end in `data`: with an empty line after others.
    fn events(&mut self, data: &[u8]) -> u64 {
        let (mut ended, mut from) = (0, 0);
        for at in memchr_iter(b'\n', data) {
            if std::mem::take(&mut self.in_line) || has_text(&data[from..at]) {
                self.in_event = true;
            } else if std::mem::take(&mut self.in_event) {
                ended += 1;
            }
            from = at + 1;
        }
        self.in_line |= has_text(&data[from..]);
        ended
    }
}

/// Whether this part of a line is more than the beginning of its end.
fn has_text(line: &[u8]) -> bool {
    !matches!(line, [] | [b'\r'])
}

/// The length of the output, if this piece says it.
fn told(data: &[u8]) -> Option<u64> {
    let at = memmem::rfind(data, USAGE)? + USAGE.len();
    let digits = data[at..].trim_ascii_start();
    let end = digits.iter().position(|byte| !byte.is_ascii_digit())?;
    // More than any model has is a mistake that must not be booked.
    std::str::from_utf8(&digits[..end]).ok()?.parse().ok().filter(|tokens| *tokens <= MOST_TOLD)
}

/// Longest output that is believed.
const MOST_TOLD: u64 = 1 << 24;

#[cfg(test)]
mod tests {
    use super::*;

    fn grown(growth: &mut Growth, text: &[u8], step: usize) -> u32 {
        text.chunks(step).map(|chunk| growth.push(chunk)).sum()
    }

    #[test]
    fn a_block_is_added_when_the_last_one_is_full_however_the_stream_is_cut() {
        for end in ["\n\n", "\r\n\r\n", "\n\n\n"] {
            let text = format!("event: x\ndata: {{\"t\":1}}{end}").repeat(33);
            for step in 1..40 {
                // 10 of 16 are taken: 6 fit, and two more blocks hold 32.
                let mut growth = Growth::new(10, 16);
                assert_eq!(grown(&mut growth, text.as_bytes(), step), 2, "{end:?} {step}");
                assert_eq!(growth.tokens, 43, "{end:?} {step}");
            }
        }
    }

    #[test]
    fn each_frame_counts_as_a_token() {
        let text = b"{\"completion_tokens\":400}\0".repeat(33);
        for step in 1..40 {
            let mut growth = Growth::of_frames(10, 16);
            assert_eq!(grown(&mut growth, &text, step), 2, "{step}");
        }
    }

    #[test]
    fn a_full_last_block_is_followed_by_another_with_the_first_token() {
        let mut growth = Growth::new(32, 16);
        assert_eq!(growth.push(b"data: {}\n"), 0);
        assert_eq!(growth.push(b"\n"), 1);
        assert_eq!(grown(&mut growth, "data: {}\n\n".repeat(15).as_bytes(), 7), 0);
        assert_eq!(growth.push(b"data: {}\n\n"), 1);
    }

    #[test]
    fn an_engine_that_tells_the_length_is_believed_within_reason() {
        let event = |tokens: &str| {
            format!("data: {{\"usage\":{{\"prompt_tokens\":16,\"completion_tokens\": {tokens}}}}}\n\n")
        };
        let mut growth = Growth::new(16, 16);
        assert_eq!(growth.push(event("40").as_bytes()), 3);
        assert_eq!(growth.push(event("41").as_bytes()), 0);
        // Nonsense is an event like any other.
        for wrong in ["99999999999999999999999", "-1", "", "1e9999", "999999999"] {
            let mut growth = Growth::new(16, 16);
            assert!(growth.push(event(wrong).as_bytes()) <= 1, "{wrong}");
        }
        let mut growth = Growth::new(16, 16);
        assert_eq!(growth.push(b"data: \"completion_tokens\":12\n\ndata: {\"completion_tokens\":"), 1);
        assert_eq!(growth.tokens, 17, "a number that is cut off is none");
    }
}
