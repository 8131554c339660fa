//! Kubernetes' EndpointSlices: lists and watch events in, endpoints of a service out.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::answer::{Answer, Endpoint, Standing, WEIGHT};
use super::client::{Trouble, shown};

/// Most slices of a service: with the usual 100 endpoints in each, far beyond
/// [`super::answer::MAX_ENDPOINTS`].
const MAX_SLICES: usize = 1024;
/// Longest event; a slice has 1,000 endpoints at most.
const MAX_LINE: usize = 4 << 20;

/// A service as it is written: `[namespace/]service[:port]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceName {
    /// Its namespace, where another one than usual.
    pub namespace: Option<String>,
    /// Its name.
    pub service: String,
    /// Name or number of a port.
    pub port: Option<String>,
}

impl ServiceName {
    /// Reads it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not [namespace/]service[:port], in small letters, digits and -");
        let (rest, port) = match text.rsplit_once(':') {
            Some((rest, port)) => (rest, Some(port)),
            None => (text, None),
        };
        let (namespace, service) = match rest.split_once('/') {
            Some((namespace, service)) => (Some(namespace), service),
            None => (None, rest),
        };
        let is_label = |label: &&str| {
            let bytes = label.as_bytes();
            let inner = bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-');
            (1..=63).contains(&bytes.len()) && inner && bytes[0] != b'-' && bytes[bytes.len() - 1] != b'-'
        };
        let parts = [Some(service), namespace, port];
        if !parts.iter().flatten().all(is_label) || port.is_some_and(|port| port.parse() == Ok(0_u64)) {
            return Err(wrong());
        }
        if port.is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_err()) {
            return Err(wrong());
        }
        Ok(Self {
            namespace: namespace.map(str::to_owned),
            service: service.to_owned(),
            port: port.map(str::to_owned),
        })
    }
}

#[derive(Deserialize)]
struct List {
    metadata: Metadata,
    #[serde(default)]
    items: Option<Vec<Slice>>,
}

#[derive(Deserialize, Default, Debug, Clone)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    #[serde(default)]
    name: String,
    #[serde(default)]
    resource_version: String,
}

#[derive(Deserialize, Debug, Clone)]
#[serde(rename_all = "camelCase")]
struct Slice {
    metadata: Metadata,
    #[serde(default)]
    address_type: String,
    #[serde(default)]
    endpoints: Option<Vec<SliceEndpoint>>,
    #[serde(default)]
    ports: Option<Vec<SlicePort>>,
}

#[derive(Deserialize, Debug, Clone)]
struct SliceEndpoint {
    #[serde(default)]
    addresses: Vec<String>,
    #[serde(default)]
    conditions: Conditions,
}

#[derive(Deserialize, Debug, Clone, Copy, Default)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl Conditions {
    fn standing(self) -> Standing {
        // What is not said is to be taken as ready, by the API's own word.
        let ready = self.ready.unwrap_or(true);
        match (ready, self.serving.unwrap_or(ready), self.terminating.unwrap_or(false)) {
            (true, _, false) => Standing::Ready,
            (_, true, true) => Standing::Leaving,
            _ => Standing::Out,
        }
    }
}

#[derive(Deserialize, Debug, Clone)]
struct SlicePort {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    port: Option<u16>,
    #[serde(default)]
    protocol: Option<String>,
}

#[derive(Deserialize)]
struct Event<'a> {
    r#type: String,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Bookmark {
    metadata: Metadata,
}

/// The API's word on a request that failed.
#[derive(Deserialize, Default)]
pub(super) struct Status {
    #[serde(default)]
    pub(super) code: u16,
    #[serde(default)]
    pub(super) message: String,
}

/// The slices of one service.
#[derive(Debug, Default)]
pub struct Slices {
    by_name: BTreeMap<String, Slice>,
    version: String,
}

