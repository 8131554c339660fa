//! Selection: filters first, then the policy; a refusal says why for every worker.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::Rng;

use super::policy::{Policy, RouteRequest};
use super::view::{RegistryView, WorkerView};
use crate::ids::WorkerId;
use crate::state::worker::WorkerRole;

/// A chosen worker.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Which.
    pub worker: Arc<WorkerView>,
    /// How many it was chosen from.
    pub candidates: usize,
    /// All candidates were marked unreachable from here; one is tried all the same.
    pub last_resort: bool,
}

/// Why a worker could not be chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filtered {
    /// Offline by the cluster's decision.
    Offline,
    /// An operator asked for no new requests.
    Draining,
    /// It does only a part of a request.
    Role(WorkerRole),
    /// Already tried for this request.
    Tried,
}

impl fmt::Display for Filtered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Filtered::Offline => f.write_str("offline"),
            Filtered::Draining => f.write_str("draining"),
            Filtered::Role(role) => write!(f, "serves the {} role only", role.name()),
            Filtered::Tried => f.write_str("tried for this request and failed"),
        }
    }
}

/// Why no worker was chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NoWorker {
    /// No worker is registered.
    RegistryEmpty,
    /// No registered worker serves the model.
    UnknownModel {
        /// Names that are served, sorted, at most [`NoWorker::MOST_LISTED`].
        known: Vec<String>,
        /// Further names not listed.
        more: usize,
    },
    /// Workers serve the model, none may be chosen.
    AllFiltered {
        /// Why, by worker, at most [`NoWorker::MOST_LISTED`].
        reasons: Vec<(WorkerId, Filtered)>,
        /// Further workers not listed.
        more: usize,
    },
}

impl NoWorker {
    /// Longest list in a refusal, so that an error stays readable and bounded.
    pub const MOST_LISTED: usize = 16;
}

impl fmt::Display for NoWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list_end = |f: &mut fmt::Formatter<'_>, more: usize| {
            if more > 0 { write!(f, " and {more} more") } else { Ok(()) }
        };
        match self {
            NoWorker::RegistryEmpty => f.write_str("no worker is registered"),
            NoWorker::UnknownModel { known, more } => {
                f.write_str(if known.is_empty() { "no model is served" } else { "served models: " })?;
                f.write_str(&known.join(", "))?;
                list_end(f, *more)
            }
            NoWorker::AllFiltered { reasons, more } => {
                for (position, (id, why)) in reasons.iter().enumerate() {
                    let comma = if position > 0 { ", " } else { "" };
                    write!(f, "{comma}{id}: {why}")?;
                }
                list_end(f, *more)
            }
        }
    }
}

fn filter(worker: &WorkerView, tried: &[WorkerId]) -> Option<Filtered> {
    let record = &worker.record;
    if tried.contains(worker.id()) {
        Some(Filtered::Tried)
    } else if record.drain {
        Some(Filtered::Draining)
    } else if !record.online {
        Some(Filtered::Offline)
    } else if record.spec.role != WorkerRole::Aggregated {
        Some(Filtered::Role(record.spec.role))
    } else {
        None
    }
}

/// Chooses a worker for `request`, never one of `tried`.
///
/// Workers this replica could not connect to are left out while any other is left; when they
/// are all there is, one of them is chosen: a failed attempt costs less than a refusal.
pub fn select(
    view: &RegistryView,
    policy: &dyn Policy,
    request: &RouteRequest<'_>,
    tried: &[WorkerId],
    rng: &mut dyn Rng,
) -> Result<Selection, NoWorker> {
    let Some(serving) = view.by_model.get(request.model) else {
        return Err(unknown_model(view));
    };
    let mut open = Vec::with_capacity(serving.len());
    let mut unreachable = Vec::new();
    for &position in serving {
        let worker = &view.workers[position];
        if filter(worker, tried).is_some() {
            continue;
        }
        if worker.live.unreachable.load(Ordering::Relaxed) {
            unreachable.push(worker);
        } else {
            open.push(worker);
        }
    }
    let last_resort = open.is_empty();
    let candidates = if last_resort { &unreachable } else { &open };
    if candidates.is_empty() {
        return Err(all_filtered(view, serving, tried));
    }
    let picked = policy.pick(candidates, request, rng);
    debug_assert!(picked < candidates.len(), "{} picked {picked} of {}", policy.name(), candidates.len());
    let worker = Arc::clone(candidates[picked.min(candidates.len() - 1)]);
    Ok(Selection { worker, candidates: candidates.len(), last_resort })
}

fn unknown_model(view: &RegistryView) -> NoWorker {
    if view.workers.is_empty() {
        return NoWorker::RegistryEmpty;
    }
    let mut known: Vec<String> = view.by_model.keys().cloned().collect();
    known.sort_unstable();
    let more = known.len().saturating_sub(NoWorker::MOST_LISTED);
    known.truncate(NoWorker::MOST_LISTED);
    NoWorker::UnknownModel { known, more }
}

fn all_filtered(view: &RegistryView, serving: &[usize], tried: &[WorkerId]) -> NoWorker {
    let mut reasons: Vec<(WorkerId, Filtered)> = serving
        .iter()
        .map(|&position| &view.workers[position])
        .filter_map(|worker| filter(worker, tried).map(|why| (worker.id().clone(), why)))
        .collect();
    let more = reasons.len().saturating_sub(NoWorker::MOST_LISTED);
    reasons.truncate(NoWorker::MOST_LISTED);
    NoWorker::AllFiltered { reasons, more }
}
