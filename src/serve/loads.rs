//! What engines say of their own work, held against what the cluster has booked on them.
//!
//! An engine may have more to do than this cluster gave it: another router sends to it, too, or it
//! still works for clients that are gone. Or it has less: a replica that is alive and stuck holds
//! bookings of requests that ended, or a client that reads slowly holds one whose answer the engine
//! finished long ago. Where the engine says so for [`MORE_IN_A_ROW`] looks, or [`LESS_IN_A_ROW`],
//! the least of the differences becomes a correction that all replicas add to its load. One replica
//! looks at each worker: the one that listens to its events, or would. It goes by the load sockets of
//! the ranks (SGLang), if it listens to all of them, and asks for `/metrics` otherwise; an SGLang
//! without metrics for `/v1/loads`.
//!
//! A worker with several data-parallel ranks is looked at rank by rank, and as a whole beside that,
//! each held against what is booked there. If its engine does not tell its ranks apart, what it has
//! more is taken to be shared equally, and what it has less to be missing where it is booked.
//!
//! A correction never feeds itself: it is what the engine says less what is *booked*, and that knows
//! of no correction. Nor does it stay longer than it is true by more than one look; with the lease of
//! whoever made it, it is gone at once, and one that takes something off also when what it was
//! taken from is released.
//!
//! The same look tells whether the engine has begun anew: [`Lives`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use super::feeds::{LoadBoard, preferred};
use super::lives::Lives;
use crate::cluster::api::ControlPlane;
use crate::engines::probe::{EngineLife, EngineLoad, RankLoad, parse_life, parse_load, parse_loads};
use crate::http::{Shard, ask_worker};
use crate::ids::{ReplicaId, WorkerIx};
use crate::kv::event::LoadStat;
use crate::routing::view::WorkerView;
use crate::state::command::CacheCommand;
use crate::state::corrections::Correction;
use crate::state::load::LoadSum;
use crate::state::ranks::{RankKey, Ranks};
use crate::state::worker::EngineKind;

/// Looks that must agree that there is more.
const MORE_IN_A_ROW: usize = 3;

/// Looks that must agree that there is less: more of them, because requests are on their way, and
/// answers too.
const LESS_IN_A_ROW: usize = 5;

/// What is no difference: as many requests or blocks ...
const SLACK: i64 = 2;
/// ... or this part of what is booked ...
const SLACK_PERCENT: i64 = 20;
/// ... or this one, where the engine has less.
const LESS_SLACK_PERCENT: i64 = 33;

/// Outstanding tokens of prompts that are no difference.
const SLACK_TOKENS: i64 = 256;

/// Engines asked at once.
const AT_ONCE: usize = 16;

/// How long an engine may take to answer.
const LIMIT: Duration = Duration::from_secs(2);

/// What an engine says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Said {
    /// That run or wait.
    requests: i64,
    /// In use; `None` where it does not say.
    blocks: Option<i64>,
}

/// What an engine has to do beyond what is booked, or short of it, as one look has it.
///
/// Engines do not say which requests they have: what is missing is taken to be like the others,
/// in tokens that wait and in blocks; of blocks no more is missing than the engine says are free.
fn difference(said: Said, booked: LoadSum, certain: LoadSum) -> LoadSum {
    let more = |said: i64, booked: i64| if differs(said, booked, SLACK) { (said - booked).max(0) } else { 0 };
    let there = said.requests.max(certain.requests);
    if !clearly_less(there, booked.requests) {
        return LoadSum {
            requests: more(said.requests, booked.requests),
            decode_blocks: said.blocks.map_or(0, |blocks| more(blocks, booked.decode_blocks)),
            prefill_tokens: 0,
        };
    }
    let rest = booked.part(there, booked.requests);
    let used = said.blocks.unwrap_or_default().max(certain.decode_blocks);
    LoadSum {
        requests: there - booked.requests,
        decode_blocks: (rest.decode_blocks.max(used) - booked.decode_blocks).min(0),
        prefill_tokens: (rest.prefill_tokens.max(certain.prefill_tokens) - booked.prefill_tokens).min(0),
    }
}

/// Whether requests are missing. An engine with nothing to do is believed however little is booked.
fn clearly_less(there: i64, booked: i64) -> bool {
    let slack = SLACK.max(booked * LESS_SLACK_PERCENT / 100);
    booked - there > slack || (there <= 0 && booked > 0)
}

/// Whether two numbers are far enough apart to mean something.
fn differs(one: i64, other: i64, slack: i64) -> bool {
    (one - other).abs() > slack.max(other.abs() * SLACK_PERCENT / 100)
}

