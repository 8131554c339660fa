//! The tables by themselves: the golden management steps, faults that fixed mode does not have, bounds,
//! and that snapshots and digests are of the same content.

use serde_json::Value;

use super::*;
use crate::ids::ReplicaId;
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::control::ControlState;
use crate::state::replicated::State;

const STRICT: Rules = Rules { strict: true, timeout_ms: 60_000 };
const FIXED: Rules = Rules { strict: false, timeout_ms: 60_000 };
const DAY: u64 = 86_400_000;

/// A state with its time, and who proposes.
#[derive(Default)]
struct Tables(ControlState);

impl Tables {
    fn apply(&mut self, command: KsanaCommand) -> KsanaOutcome {
        match self.0.apply(ReplicaId(1), ControlCommand::Ksana(command)) {
            ControlOutcome::Ksana(outcome) => outcome,
            other => panic!("{other:?}"),
        }
    }

    fn wait(&mut self, elapsed_ms: u32) {
        let (worker_timeout_ms, lease_ms) = (5000, 750);
        self.0.apply(
            ReplicaId(1),
            ControlCommand::Tick { elapsed_ms, replicas: Vec::new(), worker_timeout_ms, lease_ms },
        );
    }

    fn register(&mut self, spec: NodeSpec, rules: Rules) -> String {
        self.try_register(spec, None, rules).unwrap_or_else(|other| panic!("{other:?}"))
    }

    fn try_register(
        &mut self,
        spec: NodeSpec,
        wanted: Option<&str>,
        rules: Rules,
    ) -> Result<String, KsanaOutcome> {
        let (wanted, spare) = (wanted.map(str::to_owned), "5".repeat(32));
        match self.apply(KsanaCommand::Register { spec, wanted, spare, rules }) {
            KsanaOutcome::Registered { node_id } => Ok(node_id),
            other => Err(other),
        }
    }

    fn beat(&mut self, id: &str, rules: Rules) -> Answer {
        let command = KsanaCommand::Beat { node_id: id.to_owned(), cluster: "c".to_owned(), rules };
        assert_eq!(self.apply(command), KsanaOutcome::Done);
        self.0.ksana().answer(id, rules.strict).expect("a node")
    }

    fn name(&mut self, id: &str, key: &str, comm_id: &str, rules: Rules) -> KsanaOutcome {
        let (node_id, cluster) = (id.to_owned(), "c".to_owned());
        let (comm_key, comm_id) = (key.to_owned(), comm_id.to_owned());
        self.apply(KsanaCommand::CommId { node_id, cluster, comm_key, comm_id, rules })
    }

    fn judge(&mut self) {
        self.apply(KsanaCommand::Judge { rules: FIXED, forget_ms: DAY });
    }

    fn routes(&self) -> usize {
        self.0.ksana().routes("c", false).len()
    }
}

fn spec(
    role: Role,
    inference: &str,
    coordinator: &str,
    rank: u32,
    world_size: u32,
    devices: u32,
) -> NodeSpec {
    NodeSpec {
        cluster: "c".to_owned(),
        inference_addr: inference.to_owned(),
        coordinator_addr: coordinator.to_owned(),
        role,
        rank,
        world_size,
        devices,
    }
}

const P: &str = "127.0.0.1:100";
const D: &str = "127.0.0.1:200";
const KEY: &str = "127.0.0.1:100__127.0.0.1:200";

fn prefill() -> NodeSpec {
    spec(Role::Prefill, P, "127.0.0.1:1000", 0, 1, 1)
}

fn decode() -> NodeSpec {
    spec(Role::Decode, D, "127.0.0.1:2000", 0, 1, 1)
}

/// A pair that has its comm id: the ids of both nodes.
fn pair(tables: &mut Tables, rules: Rules) -> (String, String) {
    let (p, d) = (tables.register(prefill(), rules), tables.register(decode(), rules));
    tables.beat(&p, rules);
    tables.beat(&d, rules);
    assert_eq!(tables.name(&p, KEY, "X", rules), KsanaOutcome::CommId("X".to_owned()));
    (p, d)
}

