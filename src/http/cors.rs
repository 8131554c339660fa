//! Cross-origin requests of browsers, as `http.cors_origins` allows them: to the client plane only.
//!
//! Small and our own, because it needs the route table (which methods a path serves) and must come
//! before credentials are asked for, both of which happen inside the service of a connection.

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};

use super::body::FrontBody;
use super::routes::{Listener, Plane, Route, find};

/// Headers of answers that a page may read, beyond those that it always may.
const EXPOSED: &str = "everline-stream, everline-replica, everline-worker, everline-resumable, \
                       everline-attached, everline-cached-tokens, everline-overlap-blocks, everline-trace, \
                       x-request-id, retry-after, x-should-retry, x-ratelimit-limit-requests, \
                       x-ratelimit-remaining-requests, x-ratelimit-reset-requests";

/// Headers that a page may send, beyond those that it always may.
const SENT: [&str; 7] = [
    "authorization",
    "content-type",
    "idempotency-key",
    "last-event-id",
    "x-api-key",
    "x-request-id",
    "accept",
];

/// Beginnings of further ones: ours, and those of the makers of client libraries.
const SENT_FAMILIES: [&str; 4] = ["everline-", "x-stainless-", "openai-", "anthropic-"];

/// How long a browser may remember the answer to its question, seconds.
const MAX_AGE: &str = "600";

/// Which origins may ask from within a browser.
#[derive(Clone, Debug, Default)]
pub enum Origins {
    /// None: nothing is said of origins, and browsers keep pages out.
    #[default]
    None,
    /// All, as long as no credentials of the browser's own (cookies, client certificates) come along.
    /// An API key that a page sends itself is none of those.
    Any,
    /// These, also with credentials of the browser's own.
    Listed(Vec<HeaderValue>),
}

impl Origins {
    /// As configured; what cannot be sent as a header was refused there.
    pub fn new(origins: &[String]) -> Self {
        match origins {
            [] => Origins::None,
            [any] if any == "*" => Origins::Any,
            listed => Origins::Listed(listed.iter().filter_map(|o| HeaderValue::from_str(o).ok()).collect()),
        }
    }

    /// What is said to the origin of a request; `None` where it is not let in.
    fn allowed<'a>(&self, headers: &'a HeaderMap) -> Option<(&'a HeaderValue, bool)> {
        let origin = headers.get(ORIGIN)?;
        match self {
            Origins::None => None,
            Origins::Any => Some((origin, false)),
            Origins::Listed(listed) => listed.contains(origin).then_some((origin, true)),
        }
    }
}

/// What to add to an answer, made before the request is taken apart.
#[derive(Default)]
pub(super) struct Cors {
    headers: HeaderMap,
}

impl Cors {
    /// Of a request on `listener`.
    pub(super) fn of(origins: &Origins, listener: Listener, request: &HeaderMap) -> Self {
        let mut headers = HeaderMap::new();
        if matches!(origins, Origins::None) || listener != Listener::Client {
            return Self { headers };
        }
        if matches!(origins, Origins::Listed(_)) {
            // Whoever keeps answers must not show one origin's to another.
            headers.append(VARY, HeaderValue::from_static("origin"));
        }
        if let Some((origin, with_credentials)) = origins.allowed(request) {
            match with_credentials {
                true => {
                    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
                    headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
                }
                false => {
                    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
                }
            }
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        }
        Self { headers }
    }

    /// Puts it into an answer. A worker's own words on the matter are replaced.
    pub(super) fn add_to(self, answer: &mut HeaderMap) {
        if self.headers.is_empty() {
            return;
        }
        answer.remove(ACCESS_CONTROL_ALLOW_CREDENTIALS);
        for (name, value) in &self.headers {
            match *name == VARY {
                true => answer.append(name, value.clone()),
                false => answer.insert(name, value.clone()).is_some(),
            };
        }
    }
}

