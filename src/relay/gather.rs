//! What others know of a stream that is taken over, and this process does not: the clients of another
//! replica may have read more of it than those of this one.
//!
//! Whoever is asked takes nothing of the lost attempt any more, so that what it answers is all that its
//! clients will ever have of it. Who does not answer may have more; its clients are told then that the
//! stream went on without them, see [`super::line`].

use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::timeout;

use super::attempts::Had;
use super::copy::{Copy, Role};
use super::directory::Peer;
use super::hub::Relays;
use super::line::Line;
use super::link::caller::{Link, Ticket};
use super::link::line_from_wire;
use super::log::Log;
use crate::ids::ReplicaId;

/// How long the others may take to say what they have; and whoever has most, to give it. They live, as far
/// as is known, and answer within a millisecond; a machine with too much to do takes longer, and what it
/// is not given time to say is lost to its clients.
pub(super) const ASK: Duration = Duration::from_millis(500);
/// The same for those that are taken to be lost. They may live all the same, and then know most.
const ASK_LOST: Duration = Duration::from_millis(100);

/// Somebody who has something.
struct More {
    link: Arc<Link>,
    ticket: Ticket,
    attempt: u32,
    line: Line,
    next: u64,
}

impl More {
    fn reach(&self) -> (u32, u64) {
        self.line.reach(self.next)
    }
}

impl Relays {
    /// Completes a copy by what other replicas have, before `attempt` begins. Not asked is `holder`,
    /// which adds what it has itself; `gone`, which are taken to be lost, are not waited for as long as
    /// others. Those that have nothing say so at once.
    pub(super) async fn gather(
        self: &Arc<Self>,
        copy: &Arc<Copy>,
        attempt: u32,
        holder: ReplicaId,
        gone: &[ReplicaId],
    ) {
        let (from, line, view) = (copy.next(), copy.line(), self.view());
        let others = view.peers.iter().filter(|peer| peer.alive && peer.id != holder);
        // Who was away itself has lost those who live: what it takes from them it has to ask them for.
        let was_away = self.presence.was_away_lately(Instant::now());
        let asked = others.map(|peer| {
            let within = if gone.contains(&peer.id) && !was_away { ASK_LOST } else { ASK };
            timeout(within, self.ask_for_more(copy, attempt, from, peer))
        });
        let answers = join_all(asked).await.into_iter().filter_map(|answer| answer.ok().flatten());
        let fit = answers.filter(|more| more.attempt < attempt && more.reach() > line.reach(from));
        let Some(mut most) = fit.max_by_key(More::reach) else { return };
        let first = line.parts_from(&most.line).unwrap_or(from).min(from);
        if first < from {
            // A later attempt has said otherwise what is here.
            let Ok((ticket, accepted)) = most.link.remains(copy.id, first, attempt, ASK).await else {
                return;
            };
            // It may have gone on with somebody else meanwhile: then that is another text.
            if accepted.attempt >= attempt || line_from_wire(accepted.line).as_ref() != Some(&most.line) {
                return;
            }
            (most.ticket, most.next) = (ticket, accepted.next);
        }
        let mut had = Had { first, journal: Bytes::new(), events: Vec::new(), line: most.line.clone() };
        // As far as it comes in time: what is left out belongs to clients that are told.
        let _ = timeout(ASK, read(copy, most, &mut had)).await;
        let events = had.events.len();
        if copy.take_in(&had) {
            tracing::debug!(stream = %copy.id, attempt, from = first, events, "another replica knew more");
        }
    }

    async fn ask_for_more(&self, copy: &Copy, attempt: u32, from: u64, peer: &Peer) -> Option<More> {
        let link = self.link(&peer.address, Some(&peer.name)).await?;
        let (ticket, accepted) = link.remains(copy.id, from, attempt, ASK).await.ok()?;
        let line = line_from_wire(accepted.line)?;
        Some(More { link, ticket, attempt: accepted.attempt, line, next: accepted.next })
    }
}

/// Reads what `most` has, from where `had` ends.
async fn read(copy: &Copy, most: More, had: &mut Had) {
    let parts = (Log::after(had.first, &[]), most.line);
    // Nothing is forgotten of it: there is no more of it than the other one keeps.
    let theirs = Copy::new(copy.id, Arc::clone(&copy.order), Role::Shadow, most.attempt, parts, usize::MAX);
    let Ok(seat) = theirs.seat(had.first, None, None, false) else { return };
    most.link.receive(&most.ticket, &theirs);
    while had.first + (had.events.len() as u64) < most.next {
        match poll_fn(|cx| theirs.read(seat, usize::MAX, Some(cx))).await {
            Ok(read) => had.events.extend(read.events),
            Err(_) => return,
        }
    }
}
