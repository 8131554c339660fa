//! Decoding `Transfer-Encoding: chunked` in place (RFC 9112, section 7.1).

use bytes::{Buf, Bytes, BytesMut};

/// Longest line before a chunk, extensions included.
const MAX_SIZE_LINE: usize = 1024;
/// Most bytes of trailer fields, which are read and dropped.
const MAX_TRAILERS: usize = 16 * 1024;
/// Chunks are joined up to about this many bytes: fewer, larger writes to the client.
const JOIN: usize = 64 * 1024;

/// What a worker sent is not chunked encoding.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the chunked encoding is malformed: {0}")]
pub(super) struct BadChunk(&'static str);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// A size line comes next.
    Size,
    /// So many bytes of a chunk are still to come.
    Data(u64),
    /// The line end after a chunk's data.
    DataEnd,
    /// Trailer fields, so many bytes of them seen.
    Trailers(usize),
    Done,
}

/// Takes chunked bytes from the front of a buffer.
#[derive(Debug)]
pub(super) struct Decoder {
    state: State,
}

impl Decoder {
    /// At the start of a body.
    pub(super) fn new() -> Self {
        Self { state: State::Size }
    }

    /// Whether the last chunk and the trailers were read.
    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Takes data from the front of `buffer`, that of neighbouring chunks joined; empty when more
    /// must be read first or the body is over. What follows the body stays.
    ///
    /// With `whole` the beginning of a chunk waits for its end (up to a bound), so that events
    /// stay in one piece where the engine sent them so.
    pub(super) fn take(&mut self, buffer: &mut BytesMut, whole: bool) -> Result<Bytes, BadChunk> {
        // Data found so far lies at `from..to`; bytes before `read` are used up.
        let (mut from, mut to, mut read) = (0, 0, 0);
        loop {
            let rest = &buffer[read..];
            match self.state {
                State::Size => match size_line(rest)? {
                    None => break,
                    Some((0, used)) => {
                        read += used;
                        self.state = State::Trailers(0);
                    }
                    Some((size, used)) => {
                        read += used;
                        self.state = State::Data(size);
                    }
                },
                State::Data(left) => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    let is_part = (taken as u64) < left;
                    if taken == 0 || to - from >= JOIN || (is_part && whole && taken < JOIN) {
                        break;
                    }
                    if to == from {
                        (from, to) = (read, read);
                    }
                    buffer.copy_within(read..read + taken, to);
                    to += taken;
                    read += taken;
                    let left = left - taken as u64;
                    self.state = if left == 0 { State::DataEnd } else { State::Data(left) };
                }
                State::DataEnd => {
                    if rest.len() < 2 {
                        break;
                    }
                    if &rest[..2] != b"\r\n" {
                        return Err(BadChunk("no line end after a chunk"));
                    }
                    read += 2;
                    self.state = State::Size;
                }
                State::Trailers(seen) => {
                    let Some(end) = memchr::memchr(b'\n', rest) else {
                        if seen + rest.len() > MAX_TRAILERS {
                            return Err(BadChunk("the trailers are too long"));
                        }
                        break;
                    };
                    let seen = seen + end + 1;
                    if seen > MAX_TRAILERS {
                        return Err(BadChunk("the trailers are too long"));
                    }
                    let is_last = &rest[..=end] == b"\r\n";
                    read += end + 1;
                    self.state = if is_last { State::Done } else { State::Trailers(seen) };
                }
                State::Done => break,
            }
        }
        if read == 0 {
            return Ok(Bytes::new());
        }
        let mut used = buffer.split_to(read);
        used.truncate(to);
        used.advance(from.min(to));
        Ok(used.freeze())
    }
}

