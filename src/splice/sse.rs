//! Server-sent events out of bytes that come in pieces.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use memchr::memchr2;

/// One event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// The value of its last `event:` line.
    pub name: Option<Bytes>,
    /// The values of its `data:` lines, joined by LF.
    pub data: Bytes,
    /// The event as it is passed on: its `event:` line and its `data:` lines, each with LF.
    /// Comments, ids, retries and unknown fields are left out.
    pub lines: Bytes,
}

impl Event {
    /// An unnamed event with this data, which has no line breaks.
    pub fn unnamed(data: Bytes) -> Self {
        let lines = [b"data: ", &data[..], b"\n"].concat().into();
        Self { name: None, data, lines }
    }
}

/// An event is longer than the bound; the stream is of no use any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("an event is longer than {0} bytes")]
pub struct TooLong(pub usize);

/// Reads events piece by piece. What is cut between two pieces is copied, the rest is not.
#[derive(Debug)]
pub struct Parser {
    /// The beginning of an event that is not whole.
    rest: BytesMut,
    /// How far `rest` was looked at: no blank line ends before.
    seen: usize,
    ready: VecDeque<Event>,
    /// Longest event, in bytes with all its lines.
    max: usize,
    /// A byte order mark may still come.
    first: bool,
    /// The last block ended with CR at a piece's end: an LF that comes next belongs to it.
    skip_lf: bool,
}

impl Parser {
    /// With the longest event that is taken, in bytes.
    pub fn new(max: usize) -> Self {
        Self { rest: BytesMut::new(), seen: 0, ready: VecDeque::new(), max, first: true, skip_lf: false }
    }

    /// Takes a piece; what became whole is then in [`Parser::next_event`]. After an error nothing
    /// more is read.
    pub fn push(&mut self, mut piece: Bytes) -> Result<(), TooLong> {
        if piece.is_empty() {
            return Ok(());
        }
        if std::mem::take(&mut self.skip_lf) && piece[0] == b'\n' {
            let _ = piece.split_to(1);
        }
        if !self.rest.is_empty() {
            self.rest.extend_from_slice(&piece);
            piece = std::mem::take(&mut self.rest).freeze();
        }
        let mut from = std::mem::take(&mut self.seen);
        if self.first {
            match strip_mark(&piece) {
                Some(length) => {
                    let _ = piece.split_to(length);
                    from = 0;
                    self.first = false;
                }
                None => {
                    self.rest.extend_from_slice(&piece);
                    return Ok(());
                }
            }
        }
        loop {
            match block_end(&piece, from) {
                Ok(end) => {
                    if end > self.max {
                        return Err(TooLong(self.max));
                    }
                    let block = piece.split_to(end);
                    self.skip_lf = piece.is_empty() && block.ends_with(b"\r");
                    from = 0;
                    self.ready.extend(read(&block));
                }
                Err(seen) => {
                    if piece.len() > self.max {
                        return Err(TooLong(self.max));
                    }
                    self.seen = seen;
                    self.rest.extend_from_slice(&piece);
                    return Ok(());
                }
            }
        }
    }

    /// The next whole event.
    pub fn next_event(&mut self) -> Option<Event> {
        self.ready.pop_front()
    }

    /// Whether the bytes so far end inside an event, which is then no event.
    pub fn is_cut(&self) -> bool {
        !self.rest.is_empty()
    }
}

/// How many bytes of byte order mark there are; `None` if more must come to tell.
fn strip_mark(bytes: &[u8]) -> Option<usize> {
    const MARK: &[u8] = b"\xef\xbb\xbf";
    if bytes.starts_with(MARK) {
        return Some(MARK.len());
    }
    (bytes.len() >= MARK.len() || !MARK.starts_with(bytes)).then_some(0)
}

/// Where the first block ends, behind its blank line, looking from `from` on; else how far there
/// is none, to look on from.
fn block_end(bytes: &[u8], from: usize) -> Result<usize, usize> {
    // `from` is always the beginning of a line.
    let mut line = from;
    loop {
        let Some(end) = memchr2(b'\n', b'\r', &bytes[line..]).map(|at| line + at) else {
            return Err(line);
        };
        let next = match (bytes[end], bytes.get(end + 1)) {
            (b'\r', Some(b'\n')) => end + 2,
            // Whether the line's end is one byte or two is not known yet. A blank line ends the
            // block all the same.
            (b'\r', None) if end > line => return Err(line),
            _ => end + 1,
        };
        if end == line {
            return Ok(next);
        }
        line = next;
    }
}

