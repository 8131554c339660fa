//! Policies that look at prefixes and sessions, and the cost, against plain expectations.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::ids::WorkerIx;
use crate::kv::types::RankIx;
use crate::routing::breaker::BreakerOptions;
use crate::routing::cost::choose;
use crate::routing::select::{Filtered, Limits, NoWorker, Overload, Selection, explain, select};
use crate::routing::view::{RegistryView, WorkerLive};
use crate::state::worker::{Liveness, WorkerRecord, WorkerRole, WorkerSource, WorkerSpec};

fn worker(n: u32, dp_ranks: u32, weight: u32) -> Arc<WorkerView> {
    let spec = WorkerSpec {
        id: WorkerId(format!("w{n:03}").into()),
        url: format!("http://w{n}:1"),
        engine: Default::default(),
        models: Vec::new(),
        role: WorkerRole::Aggregated,
        transfer: Default::default(),
        dp_ranks,
        block_size: Some(16),
        capacity_blocks: Some(1000),
        labels: BTreeMap::from([("zone".to_owned(), if n == 0 { "a" } else { "b" }.to_owned())]),
        weight,
        http2: false,
        max_requests: None,
        owner: None,
        source: WorkerSource::Admin,
    };
    let record = WorkerRecord {
        spec,
        drain: false,
        online: true,
        liveness: Liveness::Probe,
        last_heard_ms: 0,
        generation: 1,
        ix: WorkerIx(n),
        failed_by: Default::default(),
    };
    let ranks = (0..dp_ranks).map(|rank| RankIx(n * dp_ranks + rank)).collect();
    let live = Arc::<WorkerLive>::default();
    live.set_ranks(ranks);
    Arc::new(WorkerView { record, live })
}

fn view(workers: u32) -> RegistryView {
    RegistryView::new(1, (0..workers).map(|n| worker(n, 1, 100)).collect())
}

fn load(view: &RegistryView, at: usize, requests: i64, prefill_tokens: i64, decode_blocks: i64) {
    view.workers[at].live.peers.set(LoadSum { requests, prefill_tokens, decode_blocks });
}

fn holds(rank: u32, blocks: u32) -> Overlap {
    Overlap { rank: RankIx(rank), blocks, gpu: blocks, host: 0 }
}

const LIMITS: Limits = Limits {
    now_ms: 1,
    breaker: BreakerOptions { failures: 5, open_ms: 1000, max_open_ms: 1000 },
    max_requests: 1_000_000,
    overload: Overload { prefill_tokens: None, kv_share: None },
};

fn choice(view: &RegistryView, policy: &str, request: &RouteRequest<'_>) -> Result<Selection, NoWorker> {
    let policy = from_spec(policy).unwrap();
    select(view, policy.as_ref(), request, &LIMITS, &[], &mut StdRng::seed_from_u64(9))
}

fn chosen(view: &RegistryView, policy: &str, request: &RouteRequest<'_>) -> u32 {
    choice(view, policy, request).unwrap().worker.record.ix.0
}

#[test]
fn kv_cost_goes_to_the_prefix_until_the_queue_there_costs_more() {
    let view = view(3);
    let overlaps = [holds(1, 60)];
    let request = RouteRequest { prompt_tokens: 1600, overlaps: &overlaps, ..RouteRequest::default() };
    assert_eq!(chosen(&view, "kv_cost", &request), 1);
    // 60 blocks of 16 tokens, weighed 3.3 times, are worth a queue of 3,168 tokens.
    load(&view, 1, 1, 3_000, 0);
    assert_eq!(chosen(&view, "kv_cost", &request), 1);
    load(&view, 1, 1, 3_400, 0);
    assert_ne!(chosen(&view, "kv_cost", &request), 1);
    assert_eq!(chosen(&view, "kv_cost:weight=5", &request), 1);
    let overrides = Overrides::new(Some(5.0), None, None).unwrap();
    assert_eq!(chosen(&view, "kv_cost", &RouteRequest { overrides, ..request }), 1);
}

