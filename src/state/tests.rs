//! The state machines against what they promise: exactly once, leases, digests, round trips.

mod lives;

use proptest::prelude::*;

use super::cache::CacheState;
use super::command::{CacheCommand, CacheOutcome, ControlCommand, ControlOutcome, ReplicaInfo, Sign};
use super::control::ControlState;
use super::corrections::Correction;
use super::load::{LoadDelta, LoadSum};
use super::ranks::RankKey;
use super::replicated::{Applied, Replicated, State};
use super::worker::{Liveness, ServedModel, WorkerSource, WorkerSpec};
use crate::ids::{Group, Incarnation, ReplicaId, WorkerId, WorkerIx};
use crate::kv::feed::Cursor;
use crate::kv::hash::{LocalHash, Seed};
use crate::kv::types::{EngineHash, KvOp, Tier};
use crate::kv::wire;

const R1: ReplicaId = ReplicaId(1);
const R2: ReplicaId = ReplicaId(2);

fn spec(id: &str, source: WorkerSource) -> WorkerSpec {
    WorkerSpec {
        id: WorkerId::parse(id).unwrap(),
        url: format!("http://127.0.0.1:{}", 9000 + id.len()),
        engine: Default::default(),
        models: vec![],
        role: Default::default(),
        transfer: Default::default(),
        dp_ranks: 1,
        block_size: None,
        capacity_blocks: None,
        labels: Default::default(),
        weight: 100,
        http2: false,
        max_requests: None,
        owner: None,
        source,
    }
}

fn register(state: &mut ControlState, id: &str) {
    let outcome = state
        .apply(R1, ControlCommand::RegisterWorker { spec: spec(id, WorkerSource::Node), heartbeats: true });
    assert!(matches!(outcome, ControlOutcome::Registered { .. }), "{outcome:?}");
}

fn tick(state: &mut ControlState, elapsed_ms: u32, replicas: &[ReplicaId]) {
    state.apply(
        R1,
        ControlCommand::Tick {
            elapsed_ms,
            replicas: replicas.to_vec(),
            worker_timeout_ms: 5000,
            lease_ms: 1000,
        },
    );
}

fn up(state: &mut ControlState, id: ReplicaId) {
    let info = ReplicaInfo { name: format!("r{id}"), ..Default::default() };
    state.apply(id, ControlCommand::ReplicaUp { id, incarnation: Incarnation(1), info });
}

fn worker(state: &ControlState, id: &str) -> super::worker::WorkerRecord {
    state.workers()[&WorkerId::parse(id).unwrap()].clone()
}

#[test]
fn a_worker_goes_offline_after_its_timeout_and_comes_back_by_itself() {
    let mut state = ControlState::default();
    register(&mut state, "w");
    for _ in 0..11 {
        tick(&mut state, 500, &[R1]);
        assert!(worker(&state, "w").online, "not before the timeout and the tick it may have been late");
    }
    tick(&mut state, 500, &[R1]);
    assert!(!worker(&state, "w").online);
    let sign = |age_ms| {
        let heartbeats = vec![Sign { id: WorkerId::parse("w").unwrap(), age_ms }];
        ControlCommand::Heard { heartbeats, probed: vec![], failed: vec![] }
    };
    state.apply(R2, sign(100));
    assert!(worker(&state, "w").online);
    assert_eq!(worker(&state, "w").last_heard_ms, 5900);
    state.apply(R1, sign(1000));
    assert_eq!(worker(&state, "w").last_heard_ms, 5900, "older news changes nothing");
}

#[test]
fn a_probed_worker_that_every_live_replica_fails_to_reach_is_offline_at_once() {
    let mut state = ControlState::default();
    up(&mut state, R1);
    up(&mut state, R2);
    state.apply(
        R1,
        ControlCommand::RegisterWorker { spec: spec("w", WorkerSource::Config), heartbeats: false },
    );
    assert_eq!(worker(&state, "w").liveness, Liveness::Probe);
    let failed = |by| {
        (
            by,
            ControlCommand::Heard {
                heartbeats: vec![],
                probed: vec![],
                failed: vec![WorkerId::parse("w").unwrap()],
            },
        )
    };
    let (by, command) = failed(R1);
    state.apply(by, command);
    assert!(worker(&state, "w").online, "one replica's word is not enough");
    let (by, command) = failed(R2);
    state.apply(by, command);
    assert!(!worker(&state, "w").online);
}

