//! What is read at the moment of a scrape of the prefix index, of the feeds that fill it, and of
//! the tokenizers.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use super::front::Front;
use crate::ids::{WorkerId, WorkerIx};
use crate::ingest::FeedCounters;
use crate::kv::index::Counters;
use crate::tokens::{Figures, Source};

/// Feeds of a replica that have labels of their own; further ones are left out.
const MOST_FEEDS: usize = 1024;

/// The label of models that are not configured.
const OTHER: &str = "_other";

/// Exports all of it.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, front: &Front) -> fmt::Result {
    let view = front.control.registry();
    let names: HashMap<WorkerIx, &WorkerId> = view.workers.iter().map(|w| (w.record.ix, w.id())).collect();
    index(encoder, &front.control.blocks().index.load().counters())?;
    workers(encoder, front, &names)?;
    feeds(encoder, front, &names)?;
    tokenizers(encoder, front.config.tokenizers.as_ref().map(|tokenizers| tokenizers.figures()))
}

fn index(encoder: &mut DescriptorEncoder<'_>, counters: &Counters) -> fmt::Result {
    let gauges = [
        ("index_blocks", "Different blocks in the prefix index", counters.blocks),
        (
            "index_worker_blocks",
            "Blocks in the prefix index, each as often as ranks hold it",
            counters.worker_blocks,
        ),
        ("index_bytes", "Memory of the prefix index, by its own account", counters.bytes),
    ];
    for (name, help, value) in gauges {
        let family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(family)?;
    }
    let counts = [
        ("index_evicted_blocks", "Blocks dropped to keep the bound on memory", counters.evicted),
        (
            "index_orphan_blocks",
            "Blocks not stored because what comes before them is unknown",
            counters.orphans,
        ),
        ("index_refused", "Operations that the prefix index refused", counters.refused),
    ];
    for (name, help, value) in counts {
        let family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(value).encode(family)?;
    }
    Ok(())
}

