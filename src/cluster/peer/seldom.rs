//! What is tried again for ever is said now and then: refusals must not fill the disk.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Time between two lines about the same.
const EVERY: Duration = Duration::from_secs(5);
/// Most things remembered; then all are forgotten, and said once more.
const MOST: usize = 256;

/// When something was said last.
#[derive(Debug, Default)]
pub struct Seldom {
    said: Mutex<HashMap<String, Instant>>,
}

impl Seldom {
    /// Whether it is time to say something about this.
    pub fn is_time(&self, about: &str) -> bool {
        let mut said = self.said.lock();
        if said.get(about).is_some_and(|at| at.elapsed() < EVERY) {
            return false;
        }
        if said.len() >= MOST {
            said.clear();
        }
        said.insert(about.to_owned(), Instant::now());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_said_once_and_memory_is_bounded() {
        let seldom = Seldom::default();
        assert!(seldom.is_time("a") && seldom.is_time("b") && !seldom.is_time("a"));
        for n in 0..10 * MOST {
            assert!(seldom.is_time(&n.to_string()));
        }
        assert!(seldom.said.lock().len() <= MOST);
    }
}