#[test]
fn a_pair_is_told_to_both_and_routed_to_once_it_has_its_comm_id() {
    for rules in [STRICT, FIXED] {
        let mut tables = Tables::default();
        let (p, d) = (tables.register(prefill(), rules), tables.register(decode(), rules));
        assert_eq!(tables.beat(&p, rules).keys, Vec::new(), "nobody is there yet");
        assert!(tables.beat(&d, rules).keys[0].comm_id.is_empty());
        assert_eq!(tables.routes(), 0);
        tables.name(&p, KEY, "X", rules);
        let addresses = vec![(0, 0, "127.0.0.1:1000".to_owned()), (0, 0, "127.0.0.1:2000".to_owned())];
        for id in [&p, &d] {
            let expected =
                KeyView { comm_key: KEY.into(), comm_id: "X".into(), addresses: addresses.clone() };
            assert_eq!(tables.beat(id, rules).keys, [expected]);
        }
        assert_eq!(tables.0.ksana().routes("c", rules.strict).len(), 1);
        assert_eq!(tables.0.ksana().routes("other", rules.strict).len(), 0);
    }
}

#[test]
fn a_heartbeat_that_changes_nothing_needs_no_command() {
    for rules in [STRICT, FIXED] {
        let mut tables = Tables::default();
        let (p, d) = (tables.register(prefill(), rules), tables.register(decode(), rules));
        assert!(!tables.0.ksana().is_plain_beat(0, &p, rules), "its group has no row yet");
        tables.beat(&p, rules);
        tables.beat(&d, rules);
        tables.beat(&p, rules);
        for id in [&p, &d] {
            assert!(tables.0.ksana().is_plain_beat(tables.0.now_ms(), id, rules));
            let before = tables.0.digest();
            tables.beat(id, rules);
            assert_eq!(tables.0.digest(), before, "and so a command changes nothing");
        }
        assert!(!tables.0.ksana().is_plain_beat(0, "nobody", rules));
    }
}

#[test]
fn in_strict_mode_silence_shows_in_somebody_s_heartbeat_only() {
    let mut tables = Tables::default();
    let (p, d) = pair(&mut tables, STRICT);
    tables.wait(61_000);
    assert_eq!(tables.0.ksana().routes("c", true).len(), 1, "dead for long, and still routed to");
    assert!(!tables.0.ksana().is_plain_beat(tables.0.now_ms(), &p, STRICT));
    assert!(tables.beat(&p, STRICT).keys[0].comm_id.is_empty());
    assert!(!tables.0.ksana().node(&d).unwrap().online);
    assert_eq!(tables.0.ksana().routes("c", true).len(), 0);
    assert_eq!(tables.beat(&d, STRICT).keys[0].comm_id, "X", "kept all the while");
}

#[test]
fn in_fixed_mode_nodes_go_offline_by_the_leader_s_clock_and_come_back_by_any_sign() {
    let mut tables = Tables::default();
    let (p, d) = pair(&mut tables, FIXED);
    tables.wait(40_000);
    tables.apply(KsanaCommand::Heard { nodes: vec![(d.clone(), 1000)], rules: FIXED });
    tables.wait(21_000);
    assert!(tables.0.ksana().wants_judgement(tables.0.now_ms(), FIXED, DAY));
    tables.judge();
    let online = |tables: &Tables, id: &str| tables.0.ksana().node(id).unwrap().online;
    assert_eq!((online(&tables, &p), online(&tables, &d)), (false, true));
    assert_eq!((tables.routes(), tables.0.ksana().blocker(KEY)), (0, Some("prefill not ready")));
    // A sign that is older than the timeout is none.
    tables.apply(KsanaCommand::Heard { nodes: vec![(p.clone(), 61_000)], rules: FIXED });
    assert!(!online(&tables, &p));
    tables.apply(KsanaCommand::Heard { nodes: vec![(p.clone(), 10)], rules: FIXED });
    assert!(online(&tables, &p));
    assert_eq!(tables.routes(), 1);
    assert!(!tables.0.ksana().wants_judgement(tables.0.now_ms(), FIXED, DAY));
}

