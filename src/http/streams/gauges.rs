//! What is exported of output streams, read at the moment of a scrape.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::admin_types::StreamNumbers;
use crate::relay::copy::Role;
use crate::relay::counts::{Counts, Resumed};
use crate::relay::hub::Relays;
use crate::telemetry::histogram::Histogram;

const ROLES: [(Role, &str); 3] =
    [(Role::Holder, "holder"), (Role::Mirror, "copy"), (Role::Shadow, "passing")];

/// Exports what one process has of streams; all zeros where it keeps none.
pub(in crate::http) fn encode(encoder: &mut DescriptorEncoder<'_>, relays: Option<&Relays>) -> fmt::Result {
    let empty = Counts::default();
    let counts = relays.map_or(&empty, |relays| &relays.counts);
    let all = relays.map(Relays::all).unwrap_or_default();
    let help = "Output streams at this replica that have not ended, by what it does for them";
    let mut family = encoder.encode_descriptor("stream_active", help, None, MetricType::Gauge)?;
    for (role, name) in ROLES {
        let active = all.iter().filter(|(_, summary)| summary.role == role && summary.ended.is_none());
        ConstGauge::new(active.count() as u64).encode(family.encode_family(&[("role", name)])?)?;
    }
    type Read = fn(&Counts) -> &AtomicU64;
    let counters: [(&str, &str, Read); 9] = [
        ("stream_opened", "Streams begun for a client here", |c| &c.opened),
        ("stream_held", "Attempts at a stream that were begun as its holder", |c| &c.held),
        ("stream_taken_over", "Streams whose holder was lost and that were given to another", |c| {
            &c.taken_over
        }),
        ("stream_continued", "Streams that this replica went on with, after a holder or an engine", |c| {
            &c.continued
        }),
        ("stream_lost", "Streams that nobody could go on with", |c| &c.lost),
        ("stream_orphaned", "Streams that were cancelled because no client came back", |c| &c.orphaned),
        ("stream_cancelled", "Streams that were cancelled", |c| &c.cancelled),
        ("stream_evicted", "Streams forgotten before their time, for want of memory", |c| &c.evicted),
        ("stream_link_failures", "Links to other replicas that could not be opened", |c| &c.links_failed),
    ];
    for (name, help, read) in counters {
        let counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(read(counts).load(Ordering::Relaxed)).encode(counter)?;
    }
    let help = "Clients that came back to a stream, by what became of that";
    let mut family = encoder.encode_descriptor("stream_resumed", help, None, MetricType::Counter)?;
    for (result, count) in Resumed::ALL.iter().zip(&counts.resumed) {
        let labels = [("result", result.as_str())];
        ConstCounter::new(count.load(Ordering::Relaxed)).encode(family.encode_family(&labels)?)?;
    }
    type Time = fn(&Counts) -> &Histogram;
    let times: [(&str, &str, Time); 2] = [
        ("stream_takeover_seconds", "From the loss of a holder to the order to the next", |c| {
            &c.takeover_time
        }),
        ("stream_resume_seconds", "From a client's asking for a stream to having it", |c| &c.resume_time),
    ];
    for (name, help, read) in times {
        let histogram = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        read(counts).snapshot().encode(histogram)?;
    }
    let help = "Pause in a stream's events where it went on elsewhere, by what had been lost";
    let mut family = encoder.encode_descriptor("stream_stall_seconds", help, None, MetricType::Histogram)?;
    for (seam, stall) in [("holder", &counts.holder_stall), ("worker", &counts.worker_stall)] {
        stall.snapshot().encode(family.encode_family(&[("seam", seam)])?)?;
    }
    let gauges = [
        ("stream_buffer_bytes", "Memory of streams at this replica", relays.map_or(0, Relays::bytes)),
        (
            "stream_links",
            "Links to other replicas that streams are read through",
            relays.map_or(0, Relays::open_links),
        ),
    ];
    for (name, help, value) in gauges {
        let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value as u64).encode(gauge)?;
    }
    Ok(())
}

/// The most important of that, for operators.
pub(in crate::http) fn numbers(relays: &Relays) -> StreamNumbers {
    let all = relays.all();
    let active = |role: Role| {
        all.iter().filter(|(_, summary)| summary.role == role && summary.ended.is_none()).count() as u64
    };
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let counts = &relays.counts;
    StreamNumbers {
        held: active(Role::Holder),
        copies: active(Role::Mirror) + active(Role::Shadow),
        kept: all.iter().filter(|(_, summary)| summary.ended.is_some()).count() as u64,
        bytes: relays.bytes() as u64,
        opened: read(&counts.opened),
        resumed: read(&counts.resumed[Resumed::Ok as usize]),
        taken_over: read(&counts.taken_over),
        continued: read(&counts.continued),
        lost: read(&counts.lost),
    }
}
