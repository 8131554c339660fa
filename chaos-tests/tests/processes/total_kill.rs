//! `kill -9` of everybody in the middle of writes, at random points, many times.

use std::time::Duration;

use chaos_tests::endpoint::Endpoint;
use chaos_tests::figures::Figures;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::writes::{Manner, Promises, Writers};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

/// Moments at which a whole cluster is killed: of three, and of one.
const ROUNDS: (usize, usize) = (85, 120);
const BACK: Duration = Duration::from_secs(20);

/// `EVERLINE_CHAOS_ROUNDS` rounds instead of the usual.
fn rounds(usual: usize) -> usize {
    std::env::var("EVERLINE_CHAOS_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// Small segments and checkpoints, so that kills fall into their changes too.
async fn small_logs(replicas: usize) -> Fleet {
    Fleet::of(replicas)
        .set("cluster.wal_segment_bytes=1048576")
        .set("cluster.checkpoint_log_bytes=65536")
        .set("cluster.checkpoint_interval_s=1")
        .set("cluster.digest_every=16")
        .set("log.filter=info,everline::access=warn,everline::cluster::hooks=debug")
        .start()
        .await
}

/// Writes, kills everybody, starts everybody and looks for what was promised; returns how long
/// a linearizable read took to answer after the start.
async fn round(fleet: &mut Fleet, n: usize, promises: &mut Promises, rng: &mut SmallRng) -> Duration {
    let all: Vec<usize> = (0..fleet.replicas.len()).collect();
    let endpoints: Vec<Endpoint> = fleet.endpoints(&all);
    let per_replica = 6 / all.len();
    // The same keys in every round: the registry stays small, and what was promised in earlier
    // rounds is still promised.
    let first = n as u64 * 1000;
    let manner =
        Manner { per_replica, pause: Duration::ZERO, limit: Duration::from_secs(2), retries: 0, first };
    let writers = Writers::start("w", &endpoints, manner);
    tokio::time::sleep(Duration::from_micros(rng.random_range(100_000..350_000))).await;
    fleet.replicas.iter_mut().for_each(|r| r.kill9_at_once());
    let (new, _) = writers.stop().await;
    fleet.replicas.iter_mut().for_each(|r| r.kill9());
    promises.extend(new);

    let started = std::time::Instant::now();
    fleet.replicas.iter_mut().for_each(|r| r.start());
    // The first linearizable read that is answered must have it all, whoever answers.
    let asked = &endpoints[rng.random_range(0..endpoints.len())];
    promises.assert_readable(asked, BACK).await;
    let took = started.elapsed();
    for endpoint in &endpoints {
        ready(endpoint, BACK).await;
    }
    took
}

async fn kill_everybody(replicas: usize, rounds: usize) {
    let seed = crate::seed();
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut fleet = small_logs(replicas).await;
    let (mut promises, mut back) = (Promises::default(), Figures::default());
    for n in 0..rounds {
        back.add(round(&mut fleet, n, &mut promises, &mut rng).await);
        if n % 10 == 9 {
            fleet.agree().await;
        }
    }
    let last: Vec<usize> = (0..replicas).collect();
    promises.visible_at(&fleet.endpoints(&last), BACK).await;
    fleet.agree().await;
    println!(
        "cluster of {replicas}: {rounds} kill points of all replicas, {} processes killed, {} acknowledged writes, 0 lost",
        rounds * replicas,
        promises.acknowledged()
    );
    println!("start of all to the first linearizable read: {back}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_when_all_three_are_killed_at_once() {
    kill_everybody(3, rounds(ROUNDS.0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_when_the_only_one_is_killed() {
    kill_everybody(1, rounds(ROUNDS.1)).await;
}
