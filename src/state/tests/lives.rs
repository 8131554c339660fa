//! Engines that begin anew, and engines that lose their feeds.

use super::*;
use crate::state::ranks::Knowledge;

#[test]
fn what_was_reckoned_of_an_engine_ends_with_its_process() {
    let mut state = CacheState::default();
    state.apply(R1, CacheCommand::ReplicaUp { id: R1, incarnation: Incarnation(1) });
    let rank = |worker| RankKey { worker: WorkerIx(worker), rank: 0 };
    let sent = |state: &mut CacheState| {
        for worker in [1, 2] {
            let locals: Vec<u8> = local(7).0.to_le_bytes().into();
            let (rank, seed) = (rank(worker), Seed::default());
            state.apply(R1, CacheCommand::Routed { rank, seed, locals: locals.into(), capacity: Some(3) });
        }
    };
    let held = |state: &CacheState| {
        let mut overlaps = Vec::new();
        state.index().lookup(&[local(7)], &mut overlaps);
        overlaps.iter().map(|overlap| overlap.rank.0).collect::<Vec<_>>()
    };
    for (life, held_then) in [
        (Some(5), vec![0, 1]),
        (Some(5), vec![0, 1]),
        (Some(6), vec![1]),
        (Some(6), vec![0, 1]),
        (None, vec![1]),
        (None, vec![1]),
        (Some(6), vec![0, 1]),
    ] {
        sent(&mut state);
        let before = state.digest();
        assert_eq!(state.apply(R1, CacheCommand::Life { worker: WorkerIx(1), life }), CacheOutcome::Done);
        assert_eq!(held(&state), held_then, "{life:?}");
        let restored = CacheState::restore(state.records()).unwrap();
        assert_eq!(restored.digest(), state.digest());
        assert!(held_then.len() == 2 || before != state.digest());
    }
    state.apply(R1, CacheCommand::ForgetWorker { worker: WorkerIx(1) });
    sent(&mut state);
    state.apply(R1, CacheCommand::Life { worker: WorkerIx(1), life: Some(9) });
    assert_eq!(held(&state), [0, 1], "another worker's first word");
}

#[test]
fn a_rank_that_has_lost_its_feed_for_good_is_reckoned_from_nothing_on() {
    let (mut state, rank) = listening();
    let cursor = Cursor { last: Some((0, 0)), owing: 0 };
    let op = KvOp::Store {
        parent: None,
        tier: Tier::Gpu,
        seed: Seed::default(),
        blocks: vec![(local(1), EngineHash(1))],
    };
    let ops = wire::encode(&[op]).into();
    let events = CacheCommand::Events { rank, after: Cursor::default(), cursor, ops };
    assert_eq!(state.apply(R1, events.clone()), CacheOutcome::Done);
    let held = |state: &CacheState| {
        let mut overlaps = Vec::new();
        state.index().lookup(&[local(1), local(2)], &mut overlaps);
        overlaps.first().map_or(0, |overlap| overlap.blocks)
    };
    let lost = CacheCommand::LoseFeed { rank };
    let stranger = ReplicaId(9);
    assert_eq!(state.apply(stranger, lost.clone()), CacheOutcome::NotOwner(Some(R1)));
    assert_eq!(held(&state), 1);
    state.take_ranks_changed();
    assert_eq!(state.apply(R1, lost.clone()), CacheOutcome::Done);
    assert!(held(&state) == 0 && state.take_ranks_changed());
    let record = state.ranks().get(rank).unwrap().clone();
    assert_eq!(
        (record.knowledge, record.owner, record.cursor),
        (Knowledge::Predicted, None, Cursor::default())
    );
    let locals: Vec<u8> = [1, 2].into_iter().flat_map(|n| local(n).0.to_le_bytes()).collect();
    let seed = Seed::default();
    state.apply(R1, CacheCommand::Routed { rank, seed, locals: locals.into(), capacity: Some(3) });
    assert_eq!(held(&state), 2);
    assert_eq!(state.apply(R1, events), CacheOutcome::NotOwner(None));
    assert_eq!(state.apply(R1, lost), CacheOutcome::Done);
    assert_eq!(held(&state), 2, "what is reckoned stays");
}
