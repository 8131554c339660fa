//! The simulation as a whole: the same twice, complete, and what policies are worth in it.

use super::cache::BlockCache;
use super::engine::{Engine, EngineModel, Outcome};
use super::generate::{Kind, generate};
use super::simulate::{Options, Router, simulate};
use super::stats::{Done, Run, quantile};
use super::trace::{Request, requests};
use crate::routing::policy::POLICY_NAMES;

const BLOCK: u32 = 64;

fn options() -> Options {
    Options {
        workers: 4,
        blocks: 8_000,
        routers: 1,
        lag: 0.01,
        speed: 0.5,
        seed: 3,
        engine: EngineModel::new(BLOCK),
    }
}

fn trace(kind: Kind, count: usize) -> Vec<Request> {
    requests(generate(kind, count, BLOCK, 5), BLOCK)
}

fn run(trace: &[Request], options: &Options, policy: &str) -> Run {
    simulate(trace, options, Router::Policy(policy)).unwrap()
}

#[test]
fn every_request_ends_once_whatever_the_policy_and_however_many_replicas() {
    let trace = trace(Kind::Bursts, 400);
    for policy in POLICY_NAMES {
        for routers in [1, 3] {
            let run = run(&trace, &Options { routers, ..options() }, policy);
            assert_eq!(run.requests.len(), trace.len());
            for (done, asked) in run.requests.iter().zip(&trace) {
                assert!(done.ttft.is_some_and(|ttft| ttft > 0.0), "{policy}: {done:?}");
                assert_eq!(done.itl.is_some(), asked.output > 1);
                assert!(done.prompt == asked.input && done.cached < done.prompt, "{policy}: {done:?}");
            }
        }
    }
}

#[test]
fn equal_seeds_give_equal_runs_and_others_do_not() {
    let trace = trace(Kind::Agents, 300);
    for policy in ["random", "kv_cost", "kv_cost:temperature=0.5"] {
        let options = Options { routers: 2, ..options() };
        let first = run(&trace, &options, policy);
        assert_eq!(first, run(&trace, &options, policy), "{policy}");
        assert_ne!(first, run(&trace, &Options { seed: 4, ..options }, policy), "{policy}");
    }
}

#[test]
fn kv_cost_beats_round_robin_on_every_kind_of_traffic() {
    for (name, kind) in Kind::ALL {
        let trace = trace(kind, 1_000);
        let of = |policy| run(&trace, &options(), policy).summary(None);
        let (blind, aware) = (of("round_robin"), of("kv_cost"));
        assert!(aware.mean_ttft_s < 0.95 * blind.mean_ttft_s, "{name}: {aware:?} {blind:?}");
        assert!(aware.hit_rate >= blind.hit_rate, "{name}: {aware:?} {blind:?}");
        if matches!(kind, Kind::Agents | Kind::Chat | Kind::Rag) {
            assert!(aware.hit_rate > 1.1 * blind.hit_rate, "{name}: {aware:?} {blind:?}");
        }
    }
}

#[test]
fn three_replicas_are_nearly_as_good_as_one() {
    let trace = trace(Kind::Agents, 1_500);
    let one = run(&trace, &options(), "kv_cost").summary(None);
    let three = run(&trace, &Options { routers: 3, ..options() }, "kv_cost").summary(None);
    assert!(three.hit_rate > 0.97 * one.hit_rate, "{three:?} {one:?}");
    assert!(three.mean_ttft_s < 1.1 * one.mean_ttft_s, "{three:?} {one:?}");
}

#[test]
fn one_pooled_cache_hits_as_often_as_unlimited_caches_would() {
    let trace = trace(Kind::Rag, 500);
    let options = Options { blocks: 1 << 30, ..options() };
    let pooled = simulate(&trace, &options, Router::Pooled).unwrap();
    let alone = run(&trace, &Options { workers: 1, speed: 0.01, ..options }, "random");
    assert!(
        (pooled.hit_rate() - alone.hit_rate()).abs() < 0.02,
        "{} {}",
        pooled.hit_rate(),
        alone.hit_rate()
    );
}

#[test]
fn a_prompt_that_fits_into_no_cache_fails_and_holds_up_nobody() {
    let mut trace = trace(Kind::Uniform, 50);
    trace[10].input = 9_000 * BLOCK;
    trace[10].ids = (0..9_000).collect();
    let options = Options { routers: 2, ..options() };
    let summary = run(&trace, &options, "kv_cost").summary(None);
    assert_eq!((summary.errors, summary.requests), (1, 50));
}

