//! Every route of the table with every credential, on both listeners, over real sockets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::Method;

use super::support::*;
use crate::http::auth::digest_of;
use crate::http::routes::{Access, Entry, Listener, Plane, Route, Served, TABLE};
use crate::http::{ClientKey, FrontConfig, KeyRing, TokenDigests};
use crate::state::worker::WorkerSource;

/// What a request shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shows {
    Nothing,
    ClientKey,
    ClientKeyInItsOwnHeader,
    ClientKeyForAnotherModel,
    ExpiredClientKey,
    NodeToken,
    AdminToken,
    Garbage,
    AnotherScheme,
    /// The credential that the route wants, twice.
    RightOneTwice,
}

impl Shows {
    const ALL: [Shows; 10] = [
        Shows::Nothing,
        Shows::ClientKey,
        Shows::ClientKeyInItsOwnHeader,
        Shows::ClientKeyForAnotherModel,
        Shows::ExpiredClientKey,
        Shows::NodeToken,
        Shows::AdminToken,
        Shows::Garbage,
        Shows::AnotherScheme,
        Shows::RightOneTwice,
    ];

    fn headers(self, access: Access) -> String {
        let bearer = |secret: &str| format!("authorization: Bearer {secret}\r\n");
        match self {
            Shows::Nothing => String::new(),
            Shows::ClientKey => bearer("client"),
            Shows::ClientKeyInItsOwnHeader => "x-api-key: client\r\n".to_owned(),
            Shows::ClientKeyForAnotherModel => bearer("other"),
            Shows::ExpiredClientKey => bearer("expired"),
            Shows::NodeToken => bearer("node"),
            Shows::AdminToken => bearer("admin"),
            Shows::Garbage => bearer("garbage"),
            Shows::AnotherScheme => "authorization: Basic Y2xpZW50OmNsaWVudA==\r\n".to_owned(),
            Shows::RightOneTwice => match access {
                Access::Open | Access::Key | Access::KeyOrCapability => bearer("client").repeat(2),
                Access::NodeToken => bearer("node").repeat(2),
                Access::AdminToken | Access::Scrape => bearer("admin").repeat(2),
            },
        }
    }
}

/// The status, and the code of an error of ours.
type Answer = (u16, Option<&'static str>);

fn expected(entry: &Entry, method: &Method, on: Listener, shows: Shows) -> Answer {
    let created = matches!(entry.route, Route::Nodes | Route::AdminWorkers) && method == Method::POST;
    let granted = match entry.path.contains("/streams/") || entry.path.contains("/responses/") {
        // There is none.
        true => (404, Some("stream_not_found")),
        false if entry.route == Route::AdminKsanaNode => (404, Some("worker_not_found")),
        false => (if created { 201 } else { 200 }, None),
    };
    if !entry.is_on(on, true) {
        return (404, Some("unknown_route"));
    }
    let token = |right: Shows| match shows {
        _ if shows == right => granted,
        Shows::Nothing | Shows::ClientKeyInItsOwnHeader | Shows::AnotherScheme | Shows::RightOneTwice => {
            (401, Some("unauthorized"))
        }
        _ => (403, Some("forbidden")),
    };
    match entry.access {
        Access::Open => granted,
        Access::Scrape if on == Listener::Client => granted,
        Access::Scrape | Access::AdminToken => token(Shows::AdminToken),
        Access::NodeToken => token(Shows::NodeToken),
        Access::Key | Access::KeyOrCapability => match shows {
            Shows::ClientKey | Shows::ClientKeyInItsOwnHeader => granted,
            Shows::ClientKeyForAnotherModel if entry.route == Route::Models => granted,
            Shows::ClientKeyForAnotherModel if entry.route.is_about_streams() => granted,
            Shows::ClientKeyForAnotherModel => (403, Some("model_not_allowed")),
            Shows::ExpiredClientKey => (401, Some("expired_api_key")),
            Shows::Nothing => (401, Some("missing_api_key")),
            Shows::NodeToken
            | Shows::AdminToken
            | Shows::Garbage
            | Shows::AnotherScheme
            | Shows::RightOneTwice => (401, Some("invalid_api_key")),
        },
    }
}

fn path_of(entry: &Entry) -> String {
    let stream = "a".repeat(26);
    let id = if entry.path.contains("/streams/") { format!("st_{stream}") } else { "w".to_owned() };
    let path = entry.path.replace("{id}", &id).replace("{response_id}", &format!("resp_{stream}"));
    path.replace("{*model}", "m").replace("{*path}", "audio/speech")
}

/// A body that the operation accepts.
fn body_of(entry: &Entry, method: &Method) -> &'static str {
    match (entry.route, entry.served) {
        (_, Served::ByModel | Served::ByAnyWorker) => r#"{"model":"m","input":"x"}"#,
        (Route::Nodes | Route::AdminWorkers, _) if method == Method::POST => {
            r#"{"url":"http://127.0.0.1:1","id":"new","models":["x"],"probe":false}"#
        }
        (Route::AdminExplain, _) => r#"{"body":{"model":"m","messages":[]}}"#,
        (Route::AdminDrain, _) => r#"{"drain":true}"#,
        (Route::AdminMembers, _) if method == Method::POST => r#"{"op":"add","peer":"127.0.0.1:1"}"#,
        _ => "",
    }
}

