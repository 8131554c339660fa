//! What several replicas must agree on when they choose: where a session is, what was reserved, and
//! what is on its way to an engine.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chaos_tests::client::{Http, Reply};
use chaos_tests::fleet::{Fleet, MODEL};
use chaos_tests::wait::{check, until};
use serde_json::{Value, json};

use super::bounds::was_silent;
use super::kv::{owners, settled};

const LIMIT: Duration = Duration::from_secs(30);

fn worker_of(reply: Result<Reply, String>) -> String {
    let reply = reply.expect("an answer");
    assert!(reply.status.is_success(), "{}", reply.text());
    reply.headers["everline-worker"].to_str().expect("a worker's name").to_owned()
}

/// Asks at a replica for a session, by a policy that the replicas are not configured with.
async fn ask(fleet: &Fleet, at: usize, session: usize) -> String {
    let session = format!("session {session}");
    let headers = [("x-session-id", session.as_str()), ("everline-policy", "consistent_hash")];
    let body = json!({"model": MODEL, "prompt": "hello", "max_tokens": 1});
    worker_of(Http::fresh().post_with(&fleet.replicas[at].http_url("/v1/completions"), &headers, &body).await)
}

async fn drain(fleet: &Fleet, engine: &str, drain: bool) {
    let url = fleet.replicas[1].admin_url(&format!("/v1/admin/workers/{engine}/drain"));
    let reply = Http::fresh().post(&url, &json!({"drain": drain}), LIMIT).await.expect("an answer");
    assert!(reply.status.is_success(), "{}", reply.text());
}

