//! What engines say of their own work, held against what the cluster has booked on them.
//!
//! An engine may have more to do than this cluster gave it: another router sends to it, too, or it
//! still works for clients that are gone. Where it says so for [`IN_A_ROW`] looks, the difference
//! becomes a correction that all replicas add to its load. One replica looks at each worker: the
//! one that listens to its events, or would. It goes by the load sockets of the ranks (SGLang), if
//! it listens to all of them, and asks for `/metrics` otherwise. Less than is booked is no reason: requests are on
//! their way, and answers too.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use super::feeds::{LoadBoard, preferred};
use crate::cluster::api::ControlPlane;
use crate::engines::probe::{EngineLoad, parse_load};
use crate::http::{Shard, ask_worker};
use crate::ids::{ReplicaId, WorkerIx};
use crate::kv::event::LoadStat;
use crate::routing::view::WorkerView;
use crate::state::command::CacheCommand;
use crate::state::load::LoadSum;
use crate::state::ranks::{RankKey, Ranks};

/// Looks that must agree that there is more.
const IN_A_ROW: usize = 3;

/// What is no difference: as many requests or blocks ...
const SLACK: i64 = 2;
/// ... or this part of what is booked.
const SLACK_PERCENT: i64 = 20;

/// Engines asked at once.
const AT_ONCE: usize = 16;

/// How long an engine may take to answer.
const LIMIT: Duration = Duration::from_secs(2);

/// The last looks at one engine.
#[derive(Debug, Default)]
struct Looks(VecDeque<LoadSum>);

impl Looks {
    /// Takes note of another one; the correction to tell, if it is another one than `now`.
    fn note(&mut self, said: LoadSum, booked: LoadSum, now: LoadSum) -> Option<LoadSum> {
        let extra =
            |said: i64, booked: i64| Some(said - booked).filter(|_| differs(said, booked)).unwrap_or(0);
        self.0.push_back(LoadSum {
            requests: extra(said.requests, booked.requests).max(0),
            decode_blocks: extra(said.decode_blocks, booked.decode_blocks).max(0),
            prefill_tokens: 0,
        });
        if self.0.len() > IN_A_ROW {
            self.0.pop_front();
        }
        // What all of them say.
        let least = |of: fn(&LoadSum) -> i64| match self.0.len() {
            IN_A_ROW => self.0.iter().map(of).min().unwrap_or(0),
            // One that says there is nothing is enough to end it.
            _ => self.0.back().map_or(0, of).min(of(&now)),
        };
        let agreed = LoadSum {
            requests: least(|sum| sum.requests),
            decode_blocks: least(|sum| sum.decode_blocks),
            prefill_tokens: 0,
        };
        let news = agreed.is_zero() != now.is_zero()
            || differs(agreed.requests, now.requests)
            || differs(agreed.decode_blocks, now.decode_blocks);
        news.then_some(agreed)
    }
}

/// Whether two numbers are far enough apart to mean something.
fn differs(one: i64, other: i64) -> bool {
    (one - other).abs() > SLACK.max(other * SLACK_PERCENT / 100)
}

/// See the module.
pub(super) struct Loads {
    shard: Arc<Shard>,
    plane: Arc<dyn ControlPlane>,
    every: Duration,
    /// What the ranks' load sockets said.
    sockets: LoadBoard,
    looks: HashMap<WorkerIx, Looks>,
}