/// Reads `SIZE[;extension]CRLF`: the size, and the length of the line.
fn size_line(bytes: &[u8]) -> Result<Option<(u64, usize)>, BadChunk> {
    let Some(end) = memchr::memchr(b'\n', bytes) else {
        if bytes.len() > MAX_SIZE_LINE {
            return Err(BadChunk("the line before a chunk is too long"));
        }
        return Ok(None);
    };
    if end > MAX_SIZE_LINE {
        return Err(BadChunk("the line before a chunk is too long"));
    }
    let Some(line) = bytes[..end].strip_suffix(b"\r") else {
        return Err(BadChunk("a line ends with a bare line feed"));
    };
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    // 15 digits: further than any body goes, and no overflow.
    if digits == 0 || digits > 15 {
        return Err(BadChunk("a chunk's size is no number"));
    }
    let extension = line[digits..].trim_ascii_start();
    if !(extension.is_empty() || extension.starts_with(b";")) {
        return Err(BadChunk("a chunk's size is no number"));
    }
    let size = line[..digits].iter().fold(0, |size, digit| size << 4 | u64::from(hex(*digit)));
    Ok(Some((size, end + 1)))
}

/// The value of a hexadecimal digit.
fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        _ => (digit | 0x20) - b'a' + 10,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds `wire` in pieces of `step` bytes; the data, what is left over, and whether it ended.
    fn decode(wire: &[u8], step: usize) -> Result<(Vec<u8>, Vec<u8>, bool), BadChunk> {
        let (mut decoder, mut buffer, mut data) = (Decoder::new(), BytesMut::new(), Vec::new());
        for piece in wire.chunks(step) {
            buffer.extend_from_slice(piece);
            loop {
                let taken = decoder.take(&mut buffer, false)?;
                if taken.is_empty() {
                    break;
                }
                data.extend_from_slice(&taken);
            }
        }
        Ok((data, buffer.to_vec(), decoder.is_done()))
    }

    #[test]
    fn sizes_extensions_and_trailers_are_read_however_they_are_cut() {
        let wire = b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\nleft";
        for step in 1..wire.len() {
            let (data, left, done) = decode(wire, step).unwrap();
            assert_eq!((data.as_slice(), left.as_slice(), done), (&b"abc0123456789"[..], &b"left"[..], true));
        }
    }

    #[test]
    fn chunks_that_lie_in_the_buffer_together_come_out_as_one() {
        let mut buffer = BytesMut::from(&b"1\r\na\r\n1\r\nb\r\n2\r\nc"[..]);
        let mut decoder = Decoder::new();
        assert_eq!(decoder.take(&mut buffer, true).unwrap(), "ab");
        assert_eq!(decoder.take(&mut buffer, true).unwrap(), "", "half a chunk waits");
        assert_eq!(decoder.take(&mut buffer, false).unwrap(), "c", "unless there is no more to be had");
        assert!(buffer.is_empty() && !decoder.is_done());
        buffer.extend_from_slice(b"d\r\n0\r\n\r\n");
        assert_eq!(decoder.take(&mut buffer, true).unwrap(), "d");
        assert!(decoder.is_done());
    }

    #[test]
    fn what_is_not_chunked_is_refused() {
        let long_line = [b"1;".as_slice(), &[b'x'; 2000], b"\r\na\r\n"].concat();
        let long_trailers = [b"0\r\n".as_slice(), &b"a: b\r\n".repeat(4000), b"\r\n"].concat();
        for bad in [
            b"\r\n".as_slice(),
            b"x\r\n",
            b"-1\r\n",
            b"+1\r\n",
            b" 1\r\na\r\n",
            b"0x1\r\na\r\n",
            b"1 2\r\na\r\n",
            b"1\na\r\n",
            b"1\r\nab\r\n",
            b"1\r\na\nb",
            b"ffffffffffffffffff\r\n",
            b"10000000000000000\r\n",
            &long_line,
            &long_trailers,
            &[b'1'; 2000],
        ] {
            for step in [1, bad.len()] {
                assert!(
                    decode(bad, step).is_err(),
                    "{:?}",
                    String::from_utf8_lossy(&bad[..bad.len().min(30)])
                );
            }
        }
    }

    proptest! {
        #[test]
        fn any_chunks_cut_anywhere_give_back_the_body(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..20),
            step in 1_usize..400,
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                wire.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            let (data, left, done) = decode(&wire, step).unwrap();
            prop_assert_eq!(data, chunks.concat());
            prop_assert!(left.is_empty() && done);
        }
    }
}
