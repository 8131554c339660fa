//! Which requests of this replica are certainly at work on a worker: those that began, or whose
//! answer had another piece, lately. What an engine says of itself may not take away from them.
//!
//! Time is counted in eras, which [`Lately::turn`] begins; a request is counted once in each era in
//! which something was heard of it, and counts until the era after that has ended.

use std::sync::atomic::{AtomicU32, Ordering};

/// Requests of which something was heard, in this era and in the one before.
#[derive(Debug, Default)]
pub struct Lately {
    era: AtomicU32,
    now: AtomicU32,
    before: AtomicU32,
}

impl Lately {
    /// Something was heard of a request; `counted` is the era in which it was counted last. Whether
    /// it had not been counted in this one.
    pub fn heard(&self, counted: &mut Option<u32>) -> bool {
        let era = self.era.load(Ordering::Relaxed);
        let is_first = *counted != Some(era);
        if is_first {
            *counted = Some(era);
            self.count();
        }
        is_first
    }

    /// Counts a request that is counted elsewhere in the same eras.
    pub fn count(&self) {
        self.now.fetch_add(1, Ordering::Relaxed);
    }

    /// Begins the next era.
    pub fn turn(&self) {
        // First, so that whoever comes in between is counted in one of the two.
        self.era.fetch_add(1, Ordering::Relaxed);
        self.before.store(self.now.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }

    /// How many there are, some of which may have ended meanwhile.
    pub fn requests(&self) -> u32 {
        self.now.load(Ordering::Relaxed).max(self.before.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_once_an_era_and_until_the_next_one_has_ended() {
        let lately = Lately::default();
        let (mut one, mut other) = (None, None);
        for _ in 0..3 {
            lately.heard(&mut one);
            lately.heard(&mut other);
        }
        assert_eq!(lately.requests(), 2);
        lately.turn();
        lately.heard(&mut one);
        assert_eq!(lately.requests(), 2, "the other one is quiet, but not for long yet");
        lately.turn();
        assert_eq!(lately.requests(), 1);
        lately.turn();
        assert_eq!(lately.requests(), 0);
        lately.heard(&mut one);
        assert_eq!(lately.requests(), 1);
    }
}
