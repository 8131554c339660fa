//! Selection: filters first, then the policy; a refusal says why for every worker.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::Rng;

use super::breaker::{BreakerOptions, BreakerState};
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
    /// Workers that might be chosen have all the requests they should have.
    Saturated {
        /// How many serve the model, whatever their state.
        workers: usize,
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
            NoWorker::Saturated { workers } => {
                write!(f, "{workers} workers serve it, and all that may be chosen are saturated")
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

/// What selection may know beside the workers and the request.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Now, in milliseconds that never go back; for breakers.
    pub now_ms: u64,
    /// How breakers open.
    pub breaker: BreakerOptions,
    /// Requests a worker should have at once where its registration does not say.
    pub max_requests: u32,
}

/// Chooses a worker for `request`, never one of `tried`.
///
/// Workers this replica could not connect to, or whose breaker is open, are left out while any
/// other is left. Where all others are saturated, the request had better wait
/// ([`NoWorker::Saturated`]). Where there are no others, one that was left out is chosen: a
/// failed attempt costs less than a refusal.
pub fn select(
    view: &RegistryView,
    policy: &dyn Policy,
    request: &RouteRequest<'_>,
    limits: &Limits,
    tried: &[WorkerId],
    rng: &mut dyn Rng,
) -> Result<Selection, NoWorker> {
    let serving = match request.model {
        Some(model) => view.by_model.get(model).ok_or_else(|| unknown_model(view))?.as_slice(),
        None if view.workers.is_empty() => return Err(NoWorker::RegistryEmpty),
        None => &view.all,
    };
    let mut open = Vec::with_capacity(serving.len());
    let mut doubtful = Vec::new();
    let mut saturated = false;
    for &position in serving {
        let worker = &view.workers[position];
        if filter(worker, tried).is_some() {
            continue;
        }
        if worker.live.unreachable.load(Ordering::Relaxed)
            || worker.live.breaker.state(limits.now_ms) == BreakerState::Open
        {
            doubtful.push(worker);
        } else if worker.is_saturated(limits.max_requests) {
            saturated = true;
        } else {
            open.push(worker);
        }
    }
    while !open.is_empty() {
        let candidates = open.len();
        let picked = policy.pick(&open, request, rng);
        debug_assert!(picked < candidates, "{} picked {picked} of {candidates}", policy.name());
        let picked = picked.min(candidates - 1);
        if open[picked].live.breaker.enter(limits.now_ms, &limits.breaker) {
            let worker = Arc::clone(open[picked]);
            return Ok(Selection { worker, candidates, last_resort: false });
        }
        // Somebody else's request is the trial of this half-open breaker.
        doubtful.push(open.swap_remove(picked));
    }
    if saturated {
        return Err(NoWorker::Saturated { workers: serving.len() });
    }
    if doubtful.is_empty() {
        return Err(all_filtered(view, serving, tried));
    }
    let picked = policy.pick(&doubtful, request, rng).min(doubtful.len() - 1);
    let worker = Arc::clone(doubtful[picked]);
    Ok(Selection { worker, candidates: doubtful.len(), last_resort: true })
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
