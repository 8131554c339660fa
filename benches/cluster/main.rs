//! What replication costs: three replicas in one process on one disk, real links and logs.
//!
//! `cargo bench --bench cluster` prints one line a figure; `-- NAME` runs only those whose name
//! contains NAME. Nothing here asserts a time.

mod events;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use everline::cluster::api::{ControlPlane, MemberOp};
use everline::cluster::inner::NodeConfig;
use everline::cluster::node::Cluster;
use everline::ids::{Group, WorkerId, WorkerIx};
use everline::state::command::{CacheCommand, ControlCommand};
use everline::state::load::LoadDelta;
use everline::state::ranks::RankKey;
use everline::state::worker::{WorkerSource, WorkerSpec};

struct Replicas {
    clusters: Vec<Cluster>,
    planes: Vec<Arc<dyn ControlPlane>>,
    runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

fn spec(id: &str) -> WorkerSpec {
    serde_json::from_value(serde_json::json!({"id": id, "url": "http://127.0.0.1:9", "source": "config"}))
        .map(|spec: WorkerSpec| WorkerSpec { source: WorkerSource::Config, ..spec })
        .unwrap()
}

impl Replicas {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ports: Vec<TcpListener> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let peers: BTreeMap<String, String> = ports
            .iter()
            .enumerate()
            .map(|(i, port)| (format!("r{}", i + 1), port.local_addr().unwrap().to_string()))
            .collect();
        let clusters: Vec<Cluster> = peers
            .iter()
            .zip(ports)
            .map(|((name, peer), port)| {
                let mut config = NodeConfig::new(name, dir.path().join(name));
                config.info.peer = peer.clone();
                config.peers = peers.clone();
                Cluster::start(config, port).unwrap()
            })
            .collect();
        let planes: Vec<_> = clusters.iter().map(Cluster::control_plane).collect();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            for n in 0..8 {
                let command =
                    ControlCommand::RegisterWorker { spec: spec(&format!("w{n}")), heartbeats: false };
                planes[0].propose(command).await.unwrap();
            }
            for plane in &planes {
                plane.read_barrier(Group::Control).await.unwrap();
                plane.read_barrier(Group::Cache).await.unwrap();
            }
        });
        Self { clusters, planes, runtime, _dir: dir }
    }

    fn leader(&self, group: Group) -> usize {
        loop {
            let leads = |p: &Arc<dyn ControlPlane>| p.status().groups[group.index()].role == "leader";
            if let Some(leader) = self.planes.iter().position(leads) {
                return leader;
            }
        }
    }
}

/// User and system time of this process, seconds.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}

fn quantiles(name: &str, what: &str, mut samples: Vec<Duration>) {
    samples.sort();
    let at = |q: f64| samples[((samples.len() - 1) as f64 * q) as usize].as_secs_f64() * 1e3;
    println!(
        "{name}: {what}: n {} p50 {:.2} ms p90 {:.2} ms p99 {:.2} ms max {:.2} ms",
        samples.len(),
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0)
    );
}

/// Offers `rate` mutations a second in 5 ms batches, spread over `at`, for `seconds`.
fn propose(r: &Replicas, name: &str, rate: usize, at: &[usize], seconds: u64) {
    let per_batch = rate / 200 / at.len();
    let batch = |sign: i32| {
        let deltas = (0..per_batch)
            .map(|n| {
                let delta = LoadDelta {
                    requests: sign,
                    prefill_tokens: i64::from(sign) * 700,
                    decode_blocks: 44 * i64::from(sign),
                };
                (RankKey { worker: WorkerIx(1 + (n % 64) as u32), rank: 0 }, delta)
            })
            .collect();
        CacheCommand::Loads(deltas)
    };
    let batches = [batch(1), batch(-1)];
    let (used, began) = (cpu(), Instant::now());
    let mut refused = 0;
    let samples = r.runtime.block_on(async {
        let mut answers = tokio::task::JoinSet::new();
        let mut period = tokio::time::interval(Duration::from_millis(5));
        period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
        for n in 0..seconds * 200 {
            period.tick().await;
            for replica in at {
                let asked = Instant::now();
                match r.clusters[*replica].cache_proposer().submit(&batches[(n % 2) as usize..][..1]) {
                    Ok(answer) => {
                        answers.spawn(async move { answer.await.map(|_| asked.elapsed()) });
                    }
                    Err(_) => refused += 1,
                }
            }
        }
        let mut samples = Vec::new();
        while let Some(sample) = answers.join_next().await {
            samples.push(sample.unwrap().unwrap());
        }
        samples
    });
    let cores = (cpu() - used) / began.elapsed().as_secs_f64();
    let what =
        format!("{rate} mutations/s, 5 ms batches, {cores:.2} core for all three, {refused} refused, commit");
    quantiles(name, &what, samples);
}