/// By worker, its ranks added up.
fn workers(
    encoder: &mut DescriptorEncoder<'_>,
    front: &Front,
    names: &HashMap<WorkerIx, &WorkerId>,
) -> fmt::Result {
    let ranks = front.control.ranks().borrow().clone();
    let blocks = front.control.blocks().index.load_full();
    let mut held: BTreeMap<&WorkerId, (u64, u64)> = BTreeMap::new();
    for (key, record) in ranks.iter() {
        let Some(name) = names.get(&key.worker) else { continue };
        let (held, recovering) = held.entry(*name).or_default();
        *held += blocks.rank(record.ix).0;
        *recovering += u64::from(record.cursor.recovering());
    }
    type Read = fn(&(u64, u64)) -> u64;
    let gauges: [(&str, &str, Read); 2] = [
        ("worker_cached_blocks", "Blocks that a worker's ranks hold, as far as is known", |held| held.0),
        (
            "worker_recovering_ranks",
            "Ranks whose blocks are known in part only, so that they are not scored",
            |held| held.1,
        ),
    ];
    for (name, help, read) in gauges {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (worker, held) in &held {
            let labels = [("worker", worker.as_str())];
            ConstGauge::new(read(held)).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn feeds(
    encoder: &mut DescriptorEncoder<'_>,
    front: &Front,
    names: &HashMap<WorkerIx, &WorkerId>,
) -> fmt::Result {
    let mut feeds: Vec<(&str, String, FeedCounters)> = front
        .feeds
        .lock()
        .iter()
        .filter_map(|(key, counters)| {
            Some((names.get(&key.worker)?.as_str(), key.rank.to_string(), counters.clone()))
        })
        .collect();
    feeds.sort_by(|a, b| (a.0, a.1.len(), &a.1).cmp(&(b.0, b.1.len(), &b.1)));
    feeds.truncate(MOST_FEEDS);
    let help = "1 while this replica's subscription to a rank's KV events stands";
    let mut family = encoder.encode_descriptor("feed_connected", help, None, MetricType::Gauge)?;
    for (worker, rank, counters) in &feeds {
        let labels = [("worker", *worker), ("rank", rank.as_str())];
        ConstGauge::new(u64::from(counters.connected)).encode(family.encode_family(&labels)?)?;
    }
    type Read = fn(&FeedCounters) -> u64;
    let counts: [(&str, &str, Read); 11] = [
        ("feed_disconnects", "Connections to feeds that ended or could not be made", |c| c.disconnects),
        ("feed_messages", "Live messages read", |c| c.messages),
        ("feed_events", "Events read, replayed ones too", |c| c.events),
        ("feed_stored_blocks", "Blocks stored or copied", |c| c.stored),
        ("feed_gaps", "Times numbers were missing", |c| c.stats.gaps),
        ("feed_replays", "Replays asked for", |c| c.stats.replays),
        ("feed_failed_replays", "Replays that broke off or never ended", |c| c.stats.failed_replays),
        ("feed_restarts", "Times an engine had begun anew", |c| c.stats.restarts),
        ("feed_losses", "Times messages were lost for good", |c| c.stats.losses),
        ("feed_garbage", "Messages that are none", |c| c.garbage),
        ("feed_skipped_events", "Events that were not used", |c| c.skipped.total()),
    ];
    for (name, help, read) in counts {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (worker, rank, counters) in &feeds {
            let labels = [("worker", *worker), ("rank", rank.as_str())];
            ConstCounter::new(read(counters)).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn tokenizers(encoder: &mut DescriptorEncoder<'_>, figures: Option<Figures>) -> fmt::Result {
    let models = figures.as_ref().map(|figures| figures.models.as_slice()).unwrap_or_default();
    let name_of = |name: &'_ str| if name.is_empty() { OTHER.to_owned() } else { name.to_owned() };
    let help = "Prompts looked at, by what their blocks are made of";
    let mut family = encoder.encode_descriptor("tokenizer_prompts", help, None, MetricType::Counter)?;
    for model in models {
        let name = name_of(&model.model);
        for (source, count) in Source::ALL.iter().zip(model.sources) {
            let labels = [("model", name.as_str()), ("source", source.name())];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
    }
    let help = "Prompts whose template or tokenizer failed";
    let mut family = encoder.encode_descriptor("tokenizer_failures", help, None, MetricType::Counter)?;
    for model in models {
        let name = name_of(&model.model);
        ConstCounter::new(model.failures).encode(family.encode_family(&[("model", name.as_str())])?)?;
    }
    let figures = figures.as_ref();
    let count = |read: fn(&Figures) -> u64| figures.map(read).unwrap_or_default();
    let help = "Prompts that found the tokenizers' queue full and were routed without their prefix";
    let family = encoder.encode_descriptor("tokenizer_refused", help, None, MetricType::Counter)?;
    ConstCounter::new(count(|f| f.refused)).encode(family)?;
    let help = "Bytes of prompts by whether their ids were still known";
    let mut family = encoder.encode_descriptor("tokenizer_bytes", help, None, MetricType::Counter)?;
    for (result, bytes) in
        [("hit", count(|f| f.segments.hit_bytes)), ("miss", count(|f| f.segments.missed_bytes))]
    {
        ConstCounter::new(bytes).encode(family.encode_family(&[("cache", result)])?)?;
    }
    let help = "Memory of the tokenizers' cache of pieces";
    let family = encoder.encode_descriptor("tokenizer_cache_bytes", help, None, MetricType::Gauge)?;
    ConstGauge::new(count(|f| f.segments.kept_bytes)).encode(family)?;
    let help = "Token ids asked of engines, by what came of it";
    let mut family = encoder.encode_descriptor("tokenizer_questions", help, None, MetricType::Counter)?;
    let results = [
        ("remembered", count(|f| f.asked.remembered)),
        ("answered", count(|f| f.asked.answered)),
        ("failed", count(|f| f.asked.failed)),
        ("refused", count(|f| f.asked.refused)),
    ];
    for (result, count) in results {
        ConstCounter::new(count).encode(family.encode_family(&[("result", result)])?)?;
    }
    Ok(())
}
