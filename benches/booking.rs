//! What booking a request costs: `cargo bench --bench booking`. Prints figures; compares nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use everline::kv::hash::{LocalHash, SequenceHash, sequence_hashes};
use everline::routing::live::LiveBlocks;

/// Repetitions of each figure, whose median is told.
const ROUNDS: u64 = 1001;

/// Requests that run meanwhile.
const RUNNING: u64 = 200;

fn chain(seed: u64, shared: u64, blocks: u64) -> Arc<[SequenceHash]> {
    let locals: Vec<LocalHash> =
        (0..blocks).map(|at| LocalHash(if at < shared { at } else { (seed << 32) + at })).collect();
    sequence_hashes(&locals).into()
}

fn main() {
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    for (blocks, shared) in [(16, 0), (250, 0), (250, 200), (2000, 0)] {
        let live = LiveBlocks::default();
        for running in 0..RUNNING {
            live.hold(&chain(1_000_000 + running, shared, blocks));
        }
        let (mut holds, mut ends) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let chain = chain(round + 1, shared, blocks);
            let begun = Instant::now();
            std::hint::black_box(live.hold(&chain));
            holds.push(begun.elapsed());
            let begun = Instant::now();
            std::hint::black_box(live.let_go(&chain));
            ends.push(begun.elapsed());
        }
        let what = format!("{blocks} blocks, {shared} of them shared, {RUNNING} requests running");
        println!("{what:<60} begin {:>8.1?}  end {:>8.1?}", median(holds), median(ends));
    }
}
