//! What a browser's `EventSource` is told when its stream cannot be had just now: it is closed for
//! good by any status but 200 (<https://html.spec.whatwg.org/multipage/server-sent-events.html>,
//! "announce the connection" and "fail the connection"), and comes back by itself from an answer that ends.

use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Method, Request, Response, StatusCode};

use super::create::RESUME;
use crate::http::body::FrontBody;

/// Pause that it is asked for where the refusal names none.
const PAUSE_S: u64 = 1;
/// Longest pause that it is asked for.
const MOST_PAUSE_S: u64 = 30;

/// Whether a request is one of an `EventSource` for a stream. Whoever says that it can come back reads
/// the status.
pub(in crate::http) fn asks<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    request.method() == Method::GET
        && request.uri().path().starts_with("/v1/streams/")
        && headers.get(ACCEPT).is_some_and(|accepted| accepted == "text/event-stream")
        && !headers.contains_key(RESUME)
}

/// The answer to it: a refusal that may pass becomes a stream without an event, after which it comes
/// back; everything else stays as it is.
pub(in crate::http) fn come_back(response: Response<FrontBody>) -> Response<FrontBody> {
    if !matches!(response.status(), StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
        return response;
    }
    let (mut parts, _) = response.into_parts();
    let named = parts.headers.remove(RETRY_AFTER);
    let named = named.and_then(|value| value.to_str().ok()?.parse().ok());
    let pause = named.unwrap_or(PAUSE_S).clamp(PAUSE_S, MOST_PAUSE_S);
    let text = format!(": {}\nretry: {}\n\n", parts.status, pause * 1000);
    parts.status = StatusCode::OK;
    parts.headers.remove(CONTENT_LENGTH);
    parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    parts.headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Response::from_parts(parts, FrontBody::full(text))
}
