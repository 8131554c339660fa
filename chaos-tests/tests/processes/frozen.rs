//! A leader that stands still and then goes on as if nothing had happened.

use std::time::Duration;

use chaos_tests::endpoint::{LIMIT, paper_worker};
use chaos_tests::fleet::Fleet;
use chaos_tests::load::{Answers, Load};
use chaos_tests::wait::{check, until};
use chaos_tests::writes::{Manner, Promises, Writers, longest_gap};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_leader_is_replaced_and_never_answers_from_the_past() {
    let seed = crate::seed();
    let mut fleet = Fleet::of(3).engines(4).start().await;
    let answers = Answers::of(&format!("http://{}", fleet.engines[0].address), 24).await;
    let mut promises = Promises::default();
    for freeze in 0..3 {
        let frozen = fleet.leader().await;
        let others = fleet.others(&[frozen]);
        let load = Load::start(&fleet.targets(&others), 3, &answers, seed + freeze, true);
        let manner = Manner { limit: Duration::from_secs(20), ..Manner::default() };
        let writers = Writers::start(&format!("f{freeze}"), &fleet.endpoints(&others), manner);
        tokio::time::sleep(Duration::from_millis(300)).await;
        fleet.replicas[frozen].sigstop();
        let stopped = std::time::Instant::now();
        let (leader, _) = until("another leader", Duration::from_secs(3), async || {
            let leader = fleet.leader_among(&others).await?;
            check(leader != frozen, || "still the frozen one".to_owned())?;
            Ok(leader)
        })
        .await;
        println!("another leader after {} ms", stopped.elapsed().as_millis());
        // Written while it slept; it must know, or say nothing, from its first moment on.
        let id = format!("while-asleep-{freeze}");
        let reply = fleet.replicas[leader].add_worker(&paper_worker(&id), LIMIT).await.expect("an answer");
        assert!(reply.status.is_success(), "{}", reply.text());
        // Asked already now, so that the answer comes before anything else that it hears.
        let asleep = (*fleet.replicas[frozen]).clone();
        let early: Vec<_> = (0..8)
            .map(|_| {
                let asleep = asleep.clone();
                tokio::spawn(async move { asleep.workers().await })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(3).saturating_sub(stopped.elapsed())).await;
        fleet.replicas[frozen].sigcont();
        let mut answered = 0;
        for read in early {
            // It may also say that it does not know, which is no lie.
            if let Ok(workers) = read.await.expect("a read does not panic") {
                assert!(workers.iter().any(|w| w.id.as_str() == id), "a stale linearizable read");
                answered += 1;
            }
        }
        println!("{answered} of 8 linearizable reads sent to the sleeper were answered, none stale");
        let (workers, took) = until("a linearizable read", LIMIT, async || asleep.workers().await).await;
        assert!(workers.iter().any(|w| w.id.as_str() == id), "a stale linearizable read");
        println!("the next one was answered {} ms after that", took.as_millis());
        fleet.leader().await;
        let (new, writes) = writers.stop().await;
        promises.extend(new);
        assert!(writes.iter().all(|w| w.result.is_ok()), "{:?}", writes.iter().find(|w| w.result.is_err()));
        println!("write gap {} ms", longest_gap(&writes).as_millis());
        load.stop().await.assert_all_good(8);
        promises.visible_at(&fleet.endpoints(&[0, 1, 2]), LIMIT).await;
        for at in 0..3 {
            promises.assert_readable(&fleet.replicas[at], LIMIT).await;
        }
        fleet.agree().await;
    }
}
