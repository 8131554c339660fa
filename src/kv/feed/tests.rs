//! Feeds against engines that restart, drop, and forget.

use proptest::prelude::*;

use super::*;

fn message(run: u64, seq: u64) -> Message<()> {
    Message { seq, print: run * 1000 + seq, size: 1, body: () }
}

fn at(run: u64, seq: u64) -> Cursor {
    Cursor { last: Some((seq, run * 1000 + seq)), owing: 0 }
}

/// Calls `what` and returns what is to be done.
fn done(feed: &mut Feed<()>, what: impl FnOnce(&mut Feed<()>, &mut Vec<Action<()>>)) -> Vec<Action<()>> {
    let mut out = Vec::new();
    what(feed, &mut out);
    out
}

fn connected(cursor: Cursor) -> Feed<()> {
    let mut feed = Feed::new(cursor, true);
    let from = cursor.last.map_or(0, |(seq, _)| seq);
    assert_eq!(done(&mut feed, |f, out| f.connected(out)), [Action::Replay { from }]);
    feed
}

#[test]
fn first_contact_replays_from_the_beginning_and_then_takes_what_came_meanwhile() {
    let mut feed = connected(Cursor::default());
    assert_eq!(done(&mut feed, |f, out| f.live(message(1, 1), out)), []);
    assert_eq!(done(&mut feed, |f, out| f.live(message(1, 2), out)), []);
    for seq in 0..2 {
        let out = done(&mut feed, |f, out| f.replayed(message(1, seq), out));
        assert_eq!(out, [Action::Apply(message(1, seq))]);
    }
    assert_eq!(done(&mut feed, |f, out| f.replay_ended(out)), [Action::Apply(message(1, 2))]);
    assert_eq!(done(&mut feed, |f, out| f.live(message(1, 3), out)), [Action::Apply(message(1, 3))]);
    assert_eq!(feed.stats().duplicates, 1);
}

#[test]
fn a_restart_that_nobody_saw_is_noticed_whatever_the_numbers() {
    // The new run stands before, exactly at, and beyond the cursor.
    for length in [3, 8, 20] {
        let mut feed = connected(at(1, 7));
        let mut out = Vec::new();
        if length > 7 {
            feed.replayed(message(2, 7), &mut out);
        } else {
            feed.replay_ended(&mut out);
        }
        assert_eq!(out, [Action::Clear { whole: true }, Action::Replay { from: 0 }], "{length}");
    }
}

#[test]
fn the_same_run_is_continued_without_a_word_repeated() {
    let mut feed = connected(at(1, 7));
    let mut out = Vec::new();
    (7..10).for_each(|seq| feed.replayed(message(1, seq), &mut out));
    feed.replay_ended(&mut out);
    assert_eq!(out, [Action::Apply(message(1, 8)), Action::Apply(message(1, 9))]);
}

#[test]
fn a_replay_that_cannot_reach_back_clears_and_goes_on_from_what_there_is() {
    for cursor in [Cursor::default(), at(1, 7)] {
        let mut feed = connected(cursor);
        let out = done(&mut feed, |f, out| f.replayed(message(1, 30), out));
        assert_eq!(out, [Action::Clear { whole: false }, Action::Apply(message(1, 30))]);
    }
}

#[test]
fn a_hole_in_a_replay_is_asked_for_again_and_given_up_only_if_it_stays() {
    let mut feed = connected(Cursor::default());
    feed.replayed(message(1, 0), &mut Vec::new());
    for _ in 0..MOST_FRUITLESS {
        let out = done(&mut feed, |f, out| f.replayed(message(1, 2), out));
        assert_eq!(out, [Action::Replay { from: 0 }]);
        assert_eq!(done(&mut feed, |f, out| f.replayed(message(1, 0), out)), []);
    }
    let out = done(&mut feed, |f, out| f.replayed(message(1, 2), out));
    assert_eq!(out, [Action::Clear { whole: false }, Action::Apply(message(1, 2))]);
}

#[test]
fn a_replay_without_its_end_goes_on_where_it_broke_off() {
    let mut feed = connected(Cursor::default());
    feed.replayed(message(1, 0), &mut Vec::new());
    assert_eq!(done(&mut feed, |f, out| f.replay_failed(out)), [Action::Replay { from: 0 }]);
    feed.replayed(message(1, 0), &mut Vec::new());
    let out = done(&mut feed, |f, out| f.replayed(message(1, 1), out));
    assert_eq!(out, [Action::Apply(message(1, 1))]);
}

