//! Edges, replicas and agents that show each other certificates, and strangers among them.

use std::time::Duration;

use chaos_tests::binary::run;
use chaos_tests::client::Http;
use chaos_tests::edges::Edge;
use chaos_tests::fleet::{Files, Fleet, MODEL, issue};
use chaos_tests::wait::{check, until};
use serde_json::json;

use crate::tiers;

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_certificates_everywhere_clients_of_edges_outlive_all_replicas_too() {
    tiers::clients_of_edges_outlive_all_replicas(tiers::builder().certificates().start().await).await;
}

/// Who holds a stream at this worker: `exact` is its agent, `continue` a replica in its place. It is
/// answered to its end in any case.
async fn resumable(fleet: &Fleet, worker: &str) -> String {
    let body = json!({"model": MODEL, "max_tokens": 10, "prompt": "x", "stream": true, "everline": {"worker": worker}});
    let url = format!("http://{}/v1/completions", fleet.balancer);
    let reply = Http::fresh().post(&url, &body, LIMIT).await.expect("an answer");
    assert!(reply.status == 200 && reply.text().contains("\n\ndata: [DONE]\n"), "{}", reply.text());
    reply.headers["everline-resumable"].to_str().expect("text").to_owned()
}

async fn said(what: &str, log: impl Fn() -> String) {
    until(&format!("{what:?} in a log"), LIMIT, async || {
        let log = log();
        check(log.contains(what), || log)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_of_another_authority_or_name_gets_no_stream_and_everybody_says_why() {
    let fleet = Fleet::of(2).engines(2).agents().certificates();
    let mut fleet = fleet.start().await;
    assert_eq!(resumable(&fleet, "e1").await, "exact");
    let strangers = fleet.folder().join("strangers");
    issue(&strangers, &["e1".to_owned(), "edge1".to_owned()]).await;
    let agent = fleet.engines[0].agent.as_mut().expect("engines have agents here");
    agent.kill9();
    agent.show(&Files::of(&strangers, "e1"), "e1");
    let before = agent.registrations();
    agent.start();
    until("the stranger has registered", LIMIT, async || {
        let now = fleet.engines[0].agent.as_ref().map_or(0, |agent| agent.registrations());
        check(now > before, || format!("{now} times"))
    })
    .await;
    assert_eq!(resumable(&fleet, "e1").await, "continue");
    let why = "the certificate is not of the cluster's authority";
    said(why, || fleet.logs()).await;
    said("peer refused", || fleet.logs()).await;
    let agent = fleet.engines[0].agent.as_ref().expect("as before");
    said("a connection to the peer listener was refused", || agent.log()).await;

    // Another engine's agent at an address that was this one's: it would answer for the wrong engine.
    let [first, second] = &mut fleet.engines[..] else { panic!("two engines") };
    let (one, other) = (first.agent.as_mut().expect("as before"), second.agent.as_mut().expect("as before"));
    one.kill9();
    other.kill9();
    other.listen_as(one);
    let before = other.registrations();
    other.start();
    until("the other agent has registered", LIMIT, async || {
        let now = fleet.engines[1].agent.as_ref().map_or(0, |agent| agent.registrations());
        check(now > before, || format!("{now} times"))
    })
    .await;
    assert_eq!(resumable(&fleet, "e1").await, "continue", "not at the agent of e2");
    said("the certificate is of e2, not of e1", || fleet.logs()).await;
    assert_eq!(resumable(&fleet, "e2").await, "exact", "which is the right one for its own engine");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_a_certificate_of_another_name_does_not_start_and_a_strange_edge_is_never_ready() {
    let fleet = Fleet::of(1).engines(1).agents().certificates().start().await;
    let files = Files::of(fleet.certificates(), "e1");
    let engine = format!("http://{}", fleet.engines[0].address);
    let replica = fleet.replicas[0].http.to_string();
    let mut args = vec!["agent", "--engine", &engine, "--replica", &replica, "--listen", "127.0.0.1:0"];
    let flags = files.flags("e9");
    args.extend(flags.iter().map(String::as_str));
    let output = run(&args).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && text.contains("is the certificate of e1, but this process is e9"),
        "{text}"
    );

    let settings = fleet.certificate_of("edge1");
    let mut args = vec!["edge", "--name", "edge9", "--replicas", "127.0.0.1:9"];
    args.extend(settings.iter().map(String::as_str));
    let output = run(&args).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("of edge1, but this process is edge9"), "{text}");

    let strangers = fleet.folder().join("strangers");
    issue(&strangers, &["edge1".to_owned()]).await;
    let edge = Edge::start(&fleet, "edge1", &Files::of(&strangers, "edge1").settings());
    said("the certificate is not of the cluster's authority", || edge.log()).await;
    let reply = until("the edge answers", LIMIT, async || {
        Http::fresh().get(&edge.url("/readyz?verbose"), LIMIT).await
    });
    let reply = reply.await.0;
    assert_eq!(reply.status, 503, "{}", reply.text());
    assert!(reply.text().contains("replica"), "{}", reply.text());
    // The right one, beside it.
    Edge::start(&fleet, "edge2", &fleet.certificate_of("edge2")).ready().await;
}
