//! A worker's HTTP/1 response head: status, headers that may pass, and how long the body is.

use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::http::headers::{self, is_hop_by_hop};

/// Most header fields of a response.
const MAX_FIELDS: usize = 128;

/// How a response body ends (RFC 9112, section 6.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Framing {
    /// After so many bytes.
    Length(u64),
    /// With the last chunk.
    Chunked,
    /// When the connection does.
    Close,
}

/// A response head.
#[derive(Debug)]
pub(super) struct Head {
    /// 200 to 999; interim responses are not told of.
    pub(super) status: StatusCode,
    /// Without those meant for this connection only.
    pub(super) headers: HeaderMap,
    /// Of the body.
    pub(super) framing: Framing,
    /// The connection may serve another request after this one.
    pub(super) keep_alive: bool,
}

/// What the front of a buffer holds.
#[derive(Debug)]
pub(super) enum Parsed {
    /// Not a whole head yet.
    Partial,
    /// An interim response (1xx), now taken from the buffer.
    Interim,
    /// A head, now taken from the buffer.
    Final(Head),
}

/// Takes a head from the front of `buffer`. `Err` says what is wrong with it.
pub(super) fn parse(buffer: &mut BytesMut, to_head_request: bool) -> Result<Parsed, String> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    let length = match response.parse(buffer) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(Parsed::Partial),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(format!("more than {MAX_FIELDS} header fields"));
        }
        Err(error) => return Err(error.to_string()),
    };
    let is_http11 = response.version == Some(1);
    let code = response.code.unwrap_or(0);
    let status = StatusCode::from_u16(code).map_err(|_| format!("status {code}"))?;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err("it switched protocols unasked".to_owned());
    }
    if status.is_informational() {
        let _ = buffer.split_to(length);
        return Ok(Parsed::Interim);
    }
    // Where the values lie, so that they can share the buffer's memory once it is frozen.
    let base = buffer.as_ptr() as usize;
    let mut parts: Vec<(HeaderName, usize, usize)> = Vec::with_capacity(response.headers.len());
    for field in response.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|error| error.to_string())?;
        parts.push((name, field.value.as_ptr() as usize - base, field.value.len()));
    }
    let head = buffer.split_to(length).freeze();
    let mut passing = HeaderMap::with_capacity(parts.len() + 4);
    let mut length = None;
    let mut transfer = None;
    let mut listed = Vec::new();
    let mut close = false;
    let mut keep = false;
    for (name, start, size) in parts {
        // An empty value may lie anywhere.
        let bytes = if size == 0 { bytes::Bytes::new() } else { head.slice(start..start + size) };
        let value = HeaderValue::from_maybe_shared(bytes).map_err(|error| error.to_string())?;
        if name == http::header::CONTENT_LENGTH {
            let number = content_length(&value)?;
            if length.is_some_and(|known| known != number) {
                return Err("two different content lengths".to_owned());
            }
            if length.replace(number).is_some() {
                continue;
            }
        } else if name == http::header::TRANSFER_ENCODING {
            if transfer.replace(value).is_some() {
                return Err("several transfer encodings".to_owned());
            }
            continue;
        } else if name == http::header::CONNECTION {
            for option in headers::list(&value) {
                close |= option.eq_ignore_ascii_case("close");
                keep |= option.eq_ignore_ascii_case("keep-alive");
                listed.extend(HeaderName::from_bytes(option.as_bytes()));
            }
            continue;
        } else if is_hop_by_hop(&name) {
            continue;
        }
        passing.append(name, value);
    }
    for name in listed {
        if name != http::header::CONTENT_LENGTH && name != http::header::CONTENT_TYPE {
            passing.remove(name);
        }
    }
    let bodiless = to_head_request || matches!(status.as_u16(), 204 | 304);
    let announced_chunks = transfer.is_some();
    let framing = match (transfer, length) {
        (Some(_), Some(_)) => return Err("a content length beside a transfer encoding".to_owned()),
        (Some(encoding), None) => {
            if !encoding.as_bytes().eq_ignore_ascii_case(b"chunked") {
                return Err("a transfer encoding other than chunked".to_owned());
            }
            if !is_http11 {
                return Err("a transfer encoding in HTTP/1.0".to_owned());
            }
            if bodiless { Framing::Length(0) } else { Framing::Chunked }
        }
        (None, _) if bodiless => Framing::Length(0),
        (None, Some(length)) => Framing::Length(length),
        (None, None) => Framing::Close,
    };
    // A worker that wrongly sends the body it announces would have it read as the next answer.
    let may_have_sent_one = bodiless && (announced_chunks || length.is_some_and(|length| length > 0));
    let keep_alive = !close && (is_http11 || keep) && framing != Framing::Close && !may_have_sent_one;
    if status == StatusCode::NO_CONTENT {
        // Must not be there, and clients that hold to that break the connection off.
        passing.remove(http::header::CONTENT_LENGTH);
    }
    Ok(Parsed::Final(Head { status, headers: passing, framing, keep_alive }))
}