#[test]
fn without_a_replay_socket_a_gap_is_a_loss_and_zero_is_a_new_engine() {
    let mut feed = Feed::new(at(1, 7), false);
    assert_eq!(done(&mut feed, |f, out| f.connected(out)), []);
    assert_eq!(done(&mut feed, |f, out| f.live(message(1, 8), out)), [Action::Apply(message(1, 8))]);
    let out = done(&mut feed, |f, out| f.live(message(1, 10), out));
    assert_eq!(out, [Action::Clear { whole: false }, Action::Apply(message(1, 10))]);
    feed.connected(&mut Vec::new());
    let out = done(&mut feed, |f, out| f.live(message(2, 0), out));
    assert_eq!(out, [Action::Clear { whole: true }, Action::Apply(message(2, 0))]);
    // The same connection, a lower number: two engines, or one that came back behind a proxy.
    feed.live(message(2, 1), &mut Vec::new());
    let out = done(&mut feed, |f, out| f.live(message(3, 0), out));
    assert_eq!(out, [Action::Clear { whole: true }, Action::Apply(message(3, 0))]);
}

#[test]
fn a_feed_that_somebody_else_continued_goes_on_behind_them() {
    let mut feed = connected(at(1, 7));
    feed.replayed(message(1, 7), &mut Vec::new());
    feed.replay_ended(&mut Vec::new());
    let out = done(&mut feed, |f, out| f.moved(at(1, 9), out));
    assert_eq!(out, [Action::Replay { from: 9 }]);
    // Without a replay socket: what they had comes again, and is known.
    let mut feed = Feed::new(at(1, 7), false);
    feed.connected(&mut Vec::new());
    feed.live(message(1, 8), &mut Vec::new());
    assert_eq!(done(&mut feed, |f, out| f.moved(at(1, 10), out)), []);
    for seq in [9, 10] {
        assert_eq!(done(&mut feed, |f, out| f.live(message(1, seq), out)), []);
    }
    assert_eq!(done(&mut feed, |f, out| f.live(message(1, 11), out)), [Action::Apply(message(1, 11))]);
}

#[test]
fn a_replay_socket_that_never_answers_is_done_without() {
    let mut feed = connected(at(1, 7));
    feed.live(message(1, 8), &mut Vec::new());
    for _ in 1..MOST_FAILURES {
        assert_eq!(done(&mut feed, |f, out| f.replay_failed(out)), [Action::Replay { from: 7 }]);
    }
    // Nobody can say that this 8 is of the same run.
    let out = done(&mut feed, |f, out| f.replay_failed(out));
    assert_eq!(out, [Action::Clear { whole: false }, Action::Apply(message(1, 8))]);
    // Later it is tried again.
    assert_eq!(done(&mut feed, |f, out| f.quiet(out)), [Action::Replay { from: 8 }]);
}

#[test]
fn what_is_held_during_a_replay_is_bounded() {
    let mut feed = connected(Cursor::default());
    for seq in 0..MOST_HELD as u64 {
        assert!(feed.has_room());
        feed.live(message(1, seq), &mut Vec::new());
    }
    assert!(!feed.has_room());
    feed.live(message(1, MOST_HELD as u64), &mut Vec::new());
    assert_eq!((feed.held.len(), feed.stats().strays), (MOST_HELD, 1));
}

#[test]
fn a_recovering_rank_is_whole_after_a_clear_or_when_all_that_was_there_must_be_gone() {
    let stored = |stored| Decoded { stored, ..Decoded::default() };
    let cleared = Decoded { ops: vec![KvOp::Clear], ..Decoded::default() };
    let cursor = Cursor::cleared(false, Some(10));
    assert!(cursor.recovering() && cursor.after(4, 0, &stored(9)).recovering());
    assert!(!cursor.after(4, 0, &stored(10)).recovering());
    let cursor = Cursor::cleared(false, None);
    assert!(cursor.after(4, 0, &stored(1 << 40)).recovering());
    assert!(!cursor.after(4, 0, &cleared).recovering());
    assert!(!Cursor::cleared(true, None).recovering());
}