/// The last looks at one engine.
#[derive(Debug, Default)]
struct Looks {
    whole: Trend,
    /// At its ranks, where it told them apart; at most as many as a worker may have.
    ranks: Vec<Trend>,
}

impl Looks {
    /// Takes note of another one; the correction to tell, if it is another one than `now`. `ranks`
    /// is empty where they are not told apart.
    fn note(&mut self, whole: LoadSum, ranks: &[LoadSum], now: &Correction) -> Option<Correction> {
        if self.ranks.len() != ranks.len() {
            // What was seen of other ranks says nothing of these.
            self.ranks.clear();
            self.ranks.resize_with(ranks.len(), Trend::default);
        }
        let (whole, mut news) = self.whole.note(whole, now.whole);
        let mut told = Vec::new();
        for ((rank, trend), difference) in (0..).zip(&mut self.ranks).zip(ranks) {
            let (agreed, is_news) = trend.note(*difference, now.of_rank(rank));
            news |= is_news;
            if !agreed.is_zero() {
                told.push((rank, agreed));
            }
        }
        // Of a rank that it does not tell of any more.
        news |= now.ranks.last().is_some_and(|(rank, _)| *rank as usize >= ranks.len());
        news.then_some(Correction { whole, ranks: told })
    }
}

/// The last looks at one rank, or at all together.
#[derive(Debug, Default)]
struct Trend(VecDeque<LoadSum>);

impl Trend {
    /// Takes note of another one; what is right now, and whether that is to be told in place of `now`.
    fn note(&mut self, difference: LoadSum, now: LoadSum) -> (LoadSum, bool) {
        self.0.push_back(difference);
        if self.0.len() > LESS_IN_A_ROW.max(MORE_IN_A_ROW) {
            self.0.pop_front();
        }
        let agreed = LoadSum {
            requests: self.agreed(|sum| sum.requests, now),
            decode_blocks: self.agreed(|sum| sum.decode_blocks, now),
            prefill_tokens: self.agreed(|sum| sum.prefill_tokens, now),
        };
        let news = agreed.is_zero() != now.is_zero()
            || differs(agreed.requests, now.requests, SLACK)
            || differs(agreed.decode_blocks, now.decode_blocks, SLACK)
            || differs(agreed.prefill_tokens, now.prefill_tokens, SLACK_TOKENS);
        (agreed, news)
    }

    /// What the last looks have in common. One that finds less of a difference is enough to end the
    /// rest of it; until there were enough of them, what is in force needs no more than that.
    fn agreed(&self, of: fn(&LoadSum) -> i64, now: LoadSum) -> i64 {
        let last = self.0.back().map_or(0, of);
        let (enough, sign) = if last < 0 { (LESS_IN_A_ROW, -1) } else { (MORE_IN_A_ROW, 1) };
        let size = |sum: &LoadSum| (sign * of(sum)).max(0);
        let least = match self.0.len() >= enough {
            true => self.0.iter().rev().take(enough).map(size).min().unwrap_or(0),
            false => size(&now).min(sign * last),
        };
        sign * least
    }
}

/// See the module.
pub(super) struct Loads {
    shard: Arc<Shard>,
    plane: Arc<dyn ControlPlane>,
    every: Duration,
    /// What the ranks' load sockets said.
    sockets: LoadBoard,
    looks: HashMap<WorkerIx, Looks>,
    lives: Lives,
}

impl Loads {
    /// Looks through `shard`, and at `sockets`, as often as that; tells `plane`.
    pub(super) fn new(
        shard: Arc<Shard>,
        plane: Arc<dyn ControlPlane>,
        every: Duration,
        sockets: LoadBoard,
    ) -> Self {
        Self { shard, plane, every, sockets, looks: HashMap::new(), lives: Lives::default() }
    }

