//! A client that reads a stream. It sees one sequence of events, whatever becomes of the copies that
//! it reads.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::copy::{Copy, Read, Seat, Stop};
use super::counts::{Counts, Resumed};
use super::find::{Found, Missing};
use super::hub::{Entry, Relays};
use super::link::caller::Ticket;
use super::order::{Head, Order};
use crate::ids::StreamId;

/// Bytes handed over at a time.
const AT_ONCE: usize = 64 << 10;

/// How long a client that seems to be ahead of its stream waits for it.
const AHEAD: Duration = Duration::from_millis(200);
/// The same while what is known to be on its way has not come, or where this process knows that it is
/// behind: it was away itself, or looks for who has the stream now.
const PROMISED: Duration = Duration::from_secs(5);
/// How often it is looked whether it has come.
const LOOK: Duration = Duration::from_millis(2);

/// Why a listener hears nothing more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Over {
    /// It has heard the last event.
    Ended,
    /// What comes next was forgotten, or was lost.
    Gone,
    /// The stream went on from an earlier event than this listener has heard.
    Stray,
}

/// Why a listener cannot begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// See [`Missing`].
    Missing(Missing),
    /// It asks for what comes after an event that there has not been.
    Ahead {
        /// Number of the next event.
        next: u64,
    },
    /// What it asks for was forgotten.
    Behind,
    /// It has heard the last event already.
    Over,
    /// The event that it has heard last was said otherwise since: the replicas that had it are lost.
    Stray,
    /// Too many clients listen to this stream.
    TooMany,
}

impl Refused {
    fn counted(&self) -> Resumed {
        match self {
            Refused::Missing(Missing::Unknown) => Resumed::NotFound,
            Refused::Missing(Missing::Forgotten) | Refused::Behind => Resumed::Expired,
            Refused::Missing(Missing::Gone) | Refused::Stray => Resumed::Lost,
            Refused::Missing(Missing::Unavailable) => Resumed::Unavailable,
            Refused::Ahead { .. } => Resumed::Ahead,
            Refused::Over => Resumed::Over,
            Refused::TooMany => Resumed::TooMany,
        }
    }
}

enum Place {
    Reading { copy: Arc<Copy>, entry: Option<Arc<Entry>>, ticket: Option<Ticket>, seat: Seat },
    Looking(Pin<Box<dyn Future<Output = Result<Found, Over>> + Send>>),
    Nowhere(Over),
}

/// See the module. Dropping it leaves the stream; see [`Listener::new`].
pub struct Listener {
    relays: Arc<Relays>,
    /// Which stream.
    pub id: StreamId,
    /// What it is of.
    pub order: Arc<Order>,
    place: Place,
    /// Next event.
    at: u64,
    /// Which attempt said the one before, as far as is known.
    of: Option<u32>,
    aware: bool,
    heard_end: bool,
    seam: Seam,
}

/// Measures how long a client waits where its stream goes on elsewhere.
#[derive(Default)]
struct Seam {
    /// When the last events came, and in which attempt.
    last: Option<(Instant, u32)>,
    /// The copy that was read is no more.
    moved: bool,
}

impl Seam {
    /// Events came.
    fn heard(&mut self, attempt: u32, counts: &Counts) {
        let now = Instant::now();
        let moved = std::mem::take(&mut self.moved);
        if let Some((last, before)) = self.last.replace((now, attempt))
            && (moved || before != attempt)
        {
            counts.holder_stall.observe_time(now.saturating_duration_since(last));
        }
    }
}

impl Relays {
    /// Has a client here listen to a stream that it began. `aware`: it may come back, so its leaving
    /// ends nothing.
    pub fn listen(self: &Arc<Self>, entry: Arc<Entry>, aware: bool) -> Listener {
        let copy = Arc::clone(&entry.copy);
        let (id, order) = (copy.id, Arc::clone(&copy.order));
        let place = match sit(self, Found { copy, entry: Some(entry), ticket: None }, 0, None) {
            Ok(place) => place,
            Err(_) => Place::Nowhere(Over::Gone),
        };
        let relays = Arc::clone(self);
        Listener { relays, id, order, place, at: 0, of: None, aware, heard_end: false, seam: Seam::default() }
    }

