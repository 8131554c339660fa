//! When a request may be tried on another worker: a budget over all requests, so that retries
//! cannot multiply a load that is already too much, and pauses that spread them.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Bounds on retries.
#[derive(Clone, Copy, Debug)]
pub struct RetryOptions {
    /// Attempts after the first: 2.
    pub attempts: u32,
    /// Retries for 100 requests, beside one a second: 20. Attempts that could not even connect
    /// do not count, for they cost a worker nothing.
    pub budget_percent: u32,
    /// Longest pause before the first retry, doubled for each further one; the actual one is
    /// random below it. 25 ms.
    pub pause: Duration,
}

impl Default for RetryOptions {
    fn default() -> Self {
        Self { attempts: 2, budget_percent: 20, pause: Duration::from_millis(25) }
    }
}

impl RetryOptions {
    /// A pause before the retry with this number, from 1.
    pub(super) fn pause_before(&self, retry: u32) -> Duration {
        let longest = self.pause * (1 << retry.saturating_sub(1).min(6));
        longest.mul_f64(rand::random_range(0.0..1.0))
    }
}

/// Retries saved up at most, and there are at the start.
const SAVED: f64 = 100.0;

/// Retries that may still be made.
#[derive(Debug)]
pub(super) struct RetryBudget {
    saved: Mutex<Saved>,
}

#[derive(Debug)]
struct Saved {
    retries: f64,
    requests: u64,
    at: Instant,
}

impl RetryBudget {
    pub(super) fn new(now: Instant) -> Self {
        Self { saved: Mutex::new(Saved { retries: SAVED, requests: 0, at: now }) }
    }

    /// Takes one retry, if there is one. `requests` counts all requests so far.
    pub(super) fn take(&self, options: &RetryOptions, requests: u64, now: Instant) -> bool {
        let mut saved = self.saved.lock();
        let earned = requests.saturating_sub(saved.requests) as f64 * f64::from(options.budget_percent)
            / 100.0
            + now.saturating_duration_since(saved.at).as_secs_f64();
        saved.retries = (saved.retries + earned).min(SAVED);
        // Both were read before the lock was had, and may be older than what is here.
        saved.requests = saved.requests.max(requests);
        saved.at = saved.at.max(now);
        if saved.retries < 1.0 {
            return false;
        }
        saved.retries -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_share_of_requests_and_one_a_second() {
        let start = Instant::now();
        let options = RetryOptions::default();
        let budget = RetryBudget::new(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        let taken = |requests, now| (0..1000).take_while(|_| budget.take(&options, requests, now)).count();
        assert_eq!(taken(0, start), 100);
        assert_eq!(taken(50, start), 10);
        assert_eq!(taken(50, at(7)), 7);
        assert_eq!(taken(1_000_000, at(8)), 100);
    }

    #[test]
    fn what_was_counted_earlier_than_the_last_look_is_not_earned_twice() {
        let start = Instant::now();
        let options = RetryOptions::default();
        let budget = RetryBudget::new(start);
        let later = start + Duration::from_secs(5);
        assert_eq!((0..1000).take_while(|_| budget.take(&options, 100, later)).count(), 100);
        assert!(!budget.take(&options, 0, start), "a latecomer");
        assert!(!budget.take(&options, 100, later), "nothing has happened since");
    }

    #[test]
    fn pauses_are_random_and_grow() {
        let options = RetryOptions::default();
        assert!((0..100).all(|_| options.pause_before(1) < options.pause));
        assert!((0..100).any(|_| options.pause_before(3) > options.pause));
    }
}