#[test]
fn in_fixed_mode_no_rank_s_heartbeat_takes_a_pair_from_the_others() {
    let mut tables = Tables::default();
    let ranks = |role, addr: &str, base: u32| {
        [0, 1].map(|rank| spec(role, addr, &format!("127.0.0.1:{}", base + rank), rank, 2, 1))
    };
    let ids: Vec<String> = ranks(Role::Prefill, P, 1000)
        .into_iter()
        .chain(ranks(Role::Decode, D, 2000))
        .map(|spec| tables.register(spec, FIXED))
        .collect();
    ids.iter().for_each(|id| drop(tables.beat(id, FIXED)));
    tables.name(&ids[0], KEY, "X", FIXED);
    assert_eq!(tables.routes(), 1);
    // The second prefill rank falls silent.
    tables.wait(61_000);
    for at in [0, 2, 3] {
        tables.apply(KsanaCommand::Heard { nodes: vec![(ids[at].clone(), 0)], rules: FIXED });
    }
    tables.judge();
    for id in [&ids[2], &ids[3], &ids[2]] {
        tables.beat(id, FIXED);
        assert_eq!(tables.routes(), 0, "half a prefill group is none, whoever speaks last");
    }
}

#[test]
fn in_fixed_mode_pairs_of_unequal_sizes_are_not_routed_to() {
    let mut tables = Tables::default();
    let p = tables.register(spec(Role::Prefill, P, "127.0.0.1:1000", 0, 2, 2), FIXED);
    let d = tables.register(decode(), FIXED);
    tables.beat(&p, FIXED);
    tables.beat(&d, FIXED);
    tables.name(&p, KEY, "X", FIXED);
    assert_eq!((tables.routes(), tables.0.ksana().blocker(KEY)), (0, Some("unequal world sizes")));
}

#[test]
fn in_fixed_mode_a_node_that_moved_takes_its_own_place_again() {
    let mut tables = Tables::default();
    let (old, _) = pair(&mut tables, FIXED);
    let moved = NodeSpec { coordinator_addr: "127.0.0.1:1999".into(), ..prefill() };
    assert_eq!(tables.try_register(moved.clone(), None, STRICT), Err(KsanaOutcome::PlaceTaken));
    let new = tables.register(moved, FIXED);
    assert_ne!(old, new);
    assert_eq!(tables.0.ksana().nodes().count(), 2);
    assert_eq!(tables.0.ksana().blocker(KEY), Some("no comm id"), "it began anew");
    let beat = KsanaCommand::Beat { node_id: old, cluster: "c".into(), rules: FIXED };
    assert_eq!(tables.apply(beat), KsanaOutcome::UnknownNode, "the old one does not come back beside it");
}

#[test]
fn a_decode_group_that_begins_anew_stops_the_pair_until_the_prefill_group_does() {
    let mut tables = Tables::default();
    let (p, d) = pair(&mut tables, FIXED);
    // Before it can have heard of the comm id, nothing is lost.
    tables.0 = {
        let mut early = Tables::default();
        let (p, d) = (early.register(prefill(), FIXED), early.register(decode(), FIXED));
        early.beat(&p, FIXED);
        early.beat(&d, FIXED);
        early.wait(10);
        early.name(&p, KEY, "X", FIXED);
        early.register(decode(), FIXED);
        assert_eq!(early.routes(), 1);
        early.0
    };
    tables.wait(10);
    tables.beat(&d, FIXED);
    assert_eq!(tables.register(decode(), FIXED), d, "the same node keeps its id");
    tables.beat(&d, FIXED);
    assert_eq!((tables.routes(), tables.0.ksana().blocker(KEY)), (0, Some("decode restarted")));
    assert_eq!(tables.register(prefill(), FIXED), p);
    assert!(tables.beat(&p, FIXED).keys[0].comm_id.is_empty());
    tables.name(&p, KEY, "Y", FIXED);
    assert_eq!(tables.routes(), 1);
}

#[test]
fn in_fixed_mode_a_comm_id_is_its_owner_s_and_stands() {
    let mut tables = Tables::default();
    let (p, _) = pair(&mut tables, FIXED);
    for (key, outcome) in [
        ("127.0.0.9:1__127.0.0.1:200", KsanaOutcome::ForeignKey),
        ("127.0.0.1:100__127.0.0.9:1", KsanaOutcome::ForeignKey),
        ("nokey", KsanaOutcome::BadKey),
        (KEY, KsanaOutcome::CommId("X".to_owned())),
    ] {
        assert_eq!(tables.name(&p, key, "other", FIXED), outcome, "{key}");
    }
    assert!(matches!(tables.name(&p, KEY, "", FIXED), KsanaOutcome::Refused(_)));
    let long = "x".repeat(MAX_COMM_ID + 1);
    for rules in [STRICT, FIXED] {
        assert!(matches!(tables.name(&p, KEY, &long, rules), KsanaOutcome::Refused(_)));
    }
}

