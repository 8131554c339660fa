//! Requests whose end two readers could see in different places, or whose head is none.
//!
//! `{n}` is the number of the case. Each has one request that its sender means, with the prompt
//! `INTENDED-{n}`, and mostly another hidden in it or behind it, with the prompt `SMUGGLED-{n}`.

/// What may become of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Refused: nothing reaches a worker, the first answer is a 4xx or there is none.
    Refused,
    /// Nothing reaches a worker; it is no request for one.
    Elsewhere,
    /// The intended request, at most once: repaired or refused.
    AtMostOnce,
    /// The intended request, once, and well answered.
    Once,
}
use Fate::{AtMostOnce, Elsewhere, Once, Refused};

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) bytes: Vec<u8>,
    pub(super) fate: Fate,
}

const LINE: &str = "POST /v1/completions HTTP/1.1\r\n";
const HOST: &str = "Host: everline\r\n";
const INTENDED: &str = r#"{"model":"m","prompt":"INTENDED-{n}"}"#;
const SMUGGLED_BODY: &str = r#"{"model":"m","prompt":"SMUGGLED-{n}"}"#;

/// A whole request that nobody meant.
fn smuggled() -> String {
    let length = SMUGGLED_BODY.len() + 4;
    format!("{LINE}{HOST}Connection: close\r\nContent-Length: {length}\r\n\r\n{}", padded(SMUGGLED_BODY))
}

/// Room for any number: the body is as long whichever case it is in.
fn padded(body: &str) -> String {
    format!("{body}{{pad}}")
}

fn intended() -> String {
    padded(INTENDED)
}

fn intended_length() -> usize {
    INTENDED.len() + 4
}

/// The intended body as one chunk and the last one.
fn chunked() -> String {
    format!("{:x}\r\n{}\r\n0\r\n\r\n", intended_length(), intended())
}

