//! The table, and what paths mean by it.

use super::*;

fn client(method: Method, path: &str) -> Route {
    find(Listener::Client, true, &method, path).unwrap_or_else(|miss| panic!("{path}: {}", miss.error))
}

#[test]
fn the_table_is_in_the_order_of_the_enum_and_names_each_path_once() {
    for (at, entry) in TABLE.iter().enumerate() {
        assert_eq!(entry.route as usize, at);
        assert_eq!(entry.route.path(), entry.path);
        let beside = |other: &&Entry| (other.plane == Plane::Ksana) == (entry.plane == Plane::Ksana);
        let same = TABLE.iter().filter(beside).filter(|other| other.path == entry.path);
        assert_eq!(same.count(), 1, "{}", entry.path);
        let any = entry.operations.is_empty();
        assert_eq!(any, entry.route == Route::PassThrough, "{}", entry.path);
    }
    assert!(Route::ALL.iter().enumerate().all(|(at, route)| *route as usize == at));
    assert_eq!(Route::Unknown as usize, TABLE.len());
    assert_eq!(Route::Unknown.path(), "unknown");
}

#[test]
fn paths_find_their_templates() {
    for (path, route) in [
        ("/v1/nodes/w", Route::Node),
        ("/v1/nodes/10.0.0.1%3A80", Route::Node),
        ("/v1/nodes/w/heartbeat", Route::Heartbeat),
        ("/v1/models/meta/llama", Route::Model),
        ("/v1/audio/speech", Route::PassThrough),
        ("/v1/messages/count_tokens", Route::PassThrough),
        ("/v1/files/a%20b/", Route::PassThrough),
        ("/v1/nodesx", Route::PassThrough),
        ("/v1/streams/st_x/cancel", Route::StreamCancel),
        ("/v1/responses/resp_aaaaaaaaaaaaaaaaaaaaaaaaaa", Route::Response),
        ("/v1/responses/resp_aaaaaaaaaaaaaaaaaaaaaaaaaa/cancel", Route::ResponseCancel),
        ("/v1/responses/resp_0123456789abcdef0123456789abcdef", Route::PassThrough),
        ("/v1/responses/resp_aaaaaaaaaaaaaaaaaaaaaaaaaa/input_items", Route::PassThrough),
    ] {
        let posts = [Route::Heartbeat, Route::StreamCancel, Route::ResponseCancel];
        let method = if posts.contains(&route) { Method::POST } else { Method::GET };
        assert_eq!(client(method, path), route, "{path}");
    }
    assert_eq!(client(Method::HEAD, "/readyz"), Route::Readyz);
    assert_eq!(client(Method::PATCH, "/v1/anything"), Route::PassThrough);
}

#[test]
fn other_spellings_of_our_paths_match_nothing() {
    for path in [
        "/v1/admin/status",
        "/v1/admin",
        "/v1/Admin/status",
        "/v1/ADMIN",
        "/v1/%61dmin/status",
        "/v1/admi%6E/status",
        "/v1/x/../admin/status",
        "/v1/x/%2e%2e/admin/status",
        "/v1/x/.%2e/admin/status",
        "/v1/./nodes",
        "/v1//nodes",
        "//v1/nodes",
        "/v1/nodes/",
        "/v1/nodes//heartbeat",
        "/v1/nodes/w/heartbeat/",
        "/v1/nodes/w/x",
        "/v1/streams/st_x/x",
        "/v1/Streams",
        "/v1/x%2f..%2fnodes",
        "/v1/..%5cmetrics",
        "/v1/..\\metrics",
        "/v1/%252e%252e/metrics",
        "/v1/x%00",
        "/v1/x%0d%0a",
        "/v1/%zz",
        "/v1/%+1",
        "/v1/%2",
        "/v1/",
        "/v1",
        "/V1/nodes",
        "/v1/load_lora_adapter",
        "/v1/Load_Lora_Adapter/",
        "/v1/unload_lora_adapter",
        "/v1/models/",
        "/metrics/",
        "*",
        "",
    ] {
        let found = find(Listener::Client, true, &Method::GET, path);
        assert!(found.is_err(), "{path} is {:?}", found.ok());
    }
}

#[test]
fn a_wrong_method_is_told_the_right_ones() {
    let miss = find(Listener::Client, true, &Method::PUT, "/v1/nodes/w").unwrap_err();
    assert_eq!((miss.route, miss.error.code), (Route::Node, Code::MethodNotAllowed));
    assert_eq!(miss.error.allow.as_deref(), Some("GET, DELETE, HEAD"));
    let miss = find(Listener::Client, true, &Method::GET, "/v1/chat/completions").unwrap_err();
    assert_eq!(miss.error.allow.as_deref(), Some("POST"));
}

#[test]
fn each_listener_has_its_planes_only() {
    // Of these paths of KsanaLLM the client listener knows another meaning.
    let others =
        |entry: &&Entry| !matches!(entry.route, Route::KsanaV1 | Route::KsanaV2 | Route::KsanaGenerate);
    for entry in TABLE.iter().filter(others) {
        let path = entry.path.replace("{*", "").replace(['{', '}'], "");
        for listener in [Listener::Client, Listener::Admin] {
            let miss = matches!(
                find(listener, false, &Method::OPTIONS, &path),
                Err(Miss { route: Route::Unknown, .. })
            );
            assert_eq!(!miss, entry.is_on(listener, false), "{path} {listener:?}");
        }
    }
}

#[test]
fn a_listener_of_ksanallm_has_its_routes_and_those_for_balancers() {
    let on = |method, path: &str| {
        find(Listener::Ksana, true, &method, path).map_err(|miss| (miss.route, miss.error.code))
    };
    for (path, route) in [
        ("/RegisterNode", Route::KsanaRegister),
        ("/generate", Route::KsanaGenerate),
        ("/v1/chat/completions", Route::KsanaV1),
        ("/v1/nodes", Route::KsanaV1),
        ("/v1/", Route::KsanaV1),
        ("/v2/foo/bar", Route::KsanaV2),
    ] {
        assert_eq!(on(Method::POST, path), Ok(route), "{path}");
        assert_eq!(on(Method::GET, path), Err((route, Code::MethodNotAllowed)), "{path}");
    }
    for path in ["/", "/health", "/v1", "/v1/a/../b", "/generate/", "/v3/x", "/v1//x"] {
        assert_eq!(on(Method::POST, path), Err((Route::Unknown, Code::UnknownRoute)), "{path}");
    }
    assert_eq!(on(Method::GET, "/readyz"), Ok(Route::Readyz));
}

#[test]
fn the_reference_names_every_route() {
    let reference = include_str!("../../../docs/reference/http-api.md");
    for entry in TABLE {
        let path = entry.path.replace("{*", "{");
        assert!(reference.contains(&path), "docs/reference/http-api.md lacks {path}");
    }
}

#[test]
fn escapes_are_decoded_once() {
    assert_eq!(percent_decoded("a%20b%C3%A9").as_deref(), Some("a bé"));
    assert_eq!(percent_decoded("%2561").as_deref(), Some("%61"));
    for broken in ["%", "%4", "%zz", "%é", "%ff"] {
        assert_eq!(percent_decoded(broken), None, "{broken}");
    }
}