#[test]
fn blocks_that_are_only_coming_save_their_time_and_no_more() {
    let view = view(2);
    let predicted = [holds(0, 40)];
    let coming = RouteRequest { prompt_tokens: 800, predicted: &predicted, ..RouteRequest::default() };
    load(&view, 0, 1, 600, 0);
    assert_eq!(chosen(&view, "kv_cost", &coming), 0);
    let selection = choice(&view, "kv_cost", &coming).unwrap();
    assert_eq!((selection.coming, selection.to_book(800)), (40, (160, 50)));
    load(&view, 0, 1, 700, 0);
    assert_eq!(chosen(&view, "kv_cost", &coming), 1, "40 blocks are worth a queue of 640 tokens");
    let held = RouteRequest { overlaps: &predicted, ..coming };
    assert_eq!(chosen(&view, "kv_cost", &held), 0, "what is held already is worth more");
    let partly = [holds(0, 39)];
    assert_eq!(choice(&view, "kv_cost", &RouteRequest { overlaps: &partly, ..coming }).unwrap().coming, 1);
}

#[test]
fn slower_tiers_are_worth_less() {
    let view = view(2);
    let overlaps = [
        Overlap { rank: RankIx(0), blocks: 40, gpu: 0, host: 40 },
        Overlap { rank: RankIx(1), blocks: 31, gpu: 31, host: 0 },
    ];
    let request = RouteRequest { prompt_tokens: 800, overlaps: &overlaps, ..RouteRequest::default() };
    assert_eq!(chosen(&view, "kv_cost", &request), 1);
    assert_eq!(chosen(&view, "kv_cost:host=0.8", &request), 0);
}

#[test]
fn what_is_booked_is_what_is_not_cached() {
    let view = view(1);
    let overlaps = [Overlap { rank: RankIx(0), blocks: 7, gpu: 5, host: 2 }];
    let request = RouteRequest { prompt_tokens: 120, overlaps: &overlaps, ..RouteRequest::default() };
    let selection = choice(&view, "kv_cost", &request).unwrap();
    assert_eq!(
        (selection.to_book(120), selection.to_book(80), selection.to_book(0)),
        ((40, 8), (1, 5), (0, 0))
    );
}

#[test]
fn a_stale_view_spreads_and_a_very_stale_one_forgets_the_peers() {
    let view = view(3);
    load(&view, 0, 1, 1600, 0);
    load(&view, 1, 1, 1700, 0);
    load(&view, 2, 1, 160_000, 0);
    let policy = by_name("kv_cost").unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let mut seen = |age: u64| {
        let request = RouteRequest { prompt_tokens: 160, view_age_ms: age, ..RouteRequest::default() };
        let mut counts = [0; 3];
        for _ in 0..300 {
            let chosen = select(&view, policy.as_ref(), &request, &LIMITS, &[], &mut rng).unwrap();
            counts[chosen.worker.record.ix.0 as usize] += 1;
        }
        counts
    };
    assert_eq!(seen(0), [300, 0, 0]);
    let spread = seen(200);
    assert!(spread[0] > 100 && spread[1] > 100 && spread[2] == 0, "{spread:?}");
    assert!(seen(501).iter().all(|count| *count > 50));
}

