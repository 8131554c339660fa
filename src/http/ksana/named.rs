//! Pairs of the endpoints that two names stand for.
//!
//! In fixed mode a name does not overrule what is known: a pair of which the registry knows a group is one
//! only if requests may go there by the registry, too. What it knows nothing of (engines that register
//! elsewhere) is believed; such groups are strangers, whose load is what this replica has there. In strict
//! mode names are followed as the reference does it, by themselves.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rand::seq::{IndexedRandom, SliceRandom};

use crate::http::front::Front;
use crate::naming::{Answer, Call, Endpoint};
use crate::routing::breaker::{Breaker, BreakerState};
use crate::state::ksana::{KsanaState, MAX_PAIRS, Role, RoutePair};

/// Weights of load: large enough that the smallest weight makes no difference of zero.
const SCALE: u64 = 10_000;

/// What two names stand for, prefill and decode.
pub(super) type Answers = (Option<Arc<Answer>>, Option<Arc<Answer>>);

/// A route, and the weights of its groups.
pub(super) type Weighed = (RoutePair, (u32, u32));

/// Whether nothing has changed.
pub(super) fn are_same(one: &Answers, other: &Answers) -> bool {
    let same = |one: &Option<Arc<Answer>>, other: &Option<Arc<Answer>>| match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    };
    same(&one.0, &other.0) && same(&one.1, &other.1)
}

/// What a leg came to: its status, or none, and how long that took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ended {
    pub(super) status: Option<u16>,
    pub(super) took: Duration,
}

/// Tells the name service how a leg ended.
pub(super) fn report(front: &Front, role: Role, route: &RoutePair, ended: Ended) {
    let Some(names) = &front.config.names else { return };
    let (is_decode, name, address) = match role {
        Role::Prefill => (false, &names.prefill, &route.prefill_addr),
        Role::Decode => (true, &names.decode, &route.decode_addr),
    };
    names.report(is_decode, &Call { name, address, status: ended.status, took: ended.took });
}

/// A group that the registry does not know.
#[derive(Debug, Default)]
pub(super) struct Stranger {
    /// Requests of this replica there.
    load: AtomicU32,
    pub(super) breaker: Breaker,
}

/// A request at a stranger, until this is dropped.
#[derive(Debug)]
pub(super) struct AtStranger(Arc<Stranger>);

impl AtStranger {
    pub(super) fn begin(group: &Arc<Stranger>) -> Self {
        group.load.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(group))
    }
}

impl Drop for AtStranger {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Both groups of a pair.
#[derive(Clone, Debug)]
pub(super) struct Strangers {
    pub(super) prefill: Arc<Stranger>,
    pub(super) decode: Arc<Stranger>,
    pub(super) weights: (u32, u32),
}

impl Strangers {
    /// Requests there, by the groups' weights.
    fn load(&self) -> (u64, u64) {
        let of = |group: &Stranger, weight: u32| {
            u64::from(group.load.load(Ordering::Relaxed)) * SCALE / u64::from(weight.max(1))
        };
        let decode = of(&self.decode, self.weights.1);
        (of(&self.prefill, self.weights.0) + decode, decode)
    }

