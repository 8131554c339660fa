//! Names that stand in the configuration.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::NameService;
use super::answer::{Answer, Endpoint, Standing};
use super::board::NameState;

/// Names with their endpoints, which never change.
#[derive(Debug, Default)]
pub struct FixedNames {
    names: BTreeMap<String, Arc<Answer>>,
}

impl FixedNames {
    /// Of names, addresses and their weights; a name that is there several times has all of them.
    pub fn new(entries: impl IntoIterator<Item = (String, String, u32)>) -> Self {
        let mut names: BTreeMap<String, Vec<Endpoint>> = BTreeMap::new();
        for (name, address, weight) in entries {
            names.entry(name).or_default().push(Endpoint { address, weight, standing: Standing::Ready });
        }
        let names = names.into_iter().map(|(name, endpoints)| (name, Arc::new(Answer::new(endpoints))));
        Self { names: names.collect() }
    }
}

impl NameService for FixedNames {
    fn provider(&self) -> &'static str {
        "static"
    }

    fn answer(&self, name: &str) -> Option<Arc<Answer>> {
        self.names.get(name).cloned()
    }

    fn states(&self) -> Vec<NameState> {
        let state = |(name, answer): (&String, &Arc<Answer>)| NameState {
            name: name.clone(),
            answer: Some(Arc::clone(answer)),
            age: Some(Duration::ZERO),
            expired: false,
            trouble: None,
            failures: 0,
            lists: 1,
            changes: 1,
        };
        self.names.iter().map(state).collect()
    }
}
