//! Requests that wait because all workers that might serve them are saturated.
//!
//! First come, first served for each model: only who is first in line looks for room, and whoever
//! leaves the line wakes the next. A place is handed on when a request of this replica ends; what
//! other replicas' requests free is noticed within [`LOOK_AGAIN`].

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::routing::book::Booking;
use crate::routing::recent::Awaited;
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

/// How often the first in line looks by itself whether there is room.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Those who wait for one model, in the order they came, and how to wake each.
type Line = BTreeMap<u64, Arc<Notify>>;

/// All who wait at this replica.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: AtomicUsize,
    /// Numbers those who come.
    came: AtomicU64,
    /// `None` is the line of requests that name no model. No line is empty.
    lines: Mutex<HashMap<Option<String>, Line>>,
}

impl Queue {
    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Whether somebody waits for this model already.
    pub(super) fn has_line(&self, model: Option<&str>) -> bool {
        self.waiting() > 0 && self.lines.lock().contains_key(&model.map(str::to_owned))
    }

    /// Stands in line; `None` when there are too many already.
    pub(super) fn enter(self: &Arc<Self>, model: Option<&str>, options: &QueueOptions) -> Option<Place> {
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= options.most {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        let model = model.map(str::to_owned);
        let turn = Arc::<Notify>::default();
        let mut lines = self.lines.lock();
        // Numbered under the lock: the order of numbers is that of coming.
        let number = self.came.fetch_add(1, Ordering::Relaxed);
        lines.entry(model.clone()).or_default().insert(number, Arc::clone(&turn));
        drop(lines);
        Some(Place { queue: Arc::clone(self), model, number, turn })
    }

    /// A request on a worker that serves these has ended.
    fn freed(&self, models: &[ServedModel]) {
        let lines = self.lines.lock();
        let names = models.iter().map(|model| Some(model.name.clone())).chain([None]);
        for (_, first) in names.filter_map(|name| lines.get(&name)?.first_key_value()) {
            first.notify_one();
        }
    }
}

/// A place in a line; left when dropped.
#[derive(Debug)]
pub(super) struct Place {
    queue: Arc<Queue>,
    model: Option<String>,
    number: u64,
    turn: Arc<Notify>,
}

impl Place {
    /// Waits until there may be room, or it is `until`.
    pub(super) async fn wait(&self, until: Instant) {
        let until = if self.is_first() { until.min(Instant::now() + LOOK_AGAIN) } else { until };
        // An early look does no harm. Who becomes first meanwhile is woken by who leaves.
        let _ = timeout_at(until, self.turn.notified()).await;
    }

    fn is_first(&self) -> bool {
        let lines = self.queue.lines.lock();
        let first = lines.get(&self.model).and_then(Line::first_key_value);
        first.is_none_or(|(number, _)| *number == self.number)
    }

    /// Lets the next one look: there is no room for this request, but there may be for one that
    /// was not tried anywhere yet.
    pub(super) fn pass_on(&self) {
        wake_after(self.queue.lines.lock().get(&self.model), self.number);
    }
}

fn wake_after(line: Option<&Line>, number: u64) {
    if let Some((_, next)) = line.and_then(|line| line.range(number + 1..).next()) {
        next.notify_one();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.queue.waiting.fetch_sub(1, Ordering::AcqRel);
        let mut lines = self.queue.lines.lock();
        let Some(line) = lines.get_mut(&self.model) else { return };
        line.remove(&self.number);
        // There may be room for more than one, or a wake-up that this one did not live to use.
        wake_after(Some(line), self.number);
        if line.is_empty() {
            lines.remove(&self.model);
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

    /// A piece of the answer arrived.
    pub(super) fn heard(&mut self) {
        if let Some(booking) = &mut self.booking {
            booking.heard();
        }
    }

    /// Keeps what is expected of the request's prompt until the first output, or its end.
    pub(super) fn awaits(&mut self, awaited: Option<Awaited>) {
        if let Some(booking) = &mut self.booking {
            booking.awaits(awaited);
        }
    }

    /// The first output arrived.
    pub(super) fn prefill_done(&mut self) {
        if let Some(booking) = &mut self.booking {
            booking.prefill_done();
        }
    }

    /// The output has filled so many blocks more.
    pub(super) fn grow(&mut self, blocks: u32) {
        if let Some(booking) = &mut self.booking {
            booking.grow(blocks);
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

    fn freed(queue: &Arc<Queue>) {
        let model = ServedModel { name: "m".into(), lora_of: None, max_model_len: None };
        queue.freed(&[model]);
    }

    /// Whether somebody is woken at once.
    async fn is_woken(place: &Place) -> bool {
        let waited = place.turn.notified();
        tokio::time::timeout(Duration::from_millis(1), waited).await.is_ok()
    }

    #[tokio::test]
    async fn places_go_to_the_first_in_line_and_whoever_leaves_wakes_the_next() {
        let queue = Arc::<Queue>::default();
        let options = QueueOptions::default();
        let [first, second, third] = [(); 3].map(|()| queue.enter(Some("m"), &options).unwrap());
        freed(&queue);
        freed(&queue);
        assert!(is_woken(&first).await && !is_woken(&second).await);
        // It found room and goes; that there was room for two is for the next to see.
        drop(first);
        assert!(is_woken(&second).await && !is_woken(&third).await);
        // It found none where it may go, but was tried elsewhere before.
        second.pass_on();
        assert!(is_woken(&third).await && !is_woken(&second).await);
        // Woken and gone before it could look.
        freed(&queue);
        drop(second);
        assert!(is_woken(&third).await);
        third.pass_on();
        assert!(!is_woken(&third).await);
    }

    #[tokio::test]
    async fn only_the_first_in_line_looks_by_itself() {
        let queue = Arc::<Queue>::default();
        let options = QueueOptions::default();
        let [first, second] = [(); 2].map(|()| queue.enter(Some("m"), &options).unwrap());
        let began = Instant::now();
        let until = began + LOOK_AGAIN * 4;
        second.wait(until).await;
        assert!(began.elapsed() >= LOOK_AGAIN * 4, "others would only push in");
        // Far enough that a machine under load is no reason to reach it.
        let began = Instant::now();
        first.wait(began + Duration::from_secs(60)).await;
        assert!(began.elapsed() < Duration::from_secs(30));
        first.wait(began).await;
    }
}
