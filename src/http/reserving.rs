//! Booking through the log, for requests that must not meet another one at a worker that both chose
//! at the same moment (`Everline-Reserve: linearizable`).
//!
//! The choice is made here, as always, and proposed with what was known of the worker's load. Where
//! more has been booked there by now the choice is made again, from a view that has it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::front::Front;
use super::placing::Placing;
use crate::routing::book::Booking;
use crate::routing::select::Selection;

/// Choices that somebody else may be faster than; then the request is booked as others are. Of so
/// many that compete for places at workers, each finds one: whoever loses has lost to one of them.
const TRIES: u32 = 16;

/// Longest wait of a request for the cluster's word, over all tries: twice what an election takes.
const PATIENCE: Duration = Duration::from_secs(2);

/// What became of a booking through the log.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Reservation {
    /// The cluster confirmed it.
    Confirmed,
    /// Somebody else had booked on the worker: chosen again.
    Late,
    /// No word in time, or late too often: booked locally.
    Local,
}

impl Reservation {
    /// All of them, in the order of their declaration.
    pub(super) const ALL: [Reservation; 3] = [Reservation::Confirmed, Reservation::Late, Reservation::Local];

    /// The name in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Reservation::Confirmed => "confirmed",
            Reservation::Late => "late",
            Reservation::Local => "local",
        }
    }
}

/// One request's tries.
#[derive(Debug, Default)]
pub(super) struct Reserving {
    late: u32,
    until: Option<Instant>,
}

impl Reserving {
    /// Has the choice confirmed; `None` if it has to be made again.
    pub(super) async fn book(
        &mut self,
        front: &Front,
        placing: &Placing,
        selection: &Selection,
    ) -> Option<Booking> {
        let until = *self.until.get_or_insert_with(|| Instant::now() + PATIENCE);
        if self.late < TRIES && Instant::now() < until {
            let share = placing.share(selection);
            let worker = Arc::clone(&selection.worker);
            let tentative = front.control.bookings().try_book(worker, share, selection.seen);
            match timeout_at(until, front.control.reserve(tentative)).await {
                Ok(Ok(Some(booking))) => {
                    front.metrics.reservation(Reservation::Confirmed);
                    return Some(booking);
                }
                Ok(Ok(None)) => {
                    self.late += 1;
                    front.metrics.reservation(Reservation::Late);
                    return None;
                }
                Ok(Err(error)) => tracing::debug!(%error, "not reserved"),
                Err(_) => tracing::debug!("not reserved in time"),
            }
        }
        front.metrics.reservation(Reservation::Local);
        Some(book(front, placing, selection))
    }
}

/// Books at once, here.
pub(super) fn book(front: &Front, placing: &Placing, selection: &Selection) -> Booking {
    let worker = Arc::clone(&selection.worker);
    front.control.bookings().book_share(worker, placing.share(selection))
}