#[test]
fn a_live_identity_cannot_be_taken_over_and_an_operators_worker_not_by_a_node() {
    let mut state = ControlState::default();
    register(&mut state, "w");
    let mut elsewhere = spec("w", WorkerSource::Node);
    elsewhere.url = "http://127.0.0.1:1".to_owned();
    let command = ControlCommand::RegisterWorker { spec: elsewhere, heartbeats: true };
    assert!(matches!(state.apply(R1, command.clone()), ControlOutcome::Refused(_)));
    (0..12).for_each(|_| tick(&mut state, 500, &[R1]));
    assert!(matches!(state.apply(R1, command), ControlOutcome::Registered { replaced: true, generation: 2 }));

    state.apply(
        R1,
        ControlCommand::RegisterWorker { spec: spec("op", WorkerSource::Admin), heartbeats: false },
    );
    let node = ControlCommand::RegisterWorker { spec: spec("op", WorkerSource::Node), heartbeats: true };
    assert!(matches!(state.apply(R1, node), ControlOutcome::Refused(_)));
    let gone = ControlCommand::RemoveWorker {
        id: WorkerId::parse("op").unwrap(),
        only_source: Some(WorkerSource::Node),
        owner: None,
    };
    assert!(matches!(state.apply(R1, gone), ControlOutcome::Refused(_)));
}

#[test]
fn an_online_worker_is_spoken_for_by_the_node_token_it_came_with() {
    let mut state = ControlState::default();
    let by = |owner: Option<&str>| ControlCommand::RegisterWorker {
        spec: WorkerSpec { owner: owner.map(str::to_owned), ..spec("w", WorkerSource::Node) },
        heartbeats: true,
    };
    let gone = |owner: Option<&str>| ControlCommand::RemoveWorker {
        id: WorkerId::parse("w").unwrap(),
        only_source: Some(WorkerSource::Node),
        owner: owner.map(str::to_owned),
    };
    state.apply(R1, by(Some("a")));
    for other in [Some("b"), None] {
        assert!(matches!(state.apply(R1, by(other)), ControlOutcome::Refused(_)));
        assert!(matches!(state.apply(R1, gone(other)), ControlOutcome::Refused(_)));
    }
    assert!(matches!(state.apply(R1, by(Some("a"))), ControlOutcome::Registered { replaced: true, .. }));
    for _ in 0..12 {
        tick(&mut state, 500, &[R1]);
    }
    assert!(!worker(&state, "w").online);
    assert!(matches!(state.apply(R1, by(Some("b"))), ControlOutcome::Registered { replaced: true, .. }));
    assert_eq!(state.apply(R1, gone(Some("b"))), ControlOutcome::Done);
}

#[test]
fn an_allocated_replica_id_is_given_once_and_never_again() {
    let mut state = ControlState::default();
    up(&mut state, ReplicaId(3));
    let allocate = |state: &mut ControlState, nonce| match state
        .apply(R1, ControlCommand::AllocateReplicaId { nonce, name: "r".to_owned() })
    {
        ControlOutcome::ReplicaId(id) => id,
        other => panic!("{other:?}"),
    };
    let first = allocate(&mut state, 7);
    assert_eq!(first, ReplicaId(101));
    assert_eq!(allocate(&mut state, 7), first, "a retry gets the same");
    state.apply(R1, ControlCommand::ForgetReplica { id: first });
    assert_eq!(allocate(&mut state, 8), ReplicaId(102));
}

#[test]
fn the_minority_of_digests_is_named() {
    let mut state = ControlState::default();
    for (id, digest) in [(1, 5), (2, 5), (3, 6)] {
        state
            .apply(R1, ControlCommand::Digest { id: ReplicaId(id), group: Group::Cache, index: 256, digest });
    }
    assert_eq!(state.take_diverged(), vec![(Group::Cache, 256, ReplicaId(3))]);
}

/// A worker's first rank.
fn first(worker: u32) -> RankKey {
    RankKey { worker: WorkerIx(worker), rank: 0 }
}

/// What all but this replica hold on worker 1.
fn peers(state: &CacheState, me: ReplicaId) -> LoadSum {
    state.peers_load(me, WorkerIx(1)).fold(LoadSum::default(), |sum, (_, load)| sum.with(&load))
}

