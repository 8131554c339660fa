//! The index against the reference, against itself restored, and with readers beside the writer.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::tree::ALL_TIERS;
use super::*;
use crate::kv::hash::{SequenceHash, sequence_hashes};
use crate::kv::reference::Reference;
use crate::kv::types::Tier;

/// Prompts part from the common one here; beyond and at the borders of words of bits.
const FORKS: [usize; 5] = [0, 5, 64, 70, 130];
const BRANCHES: u64 = 3;
const LENGTH: usize = 160;

fn prompt(branch: u64, fork: usize) -> Vec<LocalHash> {
    let fork = FORKS[fork];
    let own = |i: usize| 1_000_000 * (branch + 1) + 1000 * fork as u64 + i as u64;
    (0..LENGTH).map(|i| LocalHash(if i < fork { i as u64 + 1 } else { own(i) })).collect()
}

fn name(rank: u32, block: SequenceHash) -> EngineHash {
    // Two of the ranks call blocks the same, as engines of one kind do.
    EngineHash(block.0 ^ u64::from(rank / 2) << 7)
}

#[derive(Clone, Debug)]
enum Step {
    Store {
        rank: u32,
        branch: u64,
        fork: usize,
        from: usize,
        len: usize,
        tier: Tier,
        odd: Option<u64>,
        salted: bool,
    },
    Touch {
        rank: u32,
        branch: u64,
        fork: usize,
        from: usize,
        len: usize,
        tier: Tier,
        copy: bool,
        odd: Option<u64>,
    },
    Clear {
        rank: u32,
    },
    Forget {
        rank: u32,
    },
    Predict {
        rank: u32,
        branch: u64,
        fork: usize,
        len: usize,
        capacity: u64,
    },
    Restart,
}

fn steps(count: usize) -> impl Strategy<Value = Vec<Step>> {
    let tier = || prop_oneof![5 => Just(Tier::Gpu), 1 => Just(Tier::Host), 1 => Just(Tier::Disk)];
    let odd = || prop_oneof![6 => Just(None), 1 => (0u64..12).prop_map(Some)];
    let place = || (0..4u32, 0..BRANCHES, 0..FORKS.len());
    let from = prop_oneof![3 => Just(0), 2 => Just(32usize), 2 => Just(64), 2 => 0..LENGTH];
    let store = (place(), from, 1..90usize, tier(), odd(), prop_oneof![5 => Just(false), 1 => Just(true)])
        .prop_map(|((rank, branch, fork), from, len, tier, odd, salted)| Step::Store {
            rank,
            branch,
            fork,
            from,
            len,
            tier,
            odd,
            salted,
        });
    let touch = (place(), 0..LENGTH, 1..60usize, tier(), any::<bool>(), odd()).prop_map(
        |((rank, branch, fork), from, len, tier, copy, odd)| Step::Touch {
            rank,
            branch,
            fork,
            from,
            len,
            tier,
            copy,
            odd,
        },
    );
    // Rank 4 is mostly predicted, 5 always.
    let predict = (3..6u32, 0..BRANCHES, 0..FORKS.len(), 1..LENGTH, 0..300u64)
        .prop_map(|(rank, branch, fork, len, capacity)| Step::Predict { rank, branch, fork, len, capacity });
    let step = prop_oneof![
        12 => store,
        6 => touch,
        1 => (0..5u32).prop_map(|rank| Step::Clear { rank }),
        1 => (0..6u32).prop_map(|rank| Step::Forget { rank }),
        6 => predict,
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..count)
}

