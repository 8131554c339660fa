//! Streams whose holder is a node agent, as replicas see them: listed by the replica that has the
//! client, and their end noted by whoever has read it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::begin::KeyReused;
use super::hub::{Entry, Relays};
use super::link::Why;
use super::link::caller::AskError;
use super::order::Order;
use super::secret;
use crate::ids::StreamId;
use crate::state::streams::{Holder, StreamEnd};

/// Longest wait for a stream to be listed before its client hears of it. Without a quorum it runs on
/// unlisted, as others do.
const LISTING: Duration = Duration::from_millis(1000);

/// How long whoever reads a stream may take over its end, before that is told otherwise.
const UNREAD: Duration = Duration::from_millis(1000);
/// Ends that are told at a time.
pub const MOST_UNREAD: usize = 256;

/// The end of a stream that nobody has read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UnreadEnd {
    /// Which stream.
    pub id: StreamId,
    /// In which attempt.
    pub attempt: u32,
    /// How it ended.
    pub how: StreamEnd,
    /// How long it is kept.
    pub keep_ms: u32,
}

impl Relays {
    /// Has an agent generate a stream. It is listed before the client hears of it: an agent cannot
    /// list it itself, and nobody would find it if all replicas died now.
    pub(super) async fn begin_at(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        holder: Holder,
    ) -> Result<(), KeyReused> {
        let id = entry.copy.id;
        let is_shared = entry.shared.load(Ordering::Acquire);
        let listed = self.directory.open(id, self.record(&entry.copy.order, holder));
        // A proposal has a limit of its own.
        let within = if is_shared { Duration::MAX } else { LISTING };
        let listed = async move {
            match tokio::time::timeout(within, listed).await {
                Ok(Ok(stands)) => stands,
                Ok(Err(error)) => {
                    tracing::debug!(stream = %id, %error, "not listed");
                    None
                }
                Err(_) => {
                    tracing::debug!(stream = %id, "not listed in time");
                    None
                }
            }
        };
        let given = if is_shared {
            // Two agents must not both begin.
            if let Some(stands) = listed.await {
                if !secret::same(&stands.request, &entry.copy.order.request) {
                    self.remove(entry);
                    return Err(KeyReused);
                }
                if stands.holder != holder || stands.attempt > 1 {
                    if !self.follow(entry, &stands).await {
                        self.recover(Arc::clone(entry), Some(stands.holder)).await;
                    }
                    return Ok(());
                }
            }
            self.try_give(entry, holder, 1).await
        } else {
            // The engine computes the prompt meanwhile.
            tokio::join!(self.try_give(entry, holder, 1), listed).0
        };
        match given {
            Ok(()) => {}
            Err(AskError::Refused(Why::Overtaken, _)) => return self.join(entry, holder).await,
            // It may have begun all the same: the next one is an attempt of its own.
            Err(_) => self.recover(Arc::clone(entry), Some(holder)).await,
        }
        Ok(())
    }
}

impl Relays {
    /// What is generated here and nobody who reads it has booked, with the number of events so far: at
    /// an agent, streams whose replica or edge is gone.
    pub fn unbooked(&self) -> Vec<(Arc<Order>, u64)> {
        let running = self.entries().into_iter().filter(|entry| entry.is_held_here());
        let unbooked = running.filter(|entry| !entry.copy.is_booked() && !entry.copy.ended());
        unbooked.map(|entry| (Arc::clone(&entry.copy.order), entry.copy.next())).collect()
    }
}

impl Relays {
    /// What has ended here without anybody reading the end: nobody else notes it in the directory.
    pub fn unread_ends(&self) -> Vec<UnreadEnd> {
        let ended = self.entries().into_iter().filter(|entry| entry.is_held_here() && !entry.is_purged());
        let unread = ended.filter_map(|entry| {
            let (copy, summary) = (&entry.copy, entry.copy.summary());
            let (how, at) = (summary.ended?, summary.ended_at?);
            let is_unread = !copy.is_end_known() && at.elapsed() >= UNREAD;
            let end =
                || UnreadEnd { id: copy.id, attempt: summary.attempt, how, keep_ms: copy.order.keep_ms };
            is_unread.then(end)
        });
        unread.take(MOST_UNREAD).collect()
    }

    /// A replica was told of these.
    pub fn ends_were_told(&self, told: &[UnreadEnd]) {
        for entry in told.iter().filter_map(|end| self.get(end.id)) {
            entry.copy.end_was_told();
        }
    }
}

impl Entry {
    fn is_held_here(&self) -> bool {
        self.holding.lock().is_some()
    }

    /// Says who generates the stream from now on.
    pub(super) fn set_source(&self, holder: Holder) {
        self.is_agents.store(matches!(holder, Holder::Agent(_)), Ordering::Release);
    }

    /// Somebody else goes on with the stream: an agent, which does not see the directory, is told.
    pub(super) fn call_off(&self) {
        let mut ticket = self.ticket.lock();
        if ticket.as_ref().is_some_and(|(_, holder)| matches!(holder, Holder::Agent(_)))
            && let Some((ticket, _)) = ticket.take()
        {
            ticket.call_off();
        }
    }
}