#[test]
fn what_peers_hold_is_known_by_rank_and_released_on_all_of_them() {
    let mut state = CacheState::default();
    let delta = LoadDelta { requests: 2, prefill_tokens: 100, decode_blocks: 7 };
    let on = |rank| RankKey { rank, ..first(1) };
    for id in [R1, R2] {
        state.apply(id, CacheCommand::ReplicaUp { id, incarnation: Incarnation(1) });
    }
    let empty = state.digest();
    state.apply(R1, CacheCommand::Loads(vec![(on(0), delta), (on(3), delta), (first(2), delta)]));
    state.apply(R2, CacheCommand::Loads(vec![(on(3), delta)]));
    let seen: Vec<_> = state.peers_load(R2, WorkerIx(1)).map(|(rank, load)| (rank, load.requests)).collect();
    assert_eq!(seen, [(0, 2), (3, 2)], "of the other one");
    assert_eq!(state.total_load(WorkerIx(1)).requests, 6);
    let at_most = LoadSum { requests: 5, prefill_tokens: 9999, decode_blocks: 9999 };
    let late = state.apply(R2, CacheCommand::Reserve { rank: on(1), delta, at_most });
    assert_eq!(late, CacheOutcome::Busy(state.total_load(WorkerIx(1))), "a worker has room as a whole");
    for id in [R1, R2] {
        state.apply(id, CacheCommand::ReplaceLoads(Vec::new()));
    }
    assert_eq!(state.digest(), empty);
}

#[test]
fn a_replica_whose_lease_ends_holds_nothing_and_gets_it_back_by_saying_so() {
    let mut state = CacheState::default();
    let delta = LoadDelta { requests: 2, prefill_tokens: 100, decode_blocks: 7 };
    for id in [R1, R2] {
        state.apply(id, CacheCommand::ReplicaUp { id, incarnation: Incarnation(1) });
        state.apply(id, CacheCommand::Loads(vec![(first(1), delta)]));
    }
    assert_eq!(state.total_load(WorkerIx(1)).requests, 4);
    assert_eq!(peers(&state, R1).requests, 2);
    let tick = |ms| CacheCommand::Tick { elapsed_ms: ms, replicas: vec![R1], lease_ms: 1000 };
    state.apply(R1, tick(1000));
    assert!(state.take_released().is_empty());
    state.apply(R1, tick(1));
    assert_eq!(state.take_released(), vec![R2]);
    assert_eq!(state.total_load(WorkerIx(1)).requests, 2);
    state.apply(R2, CacheCommand::ReplaceLoads(vec![(first(1), delta)]));
    assert_eq!(state.replica(R2), Some((2, true)));
    // And it can end again: the proposal was a sign of life, not a licence.
    state.apply(R1, tick(1001));
    assert_eq!(state.take_released(), vec![R2]);
    // A new life releases what the last one held.
    state.apply(R1, CacheCommand::ReplicaUp { id: R1, incarnation: Incarnation(2) });
    assert!(!state.holds_anything());
    assert_eq!(state.digest(), CacheState::default().digest());
}

#[test]
fn who_says_its_loads_anew_keeps_its_feeds_and_corrections() {
    let mut state = CacheState::default();
    state.apply(R1, CacheCommand::ReplicaUp { id: R1, incarnation: Incarnation(1) });
    let delta = LoadDelta { requests: 5, prefill_tokens: 100, decode_blocks: 7 };
    state.apply(R1, CacheCommand::Loads(vec![(first(1), delta)]));
    state.apply(R1, CacheCommand::ClaimFeed { rank: first(1), from: None });
    let less = LoadSum { requests: -2, prefill_tokens: 0, decode_blocks: 0 };
    let extra = Correction { whole: less, ranks: Vec::new() };
    state.apply(R1, CacheCommand::Correct { worker: WorkerIx(1), extra: extra.clone() });
    state.take_ranks_changed();
    state.apply(R1, CacheCommand::ReplaceLoads(vec![(first(1), delta)]));
    assert_eq!(state.total_load(WorkerIx(1)).requests, 5);
    assert_eq!(state.ranks().get(first(1)).unwrap().owner, Some(R1), "it listens as before");
    assert!(!state.take_ranks_changed());
    assert_eq!(state.correction(WorkerIx(1)), Some(&extra));
    // A new life is another matter.
    state.apply(R1, CacheCommand::ReplicaUp { id: R1, incarnation: Incarnation(2) });
    assert_eq!(state.ranks().get(first(1)).unwrap().owner, None);
    assert_eq!(state.correction(WorkerIx(1)), None);
}

#[test]
fn what_waits_is_passed_on_and_leaves_nothing_in_the_state() {
    let mut state = CacheState::default();
    let before = state.digest();
    state.apply(R2, CacheCommand::Waiting { keys: vec![1, 2] });
    assert_eq!(state.take_waiting(), [(R2, vec![1, 2])]);
    assert!(state.take_waiting().is_empty() && state.digest() == before);
    for _ in 0..10_000 {
        state.apply(R2, CacheCommand::Waiting { keys: vec![3] });
    }
    assert_eq!(state.take_waiting().len(), 4096, "bounded where nobody takes them");
}

