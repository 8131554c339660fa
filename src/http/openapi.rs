//! `GET /openapi.json`: the route table as OpenAPI 3.1, a document for each listener.

use serde_json::{Map, Value, json};

use super::edge;
use super::routes::{Access, Entry, Listener, MaxBody, Plane, Route, Served, TABLE};

/// The methods by which a route that takes any is described.
const ANY: [&str; 5] = ["get", "post", "put", "patch", "delete"];

/// The document of a listener; `at_edge`, of an edge's.
pub(super) fn document(listener: Listener, metrics_on_client: bool, at_edge: bool) -> Value {
    let mut paths = Map::new();
    for entry in TABLE.iter().filter(|entry| entry.is_on(listener, metrics_on_client)) {
        if at_edge && !edge::has(entry.route) {
            continue;
        }
        paths.insert(entry.path.replace("{*", "{"), path_item(entry, listener));
    }
    let title = match listener {
        Listener::Client if at_edge => "Everline: clients, at an edge",
        Listener::Client => "Everline: clients and nodes",
        Listener::Admin => "Everline: operators",
        Listener::Ksana => "Prefill-Decode Router",
    };
    let schemes = match listener {
        Listener::Client | Listener::Ksana => json!({
            "clientKey": {"type": "http", "scheme": "bearer", "description": "An API key. Not asked for if none is configured."},
            "clientKeyHeader": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key, where Anthropic's clients put it."},
            "capability": {"type": "apiKey", "in": "query", "name": "cap", "description": "To read one stream, from POST /v1/streams/{id}/token."},
            "nodeToken": {"type": "http", "scheme": "bearer", "description": "A node token. Not asked for if none is configured."},
        }),
        Listener::Admin => json!({
            "adminToken": {"type": "http", "scheme": "bearer", "description": "An admin token. Not asked for if none is configured."},
        }),
    };
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Generated from the route table. What a worker answers is the worker's own: bodies pass through untouched.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": schemes,
            "schemas": {"Error": error_schema(), "AnthropicError": anthropic_error_schema(), "Registration": registration_schema()},
            "responses": {
                "Error": response("An error of Everline's; `code` is stable and explained in docs/reference/errors.md.", "Error"),
                "AnthropicError": response("An error of Everline's, as Anthropic's clients expect it.", "AnthropicError"),
            },
        },
    })
}

fn response(description: &str, schema: &str) -> Value {
    let schema = json!({"$ref": format!("#/components/schemas/{schema}")});
    json!({"description": description, "content": {"application/json": {"schema": schema}}})
}

fn error_schema() -> Value {
    json!({
        "type": "object",
        "required": ["error"],
        "properties": {"error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }},
    })
}

fn anthropic_error_schema() -> Value {
    json!({
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {
                    "type": {"type": "string"},
                    "message": {"type": "string"},
                    "code": {"type": "string"},
                },
            },
        },
    })
}

fn registration_schema() -> Value {
    let properties: Map<String, Value> = crate::admin_types::RegisterRequest::FIELDS
        .iter()
        .map(|name| {
            let kind = match *name {
                "models" => json!({"type": "array", "items": {"type": ["string", "object"]}}),
                "labels" => json!({"type": "object", "additionalProperties": {"type": "string"}}),
                "heartbeat" | "probe" => json!({"type": "boolean"}),
                "dp_ranks" | "block_size" | "capacity_blocks" | "weight" | "bootstrap_port" => {
                    json!({"type": "integer", "minimum": 1})
                }
                _ => json!({"type": "string"}),
            };
            ((*name).to_owned(), kind)
        })
        .collect();
    json!({"type": "object", "required": ["url"], "additionalProperties": false, "properties": properties})
}

fn path_item(entry: &Entry, listener: Listener) -> Value {
    let mut item = Map::new();
    if let Some(parameter) = parameter(entry) {
        item.insert("parameters".to_owned(), json!([parameter]));
    }
    for operation in entry.operations {
        let method = operation.method.as_str().to_ascii_lowercase();
        let described = describe(entry, &method, operation.summary, listener);
        item.insert(method, described);
    }
    if entry.operations.is_empty() {
        let summary = "Passed on to a worker as it stands, with any method but TRACE and CONNECT.";
        for method in ANY {
            item.insert(method.to_owned(), describe(entry, method, summary, listener));
        }
    }
    Value::Object(item)
}

