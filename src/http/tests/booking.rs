//! How requests are booked: through the log where they ask for it, and sessions where they are.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::support::*;
use crate::http::FrontConfig;
use crate::state::command::CacheCommand;
use crate::state::load::LoadSum;

#[tokio::test]
async fn a_linearizable_request_is_chosen_again_while_others_are_faster_and_booked_locally_in_the_end() {
    let front = start(FrontConfig::default());
    let (address, seen) = remembering().await;
    front.cluster.add("w", address);
    let reserving = |header: &str| {
        let body = r#"{"model":"m","messages":[{"role":"user","content":"hello"}]}"#;
        request("POST", "/v1/chat/completions", header, body)
    };
    let proposed = || {
        let told = std::mem::take(&mut *front.cluster.told.lock());
        told.iter().filter(|command| matches!(command, CacheCommand::Reserve { .. })).count()
    };
    for (header, late, times) in [
        ("everline-reserve: linearizable\r\n", 0, 1),
        ("everline-reserve: linearizable\r\n", 2, 3),
        ("everline-reserve: linearizable\r\n", 100, 16),
        ("everline-reserve: local\r\n", 0, 0),
        ("", 0, 0),
    ] {
        front.cluster.too_late.store(late, Ordering::Relaxed);
        let response = exchange(front.address, reserving(header)).await;
        assert_eq!((status(&response), proposed()), (200, times), "{header} {late}");
        let own = || front.cluster.worker("w").unwrap().live.own.get();
        eventually("freed", || own() == LoadSum::default()).await;
    }
    assert_eq!(seen.lock().len(), 5, "each was sent once");
    let metrics = front.front.metrics.encode(NoGauges).unwrap();
    for (outcome, count) in [("confirmed", 2), ("late", 18), ("local", 1)] {
        let line = format!("everline_reservations_total{{outcome=\"{outcome}\"}} {count}\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
}

#[tokio::test]
async fn with_no_word_from_the_cluster_a_linearizable_request_is_sent_all_the_same() {
    let mut config = FrontConfig::default();
    config.proxy.reserve = crate::routing::book::Reserve::Linearizable;
    let front = start(config);
    let (address, _) = remembering().await;
    front.cluster.add("w", address);
    front.cluster.undecided.store(true, Ordering::Relaxed);
    let began = Instant::now();
    assert_eq!(status(&exchange(front.address, chat()).await), 200);
    assert!(began.elapsed() >= Duration::from_secs(2), "it was not asked");
    let own = || front.cluster.worker("w").unwrap().live.own.get();
    eventually("freed", || own() == LoadSum::default()).await;
}

#[tokio::test]
async fn a_session_is_bound_once_and_a_named_worker_does_not_move_it() {
    let policy = crate::routing::policy::by_name("consistent_hash").unwrap();
    let front = start(FrontConfig { policy, ..FrontConfig::default() });
    let ask = async |header: &str| {
        let body = r#"{"model":"m","messages":[{"role":"user","content":"hello"}]}"#;
        let response = exchange(front.address, request("POST", "/v1/chat/completions", header, body)).await;
        assert_eq!(status(&response), 200, "{response}");
        super::support::header(&response, "everline-worker").unwrap().to_owned()
    };
    let bindings = || {
        let told = front.cluster.told.lock();
        told.iter().filter(|command| matches!(command, CacheCommand::Bind { .. })).count()
    };
    front.cluster.add("w0", remembering().await.0);
    assert_eq!(ask("x-session-id: s\r\n").await, "w0");
    for n in 1..8 {
        // One of these would draw more.
        front.cluster.add(&format!("w{n}"), remembering().await.0);
    }
    for _ in 0..3 {
        assert_eq!(ask("x-session-id: s\r\n").await, "w0");
    }
    assert_eq!(ask("x-session-id: s\r\neverline-worker: w3\r\n").await, "w3");
    assert_eq!(ask("x-conversation-id: s\r\n").await, "w0", "by any of its names");
    assert_eq!(bindings(), 1);
    front.cluster.change("w0", |record| record.drain = true);
    let moved = ask("x-session-id: s\r\n").await;
    front.cluster.change("w0", |record| record.drain = false);
    assert_ne!(moved, "w0");
    assert_eq!((ask("x-session-id: s\r\n").await, bindings()), (moved, 2), "it stays where it went");
}

#[derive(Debug)]
struct NoGauges;

impl prometheus_client::collector::Collector for NoGauges {
    fn encode(&self, _: prometheus_client::encoding::DescriptorEncoder<'_>) -> std::fmt::Result {
        Ok(())
    }
}