/// What a step says, and by whom. Predictions, removals and restarts say nothing.
fn said(step: &Step) -> Option<(RankIx, KvOp)> {
    match *step {
        Step::Store { rank, branch, fork, from, len, tier, odd, salted } => {
            let locals = prompt(branch, fork);
            let sequence = sequence_hashes(&locals);
            let to = (from + len).min(LENGTH);
            let mut blocks: Vec<(LocalHash, EngineHash)> =
                (from..to).map(|i| (locals[i], name(rank, sequence[i]))).collect();
            if let Some(odd) = odd {
                // Engines do not do this: names that mean several blocks, and blocks of several.
                blocks.iter_mut().step_by(7).enumerate().for_each(|(i, b)| b.1.0 = (odd + i as u64) % 12);
            }
            let parent = from.checked_sub(1).map(|before| name(rank, sequence[before]));
            let seed = if salted { Seed::new(None, Some("salt")) } else { Seed::default() };
            Some((RankIx(rank), KvOp::Store { parent, tier, seed, blocks }))
        }
        Step::Touch { rank, branch, fork, from, len, tier, copy, odd } => {
            let sequence = sequence_hashes(&prompt(branch, fork));
            let to = (from + len).min(LENGTH);
            // From the end, as engines evict.
            let mut blocks: Vec<EngineHash> = (from..to).rev().map(|i| name(rank, sequence[i])).collect();
            blocks.extend(odd.map(EngineHash));
            let op = if copy { KvOp::Copy { tier, blocks } } else { KvOp::Remove { tier, blocks } };
            Some((RankIx(rank), op))
        }
        Step::Clear { rank } => Some((RankIx(rank), KvOp::Clear)),
        Step::Forget { .. } | Step::Predict { .. } | Step::Restart => None,
    }
}

fn limited(limit: u64) -> Index {
    let index = Index::default();
    index.tree.lock().limit = limit;
    index
}

fn restarted(index: &Index) -> Index {
    let again = Index::load(Options::default(), &index.dump()).unwrap();
    again.tree.lock().limit = index.tree.lock().limit;
    again
}

fn run(index: &mut Index, step: &Step, encoded: bool) {
    match (said(step), step) {
        (Some((rank, op)), _) if encoded => index.apply_encoded(rank, &wire::encode(&[op])).unwrap(),
        (Some((rank, op)), _) => index.apply(rank, &[op]),
        (_, Step::Forget { rank }) => index.remove_rank(RankIx(*rank)),
        (_, Step::Predict { rank, branch, fork, len, capacity }) => {
            index.predict(RankIx(*rank), Seed::default(), &prompt(*branch, *fork)[..*len], *capacity);
        }
        _ => *index = restarted(index),
    }
}

fn run_reference(reference: &mut Reference, step: &Step) {
    match (said(step), step) {
        (Some((rank, op)), _) => reference.apply(rank, &op),
        (_, Step::Forget { rank }) => reference.remove_rank(RankIx(*rank)),
        (_, Step::Predict { rank, branch, fork, len, capacity }) => {
            reference.predict(RankIx(*rank), Seed::default(), &prompt(*branch, *fork)[..*len], *capacity);
        }
        _ => {}
    }
}

fn content(index: &Index) -> BTreeSet<(u32, SequenceHash, Tier)> {
    let owned = index.tree.lock();
    let mut all = BTreeSet::new();
    for (node, meta) in owned.tree.metas.iter().enumerate().skip(1).filter(|(_, meta)| meta.alive) {
        let body = index.slab.get(node as u32).read();
        for rank in body.ranks() {
            for at in 0..meta.ids.len() {
                let tiers = ALL_TIERS.into_iter().filter(|tier| body.holds_in(rank, at, *tier));
                all.extend(tiers.map(|tier| (rank, meta.sequence(at), tier)));
            }
        }
    }
    all
}

