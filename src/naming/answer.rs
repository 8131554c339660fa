//! What a name stands for: endpoints with their weights, and which of them get requests.

use std::collections::BTreeMap;

/// Most endpoints of one name; what goes beyond is left out.
pub const MAX_ENDPOINTS: usize = 4096;
/// The weight of an endpoint that has none of its own.
pub const WEIGHT: u32 = 100;
/// Largest weight; larger ones count as this.
pub const MAX_WEIGHT: u32 = 10_000;

/// Whether an endpoint gets requests.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Standing {
    /// It does.
    Ready,
    /// Only where none is ready: it is going away and still answers.
    Leaving,
    /// Only where none is ready: it is said to be unhealthy, which may be a mistake of who says so.
    Unhealthy,
    /// It does not: it is not up yet, or was taken out on purpose.
    Out,
}

impl Standing {
    /// The name used in JSON and tables.
    pub fn name(self) -> &'static str {
        match self {
            Standing::Ready => "ready",
            Standing::Leaving => "leaving",
            Standing::Unhealthy => "unhealthy",
            Standing::Out => "out",
        }
    }
}

/// An endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// `host:port`, an IPv6 address in brackets.
    pub address: String,
    /// Its share of what goes to all; 0 is none.
    pub weight: u32,
    /// Whether it gets requests.
    pub standing: Standing,
}

/// What a name stands for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Answer {
    /// By address, each once.
    endpoints: Vec<Endpoint>,
    /// Endpoints that were left out because there are too many.
    pub left_out: usize,
}

impl Answer {
    /// Of endpoints in any order. One that is there twice counts as the better of the two.
    pub fn new(endpoints: impl IntoIterator<Item = Endpoint>) -> Self {
        let mut by_address: BTreeMap<String, Endpoint> = BTreeMap::new();
        for mut endpoint in endpoints {
            endpoint.weight = endpoint.weight.min(MAX_WEIGHT);
            let stands = by_address.entry(endpoint.address.clone()).or_insert_with(|| endpoint.clone());
            if endpoint.standing < stands.standing {
                *stands = endpoint;
            }
        }
        let left_out = by_address.len().saturating_sub(MAX_ENDPOINTS);
        Self { endpoints: by_address.into_values().take(MAX_ENDPOINTS).collect(), left_out }
    }

    /// All of them, by address.
    pub fn all(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// Those that get requests: the ready ones; where there are none, those that are leaving; where there
    /// are not even such, the unhealthy ones.
    pub fn usable(&self) -> impl Iterator<Item = &Endpoint> {
        let weighs = |endpoint: &&Endpoint| endpoint.weight > 0 && endpoint.standing != Standing::Out;
        let best = self.endpoints.iter().filter(weighs).map(|endpoint| endpoint.standing).min();
        self.endpoints.iter().filter(weighs).filter(move |endpoint| Some(endpoint.standing) == best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(address: &str, weight: u32, standing: Standing) -> Endpoint {
        Endpoint { address: address.to_owned(), weight, standing }
    }

    fn usable(endpoints: &[Endpoint]) -> Vec<String> {
        Answer::new(endpoints.iter().cloned()).usable().map(|endpoint| endpoint.address.clone()).collect()
    }

    #[test]
    fn worse_endpoints_get_requests_only_where_there_are_no_better_ones() {
        let ready = endpoint("b:1", 100, Standing::Ready);
        let leaving = endpoint("c:1", 100, Standing::Leaving);
        let unhealthy = endpoint("a:1", 100, Standing::Unhealthy);
        let out = endpoint("d:1", 100, Standing::Out);
        let none = endpoint("e:1", 0, Standing::Ready);
        let all = [unhealthy.clone(), ready, leaving.clone(), out.clone(), none.clone()];
        assert_eq!(usable(&all), ["b:1"]);
        assert_eq!(usable(&[unhealthy.clone(), leaving, out.clone()]), ["c:1"]);
        assert_eq!(usable(&[unhealthy, out.clone()]), ["a:1"]);
        assert_eq!(usable(&[out, none]), [""; 0], "nobody is asked who was taken out");
    }

    #[test]
    fn an_endpoint_that_is_there_twice_counts_once_and_as_the_better_one() {
        let twice = [
            endpoint("a:1", 100, Standing::Out),
            endpoint("a:1", 50, Standing::Ready),
            endpoint("a:1", 70, Standing::Leaving),
        ];
        assert_eq!(Answer::new(twice).all(), [endpoint("a:1", 50, Standing::Ready)]);
    }

    #[test]
    fn what_goes_beyond_the_bound_is_counted_and_left_out() {
        let many = (0..MAX_ENDPOINTS + 3).map(|port| endpoint(&format!("a:{port:05}"), 1, Standing::Ready));
        let answer = Answer::new(many);
        assert_eq!((answer.all().len(), answer.left_out), (MAX_ENDPOINTS, 3));
    }
}
