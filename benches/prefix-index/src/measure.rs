//! How it is measured.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};

use crate::kv::index::{Index, Options};
use crate::subjects::{Everline, Query, Subject};
use crate::workload::{Workload, mix};

/// CPU seconds of this process, all threads.
fn cpu() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

pub fn median(mut list: Vec<f64>) -> f64 {
    list.sort_by(f64::total_cmp);
    list[list.len() / 2]
}

/// Of one subject in one round. Latencies in microseconds: p50 and p99.
pub struct Figures {
    pub name: &'static str,
    /// CPU nanoseconds a block.
    pub apply: f64,
    pub hit: (f64, f64),
    pub partial: (f64, f64),
    pub miss: (f64, f64),
    /// p99 of hits in a half-full index, alone and while the other half is applied.
    pub idle: f64,
    pub busy: f64,
    pub busy_median: f64,
}

const QUERIES: usize = 1000;

fn percentiles(mut nanos: Vec<u64>) -> (f64, f64) {
    nanos.sort_unstable();
    let at = |p: f64| nanos[((nanos.len() as f64 * p) as usize).min(nanos.len() - 1)] as f64 / 1000.0;
    (at(0.5), at(0.99))
}

fn ask(mut query: Query<'_>, count: usize, mut go_on: impl FnMut() -> bool) -> (f64, f64) {
    let mut nanos = Vec::with_capacity(1 << 20);
    let mut found = 0;
    while nanos.len() < count || go_on() {
        // Not in the order in which they were stored.
        let at = mix(11, nanos.len() as u64) as usize % QUERIES;
        let start = Instant::now();
        found += query(at);
        nanos.push(start.elapsed().as_nanos() as u64);
    }
    std::hint::black_box(found);
    percentiles(nanos)
}

pub fn run<S: Subject + Fresh>(mut subject: S, load: &Workload, busy: bool) -> Figures {
    subject.prepare(load);
    let before = cpu();
    subject.apply_all();
    let apply = (cpu() - before) * 1e9 / load.blocks as f64;
    let queries = load.queries(QUERIES);
    // In order, each once, as the peer's own measurement does.
    let [hit, partial, miss] = queries.map(|queries| {
        let mut query = subject.asker(&queries);
        let nanos = (0..QUERIES).map(|at| {
            let start = Instant::now();
            std::hint::black_box(query(at));
            start.elapsed().as_nanos() as u64
        });
        percentiles(nanos.collect())
    });
    let name = subject.name();
    drop(subject);
    let (mut idle, mut during) = (0.0, (0.0, 0.0));
    if busy {
        let mut subject = S::fresh(name);
        subject.prepare(load);
        subject.apply_half();
        // What is asked for is there from the first half on.
        let [hit, ..] = load.queries(QUERIES);
        idle = ask(subject.asker(&hit), 20_000, || false).1;
        let query = subject.reader(&hit).expect("readers anywhere");
        let done = AtomicBool::new(false);
        during = std::thread::scope(|scope| {
            let reader = scope.spawn(|| ask(query, 1, || !done.load(Relaxed)));
            subject.apply_all();
            done.store(true, Relaxed);
            reader.join().expect("a reader")
        });
    }
    Figures { name, apply, hit, partial, miss, idle, busy: during.1, busy_median: during.0 }
}

/// Another one of the same kind, empty.
pub trait Fresh {
    fn fresh(name: &str) -> Self;
}

impl Fresh for Everline {
    fn fresh(name: &str) -> Self {
        Self::new(name.contains("encoded"))
    }
}

impl Fresh for crate::subjects::Crtc {
    fn fresh(_: &str) -> Self {
        Self::new()
    }
}

impl Fresh for crate::subjects::Positional {
    fn fresh(_: &str) -> Self {
        Self::new()
    }
}

impl Fresh for crate::subjects::Radix {
    fn fresh(_: &str) -> Self {
        Self::new()
    }
}

/// What a store takes when the bound is passed all the time.
#[cfg_attr(feature = "mem", allow(dead_code, reason = "the other kind of measurement"))]
pub fn bound() {
    for mib in [64, 256, 512] {
        let load = Workload::new(64, 512, mib * 45_000);
        let index = Index::new(Options { bytes: (mib as u64) << 20 });
        let (mut worst, mut total, mut batches) = (0.0f64, 0.0f64, 0);
        for event in &load.events {
            let (rank, bytes) = crate::subjects::encoded(event);
            let before = index.counters().evicted;
            let start = Instant::now();
            index.apply_encoded(rank, &bytes).expect("what was encoded");
            let took = start.elapsed().as_secs_f64();
            total += took;
            if index.counters().evicted > before {
                worst = worst.max(took);
                batches += 1;
            }
        }
        let counters = index.counters();
        println!(
            "{mib} MiB: {} stored, {} held, {} evicted in {batches} batches, the longest {:.1} ms; {:.0} ns a block on the whole",
            load.blocks,
            counters.worker_blocks,
            counters.evicted,
            worst * 1e3,
            total * 1e9 / load.blocks as f64,
        );
    }
}

/// Dump and load of a million and of ten million blocks.
#[cfg_attr(feature = "mem", allow(dead_code, reason = "the other kind of measurement"))]
pub fn dump() {
    for (workers, depth, budget) in [(64, 512, 1_000_000), (64, 512, 10_000_000)] {
        let load = Workload::new(workers, depth, budget);
        let mut subject = Everline::new(true);
        subject.prepare(&load);
        subject.apply_all();
        let index = subject.index();
        for _ in 0..3 {
            let start = Instant::now();
            let frozen = index.freeze();
            let froze = start.elapsed();
            let records = frozen.records();
            let dumped = start.elapsed();
            let bytes: usize = records.iter().map(|(_, value)| value.len()).sum();
            let start = Instant::now();
            let again = Index::load(Options { bytes: 2 << 30 }, &records).expect("what was dumped");
            let loaded = start.elapsed();
            assert_eq!(again.digest(), index.digest());
            println!(
                "{} worker-blocks stored, {} held, {} blocks: freeze {:.1} ms, dump {:.1} ms ({:.1} MiB in {} records), load {:.1} ms",
                load.blocks,
                index.counters().worker_blocks,
                index.counters().blocks,
                froze.as_secs_f64() * 1e3,
                dumped.as_secs_f64() * 1e3,
                bytes as f64 / (1 << 20) as f64,
                records.len(),
                loaded.as_secs_f64() * 1e3,
            );
        }
    }
}