fn bookings(r: &Replicas) {
    let view = r.planes[0].registry();
    let worker = |id: &str| view.worker(&WorkerId::parse(id).unwrap()).unwrap().clone();
    let (busy, probe) = (worker("w1"), worker("w2"));
    let seen: Vec<_> = [1, 2]
        .iter()
        .map(|i| r.planes[*i].registry().worker(&WorkerId::parse("w2").unwrap()).unwrap().live.clone())
        .collect();
    let samples = r.runtime.block_on(async {
        let (plane, worker) = (r.planes[0].clone(), busy.clone());
        let noise = tokio::spawn(async move {
            // 10 bookings a millisecond, each held for one.
            let mut period = tokio::time::interval(Duration::from_millis(1));
            loop {
                period.tick().await;
                let held: Vec<_> = (0..10).map(|_| plane.bookings().book(worker.clone(), 1000, 60)).collect();
                tokio::task::yield_now().await;
                drop(held);
            }
        });
        let mut samples = Vec::new();
        for _ in 0..1000 {
            tokio::time::sleep(Duration::from_millis(3)).await;
            let booked = Instant::now();
            let booking = r.planes[0].bookings().book(probe.clone(), 1, 1);
            while !seen.iter().all(|live| live.load().requests == 1) {
                tokio::time::sleep(Duration::from_micros(50)).await;
            }
            samples.push(booked.elapsed());
            drop(booking);
            while seen.iter().any(|live| live.load().requests != 0) {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        }
        noise.abort();
        samples
    });
    quantiles("bookings", "10k bookings/s at one replica, visible on both others (timer 1 ms)", samples);
}

fn reads(r: &Replicas) {
    let leader = r.leader(Group::Control);
    for (who, at) in [("at the leader", leader), ("at a follower", (leader + 1) % 3)] {
        let samples = r.runtime.block_on(async {
            let mut samples = Vec::new();
            for _ in 0..2000 {
                let asked = Instant::now();
                r.planes[at].read_barrier(Group::Control).await.unwrap();
                samples.push(asked.elapsed());
            }
            samples
        });
        quantiles("reads", &format!("linearizable read {who}"), samples);
    }
}

fn writes(r: &Replicas) {
    let leader = r.leader(Group::Control);
    for (who, at) in [("at the leader", leader), ("at a follower", (leader + 1) % 3)] {
        let samples = r.runtime.block_on(async {
            let mut samples = Vec::new();
            for _ in 0..500 {
                let asked = Instant::now();
                r.planes[at].propose(ControlCommand::Noop).await.unwrap();
                samples.push(asked.elapsed());
            }
            samples
        });
        quantiles("writes", &format!("one registry write {who}"), samples);
    }
}

fn transfers(r: &Replicas) {
    let samples = r.runtime.block_on(async {
        let mut samples = Vec::new();
        for _ in 0..20 {
            let leader = r.leader(Group::Control);
            let to = format!("r{}", (leader + 1) % 3 + 1);
            let asked = Instant::now();
            r.planes[leader].member(MemberOp::TransferLeader { member: Some(to) }).await.unwrap();
            samples.push(asked.elapsed());
            for plane in &r.planes {
                plane.read_barrier(Group::Control).await.unwrap();
            }
        }
        samples
    });
    quantiles("transfers", "leadership of both groups moved", samples);
}

fn idle(_r: &Replicas) {
    std::thread::sleep(Duration::from_secs(2));
    let (used, began) = (cpu(), Instant::now());
    std::thread::sleep(Duration::from_secs(10));
    let share = (cpu() - used) / began.elapsed().as_secs_f64() / 3.0;
    println!("idle: {:.2} % of a core a replica", share * 100.0);
}

fn main() {
    let only: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| name.contains(o.as_str()));
    let r = Replicas::start();
    let leader = r.leader(Group::Cache);
    if wanted("idle") {
        idle(&r);
    }
    if wanted("writes") {
        writes(&r);
    }
    if wanted("reads") {
        reads(&r);
    }
    if wanted("bookings") {
        bookings(&r);
    }
    for rate in [10_000, 100_000, 500_000, 1_000_000] {
        if wanted("proposer") {
            propose(&r, "proposer at the leader", rate, &[leader], 5);
        }
    }
    if wanted("proposer") {
        propose(&r, "proposer at all three", 1_000_000 / 3 * 3, &[0, 1, 2], 5);
    }
    if wanted("events") {
        events::run(&r, leader);
    }
    if wanted("transfers") {
        transfers(&r);
    }
}
