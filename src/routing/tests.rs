//! Policies and filters against plain expectations.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::breaker::BreakerOptions;
use super::policy::{Candidate, POLICY_NAMES, RouteRequest, by_name};
use super::select::{Filtered, Limits, NoWorker, Overload, select};
use super::view::{RegistryView, WorkerView};
use crate::ids::WorkerId;
use crate::kv::types::Overlap;
use crate::state::corrections::Correction;
use crate::state::load::LoadSum;
use crate::state::worker::{Liveness, ServedModel, WorkerRecord, WorkerRole, WorkerSource, WorkerSpec};

pub(super) fn record(id: &str, weight: u32) -> WorkerRecord {
    WorkerRecord {
        spec: WorkerSpec {
            id: WorkerId(id.into()),
            url: format!("http://{id}:1"),
            engine: Default::default(),
            models: vec![ServedModel { name: "m".into(), lora_of: None, max_model_len: None }],
            role: WorkerRole::Aggregated,
            transfer: Default::default(),
            dp_ranks: 1,
            block_size: Some(16),
            capacity_blocks: None,
            labels: Default::default(),
            weight,
            http2: false,
            max_requests: None,
            owner: None,
            source: WorkerSource::Admin,
        },
        drain: false,
        online: true,
        liveness: Liveness::Probe,
        last_heard_ms: 0,
        generation: 1,
        ix: crate::ids::WorkerIx(1),
        failed_by: Default::default(),
    }
}

pub(super) fn view(records: Vec<WorkerRecord>) -> RegistryView {
    let workers =
        records.into_iter().map(|record| Arc::new(WorkerView { record, live: Arc::default() })).collect();
    RegistryView::new(1, workers)
}

const LIMITS: Limits = Limits {
    now_ms: 1,
    breaker: BreakerOptions { failures: 5, open_ms: 1000, max_open_ms: 1000 },
    max_requests: 1_000_000,
    overload: Overload { prefill_tokens: None, kv_share: None },
};

fn request() -> RouteRequest<'static> {
    RouteRequest { model: Some("m"), prompt_tokens: 100, ..RouteRequest::default() }
}

fn shares(name: &str, view: &RegistryView, rounds: usize) -> HashMap<String, usize> {
    let policy = by_name(name).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let mut shares = HashMap::new();
    for _ in 0..rounds {
        let chosen = select(view, policy.as_ref(), &request(), &LIMITS, &[], &mut rng).unwrap();
        *shares.entry(chosen.worker.id().to_string()).or_default() += 1;
    }
    shares
}

#[test]
fn round_robin_gives_equal_weights_equal_shares() {
    let view = view(vec![record("a", 100), record("b", 100), record("c", 100)]);
    assert!(shares("round_robin", &view, 300).values().all(|n| *n == 100));
}

#[test]
fn round_robin_follows_weights_without_bursts() {
    let view = view(vec![record("a", 50), record("b", 100), record("c", 100)]);
    let policy = by_name("round_robin").unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let order: Vec<String> = (0..50)
        .map(|_| {
            select(&view, policy.as_ref(), &request(), &LIMITS, &[], &mut rng)
                .unwrap()
                .worker
                .id()
                .to_string()
        })
        .collect();
    assert_eq!(order.iter().filter(|id| *id == "a").count(), 10);
    assert!(order.windows(2).all(|pair| pair[0] != pair[1]), "{order:?}");
}

#[test]
fn random_follows_weights() {
    let view = view(vec![record("a", 100), record("b", 300)]);
    let heavy = shares("random", &view, 4000)["b"];
    assert!((2800..3200).contains(&heavy), "{heavy}");
}

#[test]
fn least_loaded_divides_by_weight_and_breaks_ties_at_random() {
    let view = view(vec![record("a", 100), record("b", 200), record("c", 100)]);
    view.workers[0].live.peers.set(LoadSum { requests: 3, ..Default::default() });
    view.workers[1].live.peers.set(LoadSum { requests: 4, ..Default::default() });
    view.workers[2].live.peers.set(LoadSum { requests: 3, ..Default::default() });
    assert_eq!(shares("least_loaded", &view, 50)["b"], 50);
    view.workers[1].live.peers.set(LoadSum { requests: 60, ..Default::default() });
    let shares = shares("least_loaded", &view, 1000);
    assert!(shares["a"] > 400 && shares["c"] > 400 && !shares.contains_key("b"), "{shares:?}");
}

#[test]
fn power_of_two_never_takes_the_most_loaded_of_three() {
    let view = view(vec![record("a", 100), record("b", 100), record("c", 100)]);
    view.workers[2].live.peers.set(LoadSum { requests: 9, ..Default::default() });
    assert!(!shares("power_of_two", &view, 500).contains_key("c"));
}

