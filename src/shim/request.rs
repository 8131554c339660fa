//! Which requests are resumed, and what the other requests look like that their streams take.

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use serde_json::json;

use super::resume::Dialect;

const RESUME: HeaderName = HeaderName::from_static("everline-resume");
const STREAM: HeaderName = HeaderName::from_static("everline-stream");
const REPLICA: HeaderName = HeaderName::from_static("everline-replica");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// A route whose streams are resumed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Route {
    pub(super) dialect: Dialect,
    /// What comes before the route's own part, with the slash: `/v1/`.
    root: String,
}

impl Route {
    /// The route of a request, if its stream would be resumed. A client that goes on by itself
    /// is left alone.
    pub(super) fn of(method: &Method, path: &str, headers: &HeaderMap) -> Option<Self> {
        let resumes_itself = headers.contains_key(LAST_EVENT_ID) || headers.contains_key(RESUME);
        let is_encoded = headers.contains_key(header::CONTENT_ENCODING);
        if method != Method::POST || resumes_itself || is_encoded {
            return None;
        }
        let routes = [
            ("/v1/chat/completions", Dialect::OpenAi),
            ("/v1/completions", Dialect::OpenAi),
            ("/v1/responses", Dialect::Responses),
            ("/v1/messages", Dialect::Anthropic),
        ];
        let (before, dialect) =
            routes.into_iter().find_map(|(end, dialect)| Some((path.strip_suffix(end)?, dialect)))?;
        Some(Self { dialect, root: format!("{before}/v1/") })
    }

    /// Where a stream is asked for again.
    pub(super) fn stream_path(&self, stream: &str, end: &str) -> Result<PathAndQuery, http::Error> {
        Ok(PathAndQuery::try_from(format!("{}streams/{stream}{end}", self.root))?)
    }
}

/// Whether a body asks for a stream.
pub(super) fn wants_stream(body: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Asked {
        #[serde(default)]
        stream: serde_json::Value,
    }
    serde_json::from_slice::<Asked>(body).is_ok_and(|asked| asked.stream == serde_json::Value::Bool(true))
}

/// What the first request of a stream is sent with.
pub(super) fn first_headers(client: &HeaderMap) -> HeaderMap {
    let mut headers = client.clone();
    headers.insert(RESUME, HeaderValue::from_static("1"));
    // Events can be told apart in what is not compressed only.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if !headers.contains_key(&IDEMPOTENCY_KEY) {
        let key = format!("everline-shim-{:032x}", rand::random::<u128>());
        if let Ok(key) = HeaderValue::try_from(key) {
            headers.insert(IDEMPOTENCY_KEY, key);
        }
    }
    headers
}

/// What the rest of a stream is asked for with: the first headers without what speaks of the body.
pub(super) fn resume_headers(first: &HeaderMap, last_event_id: Option<&str>) -> HeaderMap {
    let mut headers = stream_headers(first);
    headers.insert(header::ACCEPT, HeaderValue::from_static("text/event-stream"));
    if let Some(id) = last_event_id.and_then(|id| HeaderValue::from_str(id).ok()) {
        headers.insert(LAST_EVENT_ID, id);
    }
    headers
}

/// What a stream is cancelled with.
pub(super) fn cancel_headers(first: &HeaderMap) -> HeaderMap {
    let mut headers = stream_headers(first);
    headers.remove(header::ACCEPT);
    headers
}

fn stream_headers(first: &HeaderMap) -> HeaderMap {
    let mut headers = first.clone();
    for name in [header::CONTENT_LENGTH, header::CONTENT_TYPE, header::TRANSFER_ENCODING, IDEMPOTENCY_KEY] {
        headers.remove(name);
    }
    headers
}

/// Headers that speak of one connection only (RFC 9110, section 7.6.1), and what is written anew.
pub(super) fn without_hop_by_hop(headers: &HeaderMap) -> HeaderMap {
    const HOP: [&str; 10] = [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "expect",
    ];
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    let passes = |name: &str| !HOP.contains(&name) && !named.iter().any(|other| other == name);
    let passing = headers.iter().filter(|(name, _)| passes(name.as_str()));
    passing.map(|(name, value)| (name.clone(), value.clone())).fold(
        HeaderMap::new(),
        |mut all, (name, value)| {
            all.append(name, value);
            all
        },
    )
}

