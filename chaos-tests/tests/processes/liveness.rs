//! Workers that come, fall silent and come back; registrations during elections.

use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::endpoint::{LIMIT, paper_worker};
use chaos_tests::figures::Figures;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::wait::{check, until};
use serde_json::json;

/// `workers.timeout_ms` of these fleets.
const TIMEOUT: Duration = Duration::from_secs(2);
/// For two busy cores.
const SLACK: Duration = Duration::from_millis(1500);

async fn everywhere(fleet: &Fleet, id: &str, online: bool, limit: Duration) -> Duration {
    let started = Instant::now();
    for replica in &fleet.replicas {
        let what = format!("{id} online: {online} at {}", replica.name);
        until(&what, limit.saturating_sub(started.elapsed()), async || {
            let worker = replica.worker(id).await?;
            check(worker.online == online, || format!("{worker:?}"))
        })
        .await;
    }
    started.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_workers_go_offline_everywhere_and_come_back() {
    let mut fleet = Fleet::of(3).engines(2).set("workers.timeout_ms=2000").start().await;

    // One that heartbeats to all replicas in turn.
    let reply = fleet.replicas[0].add_node(&paper_worker("beats"), LIMIT).await.expect("an answer");
    let interval = reply.json::<serde_json::Value>().expect("a registration")["interval_ms"].as_u64();
    let interval = Duration::from_millis(interval.expect("an interval"));
    assert!(interval * 2 < TIMEOUT, "one heartbeat may be lost: {interval:?}");
    let urls: Vec<String> = fleet.replicas.iter().map(|r| r.http_url("/v1/nodes/beats/heartbeat")).collect();
    let beat = async |n: usize| {
        let reply = Http::fresh().post(&urls[n % 3], &json!({}), LIMIT).await.expect("an answer");
        assert!(reply.status.is_success(), "{}", reply.text());
    };
    let beats = Instant::now();
    for n in 0.. {
        beat(n).await;
        for replica in &fleet.replicas {
            let worker = replica.worker("beats").await;
            assert!(worker.as_ref().is_ok_and(|w| w.online) || n == 0, "{worker:?}");
        }
        if beats.elapsed() > TIMEOUT * 2 {
            break;
        }
        tokio::time::sleep(interval).await;
    }
    let silent = Instant::now();
    everywhere(&fleet, "beats", false, TIMEOUT + Duration::from_secs(1) + SLACK).await;
    let took = silent.elapsed();
    println!(
        "silent for {} ms: offline on all replicas (timeout {} ms)",
        took.as_millis(),
        TIMEOUT.as_millis()
    );
    // Counted from after the last heartbeat was answered, hence the little less.
    assert!(took > TIMEOUT - Duration::from_millis(100), "offline too early: {took:?}");
    beat(1).await;
    let took = everywhere(&fleet, "beats", true, Duration::from_secs(1) + SLACK).await;
    println!("one heartbeat: online on all replicas after {} ms", took.as_millis());

    // One that is probed.
    fleet.engines[0].kill9();
    let took = everywhere(&fleet, "e1", false, TIMEOUT + Duration::from_secs(1) + SLACK).await;
    println!("engine killed: offline on all replicas after {} ms", took.as_millis());
    fleet.engines[0].start();
    let took = everywhere(&fleet, "e1", true, TIMEOUT + Duration::from_secs(1) + SLACK).await;
    println!("engine started: online on all replicas after {} ms", took.as_millis());
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registration_during_an_election_is_held_not_refused() {
    let mut fleet = Fleet::of(3).start().await;
    let mut held = Figures::default();
    for kill in 0..10 {
        let leader = fleet.leader().await;
        let others = fleet.others(&[leader]);
        let survivor = (*fleet.replicas[others[kill % 2]]).clone();
        fleet.replicas[leader].kill9();
        let asked = Instant::now();
        let reply = survivor.add_node(&paper_worker(&format!("w{kill}")), LIMIT).await;
        let reply = reply.expect("an answer within the client's five seconds");
        assert!(reply.status.is_success(), "{}: {}", reply.status, reply.text());
        held.add(asked.elapsed());
        fleet.replicas[leader].start();
        ready(&fleet.replicas[leader], Duration::from_secs(20)).await;
    }
    println!("registration right after the leader's death: {held}");
}