#[test]
fn a_reservation_is_taken_only_if_nobody_has_booked_since_the_choice() {
    let mut state = CacheState::default();
    let one = LoadDelta { requests: 1, prefill_tokens: 100, decode_blocks: 7 };
    let reserve = |requests, prefill_tokens| {
        let at_most = LoadSum { requests, prefill_tokens, decode_blocks: 7 * requests };
        CacheCommand::Reserve { rank: first(1), delta: one, at_most }
    };
    assert_eq!(state.apply(R1, reserve(9, 900)), CacheOutcome::Refused, "nobody would release it");
    for id in [R1, R2] {
        state.apply(id, CacheCommand::ReplicaUp { id, incarnation: Incarnation(1) });
    }
    assert_eq!(state.apply(R1, reserve(0, 0)), CacheOutcome::Done);
    let total = LoadSum { requests: 1, prefill_tokens: 100, decode_blocks: 7 };
    assert_eq!(state.apply(R2, reserve(0, 0)), CacheOutcome::Busy(total));
    assert_eq!(state.apply(R2, reserve(1, 50)), CacheOutcome::Busy(total), "of any kind");
    assert_eq!(state.apply(R2, reserve(2, 100)), CacheOutcome::Done, "less than known is no harm");
    assert_eq!(peers(&state, R2), total);
    assert_eq!(state.total_load(WorkerIx(1)).requests, 2);
}

#[test]
fn a_correction_holds_until_it_is_taken_back_or_whoever_made_it_or_the_worker_is_gone() {
    let mut state = CacheState::default();
    let (worker, extra) = (WorkerIx(1), LoadSum { requests: 5, decode_blocks: 40, ..LoadSum::default() });
    let correct = |extra| {
        // Of a rank it says the same.
        let ranks = Some((2, extra)).filter(|(_, extra)| *extra != LoadSum::default());
        CacheCommand::Correct {
            worker,
            extra: Correction { whole: extra, ranks: ranks.into_iter().collect() },
        }
    };
    assert_eq!(state.apply(R1, correct(extra)), CacheOutcome::Refused, "nobody would take it back");
    for id in [R1, R2] {
        state.apply(id, CacheCommand::ReplicaUp { id, incarnation: Incarnation(1) });
    }
    let empty = state.digest();
    let seen = |state: &mut CacheState| {
        let correction = state.correction(worker).cloned().unwrap_or_default();
        (correction.whole, correction.of_rank(2), state.take_changed().contains(&worker))
    };
    let none = (LoadSum::default(), LoadSum::default(), true);
    for end in [
        (R2, correct(LoadSum::default())),
        (R2, CacheCommand::ForgetWorker { worker }),
        (R2, CacheCommand::Tick { elapsed_ms: 2000, replicas: vec![R2], lease_ms: 1000 }),
    ] {
        state.apply(R1, CacheCommand::Loads(Vec::new()));
        state.apply(R1, correct(extra));
        assert_eq!(seen(&mut state), (extra, extra, true));
        assert_ne!(state.digest(), empty);
        assert!(state.total_load(worker).is_zero(), "it is nobody's booking");
        state.apply(end.0, end.1);
        assert_eq!(seen(&mut state), none);
        assert_eq!(state.digest(), empty);
    }
}

#[test]
fn what_a_correction_takes_off_ends_with_the_bookings_that_it_may_have_been_taken_from() {
    let mut state = CacheState::default();
    for id in [R1, R2] {
        state.apply(id, CacheCommand::ReplicaUp { id, incarnation: Incarnation(1) });
    }
    let delta = LoadDelta { requests: 5, prefill_tokens: 100, decode_blocks: 9 };
    state.apply(R2, CacheCommand::Loads(vec![(first(1), delta)]));
    let less = LoadSum { requests: -5, prefill_tokens: -100, decode_blocks: 40 };
    let less_on = |rank| Correction { whole: less, ranks: vec![(rank, less)] };
    for (worker, rank) in [(1, 0), (2, 0), (3, 1)] {
        state.apply(R1, CacheCommand::Correct { worker: WorkerIx(worker), extra: less_on(rank) });
    }
    state.apply(R2, CacheCommand::Loads(vec![(first(3), delta)]));
    let again = CacheState::restore(state.records()).unwrap();
    assert_eq!((again.correction(WorkerIx(1)), again.digest()), (Some(&less_on(0)), state.digest()));
    state.apply(R1, CacheCommand::Tick { elapsed_ms: 2000, replicas: vec![R1], lease_ms: 1000 });
    assert_eq!(state.total_load(WorkerIx(1)), LoadSum::default());
    let more = LoadSum { decode_blocks: 40, ..LoadSum::default() };
    let more_on_0 = Correction { whole: more, ranks: vec![(0, more)] };
    assert_eq!(state.correction(WorkerIx(1)), Some(&more_on_0), "more than is booked is more than ever");
    assert_eq!(state.correction(WorkerIx(2)), Some(&less_on(0)), "nothing was released there");
    let elsewhere = Correction { whole: more, ranks: vec![(1, less)] };
    assert_eq!(state.correction(WorkerIx(3)), Some(&elsewhere), "nothing was released on that rank");
}

