//! A plain HTTP client that shows bytes, and JSON that keeps the order of its keys.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use everline::engines::sim::{EngineSimArgs, Simulator};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A golden request: method, path, headers and body.
pub(crate) fn golden_request(name: &str) -> Value {
    serde_json::from_slice(&golden(&format!("vllm_{name}.req.json"))).unwrap()
}

/// A golden file.
pub(crate) fn golden(file: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/http").join(file);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Flags for quick tests: one event for each token, names and context of the golden engine.
pub(crate) fn quick() -> EngineSimArgs {
    let mut args = EngineSimArgs::defaults();
    args.models = vec!["tiny".into()];
    args.max_model_len = 2048;
    args.no_coalesce = true;
    args.instant = true;
    args
}

pub(crate) async fn start(args: EngineSimArgs) -> Simulator {
    Simulator::start(args).await.unwrap()
}

pub(crate) struct Reply {
    pub(crate) head: String,
    /// One entry for each HTTP chunk; the whole body if it is not chunked.
    pub(crate) chunks: Vec<String>,
    /// Whether the reply ended as HTTP wants it.
    pub(crate) complete: bool,
}

impl Reply {
    pub(crate) fn status(&self) -> u16 {
        self.head.split(' ').nth(1).unwrap().parse().unwrap()
    }

    pub(crate) fn body(&self) -> String {
        self.chunks.concat()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body()).unwrap_or_else(|error| panic!("{error}: {}", self.body()))
    }

    /// The events before `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        let events = self.chunks.iter().map(|chunk| chunk.strip_prefix("data: ").unwrap().trim_end());
        events.filter(|event| *event != "[DONE]").map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

pub(crate) fn request_bytes(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> String {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!(
        "{method} {path} HTTP/1.1\r\nhost: sim\r\nconnection: close\r\ncontent-type: application/json\r\n\
         {headers}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

pub(crate) async fn call(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Reply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request_bytes(method, path, headers, body).as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    // A reset is a way to end, too.
    let _ = stream.read_to_end(&mut bytes).await;
    parse(&bytes)
}

pub(crate) async fn post(address: SocketAddr, path: &str, body: Value) -> Reply {
    call(address, "POST", path, &[], &body.to_string()).await
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Reply {
    call(address, "GET", path, &[], "").await
}

fn parse(bytes: &[u8]) -> Reply {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let find = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).position(|window| window == what);
    let Some(end) = find(bytes, b"\r\n\r\n") else {
        return Reply { head: text(bytes), chunks: Vec::new(), complete: false };
    };
    let mut reply = Reply { head: text(&bytes[..end]), chunks: Vec::new(), complete: true };
    let mut body = &bytes[end + 4..];
    if !reply.head.contains("transfer-encoding: chunked") {
        reply.chunks.push(text(body));
        return reply;
    }
    loop {
        let Some(line) = find(body, b"\r\n") else {
            reply.complete = false;
            return reply;
        };
        let size = usize::from_str_radix(&text(&body[..line]), 16).unwrap();
        if size == 0 {
            return reply;
        }
        reply.chunks.push(text(&body[line + 2..line + 2 + size]));
        body = &body[line + size + 4..];
    }
}

/// JSON reduced to what must be equal: keys in order, nulls, types, and words of the protocol.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Shape {
    Null,
    Bool(bool),
    Number,
    Text(String),
    List(Vec<Shape>),
    Map(Vec<(String, Shape)>),
}

/// Texts under these keys belong to the protocol and are compared.
const WORDS: [&str; 6] = ["object", "finish_reason", "role", "type", "param", "system_fingerprint"];

impl Shape {
    pub(crate) fn of(json: &str) -> Self {
        serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"))
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shape::Null => f.write_str("null"),
            Shape::Bool(flag) => write!(f, "{flag}"),
            Shape::Number => f.write_str("N"),
            Shape::Text(text) => write!(f, "{text:?}"),
            Shape::List(items) => f.debug_list().entries(items).finish(),
            Shape::Map(fields) => {
                f.debug_map().entries(fields.iter().map(|(key, value)| (key, value))).finish()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }
            fn visit_unit<E>(self) -> Result<Shape, E> {
                Ok(Shape::Null)
            }
            fn visit_bool<E>(self, flag: bool) -> Result<Shape, E> {
                Ok(Shape::Bool(flag))
            }
            fn visit_u64<E>(self, _: u64) -> Result<Shape, E> {
                Ok(Shape::Number)
            }
            fn visit_i64<E>(self, _: i64) -> Result<Shape, E> {
                Ok(Shape::Number)
            }
            fn visit_f64<E>(self, _: f64) -> Result<Shape, E> {
                Ok(Shape::Number)
            }
            fn visit_str<E>(self, text: &str) -> Result<Shape, E> {
                Ok(Shape::Text(text.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element::<Shape>()? {
                    let item = if matches!(item, Shape::Text(_)) { Shape::Text("…".into()) } else { item };
                    // Lists of ids differ in length only.
                    if items.last() != Some(&item) {
                        items.push(item);
                    }
                }
                Ok(Shape::List(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shape, A::Error> {
                let mut fields = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, Shape>()? {
                    let value = match value {
                        Shape::Text(_) if !WORDS.contains(&key.as_str()) => Shape::Text("…".into()),
                        other => other,
                    };
                    fields.push((key, value));
                }
                Ok(Shape::Map(fields))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}
