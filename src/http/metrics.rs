//! What the front counts. Families are made once; label sets are closed enums and worker ids.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::keys::Caller;
pub use super::routes::Route;
use crate::ids::WorkerId;

impl EncodeLabelValue for Route {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        self.path().encode(encoder)
    }
}

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
    fn as_str(self) -> &'static str {
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

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        self.as_str().encode(encoder)
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct RequestLabels {
    route: Route,
    outcome: Outcome,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct RouteLabels {
    route: Route,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct RejectLabels {
    reason: &'static str,
}

/// All that the front counts; one for a replica, shared by its listeners.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    duration: Family<RouteLabels, Histogram, fn() -> Histogram>,
    first_byte: Family<RouteLabels, Histogram, fn() -> Histogram>,
    rejected: Family<RejectLabels, Counter>,
    /// Attempts after the first.
    pub retries: Counter,
    /// Open client and admin connections.
    pub connections: Gauge,
    recent: RecentErrors,
    taken: AtomicU64,
}

/// From 1 ms to 30 min, a little less than two buckets an octave where people look.
fn seconds() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
        300.0, 600.0, 1800.0,
    ])
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("everline");
        let requests = Family::<RequestLabels, Counter>::default();
        let duration = Family::<RouteLabels, Histogram, fn() -> Histogram>::new_with_constructor(seconds);
        let first_byte = Family::<RouteLabels, Histogram, fn() -> Histogram>::new_with_constructor(seconds);
        let rejected = Family::<RejectLabels, Counter>::default();
        let retries = Counter::<u64, AtomicU64>::default();
        let connections = Gauge::default();
        registry.register("requests", "Requests by route and how they ended", requests.clone());
        registry.register(
            "request_duration_seconds",
            "From head to last byte of the response",
            duration.clone(),
        );
        registry.register(
            "time_to_first_byte_seconds",
            "From request head to the first byte of a worker's body",
            first_byte.clone(),
        );
        registry.register("rejected", "Requests and connections refused, by reason", rejected.clone());
        registry.register("upstream_retries", "Attempts at workers after the first", retries.clone());
        registry.register("connections", "Open connections", connections.clone());
        let version = vec![("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "What is running", Info::new(version));
        Self {
            registry,
            requests,
            duration,
            first_byte,
            rejected,
            retries,
            connections,
            recent: RecentErrors::default(),
            taken: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// The registry, for encoding.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Lets another part of the program add its families before the metrics are shared.
    pub fn registry_mut(&mut self) -> &mut Registry {
        &mut self.registry
    }

    /// Counts a refusal. `reason` is an error code or another word from a fixed set.
    pub fn reject(&self, reason: &'static str) {
        self.rejected.get_or_create(&RejectLabels { reason }).inc();
    }

    /// The newest errors.
    pub fn recent(&self) -> &RecentErrors {
        &self.recent
    }

    /// Requests for workers taken since the start.
    pub fn requests_taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Begins to measure a request.
    pub fn track(self: &Arc<Self>, route: Route) -> Tracked {
        if route.is_proxied() {
            self.taken.fetch_add(1, Ordering::Relaxed);
        }
        Tracked {
            metrics: Arc::clone(self),
            route,
            started: Instant::now(),
            status: http::StatusCode::OK,
            first_byte: None,
            request_id: None,
            worker: None,
            caller: Caller::default(),
            finished: false,
        }
    }
}

/// A request being measured; counted once, as canceled if nobody said otherwise before the drop.
#[derive(Debug)]
pub struct Tracked {
    metrics: Arc<Metrics>,
    route: Route,
    started: Instant,
    status: http::StatusCode,
    first_byte: Option<Duration>,
    request_id: Option<http::HeaderValue>,
    worker: Option<WorkerId>,
    caller: Caller,
    finished: bool,
}

impl Tracked {
    /// Which route.
    pub fn route(&self) -> Route {
        self.route
    }

    /// The status that was passed on.
    pub fn set_status(&mut self, status: http::StatusCode) {
        self.status = status;
    }

    /// How the request is called in the log.
    pub(super) fn set_request_id(&mut self, id: http::HeaderValue) {
        self.request_id = Some(id);
    }

    /// Whose key the request came with.
    pub(super) fn set_caller(&mut self, caller: Caller) {
        self.caller = caller;
    }

    /// The worker that answers.
    pub(super) fn set_worker(&mut self, id: WorkerId) {
        self.worker = Some(id);
    }

    /// The first body byte arrived from a worker.
    pub(super) fn first_byte(&mut self) {
        let elapsed = self.started.elapsed();
        self.first_byte = Some(elapsed);
        let labels = RouteLabels { route: self.route };
        self.metrics.first_byte.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }

    /// Ended, as well as its status says.
    pub fn finish_with_status(&mut self) {
        let outcome = match Outcome::of(self.status) {
            Outcome::ServerError => Outcome::UpstreamError,
            other => other,
        };
        self.finish(outcome);
    }

    /// Ended. Only the first call counts.
    pub fn finish(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let route = self.route;
        self.metrics.requests.get_or_create(&RequestLabels { route, outcome }).inc();
        let elapsed = self.started.elapsed();
        self.metrics.duration.get_or_create(&RouteLabels { route }).observe(elapsed.as_secs_f64());
        // One line a request, without anything of its content; at debug level what is not a
        // client's.
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "everline::access",
                    route = route.path(),
                    outcome = outcome.as_str(),
                    status = self.status.as_u16(),
                    request_id = self.request_id.as_ref().and_then(|id| id.to_str().ok()),
                    key = self.caller.key_id(),
                    worker = self.worker.as_ref().map(WorkerId::as_str),
                    first_byte_ms = self.first_byte.map(|t| t.as_millis() as u64),
                    ms = elapsed.as_millis() as u64,
                )
            };
        }
        if route.is_proxied() { line!(info) } else { line!(debug) }
    }

    /// Remembers an error for the status page.
    pub fn note_error(&self, what: String) {
        self.metrics.recent.push(what);
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.finish(Outcome::Canceled);
    }
}

/// The newest errors, at most [`RecentErrors::MOST`]; the oldest gives way.
#[derive(Debug, Default)]
pub struct RecentErrors {
    ring: Mutex<VecDeque<(Instant, String)>>,
}

impl RecentErrors {
    /// Errors kept.
    pub const MOST: usize = 64;
    /// Longest text kept of one, in bytes.
    const MOST_TEXT: usize = 512;

    /// Adds one.
    pub fn push(&self, mut what: String) {
        let mut end = what.len().min(Self::MOST_TEXT);
        while !what.is_char_boundary(end) {
            end -= 1;
        }
        what.truncate(end);
        let mut ring = self.ring.lock();
        if ring.len() == Self::MOST {
            ring.pop_front();
        }
        ring.push_back((Instant::now(), what));
    }

    /// All of them, newest first, with their age in milliseconds.
    pub fn list(&self) -> Vec<(u64, String)> {
        let ring = self.ring.lock();
        ring.iter().rev().map(|(at, what)| (at.elapsed().as_millis() as u64, what.clone())).collect()
    }
}
