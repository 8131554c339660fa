//! The management steps recorded from the reference router, replayed against one listener in strict
//! mode.

use std::collections::BTreeMap;

use serde_json::Value;

use super::start;
use crate::http::tests::support::{MemoryCluster, exchange, header, status};
use crate::ids::ReplicaId;
use crate::state::command::ControlCommand;
use crate::state::control::ControlState;
use crate::state::ksana::{KsanaCommand, Rules};
use crate::state::replicated::State as _;

/// The recorded vectors.
pub(super) fn vectors() -> Value {
    serde_json::from_str(include_str!("../../../../tests/golden/ksana/vectors.json")).unwrap()
}

/// Whether `actual` is `expected` with something in the place of each placeholder: the same for the
/// same node everywhere.
fn fits(expected: &str, actual: &str, ids: &mut BTreeMap<String, String>) -> bool {
    let Some(at) =
        ["<NODE", "<UTC_Z>", "<LOCAL_NAIVE>", "<DB_TS>"].iter().filter_map(|p| expected.find(p)).min()
    else {
        return expected == actual;
    };
    let Some(rest) = actual.strip_prefix(&expected[..at]) else { return false };
    let end = at + expected[at..].find('>').expect("a placeholder's end") + 1;
    let (placeholder, after) = (&expected[at..end], &expected[end..]);
    let is = match ids.get(placeholder) {
        Some(id) => id.clone(),
        None => rest[..rest.find(['"', '\'']).unwrap_or(rest.len())].to_owned(),
    };
    let shape: String = is.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    let right = match placeholder {
        "<UTC_Z>" => shape == "0000-00-00T00:00:00.000000Z",
        "<LOCAL_NAIVE>" => shape == "0000-00-00T00:00:00.000000",
        "<DB_TS>" => shape == "0000-00-00 00:00:00.000000",
        _ => {
            ids.insert(placeholder.to_owned(), is.clone());
            !is.is_empty()
        }
    };
    right && rest.strip_prefix(&is).is_some_and(|rest| fits(after, rest, ids))
}

/// What the recording did to the reference's database before a step.
fn prepare(cluster: &MemoryCluster, ids: &mut BTreeMap<String, String>, step: &str) {
    let mut control = cluster.control.lock();
    if matches!(step, "L1 register prefill" | "M reg prefill rank1") {
        *control = ControlState::default();
        ids.clear();
    }
    let silent = match step {
        "S1 hb prefill r0 after decode r1 stale" => Some("<NODE12>"),
        "S6 hb decode r0 after prefill r1 stale" => Some("<NODE10>"),
        _ if step.starts_with("S9 ") => None,
        _ => return,
    };
    let rules = Rules { strict: true, timeout_ms: 60_000 };
    let tick = ControlCommand::Tick {
        elapsed_ms: 3_600_000,
        replicas: Vec::new(),
        worker_timeout_ms: 5000,
        lease_ms: 750,
    };
    control.apply(ReplicaId(1), tick);
    if let Some(silent) = silent {
        let others = ids.iter().filter(|(name, _)| name.as_str() != silent);
        let nodes = others.map(|(_, id)| (id.clone(), 0)).collect();
        control.apply(ReplicaId(1), ControlCommand::Ksana(KsanaCommand::Heard { nodes, rules }));
    }
}

#[tokio::test]
async fn all_management_steps_are_answered_as_the_reference_answers_them() {
    let front = start(true);
    let mut ids = BTreeMap::new();
    let golden = vectors();
    let steps = golden["management_sequence"].as_array().unwrap();
    assert_eq!(steps.len(), 98);
    for step in steps {
        let text = |member: &str| step[member].as_str().unwrap_or_default();
        let name = text("step");
        prepare(&front.cluster, &mut ids, name);
        let mut body = text("body").to_owned();
        for (placeholder, id) in &ids {
            body = body.replace(placeholder, id);
        }
        let kind = match name {
            "reg no content-type" => "",
            _ => "content-type: application/json\r\n",
        };
        let request = format!(
            "{} {} HTTP/1.1\r\nhost: router:9080\r\nconnection: close\r\n{kind}content-length: {}\r\n\r\n{body}",
            text("method"),
            text("path"),
            body.len()
        );
        let response = exchange(front.address, request).await;
        let (head, answered) = response.split_once("\r\n\r\n").expect(&response);
        assert_eq!(
            u64::from(status(&response)),
            step["expect_status"].as_u64().unwrap(),
            "{name}: {response}"
        );
        assert_eq!(header(head, "content-type"), step["expect_content_type"].as_str(), "{name}: {response}");
        match (status(&response), text("expect_body")) {
            (307, _) => {
                let path = text("path");
                let other = path.strip_suffix('/').map_or_else(|| format!("{path}/"), str::to_owned);
                assert_eq!(header(head, "location"), Some(format!("http://router:9080{other}").as_str()));
            }
            (_, "<skip>") => assert!(!answered.is_empty(), "{name}"),
            (_, expected) => assert!(fits(expected, answered, &mut ids), "{name}: {expected}\n{answered}"),
        }
        if status(&response) == 405 {
            assert_eq!(header(head, "allow"), Some("POST"), "{name}");
        }
    }
}