fn methods_of(entry: &Entry) -> Vec<Method> {
    match entry.operations {
        [] => vec![Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE],
        operations => operations.iter().map(|operation| operation.method.clone()).collect(),
    }
}

/// A front on which everything needs its credential, with a worker `w` that came by the node plane.
async fn guarded() -> (Running, SocketAddr) {
    let key = |id: &str| ClientKey {
        id: id.into(),
        digest: digest_of(id.as_bytes()),
        models: None,
        rate: None,
        max_concurrent: None,
        expires: None,
    };
    let keys = vec![
        key("client"),
        ClientKey { models: Some(vec!["another".into()]), ..key("other") },
        ClientKey { expires: Some(SystemTime::now() - Duration::from_secs(1)), ..key("expired") },
    ];
    let mut config = FrontConfig {
        keys: Arc::new(KeyRing::new(Some(keys))),
        admin_tokens: TokenDigests::of_tokens(["admin"]),
        ..FrontConfig::default()
    };
    config.nodes.tokens = TokenDigests::of_tokens(["node"]);
    let front = start(config);
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    front.cluster.change("w", |record| record.spec.source = WorkerSource::Node);
    let admin = admin_of(&front);
    (front, admin)
}

/// What these listeners have: KsanaLLM has one of its own, with tests of its own.
fn here() -> impl Iterator<Item = &'static Entry> {
    TABLE.iter().filter(|entry| entry.plane != Plane::Ksana)
}

/// The code of an error in either dialect.
fn code_of(response: &str) -> Option<String> {
    let text = response.split_once("\r\n\r\n")?.1;
    let body: serde_json::Value = serde_json::from_str(text).ok()?;
    Some(body["error"]["code"].as_str()?.to_owned())
}

#[tokio::test]
async fn every_route_with_every_credential_answers_as_the_table_says() {
    let mut asked = 0;
    for entry in here() {
        for method in methods_of(entry) {
            // A front of its own: some of these requests change the registry.
            let (front, admin) = guarded().await;
            for (on, address) in [(Listener::Admin, admin), (Listener::Client, front.address)] {
                for shows in Shows::ALL {
                    let headers = shows.headers(entry.access);
                    let request =
                        request(method.as_str(), &path_of(entry), &headers, body_of(entry, &method));
                    let response = exchange(address, request).await;
                    let code = code_of(&response);
                    assert_eq!(
                        (status(&response), code.as_deref()),
                        expected(entry, &method, on, shows),
                        "{method} {} on {on:?} with {shows:?}: {response}",
                        entry.path
                    );
                    let challenge = header(&response, "www-authenticate").is_some();
                    assert_eq!(challenge, status(&response) == 401, "{response}");
                    asked += 1;
                }
            }
        }
    }
    assert!(asked >= here().count() * Shows::ALL.len() * 2);
}

