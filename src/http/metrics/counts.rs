//! The counts themselves, and how they are exported.

use std::array;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::choices::Choices;
use super::models::{ModelCounts, Models};
use super::{Outcome, Retry, Route};
use crate::http::routes::TABLE;
use crate::telemetry::histogram::{ANSWER, Histogram, OVERHEAD, ROUND, Scale};

const ROUTES: usize = Route::Unknown as usize + 1;

/// All routes, in the order of their numbers.
fn routes() -> impl Iterator<Item = Route> {
    TABLE.iter().map(|entry| entry.route).chain([Route::Unknown])
}

/// What is counted of every request, by route and outcome.
#[derive(Debug)]
pub(super) struct Counts {
    requests: [[AtomicU64; Outcome::ALL.len()]; ROUTES],
    in_flight: [AtomicI64; ROUTES],
    duration: [Histogram; ROUTES],
    first_byte: [Histogram; ROUTES],
    overhead: [Histogram; ROUTES],
    queued: Histogram,
    retries: [AtomicU64; Retry::ALL.len()],
    pub(super) models: Models,
    pub(super) choices: Choices,
}

fn by_route(scale: &'static Scale) -> [Histogram; ROUTES] {
    array::from_fn(|_| Histogram::new(scale))
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            requests: array::from_fn(|_| Default::default()),
            in_flight: array::from_fn(|_| AtomicI64::default()),
            duration: by_route(&ANSWER),
            first_byte: by_route(&ANSWER),
            overhead: by_route(&OVERHEAD),
            queued: Histogram::new(&ROUND),
            retries: Default::default(),
            models: Models::default(),
            choices: Choices::default(),
        }
    }
}

impl Counts {
    pub(super) fn begun(&self, route: Route) {
        self.in_flight[route as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Was not for here.
    pub(super) fn withdrawn(&self, route: Route) {
        self.in_flight[route as usize].fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn sent(&self, route: Route, after: Duration) {
        self.overhead[route as usize].observe_time(after);
    }

    pub(super) fn waited(&self, time: Duration) {
        self.queued.observe_time(time);
    }

    pub(super) fn first_byte(&self, route: Route, after: Duration) {
        self.first_byte[route as usize].observe_time(after);
    }

    pub(super) fn retried(&self, why: Retry) {
        self.retries[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn ended(&self, route: Route, outcome: Outcome, after: Duration) {
        self.requests[route as usize][outcome as usize].fetch_add(1, Ordering::Relaxed);
        self.in_flight[route as usize].fetch_sub(1, Ordering::Relaxed);
        self.duration[route as usize].observe_time(after);
    }

    pub(super) fn retries(&self) -> u64 {
        self.retries.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

/// Exports [`Counts`].
#[derive(Debug)]
pub(super) struct Exported(pub(super) Arc<Counts>);

impl Collector for Exported {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let counts = &*self.0;
        self.requests(&mut encoder)?;
        let help = "Requests being served, by route";
        let mut family = encoder.encode_descriptor("requests_in_flight", help, None, MetricType::Gauge)?;
        for route in routes().filter(|route| route.is_proxied()) {
            let value = counts.in_flight[route as usize].load(Ordering::Relaxed);
            ConstGauge::new(value).encode(family.encode_family(&[("route", route.path())])?)?;
        }
        let by_route: [(&str, &str, &[Histogram; ROUTES]); 3] = [
            ("request_duration_seconds", "From head to last byte of the response", &counts.duration),
            (
                "time_to_first_byte_seconds",
                "From request head to the first byte of a worker's body",
                &counts.first_byte,
            ),
            (
                "router_overhead_seconds",
                "From the last byte of a request to sending it to a worker, of the first attempt",
                &counts.overhead,
            ),
        ];
        for (name, help, histograms) in by_route {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for route in routes() {
                let snapshot = histograms[route as usize].snapshot();
                if snapshot.count() > 0 {
                    snapshot.encode(family.encode_family(&[("route", route.path())])?)?;
                }
            }
        }
        let help = "Standing in line while all workers were saturated, of those that had to";
        let family = encoder.encode_descriptor("queue_wait_seconds", help, None, MetricType::Histogram)?;
        counts.queued.snapshot().encode(family)?;
        let help = "Attempts at workers after the first, by what went wrong before";
        let mut family = encoder.encode_descriptor("retries", help, None, MetricType::Counter)?;
        for why in Retry::ALL {
            let count = counts.retries[why as usize].load(Ordering::Relaxed);
            ConstCounter::new(count).encode(family.encode_family(&[("reason", why.as_str())])?)?;
        }
        counts.choices.encode(&mut encoder)?;
        self.models(&mut encoder)
    }
}

impl Exported {
    fn requests(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        let help = "Requests by route and how they ended";
        let mut family = encoder.encode_descriptor("requests", help, None, MetricType::Counter)?;
        for route in routes() {
            for outcome in Outcome::ALL {
                let count = self.0.requests[route as usize][outcome as usize].load(Ordering::Relaxed);
                // What can be proxied begins at zero, so that its first error is an increase.
                if count > 0 || route.is_proxied() {
                    let labels = [("route", route.path()), ("outcome", outcome.as_str())];
                    ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }

    fn models(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        let models = self.0.models.list();
        let help = "Requests for which a worker was found, by model and how they ended";
        let mut family = encoder.encode_descriptor("model_requests", help, None, MetricType::Counter)?;
        for model in &models {
            for outcome in Outcome::ALL {
                let count = model.requests[outcome as usize].load(Ordering::Relaxed);
                if count > 0 {
                    let labels = [("model", model.name.as_str()), ("outcome", outcome.as_str())];
                    ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        type Read = fn(&ModelCounts) -> &Histogram;
        let histograms: [(&str, &str, Read); 2] = [
            (
                "time_to_first_token_seconds",
                "From request head to the first event of a streamed answer, as handed to the client",
                |model| &model.first_token,
            ),
            ("inter_token_seconds", "Between two pieces of a streamed answer", |model| &model.between_tokens),
        ];
        for (name, help, read) in histograms {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for model in &models {
                let snapshot = read(model).snapshot();
                if snapshot.count() > 0 {
                    snapshot.encode(family.encode_family(&[("model", model.name.as_str())])?)?;
                }
            }
        }
        Ok(())
    }
}