/// The event in a block that ends with a blank line, if it has data.
fn read(block: &Bytes) -> Option<Event> {
    let mut name = None;
    let mut data: Option<Bytes> = None;
    let mut joined: Option<BytesMut> = None;
    // Whether the lines can be passed on as they are, and where they end.
    let mut plain = true;
    let mut end_of_data = 0;
    let mut at = 0;
    while at < block.len() {
        let end = memchr2(b'\n', b'\r', &block[at..]).map_or(block.len(), |found| at + found);
        let next = if block[end..].starts_with(b"\r\n") { end + 2 } else { (end + 1).min(block.len()) };
        let line = &block[at..end];
        let colon = memchr::memchr(b':', line);
        let field = &line[..colon.unwrap_or(line.len())];
        let mut value = colon.map_or(end, |colon| at + colon + 1);
        let spaced = block.get(value) == Some(&b' ') && value < end;
        value += usize::from(spaced);
        let lf = block.get(end) == Some(&b'\n');
        match field {
            b"data" => {
                let value = block.slice(value..end);
                match (&data, &mut joined) {
                    (None, _) => data = Some(value),
                    (Some(_), Some(joined)) => {
                        joined.extend_from_slice(b"\n");
                        joined.extend_from_slice(&value);
                    }
                    (Some(first), None) => {
                        joined = Some([&first[..], b"\n", &value].concat().as_slice().into());
                    }
                }
                plain &= spaced && lf;
                end_of_data = next;
            }
            b"event" => {
                plain &= spaced && lf && name.is_none() && data.is_none();
                name = Some(block.slice(value..end));
            }
            b"" if line.is_empty() => {}
            _ => plain = false,
        }
        at = next;
    }
    let data = match joined {
        Some(joined) => joined.freeze(),
        None => data?,
    };
    let lines = if plain { block.slice(..end_of_data) } else { lines(name.as_deref(), &data) };
    Some(Event { name, data, lines })
}

/// An event's lines, each with LF.
fn lines(name: Option<&[u8]>, data: &[u8]) -> Bytes {
    let mut lines = BytesMut::with_capacity(data.len() + 32);
    if let Some(name) = name {
        lines.extend_from_slice(b"event: ");
        lines.extend_from_slice(name);
        lines.extend_from_slice(b"\n");
    }
    for line in data.split(|byte| *byte == b'\n') {
        lines.extend_from_slice(b"data: ");
        lines.extend_from_slice(line);
        lines.extend_from_slice(b"\n");
    }
    lines.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&[u8]]) -> Vec<(Option<String>, String, String)> {
        let mut parser = Parser::new(1000);
        for piece in pieces {
            parser.push(Bytes::copy_from_slice(piece)).unwrap();
        }
        let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
        std::iter::from_fn(|| parser.next_event())
            .map(|event| (event.name.as_ref().map(text), text(&event.data), text(&event.lines)))
            .collect()
    }

    const STREAM: &str = "\u{feff}: beat\n\ndata: one\n\nid: 7\nevent: named\ndata:two\ndata: three\nretry: 5\n\n\
        event: empty\n\ndata\n\nunknown: x\ndata: last\n\n";

    #[test]
    fn events_are_the_same_with_every_line_end_and_however_they_are_cut() {
        let wanted = vec![
            (None, "one".to_owned(), "data: one\n".to_owned()),
            (
                Some("named".to_owned()),
                "two\nthree".to_owned(),
                "event: named\ndata: two\ndata: three\n".to_owned(),
            ),
            (None, String::new(), "data: \n".to_owned()),
            (None, "last".to_owned(), "data: last\n".to_owned()),
        ];
        for end in ["\n", "\r\n", "\r"] {
            let stream = STREAM.replace('\n', end);
            for size in 1..=stream.len() {
                let pieces: Vec<&[u8]> = stream.as_bytes().chunks(size).collect();
                assert_eq!(read(&pieces), wanted, "{end:?} in pieces of {size}");
            }
        }
    }

    #[test]
    fn an_event_is_passed_on_from_the_bytes_it_came_in() {
        let piece = Bytes::from_static(b"event: a\ndata: {}\n\ndata: [DONE]\n\n");
        let mut parser = Parser::new(100);
        parser.push(piece.clone()).unwrap();
        let event = parser.next_event().unwrap();
        assert_eq!(event.lines, "event: a\ndata: {}\n");
        assert_eq!(event.lines.as_ptr(), piece.as_ptr());
        assert!(!parser.is_cut());
    }

    #[test]
    fn an_event_beyond_the_bound_is_an_error_whole_or_not() {
        let long = |end: &str| Bytes::from(format!("data: {}{end}", "x".repeat(100)));
        assert_eq!(Parser::new(50).push(long("\n\n")), Err(TooLong(50)));
        assert_eq!(Parser::new(50).push(long("")), Err(TooLong(50)));
        let mut parser = Parser::new(50);
        parser.push(Bytes::from_static(b"data: x")).unwrap();
        assert!(parser.is_cut() && parser.next_event().is_none());
        assert_eq!(parser.push(long("")), Err(TooLong(50)));
    }
}
