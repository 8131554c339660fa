//! A request on its way to a worker, the same for every attempt.

use std::sync::OnceLock;

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use http_body_util::Full;

use super::endpoint::Endpoint;
use crate::http::headers::{self, HeaderRules};

/// Names the data-parallel rank that shall take a request.
const RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");

/// Everything of a request but where it goes.
#[derive(Debug)]
pub(in crate::http) struct Outgoing<'a> {
    method: &'a Method,
    target: &'a str,
    headers: HeadersToWorker<'a>,
    body: Bytes,
    /// The header lines of HTTP/1, written when first needed.
    lines: OnceLock<Vec<u8>>,
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
        Self { method, target, headers, body, lines: OnceLock::new() }
    }

    /// The same for one of the worker's data-parallel ranks, in the header that vLLM reads.
    pub(in crate::http) fn to_rank(&self, rank: u32) -> Self {
        let mut headers = self.headers.clone();
        headers.ours.insert(RANK, rank.into());
        Self::new(self.method, self.target, headers, self.body.clone())
    }

    /// Whether no answer to it has a body.
    pub(super) fn is_head(&self) -> bool {
        self.method == Method::HEAD
    }

    /// The body.
    pub(super) fn body(&self) -> &Bytes {
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
        head.extend_from_slice(b" HTTP/1.1\r\nhost: ");
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