#[test]
fn every_rank_is_a_candidate_of_its_own() {
    let view = RegistryView::new(1, vec![worker(0, 4, 100), worker(1, 4, 100)]);
    let overlaps = [holds(6, 50)];
    let request = RouteRequest { prompt_tokens: 900, overlaps: &overlaps, ..RouteRequest::default() };
    let selection = choice(&view, "kv_cost", &request).unwrap();
    assert_eq!((selection.worker.record.ix.0, selection.rank, selection.candidates), (1, 2, 8));
    let bookings = crate::routing::book::Bookings::new(|| {});
    let booking = bookings.book_share(
        selection.worker,
        crate::routing::book::Share { rank: 2, prefill_tokens: 100_000, decode_blocks: 60, chain: None },
    );
    assert_ne!(choice(&view, "kv_cost", &request).unwrap().rank, 2);
    assert_eq!(view.workers[1].rank_load(2, true).prefill_tokens, 100_000);
    assert_eq!(view.workers[1].rank_load(3, true).prefill_tokens, 0);
    drop(booking);
    assert_eq!(view.workers[1].rank_load(2, true), LoadSum::default());
    let peers = |tokens| LoadSum { requests: 1, prefill_tokens: tokens, decode_blocks: 1 };
    let seen = |rank| view.workers[1].rank_load(rank, true).prefill_tokens;
    let told = [(0, peers(100)), (2, peers(500)), (2, peers(7))];
    for (loads, expected) in
        [(&told[..1], [100, 0, 0, 0]), (&told, [100, 0, 507, 0]), (&told[1..], [0, 0, 507, 0])]
    {
        view.workers[1].live.set_peers(loads.iter().copied());
        assert_eq!([0, 1, 2, 3].map(seen), expected);
        let total = view.workers[1].live.load();
        assert_eq!(total.prefill_tokens, expected.iter().sum::<i64>());
    }
    assert_eq!(view.workers[1].rank_load(2, false).prefill_tokens, 0);
}

#[test]
fn cache_aware_follows_the_rule_of_the_sglang_router() {
    let view = view(3);
    let overlaps = [holds(1, 40), holds(2, 60)];
    let request = RouteRequest { prompt_tokens: 1600, overlaps: &overlaps, ..RouteRequest::default() };
    load(&view, 2, 20, 0, 0);
    load(&view, 1, 5, 0, 0);
    assert_eq!(chosen(&view, "cache_aware", &request), 2, "60 of 100 blocks are enough");
    assert_eq!(chosen(&view, "cache_aware:cache_threshold=0.7", &request), 0, "too few: the shortest queue");
    load(&view, 2, 33, 0, 0);
    assert_eq!(chosen(&view, "cache_aware", &request), 0, "33 more than none is unbalanced");
    assert_eq!(chosen(&view, "cache_aware:balance_abs_threshold=40", &request), 2);
}

#[test]
fn prefix_hash_keeps_beginnings_together_within_its_bound() {
    let view = view(4);
    let hashes: Vec<SequenceHash> = (0..300).map(SequenceHash).collect();
    let other: Vec<SequenceHash> = (0..128).chain(900..950).map(SequenceHash).collect();
    let ask = |hashes| RouteRequest { prompt_tokens: 3000, hashes, ..RouteRequest::default() };
    let home = chosen(&view, "prefix_hash", &ask(&hashes));
    assert_eq!(chosen(&view, "prefix_hash", &ask(&other)), home, "the first 2,048 tokens are equal");
    for at in 0..4 {
        load(&view, at, 10, 0, 0);
    }
    assert_eq!(chosen(&view, "prefix_hash", &ask(&hashes)), home);
    // 44 requests and this one are 11.25 each; 1.25 times that is 14.06, so 15 with this one.
    load(&view, home as usize, 15, 0, 0);
    assert_ne!(chosen(&view, "prefix_hash", &ask(&hashes)), home);
    assert_eq!(chosen(&view, "prefix_hash:load_factor=2", &ask(&hashes)), home);
}

#[test]
fn bounded_load_stays_bounded_when_all_ask_the_same() {
    let view = view(5);
    let hashes = [SequenceHash(1)];
    let request = RouteRequest { prompt_tokens: 16, hashes: &hashes, ..RouteRequest::default() };
    let mut counts = [0_i64; 5];
    for sent in 1..=500_i64 {
        let to = chosen(&view, "prefix_hash", &request) as usize;
        counts[to] += 1;
        load(&view, to, counts[to], 0, 0);
        let most = (1.25 * sent as f64 / 5.0).ceil() as i64;
        assert!(counts.iter().all(|count| *count <= most), "{counts:?} after {sent}");
    }
    assert!(counts.contains(&125), "the key's home is full: {counts:?}");
}

