//! Going on with a stream whose holder is lost: a compare-and-set on its attempt, then an order to
//! the next holder. Whoever loses attaches to the winner.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::Failure;
use super::copy::{Copy, Role};
use super::counts::Counts;
use super::directory::Taken;
use super::gather::ASK;
use super::hub::{Entry, ORDER_TIMEOUT, Relays};
use super::link::caller::{AskError, Lost, Wanted};
use super::link::{Why, line_from_wire};
use super::secret;
use crate::ids::ReplicaId;
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// How long a holder of which nothing was heard may take to answer, before it is taken to be dead.
const AGAIN: Duration = Duration::from_millis(150);
/// The same where the link was closed at the other end. Who died refuses at once to be connected to; any
/// other had lost patience with this process, which was away, and has its hands full with all that are
/// back.
const CLOSED_AGAIN: Duration = Duration::from_millis(2000);
/// The same where this process was away itself, whatever it seems that became of the holder.
const BACK_AGAIN: Duration = Duration::from_millis(3000);
/// Pause between two tries then.
const BACK_PAUSE: Duration = Duration::from_millis(100);
/// How long a process without a client of a stream leaves it to others to take it over.
const OTHERS_FIRST: Duration = Duration::from_millis(400);
/// Pause before asking a cluster again that did not answer.
const PAUSE: Duration = Duration::from_millis(50);
/// Pause where no replica is known that could be asked.
const NOBODY_PAUSE: Duration = Duration::from_millis(200);
/// How long who has won a take-over may take to tell the new holder: to ask the others, and then that
/// one; and the pause between two questions whether it knows.
const PATIENCE: Duration = Duration::from_millis(2 * ASK.as_millis() as u64 + 500);
const NOT_YET_PAUSE: Duration = Duration::from_millis(10);
/// Why a stream is given up that somebody else has begun as something else.
const OTHERS: &str = "the same Idempotency-Key was used for another request at the same moment";
/// The same where it was begun as the same.
pub(super) const TWICE: &str = "the same Idempotency-Key was used at another replica at the same moment";
/// Times that a process is asked for a stream of which less and less turns out to be of use.
const FOLLOWS: usize = 3;
/// Attempts in a row that may begin without an event since the one before. That many holders do not
/// die by chance: the stream may be what they die of.
const MOST_IDLE: u32 = 8;

impl Relays {
    /// Finds `entry` a new source, `lost` being none any more; a first one, where there was none.
    /// Ends when it has one, or when the stream has failed.
    pub(super) async fn recover(self: &Arc<Self>, entry: Arc<Entry>, lost: Option<Holder>) {
        self.recover_from(entry, lost, false).await;
    }

    /// The same. Who is lost may be leaving, and then lives, and knows all that was said.
    pub(super) async fn recover_from(
        self: &Arc<Self>,
        entry: Arc<Entry>,
        mut lost: Option<Holder>,
        mut leaves: bool,
    ) {
        while !entry.recovering.swap(true, Ordering::AcqRel) {
            let began = Instant::now();
            let leaving = lost.filter(|_| std::mem::take(&mut leaves));
            if self.try_recover(&entry, lost, leaving, began + self.options.takeover).await {
                self.counts.takeover_time.observe_time(began.elapsed());
            }
            entry.recovering.store(false, Ordering::Release);
            // Whoever saw the new source go meanwhile has left it to this one.
            lost = entry.lost_source();
            if lost.is_none() {
                return;
            }
        }
    }

    /// Whether only the link was lost: its holder has the stream still, or somebody else by now. This
    /// process may have been away itself, and then knows less than others do. One that nobody listens
    /// at lets those go first who have a client: they know what was read.
    async fn is_still_held(self: &Arc<Self>, entry: &Arc<Entry>, holder: Holder, patience: Duration) -> bool {
        let _ = entry.ticket.lock().take();
        let began = Instant::now();
        loop {
            let was_away = self.presence.was_away_lately(Instant::now());
            let until = began + if was_away { BACK_AGAIN.max(patience) } else { patience };
            match tokio::time::timeout_at(until.into(), self.follow_at(entry, holder, 0)).await {
                Ok(Followed::Yes) => return true,
                Ok(Followed::No) if was_away && Instant::now() < until && !self.is_dead(holder).await => {}
                _ => break,
            }
            // Others may have gone on meanwhile.
            if let Some(stands) = self.directory.find(entry.copy.id).await
                && stands.attempt > entry.copy.attempt()
            {
                return tokio::time::timeout(AGAIN, self.follow(entry, &stands)).await.unwrap_or(false);
            }
            tokio::time::sleep(BACK_PAUSE).await;
        }
        if entry.copy.clients() > 0 {
            return false;
        }
        tokio::time::sleep(OTHERS_FIRST).await;
        match self.directory.find(entry.copy.id).await {
            Some(stands) if stands.attempt > entry.copy.attempt() => {
                tokio::time::timeout(AGAIN, self.follow(entry, &stands)).await.unwrap_or(false)
            }
            _ => false,
        }
    }

