//! `kv_cost`: the least of [`crate::routing::cost`], with hindsight about how fresh the loads are.

use rand::Rng;

use super::{Candidate, Parameters, Policy, RouteRequest};
use crate::routing::cost::{CostOptions, Terms, choose};
use crate::routing::stale::Freshness;

/// The candidate of the least cost.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct KvCost {
    /// Its weights.
    pub options: CostOptions,
}

impl KvCost {
    pub(super) fn from_parameters(parameters: &Parameters<'_>) -> Result<Self, String> {
        let mut options = CostOptions::default();
        parameters.fill(&mut [
            ("weight", &mut options.overlap_weight),
            ("queue", &mut options.queue_weight),
            ("coming", &mut options.coming_weight),
            ("decode", &mut options.decode_weight),
            ("temperature", &mut options.temperature),
            ("host", &mut options.credits.host),
            ("disk", &mut options.credits.disk),
        ])?;
        options.check().map_err(|why| format!("policy kv_cost: {why}"))?;
        Ok(Self { options })
    }

    fn options_for(&self, request: &RouteRequest<'_>) -> CostOptions {
        let mut options = self.options;
        if let Some(weight) = request.overrides.overlap_weight() {
            options.overlap_weight = weight;
        }
        if let Some(temperature) = request.overrides.temperature() {
            options.temperature = temperature;
        }
        options
    }
}

impl Policy for KvCost {
    fn name(&self) -> &'static str {
        "kv_cost"
    }

    fn wants_overlap(&self) -> bool {
        true
    }

    fn pick(&self, candidates: &[Candidate<'_>], request: &RouteRequest<'_>, rng: &mut dyn Rng) -> usize {
        let options = self.options_for(request);
        let costs: Vec<f64> =
            candidates.iter().map(|c| options.terms(&c.cost_input(request)).total()).collect();
        let tolerance = Freshness::of(request.view_age_ms).tolerance();
        choose(&costs, options.temperature, tolerance, rng)
    }

    fn behind(
        &self,
        candidates: &[Candidate<'_>],
        chosen: usize,
        other: usize,
        request: &RouteRequest<'_>,
    ) -> String {
        let options = self.options_for(request);
        let cost = |at: usize| options.terms(&candidates[at].cost_input(request)).total();
        let (name, more) = (candidates[chosen].name(), cost(other) - cost(chosen));
        match options.temperature > 0.0 {
            true if more > 0.0 => {
                format!("costs {more:.1} more than {name}, and chance took part (temperature)")
            }
            false if more > 0.0 => format!("costs {more:.1} more than {name}"),
            _ if more == 0.0 => format!("costs as much as {name}, which chance chose"),
            _ => format!("costs {:.1} less than {name}, which chance chose", -more),
        }
    }

    fn terms(&self, candidate: &Candidate<'_>, request: &RouteRequest<'_>) -> Option<Terms> {
        Some(self.options_for(request).terms(&candidate.cost_input(request)))
    }
}
