//! KV events through the log of three replicas: how many blocks a second, and how soon each
//! replica can look them up.
//!
//! A feed does what the program's own does: one batch in flight, the next proposed when the one
//! before was applied where it was proposed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use everline::cluster::api::ControlPlane;
use everline::ids::WorkerIx;
use everline::kv::feed::Cursor;
use everline::kv::hash::{LocalHash, Seed};
use everline::kv::types::{EngineHash, KvOp, Tier};
use everline::kv::wire;
use everline::state::command::{CacheCommand, CacheOutcome};
use everline::state::ranks::RankKey;
use tokio::task::JoinSet;

use super::{Replicas, cpu, quantiles};

/// Blocks of one engine step.
const EVENT: usize = 32;
/// Events of one sequence: a prompt of 4,096 tokens in blocks of 16.
const SEQUENCE: usize = 8;
/// Sequences that a rank holds; the oldest goes when another comes: 32 thousand blocks.
const HELD: u64 = 128;

/// What an engine tells, without end: sequences, a quarter of each known to all ranks, and what
/// had to go for them.
struct Engine {
    rank: u64,
    events: u64,
}

impl Engine {
    fn block(&self, sequence: u64, at: u64) -> u64 {
        // The first quarter of a sequence is any rank's.
        let whose = if (at as usize) < SEQUENCE * EVENT / 4 { 0 } else { 1 + self.rank };
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&whose.to_le_bytes());
        bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
        bytes[16..].copy_from_slice(&at.to_le_bytes());
        xxhash_rust::xxh3::xxh3_64(&bytes)
    }

    fn step(&mut self, ops: &mut Vec<KvOp>) -> usize {
        let (sequence, event) = (self.events / SEQUENCE as u64, self.events % SEQUENCE as u64);
        self.events += 1;
        let (first, last) = (event * EVENT as u64, (event + 1) * EVENT as u64);
        let parent = (first > 0).then(|| EngineHash(self.block(sequence, first - 1)));
        let blocks = (first..last).map(|at| self.block(sequence, at));
        let blocks = blocks.map(|hash| (LocalHash(hash), EngineHash(hash))).collect();
        ops.push(KvOp::Store { parent, tier: Tier::Gpu, seed: Seed::default(), blocks });
        let Some(old) = sequence.checked_sub(HELD) else { return EVENT };
        // The end of a sequence goes first.
        let (first, last) = (SEQUENCE as u64 * EVENT as u64 - last, SEQUENCE as u64 * EVENT as u64 - first);
        let blocks = (first..last).rev().map(|at| EngineHash(self.block(old, at))).collect();
        ops.push(KvOp::Remove { tier: Tier::Gpu, blocks });
        2 * EVENT
    }

    /// At least this many blocks, and how many.
    fn batch(&mut self, least: usize) -> (Bytes, usize) {
        let (mut ops, mut blocks) = (Vec::new(), 0);
        while blocks < least {
            blocks += self.step(&mut ops);
        }
        (wire::encode(&ops).into(), blocks)
    }
}

/// One rank's events on their way.
struct Feed {
    plane: Arc<dyn ControlPlane>,
    rank: RankKey,
    cursor: Cursor,
}

