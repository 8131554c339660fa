//! What a process had of streams that others have taken from it while it lives: whoever takes one has lost
//! sight of this process, or it is leaving, and asks for it a moment later.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::copy::{Copy, Role};
use super::hub::log_of;
use crate::ids::StreamId;
use crate::state::streams::StreamEnd;

/// How long it is kept: whoever asks does so at once, and again after a lost holder or two.
const KEPT: Duration = Duration::from_secs(3);
/// Most streams that it is kept of. Their events are shared with those that were let go of this moment.
const MOST: usize = 16_384;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Pasts(Mutex<HashMap<StreamId, (Instant, Arc<Copy>)>>);

impl Pasts {
    /// Keeps what there is of a stream of which somebody else begins `attempt`: nothing is added to its copy any
    /// more. Nothing is kept where too much of it was forgotten, or where it has failed here: that is nothing
    /// that the attempt begins behind.
    pub(super) fn keep(&self, copy: &Copy, attempt: u32) {
        // First, so that nobody reads what is not kept.
        copy.seal(attempt);
        if copy.summary().ended.is_some_and(|how| how != StreamEnd::Complete) {
            return;
        }
        let Some(had) = copy.past() else { return };
        let (order, bound) = (Arc::clone(&copy.order), copy.bound());
        let kept = Copy::new(copy.id, order, Role::Mirror, copy.attempt(), log_of(had), bound);
        kept.set_head_if_any(copy.head());
        kept.seal(attempt);
        let mut all = self.0.lock();
        if all.len() < MOST || all.contains_key(&copy.id) {
            all.insert(copy.id, (Instant::now(), kept));
        }
    }

    /// What was kept of a stream before `attempt`.
    pub(super) fn of(&self, id: StreamId, attempt: u32) -> Option<Arc<Copy>> {
        let all = self.0.lock();
        all.get(&id).map(|(_, copy)| Arc::clone(copy)).filter(|copy| copy.attempt() < attempt)
    }

    /// Lets go of what nobody asks for any more.
    pub(super) fn forget_old(&self, now: Instant) {
        self.0.lock().retain(|_, (since, _)| now.saturating_duration_since(*since) < KEPT);
    }
}
