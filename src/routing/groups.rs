//! KsanaLLM's groups as routing sees them: each is a worker with one rank, of which the registry does
//! not know. What is booked on it and what it has cached is kept as for any worker, under a number that
//! its row of the tables gives it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::view::{ORDINARY_CAPACITY, WorkerLive, WorkerView};
use crate::ids::{WorkerId, WorkerIx};
use crate::state::ksana::{GroupKey, GroupRecord, KsanaState};
use crate::state::worker::{Liveness, WorkerRecord, WorkerSource, WorkerSpec};

/// Tokens in a block: what KsanaLLM has where its configuration does not say otherwise, which its nodes
/// do not tell.
pub const BLOCK: u32 = 16;

/// All groups that have sent a heartbeat, as of one version of the tables.
#[derive(Debug, Default)]
pub struct Groups {
    version: Option<u64>,
    by_key: HashMap<GroupKey, Arc<WorkerView>>,
    numbers: HashSet<WorkerIx>,
}

impl Groups {
    /// Those of the tables; `live` has the load of each, which outlives this view.
    pub fn of(state: &KsanaState, mut live: impl FnMut(WorkerIx) -> Arc<WorkerLive>) -> Self {
        let groups = state.groups().iter();
        let by_key = groups.map(|(key, group)| {
            let view = WorkerView { record: record(key, group), live: live(group.ix()) };
            (key.clone(), Arc::new(view))
        });
        let by_key: HashMap<GroupKey, Arc<WorkerView>> = by_key.collect();
        let numbers = by_key.values().map(|group| group.record.ix).collect();
        Self { version: Some(state.version()), by_key, numbers }
    }

    /// Whether these are the tables that it was made of.
    pub fn are_of(&self, state: &KsanaState) -> bool {
        self.version == Some(state.version())
    }

    /// A group.
    pub fn get(&self, key: &GroupKey) -> Option<&Arc<WorkerView>> {
        self.by_key.get(key)
    }

    /// Whether this is the number of one of them.
    pub fn has(&self, ix: WorkerIx) -> bool {
        self.numbers.contains(&ix)
    }
}

fn record(key: &GroupKey, group: &GroupRecord) -> WorkerRecord {
    // The cache is spread over the devices, so that each brings its share.
    let capacity = ORDINARY_CAPACITY * u64::from(group.world_size.max(1));
    let spec = WorkerSpec {
        id: WorkerId(format!("{}/{}/{}", key.cluster, key.role.name(), key.inference_addr).into()),
        url: format!("http://{}", key.inference_addr),
        engine: Default::default(),
        models: Vec::new(),
        role: Default::default(),
        dp_ranks: 1,
        block_size: Some(BLOCK),
        capacity_blocks: Some(capacity),
        labels: Default::default(),
        weight: 100,
        http2: false,
        max_requests: None,
        owner: None,
        source: WorkerSource::Node,
        transfer: Default::default(),
    };
    WorkerRecord {
        spec,
        ix: group.ix(),
        drain: false,
        online: group.ready,
        liveness: Liveness::Heartbeat,
        last_heard_ms: 0,
        generation: group.order,
        failed_by: Default::default(),
    }
}