impl Feed {
    async fn claim(plane: &Arc<dyn ControlPlane>, worker: u32) -> Self {
        let rank = RankKey { worker: WorkerIx(worker), rank: 0 };
        loop {
            // A replica that has not been heard of yet may not.
            match plane.propose_cache(CacheCommand::ClaimFeed { rank, from: None }).await.unwrap() {
                CacheOutcome::Feed(cursor) => return Self { plane: plane.clone(), rank, cursor },
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn deliver(&mut self, ops: Bytes) {
        let (seq, after) = (self.cursor.last.map_or(0, |(seq, _)| seq + 1), self.cursor);
        self.cursor.last = Some((seq, seq));
        loop {
            let command =
                CacheCommand::Events { rank: self.rank, after, cursor: self.cursor, ops: ops.clone() };
            match self.plane.propose_cache(command).await {
                Ok(CacheOutcome::Done) => return,
                Ok(CacheOutcome::Moved(cursor)) if cursor == self.cursor => return,
                Ok(CacheOutcome::NotOwner(None)) => {
                    // The machine was so busy that the lease ended: claimed again, as the
                    // program's feeds are.
                    let claimed = Self::claim(&self.plane, self.rank.worker.0).await;
                    assert!([after, self.cursor].contains(&claimed.cursor), "another's feed");
                }
                Ok(other) => panic!("events of {:?}: {other:?}", self.rank),
                // No room: again, as the program's feeds do.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }
}

async fn forget(r: &Replicas, workers: std::ops::Range<u32>) {
    for worker in workers {
        let command = CacheCommand::ForgetWorker { worker: WorkerIx(worker) };
        r.planes[0].propose_cache(command).await.unwrap();
    }
}

/// Waits until all replicas have applied as much, and says when that was.
async fn settled(r: &Replicas) -> Instant {
    loop {
        let status: Vec<_> = r.planes.iter().map(|plane| plane.status().groups.swap_remove(1)).collect();
        let now = Instant::now();
        if status.iter().all(|group| group.applied >= status[0].last_log && group.applied >= group.last_log) {
            let digests: Vec<u64> = r.planes.iter().map(|p| p.blocks().index.load().digest()).collect();
            assert!(digests.iter().all(|digest| *digest == digests[0]), "the replicas differ: {digests:x?}");
            return now;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// `feeds` at the replicas `at`, as fast as they go, in batches of `size` blocks; `total` blocks.
fn rate(r: &Replicas, name: &str, at: &[usize], feeds: usize, size: usize, total: usize) {
    r.runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for n in 0..feeds {
            let feed = Feed::claim(&r.planes[at[n % at.len()]], 1000 + n as u32).await;
            let mut engine = Engine { rank: n as u64, events: 0 };
            let mut batches = vec![engine.batch(HELD as usize * EVENT * SEQUENCE)];
            while batches[1..].iter().map(|batch| batch.1).sum::<usize>() < total / feeds {
                batches.push(engine.batch(size));
            }
            tasks.spawn(async move {
                let mut feed = feed;
                // So that in what is measured all caches are full.
                feed.deliver(batches.remove(0).0).await;
                (feed, batches)
            });
        }
        let ready = tasks.join_all().await;
        settled(r).await;
        let (used, began, mut blocks) = (cpu(), Instant::now(), 0);
        let mut tasks = JoinSet::new();
        for (mut feed, batches) in ready {
            blocks += batches.iter().map(|batch| batch.1).sum::<usize>();
            tasks.spawn(async move {
                for (ops, _) in batches {
                    feed.deliver(ops).await;
                }
            });
        }
        tasks.join_all().await;
        let took = settled(r).await.duration_since(began).as_secs_f64();
        println!(
            "events: {name}, {feeds} feeds, batches of {size}: {:.0}k blocks/s applied on all three in {took:.2} s, \
             {:.0} ns CPU a block and replica",
            blocks as f64 / took / 1e3,
            (cpu() - used) * 1e9 / blocks as f64 / 3.0,
        );
        forget(r, 1000..1000 + feeds as u32).await;
    });
}

/// `per_second` blocks spread over `feeds` in engine steps; how soon what one of the replicas
/// proposes is to be looked up on both others.
fn visible(r: &Replicas, feeds: usize, per_second: usize) {
    let samples = r.runtime.block_on(async {
        let mut noise = JoinSet::new();
        for n in 0..feeds {
            let mut feed = Feed::claim(&r.planes[n % 3], 1000 + n as u32).await;
            let mut engine = Engine { rank: n as u64, events: 0 };
            noise.spawn(async move {
                let pause = Duration::from_secs(1) * feeds as u32 / per_second as u32;
                let (began, mut told) = (Instant::now(), 0);
                loop {
                    // What has gathered while the last batch was on its way.
                    let due = began.elapsed().as_nanos() / pause.as_nanos();
                    let (mut ops, mut blocks) = (Vec::new(), 0);
                    while told < due as usize {
                        let step = engine.step(&mut ops);
                        (told, blocks) = (told + step, blocks + step);
                    }
                    if blocks > 0 {
                        feed.deliver(wire::encode(&ops).into()).await;
                    }
                    let next = began + pause * (told + EVENT) as u32;
                    tokio::time::sleep_until(next.into()).await;
                }
            });
        }
        let mut probes = Vec::new();
        for n in 0..3 {
            probes.push(Feed::claim(&r.planes[n], 2000 + n as u32).await);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (mut samples, mut found) = (Vec::new(), Vec::new());
        for n in 0..900_usize {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let block = LocalHash(xxhash_rust::xxh3::xxh3_64(&(n as u64).to_le_bytes()));
            let blocks = vec![(block, EngineHash(block.0))];
            let store = KvOp::Store { parent: None, tier: Tier::Gpu, seed: Seed::default(), blocks };
            let others: Vec<_> =
                (1..3).map(|step| r.planes[(n + step) % 3].blocks().index.load_full()).collect();
            let asked = Instant::now();
            let ops = Bytes::from(wire::encode(&[store]));
            let mut seen_by = [None; 2];
            let deliver = probes[n % 3].deliver(ops);
            let watch = async {
                while seen_by.contains(&None) {
                    for (seen, index) in seen_by.iter_mut().zip(&others) {
                        index.lookup(&[block], &mut found);
                        if seen.is_none() && !found.is_empty() {
                            *seen = Some(asked.elapsed());
                        }
                    }
                    tokio::time::sleep(Duration::from_micros(100)).await;
                }
            };
            tokio::join!(deliver, watch);
            samples.extend(seen_by.into_iter().flatten());
        }
        noise.shutdown().await;
        settled(r).await;
        forget(r, 1000..1000 + feeds as u32).await;
        forget(r, 2000..2003).await;
        samples
    });
    let what = format!(
        "{}k blocks/s of {feeds} feeds, proposed to looked up on another (timer 1 ms)",
        per_second / 1000
    );
    quantiles("events", &what, samples);
}

pub(super) fn run(r: &Replicas, leader: usize) {
    let follower = (leader + 1) % 3;
    rate(r, "owned by all three", &[0, 1, 2], 24, 8192, 6_000_000);
    rate(r, "owned by all three", &[0, 1, 2], 24, 1024, 3_000_000);
    rate(r, "owned by a follower", &[follower], 24, 8192, 4_000_000);
    rate(r, "owned by the leader", &[leader], 1, 8192, 1_000_000);
    rate(r, "owned by a follower", &[follower], 1, 8192, 1_000_000);
    visible(r, 24, 100_000);
    visible(r, 64, 100_000);
}
