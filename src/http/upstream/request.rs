//! A request on its way to a worker, the same for every attempt; and the same for one rank of it.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::Full;
use serde_json::value::RawValue;

use super::endpoint::Endpoint;
use crate::http::headers::{self, HeaderRules};
use crate::state::worker::EngineKind;

/// Names the data-parallel rank that shall take a request: for vLLM on all routes that generate, for newer
/// SGLang on OpenAI's and Anthropic's.
const RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");

/// Members of the body that name the rank for SGLang, on its own route too; the second one is what it
/// was called before, and is all that older versions know.
const RANK_MEMBERS: [&str; 2] = ["routed_dp_rank", "data_parallel_rank"];

/// Everything of a request but where it goes.
#[derive(Debug)]
pub(in crate::http) struct Outgoing<'a> {
    method: &'a Method,
    target: &'a str,
    headers: HeadersToWorker<'a>,
    body: Bytes,
    /// The header lines of HTTP/1, written when first needed.
    lines: OnceLock<Vec<u8>>,
    /// As the line of the host begins, which is written with each endpoint.
    host: &'static str,
}

/// A client's headers, of which only those that may pass are read.
#[derive(Clone, Debug)]
pub(in crate::http) struct HeadersToWorker<'a> {
    /// As the client sent them.
    pub(in crate::http) client: &'a HeaderMap,
    /// The request's id, the client's or a new one.
    pub(in crate::http) request_id: &'a HeaderValue,
    /// What may pass.
    pub(in crate::http) rules: &'a HeaderRules,
    /// Headers of ours, which replace the client's of the same name.
    pub(in crate::http) ours: HeaderMap,
}

impl<'a> Outgoing<'a> {
    /// `target` is path and query.
    pub(in crate::http) fn new(
        method: &'a Method,
        target: &'a str,
        headers: HeadersToWorker<'a>,
        body: Bytes,
    ) -> Self {
        Self { method, target, headers, body, lines: OnceLock::new(), host: "host: " }
    }

    /// With exactly these header lines behind that of the host, the empty one at their end, over HTTP/1.
    pub(in crate::http) fn verbatim(
        method: &'a Method,
        target: &'a str,
        headers: HeadersToWorker<'a>,
        lines: Vec<u8>,
        body: Bytes,
    ) -> Self {
        Self { method, target, headers, body, lines: OnceLock::from(lines), host: "Host: " }
    }

    /// The same for one of the worker's data-parallel ranks, said as its engine reads it.
    pub(in crate::http) fn to_rank(&self, rank: u32, engine: EngineKind) -> Self {
        let mut headers = self.headers.clone();
        headers.ours.insert(RANK, rank.into());
        let body = match engine {
            EngineKind::Sglang => with_rank(&self.body, rank),
            EngineKind::Vllm | EngineKind::OpenaiCompatible => None,
        };
        Self::new(self.method, self.target, headers, body.unwrap_or_else(|| self.body.clone()))
    }

    /// The same with another body, as one of two workers that share it gets it, and with this id if there
    /// is one. Both read each other's words, or we do: nothing may be compressed.
    pub(in crate::http) fn leg<'b>(
        &'b self,
        body: Bytes,
        request_id: Option<&'b HeaderValue>,
    ) -> Outgoing<'b> {
        let mut headers = self.headers.clone();
        headers.ours.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let request_id = request_id.unwrap_or(headers.request_id);
        let HeadersToWorker { client, rules, ours, .. } = headers;
        Outgoing::new(self.method, self.target, HeadersToWorker { client, request_id, rules, ours }, body)
    }

    /// Its path, without a query.
    pub(in crate::http) fn path(&self) -> &'a str {
        self.target.split_once('?').map_or(self.target, |(path, _)| path)
    }

    /// Whether no answer to it has a body.
    pub(super) fn is_head(&self) -> bool {
        self.method == Method::HEAD
    }

    /// The body.
    pub(in crate::http) fn body(&self) -> &Bytes {
        &self.body
    }

    fn has_body(&self) -> bool {
        !self.body.is_empty() || matches!(*self.method, Method::POST | Method::PUT | Method::PATCH)
    }

    /// Writes the head for HTTP/1.1, in place of what `head` held.
    pub(super) fn write_head(&self, endpoint: &Endpoint, head: &mut Vec<u8>) {
        head.clear();
        head.extend_from_slice(self.method.as_str().as_bytes());
        head.push(b' ');
        head.extend_from_slice(self.target.as_bytes());
        head.extend_from_slice(b" HTTP/1.1\r\n");
        head.extend_from_slice(self.host.as_bytes());
        head.extend_from_slice(endpoint.authority.as_str().as_bytes());
        head.extend_from_slice(b"\r\n");
        head.extend_from_slice(self.lines.get_or_init(|| self.write_lines()));
    }

    fn write_lines(&self) -> Vec<u8> {
        let mut lines = Vec::with_capacity(512);
        headers::for_worker(&self.headers, |name, value| {
            lines.extend_from_slice(name.as_str().as_bytes());
            lines.extend_from_slice(b": ");
            lines.extend_from_slice(value.as_bytes());
            lines.extend_from_slice(b"\r\n");
        });
        if self.has_body() {
            lines.extend_from_slice(format!("content-length: {}\r\n", self.body.len()).as_bytes());
        }
        lines.extend_from_slice(b"\r\n");
        lines
    }

    /// The request for HTTP/2. `None` if its target is none, which no parsed request has.
    pub(super) fn to_h2(&self, endpoint: &Endpoint) -> Option<Request<Full<Bytes>>> {
        let uri = Uri::builder()
            .scheme(if endpoint.tls { "https" } else { "http" })
            .authority(endpoint.authority.clone())
            .path_and_query(self.target)
            .build()
            .ok()?;
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri;
        *request.version_mut() = http::Version::HTTP_2;
        let fields = request.headers_mut();
        headers::for_worker(&self.headers, |name, value| {
            fields.append(name.clone(), value.clone());
        });
        if self.has_body() {
            fields.insert(CONTENT_LENGTH, self.body.len().into());
        }
        Some(request)
    }
}

