//! Finding a stream for a client that comes back, wherever it is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{Either, join_all, select};

use super::Durability;
use super::copy::{Copy, Role};
use super::hub::{Entry, ORDER_TIMEOUT, Relays, head_of};
use super::link::caller::{AskError, Ticket, Wanted};
use super::link::{end_from_wire, line_from_wire};
use super::log::Log;
use super::order::{Head, Order};
use crate::codec;
use crate::ids::StreamId;
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// Pause before looking again for a stream that is being taken over.
const PAUSE: Duration = Duration::from_millis(20);
/// How long another replica may take to say whether it has a stream that is not listed.
const GLANCE: Duration = Duration::from_millis(500);

/// Where a client reads a stream.
pub struct Found {
    /// The copy to read.
    pub copy: Arc<Copy>,
    /// The stream, where this process keeps it.
    pub entry: Option<Arc<Entry>>,
    /// Its channel, where it is only passed on.
    pub(super) ticket: Option<Ticket>,
}

/// What another process has of a stream.
pub struct Distant {
    /// The answer's head, when it is known.
    pub head: Option<Arc<Head>>,
    /// Counts take-overs.
    pub attempt: u32,
    /// Events so far.
    pub events: u64,
    /// Whether and how it has ended.
    pub ended: Option<StreamEnd>,
}

/// Why a stream cannot be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// There is none; or it was somebody else's.
    Unknown,
    /// It has ended and was forgotten.
    Forgotten,
    /// It was lost with whoever had it.
    Gone,
    /// Nobody knows at the moment.
    Unavailable,
}

/// Why a process gives no copy of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Absent {
    /// It says that it has none, or it has died, and what it had with it.
    Surely,
    /// It does not answer: it may be frozen or cut off, and have it.
    Silent,
}

impl Relays {
    /// What the directory says of a stream: as far as is known here, and if it is not, for certain.
    pub async fn record_of(&self, id: StreamId) -> Result<Option<StreamRecord>, Missing> {
        if let Some(record) = self.directory.find(id).await {
            return Ok(Some(record));
        }
        self.directory.find_surely(id).await.map_err(|_| Missing::Unavailable)
    }

    /// Who has a stream: as the directory says, or, where it does not list it, or not yet, who says so
    /// when asked. A stream begins, and runs, without a quorum.
    pub async fn whereabouts(&self, id: StreamId) -> Result<Option<StreamRecord>, Missing> {
        if let Some(record) = self.directory.find(id).await {
            return Ok(Some(record));
        }
        let unlisted = Box::pin(self.unlisted(id));
        match select(unlisted, self.directory.find_surely(id)).await {
            Either::Left((Some(record), _)) | Either::Right((Ok(Some(record)), _)) => Ok(Some(record)),
            Either::Left((None, listed)) => listed.await.map_err(|_| Missing::Unavailable),
            Either::Right((Ok(None), unlisted)) => Ok(unlisted.await),
            Either::Right((Err(_), unlisted)) => unlisted.await.map(Some).ok_or(Missing::Unavailable),
        }
    }

    /// What the other replicas have of a stream, listed or not: of several, what goes furthest.
    pub async fn unlisted(&self, id: StreamId) -> Option<StreamRecord> {
        let view = self.view();
        let asked = view.peers.iter().filter(|peer| peer.alive).map(|peer| async move {
            let link = self.link(&peer.address, Some(&peer.name)).await?;
            let (_, accepted) = link.glance(id, GLANCE).await.ok()?;
            let order = codec::decode::<Order>(&accepted.order).ok()?;
            let mut record = self.record(&order, Holder::Replica(peer.id));
            (record.mirror, record.attempt) = (None, accepted.attempt);
            record.ended = end_from_wire(accepted.ended);
            Some((accepted.attempt, accepted.next, record))
        });
        let found = join_all(asked).await.into_iter().flatten();
        found.max_by_key(|(attempt, next, _)| (*attempt, *next)).map(|(_, _, record)| record)
    }

    /// What another process says that it has of a stream, by its copy's attempt and number of events;
    /// `None` where it has none, or does not answer.
    pub async fn glance_at(&self, id: StreamId, place: Holder) -> Option<Distant> {
        let (_, accepted) = self.link_to(place).await?.glance(id, GLANCE).await.ok()?;
        Some(Distant {
            head: head_of(&accepted.head),
            attempt: accepted.attempt,
            events: accepted.next,
            ended: end_from_wire(accepted.ended),
        })
    }

