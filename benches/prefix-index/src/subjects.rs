//! What is measured: the index and its peers behind one interface.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use dynamo_kv_router::indexer::concurrent_radix_tree_compressed::ConcurrentRadixTreeCompressed;
use dynamo_kv_router::indexer::positional::PositionalIndexer;
use dynamo_kv_router::indexer::{KvIndexerInterface, RadixTree, SyncIndexer, ThreadPoolIndexer};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData, KvCacheStoredBlockData,
    LocalBlockHash, RouterEvent,
};

use crate::kv::hash::{LocalHash, Seed};
use crate::kv::index::{Index, Options};
use crate::kv::types::{EngineHash, KvOp, Overlap, RankIx, Tier};
use crate::kv::wire;
use crate::workload::{Event, Workload};

/// Asks how many workers hold the first block. Made for one kind of query.
pub type Query<'a> = Box<dyn FnMut(usize) -> usize + 'a>;

/// The same, for another thread.
pub type Elsewhere = Box<dyn FnMut(usize) -> usize + Send>;

pub trait Subject {
    fn name(&self) -> &'static str;
    /// Builds the events in the subject's own terms; not measured.
    fn prepare(&mut self, load: &Workload);
    /// Applies all that was prepared, and is done when it is visible. Events are dropped on the way.
    fn apply_all(&mut self);
    /// Applies the first half; [`Self::apply_all`] applies the rest.
    fn apply_half(&mut self);
    fn asker(&self, queries: &[Vec<u64>]) -> Query<'static>;
    /// The same for another thread, if it can be asked from there.
    fn reader(&self, _: &[Vec<u64>]) -> Option<Elsewhere> {
        None
    }
    /// Live bytes of what was prepared: freed when it is applied.
    fn prepared(&self) -> i64;
}

/// Live bytes now, where they are counted.
fn live() -> i64 {
    #[cfg(feature = "mem")]
    return crate::live::LIVE.load(Relaxed);
    #[cfg(not(feature = "mem"))]
    0
}

/// Keeps how much was prepared.
#[derive(Default)]
struct Prepared(AtomicI64);

impl Prepared {
    fn note<T>(&self, prepare: impl FnOnce() -> T) -> T {
        let before = live();
        let result = prepare();
        self.0.store(live() - before, Relaxed);
        result
    }
}

fn half<T>(all: &mut Vec<T>) -> Vec<T> {
    let rest = all.split_off(all.len() / 2);
    std::mem::replace(all, rest)
}

// ---- ours ----

pub struct Everline {
    index: Arc<Index>,
    encoded: bool,
    ops: Vec<(RankIx, KvOp)>,
    bytes: Vec<(RankIx, Vec<u8>)>,
    prepared: Prepared,
}

impl Everline {
    pub fn new(encoded: bool) -> Self {
        let index = Arc::new(Index::new(Options { bytes: 2 << 30 }));
        Self { index, encoded, ops: Vec::new(), bytes: Vec::new(), prepared: Prepared::default() }
    }

    #[cfg(feature = "mem")]
    pub fn counted(&self) -> u64 {
        self.index.counters().bytes
    }

    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    fn apply(&self, ops: Vec<(RankIx, KvOp)>, bytes: Vec<(RankIx, Vec<u8>)>) {
        for (rank, op) in ops {
            self.index.apply(rank, &[op]);
        }
        for (rank, bytes) in bytes {
            self.index.apply_encoded(rank, &bytes).expect("what was encoded");
        }
    }
}

fn op(event: &Event) -> KvOp {
    let blocks = event.locals.iter().zip(&event.names);
    KvOp::Store {
        parent: event.parent.map(EngineHash),
        tier: Tier::Gpu,
        seed: Seed::default(),
        blocks: blocks.map(|(local, name)| (LocalHash(*local), EngineHash(*name))).collect(),
    }
}

/// An event as the log carries it.
pub fn encoded(event: &Event) -> (RankIx, Vec<u8>) {
    (RankIx(event.worker as u32), wire::encode(&[op(event)]))
}

impl Subject for Everline {
    fn name(&self) -> &'static str {
        if self.encoded { "everline (encoded)" } else { "everline" }
    }

    fn prepare(&mut self, load: &Workload) {
        let rank = |event: &Event| RankIx(event.worker as u32);
        let (ops, bytes) = self.prepared.note(|| {
            if self.encoded {
                (vec![], load.events.iter().map(encoded).collect())
            } else {
                (load.events.iter().map(|e| (rank(e), op(e))).collect(), vec![])
            }
        });
        (self.ops, self.bytes) = (ops, bytes);
    }

    fn apply_all(&mut self) {
        let (ops, bytes) = (std::mem::take(&mut self.ops), std::mem::take(&mut self.bytes));
        self.apply(ops, bytes);
    }

    fn apply_half(&mut self) {
        let (ops, bytes) = (half(&mut self.ops), half(&mut self.bytes));
        self.apply(ops, bytes);
    }

    fn asker(&self, queries: &[Vec<u64>]) -> Query<'static> {
        self.reader(queries).expect("readers anywhere")
    }

    fn reader(&self, queries: &[Vec<u64>]) -> Option<Elsewhere> {
        let index = Arc::clone(&self.index);
        let queries: Vec<Vec<LocalHash>> =
            queries.iter().map(|q| q.iter().map(|l| LocalHash(*l)).collect()).collect();
        let mut out: Vec<Overlap> = Vec::new();
        Some(Box::new(move |at| {
            index.lookup(&queries[at % queries.len()], &mut out);
            out.len()
        }))
    }

    fn prepared(&self) -> i64 {
        self.prepared.0.load(Relaxed)
    }
}

