//! Who generates a stream: orders to others, orders that are carried out here, and their end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::Failure;
use super::copy::Copy;
use super::counts::Counts;
use super::find::Found;
use super::hub::{Entry, ORDER_TIMEOUT, Relays};
use super::link::caller::{AskError, Terms};
use super::link::{Past, Why, line_from_wire};
use super::recover::TWICE;
use crate::codec;
use crate::ids::StreamId;
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// Longest wait for those that read along to have a stream's end before the directory hears of it.
const READ_OUT: Duration = Duration::from_secs(5);
/// Pause before looking again whether somebody has taken a stream over.
const FOUND_PAUSE: Duration = Duration::from_millis(50);
/// Pause before looking again whether they have it.
const READ_OUT_PAUSE: Duration = Duration::from_millis(10);

/// Waits until those that read along have the end of a stream. Nobody goes on with one that the
/// directory says has ended: were it to say so before, and this process to die, the end would be
/// nowhere.
async fn read_out(copy: &Copy) {
    let until = Instant::now() + READ_OUT;
    while copy.has_mirror() && Instant::now() < until {
        tokio::time::sleep(READ_OUT_PAUSE).await;
    }
}

impl Relays {
    /// Orders an attempt from a holder. False if that did not work.
    pub(super) async fn give(&self, entry: &Arc<Entry>, holder: Holder, attempt: u32) -> bool {
        self.try_give(entry, holder, attempt).await.is_ok()
    }

    /// The same; the error says whether it may have begun all the same.
    pub(super) async fn try_give(
        &self,
        entry: &Arc<Entry>,
        holder: Holder,
        attempt: u32,
    ) -> Result<(), AskError> {
        let copy = &entry.copy;
        if !copy.expect_attempt(attempt) {
            return Err(AskError::Refused(Why::Overtaken, "it was given to somebody meanwhile".to_owned()));
        }
        let past = match attempt {
            1 => None,
            _ => match past_of(copy) {
                Some(past) => Some(past),
                None => return Err(AskError::Refused(Why::Behind, "too much was forgotten".to_owned())),
            },
        };
        entry.set_source(holder);
        let Some(link) = self.link_to(holder).await else { return Err(AskError::Broken) };
        // Whoever has an agent generate a stream has booked it at the engine.
        let books = matches!(holder, Holder::Agent(_));
        let shared = attempt == 1 && entry.shared.load(Ordering::Acquire);
        match link.order(copy, attempt, past, Terms { books, shared }, ORDER_TIMEOUT).await {
            Ok((ticket, accepted)) => {
                // Where it begins: it may have had more of it itself.
                if !line_from_wire(accepted.line).is_some_and(|line| copy.follow(attempt, &line)) {
                    return Err(AskError::Refused(Why::Overtaken, "it knows of a later attempt".to_owned()));
                }
                ticket.watch(copy.clients());
                {
                    let mut source = entry.ticket.lock();
                    entry.asked.lock().take();
                    *source = Some((ticket, holder));
                }
                // It may be lost again before the ticket was there, and then nobody has seen to that.
                match entry.lost_source() {
                    None => Ok(()),
                    Some(_) => Err(AskError::Broken),
                }
            }
            Err(error) => {
                tracing::debug!(stream = %copy.id, ?holder, attempt, %error, "order not taken");
                Err(error)
            }
        }
    }

