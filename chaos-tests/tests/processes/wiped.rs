//! A replica whose disk is gone.

use std::time::{Duration, Instant};

use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::wait::{check, until};
use chaos_tests::writes::{Manner, Writers};

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_folder_is_deleted_rejoins_and_votes_again() {
    let mut fleet = Fleet::of(3).start().await;
    let writers = Writers::start("w", &fleet.endpoints(&[0, 1]), Manner::default());
    let (gone, leader) = (2, fleet.leader().await);
    println!("the wiped one {}", if leader == gone { "led" } else { "followed" });
    let old = fleet.replicas[gone].status().await.expect("a status").cluster.me;
    fleet.replicas[gone].kill9();
    fleet.replicas[gone].wipe();
    let started = Instant::now();
    fleet.replicas[gone].start();
    ready(&fleet.replicas[gone], LIMIT).await;
    for replica in &fleet.replicas {
        until("three voters, the old self not among them", LIMIT, async || {
            let members = replica.members().await?;
            let voters = members.iter().filter(|m| m.membership == "voter" && m.id != old).count();
            check(members.len() == 3 && voters == 3, || format!("{}: {members:?}", replica.name))
        })
        .await;
    }
    println!("start with an empty folder to three voters everywhere: {} ms", started.elapsed().as_millis());
    let (mut promises, _) = writers.stop().await;
    promises.visible_at(&fleet.endpoints(&[0, 1, 2]), LIMIT).await;

    // Its vote counts: without it the other one left would be no quorum.
    fleet.replicas[0].kill9();
    let writers = Writers::start("after", &fleet.endpoints(&[1, 2]), Manner::default());
    until("a leader of the two", LIMIT, async || fleet.leader_among(&[1, 2]).await).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (more, writes) = writers.stop().await;
    assert!(writes.iter().all(|w| w.result.is_ok()), "{:?}", writes.iter().find(|w| w.result.is_err()));
    promises.extend(more);
    fleet.replicas[0].start();
    ready(&fleet.replicas[0], LIMIT).await;
    promises.visible_at(&fleet.endpoints(&[0, 1, 2]), LIMIT).await;
    fleet.agree().await;
}