impl Loads {
    /// Looks through `shard`, and at `sockets`, as often as that; tells `plane`.
    pub(super) fn new(
        shard: Arc<Shard>,
        plane: Arc<dyn ControlPlane>,
        every: Duration,
        sockets: LoadBoard,
    ) -> Self {
        Self { shard, plane, every, sockets, looks: HashMap::new() }
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
        let ours: Vec<Arc<WorkerView>> = view
            .workers
            .iter()
            .filter(|worker| worker.record.online && is_ours(worker, &ranks, status.me, &live))
            .cloned()
            .collect();
        self.looks.retain(|ix, _| ours.iter().any(|worker| worker.record.ix == *ix));
        let (shard, sockets) = (&self.shard, &self.sockets);
        let answers: Vec<_> = futures_util::stream::iter(ours)
            .map(|worker| async move {
                let published = published(&sockets.lock(), &worker);
                let load = match published {
                    Some(load) => Some(load),
                    None => ask(shard, &worker).await,
                };
                (worker, load)
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        for (worker, load) in answers {
            let ix = worker.record.ix;
            let Some(load) = load else {
                // Nothing is known of the time in between.
                self.looks.remove(&ix);
                continue;
            };
            let (booked, now) = (worker.live.booked(), worker.live.foreign.get());
            let looks = self.looks.entry(ix).or_default();
            if let Some(extra) = looks.note(said(&load, &worker, booked), booked, now) {
                tracing::info!(
                    worker = %worker.id(),
                    requests = extra.requests,
                    blocks = extra.decode_blocks,
                    "work of its engine that is not of this cluster"
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
    let mut load = EngineLoad { requests: 0, kv_usage: Some(0.0) };
    for rank in 0..worker.dp_ranks() {
        let stat = said.get(&RankKey { worker: worker.record.ix, rank })?;
        load.requests = load.requests.saturating_add(stat.running).saturating_add(stat.waiting);
        let usage = (stat.max_tokens > 0).then(|| stat.tokens as f64 / stat.max_tokens as f64);
        load.kv_usage = load.kv_usage.zip(usage).map(|(sum, usage)| sum + usage.min(1.0));
    }
    Some(load)
}

async fn ask(shard: &Shard, worker: &WorkerView) -> Option<EngineLoad> {
    match ask_worker(shard, worker, "/metrics", LIMIT).await {
        Ok(body) => parse_load(&String::from_utf8_lossy(&body?)),
        Err(error) => {
            tracing::debug!(worker = %worker.id(), error, "no figures");
            None
        }
    }
}

/// In our terms; blocks as booked where the engine does not say how many it has.
fn said(load: &EngineLoad, worker: &WorkerView, booked: LoadSum) -> LoadSum {
    let blocks = load.kv_usage.zip(worker.rank_capacity()).map(|(usage, blocks)| usage * blocks as f64);
    LoadSum {
        requests: i64::try_from(load.requests).unwrap_or(i64::MAX),
        prefill_tokens: 0,
        decode_blocks: blocks.map_or(booked.decode_blocks, |blocks| blocks as i64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(requests: i64, decode_blocks: i64) -> LoadSum {
        LoadSum { requests, decode_blocks, prefill_tokens: 0 }
    }

    /// What is in force after each look, and how often something was told.
    fn after(looks: &[(i64, i64)], booked: LoadSum) -> (Vec<LoadSum>, usize) {
        let (mut state, mut now, mut told) = (Looks::default(), LoadSum::default(), 0);
        let each = looks.iter().map(|(requests, blocks)| {
            if let Some(extra) = state.note(load(*requests, *blocks), booked, now) {
                told += 1;
                now = extra;
            }
            now
        });
        (each.collect(), told)
    }

    #[test]
    fn more_counts_when_it_was_there_three_times_and_no_longer_than_it_is() {
        let none = LoadSum::default();
        let (each, told) = after(&[(9, 50), (12, 60), (9, 70), (9, 70), (1, 5), (9, 50)], load(1, 5));
        assert_eq!(each, [none, none, load(8, 45), load(8, 55), none, none]);
        assert_eq!(told, 3);
        let (each, _) = after(&[(9, 5), (1, 5), (9, 5), (9, 5), (1, 5)], load(1, 5));
        assert!(each.iter().all(LoadSum::is_zero), "a peak is none");
    }

    #[test]
    fn little_more_or_less_is_nothing_and_small_changes_are_not_told() {
        for said in [(3, 7), (0, 0), (1, 5)] {
            assert_eq!(after(&[said; 5], load(1, 5)).1, 0, "{said:?}");
        }
        assert_eq!(after(&[(119, 0); 5], load(100, 0)).1, 0);
        assert_eq!(after(&[(40, 0), (41, 0), (40, 0), (42, 0), (43, 0), (42, 0)], load(0, 0)).1, 1);
    }

    #[test]
    fn the_load_of_published_ranks_is_summed_if_all_of_them_say_it() {
        use crate::state::worker::{Liveness, WorkerRecord, WorkerSource, WorkerSpec};
        let spec = WorkerSpec {
            id: crate::ids::WorkerId("w".into()),
            url: "http://127.0.0.1:9".to_owned(),
            engine: Default::default(),
            models: Vec::new(),
            role: Default::default(),
            dp_ranks: 2,
            block_size: None,
            capacity_blocks: Some(200),
            labels: Default::default(),
            weight: 100,
            http2: false,
            max_requests: None,
            owner: None,
            source: WorkerSource::Admin,
        };
        let record = WorkerRecord {
            spec,
            ix: WorkerIx(4),
            drain: false,
            online: true,
            liveness: Liveness::Probe,
            last_heard_ms: 0,
            generation: 1,
            failed_by: Default::default(),
        };
        let worker = WorkerView { record, live: Arc::default() };
        let key = |rank| RankKey { worker: WorkerIx(4), rank };
        let stat = |running, waiting, tokens| LoadStat {
            running,
            waiting,
            tokens,
            max_tokens: 1000,
            rank: None,
            waiting_uncached_tokens: None,
        };
        let mut ranks = HashMap::from([(key(0), stat(3, 1, 500))]);
        assert_eq!(published(&ranks, &worker), None);
        ranks.insert(key(1), stat(2, 0, 250));
        let sum = published(&ranks, &worker).unwrap();
        assert_eq!(sum, EngineLoad { requests: 6, kv_usage: Some(0.75) });
        assert_eq!(said(&sum, &worker, LoadSum::default()), load(6, 75), "of 100 blocks a rank");
    }

    #[test]
    fn a_correction_that_another_replica_made_is_taken_back_at_once_when_it_is_not_true() {
        let mut looks = Looks::default();
        assert_eq!(looks.note(load(8, 0), load(0, 0), load(8, 0)), None, "one look confirms it");
        let mut looks = Looks::default();
        assert_eq!(looks.note(load(1, 0), load(1, 0), load(8, 0)), Some(load(0, 0)));
    }
}
