//! Selection: filters first, then the policy; a refusal says why for every worker.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::Rng;

use super::breaker::{BreakerOptions, BreakerState};
use super::cost::Terms;
use super::part::{Connectors, Part};
use super::policy::{Candidate, Policy, RouteRequest};
use super::stale::Freshness;
use super::view::{RegistryView, WorkerView};
use crate::ids::WorkerId;
use crate::kv::types::{Overlap, RankIx};
use crate::state::load::LoadSum;
use crate::state::worker::WorkerRole;

/// A chosen worker.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Which.
    pub worker: Arc<WorkerView>,
    /// Which of its data-parallel ranks; 0 where there is but one.
    pub rank: u32,
    /// What that rank holds of the prompt.
    pub overlap: Overlap,
    /// Blocks after those that requests on their way there will bring.
    pub coming: u32,
    /// How many ranks it was chosen from.
    pub candidates: usize,
    /// All candidates were marked unreachable from here; one is tried all the same.
    pub last_resort: bool,
    /// What was booked on the worker when it was looked at.
    pub seen: LoadSum,
    /// What it was chosen for.
    pub part: Part,
}

impl Selection {
    /// What to book for a prompt: tokens whose prefill is outstanding, those that the accelerator
    /// holds or will hold left out, and the blocks that it will hold. One token at least is computed always.
    /// A worker that only decodes has no prefill to do.
    pub fn to_book(&self, prompt_tokens: u32) -> (u32, u32) {
        let block = self.worker.block_size();
        if matches!(self.part, Part::Decode(_)) {
            return (0, prompt_tokens.div_ceil(block));
        }
        let cached = self.overlap.gpu.saturating_add(self.coming).saturating_mul(block);
        let prefill = prompt_tokens.saturating_sub(cached).max(prompt_tokens.min(1));
        (prefill, prompt_tokens.div_ceil(block))
    }
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
    /// The client named another one, or a rank that it has not.
    Pinned,
    /// A label that was asked for is missing or has another value.
    Label,
    /// It has all the requests it should have.
    Saturated,
    /// It has more prefill or blocks than the thresholds allow, and others have not.
    Overloaded,
    /// This replica could not connect to it lately.
    Unreachable,
    /// Its breaker is open.
    Breaker,
    /// It lacks too much of the prompt to do alone what others would do in two parts.
    Far,
}

impl fmt::Display for Filtered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Filtered::Offline => f.write_str("offline"),
            Filtered::Draining => f.write_str("draining"),
            Filtered::Role(role) => write!(f, "serves the {} role only", role.name()),
            Filtered::Tried => f.write_str("tried for this request and failed"),
            Filtered::Pinned => f.write_str("another worker or rank was asked for"),
            Filtered::Label => f.write_str("does not have the labels asked for"),
            Filtered::Saturated => f.write_str("has all the requests it should have"),
            Filtered::Overloaded => f.write_str("over the thresholds of load"),
            Filtered::Unreachable => f.write_str("cannot be reached from this replica"),
            Filtered::Far => f.write_str("lacks too much of the prompt to do it alone"),
            Filtered::Breaker => f.write_str("failed too often, left alone for a while"),
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

/// Ways in which prefill workers that might be asked hand over.
pub fn prefill_connectors(view: &RegistryView, request: &RouteRequest<'_>, tried: &[WorkerId]) -> Connectors {
    let serving = serving(view, request).unwrap_or_default();
    let workers = serving.iter().map(|&position| &view.workers[position]);
    let could = workers.filter(|worker| {
        let part = Part::Prefill(worker.record.spec.connector());
        filter(view, worker, &RouteRequest { part, ..*request }, tried).is_none()
    });
    could.fold(Connectors::default(), |all, worker| all.with(worker.record.spec.connector()))
}

fn filter(
    view: &RegistryView,
    worker: &WorkerView,
    request: &RouteRequest<'_>,
    tried: &[WorkerId],
) -> Option<Filtered> {
    let record = &worker.record;
    let role_of = |id: &WorkerId| view.worker(id).map(|worker| worker.record.spec.role);
    let pinned = request.pinned.filter(|pin| request.part.is_pinned_by(role_of(pin.worker)));
    let has = |(key, value): &(&str, &str)| record.spec.labels.get(*key).is_some_and(|v| v == value);
    let other = |rank: Option<u32>| rank.is_some_and(|rank| rank >= worker.dp_ranks());
    if pinned.is_some_and(|pin| pin.worker != worker.id() || other(pin.rank)) {
        Some(Filtered::Pinned)
    } else if !request.labels.iter().all(has) {
        Some(Filtered::Label)
    } else if tried.contains(worker.id()) {
        Some(Filtered::Tried)
    } else if record.drain {
        Some(Filtered::Draining)
    } else if !record.online {
        Some(Filtered::Offline)
    } else if !request.part.may_be_of(&record.spec) {
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
    /// Above what load a worker is left out while others are not.
    pub overload: Overload,
}

/// Load above which a rank is left out while others are not; `None` is no threshold.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Overload {
    /// Outstanding prefill tokens.
    pub prefill_tokens: Option<u64>,
    /// Share of its blocks that running requests hold, where its capacity is known.
    pub kv_share: Option<f64>,
}

