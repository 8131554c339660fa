//! A fleet's life while replicas die one after the other: all nodes send heartbeats, and requests run.
//!
//! `EVERLINE_KSANA_GROUPS` groups of each role (8), a heartbeat each `EVERLINE_KSANA_BEAT_MS` (500), a
//! replica killed each `EVERLINE_KSANA_KILL_MS` (3000), `EVERLINE_KSANA_KILLS` times (4). The size at
//! which the cluster is to hold is 64, 2000, 10000.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::endpoint::LIMIT;
use chaos_tests::figures::Figures;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::wait::{check, until};
use serde_json::{Value, json};

use super::{Engine, beat, name, register, registration, tables, until_seen};

/// How long after a death there may be no leader.
const ELECTION: Duration = Duration::from_secs(2);
/// `ksana.heartbeat_timeout_s`.
const TIMEOUT: Duration = Duration::from_secs(10);

fn setting(name: &str, ordinary: u64) -> u64 {
    let given = std::env::var(format!("EVERLINE_KSANA_{name}")).ok();
    given.map_or(ordinary, |text| text.parse().expect("a number"))
}

struct Node {
    id: String,
    engine: Engine,
}

/// A group of one node that sends heartbeats.
async fn group(at: SocketAddr, role: &str, n: usize, world: u32) -> Node {
    let engine = Engine::start().await;
    let id = register(at, &registration(role, engine.address, &format!("127.0.0.3:{n}"), 0, world)).await;
    beat(at, &id).await;
    Node { id, engine }
}

/// What is seen of heartbeats.
#[derive(Default)]
struct Watched {
    stop: AtomicBool,
    /// When replicas died.
    deaths: Mutex<Vec<Instant>>,
    /// Decode groups in pairs that do not work: without a comm id, or not shown one.
    hollow: Vec<SocketAddr>,
    /// Heartbeats that broke off with their replica.
    cut: AtomicUsize,
    /// Answers with less than all pairs: of a replica that has just started, without a leader.
    partial: AtomicUsize,
}

impl Watched {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn is_election(&self, at: Instant) -> bool {
        let deaths = self.deaths.lock().expect("nobody panics with it");
        deaths.iter().any(|death| at >= *death && at < *death + ELECTION)
    }
}

/// Sends a node's heartbeats, each by a connection of its own, and looks at every answer; how long those
/// took that fell in no election, and those that did.
async fn heart(
    at: SocketAddr,
    id: String,
    pairs: usize,
    every: Duration,
    seen: Arc<Watched>,
) -> (Figures, Figures) {
    let url = format!("http://{at}/Heartbeat");
    let (mut quiet, mut election) = (Figures::default(), Figures::default());
    // Not all at once.
    tokio::time::sleep(every.mul_f64(rand::random())).await;
    while !seen.is_over() {
        let began = Instant::now();
        match Http::fresh().post(&url, &json!({ "node_id": id }), LIMIT).await {
            // A connection that dies with its replica is no answer.
            Err(_) => drop(seen.cut.fetch_add(1, Ordering::Relaxed)),
            Ok(reply) => {
                let took = began.elapsed();
                let said: Value = reply.json().expect("a good answer");
                assert_eq!(reply.status, 200, "{said}");
                let ids = said["comm_group_to_id"].as_object().expect("a map");
                assert_eq!(said["is_online"], true, "{said}");
                let is_named = |id: &Value| id.as_str().is_some_and(|id| !id.is_empty());
                let named = ids.values().filter(|id| is_named(id)).count();
                for (key, _) in ids.iter().filter(|(_, id)| !is_named(id)) {
                    let hollow = seen.hollow.iter().any(|addr| key.ends_with(&format!("__{addr}")));
                    assert!(hollow, "a comm id that was set is not shown: {key} {said}");
                }
                if named < pairs || said["group_ready"] != true {
                    seen.partial.fetch_add(1, Ordering::Relaxed);
                }
                let during = seen.is_election(began) || seen.is_election(Instant::now());
                if during { election.add(took) } else { quiet.add(took) }
            }
        }
        tokio::time::sleep(every.saturating_sub(began.elapsed())).await;
    }
    (quiet, election)
}