#[test]
fn a_session_moves_only_when_its_worker_goes_or_a_new_one_wins_it() {
    let (before, after) = (view(10), view(11));
    let at = |view: &RegistryView, session| {
        chosen(view, "consistent_hash", &RouteRequest { session: Some(session), ..RouteRequest::default() })
    };
    let mut moved = 0;
    let mut shares = [0; 10];
    for session in 0..4_000 {
        let (was, is) = (at(&before, session), at(&after, session));
        shares[was as usize] += 1;
        if was != is {
            assert_eq!(is, 10, "moved to the new one only");
            moved += 1;
        }
    }
    assert!((250..480).contains(&moved), "an eleventh of 4,000, not {moved}");
    assert!(shares.iter().all(|share| (300..500).contains(share)), "{shares:?}");
}

#[test]
fn a_bound_session_stays_when_a_worker_joins_and_moves_when_its_own_may_not_be_chosen() {
    let (before, after) = (view(10), view(11));
    let session = (0..).find(|session| {
        let request = RouteRequest { session: Some(*session), ..RouteRequest::default() };
        chosen(&before, "consistent_hash", &request) != chosen(&after, "consistent_hash", &request)
    });
    let unbound = RouteRequest { session, ..RouteRequest::default() };
    let home = chosen(&before, "consistent_hash", &unbound);
    let bound =
        |view: &RegistryView| Some(view.workers.iter().find(|w| w.record.ix.0 == home).unwrap().record.ix);
    let request = RouteRequest { bound: bound(&after), ..unbound };
    assert_eq!(chosen(&after, "consistent_hash", &request), home, "though the new one draws more");
    let elsewhere = chosen(&after, "consistent_hash", &RouteRequest { bound: Some(WorkerIx(99)), ..unbound });
    assert_eq!(elsewhere, 10, "a worker that is not there binds nobody");
}

#[test]
fn sessions_are_shared_out_by_weight_and_requests_without_one_go_to_the_shortest_queue() {
    let view = RegistryView::new(1, vec![worker(0, 1, 100), worker(1, 1, 300)]);
    let at = |session| {
        chosen(&view, "consistent_hash", &RouteRequest { session: Some(session), ..RouteRequest::default() })
    };
    let heavy = (0..4000).filter(|session| at(*session) == 1).count();
    assert!((2850..3150).contains(&heavy), "{heavy}");
    load(&view, 1, 9, 0, 0);
    assert_eq!(chosen(&view, "consistent_hash", &RouteRequest::default()), 0);
}

#[test]
fn pins_labels_and_thresholds_leave_others_out_and_say_so() {
    let view = view(3);
    let two = WorkerId("w002".into());
    let pin = |rank| RouteRequest { pinned: Some(Pin { worker: &two, rank }), ..RouteRequest::default() };
    assert_eq!(chosen(&view, "kv_cost", &pin(None)), 2);
    assert_eq!(chosen(&view, "kv_cost", &pin(Some(0))), 2);
    let refusal = choice(&view, "kv_cost", &pin(Some(1))).unwrap_err();
    assert!(refusal.to_string().contains("another worker or rank was asked for"), "{refusal}");
    let labelled = RouteRequest { labels: &[("zone", "a")], ..RouteRequest::default() };
    assert_eq!(chosen(&view, "random", &labelled), 0);
    let refusal =
        choice(&view, "random", &RouteRequest { labels: &[("zone", "c")], ..labelled }).unwrap_err();
    assert!(matches!(&refusal, NoWorker::AllFiltered { reasons, .. } if reasons[0].1 == Filtered::Label));
    // By thresholds, too; but where all are over them, all may be chosen.
    let limits = Limits { overload: Overload { prefill_tokens: Some(100), kv_share: Some(0.5) }, ..LIMITS };
    load(&view, 0, 1, 101, 0);
    load(&view, 1, 1, 0, 501);
    let policy = by_name("round_robin").unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let mut pick = || {
        let request = RouteRequest::default();
        select(&view, policy.as_ref(), &request, &limits, &[], &mut rng).unwrap().candidates
    };
    assert_eq!(pick(), 1);
    let cost = by_name("kv_cost").unwrap();
    let explained = explain(&view, cost.as_ref(), &pin(None), &limits, &[], None).unwrap();
    let why: Vec<Option<Filtered>> = explained.iter().map(|e| e.filtered).collect();
    assert_eq!(why, [Some(Filtered::Pinned), Some(Filtered::Pinned), None]);
    let explained = explain(&view, cost.as_ref(), &RouteRequest::default(), &limits, &[], None).unwrap();
    let why: Vec<Option<Filtered>> = explained.iter().map(|e| e.filtered).collect();
    assert_eq!(why, [Some(Filtered::Overloaded), Some(Filtered::Overloaded), None]);
    load(&view, 2, 1, 101, 0);
    assert_eq!(pick(), 3);
}