fn parameter(entry: &Entry) -> Option<Value> {
    let name = entry.path.split_once('{')?.1.split_once('}')?.0;
    let (name, about) = match name.strip_prefix('*') {
        Some(name) => (name, "May hold slashes."),
        None => (name, "One segment."),
    };
    let schema = json!({"type": "string"});
    Some(json!({"name": name, "in": "path", "required": true, "description": about, "schema": schema}))
}

fn describe(entry: &Entry, method: &str, summary: &str, listener: Listener) -> Value {
    let mut operation = json!({
        "operationId": format!("{}_{:?}", method, entry.route),
        "summary": summary,
        "tags": [tag(entry.plane)],
        "security": security(entry.access, listener),
        "responses": responses(entry, method),
    });
    if let Some(body) = request_body(entry, method) {
        operation["requestBody"] = body;
    }
    if let Some(parameters) = stream_parameters(entry.route, method) {
        operation["parameters"] = parameters;
    }
    let reads_cluster = entry.plane == Plane::Admin && method == "get" && entry.route != Route::AdminKeys;
    if reads_cluster {
        operation["parameters"] = json!([{
            "name": "consistency",
            "in": "query",
            "description": "`linearizable` waits for everything committed before.",
            "schema": {"enum": ["local", "linearizable"]},
        }]);
    }
    operation
}

/// Parameters of the routes about streams.
fn stream_parameters(route: Route, method: &str) -> Option<Value> {
    let query = |name: &str, about: &str, schema: Value| json!({"name": name, "in": "query", "description": about, "schema": schema});
    let number = || json!({"type": "integer", "minimum": 0});
    match (route, method) {
        (Route::Stream, "get") => Some(json!([
            {"name": "Last-Event-ID", "in": "header", "description": "The last event that was read.", "schema": {"type": "string"}},
            query("after", "The same by its number; the header wins.", number()),
        ])),
        (Route::Streams, "get") => Some(json!([
            query("limit", "Streams in a page: 1 to 100, 20 if left out.", number()),
            query("after", "The last id of the page before.", json!({"type": "string"})),
        ])),
        (Route::Response, "get") => Some(json!([
            query("stream", "`true` for the events instead of the object.", json!({"type": "boolean"})),
            query("starting_after", "The `sequence_number` of the last event that was read.", number()),
        ])),
        _ => None,
    }
}

fn tag(plane: Plane) -> &'static str {
    match plane {
        Plane::Client => "clients",
        Plane::Node => "nodes",
        Plane::Admin => "operators",
        Plane::Ksana => "ksanallm",
        Plane::Health | Plane::Metrics => "health",
    }
}

fn security(access: Access, listener: Listener) -> Value {
    match access {
        Access::Key => json!([{"clientKey": []}, {"clientKeyHeader": []}]),
        Access::KeyOrCapability => json!([{"clientKey": []}, {"clientKeyHeader": []}, {"capability": []}]),
        Access::NodeToken => json!([{"nodeToken": []}]),
        Access::AdminToken => json!([{"adminToken": []}]),
        Access::Scrape if listener == Listener::Admin => json!([{"adminToken": []}]),
        Access::Open | Access::Scrape => json!([]),
    }
}

