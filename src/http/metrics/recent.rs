//! What went wrong lately, for the status page.

use std::collections::VecDeque;
use std::time::Instant;

use parking_lot::Mutex;

/// The newest errors, at most [`RecentErrors::MOST`]; the oldest gives way.
#[derive(Debug, Default)]
pub struct RecentErrors {
    ring: Mutex<VecDeque<(Instant, String)>>,
}

impl RecentErrors {
    /// Errors kept.
    pub const MOST: usize = 64;
    /// Longest text kept of one, in bytes.
    const MOST_TEXT: usize = 512;

    /// Adds one.
    pub fn push(&self, mut what: String) {
        let mut end = what.len().min(Self::MOST_TEXT);
        while !what.is_char_boundary(end) {
            end -= 1;
        }
        what.truncate(end);
        let mut ring = self.ring.lock();
        if ring.len() == Self::MOST {
            ring.pop_front();
        }
        ring.push_back((Instant::now(), what));
    }

    /// All of them, newest first, with their age in milliseconds.
    pub fn list(&self) -> Vec<(u64, String)> {
        let ring = self.ring.lock();
        ring.iter().rev().map(|(at, what)| (at.elapsed().as_millis() as u64, what.clone())).collect()
    }
}
