//! Which attempt said which events of a stream, so that events of two attempts that contradict each
//! other are never joined.
//!
//! ```text
//! attempt 1   0 1 2 3 4 5 6          some copy had 7 events when the holder died
//! attempt 2         3 4 5 ...        but who took the stream over had 3
//! attempt 3             5 ...        and the next one 5 of those
//!
//! line        0 1 2 | 3 4 | 5 ...    turns: (2, from 3), (3, from 5)
//!             1       2     3
//! ```
//!
//! Two copies have the same events before the first turn in which their lines differ, and none that
//! is certainly the same behind it. Pure.

use std::sync::Arc;

/// From which event on an attempt speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Turn {
    /// The attempt.
    pub attempt: u32,
    /// Its first event.
    pub base: u64,
}

/// See the module. Attempts and first events both rise from turn to turn; what a later attempt says
/// anew is not in it any more.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Line {
    /// `None` is no turn: nearly always.
    turns: Option<Arc<[Turn]>>,
    /// Attempts in a row that began without an event since the one before.
    idle: u32,
}

/// Most turns of a stream. It is not taken over more often.
pub const MOST_TURNS: usize = 1024;

impl Line {
    /// As another process wrote it; `None` of what no process writes.
    pub fn of(turns: Vec<Turn>, idle: u32) -> Option<Self> {
        let rises = |pair: &[Turn]| pair[0].attempt < pair[1].attempt && pair[0].base < pair[1].base;
        let is_one = turns.windows(2).all(rises)
            && turns.first().is_none_or(|turn| turn.attempt > 1)
            && turns.len() <= MOST_TURNS;
        is_one.then(|| Self { turns: (!turns.is_empty()).then(|| turns.into()), idle })
    }

    /// The turns, in order.
    pub fn turns(&self) -> &[Turn] {
        self.turns.as_deref().unwrap_or_default()
    }

    /// Attempts in a row that began without an event since the one before.
    pub fn idle(&self) -> u32 {
        self.idle
    }

    /// Whether there may be another turn.
    pub fn has_room(&self) -> bool {
        self.turns().len() < MOST_TURNS
    }

    /// Has a later attempt speak from `base` on. The first attempt takes no turn.
    pub fn begin(&mut self, attempt: u32, base: u64) {
        if attempt <= 1 {
            return;
        }
        let before = self.turns().last().map_or(0, |turn| turn.base);
        self.idle = if base > before { 0 } else { self.idle.saturating_add(1) };
        let kept = self.turns().iter().copied().filter(|turn| turn.base < base);
        self.turns = Some(kept.chain([Turn { attempt, base }]).collect());
    }

    /// Whether it is known where this attempt begins: later than that there is one.
    pub fn has_begun(&self, attempt: u32) -> bool {
        attempt <= 1 || self.turns().last().is_some_and(|turn| turn.attempt == attempt)
    }

    /// Which attempt said, or will say, an event.
    pub fn said_by(&self, seq: u64) -> u32 {
        self.turns().iter().rev().find(|turn| turn.base <= seq).map_or(1, |turn| turn.attempt)
    }

    /// Of two who have events up to `next`, said by whom their lines say, the one with more is gone on from:
    /// what a later attempt has said may have been read since, and of one attempt the more, the later.
    pub fn reach(&self, next: u64) -> (u32, u64) {
        (next.checked_sub(1).map_or(0, |last| self.said_by(last)), next)
    }

    /// The first event that is not certainly the same in two lines; `None` if there is no such one.
    pub fn parts_from(&self, other: &Line) -> Option<u64> {
        let (ours, theirs) = (self.turns(), other.turns());
        let same = ours.iter().zip(theirs).take_while(|(ours, theirs)| ours == theirs).count();
        let next = [ours.get(same), theirs.get(same)];
        next.into_iter().flatten().map(|turn| turn.base).min()
    }

