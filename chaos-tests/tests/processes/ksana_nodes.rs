//! A fleet of simulated KsanaLLM engines that register and hand their requests over by themselves, while
//! replicas die: what clients read is what one engine alone would say.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::endpoint::LIMIT;
use chaos_tests::fleet::{Fleet, ready};
use chaos_tests::wait::{check, until};
use everline::admin_types::ksana::KsanaReply;
use everline::engines::sim::pd::{Protocol, Role};
use everline::engines::sim::{EngineSimArgs, Simulator};
use serde_json::{Value, json};

/// Groups of each role.
const GROUPS: usize = 2;
/// Nodes of a group, and devices of a node.
const NODES: u32 = 2;
const DEVICES: u32 = 2;

fn node(role: Role, router: &str, rank: u32, first: Option<&Simulator>) -> EngineSimArgs {
    let mut args = EngineSimArgs::defaults();
    (args.models, args.instant) = (vec!["m".to_owned()], true);
    (args.pd.protocol, args.pd.role) = (Some(Protocol::Ksana), Some(role));
    let ksana = &mut args.pd.ksana;
    ksana.router_addr = Some(router.to_owned());
    ksana.heartbeat_interval_ms = 250;
    (ksana.node_rank, ksana.devices, ksana.world_size) = (rank, DEVICES, Some(NODES * DEVICES));
    ksana.inference_addr = first.map(|first| first.address().to_string());
    args
}

/// What an engine by itself says to a prompt.
async fn alone(prompt: &str) -> String {
    let mut args = EngineSimArgs::defaults();
    (args.models, args.instant) = (vec!["m".to_owned()], true);
    let sim = Simulator::start(args).await.expect("an engine");
    let body = json!({"prompt": prompt, "max_tokens": 30, "temperature": 0});
    let url = format!("http://{}/v1/completions", sim.address());
    let whole: Value = Http::fresh().post(&url, &body, LIMIT).await.expect("an answer").json().expect("JSON");
    whole["choices"][0]["text"].as_str().expect("a text").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn engines_that_register_by_themselves_answer_right_while_replicas_die() {
    let mut fleet = Fleet::of(3).set("ksana.enabled=true").set("ksana.heartbeat_timeout_s=10").start().await;
    let router = fleet.balancer.to_string();
    let mut engines = Vec::new();
    for role in [Role::Prefill, Role::Decode] {
        for _ in 0..GROUPS {
            let first = Simulator::start(node(role, &router, 0, None)).await.expect("an engine");
            let second = Simulator::start(node(role, &router, 1, Some(&first))).await.expect("an engine");
            engines.extend([first, second]);
        }
    }
    for replica in &fleet.replicas {
        until(&format!("{} knows all pairs to be ready", replica.name), LIMIT, async || {
            let all: KsanaReply =
                Http::fresh().get(&replica.admin_url("/v1/admin/ksana"), LIMIT).await?.json()?;
            let is_ready = |pair: &everline::admin_types::ksana::KsanaPair| {
                pair.is_active && pair.has_comm_id && pair.blocked_by.is_none()
            };
            let ready = all.pairs.iter().filter(|pair| is_ready(pair)).count();
            check(ready == GROUPS * GROUPS, || format!("{ready}: {all:?}"))
        })
        .await;
    }
    let active = || engines.iter().filter_map(|sim| sim.engine().desk()?.node().cloned());
    until("all groups are set up", LIMIT, async || {
        // First nodes have one with each group of the other role.
        let groups: usize = active().map(|node| node.active_groups()).sum();
        check(groups >= 2 * GROUPS * GROUPS, || format!("{groups}"))
    })
    .await;

    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for client in 0..3 {
        let (stop, url) = (Arc::clone(&stop), format!("http://{router}/generate"));
        let prompt =
            format!("what client {client} wants to know of prefill and decode, in many words ").repeat(4);
        let expected = alone(&prompt).await;
        let body = json!({"prompt": prompt, "sampling_config": {"max_new_tokens": 30, "temperature": 0}});
        clients.push(tokio::spawn(async move {
            let (mut asked, mut good) = (0_usize, 0_usize);
            while !stop.load(Ordering::Relaxed) {
                asked += 1;
                // A connection that dies with its replica is no answer.
                if let Ok(reply) = Http::fresh().post(&url, &body, LIMIT).await {
                    assert_eq!(reply.status, 200, "{}", reply.text());
                    let text = reply.text();
                    let last = text.split('\0').rfind(|frame| !matches!(*frame, "" | "[DONE]"));
                    let last: Value = serde_json::from_str(last.expect("a frame")).expect("JSON");
                    assert_eq!(last["texts"][0], expected.as_str());
                    good += 1;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            (asked, good)
        }));
    }
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let leader = fleet.leader().await;
        fleet.replicas[leader].kill9();
        tokio::time::sleep(Duration::from_secs(2)).await;
        fleet.replicas[leader].start();
        ready(&fleet.replicas[leader], Duration::from_secs(20)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        let (asked, good) = client.await.expect("every answer was right");
        println!("{good} of {asked} requests");
        assert!(good > 20 && good * 10 > asked * 9, "{good} of {asked}");
    }
    // Nobody minted a second id for a pair, and nothing is left over.
    for engine in &engines {
        let stats = &engine.engine().stats;
        until("no blocks in use", LIMIT, async || {
            check(stats.kv_usage_ppm.get() == 0 && stats.deferred.get() == 0, || "some are".into())
        })
        .await;
    }
    fleet.agree().await;
}
