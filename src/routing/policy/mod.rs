//! Policies: one object-safe function from candidates to a choice. Filters come before it.

mod cache_aware;
mod hashed;
mod kv_cost;
mod plain;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use rand::Rng;

pub use cache_aware::CacheAware;
pub use hashed::{ConsistentHash, PrefixHash};
pub use kv_cost::KvCost;
pub use plain::{LeastLoaded, PowerOfTwo, Random, RoundRobin};

use super::cost::{CostInput, CostOptions, Terms};
use super::part::Part;
use super::view::WorkerView;
use crate::ids::{WorkerId, WorkerIx};
use crate::kv::hash::SequenceHash;
use crate::kv::types::Overlap;
use crate::state::load::LoadSum;

/// What routing may know of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct RouteRequest<'a> {
    /// Model or adapter asked for; `None` if any worker will do.
    pub model: Option<&'a str>,
    /// Prompt length in tokens, estimated where it is not known.
    pub prompt_tokens: u32,
    /// Longest output asked for, where the client says so.
    pub max_tokens: Option<u32>,
    /// Sequence hashes of the prompt's full blocks; empty where they are not known.
    pub hashes: &'a [SequenceHash],
    /// What the ranks hold of it, sorted by rank, each rank at most once; those that hold nothing
    /// may be left out.
    pub overlaps: &'a [Overlap],
    /// The same with what requests on their way there will bring, sorted by rank; ranks for which
    /// that makes no difference may be left out.
    pub predicted: &'a [Overlap],
    /// The session it belongs to, if it says so.
    pub session: Option<u64>,
    /// The worker that the session is with, if that is known.
    pub bound: Option<WorkerIx>,
    /// What the client wants otherwise than configured.
    pub overrides: Overrides,
    /// The only worker (and rank) that will do.
    pub pinned: Option<Pin<'a>>,
    /// Labels that a worker must have, with these values.
    pub labels: &'a [(&'a str, &'a str)],
    /// What part of it is wanted of the worker.
    pub part: Part,
    /// How far behind this replica's view of its peers' bookings is.
    pub view_age_ms: u64,
}

/// A worker that was named by the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pin<'a> {
    /// Which.
    pub worker: &'a WorkerId,
    /// Which of its ranks; any of them if `None`.
    pub rank: Option<u32>,
}

/// What a single request may want otherwise than configured; checked when made.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Overrides {
    overlap_weight: Option<f64>,
    temperature: Option<f64>,
    policy: Option<&'static str>,
}

impl Overrides {
    /// Checks what a client asked for; the error says what would be right.
    pub fn new(
        overlap_weight: Option<f64>,
        temperature: Option<f64>,
        policy: Option<&str>,
    ) -> Result<Self, String> {
        if let Some(weight) = overlap_weight {
            CostOptions::check_weight(weight)?;
        }
        if let Some(temperature) = temperature {
            CostOptions::check_temperature(temperature)?;
        }
        let policy = policy.map(known).transpose()?;
        Ok(Self { overlap_weight, temperature, policy })
    }

    /// Weight of the prompt's own uncached blocks.
    pub fn overlap_weight(&self) -> Option<f64> {
        self.overlap_weight
    }

    /// Temperature of the choice.
    pub fn temperature(&self) -> Option<f64> {
        self.temperature
    }

    /// One of [`POLICY_NAMES`].
    pub fn policy(&self) -> Option<&'static str> {
        self.policy
    }
}

/// One rank of one worker as a candidate, with its load as of the decision.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The worker.
    pub worker: &'a Arc<WorkerView>,
    /// Which of its data-parallel ranks; 0 where there is but one.
    pub rank: u32,
    /// What is booked there, by all replicas.
    pub load: LoadSum,
    /// What it holds of the prompt.
    pub overlap: Overlap,
    /// Blocks after those that requests on their way there will bring.
    pub coming: u32,
    /// What is booked on the worker, on all its ranks and by all replicas.
    pub seen: LoadSum,
}