#[test]
fn an_explanation_has_the_terms_that_the_choice_is_made_by() {
    let view = view(3);
    load(&view, 0, 2, 320, 40);
    let overlaps = [holds(0, 10), holds(2, 3)];
    let request = RouteRequest { prompt_tokens: 320, overlaps: &overlaps, ..RouteRequest::default() };
    let policy = by_name("kv_cost").unwrap();
    let explained = explain(&view, policy.as_ref(), &request, &LIMITS, &[], None).unwrap();
    let totals: Vec<f64> = explained.iter().map(|e| e.terms.unwrap().total()).collect();
    let least = totals.iter().copied().fold(f64::INFINITY, f64::min);
    let at = totals.iter().position(|total| *total == least).unwrap();
    assert_eq!(chosen(&view, "kv_cost", &request), at as u32);
    let terms = explained[0].terms.unwrap();
    assert!((terms.queued - 20.0).abs() < 1e-9 && (terms.decode - 0.07 * 42.0).abs() < 1e-9, "{terms:?}");
    assert!((terms.prompt - 66.0).abs() < 1e-9 && (terms.credit - 33.0).abs() < 1e-9, "{terms:?}");
    let blind = by_name("random").unwrap();
    assert!(explain(&view, blind.as_ref(), &request, &LIMITS, &[], None).unwrap()[0].terms.is_none());
}

/// Why the rank at `other` came behind the one at `best`.
fn behind(view: &RegistryView, spec: &str, request: &RouteRequest<'_>, best: usize, other: usize) -> String {
    let policy = from_spec(spec).unwrap();
    let id = view.workers[best].id().clone();
    let explained = explain(view, policy.as_ref(), request, &LIMITS, &[], Some((&id, 0))).unwrap();
    assert_eq!(explained[best].behind, None, "{spec}");
    explained[other].behind.clone().unwrap_or_default()
}

