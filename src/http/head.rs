//! A look at raw HTTP/1 heads for what hyper repairs without a trace: Content-Length beside
//! Transfer-Encoding, and lines ended by a bare line feed.
//!
//! The scanner sees a head only when it starts on a quiet connection. A pipelined head may
//! start inside bytes already buffered; a scan that does not begin with a request line judges
//! nothing (hyper itself closes the connection after a doubtful message, so nothing is
//! smuggled either way).

/// What is wrong with a head.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Verdict {
    /// Both Content-Length and Transfer-Encoding are there.
    pub two_lengths: bool,
    /// A line ends with a bare line feed.
    pub bare_line_feed: bool,
}

impl Verdict {
    /// Packs it into a byte.
    pub(super) fn bits(self) -> u8 {
        u8::from(self.two_lengths) | u8::from(self.bare_line_feed) << 1
    }

    /// The inverse of [`Verdict::bits`].
    pub(super) fn from_bits(bits: u8) -> Self {
        Self { two_lengths: bits & 1 != 0, bare_line_feed: bits & 2 != 0 }
    }
}

/// Room for the longest name of interest plus one, so that longer names cannot match.
const NAME_ROOM: usize = "transfer-encoding".len() + 1;
/// Room for the end of a request line.
const VERSION: &[u8] = b"HTTP/1.";

/// Reads a head in pieces of any size.
#[derive(Debug, Default)]
pub(super) struct HeadScanner {
    done: bool,
    /// Header lines seen, counting the request line.
    lines: u32,
    line_length: usize,
    name: [u8; NAME_ROOM],
    name_length: usize,
    in_name: bool,
    /// The last bytes seen, newest last.
    tail: [u8; 10],
    content_length: bool,
    transfer_encoding: bool,
    verdict: Verdict,
}