    /// Generates an attempt here. False if it cannot be this one's turn.
    pub(super) fn hold(&self, entry: &Arc<Entry>, attempt: u32) -> bool {
        let (Some(engines), Some(this)) = (self.engines.get().cloned(), self.this.upgrade()) else {
            return false;
        };
        let copy = Arc::clone(&entry.copy);
        if !copy.begin_attempt(attempt) {
            return false;
        }
        Counts::add(&self.counts.held);
        entry.ticket.lock().take();
        if copy.ended() {
            // Its end was all that nobody had told the directory.
            self.note_end(entry, attempt);
            return true;
        }
        let stop = CancellationToken::new();
        *entry.holding.lock() = Some((attempt, stop.clone()));
        if copy.is_closed() {
            // Somebody else was given a later attempt since this one began, and nothing stood here to stop.
            entry.holding.lock().take();
            return false;
        }
        if attempt == 1 {
            if entry.shared.load(Ordering::Acquire) {
                copy.hold_back();
            }
            self.list(Arc::clone(entry));
        }
        let entry = Arc::clone(entry);
        // Ends with the stream, when it is cancelled, or when somebody else holds it.
        self.spawn(async move {
            let generated = engines.generate(Arc::clone(&copy), attempt, stop.clone());
            tokio::select! {
                () = generated => {}
                () = stop.cancelled() => {}
            }
            // Sealed by who has won it: what its engine said last was not taken, and is said again elsewhere.
            // That its end is missing here is no failure of the stream's.
            if entry.fenced.load(Ordering::Acquire) || copy.is_sealed(attempt) {
                return;
            }
            if !copy.is_held_in(attempt) {
                // Somebody else goes on with it, and this process reads along.
                let mut holding = entry.holding.lock();
                if holding.as_ref().is_some_and(|(held, _)| *held == attempt) {
                    holding.take();
                }
                return;
            }
            if !copy.ended() {
                let (failure, text) = match stop.is_cancelled() {
                    true => (Failure::Cancelled, "the stream was cancelled"),
                    false => (Failure::Upstream, "generation stopped without an end"),
                };
                this.fail(&entry, failure, text);
            }
            read_out(&copy).await;
            this.note_end(&entry, attempt);
        });
        true
    }

    /// Has the directory list a stream that is held here.
    fn list(&self, entry: Arc<Entry>) {
        let (Some(this), Some(me)) = (self.this.upgrade(), self.view().me) else {
            return entry.copy.let_go();
        };
        let mut record = self.record(&entry.copy.order, Holder::Replica(me));
        record.mirror = entry.copy.order.edge.filter(|edge| Holder::Replica(*edge) != record.holder);
        let listed = match entry.shared.load(Ordering::Acquire) {
            true => self.directory.open(entry.copy.id, record),
            false => self.directory.list(entry.copy.id, record),
        };
        self.spawn(async move {
            match listed.await {
                // Somebody else was asked for the same under the same key, or has taken it over.
                Ok(Some(stands)) if stands.holder != Holder::Replica(me) || stands.attempt > 1 => {
                    tracing::debug!(stream = %entry.copy.id, ?stands.holder, "held by another");
                    return this.yield_to(&entry, &stands);
                }
                Ok(_) => {}
                // Runs on; who looks for it asks here as long as there is no quorum.
                Err(error) => tracing::debug!(stream = %entry.copy.id, %error, "not listed"),
            }
            entry.copy.let_go();
        });
    }

    /// Another process has begun the same stream at the same moment, and was first; or goes on with it.
    fn yield_to(&self, entry: &Arc<Entry>, stands: &StreamRecord) {
        if stands.attempt == 1 && entry.copy.next() > 0 {
            // It was not listed in time. Who has read something of this one must not read on in the other's
            // text.
            entry.fenced.store(true, Ordering::Release);
            self.fail(entry, Failure::Lost, TWICE);
            if let Some((_, stop)) = entry.holding.lock().take() {
                stop.cancel();
            }
            return self.detach(entry);
        }
        self.remove(entry);
    }

    /// Ends a stream with an error.
    pub(super) fn fail(&self, entry: &Entry, failure: Failure, text: &str) {
        let copy = &entry.copy;
        copy.ended_as(if failure == Failure::Cancelled { StreamEnd::Cancelled } else { StreamEnd::Failed });
        match failure {
            Failure::Lost => Counts::add(&self.counts.lost),
            Failure::Cancelled => Counts::add(&self.counts.cancelled),
            Failure::Upstream => {}
        }
        match self.engines.get() {
            Some(engines) => copy.fail(engines.failure(copy, failure, text)),
            None => copy.close(),
        }
    }