fn request_body(entry: &Entry, method: &str) -> Option<Value> {
    if method != "post" && entry.served != Served::ByAnyWorker || method == "get" {
        return None;
    }
    let (about, schema) = match (entry.route, entry.served) {
        (Route::PassThrough, _) => {
            let any = json!({"description": "Whatever the worker takes.", "content": {"*/*": {}}});
            return Some(any);
        }
        (Route::Generate, _) => (
            "As the worker's route takes it; where several models are served, `model` decides which workers can get it.",
            json!({
                "type": "object",
                "properties": {"model": {"type": "string"}, "stream": {"type": "boolean"}},
                "additionalProperties": true,
            }),
        ),
        (_, Served::ByModel) => (
            "As the worker's route takes it; `model` decides which workers can get it.",
            json!({
                "type": "object",
                "required": ["model"],
                "properties": {"model": {"type": "string"}, "stream": {"type": "boolean"}},
                "additionalProperties": true,
            }),
        ),
        (Route::Nodes | Route::AdminWorkers, _) => {
            ("The worker.", json!({"$ref": "#/components/schemas/Registration"}))
        }
        (Route::Heartbeat, _) => {
            let number = |most: u64| json!({"type": "integer", "minimum": 0, "maximum": most});
            let rank = json!({
                "type": "object",
                "required": ["rank", "requests", "prefill_tokens", "decode_blocks"],
                "properties": {
                    "rank": number(1023),
                    "requests": number(65_536),
                    "prefill_tokens": number(u32::MAX.into()),
                    "decode_blocks": number(u32::MAX.into()),
                },
            });
            let end = json!({
                "type": "object",
                "required": ["id", "attempt", "how", "keep_ms"],
                "properties": {
                    "id": {"type": "string"},
                    "attempt": number(u32::MAX.into()),
                    "how": {"enum": ["completed", "cancelled", "failed"]},
                    "keep_ms": number(u32::MAX.into()),
                },
            });
            let said = json!({
                "running": {"type": "array", "maxItems": 1024, "items": rank},
                "ended": {"type": "array", "maxItems": 256, "items": end},
            });
            let content = json!({"application/json": {"schema": {"type": "object", "properties": said}}});
            let about = "Of an agent: what runs, rank by rank, that no replica has booked; streams whose end nobody has read.";
            return Some(json!({"required": false, "description": about, "content": content}));
        }
        (Route::AdminDrain, _) => (
            "Whether new requests stay away.",
            json!({
                "type": "object",
                "required": ["drain"],
                "additionalProperties": false,
                "properties": {"drain": {"type": "boolean"}},
            }),
        ),
        (Route::StreamToken, _) => {
            let properties = json!({"expires_in": {"type": "integer", "minimum": 1, "maximum": 600}});
            let schema = json!({"type": "object", "additionalProperties": false, "properties": properties});
            let content = json!({"application/json": {"schema": schema}});
            return Some(
                json!({"required": false, "description": "For how many seconds.", "content": content}),
            );
        }
        (Route::AdminExplain, _) => (
            "The request that is not sent.",
            json!({
                "type": "object",
                "required": ["body"],
                "additionalProperties": false,
                "properties": {
                    "route": {"type": "string", "default": "/v1/chat/completions"},
                    "headers": {"type": "object", "additionalProperties": {"type": "string"}},
                    "body": {"type": "object"},
                },
            }),
        ),
        (Route::AdminMembers, _) => (
            "The change.",
            json!({
                "type": "object",
                "required": ["op"],
                "properties": {
                    "op": {"enum": ["add", "remove", "promote", "transfer-leader"]},
                    "peer": {"type": "string"},
                    "member": {"type": ["string", "null"]},
                },
            }),
        ),
        _ => return None,
    };
    let most = match entry.max_body {
        MaxBody::Bytes(bytes) => format!(" At most {bytes} bytes."),
        MaxBody::Configured => " At most `http.max_body_bytes`.".to_owned(),
        MaxBody::None => String::new(),
    };
    let content = json!({"application/json": {"schema": schema}});
    Some(json!({"required": true, "description": format!("{about}{most}"), "content": content}))
}