impl Slices {
    /// The `resourceVersion` that this is as of; empty before the first list.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Takes a list in the place of everything known.
    pub fn relist(&mut self, json: &[u8]) -> Result<(), Trouble> {
        let list: List = serde_json::from_slice(json)
            .map_err(|why| Trouble::Garbage(format!("the list of EndpointSlices cannot be read: {why}")))?;
        let items = list.items.unwrap_or_default();
        if items.len() > MAX_SLICES {
            return Err(Trouble::Garbage(format!("{} EndpointSlices, more than {MAX_SLICES}", items.len())));
        }
        self.by_name = items.into_iter().map(|slice| (slice.metadata.name.clone(), slice)).collect();
        self.version = list.metadata.resource_version;
        Ok(())
    }

    /// Takes an event of a watch; whether endpoints may have changed by it.
    pub fn event(&mut self, line: &[u8]) -> Result<bool, Trouble> {
        let garbage =
            |why: serde_json::Error| Trouble::Garbage(format!("a watch event cannot be read: {why}"));
        let event: Event<'_> = serde_json::from_slice(line).map_err(garbage)?;
        let object = event.object.get();
        match event.r#type.as_str() {
            "ADDED" | "MODIFIED" => {
                let slice: Slice = serde_json::from_str(object).map_err(garbage)?;
                self.version.clone_from(&slice.metadata.resource_version);
                self.by_name.insert(slice.metadata.name.clone(), slice);
                if self.by_name.len() > MAX_SLICES {
                    return Err(Trouble::Garbage(format!("more than {MAX_SLICES} EndpointSlices")));
                }
                Ok(true)
            }
            "DELETED" => {
                let slice: Slice = serde_json::from_str(object).map_err(garbage)?;
                self.version.clone_from(&slice.metadata.resource_version);
                Ok(self.by_name.remove(&slice.metadata.name).is_some())
            }
            "BOOKMARK" => {
                let bookmark: Bookmark = serde_json::from_str(object).map_err(garbage)?;
                self.version = bookmark.metadata.resource_version;
                Ok(false)
            }
            "ERROR" => {
                let status: Status = serde_json::from_str(object).unwrap_or_default();
                if status.code == 410 {
                    return Err(Trouble::Gone);
                }
                let message = shown(&status.message);
                Err(Trouble::Refused(format!("the watch ended with {}: {message}", status.code)))
            }
            // Kinds of events that are not known yet change nothing.
            _ => Ok(false),
        }
    }

    /// The endpoints at a port.
    pub fn answer(&self, name: &ServiceName) -> Result<Answer, Trouble> {
        // The pods of a service with both families are in slices of both: once is enough.
        let has_v4 = self.by_name.values().any(|slice| {
            slice.address_type == "IPv4" && slice.endpoints.as_ref().is_some_and(|e| !e.is_empty())
        });
        let mut endpoints = Vec::new();
        for slice in self.by_name.values() {
            let some = slice.endpoints.as_deref().unwrap_or_default();
            if some.is_empty() || (has_v4 && slice.address_type == "IPv6") {
                continue;
            }
            let port = port_of(slice.ports.as_deref().unwrap_or_default(), name)?;
            endpoints.extend(some.iter().filter_map(|endpoint| {
                let host = endpoint.addresses.first()?;
                let address = match host.parse::<Ipv6Addr>() {
                    Ok(v6) => format!("[{v6}]:{port}"),
                    Err(_) => format!("{host}:{port}"),
                };
                Some(Endpoint { address, weight: WEIGHT, standing: endpoint.conditions.standing() })
            }));
        }
        Ok(Answer::new(endpoints))
    }
}

/// The port meant among a slice's.
fn port_of(ports: &[SlicePort], name: &ServiceName) -> Result<u16, Trouble> {
    if let Some(number) = name.port.as_deref().and_then(|port| port.parse().ok()) {
        return Ok(number);
    }
    let is_tcp = |port: &&SlicePort| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
    let known: Vec<(&str, u16)> = ports
        .iter()
        .filter(is_tcp)
        .filter_map(|port| Some((port.name.as_deref().unwrap_or_default(), port.port?)))
        .collect();
    let service = &name.service;
    let listed =
        || known.iter().map(|(name, port)| format!("{name} ({port})")).collect::<Vec<_>>().join(", ");
    match (&name.port, known.as_slice()) {
        (Some(wanted), _) => {
            let found = known.iter().find(|(name, _)| name == wanted);
            found.map(|(_, port)| *port).ok_or_else(|| {
                Trouble::Refused(format!("service {service} has no port {wanted:?}; it has {}", listed()))
            })
        }
        (None, [(_, port)]) => Ok(*port),
        (None, []) => Err(Trouble::Refused(format!(
            "service {service} has no TCP port in its EndpointSlices; write the port behind it: {service}:8000"
        ))),
        (None, [(first, _), ..]) => Err(Trouble::Refused(format!(
            "service {service} has several ports ({}); write which is meant: {service}:{first}",
            listed()
        ))),
    }
}

