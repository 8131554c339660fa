//! The data-parallel ranks behind one listener: engines of their own, each with its own cache,
//! queue and sockets of events.
//!
//! A client that names a rank (`X-data-parallel-rank`; SGLang's also in the body) gets that one. Otherwise the least busy is
//! taken, by vLLM's measure, ties in turn.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use super::engine::Engine;
use super::faults::{FaultChange, FaultState};
use super::options::EngineSimArgs;
use super::pd::bootstrap::Bootstrap;

/// What a waiting request counts beside a running one, as in vLLM.
const WAITING_COUNTS: u64 = 4;

/// All ranks, by number; at least one.
pub struct Ranks {
    first: Arc<Engine>,
    others: Vec<Arc<Engine>>,
    turn: AtomicUsize,
    bootstrap: OnceLock<Bootstrap>,
}

impl Ranks {
    /// As many as `--dp` says; [`Engine::drive`] has to run for each of them.
    pub fn new(args: &EngineSimArgs) -> Arc<Self> {
        let engine = |rank| Engine::new(args.clone(), rank);
        let others = (1..args.dp).map(engine).collect();
        Arc::new(Self { first: engine(0), others, turn: AtomicUsize::new(0), bootstrap: OnceLock::new() })
    }

    /// Has SGLang's bootstrap server beside them; once.
    pub fn have_bootstrap(&self, server: Bootstrap) {
        // Set once, by who started them.
        let _ = self.bootstrap.set(server);
    }

    /// Port of that server.
    pub fn bootstrap_port(&self) -> Option<u16> {
        self.bootstrap.get().map(Bootstrap::port)
    }

    /// Rank 0, for whatever is the same of all of them.
    pub fn first(&self) -> &Arc<Engine> {
        &self.first
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Engine>> + Clone {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        1 + self.others.len()
    }

    /// The engine for a request that asks for rank `asked`, or for none; the error is vLLM's.
    pub fn choose(&self, asked: Option<i64>) -> Result<&Arc<Engine>, String> {
        let Some(asked) = asked else { return Ok(self.least_busy()) };
        let engine = usize::try_from(asked).ok().and_then(|rank| self.iter().nth(rank));
        engine.ok_or_else(|| format!("data_parallel_rank {asked} is out of range [0, {}).", self.count()))
    }

    fn least_busy(&self) -> &Arc<Engine> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.count();
        let in_turn = self.iter().cycle().skip(turn).take(self.count());
        in_turn.min_by_key(|engine| busy(engine)).unwrap_or(&self.first)
    }

    /// Sets fault switches of all ranks.
    pub fn set_faults(&self, change: &FaultChange) -> Result<FaultState, String> {
        // They are checked the same way, so that all of them take it, or none does.
        for engine in &self.others {
            engine.set_faults(change)?;
        }
        self.first.set_faults(change)
    }

    /// Empties all prefix caches; whether all of them could be.
    pub async fn reset_prefix_caches(&self) -> bool {
        let mut all = true;
        for engine in self.iter() {
            all &= engine.reset_prefix_cache().await;
        }
        all
    }

    /// Ends everything with `finish_reason` `abort`, and whatever still comes as well.
    pub fn close(&self) {
        self.iter().for_each(|engine| engine.close());
    }
}

fn busy(engine: &Engine) -> u64 {
    let waiting = engine.stats.waiting.get() + engine.arriving() as u64;
    waiting * WAITING_COUNTS + engine.stats.running.get()
}
