//! Requests that wait because all workers that might serve them are saturated.
//!
//! First come, first served for each model. A place is handed on when a request of this replica
//! ends; what other replicas' requests free is noticed within [`LOOK_AGAIN`].

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::routing::book::Booking;
use crate::state::worker::ServedModel;

/// Bounds on waiting.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// Most requests that wait at this replica: 1,024.
    pub most: usize,
    /// Longest wait of each: 30 s.
    pub patience: Duration,
}

impl Default for QueueOptions {
    fn default() -> Self {
        Self { most: 1024, patience: Duration::from_secs(30) }
    }
}

/// How often a waiting request looks by itself whether there is room.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Those who wait for one model.
#[derive(Debug, Default)]
struct Line {
    notify: Notify,
    length: AtomicUsize,
}

/// All who wait at this replica.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: AtomicUsize,
    /// `None` is the line of requests that name no model.
    lines: Mutex<HashMap<Option<String>, Arc<Line>>>,
}

impl Queue {
    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Whether somebody waits for this model already.
    pub(super) fn has_line(&self, model: Option<&str>) -> bool {
        self.waiting() > 0
            && self
                .lines
                .lock()
                .get(&model.map(str::to_owned))
                .is_some_and(|line| line.length.load(Ordering::Relaxed) > 0)
    }

    /// Stands in line; `None` when there are too many already.
    pub(super) fn enter(self: &Arc<Self>, model: Option<&str>, options: &QueueOptions) -> Option<Place> {
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= options.most {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        let model = model.map(str::to_owned);
        let line = Arc::clone(self.lines.lock().entry(model.clone()).or_default());
        line.length.fetch_add(1, Ordering::AcqRel);
        Some(Place { queue: Arc::clone(self), model, line })
    }

    /// A request on a worker that serves these has ended.
    fn freed(&self, models: &[ServedModel]) {
        let lines = self.lines.lock();
        for model in models {
            if let Some(line) = lines.get(&Some(model.name.clone())) {
                line.notify.notify_one();
            }
        }
        if let Some(line) = lines.get(&None) {
            line.notify.notify_one();
        }
    }
}

/// A place in a line; left when dropped.
#[derive(Debug)]
pub(super) struct Place {
    queue: Arc<Queue>,
    model: Option<String>,
    line: Arc<Line>,
}

impl Place {
    /// Waits until there may be room.
    pub(super) async fn wait(&self) {
        // An early look does no harm.
        let _ = tokio::time::timeout(LOOK_AGAIN, self.line.notify.notified()).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.queue.waiting.fetch_sub(1, Ordering::AcqRel);
        if self.line.length.fetch_sub(1, Ordering::AcqRel) == 1 {
            let mut lines = self.queue.lines.lock();
            // Somebody may have come since; then the line stays.
            if lines.get(&self.model).is_some_and(|line| line.length.load(Ordering::Acquire) == 0) {
                lines.remove(&self.model);
            }
        }
    }
}

/// A booking whose end lets the next one in line go on.
#[derive(Debug)]
pub(super) struct Held {
    /// There until the drop.
    booking: Option<Booking>,
    queue: Arc<Queue>,
}

impl Held {
    pub(super) fn new(booking: Booking, queue: &Arc<Queue>) -> Self {
        Self { booking: Some(booking), queue: Arc::clone(queue) }
    }

    /// The first output arrived.
    pub(super) fn prefill_done(&mut self) {
        if let Some(booking) = &mut self.booking {
            booking.prefill_done();
        }
    }

    /// The worker's id, for messages.
    pub(super) fn worker(&self) -> Option<&crate::ids::WorkerId> {
        self.booking.as_ref().map(|booking| booking.worker().id())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(booking) = self.booking.take() else { return };
        if self.queue.waiting() == 0 {
            return;
        }
        // The load must be off the worker before anybody looks.
        let worker = Arc::clone(booking.worker());
        drop(booking);
        self.queue.freed(&worker.record.spec.models);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_bounded_and_vanish_when_nobody_waits() {
        let queue = Arc::<Queue>::default();
        let options = QueueOptions { most: 2, ..QueueOptions::default() };
        let one = queue.enter(Some("m"), &options).unwrap();
        let two = queue.enter(None, &options).unwrap();
        assert!(queue.enter(Some("m"), &options).is_none());
        assert!(queue.has_line(Some("m")) && queue.has_line(None) && !queue.has_line(Some("other")));
        drop(one);
        assert!(!queue.has_line(Some("m")) && queue.waiting() == 1);
        drop(two);
        assert!(queue.lines.lock().is_empty() && queue.waiting() == 0);
    }

    #[tokio::test]
    async fn the_first_in_line_is_woken_first() {
        let queue = Arc::<Queue>::default();
        let options = QueueOptions::default();
        let (first, second) = (queue.enter(Some("m"), &options), queue.enter(Some("m"), &options));
        let (first, second) = (first.unwrap(), second.unwrap());
        let mut one = std::pin::pin!(first.line.notify.notified());
        let mut two = std::pin::pin!(second.line.notify.notified());
        assert!(futures_util::poll!(one.as_mut()).is_pending());
        assert!(futures_util::poll!(two.as_mut()).is_pending());
        let model = ServedModel { name: "m".into(), lora_of: None, max_model_len: None };
        queue.freed(&[model]);
        assert!(futures_util::poll!(one.as_mut()).is_ready());
        assert!(futures_util::poll!(two.as_mut()).is_pending());
    }
}