/// What an answer is to somebody who wants a stream's events.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    /// They come.
    Events,
    /// Not now; it may be different a moment later or elsewhere.
    Passing,
    /// Never.
    Final,
}

/// Judges an answer by its head.
pub(super) fn judge<B>(response: &Response<B>) -> Answer {
    let headers = response.headers();
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let is_events =
        kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"));
    let is_plain = headers.get(header::CONTENT_ENCODING).is_none_or(|value| value == "identity");
    let is_ours = headers.contains_key(STREAM) || headers.contains_key(REPLICA);
    if response.status() == StatusCode::OK && is_events && is_plain && is_ours {
        return Answer::Events;
    }
    let refused =
        headers.get(SHOULD_RETRY).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"false"));
    match response.status().as_u16() {
        408 | 429 | 500 | 502 | 503 | 504 if !refused => Answer::Passing,
        _ => Answer::Final,
    }
}

/// The stream that an answer names. Nothing else is put into a path.
pub(super) fn stream_of<B>(response: &Response<B>) -> Option<String> {
    let name = response.headers().get(STREAM)?.to_str().ok()?;
    let is_name = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    (!name.is_empty() && name.len() <= 64 && is_name(name)).then(|| name.to_owned())
}

/// Why a request, or a stream, came to no good end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Trouble {
    pub(super) code: String,
    pub(super) message: String,
}