#[tokio::test]
async fn every_other_method_is_refused_with_those_that_are_served() {
    let (front, admin) = guarded().await;
    for entry in here().filter(|entry| !entry.operations.is_empty()) {
        let address = if entry.is_on(Listener::Client, true) { front.address } else { admin };
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"] {
            if entry.operations.iter().any(|operation| operation.method == method) {
                continue;
            }
            let response = exchange(address, request(method, &path_of(entry), "", "")).await;
            assert_eq!(status(&response), 405, "{method} {}: {response}", entry.path);
            assert_eq!(code_of(&response).as_deref(), Some("method_not_allowed"));
            assert_eq!(header(&response, "allow"), Some(entry.allow().as_str()), "{}", entry.path);
        }
    }
}

/// Ways of writing a path that somebody may take for the same.
fn spellings(path: &str) -> Vec<String> {
    let last = path.rsplit('/').next().unwrap_or_default();
    let encoded = format!("%{:02x}{}", last.as_bytes()[0], &last[1..]);
    let mut all = vec![
        path.replacen("/v1/", "/v1//", 1),
        format!("/{path}"),
        path.replacen("/v1/", "/v1/./", 1),
        path.replacen("/v1/", "/v1/x/../", 1),
        path.replacen("/v1/", "/v1/x/%2e%2e/", 1),
        path.replacen("/v1/", "/v1/%2e/", 1),
        path.replacen("/v1/", "/v1/x%2f..%2f", 1),
        path.replacen("/v1/", "/v1/x\\..\\", 1),
        path.replacen("/v1/", "/v1%2f", 1),
        path.replacen("/v1/", "/%76%31/", 1),
        path.replacen("/v1/", "/V1/", 1),
        path.replacen("/v1/", "/v1/%252e%252e/v1/", 1),
        format!("{}{encoded}", path.strip_suffix(last).unwrap_or_default()),
        format!("{path}/"),
        format!("{path}//"),
        format!("{path}/."),
        format!("{path}%00"),
        format!("{path};x=1"),
        format!("{path}%3f"),
        path.to_uppercase(),
    ];
    all.retain(|other| other != path);
    all
}

#[tokio::test]
async fn no_spelling_of_a_guarded_path_is_served_without_its_credential() {
    let (front, admin) = guarded().await;
    for entry in TABLE.iter().filter(|entry| entry.access != Access::Open) {
        for path in spellings(&path_of(entry)) {
            for (method, address) in
                methods_of(entry).into_iter().flat_map(|m| [(m.clone(), front.address), (m, admin)])
            {
                let response =
                    exchange(address, request(method.as_str(), &path, "", body_of(entry, &method))).await;
                assert!(
                    matches!(status(&response), 400 | 401 | 403 | 404 | 405),
                    "{method} {path}: {response}"
                );
            }
        }
    }
    // With a client's key they are nothing but a client's requests: none reaches another plane.
    for entry in TABLE.iter().filter(|e| matches!(e.access, Access::NodeToken | Access::AdminToken)) {
        for path in spellings(&path_of(entry)) {
            let credential = "authorization: Bearer client\r\n";
            let response = exchange(front.address, request("GET", &path, credential, "")).await;
            let by_worker = header(&response, "everline-worker").is_some();
            assert!(by_worker || status(&response) >= 400, "{path}: {response}");
        }
    }
    let record = front.cluster.worker("w").expect("nothing was removed");
    assert!(!record.record.drain, "nothing was drained");
}