#[test]
fn a_segment_is_applied_once_in_order_and_only_in_its_life() {
    let mut r: Replicated<ControlState> = Replicated::default();
    let noop = || vec![ControlCommand::Noop];
    let life = Incarnation;
    assert_eq!(r.apply(R1, life(1), 2, noop()), Applied::Gap);
    assert_eq!(r.apply(R1, life(1), 1, noop()), Applied::Now(vec![ControlOutcome::Done]));
    assert_eq!(r.apply(R1, life(1), 1, noop()), Applied::Before);
    assert_eq!(r.apply(R1, life(1), 2, noop()), Applied::Now(vec![ControlOutcome::Done]));
    assert_eq!(r.apply(R1, life(2), 1, noop()), Applied::Now(vec![ControlOutcome::Done]));
    assert_eq!(r.apply(R1, life(1), 3, noop()), Applied::Before);
    let again = Replicated::<ControlState>::restore(r.records()).unwrap();
    assert_eq!(again.session(R1).applied, 1);
    assert_eq!(again.session(R1).incarnation, life(2));
}

/// A state in which two replicas live, and a rank whose feed the first one owns.
fn listening() -> (CacheState, RankKey) {
    let mut state = CacheState::default();
    for id in [R1, R2] {
        state.apply(id, CacheCommand::ReplicaUp { id, incarnation: Incarnation(1) });
    }
    let rank = RankKey { worker: WorkerIx(4), rank: 0 };
    let claim = CacheCommand::ClaimFeed { rank, from: None };
    assert_eq!(state.apply(R1, claim), CacheOutcome::Feed(Cursor::default()));
    (state, rank)
}

fn stored(rank: RankKey, after: Cursor, number: u64) -> (CacheCommand, Cursor) {
    let cursor = Cursor { last: Some((number, number + 7)), owing: 0 };
    let ops = wire::encode(&[KvOp::Store {
        parent: number.checked_sub(1).map(EngineHash),
        tier: Tier::Gpu,
        seed: Seed::default(),
        blocks: vec![(local(number), EngineHash(number))],
    }]);
    (CacheCommand::Events { rank, after, cursor, ops: ops.into() }, cursor)
}

#[test]
fn a_feed_is_handed_over_with_its_owners_lease_and_goes_on_where_it_was() {
    let (mut state, rank) = listening();
    let (first, one) = stored(rank, Cursor::default(), 0);
    assert_eq!(state.apply(R1, first.clone()), CacheOutcome::Done);
    // Said again, by an owner who did not hear the answer.
    assert_eq!(state.apply(R1, first), CacheOutcome::Moved(one));
    let (second, two) = stored(rank, one, 1);
    assert_eq!(state.apply(R2, second.clone()), CacheOutcome::NotOwner(Some(R1)));
    assert_eq!(
        state.apply(R2, CacheCommand::ClaimFeed { rank, from: None }),
        CacheOutcome::NotOwner(Some(R1)),
        "not while its owner lives"
    );
    state.take_ranks_changed();
    state.apply(R2, CacheCommand::Tick { elapsed_ms: 2000, replicas: vec![R2], lease_ms: 1000 });
    assert!(state.take_ranks_changed());
    assert_eq!(state.apply(R1, second.clone()), CacheOutcome::NotOwner(None));
    assert_eq!(state.apply(R2, CacheCommand::ClaimFeed { rank, from: None }), CacheOutcome::Feed(one));
    assert_eq!(state.apply(R2, second), CacheOutcome::Done);
    assert_eq!(state.ranks().get(rank).map(|record| record.cursor), Some(two));
    let mut overlaps = Vec::new();
    state.index().lookup(&[local(0), local(1)], &mut overlaps);
    assert_eq!(overlaps.iter().map(|o| o.blocks).collect::<Vec<_>>(), [2]);
    state.apply(R1, CacheCommand::ForgetWorker { worker: WorkerIx(4) });
    state.index().lookup(&[local(0)], &mut overlaps);
    assert!(overlaps.is_empty() && state.ranks().get(rank).is_none());
}