/// The body with the rank in it, at its end and in place of what the client said of ranks. `None` for what is
/// no JSON object, to which nothing can be added.
fn with_rank(body: &Bytes, rank: u32) -> Option<Bytes> {
    let text = body.trim_ascii_end();
    let inside = text.strip_suffix(b"}")?.trim_ascii_end();
    if !text.trim_ascii_start().starts_with(b"{") {
        return None;
    }
    let members = RANK_MEMBERS.map(|name| format!("\"{name}\":{rank}")).join(",");
    // Seldom: then it is written anew, because not all readers agree which of two equal members counts.
    if RANK_MEMBERS.iter().any(|name| memchr::memmem::find(body, name.as_bytes()).is_some()) {
        let mut object: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(body).ok()?;
        for name in RANK_MEMBERS {
            object.insert(name.to_owned(), RawValue::from_string(rank.to_string()).ok()?);
        }
        return serde_json::to_vec(&object).ok().map(Bytes::from);
    }
    let separator = if inside.trim_ascii() == b"{" { "" } else { "," };
    let mut out = Vec::with_capacity(inside.len() + separator.len() + members.len() + 1);
    for part in [inside, separator.as_bytes(), members.as_bytes(), b"}"] {
        out.extend_from_slice(part);
    }
    Some(out.into())
}

impl<'a> HeadersToWorker<'a> {
    /// Headers of a request that no client sent.
    pub(in crate::http) fn own(
        request_id: &'a HeaderValue,
        none: &'a HeaderMap,
        rules: &'a HeaderRules,
    ) -> Self {
        Self { client: none, request_id, ours: HeaderMap::new(), rules }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranked(body: &'static str) -> Option<String> {
        Some(String::from_utf8(with_rank(&Bytes::from_static(body.as_bytes()), 3)?.to_vec()).unwrap())
    }

    #[test]
    fn sglang_is_told_the_rank_in_the_body() {
        let both = r#""routed_dp_rank":3,"data_parallel_rank":3}"#;
        assert_eq!(ranked(r#"{"text":"a"} "#), Some(format!(r#"{{"text":"a",{both}"#)));
        assert_eq!(ranked(" { }\n"), Some(format!(" {{{both}")));
        // What the client said is replaced, and the rest of it stays to the last digit.
        let own = r#"{"routed_dp_rank":1,"big":12345678901234567890123,"text":"data_parallel_rank"}"#;
        let written: serde_json::Value = serde_json::from_str(&ranked(own).unwrap()).unwrap();
        assert_eq!((&written["routed_dp_rank"], &written["data_parallel_rank"]), (&3.into(), &3.into()));
        assert!(ranked(own).unwrap().contains("12345678901234567890123"));
        for other in ["", "[1]", "\u{1f}zipped", "{", "}", r#"{"routed_dp_rank":}"#] {
            assert_eq!(ranked(other), None, "{other}");
        }
    }

    #[test]
    fn each_kind_of_engine_is_told_the_rank_as_it_reads_it() {
        let (method, none) = (Method::POST, HeaderMap::new());
        let (id, rules) = (HeaderValue::from_static("r"), HeaderRules::default());
        let body = Bytes::from_static(br#"{"text":"a"}"#);
        let outgoing =
            Outgoing::new(&method, "/generate", HeadersToWorker::own(&id, &none, &rules), body.clone());
        for (engine, in_body) in
            [(EngineKind::Vllm, false), (EngineKind::OpenaiCompatible, false), (EngineKind::Sglang, true)]
        {
            let ranked = outgoing.to_rank(2, engine);
            let head = String::from_utf8(ranked.write_lines()).unwrap();
            assert!(head.contains("x-data-parallel-rank: 2\r\n"), "{head}");
            assert!(head.contains(&format!("content-length: {}\r\n", ranked.body.len())), "{head}");
            assert_eq!(ranked.body != body, in_body, "{engine}");
        }
    }
}