/// Takes a watch's bytes apart into lines.
#[derive(Debug, Default)]
pub struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Takes more bytes; each line that they complete is handed to `line`.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        mut line: impl FnMut(&[u8]) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        let mut bytes = bytes;
        while let Some(at) = memchr::memchr(b'\n', bytes) {
            let (one, rest) = (&bytes[..at], &bytes[at + 1..]);
            if self.rest.is_empty() {
                line(one)?;
            } else {
                self.rest.extend_from_slice(one);
                let whole = std::mem::take(&mut self.rest);
                line(&whole)?;
            }
            bytes = rest;
        }
        if self.rest.len() + bytes.len() > MAX_LINE {
            return Err(Trouble::Garbage(format!("an event of a watch is longer than {MAX_LINE} bytes")));
        }
        self.rest.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(name: &str, version: &str, family: &str, endpoints: Value) -> Value {
        json!({
            "metadata": {"name": name, "resourceVersion": version, "namespace": "ns"}, "addressType": family,
            "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}, {"name": "q", "port": 1, "protocol": "UDP"}],
        })
    }

    fn list(items: &[Value]) -> Slices {
        let mut slices = Slices::default();
        let json = json!({"metadata": {"resourceVersion": "7"}, "items": items});
        slices.relist(json.to_string().as_bytes()).unwrap();
        slices
    }

    fn name(text: &str) -> ServiceName {
        ServiceName::parse(text).unwrap()
    }

    fn shown(slices: &Slices, text: &str) -> Vec<String> {
        let answer = slices.answer(&name(text)).unwrap();
        answer.all().iter().map(|e| format!("{} {}", e.address, e.standing.name())).collect()
    }

    fn event(slices: &mut Slices, kind: &str, object: &Value) -> Result<bool, Trouble> {
        slices.event(json!({"type": kind, "object": object}).to_string().as_bytes())
    }

    #[test]
    fn names_are_taken_apart_and_others_refused() {
        let all = name("prod/vllm:http");
        assert_eq!((all.namespace.as_deref(), all.service.as_str()), (Some("prod"), "vllm"));
        assert_eq!(all.port.as_deref(), Some("http"));
        assert_eq!(name("vllm"), ServiceName { namespace: None, service: "vllm".into(), port: None });
        let long = "a".repeat(64);
        for wrong in
            ["", "/a", "a/", "a:", "A", "a_b", "-a", "a-", "a:0", "a:70000", "a/b/c", "http://a", &long]
        {
            assert!(ServiceName::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn conditions_decide_who_gets_requests() {
        let endpoint = |ip: &str, conditions: Value| json!({"addresses": [ip], "conditions": conditions});
        let slices = list(&[slice(
            "a",
            "1",
            "IPv4",
            json!([
                endpoint("10.0.0.1", json!({"ready": true, "serving": true, "terminating": false})),
                endpoint("10.0.0.2", json!({"ready": false, "serving": true, "terminating": true})),
                endpoint("10.0.0.3", json!({"ready": false, "serving": false, "terminating": true})),
                endpoint("10.0.0.4", json!({"ready": false})),
                endpoint("10.0.0.5", json!({})),
                endpoint("10.0.0.6", json!({"ready": true, "serving": true, "terminating": true})),
                {"addresses": ["10.0.0.7"]},
                {"addresses": []},
            ]),
        )]);
        assert_eq!(
            shown(&slices, "s"),
            [
                "10.0.0.1:8000 ready",
                "10.0.0.2:8000 leaving",
                "10.0.0.3:8000 out",
                "10.0.0.4:8000 out",
                "10.0.0.5:8000 ready",
                "10.0.0.6:8000 leaving",
                "10.0.0.7:8000 ready"
            ]
        );
    }

    #[test]
    fn a_pod_with_both_families_counts_once() {
        let v4 = slice("a", "1", "IPv4", json!([{"addresses": ["10.0.0.1"]}]));
        let v6 = slice("b", "2", "IPv6", json!([{"addresses": ["fd00::1"]}]));
        assert_eq!(shown(&list(&[v4, v6.clone()]), "s"), ["10.0.0.1:8000 ready"]);
        let none = slice("a", "1", "IPv4", Value::Null);
        assert_eq!(shown(&list(&[none, v6]), "s"), ["[fd00::1]:8000 ready"]);
    }

    #[test]
    fn the_port_is_the_named_one_or_the_only_one() {
        let mut several = slice("a", "1", "IPv4", json!([{"addresses": ["10.0.0.1"]}]));
        assert_eq!(shown(&list(&[several.clone()]), "s:http"), ["10.0.0.1:8000 ready"]);
        assert_eq!(shown(&list(&[several.clone()]), "s:9999"), ["10.0.0.1:9999 ready"]);
        several["ports"] = json!([{"name": "http", "port": 8000}, {"name": "metrics", "port": 9000}]);
        let slices = list(&[several.clone()]);
        let wrong = |text: &str| slices.answer(&name(text)).unwrap_err().to_string();
        assert!(wrong("s").contains("several ports (http (8000), metrics (9000))"), "{}", wrong("s"));
        assert!(wrong("s").contains("s:http"), "{}", wrong("s"));
        assert!(wrong("s:grpc").contains("no port \"grpc\""), "{}", wrong("s:grpc"));
        assert_eq!(shown(&slices, "s:metrics"), ["10.0.0.1:9000 ready"]);
        several["ports"] = Value::Null;
        assert!(list(&[several]).answer(&name("s")).is_err());
    }

    #[test]
    fn events_change_what_a_list_said() {
        let one = |ip: &str, version: &str| slice("a", version, "IPv4", json!([{"addresses": [ip]}]));
        let mut slices = list(&[one("10.0.0.1", "5")]);
        assert_eq!(slices.version(), "7", "the list's, not that of a slice");
        assert_eq!(event(&mut slices, "MODIFIED", &one("10.0.0.2", "8")), Ok(true));
        assert_eq!((shown(&slices, "s"), slices.version()), (vec!["10.0.0.2:8000 ready".to_owned()], "8"));
        let bookmark = json!({"kind": "EndpointSlice", "metadata": {"resourceVersion": "12"}});
        assert_eq!(event(&mut slices, "BOOKMARK", &bookmark), Ok(false));
        assert_eq!(slices.version(), "12");
        assert_eq!(event(&mut slices, "DELETED", &one("10.0.0.2", "13")), Ok(true));
        assert_eq!(shown(&slices, "s"), [""; 0]);
        assert_eq!(event(&mut slices, "SOMETHING", &json!({})), Ok(false));
        let status = |code: u16| json!({"kind": "Status", "code": code, "message": "too old"});
        assert_eq!(event(&mut slices, "ERROR", &status(410)), Err(Trouble::Gone));
        assert!(matches!(event(&mut slices, "ERROR", &status(500)), Err(Trouble::Refused(_))));
        assert!(matches!(slices.event(b"{"), Err(Trouble::Garbage(_))));
    }

    #[test]
    fn lines_come_out_however_the_bytes_were_cut() {
        let text = b"one\ntwo\n\nfour\n";
        for cut in 0..=text.len() {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            for part in [&text[..cut], &text[cut..]] {
                let mut see = |line: &[u8]| {
                    seen.push(line.to_vec());
                    Ok(())
                };
                lines.feed(part, &mut see).unwrap();
            }
            assert_eq!(seen, [b"one".to_vec(), b"two".to_vec(), b"".to_vec(), b"four".to_vec()], "{cut}");
        }
        let endless = Lines::default().feed(&vec![b'x'; MAX_LINE + 1], |_| Ok(()));
        assert!(matches!(endless, Err(Trouble::Garbage(_))));
    }
}
