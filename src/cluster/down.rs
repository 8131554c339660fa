//! The cluster for a process that takes no part in it, a damaged replica or an edge: says why, to
//! everybody who asks.

use std::sync::Arc;

use super::apart::{Apart, Nothing};
use super::api::{ClusterError, ClusterStatus};
use crate::ids::{Incarnation, ReplicaId};
use crate::routing::view::RegistryView;

/// See the module.
pub struct DownPlane {
    name: String,
    why: String,
    nothing: Nothing,
    seen: Option<Box<dyn Fn() -> ClusterStatus + Send + Sync>>,
}

impl DownPlane {
    /// What is known of the cluster all the same.
    pub fn seeing(self, seen: impl Fn() -> ClusterStatus + Send + Sync + 'static) -> Self {
        Self { seen: Some(Box::new(seen)), ..self }
    }

    /// For the replica of this name, with the reason and the remedy.
    pub fn new(name: &str, why: String) -> Self {
        Self { name: name.to_owned(), why, nothing: Nothing::default(), seen: None }
    }
}

impl Apart for DownPlane {
    fn nothing(&self) -> &Nothing {
        &self.nothing
    }

    fn refusal(&self) -> ClusterError {
        ClusterError::Down(self.why.clone())
    }

    fn workers(&self) -> Arc<RegistryView> {
        Arc::default()
    }

    fn seen(&self) -> ClusterStatus {
        if let Some(seen) = &self.seen {
            return seen();
        }
        ClusterStatus {
            cluster_id: String::new(),
            me: ReplicaId::default(),
            name: self.name.clone(),
            incarnation: Incarnation::default(),
            quorum: false,
            current: false,
            down: Some(self.why.clone()),
            groups: Vec::new(),
            members: Vec::new(),
        }
    }
}
