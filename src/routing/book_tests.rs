//! Bookings against what the cluster would make of what is told.

use super::*;
use crate::kv::hash::{LocalHash, sequence_hashes};
use crate::routing::tests::{record, view};

fn worker() -> Arc<WorkerView> {
    view(vec![record("w", 100)]).workers[0].clone()
}

fn share(locals: &[u64], blocks: u32) -> Share {
    let locals: Vec<LocalHash> = locals.iter().copied().map(LocalHash).collect();
    let chain = Some(sequence_hashes(&locals).into());
    Share { rank: 0, prefill_tokens: 16 * blocks, decode_blocks: blocks, chain }
}

/// What the cluster holds after it was told everything.
fn told(bookings: &Bookings, before: LoadSum) -> LoadSum {
    bookings.drain().iter().fold(before, |sum, (_, delta)| sum.plus(delta))
}

#[test]
fn a_prefix_that_running_requests_share_is_booked_once_whoever_ends_first() {
    let (bookings, worker) = (Bookings::new(|| {}), worker());
    let blocks = || worker.live.own.get().decode_blocks;
    let first = bookings.book_share(worker.clone(), share(&[1, 2, 3], 4));
    assert_eq!(blocks(), 4, "three full blocks and one that is not");
    let mut second = bookings.book_share(worker.clone(), share(&[1, 2, 9, 9], 5));
    assert_eq!(blocks(), 7);
    second.grow(2);
    drop(first);
    assert_eq!(blocks(), 7, "1, 2, 9, 9, the last one and two of output");
    let third = bookings.book_share(worker.clone(), share(&[2], 1));
    assert_eq!(blocks(), 8, "the same tokens after others are another block");
    drop(second);
    drop(third);
    assert!(worker.live.own.get().is_zero() && worker.live.live_blocks(0).is_empty());
    assert!(told(&bookings, LoadSum::default()).is_zero());
}

#[test]
fn what_somebody_else_says_that_runs_is_booked_as_it_says_and_freed_with_the_guard() {
    let (bookings, worker) = (Bookings::new(|| {}), worker());
    let load = |requests: i32| LoadDelta { requests, prefill_tokens: 7, decode_blocks: 30 };
    let mut booking = bookings.book_told(worker.clone(), 0, load(3));
    assert_eq!(told(&bookings, LoadSum::default()), LoadSum::default().plus(&load(3)));
    booking.turn_into(load(2));
    assert_eq!(worker.live.own.get(), LoadSum::default().plus(&load(2)));
    assert_eq!(bookings.drain().len(), 1, "the difference");
    drop(booking);
    assert!(worker.live.own.get().is_zero());
}

#[test]
fn a_tentative_booking_counts_here_and_is_told_only_by_its_command() {
    let (bookings, worker) = (Bookings::new(|| {}), worker());
    let tentative = bookings.try_book(worker.clone(), share(&[1, 2], 3), LoadSum::default());
    assert_eq!(worker.live.own.get().requests, 1);
    let Some(CacheCommand::Reserve { delta, at_most, .. }) = tentative.command() else {
        panic!("no command")
    };
    assert_eq!(at_most, LoadSum { decode_blocks: 3, ..LoadSum::default() });
    assert!(bookings.drain().is_empty());
    let booking = tentative.confirmed().unwrap();
    assert!(bookings.drain().is_empty());
    drop(booking);
    assert!(told(&bookings, LoadSum::default().plus(&delta)).is_zero());
    assert!(worker.live.own.get().is_zero() && !bookings.take_doubt());
}

#[test]
fn a_refused_one_leaves_nothing_but_what_others_came_to_share() {
    let (bookings, worker) = (Bookings::new(|| {}), worker());
    let tentative = bookings.try_book(worker.clone(), share(&[1, 2], 3), LoadSum::default());
    let other = bookings.book_share(worker.clone(), share(&[1, 2, 3], 3));
    let cluster = told(&bookings, LoadSum::default());
    assert_eq!(cluster.decode_blocks, 1, "the rest is told by the reservation");
    tentative.refused();
    let cluster = told(&bookings, cluster);
    assert_eq!(cluster, worker.live.own.get());
    assert_eq!((cluster.requests, cluster.decode_blocks), (1, 3));
    drop(other);
    assert!(told(&bookings, cluster).is_zero() && !bookings.take_doubt());
}

#[test]
fn what_is_said_anew_while_a_word_is_awaited_is_said_once_more_afterwards() {
    let bookings = Bookings::new(|| {});
    let worker = worker();
    let lives = HashMap::from([(worker.record.ix, worker.live.clone())]);
    for taken in [true, false] {
        let tentative = bookings.try_book(worker.clone(), share(&[1, 2], 3), LoadSum::default());
        // The lease was lost: whether this is applied before or after the command is not known.
        assert_eq!(bookings.restate(&lives).len(), 1);
        assert!(!bookings.take_doubt());
        let booking = if taken {
            tentative.confirmed()
        } else {
            tentative.refused();
            None
        };
        assert!(bookings.take_doubt());
        let said = bookings.restate(&lives);
        assert_eq!(said.len(), usize::from(taken), "all that is held, and that is known by now");
        drop(booking);
        bookings.drain();
    }
    // Nor is it known what became of one whose outcome was not seen, or that was given up.
    bookings.try_book(worker.clone(), share(&[1], 1), LoadSum::default()).unknown();
    assert!(bookings.take_doubt());
    drop(bookings.try_book(worker.clone(), share(&[1], 1), LoadSum::default()));
    assert!(bookings.take_doubt() && worker.live.own.get().is_zero());
}

#[test]
fn what_is_told_is_told_of_the_rank_that_it_was_booked_on_also_when_it_is_said_anew() {
    let bookings = Bookings::new(|| {});
    let mut record = record("w", 100);
    record.spec.dp_ranks = 3;
    let worker = view(vec![record]).workers[0].clone();
    let lives = HashMap::from([(worker.record.ix, worker.live.clone())]);
    let ranks = |told: Vec<(RankKey, LoadDelta)>| {
        told.iter().map(|(key, delta)| (key.rank, delta.requests)).collect::<Vec<_>>()
    };
    let book = |rank| bookings.book_share(worker.clone(), Share { rank, ..Share::default() });
    let held = [book(2), book(2), book(0), book(9)];
    let expected = vec![(0, 2), (2, 2)];
    assert_eq!(ranks(bookings.drain()), expected, "a rank that it does not have is the first one");
    assert_eq!(ranks(bookings.restate(&lives)), expected);
    drop(held);
    assert_eq!(ranks(bookings.drain()), [(0, -2), (2, -2)]);
    assert!(bookings.restate(&lives).is_empty());
}
