//! Whose a stream is. What is somebody else's is not there: the answer is the same, and takes as
//! long.
//!
//! **Guessing.** An id has 130 random bits, so guessing finds nothing; what is left to prevent is that
//! it costs anything. An id that is not known here as the caller's own takes a place under
//! `streams.guesses_per_s`, one meter for each key, before the cluster is asked, or, at an edge, a
//! replica; and all who wait for the cluster share its answer ([`crate::relay::directory`]). Nothing
//! is remembered of a guess. Who finds their own by it has the place back.

use std::sync::Arc;

use crate::http::errors::{ApiError, Code};
use crate::http::front::Shard;
use crate::http::keys::Caller;
use crate::http::throttle::{Meter, Rate};
use crate::ids::StreamId;
use crate::relay::counts::Resumed;
use crate::relay::hub::Relays;
use crate::relay::secret;
use crate::state::streams::StreamRecord;

/// Lets pass whose stream it is. The record, if it is known.
pub(super) async fn owned(
    shard: &Shard,
    relays: &Arc<Relays>,
    id: StreamId,
    caller: &Caller,
) -> Result<Option<StreamRecord>, ApiError> {
    let principal = secret::principal(caller.key_id());
    let is_own = |record: &Option<StreamRecord>| {
        record.as_ref().is_some_and(|record| secret::same(&record.principal, &principal))
    };
    let here = relays.get(id).filter(|entry| !entry.is_purged());
    let is_own_here = here.is_some_and(|entry| secret::same(&entry.copy.order.principal, &principal));
    let mut guess = None;
    let record = if relays.directory.is_elsewhere() && !is_own_here {
        // Closed never; without a place it would be asked all the same.
        let _place = shard.front.looking.acquire().await;
        guess = Some(Guess::take(shard, caller)?);
        relays.directory.find(id).await
    } else {
        relays.directory.find(id).await
    };
    // Both are compared, whether they are there or not.
    if is_own_here | is_own(&record) {
        guess.inspect(Guess::was_none);
        return Ok(record);
    }
    let guess = match guess {
        Some(guess) => guess,
        None => Guess::take(shard, caller)?,
    };
    let found = relays.whereabouts(id).await.map_err(|_| unavailable())?;
    if is_own(&found) {
        guess.was_none();
        return Ok(found);
    }
    relays.counts.resumed(Resumed::NotFound);
    Err(not_found())
}

/// A place under the limit of guesses.
struct Guess<'a> {
    rate: &'a Rate,
    meter: &'a Meter,
}

impl<'a> Guess<'a> {
    fn take(shard: &'a Shard, caller: &'a Caller) -> Result<Self, ApiError> {
        let front = &shard.front;
        let (rate, meter) = (&front.config.streams.guesses, caller.guesses().unwrap_or(&front.guesses));
        let now = front.started.elapsed().as_nanos() as u64;
        match rate.take(meter, now) {
            Ok(()) => Ok(Self { rate, meter }),
            Err(excess) => {
                let text = "too many streams were asked for that are none of this key's; wait, and ask for those \
                            that are";
                let wait = excess.wait.as_secs_f64().ceil().max(1.0);
                Err(ApiError::new(Code::RateLimitExceeded, text).retry_after(wait as u32))
            }
        }
    }

    /// It was the caller's own.
    fn was_none(&self) {
        self.rate.give_back(self.meter);
    }
}

pub(super) fn not_found() -> ApiError {
    let text = "there is no stream of this id; it was never begun with this key, or is forgotten";
    ApiError::new(Code::StreamNotFound, text).no_retry()
}

pub(super) fn unavailable() -> ApiError {
    let text = "no quorum of replicas answered, so this stream cannot be looked up now; try again";
    ApiError::new(Code::ClusterUnavailable, text).retry_after(1)
}