#[test]
fn what_is_sent_to_an_engine_without_events_is_taken_for_cached_until_it_turns_out_to_have_some() {
    let mut state = CacheState::default();
    state.apply(R1, CacheCommand::ReplicaUp { id: R1, incarnation: Incarnation(1) });
    let rank = RankKey { worker: WorkerIx(1), rank: 0 };
    let locals: Vec<u8> = (0..4).flat_map(|n| local(n).0.to_le_bytes()).collect();
    let routed = |capacity| CacheCommand::Routed {
        rank,
        seed: Seed::default(),
        locals: locals.clone().into(),
        capacity,
    };
    state.apply(R1, routed(None));
    assert!(state.ranks().get(rank).is_none(), "nothing is known of how it keeps blocks");
    state.apply(R1, routed(Some(3)));
    let blocks = |state: &CacheState| {
        let mut overlaps = Vec::new();
        state.index().lookup(&[0, 1, 2, 3].map(local), &mut overlaps);
        overlaps.first().map_or(0, |o| o.blocks)
    };
    assert_eq!(blocks(&state), 3, "as many as it holds");
    let claimed = state.apply(R1, CacheCommand::ClaimFeed { rank, from: None });
    assert_eq!(claimed, CacheOutcome::Feed(Cursor::default()));
    assert_eq!(blocks(&state), 0);
    state.apply(R1, routed(Some(3)));
    assert_eq!((blocks(&state), state.take_routed().len()), (0, 1), "events know better");
}

#[test]
fn the_bound_of_the_index_holds_from_where_it_stands_in_the_log_and_outlives_a_restart() {
    let (mut state, rank) = listening();
    // 64 thousand blocks, each a sequence of its own: 20 MB.
    let mut after = Cursor::default();
    for number in 0..64 {
        let ops: Vec<KvOp> = (0..1000)
            .map(|n| (local(number * 1000 + n), EngineHash(number * 1000 + n)))
            .map(|block| KvOp::Store {
                parent: None,
                tier: Tier::Gpu,
                seed: Seed::default(),
                blocks: vec![block],
            })
            .collect();
        let cursor = Cursor { last: Some((number, 0)), owing: 0 };
        let events = CacheCommand::Events { rank, after, cursor, ops: wire::encode(&ops).into() };
        assert_eq!(state.apply(R1, events), CacheOutcome::Done);
        after = cursor;
    }
    let before = (state.digest(), state.index().counters());
    assert!(before.1.bytes > 8 << 20 && before.1.evicted == 0, "{before:?}");
    state.apply(R2, CacheCommand::BoundIndex { bytes: 8 << 20 });
    let bounded = state.index().counters();
    assert!(bounded.bytes <= 8 << 20 && bounded.evicted > 0, "{bounded:?}");

    let restored = CacheState::restore(state.records()).unwrap();
    assert_eq!(restored.index().options().bytes, 8 << 20);
    assert_eq!((restored.digest(), restored.index().counters().bytes), (state.digest(), bounded.bytes));
    // An empty index keeps its bound, too, and two bounds are two states.
    let of = |bytes| {
        let mut state = CacheState::default();
        state.apply(R1, CacheCommand::BoundIndex { bytes });
        CacheState::restore(state.records()).unwrap()
    };
    assert_eq!(of(9 << 20).index().options().bytes, 9 << 20);
    assert_ne!(of(9 << 20).digest(), of(10 << 20).digest());
}

fn any_delta() -> impl Strategy<Value = LoadDelta> + Clone {
    (-5..5i32, -500..500i64, -50..50i64).prop_map(|(requests, prefill_tokens, decode_blocks)| LoadDelta {
        requests,
        prefill_tokens,
        decode_blocks,
    })
}

