//! What is read at the moment of a scrape: requests that wait, workers and their loads, the life of
//! both Raft groups, batches, proposals, the log and what is known of other replicas.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::front::Front;
use super::keys::KeyGauges;
use super::knowledge;
use super::names;
use super::status::breaker;
use super::streams;
use crate::admin_types::BreakerState;
use crate::cluster::api::{ClusterStats, ClusterStatus, GroupStats, GroupStatus, LogStats, MemberStatus};
use crate::routing::view::WorkerView;
use crate::telemetry::histogram::Snapshot;
use crate::telemetry::log;

/// The roles of [`GroupStatus::role`], one of which is 1.
const ROLES: [&str; 5] = ["leader", "follower", "candidate", "learner", "down"];

/// Exports the state of a front and of its cluster.
#[derive(Debug)]
pub(super) struct Gauges(pub(super) Arc<Front>);

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let front = &*self.0;
        let help = "Requests that stand in line because all workers are saturated";
        let waiting = encoder.encode_descriptor("queue_requests", help, None, MetricType::Gauge)?;
        ConstGauge::new(front.queue.waiting() as u64).encode(waiting)?;
        let help = "Sessions that are bound to a worker, over the cluster";
        let bound = encoder.encode_descriptor("sessions", help, None, MetricType::Gauge)?;
        ConstGauge::new(front.control.sessions() as u64).encode(bound)?;
        workers(&mut encoder, &front.control.registry().workers, front.now_ms())?;
        knowledge::encode(&mut encoder, front)?;
        names::encode(&mut encoder, front)?;
        streams::gauges::encode(&mut encoder, front.streams.get().map(AsRef::as_ref))?;
        let status = front.control.status();
        groups(&mut encoder, &status)?;
        peers(&mut encoder, &status)?;
        let stats = front.control.stats();
        proposals(&mut encoder, &stats)?;
        if let Some(log) = &stats.log {
            self::log(&mut encoder, log)?;
        }
        KeyGauges::new(Arc::clone(&front.config.keys)).encode(encoder)
    }
}

/// What a process tells of itself whatever it is: lines of its log that were left out, and when each
/// listener's certificate expires, read at the moment of a scrape.
pub struct ProcessGauges {
    expiries: Box<dyn Fn() -> Vec<(&'static str, i64)> + Send + Sync>,
}

impl ProcessGauges {
    /// `expiries` gives listeners and seconds since 1970.
    pub fn new(expiries: impl Fn() -> Vec<(&'static str, i64)> + Send + Sync + 'static) -> Self {
        Self { expiries: Box::new(expiries) }
    }
}

impl std::fmt::Debug for ProcessGauges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProcessGauges")
    }
}

impl Collector for ProcessGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let help = "Lines of the log that were left out because those before them were not taken in time";
        let lines = encoder.encode_descriptor("log_lines_left_out", help, None, MetricType::Counter)?;
        ConstCounter::new(log::left_out()).encode(lines)?;
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

