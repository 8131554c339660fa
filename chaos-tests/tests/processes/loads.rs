//! What a killed replica had in flight must not weigh on its workers for ever.

use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::endpoint::Endpoint;
use chaos_tests::figures::Figures;
use chaos_tests::fleet::{Fleet, MODEL, ready};
use chaos_tests::wait::{check, until};
use serde_json::json;
use tokio::task::JoinSet;

const KILLS: usize = 10;
const STREAMS: i64 = 8;
const BOUND: Duration = Duration::from_secs(4);
const AIM: Duration = Duration::from_secs(2);

/// The replica's view holds so many requests; with none, nothing else is left either.
async fn sees(replica: &Endpoint, wanted: i64) -> Result<(), String> {
    let workers = replica.local_workers().await?;
    let requests: i64 = workers.iter().map(|w| w.requests).sum();
    let rest: i64 = workers.iter().map(|w| w.decode_blocks + w.prefill_tokens).sum();
    check(requests == wanted && (wanted > 0 || rest == 0), || {
        format!("{} sees {requests} requests, {rest} blocks and tokens", replica.name)
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_load_of_a_killed_replica_is_gone_from_every_view() {
    // Streams are held, and booked, where their clients are.
    let mut fleet = Fleet::of(3).engines(4).set("streams.durability=local").start().await;
    let (mut of_leader, mut of_follower) = (Figures::default(), Figures::default());
    for kill in 0..KILLS {
        let leader = fleet.leader().await;
        let is_leader = kill % 2 == 0;
        let victim = if is_leader { leader } else { (leader + 1) % 3 };
        let others = fleet.others(&[victim]);

        // Long streams that nobody else has a part in.
        let mut streams = JoinSet::new();
        for n in 0..STREAMS {
            let url = fleet.replicas[victim].http_url("/v1/completions");
            let body =
                json!({"model": MODEL, "prompt": format!("{kill} {n}"), "max_tokens": 5000, "stream": true});
            streams.spawn(async move { Http::fresh().post(&url, &body, Duration::from_secs(60)).await });
        }
        for at in 0..3 {
            until("the streams in every view", Duration::from_secs(10), async || {
                sees(&fleet.replicas[at], STREAMS).await
            })
            .await;
        }

        fleet.replicas[victim].kill9();
        let killed = Instant::now();
        for at in &others {
            until("the load gone", Duration::from_secs(20), async || sees(&fleet.replicas[*at], 0).await)
                .await;
        }
        let took = killed.elapsed();
        if is_leader {
            of_leader.add(took)
        } else {
            of_follower.add(took)
        }
        streams.shutdown().await;
        fleet.replicas[victim].start();
        ready(&fleet.replicas[victim], Duration::from_secs(20)).await;
        until("nothing in its view either", Duration::from_secs(20), async || {
            sees(&fleet.replicas[victim], 0).await
        })
        .await;
    }
    println!("load of a killed leader gone everywhere:   {of_leader}");
    println!("load of a killed follower gone everywhere: {of_follower}");
    let worst = of_leader.max().max(of_follower.max());
    println!("within {} ms: {}", AIM.as_millis(), if worst < AIM { "always" } else { "NOT always" });
    assert!(worst < BOUND, "{worst:?}");
}
