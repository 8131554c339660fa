//! What a second process must know of an event to continue behind it, as few bytes as possible.
//!
//! A stream's first entry begins with the version. An entry is a sequence of operations, each a
//! tag and its operands; numbers are varints, seven bits a byte, lowest first.

use super::stream::JournalError;

pub(super) const VERSION: u8 = 3;

/// What an entry says. Choices are the client's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Op<'a> {
    /// One token of choice 0: what nearly every event is.
    Token(u32),
    /// Tokens of a choice that are kept, all their text being delivered or held.
    Tokens(u32, Vec<u32>),
    /// Tokens of a choice whose ids are not known, or not kept.
    Uncounted(u32, u32),
    /// Text of a choice that is generated, but not delivered.
    Held(u32, &'a str),
    /// Where a choice's text goes now.
    Channel(u32, u8),
    /// Where the next token's text begins, as the engine counts, and whether it counts the text.
    Offset(u32, u64, bool),
    /// The first character of a choice's content that counts.
    Opening(u32, char),
    /// The end of the text of a chunk with several tokens, which may end inside a character, and
    /// how many characters there are at least up to there.
    Guard(u32, Option<(u64, &'a str)>),
    /// A choice got its role event.
    Role(u32),
    /// A choice is not finished, but generated to its end, for this reason.
    Ending(u32, &'a [u8], &'a [u8]),
    /// A choice is finished.
    Finished(u32),
    /// What every event of the stream has: id, created, model, and whether it is SGLang's.
    Head(&'a [u8], &'a [u8], &'a [u8], bool),
    /// `system_fingerprint`.
    Fingerprint(&'a [u8]),
    /// The ids of a prompt, counted as the request has them.
    Prompt(u32, Vec<u32>),
    /// The prompt's tokens as the engine counted them, and how many of them were cached, plus one.
    PromptTokens(u64, u64),
    /// Engines in a row that were lost before any choice said something.
    Setbacks(u32),
    /// Why it cannot be continued any more.
    Broken(u8),
    /// The usage event was delivered.
    UsageSent,
    /// The terminal event was delivered.
    Done,
    /// An event of a route that is not read.
    Passed,
    /// Engines in a row that were lost without getting on with a choice, as far as its tokens are
    /// written down before this.
    SetBack(u32, u32),
    /// That a choice does not reason was not seen, but taken from its siblings.
    Guessed(u32),
    /// Events without text that were delivered of a choice since its last token that is kept.
    Blanks(u32, u32),
}

pub(super) fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn text(text: &[u8], out: &mut Vec<u8>) {
    varint(text.len() as u64, out);
    out.extend_from_slice(text);
}

fn list(ids: &[u32], out: &mut Vec<u8>) {
    varint(ids.len() as u64, out);
    ids.iter().for_each(|id| varint((*id).into(), out));
}

impl Op<'_> {
    /// Appends the operation to an entry.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        let mut with = |tag: u8, numbers: &[u64]| {
            out.push(tag);
            numbers.iter().for_each(|number| varint(*number, out));
        };
        match self {
            Op::Token(id) => with(1, &[(*id).into()]),
            Op::Tokens(choice, ids) => {
                with(2, &[(*choice).into()]);
                list(ids, out);
            }
            Op::Uncounted(choice, count) => with(3, &[(*choice).into(), (*count).into()]),
            Op::Held(choice, held) => {
                with(4, &[(*choice).into()]);
                text(held.as_bytes(), out);
            }
            Op::Channel(choice, channel) => with(5, &[(*choice).into(), (*channel).into()]),
            Op::Offset(choice, next, by_text) => {
                with(6, &[(*choice).into(), *next, (*by_text).into()]);
            }
            Op::Opening(choice, first) => with(7, &[(*choice).into(), u32::from(*first).into()]),
            Op::Guard(choice, None) => with(8, &[(*choice).into()]),
            Op::Guard(choice, Some((characters, end))) => {
                with(9, &[(*choice).into(), *characters]);
                text(end.as_bytes(), out);
            }
            Op::Role(choice) => with(10, &[(*choice).into()]),
            Op::Ending(choice, reason, stop) => {
                with(11, &[(*choice).into()]);
                text(reason, out);
                text(stop, out);
            }
            Op::Finished(choice) => with(12, &[(*choice).into()]),
            Op::Head(id, created, model, sglang) => {
                with(13, &[(*sglang).into()]);
                [id, created, model].iter().for_each(|value| text(value, out));
            }
            Op::Fingerprint(value) => {
                with(14, &[]);
                text(value, out);
            }
            Op::Prompt(choice, ids) => {
                with(15, &[(*choice).into()]);
                list(ids, out);
            }
            Op::PromptTokens(prompt, cached) => with(16, &[*prompt, *cached]),
            Op::Setbacks(count) => with(17, &[(*count).into()]),
            Op::Broken(why) => with(18, &[(*why).into()]),
            Op::UsageSent => with(19, &[]),
            Op::Done => with(20, &[]),
            Op::Passed => with(21, &[]),
            Op::SetBack(choice, count) => with(22, &[(*choice).into(), (*count).into()]),
            Op::Guessed(choice) => with(23, &[(*choice).into()]),
            Op::Blanks(choice, count) => with(24, &[(*choice).into(), (*count).into()]),
        }
    }
}

/// Reads the operations of an entry.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(entry: &'a [u8]) -> Self {
        Self { rest: entry }
    }

    /// The version, of the first entry with operations.
    pub(super) fn version(&mut self) -> Result<(), JournalError> {
        match self.byte()? {
            VERSION => Ok(()),
            other => Err(JournalError::Version(other)),
        }
    }

    fn byte(&mut self) -> Result<u8, JournalError> {
        let (byte, rest) = self.rest.split_first().ok_or(JournalError::Damaged)?;
        self.rest = rest;
        Ok(*byte)
    }

    fn number(&mut self) -> Result<u64, JournalError> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(JournalError::Damaged)
    }

    fn small(&mut self) -> Result<u32, JournalError> {
        u32::try_from(self.number()?).map_err(|_| JournalError::Damaged)
    }

    fn bytes(&mut self) -> Result<&'a [u8], JournalError> {
        let length = usize::try_from(self.number()?).map_err(|_| JournalError::Damaged)?;
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(JournalError::Damaged)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<&'a str, JournalError> {
        std::str::from_utf8(self.bytes()?).map_err(|_| JournalError::Damaged)
    }

    fn ids(&mut self) -> Result<Vec<u32>, JournalError> {
        let count = usize::try_from(self.number()?).map_err(|_| JournalError::Damaged)?;
        // Every number takes a byte at least.
        if count > self.rest.len() {
            return Err(JournalError::Damaged);
        }
        (0..count).map(|_| self.small()).collect()
    }

    /// The next operation; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Op<'a>>, JournalError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let op = match self.byte()? {
            1 => Op::Token(self.small()?),
            2 => Op::Tokens(self.small()?, self.ids()?),
            3 => Op::Uncounted(self.small()?, self.small()?),
            4 => Op::Held(self.small()?, self.text()?),
            5 => Op::Channel(self.small()?, self.small()?.try_into().map_err(|_| JournalError::Damaged)?),
            6 => Op::Offset(self.small()?, self.number()?, self.small()? != 0),
            7 => Op::Opening(self.small()?, char::from_u32(self.small()?).ok_or(JournalError::Damaged)?),
            8 => Op::Guard(self.small()?, None),
            9 => Op::Guard(self.small()?, Some((self.number()?, self.text()?))),
            10 => Op::Role(self.small()?),
            11 => Op::Ending(self.small()?, self.bytes()?, self.bytes()?),
            12 => Op::Finished(self.small()?),
            13 => {
                let sglang = self.small()? != 0;
                Op::Head(self.bytes()?, self.bytes()?, self.bytes()?, sglang)
            }
            14 => Op::Fingerprint(self.bytes()?),
            15 => Op::Prompt(self.small()?, self.ids()?),
            16 => Op::PromptTokens(self.number()?, self.number()?),
            17 => Op::Setbacks(self.small()?),
            18 => Op::Broken(self.small()?.try_into().map_err(|_| JournalError::Damaged)?),
            19 => Op::UsageSent,
            20 => Op::Done,
            21 => Op::Passed,
            22 => Op::SetBack(self.small()?, self.small()?),
            23 => Op::Guessed(self.small()?),
            24 => Op::Blanks(self.small()?, self.small()?),
            _ => return Err(JournalError::Damaged),
        };
        Ok(Some(op))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_reads_back_and_what_is_cut_is_an_error() {
        let all = [
            Op::Token(151_643),
            Op::Tokens(2, vec![0, 127, 128, u32::MAX]),
            Op::Uncounted(1, 9),
            Op::Held(0, "日E"),
            Op::Channel(0, 2),
            Op::Offset(3, 300, true),
            Op::Opening(0, '{'),
            Op::Guard(1, None),
            Op::Guard(1, Some((300, "end"))),
            Op::Role(4),
            Op::Ending(0, b"\"stop\"", b"7"),
            Op::Finished(0),
            Op::Head(b"\"id\"", b"5", b"\"m\"", true),
            Op::Fingerprint(b"\"f\""),
            Op::Prompt(0, vec![1, 2, 3]),
            Op::PromptTokens(u64::MAX, 1),
            Op::Setbacks(2),
            Op::SetBack(1, 3),
            Op::Guessed(300),
            Op::Blanks(1, 2),
            Op::Broken(3),
            Op::UsageSent,
            Op::Done,
            Op::Passed,
        ];
        for op in &all {
            let mut entry = Vec::new();
            op.write(&mut entry);
            let mut reader = Reader::new(&entry);
            assert_eq!(reader.next().unwrap().as_ref(), Some(op));
            assert_eq!(reader.next(), Ok(None));
            for cut in 1..entry.len() {
                assert_eq!(Reader::new(&entry[..cut]).next(), Err(JournalError::Damaged), "{op:?}");
            }
        }
        let mut token = Vec::new();
        Op::Token(100_000).write(&mut token);
        assert!(token.len() <= 4);
        assert_eq!(Reader::new(&[99]).next(), Err(JournalError::Damaged));
        assert_eq!(Reader::new(&[1]).version(), Err(JournalError::Version(1)));
    }
}
