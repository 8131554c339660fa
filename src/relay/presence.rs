//! Whether this process was away itself: stopped, or without a processor. What it then finds broken or
//! silent may be so because others had given *it* up, and what it has is old.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Who looks at the clock every 100 ms and misses that for so long was away.
const GAP: Duration = Duration::from_millis(750);
/// How long it takes a process that is back to find its place again, on a machine that is busy with that.
const LATELY: Duration = Duration::from_secs(3);

/// Watches this process's own clock.
#[derive(Debug, Default)]
pub(super) struct Presence(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    last: Option<Instant>,
    back: Option<Instant>,
}

impl Presence {
    /// To be called often.
    pub(super) fn tick(&self, now: Instant) {
        let mut seen = self.0.lock();
        if seen.is_away(now) {
            seen.back = Some(now);
        }
        seen.last = Some(now);
    }

    /// Whether it was away a moment ago. Until the first tick nobody knows of any absence.
    pub(super) fn was_away_lately(&self, now: Instant) -> bool {
        let seen = self.0.lock();
        seen.is_away(now) || seen.back.is_some_and(|back| now.saturating_duration_since(back) < LATELY)
    }
}

impl Seen {
    fn is_away(&self, now: Instant) -> bool {
        self.last.is_some_and(|last| now.saturating_duration_since(last) > GAP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_missed_its_ticks_was_away_at_once_and_for_a_while() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let presence = Presence::default();
        assert!(!presence.was_away_lately(start));
        presence.tick(start);
        presence.tick(start + ms(700));
        assert!(!presence.was_away_lately(start + ms(1400)));
        assert!(presence.was_away_lately(start + ms(1500)), "before the next tick");
        presence.tick(start + ms(1500));
        for late in (100..=4000).step_by(100) {
            let now = start + ms(1500 + late);
            presence.tick(now);
            assert_eq!(presence.was_away_lately(now), late < 3000, "{late} ms later");
        }
    }
}
