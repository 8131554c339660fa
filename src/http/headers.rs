//! Headers at the boundary: what passes, what stays, and the request's id.
//!
//! From a client to a worker everything passes except: what speaks of one connection only
//! (RFC 9110, section 7.6.1), credentials and cookies, what proxies say of each other
//! (`Forwarded`, `X-Forwarded-*`), and the names this cluster keeps for itself (`Everline-*`,
//! `X-Everline-*`, `KV-Comm-*`). [`HeaderRules`] lets more or less pass, but never the first.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::upstream::HeadersToWorker;

/// Names a request through all its hops.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Which replica answered.
pub(super) const REPLICA: HeaderName = HeaderName::from_static("everline-replica");
/// Which worker answered.
pub(super) const WORKER: HeaderName = HeaderName::from_static("everline-worker");
/// Which worker did the prefill, if another one answered.
pub(super) const PREFILL_WORKER: HeaderName = HeaderName::from_static("everline-prefill-worker");
/// Tokens of the prompt that the router expects the worker to have cached.
pub(super) const CACHED: HeaderName = HeaderName::from_static("everline-cached-tokens");
/// Blocks of the prompt that the router expects the worker to have cached.
pub(super) const OVERLAP_BLOCKS: HeaderName = HeaderName::from_static("everline-overlap-blocks");
/// What was known of each candidate, for a request that asked for it by the same header.
pub(super) const TRACE: HeaderName = HeaderName::from_static("everline-trace");

/// Longest request id kept from a client.
const MAX_REQUEST_ID: usize = 128;

/// The client's request id if it is 1 to 128 visible ASCII characters, else a new one.
pub(super) fn request_id(headers: &HeaderMap) -> HeaderValue {
    match headers.get(REQUEST_ID) {
        Some(id) if is_request_id(id.as_bytes()) => id.clone(),
        _ => new_request_id(),
    }
}

/// 128 random bits.
pub(super) fn new_request_id() -> HeaderValue {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let random = rand::random::<u128>();
    let text: [u8; 32] = std::array::from_fn(|at| DIGITS[(random >> (4 * at) & 15) as usize]);
    HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("0"))
}

fn is_request_id(id: &[u8]) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)
}

/// Exceptions to what passes from clients to workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderRules {
    /// Pass although they would stay, such as `authorization`.
    pub forward: Vec<HeaderName>,
    /// Stay although they would pass.
    pub drop: Vec<HeaderName>,
    /// All pass that may pass at all, credentials too: to a replica, which is to see what its client
    /// sent.
    pub everything: bool,
}

impl HeaderRules {
    fn passes(&self, name: &HeaderName) -> bool {
        if self.everything {
            return true;
        }
        if is_private(name.as_str()) { self.forward.contains(name) } else { !self.drop.contains(name) }
    }
}

/// Headers that speak of one connection only, whoever sends them.
pub(super) fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "transfer-encoding"
            | "te"
            | "trailer"
            | "upgrade"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "http2-settings"
    )
}

/// Written anew for each hop.
fn is_ours(name: &str) -> bool {
    matches!(name, "host" | "content-length" | "expect" | "x-request-id")
}

/// No business of a worker's, or nothing a client has a say in.
fn is_private(name: &str) -> bool {
    match name.as_bytes()[0] {
        b'a' => name == "authorization" || name == "api-key",
        b'c' => name == "cookie",
        b'e' => name.starts_with("everline-"),
        b'f' => name == "forwarded",
        b'k' => name.starts_with("kv-comm-"),
        b'x' => {
            name.starts_with("x-forwarded-")
                || name.starts_with("x-everline-")
                || name == "x-api-key"
                || name == "x-real-ip"
        }
        _ => false,
    }
}

