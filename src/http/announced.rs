//! What agents announce of their streams with their heartbeats: load of those that go on although the
//! replica that had booked them is gone, and ends that nobody has read. Whoever hears of it books it,
//! for as long as it is said again, and notes the ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::errors::{ApiError, Code};
use super::front::Front;
use crate::admin_types::{EndedStream, HeartbeatRequest, RunningOnRank};
use crate::ids::{StreamId, WorkerIx};
use crate::relay::by_agent::MOST_UNREAD;
use crate::routing::book::Booking;
use crate::routing::view::WorkerView;
use crate::state::command::CacheCommand;
use crate::state::load::LoadDelta;
use crate::state::streams::{Holder, StreamRecord};

/// After so many heartbeats that did not come, or went to another replica, nothing is booked any more.
const BELIEVED: u32 = 3;

/// Longest time that a stream is kept: the bound of `streams.keep_s`.
const MOST_KEPT_MS: u32 = 3_600_000;

/// What agents said last.
#[derive(Debug, Default)]
pub(super) struct Announced {
    by_worker: Mutex<HashMap<WorkerIx, Announcement>>,
}

#[derive(Debug)]
struct Announcement {
    until: Instant,
    ranks: HashMap<u32, Booking>,
}

impl Announced {
    /// A worker's agent says that this runs, and nothing else that is not booked.
    fn set(&self, front: &Front, worker: &Arc<WorkerView>, running: &[RunningOnRank], until: Instant) {
        let mut by_worker = self.by_worker.lock();
        let ix = worker.record.ix;
        let mut ranks = by_worker.remove(&ix).map(|old| old.ranks).unwrap_or_default();
        ranks.retain(|rank, _| running.iter().any(|said| said.rank == *rank));
        for said in running {
            let load = LoadDelta {
                requests: i32::try_from(said.requests).unwrap_or(i32::MAX),
                prefill_tokens: said.prefill_tokens.into(),
                decode_blocks: said.decode_blocks.into(),
            };
            match ranks.get_mut(&said.rank) {
                Some(booking) => booking.turn_into(load),
                None => {
                    let booking = front.control.bookings().book_told(Arc::clone(worker), said.rank, load);
                    ranks.insert(said.rank, booking);
                }
            }
        }
        if !ranks.is_empty() {
            by_worker.insert(ix, Announcement { until, ranks });
        }
    }

    /// Frees what was not said again in time.
    fn sweep(&self) {
        let now = Instant::now();
        self.by_worker.lock().retain(|_, said| said.until > now);
    }
}

/// Takes note of what a heartbeat says.
pub(super) fn hear(
    front: &Arc<Front>,
    worker: &Arc<WorkerView>,
    said: &HeartbeatRequest,
) -> Result<(), ApiError> {
    note_ends(front, worker, &said.ended)?;
    note_running(front, worker, &said.running)
}

/// Has the directory note the ends of the worker's own streams.
fn note_ends(front: &Front, worker: &WorkerView, ended: &[EndedStream]) -> Result<(), ApiError> {
    let wrong = |text: String| ApiError::new(Code::InvalidValue, text).param("ended");
    if ended.len() > MOST_UNREAD {
        return Err(wrong(format!("{} ends at once are more than {MOST_UNREAD}", ended.len())));
    }
    for end in ended {
        let id = StreamId::parse(&end.id).ok_or_else(|| wrong(format!("{:?} is no stream's id", end.id)))?;
        let record = front.control.stream(id);
        let is_its =
            |record: StreamRecord| record.holder == Holder::Agent(worker.record.ix) && record.ended.is_none();
        if record.is_some_and(is_its) {
            let (attempt, how, keep_ms) = (end.attempt, end.how.into(), end.keep_ms.min(MOST_KEPT_MS));
            let told =
                front.control.propose_cache_unhurried(CacheCommand::EndStream { id, attempt, how, keep_ms });
            // Without an answer it is applied later, or the stream is forgotten in time.
            tokio::spawn(told);
        }
    }
    Ok(())
}

fn note_running(
    front: &Arc<Front>,
    worker: &Arc<WorkerView>,
    running: &[RunningOnRank],
) -> Result<(), ApiError> {
    let wrong = |text: String| Err(ApiError::new(Code::InvalidValue, text).param("running"));
    let ranks = worker.dp_ranks();
    for (at, said) in running.iter().enumerate() {
        if said.rank >= ranks || running[..at].iter().any(|other| other.rank == said.rank) {
            return wrong(format!("rank {} is named twice, or is none of the worker's {ranks}", said.rank));
        }
        if said.requests > RunningOnRank::MOST_REQUESTS {
            return wrong(format!(
                "{} requests are more than {}",
                said.requests,
                RunningOnRank::MOST_REQUESTS
            ));
        }
    }
    let believed: Duration = front.config.nodes.heartbeat_interval * BELIEVED;
    front.announced.set(front, worker, running, Instant::now() + believed);
    if !running.is_empty() {
        let front = Arc::downgrade(front);
        // Ends by itself: there are no more of these than heartbeats within that time.
        tokio::spawn(async move {
            tokio::time::sleep(believed).await;
            if let Some(front) = front.upgrade() {
                front.announced.sweep();
            }
        });
    }
    Ok(())
}
