//! What is counted of requests that two workers share.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::http::attempts::plan::Why;

/// A part of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::http) enum Leg {
    /// Up to the first token.
    Prefill,
    /// From there on.
    Decode,
}

/// What came of one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::http) enum LegEnd {
    /// The worker did its part; of a decode, that it began to answer.
    Ok,
    /// The prefill worker's token was the whole answer.
    Complete,
    /// The worker could not be reached, broke off, or answered nonsense.
    Failed,
    /// It answered an error.
    Refused,
    /// What was handed over waited for too long.
    Expired,
}

const LEGS: [(Leg, &str); 2] = [(Leg::Prefill, "prefill"), (Leg::Decode, "decode")];
const ENDS: [(LegEnd, &str); 5] = [
    (LegEnd::Ok, "ok"),
    (LegEnd::Complete, "complete"),
    (LegEnd::Failed, "failed"),
    (LegEnd::Refused, "refused"),
    (LegEnd::Expired, "expired"),
];

/// See the module.
#[derive(Debug)]
pub(super) struct Pairs {
    plans: [Counter; Why::ALL.len()],
    legs: [[Counter; ENDS.len()]; LEGS.len()],
    prefill: Histogram,
}

impl Pairs {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let plans = Family::<[(&str, &str); 1], Counter>::default();
        let help = "Choices among workers that do parts of requests, by what was decided";
        registry.register("pd_plans", help, plans.clone());
        let legs = Family::<[(&str, &str); 2], Counter>::default();
        let help = "Parts of requests that two workers share, by how they ended";
        registry.register("pd_legs", help, legs.clone());
        // From 1 ms to 131 s.
        let prefill = Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let help = "From sending a request to a prefill worker to the end of its answer";
        registry.register("pd_prefill_seconds", help, prefill.clone());
        Self {
            plans: Why::ALL.map(|why| plans.get_or_create(&[("plan", why.as_str())]).clone()),
            legs: LEGS.map(|(_, leg)| {
                ENDS.map(|(_, end)| legs.get_or_create(&[("leg", leg), ("outcome", end)]).clone())
            }),
            prefill,
        }
    }

    pub(super) fn planned(&self, why: Why) {
        self.plans[why as usize].inc();
    }

    pub(super) fn leg(&self, leg: Leg, end: LegEnd, after: Duration) {
        self.legs[leg as usize][end as usize].inc();
        if (leg, end) == (Leg::Prefill, LegEnd::Ok) {
            self.prefill.observe(after.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_listed_in_the_order_of_their_declaration() {
        assert!(LEGS.iter().enumerate().all(|(at, (leg, _))| *leg as usize == at));
        assert!(ENDS.iter().enumerate().all(|(at, (end, _))| *end as usize == at));
        assert!(Why::ALL.iter().enumerate().all(|(at, why)| *why as usize == at));
    }
}