#[test]
fn a_heartbeat_brings_a_node_back_after_everything_was_lost() {
    for rules in [STRICT, FIXED] {
        let mut tables = Tables::default();
        let (p, d) = pair(&mut tables, rules);
        let mut wiped = Tables::default();
        for id in [&p, &d] {
            let answer = wiped.beat(id, rules);
            assert_eq!(&answer.node.node_id, id);
            assert!(answer.group_ready);
        }
        assert_eq!(wiped.0.ksana().node(&p).unwrap().spec, prefill());
        assert_eq!(wiped.0.ksana().node(&d).unwrap().spec, decode());
        assert_eq!(wiped.name(&p, KEY, "X", rules), KsanaOutcome::CommId("X".to_owned()));
        assert_eq!(wiped.0.ksana().routes("c", rules.strict).len(), 1);
    }
}

#[test]
fn an_id_never_describes_what_its_node_no_longer_is() {
    let mut tables = Tables::default();
    let id = tables.register(prefill(), FIXED);
    let other = NodeSpec { inference_addr: "127.0.0.1:777".into(), ..prefill() };
    let new = tables.register(other.clone(), FIXED);
    assert_ne!(id, new);
    assert_eq!(tables.0.ksana().nodes().count(), 1);
    assert_eq!(describe(&new, "c"), Some(other));
    // A name that it chose itself stays.
    let named = tables.try_register(decode(), Some("mine"), FIXED).unwrap();
    assert_eq!(named, "mine");
    let again = NodeSpec { inference_addr: "127.0.0.1:778".into(), ..decode() };
    assert_eq!(tables.register(again, FIXED), "mine");
    assert_eq!(tables.try_register(prefill_at(5000), Some("mine"), FIXED), Err(KsanaOutcome::IdTaken));
}

fn prefill_at(port: u32) -> NodeSpec {
    spec(Role::Prefill, &format!("127.0.0.1:{port}"), &format!("127.0.0.2:{port}"), 0, 1, 1)
}

#[test]
fn who_is_gone_for_long_is_forgotten_and_makes_room() {
    let mut tables = Tables::default();
    let (p, _) = pair(&mut tables, FIXED);
    tables.wait(61_000);
    tables.judge();
    let beat = tables.beat(&p, FIXED);
    assert!(beat.group_ready);
    tables.wait(u32::try_from(DAY).unwrap());
    tables.apply(KsanaCommand::Heard { nodes: vec![(p, 0)], rules: FIXED });
    tables.judge();
    assert_eq!(tables.0.ksana().nodes().count(), 1);
    assert_eq!((tables.0.ksana().groups().len(), tables.0.ksana().pairs().len()), (1, 0));

    let mut full = Tables::default();
    for port in 0..MAX_NODES as u32 {
        full.register(prefill_at(1 + port), FIXED);
    }
    let late = prefill_at(60_000);
    for rules in [STRICT, FIXED] {
        assert!(matches!(full.try_register(late.clone(), None, rules), Err(KsanaOutcome::Refused(_))));
    }
    full.wait(61_000);
    full.judge();
    full.register(late, FIXED);
    assert_eq!(full.0.ksana().nodes().count(), MAX_NODES);
}

#[test]
fn a_node_is_removed_with_what_only_it_made() {
    let mut tables = Tables::default();
    let (p, d) = pair(&mut tables, FIXED);
    assert_eq!(tables.apply(KsanaCommand::Remove { node_id: p.clone() }), KsanaOutcome::Done);
    assert_eq!(tables.apply(KsanaCommand::Remove { node_id: p }), KsanaOutcome::UnknownNode);
    assert_eq!((tables.0.ksana().groups().len(), tables.0.ksana().pairs().len()), (1, 0));
    tables.apply(KsanaCommand::Remove { node_id: d });
    assert_eq!(tables.0.ksana().groups().len(), 0);
}