    /// Looks until `shutdown`. What was told is forgotten by the cluster with this replica's lease.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let pause = tokio::time::sleep(self.every.mul_f64(rand::random_range(0.9..1.1)));
            let round = async { tokio::join!(self.round(), pause) };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = round => {}
            }
        }
    }

    async fn round(&mut self) {
        let status = self.plane.status();
        let live: Vec<ReplicaId> = status.members.iter().filter(|m| m.alive).map(|m| m.id).collect();
        let ranks = self.plane.ranks().borrow().clone();
        let view = self.plane.registry();
        let ours: Vec<Arc<WorkerView>> =
            view.workers.iter().filter(|worker| is_ours(worker, &ranks, status.me, &live)).cloned().collect();
        self.lives.keep(&ours);
        let ours: Vec<_> = ours.into_iter().filter(|worker| worker.record.online).collect();
        view.workers.iter().for_each(|worker| worker.live.turn());
        self.looks.retain(|ix, _| ours.iter().any(|worker| worker.record.ix == *ix));
        let (shard, sockets) = (&self.shard, &self.sockets);
        let answers: Vec<_> = futures_util::stream::iter(ours)
            .map(|worker| async move {
                let published = published(&sockets.lock(), &worker);
                let said = match published {
                    Some(load) => (Some(load), None),
                    None => ask(shard, &worker).await,
                };
                (worker, said)
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let mut heard = true;
        for (worker, (load, life)) in answers {
            let ix = worker.record.ix;
            if let Some(life) = life.filter(|_| heard) {
                heard = self.lives.note(self.plane.as_ref(), &ranks, &worker, life).await;
            }
            let Some(load) = load else {
                // Nothing is known of the time in between.
                self.looks.remove(&ix);
                continue;
            };
            let (whole, ranks) = differences(&load, &worker);
            let looks = self.looks.entry(ix).or_default();
            if let Some(extra) = looks.note(whole, &ranks, &worker.live.correction()) {
                tracing::info!(
                    worker = %worker.id(),
                    requests = extra.whole.requests,
                    blocks = extra.whole.decode_blocks,
                    tokens = extra.whole.prefill_tokens,
                    ranks = extra.ranks.len(),
                    "its engine has more to do than is booked, or less"
                );
                self.plane.tell_cache(CacheCommand::Correct { worker: ix, extra });
            }
        }
    }
}

fn is_ours(worker: &WorkerView, ranks: &Ranks, me: ReplicaId, live: &[ReplicaId]) -> bool {
    let key = RankKey { worker: worker.record.ix, rank: 0 };
    let owner = ranks.get(key).and_then(|record| record.owner);
    owner.or_else(|| preferred(key, live)) == Some(me)
}

/// What a worker's ranks said of their load, if all of them did.
fn published(said: &HashMap<RankKey, LoadStat>, worker: &WorkerView) -> Option<EngineLoad> {
    let mut load = EngineLoad::default();
    for rank in 0..worker.dp_ranks() {
        let stat = said.get(&RankKey { worker: worker.record.ix, rank })?;
        let requests = stat.running.saturating_add(stat.waiting);
        let usage = (stat.max_tokens > 0).then(|| stat.tokens as f64 / stat.max_tokens as f64);
        load.add(Some(rank), RankLoad { requests, kv_usage: usage.map(|usage| usage.min(1.0)) });
    }
    Some(load)
}

/// Load and life of an engine, as far as it tells them; no life if it does not answer.
async fn ask(shard: &Shard, worker: &WorkerView) -> (Option<EngineLoad>, Option<EngineLife>) {
    let (load, life) = match ask_worker(shard, worker, "/metrics", LIMIT).await {
        Ok(Some(body)) => {
            let text = String::from_utf8_lossy(&body);
            (parse_load(&text), parse_life(&text))
        }
        Ok(None) => (None, EngineLife::default()),
        Err(error) => {
            tracing::debug!(worker = %worker.id(), error, "no figures");
            return (None, None);
        }
    };
    if load.is_some() || worker.record.spec.engine != EngineKind::Sglang {
        return (load, Some(life));
    }
    // Metrics have to be switched on there; older versions have neither.
    match ask_worker(shard, worker, "/v1/loads?include=core", LIMIT).await {
        Ok(body) => (body.and_then(|body| parse_loads(&body)), Some(life)),
        Err(error) => {
            tracing::debug!(worker = %worker.id(), error, "no loads");
            (None, Some(life))
        }
    }
}

/// What one look finds, on the worker and on each of its ranks; none of those where they are not told
/// apart.
fn differences(load: &EngineLoad, worker: &WorkerView) -> (LoadSum, Vec<LoadSum>) {
    let (live, ranks) = (&worker.live, load.by_rank(worker.dp_ranks()).unwrap_or_default());
    let whole = difference(said(&load.whole, worker), live.booked(), live.certain());
    let of_rank = |(rank, load): (u32, &RankLoad)| {
        difference(said(load, worker), worker.rank_booked(rank, true), worker.rank_certain(rank))
    };
    (whole, (0..).zip(&ranks).map(of_rank).collect())
}

/// In our terms.
fn said(load: &RankLoad, worker: &WorkerView) -> Said {
    let blocks = load.kv_usage.zip(worker.rank_capacity()).map(|(usage, blocks)| usage * blocks as f64);
    Said {
        requests: i64::try_from(load.requests).unwrap_or(i64::MAX),
        blocks: blocks.map(|blocks| blocks as i64),
    }
}

#[cfg(test)]
#[path = "loads_tests.rs"]
mod tests;
