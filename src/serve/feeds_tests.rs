//! Feeds of engines as they are registered: with nothing said of them, and as parts of larger ones.

use std::net::SocketAddr;

use serde_json::json;

use super::*;
use crate::engines::sim::events::{EventFormat, KvEventsConfig};
use crate::engines::sim::{EngineSimArgs, Simulator};
use crate::http::post_to_worker;
use crate::serve::testing::{Alone, Scripted, eventually};
use crate::state::worker::{EngineKind, WorkerSpec};

/// An engine that publishes events and keeps them.
async fn publishing(format: EventFormat, block_size: u32) -> Simulator {
    let mut args = EngineSimArgs::defaults();
    (args.instant, args.kv_events_format, args.block_size, args.blocks) = (true, format, block_size, 50);
    let config = json!({"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"});
    args.kv_events_config = Some(KvEventsConfig::parse(&config.to_string()).unwrap());
    Simulator::start(args).await.unwrap()
}

fn listen(alone: &Alone) {
    let allow = Arc::clone(&alone.front.config.allow);
    tokio::spawn(Feeds::new(alone.shard(), Arc::clone(&alone.plane), allow).run(alone.stop.clone()));
}

/// A registration that says nothing of the engine.
fn bare(address: SocketAddr, engine: EngineKind) -> WorkerSpec {
    WorkerSpec { block_size: None, capacity_blocks: None, ..Alone::spec("w", address, engine) }
}

fn tells(alone: &Alone, key: RankKey) -> bool {
    alone.plane.ranks().borrow().get(key).is_some_and(|rank| rank.knowledge == Knowledge::Events)
}

#[tokio::test]
async fn an_sglang_of_which_nothing_was_said_is_asked_and_its_blocks_are_known() {
    let sim = publishing(EventFormat::Sglang, 64).await;
    let alone = Alone::start().await;
    let worker = alone.put(bare(sim.address(), EngineKind::Sglang)).await;
    listen(&alone);
    let key = RankKey { worker: worker.record.ix, rank: 0 };
    eventually("the feed is ours", || tells(&alone, key)).await;
    let now = alone.plane.registry().worker(worker.id()).cloned().unwrap();
    assert_eq!((now.record.spec.block_size, now.record.spec.capacity_blocks), (Some(64), Some(50)));
    assert_eq!(now.record.generation, worker.record.generation, "it is the same registration");
    let prompt: Vec<u32> = (0..200).collect();
    let body = json!({"prompt": prompt, "max_tokens": 1}).to_string();
    let shard = alone.shard();
    post_to_worker(&shard, &now, "/v1/completions", body.into(), Duration::from_secs(20)).await.unwrap();
    eventually("its three blocks are known", || {
        let ranks = alone.plane.ranks();
        let rank = ranks.borrow().get(key).map(|rank| rank.ix);
        rank.is_some_and(|rank| alone.plane.blocks().index.load().rank(rank) == (3, false))
    })
    .await;
}

#[tokio::test]
async fn what_was_said_at_the_registration_stays_and_a_later_one_is_left_alone() {
    let (alone, engine) = (Alone::start().await, Scripted::start().await);
    let worker = alone.add("w", engine.address, EngineKind::Vllm).await;
    let learn = async |generation, blocks| {
        let id = worker.id().clone();
        let learned =
            ControlCommand::Learned { id, generation, block_size: Some(blocks), capacity_blocks: Some(9) };
        alone.plane.propose(learned).await.unwrap();
        let spec = alone.plane.registry().worker(worker.id()).unwrap().record.spec.clone();
        (spec.block_size, spec.capacity_blocks)
    };
    assert_eq!(learn(worker.record.generation, 64).await, (Some(16), Some(1000)));
    let again = alone.put(bare(engine.address, EngineKind::Vllm)).await;
    assert_eq!(learn(worker.record.generation, 64).await, (None, None));
    assert_eq!(learn(again.record.generation, 64).await, (Some(64), Some(9)));
    assert_eq!(learn(again.record.generation, 32).await, (Some(64), Some(9)));
}

#[tokio::test]
async fn the_only_rank_of_a_server_that_is_a_part_of_a_larger_one_is_listened_to() {
    let sim = publishing(EventFormat::VllmMap, 16).await;
    let (alone, front) = (Alone::start().await, Scripted::start().await);
    let endpoint = sim.engine().kv_publisher().unwrap().endpoint().to_string();
    front.says("/kv_event_sources", json!({"3": {"endpoint": endpoint}}).to_string());
    let worker = alone.add("w", front.address, EngineKind::Vllm).await;
    listen(&alone);
    let key = RankKey { worker: worker.record.ix, rank: 0 };
    eventually("the feed is ours", || tells(&alone, key)).await;
    let board = Arc::clone(&alone.front.feeds);
    eventually("and connected", || board.lock().iter().any(|(of, feed)| *of == key && feed.connected)).await;
}

#[tokio::test]
async fn a_rank_whose_capacity_nobody_says_is_taken_for_an_ordinary_one() {
    let (alone, engine) = (Alone::start().await, Scripted::start().await);
    let worker = alone.put(bare(engine.address, EngineKind::Vllm)).await;
    let named = sources::Named { endpoint: "tcp://127.0.0.1:1", replay: None, topic: None, first: None };
    let source = named.of(1).unwrap().ranks.remove(0);
    let plan = Plan::new(&source, &worker);
    assert_eq!(Cursor::cleared(false, Some(plan.capacity)).owing, ORDINARY_CAPACITY);
    let sized = alone.add("sized", engine.address, EngineKind::Vllm).await;
    assert_eq!(Plan::new(&source, &sized).capacity, 1000);
}

#[test]
fn feeds_are_spread_and_few_move_when_a_replica_goes() {
    let all = [1, 2, 3].map(ReplicaId);
    let keys: Vec<RankKey> = (0..300).map(|n| RankKey { worker: WorkerIx(n), rank: n % 2 }).collect();
    let owners: Vec<_> = keys.iter().map(|key| preferred(*key, &all)).collect();
    for id in all {
        let share = owners.iter().filter(|owner| **owner == Some(id)).count();
        assert!((60..140).contains(&share), "{id:?} has {share} of 300");
    }
    for (key, owner) in keys.iter().zip(&owners) {
        let after = preferred(*key, &all[..2]);
        assert!(*owner == Some(all[2]) || after == *owner, "a feed of a replica that stays has moved");
    }
    assert_eq!(preferred(keys[0], &[]), None);
}
