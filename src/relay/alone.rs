//! The directory of a node agent: it knows nobody and decides nothing. Replicas list what it holds,
//! note its end, and take it over.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::directory::{Address, Directory, Peer, Soon, Taken};
use crate::cluster::api::ClusterError;
use crate::ids::{ReplicaId, StreamId};
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// See the module.
#[derive(Default)]
pub struct Alone {
    cluster: ArcSwap<String>,
}

impl Alone {
    /// Of the cluster with this id, once it is known; until then nobody is let in.
    pub fn set_cluster(&self, id: &str) {
        self.cluster.store(Arc::new(id.to_owned()));
    }
}

fn soon<T: Send + 'static>(value: T) -> Soon<T> {
    Box::pin(std::future::ready(value))
}

impl Directory for Alone {
    fn me(&self) -> Option<ReplicaId> {
        None
    }

    fn cluster(&self) -> String {
        self.cluster.load().to_string()
    }

    fn peers(&self) -> Vec<Peer> {
        Vec::new()
    }

    fn find(&self, _: StreamId) -> Soon<Option<StreamRecord>> {
        soon(None)
    }

    fn find_surely(&self, _: StreamId) -> Soon<Result<Option<StreamRecord>, ClusterError>> {
        soon(Ok(None))
    }

    fn open(&self, _: StreamId, _: StreamRecord) -> Soon<Result<Option<Box<StreamRecord>>, ClusterError>> {
        // By whoever ordered it.
        soon(Ok(None))
    }

    fn take(&self, _: StreamId, _: u32, _: StreamRecord) -> Soon<Result<Taken, ClusterError>> {
        soon(Err(ClusterError::Refused("an agent takes nothing over".to_owned())))
    }

    fn mirror(&self, _: StreamId, _: u32) {}

    fn end(&self, _: StreamId, _: u32, _: StreamEnd, _: u32) {}

    fn purge(&self, _: StreamId) {}

    fn secret(&self) -> Option<[u8; 32]> {
        None
    }

    fn address(&self, _: Holder) -> Soon<Option<Address>> {
        soon(None)
    }
}
