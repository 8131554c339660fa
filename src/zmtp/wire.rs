//! Bytes of ZMTP 3.0: greeting, frames, commands. Pure.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{SocketType, ZmtpError};

/// Length of the greeting.
pub(super) const GREETING: usize = 64;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Version 3.0: peers of a later 3.x then keep to what 3.0 has.
pub(super) fn greeting() -> [u8; GREETING] {
    let mut bytes = [0; GREETING];
    bytes[0] = 0xff;
    bytes[9] = 0x7f;
    bytes[10] = 3;
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

/// Checks what the other side greets with.
pub(super) fn check_greeting(bytes: &[u8; GREETING]) -> Result<(), ZmtpError> {
    if bytes[0] != 0xff || bytes[9] & 1 != 1 {
        return Err(ZmtpError::Protocol("no ZMTP signature"));
    }
    if bytes[10] < 3 {
        return Err(ZmtpError::Protocol("an older version"));
    }
    if bytes[12..32] != *b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" {
        return Err(ZmtpError::Protocol("another security mechanism"));
    }
    Ok(())
}

/// One frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Frame {
    /// A part of a message, and whether more follow.
    Part(Bytes, bool),
    /// A command, with its name before its data.
    Command(Bytes),
}

/// Takes the next frame out of `buffer`; `None` until it is there in full. A frame of more than `most`
/// bytes is an error as soon as its length is read.
pub(super) fn take_frame(buffer: &mut BytesMut, most: usize) -> Result<Option<Frame>, ZmtpError> {
    let Some(&flags) = buffer.first() else { return Ok(None) };
    if flags & !(MORE | LONG | COMMAND) != 0 || flags & (COMMAND | MORE) == (COMMAND | MORE) {
        return Err(ZmtpError::Protocol("reserved flags in a frame"));
    }
    let (head, length) = if flags & LONG == 0 {
        let Some(&length) = buffer.get(1) else { return Ok(None) };
        (2, u64::from(length))
    } else {
        let Some(length) = buffer.get(1..).and_then(|rest| rest.first_chunk::<8>()) else { return Ok(None) };
        (9, u64::from_be_bytes(*length))
    };
    let length = usize::try_from(length).ok().filter(|length| *length <= most);
    let Some(length) = length else { return Err(ZmtpError::TooLong(most, usize::MAX)) };
    if buffer.len() - head < length {
        return Ok(None);
    }
    buffer.advance(head);
    let body = buffer.split_to(length).freeze();
    Ok(Some(if flags & COMMAND == 0 { Frame::Part(body, flags & MORE != 0) } else { Frame::Command(body) }))
}

fn put_frame(out: &mut BytesMut, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(length) => {
            out.put_u8(flags);
            out.put_u8(length);
        }
        Err(_) => {
            out.put_u8(flags | LONG);
            out.put_u64(body.len() as u64);
        }
    }
    out.put_slice(body);
}

/// Writes a message.
pub(super) fn put_message(out: &mut BytesMut, parts: &[Bytes]) {
    for (place, part) in parts.iter().enumerate() {
        put_frame(out, if place + 1 < parts.len() { MORE } else { 0 }, part);
    }
}

fn put_command(out: &mut BytesMut, name: &[u8], data: &[u8]) {
    let mut body = Vec::with_capacity(1 + name.len() + data.len());
    // Names of commands are ours and short.
    body.push(name.len() as u8);
    body.extend_from_slice(name);
    body.extend_from_slice(data);
    put_frame(out, COMMAND, &body);
}

/// Says what we are.
pub(super) fn put_ready(out: &mut BytesMut, ours: SocketType) {
    let (name, value) = (b"Socket-Type", ours.name().as_bytes());
    let mut data = vec![name.len() as u8];
    data.extend_from_slice(name);
    data.extend_from_slice(&(value.len() as u32).to_be_bytes());
    data.extend_from_slice(value);
    put_command(out, b"READY", &data);
}

/// Answers a ping.
pub(super) fn put_pong(out: &mut BytesMut, context: &[u8]) {
    put_command(out, b"PONG", context);
}

/// Name and data of a command.
pub(super) fn command(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = body.split_first()?;
    rest.split_at_checked(usize::from(*length))
}

/// The type of socket that a READY command speaks of.
pub(super) fn socket_type(mut data: &[u8]) -> Option<&[u8]> {
    while let Some((length, rest)) = data.split_first() {
        let (name, rest) = rest.split_at_checked(usize::from(*length))?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
        data = rest;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let parts = [Bytes::from_static(b""), Bytes::from(vec![7; 300]), Bytes::from_static(b"end")];
        let mut wire = BytesMut::new();
        put_message(&mut wire, &parts);
        let mut buffer = BytesMut::new();
        let mut frames = Vec::new();
        for byte in &wire {
            buffer.put_u8(*byte);
            frames.extend(take_frame(&mut buffer, 1000).unwrap());
        }
        let [a, b, c] = parts;
        assert_eq!(frames, [Frame::Part(a, true), Frame::Part(b, true), Frame::Part(c, false)]);
        assert!(buffer.is_empty());
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_by_its_length_alone() {
        let mut buffer = BytesMut::from(&[2, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff][..]);
        assert!(matches!(take_frame(&mut buffer, 1000), Err(ZmtpError::TooLong(1000, _))));
        let mut buffer = BytesMut::from(&[2, 0, 0, 0, 0, 0, 0, 3, 0xe9][..]);
        assert!(matches!(take_frame(&mut buffer, 1000), Err(ZmtpError::TooLong(1000, _))));
    }

    #[test]
    fn a_ready_command_names_the_socket_and_a_greeting_the_mechanism() {
        let mut out = BytesMut::new();
        put_ready(&mut out, SocketType::Sub);
        let Some(Frame::Command(body)) = take_frame(&mut out, 100).unwrap() else { panic!() };
        let (name, data) = command(&body).unwrap();
        assert_eq!((name, socket_type(data)), (&b"READY"[..], Some(&b"SUB"[..])));
        check_greeting(&greeting()).unwrap();
        let mut plain = greeting();
        plain[12..17].copy_from_slice(b"PLAIN");
        assert!(check_greeting(&plain).is_err());
        assert!(check_greeting(&[b'G'; GREETING]).is_err());
    }

    proptest! {
        #[test]
        fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = command(&noise).map(|(_, data)| socket_type(data).is_some());
            let mut buffer = BytesMut::from(&noise[..]);
            while let Ok(Some(_)) = take_frame(&mut buffer, 50) {}
        }
    }
}