    /// Has a client that comes back listen from event `from` on. Where it says which attempt the event
    /// before is `of`, it never hears what contradicts that.
    pub async fn resume(
        self: &Arc<Self>,
        id: StreamId,
        from: u64,
        of: Option<u32>,
    ) -> Result<Listener, Refused> {
        let began = Instant::now();
        let resumed = loop {
            match self.try_resume(id, from, of).await {
                Some(resumed) => break resumed,
                None if began.elapsed() >= self.options.takeover => {
                    break Err(Refused::Missing(Missing::Unavailable));
                }
                None => tokio::time::sleep(LOOK).await,
            }
        };
        self.counts.resumed(resumed.as_ref().map_or_else(Refused::counted, |_| Resumed::Ok));
        if resumed.is_ok() {
            self.counts.resume_time.observe_time(began.elapsed());
        }
        resumed
    }

    /// Whether the cluster is in a later attempt at a stream than a copy here; that one is forgotten then.
    /// `None` where the cluster does not say.
    async fn is_outdated(&self, id: StreamId, copy: &Copy) -> Option<bool> {
        let stands = self.directory.find_surely(id).await.ok()?;
        let is_outdated = stands.is_some_and(|it| it.attempt > copy.attempt());
        if let Some(entry) = self.get(id).filter(|entry| is_outdated && std::ptr::eq(&*entry.copy, copy)) {
            self.remove(&entry);
        }
        Some(is_outdated)
    }

    /// A stream for a client that was reading it, from event `from` on, the one before being of attempt
    /// `of`. A copy that has ended in an earlier attempt belongs to a process that was away, and learns
    /// of that only now.
    async fn find_again(self: &Arc<Self>, id: StreamId, from: u64, of: Option<u32>) -> Result<Found, Over> {
        loop {
            let found = self.find(id, from).await.map_err(|_| Over::Gone)?;
            let source = found.source();
            if of.is_none_or(|of| of <= source.attempt()) || !source.ended() {
                return Ok(found);
            }
            match self.is_outdated(id, source).await {
                Some(true) => {}
                Some(false) => return Err(Over::Stray),
                None => return Err(Over::Gone),
            }
        }
    }

    /// `None` where the copy that was found was given up meanwhile, for a better one: it is to be looked
    /// for again.
    async fn try_resume(
        self: &Arc<Self>,
        id: StreamId,
        from: u64,
        of: Option<u32>,
    ) -> Option<Result<Listener, Refused>> {
        if self.get(id).is_some_and(|entry| self.is_full(&entry) && !entry.copy.ended()) {
            // Before another replica is asked for its copy.
            return Some(Err(Refused::TooMany));
        }
        let found = match self.find(id, from).await {
            Ok(found) => found,
            Err(missing) => return Some(Err(Refused::Missing(missing))),
        };
        let source = found.source();
        // A copy that is just being made may have less than there is.
        let in_touch = !self.presence.was_away_lately(Instant::now())
            && found.entry.as_ref().is_none_or(|entry| entry.is_in_touch());
        let ahead = if in_touch { AHEAD } else { PROMISED };
        let next = wait_for(source, from, of.unwrap_or(0), ahead).await;
        if source.is_closed() {
            return None;
        }
        if of.is_some_and(|of| of > source.attempt()) && self.is_outdated(id, source).await == Some(true) {
            // This process was away while another went on with the stream.
            return None;
        }
        if source.is_stray(from, of) {
            return Some(Err(Refused::Stray));
        }
        if from > next || of.is_some_and(|of| of > source.attempt()) {
            // It may be on its way still, or with somebody who does not answer at the moment.
            let is_known = next < source.promised() && from <= source.promised();
            let refused = if is_known || !in_touch {
                Refused::Missing(Missing::Unavailable)
            } else {
                Refused::Ahead { next }
            };
            return Some(Err(refused));
        }
        if source.ended() && from == next {
            return Some(Err(Refused::Over));
        }
        let is_full = match &found.entry {
            Some(entry) => self.is_full(entry),
            None => source.clients_here() >= self.options.most_listeners,
        };
        if is_full {
            return Some(Err(Refused::TooMany));
        }
        let order = Arc::clone(&found.copy.order);
        let place = match sit(self, found, from, of) {
            Ok(place) => place,
            Err(Stop::Closed) => return None,
            Err(Stop::Stray) => return Some(Err(Refused::Stray)),
            Err(Stop::Behind | Stop::Ended) => return Some(Err(Refused::Behind)),
        };
        let relays = Arc::clone(self);
        let seam = Seam::default();
        Some(Ok(Listener { relays, id, order, place, at: from, of, aware: true, heard_end: false, seam }))
    }
}