#[test]
fn prefill_and_decode_both_count_as_work() {
    let view = view(vec![record("a", 1)]);
    let worker = &view.workers[0];
    worker.live.own.set(LoadSum { requests: 1, prefill_tokens: 32, decode_blocks: 5 });
    let load = worker.rank_load(0, true);
    let candidate = Candidate { worker, rank: 0, load, overlap: Overlap::default(), coming: 0, seen: load };
    assert_eq!(candidate.weighted_load(), 8.0);
}

#[test]
fn a_refusal_names_every_reason() {
    let mut offline = record("a", 1);
    offline.online = false;
    let mut draining = record("b", 1);
    draining.drain = true;
    let mut prefill = record("c", 1);
    prefill.spec.role = WorkerRole::Prefill;
    let view = view(vec![offline, draining, prefill, record("d", 1)]);
    let tried = [WorkerId("d".into())];
    let policy = by_name("random").unwrap();
    let refusal = select(&view, policy.as_ref(), &request(), &LIMITS, &tried, &mut rand::rng()).unwrap_err();
    let NoWorker::AllFiltered { reasons, more: 0 } = &refusal else { panic!("{refusal:?}") };
    let why: Vec<Filtered> = reasons.iter().map(|(_, why)| *why).collect();
    assert_eq!(
        why,
        [Filtered::Offline, Filtered::Draining, Filtered::Role(WorkerRole::Prefill), Filtered::Tried]
    );
    assert!(refusal.to_string().contains("b: draining"), "{refusal}");
}

#[test]
fn unknown_models_list_the_known_ones_and_an_empty_registry_says_so() {
    let policy = by_name("random").unwrap();
    let other = RouteRequest { model: Some("other"), ..request() };
    let served = view(vec![record("a", 1)]);
    assert_eq!(
        select(&served, policy.as_ref(), &other, &LIMITS, &[], &mut rand::rng()).unwrap_err(),
        NoWorker::UnknownModel { known: vec!["m".into()], more: 0 }
    );
    assert_eq!(
        select(&view(vec![]), policy.as_ref(), &other, &LIMITS, &[], &mut rand::rng()).unwrap_err(),
        NoWorker::RegistryEmpty
    );
}

#[test]
fn unreachable_workers_are_the_last_resort() {
    let view = view(vec![record("a", 1), record("b", 1)]);
    view.workers[0].live.unreachable.store(true, Ordering::Relaxed);
    for name in POLICY_NAMES {
        assert_eq!(shares(name, &view, 20)["b"], 20);
    }
    view.workers[1].live.unreachable.store(true, Ordering::Relaxed);
    let policy = by_name("round_robin").unwrap();
    assert!(select(&view, policy.as_ref(), &request(), &LIMITS, &[], &mut rand::rng()).unwrap().last_resort);
}

proptest! {
    #[test]
    fn every_policy_picks_a_worker_that_passes_the_filters(
        workers in prop::collection::vec((1_u32..1000, any::<bool>(), any::<bool>(), any::<bool>(), 0_i64..50), 1..20),
        seed in any::<u64>(),
    ) {
        let records = workers.iter().enumerate().map(|(at, (weight, online, drain, ..))| {
            let mut record = record(&format!("w{at:02}"), *weight);
            record.online = *online;
            record.drain = *drain;
            record
        }).collect();
        let view = view(records);
        for (worker, (.., unreachable, requests)) in view.workers.iter().zip(&workers) {
            worker.live.unreachable.store(*unreachable, Ordering::Relaxed);
            worker.live.peers.set(LoadSum { requests: *requests, ..Default::default() });
        }
        let healthy = view.workers.iter().filter(|w| w.is_routable()).count();
        let possible = workers.iter().filter(|(_, online, drain, ..)| *online && !*drain).count();
        let mut rng = StdRng::seed_from_u64(seed);
        for name in POLICY_NAMES {
            let policy = by_name(name).unwrap();
            for _ in 0..8 {
                match select(&view, policy.as_ref(), &request(), &LIMITS, &[], &mut rng) {
                    Ok(chosen) => {
                        prop_assert!(chosen.worker.record.online && !chosen.worker.record.drain);
                        prop_assert_eq!(chosen.last_resort, healthy == 0);
                        prop_assert!(healthy == 0 || chosen.worker.is_routable());
                    }
                    Err(_) => prop_assert_eq!(possible, 0),
                }
            }
        }
    }

    #[test]
    fn weighted_round_robin_is_exact_over_a_full_turn(weights in prop::collection::vec(1_u32..9, 1..8)) {
        let records = weights.iter().enumerate().map(|(at, w)| record(&format!("w{at}"), *w)).collect();
        let view = view(records);
        let equal = weights.iter().all(|w| *w == weights[0]);
        let turn = if equal { weights.len() } else { weights.iter().sum::<u32>() as usize };
        let shares = shares("round_robin", &view, turn);
        for (at, weight) in weights.iter().enumerate() {
            let expected = if equal { 1 } else { *weight as usize };
            prop_assert_eq!(shares[&format!("w{at}")], expected);
        }
    }
}

