//! A choice that is not made: what selection would know, and whom it would choose how often.

use std::sync::Arc;

use rand::Rng;

use super::policy::{Candidate, Policy, RouteRequest};
use super::select::{Explained, Filtered, Limits, NoWorker, considered};
use super::view::RegistryView;

/// Picks that are tried: enough that a tie of two is told from one in a hundred.
const PICKS: usize = 200;

/// Candidates looked at in all picks together, so that thousands of workers hold nobody up.
const MOST_LOOKS: usize = 20_000;

/// See the module.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    /// Each rank that serves the model, and in what share of the picks it was chosen.
    pub ranks: Vec<(Explained, f64)>,
    /// Whether all that are left are ones that this replica had better leave alone.
    pub last_resort: bool,
    /// Whether nobody may be chosen because those that could have all they should have: the
    /// request would wait.
    pub waits: bool,
}

/// What [`super::select::select`] would do, many times over. Changes nothing, neither a load nor a
/// breaker nor whose turn it is.
pub fn rehearse(
    view: &RegistryView,
    policy: &dyn Policy,
    request: &RouteRequest<'_>,
    limits: &Limits,
    rng: &mut dyn Rng,
) -> Result<Rehearsal, NoWorker> {
    let all = considered(view, request, limits, &[])?;
    let positions = |wanted: fn(Option<Filtered>) -> bool| -> Vec<usize> {
        (0..all.len()).filter(|at| wanted(all[*at].1)).collect()
    };
    let mut open = positions(|filtered| filtered.is_none());
    let waits = open.is_empty() && all.iter().any(|(_, why)| *why == Some(Filtered::Saturated));
    let mut last_resort = false;
    if open.is_empty() && !waits {
        open = positions(|why| matches!(why, Some(Filtered::Unreachable | Filtered::Breaker)));
        last_resort = !open.is_empty();
    }
    let stand_in: Option<Arc<dyn Policy>> = policy.stand_in();
    let picker = stand_in.as_deref().unwrap_or(policy);
    let mut picked = vec![0_usize; all.len()];
    let candidates: Vec<Candidate<'_>> = open.iter().map(|at| all[*at].0).collect();
    let picks = if candidates.is_empty() { 0 } else { (MOST_LOOKS / candidates.len()).clamp(1, PICKS) };
    for _ in 0..picks {
        let position = picker.pick(&candidates, request, rng).min(candidates.len() - 1);
        picked[open[position]] += 1;
    }
    let mut ranks: Vec<(Explained, f64)> = Vec::with_capacity(all.len());
    for ((candidate, filtered), times) in all.iter().zip(&picked) {
        let share = if picks == 0 { 0.0 } else { *times as f64 / picks as f64 };
        ranks.push((Explained::of(candidate, policy, request, *filtered), share));
    }
    if let Some(best) = (0..open.len()).max_by_key(|at| picked[open[*at]]) {
        // What chance chooses now and then is not behind.
        for (other, at) in open.iter().enumerate().filter(|(_, at)| picked[**at] == 0) {
            ranks[*at].0.behind = Some(policy.behind(&candidates, best, other, request));
        }
    }
    Ok(Rehearsal { ranks, last_resort, waits })
}