    /// Tells the directory that a stream has ended.
    pub(super) fn note_end(&self, entry: &Arc<Entry>, attempt: u32) {
        let copy = &entry.copy;
        // After a refusal whoever asked may ask again, with the same key.
        if entry.purged.load(Ordering::Acquire) || copy.is_refusal() {
            self.directory.purge(copy.id);
            return;
        }
        let how = copy.summary().ended.unwrap_or(StreamEnd::Failed);
        self.directory.end(copy.id, attempt, how, copy.order.keep_ms);
    }

    /// Ends the generation of a stream, wherever that is; and forgets it. False where nobody is known
    /// who generates it: it is being taken over.
    pub fn cancel(&self, entry: &Entry, purge: bool) -> bool {
        if purge {
            entry.purged.store(true, Ordering::Release);
        }
        if let Some((_, stop)) = entry.holding.lock().as_ref() {
            stop.cancel();
            return true;
        }
        if let Some((ticket, _)) = entry.ticket.lock().as_ref() {
            ticket.cancel(purge);
            return true;
        }
        entry.copy.ended()
    }

    /// A client that does not come back has left: ends the generation if nobody else listens, wherever
    /// that is. False where nobody is known who generates it.
    pub fn desert(&self, entry: &Entry) -> bool {
        if entry.copy.clients() > 0 {
            return true;
        }
        if let Some((_, stop)) = entry.holding.lock().as_ref() {
            stop.cancel();
            return true;
        }
        if let Some((ticket, _)) = entry.ticket.lock().as_ref() {
            ticket.desert();
            return true;
        }
        entry.copy.ended()
    }

    /// The same while the stream is being taken over: whoever has it then hears of it.
    pub(super) async fn desert_when_found(self: Arc<Self>, id: StreamId, at: u64) {
        let until = Instant::now() + self.options.takeover;
        while Instant::now() < until {
            let Ok(Found { entry: Some(entry), .. }) = self.find(id, at).await else { return };
            if self.desert(&entry) {
                return;
            }
            tokio::time::sleep(FOUND_PAUSE).await;
        }
    }

    /// A stream was given to another holder: if it is generated here in an earlier attempt, that
    /// ends.
    pub fn moved(&self, id: StreamId, attempt: u32) {
        let Some(entry) = self.get(id) else { return };
        let is_held = |(held, _): &(u32, CancellationToken)| *held < attempt;
        // Or is about to be.
        let begins = entry.copy.begins_before(attempt);
        if begins || entry.holding.lock().as_ref().is_some_and(is_held) {
            tracing::debug!(stream = %id, attempt, "taken over by another");
            if !entry.is_purged() {
                self.pasts.keep(&entry.copy, attempt);
            }
            self.remove(&entry);
        }
    }

    /// Has others take over what is held here, and takes nothing more. What nobody takes goes on
    /// here.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
        let entries = self.entries();
        for entry in entries.into_iter().filter(|entry| entry.holding.lock().is_some()) {
            entry.copy.want_to_leave();
            if let Some(this) = self.this.upgrade()
                && !entry.copy.ended()
                && !entry.copy.has_mirror()
            {
                self.spawn(async move {
                    this.have_mirrored(&entry).await;
                });
            }
        }
    }

    /// Waits until nothing is generated here any more, at most for so long.
    pub async fn handed_over(&self, within: Duration) {
        let until = Instant::now() + within;
        while self.holding() > 0 && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether it takes nothing more.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// Streams that are generated here and have not ended.
    pub fn holding(&self) -> usize {
        let entries = self.entries();
        entries.iter().filter(|entry| entry.holding.lock().is_some() && !entry.copy.ended()).count()
    }
}

/// What there is of a stream, for another process.
fn past_of(copy: &Copy) -> Option<Past> {
    let had = copy.past()?;
    let head = copy.head().map(|head| codec::encode(&*head)).unwrap_or_default();
    Some(Past { head: head.into(), had })
}
