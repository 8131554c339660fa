//! What engines with P2pNccl or MoRI-IO say of themselves to the router, every few seconds.

use crate::kv::msgpack::{Reader, Value};
use crate::state::worker::{Connector, WorkerRole};

/// Longest ping.
pub const MOST_PING: usize = 4096;

/// Most members of one.
const MOST_MEMBERS: usize = 64;

/// An engine that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ping {
    /// What part it does.
    pub role: WorkerRole,
    /// `host:port` of its HTTP server.
    pub http_address: String,
    /// What it is called by engines that it hands over to, or gets from.
    pub zmq_address: String,
    /// Which of the two it is.
    pub connector: Connector,
    /// Its data-parallel ranks, where it says so.
    pub dp_size: Option<u32>,
}

/// Why one could not be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a ping of a prefill or decode engine: {0}")]
pub struct NoPing(&'static str);

impl Ping {
    /// Reads one; `Ok(None)` for a greeting, which says nothing.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, NoPing> {
        let members = Texts::read(bytes).ok_or(NoPing("it is no map of texts"))?;
        let role = match (members.get("type"), members.get("role")) {
            (Some("HELLO"), _) => return Ok(None),
            (Some("P"), _) | (Some("register"), Some("P")) => WorkerRole::Prefill,
            (Some("D"), _) | (Some("register"), Some("D")) => WorkerRole::Decode,
            _ => return Err(NoPing("its type is neither P nor D")),
        };
        let address = members.get("http_address").or(members.get("request_address"));
        let http_address = host_and_port(address.ok_or(NoPing("it has no http_address"))?);
        let zmq_address = match members.get("zmq_address") {
            Some(address) => address.to_owned(),
            // As MoRI-IO said it first.
            None => {
                let [handshake, notify] = ["handshake_port", "notify_port"].map(|name| members.number(name));
                let (Some(handshake), Some(notify)) = (handshake, notify) else {
                    return Err(NoPing("it has no zmq_address"));
                };
                let host = http_address.rsplit_once(':').map_or(http_address.as_str(), |(host, _)| host);
                format!("host:{host},handshake:{handshake},notify:{notify}")
            }
        };
        let connector = match zmq_address.starts_with("host:") {
            true => Connector::Moriio,
            false => Connector::P2pNccl,
        };
        let dp_size = members.number("dp_size").and_then(|size| u32::try_from(size).ok());
        Ok(Some(Self { role, http_address, zmq_address, connector, dp_size }))
    }
}

/// `host:port` of an address that may be a URL.
fn host_and_port(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default().to_owned()
}

/// The members that are texts or numbers.
struct Texts(Vec<(String, String)>);

impl Texts {
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let Value::Map(count) = reader.value().ok()? else { return None };
        if count > MOST_MEMBERS {
            return None;
        }
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
        let mut members = Vec::with_capacity(count);
        for _ in 0..count {
            let (Value::Text(name) | Value::Bytes(name)) = reader.value().ok()? else { return None };
            let before = reader;
            let value = match reader.value().ok()? {
                Value::Text(value) | Value::Bytes(value) => text(value)?,
                Value::Int { bits, negative: false } => bits.to_string(),
                _ => {
                    reader = before;
                    reader.skip().ok()?;
                    continue;
                }
            };
            members.push((text(name)?, value));
        }
        Some(Self(members))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(is, _)| is == name).map(|(_, value)| value.as_str())
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map as MessagePack: texts in quotes' place, numbers up to 65535.
    fn packed(members: &[(&str, &str)]) -> Vec<u8> {
        let mut out = vec![0x80 | members.len() as u8];
        let text = |out: &mut Vec<u8>, text: &str| {
            out.extend([0xd9, text.len() as u8]);
            out.extend(text.as_bytes());
        };
        for (name, value) in members {
            text(&mut out, name);
            match value.parse::<u16>() {
                Ok(number) => {
                    out.push(0xcd);
                    out.extend(number.to_be_bytes());
                }
                Err(_) => text(&mut out, value),
            }
        }
        out
    }

    #[test]
    fn both_kinds_of_engines_are_understood() {
        let nccl = [("type", "P"), ("http_address", "10.0.0.1:20001"), ("zmq_address", "10.0.0.1:21001")];
        let ping = Ping::parse(&packed(&nccl)).unwrap().unwrap();
        assert_eq!(
            (ping.role, ping.connector, ping.dp_size),
            (WorkerRole::Prefill, Connector::P2pNccl, None)
        );
        assert_eq!(
            (ping.http_address.as_str(), ping.zmq_address.as_str()),
            ("10.0.0.1:20001", "10.0.0.1:21001")
        );

        let zmq = "host:10.0.0.2,handshake:6301,notify:61005";
        let moriio = [
            ("type", "D"),
            ("http_address", "10.0.0.2:8000"),
            ("zmq_address", zmq),
            ("dp_size", "2"),
            ("transfer_mode", "READ"),
        ];
        let ping = Ping::parse(&packed(&moriio)).unwrap().unwrap();
        assert_eq!(
            (ping.role, ping.connector, ping.dp_size),
            (WorkerRole::Decode, Connector::Moriio, Some(2))
        );

        let older = [
            ("type", "register"),
            ("role", "D"),
            ("request_address", "http://10.0.0.2:8000/v1/completions"),
            ("handshake_port", "6301"),
            ("notify_port", "61005"),
        ];
        let ping = Ping::parse(&packed(&older)).unwrap().unwrap();
        assert_eq!((ping.http_address.as_str(), ping.zmq_address.as_str()), ("10.0.0.2:8000", zmq));
        assert_eq!(Ping::parse(&packed(&[("type", "HELLO")])), Ok(None));
    }

    #[test]
    fn what_is_no_ping_is_refused() {
        let short = packed(&[("type", "P"), ("http_address", "a:1")]);
        for bytes in
            [&b""[..], b"\xc0", b"\xdf\xff\xff\xff\xff", &packed(&[("type", "X")]), &short, &short[..9]]
        {
            assert!(Ping::parse(bytes).is_err(), "{bytes:?}");
        }
    }
}