impl Trouble {
    pub(super) fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into() }
    }

    /// What a refusal says, in either dialect, or nothing.
    pub(super) fn said_by(body: &[u8]) -> Option<Self> {
        let said: serde_json::Value = serde_json::from_slice(body).ok()?;
        let error = said.get("error")?;
        let text = |name: &str| error.get(name).and_then(serde_json::Value::as_str);
        Some(Self::new(text("code").or_else(|| text("type"))?, text("message").unwrap_or_default()))
    }

    /// As the body of an answer.
    pub(super) fn body(&self, dialect: Dialect) -> String {
        match dialect {
            Dialect::Anthropic => {
                let error = json!({"type": "api_error", "message": self.message, "code": self.code});
                json!({"type": "error", "error": error}).to_string()
            }
            Dialect::OpenAi | Dialect::Responses => {
                let (message, code) = (&self.message, &self.code);
                json!({"error": {"message": message, "type": "server_error", "param": null, "code": code}})
                    .to_string()
            }
        }
    }

    /// As the end of a stream whose next event would have been `number`.
    pub(super) fn events(&self, dialect: Dialect, number: u64) -> String {
        let body = match dialect {
            // As the API's reference has it, and with the member that SDKs raise by.
            Dialect::Responses => {
                let (message, code) = (&self.message, &self.code);
                let error = json!({"message": message, "type": "server_error", "param": null, "code": code});
                json!({
                    "type": "error", "sequence_number": number, "code": code, "message": message,
                    "param": null, "error": error,
                })
                .to_string()
            }
            Dialect::OpenAi | Dialect::Anthropic => self.body(dialect),
        };
        let named = if dialect == Dialect::OpenAi { "" } else { "event: error\n" };
        format!("{named}data: {body}\n\ndata: [DONE]\n\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(all: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = all.iter().map(|(name, value)| (*name, *value));
        pairs.fold(HeaderMap::new(), |mut map, (name, value)| {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
            map
        })
    }

    #[test]
    fn routes_are_told_by_method_path_and_headers() {
        let route = |path, all| Route::of(&Method::POST, path, &headers(all));
        let chat = route("/v1/chat/completions", &[]).unwrap();
        assert_eq!(chat.stream_path("st_x", "/cancel").unwrap(), "/v1/streams/st_x/cancel");
        let below = route("/a/v1/messages", &[]).unwrap();
        assert_eq!(below.dialect, Dialect::Anthropic);
        assert_eq!(below.stream_path("st_x", "").unwrap(), "/a/v1/streams/st_x");
        assert_eq!(route("/v1/embeddings", &[]), None);
        assert_eq!(route("/v1/responses", &[("last-event-id", "st_x.1")]), None);
        assert_eq!(route("/v1/responses", &[("everline-resume", "1")]), None);
        assert_eq!(Route::of(&Method::GET, "/v1/completions", &HeaderMap::new()), None);
    }

    #[test]
    fn only_true_asks_for_a_stream() {
        assert!(wants_stream(br#"{"model":"m","stream":true}"#));
        for other in
            [r#"{"stream":false}"#, r#"{"stream":"true"}"#, "{}", "[]", "", r#"{"x":{"stream":true}}"#]
        {
            assert!(!wants_stream(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_resumption_has_the_credentials_and_nothing_of_the_body() {
        let first = first_headers(&headers(&[
            ("authorization", "Bearer k"),
            ("content-type", "application/json"),
            ("accept-encoding", "gzip"),
        ]));
        assert!(first["idempotency-key"].to_str().unwrap().starts_with("everline-shim-"));
        assert_eq!(
            (&first["everline-resume"], &first["accept-encoding"]),
            (&HeaderValue::from_static("1"), &HeaderValue::from_static("identity"))
        );
        let resumed = resume_headers(&first, Some("st_x.3"));
        assert_eq!(
            (&resumed["authorization"], &resumed["last-event-id"]),
            (&HeaderValue::from_static("Bearer k"), &HeaderValue::from_static("st_x.3"))
        );
        assert!(!resumed.contains_key("content-type") && !resumed.contains_key("idempotency-key"));
        assert!(!resume_headers(&first, None).contains_key("last-event-id"));
        let own = first_headers(&headers(&[("idempotency-key", "mine")]));
        assert_eq!(own["idempotency-key"], "mine");
    }

    #[test]
    fn what_speaks_of_the_connection_stays() {
        let all = headers(&[
            ("connection", "close, X-Listed"),
            ("x-listed", "1"),
            ("te", "trailers"),
            ("x-a", "1"),
            ("x-a", "2"),
        ]);
        assert_eq!(without_hop_by_hop(&all), headers(&[("x-a", "1"), ("x-a", "2")]));
    }

    #[test]
    fn answers_are_judged_by_their_heads() {
        let answer = |status: u16, all: &[(&'static str, &'static str)]| {
            let mut response = Response::new(());
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            *response.headers_mut() = headers(all);
            judge(&response)
        };
        let events = ("content-type", "Text/Event-Stream; charset=utf-8");
        assert_eq!(answer(200, &[events, ("everline-stream", "st_x")]), Answer::Events);
        assert_eq!(answer(200, &[events]), Answer::Final, "of some other server");
        assert_eq!(
            answer(200, &[events, ("everline-replica", "r"), ("content-encoding", "gzip")]),
            Answer::Final
        );
        assert_eq!(answer(503, &[]), Answer::Passing);
        assert_eq!(answer(503, &[("x-should-retry", "false")]), Answer::Final);
        for status in [204, 400, 401, 403, 404, 410, 412, 422] {
            assert_eq!(answer(status, &[]), Answer::Final);
        }
    }

    #[test]
    fn a_name_that_could_lead_elsewhere_is_none() {
        let named = |name: &'static str| {
            let mut response = Response::new(());
            response.headers_mut().insert(STREAM, HeaderValue::from_static(name));
            stream_of(&response)
        };
        assert_eq!(named("st_abc").as_deref(), Some("st_abc"));
        for bad in ["", "../x", "a/b", "a?b", "a b"] {
            assert_eq!(named(bad), None, "{bad}");
        }
    }

    #[test]
    fn trouble_is_told_in_the_dialect_of_the_route() {
        let trouble = Trouble::new("stream_lost", "gone");
        let data = |dialect| {
            let events = trouble.events(dialect, 7);
            assert!(events.ends_with("\n\ndata: [DONE]\n\n"));
            let line = events.lines().find_map(|line| line.strip_prefix("data: ")).unwrap().to_owned();
            serde_json::from_str::<serde_json::Value>(&line).unwrap()
        };
        assert_eq!(data(Dialect::OpenAi)["error"]["code"], "stream_lost");
        assert_eq!(data(Dialect::Anthropic)["error"]["message"], "gone");
        assert_eq!(data(Dialect::Responses)["sequence_number"], 7);
        for dialect in [Dialect::OpenAi, Dialect::Anthropic] {
            assert_eq!(Trouble::said_by(trouble.body(dialect).as_bytes()), Some(trouble.clone()));
        }
        assert_eq!(Trouble::said_by(b"no json"), None);
    }
}
