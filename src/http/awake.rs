//! A lane that is asked something every few tens of microseconds stays awake.
//!
//! Going to sleep and being woken costs a processor 10 to 30 µs, several times what a request
//! costs. While events follow each other faster than that, but not so fast that the lane has no
//! time to sleep anyway, it looks for the next one again and again instead of sleeping. A lane
//! whose clients or workers take longer (every real model does) never does so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Events that follow each other faster keep a lane awake by themselves.
const BUSY: Duration = Duration::from_micros(15);

/// Most that one gap adds to the mean: after a pause it takes some quick events to begin anew.
const PAUSE: Duration = Duration::from_millis(2);

/// How many lanes may look at once: half of the processors, so that whom they wait for has one.
#[derive(Debug)]
pub struct Lookouts {
    free: AtomicUsize,
}

impl Default for Lookouts {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self { free: AtomicUsize::new(processors / 2) }
    }
}

impl Lookouts {
    fn take(&self) -> Option<Lookout<'_>> {
        let less = |free: usize| free.checked_sub(1);
        self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok().map(|_| Lookout(self))
    }
}

/// Given back when dropped.
struct Lookout<'a>(&'a Lookouts);

impl Drop for Lookout<'_> {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, Ordering::Relaxed);
    }
}

/// Watches the pace of one lane's events.
#[derive(Debug)]
pub struct Awake {
    /// How long it is worth looking for the next event; zero never looks.
    limit: Duration,
    started: Instant,
    last_ns: AtomicU64,
    /// Mean gap between events, weighted towards the last eight.
    gap_ns: AtomicU64,
    look: Notify,
    lookouts: Arc<Lookouts>,
}

impl Awake {
    /// For gaps of up to `limit`; zero switches it off.
    pub fn new(limit: Duration, lookouts: Arc<Lookouts>) -> Self {
        let pause = PAUSE.as_nanos() as u64;
        Self {
            limit,
            started: Instant::now(),
            last_ns: AtomicU64::default(),
            gap_ns: pause.into(),
            look: Notify::new(),
            lookouts,
        }
    }

    /// Something happened: a request came, or a worker began to answer.
    pub fn stir(&self) {
        if !self.limit.is_zero() && self.note(self.started.elapsed()) {
            self.look.notify_one();
        }
    }

    /// Notes an event; whether the next one is worth waiting for. The lane is the only writer.
    fn note(&self, now: Duration) -> bool {
        let now = now.as_nanos() as u64;
        let gap = now.saturating_sub(self.last_ns.swap(now, Ordering::Relaxed));
        let mean = self.gap_ns.load(Ordering::Relaxed);
        let mean = mean - mean / 8 + gap.min(PAUSE.as_nanos() as u64) / 8;
        self.gap_ns.store(mean, Ordering::Relaxed);
        (BUSY.as_nanos() as u64..=self.limit.as_nanos() as u64).contains(&mean)
    }

    /// Runs on the lane for as long as it lives: keeps it from sleeping while that is worth it.
    pub async fn keep(&self) {
        loop {
            self.look.notified().await;
            let Some(_lookout) = self.lookouts.take() else { continue };
            let (seen, since) = (self.last_ns.load(Ordering::Relaxed), Instant::now());
            while self.last_ns.load(Ordering::Relaxed) == seen && since.elapsed() < self.limit {
                // The runtime asks the kernel for events, without waiting for them.
                tokio::task::yield_now().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn awake(limit: Duration) -> Awake {
        Awake::new(limit, Arc::default())
    }

    fn paced(awake: &Awake, from: Duration, gap: Duration, events: u32) -> bool {
        let paced: Vec<bool> = (1..=events).map(|n| awake.note(from + gap * n)).collect();
        *paced.last().expect("at least one event")
    }

    #[test]
    fn only_a_pace_between_busy_and_slow_keeps_a_lane_awake() {
        let micros = Duration::from_micros;
        let limit = micros(60);
        assert!(paced(&awake(limit), Duration::ZERO, micros(40), 64));
        assert!(!paced(&awake(limit), Duration::ZERO, micros(5), 200), "busy anyway");
        assert!(!paced(&awake(limit), Duration::ZERO, micros(200), 64), "not worth it");
        assert!(!paced(&awake(Duration::ZERO), Duration::ZERO, micros(40), 64), "switched off");
    }

    #[test]
    fn one_pause_puts_it_to_sleep_until_the_pace_is_back() {
        let micros = Duration::from_micros;
        let awake = awake(micros(60));
        assert!(paced(&awake, Duration::ZERO, micros(40), 64));
        let later = Duration::from_secs(1);
        assert!(!awake.note(later));
        assert!(!paced(&awake, later, micros(40), 4));
        assert!(paced(&awake, later + micros(160), micros(40), 32));
    }
}