#[test]
fn every_policy_says_why_another_one_came_behind() {
    let view = view(3);
    load(&view, 1, 3, 160, 20);
    let overlaps = [holds(0, 10), holds(2, 8)];
    let plain = RouteRequest { prompt_tokens: 160, overlaps: &overlaps, ..RouteRequest::default() };
    let (chain, session) = ([SequenceHash(7)], Some(7));
    let hashed = RouteRequest { hashes: &chain, ..plain };
    let bound = RouteRequest { session, bound: Some(WorkerIx(0)), ..plain };
    let gone = RouteRequest { session, bound: Some(WorkerIx(9)), ..plain };
    let of_session = RouteRequest { session, ..plain };
    for (spec, request, other, why) in [
        ("kv_cost", &plain, 2, "costs 6.6 more than w000"),
        ("kv_cost:temperature=1", &plain, 2, "costs 6.6 more than w000, and chance took part (temperature)"),
        ("cache_aware", &plain, 2, "holds 32 tokens of the prompt fewer than w000"),
        (
            "cache_aware:cache_threshold=1",
            &plain,
            1,
            "nobody holds over 100 % of the prompt (cache_threshold): has 3 requests and w000 0, which is fewer",
        ),
        (
            "cache_aware:balance_abs_threshold=2",
            &plain,
            2,
            "queues are unbalanced, fewest requests win: has as few requests as w000, which chance chose",
        ),
        ("prefix_hash", &plain, 1, "the prompt has no full block to go by: has 3 requests and w000 0"),
        ("prefix_hash", &hashed, 1, "over load_factor: with this one it has more than 1.25 times"),
        ("prefix_hash", &hashed, 2, "the prompt's beginning belongs to w000"),
        ("consistent_hash", &plain, 1, "the request names no session: has 3 requests"),
        ("consistent_hash", &bound, 1, "the session is bound to w000"),
        ("consistent_hash", &gone, 1, "the session's worker cannot take it, and w000 drew higher"),
        ("consistent_hash", &of_session, 1, "w000 drew higher for the session"),
        ("least_loaded", &plain, 1, "has 33.0 blocks of work more than w000"),
        ("least_loaded", &plain, 2, "has as little to do as w000, which chance chose"),
        ("power_of_two", &plain, 1, "has 33.0 blocks of work more than w000, or was not one of the two"),
        ("power_of_two", &plain, 2, "was not drawn beside w000"),
        ("round_robin", &plain, 1, "it was the turn of w000"),
        ("random", &plain, 1, "chance chose w000"),
    ] {
        let told = behind(&view, spec, request, 0, other);
        assert!(told.starts_with(why), "{spec}: {told:?} is not {why:?}");
    }
}

#[test]
fn specs_and_overrides_are_checked_and_errors_say_what_is_known() {
    for good in [
        "kv_cost:weight=4,temperature=0.1",
        "cache_aware:cache_threshold=0.3",
        "random",
        "prefix_hash:tokens=256",
    ] {
        assert!(from_spec(good).is_ok(), "{good}");
    }
    for (bad, word) in [
        ("fastest", "kv_cost, cache_aware, prefix_hash"),
        ("kv_cost:wait=4", "it has weight, queue, coming, decode"),
        ("kv_cost:weight", "key=value"),
        ("kv_cost:weight=x", "not a number"),
        ("kv_cost:weight=-1", "0 to 1000"),
        ("kv_cost:host=2", "0 to 1"),
        ("kv_cost:temperature=inf", "not a number"),
        ("cache_aware:cache_threshold=2", "0 to 1"),
        ("cache_aware:balance_rel_threshold=0", "at least 1"),
        ("prefix_hash:load_factor=0.5", "1 to 1000"),
        ("random:x=1", "no parameter"),
    ] {
        let error = from_spec(bad).err().unwrap_or_default();
        assert!(error.contains(word), "{bad}: {error}");
    }
    assert!(Overrides::new(Some(f64::NAN), None, None).is_err());
    assert!(Overrides::new(None, Some(101.0), None).is_err());
    assert!(Overrides::new(None, None, Some("x")).unwrap_err().contains("round_robin"));
    assert_eq!(Overrides::new(None, None, Some("random")).unwrap().policy(), Some("random"));
}

#[test]
fn a_temperature_spreads_choices_and_prefers_the_cheap() {
    let mut rng = StdRng::seed_from_u64(2);
    let mut counts = [0; 3];
    for _ in 0..3000 {
        counts[choose(&[0.0, 50.0, 100.0], 0.5, 0.0, &mut rng)] += 1;
    }
    assert!(counts[0] > counts[1] && counts[1] > counts[2] && counts[2] > 100, "{counts:?}");
    assert_eq!(choose(&[f64::NAN, 1.0], 0.0, 0.0, &mut rng), 1);
}

