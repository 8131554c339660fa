//! The name service of a front: by which names KsanaLLM's groups go, and what operators and scrapers see
//! of it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Json;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::front::Front;
use crate::admin_types::names::{NameEndpoint, NameStatus, NamesReply};
use crate::naming::{Answer, Call, NameService, NameState, Standing};

/// By which names KsanaLLM's groups are found, and where.
#[derive(Clone, Debug)]
pub struct Names {
    /// Who knows what they stand for.
    pub service: Arc<dyn NameService>,
    /// The name of the prefill groups.
    pub prefill: String,
    /// That of the decode groups.
    pub decode: String,
    calls: Arc<[AtomicU64; 4]>,
}

/// Roles and results of calls, in the order of the counters.
const CALLS: [(&str, &str); 4] =
    [("prefill", "ok"), ("prefill", "error"), ("decode", "ok"), ("decode", "error")];

impl Names {
    /// Of a service, and two of its names.
    pub fn new(service: Arc<dyn NameService>, prefill: String, decode: String) -> Self {
        Self { service, prefill, decode, calls: Arc::default() }
    }

    /// What the prefill and the decode groups' names stand for.
    pub(super) fn answers(&self) -> (Option<Arc<Answer>>, Option<Arc<Answer>>) {
        (self.service.answer(&self.prefill), self.service.answer(&self.decode))
    }

    /// Hands on how a call ended.
    pub(super) fn report(&self, is_decode: bool, call: &Call<'_>) {
        let at = usize::from(is_decode) * 2 + usize::from(!call.is_ok());
        self.calls[at].fetch_add(1, Ordering::Relaxed);
        self.service.report(call);
    }
}

/// Everything about the names of a front, for operators.
pub(super) fn show(front: &Front) -> Response {
    let reply = match &front.name_service {
        None => NamesReply::default(),
        Some(service) => NamesReply {
            provider: service.provider().to_owned(),
            names: service.states().into_iter().map(status).collect(),
        },
    };
    Json(reply).into_response()
}

fn status(state: NameState) -> NameStatus {
    let answer = state.answer.unwrap_or_default();
    let used: Vec<&str> = match state.expired {
        true => Vec::new(),
        false => answer.usable().map(|endpoint| endpoint.address.as_str()).collect(),
    };
    let endpoint = |endpoint: &crate::naming::Endpoint| NameEndpoint {
        address: endpoint.address.clone(),
        weight: endpoint.weight,
        state: endpoint.standing.name().to_owned(),
        used: used.binary_search(&endpoint.address.as_str()).is_ok(),
    };
    NameStatus {
        name: state.name,
        endpoints: answer.all().iter().map(endpoint).collect(),
        left_out: answer.left_out as u64,
        age_ms: state.age.map(|age| age.as_millis() as u64),
        expired: state.expired,
        trouble: state.trouble,
        failures: state.failures,
        lists: state.lists,
        changes: state.changes,
    }
}

/// What is wrong with the name service, a line for each name.
pub(super) fn troubles(front: &Front) -> Vec<String> {
    let states = front.name_service.as_ref().map(|service| service.states()).unwrap_or_default();
    let line = |state: NameState| {
        let why = state.trouble?;
        let holds = match (state.age, state.expired) {
            (None, _) => "nothing is known of it yet".to_owned(),
            (Some(age), false) => format!("what was said {} s ago holds", age.as_secs()),
            (Some(age), true) => format!("what was said {} s ago is too old to be used", age.as_secs()),
        };
        Some(format!("{}: {why}; {holds}", state.name))
    };
    states.into_iter().filter_map(line).collect()
}

/// Exports how the names stand.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, front: &Front) -> fmt::Result {
    let service = front.name_service.as_ref();
    let states = service.map(|service| service.states()).unwrap_or_default();
    let help = "Endpoints of a name, by whether they get requests";
    let mut family = encoder.encode_descriptor("name_service_endpoints", help, None, MetricType::Gauge)?;
    for state in &states {
        for standing in [Standing::Ready, Standing::Leaving, Standing::Unhealthy, Standing::Out] {
            let all = state.answer.as_ref().map(|answer| answer.all()).unwrap_or_default();
            let count = all.iter().filter(|endpoint| endpoint.standing == standing).count();
            let labels = [("name", state.name.as_str()), ("state", standing.name())];
            ConstGauge::new(count as u64).encode(family.encode_family(&labels)?)?;
        }
    }
    let help = "Since the name service last said that a name stands for what it does";
    let mut family = encoder.encode_descriptor("name_service_age_seconds", help, None, MetricType::Gauge)?;
    for state in &states {
        if let Some(age) = state.age {
            let labels = [("name", state.name.as_str())];
            ConstGauge::new(age.as_secs_f64()).encode(family.encode_family(&labels)?)?;
        }
    }
    type Gauge = fn(&NameState) -> bool;
    let gauges: [(&str, &str, Gauge); 2] = [
        ("name_service_up", "1 while the name service answers when it is asked about a name", |state| {
            state.trouble.is_none() && state.answer.is_some()
        }),
        ("name_service_expired", "1 if what was said of a name is too old to be used", |state| state.expired),
    ];
    for (name, help, read) in gauges {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for state in &states {
            let labels = [("name", state.name.as_str())];
            ConstGauge::new(u64::from(read(state))).encode(family.encode_family(&labels)?)?;
        }
    }
    type Count = fn(&NameState) -> u64;
    let counts: [(&str, &str, Count); 3] = [
        ("name_service_failures", "Questions about a name that were not answered well", |state| {
            state.failures
        }),
        ("name_service_lists", "Times that everything about a name was asked for", |state| state.lists),
        ("name_service_changes", "Times that a name came to stand for something else", |state| state.changes),
    ];
    for (name, help, read) in counts {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for state in &states {
            let labels = [("name", state.name.as_str())];
            ConstCounter::new(read(state)).encode(family.encode_family(&labels)?)?;
        }
    }
    let help = "Calls of KsanaLLM's groups that were found by name, by what came of them";
    let mut family = encoder.encode_descriptor("name_service_calls", help, None, MetricType::Counter)?;
    if let Some(names) = &front.config.names {
        for ((role, result), count) in CALLS.iter().zip(names.calls.iter()) {
            let labels = [("role", *role), ("result", *result)];
            let count = count.load(Ordering::Relaxed);
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
    }
    let help = "Reports of results to the name service's monitoring";
    let mut family = encoder.encode_descriptor("name_service_reports", help, None, MetricType::Counter)?;
    if let Some(service) = service {
        let (sent, failed) = service.reports();
        for (result, count) in [("ok", sent), ("error", failed)] {
            ConstCounter::new(count).encode(family.encode_family(&[("result", result)])?)?;
        }
    }
    Ok(())
}
