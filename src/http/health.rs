//! `/livez`, `/readyz` and `/metrics`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use serde_json::json;

use super::errors::{ApiError, Code};
use super::front::Shard;
use crate::cluster::api::{ClusterStatus, ControlPlane};
use crate::routing::view::WorkerView;

/// The process runs and answers; nothing else is looked at.
pub(super) async fn livez() -> &'static str {
    "ok\n"
}

/// Whether a load balancer should send requests here: joined, registry applied, not draining.
/// Without a quorum a replica keeps routing with what it knows, so it stays ready.
pub(super) async fn readyz(State(shard): State<Arc<Shard>>, RawQuery(query): RawQuery) -> Response {
    let front = &shard.front;
    let status = front.control.status();
    let draining = front.draining.is_cancelled();
    let joined = !status.cluster_id.is_empty() && status.down.is_none();
    let applied = front.control.registry().index > 0;
    let ready = !draining && joined && applied;
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let verbose = query.is_some_and(|q| q.split('&').any(|p| p == "verbose" || p.starts_with("verbose=")));
    if !verbose {
        return (code, if ready { "ok\n" } else { "not ready; see /readyz?verbose\n" }).into_response();
    }
    let check = |ok: bool, otherwise: &str| if ok { "ok".to_owned() } else { otherwise.to_owned() };
    let member = match &status.down {
        Some(why) => format!("down: {why}"),
        None => check(joined, "waiting to join a cluster"),
    };
    let body = json!({
        "ready": ready,
        "replica": front.config.replica,
        "checks": {
            "not_draining": check(!draining, "draining"),
            "cluster_joined": member,
            "registry_applied": check(applied, "nothing applied yet"),
            "quorum": check(status.quorum, "degraded: no quorum"),
        },
    });
    (code, Json(body)).into_response()
}

/// The counters in OpenMetrics text.
pub(super) async fn metrics(State(shard): State<Arc<Shard>>) -> Response {
    let mut text = String::new();
    if prometheus_client::encoding::text::encode(&mut text, shard.front.metrics.registry()).is_err() {
        return ApiError::new(Code::Internal, "the metrics could not be encoded").into_response();
    }
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, content_type)], text).into_response()
}

/// Gauges read from the cluster at the moment of a scrape.
pub struct ClusterGauges {
    control: Arc<dyn ControlPlane>,
}

impl ClusterGauges {
    /// Reads from `control`.
    pub fn new(control: Arc<dyn ControlPlane>) -> Self {
        Self { control }
    }
}

impl std::fmt::Debug for ClusterGauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterGauges")
    }
}

impl Collector for ClusterGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let registry = self.control.registry();
        let load = |worker: &WorkerView| worker.live.load();
        worker_gauge(&mut encoder, &registry.workers, "worker_requests", "Requests booked", |w| {
            load(w).requests
        })?;
        worker_gauge(
            &mut encoder,
            &registry.workers,
            "worker_prefill_tokens",
            "Prompt tokens still to be prefilled, as booked",
            |w| load(w).prefill_tokens,
        )?;
        worker_gauge(
            &mut encoder,
            &registry.workers,
            "worker_decode_blocks",
            "KV blocks held, as booked",
            |w| load(w).decode_blocks,
        )?;
        worker_gauge(
            &mut encoder,
            &registry.workers,
            "worker_online",
            "1 if online by the cluster's decision",
            |w| i64::from(w.record.online),
        )?;
        worker_gauge(
            &mut encoder,
            &registry.workers,
            "worker_reachable",
            "1 unless this replica failed to connect to it last",
            |w| i64::from(!w.live.unreachable.load(Ordering::Relaxed)),
        )?;
        raft_gauges(&mut encoder, &self.control.status())
    }
}

/// When each listener's certificate expires, read at the moment of a scrape.
pub struct CertificateGauges {
    expiries: Box<dyn Fn() -> Vec<(&'static str, i64)> + Send + Sync>,
}

impl CertificateGauges {
    /// `expiries` gives listeners and seconds since 1970.
    pub fn new(expiries: impl Fn() -> Vec<(&'static str, i64)> + Send + Sync + 'static) -> Self {
        Self { expiries: Box::new(expiries) }
    }
}

impl std::fmt::Debug for CertificateGauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CertificateGauges")
    }
}

impl Collector for CertificateGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let expiries = (self.expiries)();
        if expiries.is_empty() {
            return Ok(());
        }
        let help = "When the certificate in use expires, in seconds since 1970";
        let mut family =
            encoder.encode_descriptor("certificate_expiry_seconds", help, None, MetricType::Gauge)?;
        for (listener, expires) in expiries {
            ConstGauge::new(expires).encode(family.encode_family(&[("listener", listener)])?)?;
        }
        Ok(())
    }
}

fn worker_gauge(
    encoder: &mut DescriptorEncoder<'_>,
    workers: &[Arc<WorkerView>],
    name: &str,
    help: &str,
    value: impl Fn(&WorkerView) -> i64,
) -> std::fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for worker in workers {
        let labels = [("worker", worker.id().as_str())];
        ConstGauge::new(value(worker)).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn raft_gauges(encoder: &mut DescriptorEncoder<'_>, status: &ClusterStatus) -> std::fmt::Result {
    type Read = fn(&crate::cluster::api::GroupStatus) -> i64;
    let gauges: [(&str, &str, Read); 5] = [
        ("raft_term", "Raft term", |g| g.term as i64),
        ("raft_is_leader", "1 if this replica leads the group", |g| i64::from(g.role == "leader")),
        ("raft_commit_index", "Last index known to be committed", |g| g.committed as i64),
        ("raft_applied_index", "Last index applied", |g| g.applied as i64),
        ("raft_log_bytes", "Bytes of log on disk", |g| g.log_bytes as i64),
    ];
    for (name, help, read) in gauges {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for group in &status.groups {
            let labels = [("group", group.group.as_str())];
            ConstGauge::new(read(group)).encode(family.encode_family(&labels)?)?;
        }
    }
    let quorum =
        encoder.encode_descriptor("quorum", "1 if a quorum was heard of lately", None, MetricType::Gauge)?;
    ConstGauge::new(i64::from(status.quorum)).encode(quorum)
}