/// Whether all replicas see that an engine is drained, or is not.
async fn all_see(fleet: &Fleet, engine: &str, drained: bool) {
    for replica in &fleet.replicas {
        until("the drain everywhere", LIMIT, async || {
            let workers = replica.local_workers().await?;
            let worker = workers.iter().find(|w| w.id.as_str() == engine).ok_or("no such worker")?;
            check(worker.drain == drained, || format!("{} has {}", replica.name, worker.drain))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_stay_where_a_replica_that_was_killed_had_sent_them() {
    const SESSIONS: usize = 24;
    let fleet = Fleet::of(3).engines(3).engine_arg("--instant").set("proxy.policy=least_loaded");
    let mut fleet = fleet.start().await;
    // While one engine is away, its sessions are bound elsewhere: where no hash would find them.
    drain(&fleet, "e3", true).await;
    all_see(&fleet, "e3", true).await;
    let mut bound = BTreeMap::new();
    for session in 0..SESSIONS {
        bound.insert(session, ask(&fleet, 0, session).await);
    }
    assert!(bound.values().all(|worker| worker != "e3"), "{bound:?}");
    drain(&fleet, "e3", false).await;
    all_see(&fleet, "e3", false).await;
    settled(&fleet).await;

    fleet.replicas[0].kill9();
    for (session, worker) in &bound {
        for at in [1, 2] {
            assert_eq!(ask(&fleet, at, *session).await, *worker, "session {session} at replica {at}");
        }
    }
    // It is not that e3 is never chosen.
    let mut fresh = Vec::new();
    for session in SESSIONS..2 * SESSIONS {
        fresh.push(ask(&fleet, 1, session).await);
    }
    assert!(fresh.iter().any(|worker| worker == "e3"), "{fresh:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_that_reserve_at_once_do_not_choose_the_same_idle_engine() {
    const ROUNDS: usize = 10;
    let fleet = Fleet::of(3).engines(2).set("proxy.policy=least_loaded").start().await;
    // Some one and a half seconds of generating.
    let body = json!({"model": MODEL, "prompt": "hello", "max_tokens": 150});
    let mut met = 0;
    for round in 0..ROUNDS {
        for replica in &fleet.replicas {
            until("idle engines in every view", LIMIT, async || {
                let workers = replica.local_workers().await?;
                let requests: i64 = workers.iter().map(|w| w.requests).sum();
                check(requests == 0, || format!("{requests} requests"))
            })
            .await;
        }
        let one = async |at: usize| {
            let url = fleet.replicas[at].http_url("/v1/completions");
            let began = Instant::now();
            let reply = Http::fresh().post_with(&url, &[("everline-reserve", "linearizable")], &body).await;
            (worker_of(reply), began, Instant::now())
        };
        let (a, b) = tokio::join!(one(round % 3), one((round + 1) % 3));
        // A machine that stands still between the two shows nothing.
        if a.1 + Duration::from_millis(500) < a.2.min(b.2) && b.1 < a.2 && a.1 < b.2 {
            met += 1;
            assert_ne!(a.0, b.0, "round {round}: both were sent to the same engine");
        }
    }
    assert!(met >= ROUNDS / 2, "only {met} rounds overlapped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_is_coming_on_every_replica_until_its_first_token_and_then_no_more() {
    let fleet = Fleet::of(3).engines(2).kv_events().set("proxy.policy=kv_cost");
    let fleet = fleet.engine_arg("--max-running").engine_arg("1").start().await;
    let prompt: Vec<u32> = (1000..2600).collect();
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 1});
    let coming = async |at: usize| -> Result<u64, String> {
        let url = fleet.replicas[at].admin_url("/v1/admin/explain");
        let question = json!({"route": "/v1/completions", "body": body});
        let reply: Value = Http::fresh().post(&url, &question, LIMIT).await?.json()?;
        let all = reply["candidates"].as_array().ok_or("no candidates")?;
        Ok(all.iter().filter_map(|candidate| candidate["coming"].as_u64()).sum())
    };
    // So that it is known that they have events.
    let short = json!({"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 1});
    for engine in ["e1", "e2"] {
        let url = fleet.replicas[0].http_url("/v1/completions");
        until("the first answer", LIMIT, async || {
            let reply = Http::fresh().post_with(&url, &[("everline-worker", engine)], &short).await?;
            check(reply.status.is_success(), || reply.text())
        })
        .await;
    }
    for replica in &fleet.replicas {
        until("somebody listens to both", LIMIT, async || {
            let owners = owners(replica).await?;
            check(owners.values().flatten().count() == 2, || format!("{} has {owners:?}", replica.name))
        })
        .await;
    }
    settled(&fleet).await;

    // A minute in which the engine begins nothing else, of which a few seconds are looked at: several
    // turns of what is kept of the past.
    let url = fleet.replicas[0].http_url("/v1/completions");
    let pin = [("everline-worker", "e1")];
    let blocker = json!({"model": MODEL, "prompt": [8, 9], "max_tokens": 6000});
    let blocking = tokio::spawn({
        let url = url.clone();
        async move { Http::fresh().post_with(&url, &pin, &blocker).await }
    });
    until("the engine busy", LIMIT, async || {
        let worker = fleet.replicas[0].worker("e1").await?;
        check(worker.requests == 1, || format!("{} requests", worker.requests))
    })
    .await;
    let sending = async { (Http::fresh().post_with(&url, &pin, &body).await, Instant::now()) };
    let looking = async {
        for at in 0..3 {
            until("on its way, in every view", LIMIT, async || {
                let blocks = coming(at).await?;
                check(blocks == 100, || format!("{blocks} blocks"))
            })
            .await;
        }
        let mut seen = Vec::new();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(3500) {
            for at in 0..3 {
                seen.push(coming(at).await.expect("an explanation"));
            }
        }
        (seen, Instant::now())
    };
    // Were it answered before it was looked at, there would be nothing to wait for.
    let mut answered = std::pin::pin!(sending);
    let (seen, looked) = tokio::select! {
        seen = looking => seen,
        (reply, _) = &mut answered => panic!("answered too soon: {:?}", reply.map(|reply| reply.text())),
    };
    // Who asked for that is gone, so the engine begins what waits.
    blocking.abort();
    let (reply, ended) = answered.await;
    let reply = reply.expect("an answer");
    assert!(reply.status.is_success(), "{}", reply.text());
    assert!(looked < ended, "it was answered while it was looked at");
    // What a replica has on its way is forgotten with it, and one that was silent for a second may be dead.
    let kept = seen.iter().all(|blocks| *blocks == 100);
    assert!(kept || was_silent(&fleet), "forgotten before its first token: {seen:?}");
    for at in 0..3 {
        until("nothing on its way, in every view", LIMIT, async || {
            let blocks = coming(at).await?;
            check(blocks == 0, || format!("{blocks} blocks"))
        })
        .await;
    }
}