#[test]
fn a_correction_takes_nothing_off_what_certainly_runs_and_is_shared_by_what_is_booked() {
    let of = |requests| LoadSum { requests, prefill_tokens: 100 * requests, decode_blocks: 10 * requests };
    let mut record = record("w", 100);
    record.spec.dp_ranks = 2;
    let worker = view(vec![record]).workers[0].clone();
    let bookings = super::book::Bookings::new(|| {});
    let share = super::book::Share { rank: 0, prefill_tokens: 100, decode_blocks: 10, chain: None };
    let held: Vec<_> = (0..4).map(|_| bookings.book_share(worker.clone(), share.clone())).collect();
    worker.live.set_peers([(1, of(8))].into_iter());
    worker.live.set_correction(Some(&Correction::of_whole(of(-6))));
    assert_eq!(worker.live.load(), of(6), "12 are booked, 6 of them are not there");
    assert_eq!([0, 1].map(|rank| worker.rank_load(rank, true)), [of(4), of(4)], "4 of ours just began");
    worker.live.set_correction(Some(&Correction::of_whole(of(-12))));
    assert_eq!(worker.live.load(), of(4));
    for _ in 0..2 {
        worker.live.turn();
    }
    assert!(worker.live.load().is_zero(), "nothing was heard of them for long");
    worker.live.set_correction(Some(&Correction::of_whole(of(-6))));
    assert_eq!([0, 1].map(|rank| worker.rank_load(rank, true)), [of(2), of(4)]);
    assert_eq!(worker.rank_load(0, false), of(4), "it may be for the peers' sake, who do not count");
    worker.live.set_correction(Some(&Correction::of_whole(of(6))));
    assert_eq!([0, 1].map(|rank| worker.rank_load(rank, true)), [of(7), of(11)], "more may be anywhere");
    worker.live.set_correction(None);
    assert_eq!([0, 1].map(|rank| worker.rank_load(rank, true)), [of(4), of(8)]);
    drop(held);
}

#[test]
fn what_is_held_beyond_what_is_booked_ends_with_the_last_request() {
    let worker = view(vec![record("w", 100)]).workers[0].clone();
    let more = |requests| LoadSum { requests, prefill_tokens: 0, decode_blocks: 40 };
    let booked = LoadSum { requests: 1, prefill_tokens: 100, decode_blocks: 10 };
    worker.live.set_peers([(0, booked)].into_iter());
    worker.live.set_correction(Some(&Correction::of_whole(more(0))));
    let both = LoadSum { decode_blocks: 50, ..booked };
    assert_eq!((worker.live.load(), worker.rank_load(0, true)), (both, both));
    worker.live.set_peers([].into_iter());
    assert!(worker.live.load().is_zero() && worker.rank_load(0, true).is_zero());
    worker.live.set_correction(Some(&Correction::of_whole(more(2))));
    assert_eq!((worker.live.load(), worker.rank_load(0, true)), (more(2), more(2)), "requests of others");
}

#[test]
fn a_correction_of_a_rank_counts_there_and_nowhere_else() {
    let of = |requests| LoadSum { requests, prefill_tokens: 100 * requests, decode_blocks: 10 * requests };
    let mut record = record("w", 100);
    record.spec.dp_ranks = 3;
    let worker = view(vec![record]).workers[0].clone();
    let bookings = super::book::Bookings::new(|| {});
    let share = |rank| super::book::Share { rank, prefill_tokens: 100, decode_blocks: 10, chain: None };
    let mut ours = bookings.book_share(worker.clone(), share(0));
    worker.live.set_peers([(0, of(7)), (1, of(8))].into_iter());
    let seen = |peers_count| [0, 1, 2].map(|rank| worker.rank_load(rank, peers_count));
    let correct = |whole, ranks: &[(u32, i64)]| {
        let ranks = ranks.iter().map(|(rank, requests)| (*rank, of(*requests))).collect();
        worker.live.set_correction(Some(&Correction { whole: of(whole), ranks }));
    };
    // What rank 1 lacks, rank 2 has.
    correct(0, &[(1, -5), (2, 5)]);
    assert_eq!((seen(true), worker.live.load()), ([of(8), of(3), of(5)], of(16)));
    assert_eq!(seen(false), [of(1), of(0), of(5)], "peers who do not count lack nothing");
    // Ours certainly runs, on its own rank only.
    correct(-16, &[(0, -8), (1, -8)]);
    assert_eq!((seen(true), worker.live.load()), ([of(1), of(0), of(0)], of(1)));
    for _ in 0..2 {
        worker.live.turn();
        assert_eq!(worker.rank_certain(1), of(0));
    }
    assert_eq!((seen(true)[0], worker.live.load()), (of(0), of(0)), "nothing was heard of it for long");
    ours.heard();
    assert_eq!((seen(true)[0], worker.live.load()), (of(1), of(1)));
    // Too little on each rank to be told of it by itself.
    correct(6, &[]);
    assert_eq!(seen(true), [of(10), of(10), of(2)]);
    drop(ours);
}
