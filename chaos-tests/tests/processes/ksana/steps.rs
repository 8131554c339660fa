//! The recorded management steps in strict mode on three replicas: each by way of the balancer, which
//! hands every connection to another replica than the last one.

use std::collections::BTreeMap;
use std::time::Duration;

use chaos_tests::endpoint::LIMIT;
use chaos_tests::fleet::Fleet;
use chaos_tests::raw;
use serde_json::{Value, json};

use super::{golden, until_seen};

/// `ksana.heartbeat_timeout_s` of the recorded steps' fleets.
const TIMEOUT: Duration = Duration::from_secs(4);

/// Whether `actual` is `expected` with something in the place of each placeholder, the same for the same
/// node everywhere.
fn fits(expected: &str, actual: &str, ids: &mut BTreeMap<String, String>) -> bool {
    let places = ["<NODE", "<UTC_Z>", "<LOCAL_NAIVE>", "<DB_TS>"];
    let Some(at) = places.iter().filter_map(|place| expected.find(place)).min() else {
        return expected == actual;
    };
    let Some(rest) = actual.strip_prefix(&expected[..at]) else { return false };
    let end = at + expected[at..].find('>').expect("a placeholder ends") + 1;
    let (place, after) = (&expected[at..end], &expected[end..]);
    let found = rest[..rest.find(['"', '\'']).unwrap_or(rest.len())].to_owned();
    let is = ids.get(place).cloned().unwrap_or_else(|| found.clone());
    if place.starts_with("<NODE") {
        ids.insert(place.to_owned(), is.clone());
    }
    !is.is_empty() && rest.strip_prefix(&is).is_some_and(|rest| fits(after, rest, ids))
}

async fn strict_fleet() -> Fleet {
    let timeout = format!("ksana.heartbeat_timeout_s={}", TIMEOUT.as_secs());
    Fleet::of(3).set("ksana.enabled=true").set("ksana.compat=strict").set(&timeout).start().await
}

/// Sends recorded steps to the balancer.
struct Replay {
    fleet: Fleet,
    ids: BTreeMap<String, String>,
}

impl Replay {
    async fn ask(&mut self, method: &str, path: &str, kind: &str, body: &str) -> raw::Answer {
        let address = self.fleet.balancer;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{kind}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let bytes = raw::exchange(address, request.as_bytes(), LIMIT).await.expect("an answer");
        raw::Answer::parse(&bytes)
    }

    /// Has these nodes send heartbeats that change nothing.
    async fn beat(&mut self, nodes: &[&str]) {
        for node in nodes {
            let body = json!({ "node_id": self.ids[*node] }).to_string();
            let answer = self.ask("POST", "/Heartbeat", "content-type: application/json\r\n", &body).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
    }

    /// Waits until these nodes have been silent for longer than they may, for each replica.
    async fn silent(&self, nodes: &[&str]) {
        let too_long = (TIMEOUT + Duration::from_millis(500)).as_millis() as u64;
        until_seen(&self.fleet, &[0, 1, 2], "silent for too long", |seen| {
            let silent = |id: &String| {
                seen.nodes.iter().any(|node| node.node_id == *id && node.heard_ms_ago > too_long)
            };
            nodes.iter().all(|node| silent(&self.ids[*node]))
        })
        .await;
    }

    async fn step(&mut self, step: &Value) {
        let text = |member: &str| step[member].as_str().unwrap_or_default();
        let name = text("step");
        let mut body = text("body").to_owned();
        for (place, id) in &self.ids {
            body = body.replace(place, id);
        }
        let kind = if name == "reg no content-type" { "" } else { "content-type: application/json\r\n" };
        let answer = self.ask(text("method"), text("path"), kind, &body).await;
        let said = answer.text();
        assert_eq!(
            u64::from(answer.status),
            step["expect_status"].as_u64().expect("a status"),
            "{name}: {said}"
        );
        let kind = raw::header(&answer.head, "content-type");
        assert_eq!(kind, step["expect_content_type"].as_str(), "{name}: {said}");
        let expected = text("expect_body");
        let is_told = expected != "<skip>" && answer.status != 307;
        assert!(!is_told || fits(expected, &said, &mut self.ids), "{name}: {expected}\n{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_recorded_steps_are_answered_alike_step_by_step_over_three_replicas() {
    let golden = golden();
    let steps = golden["management_sequence"].as_array().expect("steps");
    assert_eq!(steps.len(), 98);
    let mut replay = Replay { fleet: strict_fleet().await, ids: BTreeMap::new() };
    for step in steps {
        let name = step["step"].as_str().expect("a name");
        // The recording began with an empty database here.
        if matches!(name, "L1 register prefill" | "M reg prefill rank1") {
            replay.fleet.agree().await;
            drop(replay);
            replay = Replay { fleet: strict_fleet().await, ids: BTreeMap::new() };
        }
        match name {
            // A rank was silent for too long here, the others were not.
            "S1 hb prefill r0 after decode r1 stale" => {
                tokio::time::sleep(TIMEOUT - Duration::from_secs(1)).await;
                replay.beat(&["<NODE10>", "<NODE11>", "<NODE13>"]).await;
                replay.silent(&["<NODE12>"]).await;
            }
            "S6 hb decode r0 after prefill r1 stale" => {
                replay.beat(&["<NODE11>", "<NODE12>", "<NODE13>"]).await;
                replay.silent(&["<NODE10>"]).await;
            }
            // All of them were.
            _ if name.starts_with("S9 ") => {
                replay.silent(&["<NODE10>", "<NODE11>", "<NODE12>", "<NODE13>"]).await;
            }
            _ => {}
        }
        replay.step(step).await;
    }
    replay.fleet.agree().await;
}
