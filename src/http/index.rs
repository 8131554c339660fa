//! What is told of the prefix index and of the feeds that fill it.

use std::collections::HashMap;

use super::front::Front;
use crate::admin_types::{CacheStatus, FeedStatus, IndexCounters, IndexReply, Known, RankStatus};
use crate::cluster::api::MemberStatus;
use crate::ids::{WorkerId, WorkerIx};
use crate::ingest::FeedCounters;
use crate::state::ranks::{Knowledge, RankKey};

/// The index as this replica has it.
pub(super) fn index(front: &Front) -> IndexReply {
    let status = front.control.status();
    let digest = front.control.cache_digest();
    let ranks = front.control.ranks().borrow().clone();
    let view = front.control.registry();
    let names: HashMap<WorkerIx, _> = view.workers.iter().map(|w| (w.record.ix, w.id())).collect();
    let feeds: HashMap<RankKey, FeedStatus> =
        front.feeds.lock().iter().map(|(key, counters)| (*key, feed(counters))).collect();
    let blocks = front.control.blocks().index.load_full();
    let counted = blocks.counters();
    let name_of = |id| {
        let known = status.members.iter().find(|member: &&MemberStatus| member.id == id);
        known.map_or_else(|| id.to_string(), |member| member.info.name.clone())
    };
    let rank = |(key, record): (&RankKey, &crate::state::ranks::RankRecord)| {
        // The published ranks may have old cursors.
        let cursor = front.control.feed_cursor(*key).unwrap_or(record.cursor);
        RankStatus {
            worker: names.get(&key.worker).map(|id| (*id).clone()),
            rank: key.rank,
            known: match record.knowledge {
                Knowledge::Events => Known::Events,
                Knowledge::Predicted => Known::Predicted,
            },
            owner: record.owner.map(name_of),
            blocks: blocks.rank(record.ix).0,
            cursor: cursor.last.map(|(number, _)| number),
            recovering: cursor.recovering(),
            feed: feeds.get(key).cloned(),
        }
    };
    let mut ranks: Vec<RankStatus> = ranks.iter().map(rank).collect();
    ranks.sort_by(|a, b| (&a.worker, a.rank).cmp(&(&b.worker, b.rank)));
    IndexReply {
        replica: status.me,
        name: status.name,
        digest,
        counters: IndexCounters {
            blocks: counted.blocks,
            worker_blocks: counted.worker_blocks,
            nodes: counted.nodes,
            bytes: counted.bytes,
            evicted: counted.evicted,
            orphans: counted.orphans,
            refused: counted.refused,
        },
        ranks,
    }
}

/// What is known of each worker's cache, from the ranks of [`index`].
pub(super) fn caches(ranks: &[RankStatus]) -> HashMap<WorkerId, CacheStatus> {
    let mut caches: HashMap<WorkerId, CacheStatus> = HashMap::new();
    for rank in ranks {
        let Some(worker) = &rank.worker else { continue };
        let empty = || CacheStatus { blocks: 0, known: rank.known, recovering: false, owners: Vec::new() };
        let cache = caches.entry(worker.clone()).or_insert_with(empty);
        cache.blocks += rank.blocks;
        cache.recovering |= rank.recovering;
        if rank.known == Known::Events {
            cache.known = Known::Events;
        }
        cache.owners.extend(
            rank.owner.iter().filter(|name| !cache.owners.contains(name)).cloned().collect::<Vec<_>>(),
        );
    }
    caches
}

fn feed(counters: &FeedCounters) -> FeedStatus {
    FeedStatus {
        connected: counters.connected,
        messages: counters.messages,
        gaps: counters.stats.gaps,
        replays: counters.stats.replays,
        restarts: counters.stats.restarts,
        losses: counters.stats.losses,
        last_error: counters.last_error.clone(),
    }
}