fn any_cache_command() -> impl Strategy<Value = (ReplicaId, CacheCommand)> {
    let loads = prop::collection::vec((any_rank(), any_delta()), 0..5);
    let command = prop_oneof![
        6 => loads.clone().prop_map(CacheCommand::Loads),
        1 => loads.prop_map(CacheCommand::ReplaceLoads),
        2 => (0..700u32, prop::collection::vec(1..4u64, 0..3)).prop_map(|(elapsed_ms, ids)| CacheCommand::Tick {
            elapsed_ms,
            replicas: ids.into_iter().map(ReplicaId).collect(),
            lease_ms: 1000,
        }),
        1 => (1..4u64, 1..9u64).prop_map(|(id, life)| CacheCommand::ReplicaUp {
            id: ReplicaId(id),
            incarnation: Incarnation(life),
        }),
        1 => (1..4u64).prop_map(|id| CacheCommand::ForgetReplica { id: ReplicaId(id) }),
        3 => (any_rank(), prop::option::of((1..4u64).prop_map(ReplicaId)))
            .prop_map(|(rank, from)| CacheCommand::ClaimFeed { rank, from }),
        1 => any_rank().prop_map(|rank| CacheCommand::ReleaseFeed { rank }),
        8 => (any_rank(), any_cursor(), any_cursor(), any_op()).prop_map(|(rank, after, cursor, op)| {
            CacheCommand::Events { rank, after, cursor, ops: wire::encode(&[op]).into() }
        }),
        3 => (any_rank(), 1..6usize, prop::option::of(2..9u64)).prop_map(|(rank, blocks, capacity)| {
            let locals = (0..blocks).flat_map(|n| local(n as u64).0.to_le_bytes()).collect::<Vec<u8>>();
            CacheCommand::Routed { rank, seed: Seed::default(), locals: locals.into(), capacity }
        }),
        1 => (0..3u32).prop_map(|n| CacheCommand::ForgetWorker { worker: WorkerIx(n) }),
        1 => any_rank().prop_map(|rank| CacheCommand::LoseFeed { rank }),
        2 => (0..3u32, prop::option::of(0..2u64))
            .prop_map(|(worker, life)| CacheCommand::Life { worker: WorkerIx(worker), life }),
        3 => (any_rank(), any_delta(), -2..5i64, -500..500i64).prop_map(|(rank, delta, requests, prefill_tokens)| {
            let at_most = LoadSum { requests, prefill_tokens, decode_blocks: 20 };
            CacheCommand::Reserve { rank, delta, at_most }
        }),
        3 => (0..5u64, 0..3u32, prop::option::of((0..3u32).prop_map(WorkerIx))).prop_map(|(session, worker, from)| {
            CacheCommand::Bind { session, worker: WorkerIx(worker), from }
        }),
        2 => (any_rank(), -4..4i64, any::<bool>()).prop_map(|(rank, requests, divided)| {
            let whole = LoadSum { requests, decode_blocks: requests * 9, ..LoadSum::default() };
            let ranks = if divided { vec![(rank.rank, whole)] } else { Vec::new() };
            CacheCommand::Correct { worker: rank.worker, extra: Correction { whole, ranks } }
        }),
    ];
    (1..4u64, command).prop_map(|(id, command)| (ReplicaId(id), command))
}

fn any_rank() -> impl Strategy<Value = RankKey> + Clone {
    (0..3u32, 0..2u32).prop_map(|(worker, rank)| RankKey { worker: WorkerIx(worker), rank })
}

/// Few enough that one often continues another.
fn any_cursor() -> impl Strategy<Value = Cursor> {
    prop_oneof![
        2 => Just(Cursor::default()),
        1 => Just(Cursor { last: Some((1, 7)), owing: 0 }),
        1 => Just(Cursor { last: Some((2, 8)), owing: 3 }),
    ]
}

fn local(n: u64) -> LocalHash {
    LocalHash(n + 100)
}

fn any_op() -> impl Strategy<Value = KvOp> {
    let block = |n: u64| (local(n), EngineHash(n));
    prop_oneof![
        4 => (0..3u64, 1..4u64).prop_map(move |(from, many)| KvOp::Store {
            parent: from.checked_sub(1).map(EngineHash),
            tier: Tier::Gpu,
            seed: Seed::default(),
            blocks: (from..from + many).map(block).collect(),
        }),
        2 => (0..6u64).prop_map(|n| KvOp::Remove { tier: Tier::Gpu, blocks: vec![EngineHash(n)] }),
        1 => Just(KvOp::Clear),
    ]
}