/// All cases, numbered.
pub(super) fn cases() -> Vec<Case> {
    let mut all: Vec<(&'static str, Vec<u8>, Fate)> = Vec::new();
    let n = intended_length();
    let (chunks, whole, evil) = (chunked(), intended(), smuggled());
    let mut add = |name, text: String, fate| all.push((name, text.into_bytes(), fate));

    // Two lengths: what is after the shorter is a request to whoever reads that one.
    let cl_te = format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n", 5 + evil.len());
    add("CL.TE", format!("{LINE}{HOST}{cl_te}\r\n0\r\n\r\n{evil}"), Refused);
    let te_cl = "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n";
    add("TE.CL", format!("{LINE}{HOST}{te_cl}\r\n{:x}\r\n{evil}\r\n0\r\n\r\n", evil.len()), Refused);
    let agreeing = format!("Content-Length: {}\r\nTransfer-Encoding: chunked\r\n", chunks.len());
    add("CL and TE that agree", format!("{LINE}{HOST}{agreeing}\r\n{chunks}{evil}"), Refused);
    let first = format!("{LINE}{HOST}Content-Length: {n}\r\n\r\n{whole}");
    add("CL.TE behind a good request", format!("{first}{LINE}{HOST}{cl_te}\r\n0\r\n\r\n{evil}"), AtMostOnce);

    // Codings that one reader takes for chunked and another does not, with a length beside.
    for (name, coding) in [
        ("TE xchunked", "Transfer-Encoding: xchunked"),
        ("TE chunked, identity", "Transfer-Encoding: chunked, identity"),
        ("TE identity", "Transfer-Encoding: identity"),
        ("TE twice, chunked first", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"),
        ("TE twice, chunked last", "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"),
        ("TE quoted", "Transfer-Encoding: \"chunked\""),
        ("TE with a parameter", "Transfer-Encoding: chunked;q=1"),
        ("TE with a vertical tab", "Transfer-Encoding: \x0bchunked"),
        ("TE with a NUL", "Transfer-Encoding: chunked\0"),
        ("TE with a space before the colon", "Transfer-Encoding : chunked"),
        ("TE with a tab before the colon", "Transfer-Encoding\t: chunked"),
        ("TE folded", "Transfer-Encoding:\r\n chunked"),
        ("TE behind a bare CR", "X: a\rTransfer-Encoding: chunked"),
        ("TE behind a bare LF", "X: a\nTransfer-Encoding: chunked"),
        ("TE on a folded line", "X: a\r\n Transfer-Encoding: chunked"),
        ("TE empty", "Transfer-Encoding:"),
        ("TE with a comma", "Transfer-Encoding: ,chunked"),
        ("TE chunked twice", "Transfer-Encoding: chunked, chunked"),
        ("TE with a letter that is none", "Transfer-Encoding: chun\u{212a}ed"),
    ] {
        let fields = format!("Content-Length: {}\r\n{coding}\r\n", 5 + evil.len());
        add(name, format!("{LINE}{HOST}{fields}\r\n0\r\n\r\n{evil}"), Refused);
    }
    for (name, coding) in [
        ("TE gzip, chunked", "gzip, chunked"),
        ("TE identity, chunked", "identity, chunked"),
        ("TE chunked twice, alone", "chunked, chunked"),
        ("TE gzip", "gzip"),
    ] {
        add(name, format!("{LINE}{HOST}Transfer-Encoding: {coding}\r\n\r\n{chunks}"), AtMostOnce);
    }
    let old = "POST /v1/completions HTTP/1.0\r\n";
    add("TE in HTTP/1.0", format!("{old}{HOST}Transfer-Encoding: chunked\r\n\r\n{chunks}{evil}"), AtMostOnce);
    add("TE in odd case", format!("{LINE}{HOST}tRANSFER-eNCODING: cHUNKED\r\n\r\n{chunks}"), Once);

    // Lengths.
    for (name, lengths) in [
        ("two lengths", "Content-Length: 5\r\nContent-Length: {n}"),
        ("two lengths, longer first", "Content-Length: {n}\r\nContent-Length: 5"),
        ("a list of lengths", "Content-Length: 5, {n}"),
        ("length with a plus", "Content-Length: +{n}"),
        ("negative length", "Content-Length: -{n}"),
        ("hexadecimal length", "Content-Length: 0x{n}"),
        ("length with a blank inside", "Content-Length: 5 5"),
        ("length with a semicolon", "Content-Length: {n};"),
        ("length with an exponent", "Content-Length: 1e2"),
        ("length with a point", "Content-Length: 5.0"),
        ("length beyond 64 bits", "Content-Length: 18446744073709551621"),
        ("empty length", "Content-Length:"),
        ("length in other digits", "Content-Length: \u{663}\u{667}"),
        ("length with a blank before the colon", "Content-Length : {n}"),
        ("folded length", "Content-Length:\r\n {n}"),
        ("length behind a bare LF", "X: a\nContent-Length: {n}"),
    ] {
        let lengths = lengths.replace("{n}", &n.to_string());
        add(name, format!("{LINE}{HOST}{lengths}\r\n\r\n{whole}{evil}"), Refused);
    }
    let same = format!("Content-Length: {n}\r\nContent-Length: {n}\r\n");
    add("the same length twice", format!("{LINE}{HOST}{same}\r\n{whole}"), AtMostOnce);
    add("length with zeros before", format!("{LINE}{HOST}Content-Length: 000{n}\r\n\r\n{whole}"), Once);
    let mangled = format!("Content_Length: 5\r\nContent-Length: {n}\r\n");
    add("a length by another name", format!("{LINE}{HOST}{mangled}\r\n{whole}"), Once);
    let mangled = format!("Transfer_Encoding: chunked\r\nContent-Length: {n}\r\n");
    add("a coding by another name", format!("{LINE}{HOST}{mangled}\r\n{whole}"), Once);
    // A request without a length has no body, and what follows is another one.
    add("no length", format!("{LINE}{HOST}\r\n{whole}"), Refused);

    // Chunks.
    let te = "Transfer-Encoding: chunked\r\n";
    for (name, body) in [
        ("chunk size with 0x", format!("0x{n:x}\r\n{whole}\r\n0\r\n\r\n")),
        ("negative chunk size", format!("-{n:x}\r\n{whole}\r\n0\r\n\r\n")),
        ("chunk size with a plus", format!("+{n:x}\r\n{whole}\r\n0\r\n\r\n")),
        ("chunk size with an underscore", format!("0_{n:x}\r\n{whole}\r\n0\r\n\r\n")),
        ("chunk size beyond 64 bits", format!("100000000000000{n:x}\r\n{whole}\r\n0\r\n\r\n")),
        ("chunk size missing", format!("\r\n{whole}\r\n0\r\n\r\n")),
        ("chunk size that is none", format!("zz\r\n{whole}\r\n0\r\n\r\n")),
        ("chunk size with a blank before", format!(" {n:x}\r\n{whole}\r\n0\r\n\r\n")),
        ("chunk longer than its size", format!("{:x}\r\n{whole}\r\n0\r\n\r\n", n - 3)),
        ("chunk shorter than its size", format!("{:x}\r\n{whole}\r\n0\r\n\r\n", n + 3)),
        ("chunk ended by a bare LF", format!("{n:x}\r\n{whole}\n0\r\n\r\n")),
        ("chunk size ended by a bare LF", format!("{n:x}\n{whole}\r\n0\r\n\r\n")),
        ("chunk size ended by a bare CR", format!("{n:x}\r{whole}\r\n0\r\n\r\n")),
        ("chunk extension with a bare LF", format!("{n:x};a\nb\r\n{whole}\r\n0\r\n\r\n")),
        ("chunk extension with a bare CR", format!("{n:x};a\rb\r\n{whole}\r\n0\r\n\r\n")),
        ("chunk extension of 64 KiB", format!("{n:x};{}\r\n{whole}\r\n0\r\n\r\n", "a".repeat(65_536))),
        ("trailers of 128 KiB", format!("{n:x}\r\n{whole}\r\n0\r\nx: {}\r\n\r\n", "a".repeat(131_072))),
        ("trailers without end", format!("{n:x}\r\n{whole}\r\n0\r\n{}", "x: a\r\n".repeat(50_000))),
    ] {
        add(name, format!("{LINE}{HOST}{te}\r\n{body}{evil}"), Refused);
    }
    for (name, body) in [
        ("chunk size with a blank behind", format!("{n:x} \r\n{whole}\r\n0\r\n\r\n")),
        ("a last chunk of many zeros", format!("{n:x}\r\n{whole}\r\n0000\r\n\r\n")),
        (
            "trailers that speak of lengths",
            format!("{n:x}\r\n{whole}\r\n0\r\nContent-Length: 5\r\nHost: evil\r\n\r\n"),
        ),
        ("an extension in quotes", format!("{n:x};a=\"b\"\r\n{whole}\r\n0\r\n\r\n")),
    ] {
        add(name, format!("{LINE}{HOST}{te}\r\n{body}"), AtMostOnce);
    }
    let trailing = format!("{n:x}\r\n{whole}\r\n0\r\nno colon\r\n\r\n");
    add("a trailer that is none", format!("{LINE}{HOST}{te}\r\n{trailing}"), AtMostOnce);

    // Hosts.
    let cl = format!("Content-Length: {n}\r\n");
    for (name, hosts) in [
        ("no host", ""),
        ("two hosts", "Host: everline\r\nHost: evil\r\n"),
        ("the same host twice", "Host: everline\r\nHost: everline\r\n"),
        ("an empty host", "Host:\r\n"),
        ("a list of hosts", "Host: everline, evil\r\n"),
        ("a host with a path", "Host: everline/evil\r\n"),
        ("a host with a query", "Host: everline?evil#\r\n"),
        ("a host with a user", "Host: evil@everline\r\n"),
        ("a host with a port that is none", "Host: everline:evil\r\n"),
        ("a host with port 99999", "Host: everline:99999\r\n"),
        ("a host with a blank before the colon", "Host : everline\r\n"),
        ("a host with a tab inside", "Host: ever\tline\r\n"),
        ("a host on a folded line", "X: a\r\n Host: everline\r\n"),
        ("a host with high bytes", "Host: everl\u{ef}ne\r\n"),
    ] {
        add(name, format!("{LINE}{hosts}{cl}\r\n{whole}{evil}"), Refused);
    }
    let other = "POST http://evil/v1/completions HTTP/1.1\r\n";
    add("an absolute target that is not the host", format!("{other}{HOST}{cl}\r\n{whole}{evil}"), Refused);
    let agreeing = format!("{other}Host: evil\r\n{cl}\r\n{whole}");
    add("an absolute target that is the host", agreeing, Once);
    let user = "POST http://u:p@everline/v1/completions HTTP/1.1\r\n";
    add("an absolute target with a user", format!("{user}{HOST}{cl}\r\n{whole}{evil}"), Refused);

    // Request lines.
    for (name, line) in [
        ("two blanks", "POST  /v1/completions HTTP/1.1\r\n"),
        ("a tab for a blank", "POST\t/v1/completions\tHTTP/1.1\r\n"),
        ("two versions", "POST /v1/completions HTTP/1.1 HTTP/1.0\r\n"),
        ("a blank in the target", "POST /v1/completions /x HTTP/1.1\r\n"),
        ("HTTP/0.9", "POST /v1/completions\r\n"),
        ("HTTP/1.2", "POST /v1/completions HTTP/1.2\r\n"),
        ("HTTP/11", "POST /v1/completions HTTP/11\r\n"),
        ("http in lower case", "POST /v1/completions http/1.1\r\n"),
        ("a method with a control character", "PO\x01ST /v1/completions HTTP/1.1\r\n"),
        ("a target that is no path", "POST v1/completions HTTP/1.1\r\n"),
        ("a bare CR in the line", "POST /v1/completions\rX: y HTTP/1.1\r\n"),
        ("a line ended by a bare LF", "POST /v1/completions HTTP/1.1\n"),
        ("a blank line before the method", " POST /v1/completions HTTP/1.1\r\n"),
        ("a colon before it all", ": x\r\nPOST /v1/completions HTTP/1.1\r\n"),
    ] {
        add(name, format!("{line}{HOST}{cl}\r\n{whole}{evil}"), Refused);
    }
    for (name, line) in [
        ("CONNECT", "CONNECT everline:80 HTTP/1.1\r\n"),
        ("TRACE", "TRACE /v1/completions HTTP/1.1\r\n"),
        ("a target in asterisk form", "OPTIONS * HTTP/1.1\r\n"),
        ("GET with a body", "GET /v1/models HTTP/1.1\r\n"),
        ("HEAD with a body", "HEAD /livez HTTP/1.1\r\n"),
        ("an unknown route with a body", "POST /nothing HTTP/1.1\r\n"),
        ("a route with dots", "POST /v1/../v1/completions HTTP/1.1\r\n"),
        ("a route with an encoded slash", "POST /v1%2fcompletions HTTP/1.1\r\n"),
        ("the admin plane", "POST /v1/admin/workers HTTP/1.1\r\n"),
    ] {
        let length = format!("Content-Length: {}\r\nConnection: close\r\n", evil.len());
        add(name, format!("{line}{HOST}{length}\r\n{evil}"), Elsewhere);
    }
    add("line ends before the request", format!("\r\n\r\n{LINE}{HOST}{cl}\r\n{whole}"), Once);
    let encoded = "POST /v1/completions?a=%0d%0aX-Evil:%20b%20HTTP/1.1%0d%0a HTTP/1.1\r\n";
    add("line ends in percent", format!("{encoded}{HOST}{cl}\r\n{whole}"), Once);

    // Headers.
    for (name, fields) in [
        ("a NUL in a value", "X: a\0b\r\n".to_owned()),
        ("a bare CR in a value", "X: a\rb\r\n".to_owned()),
        ("a bare CR before a line's end", "X: a\r\r\n".to_owned()),
        ("an empty name", ": a\r\n".to_owned()),
        ("a name with a blank", "X y: a\r\n".to_owned()),
        ("a name with high bytes", "X\u{e9}: a\r\n".to_owned()),
        ("no colon", "nonsense\r\n".to_owned()),
        ("a folded value", "X: a\r\n\tb\r\n".to_owned()),
        ("65 fields", "X: a\r\n".repeat(65)),
        ("10,000 fields", "X: a\r\n".repeat(10_000)),
        ("a field of 70 KiB", format!("X: {}\r\n", "a".repeat(70 << 10))),
        ("a field of 8 MiB", format!("X: {}\r\n", "a".repeat(8 << 20))),
    ] {
        add(name, format!("{LINE}{HOST}{fields}{cl}\r\n{whole}{evil}"), Refused);
    }
    add(
        "a target of 70 KiB",
        format!("POST /{} HTTP/1.1\r\n{HOST}{cl}\r\n{whole}{evil}", "a".repeat(70 << 10)),
        Refused,
    );

    // What concerns one connection only must not take the length away from the next.
    for (name, fields) in [
        ("Connection: content-length", "Connection: close, Content-Length\r\n"),
        ("Connection: host", "Connection: close, Host\r\n"),
        ("Connection: transfer-encoding", "Connection: close, Transfer-Encoding\r\n"),
        ("Connection: our own", "Connection: close, X-Request-Id, Everline-Replica\r\n"),
        (
            "an upgrade to h2c",
            "Connection: close, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        ),
        (
            "an upgrade to a socket",
            "Connection: close, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: YQ==\r\n",
        ),
        ("a continuation expected", "Connection: close\r\nExpect: 100-continue\r\n"),
        ("TE and Trailer", "Connection: close, TE\r\nTE: trailers, chunked\r\nTrailer: Content-Length\r\n"),
        ("headers of ours", "Connection: close\r\nEverline-Replica: evil\r\nX-Forwarded-Host: evil\r\n"),
    ] {
        add(name, format!("{LINE}{HOST}{fields}{cl}\r\n{whole}"), Once);
    }
    let odd = "Connection: close\r\nExpect: 200-whatever\r\n";
    add("something else expected", format!("{LINE}{HOST}{odd}{cl}\r\n{whole}"), AtMostOnce);

    // A body that is refused is not the next request.
    let large = format!("Content-Length: {}\r\n", 64 << 20);
    add("a body beyond the limit", format!("{LINE}{HOST}{large}\r\n{evil}"), Refused);
    let gzip = format!("Content-Encoding: gzip\r\nContent-Length: {}\r\n", evil.len());
    add("a compressed body", format!("{LINE}{HOST}{gzip}\r\n{evil}"), Refused);
    let nonsense = format!("Connection: close\r\nContent-Length: {}\r\n", evil.len());
    add("a body that is a request", format!("{LINE}{HOST}{nonsense}\r\n{evil}"), Refused);

    let numbered = all.into_iter().enumerate().map(|(n, (name, bytes, fate))| {
        let number = n.to_string();
        // {n} is as long as what is put there, and so are the blanks that even lengths out.
        let pad = " ".repeat("{n}".len() + 4 - number.len());
        let bytes = replace(&replace(&bytes, b"{n}", number.as_bytes()), b"{pad}", pad.as_bytes());
        Case { name, bytes, fate }
    });
    numbered.collect()
}

fn replace(bytes: &[u8], what: &[u8], by: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(at) = rest.windows(what.len()).position(|window| window == what) {
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(by);
        rest = &rest[at + what.len()..];
    }
    out.extend_from_slice(rest);
    out
}