// ---- peers ----

fn event(event: &Event) -> RouterEvent {
    let blocks = event.locals.iter().zip(&event.names);
    let blocks = blocks
        .map(|(local, name)| KvCacheStoredBlockData {
            block_hash: ExternalSequenceBlockHash(*name),
            tokens_hash: LocalBlockHash(*local),
            mm_extra_info: None,
        })
        .collect();
    let parent_hash = event.parent.map(ExternalSequenceBlockHash);
    let data = KvCacheEventData::Stored(KvCacheStoreData { parent_hash, start_position: None, blocks });
    RouterEvent::new(event.worker, KvCacheEvent { event_id: event.id, dp_rank: 0, data })
}

fn locals(queries: &[Vec<u64>]) -> Vec<Vec<LocalBlockHash>> {
    queries.iter().map(|q| q.iter().map(|l| LocalBlockHash(*l)).collect()).collect()
}

/// A backend of Dynamo's behind its pool of four threads.
pub struct Pooled<T: SyncIndexer> {
    name: &'static str,
    runtime: tokio::runtime::Runtime,
    tree: Arc<ThreadPoolIndexer<T>>,
    events: Vec<RouterEvent>,
    prepared: Prepared,
}

pub type Crtc = Pooled<ConcurrentRadixTreeCompressed>;
pub type Positional = Pooled<PositionalIndexer>;

impl<T: SyncIndexer + Send + Sync + 'static> Pooled<T> {
    fn with(name: &'static str, backend: T) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let tree = Arc::new(ThreadPoolIndexer::new(backend, 4, 16));
        Self { name, runtime, tree, events: Vec::new(), prepared: Prepared::default() }
    }

    fn apply(&self, events: Vec<RouterEvent>) {
        self.runtime.block_on(async {
            for event in events {
                self.tree.apply_event(event).await;
            }
            self.tree.flush().await;
        });
    }
}

impl Crtc {
    pub fn new() -> Self {
        Self::with("CRTC+pool4", ConcurrentRadixTreeCompressed::new())
    }
}

impl Positional {
    pub fn new() -> Self {
        Self::with("Positional64+pool4", PositionalIndexer::new(64))
    }
}

macro_rules! pooled {
    ($backend:ty) => {
        impl Subject for Pooled<$backend> {
            fn name(&self) -> &'static str {
                self.name
            }

            fn prepare(&mut self, load: &Workload) {
                self.events = self.prepared.note(|| load.events.iter().map(event).collect());
            }

            fn apply_all(&mut self) {
                let events = std::mem::take(&mut self.events);
                self.apply(events);
            }

            fn apply_half(&mut self) {
                let events = half(&mut self.events);
                self.apply(events);
            }

            fn asker(&self, queries: &[Vec<u64>]) -> Query<'static> {
                self.reader(queries).expect("readers anywhere")
            }

            fn reader(&self, queries: &[Vec<u64>]) -> Option<Elsewhere> {
                let (tree, queries) = (Arc::clone(&self.tree), locals(queries));
                Some(Box::new(move |at| {
                    tree.backend().find_matches(&queries[at % queries.len()], false).scores.len()
                }))
            }

            fn prepared(&self) -> i64 {
                self.prepared.0.load(Relaxed)
            }
        }
    };
}

pooled!(ConcurrentRadixTreeCompressed);
pooled!(PositionalIndexer);

/// Dynamo's single-threaded tree.
pub struct Radix {
    tree: Rc<RefCell<RadixTree>>,
    events: Vec<RouterEvent>,
    prepared: Prepared,
}

impl Radix {
    pub fn new() -> Self {
        let tree = Rc::new(RefCell::new(RadixTree::new()));
        Self { tree, events: Vec::new(), prepared: Prepared::default() }
    }

    fn apply(&self, events: Vec<RouterEvent>) {
        let mut tree = self.tree.borrow_mut();
        for event in events {
            tree.apply_event(event).expect("a good event");
        }
    }
}

impl Subject for Radix {
    fn name(&self) -> &'static str {
        "RadixTree"
    }

    fn prepare(&mut self, load: &Workload) {
        self.events = self.prepared.note(|| load.events.iter().map(event).collect());
    }

    fn apply_all(&mut self) {
        let events = std::mem::take(&mut self.events);
        self.apply(events);
    }

    fn apply_half(&mut self) {
        let events = half(&mut self.events);
        self.apply(events);
    }

    fn asker(&self, queries: &[Vec<u64>]) -> Query<'static> {
        let (tree, queries) = (Rc::clone(&self.tree), locals(queries));
        Box::new(move |at| {
            tree.borrow().find_matches(queries[at % queries.len()].clone(), false).scores.len()
        })
    }

    fn prepared(&self) -> i64 {
        self.prepared.0.load(Relaxed)
    }
}
