//! Looking at a stream and ending it, wherever it is, without taking a copy of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::hub::{Entry, ORDER_TIMEOUT, Relays, head_of};
use super::link::end_from_wire;
use super::order::{Head, Order};
use crate::codec;
use crate::ids::StreamId;
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// Pause before looking again for whoever holds a stream.
const PAUSE: Duration = Duration::from_millis(50);
/// How long somebody is looked for who can end a stream.
const PATIENCE: Duration = Duration::from_secs(2);

/// A stream, looked at from outside.
#[derive(Clone, Debug)]
pub struct Glance {
    /// What it is of; of a stream elsewhere without body and headers.
    pub order: Arc<Order>,
    /// The answer's head, once it is known.
    pub head: Option<Arc<Head>>,
    /// Counts take-overs.
    pub attempt: u32,
    /// Events so far.
    pub events: u64,
    /// Whether and how it has ended.
    pub ended: Option<StreamEnd>,
}

impl Entry {
    /// Whether it is only here until it has ended: for clients there is no such stream any more.
    pub fn is_purged(&self) -> bool {
        self.purged.load(Ordering::Acquire)
    }
}

impl Relays {
    /// What can be said of a stream by whoever has it: this process, its holder, or who has a copy.
    pub async fn glance(self: &Arc<Self>, id: StreamId, record: Option<&StreamRecord>) -> Option<Glance> {
        if let Some(entry) = self.get(id).filter(|entry| !entry.copy.is_closed()) {
            let (copy, summary) = (&entry.copy, entry.copy.summary());
            return Some(Glance {
                order: Arc::clone(&copy.order),
                head: copy.head(),
                attempt: summary.attempt,
                events: summary.events,
                ended: summary.ended,
            });
        }
        for place in self.places(record?) {
            let Some(link) = self.link_to(place).await else { continue };
            let Ok((_, accepted)) = link.glance(id, ORDER_TIMEOUT).await else { continue };
            let Ok(order) = codec::decode::<Order>(&accepted.order) else { continue };
            return Some(Glance {
                order: Arc::new(order),
                head: head_of(&accepted.head),
                attempt: accepted.attempt,
                events: accepted.next,
                ended: end_from_wire(accepted.ended),
            });
        }
        None
    }

    /// Has a stream end, and be forgotten with `purge`, at all who are known to have it. False where
    /// nobody was reached who could see to it.
    pub async fn end(self: &Arc<Self>, id: StreamId, purge: bool) -> bool {
        let until = Instant::now() + PATIENCE;
        let reached = loop {
            let record = self.directory.find(id).await;
            let mut reached = false;
            if let Some(entry) = self.get(id).filter(|entry| !entry.copy.is_closed()) {
                reached = self.cancel(&entry, purge);
            }
            let mut places = record.as_ref().map(|record| self.places(record)).unwrap_or_default();
            if purge {
                // The directory knows of one copy; a client that came back elsewhere had another made.
                let view = self.view();
                let peers = view.peers.iter().filter(|peer| peer.alive).map(|peer| Holder::Replica(peer.id));
                let more: Vec<Holder> = peers.filter(|peer| !places.contains(peer)).collect();
                places.extend(more);
            }
            // Who only has a copy passes it on; but must forget it, too.
            if purge || !reached {
                reached |= self.cancel_at(id, places, purge).await;
            }
            let over = record.as_ref().is_none_or(|record| record.ended.is_some());
            if reached || over || Instant::now() >= until {
                break reached || over;
            }
            tokio::time::sleep(PAUSE).await;
        };
        if purge && reached {
            self.directory.purge(id);
        }
        reached
    }

    /// Has these end a stream; whether any of them has it.
    async fn cancel_at(&self, id: StreamId, places: Vec<Holder>, purge: bool) -> bool {
        let told = places.into_iter().map(|place| async move {
            let Some(link) = self.link_to(place).await else { return false };
            let Ok((ticket, _)) = link.glance(id, ORDER_TIMEOUT).await else { return false };
            ticket.cancel(purge);
            true
        });
        join_all(told).await.contains(&true)
    }

    /// The other processes that are said to have a stream, its holder first.
    fn places(&self, record: &StreamRecord) -> Vec<Holder> {
        let me = self.view().me.map(Holder::Replica);
        let mirror = record.mirror.map(Holder::Replica);
        let mut places: Vec<Holder> = std::iter::once(record.holder).chain(mirror).collect();
        places.retain(|place| Some(*place) != me);
        places.dedup();
        places
    }
}
