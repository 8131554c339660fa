//! What is known of each name: the last answer, how old it is, and what is wrong with the service.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use super::answer::Answer;

/// How following a name goes.
#[derive(Clone, Debug)]
pub struct NameState {
    /// The name.
    pub name: String,
    /// The last answer, however old.
    pub answer: Option<Arc<Answer>>,
    /// Since the service last said that this is so.
    pub age: Option<Duration>,
    /// Whether it is older than it may be, so that nothing goes by it any more.
    pub expired: bool,
    /// What was wrong when the service was last asked; nothing if it answered.
    pub trouble: Option<String>,
    /// Times that it did not answer well.
    pub failures: u64,
    /// Times that it was asked for everything, rather than for what has changed.
    pub lists: u64,
    /// Times that the answer changed.
    pub changes: u64,
}

#[derive(Debug, Default)]
struct Known {
    answer: Option<Arc<Answer>>,
    said: Option<Instant>,
    trouble: Option<String>,
    failures: u64,
    lists: u64,
    changes: u64,
}

/// What is known of some names. Time is given from outside.
#[derive(Debug)]
pub struct Board {
    /// The names are fixed; what is known of them changes.
    names: BTreeMap<String, RwLock<Known>>,
    max_age: Duration,
}

impl Board {
    /// Of these names. An answer counts for `max_age` after the service last said that it is so.
    pub fn new(names: impl IntoIterator<Item = String>, max_age: Duration) -> Self {
        Self { names: names.into_iter().map(|name| (name, RwLock::default())).collect(), max_age }
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// The service has given an answer; whether it is another one than before.
    pub fn put(&self, name: &str, answer: Answer, now: Instant) -> bool {
        let Some(known) = self.names.get(name) else { return false };
        let mut known = known.write();
        (known.said, known.trouble) = (Some(now), None);
        let is_new = known.answer.as_deref() != Some(&answer);
        if is_new {
            known.answer = Some(Arc::new(answer));
            known.changes += 1;
        }
        is_new
    }

    /// The service has said that nothing has changed.
    pub fn confirm(&self, name: &str, now: Instant) {
        if let Some(known) = self.names.get(name) {
            let mut known = known.write();
            (known.said, known.trouble) = (Some(now), None);
        }
    }

    /// The service is asked for everything.
    pub fn listed(&self, name: &str) {
        if let Some(known) = self.names.get(name) {
            known.write().lists += 1;
        }
    }

    /// The service has not answered, or not well; whether that is another trouble than before.
    pub fn failed(&self, name: &str, why: &str) -> bool {
        let Some(known) = self.names.get(name) else { return false };
        let mut known = known.write();
        known.failures += 1;
        let is_new = known.trouble.as_deref() != Some(why);
        if is_new {
            known.trouble = Some(why.to_owned());
        }
        is_new
    }

    /// What a name stands for, if that is known and not too old.
    pub fn answer(&self, name: &str, now: Instant) -> Option<Arc<Answer>> {
        let known = self.names.get(name)?.read();
        let said = known.said.filter(|said| now.saturating_duration_since(*said) <= self.max_age);
        said.and_then(|_| known.answer.clone())
    }

    /// How each name stands.
    pub fn states(&self, now: Instant) -> Vec<NameState> {
        let state = |(name, known): (&String, &RwLock<Known>)| {
            let known = known.read();
            let age = known.said.map(|said| now.saturating_duration_since(said));
            NameState {
                name: name.clone(),
                answer: known.answer.clone(),
                age,
                expired: age.is_some_and(|age| age > self.max_age),
                trouble: known.trouble.clone(),
                failures: known.failures,
                lists: known.lists,
                changes: known.changes,
            }
        };
        self.names.iter().map(state).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::answer::{Endpoint, Standing, WEIGHT};
    use super::*;

    fn answer(address: &str) -> Answer {
        Answer::new([Endpoint { address: address.to_owned(), weight: WEIGHT, standing: Standing::Ready }])
    }

    #[test]
    fn the_last_answer_holds_while_the_service_is_away_and_not_for_ever() {
        let board = Board::new(["x".to_owned()], Duration::from_secs(10));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(board.answer("x", start), None, "nothing was said yet");
        assert!(board.put("x", answer("a:1"), at(0)));
        assert!(!board.put("x", answer("a:1"), at(2)), "the same once more");
        let first = board.answer("x", at(2)).unwrap();
        assert!(board.failed("x", "refused") && !board.failed("x", "refused"), "said once");
        assert!(Arc::ptr_eq(&board.answer("x", at(12)).unwrap(), &first));
        let state = &board.states(at(12))[0];
        assert_eq!((state.expired, state.failures, state.changes), (false, 2, 1));
        assert_eq!((state.trouble.as_deref(), state.age), (Some("refused"), Some(Duration::from_secs(10))));
        assert_eq!(board.answer("x", at(13)), None, "too old");
        assert!(board.states(at(13))[0].expired);
        board.confirm("x", at(14));
        assert!(Arc::ptr_eq(&board.answer("x", at(20)).unwrap(), &first), "it is still so");
        assert_eq!(board.states(at(20))[0].trouble, None);
        assert_eq!(board.answer("y", start), None);
    }
}