impl Overload {
    fn has(&self, candidate: &Candidate<'_>) -> bool {
        let load = &candidate.load;
        let prefill = self.prefill_tokens.is_some_and(|most| load.prefill_tokens > most as i64);
        let capacity = candidate.worker.rank_capacity();
        let blocks = self
            .kv_share
            .zip(capacity)
            .is_some_and(|(share, blocks)| load.decode_blocks as f64 > share * blocks as f64);
        prefill || blocks
    }
}

/// Ranks of `worker` that may be asked, each with its load and what it holds.
fn ranks<'a>(
    worker: &'a Arc<WorkerView>,
    request: &RouteRequest<'a>,
    seen: LoadSum,
    peers_count: bool,
) -> impl Iterator<Item = Candidate<'a>> + use<'a> {
    let own = request.pinned.filter(|pin| pin.worker == worker.id());
    let (pinned, overlaps, predicted) = (own.and_then(|pin| pin.rank), request.overlaps, request.predicted);
    let all = 0..worker.dp_ranks();
    let names = worker.live.ranks();
    all.filter(move |rank| pinned.is_none_or(|pinned| pinned == *rank)).map(move |rank| {
        let ix = names.get(rank as usize).copied();
        let overlap = ix.map(|ix| overlap_of(overlaps, ix)).unwrap_or_default();
        let with_coming = ix.map(|ix| overlap_of(predicted, ix).blocks).unwrap_or_default();
        Candidate {
            worker,
            rank,
            load: worker.rank_load(rank, peers_count),
            overlap,
            coming: with_coming.saturating_sub(overlap.blocks),
            seen,
        }
    })
}

fn overlap_of(overlaps: &[Overlap], rank: RankIx) -> Overlap {
    match overlaps.binary_search_by_key(&rank, |overlap| overlap.rank) {
        Ok(at) => overlaps[at],
        Err(_) => Overlap { rank, ..Overlap::default() },
    }
}

/// Why a worker that passes the filters is avoided while there are others.
fn doubt(worker: &WorkerView, limits: &Limits) -> Option<Filtered> {
    if worker.live.unreachable.load(Ordering::Relaxed) {
        Some(Filtered::Unreachable)
    } else if worker.live.breaker.state(limits.now_ms) == BreakerState::Open {
        Some(Filtered::Breaker)
    } else {
        None
    }
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
    let serving = serving(view, request)?;
    let peers_count = Freshness::of(request.view_age_ms) != Freshness::OwnOnly;
    let mut open = Vec::with_capacity(serving.len());
    let mut doubtful = Vec::new();
    let mut saturated = false;
    for &position in serving {
        let worker = &view.workers[position];
        if filter(view, worker, request, tried).is_some() {
            continue;
        }
        let (seen, load) = (worker.live.booked(), worker.live.load());
        let near = |candidate: &Candidate<'_>| request.part.is_near(candidate, request.prompt_tokens);
        if doubt(worker, limits).is_some() {
            doubtful.extend(ranks(worker, request, seen, peers_count).filter(near));
        } else if worker.is_saturated_by(load, limits.max_requests) {
            saturated = true;
        } else {
            open.extend(ranks(worker, request, seen, peers_count).filter(near));
        }
    }
    if open.iter().any(|candidate| !limits.overload.has(candidate)) {
        open.retain(|candidate| !limits.overload.has(candidate));
    }
    while !open.is_empty() {
        let candidates = open.len();
        let picked = policy.pick(&open, request, rng);
        debug_assert!(picked < candidates, "{} picked {picked} of {candidates}", policy.name());
        let picked = open[picked.min(candidates - 1)];
        if picked.worker.live.breaker.enter(limits.now_ms, &limits.breaker) {
            return Ok(selection(&picked, request.part, candidates, false));
        }
        // Somebody else's request is the trial of this half-open breaker.
        let refused = |candidate: &Candidate<'_>| Arc::ptr_eq(candidate.worker, picked.worker);
        doubtful.extend(open.extract_if(.., |candidate| refused(candidate)));
    }
    if saturated {
        return Err(NoWorker::Saturated { workers: serving.len() });
    }
    if doubtful.is_empty() {
        return Err(all_filtered(view, serving, request, tried));
    }
    let picked = policy.pick(&doubtful, request, rng).min(doubtful.len() - 1);
    Ok(selection(&doubtful[picked], request.part, doubtful.len(), true))
}

fn selection(picked: &Candidate<'_>, part: Part, candidates: usize, last_resort: bool) -> Selection {
    let worker = Arc::clone(picked.worker);
    Selection {
        worker,
        rank: picked.rank,
        overlap: picked.overlap,
        coming: picked.coming,
        candidates,
        last_resort,
        seen: picked.seen,
        part,
    }
}

/// Positions of the workers that serve the model.
fn serving<'a>(view: &'a RegistryView, request: &RouteRequest<'_>) -> Result<&'a [usize], NoWorker> {
    match request.model {
        Some(model) => Ok(view.by_model.get(model).ok_or_else(|| unknown_model(view))?),
        None if view.workers.is_empty() => Err(NoWorker::RegistryEmpty),
        None => Ok(&view.all),
    }
}

