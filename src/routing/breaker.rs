//! A circuit breaker: after some failures in a row a worker is left alone for a while, then
//! tried with one request at a time until one succeeds.
//!
//! It only steers: where no other worker is left, one with an open breaker is tried all the
//! same (see [`super::select`]). Time is given from outside, in milliseconds that never go
//! back.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// When a breaker opens and for how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BreakerOptions {
    /// Failures in a row that open it; 0 means never. 5.
    pub failures: u32,
    /// First time open, in ms; doubles with each failed trial, however many requests fail at
    /// once. 1,000.
    pub open_ms: u64,
    /// Longest time open, in ms: 30,000.
    pub max_open_ms: u64,
}

impl Default for BreakerOptions {
    fn default() -> Self {
        Self { failures: 5, open_ms: 1_000, max_open_ms: 30_000 }
    }
}

/// What a breaker does with requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BreakerState {
    /// Lets all through.
    Closed,
    /// Lets one through, to see.
    HalfOpen,
    /// Lets none through.
    Open,
}

impl BreakerState {
    /// The name used in JSON and metrics.
    pub fn name(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::HalfOpen => "half-open",
            BreakerState::Open => "open",
        }
    }
}

/// One replica's breaker of one worker.
#[derive(Debug, Default)]
pub struct Breaker {
    failures: AtomicU32,
    /// Trials that failed since it opened.
    trials: AtomicU32,
    /// A trial was let in, and nothing was heard of it yet.
    on_trial: AtomicBool,
    /// 0 while closed, else when the next trial may begin.
    open_until: AtomicU64,
}

impl Breaker {
    /// What it does with a request at `now_ms`.
    pub fn state(&self, now_ms: u64) -> BreakerState {
        match self.open_until.load(Ordering::Relaxed) {
            0 => BreakerState::Closed,
            until if now_ms < until => BreakerState::Open,
            _ => BreakerState::HalfOpen,
        }
    }

    /// Lets a request through, or not. A half-open breaker lets one through and then waits for
    /// how it ends, at most the time it was open last.
    pub fn enter(&self, now_ms: u64, options: &BreakerOptions) -> bool {
        let until = self.open_until.load(Ordering::Acquire);
        if until == 0 {
            return true;
        }
        if now_ms < until {
            return false;
        }
        let next = now_ms + self.pause(options);
        let mine = self.open_until.compare_exchange(until, next, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if mine {
            self.on_trial.store(true, Ordering::Release);
        }
        mine
    }

    /// A request was answered.
    pub fn succeeded(&self) {
        // Mostly there is nothing to change, and a shared line is better not written to.
        if self.failures.load(Ordering::Relaxed) != 0 {
            self.failures.store(0, Ordering::Relaxed);
        }
        if self.open_until.load(Ordering::Relaxed) != 0 {
            self.trials.store(0, Ordering::Relaxed);
            self.on_trial.store(false, Ordering::Relaxed);
            self.open_until.store(0, Ordering::Release);
        }
    }

    /// A request failed at the worker.
    pub fn failed(&self, now_ms: u64, options: &BreakerOptions) {
        let before = self.failures.fetch_add(1, Ordering::AcqRel);
        if before == u32::MAX {
            self.failures.store(u32::MAX, Ordering::Relaxed);
        }
        if options.failures == 0 || before.saturating_add(1) < options.failures {
            return;
        }
        if self.open_until.load(Ordering::Acquire) != 0 {
            // Open already. Of many requests that a dying worker takes with it, only the trial
            // says anything new.
            if !self.on_trial.swap(false, Ordering::AcqRel) {
                return;
            }
            self.trials.fetch_add(1, Ordering::AcqRel);
        }
        self.open_until.store((now_ms + self.pause(options)).max(1), Ordering::Release);
    }

    fn pause(&self, options: &BreakerOptions) -> u64 {
        let trials = self.trials.load(Ordering::Relaxed);
        let doubled = options.open_ms.saturating_mul(1 << trials.min(20));
        doubled.min(options.max_open_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: BreakerOptions = BreakerOptions { failures: 3, open_ms: 100, max_open_ms: 350 };

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_does_not_let_them() {
        let breaker = Breaker::default();
        for _ in 0..10 {
            breaker.failed(1, &OPTIONS);
            breaker.failed(1, &OPTIONS);
            breaker.succeeded();
        }
        assert_eq!(breaker.state(1), BreakerState::Closed);
        for _ in 0..3 {
            breaker.failed(1, &OPTIONS);
        }
        assert_eq!(breaker.state(1), BreakerState::Open);
        assert!(!breaker.enter(100, &OPTIONS));
    }

    #[test]
    fn one_trial_at_a_time_and_longer_pauses_until_one_succeeds() {
        let breaker = Breaker::default();
        for _ in 0..3 {
            breaker.failed(0, &OPTIONS);
        }
        assert_eq!(breaker.state(100), BreakerState::HalfOpen);
        assert!(breaker.enter(100, &OPTIONS));
        assert!(!breaker.enter(100, &OPTIONS), "a second trial beside the first");
        breaker.failed(110, &OPTIONS);
        assert_eq!((breaker.state(309), breaker.state(310)), (BreakerState::Open, BreakerState::HalfOpen));
        assert!(breaker.enter(310, &OPTIONS));
        breaker.failed(310, &OPTIONS);
        assert_eq!(breaker.state(310 + 349), BreakerState::Open, "doubled, up to the longest");
        assert_eq!(breaker.state(310 + 350), BreakerState::HalfOpen);
        assert!(breaker.enter(700, &OPTIONS));
        breaker.succeeded();
        assert_eq!(breaker.state(700), BreakerState::Closed);
        assert!(breaker.enter(700, &OPTIONS) && breaker.enter(700, &OPTIONS));
    }

    #[test]
    fn many_failures_at_once_open_it_no_longer_than_a_few() {
        let breaker = Breaker::default();
        for _ in 0..100 {
            breaker.failed(0, &OPTIONS);
        }
        assert_eq!((breaker.state(99), breaker.state(100)), (BreakerState::Open, BreakerState::HalfOpen));
        assert!(breaker.enter(100, &OPTIONS));
        for _ in 0..100 {
            breaker.failed(100, &OPTIONS);
        }
        assert_eq!((breaker.state(299), breaker.state(300)), (BreakerState::Open, BreakerState::HalfOpen));
    }

    #[test]
    fn a_trial_nobody_tells_the_end_of_is_followed_by_another() {
        let breaker = Breaker::default();
        for _ in 0..3 {
            breaker.failed(0, &OPTIONS);
        }
        assert!(breaker.enter(100, &OPTIONS));
        assert!(!breaker.enter(199, &OPTIONS));
        assert!(breaker.enter(200, &OPTIONS));
    }

    #[test]
    fn zero_failures_mean_never() {
        let breaker = Breaker::default();
        for _ in 0..100 {
            breaker.failed(0, &BreakerOptions { failures: 0, ..OPTIONS });
        }
        assert_eq!(breaker.state(0), BreakerState::Closed);
    }
}