/// The items of a comma-separated header value; none if it is not visible ASCII.
pub(super) fn list(value: &HeaderValue) -> impl Iterator<Item = &str> {
    value.to_str().unwrap_or_default().split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// Calls `field` with each header that a worker gets to see.
pub(super) fn for_worker<'a>(
    headers: &'a HeadersToWorker<'_>,
    mut field: impl FnMut(&'a HeaderName, &'a HeaderValue),
) {
    let HeadersToWorker { client, request_id, rules, ours } = headers;
    let connections = client.get_all(http::header::CONNECTION);
    for (name, value) in *client {
        let text = name.as_str();
        let stays = is_hop_by_hop(name)
            || is_ours(text)
            || !rules.passes(name)
            || (!ours.is_empty() && ours.contains_key(name))
            || connections.iter().flat_map(list).any(|listed| listed.eq_ignore_ascii_case(text));
        if !stays {
            field(name, value);
        }
    }
    static ID: HeaderName = REQUEST_ID;
    field(&ID, request_id);
    for (name, value) in ours {
        field(name, value);
    }
}

/// The client's headers that a worker gets to see.
pub(super) fn passing(client: &HeaderMap, rules: &HeaderRules) -> HeaderMap {
    let mut passed = HeaderMap::new();
    let id = HeaderValue::from_static("");
    let headers = HeadersToWorker { client, request_id: &id, rules, ours: HeaderMap::new() };
    for_worker(&headers, |name, value| {
        if *name != REQUEST_ID {
            passed.append(name.clone(), value.clone());
        }
    });
    passed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passing(client: &HeaderMap, rules: &HeaderRules) -> Vec<String> {
        let id = HeaderValue::from_static("id");
        let ours =
            HeaderMap::from_iter([(HeaderName::from_static("traceparent"), HeaderValue::from_static("new"))]);
        let headers = HeadersToWorker { client, request_id: &id, rules, ours };
        let mut lines = Vec::new();
        for_worker(&headers, |name, value| lines.push(format!("{name}: {}", value.to_str().unwrap())));
        lines.sort_unstable();
        lines
    }

    #[test]
    fn private_and_hop_by_hop_headers_stay() {
        let mut client = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("cookie", "a=b"),
            ("connection", "keep-alive, X-Listed"),
            ("x-listed", "1"),
            ("keep-alive", "5"),
            ("te", "trailers"),
            ("x-forwarded-for", "1.2.3.4"),
            ("forwarded", "for=1.2.3.4"),
            ("kv-comm-request-id", "7"),
            ("everline-worker", "w"),
            ("x-everline-x", "w"),
            ("host", "a"),
            ("content-length", "5"),
            ("x-request-id", "not this one"),
            ("accept", "*/*"),
            ("traceparent", "old"),
            ("x-session-id", "s"),
            ("x-session-id", "t"),
        ] {
            client.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let lines = passing(&client, &HeaderRules::default());
        assert_eq!(
            lines,
            ["accept: */*", "traceparent: new", "x-request-id: id", "x-session-id: s", "x-session-id: t"]
        );

        let rules = HeaderRules {
            forward: vec![http::header::AUTHORIZATION, http::header::TE],
            drop: vec![HeaderName::from_static("x-session-id")],
            everything: false,
        };
        let lines = passing(&client, &rules);
        assert_eq!(
            lines,
            ["accept: */*", "authorization: Bearer secret", "traceparent: new", "x-request-id: id"]
        );
        let everything = HeaderRules { everything: true, ..HeaderRules::default() };
        let lines = passing(&client, &everything);
        for there in ["authorization: Bearer secret", "everline-worker: w", "x-forwarded-for: 1.2.3.4"] {
            assert!(lines.iter().any(|line| line == there), "{there} in {lines:?}");
        }
        assert!(!lines.iter().any(|line| line.starts_with("x-listed") || line.starts_with("te:")));
    }

    #[test]
    fn only_sane_request_ids_are_kept() {
        let with = |id: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(id).unwrap());
            request_id(&headers)
        };
        assert_eq!(with("abc-1"), "abc-1");
        for bad in ["", "a b", &"x".repeat(129)] {
            assert_eq!(with(bad).len(), 32, "{bad}");
        }
        assert_ne!(new_request_id(), new_request_id());
    }
}
