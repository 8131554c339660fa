//! Which pair a request goes to: by what all replicas have sent where, not only the one that is asked.

use std::net::SocketAddr;
use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::endpoint::LIMIT;
use chaos_tests::fleet::{Fleet, ready};
use everline::admin_types::ksana::KsanaReply;
use serde_json::json;

use super::{Engine, beat, name, register, registration, tables, until_seen};

/// Pairs, of groups that are in one pair each.
const PAIRS: usize = 3;
const ALL: [usize; 3] = [0, 1, 2];

struct Pair {
    id: String,
    prefill: Engine,
    decode: Engine,
}

async fn pairs(fleet: &Fleet) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for n in 0..PAIRS {
        let (prefill, decode) = (Engine::start().await, Engine::start().await);
        let mut ids = Vec::new();
        for (role, of) in [("prefill", &prefill), ("decode", &decode)] {
            let coordinator = format!("127.0.0.3:{}", 1000 + 2 * n + ids.len());
            let id = register(fleet.balancer, &registration(role, of.address, &coordinator, 0, 1)).await;
            beat(fleet.balancer, &id).await;
            ids.push(id);
        }
        let id = ids.swap_remove(0);
        name(fleet.balancer, &id, &format!("{}__{}", prefill.address, decode.address)).await;
        pairs.push(Pair { id, prefill, decode });
    }
    until_seen(fleet, &ALL, "all pairs are ready", |seen| {
        seen.pairs.iter().filter(|pair| pair.is_active).count() == PAIRS
    })
    .await;
    pairs
}

/// Requests at groups of a role, as a replica sees them.
fn running(seen: &KsanaReply, role: &str) -> i64 {
    seen.groups.iter().filter(|group| group.role == role).map(|group| group.requests).sum()
}

fn cached(seen: &KsanaReply, address: SocketAddr) -> u64 {
    let mut groups = seen.groups.iter().filter(|group| group.inference_addr == address.to_string());
    groups.next().map_or(0, |group| group.cached_blocks)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_goes_where_no_replica_has_sent_one_and_the_load_of_a_dead_replica_is_freed() {
    let mut fleet = Fleet::of(3).set("ksana.enabled=true").start().await;
    let pairs = pairs(&fleet).await;
    // With what only the asked replica has sent, one round in five would look the same.
    for round in 1..=4 {
        pairs.iter().for_each(|pair| pair.decode.hold(true));
        let mut asked = Vec::new();
        for (n, replica) in fleet.replicas.iter().enumerate() {
            let url = replica.http_url("/generate");
            asked.push(tokio::spawn(async move {
                Http::fresh().post(&url, &json!({"prompt": "x"}), Duration::from_secs(30)).await
            }));
            until_seen(&fleet, &ALL, "what was sent is known", |seen| {
                running(seen, "decode") == n as i64 + 1 && running(seen, "prefill") == n as i64 + 1
            })
            .await;
        }
        let counts: Vec<usize> = pairs.iter().map(|pair| pair.decode.numbers().len()).collect();
        assert_eq!(counts, [round; PAIRS], "one each, whoever sent it");
        pairs.iter().for_each(|pair| pair.decode.hold(false));
        for asked in asked {
            let reply = asked.await.expect("it does not panic").expect("an answer");
            assert_eq!(reply.status, 200, "{}", reply.text());
        }
        until_seen(&fleet, &ALL, "all have ended", |seen| {
            running(seen, "decode") == 0 && running(seen, "prefill") == 0
        })
        .await;
    }

    // A replica dies with a request.
    pairs.iter().for_each(|pair| pair.decode.hold(true));
    let mut asked = Vec::new();
    for replica in &fleet.replicas[..2] {
        let url = replica.http_url("/generate");
        asked.push(tokio::spawn(
            async move { Http::fresh().post(&url, &json!({"prompt": "x"}), LIMIT).await },
        ));
    }
    until_seen(&fleet, &ALL, "both are known", |seen| running(seen, "decode") == 2).await;
    fleet.replicas[0].kill9();
    until_seen(&fleet, &[1, 2], "what it had is freed", |seen| {
        running(seen, "decode") == 1 && running(seen, "prefill") == 1
    })
    .await;
    pairs.iter().for_each(|pair| pair.decode.hold(false));
    until_seen(&fleet, &[1, 2], "the other one has ended", |seen| running(seen, "decode") == 0).await;
    fleet.replicas[0].start();
    ready(&fleet.replicas[0], Duration::from_secs(20)).await;
    fleet.agree().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_goes_to_the_pair_that_has_it_whichever_replica_is_asked() {
    let fleet = Fleet::of(3).set("ksana.enabled=true").start().await;
    let pairs = pairs(&fleet).await;
    let prompt = "Of what is said at the beginning each time, nothing has to be computed again. ".repeat(60);
    let ask = async |replica: usize, path: &str, body: serde_json::Value| {
        let url = fleet.replicas[replica].http_url(path);
        let reply = Http::fresh().post(&url, &body, LIMIT).await.expect("an answer");
        assert_eq!(reply.status, 200, "{}", reply.text());
    };
    ask(0, "/generate", json!({ "prompt": prompt })).await;
    let first = pairs.iter().find(|pair| !pair.prefill.numbers().is_empty()).expect("one of them got it");
    let at = first.prefill.address;
    until_seen(&fleet, &ALL, "who has it is known", |seen| cached(seen, at) > 0).await;
    for turn in 0..9 {
        let longer = format!("{prompt}And then, in turn {turn}:");
        ask(turn % 3, "/generate", json!({ "prompt": longer })).await;
        until_seen(&fleet, &ALL, "it has ended", |seen| running(seen, "prefill") == 0).await;
    }
    assert_eq!(first.prefill.numbers().len(), 10, "all of them went there");
    // What nobody has goes anywhere, and a conversation is known by its text as well.
    let chat = |more: &str| {
        json!({"messages": [{"role": "system", "content": prompt.replace("Of", "On")},
                            {"role": "user", "content": more}]})
    };
    let all_cached = |seen: &KsanaReply| seen.groups.iter().map(|group| group.cached_blocks).sum::<u64>();
    let mut known = 0;
    for replica in &fleet.replicas {
        known = known.max(all_cached(&tables(replica).await.expect("what it knows so far")));
    }
    let before: Vec<usize> = pairs.iter().map(|pair| pair.prefill.numbers().len()).collect();
    for turn in 0..6 {
        ask(turn % 3, "/v1/chat/completions", chat(&turn.to_string())).await;
        until_seen(&fleet, &ALL, "it is known", |seen| {
            running(seen, "prefill") == 0 && all_cached(seen) > known + 20
        })
        .await;
    }
    let more = pairs.iter().zip(before).map(|(pair, before)| pair.prefill.numbers().len() - before);
    let mut more: Vec<usize> = more.collect();
    more.sort_unstable();
    assert_eq!(more, [0, 0, 6]);

    // A prefill node that begins anew has nothing.
    let again = registration("prefill", at, "127.0.0.3:9999", 0, 1);
    let id = register(fleet.balancer, &again).await;
    assert_ne!(id, first.id);
    until_seen(&fleet, &ALL, "it has nothing", |seen| cached(seen, at) == 0).await;
    fleet.agree().await;
}
