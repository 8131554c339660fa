//! What the front counts. The labels are closed enums, worker ids and a bounded number of model
//! names; what is counted for every request is an array of atomics, indexed by them: nothing is
//! hashed and no lock is taken.

mod access;
mod choices;
mod counts;
mod models;
mod pairs;
mod recent;
mod tracked;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

pub use self::access::{Access, AccessOptions};
pub use self::recent::RecentErrors;
pub use self::tracked::Tracked;

use self::access::AccessLog;
use self::counts::{Counts, Exported};
use self::pairs::Pairs;
pub(super) use self::pairs::{Leg, LegEnd};
use super::attempts::plan::Why;
use super::reserving::Reservation;
pub use super::routes::Route;
use crate::telemetry::process::ProcessMetrics;
use crate::telemetry::trace::Tracing;

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Outcome {
    /// Answered with a status below 400, to the last byte.
    Ok,
    /// The client's fault: 4xx.
    ClientError,
    /// No worker could be chosen.
    NoWorker,
    /// A worker failed or answered 5xx.
    UpstreamError,
    /// A worker took too long.
    Timeout,
    /// The client went away before the end.
    Canceled,
    /// A fault on this side.
    ServerError,
}

impl Outcome {
    /// All of them, in the order of their declaration.
    pub const ALL: [Outcome; 7] = [
        Outcome::Ok,
        Outcome::ClientError,
        Outcome::NoWorker,
        Outcome::UpstreamError,
        Outcome::Timeout,
        Outcome::Canceled,
        Outcome::ServerError,
    ];

    /// The ordinary outcome of a status.
    pub fn of(status: http::StatusCode) -> Self {
        match status.as_u16() {
            504 => Outcome::Timeout,
            502 => Outcome::UpstreamError,
            500.. => Outcome::ServerError,
            400.. => Outcome::ClientError,
            _ => Outcome::Ok,
        }
    }
}

impl Outcome {
    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::ClientError => "client_error",
            Outcome::NoWorker => "no_worker",
            Outcome::UpstreamError => "upstream_error",
            Outcome::Timeout => "timeout",
            Outcome::Canceled => "canceled",
            Outcome::ServerError => "server_error",
        }
    }
}

/// Why another worker was tried, or the same one again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Retry {
    /// No connection, or none allowed.
    Connect,
    /// As many connections as allowed, all in use.
    Full,
    /// A kept-alive connection turned out to be closed.
    Stale,
    /// A fresh connection was closed without an answer.
    Closed,
    /// What came was not HTTP.
    Garbage,
    /// The worker answered 502, 503 or 504.
    Status,
    /// Of two workers that shared the request one failed, or what the first one handed over was of no use.
    Handoff,
}

impl Retry {
    /// All of them, in the order of their declaration.
    pub const ALL: [Retry; 7] = [
        Retry::Connect,
        Retry::Full,
        Retry::Stale,
        Retry::Closed,
        Retry::Garbage,
        Retry::Status,
        Retry::Handoff,
    ];

    /// The name in metrics and spans.
    pub fn as_str(self) -> &'static str {
        match self {
            Retry::Connect => "connect",
            Retry::Full => "full",
            Retry::Stale => "stale",
            Retry::Closed => "closed",
            Retry::Garbage => "garbage",
            Retry::Status => "status",
            Retry::Handoff => "handoff",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct RejectLabels {
    reason: &'static str,
}

/// What the names of families begin with.
const PREFIX: &str = "everline";

/// All that the front counts; one for a replica, shared by its listeners.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// `process_*`, whose names have no prefix of ours.
    process: Registry,
    counts: Arc<Counts>,
    rejected: Family<RejectLabels, Counter>,
    reservations: [Counter; Reservation::ALL.len()],
    pairs: Pairs,
    /// Open client and admin connections.
    pub connections: Gauge,
    recent: RecentErrors,
    taken: AtomicU64,
    access: AccessLog,
    tracing: Option<Tracing>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(AccessOptions::default())
    }
}