fn input() -> impl Strategy<Value = CostInput> {
    let overlap = (0_u32..50, 0_u32..50, 0_u32..50);
    let rest = (0_u32..50, 1_u32..3000, 1_u32..64, 0_u64..100_000, 0_u64..10_000, 0_u64..500, 1_u32..1000);
    (overlap, rest).prop_map(
        |((gpu, host, disk), (coming, prompt, block, prefill, decode, requests, weight))| CostInput {
            overlap: Overlap { rank: RankIx(0), blocks: gpu + host + disk, gpu, host },
            coming,
            prompt_tokens: prompt,
            block_size: block,
            active_prefill_tokens: prefill,
            active_decode_blocks: decode,
            requests,
            weight,
        },
    )
}

proptest! {
    #[test]
    fn more_overlap_never_costs_more_and_more_load_never_less(input in input(), more in 1_u32..100) {
        let options = CostOptions::default();
        let cost = |input: CostInput| options.terms(&input).total();
        let base = cost(input);
        prop_assert!(base.is_finite() && base >= 0.0);
        let longer = |gpu: u32, host: u32, disk: u32| {
            let o = input.overlap;
            let blocks = o.blocks + gpu + host + disk;
            cost(CostInput { overlap: Overlap { blocks, gpu: o.gpu + gpu, host: o.host + host, ..o }, ..input })
        };
        prop_assert!(longer(more, 0, 0) <= longer(0, more, 0));
        prop_assert!(longer(0, more, 0) <= longer(0, 0, more));
        prop_assert!(longer(0, 0, more) <= base + 1e-9);
        let brought = CostInput { coming: input.coming + more, ..input };
        prop_assert!(cost(brought) <= base);
        let more = u64::from(more);
        let queued = CostInput { active_prefill_tokens: input.active_prefill_tokens + more, ..input };
        let held = CostInput { active_decode_blocks: input.active_decode_blocks + more, ..input };
        let busy = CostInput { requests: input.requests + more, ..input };
        for worse in [queued, held, busy] {
            prop_assert!(cost(worse) > base);
        }
        let faster = CostInput { weight: input.weight + 1, ..input };
        prop_assert!(cost(faster) <= base);
    }

    #[test]
    fn the_choice_does_not_depend_on_the_order_of_candidates(
        costs in prop::collection::hash_set(0_u32..1000, 1..20),
        turn in 0_usize..20,
        seed in any::<u64>(),
    ) {
        let costs: Vec<f64> = costs.into_iter().map(f64::from).collect();
        let mut turned = costs.clone();
        turned.rotate_left(turn % costs.len());
        let mut rng = StdRng::seed_from_u64(seed);
        let (one, other) = (choose(&costs, 0.0, 0.0, &mut rng), choose(&turned, 0.0, 0.0, &mut rng));
        prop_assert_eq!(costs[one], turned[other]);
        // Whatever the temperature and the tolerance: one of them, and within the tolerance.
        let warm = choose(&costs, 0.7, 0.0, &mut rng);
        prop_assert!(warm < costs.len());
        let near = choose(&costs, 0.0, 0.3, &mut rng);
        prop_assert!(costs[near] <= 1.3 * costs[one] + 1e-9);
    }

    #[test]
    fn hashed_policies_do_not_depend_on_the_order_of_candidates(session in any::<u64>(), turn in 0_usize..7) {
        let workers: Vec<Arc<WorkerView>> = (0..7).map(|n| worker(n, 1, 100 + n)).collect();
        let candidate = |worker| Candidate { worker, rank: 0, load: LoadSum::default(), overlap: Overlap::default(), coming: 0, seen: LoadSum::default() };
        let candidates: Vec<Candidate<'_>> = workers.iter().map(candidate).collect();
        let mut turned = candidates.clone();
        turned.rotate_left(turn);
        let request = RouteRequest { session: Some(session), ..RouteRequest::default() };
        let mut rng = StdRng::seed_from_u64(0);
        for name in ["consistent_hash", "prefix_hash"] {
            let policy = by_name(name).unwrap();
            let one = policy.pick(&candidates, &request, &mut rng);
            let other = policy.pick(&turned, &request, &mut rng);
            prop_assert_eq!(candidates[one].worker.id(), turned[other].worker.id());
        }
    }
}