fn content_length(value: &HeaderValue) -> Result<u64, String> {
    let bytes = value.as_bytes();
    // 18 digits cannot overflow.
    if bytes.is_empty() || bytes.len() > 18 || !bytes.iter().all(u8::is_ascii_digit) {
        return Err("the content length is no number".to_owned());
    }
    Ok(bytes.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<Head, String> {
        let mut buffer = BytesMut::from(text);
        match parse(&mut buffer, false)? {
            Parsed::Final(head) => Ok(head),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn framing_follows_the_rules_and_doubt_is_an_error() {
        let framing = |fields: &str| head(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n")).map(|h| h.framing);
        assert_eq!(framing("Content-Length: 12\r\n").unwrap(), Framing::Length(12));
        assert_eq!(framing("content-length: 5\r\ncontent-length: 5\r\n").unwrap(), Framing::Length(5));
        assert_eq!(framing("Transfer-Encoding: Chunked\r\n").unwrap(), Framing::Chunked);
        assert_eq!(framing("").unwrap(), Framing::Close);
        for bad in [
            "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n",
            "Content-Length: 1\r\nContent-Length: 2\r\n",
            "Content-Length: +1\r\n",
            "Content-Length: 1, 1\r\n",
            "Content-Length: \r\n",
            "Content-Length: 9999999999999999999\r\n",
            "Transfer-Encoding: gzip, chunked\r\n",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
            "Transfer-Encoding: identity\r\n",
            "Bad Name: 1\r\n",
            "X: a\0b\r\n",
        ] {
            assert!(framing(bad).is_err(), "{bad:?}");
        }
        assert!(head("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").is_err());
        assert!(head("HTTP/1.1 101 Switching Protocols\r\n\r\n").is_err());
        assert!(head("220 mail.example ESMTP\r\n\r\n").is_err());
        let fields = "x: y\r\n".repeat(MAX_FIELDS + 1);
        assert!(framing(&fields).unwrap_err().contains("128"));
    }

    #[test]
    fn answers_without_a_body_have_none_whatever_they_announce() {
        for code in [204, 304] {
            let text = format!("HTTP/1.1 {code} x\r\nContent-Length: 7\r\n\r\n");
            let head = head(&text).unwrap();
            assert_eq!(head.framing, Framing::Length(0));
            assert_eq!(head.headers.contains_key("content-length"), code == 304);
        }
        let mut buffer = BytesMut::from("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n");
        let Ok(Parsed::Final(head)) = parse(&mut buffer, true) else { panic!("no head") };
        assert_eq!(
            (head.framing, head.headers["content-length"].as_bytes()),
            (Framing::Length(0), &b"7"[..])
        );
    }

    #[test]
    fn a_connection_is_kept_only_when_both_ends_mean_it() {
        let keeps = |text: &str| head(text).unwrap().keep_alive;
        assert!(keeps("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
        assert!(!keeps("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: x, Close\r\n\r\n"));
        assert!(!keeps("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"));
        assert!(keeps("HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n"));
        assert!(!keeps("HTTP/1.1 200 OK\r\n\r\n"));
    }

    #[test]
    fn a_body_that_is_announced_where_none_may_be_is_not_waited_for_on_a_kept_connection() {
        let keeps = |text: &str, to_head| match parse(&mut BytesMut::from(text), to_head) {
            Ok(Parsed::Final(head)) => head.keep_alive,
            other => panic!("{other:?}"),
        };
        assert!(!keeps("HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", true));
        assert!(!keeps("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", true));
        assert!(!keeps("HTTP/1.1 204 No Content\r\nContent-Length: 7\r\n\r\n", false));
        assert!(keeps("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", true));
        assert!(keeps("HTTP/1.1 200 OK\r\n\r\n", true));
        assert!(keeps("HTTP/1.1 204 No Content\r\n\r\n", false));
    }

    #[test]
    fn what_is_meant_for_this_hop_stays_and_the_rest_passes_untouched() {
        let head = head(
            "HTTP/1.1 200 OK\r\nDate: x\r\nX-Empty:\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nKeep-Alive: timeout=5\r\n\
             Connection: keep-alive, X-Listed\r\nX-Listed: 1\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\n",
        );
        let headers = head.unwrap().headers;
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-length", "date", "set-cookie", "x-empty"]);
        assert_eq!(headers.get_all("set-cookie").iter().count(), 2);
    }

    #[test]
    fn heads_are_taken_one_at_a_time() {
        let mut buffer = BytesMut::from("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nbody");
        assert!(matches!(parse(&mut buffer, false), Ok(Parsed::Interim)));
        assert!(matches!(parse(&mut buffer, false), Ok(Parsed::Final(_))));
        assert_eq!(&buffer[..], b"body");
        let mut partial = BytesMut::from("HTTP/1.1 200 OK\r\nX: y\r\n");
        assert!(matches!(parse(&mut partial, false), Ok(Parsed::Partial)));
    }
}