/// Everything that is written down as an invariant, and every sum that is kept.
fn check(index: &Index) {
    let owned = index.tree.lock();
    let tree = &owned.tree;
    let (mut nodes, mut blocks, mut parts, mut words, mut predictions) = (0, 0, 0, 0, 0);
    for (node, meta) in tree.metas.iter().enumerate().filter(|(_, meta)| meta.alive) {
        let body = index.slab.get(node as u32).read();
        for child in body.children.iter() {
            let below = &tree.metas[child as usize];
            assert!(
                below.alive
                    && below.parent == node as u32
                    && below.depth == meta.depth + meta.ids.len() as u32
            );
            assert_eq!(body.children.get(index.slab.get(child).read().locals[0]), Some(child));
        }
        if node == 0 {
            continue;
        }
        nodes += 1;
        blocks += meta.ids.len() as u64;
        parts += body.parts.len() as u64;
        words += body.words() as u64;
        predictions += meta.predicted.len() as u64;
        assert!(
            !body.locals.is_empty()
                && body.locals.len() == meta.ids.len()
                && meta.ids.len() == meta.sums.len()
        );
        for (at, block) in meta.ids.iter().enumerate() {
            let place = tree.places[*block as usize];
            assert_eq!((place.node, place.depth), (node as u32, meta.depth + at as u32));
        }
        assert!(
            body.parts.is_sorted_by(|a, b| a.rank < b.rank) && body.parts.iter().all(|part| !part.is_empty())
        );
        for part in &body.parts {
            let full = body.full.contains(part.rank);
            assert!(part.end() <= meta.ids.len() && part.tiers[0].count() < meta.ids.len());
            assert!(!full || part.tiers[0].is_empty());
        }
        let held = body.ranks().iter().any(|rank| body.holds(*rank, meta.ids.len() - 1));
        assert!(held || !body.children.is_empty(), "the end of a branch is held");
        for p in &meta.predicted {
            assert!(body.full.contains(p.rank) && p.stamp <= tree.clock);
            let leaf = tree.ranks[p.rank as usize].leaves.get(&p.stamp) == Some(&(node as u32));
            assert_eq!(leaf, p.children == 0);
        }
    }
    let counters = Counters { blocks, nodes, bytes: 0, ..tree.counters };
    assert_eq!(
        (counters, parts, words, predictions),
        (tree.counters, tree.parts, tree.words, tree.predictions)
    );
    let (mut named, mut aliases) = (0, 0);
    for (rank, state) in tree.ranks.iter().enumerate() {
        aliases += state.names.aliases() as u64;
        let main: BTreeSet<u32> = state.names.iter().map(|(_, block)| block).collect();
        assert_eq!(main.len(), state.names.len());
        for block in main.into_iter().chain(state.names.iter_aliases().map(|(_, block)| block)) {
            let place = tree.places[block as usize];
            let meta = &tree.metas[place.node as usize];
            let body = index.slab.get(place.node).read();
            assert!(meta.alive && body.holds(rank as u32, (place.depth - meta.depth) as usize));
        }
        if state.source != Source::Predictions {
            assert_eq!(state.names.len() as u64, state.held);
            named += state.held;
        }
    }
    assert_eq!((named, aliases), (tree.named, tree.aliases));
}

/// The digest of a set, reckoned from nothing.
fn digest_of(content: &BTreeSet<(u32, SequenceHash, Tier)>) -> u64 {
    let mut shares = std::collections::BTreeMap::<(u32, usize), (u64, u64)>::new();
    for (rank, block, tier) in content {
        let share = shares.entry((*rank, *tier as usize)).or_default();
        *share = (share.0 + 1, share.1.wrapping_add(block.0));
    }
    shares.into_iter().fold(0, |sum, ((rank, tier), share)| sum.wrapping_add(tree::term(rank, tier, share)))
}