    fn is_open(&self, now_ms: u64) -> bool {
        [&self.prefill, &self.decode].iter().any(|group| group.breaker.state(now_ms) == BreakerState::Open)
    }
}

/// How much a pair of such weights gets of what goes to all.
pub(super) fn product(weights: (u32, u32)) -> u64 {
    u64::from(weights.0) * u64::from(weights.1)
}

/// The least loaded of some pairs of strangers, of equal ones one by weight; `None` where there are none.
pub(super) fn least<T>(mut rows: Vec<(T, &Strangers)>, front: &Front, rng: &mut impl rand::Rng) -> Option<T> {
    let (now_ms, options) = (front.now_ms(), &front.config.proxy.breaker);
    let mut doubtful: Vec<_> = rows.extract_if(.., |(_, pair)| pair.is_open(now_ms)).collect();
    while let Some(at) = pick(&rows, rng) {
        let (row, pair) = rows.swap_remove(at);
        let enters = |group: &Stranger| group.breaker.enter(now_ms, options);
        if enters(&pair.prefill) && enters(&pair.decode) {
            return Some(row);
        }
        // Somebody else's request is the trial of a group that failed.
        doubtful.push((row, pair));
    }
    // There is no other: a failed attempt costs less than a refusal.
    pick(&doubtful, rng).map(|at| doubtful.swap_remove(at).0)
}

fn pick<T>(rows: &[(T, &Strangers)], rng: &mut impl rand::Rng) -> Option<usize> {
    let loads: Vec<_> = rows.iter().map(|(_, pair)| pair.load()).collect();
    let least = loads.iter().min()?;
    let ties: Vec<usize> = (0..rows.len()).filter(|at| loads[*at] == *least).collect();
    ties.choose_weighted(rng, |at| product(rows[*at].1.weights)).ok().copied()
}

/// The pairs of the endpoints that two names stand for.
pub(super) fn pairs(state: &KsanaState, cluster: &str, strict: bool, answers: &Answers) -> Vec<Weighed> {
    let (Some(prefill), Some(decode)) = answers else { return Vec::new() };
    let known: BTreeSet<(Role, &str)> = state
        .nodes()
        .filter(|node| node.spec.cluster == cluster)
        .map(|node| (node.spec.role, node.spec.inference_addr.as_str()))
        .collect();
    let good: BTreeSet<String> = match strict {
        true => BTreeSet::new(),
        false => state.routes(cluster, false).into_iter().map(|route| route.comm_key).collect(),
    };
    let may = |route: &RoutePair| {
        let is_known = known.contains(&(Role::Prefill, route.prefill_addr.as_str()))
            || known.contains(&(Role::Decode, route.decode_addr.as_str()));
        strict || !is_known || good.contains(&route.comm_key)
    };
    let mut prefill: Vec<&Endpoint> = prefill.usable().collect();
    let mut decode: Vec<&Endpoint> = decode.usable().collect();
    if prefill.is_empty() || decode.is_empty() {
        return Vec::new();
    }
    if prefill.len().saturating_mul(decode.len()) > MAX_PAIRS {
        // Each of both is in some pair, and not by its name in the same ones everywhere.
        prefill.shuffle(&mut rand::rng());
        decode.shuffle(&mut rand::rng());
    }
    let each = (MAX_PAIRS / prefill.len()).clamp(1, decode.len());
    let mut pairs = Vec::new();
    for (at, p) in prefill.iter().enumerate() {
        for next in 0..each {
            let d = decode[(at * each + next) % decode.len()];
            let route = RoutePair {
                comm_key: format!("{}__{}", p.address, d.address),
                prefill_addr: p.address.clone(),
                decode_addr: d.address.clone(),
            };
            if may(&route) {
                pairs.push((route, (p.weight, d.weight)));
            }
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naming::Standing;

    fn answer(kind: &str, count: usize) -> Option<Arc<Answer>> {
        let endpoint =
            |at: usize| Endpoint { address: format!("{kind}{at}:1"), weight: 100, standing: Standing::Ready };
        Some(Arc::new(Answer::new((0..count).map(endpoint))))
    }

    #[test]
    fn pairs_are_bounded_and_every_endpoint_is_in_some() {
        let state = KsanaState::default();
        for (p, d, most) in [(3, 2, 6), (128, 128, MAX_PAIRS), (200, 300, MAX_PAIRS), (4096, 4096, MAX_PAIRS)]
        {
            let pairs = pairs(&state, "c", false, &(answer("p", p), answer("d", d)));
            assert!(pairs.len() <= most && pairs.len() * 2 > most, "{p} {d}: {}", pairs.len());
            let keys: BTreeSet<&str> = pairs.iter().map(|(route, _)| route.comm_key.as_str()).collect();
            assert_eq!(keys.len(), pairs.len(), "each once");
            let of = |read: fn(&RoutePair) -> &str| {
                pairs.iter().map(|(r, _)| read(r)).collect::<BTreeSet<_>>().len()
            };
            assert_eq!((of(|route| &route.prefill_addr), of(|route| &route.decode_addr)), (p, d));
        }
        assert_eq!(pairs(&state, "c", false, &(answer("p", 2), None)), []);
        assert_eq!(pairs(&state, "c", true, &(answer("p", 2), answer("d", 0))), []);
    }
}
