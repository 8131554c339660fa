//! What choosing a worker costs: `cargo bench --bench selection`. A prompt's token ids to a booked
//! worker, in parts and as a whole, as the proxy does it. Prints figures; compares nothing.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use everline::ids::{Incarnation, ReplicaId, WorkerIx};
use everline::kv::hash::{LocalHash, Seed, SequenceHash, local_hashes, sequence_hashes};
use everline::kv::types::{EngineHash, KvOp, RankIx, Tier};
use everline::routing::blocks::Blocks;
use everline::routing::book::{Bookings, Share};
use everline::routing::breaker::BreakerOptions;
use everline::routing::policy::{Policy, RouteRequest, by_name};
use everline::routing::select::{Limits, Overload, select};
use everline::routing::view::{RegistryView, WorkerLive, WorkerView};
use everline::state::cache::CacheState;
use everline::state::command::{CacheCommand, ControlCommand};
use everline::state::control::ControlState;
use everline::state::replicated::State as _;
use everline::state::worker::WorkerSpec;

/// Tokens of a prompt and of a block.
const PROMPT: usize = 4000;
const BLOCK: usize = 16;
/// Different prompts asked for, in turn.
const PROMPTS: usize = 256;
/// Conversations that each worker holds, of as many blocks.
const HELD: usize = 128;
/// Repetitions of each figure, whose median is told, and calls in each.
const ROUNDS: usize = 31;
const CALLS: usize = 512;

/// A cluster's registry of `workers`, each with one rank that the index knows.
fn registry(workers: usize) -> RegistryView {
    let mut state = ControlState::default();
    for n in 0..workers {
        let spec: WorkerSpec = serde_json::from_value(serde_json::json!({
            "id": format!("w{n:04}"), "url": "http://127.0.0.1:9", "source": "config", "block_size": BLOCK,
            "models": [{"name": "m"}],
        }))
        .unwrap();
        state.apply(ReplicaId(1), ControlCommand::RegisterWorker { spec, heartbeats: false });
    }
    let view = state.workers().values().enumerate().map(|(n, record)| {
        let live = Arc::<WorkerLive>::default();
        live.set_ranks(vec![RankIx(n as u32)]);
        Arc::new(WorkerView { record: record.clone(), live })
    });
    RegistryView::new(1, view.collect())
}

/// The first `shared` blocks are those of prompt `n % 16`, the rest its own.
fn prompt(n: usize, shared: usize) -> Vec<u32> {
    (0..PROMPT)
        .map(|at| {
            let whose = if at < shared * BLOCK { n % 16 } else { 1000 + n };
            xxhash_rust::xxh3::xxh3_64(&[whose.to_le_bytes(), at.to_le_bytes()].concat()) as u32 % 128_000
        })
        .collect()
}

fn store(blocks: &Blocks, rank: RankIx, locals: &[LocalHash]) {
    let names = sequence_hashes(locals).into_iter().map(|hash| EngineHash(hash.0));
    let blocks_of = locals.iter().copied().zip(names).collect();
    let op = KvOp::Store { parent: None, tier: Tier::Gpu, seed: Seed::default(), blocks: blocks_of };
    blocks.index.load().apply(rank, &[op]);
}

fn share(rank: u32, prefill_tokens: u32, decode_blocks: u32, chain: &Arc<[SequenceHash]>) -> Share {
    Share { rank, prefill_tokens, decode_blocks, chain: Some(chain.clone()) }
}