fn workers(encoder: &mut DescriptorEncoder<'_>, workers: &[Arc<WorkerView>], now_ms: u64) -> fmt::Result {
    let state = |worker: &WorkerView| match breaker(&worker.live, now_ms) {
        BreakerState::Closed => 0,
        BreakerState::HalfOpen => 1,
        BreakerState::Open => 2,
    };
    let reachable = |worker: &WorkerView| !worker.live.unreachable.load(Ordering::Relaxed);
    type Read<'a> = &'a dyn Fn(&WorkerView) -> i64;
    let gauges: [(&str, &str, Read<'_>); 9] = [
        ("worker_requests", "Requests booked", &|w| w.live.booked().requests),
        ("worker_prefill_tokens", "Prompt tokens still to be prefilled, as booked", &|w| {
            w.live.booked().prefill_tokens
        }),
        ("worker_decode_blocks", "KV blocks held, as booked", &|w| w.live.booked().decode_blocks),
        (
            "worker_foreign_requests",
            "Requests its engine has beyond what is booked; below zero: short of it",
            &|w| w.live.foreign.get().requests,
        ),
        (
            "worker_foreign_blocks",
            "KV blocks its engine uses beyond what is booked; below zero: short of it",
            &|w| w.live.foreign.get().decode_blocks,
        ),
        ("worker_online", "1 if online by the cluster's decision", &|w| w.record.online.into()),
        ("worker_draining", "1 if kept from new requests", &|w| w.record.drain.into()),
        ("worker_reachable", "1 unless this replica failed to connect to it last", &|w| reachable(w).into()),
        ("worker_breaker_state", "This replica's breaker: 0 closed, 1 half-open, 2 open", &state),
    ];
    for (name, help, read) in gauges {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for worker in workers {
            let labels = [("worker", worker.id().as_str())];
            ConstGauge::new(read(worker)).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn groups(encoder: &mut DescriptorEncoder<'_>, status: &ClusterStatus) -> fmt::Result {
    type Read = fn(&GroupStatus) -> u64;
    let gauges: [(&str, &str, Read); 8] = [
        ("raft_term", "Raft term", |g| g.term),
        ("raft_is_leader", "1 if this replica leads the group", |g| (g.role == "leader").into()),
        ("raft_commit_index", "Last index known to be committed", |g| g.committed),
        ("raft_applied_index", "Last index applied", |g| g.applied),
        ("raft_commit_lag", "Entries in the log that are not known to be committed", |g| {
            g.last_log.saturating_sub(g.committed)
        }),
        ("raft_apply_lag", "Entries known to be committed that are not applied", |g| {
            g.committed.saturating_sub(g.applied)
        }),
        ("raft_checkpoint_index", "Index of the newest checkpoint", |g| g.checkpoint),
        ("raft_log_bytes", "Bytes of log on disk", |g| g.log_bytes),
    ];
    for (name, help, read) in gauges {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for group in &status.groups {
            ConstGauge::new(read(group)).encode(family.encode_family(&[("group", group.group.as_str())])?)?;
        }
    }
    let help = "1 for the role this replica has in the group";
    let mut family = encoder.encode_descriptor("raft_role", help, None, MetricType::Gauge)?;
    for group in &status.groups {
        for role in ROLES {
            let labels = [("group", group.group.as_str()), ("role", role)];
            ConstGauge::new(i64::from(group.role == role)).encode(family.encode_family(&labels)?)?;
        }
    }
    let help = "Since a quorum followed this leader, or its leader was heard";
    let mut family = encoder.encode_descriptor("raft_quorum_age_seconds", help, None, MetricType::Gauge)?;
    for group in &status.groups {
        if let Some(age) = group.quorum_age_ms {
            let labels = [("group", group.group.as_str())];
            ConstGauge::new(age as f64 / 1000.0).encode(family.encode_family(&labels)?)?;
        }
    }
    let help = "1 if a quorum was heard of lately";
    let quorum = encoder.encode_descriptor("quorum", help, None, MetricType::Gauge)?;
    ConstGauge::new(i64::from(status.quorum)).encode(quorum)
}

fn peers(encoder: &mut DescriptorEncoder<'_>, status: &ClusterStatus) -> fmt::Result {
    type Read = fn(&MemberStatus) -> Option<f64>;
    let gauges: [(&str, &str, Read); 4] = [
        ("replica_alive", "1 if heard from within its lease, by the cluster's decision", |m| {
            Some(f64::from(u8::from(m.alive)))
        }),
        ("replica_requests", "Requests a replica has in flight, by the cluster's books", |m| {
            Some(m.requests as f64)
        }),
        (
            "raft_follower_lag",
            "Entries of the cache group that a replica lacks, as its leader knows; only at the leader",
            |m| m.lag.map(|lag| lag as f64),
        ),
        ("view_lag_seconds", "How old the newest is that is known here of another replica, at most", |m| {
            m.view_age_ms.map(|age| age as f64 / 1000.0)
        }),
    ];
    for (name, help, read) in gauges {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for member in &status.members {
            if let Some(value) = read(member) {
                let labels = [("replica", member.info.name.as_str())];
                ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}

fn proposals(encoder: &mut DescriptorEncoder<'_>, stats: &ClusterStats) -> fmt::Result {
    type Histogram = fn(&GroupStats) -> &Snapshot;
    let histograms: [(&str, &str, Histogram); 4] = [
        ("proposal_batch_mutations", "Changes in one batch of this replica", |g| &g.batch_mutations),
        ("proposal_batch_bytes", "Bytes of one batch of this replica", |g| &g.batch_bytes),
        ("proposal_duration_seconds", "From sealing a batch to its application here", |g| &g.proposals),
        ("checkpoint_duration_seconds", "Writing a checkpoint", |g| &g.checkpoints),
    ];
    for (name, help, read) in histograms {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for group in &stats.groups {
            read(group).encode(family.encode_family(&[("group", group.group.name())])?)?;
        }
    }
    type Count = fn(&GroupStats) -> u64;
    let counters: [(&str, &str, Count); 3] = [
        ("proposal_resends", "Batches sent to a leader once more", |g| g.resends),
        ("raft_leader_changes", "Times a leader was seen to come", |g| g.leader_changes),
        ("checkpoint_failures", "Checkpoints that could not be written", |g| g.checkpoint_failures),
    ];
    for (name, help, read) in counters {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for group in &stats.groups {
            ConstCounter::new(read(group)).encode(family.encode_family(&[("group", group.group.name())])?)?;
        }
    }
    let help = "Bytes of changes that wait for a leader or are on their way";
    let mut family = encoder.encode_descriptor("proposal_queue_bytes", help, None, MetricType::Gauge)?;
    for group in &stats.groups {
        ConstGauge::new(group.queued_bytes)
            .encode(family.encode_family(&[("group", group.group.name())])?)?;
    }
    Ok(())
}

fn log(encoder: &mut DescriptorEncoder<'_>, log: &LogStats) -> fmt::Result {
    let help = "Making what was written to the log durable";
    let family =
        encoder.encode_descriptor("wal_flush_duration_seconds", help, None, MetricType::Histogram)?;
    log.syncs.encode(family)?;
    let counters = [
        ("wal_batches", "Batches written to the log", log.batches),
        ("wal_written_bytes", "Bytes written to the log", log.bytes),
        ("wal_watermark_flushes", "Flushes of the watermark", log.watermark_syncs),
    ];
    for (name, help, count) in counters {
        ConstCounter::new(count).encode(encoder.encode_descriptor(
            name,
            help,
            None,
            MetricType::Counter,
        )?)?;
    }
    Ok(())
}
