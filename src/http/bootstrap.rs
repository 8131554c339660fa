//! What engines with the Mooncake connector are called: asked of the bootstrap servers beside them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::fetch;
use super::upstream::{Endpoint, Pool};
use crate::disagg::at_once::engine_of;
use crate::ids::WorkerIx;
use crate::routing::view::WorkerView;

/// How long an answer is believed: an engine that starts anew has another name.
const BELIEVED: Duration = Duration::from_secs(60);

/// Names kept; beyond that all are asked for again.
const MOST: usize = 4096;

/// A registration of a worker, and a rank of it.
type Key = (WorkerIx, u64, u32);

/// The names that were told.
#[derive(Debug, Default)]
pub(super) struct Bootstraps {
    engines: Mutex<HashMap<Key, (String, Instant)>>,
}

impl Bootstraps {
    /// The name of a prefill worker's engine, and the URL of its bootstrap server.
    pub(super) async fn engine(
        &self,
        pool: &Pool,
        worker: &WorkerView,
        rank: u32,
        limit: Duration,
    ) -> Result<(String, String), String> {
        let (host, port) = worker.record.spec.bootstrap();
        let url = format!("http://{host}:{port}");
        let key = (worker.record.ix, worker.record.generation, rank);
        let known = self.engines.lock().get(&key).cloned();
        if let Some((engine, _)) = known.filter(|(_, at)| at.elapsed() < BELIEVED) {
            return Ok((engine, url));
        }
        let failed = |why: String| format!("its bootstrap server {url} was asked GET /query: {why}");
        let endpoint = Endpoint::parse(&url, false).map_err(|why| failed(why.to_string()))?;
        let answer =
            fetch::get(pool, &endpoint, "/query", limit).await.map_err(|why| failed(why.to_string()))?;
        let engine = engine_of(&answer, rank).ok_or_else(|| failed(format!("rank {rank} is not listed")))?;
        let mut engines = self.engines.lock();
        if engines.len() >= MOST {
            engines.clear();
        }
        engines.insert(key, (engine.clone(), Instant::now()));
        Ok((engine, url))
    }

    /// Forgets a worker's names: something went wrong there.
    pub(super) fn forget(&self, worker: &WorkerView) {
        self.engines.lock().retain(|(ix, _, _), _| *ix != worker.record.ix);
    }
}
