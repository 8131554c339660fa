//! `kill -9` of the leader, again and again.

use std::time::{Duration, Instant};

use chaos_tests::endpoint::{LIMIT, paper_worker};
use chaos_tests::figures::Figures;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::load::{Answers, Load};
use chaos_tests::wait::until;
use chaos_tests::writes::{Manner, Promises, Writers, longest_gap};

const KILLS: usize = 6;

/// Writes may stand still this long; a generous bound, the figures are printed.
const GAP: Duration = Duration::from_secs(5);

/// A killed replica is back, with everything, within this.
const BACK: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_its_own_clients_notices_that_the_leader_is_killed() {
    let seed = crate::seed();
    let mut fleet = Fleet::of(3).engines(4).start().await;
    let answers = Answers::of(&format!("http://{}", fleet.engines[0].address), 24).await;
    let (mut gaps, mut ready_after, mut complete_after) =
        (Figures::default(), Figures::default(), Figures::default());
    let mut promises = Promises::default();
    let (mut asked, mut through_balancer, mut cut) = (0, 0, 0);
    for kill in 0..KILLS {
        let leader = fleet.leader().await;
        let others = fleet.others(&[leader]);
        let survivors = fleet.endpoints(&others);

        // Registered through whoever will be killed or another, just before.
        let registrar = &fleet.replicas[kill % 3];
        let id = format!("registered-{kill}");
        let reply = registrar.add_node(&paper_worker(&id), LIMIT).await;
        assert!(reply.as_ref().is_ok_and(|r| r.status.is_success()), "{reply:?}");

        let direct = Load::start(&fleet.targets(&others), 3, &answers, seed + kill as u64, true);
        let balanced =
            Load::start(&[format!("http://{}", fleet.balancer)], 3, &answers, seed ^ kill as u64, false);
        let manner = Manner { per_replica: 2, limit: Duration::from_secs(20), ..Manner::default() };
        let writers = Writers::start(&format!("k{kill}"), &survivors, manner);
        tokio::time::sleep(Duration::from_millis(300)).await;

        let killed = Instant::now();
        fleet.replicas[leader].kill9();
        let dead = Instant::now();
        until("another leader", GAP, async || fleet.leader_among(&others).await).await;
        for survivor in &survivors {
            until("what was registered before", GAP, async || survivor.worker(&id).await).await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;

        let restarted = Instant::now();
        fleet.replicas[leader].start();
        ready_after.add(ready(&fleet.replicas[leader], BACK).await);
        let (new, writes) = writers.stop().await;
        promises.extend(new);
        let all = fleet.endpoints(&[0, 1, 2]);
        promises.visible_at(&all, BACK.saturating_sub(restarted.elapsed())).await;
        complete_after.add(restarted.elapsed());

        let failed: Vec<_> = writes.iter().filter(|w| w.result.is_err()).collect();
        assert!(failed.is_empty(), "{} writes failed, {:?}", failed.len(), failed.first());
        let after = writes.iter().filter(|w| w.sent > killed).count();
        assert!(after > 0, "nothing was written after the kill");
        gaps.add(longest_gap(&writes));

        let report = direct.stop().await;
        report.assert_all_good(8);
        asked += report.0.len();
        let report = balanced.stop().await;
        // One connection a request: only what was running at the moment may be cut.
        let running = |o: &&chaos_tests::load::Outcome| {
            o.sent <= dead + Duration::from_millis(50) && o.sent + o.took >= killed
        };
        let unlucky = report.failures().iter().filter(|o| running(o)).count();
        assert_eq!(unlucky, report.failures().len(), "{:#?}", report.failures());
        assert!(report.wrong().is_empty(), "{:#?}", report.wrong());
        assert!(unlucky <= 3, "more were cut than there are clients");
        cut += unlucky;
        through_balancer += report.0.len();
    }
    fleet.agree().await;
    println!("{KILLS} kills of the leader, {} acknowledged writes", promises.acknowledged());
    println!("requests to the others: {asked}, failed 0");
    println!("requests through the balancer: {through_balancer}, cut {cut}");
    println!("write gap:                  {gaps}");
    println!("restart to ready:           {ready_after}");
    println!("restart to all writes seen: {complete_after}");
    assert!(gaps.max() < GAP);
    assert!(complete_after.max() < BACK);
}