impl Metrics {
    /// Nothing counted yet.
    pub fn new(access: AccessOptions) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let counts = Arc::<Counts>::default();
        registry.register_collector(Box::new(Exported(Arc::clone(&counts))));
        let rejected = Family::<RejectLabels, Counter>::default();
        registry.register("rejected", "Requests and connections refused, by reason", rejected.clone());
        let reservations = Family::<[(&str, &str); 1], Counter>::default();
        let help = "Bookings through the log, by what became of them";
        registry.register("reservations", help, reservations.clone());
        let reservations =
            Reservation::ALL.map(|of| reservations.get_or_create(&[("outcome", of.as_str())]).clone());
        let pairs = Pairs::new(&mut registry);
        let connections = Gauge::default();
        registry.register("connections", "Open connections", connections.clone());
        // A gauge that is always 1, as most have it: readers that know the older text format only
        // stumble over the type `info`.
        let build = Family::<[(&str, &str); 1], Gauge>::default();
        build.get_or_create(&[("version", env!("CARGO_PKG_VERSION"))]).set(1);
        registry.register("build_info", "What is running", build);
        let mut process = Registry::default();
        process.register_collector(Box::new(ProcessMetrics));
        Self {
            registry,
            process,
            counts,
            rejected,
            reservations,
            pairs,
            connections,
            recent: RecentErrors::default(),
            taken: AtomicU64::new(0),
            access: AccessLog::new(access),
            tracing: None,
        }
    }

    /// The same, with a span for each request to a worker.
    pub fn with_tracing(mut self, tracing: Option<Tracing>) -> Self {
        self.tracing = tracing;
        self
    }

    /// Exports what else is read at the moment of a scrape.
    pub fn with_collector(mut self, collector: impl Collector) -> Self {
        self.registry.register_collector(Box::new(collector));
        self
    }

    /// Sends the spans that wait, for two seconds at most. Blocks.
    pub fn flush_spans(&self) {
        if let Some(tracing) = &self.tracing {
            tracing.shutdown();
        }
    }

    /// Everything, as OpenMetrics text, with what `gauges` reads at this moment.
    pub fn encode(&self, gauges: impl Collector) -> Result<String, std::fmt::Error> {
        use prometheus_client::encoding::text::{encode_eof, encode_registry};
        let mut text = String::new();
        let mut read_now = Registry::with_prefix(PREFIX);
        read_now.register_collector(Box::new(gauges));
        encode_registry(&mut text, &self.registry)?;
        encode_registry(&mut text, &read_now)?;
        encode_registry(&mut text, &self.process)?;
        encode_eof(&mut text)?;
        Ok(text)
    }

    /// Counts a refusal. `reason` is an error code or another word from a fixed set.
    pub fn reject(&self, reason: &'static str) {
        self.rejected.get_or_create(&RejectLabels { reason }).inc();
    }

    /// Counts a booking through the log.
    pub(super) fn reservation(&self, became: Reservation) {
        self.reservations[became as usize].inc();
    }

    /// Counts a choice among workers that do parts of requests.
    pub(super) fn planned(&self, why: Why) {
        self.pairs.planned(why);
    }

    /// Counts what came of one of two workers that share a request, after so long.
    pub(super) fn leg(&self, leg: Leg, end: LegEnd, after: std::time::Duration) {
        self.pairs.leg(leg, end, after);
    }

    /// Attempts after the first, for whatever reason.
    pub fn retries(&self) -> u64 {
        self.counts.retries()
    }

    /// The newest errors.
    pub fn recent(&self) -> &RecentErrors {
        &self.recent
    }

    /// Requests for workers taken since the start.
    pub fn requests_taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Begins to measure a request that was let in.
    pub fn track(self: &Arc<Self>, route: Route) -> Tracked {
        if route.is_proxied() {
            self.taken.fetch_add(1, Ordering::Relaxed);
        }
        self.track_refused(route)
    }

    /// Begins to measure a request that is refused before anything is done for it. It is not
    /// one taken: what is allowed in proportion to those must not grow with a flood of refusals.
    pub(super) fn track_refused(self: &Arc<Self>, route: Route) -> Tracked {
        Tracked::new(Arc::clone(self), route)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_listed_in_the_order_of_their_declaration() {
        assert!(Outcome::ALL.iter().enumerate().all(|(at, outcome)| *outcome as usize == at));
        assert!(Retry::ALL.iter().enumerate().all(|(at, retry)| *retry as usize == at));
    }
}
