//! The prefix index beside Dynamo's native trees, interleaved in one run.
//!
//! The workload is that of the peer's own measurement: every worker stores sequences in chunks of
//! 32 blocks, in turns; a quarter of each sequence is common to all, a quarter to eight workers,
//! and half is its own. A million blocks in all. Then a thousand look-ups each of whole sequences
//! (`hit`), of sequences that share the common quarter (`partial`), and of unknown ones (`miss`).
//!
//!     prefixbench [--reps 5] [--configs 16x128,64x512] [--peers all]   figures and ratios
//!     prefixbench --dump                                               dump and load
//!     prefixbench --bound                                              stores beyond the bound
//!     cargo run --release --features mem                               live heap bytes

#[allow(dead_code, reason = "the benchmark calls part of it")]
#[path = "../../../src/kv/mod.rs"]
mod kv;
mod measure;
mod subjects;
mod workload;

use measure::{Figures, median};
#[cfg(feature = "mem")]
use subjects::Subject;
use subjects::{Crtc, Everline, Positional, Radix};
use workload::Workload;

#[cfg(feature = "mem")]
mod live {
    //! Counts live heap bytes.
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

    pub static LIVE: AtomicI64 = AtomicI64::new(0);

    struct Counting;

    // Safety: passes on to the system's allocator.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            LIVE.fetch_add(layout.size() as i64, Relaxed);
            unsafe { System.alloc(layout) }
        }
        unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
            LIVE.fetch_sub(layout.size() as i64, Relaxed);
            unsafe { System.dealloc(at, layout) }
        }
    }

    #[global_allocator]
    static COUNTING: Counting = Counting;
}

/// Of one configuration, by subject: the median of all rounds.
fn compare(workers: usize, depth: usize, reps: usize, all: bool, busy: bool) {
    let mut rounds: Vec<Vec<Figures>> = Vec::new();
    for _ in 0..reps {
        let load = Workload::new(workers, depth, 1_000_000);
        let mut round = vec![
            measure::run(Everline::new(false), &load, busy),
            measure::run(Everline::new(true), &load, busy),
            measure::run(Crtc::new(), &load, busy),
        ];
        if all {
            round.push(measure::run(Radix::new(), &load, false));
            round.push(measure::run(Positional::new(), &load, false));
        }
        rounds.push(round);
    }
    let subjects = rounds[0].len();
    let of = |subject: usize, figure: fn(&Figures) -> f64| {
        median(rounds.iter().map(|round| figure(&round[subject])).collect())
    };
    let figures: [(&str, fn(&Figures) -> f64); 9] = [
        ("apply ns/block", |f| f.apply),
        ("hit p50 us", |f| f.hit.0),
        ("hit p99 us", |f| f.hit.1),
        ("partial p50", |f| f.partial.0),
        ("partial p99", |f| f.partial.1),
        ("miss p50", |f| f.miss.0),
        ("idle p99", |f| f.idle),
        ("busy p99", |f| f.busy),
        ("busy p50", |f| f.busy_median),
    ];
    println!("\n{workers} x {depth}");
    print!("{:22}", "");
    figures.iter().for_each(|(name, _)| print!("{name:>15}"));
    println!();
    for subject in 0..subjects {
        print!("{:22}", rounds[0][subject].name);
        figures.iter().for_each(|(_, figure)| print!("{:15.2}", of(subject, *figure)));
        println!();
    }
    // Ratios of each round, so that what the machine does meanwhile cancels out.
    for subject in 0..2 {
        print!("{:22}", format!("{} / CRTC", rounds[0][subject].name));
        for (_, figure) in &figures {
            let ratios = rounds.iter().map(|round| figure(&round[subject]) / figure(&round[2]));
            print!("{:15.2}", median(ratios.collect()));
        }
        println!("   busy/idle p99 {:.2}", median(rounds.iter().map(|r| r[subject].busy / r[subject].idle).collect()));
    }
    println!("CRTC busy/idle p99 {:.2}", median(rounds.iter().map(|r| r[2].busy / r[2].idle).collect()));
}

#[cfg(feature = "mem")]
fn main() {
    use std::sync::atomic::Ordering::Relaxed;
    for (workers, depth, budget) in
        [(64, 128, 1_000_000), (64, 1024, 1_000_000), (256, 1024, 2_000_000), (16, 128, 1_000_000)]
    {
        let load = Workload::new(workers, depth, budget);
        // What was prepared is live before and freed after.
        let measured = |subject: &mut dyn Subject| {
            subject.prepare(&load);
            let before = live::LIVE.load(Relaxed);
            subject.apply_all();
            (live::LIVE.load(Relaxed) - before + subject.prepared()) as f64 / load.blocks as f64
        };
        let mut everline = Everline::new(true);
        let ours = measured(&mut everline);
        let counted = everline.counted() as f64 / load.blocks as f64;
        println!(
            "{workers} x {depth}: bytes per worker-block: everline {ours:.1} (its own account {counted:.1}), CRTC {:.1}, RadixTree {:.1}, Positional {:.1}",
            measured(&mut Crtc::new()),
            measured(&mut Radix::new()),
            measured(&mut Positional::new()),
        );
    }
}

#[cfg(not(feature = "mem"))]
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1)).cloned();
    if args.iter().any(|a| a == "--dump") {
        return measure::dump();
    }
    if args.iter().any(|a| a == "--bound") {
        return measure::bound();
    }
    let reps = value("--reps").and_then(|n| n.parse().ok()).unwrap_or(3);
    let configs = value("--configs").unwrap_or("16x128,64x512,64x2048,256x128,256x2048".into());
    for config in configs.split(',') {
        let (workers, depth) = config.split_once('x').expect("workers x blocks");
        let number = |text: &str| text.parse().expect("a number");
        let busy = !args.iter().any(|a| a == "--no-busy");
        compare(number(workers), number(depth), reps, value("--peers").is_some(), busy);
    }
}