fn responses(entry: &Entry, method: &str) -> Value {
    let mut responses = Map::new();
    let errors = match entry.route {
        Route::Messages => "#/components/responses/AnthropicError",
        _ => "#/components/responses/Error",
    };
    let mut add = |status: &str, description: &str, kind: &str| {
        let content = if kind.is_empty() { json!({}) } else { json!({kind: {}}) };
        responses.insert(status.to_owned(), json!({"description": description, "content": content}));
    };
    match (entry.served, entry.route, method) {
        (Served::ByModel | Served::ByAnyWorker, ..) => {
            add("default", "The worker's answer, with its status, as it comes.", "*/*");
        }
        (_, Route::Nodes | Route::AdminWorkers, "post") => {
            add("201", "Registered.", "application/json");
            add("200", "Registered again.", "application/json");
        }
        (_, Route::Readyz, _) => {
            add("200", "Ready; with `?verbose` each check as JSON.", "text/plain");
            add("503", "Not ready.", "text/plain");
        }
        (_, Route::Stream, "get") => {
            add(
                "200",
                "The events, or with `Accept: application/json` how the stream stands.",
                "text/event-stream",
            );
            add("204", "It has ended, and was read to its end.", "");
        }
        (_, Route::Livez, _) => add("200", "Alive.", "text/plain"),
        (_, Route::Metrics, _) => add("200", "The metrics.", "application/openmetrics-text"),
        _ => add("200", "Done.", "application/json"),
    }
    let refused: &[&str] = match entry.access {
        Access::Open => &[],
        Access::Key | Access::KeyOrCapability => &["401", "403", "429"],
        Access::NodeToken | Access::AdminToken | Access::Scrape => &["401", "403"],
    };
    let own: &[&str] = match entry.served {
        Served::Here => &[],
        Served::ByModel => &["400", "404", "413", "502", "503", "504"],
        Served::ByAnyWorker => &["413", "502", "503", "504"],
    };
    for status in refused.iter().chain(own) {
        responses.insert((*status).to_owned(), json!({"$ref": errors}));
    }
    if entry.served == Served::Here && entry.access != Access::Open {
        responses.insert("default".to_owned(), json!({"$ref": errors}));
    }
    Value::Object(responses)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_documents_and_the_table_have_the_same_routes() {
        for (listener, metrics) in
            [(Listener::Client, true), (Listener::Client, false), (Listener::Admin, false)]
        {
            for at_edge in [false, true] {
                let document = document(listener, metrics, at_edge);
                let mut described = BTreeSet::new();
                for (path, item) in document["paths"].as_object().unwrap() {
                    for method in item.as_object().unwrap().keys().filter(|key| *key != "parameters") {
                        described.insert(format!("{method} {path}"));
                    }
                }
                let mut served = BTreeSet::new();
                let here = |entry: &&Entry| !at_edge || edge::has(entry.route);
                for entry in TABLE.iter().filter(|entry| entry.is_on(listener, metrics)).filter(here) {
                    let path = entry.path.replace("{*", "{");
                    let named = entry.operations.iter().map(|o| o.method.as_str().to_ascii_lowercase());
                    let any = ANY.iter().filter(|_| entry.operations.is_empty()).map(|m| (*m).to_owned());
                    served.extend(named.chain(any).map(|method| format!("{method} {path}")));
                }
                assert_eq!(described, served);
                let for_nodes = described.iter().any(|line| line.contains("/v1/nodes"));
                assert_eq!(for_nodes, listener == Listener::Client && !at_edge);
            }
        }
    }

    #[test]
    fn every_reference_in_the_documents_leads_somewhere() {
        fn references(value: &Value, found: &mut Vec<String>) {
            match value {
                Value::Object(map) => map.iter().for_each(|(key, value)| match value.as_str() {
                    Some(target) if key == "$ref" => found.push(target.to_owned()),
                    _ => references(value, found),
                }),
                Value::Array(list) => list.iter().for_each(|value| references(value, found)),
                _ => {}
            }
        }
        for listener in [Listener::Client, Listener::Admin] {
            let document = document(listener, true, false);
            let mut found = Vec::new();
            references(&document, &mut found);
            assert!(!found.is_empty());
            for target in found {
                assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target}");
            }
            let schemes = document["components"]["securitySchemes"].as_object().unwrap();
            for (path, item) in document["paths"].as_object().unwrap() {
                for (method, operation) in
                    item.as_object().unwrap().iter().filter(|(k, _)| *k != "parameters")
                {
                    for scheme in operation["security"].as_array().unwrap() {
                        assert!(scheme.as_object().unwrap().keys().all(|name| schemes.contains_key(name)));
                    }
                    assert!(operation["summary"].as_str().unwrap().ends_with('.'), "{method} {path}");
                    assert!(!operation["responses"].as_object().unwrap().is_empty(), "{method} {path}");
                }
            }
        }
    }
}
