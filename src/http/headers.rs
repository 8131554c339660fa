//! Headers at the boundary: what passes, what stays, and the request's id.

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
    TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue};

/// Names a request through all its hops.
pub(super) static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Which replica answered.
pub(super) static REPLICA: HeaderName = HeaderName::from_static("everline-replica");
/// Which worker answered.
pub(super) static WORKER: HeaderName = HeaderName::from_static("everline-worker");

/// Longest request id kept from a client.
const MAX_REQUEST_ID: usize = 128;

/// The client's request id if it is 1 to 128 visible ASCII characters, else a new one of 128
/// random bits.
pub(super) fn request_id(headers: &HeaderMap) -> HeaderValue {
    match headers.get(&REQUEST_ID) {
        Some(id) if is_request_id(id.as_bytes()) => id.clone(),
        _ => {
            let id = format!("{:032x}", rand::random::<u128>());
            HeaderValue::from_maybe_shared(bytes::Bytes::from(id)).unwrap_or(HeaderValue::from_static("0"))
        }
    }
}

fn is_request_id(id: &[u8]) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic)
}

/// Headers that speak of one connection only, or that a client has no say in.
fn stays(name: &HeaderName, connection_listed: &[HeaderName]) -> bool {
    let fixed =
        [&CONNECTION, &TRANSFER_ENCODING, &TE, &TRAILER, &UPGRADE, &PROXY_AUTHENTICATE, &PROXY_AUTHORIZATION];
    fixed.contains(&name)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection")
        || connection_listed.contains(name)
}

fn connection_listed(headers: &HeaderMap) -> Vec<HeaderName> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).filter_map(|name| name.trim().parse().ok()).collect()
}

/// The headers of a client's request that a worker gets to see.
pub(super) fn to_worker(client: &HeaderMap, request_id: HeaderValue) -> HeaderMap {
    let listed = connection_listed(client);
    let mut headers = HeaderMap::with_capacity(client.len() + 1);
    for (name, value) in client {
        let text = name.as_str();
        let private = [&AUTHORIZATION, &HOST, &EXPECT, &CONTENT_LENGTH, &REQUEST_ID].contains(&name)
            || ["x-forwarded-", "x-everline-", "everline-", "kv-comm-"].iter().any(|p| text.starts_with(p))
            || matches!(text, "forwarded" | "x-api-key");
        if !private && !stays(name, &listed) {
            headers.append(name.clone(), value.clone());
        }
    }
    headers.insert(REQUEST_ID.clone(), request_id);
    headers
}

/// Strips from a worker's response what was meant for this hop.
pub(super) fn strip_response(headers: &mut HeaderMap) {
    let listed = connection_listed(headers);
    let doomed: Vec<HeaderName> = headers.keys().filter(|name| stays(name, &listed)).cloned().collect();
    for name in doomed {
        headers.remove(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_and_hop_by_hop_headers_stay() {
        let mut client = HeaderMap::new();
        for (name, value) in [
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("connection", "keep-alive, X-Listed"),
            ("x-listed", "1"),
            ("keep-alive", "5"),
            ("te", "trailers"),
            ("x-forwarded-for", "1.2.3.4"),
            ("kv-comm-request-id", "7"),
            ("host", "a"),
            ("accept", "*/*"),
            ("x-session-id", "s"),
        ] {
            client.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let worker = to_worker(&client, HeaderValue::from_static("id"));
        let mut names: Vec<&str> = worker.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "x-request-id", "x-session-id"]);
    }

    #[test]
    fn only_sane_request_ids_are_kept() {
        let with = |id: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(&REQUEST_ID, HeaderValue::from_str(id).unwrap());
            request_id(&headers)
        };
        assert_eq!(with("abc-1"), "abc-1");
        for bad in ["", "a b", &"x".repeat(129)] {
            assert_eq!(with(bad).len(), 32, "{bad}");
        }
    }
}
