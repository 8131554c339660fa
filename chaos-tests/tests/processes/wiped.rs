//! A replica whose disk is gone, and those who come to it before it is back.

use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::streams::{self, Question, read};
use chaos_tests::wait::{check, until};
use chaos_tests::writes::{Manner, Writers};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

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

/// Who asks at one address from the moment on at which somebody listens there until told to stop, an answer in
/// one piece and a stream in turn. How many were answered.
async fn asks(base: String, at: usize, mut stop: watch::Receiver<bool>) -> u32 {
    let mut answered = 0;
    while !*stop.borrow_and_update() {
        // As a balancer does that only sees whether somebody listens.
        if TcpStream::connect(base.trim_start_matches("http://")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        }
        let mut question = Question::whole(at, 20);
        if answered % 2 == 0 {
            question.body["stream"] = json!(false);
            let url = format!("{base}{}", question.path);
            let reply = Http::fresh().post(&url, &question.body, LIMIT).await.expect("an answer");
            assert_eq!(reply.status, 200, "{at}: {}", reply.text());
        } else {
            let heard = read(&base, &question, streams::Manner::Plain).await;
            heard.unwrap_or_else(|broken| panic!("{at}: {broken:?}"));
        }
        answered += 1;
    }
    answered
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_who_comes_to_a_replica_with_an_empty_folder_before_it_is_ready_is_refused() {
    let mut fleet = Fleet::of(3).engines(2).start().await;
    let gone = 2;
    fleet.replicas[gone].kill9();
    fleet.replicas[gone].wipe();
    let stop = watch::Sender::new(false);
    let mut clients = JoinSet::new();
    for at in 0..8 {
        clients.spawn(asks(fleet.replicas[gone].http_url(""), at, stop.subscribe()));
    }
    fleet.replicas[gone].start();
    ready(&fleet.replicas[gone], LIMIT).await;
    fleet.agree().await;
    stop.send_replace(true);
    let mut answered = 0;
    while let Some(client) = clients.join_next().await {
        answered += client.expect("nobody is refused");
    }
    assert!(answered >= 8, "{answered} answered");
}
