//! Polaris' discovery in JSON: a question, and what the answer says.

use serde::Deserialize;
use serde_json::json;

use super::answer::{Answer, Endpoint, Standing, WEIGHT};
use super::client::{Trouble, shown};

/// Of an answer: everything.
const SUCCESS: u32 = 200_000;
/// Of an answer: nothing but that the revision is still the same.
const NO_CHANGE: u32 = 200_001;
/// Asks for instances of a service.
const INSTANCE: u32 = 1;

#[derive(Deserialize)]
struct Reply {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    info: Option<String>,
    #[serde(default)]
    service: Option<Service>,
    #[serde(default)]
    instances: Option<Vec<Instance>>,
}

#[derive(Deserialize)]
struct Service {
    #[serde(default)]
    revision: Option<String>,
}

#[derive(Deserialize)]
struct Instance {
    #[serde(default)]
    host: Option<String>,
    #[serde(default)]
    port: Option<u16>,
    #[serde(default)]
    weight: Option<u32>,
    #[serde(default)]
    healthy: Option<bool>,
    #[serde(default)]
    isolate: Option<bool>,
}

/// What an answer says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// The same as at the revision that was named.
    Same,
    /// This, at a revision.
    Instances(Answer, String),
}

/// The question after a service's instances, unless they are those of a revision.
pub(super) fn question(namespace: &str, service: &str, revision: &str) -> String {
    json!({"type": INSTANCE, "service": {"namespace": namespace, "name": service, "revision": revision}})
        .to_string()
}

/// Reads an answer.
pub(super) fn read(body: &[u8], namespace: &str, service: &str) -> Result<Found, Trouble> {
    let reply: Reply = serde_json::from_slice(body)
        .map_err(|why| Trouble::Garbage(format!("Polaris' answer cannot be read: {why}")))?;
    match reply.code {
        NO_CHANGE => Ok(Found::Same),
        SUCCESS => {
            let revision = reply.service.and_then(|service| service.revision).unwrap_or_default();
            let endpoints = reply.instances.unwrap_or_default().into_iter().filter_map(endpoint);
            Ok(Found::Instances(Answer::new(endpoints), revision))
        }
        code => {
            let info = shown(reply.info.as_deref().unwrap_or_default());
            let help = match code / 1000 {
                400 => format!("; is there a service {service} in namespace {namespace}?"),
                401 | 403 => "; name a token's file: name_service.polaris_token_file".to_owned(),
                _ => String::new(),
            };
            Err(Trouble::Refused(format!("Polaris answered {code}: {info}{help}")))
        }
    }
}

fn endpoint(instance: Instance) -> Option<Endpoint> {
    let host = instance.host.filter(|host| !host.is_empty())?;
    let port = instance.port.filter(|port| *port > 0)?;
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let standing = match (instance.isolate.unwrap_or(false), instance.healthy.unwrap_or(true)) {
        (true, _) => Standing::Out,
        (false, true) => Standing::Ready,
        (false, false) => Standing::Unhealthy,
    };
    Some(Endpoint { address: format!("{host}:{port}"), weight: instance.weight.unwrap_or(WEIGHT), standing })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_read_with_health_weight_and_isolation() {
        let body = br#"{"code":200000,"info":"execute success","service":{"name":"p","revision":"r1"},"instances":[
            {"id":"1","host":"10.0.0.1","port":8000,"weight":50,"healthy":true,"isolate":false,"metadata":{"a":"b"}},
            {"host":"10.0.0.2","port":8000,"weight":0,"healthy":true},
            {"host":"10.0.0.3","port":8000,"healthy":false,"priority":0},
            {"host":"10.0.0.4","port":8000,"healthy":true,"isolate":true},
            {"host":"fd00::1","port":8000},{"host":"","port":1},{"host":"x"}]}"#;
        let Ok(Found::Instances(answer, revision)) = read(body, "Production", "p") else { panic!() };
        let shown: Vec<String> = answer
            .all()
            .iter()
            .map(|e| format!("{} {} {}", e.address, e.weight, e.standing.name()))
            .collect();
        assert_eq!(
            shown,
            [
                "10.0.0.1:8000 50 ready",
                "10.0.0.2:8000 0 ready",
                "10.0.0.3:8000 100 unhealthy",
                "10.0.0.4:8000 100 out",
                "[fd00::1]:8000 100 ready"
            ]
        );
        assert_eq!(revision, "r1");
        assert_eq!(answer.usable().count(), 2, "weight 0 gets nothing");
    }

    #[test]
    fn no_change_and_refusals_are_told_apart() {
        assert_eq!(read(br#"{"code":200001,"instances":[]}"#, "n", "s"), Ok(Found::Same));
        let missing = read(br#"{"code":400202,"info":"not found resource"}"#, "Production", "s").unwrap_err();
        assert!(missing.to_string().contains("service s in namespace Production"), "{missing}");
        let token = read(br#"{"code":401000,"info":"unauthorized"}"#, "n", "s").unwrap_err();
        assert!(token.to_string().contains("polaris_token_file"), "{token}");
        assert!(matches!(read(b"<html>", "n", "s"), Err(Trouble::Garbage(_))));
        assert_eq!(
            question("n", "s", "r"),
            r#"{"service":{"name":"s","namespace":"n","revision":"r"},"type":1}"#
        );
    }
}
