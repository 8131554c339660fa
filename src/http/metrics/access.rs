//! Which requests get a line in the log. A line costs microseconds, a request should not: so
//! ordinary answers get none unless asked for, and errors, which come in floods, are bounded.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Outcome;

/// Which requests are logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Access {
    /// None.
    Off,
    /// Those that did not end well, and slow ones; at most [`MOST_A_SECOND`] lines a second.
    #[default]
    Errors,
    /// Every one.
    All,
}

/// Lines a second with [`Access::Errors`]; what is left out is counted and said.
pub const MOST_A_SECOND: u32 = 100;

/// How requests are logged.
#[derive(Clone, Copy, Debug)]
pub struct AccessOptions {
    /// Which.
    pub access: Access,
    /// An answer whose first byte came later than this is slow: 10 s.
    pub slow: Duration,
}

impl Default for AccessOptions {
    fn default() -> Self {
        Self { access: Access::default(), slow: Duration::from_secs(10) }
    }
}

/// The decision, shared by all threads.
#[derive(Debug)]
pub(super) struct AccessLog {
    options: AccessOptions,
    since: Instant,
    /// The second of the window in the upper half, lines so far in the lower.
    window: AtomicU64,
    left_out: AtomicU64,
}

impl AccessLog {
    pub(super) fn new(options: AccessOptions) -> Self {
        Self { options, since: Instant::now(), window: AtomicU64::new(0), left_out: AtomicU64::new(0) }
    }

    /// Whether a request gets a line; `waited` is its time to the first byte, or in all if there
    /// was none. The second value is how many lines were left out before, to be said once.
    pub(super) fn wants(&self, outcome: Outcome, waited: Duration) -> Option<u64> {
        match self.options.access {
            Access::Off => None,
            Access::All => Some(0),
            Access::Errors if outcome == Outcome::Ok && waited <= self.options.slow => None,
            Access::Errors => self.admit(self.since.elapsed().as_secs()),
        }
    }

    fn admit(&self, second: u64) -> Option<u64> {
        let next = |window: u64| match (window >> 32 == second, window as u32) {
            (true, lines) if lines >= MOST_A_SECOND => None,
            (true, _) => Some(window + 1),
            (false, _) => Some(second << 32 | 1),
        };
        match self.window.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            Ok(_) => Some(self.left_out.swap(0, Ordering::Relaxed)),
            Err(_) => {
                self.left_out.fetch_add(1, Ordering::Relaxed);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(access: Access) -> AccessLog {
        AccessLog::new(AccessOptions { access, slow: Duration::from_millis(100) })
    }

    #[test]
    fn ordinary_answers_are_silent_errors_and_slow_ones_are_not() {
        let (quick, slow) = (Duration::from_millis(100), Duration::from_millis(101));
        let errors = log(Access::Errors);
        assert_eq!(errors.wants(Outcome::Ok, quick), None);
        assert_eq!(errors.wants(Outcome::Ok, slow), Some(0));
        assert_eq!(errors.wants(Outcome::Canceled, quick), Some(0));
        assert_eq!(log(Access::Off).wants(Outcome::ServerError, slow), None);
        assert_eq!(log(Access::All).wants(Outcome::Ok, quick), Some(0));
    }

    #[test]
    fn a_flood_of_errors_is_cut_and_counted() {
        let log = log(Access::Errors);
        let lines = (0..10 * MOST_A_SECOND).filter(|_| log.admit(7).is_some()).count();
        assert_eq!(lines, MOST_A_SECOND as usize);
        assert_eq!(
            log.admit(8),
            Some(u64::from(9 * MOST_A_SECOND)),
            "the next second says what was left out"
        );
        assert_eq!(log.admit(8), Some(0));
    }
}