impl Candidate<'_> {
    /// Outstanding work in KV blocks per unit of weight: blocks still to be prefilled plus blocks
    /// held, plus one a request, so that a request without a known prompt counts too.
    pub fn weighted_load(&self) -> f64 {
        let prefill_blocks = self.load.prefill_tokens as f64 / f64::from(self.worker.block_size());
        let work = prefill_blocks + self.load.decode_blocks as f64 + self.load.requests as f64;
        work / f64::from(self.weight())
    }

    /// For people: the worker, with its rank where it has several.
    pub fn name(&self) -> String {
        match self.worker.dp_ranks() {
            1 => self.worker.id().to_string(),
            _ => format!("{}/{}", self.worker.id(), self.rank),
        }
    }

    /// Relative share of traffic, never 0.
    pub fn weight(&self) -> u32 {
        self.worker.record.spec.weight.max(1)
    }

    /// What its cost is reckoned from. Loads below zero are those of an unlucky moment.
    pub fn cost_input(&self, request: &RouteRequest<'_>) -> CostInput {
        let count = |n: i64| u64::try_from(n).unwrap_or(0);
        CostInput {
            overlap: self.overlap,
            coming: self.coming,
            prompt_tokens: request.prompt_tokens,
            block_size: self.worker.block_size(),
            active_prefill_tokens: count(self.load.prefill_tokens),
            active_decode_blocks: count(self.load.decode_blocks),
            requests: count(self.load.requests),
            weight: self.weight(),
        }
    }
}

/// Chooses one of several candidates, all of which may be chosen.
///
/// An implementation MUST answer an index below `candidates.len()`, MUST NOT block, and steers
/// only: it has no way to refuse. `candidates` is never empty.
pub trait Policy: Send + Sync {
    /// Name in configuration and metrics.
    fn name(&self) -> &'static str;

    /// Whether a session stays with the worker that it was sent to first.
    fn binds_sessions(&self) -> bool {
        false
    }

    /// Whether it looks at the prompt's blocks; if not, nobody need hash them.
    fn wants_overlap(&self) -> bool {
        false
    }

    /// The position of the chosen candidate.
    fn pick(&self, candidates: &[Candidate<'_>], request: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize;

    /// What a candidate's cost is made of, if it goes by cost.
    fn terms(&self, candidate: &Candidate<'_>, request: &RouteRequest<'_>) -> Option<Terms> {
        let _ = (candidate, request);
        None
    }

    /// Why `other` of the candidates came behind the `chosen` one, for people. Changes nothing.
    fn behind(
        &self,
        candidates: &[Candidate<'_>],
        chosen: usize,
        other: usize,
        request: &RouteRequest<'_>,
    ) -> String {
        let _ = (other, request);
        format!("{} was chosen", candidates[chosen].name())
    }

    /// What to ask in its place where a choice is only rehearsed, if choosing changes it.
    fn stand_in(&self) -> Option<Arc<dyn Policy>> {
        None
    }
}

impl fmt::Debug for dyn Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Names that [`by_name`] knows.
pub const POLICY_NAMES: [&str; 8] = [
    "kv_cost",
    "cache_aware",
    "prefix_hash",
    "consistent_hash",
    "least_loaded",
    "power_of_two",
    "round_robin",
    "random",
];

fn known(name: &str) -> Result<&'static str, String> {
    let found = POLICY_NAMES.into_iter().find(|known| *known == name);
    found.ok_or_else(|| format!("unknown policy {name:?}; known are {}", POLICY_NAMES.join(", ")))
}

/// Makes a policy with its defaults; `None` for a name that is not one of [`POLICY_NAMES`].
pub fn by_name(name: &str) -> Option<Arc<dyn Policy>> {
    from_spec(name).ok()
}

/// Makes a policy from its name and, after a colon, its parameters: `kv_cost:weight=4`. The error
/// lists what is known.
pub fn from_spec(spec: &str) -> Result<Arc<dyn Policy>, String> {
    let (name, text) = spec.split_once(':').unwrap_or((spec, ""));
    let name = known(name)?;
    let parameters = Parameters::parse(name, text)?;
    let policy: Arc<dyn Policy> = match name {
        "kv_cost" => Arc::new(KvCost::from_parameters(&parameters)?),
        "cache_aware" => Arc::new(CacheAware::from_parameters(&parameters)?),
        "prefix_hash" => Arc::new(PrefixHash::from_parameters(&parameters)?),
        "consistent_hash" => Arc::new(ConsistentHash::from_parameters(&parameters)?),
        "power_of_two" => parameters.none().map(|()| Arc::new(PowerOfTwo))?,
        "round_robin" => parameters.none().map(|()| Arc::new(RoundRobin::default()))?,
        "random" => parameters.none().map(|()| Arc::new(Random))?,
        _ => parameters.none().map(|()| Arc::new(LeastLoaded))?,
    };
    Ok(policy)
}

/// `key=value,key=value` after a policy's name.
struct Parameters<'a> {
    policy: &'static str,
    given: Vec<(&'a str, f64)>,
}

impl<'a> Parameters<'a> {
    fn parse(policy: &'static str, text: &'a str) -> Result<Self, String> {
        let mut given = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("policy {policy}: {part:?} is not of the form key=value"))?;
            let value: f64 = value
                .parse()
                .ok()
                .filter(|v: &f64| v.is_finite())
                .ok_or_else(|| format!("policy {policy}: {key}={value} is not a number"))?;
            given.push((key, value));
        }
        Ok(Self { policy, given })
    }