fn any_control_command() -> impl Strategy<Value = (ReplicaId, ControlCommand)> {
    let id = (0..5u8).prop_map(|n| format!("w{n}"));
    let ids = prop::collection::vec(id.clone(), 0..3)
        .prop_map(|v| v.iter().map(|i| WorkerId::parse(i).unwrap()).collect::<Vec<_>>());
    let signs = prop::collection::vec((id.clone(), 0..3000u32), 0..3).prop_map(|v| {
        v.iter()
            .map(|(i, age_ms)| Sign { id: WorkerId::parse(i).unwrap(), age_ms: *age_ms })
            .collect::<Vec<_>>()
    });
    let source = prop_oneof![
        Just(WorkerSource::Node),
        Just(WorkerSource::Admin),
        Just(WorkerSource::Config),
        Just(WorkerSource::Name)
    ];
    let command = prop_oneof![
        3 => (id.clone(), source, any::<bool>(), 1..4u32).prop_map(|(id, source, heartbeats, weight)| {
            let mut spec = spec(&id, source);
            spec.weight = weight;
            let lora_of = heartbeats.then(|| "m".to_owned());
            spec.models.push(ServedModel { name: "m".to_owned(), lora_of, max_model_len: Some(weight) });
            spec.labels.insert("zone".to_owned(), id.clone());
            spec.block_size = heartbeats.then_some(16);
            ControlCommand::RegisterWorker { spec, heartbeats }
        }),
        1 => id.clone().prop_map(|id| ControlCommand::RemoveWorker { id: WorkerId::parse(&id).unwrap(), only_source: None, owner: None }),
        1 => (id, any::<bool>()).prop_map(|(id, drain)| ControlCommand::DrainWorker { id: WorkerId::parse(&id).unwrap(), drain }),
        3 => (signs.clone(), signs, ids).prop_map(|(heartbeats, probed, failed)| ControlCommand::Heard { heartbeats, probed, failed }),
        3 => (0..3000u32, prop::collection::vec(1..4u64, 0..3)).prop_map(|(elapsed_ms, ids)| ControlCommand::Tick {
            elapsed_ms,
            replicas: ids.into_iter().map(ReplicaId).collect(),
            worker_timeout_ms: 5000,
            lease_ms: 1000,
        }),
        1 => (1..4u64, 1..9u64).prop_map(|(id, life)| ControlCommand::ReplicaUp {
            id: ReplicaId(id),
            incarnation: Incarnation(life),
            info: ReplicaInfo::default(),
        }),
        1 => any::<u64>().prop_map(|nonce| ControlCommand::AllocateReplicaId { nonce, name: String::new() }),
        1 => (1..4u64).prop_map(|id| ControlCommand::ForgetReplica { id: ReplicaId(id) }),
    ];
    (1..4u64, command).prop_map(|(id, command)| (ReplicaId(id), command))
}

/// Applies everything; half-way, goes on from what was written to records instead.
fn run<S: State>(commands: &[(ReplicaId, S::Command)], reload_at: Option<usize>) -> Replicated<S> {
    let mut r: Replicated<S> = Replicated::default();
    for (at, (origin, command)) in commands.iter().enumerate() {
        if reload_at == Some(at) {
            let digest = r.state.digest();
            r = Replicated::restore(r.records()).unwrap();
            assert_eq!(r.state.digest(), digest, "a restored state has the digest it was written with");
        }
        // Through the codec, as the log does.
        let command = crate::codec::decode(&crate::codec::encode(command)).unwrap();
        r.state.apply(*origin, command);
    }
    r
}

proptest! {
    #[test]
    fn a_cache_state_restored_half_way_ends_where_the_other_does(
        commands in prop::collection::vec(any_cache_command(), 0..60), at in 0..60usize
    ) {
        let (a, b) = (run::<CacheState>(&commands, None), run::<CacheState>(&commands, Some(at)));
        // The index may be written down in different orders.
        let small = |state: &Replicated<CacheState>| {
            let mut records = state.records();
            records.retain(|(key, _)| key.first() != Some(&b'x'));
            records
        };
        prop_assert_eq!(small(&a), small(&b));
        prop_assert_eq!(a.state.digest(), b.state.digest());
        for worker in 0..6 {
            let total = a.state.total_load(WorkerIx(worker));
            let peers = |r| a.state.peers_load(ReplicaId(r), WorkerIx(worker)).map(|(_, load)| load.requests).sum::<i64>();
            let sum: i64 = (1..4).map(|r| total.requests - peers(r)).sum();
            prop_assert_eq!(total.requests, sum, "the total is the sum of the columns");
        }
    }

    #[test]
    fn a_control_state_restored_half_way_ends_where_the_other_does(
        commands in prop::collection::vec(any_control_command(), 0..60), at in 0..60usize
    ) {
        let (a, b) = (run::<ControlState>(&commands, None), run::<ControlState>(&commands, Some(at)));
        prop_assert_eq!(a.records(), b.records());
        prop_assert_eq!(a.state.digest(), b.state.digest());
    }

    #[test]
    fn a_sum_is_undone_by_its_undo(requests in -1000..1000i64, p in any::<i32>(), d in any::<i32>()) {
        let sum = LoadSum { requests, prefill_tokens: p.into(), decode_blocks: d.into() };
        prop_assert!(sum.plus(&sum.undo()).is_zero());
    }
}