impl Found {
    /// What is known here of the stream.
    fn source(&self) -> &Arc<Copy> {
        self.entry.as_ref().map_or(&self.copy, |entry| &entry.copy)
    }
}

impl Relays {
    /// Whether as many clients listen to a stream here as may.
    fn is_full(&self, entry: &Entry) -> bool {
        entry.copy.clients_here() + entry.detours.load(Ordering::Relaxed) >= self.options.most_listeners
    }
}

/// The stream that is held here, where it is read by way of another replica's copy of it.
fn detour<'a>(entry: &'a Option<Arc<Entry>>, ticket: &Option<Ticket>) -> Option<&'a Entry> {
    entry.as_deref().filter(|_| ticket.is_some())
}

/// Waits for a copy to have event `from - 1`, and to be in this attempt: as long as it takes, within
/// reason, for what its source is known to have, and for `ahead` for what that may not have had yet.
async fn wait_for(copy: &Arc<Copy>, from: u64, attempt: u32, ahead: Duration) -> u64 {
    let began = Instant::now();
    loop {
        let next = copy.next();
        let is_short = next < from || copy.attempt() < attempt;
        let patience = if next < copy.promised() { PROMISED } else { ahead };
        if !is_short || copy.ended() || copy.is_closed() || began.elapsed() >= patience {
            return next;
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn sit(relays: &Relays, found: Found, at: u64, of: Option<u32>) -> Result<Place, Stop> {
    let Found { copy, entry, ticket } = found;
    let seat = copy.seat(at, of, None, true)?;
    tell(relays, entry.as_deref(), ticket.as_ref(), &copy);
    if let Some(held) = detour(&entry, &ticket) {
        held.detours.fetch_add(1, Ordering::Relaxed);
    }
    Ok(Place::Reading { copy, entry, ticket, seat })
}

/// Tells where the stream comes from how many listen here.
fn tell(_: &Relays, entry: Option<&Entry>, ticket: Option<&Ticket>, copy: &Copy) {
    if let Some(ticket) = ticket {
        return ticket.watch(copy.clients());
    }
    let slot = entry.map(|entry| entry.ticket.lock());
    if let Some((ticket, _)) = slot.as_ref().and_then(|slot| slot.as_ref()) {
        ticket.watch(copy.clients());
    }
}

impl Listener {
    /// The answer's head, when it is known; `None` when the stream was lost before there was one.
    pub fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Option<Arc<Head>>> {
        loop {
            match &mut self.place {
                Place::Reading { copy, seat, .. } => match ready!(copy.poll_head(*seat, cx)) {
                    Ok(head) => return Poll::Ready(Some(head)),
                    Err(_) if copy.ended() => return Poll::Ready(None),
                    Err(_) => self.look(),
                },
                Place::Looking(looking) => {
                    let found = ready!(looking.as_mut().poll(cx));
                    self.arrive(found);
                }
                Place::Nowhere(_) => return Poll::Ready(None),
            }
        }
    }

    /// The next events.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Read, Over>> {
        loop {
            match &mut self.place {
                Place::Reading { copy, seat, .. } => match ready!(copy.read(*seat, AT_ONCE, Some(cx))) {
                    Ok(read) => {
                        self.at = read.first + read.events.len() as u64;
                        self.of = self.at.checked_sub(1).map(|last| read.line.said_by(last));
                        self.seam.heard(read.attempt, &self.relays.counts);
                        self.heard_end = read.events.last().is_some_and(|event| event.terminal);
                        return Poll::Ready(Ok(read));
                    }
                    Err(Stop::Ended) => return Poll::Ready(Err(Over::Ended)),
                    Err(Stop::Behind) => {
                        self.leave();
                        self.place = Place::Nowhere(Over::Gone);
                    }
                    // It has heard of a later attempt than this copy: not the client strayed.
                    Err(Stop::Stray) if self.of.is_some_and(|of| of > copy.attempt()) => self.look(),
                    Err(Stop::Stray) => {
                        self.leave();
                        self.place = self.strayed();
                    }
                    Err(Stop::Closed) => self.look(),
                },
                Place::Looking(looking) => {
                    let found = ready!(looking.as_mut().poll(cx));
                    self.arrive(found);
                }
                Place::Nowhere(over) => return Poll::Ready(Err(*over)),
            }
        }
    }

    /// Whether the stream ended with a failure.
    pub fn has_failed(&self) -> bool {
        use crate::state::streams::StreamEnd;
        match &self.place {
            Place::Reading { copy, .. } => copy.summary().ended != Some(StreamEnd::Complete),
            _ => true,
        }
    }

    /// Number of the next event.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Whether the client may come back.
    pub fn is_aware(&self) -> bool {
        self.aware
    }

    /// Leaves without ending anything, whoever the client is.
    pub fn keep_running(&mut self) {
        self.aware = true;
    }

    fn look(&mut self) {
        self.leave();
        self.seam.moved = true;
        let (relays, id, at, of) = (Arc::clone(&self.relays), self.id, self.at, self.of);
        self.place = Place::Looking(Box::pin(async move { relays.find_again(id, at, of).await }));
    }

    fn arrive(&mut self, found: Result<Found, Over>) {
        self.place = match found {
            // Somebody used the same Idempotency-Key for something else at the same moment, and was first.
            Ok(found) if found.copy.order.request != self.order.request => Place::Nowhere(Over::Gone),
            Ok(found) => match sit(&self.relays, found, self.at, self.of) {
                Ok(place) => place,
                Err(Stop::Stray) => self.strayed(),
                Err(_) => Place::Nowhere(Over::Gone),
            },
            Err(Over::Stray) => self.strayed(),
            Err(over) => Place::Nowhere(over),
        };
    }

    fn strayed(&self) -> Place {
        Counts::add(&self.relays.counts.lost);
        tracing::info!(stream = %self.id, at = self.at, of = self.of, "a client has read what was lost");
        Place::Nowhere(Over::Stray)
    }

    fn leave(&mut self) {
        if let Place::Reading { copy, entry, ticket, seat } = &self.place {
            copy.leave(*seat);
            if let Some(held) = detour(entry, ticket) {
                held.detours.fetch_sub(1, Ordering::Relaxed);
            }
            tell(&self.relays, entry.as_deref(), ticket.as_ref(), copy);
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.leave();
        if self.aware || self.heard_end {
            return;
        }
        match &self.place {
            Place::Nowhere(_) | Place::Reading { entry: None, .. } => return,
            Place::Reading { copy, entry: Some(entry), .. } if copy.ended() || self.relays.desert(entry) => {
                return;
            }
            Place::Reading { .. } | Place::Looking(_) => {}
        }
        self.relays.spawn(Arc::clone(&self.relays).desert_when_found(self.id, self.at));
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::copy::Role;
    use super::super::log::Event;
    use super::super::secret::random_id;
    use super::super::tests::order;
    use super::*;

    #[tokio::test]
    async fn what_the_source_has_is_waited_for_however_late_it_comes() {
        let copy = || Copy::new(random_id(), Arc::new(order()), Role::Mirror, 1, Default::default(), 1 << 20);
        let ahead = copy();
        assert_eq!(wait_for(&ahead, 3, 1, AHEAD).await, 0, "nobody has seen these");
        let late = copy();
        late.promise(3);
        let source = Arc::clone(&late);
        let feeding = async move {
            tokio::time::sleep(AHEAD * 2).await;
            let event = || Event { lines: Bytes::from_static(b"data: x\n"), ..Event::default() };
            assert!(source.push(1, 0, [event(), event(), event()]));
        };
        let (next, ()) = tokio::join!(wait_for(&late, 3, 1, AHEAD), feeding);
        assert_eq!(next, 3);
        let closed = copy();
        closed.promise(3);
        closed.close();
        assert_eq!(wait_for(&closed, 3, 1, AHEAD).await, 0, "nothing comes any more");
    }
}
