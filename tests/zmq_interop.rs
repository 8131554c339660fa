//! Our sockets beside libzmq's: the other side is a Python process with pyzmq, in the part of an
//! engine and of a listener. Without pyzmq these tests say so and do nothing.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use everline::engines::sim::events::KvEventsConfig;
use everline::engines::sim::{EngineSimArgs, Simulator};
use everline::ingest::hub::{Claim, Hub};
use everline::ingest::{Delivery, FeedBatch, FeedConfig, FeedHandle, FeedSink, Source};
use everline::kv::event::Format;
use everline::kv::feed::Cursor;
use everline::kv::hash::Seed;
use everline::kv::types::{EngineHash, KvOp};
use everline::zmtp::{AnyAddress, Endpoint, Limits};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::watch;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

/// A Python process that obeys.
struct Peer {
    _child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    /// `None`, and a word about it, where pyzmq is not installed.
    async fn start(args: &[&str]) -> Option<(Self, Value)> {
        let has = Command::new("python3").args(["-c", "import zmq"]).stderr(Stdio::null()).status().await;
        if !has.is_ok_and(|status| status.success()) {
            println!("skipped: python3 with pyzmq is not installed");
            return None;
        }
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/zmq/peer.py");
        let mut command = Command::new("python3");
        command.arg(script).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut peer = Self { _child: child, input, output };
        let first = peer.read().await;
        Some((peer, first))
    }

    async fn read(&mut self) -> Value {
        let line = timeout(PATIENCE, self.output.next_line()).await.unwrap().unwrap().unwrap();
        serde_json::from_str(&line).unwrap()
    }

    async fn say(&mut self, line: &str) -> Value {
        self.input.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        self.read().await
    }
}

#[derive(Default)]
struct Kept {
    cursor: Cursor,
    blocks: BTreeSet<u64>,
    clears: u64,
}

#[derive(Clone)]
struct Sink(Arc<watch::Sender<Kept>>);

impl Default for Sink {
    fn default() -> Self {
        Self(Arc::new(watch::channel(Kept::default()).0))
    }
}

impl FeedSink for Sink {
    async fn deliver(&self, batch: FeedBatch) -> Delivery {
        self.0.send_modify(|kept| {
            assert_eq!(kept.cursor, batch.after);
            kept.cursor = batch.cursor;
            for op in batch.ops {
                match op {
                    KvOp::Store { blocks, .. } => kept.blocks.extend(blocks.iter().map(|(_, hash)| hash.0)),
                    KvOp::Clear => {
                        kept.blocks.clear();
                        kept.clears += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
        });
        Delivery::Applied
    }

    fn seed_of(&self, _: EngineHash) -> Option<Seed> {
        None
    }
}

impl Sink {
    async fn has(&self, blocks: u64, clears: u64) {
        let wanted = |kept: &Kept| kept.blocks == (0..blocks).collect() && kept.clears == clears;
        let mut changes = self.0.subscribe();
        let waited = timeout(PATIENCE, changes.wait_for(wanted)).await.map(|_| ());
        assert!(waited.is_ok(), "{:?}, {} clears", self.0.borrow().blocks, self.0.borrow().clears);
    }
}

fn config(source: Source, replay: &Value) -> FeedConfig {
    let replay = Endpoint::parse(replay.as_str().unwrap()).unwrap();
    let format = Format { block_size: 4, group: 0 };
    let mut config = FeedConfig::new(source, Some(replay), format, Arc::new(AnyAddress));
    config.topic = "kv".into();
    config.quiet = Duration::from_millis(200);
    config
}

/// Through loss, gaps and a restart with equal numbers.
async fn follow(peer: &mut Peer, source: Source, replay: &Value) {
    peer.say("send 5").await;
    let sink = Sink::default();
    let feed = FeedHandle::spawn(config(source, replay), Cursor::default(), sink.clone());
    sink.has(5, 0).await;
    peer.say("send 10").await;
    sink.has(15, 0).await;
    peer.say("lose 3").await;
    peer.say("send 1").await;
    sink.has(19, 0).await;
    // The last of a burst: no later number shows that it was lost.
    peer.say("lose 1").await;
    sink.has(20, 0).await;
    peer.say("restart").await;
    peer.say("send 20").await;
    sink.has(20, 1).await;
    let counters = feed.counters();
    assert_eq!((counters.garbage, counters.stats.losses, counters.stats.restarts), (0, 0, 1));
}

#[tokio::test]
async fn a_feed_follows_a_libzmq_publisher_through_loss_and_restart() {
    let Some((mut peer, at)) = Peer::start(&["publish"]).await else { return };
    let source = Source::Connect(Endpoint::parse(at[0].as_str().unwrap()).unwrap());
    follow(&mut peer, source, &at[1]).await;
}

#[tokio::test]
async fn a_libzmq_publisher_connects_to_our_listener() {
    let any = Endpoint::parse("tcp://127.0.0.1:0").unwrap();
    let hub = Hub::bind(&any, Limits::default(), Arc::new(|_| true)).await.unwrap();
    let Some((mut peer, at)) = Peer::start(&["connect", &hub.endpoint().to_string()]).await else { return };
    let source = Source::Hub(hub.claim(Claim { topic: "kv".into(), rank: Some(0) }).unwrap());
    follow(&mut peer, source, &at[1]).await;
}

#[tokio::test]
async fn libzmq_listens_to_the_simulated_engine_and_asks_it_for_replays() {
    let mut args = EngineSimArgs::defaults();
    let config = json!({"enable_kv_cache_events": true, "endpoint": "tcp://*:0",
        "replay_endpoint": "tcp://*:0", "topic": "kv"});
    args.kv_events_config = Some(KvEventsConfig::parse(&config.to_string()).unwrap());
    let sim = Simulator::start(args).await.unwrap();
    let publisher = sim.engine().kv_publisher().unwrap();
    let at = [publisher.endpoint().to_string(), publisher.replay_endpoint().unwrap().to_string()];
    let Some((mut peer, _)) = Peer::start(&["listen", &at[0], &at[1]]).await else { return };
    let subscribed = async {
        while publisher.stats().subscribers == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, subscribed).await.unwrap();
    assert_eq!(peer.say("disconnects").await, false, "pings were answered");
    for sequence in 0..3_u64 {
        let batch = everline::engines::sim::engine::KvEventBatch {
            sequence,
            timestamp: 1.0,
            events: vec![everline::engines::sim::kv::KvEvent::Cleared],
        };
        publisher.publish(&batch);
    }
    let payload = "93cb3ff00000000000009181a474797065b0416c6c426c6f636b73436c656172656400";
    let number = |sequence: u64| format!("{sequence:016x}");
    for sequence in 0..3 {
        assert_eq!(peer.say("live").await, json!(["6b76", number(sequence), payload]));
    }
    let answer = |sequence| json!(["", "6b76", number(sequence), payload]);
    let end = json!(["", "", number(u64::MAX), ""]);
    assert_eq!(peer.say("dealer").await, json!([answer(1), answer(2), end]));
    assert_eq!(peer.say("req").await, json!([["6b76", number(1), payload]]), "the empty part is REQ's own");
}
