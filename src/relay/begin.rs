//! How streams begin: who shall hold one, and the order for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;

use super::Durability;
use super::copy::{Copy, Role};
use super::counts::Counts;
use super::hub::{Entry, ORDER_TIMEOUT, Relays};
use super::link::Why;
use super::link::caller::AskError;
use super::order::Order;
use super::secret;
use crate::codec;
use crate::ids::{ReplicaId, StreamId};
use crate::state::streams::Holder;

/// Largest body that is ordered from another process: with all that may have been generated it fits
/// into one message. A stream of a larger one is held where its client is.
pub const MOST_ORDERED: usize = 24 << 20;

/// Something else was asked under the same key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeyReused;

/// How a stream is to be generated.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Where what is generated is kept.
    pub durability: Durability,
    /// By whom, where an agent shall do it.
    pub agent: Option<Holder>,
    /// Its id is derived from what the client says, which may say it again, elsewhere: nothing of it is
    /// read before it is listed, so that of two that do not know of each other only one is ever read.
    /// Where the cluster does not answer, that wait ends when the proposal does
    /// (`cluster.propose_timeout_ms`).
    pub shared: bool,
    /// Its client may come back, so its leaving ends nothing.
    pub aware: bool,
}

impl Relays {
    /// Has a stream generated for a client here. The copy gets what is generated. May be dropped at any
    /// time: what has begun by then ends as if its client had left.
    pub async fn begin(
        self: &Arc<Self>,
        id: StreamId,
        order: Order,
        manner: Manner,
    ) -> Result<Arc<Entry>, KeyReused> {
        let alone = manner.durability == Durability::Local || order.body.len() > MOST_ORDERED;
        let me = self.view_to_serve().me.map(Holder::Replica);
        let order = Arc::new(order);
        let copy = || Copy::new(id, Arc::clone(&order), Role::Mirror, 0, Default::default(), self.bound());
        let entry = loop {
            let there = match self.put_first(copy()) {
                Ok(entry) => break entry,
                Err(there) => there,
            };
            if !there.copy.is_closed() && !there.copy.is_refusal() {
                // Asked for at the same time, under the same key.
                let is_same = secret::same(&there.copy.order.request, &order.request);
                return if is_same { Ok(there) } else { Err(KeyReused) };
            }
            self.remove(&there);
        };
        Counts::add(&self.counts.opened);
        entry.local.store(alone, Ordering::Release);
        entry.shared.store(manner.shared, Ordering::Release);
        let first = match me {
            Some(_) if alone => me,
            _ => self.choose(&[]).map(Holder::Replica),
        };
        if manner.agent.is_none() && me.is_some() && first == me {
            self.hold(&entry, 1);
            return Ok(entry);
        }
        let (this, begun) = (Arc::clone(self), Arc::clone(&entry));
        let orders = async move {
            match manner.agent {
                Some(agent) => this.begin_at(&begun, agent).await,
                None => this.begin_elsewhere(&begun, first).await,
            }
        };
        self.see_to(&entry, manner.aware, orders).await?;
        Ok(entry)
    }

    /// Carries out what a stream begins with in a task of its own, since whoever asked may be gone before
    /// it is done, and nobody else would see to the stream then.
    async fn see_to<T: Send + 'static>(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        aware: bool,
        orders: impl Future<Output = Result<(), T>> + Send + 'static,
    ) -> Result<(), T> {
        let (tell, told) = oneshot::channel();
        let (this, entry) = (Arc::clone(self), Arc::clone(entry));
        self.home().spawn(async move {
            if tell.send(orders.await).is_err() && !aware && !entry.copy.ended() {
                this.desert(&entry);
            }
        });
        // Without an answer the process is ending.
        told.await.unwrap_or(Ok(()))
    }

    async fn begin_elsewhere(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        mut next: Option<Holder>,
    ) -> Result<(), KeyReused> {
        let mut bad = Vec::new();
        loop {
            // Not before it was chosen: a process may just have become a replica.
            let me = self.view().me.map(Holder::Replica);
            match next {
                Some(holder) if Some(holder) == me => {
                    if !self.hold(entry, 1) && entry.copy.role() != Role::Holder {
                        self.recover(Arc::clone(entry), None).await;
                    }
                    return Ok(());
                }
                Some(holder) if self.link_to(holder).await.is_some() => {
                    *entry.asked.lock() = Some(holder);
                    match self.try_give(entry, holder, 1).await {
                        Ok(()) => return Ok(()),
                        // It has not begun, so somebody else may be asked for the same attempt.
                        Err(AskError::Refused(Why::Busy, _)) => {
                            entry.copy.expect_nobody();
                            bad.extend(replica_of(holder));
                            next = self.choose(&bad).map(Holder::Replica);
                        }
                        Err(AskError::Refused(Why::Overtaken, _)) => return self.join(entry, holder).await,
                        // It may have begun all the same: the next one is an attempt of its own.
                        Err(_) => {
                            self.recover(Arc::clone(entry), Some(holder)).await;
                            return Ok(());
                        }
                    }
                }
                // Nothing was asked of it, so somebody else may be asked for the same attempt.
                Some(holder) => {
                    bad.extend(replica_of(holder));
                    next = self.choose(&bad).map(Holder::Replica);
                }
                None => {
                    self.recover(Arc::clone(entry), None).await;
                    return Ok(());
                }
            }
        }
    }

    /// Somebody has the stream already: it was asked for at another process at the same moment, under the
    /// same key.
    pub(super) async fn join(self: &Arc<Self>, entry: &Arc<Entry>, holder: Holder) -> Result<(), KeyReused> {
        if entry.copy.role() == Role::Holder {
            // Who was asked had asked this process, and that came first.
            return Ok(());
        }
        if let Some(link) = self.link_to(holder).await
            && let Ok((_, accepted)) = link.glance(entry.copy.id, ORDER_TIMEOUT).await
            && let Ok(order) = codec::decode::<Order>(&accepted.order)
            && !secret::same(&order.request, &entry.copy.order.request)
        {
            self.remove(entry);
            return Err(KeyReused);
        }
        if !self.follow_now(entry, holder).await {
            self.recover(Arc::clone(entry), None).await;
        }
        Ok(())
    }

    /// Begins a stream from its first event again that was lost with all who had it, in this attempt, for
    /// a client that has read nothing of it.
    pub async fn begin_again(
        self: &Arc<Self>,
        id: StreamId,
        order: Order,
        lost: u32,
        aware: bool,
    ) -> Arc<Entry> {
        let bound = self.bound();
        let entry = self.put(Copy::new(id, Arc::new(order), Role::Mirror, lost, Default::default(), bound));
        let (this, begun) = (Arc::clone(self), Arc::clone(&entry));
        let orders = async move {
            this.recover(begun, None).await;
            Ok::<_, KeyReused>(())
        };
        // It is never refused.
        let _ = self.see_to(&entry, aware, orders).await;
        entry
    }
}

fn replica_of(holder: Holder) -> Option<ReplicaId> {
    match holder {
        Holder::Replica(id) => Some(id),
        Holder::Agent(_) => None,
    }
}
