//! Signs of life heard at this replica, gathered and reported to the cluster in one command
//! at most four times a second, and only when the cluster does not know as much already.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::machine::{Cell, Raft};
use super::proposer::Proposer;
use crate::ids::WorkerId;
use crate::state::command::{ControlCommand, Sign};
use crate::state::control::{ControlState, MAX_WORKERS};
use crate::state::ksana::{KsanaCommand, MAX_NAME, MAX_NODES, Rules};
use crate::state::worker::Liveness;

/// Time between two reports; a twentieth of the worker timeout where that is less, so that a
/// report is never what makes a worker late.
const PERIOD: Duration = Duration::from_millis(250);

/// Most entries of each kind in one report; the rest waits for the next. Keeps a report far below
/// what the log takes in one entry.
const MOST: usize = 512;

/// A KsanaLLM node's sign is reported when so much time has passed since the last one, or a quarter of
/// the timeout where that is less: often enough that it shows who knew of what before it began anew.
const KSANA_PERIOD: Duration = Duration::from_secs(1);

/// How KsanaLLM's nodes go offline.
#[derive(Clone, Copy, Debug)]
pub struct KsanaWatch {
    /// As configured.
    pub rules: Rules,
    /// How long after that a node is forgotten.
    pub forget: Duration,
}

#[derive(Default)]
struct Heard {
    /// When the newest came that has not been reported.
    heartbeats: BTreeMap<WorkerId, Instant>,
    probed: BTreeMap<WorkerId, Instant>,
    failed: BTreeSet<WorkerId>,
    /// KsanaLLM's nodes, by id.
    ksana: BTreeMap<String, Instant>,
    ksana_rules: Option<Rules>,
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
            heard.heartbeats.insert(id.clone(), Instant::now());
        }
    }

    /// A KsanaLLM node's heartbeat.
    pub fn ksana_heard(&self, id: &str, rules: Rules) {
        let mut heard = self.heard.lock();
        heard.ksana_rules = Some(rules);
        if id.len() <= MAX_NAME && heard.ksana.len() < MAX_NODES {
            heard.ksana.insert(id.to_owned(), Instant::now());
        }
    }

    fn take_ksana(&self, state: &ControlState) -> Option<ControlCommand> {
        let mut heard = self.heard.lock();
        let rules = heard.ksana_rules?;
        let (now, now_ms) = (Instant::now(), state.now_ms());
        let period_ms = (KSANA_PERIOD.as_millis() as u64).min(u64::from(rules.timeout_ms) / 4);
        let mut nodes = Vec::new();
        heard.ksana.retain(|id, at| {
            let age_ms = (now - *at).as_millis() as u64;
            let Some(node) = state.ksana().node(id).filter(|_| age_ms < u64::from(rules.timeout_ms)) else {
                return false;
            };
            if node.online && now_ms.saturating_sub(age_ms) < node.last_heard_ms {
                return false;
            }
            let is_due = !node.online || now_ms.saturating_sub(node.last_heard_ms) >= period_ms;
            if is_due && nodes.len() < MOST {
                nodes.push((id.clone(), age_ms as u32));
                return false;
            }
            true
        });
        (!nodes.is_empty()).then_some(ControlCommand::Ksana(KsanaCommand::Heard { nodes, rules }))
    }

    /// The result of a probe; the latest counts.
    pub fn probed(&self, id: &WorkerId, healthy: bool) {
        let mut heard = self.heard.lock();
        if healthy {
            heard.failed.remove(id);
            if heard.probed.len() < MAX_WORKERS {
                heard.probed.insert(id.clone(), Instant::now());
            }
        } else {
            heard.probed.remove(id);
            if heard.failed.len() < MAX_WORKERS {
                heard.failed.insert(id.clone());
            }
        }
    }

    /// What the cluster should be told. A sign of life is worth an entry only when a quarter of
    /// the timeout has passed since the last one that any replica reported, or when it changes
    /// something; until then it is kept, so that the last one before a silence is not lost.
    fn take(&self, state: &ControlState, worker_timeout: Duration) -> Option<ControlCommand> {
        let mut heard = self.heard.lock();
        let (now, now_ms) = (Instant::now(), state.now_ms());
        let timeout_ms = worker_timeout.as_millis() as u64;
        let signs = |of: &mut BTreeMap<WorkerId, Instant>, heartbeat: bool| {
            let mut due = Vec::new();
            of.retain(|id, at| {
                let age = now - *at;
                let Some(worker) = state.workers().get(id).filter(|_| age < worker_timeout) else {
                    return false;
                };
                let age_ms = age.as_millis() as u64;
                if worker.online && now_ms.saturating_sub(age_ms) < worker.last_heard_ms {
                    return false;
                }
                let changes = !worker.online
                    || !worker.failed_by.is_empty()
                    || (heartbeat && worker.liveness == Liveness::Probe);
                if due.len() < MOST
                    && (changes || now_ms.saturating_sub(worker.last_heard_ms) >= timeout_ms / 4)
                {
                    due.push(Sign { id: id.clone(), age_ms: age_ms as u32 });
                    return false;
                }
                true
            });
            due
        };
        let heard = &mut *heard;
        let heartbeats = signs(&mut heard.heartbeats, true);
        let probed = signs(&mut heard.probed, false);
        let failing = |id: &WorkerId| {
            state.workers().get(id).is_some_and(|w| w.online && w.liveness == Liveness::Probe)
        };
        let failed: Vec<_> =
            std::mem::take(&mut heard.failed).into_iter().filter(failing).take(MOST).collect();
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
    let mut period = tokio::time::interval(PERIOD.min(worker_timeout / 20).max(Duration::from_millis(5)));
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        let report: Vec<ControlCommand> = control.read(|state| {
            let workers = pulse.take(state, worker_timeout);
            workers.into_iter().chain(pulse.take_ksana(state)).collect()
        });
        if !report.is_empty() {
            // With a full queue there is no leader; what is heard then will be heard again.
            let _ = proposer.submit(&report);
        }
    }
}

/// While this replica leads, has KsanaLLM's nodes judged that are overdue by the committed clock, until
/// aborted. In strict mode heartbeats do that.
pub async fn watch_ksana(
    watch: KsanaWatch,
    raft: Raft,
    control: Arc<Cell<ControlState>>,
    proposer: Proposer<ControlState>,
) {
    let KsanaWatch { rules, forget } = watch;
    let forget_ms = u64::try_from(forget.as_millis()).unwrap_or(u64::MAX);
    let mut period = tokio::time::interval(PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    if rules.strict {
        return;
    }
    loop {
        period.tick().await;
        if !raft.is_leader() {
            continue;
        }
        let wanted = control.read(|state| state.ksana().wants_judgement(state.now_ms(), rules, forget_ms));
        if wanted
            && let Ok(judged) =
                proposer.submit(&[ControlCommand::Ksana(KsanaCommand::Judge { rules, forget_ms })])
        {
            // One after the other: what is judged must show before it is looked at again.
            let _ = judged.await;
        }
    }
}