    /// Whether it is somebody else who has the stream, and is read from now on: who was lost had only read
    /// along, or was the second of two that begin the same one at the same moment, and gave way. To take the
    /// stream over would be to take it from one that lives, with clients of its own.
    async fn is_with_another(self: &Arc<Self>, entry: &Arc<Entry>, holder: Holder) -> bool {
        let copy = &entry.copy;
        if entry.recovering.load(Ordering::Acquire) {
            return false;
        }
        let stands = match self.directory.find(copy.id).await {
            Some(stands) => Some(stands),
            // It may be listed, and not known here yet.
            None => self.directory.find_surely(copy.id).await.ok().flatten(),
        };
        let Some(stands) = stands else { return false };
        if stands.holder == holder || stands.attempt < copy.attempt() {
            return false;
        }
        let why = match is_of(&stands, copy) {
            false => OTHERS,
            // Nobody listed this one in time, so it was read: what the other one says is another text. (What
            // was not begun here may have come from one that only read along.)
            true if stands.attempt == 1 && copy.next() > 0 && entry.shared.load(Ordering::Acquire) => TWICE,
            true => return self.follow(entry, &stands).await,
        };
        self.give_up(entry, None, why);
        true
    }

    /// Whether nobody listens where a holder was: it has died, and was not started again yet. A frozen process
    /// listens, and one that has only closed its links.
    pub(super) async fn is_dead(&self, holder: Holder) -> bool {
        let Some((address, _)) = self.address_of(holder).await else { return false };
        let tried = tokio::time::timeout(AGAIN, TcpStream::connect(&address)).await;
        tried.is_ok_and(|tried| tried.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused))
    }

    /// A copy's source is gone, or has nothing more to say.
    pub(super) fn source_lost(&self, copy: &Arc<Copy>, lost: Lost) {
        let entry = self.get(copy.id).filter(|entry| Arc::ptr_eq(&entry.copy, copy));
        if lost == Lost::Ended {
            if let Some(entry) = entry.filter(|entry| entry.is_agents.load(Ordering::Acquire)) {
                self.note_end(&entry, copy.attempt());
            }
            return;
        }
        let (Some(entry), Some(this)) = (entry, self.this.upgrade()) else {
            // Only passed on: whoever reads it asks anew.
            return copy.close();
        };
        // Not here: who calls may be about to put the ticket there.
        self.spawn(async move {
            let Some(holder) = entry.ticket.lock().as_ref().map(|(_, holder)| *holder) else { return };
            if let (Lost::Leaving, Holder::Replica(id)) = (lost, holder)
                && this.choose(&[id]).is_none()
            {
                // There is nobody else: it goes on as long as it can.
                return;
            }
            tracing::debug!(stream = %entry.copy.id, ?holder, ?lost, "source lost");
            let patience = match lost {
                Lost::Link => Some(CLOSED_AGAIN),
                Lost::Silence => Some(AGAIN),
                Lost::Refused(_) | Lost::Leaving | Lost::Ended => None,
            };
            if let Some(patience) = patience
                && this.is_still_held(&entry, holder, patience).await
            {
                return;
            }
            if lost != Lost::Leaving && this.is_with_another(&entry, holder).await {
                return;
            }
            this.recover_from(entry, Some(holder), lost == Lost::Leaving).await;
        });
    }

    async fn try_recover(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        lost: Option<Holder>,
        leaving: Option<Holder>,
        until: Instant,
    ) -> bool {
        let copy = &entry.copy;
        let mut bad: Vec<ReplicaId> = Vec::new();
        lost.into_iter().for_each(|lost| note(&mut bad, lost));
        // The attempt that is over, and whether this process has won it.
        let (mut over, mut won) = (copy.attempt(), false);
        loop {
            if copy.ended() || copy.is_closed() {
                return false;
            }
            if copy.role() == Role::Holder {
                // Somebody else has won, and gave it to this process.
                return true;
            }
            if let Some(why) = self.is_hopeless(copy, until) {
                self.give_up(entry, won.then_some(over), why);
                return false;
            }
            let me = self.view().me;
            let Some(next) = self.choose(&bad) else {
                // Nobody that is known, and this process holds nothing: somebody may come back.
                bad.clear();
                tokio::time::sleep(NOBODY_PAUSE).await;
                continue;
            };
            let holder = Holder::Replica(next);
            if Some(next) != me && self.link_to(holder).await.is_none() {
                // An attempt that nobody can be given would be wasted.
                bad.push(next);
                continue;
            }
            let stands = match self.directory.take(copy.id, over, self.record(&copy.order, holder)).await {
                Ok(Taken::Won) => {
                    (over, won) = (over + 1, true);
                    Counts::add(&self.counts.taken_over);
                    entry.call_off();
                    let mut gone = bad.clone();
                    gone.retain(|id| Some(Holder::Replica(*id)) != leaving);
                    self.gather(copy, over, next, &gone).await;
                    tracing::info!(stream = %copy.id, attempt = over, holder = %next, events = copy.next(), "taken over");
                    if copy.ended() {
                        // Another one had its end.
                        self.note_end(entry, over);
                        return true;
                    }
                    let given = match Some(next) == me {
                        true => self.hold(entry, over),
                        false => self.give(entry, holder, over).await,
                    };
                    if given {
                        return true;
                    }
                    if copy.past().is_none() {
                        let why = "too much of this stream was forgotten to go on with it";
                        self.give_up(entry, Some(over), why);
                        return false;
                    }
                    bad.push(next);
                    continue;
                }
                Ok(Taken::Lost(stands)) => stands,
                Ok(Taken::Refused) => {
                    self.give_up(entry, won.then_some(over), "the directory of streams is full");
                    return false;
                }
                Err(error) => {
                    tracing::debug!(stream = %copy.id, %error, "take-over has to wait");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            if !is_of(&stands, copy) {
                self.give_up(entry, None, OTHERS);
                return false;
            }
            if self.follow(entry, &stands).await {
                return true;
            }
            if stands.ended.is_some() && !self.follow_mirror(entry, &stands).await {
                // Nobody else will generate anything of it: it is finished for the client here.
                if stands.ended == Some(StreamEnd::Complete)
                    && self.finish(entry, stands.attempt + 1, &bad).await
                {
                    return true;
                }
                self.give_up(entry, None, "who had this stream's end is gone");
                return false;
            }
            note(&mut bad, stands.holder);
            (over, won) = (stands.attempt, false);
        }
    }

    /// Has the rest of a stream generated again whose end was lost with those who had it. The directory
    /// has its end already, and need not hear of this.
    async fn finish(self: &Arc<Self>, entry: &Arc<Entry>, attempt: u32, bad: &[ReplicaId]) -> bool {
        let me = self.view().me;
        tracing::info!(stream = %entry.copy.id, attempt, events = entry.copy.next(), "finished again");
        match self.choose(bad) {
            Some(next) if Some(next) != me => {
                let given = self.give(entry, Holder::Replica(next), attempt).await;
                given || (me.is_some() && self.hold(entry, attempt + 1))
            }
            next => next.is_some() && self.hold(entry, attempt),
        }
    }

    /// Why nobody goes on with a stream any more.
    fn is_hopeless(&self, copy: &Copy, until: Instant) -> Option<&'static str> {
        let line = copy.line();
        if Instant::now() >= until {
            return Some("no replica could go on with this stream in time");
        }
        if line.idle() >= MOST_IDLE {
            return Some("its holders were lost one after the other, before any of them said a word");
        }
        (!line.has_room()).then_some("it has changed hands too often")
    }

    /// Ends a stream here that nobody goes on with, as far as is known. Who listens here is told; who
    /// asks for it later is not, because it may live all the same where this process cannot see it.
    fn give_up(&self, entry: &Arc<Entry>, won: Option<u32>, why: &str) {
        tracing::info!(stream = %entry.copy.id, why, "given up");
        self.fail(entry, Failure::Lost, why);
        self.detach(entry);
        if let Some(attempt) = won {
            // Nobody else would say so: it was given to nobody.
            self.directory.end(entry.copy.id, attempt, StreamEnd::Failed, entry.copy.order.keep_ms);
        }
    }

    /// Attaches to whoever holds the stream by now, which may not have been told yet by who has won it.
    pub(super) async fn follow(self: &Arc<Self>, entry: &Arc<Entry>, stands: &StreamRecord) -> bool {
        if !is_of(stands, &entry.copy) {
            return false;
        }
        let until = Instant::now() + PATIENCE;
        loop {
            match self.follow_at(entry, stands.holder, stands.attempt).await {
                Followed::Yes => return true,
                Followed::No => return false,
                Followed::NotYet if stands.ended.is_some() || Instant::now() >= until => return false,
                Followed::NotYet => tokio::time::sleep(NOT_YET_PAUSE).await,
            }
            let now = self.directory.find(entry.copy.id).await;
            if now.is_none_or(|now| now.attempt > stands.attempt) {
                return false;
            }
        }
    }

    /// Attaches to a process that was seen to have the stream.
    pub(super) async fn follow_now(self: &Arc<Self>, entry: &Arc<Entry>, holder: Holder) -> bool {
        self.follow_at(entry, holder, 0).await == Followed::Yes
    }

    async fn follow_mirror(self: &Arc<Self>, entry: &Arc<Entry>, stands: &StreamRecord) -> bool {
        match stands.mirror {
            Some(mirror) if Some(mirror) != self.view().me => {
                self.follow_at(entry, Holder::Replica(mirror), 0).await == Followed::Yes
            }
            _ => false,
        }
    }

    /// Attaches to a process that has the stream in this attempt, or a later one.
    async fn follow_at(self: &Arc<Self>, entry: &Arc<Entry>, holder: Holder, least: u32) -> Followed {
        let copy = &entry.copy;
        if Some(holder) == self.view().me.map(Holder::Replica) {
            return if copy.role() == Role::Holder { Followed::Yes } else { Followed::NotYet };
        }
        let Some(link) = self.link_to(holder).await else { return Followed::No };
        for _ in 0..FOLLOWS {
            let from = copy.next();
            let wanted = Wanted { from, books: copy.is_booked_here(), ..Wanted::default() };
            let (ticket, accepted) = match link.attach(copy.id, wanted, ORDER_TIMEOUT).await {
                Ok(answer) => answer,
                Err(AskError::Refused(Why::NoSuchStream | Why::Overtaken, _)) => return Followed::NotYet,
                Err(_) => return Followed::No,
            };
            let Some(line) = line_from_wire(accepted.line) else { return Followed::No };
            if copy.role() == Role::Holder {
                // It was given to this process meanwhile.
                return Followed::Yes;
            }
            let is_behind = accepted.attempt < least.max(copy.least_attempt());
            if is_behind || copy.knows_more_than(accepted.attempt, &line) {
                return Followed::NotYet;
            }
            if !copy.follow(accepted.attempt, &line) {
                // What was said otherwise since is forgotten here: this copy is of no use any more.
                self.remove(entry);
                return Followed::Yes;
            }
            if copy.next() < from {
                continue;
            }
            ticket.watch(copy.clients());
            entry.set_source(holder);
            let mut place = entry.ticket.lock();
            link.receive(&ticket, copy);
            *place = Some((ticket, holder));
            if copy.role() == Role::Holder {
                place.take();
                return Followed::Yes;
            }
            drop(place);
            return if entry.lost_source().is_some() { Followed::No } else { Followed::Yes };
        }
        Followed::No
    }
}

/// What became of an attempt to follow somebody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Followed {
    Yes,
    /// It has no such stream, or in an earlier attempt.
    NotYet,
    No,
}

/// Whether a record is of what a copy is of, and not of another request under the same key.
fn is_of(stands: &StreamRecord, copy: &Copy) -> bool {
    secret::same(&stands.request, &copy.order.request)
}

fn note(bad: &mut Vec<ReplicaId>, holder: Holder) {
    if let Holder::Replica(id) = holder
        && !bad.contains(&id)
    {
        bad.push(id);
    }
}