    fn none(&self) -> Result<(), String> {
        match self.given.first() {
            None => Ok(()),
            Some((key, _)) => Err(format!("policy {} has no parameter {key:?}", self.policy)),
        }
    }

    /// Gives each parameter to the option of its name.
    fn fill(&self, options: &mut [(&str, &mut f64)]) -> Result<(), String> {
        for (key, value) in &self.given {
            match options.iter_mut().find(|(name, _)| name == key) {
                Some((_, option)) => **option = *value,
                None => {
                    let names: Vec<&str> = options.iter().map(|(name, _)| *name).collect();
                    return Err(format!(
                        "policy {} has no parameter {key:?}; it has {}",
                        self.policy,
                        names.join(", ")
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Requests for the candidate's weight.
pub(super) fn queue(candidate: &Candidate<'_>) -> f64 {
    candidate.load.requests.max(0) as f64 / f64::from(candidate.weight())
}

/// Why a candidate came behind another where the fewest requests win.
pub(super) fn longer_queue(chosen: &Candidate<'_>, other: &Candidate<'_>) -> String {
    let requests = |candidate: &Candidate<'_>| candidate.load.requests.max(0);
    let (name, less) = (chosen.name(), requests(chosen));
    if queue(other) > queue(chosen) {
        let weighed = if other.weight() == chosen.weight() { "" } else { " for its weight" };
        format!("has {} requests and {name} {less}, which is fewer{weighed}", requests(other))
    } else {
        format!("has as few requests as {name}, which chance chose")
    }
}

/// The position of the least of `costs`, ties at random: replicas with equal views must not all
/// choose the first. Costs that are not numbers lose.
pub(super) fn least(costs: impl Iterator<Item = f64>, rng: &mut dyn Rng) -> usize {
    use rand::RngExt as _;
    let mut best = (0, f64::INFINITY);
    let mut ties = 0_u32;
    for (position, cost) in costs.enumerate() {
        if cost < best.1 {
            best = (position, cost);
            ties = 1;
        } else if cost == best.1 {
            // Reservoir of one: every tie ends up chosen with the same probability.
            ties += 1;
            if rng.random_range(0..ties) == 0 {
                best.0 = position;
            }
        }
    }
    best.0
}