fn compare(index: &Index, reference: &Reference) {
    let mut out = Vec::new();
    for branch in 0..BRANCHES {
        for fork in 0..FORKS.len() {
            let locals = prompt(branch, fork);
            for len in [LENGTH, 66] {
                index.lookup(&locals[..len], &mut out);
                assert_eq!(out, reference.lookup(&locals[..len]));
            }
        }
    }
    let content = reference.content();
    assert_eq!(index.digest(), digest_of(&content));
    let counters = index.counters();
    assert_eq!((counters.blocks, counters.worker_blocks), reference.counts());
    assert_eq!((counters.orphans, counters.refused), (reference.orphans, reference.refused));
    for block in sequence_hashes(&prompt(1, 3)).into_iter().step_by(9) {
        for rank in 0..4 {
            let name = name(rank, block);
            assert_eq!(index.seed_of(RankIx(rank), name), reference.seed_of(RankIx(rank), name));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn what_was_frozen_does_not_change_with_the_index(before in steps(20), after in steps(20)) {
        let mut index = Index::default();
        before.iter().for_each(|step| run(&mut index, step, false));
        let (frozen, digest, counters, kept) = (index.freeze(), index.digest(), index.counters(), content(&index));
        after.iter().for_each(|step| run(&mut index, step, false));
        check(&index);
        let again = Index::load(Options::default(), &frozen.records()).unwrap();
        check(&again);
        prop_assert_eq!((again.digest(), again.counters(), content(&again)), (digest, counters, kept));
    }

    #[test]
    fn it_holds_what_the_reference_holds(steps in steps(40)) {
        let (mut index, mut reference) = (Index::default(), Reference::default());
        for (n, step) in steps.iter().enumerate() {
            run(&mut index, step, n % 2 == 0);
            run_reference(&mut reference, step);
            check(&index);
            compare(&index, &reference);
        }
        prop_assert_eq!(content(&index), reference.content());
    }

    #[test]
    fn the_bound_takes_ends_and_nothing_else(steps in steps(60), limit in 4_000u64..40_000) {
        let (mut index, mut reference) = (limited(limit), Reference::default());
        let mut evicted = 0;
        for step in &steps {
            run(&mut index, step, true);
            run_reference(&mut reference, step);
            check(&index);
            if index.counters().evicted > evicted {
                evicted += reference.evicted(&content(&index));
            }
            compare(&index, &reference);
            prop_assert_eq!(index.counters().evicted, evicted);
            let adds = matches!(step, Step::Store { .. } | Step::Predict { .. });
            prop_assert!(!adds || index.counters().bytes <= limit);
        }
    }

    #[test]
    fn a_replica_that_was_restored_stays_like_one_that_was_not(
        steps in steps(60), limit in 4_000u64..40_000, restarts in 0u64..
    ) {
        let (mut index, mut other) = (limited(limit), limited(limit));
        for (n, step) in steps.iter().enumerate() {
            run(&mut index, step, false);
            // The other was restored at some of the steps, and its numbers differ since.
            if restarts >> (n % 64) & 1 == 1 {
                other = restarted(&other);
            }
            if !matches!(step, Step::Restart) {
                run(&mut other, step, true);
            }
            prop_assert_eq!(index.counters(), other.counters());
            prop_assert_eq!(index.digest(), other.digest());
        }
        prop_assert_eq!(content(&index), content(&other));
        check(&other);
    }

    #[test]
    fn a_damaged_dump_is_an_error_or_sound(
        steps in steps(20),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut index = Index::default();
        steps.iter().for_each(|step| run(&mut index, step, false));
        let whole = index.dump();
        let mut records = whole.clone();
        for (record, byte, value) in damage {
            let at = record.index(records.len());
            let (_, bytes) = &mut records[at];
            let at = byte.index(bytes.len());
            bytes[at] = value;
        }
        // It may be the same, or a counter may be another: then it is at least sound.
        if let Ok(loaded) = Index::load(Options::default(), &records) {
            check(&loaded);
        }
        let mut records = whole.clone();
        let at = cut.index(records.len());
        records.remove(at);
        prop_assert!(Index::load(Options::default(), &records).is_err());
        let mut records = whole;
        let bytes = &mut records[at].1;
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(Index::load(Options::default(), &records).is_err());
    }
}

fn store(parent: Option<u64>, from: u64, to: u64) -> KvOp {
    let blocks = (from..to).map(|i| (LocalHash(i), EngineHash(i))).collect();
    KvOp::Store { parent: parent.map(EngineHash), tier: Tier::Gpu, seed: Seed::default(), blocks }
}

fn locals(to: u64) -> Vec<LocalHash> {
    (1..to).map(LocalHash).collect()
}

#[test]
fn a_gap_ends_the_overlap_and_storing_it_again_restores_it() {
    let index = Index::default();
    let mut out = Vec::new();
    index.apply(RankIx(7), &[store(None, 1, 101)]);
    index.apply(RankIx(7), &[KvOp::Remove { tier: Tier::Gpu, blocks: vec![EngineHash(50)] }]);
    index.lookup(&locals(101), &mut out);
    assert_eq!(out, [Overlap { rank: RankIx(7), blocks: 49, gpu: 49, host: 0 }]);
    index.apply(RankIx(7), &[store(Some(49), 50, 51)]);
    index.lookup(&locals(101), &mut out);
    assert_eq!(out[0].blocks, 100);
}

#[test]
fn a_rank_is_fed_by_events_or_predicted_until_it_is_removed() {
    let index = Index::default();
    index.apply(RankIx(0), &[store(None, 1, 9)]);
    assert!(!index.predict(RankIx(0), Seed::default(), &locals(9), 100));
    index.remove_rank(RankIx(0));
    assert!(index.predict(RankIx(0), Seed::default(), &locals(9), 100));
    index.apply(RankIx(0), &[store(None, 1, 20)]);
    assert_eq!(index.rank(RankIx(0)), (8, true));
    assert_eq!(index.counters().refused, 2);
    index.apply(RankIx(MOST_RANKS), &[store(None, 1, 20)]);
    assert_eq!((index.counters().refused, index.counters().worker_blocks), (3, 8));
}

#[test]
fn chains_longer_than_a_node_are_found_whole() {
    let index = Index::default();
    let long = 3 * tree::MOST_BLOCKS as u64 + 100;
    index.apply(RankIx(1), &[store(None, 1, 5)]);
    index.apply(RankIx(1), &[store(Some(4), 5, long)]);
    let again = restarted(&index);
    check(&again);
    let mut out = Vec::new();
    again.lookup(&locals(long), &mut out);
    assert_eq!(out[0].blocks as u64, long - 1);
    assert_eq!((again.digest(), again.counters()), (index.digest(), index.counters()));
    assert!(index.dump().iter().all(|(key, bytes)| key[0] == b'x' && bytes.len() < 512 << 10));
}

#[test]
fn second_names_are_bounded() {
    let index = Index::default();
    for n in 0..names::MOST_ALIASES as u64 + 10 {
        let blocks = vec![(LocalHash(1), EngineHash(n))];
        let op = KvOp::Store { parent: None, tier: Tier::Gpu, seed: Seed::default(), blocks };
        index.apply(RankIx(0), &[op]);
    }
    assert_eq!((index.counters().refused, index.counters().worker_blocks), (9, 1));
    check(&restarted(&index));
    let blocks = (0..5000).map(EngineHash).collect();
    index.apply(RankIx(0), &[KvOp::Remove { tier: Tier::Gpu, blocks }]);
    assert_eq!(index.counters(), Counters { refused: 9, ..Counters::default() });
}

#[test]
fn readers_beside_a_writer_see_prefixes_that_were_there() {
    const WHOLE: u64 = 400;
    let index = Index::default();
    // Always there, and shared by what comes and goes.
    index.apply(RankIx(0), &[store(None, 1, WHOLE)]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for reader in 0..3u64 {
            let (index, stop) = (&index, &stop);
            scope.spawn(move || {
                let (mut out, mut rounds) = (Vec::new(), 0);
                let own: Vec<LocalHash> = (1..WHOLE)
                    .map(|i| LocalHash(if i < 200 { i } else { i + 10_000 * (1 + reader) }))
                    .collect();
                while !stop.load(Ordering::Relaxed) || rounds < 100 {
                    rounds += 1;
                    index.lookup(&locals(WHOLE), &mut out);
                    assert!(out.is_sorted_by(|a, b| a.rank < b.rank));
                    assert_eq!((out[0].rank, out[0].blocks), (RankIx(0), WHOLE as u32 - 1));
                    index.lookup(&own, &mut out);
                    assert_eq!((out[0].rank, out[0].blocks), (RankIx(0), 199));
                    for overlap in &out[1..] {
                        // They come in steps of 50 and go at once: nothing else was ever there.
                        let own = overlap.rank.0 as u64 == reader + 1;
                        assert!(overlap.blocks % 50 == 49 && (own || overlap.blocks <= 199), "{overlap:?}");
                    }
                }
            });
        }
        for round in 0..300u64 {
            let rank = 1 + round % 4;
            let fork = |i: u64| if i < 200 { i } else { i + 10_000 * rank };
            for from in (0..WHOLE).step_by(50) {
                let (from, to) = (from.max(1), from + 50);
                let blocks = (from..to).map(|i| (LocalHash(fork(i)), EngineHash(fork(i)))).collect();
                let parent = (from > 1).then(|| EngineHash(fork(from - 1)));
                let op = KvOp::Store { parent, tier: Tier::Gpu, seed: Seed::default(), blocks };
                index.apply(RankIx(rank as u32), &[op]);
            }
            if round % 3 == 2 {
                (1..5).for_each(|rank| index.apply(RankIx(rank), &[KvOp::Clear]));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    check(&index);
}
