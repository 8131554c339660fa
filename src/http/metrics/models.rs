//! What is counted by model. Names come from clients, so they are counted only after a
//! registered worker was found for them, and only a bounded number of them have a label.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::Outcome;
use crate::telemetry::histogram::{BETWEEN_TOKENS, FIRST_TOKEN, Histogram};

/// Models with a label of their own: the first to be asked for since the start.
pub(super) const MOST_MODELS: usize = 100;
/// Longest name of one, in bytes.
const MOST_NAME: usize = 128;
/// The label of all others; a model of this name is one of them.
pub(super) const OTHERS: &str = "_other";

/// One model's counts.
#[derive(Debug)]
pub(super) struct ModelCounts {
    pub(super) name: String,
    pub(super) requests: [AtomicU64; Outcome::ALL.len()],
    pub(super) first_token: Histogram,
    pub(super) between_tokens: Histogram,
}

impl ModelCounts {
    fn new(name: &str) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            requests: Default::default(),
            first_token: Histogram::new(&FIRST_TOKEN),
            between_tokens: Histogram::new(&BETWEEN_TOKENS),
        })
    }
}

/// All models' counts. Looking one up takes no lock.
#[derive(Debug)]
pub(super) struct Models {
    known: ArcSwap<HashMap<String, Arc<ModelCounts>>>,
    others: Arc<ModelCounts>,
    adding: Mutex<()>,
}

impl Default for Models {
    fn default() -> Self {
        Self { known: ArcSwap::default(), others: ModelCounts::new(OTHERS), adding: Mutex::default() }
    }
}

impl Models {
    /// The counts of a model that some worker serves.
    pub(super) fn get(&self, name: &str) -> Arc<ModelCounts> {
        let known = self.known.load();
        if let Some(counts) = known.get(name) {
            return Arc::clone(counts);
        }
        if known.len() >= MOST_MODELS || name.len() > MOST_NAME || name == OTHERS {
            return Arc::clone(&self.others);
        }
        drop(known);
        self.add(name)
    }

    fn add(&self, name: &str) -> Arc<ModelCounts> {
        let _adding = self.adding.lock();
        let mut known = self.known.load().as_ref().clone();
        // Somebody else may have been quicker.
        if let Some(counts) = known.get(name) {
            return Arc::clone(counts);
        }
        if known.len() >= MOST_MODELS {
            return Arc::clone(&self.others);
        }
        let counts = ModelCounts::new(name);
        known.insert(name.to_owned(), Arc::clone(&counts));
        self.known.store(Arc::new(known));
        counts
    }

    /// All that have been asked for, by name.
    pub(super) fn list(&self) -> Vec<Arc<ModelCounts>> {
        let mut all: Vec<_> = self.known.load().values().cloned().collect();
        all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        all.push(Arc::clone(&self.others));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_models_get_a_label() {
        let models = Models::default();
        for number in 0..2 * MOST_MODELS {
            models.get(&format!("m{number:04}"));
        }
        assert_eq!(models.list().len(), MOST_MODELS + 1);
        assert_eq!(models.get("m0000").name, "m0000");
        assert_eq!(models.get("m0150").name, OTHERS);
        assert!(Arc::ptr_eq(&models.get("m0007"), &models.get("m0007")));
        assert_eq!(Models::default().get(&"x".repeat(MOST_NAME + 1)).name, OTHERS);
        assert_eq!(Models::default().get(OTHERS).name, OTHERS);
    }
}