impl HeadScanner {
    /// Takes more bytes; a verdict once the head is complete, and only then.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> Option<Verdict> {
        while !self.done && !bytes.is_empty() {
            let Some(end) = memchr::memchr(b'\n', bytes) else {
                self.read(bytes);
                return None;
            };
            self.read(&bytes[..end]);
            bytes = &bytes[end + 1..];
            if self.end_line() {
                self.done = true;
                self.verdict.two_lengths = self.content_length && self.transfer_encoding;
                return Some(self.verdict);
            }
        }
        None
    }

    /// Takes a part of a line.
    fn read(&mut self, part: &[u8]) {
        if self.in_name {
            let colon = memchr::memchr(b':', part);
            let name = &part[..colon.unwrap_or(part.len())];
            for byte in name.iter().take(NAME_ROOM - self.name_length) {
                self.name[self.name_length] = byte.to_ascii_lowercase();
                self.name_length += 1;
            }
            if colon.is_some() {
                self.in_name = false;
                self.note_name();
            }
        }
        self.line_length += part.len();
        let kept = &part[part.len().saturating_sub(self.tail.len())..];
        self.tail.rotate_left(kept.len());
        let from = self.tail.len() - kept.len();
        self.tail[from..].copy_from_slice(kept);
    }

    fn note_name(&mut self) {
        match &self.name[..self.name_length] {
            b"content-length" => self.content_length = true,
            b"transfer-encoding" => self.transfer_encoding = true,
            _ => {}
        }
    }

    /// Ends a line; true when it was the empty one that ends the head.
    fn end_line(&mut self) -> bool {
        let carriage_return = self.line_length > 0 && self.tail[9] == b'\r';
        self.verdict.bare_line_feed |= !carriage_return;
        let length = self.line_length - usize::from(carriage_return);
        if self.lines == 0 {
            if length == 0 {
                // Empty lines before a request line are allowed, and are not part of the head.
                self.verdict = Verdict::default();
                self.line_length = 0;
                return false;
            }
            let version_end = if carriage_return { 9 } else { 10 };
            let version = &self.tail[version_end - 8..version_end];
            self.done = !version.starts_with(VERSION);
        } else if length == 0 {
            return true;
        }
        self.lines += 1;
        self.line_length = 0;
        self.name_length = 0;
        self.in_name = true;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(head: &str, step: usize) -> Option<Verdict> {
        let mut scanner = HeadScanner::default();
        head.as_bytes().chunks(step).filter_map(|chunk| scanner.feed(chunk)).next()
    }

    #[test]
    fn both_lengths_are_found_however_the_head_is_cut() {
        let head = "POST / HTTP/1.1\r\nHost: a\r\nContent-LENGTH: 3\r\ntransfer-encoding: chunked\r\n\r\n";
        for step in 1..head.len() {
            assert_eq!(
                scan(head, step),
                Some(Verdict { two_lengths: true, bare_line_feed: false }),
                "{step}"
            );
        }
    }

    #[test]
    fn an_ordinary_head_is_clean_and_a_bare_line_feed_is_not() {
        assert_eq!(
            scan(
                "\r\nGET / HTTP/1.1\r\nHost: a\r\nX-Content-Length: 3\r\nTransfer-Encodings: x\r\n\r\nbody\n\n",
                7
            ),
            Some(Verdict::default())
        );
        let bare = Some(Verdict { two_lengths: false, bare_line_feed: true });
        assert_eq!(scan("GET / HTTP/1.1\nHost: a\r\n\r\n", 3), bare);
        assert_eq!(scan("GET / HTTP/1.1\r\nHost: a\n\n", 30), bare);
    }

    #[test]
    fn bytes_that_do_not_start_with_a_request_line_are_not_judged() {
        assert_eq!(scan("ent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n", 5), None);
        assert_eq!(scan("{\n\"content-length: 4\n\n", 5), None);
    }

    use proptest::prelude::*;

    /// A header line as text, whether it is one of the two lengths, and whether it ends with a
    /// bare line feed.
    fn line() -> impl Strategy<Value = (String, [bool; 2], bool)> {
        let lengths = prop_oneof![
            Just(("content-length", [true, false])),
            Just(("Content-Length", [true, false])),
            Just(("TRANSFER-ENCODING", [false, true])),
            Just(("transfer-encoding", [false, true])),
            Just(("x-content-length", [false, false])),
            Just(("content-length-x", [false, false])),
            Just(("transfer-encoding2", [false, false])),
            Just(("content-lengt", [false, false])),
            Just(("content-length ", [false, false])),
            Just(("host", [false, false])),
            Just(("", [false, false])),
        ];
        (lengths, "[ -~\r]{0,12}", any::<bool>()).prop_map(|((name, is), value, bare)| {
            // A value that ends with CR would make an LF behind it an ordinary end of a line.
            let value = value.trim_end_matches('\r');
            let end = if bare { "\n" } else { "\r\n" };
            (format!("{name}:{value}{end}"), is, bare)
        })
    }

    proptest! {
        #[test]
        fn the_scanner_agrees_with_somebody_who_sees_the_whole_head(
            blank_lines in 0..3_usize,
            lines in prop::collection::vec(line(), 0..8),
            bare_first: bool,
            bare_last: bool,
            body in "[\\x00-\\x7f]{0,20}",
            step in 1..40_usize,
        ) {
            let end = |bare| if bare { "\n" } else { "\r\n" };
            let mut head = format!("{}GET /a HTTP/1.1{}", "\r\n".repeat(blank_lines), end(bare_first));
            head.extend(lines.iter().map(|(text, ..)| text.as_str()));
            head.push_str(end(bare_last));
            head.push_str(&body);
            let has = |which: usize| lines.iter().any(|(_, is, _)| is[which]);
            let expected = Verdict {
                two_lengths: has(0) && has(1),
                bare_line_feed: bare_first || bare_last || lines.iter().any(|(_, _, bare)| *bare),
            };
            prop_assert_eq!(scan(&head, step), Some(expected), "{:?}", head);
        }

        #[test]
        fn any_bytes_are_scanned_without_harm(bytes: Vec<u8>, step in 1..9_usize) {
            let mut scanner = HeadScanner::default();
            let verdicts = bytes.chunks(step).filter_map(|chunk| scanner.feed(chunk)).count();
            prop_assert!(verdicts <= 1);
        }
    }
}