    /// Whether both have the same events before `until`.
    #[cfg(test)]
    fn agrees(&self, other: &Line, until: u64) -> bool {
        self.parts_from(other).is_none_or(|from| from >= until)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(turns: &[(u32, u64)]) -> Line {
        let mut line = Line::default();
        turns.iter().for_each(|(attempt, base)| line.begin(*attempt, *base));
        line
    }

    #[test]
    fn what_a_later_attempt_says_anew_belongs_to_it() {
        let line = line(&[(2, 3), (3, 5)]);
        let said: Vec<u32> = (0..7).map(|seq| line.said_by(seq)).collect();
        assert_eq!(said, [1, 1, 1, 2, 2, 3, 3]);
        let mut behind = line.clone();
        behind.begin(4, 4);
        assert_eq!(behind.turns(), [Turn { attempt: 2, base: 3 }, Turn { attempt: 4, base: 4 }]);
        assert_eq!((behind.parts_from(&line), line.parts_from(&behind)), (Some(4), Some(4)));
        assert!(behind.agrees(&line, 4) && !behind.agrees(&line, 5));
        assert_eq!(Line::default().parts_from(&line), Some(3));
        assert_eq!(line.parts_from(&line), None);
    }

    #[test]
    fn an_earlier_attempt_that_began_further_on_hides_no_contradiction() {
        // Event 97 was said by attempt 1, and anew by attempt 2, although attempt 3 began behind it.
        let there = line(&[(2, 95), (3, 120)]);
        assert!(!Line::default().agrees(&there, 100));
        assert!(Line::default().agrees(&there, 95));
    }

    #[test]
    fn attempts_without_progress_are_counted_until_there_is_some() {
        let mut line = line(&[(2, 0), (3, 0)]);
        assert_eq!((line.idle(), line.turns().len()), (2, 1));
        line.begin(5, 1);
        assert_eq!(line.idle(), 0);
        line.begin(6, 1);
        line.begin(7, 0);
        assert_eq!((line.idle(), line.turns()), (2, &[Turn { attempt: 7, base: 0 }][..]));
    }

    #[test]
    fn what_no_process_writes_is_none() {
        let of = |turns: &[(u32, u64)]| {
            let turns = turns.iter().map(|(attempt, base)| Turn { attempt: *attempt, base: *base });
            Line::of(turns.collect(), 0)
        };
        assert_eq!(of(&[]), Some(Line::default()));
        assert!(of(&[(2, 0), (3, 4)]).is_some());
        assert!(
            of(&[(1, 0)]).is_none() && of(&[(2, 4), (3, 4)]).is_none() && of(&[(3, 1), (2, 4)]).is_none()
        );
    }

    proptest! {
        /// Against a model that writes down who said each event.
        #[test]
        fn lines_are_as_good_as_a_list_of_who_said_each_event(
            attempts in proptest::collection::vec((0..12_u64, 0..5_u64), 0..8),
        ) {
            let mut said: Vec<u32> = vec![1; 10];
            let mut line = Line::default();
            let mut all = vec![(said.clone(), line.clone())];
            for (number, (base, events)) in attempts.into_iter().enumerate() {
                let (attempt, base) = (number as u32 + 2, base.min(said.len() as u64));
                said.truncate(base as usize);
                line.begin(attempt, base);
                said.extend(vec![attempt; events as usize]);
                let told: Vec<u32> = (0..said.len() as u64).map(|seq| line.said_by(seq)).collect();
                prop_assert_eq!(&told, &said);
                prop_assert!(Line::of(line.turns().to_vec(), 0).is_some());
                all.push((said.clone(), line.clone()));
            }
            for (ours, our_line) in &all {
                for (theirs, their_line) in &all {
                    let same = ours.iter().zip(theirs).take_while(|(ours, theirs)| ours == theirs).count();
                    let until = ours.len().min(theirs.len());
                    prop_assert_eq!(our_line.agrees(their_line, until as u64), same == until);
                }
            }
        }
    }
}
