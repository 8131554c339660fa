//! Request ids: unique over all replicas among all requests in flight, and growing with time as far as
//! blocks allow. A replica leases a block through the log and the next one before that is used up, so
//! that no request waits for it but the first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::cluster::api::{ClusterError, ControlPlane};
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::ksana::{KsanaCommand, KsanaOutcome, MAX_REQUEST_ID};

/// Ids of one lease. Engines serve small ids first, so that a replica with an old block is preferred by
/// as much.
const BLOCK: u32 = 1024;
/// A block that was not touched for so long is let go when others have come further: its ids would be
/// served before theirs.
const STALE: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug)]
struct Block {
    next: u32,
    left: u32,
}

#[derive(Debug, Default)]
struct Held {
    block: Option<Block>,
    /// For when that is used up.
    spare: Option<Block>,
    used: Option<Instant>,
    is_leasing: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct RequestIds {
    held: Mutex<Held>,
    /// Whoever finds nothing waits for the one who asks.
    asking: tokio::sync::Mutex<()>,
}

impl RequestIds {
    /// The next id.
    pub(super) async fn next(self: &Arc<Self>, control: &Arc<dyn ControlPlane>) -> Result<u32, ClusterError> {
        self.let_go_of_stale(control);
        if let Some(id) = self.take(control) {
            return Ok(id);
        }
        let _asking = self.asking.lock().await;
        loop {
            if let Some(id) = self.take(control) {
                return Ok(id);
            }
            let block = lease(&**control).await?;
            self.held.lock().block = Some(block);
        }
    }

    fn take(self: &Arc<Self>, control: &Arc<dyn ControlPlane>) -> Option<u32> {
        let mut held = self.held.lock();
        if held.block.is_none_or(|block| block.left == 0) {
            held.block = held.spare.take();
        }
        let block = held.block.as_mut().filter(|block| block.left > 0)?;
        let id = block.next;
        block.next += 1;
        block.left -= 1;
        let is_low = block.left < BLOCK / 2;
        held.used = Some(Instant::now());
        if is_low && held.spare.is_none() && !std::mem::replace(&mut held.is_leasing, true) {
            let (ids, control) = (Arc::clone(self), Arc::clone(control));
            // Ends by the cluster's own deadline.
            tokio::spawn(async move {
                let leased = lease(&*control).await.ok();
                let mut held = ids.held.lock();
                held.is_leasing = false;
                held.spare = leased.or(held.spare);
            });
        }
        Some(id)
    }

    fn let_go_of_stale(&self, control: &Arc<dyn ControlPlane>) {
        let mut held = self.held.lock();
        if held.used.is_none_or(|used| used.elapsed() < STALE) {
            return;
        }
        let Some(block) = held.block else { return };
        let mut newest = 0;
        control.ksana(&mut |state, _| newest = state.next_request());
        let behind = newest.wrapping_sub(block.next) & MAX_REQUEST_ID;
        if behind > 2 * BLOCK {
            (held.block, held.spare) = (None, None);
        }
    }
}

async fn lease(control: &dyn ControlPlane) -> Result<Block, ClusterError> {
    let start = rand::random::<u32>() % (MAX_REQUEST_ID / 2) + 1;
    let command = ControlCommand::Ksana(KsanaCommand::Lease { count: BLOCK, start });
    match control.propose(command).await? {
        ControlOutcome::Ksana(KsanaOutcome::Block { first, count }) => Ok(Block { next: first, left: count }),
        ControlOutcome::Unknown => Err(ClusterError::Unavailable { waited: Duration::ZERO }),
        other => Err(ClusterError::Refused(format!("request ids were not leased: {other:?}"))),
    }
}