/// The answer to a browser that asks whether a page may send a request; `None` if this is no such
/// question, or nobody is let in. Needs no credentials: browsers send none with it.
pub(super) fn preflight(
    origins: &Origins,
    listener: Listener,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
) -> Option<Response<FrontBody>> {
    if *method != Method::OPTIONS || listener != Listener::Client || matches!(origins, Origins::None) {
        return None;
    }
    let wanted = Method::from_bytes(headers.get(ACCESS_CONTROL_REQUEST_METHOD)?.as_bytes()).ok()?;
    headers.get(ORIGIN)?;
    let mut response = Response::new(FrontBody::full(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let map = response.headers_mut();
    // What depends on the question must not be kept for another one.
    map.append(
        VARY,
        HeaderValue::from_static("access-control-request-method, access-control-request-headers"),
    );
    let route = find(listener, false, &wanted, path).ok().and_then(Route::entry);
    let route = route.filter(|entry| entry.plane == Plane::Client);
    if let (Some(entry), Some(_)) = (route, origins.allowed(headers)) {
        if let Ok(methods) = HeaderValue::try_from(entry.allow()) {
            map.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        }
        if let Ok(names) = HeaderValue::try_from(sendable(headers)) {
            map.insert(ACCESS_CONTROL_ALLOW_HEADERS, names);
        }
        map.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
    }
    Some(response)
}

/// Those of the headers asked for that may be sent.
fn sendable(headers: &HeaderMap) -> String {
    let asked = headers.get_all(ACCESS_CONTROL_REQUEST_HEADERS).iter();
    let names = asked.flat_map(super::headers::list).map(str::to_ascii_lowercase).filter(|name| {
        SENT.contains(&name.as_str()) || SENT_FAMILIES.iter().any(|family| name.starts_with(family))
    });
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(origin: &str, method: &str, names: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ORIGIN, HeaderValue::from_str(origin).unwrap());
        headers.insert(ACCESS_CONTROL_REQUEST_METHOD, HeaderValue::from_str(method).unwrap());
        headers.insert(ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue::from_str(names).unwrap());
        headers
    }

    fn said(origins: &Origins, path: &str, headers: &HeaderMap) -> Option<HeaderMap> {
        let response = preflight(origins, Listener::Client, &Method::OPTIONS, path, headers)?;
        assert_eq!(response.status(), StatusCode::NO_CONTENT);
        let mut map = response.headers().clone();
        Cors::of(origins, Listener::Client, headers).add_to(&mut map);
        Some(map)
    }

    #[test]
    fn a_listed_origin_may_send_what_clients_send_and_another_may_not() {
        let origins = Origins::new(&["https://a.example".to_owned(), "http://localhost:3000".to_owned()]);
        let names = "Authorization,last-event-id, Everline-Resume,X-Stainless-Lang,x-evil";
        let map = said(&origins, "/v1/chat/completions", &asks("https://a.example", "POST", names)).unwrap();
        assert_eq!(map[ACCESS_CONTROL_ALLOW_ORIGIN], "https://a.example");
        assert_eq!(map[ACCESS_CONTROL_ALLOW_CREDENTIALS], "true");
        assert_eq!(map[ACCESS_CONTROL_ALLOW_METHODS], "POST");
        assert_eq!(
            map[ACCESS_CONTROL_ALLOW_HEADERS],
            "authorization, last-event-id, everline-resume, x-stainless-lang"
        );
        assert!(map.get_all(VARY).iter().any(|value| value == "origin"));
        let other =
            said(&origins, "/v1/chat/completions", &asks("https://b.example", "POST", names)).unwrap();
        assert!(
            !other.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN)
                && !other.contains_key(ACCESS_CONTROL_ALLOW_METHODS)
        );
        let map = said(&origins, "/v1/streams/st_x", &asks("http://localhost:3000", "DELETE", "")).unwrap();
        assert_eq!(map[ACCESS_CONTROL_ALLOW_METHODS], "GET, DELETE, HEAD");
    }

    #[test]
    fn routes_of_nodes_and_what_is_no_question_are_not_answered_for() {
        let origins = Origins::Any;
        let node = said(&origins, "/v1/nodes", &asks("https://a.example", "POST", "")).unwrap();
        assert!(!node.contains_key(ACCESS_CONTROL_ALLOW_METHODS));
        let mut plain = asks("https://a.example", "POST", "");
        plain.remove(ACCESS_CONTROL_REQUEST_METHOD);
        assert!(said(&origins, "/v1/files", &plain).is_none(), "OPTIONS goes to the worker");
        assert!(said(&Origins::None, "/v1/models", &asks("https://a.example", "GET", "")).is_none());
    }

    #[test]
    fn everybody_is_let_in_without_credentials_only() {
        let map = said(&Origins::new(&["*".to_owned()]), "/v1/models", &asks("https://a.example", "GET", ""))
            .unwrap();
        assert_eq!(map[ACCESS_CONTROL_ALLOW_ORIGIN], "*");
        assert!(!map.contains_key(ACCESS_CONTROL_ALLOW_CREDENTIALS));
        assert!(map[ACCESS_CONTROL_EXPOSE_HEADERS].to_str().unwrap().contains("everline-stream"));
    }
}
