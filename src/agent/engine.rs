//! What the agent asks its engine.

use std::sync::Arc;
use std::time::Duration;

use crate::cluster::solo::SoloPlane;
use crate::engines::probe::parse_models;
use crate::http::{Shard, ask_worker};
use crate::ingest::discover::RankSource;
use crate::routing::view::WorkerView;
use crate::serve::sources::{self, Found, Named};
use crate::state::worker::WorkerSpec;

/// How long the engine may take to say that it is well.
const HEALTH: Duration = Duration::from_secs(2);
/// How long it may take to say what it is.
const FACTS: Duration = Duration::from_secs(5);

/// The engine.
pub(super) struct Engine {
    shard: Arc<Shard>,
    plane: Arc<SoloPlane>,
    /// As far as the operator said.
    said: WorkerSpec,
    /// Whether that was how many ranks it has.
    ranks_given: bool,
    /// Where its events are, where the operator said so.
    events: Option<(String, Option<String>, Option<String>)>,
}

impl Engine {
    pub(super) fn new(
        shard: Arc<Shard>,
        plane: Arc<SoloPlane>,
        said: WorkerSpec,
        ranks_given: bool,
        events: Option<(String, Option<String>, Option<String>)>,
    ) -> Self {
        Self { shard, plane, said, ranks_given, events }
    }

    fn worker(&self) -> Result<Arc<WorkerView>, String> {
        self.plane.worker().ok_or_else(|| "there is no worker".to_owned())
    }

    async fn get(&self, path: &str, limit: Duration) -> Result<Vec<u8>, String> {
        match ask_worker(&self.shard, &*self.worker()?, path, limit).await {
            Ok(Some(body)) => Ok(body.into()),
            Ok(None) => Err(format!("the engine has no {path}")),
            Err(why) => Err(format!("GET {path}: {why}")),
        }
    }

    /// Tokens of its KV blocks.
    pub(super) fn block_size(&self) -> u32 {
        self.plane.worker().map_or(1, |worker| worker.block_size())
    }

    /// Whether it is well.
    pub(super) async fn is_well(&self) -> Result<(), String> {
        self.get("/health", HEALTH).await.map(drop)
    }

    /// Asks it what it is, for the generations to come.
    pub(super) async fn learn(&self) -> Result<(), String> {
        let mut spec = self.said.clone();
        if spec.models.is_empty() {
            spec.models = parse_models(&self.get("/v1/models", FACTS).await?)?;
        }
        // Engines that say nothing else are no worse.
        let facts = sources::facts(&self.shard, &*self.worker()?).await;
        spec.block_size = spec.block_size.or(facts.block_size);
        spec.engine = facts.engine.unwrap_or(spec.engine);
        if let (Some(ranks), false) = (facts.dp_ranks, self.ranks_given) {
            spec.dp_ranks = ranks;
        }
        self.plane.set(spec);
        Ok(())
    }

    /// Where it tells of its cache.
    pub(super) async fn events(&self) -> Result<Vec<RankSource>, String> {
        if let Some((endpoint, replay, topic)) = &self.events {
            let ranks = self.worker()?.dp_ranks();
            let (replay, topic) = (replay.as_deref(), topic.as_deref());
            return Ok(Named { endpoint, replay, topic, first: None }.of(ranks)?.ranks);
        }
        match sources::ask(&self.shard, &*self.worker()?).await {
            Found::Sources(found) => Ok(found.ranks),
            Found::Nothing => Ok(Vec::new()),
            Found::Silence => Err("the engine does not say where its KV events are".to_owned()),
        }
    }
}