#[test]
fn what_is_out_of_bounds_is_refused() {
    let mut tables = Tables::default();
    for bad in [
        NodeSpec { inference_addr: "x".repeat(MAX_NAME + 1), ..prefill() },
        NodeSpec { world_size: 0, ..prefill() },
        NodeSpec { world_size: MAX_WORLD + 1, ..prefill() },
        NodeSpec { rank: MAX_WORLD, ..prefill() },
        NodeSpec { devices: 0, ..prefill() },
        NodeSpec { devices: MAX_DEVICES + 1, ..prefill() },
    ] {
        for rules in [STRICT, FIXED] {
            assert!(matches!(tables.try_register(bad.clone(), None, rules), Err(KsanaOutcome::Refused(_))));
        }
    }
}

#[test]
fn leased_ids_are_given_once_stay_in_range_and_begin_again_at_one() {
    let mut tables = Tables::default();
    let mut lease = |count, start| match tables.apply(KsanaCommand::Lease { count, start }) {
        KsanaOutcome::Block { first, count } => (first, count),
        other => panic!("{other:?}"),
    };
    assert_eq!(lease(100, 7), (7, 100));
    assert_eq!(lease(10, 9999), (107, 10), "the start counts once");
    assert_eq!(lease(u32::MAX, 1), (117, MAX_LEASE));
    let mut tables = Tables::default();
    let mut lease = |count, start| match tables.apply(KsanaCommand::Lease { count, start }) {
        KsanaOutcome::Block { first, count } => (first, count),
        other => panic!("{other:?}"),
    };
    let (first, count) = lease(1000, MAX_REQUEST_ID - 1000);
    assert!(first + count - 1 <= MAX_REQUEST_ID);
    assert_eq!(lease(1000, 1), (1, 1000));
}

#[test]
fn a_snapshot_has_the_same_content_and_digest() {
    let mut tables = Tables::default();
    pair(&mut tables, FIXED);
    pair(&mut tables, STRICT);
    tables.apply(KsanaCommand::Lease { count: 10, start: 3 });
    tables.wait(500);
    let again = ControlState::restore(tables.0.records()).unwrap();
    assert_eq!(again.digest(), tables.0.digest());
    assert_eq!(again.records(), tables.0.records());
    assert_eq!(again.ksana().next_request(), 13);
    let (mut a, mut b) = (Tables(again), tables);
    for tables in [&mut a, &mut b] {
        tables.wait(61_000);
        tables.judge();
        tables.register(decode(), FIXED);
    }
    assert_eq!(a.0.digest(), b.0.digest());
    assert_eq!(a.0.records(), b.0.records());
}

/// The golden steps that are about the tables, as bodies.
#[test]
fn strict_mode_leaves_the_tables_as_the_reference_does() {
    let golden: Value =
        serde_json::from_str(include_str!("../../../tests/golden/ksana/vectors.json")).unwrap();
    let mut tables = Tables::default();
    let mut ids = std::collections::BTreeMap::new();
    let mut compared = 0;
    for step in golden["management_sequence"].as_array().unwrap() {
        let name = step["step"].as_str().unwrap();
        prepare(&mut tables, &mut ids, name);
        let status = step["expect_status"].as_u64().unwrap();
        let mut body = step["body"].as_str().unwrap().to_owned();
        for (placeholder, id) in &ids {
            body = body.replace(placeholder, id);
        }
        let Ok(body) = serde_json::from_str::<Value>(&body) else { continue };
        let text = |member: &str| body[member].as_str().unwrap_or_default().to_owned();
        match step["path"].as_str().unwrap() {
            "/RegisterNode" if matches!(status, 201 | 500) => {
                let role = if text("group_role") == "prefill" { Role::Prefill } else { Role::Decode };
                let spec = NodeSpec {
                    cluster: "default_cluster".into(),
                    inference_addr: text("inference_addr"),
                    coordinator_addr: text("coordinator_addr"),
                    role,
                    rank: body["node_rank"].as_u64().unwrap() as u32,
                    world_size: body["world_size"].as_u64().unwrap_or(1) as u32,
                    devices: body["devices"].as_array().unwrap().len() as u32,
                };
                let registered = tables.try_register(spec, body["node_id"].as_str(), STRICT);
                assert_eq!(registered.is_ok(), status == 201, "{name}: {registered:?}");
                if let Ok(id) = registered {
                    let expected: Value =
                        serde_json::from_str(step["expect_body"].as_str().unwrap()).unwrap();
                    let expected = expected["node_id"].as_str().unwrap().to_owned();
                    assert_eq!(ids.entry(expected).or_insert_with(|| id.clone()), &id, "{name}");
                }
            }
            "/Heartbeat" if status == 200 => drop(tables.beat(&text("node_id"), STRICT)),
            "/RegisterCommId" if status == 200 => {
                tables.name(&text("node_id"), &text("comm_key"), &text("comm_id"), STRICT);
            }
            _ => {}
        }
        if let Some(after) = step.get("db_after") {
            compare(&tables, &ids, after, name);
            compared += 1;
        }
    }
    assert!(compared > 20, "only {compared} steps say what the tables are");
}

