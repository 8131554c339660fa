//! What the agent's streams take of the engine, where nobody else says so: their replica or edge is
//! gone, and whoever hears the next heartbeat books them.

use std::collections::BTreeMap;

use crate::admin_types::RunningOnRank;
use crate::http::takes;
use crate::relay::hub::Relays;
use crate::state::load::LoadDelta;

/// What runs unbooked, rank by rank.
pub(super) fn running(relays: &Relays, block_size: u32) -> Vec<RunningOnRank> {
    let mut by_rank = BTreeMap::<u32, LoadDelta>::new();
    for (order, events) in relays.unbooked() {
        let (rank, load) = takes(&order, events, block_size);
        by_rank.entry(rank).or_default().merge(&load);
    }
    let number = |sum: i64| u32::try_from(sum).unwrap_or(u32::MAX);
    by_rank
        .into_iter()
        .map(|(rank, load)| RunningOnRank {
            rank,
            requests: number(load.requests.into()).min(RunningOnRank::MOST_REQUESTS),
            prefill_tokens: number(load.prefill_tokens),
            decode_blocks: number(load.decode_blocks),
        })
        .collect()
}

/// How many streams that are.
pub(super) fn requests(running: &[RunningOnRank]) -> Vec<(u32, u32)> {
    running.iter().map(|on| (on.rank, on.requests)).collect()
}
