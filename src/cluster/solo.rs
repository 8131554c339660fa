//! The cluster for the node agent beside an engine: one worker, which is always there, and nobody to
//! agree with.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::apart::{Apart, Nothing};
use super::api::{ClusterError, ClusterStatus};
use crate::ids::{Incarnation, ReplicaId, WorkerIx};
use crate::routing::view::{RegistryView, WorkerLive, WorkerView};
use crate::state::worker::{Liveness, WorkerRecord, WorkerSpec};

/// See the module.
pub struct SoloPlane {
    name: String,
    view: ArcSwap<RegistryView>,
    live: Arc<WorkerLive>,
    nothing: Nothing,
}

impl SoloPlane {
    /// For the agent of this name, with this worker.
    pub fn new(name: &str, spec: WorkerSpec) -> Arc<Self> {
        let plane = Self {
            name: name.to_owned(),
            view: ArcSwap::default(),
            live: Arc::default(),
            nothing: Nothing::default(),
        };
        plane.set(spec);
        Arc::new(plane)
    }

    /// What the worker is like from now on.
    pub fn set(&self, spec: WorkerSpec) {
        let record = WorkerRecord {
            spec,
            ix: WorkerIx(1),
            drain: false,
            online: true,
            liveness: Liveness::Heartbeat,
            last_heard_ms: 0,
            generation: 1,
            failed_by: Default::default(),
        };
        let worker = Arc::new(WorkerView { record, live: Arc::clone(&self.live) });
        self.view.store(Arc::new(RegistryView::new(1, vec![worker])));
    }

    /// The worker.
    pub fn worker(&self) -> Option<Arc<WorkerView>> {
        self.view.load().workers.first().cloned()
    }
}

impl Apart for SoloPlane {
    fn nothing(&self) -> &Nothing {
        &self.nothing
    }

    fn refusal(&self) -> ClusterError {
        ClusterError::Refused("a node agent is no replica".to_owned())
    }

    fn settled(&self) -> Result<(), ClusterError> {
        Ok(())
    }

    fn workers(&self) -> Arc<RegistryView> {
        self.view.load_full()
    }

    fn seen(&self) -> ClusterStatus {
        ClusterStatus {
            cluster_id: String::new(),
            me: ReplicaId::default(),
            name: self.name.clone(),
            incarnation: Incarnation::default(),
            quorum: true,
            current: true,
            down: None,
            groups: Vec::new(),
            members: Vec::new(),
        }
    }
}