/// What the recording did to the reference's database between the steps.
fn prepare(tables: &mut Tables, ids: &mut std::collections::BTreeMap<String, String>, step: &str) {
    // Some rows were taken out in between: those registered before the tables are looked at.
    let keep: Option<&[&str]> = match step {
        "L1 register prefill" | "M reg prefill rank1" => Some(&[]),
        _ => None,
    };
    if keep.is_some() {
        *tables = Tables::default();
        ids.clear();
    }
    let silent = match step {
        "S1 hb prefill r0 after decode r1 stale" => "<NODE12>",
        "S6 hb decode r0 after prefill r1 stale" => "<NODE10>",
        _ => return,
    };
    tables.wait(61_000);
    let others: Vec<(String, u32)> =
        ids.iter().filter(|(name, _)| name.as_str() != silent).map(|(_, id)| (id.clone(), 0)).collect();
    tables.apply(KsanaCommand::Heard { nodes: others, rules: STRICT });
}

fn compare(tables: &Tables, ids: &std::collections::BTreeMap<String, String>, after: &Value, step: &str) {
    let name_of = |id: &String| ids.iter().find(|(_, is)| *is == id).map_or(id, |(name, _)| name).clone();
    let state = tables.0.ksana();
    let mut nodes: Vec<&NodeRecord> = state.nodes().collect();
    nodes.sort_by_key(|node| node.order);
    let nodes: Vec<Value> = nodes
        .iter()
        .map(|n| {
            serde_json::json!({
                "node_id": name_of(&n.node_id), "cluster_name": n.spec.cluster,
                "inference_addr": n.spec.inference_addr, "coordinator_addr": n.spec.coordinator_addr,
                "role": n.spec.role, "node_rank": n.spec.rank, "world_size": n.spec.world_size,
                "device_num": n.spec.devices, "is_online": u8::from(n.online),
            })
        })
        .collect();
    assert_eq!(Value::from(nodes), after["node_info"], "{step}");
    let mut groups: Vec<_> = state.groups().iter().collect();
    groups.sort_by_key(|(_, group)| group.order);
    let groups: Vec<Value> = groups
        .iter()
        .map(|(key, g)| {
            serde_json::json!({
                "cluster_name": key.cluster, "inference_addr": key.inference_addr, "role": key.role,
                "world_size_expected": g.world_size, "online_device_sum": g.online_devices,
                "online_node_count": g.online_nodes, "is_ready": u8::from(g.ready),
            })
        })
        .collect();
    assert_eq!(Value::from(groups), after["inference_group_status"], "{step}");
    let mut pairs: Vec<_> = state.pairs().iter().collect();
    pairs.sort_by_key(|(_, pair)| pair.order);
    let expected = after["comm_group_pair"].as_array().unwrap();
    assert_eq!(pairs.len(), expected.len(), "{step}");
    for ((key, pair), row) in pairs.iter().zip(expected) {
        assert_eq!(row["comm_key"], key.as_str(), "{step}");
        assert_eq!(row["is_active"], u8::from(pair.active), "{step}");
        assert_eq!(row["prefill_addr"], pair.prefill_addr.as_str(), "{step}");
        assert_eq!(row["decode_addr"], pair.decode_addr.as_str(), "{step}");
        let meta = |member: &str| serde_json::from_str::<Value>(row[member].as_str().unwrap()).unwrap();
        assert_eq!(meta("data_channel_meta"), pair.comm_id.as_str(), "{step}");
        let addresses: Vec<Value> =
            answer::expand(&pair.legs).into_iter().map(|a| serde_json::json!([a.0, a.1, a.2])).collect();
        assert_eq!(meta("control_channel_meta"), Value::from(addresses), "{step}");
    }
}
