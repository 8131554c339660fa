//! Signs of life heard at this replica, gathered and reported to the cluster in one command
//! at most four times a second, and only when the cluster does not know as much already.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::machine::Cell;
use super::proposer::Proposer;
use crate::ids::WorkerId;
use crate::state::command::ControlCommand;
use crate::state::control::{ControlState, MAX_WORKERS};
use crate::state::worker::Liveness;

/// Time between two reports; a twentieth of the worker timeout where that is less, so that a
/// report is never what makes a worker late.
const PERIOD: Duration = Duration::from_millis(250);

#[derive(Default)]
struct Heard {
    heartbeats: BTreeSet<WorkerId>,
    probed: BTreeSet<WorkerId>,
    failed: BTreeSet<WorkerId>,
}

/// See the module. Bounded by the registry: only known workers are taken note of.
#[derive(Default)]
pub struct Pulse {
    heard: Mutex<Heard>,
}

impl Pulse {
    /// A worker's own heartbeat.
    pub fn heartbeat(&self, id: &WorkerId) {
        let mut heard = self.heard.lock();
        if heard.heartbeats.len() < MAX_WORKERS {
            heard.heartbeats.insert(id.clone());
        }
    }

    /// The result of a probe; the latest counts.
    pub fn probed(&self, id: &WorkerId, healthy: bool) {
        let mut heard = self.heard.lock();
        let heard = &mut *heard;
        let (to, from) = if healthy {
            (&mut heard.probed, &mut heard.failed)
        } else {
            (&mut heard.failed, &mut heard.probed)
        };
        from.remove(id);
        if to.len() < MAX_WORKERS {
            to.insert(id.clone());
        }
    }

    /// What the cluster should be told. A sign of life is worth an entry only when a quarter of
    /// the timeout has passed since the last one that any replica reported, or when it changes
    /// something.
    fn take(&self, state: &ControlState, worker_timeout_ms: u64) -> Option<ControlCommand> {
        let heard = std::mem::take(&mut *self.heard.lock());
        let now_ms = state.now_ms();
        let news = |id: &WorkerId, heartbeat: bool| {
            state.workers().get(id).is_some_and(|w| {
                !w.online
                    || !w.failed_by.is_empty()
                    || (heartbeat && w.liveness == Liveness::Probe)
                    || now_ms.saturating_sub(w.last_heard_ms) >= worker_timeout_ms / 4
            })
        };
        let failing = |id: &WorkerId| {
            state.workers().get(id).is_some_and(|w| w.online && w.liveness == Liveness::Probe)
        };
        let heartbeats: Vec<_> = heard.heartbeats.into_iter().filter(|id| news(id, true)).collect();
        let probed: Vec<_> = heard.probed.into_iter().filter(|id| news(id, false)).collect();
        let failed: Vec<_> = heard.failed.into_iter().filter(failing).collect();
        if heartbeats.is_empty() && probed.is_empty() && failed.is_empty() {
            return None;
        }
        Some(ControlCommand::Heard { heartbeats, probed, failed })
    }
}

/// Reports until aborted.
pub async fn run(
    pulse: Arc<Pulse>,
    control: Arc<Cell<ControlState>>,
    proposer: Proposer<ControlState>,
    worker_timeout: Duration,
) {
    let worker_timeout_ms = worker_timeout.as_millis() as u64;
    let mut period = tokio::time::interval(PERIOD.min(worker_timeout / 20).max(Duration::from_millis(5)));
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        let report = control.read(|state| pulse.take(state, worker_timeout_ms));
        if let Some(report) = report {
            // With a full queue there is no leader; what is heard then will be heard again.
            let _ = proposer.submit(&[report]);
        }
    }
}