    /// A stream for a client here, from event `from` on.
    pub async fn find(self: &Arc<Self>, id: StreamId, from: u64) -> Result<Found, Missing> {
        let until = Instant::now() + self.options.takeover;
        loop {
            if let Some(found) = self.find_here(id, from).await {
                return Ok(found);
            }
            let Some(record) = self.whereabouts(id).await? else { return Err(Missing::Unknown) };
            let me = self.view().me.map(Holder::Replica);
            let mut places = vec![record.holder];
            places.extend(record.mirror.map(Holder::Replica));
            let mut absent = Absent::Surely;
            for place in places.into_iter().filter(|place| Some(*place) != me) {
                match self.mirror_from(id, place).await {
                    Ok(entry) => {
                        return Ok(Found { copy: Arc::clone(&entry.copy), entry: Some(entry), ticket: None });
                    }
                    Err(Absent::Silent) => absent = Absent::Silent,
                    Err(Absent::Surely) => {}
                }
            }
            let ended = record.ended.is_some();
            if ended && absent == Absent::Surely {
                return Err(Missing::Forgotten);
            }
            if Instant::now() >= until {
                return Err(if ended { Missing::Unavailable } else { Missing::Gone });
            }
            // Being taken over by whoever has a copy; or with somebody who may come back to himself.
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn find_here(self: &Arc<Self>, id: StreamId, from: u64) -> Option<Found> {
        let entry = self.get(id).filter(|entry| !entry.copy.is_closed())?;
        let copy = Arc::clone(&entry.copy);
        let alone = self.options.durability == Durability::Local;
        if copy.role() != Role::Holder || copy.ended() || alone {
            return Some(Found { copy, entry: Some(entry), ticket: None });
        }
        // Held here: what the client reads shall be elsewhere, too.
        match self.through_another(id, from).await {
            Some(found) => Some(Found { entry: Some(entry), ..found }),
            None => Some(Found { copy, entry: Some(entry), ticket: None }),
        }
    }

    /// A stream that is held here, by way of another replica, which keeps a copy.
    async fn through_another(self: &Arc<Self>, id: StreamId, from: u64) -> Option<Found> {
        let view = self.view();
        let me = view.me?;
        let known = self.directory.find(id).await.and_then(|record| record.mirror);
        let mut others: Vec<_> = view.peers.iter().filter(|peer| peer.alive).collect();
        others.sort_by_key(|peer| Some(peer.id) != known);
        for peer in others {
            let Some(link) = self.link(&peer.address, Some(&peer.name)).await else { continue };
            let wanted = Wanted { from, via: me.0, ..Wanted::default() };
            let Ok((ticket, accepted)) = link.attach(id, wanted, 2 * ORDER_TIMEOUT).await else { continue };
            let Ok(order) = codec::decode::<Order>(&accepted.order) else { continue };
            let Some(line) = line_from_wire(accepted.line) else { continue };
            let parts = (Log::after(from, &[]), line);
            let bound = super::link::WINDOW;
            let copy = Copy::new(id, Arc::new(order), Role::Shadow, accepted.attempt, parts, bound);
            copy.set_head_if_any(head_of(&accepted.head));
            link.receive(&ticket, &copy);
            return Some(Found { copy, entry: None, ticket: Some(ticket) });
        }
        None
    }

    /// A whole copy of a stream that somebody else has.
    pub(super) async fn mirror_from(
        self: &Arc<Self>,
        id: StreamId,
        place: Holder,
    ) -> Result<Arc<Entry>, Absent> {
        let Some(link) = self.link_to(place).await else {
            let is_gone = self.address_of(place).await.is_none() || self.is_dead(place).await;
            return Err(if is_gone { Absent::Surely } else { Absent::Silent });
        };
        let wanted = Wanted { whole: true, ..Wanted::default() };
        let (ticket, accepted) = match link.attach(id, wanted, ORDER_TIMEOUT).await {
            Ok(answer) => answer,
            Err(AskError::Refused(..)) => return Err(Absent::Surely),
            Err(AskError::Broken | AskError::Timeout) => return Err(Absent::Silent),
        };
        let order = codec::decode::<Order>(&accepted.order).map_err(|_| Absent::Surely)?;
        if let Some(entry) = self.get(id).filter(|entry| !entry.copy.is_closed()) {
            // Somebody else asked at the same time.
            return Ok(entry);
        }
        let line = line_from_wire(accepted.line).ok_or(Absent::Surely)?;
        let parts = (Log::after(accepted.first, &accepted.journal), line);
        let bound = self.options.stream_bytes;
        let copy = Copy::new(id, Arc::new(order), Role::Mirror, accepted.attempt, parts, bound);
        copy.set_head_if_any(head_of(&accepted.head));
        copy.promise(accepted.next);
        let entry = match self.put_first(Arc::clone(&copy)) {
            Ok(entry) => entry,
            Err(there) if there.copy.is_closed() => self.put(Arc::clone(&copy)),
            Err(there) => return Ok(there),
        };
        entry.set_source(place);
        if self.view().me.is_some() {
            self.directory.mirror(id, accepted.attempt);
        }
        let mut slot = entry.ticket.lock();
        link.receive(&ticket, &copy);
        *slot = Some((ticket, place));
        drop(slot);
        Ok(entry)
    }
}