/// What a decision knows of one rank.
#[derive(Clone, Debug)]
pub struct Explained {
    /// The worker.
    pub worker: WorkerId,
    /// Which of its ranks.
    pub rank: u32,
    /// What it holds of the prompt.
    pub overlap: Overlap,
    /// Blocks after those that requests on their way there will bring.
    pub coming: u32,
    /// What is to do there: what is booked, corrected.
    pub load: LoadSum,
    /// The part of `load` that its engine's own figures add to what is booked, or take off.
    pub correction: LoadSum,
    /// Its cost, if the policy goes by cost.
    pub terms: Option<Terms>,
    /// Why it may not be chosen, or is not while there are others.
    pub filtered: Option<Filtered>,
    /// If it may: why the policy chose another one.
    pub behind: Option<String>,
}

/// What [`select`] knew of each rank that serves the model, and why it chose the one that it did.
/// Chooses nothing and changes nothing.
pub fn explain(
    view: &RegistryView,
    policy: &dyn Policy,
    request: &RouteRequest<'_>,
    limits: &Limits,
    tried: &[WorkerId],
    chosen: Option<(&WorkerId, u32)>,
) -> Result<Vec<Explained>, NoWorker> {
    let considered = considered(view, request, limits, tried)?;
    let is_chosen = |c: &Candidate<'_>| chosen == Some((c.worker.id(), c.rank));
    // Loads move on: the chosen one may have got too much to do meanwhile.
    let open = considered.iter().filter(|(c, filtered)| filtered.is_none() || is_chosen(c));
    let open: Vec<Candidate<'_>> = open.map(|(c, _)| *c).collect();
    let best = open.iter().position(is_chosen);
    let mut at = 0;
    let explained = considered.iter().map(|(candidate, filtered)| {
        let mut explained = Explained::of(candidate, policy, request, *filtered);
        if filtered.is_none() || is_chosen(candidate) {
            let other = at;
            at += 1;
            let best = best.filter(|best| *best != other);
            explained.behind = best.map(|best| policy.behind(&open, best, other, request));
        }
        explained
    });
    Ok(explained.collect())
}

impl Explained {
    pub(super) fn of(
        candidate: &Candidate<'_>,
        policy: &dyn Policy,
        request: &RouteRequest<'_>,
        filtered: Option<Filtered>,
    ) -> Self {
        let peers_count = Freshness::of(request.view_age_ms) != Freshness::OwnOnly;
        let booked = candidate.worker.rank_booked(candidate.rank, peers_count);
        Self {
            worker: candidate.worker.id().clone(),
            rank: candidate.rank,
            overlap: candidate.overlap,
            coming: candidate.coming,
            load: candidate.load,
            correction: candidate.load.minus(&booked),
            terms: policy.terms(candidate, request),
            filtered,
            behind: None,
        }
    }
}

/// Each rank that serves the model, with the reason why it may not be chosen, if there is one.
pub(super) fn considered<'a>(
    view: &'a RegistryView,
    request: &RouteRequest<'a>,
    limits: &Limits,
    tried: &[WorkerId],
) -> Result<Vec<(Candidate<'a>, Option<Filtered>)>, NoWorker> {
    let peers_count = Freshness::of(request.view_age_ms) != Freshness::OwnOnly;
    let mut all = Vec::new();
    for &position in serving(view, request)? {
        let worker = &view.workers[position];
        let whole = filter(view, worker, request, tried)
            .or_else(|| doubt(worker, limits))
            .or_else(|| worker.is_saturated(limits.max_requests).then_some(Filtered::Saturated));
        all.extend(ranks(worker, request, worker.live.booked(), peers_count).map(|candidate| {
            let far = !request.part.is_near(&candidate, request.prompt_tokens);
            (candidate, whole.or(far.then_some(Filtered::Far)))
        }));
    }
    // The thresholds hold only while somebody is below them.
    let fits = |(candidate, filtered): &(Candidate<'_>, Option<Filtered>)| {
        filtered.is_none() && !limits.overload.has(candidate)
    };
    if all.iter().any(fits) {
        for entry in &mut all {
            if entry.1.is_none() && limits.overload.has(&entry.0) {
                entry.1 = Some(Filtered::Overloaded);
            }
        }
    }
    Ok(all)
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

fn all_filtered(
    view: &RegistryView,
    serving: &[usize],
    request: &RouteRequest<'_>,
    tried: &[WorkerId],
) -> NoWorker {
    let mut reasons: Vec<(WorkerId, Filtered)> = serving
        .iter()
        .map(|&position| &view.workers[position])
        .filter_map(|worker| filter(view, worker, request, tried).map(|why| (worker.id().clone(), why)))
        .collect();
    let more = reasons.len().saturating_sub(NoWorker::MOST_LISTED);
    reasons.truncate(NoWorker::MOST_LISTED);
    NoWorker::AllFiltered { reasons, more }
}
