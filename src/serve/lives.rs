//! Whether an engine has begun anew: what was reckoned of its blocks is void then. Engines with
//! events tell by their numbers; of the others the start of their process tells, or that they have
//! read less than before, or that they were away, whichever they give to know.

use std::collections::HashMap;
use std::sync::Arc;

use crate::cluster::api::ControlPlane;
use crate::engines::probe::EngineLife;
use crate::ids::WorkerIx;
use crate::routing::view::WorkerView;
use crate::state::command::{CacheCommand, CacheOutcome};
use crate::state::ranks::{Knowledge, Ranks};

/// What is known of one engine.
#[derive(Debug, Default)]
struct Watched {
    /// The start of its process, as the cluster was told.
    told: Option<u64>,
    /// What it had read when it was last asked.
    read: Option<f64>,
    /// It was offline, by committed decision, since it was last asked.
    away: bool,
    /// It has begun anew, and the cluster was not told.
    anew: bool,
}

impl Watched {
    /// Takes note of what it says; what the cluster has to be told.
    fn note(&mut self, life: EngineLife) -> Option<Option<u64>> {
        let before = std::mem::replace(&mut self.read, life.prompt_tokens);
        let away = std::mem::take(&mut self.away);
        if let Some(started) = life.started_ms {
            return (self.told != Some(started)).then_some(Some(started));
        }
        self.anew |= match (before, life.prompt_tokens) {
            (Some(before), Some(now)) => now < before,
            // It does not say. To have been away is enough: less is lost by forgetting its blocks
            // than by looking for them in vain.
            _ => away,
        };
        self.anew.then_some(None)
    }

    /// The cluster was told.
    fn told(&mut self, life: Option<u64>) {
        (self.told, self.anew) = (life, false);
    }
}

/// All engines that this replica asks.
#[derive(Debug, Default)]
pub(super) struct Lives(HashMap<WorkerIx, Watched>);

impl Lives {
    /// Forgets engines that others ask, and takes note of who is offline.
    pub(super) fn keep(&mut self, ours: &[Arc<WorkerView>]) {
        self.0.retain(|ix, _| ours.iter().any(|worker| worker.record.ix == *ix));
        for worker in ours.iter().filter(|worker| !worker.record.online) {
            self.0.entry(worker.record.ix).or_default().away = true;
        }
    }

    /// Takes note of what an engine says of itself, and tells the cluster if it has begun anew.
    /// False if the cluster cannot be told now.
    pub(super) async fn note(
        &mut self,
        plane: &dyn ControlPlane,
        ranks: &Ranks,
        worker: &WorkerView,
        life: EngineLife,
    ) -> bool {
        let ix = worker.record.ix;
        if !ranks.of(ix).any(|(_, record)| record.knowledge == Knowledge::Predicted) {
            return true;
        }
        let watched = self.0.entry(ix).or_default();
        let Some(life) = watched.note(life) else { return true };
        match plane.propose_cache(CacheCommand::Life { worker: ix, life }).await {
            Ok(CacheOutcome::Done | CacheOutcome::Unknown) => {
                tracing::info!(worker = %worker.id(), ?life, "the engine's process, whose blocks are reckoned");
                watched.told(life);
                true
            }
            Ok(CacheOutcome::Refused) => true,
            other => {
                tracing::debug!(worker = %worker.id(), ?other, "the cluster was not told of an engine's restart");
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(started_ms: Option<u64>, prompt_tokens: Option<f64>) -> EngineLife {
        EngineLife { started_ms, prompt_tokens }
    }

    #[test]
    fn the_start_of_a_process_is_told_until_the_cluster_knows_it() {
        let mut watched = Watched::default();
        assert_eq!(watched.note(life(Some(5), Some(9.0))), Some(Some(5)));
        assert_eq!(watched.note(life(Some(5), Some(9.0))), Some(Some(5)), "it was not heard");
        watched.told(Some(5));
        watched.away = true;
        assert_eq!(watched.note(life(Some(5), Some(2.0))), None, "it was only out of reach");
        assert_eq!(watched.note(life(Some(6), Some(2.0))), Some(Some(6)));
    }

    #[test]
    fn who_does_not_say_when_it_began_is_known_by_what_it_read_or_by_having_been_away() {
        let mut watched = Watched::default();
        assert_eq!(watched.note(life(None, Some(9.0))), None);
        watched.away = true;
        assert_eq!(watched.note(life(None, Some(9.0))), None, "it was only out of reach");
        assert_eq!(watched.note(life(None, Some(3.0))), Some(None));
        assert_eq!(watched.note(life(None, Some(4.0))), Some(None), "it was not heard");
        watched.told(None);
        assert_eq!(watched.note(life(None, Some(4.0))), None);

        let mut silent = Watched::default();
        assert_eq!(silent.note(life(None, None)), None);
        silent.away = true;
        assert_eq!(silent.note(life(None, None)), Some(None));
        silent.told(None);
        assert_eq!(silent.note(life(None, None)), None);
    }
}