/// Registers a node in an election, as an engine does that waits a second and never asks again.
async fn register_in_election(fleet: &Fleet, dead: usize, round: usize) -> String {
    let spare = fleet.others(&[dead])[round % 2];
    let late = registration(
        "decode",
        ([127, 0, 0, 9], 9).into(),
        &format!("127.0.0.4:{}", 1000 + round),
        round as u32,
        99,
    );
    let url = fleet.replicas[spare].http_url("/RegisterNode");
    let reply = Http::fresh().post(&url, &late, Duration::from_secs(1)).await.expect("an answer in time");
    assert_eq!(reply.status, 201, "{}", reply.text());
    reply.json::<Value>().expect("json")["node_id"].as_str().expect("an id").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_notice_nothing_while_replicas_die() {
    let groups = setting("GROUPS", 8) as usize;
    let every = Duration::from_millis(setting("BEAT_MS", 500));
    let kill_every = Duration::from_millis(setting("KILL_MS", 3000));
    let kills = setting("KILLS", 4) as usize;

    let timeout = format!("ksana.heartbeat_timeout_s={}", TIMEOUT.as_secs());
    let mut fleet = Fleet::of(3).set("ksana.enabled=true").set(&timeout).start().await;
    let at = fleet.balancer;
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for n in 0..groups {
        prefill.push(group(at, "prefill", 1000 + n, 1).await);
        decode.push(group(at, "decode", 2000 + n, 1).await);
    }
    // Half a group, and one whose pairs nobody names: no request may go to them.
    let half = group(at, "decode", 3000, 2).await;
    let unnamed = group(at, "decode", 3001, 1).await;
    let decodes: Vec<SocketAddr> = decode.iter().chain([&half]).map(|node| node.engine.address).collect();
    for node in &prefill {
        for decode in &decodes {
            name(at, &node.id, &format!("{}__{decode}", node.engine.address)).await;
        }
    }
    for node in prefill.iter().chain(&decode).chain([&half, &unnamed]) {
        beat(at, &node.id).await;
    }
    until_seen(&fleet, &[0, 1, 2], "all pairs are ready", |seen| {
        seen.pairs.iter().filter(|pair| pair.is_active).count() == groups * groups
    })
    .await;

    // From here on every answer must be a good one.
    let hollow = vec![half.engine.address, unnamed.engine.address];
    let seen = Arc::new(Watched { hollow, ..Watched::default() });
    let mut hearts = Vec::new();
    for node in prefill.iter().chain(&decode) {
        hearts.push(tokio::spawn(heart(at, node.id.clone(), groups, every, Arc::clone(&seen))));
    }
    for node in [&half, &unnamed] {
        hearts.push(tokio::spawn(idle_heart(at, node.id.clone(), every, Arc::clone(&seen))));
    }
    let asking = tokio::spawn(ask(at, Arc::clone(&seen)));
    for round in 0..kills {
        tokio::time::sleep(kill_every).await;
        // The leader, and then any other.
        let leader = fleet.leader().await;
        let dead = if round % 2 == 0 { leader } else { fleet.others(&[leader])[round / 2 % 2] };
        fleet.replicas[dead].kill9();
        seen.deaths.lock().expect("nobody panics with it").push(Instant::now());
        let late = register_in_election(&fleet, dead, round).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        fleet.replicas[dead].start();
        ready(&fleet.replicas[dead], Duration::from_secs(20)).await;
        for replica in &fleet.replicas {
            until(&format!("{} knows who registered in the election", replica.name), LIMIT, async || {
                let all = tables(replica).await?;
                for node in prefill.iter().chain(&decode) {
                    let online = all.nodes.iter().any(|row| row.node_id == node.id && row.is_online);
                    assert!(online, "{} has a node offline that is not: {all:?}", replica.name);
                }
                check(all.nodes.iter().any(|node| node.node_id == late), || format!("{all:?}"))
            })
            .await;
        }
    }
    tokio::time::sleep(kill_every).await;
    seen.stop.store(true, Ordering::Relaxed);
    let (mut quiet, mut election) = (Figures::default(), Figures::default());
    for heart in hearts {
        let (of_quiet, of_election) = heart.await.expect("every answer was good");
        quiet.merge(&of_quiet);
        election.merge(&of_election);
    }
    let (asked, good) = asking.await.expect("every answer was good");
    let all: Vec<u32> = decode.iter().flat_map(|node| node.engine.numbers()).collect();
    let unique: BTreeSet<u32> = all.iter().copied().collect();
    let (cut, partial) = (seen.cut.load(Ordering::Relaxed), seen.partial.load(Ordering::Relaxed));
    println!(
        "{groups} + {groups} nodes: {} heartbeats outside elections, p50 {} ms, p99 {} ms, max {} ms; {} in \
         elections, p99 {} ms, max {} ms; {cut} cut with their replica, {partial} answered in part; {good} of \
         {asked} requests, {} numbers",
        quiet.count(),
        quiet.percentile(50).as_millis(),
        quiet.percentile(99).as_millis(),
        quiet.max().as_millis(),
        election.count(),
        election.percentile(99).as_millis(),
        election.max().as_millis(),
        all.len(),
    );
    assert!(partial * 20 <= quiet.count() + election.count(), "nearly all are answered in full");
    assert_eq!(unique.len(), all.len(), "a number was used twice");
    for node in [&half, &unnamed] {
        assert!(node.engine.numbers().is_empty(), "a request to a pair that is not ready");
    }
    assert!(good * 10 > asked * 9, "{good} of {asked}");
    fleet.agree().await;
}

/// The heartbeats of a group that is in no pair that works.
async fn idle_heart(at: SocketAddr, id: String, every: Duration, seen: Arc<Watched>) -> (Figures, Figures) {
    while !seen.is_over() {
        let url = format!("http://{at}/Heartbeat");
        if let Ok(reply) = Http::fresh().post(&url, &json!({ "node_id": id }), LIMIT).await {
            assert_eq!(reply.status, 200, "{}", reply.text());
        }
        tokio::time::sleep(every).await;
    }
    Default::default()
}

/// Sends requests until it is over; how many, and how many were answered. One that breaks off with its
/// replica is neither.
async fn ask(at: SocketAddr, seen: Arc<Watched>) -> (usize, usize) {
    let url = format!("http://{at}/generate");
    let (mut asked, mut good) = (0, 0);
    while !seen.is_over() {
        asked += 1;
        if let Ok(reply) = Http::fresh().post(&url, &json!({"prompt": "x"}), LIMIT).await {
            assert_eq!(reply.status, 200, "{}", reply.text());
            good += 1;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (asked, good)
}
