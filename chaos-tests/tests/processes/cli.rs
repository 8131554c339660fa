//! The command line against a running cluster.

use std::time::Duration;

use chaos_tests::binary::{run, run_ok};
use chaos_tests::endpoint::LIMIT;
use chaos_tests::fleet::{Fleet, MODEL};
use chaos_tests::wait::{check, until};
use everline::admin_types::{MembersReply, WorkersReply};

const LONG: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_come_lead_and_go_by_command() {
    let fleet = Fleet::of(3).start().await;
    let server = fleet.replicas[1].admin_url("");
    let mut fourth = fleet.newcomer("r4");
    fourth.start();
    let list = async || {
        let text = run_ok(&["member", "list", "--json", "--server", &server]).await;
        let reply: MembersReply = serde_json::from_str(&text).map_err(|e| format!("{e} in {text}"))?;
        Ok::<_, String>(reply.members)
    };
    until("four voters", LONG, async || {
        let members = list().await?;
        check(members.iter().filter(|m| m.membership == "voter").count() == 4, || format!("{members:?}"))
    })
    .await;
    assert!(run_ok(&["member", "list", "--server", &server]).await.contains("r4"));

    let said = run_ok(&["member", "transfer-leader", "r4", "--server", &server]).await;
    assert!(said.contains("leads both groups"), "{said}");
    until("r4 leads", LONG, async || {
        let members = list().await?;
        let leads = |m: &everline::cluster::api::MemberStatus| {
            m.info.name == "r4" && m.leads_control && m.leads_cache
        };
        check(members.iter().any(leads), || format!("{members:?}"))
    })
    .await;

    // The leader itself is removed: it hands over first.
    let said = run_ok(&["member", "remove", "r4", "--server", &server]).await;
    assert!(said.contains("no longer a member"), "{said}");
    until("three members", LONG, async || {
        let members = list().await?;
        check(members.len() == 3, || format!("{members:?}"))
    })
    .await;
    fourth.kill9();
    let again = run(&["member", "remove", "r4", "--server", &server]).await;
    assert!(!again.status.success(), "a member that is gone cannot be removed");

    // A replica that waits without knowing anybody is told where to go.
    let mut fifth = fleet.waiting("r5");
    fifth.start();
    until("r5 answers", LONG, async || fifth.status().await).await;
    let said = run_ok(&["member", "add", &fifth.peer.to_string(), "--server", &server]).await;
    println!("member add: {}", said.trim());
    until("r5 votes", LONG, async || {
        let members = list().await?;
        let votes = |m: &everline::cluster::api::MemberStatus| m.info.name == "r5" && m.membership == "voter";
        check(members.iter().any(votes), || format!("{members:?}"))
    })
    .await;
    let gone = run(&["member", "list", "--server", "http://127.0.0.1:1"]).await;
    assert_eq!(gone.status.code(), Some(3), "nobody there has an exit code of its own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_come_drain_and_go_by_command() {
    let fleet = Fleet::of(3).engines(1).start().await;
    let server = fleet.replicas[2].admin_url("");
    let list = async |at: usize| {
        let server = fleet.replicas[at].admin_url("");
        let text = run_ok(&["worker", "list", "--json", "--server", &server]).await;
        serde_json::from_str::<WorkersReply>(&text)
            .map(|reply| reply.workers)
            .map_err(|e| format!("{e}: {text}"))
    };
    let url = format!("http://{}", fleet.engines[0].address);
    run_ok(&["worker", "add", &url, "--id", "gpu-7", "--weight", "50", "--server", &server]).await;
    for at in 0..3 {
        until("gpu-7 everywhere", LIMIT, async || {
            let workers = list(at).await?;
            let worker = workers.iter().find(|w| w.id.as_str() == "gpu-7").ok_or("not there")?;
            check(worker.models == [MODEL] && worker.weight == 50 && worker.online, || format!("{worker:?}"))
        })
        .await;
    }
    run_ok(&["worker", "drain", "gpu-7", "--server", &server]).await;
    until("gpu-7 drained at another", LIMIT, async || {
        let workers = list(0).await?;
        let drained = workers.iter().any(|w| w.id.as_str() == "gpu-7" && w.drain);
        check(drained, || format!("{workers:?}"))
    })
    .await;
    assert!(run_ok(&["worker", "show", "gpu-7", "--server", &server]).await.contains("draining"));
    run_ok(&["worker", "undrain", "gpu-7", "--server", &server]).await;
    run_ok(&["worker", "remove", "gpu-7", "--server", &server]).await;
    until("gpu-7 gone from another", LIMIT, async || {
        let workers = list(1).await?;
        check(workers.len() == 1, || format!("{workers:?}"))
    })
    .await;
    assert!(!run(&["worker", "remove", "gpu-7", "--server", &server]).await.status.success());
}
