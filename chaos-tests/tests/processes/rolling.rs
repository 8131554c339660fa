//! A rolling restart.

use std::time::{Duration, Instant};

use chaos_tests::figures::Figures;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::load::{Answers, Load};
use chaos_tests::wait::{check, until};
use chaos_tests::writes::{Manner, Promises, Writers, longest_gap};

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_fails_no_request_and_no_write() {
    let seed = crate::seed();
    let mut fleet = Fleet::of(3).engines(4).start().await;
    let answers = Answers::of(&format!("http://{}", fleet.engines[0].address), 24).await;
    let all = fleet.endpoints(&[0, 1, 2]);
    let mut promises = Promises::default();
    let mut gaps = Figures::default();
    for restart in 0..3 {
        let others = fleet.others(&[restart]);
        // The leader too: it gets its turn, and hands over.
        if restart == 2 && fleet.leader().await != restart {
            let name = fleet.replicas[restart].name.clone();
            let server = fleet.replicas[0].admin_url("");
            chaos_tests::binary::run_ok(&["member", "transfer-leader", &name, "--server", &server]).await;
            until("the last one leads", LIMIT, async || {
                let leader = fleet.leader_among(&[0, 1, 2]).await?;
                check(leader == restart, || format!("{leader} leads"))
            })
            .await;
        }
        let was_leader = fleet.leader().await == restart;
        let load = Load::start(&fleet.targets(&others), 4, &answers, seed + restart as u64, true);
        // One of three is on its way out, and another one may wait for a leader for longer than it
        // lets a write wait.
        let manner = Manner { retries: 3, ..Manner::default() };
        let writers = Writers::start(&format!("s{restart}"), &all, manner);
        tokio::time::sleep(Duration::from_millis(400)).await;

        let asked = Instant::now();
        fleet.replicas[restart].sigterm();
        if was_leader {
            until("leadership handed over", LIMIT, async || {
                let leader = fleet.leader_among(&others).await?;
                check(leader != restart, || "it still leads".to_owned())
            })
            .await;
            println!("leadership handed over after {} ms", asked.elapsed().as_millis());
        }
        let status = fleet.replicas[restart].wait(LIMIT).expect("it ran");
        println!("stopped after {} ms ({status})", asked.elapsed().as_millis());
        assert!(status.success(), "{status}");
        fleet.replicas[restart].start();
        ready(&fleet.replicas[restart], LIMIT).await;
        let (new, writes) = writers.stop().await;
        promises.extend(new);
        let failed = writes.iter().find(|w| w.result.is_err());
        assert!(failed.is_none(), "{failed:?}");
        gaps.add(longest_gap(&writes));
        println!("write gap {} ms, was leader: {was_leader}", longest_gap(&writes).as_millis());
        load.stop().await.assert_all_good(8);
        promises.visible_at(&all, LIMIT).await;
    }
    fleet.agree().await;
    println!("rolling restart: {} acknowledged writes, write gaps {gaps}", promises.acknowledged());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_balancer_a_rolling_restart_fails_no_request_and_cuts_no_stream() {
    let seed = crate::seed();
    let builder = Fleet::of(3).engines(4).set("http.drain_settle_ms=1500");
    let mut fleet = builder.set("http.shutdown_grace_ms=10000").start().await;
    // Half a second for a stream: some run whenever a replica is told to stop.
    let answers = Answers::of(&format!("http://{}", fleet.engines[0].address), 64).await;
    let short = Answers::of(&format!("http://{}", fleet.engines[0].address), 2).await;
    let balancer = [format!("http://{}", fleet.balancer)];
    // Those that keep their connections, and those whose every request may go elsewhere.
    let kept = Load::start(&balancer, 4, &answers, seed, true);
    let fresh = Load::start(&balancer, 4, &short, seed + 100, false);
    tokio::time::sleep(Duration::from_millis(500)).await;
    for replica in 0..3 {
        let asked = Instant::now();
        fleet.replicas[replica].sigterm();
        let others: Vec<usize> = fleet.others(&[replica]);
        until("leadership elsewhere", LIMIT, async || {
            let leader = fleet.leader_among(&others).await?;
            check(leader != replica, || "it still leads".to_owned())
        })
        .await;
        let status = fleet.replicas[replica].wait(LIMIT).expect("it ran");
        assert!(status.success(), "{status}");
        println!("{} stopped after {} ms", fleet.replicas[replica].name, asked.elapsed().as_millis());
        fleet.replicas[replica].start();
        ready(&fleet.replicas[replica], LIMIT).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (kept, fresh) = (kept.stop().await, fresh.stop().await);
    println!("kept connections: {}; fresh ones: {}", kept.figures(), fresh.figures());
    // Each of the four clients in each of the three restarts.
    kept.assert_all_good(12);
    fresh.assert_all_good(48);
}