/// Median time of one call, ns.
fn time<R>(mut call: impl FnMut(usize) -> R) -> f64 {
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|round| {
            let began = Instant::now();
            for n in 0..CALLS {
                black_box(call(round * CALLS + n));
            }
            began.elapsed().as_nanos() as f64 / CALLS as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

fn measure(workers: usize) {
    let view = registry(workers);
    let blocks = Blocks::default();
    let shared = PROMPT / BLOCK / 2;
    let prompts: Vec<Vec<u32>> = (0..PROMPTS).map(|n| prompt(n, shared)).collect();
    let hashed: Vec<Vec<LocalHash>> =
        prompts.iter().map(|tokens| local_hashes(tokens, BLOCK, Seed::default())).collect();
    let chains: Vec<Arc<[SequenceHash]>> =
        hashed.iter().map(|locals| sequence_hashes(locals).into()).collect();
    for worker in 0..workers {
        // Half of each prompt is held by every worker, the whole by one or other.
        for n in 0..HELD {
            let held = local_hashes(&prompt(worker * HELD + n, shared), BLOCK, Seed::default());
            store(&blocks, RankIx(worker as u32), &held);
        }
    }
    let bookings = Bookings::new(|| {});
    let policy = by_name("kv_cost").unwrap();
    let limits = Limits {
        now_ms: 0,
        breaker: BreakerOptions::default(),
        max_requests: 8192,
        overload: Overload::default(),
    };
    // Every worker is at something.
    let _busy: Vec<_> = view
        .workers
        .iter()
        .enumerate()
        .map(|(n, w)| bookings.book(w.clone(), n as u32 * 37 % 4000, 100))
        .collect();
    let (mut held, mut sent) = (Vec::new(), Vec::new());
    let choose = |tokens: usize, held: &[_], sent: &[_], policy: &dyn Policy| {
        let request = RouteRequest {
            model: Some("m"),
            prompt_tokens: tokens as u32,
            overlaps: held,
            predicted: sent,
            ..RouteRequest::default()
        };
        select(&view, policy, &request, &limits, &[], &mut rand::rng()).unwrap()
    };
    let told = |what: &str, ns: f64| println!("selection: {workers} workers: {what}: {:.1} us", ns / 1e3);

    told("hash 4,000 tokens", time(|n| local_hashes(&prompts[n % PROMPTS], BLOCK, Seed::default())));
    told("sequence hashes of its blocks", time(|n| sequence_hashes(&hashed[n % PROMPTS])));
    told(
        "look up, nothing sent lately",
        time(|n| blocks.overlaps(&hashed[n % PROMPTS], &mut held, &mut sent)),
    );
    blocks.overlaps(&hashed[0], &mut held, &mut sent);
    assert_eq!(held.len(), workers, "every worker holds the first half");
    let (held_now, sent_now) = (held.clone(), sent.clone());
    told("filter, cost, choose", time(|_| choose(PROMPT, &held_now, &sent_now, policy.as_ref())));
    told(
        "book and free",
        time(|n| {
            bookings.book_share(view.workers[n % workers].clone(), share(0, 2000, 250, &chains[n % PROMPTS]))
        }),
    );
    let note =
        |n: usize| blocks.recent.note(RankIx((n % workers) as u32), Seed::default(), &hashed[n % PROMPTS]);
    told("note where it was sent", time(note));
    told("look up, all sent lately", time(|n| blocks.overlaps(&hashed[n % PROMPTS], &mut held, &mut sent)));
    blocks.recent.turn();
    blocks.recent.turn();
    let whole = time(|n| {
        let locals = local_hashes(&prompts[n % PROMPTS], BLOCK, Seed::default());
        blocks.overlaps(&locals, &mut held, &mut sent);
        let selection = choose(PROMPT, &held, &sent, policy.as_ref());
        let (tokens, decode) = selection.to_book(PROMPT as u32);
        let chain = sequence_hashes(&locals).into();
        let share = share(selection.rank, tokens, decode, &chain);
        let booked = bookings.book_share(selection.worker.clone(), share);
        blocks.recent.note(selection.worker.live.ranks()[0], Seed::default(), &locals);
        booked
    });
    told("whole: hash, look up, cost, choose, book, note, free", whole);
}

fn main() {
    for workers in [8, 64, 256] {
        measure(workers);
    }
    // What every replica does with a prompt that another one sent.
    let mut state = CacheState::default();
    state.apply(ReplicaId(1), CacheCommand::ReplicaUp { id: ReplicaId(1), incarnation: Incarnation(1) });
    let rank = everline::state::ranks::RankKey { worker: WorkerIx(1), rank: 0 };
    state.apply(ReplicaId(1), CacheCommand::ClaimFeed { rank, from: None });
    let locals: Vec<u8> = local_hashes(&prompt(0, 125), BLOCK, Seed::default())
        .iter()
        .flat_map(|hash| hash.0.to_le_bytes())
        .collect();
    let routed = CacheCommand::Routed { rank, seed: Seed::default(), locals: locals.into(), capacity: None };
    let ns = time(|_| {
        let command = everline::codec::decode(&everline::codec::encode(&routed)).unwrap();
        state.apply(ReplicaId(1), command);
        state.take_routed()
    });
    println!(
        "selection: a prompt of 4,000 tokens told to another replica, coding and applying: {:.1} us",
        ns / 1e3
    );
}
