//! Parts of a request that different workers may do, and who may be asked for which.

use super::policy::Candidate;
use crate::state::worker::{Connector, WorkerRole, WorkerSpec};

/// What is wanted of a worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Part {
    /// All of it, of a worker that does nothing else.
    #[default]
    Whole,
    /// All of it; of a decode worker too, if its engine can.
    Alone {
        /// Most tokens of the prompt that it may have to compute; `None` for any number.
        most_uncached: Option<u32>,
    },
    /// What comes after the prefill, which somebody does who hands over in one of these ways.
    Decode(Connectors),
    /// The prefill, for a worker that gets it this way.
    Prefill(Connector),
}

impl Part {
    /// Whether the worker is one to be asked for this.
    pub(super) fn may_be_of(self, spec: &WorkerSpec) -> bool {
        match (self, spec.role) {
            (Part::Whole, role) => role == WorkerRole::Aggregated,
            (Part::Alone { .. }, _) => spec.works_alone(),
            (Part::Decode(connectors), role) => {
                role == WorkerRole::Decode && connectors.has(spec.connector())
            }
            (Part::Prefill(connector), role) => role == WorkerRole::Prefill && spec.connector() == connector,
        }
    }

    /// Whether the rank has enough of the prompt.
    pub(super) fn is_near(self, candidate: &Candidate<'_>, prompt_tokens: u32) -> bool {
        let Part::Alone { most_uncached: Some(most) } = self else { return true };
        let cached = candidate.overlap.gpu.saturating_mul(candidate.worker.block_size());
        prompt_tokens.saturating_sub(cached) <= most
    }

    /// Whether the role that a client named a worker for is this part's: of a pair it names one.
    pub(super) fn is_pinned_by(self, role: Option<WorkerRole>) -> bool {
        match self {
            Part::Whole | Part::Alone { .. } => true,
            Part::Decode(_) => role != Some(WorkerRole::Prefill),
            Part::Prefill(_) => role == Some(WorkerRole::Prefill),
        }
    }
}

/// Some of the ways of handing a KV cache on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Connectors(u8);

impl Connectors {
    /// With this one too.
    pub fn with(self, connector: Connector) -> Self {
        Self(self.0 | 1 << connector as u8)
    }

    /// Those that are among `others` too.
    pub fn and(self, others: Self) -> Self {
        Self(self.0 & others.0)
    }

    /// Whether it is one of them.
    pub fn has(self, connector: Connector) -> bool {
        self.0 & 1 << connector as u8 != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connector_is_told_from_the_others() {
        for one in Connector::ALL {
            let only = Connectors::default().with(one);
            assert!(Connector::ALL.into_iter().all(|other| only.has(other) == (one == other)), "{only:?}");
        }
        assert!(Connectors::default().is_empty() && !Connectors::default().with(Connector::Nixl).is_empty());
    }
}
