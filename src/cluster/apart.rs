//! The cluster for processes that take no part in it: everything that would change something is
//! refused, and nothing is known but what such a process says itself.

use std::sync::Arc;

use tokio::sync::watch;

use super::api::{Answer, ClusterError, ClusterStatus, ControlPlane, MemberOp};
use crate::ids::{Group, WorkerId, WorkerIx};
use crate::kv::feed::Cursor;
use crate::routing::blocks::Blocks;
use crate::routing::book::{Booking, Bookings, Tentative};
use crate::routing::view::RegistryView;
use crate::state::command::{CacheCommand, CacheOutcome, ControlCommand, ControlOutcome};
use crate::state::ranks::{RankKey, Ranks};

/// What such a process has all the same: books that nobody reads, and an index without blocks.
pub struct Nothing {
    bookings: Bookings,
    blocks: Blocks,
    ranks: watch::Sender<Arc<Ranks>>,
}

impl Default for Nothing {
    fn default() -> Self {
        Self { bookings: Bookings::new(|| {}), blocks: Blocks::default(), ranks: watch::Sender::default() }
    }
}

/// A process that takes no part.
pub trait Apart: Send + Sync + 'static {
    /// See [`Nothing`].
    fn nothing(&self) -> &Nothing;
    /// What everybody hears who wants something.
    fn refusal(&self) -> ClusterError;
    /// Whether all is known here that was committed before.
    fn settled(&self) -> Result<(), ClusterError> {
        Err(self.refusal())
    }
    /// The workers that it knows.
    fn workers(&self) -> Arc<RegistryView>;
    /// The cluster as it sees it.
    fn seen(&self) -> ClusterStatus;
}

fn refuse<T: Send + 'static>(apart: &impl Apart) -> Answer<T> {
    Box::pin(std::future::ready(Err(apart.refusal())))
}

impl<P: Apart> ControlPlane for P {
    fn propose(&self, _: ControlCommand) -> Answer<ControlOutcome> {
        refuse(self)
    }

    fn read_barrier(&self, _: Group) -> Answer<()> {
        Box::pin(std::future::ready(self.settled()))
    }

    fn heartbeat(&self, _: &WorkerId) -> bool {
        false
    }

    fn probed(&self, _: &WorkerId, _: bool) {}

    fn registry(&self) -> Arc<RegistryView> {
        self.workers()
    }

    fn bookings(&self) -> &Bookings {
        &self.nothing().bookings
    }

    fn reserve(&self, tentative: Tentative) -> Answer<Option<Booking>> {
        tentative.refused();
        refuse(self)
    }

    fn propose_cache(&self, _: CacheCommand) -> Answer<CacheOutcome> {
        refuse(self)
    }

    fn tell_cache(&self, _: CacheCommand) {}

    fn blocks(&self) -> &Blocks {
        &self.nothing().blocks
    }

    fn ranks(&self) -> watch::Receiver<Arc<Ranks>> {
        self.nothing().ranks.subscribe()
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
        refuse(self)
    }

    fn status(&self) -> ClusterStatus {
        self.seen()
    }
}
