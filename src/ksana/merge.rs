//! Two legs' bytes into one stream: the prefill leg's first frame, then what the decode leg says.
//! Frames end with NUL.

/// Largest first frame of a prefill leg that is waited for; a larger one is not shown, the decode leg
/// says it again.
pub const MAX_FRAME: usize = 4 << 20;

/// What ends a stream of frames.
pub const DONE: &[u8] = b"[DONE]\0";

/// What the reference makes of one read of the decode leg: empty frames fall away, and with them a NUL
/// that a read begins with, which glues two frames together.
pub fn strict_decode(read: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(read.len());
    let last = read.iter().filter(|byte| **byte == 0).count();
    for (at, part) in read.split(|byte| *byte == 0).enumerate() {
        if !part.is_empty() {
            out.extend_from_slice(part);
            if at < last {
                out.push(0);
            }
        }
    }
    out
}

/// What the reference makes of the prefill leg's first read: its first frame, or as much of it as came.
pub fn strict_prefill(read: &[u8]) -> Vec<u8> {
    let last = read.iter().filter(|byte| **byte == 0).count();
    let mut parts = read.split(|byte| *byte == 0).enumerate();
    let Some((at, part)) = parts.find(|(_, part)| !part.is_empty()) else { return Vec::new() };
    let mut out = part.to_vec();
    if at < last {
        out.push(0);
    }
    out
}

/// Finds the first frame of a prefill leg in whatever pieces it comes.
#[derive(Debug, Default)]
pub struct FirstFrame {
    held: Vec<u8>,
    is_over: bool,
}

impl FirstFrame {
    /// Takes the next bytes; the frame, once it is whole.
    pub fn take(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        if self.is_over {
            return None;
        }
        match bytes.iter().position(|byte| *byte == 0) {
            // An empty frame is none.
            Some(0) if self.held.is_empty() => self.take(&bytes[1..]),
            Some(end) => {
                self.is_over = true;
                let mut frame = std::mem::take(&mut self.held);
                frame.extend_from_slice(&bytes[..=end]);
                Some(frame)
            }
            None if self.held.len() + bytes.len() > MAX_FRAME => {
                self.is_over = true;
                self.held = Vec::new();
                None
            }
            None => {
                self.held.extend_from_slice(bytes);
                None
            }
        }
    }

    /// The leg has ended as it should: a frame that only lacks its NUL is whole.
    pub fn end(&mut self) -> Option<Vec<u8>> {
        self.is_over = true;
        let mut frame = std::mem::take(&mut self.held);
        if frame.is_empty() {
            return None;
        }
        frame.push(0);
        Some(frame)
    }
}

/// Cuts bytes into frames, in whatever pieces they come.
#[derive(Debug)]
pub struct Frames {
    rest: Vec<u8>,
    most: usize,
}

impl Frames {
    /// Of frames of at most so many bytes.
    pub fn new(most: usize) -> Self {
        Self { rest: Vec::new(), most }
    }

    /// Takes the next bytes; the frames that are whole now, each with its NUL. `None` if one is too long.
    pub fn push(&mut self, bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
        let mut whole = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == 0) {
            self.rest.extend_from_slice(piece);
            if self.rest.len() > self.most {
                return None;
            }
            if piece.ends_with(&[0]) {
                whole.push(std::mem::take(&mut self.rest));
            }
        }
        Some(whole)
    }

    /// What lacks its NUL at the end.
    pub fn end(self) -> Option<Vec<u8>> {
        Some(self.rest).filter(|rest| !rest.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_mode_cuts_reads_as_the_reference_does() {
        for (read, out) in [
            (&b"a\0b\0"[..], &b"a\0b\0"[..]),
            (b"a", b"a"),
            (b"\0b\0", b"b\0"),
            (b"a\0\0b", b"a\0b"),
            (b"\0", b""),
            (b"a\0b", b"a\0b"),
        ] {
            assert_eq!(strict_decode(read), out, "{read:?}");
        }
        for (read, out) in [(&b"a\0b\0"[..], &b"a\0"[..]), (b"a", b"a"), (b"\0b\0", b"b\0"), (b"\0\0", b"")] {
            assert_eq!(strict_prefill(read), out, "{read:?}");
        }
    }

    #[test]
    fn frames_are_cut_at_nul_and_nowhere_else() {
        let wire = b"{}\0\0{\"a\":1}\0rest";
        for step in 1..=wire.len() {
            let mut frames = Frames::new(16);
            let whole: Vec<Vec<u8>> =
                wire.chunks(step).flat_map(|piece| frames.push(piece).unwrap()).collect();
            assert_eq!(whole, [&b"{}\0"[..], b"\0", b"{\"a\":1}\0"], "{step}");
            assert_eq!(frames.end().as_deref(), Some(&b"rest"[..]));
        }
        let mut frames = Frames::new(4);
        assert_eq!(frames.push(b"abc\0abc\0").map(|whole| whole.len()), Some(2));
        assert_eq!(frames.push(b"ab").map(|whole| whole.len()), Some(0));
        assert_eq!(frames.push(b"cde"), None);
    }

    #[test]
    fn a_frame_is_shown_whole_however_it_comes() {
        let wire = b"\0{\"texts\":[\"A\"]}\0more\0";
        for step in 1..wire.len() {
            let mut first = FirstFrame::default();
            let frames: Vec<_> = wire.chunks(step).filter_map(|piece| first.take(piece)).collect();
            assert_eq!(frames, [b"{\"texts\":[\"A\"]}\0"], "{step}");
            assert_eq!(first.end(), None);
        }
        let mut unended = FirstFrame::default();
        assert_eq!(unended.take(b"{}"), None);
        assert_eq!(unended.end().as_deref(), Some(&b"{}\0"[..]));
        let mut large = FirstFrame::default();
        assert_eq!(large.take(&vec![b'x'; MAX_FRAME + 1]), None);
        assert_eq!((large.take(b"\0"), large.end()), (None, None));
    }
}