#[derive(Clone, Debug)]
enum Step {
    Publish {
        lost: bool,
    },
    Restart,
    Disconnect,
    Connect,
    HandOver,
    /// Answers so many of the replay; of the last one nothing arrives.
    Answer {
        count: usize,
        hole: bool,
    },
    Break,
    Quiet,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => any::<bool>().prop_map(|lost| Step::Publish { lost }),
        1 => Just(Step::Restart),
        1 => Just(Step::Disconnect),
        2 => Just(Step::Connect),
        1 => Just(Step::HandOver),
        4 => (1_usize..6, any::<bool>()).prop_map(|(count, hole)| Step::Answer { count, hole }),
        1 => Just(Step::Break),
        1 => Just(Step::Quiet),
    ]
}

struct World {
    feed: Feed<()>,
    run: u64,
    published: u64,
    buffer: u64,
    connected: bool,
    /// Numbers a running replay still has to answer with.
    replay: Option<VecDeque<u64>>,
    /// What a listener made of the actions.
    applied: Vec<(u64, u64)>,
    whole: bool,
}

impl World {
    fn new(buffer: u64) -> Self {
        let feed = Feed::new(Cursor::default(), true);
        let (applied, whole) = (Vec::new(), true);
        Self { feed, run: 1, published: 0, buffer, connected: false, replay: None, applied, whole }
    }

    fn act(&mut self, what: impl FnOnce(&mut Feed<()>, &mut Vec<Action<()>>)) {
        for action in done(&mut self.feed, what) {
            match action {
                Action::Apply(m) => {
                    let next = self.applied.last().map(|(seq, _)| seq + 1);
                    assert_eq!(m.seq, next.unwrap_or(m.seq), "in order, nothing twice");
                    self.applied.push((m.seq, m.print));
                }
                Action::Clear { whole } => {
                    self.applied.clear();
                    self.whole = whole;
                }
                Action::Replay { from } => {
                    let oldest = self.published.saturating_sub(self.buffer);
                    self.replay = Some((from.max(oldest)..self.published).collect());
                }
            }
        }
    }

    fn answer(&mut self, count: usize, hole: bool) {
        for place in 0..count {
            let Some(replay) = &mut self.replay else { return };
            match replay.pop_front() {
                Some(_) if hole && place + 1 == count => {}
                Some(seq) => {
                    let run = self.run;
                    self.act(|feed, out| feed.replayed(message(run, seq), out));
                }
                None => {
                    self.replay = None;
                    self.act(|feed, out| feed.replay_ended(out));
                }
            }
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Publish { lost } => {
                let seq = self.published;
                self.published += 1;
                if self.connected && !lost {
                    let run = self.run;
                    self.act(|feed, out| feed.live(message(run, seq), out));
                }
            }
            Step::Restart | Step::Disconnect | Step::HandOver => {
                if matches!(step, Step::Restart) {
                    (self.run, self.published) = (self.run + 1, 0);
                }
                if matches!(step, Step::HandOver) {
                    let cursor = Cursor { last: self.applied.last().copied(), owing: 0 };
                    self.feed = Feed::new(cursor, true);
                }
                self.feed.away();
                (self.connected, self.replay) = (false, None);
            }
            Step::Connect => {
                self.connected = true;
                self.act(|feed, out| feed.connected(out));
            }
            Step::Answer { count, hole } => self.answer(count, hole),
            Step::Break => {
                if self.replay.take().is_some() {
                    self.act(|feed, out| feed.replay_failed(out));
                }
            }
            Step::Quiet => self.act(|feed, out| feed.quiet(out)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever happened: once the engine is connected and quiet, what was applied is what it
    /// said, to the last message; and from its beginning, unless the feed says otherwise.
    #[test]
    fn nothing_is_lost_and_nothing_repeated(
        steps in proptest::collection::vec(step(), 0..60),
        buffer in prop_oneof![Just(u64::MAX), 1_u64..10],
    ) {
        let mut world = World::new(buffer);
        steps.iter().for_each(|step| world.step(step));
        world.step(&Step::Connect);
        for _ in 0..2 {
            for _ in 0..200 {
                world.answer(1, false);
            }
            world.step(&Step::Quiet);
        }
        world.answer(200, false);
        prop_assert!(world.replay.is_none(), "it comes to rest");
        let first = world.published - world.applied.len() as u64;
        let said: Vec<_> = (first..world.published).map(|seq| (seq, world.run * 1000 + seq)).collect();
        prop_assert_eq!(&world.applied, &said);
        prop_assert!(!world.whole || first == 0);
        if buffer == u64::MAX && !steps.iter().any(|step| matches!(step, Step::Answer { hole: true, .. })) {
            prop_assert_eq!(first, 0, "nothing was lost on the way, so nothing is missing");
        }
    }
}
