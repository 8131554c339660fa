//! Engines to listen to, and a sink that keeps what it is given.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::engines::sim::events::KvEventsConfig;
use crate::engines::sim::{EngineSimArgs, Simulator};
use crate::ingest::{Delivery, FeedBatch, FeedConfig, FeedHandle, FeedSink, Source};
use crate::kv::event::Format;
use crate::kv::feed::Cursor;
use crate::kv::hash::{LocalHash, Seed, local_hashes};
use crate::kv::types::{EngineHash, KvOp};
use crate::zmtp::AnyAddress;

pub(super) const BLOCK: u32 = 4;
pub(super) const FORMAT: Format = Format { block_size: BLOCK, group: 0 };

/// Longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
pub(super) struct Kept {
    pub(super) cursor: Cursor,
    /// Parent, content and seed of each block, by the engine's name for it.
    pub(super) blocks: BTreeMap<EngineHash, (Option<EngineHash>, LocalHash, Seed)>,
    pub(super) clears: u64,
    pub(super) batches: u64,
}

impl Kept {
    fn apply(&mut self, batch: FeedBatch) -> Delivery {
        if batch.after != self.cursor {
            return Delivery::Moved(self.cursor);
        }
        for op in batch.ops {
            match op {
                KvOp::Store { parent, seed, blocks, .. } => {
                    let mut before = parent;
                    for (local, hash) in blocks {
                        self.blocks.insert(hash, (before, local, seed));
                        before = Some(hash);
                    }
                }
                KvOp::Copy { .. } => {}
                KvOp::Remove { blocks, .. } => blocks.iter().for_each(|hash| {
                    self.blocks.remove(hash);
                }),
                KvOp::Clear => {
                    self.blocks.clear();
                    self.clears += 1;
                }
            }
        }
        self.cursor = batch.cursor;
        self.batches += 1;
        Delivery::Applied
    }

    pub(super) fn hashes(&self) -> Vec<u64> {
        self.blocks.keys().map(|hash| hash.0).collect()
    }

    /// How many leading blocks of a prompt are there.
    pub(super) fn overlap(&self, prompt: &[u32], seed: Seed) -> usize {
        let mut at = None;
        let locals = local_hashes(prompt, BLOCK as usize, seed);
        locals
            .iter()
            .take_while(|local| {
                let next =
                    self.blocks.iter().find(|(_, (parent, found, _))| (parent, found) == (&at, *local));
                at = next.map(|(hash, _)| *hash);
                at.is_some()
            })
            .count()
    }
}

/// Applies what comes as the replicated state would: all or nothing, behind its cursor only.
#[derive(Clone)]
pub(super) struct Sink {
    pub(super) kept: Arc<Mutex<Kept>>,
    changed: Arc<watch::Sender<()>>,
}

impl Default for Sink {
    fn default() -> Self {
        Self { kept: Arc::default(), changed: Arc::new(watch::channel(()).0) }
    }
}

impl FeedSink for Sink {
    async fn deliver(&self, batch: FeedBatch) -> Delivery {
        // A commit takes its time; a feed may be dropped here.
        tokio::task::yield_now().await;
        let delivery = self.kept.lock().apply(batch);
        self.changed.send_replace(());
        delivery
    }

    fn seed_of(&self, block: EngineHash) -> Option<Seed> {
        self.kept.lock().blocks.get(&block).map(|(_, _, seed)| *seed)
    }
}

impl Sink {
    /// Waits until what is kept is as `wanted` says.
    pub(super) async fn until(&self, what: &str, wanted: impl Fn(&Kept) -> bool) {
        let mut changes = self.changed.subscribe();
        let waiting = async {
            while !wanted(&self.kept.lock()) {
                changes.changed().await.unwrap();
            }
        };
        let kept = || {
            let kept = self.kept.lock();
            (kept.cursor, kept.blocks.len(), kept.clears)
        };
        timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("{what}: {:?}", kept()));
    }

    /// Waits until it has what the engine has.
    pub(super) async fn equals(&self, sim: &Simulator, what: &str) {
        let truth = sim.engine().indexed_blocks().await;
        self.until(what, |kept| kept.hashes() == truth).await;
    }
}

/// Waits until `check` holds of something that tells nobody when it changes.
pub(super) async fn eventually<F: Future<Output = bool>>(what: &str, check: impl Fn() -> F) {
    let waiting = async {
        while !check().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("{what}"));
}

/// Flags of an engine that publishes, with small blocks and few of them.
pub(super) fn args(config: Value) -> EngineSimArgs {
    let mut args = EngineSimArgs::defaults();
    let mut all =
        json!({"enable_kv_cache_events": true, "endpoint": "tcp://*:0", "replay_endpoint": "tcp://*:0"});
    all.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    args.kv_events_config = Some(KvEventsConfig::parse(&all.to_string()).unwrap());
    args.block_size = BLOCK;
    args.blocks = 64;
    args.instant = true;
    args.loras = vec!["ad".into()];
    args
}

pub(super) async fn start(args: EngineSimArgs) -> Simulator {
    Simulator::start(args).await.unwrap()
}

/// A feed of the engine into the sink, from the sink's cursor.
pub(super) fn follow(sim: &Simulator, sink: &Sink) -> FeedHandle {
    let cursor = sink.kept.lock().cursor;
    FeedHandle::spawn(config(sim), cursor, sink.clone())
}

pub(super) fn config(sim: &Simulator) -> FeedConfig {
    let publisher = sim.engine().kv_publisher().unwrap();
    let source = Source::Connect(publisher.endpoint().clone());
    let mut config =
        FeedConfig::new(source, publisher.replay_endpoint().cloned(), FORMAT, Arc::new(AnyAddress));
    config.quiet = Duration::from_millis(100);
    config.silence = Duration::from_millis(300);
    config
}

async fn call(sim: &Simulator, head: &str, body: &str) -> Value {
    let mut stream = TcpStream::connect(sim.address()).await.unwrap();
    let request = format!(
        "{head} HTTP/1.1\r\nhost: sim\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    let (_, body) = reply.split_once("\r\n\r\n").unwrap();
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {reply}"))
}

pub(super) async fn get(sim: &Simulator, path: &str) -> Vec<u8> {
    call(sim, &format!("GET {path}"), "").await.to_string().into_bytes()
}

pub(super) async fn post(sim: &Simulator, path: &str, body: Value) -> Value {
    call(sim, &format!("POST {path}"), &body.to_string()).await
}

/// Runs a prompt and returns how many of its tokens the engine found in its cache.
pub(super) async fn run(sim: &Simulator, prompt: &[u32], salt: Option<&str>, lora: bool) -> usize {
    let model = if lora { "ad" } else { "sim-model" };
    let mut body = json!({"model": model, "prompt": prompt, "max_tokens": 6});
    if let Some(salt) = salt {
        body["cache_salt"] = salt.into();
    }
    let reply = post(sim, "/v1/completions", body).await;
    let cached = &reply["usage"]["prompt_tokens_details"]["cached_tokens"];
    cached.as_u64().unwrap_or_else(|| panic!("{reply}")) as usize
}

/// Makes the engine say what it has still to say: that takes a step.
pub(super) async fn flush(sim: &Simulator) {
    post(sim, "/v1/completions", json!({"model": "sim-model", "prompt": [5], "max_tokens": 1})).await;
}

/// A prompt of some family, of so many tokens.
pub(super) fn prompt(family: u32, length: u32) -> Vec<u32> {
    (0..length).map(|at| if at < 8 { 300 + at } else { 300 + (family * 31 + at) % 900 }).collect()
}
