//! Signs of life on a link: each end sends them, and misses those of the other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::PING_EVERY;
use super::outbox::Outbox;

/// When something was last heard of the other end.
pub(super) struct Signs {
    started: Instant,
    /// In milliseconds since the start.
    heard: AtomicU64,
}

impl Signs {
    /// From now on.
    pub(super) fn new() -> Self {
        Self { started: Instant::now(), heard: AtomicU64::new(0) }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Something was heard.
    pub(super) fn heard(&self) {
        self.heard.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Sends signs of life for as long as the link is open, and until nothing was heard for `silence`.
    pub(super) async fn exchange(&self, outbox: &Outbox, silence: Duration, is_open: impl Fn() -> bool) {
        let mut last = Instant::now();
        loop {
            tokio::time::sleep(PING_EVERY).await;
            if !is_open() {
                return;
            }
            outbox.ping();
            // Whoever was stopped itself cannot have heard anything.
            let was_away = last.elapsed() > PING_EVERY * 3;
            last = Instant::now();
            if was_away {
                self.heard();
            }
            let silent = self.now_ms().saturating_sub(self.heard.load(Ordering::Relaxed));
            if silent > silence.as_millis() as u64 {
                tracing::debug!(silent, "the other end of a stream link is silent");
                return;
            }
        }
    }
}