#[test]
fn options_out_of_bounds_and_unknown_policies_are_refused() {
    let trace = trace(Kind::Chat, 10);
    for (wrong, word) in [
        (Options { workers: 0, ..options() }, "workers"),
        (Options { workers: 257, ..options() }, "workers"),
        (Options { routers: 65, ..options() }, "routers"),
        (Options { blocks: 0, ..options() }, "blocks"),
        (Options { lag: -1.0, ..options() }, "lag"),
        (Options { speed: f64::NAN, ..options() }, "speed"),
    ] {
        let error = simulate(&trace, &wrong, Router::Pooled).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    let error = simulate(&trace, &options(), Router::Policy("fastest")).unwrap_err();
    assert!(POLICY_NAMES.iter().all(|name| error.contains(name)), "{error}");
}

fn asked(input: u32, output: u32) -> Request {
    let ids = (0..u64::from(input.div_ceil(BLOCK))).collect();
    let mut line = requests(
        vec![super::trace::Line {
            timestamp: 0.0,
            input_length: input,
            output_length: output,
            hash_ids: ids,
        }],
        BLOCK,
    );
    line.remove(0)
}

#[test]
fn a_step_takes_as_long_as_the_model_says() {
    let model = EngineModel::new(BLOCK);
    let (trace, mut cache) = ([asked(12_000, 3)], BlockCache::new(1_000));
    let mut engine = Engine::new(model);
    engine.push(0);
    let (mut refused, mut outcomes, mut times) = (Vec::new(), Vec::new(), Vec::new());
    while let Some(time) = engine.begin(&trace, &mut cache, &mut refused) {
        engine.end(&trace, &mut cache, &mut outcomes);
        times.push(time);
    }
    let step = |tokens: f64, context: f64| {
        0.008 + 30e-6 + tokens / 12_000.0 * (1.0 + (context + tokens / 2.0) / 53_000.0)
    };
    let decode = |context: f64| 0.008 + 30e-6 + 24e-9 * context;
    let expected = [step(8192.0, 0.0), step(3808.0, 8192.0), decode(12_001.0), decode(12_002.0)];
    assert_eq!(times.len(), expected.len());
    for (time, expected) in times.iter().zip(expected) {
        assert!((time - expected).abs() < 1e-9, "{times:?}");
    }
    assert_eq!(outcomes, [Outcome::FirstToken { request: 0, cached: 0 }, Outcome::Ended { request: 0 }]);
    assert!(engine.is_idle() && cache.in_use() == 0 && refused.is_empty());
}

#[test]
fn a_prompt_asked_again_is_cached_but_for_its_last_token_or_part() {
    let model = EngineModel::new(BLOCK);
    let (trace, mut cache) = ([asked(640, 1), asked(640, 1), asked(700, 1)], BlockCache::new(1_000));
    for (request, expected) in [(0, 0), (1, 576), (2, 640)] {
        let mut engine = Engine::new(model);
        engine.push(request);
        let mut outcomes = Vec::new();
        assert!(engine.begin(&trace, &mut cache, &mut Vec::new()).is_some());
        engine.end(&trace, &mut cache, &mut outcomes);
        assert_eq!(outcomes[0], Outcome::FirstToken { request, cached: expected });
    }
}

#[test]
fn figures_are_of_all_requests_and_failures_are_counted() {
    let done = |ttft, cached| Done { at: 0.0, ttft, itl: Some(0.5), prompt: 10, cached };
    let requests = vec![done(Some(1.0), 5), done(None, 10), done(Some(3.0), 0)];
    let summary = Run { requests, spread: Vec::new(), seconds: 1.0 }.summary(Some(0.5));
    assert_eq!((summary.requests, summary.errors, summary.mean_ttft_s), (3, 1, 2.0));
    assert_eq!((summary.hit_rate, summary.hit_rate_of_bound), (0.25, Some(0.5)));
    let sorted: Vec<f64> = (1..=100).map(f64::from).collect();
    assert_eq!((quantile(&sorted, 0.5), quantile(&sorted, 0.99), quantile(&[], 0.5)), (50.0, 99.0, 0.0));
}
