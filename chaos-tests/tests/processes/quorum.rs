//! One of three left.

use std::time::{Duration, Instant};

use chaos_tests::endpoint::paper_worker;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::load::{Answers, Load};
use chaos_tests::wait::{check, until};
use chaos_tests::writes::{Manner, Writers};
use http::header::RETRY_AFTER;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_of_three_keeps_proxying_and_refuses_writes_until_quorum_is_back() {
    let seed = crate::seed();
    let mut fleet = Fleet::of(3).engines(4).start().await;
    let answers = Answers::of(&format!("http://{}", fleet.engines[0].address), 24).await;
    let writers = Writers::start("before", &fleet.endpoints(&[0, 1, 2]), Manner::default());
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (promises, _) = writers.stop().await;

    for last in [0, 2] {
        let dead = fleet.others(&[last]);
        dead.iter().for_each(|at| fleet.replicas[*at].kill9());
        // Not before: a stream that was held by one of the dead waits for a quorum to go on.
        let load = Load::start(&fleet.targets(&[last]), 4, &answers, seed, true);

        // Neither the first refusal nor those after it are early, late or of another kind.
        for attempt in 0..2 {
            let asked = Instant::now();
            let request = paper_worker(&format!("refused-{last}-{attempt}"));
            let reply = fleet.replicas[last].add_worker(&request, Duration::from_secs(6)).await;
            let reply = reply.expect("an answer");
            let took = asked.elapsed();
            assert_eq!(reply.status, 503, "{}", reply.text());
            assert!(reply.headers.contains_key(RETRY_AFTER), "{:?}", reply.headers);
            assert!(took < Duration::from_secs(4), "refused after {took:?}");
            println!("write without a quorum refused after {} ms", took.as_millis());
        }
        let ready_reply = fleet.replicas[last].ready().await.expect("an answer");
        assert_eq!(ready_reply.status, 200, "it still routes: {}", ready_reply.text());
        let status = fleet.replicas[last].status().await.expect("a status");
        assert!(!status.cluster.quorum, "it knows that it has no quorum");

        let report = load.stop().await;
        report.assert_all_good(50);
        println!("{} answers from the last of three, {}", report.0.len(), report.figures());

        // One more is enough.
        let back = Instant::now();
        fleet.replicas[dead[0]].start();
        let request = paper_worker(&format!("accepted-{last}"));
        until("writes with two of three", Duration::from_secs(15), async || {
            let reply = fleet.replicas[last].add_worker(&request, Duration::from_secs(5)).await?;
            check(reply.status.is_success(), || reply.text())
        })
        .await;
        println!("a second replica started to first write: {} ms", back.elapsed().as_millis());
        fleet.replicas[dead[1]].start();
        for at in &dead {
            ready(&fleet.replicas[*at], Duration::from_secs(15)).await;
        }
        promises.visible_at(&fleet.endpoints(&[0, 1, 2]), Duration::from_secs(10)).await;
        // Whatever became of the refused ones: all say the same.
        fleet.agree().await;
    }
}
