//! The cluster for a replica that takes no part in it: says why, to everybody who asks.

use std::sync::Arc;

use tokio::sync::watch;

use super::api::{Answer, ClusterError, ClusterStatus, ControlPlane, MemberOp};
use crate::ids::{Group, Incarnation, ReplicaId, WorkerId, WorkerIx};
use crate::kv::feed::Cursor;
use crate::routing::blocks::Blocks;
use crate::routing::book::{Booking, Bookings, Tentative};
use crate::routing::view::RegistryView;
use crate::state::command::{CacheCommand, CacheOutcome, ControlCommand, ControlOutcome};
use crate::state::ranks::{RankKey, Ranks};

/// See the module.
pub struct DownPlane {
    name: String,
    why: String,
    bookings: Bookings,
    blocks: Blocks,
    ranks: watch::Sender<Arc<Ranks>>,
}

impl DownPlane {
    /// For the replica of this name, with the reason and the remedy.
    pub fn new(name: &str, why: String) -> Self {
        Self {
            name: name.to_owned(),
            why,
            bookings: Bookings::new(|| {}),
            blocks: Blocks::default(),
            ranks: watch::Sender::default(),
        }
    }

    fn refuse<T: Send + 'static>(&self) -> Answer<T> {
        let why = self.why.clone();
        Box::pin(async move { Err(ClusterError::Down(why)) })
    }
}

impl ControlPlane for DownPlane {
    fn propose(&self, _: ControlCommand) -> Answer<ControlOutcome> {
        self.refuse()
    }

    fn read_barrier(&self, _: Group) -> Answer<()> {
        self.refuse()
    }

    fn heartbeat(&self, _: &WorkerId) -> bool {
        false
    }

    fn probed(&self, _: &WorkerId, _: bool) {}

    fn registry(&self) -> Arc<RegistryView> {
        Arc::default()
    }

    fn bookings(&self) -> &Bookings {
        &self.bookings
    }

    fn reserve(&self, tentative: Tentative) -> Answer<Option<Booking>> {
        tentative.refused();
        self.refuse()
    }

    fn propose_cache(&self, _: CacheCommand) -> Answer<CacheOutcome> {
        self.refuse()
    }

    fn tell_cache(&self, _: CacheCommand) {}

    fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    fn ranks(&self) -> watch::Receiver<Arc<Ranks>> {
        self.ranks.subscribe()
    }

    fn feed_cursor(&self, _: RankKey) -> Option<Cursor> {
        None
    }

    fn session(&self, _: u64) -> Option<(WorkerIx, bool)> {
        None
    }

    fn view_age_ms(&self) -> u64 {
        0
    }

    fn member(&self, _: MemberOp) -> Answer<String> {
        self.refuse()
    }

    fn status(&self) -> ClusterStatus {
        ClusterStatus {
            cluster_id: String::new(),
            me: ReplicaId::default(),
            name: self.name.clone(),
            incarnation: Incarnation::default(),
            quorum: false,
            down: Some(self.why.clone()),
            groups: Vec::new(),
            members: Vec::new(),
        }
    }
}
