//! A rate limit without a lock: GCRA, the virtual form of a token bucket, in one atomic number.
//! Pure: time is handed in as nanoseconds since any fixed moment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// So many requests a second, with bursts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    /// Nanoseconds that one request costs.
    interval: u64,
    /// Requests that may come at once.
    burst: u32,
}

/// When the bucket of a [`Rate`] will be full again; starts full.
#[derive(Debug, Default)]
pub(super) struct Meter(AtomicU64);

/// A request too many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Excess {
    /// Until one more request fits.
    pub(super) wait: Duration,
    /// Until a whole burst fits.
    pub(super) reset: Duration,
}

impl Rate {
    /// `per_second` is held to between one in eleven days and a billion a second, `burst` to at
    /// least 1.
    pub fn new(per_second: f64, burst: u32) -> Self {
        let interval = (1e9 / per_second.clamp(1e-6, 1e9)).round() as u64;
        Self { interval: interval.max(1), burst: burst.max(1) }
    }

    /// Requests that may come at once.
    pub fn burst(&self) -> u32 {
        self.burst
    }

    /// Puts a request's worth back that was taken, and need not have been.
    pub(super) fn give_back(&self, meter: &Meter) {
        meter.0.fetch_sub(self.interval, Ordering::Relaxed);
    }

    /// Takes a request's worth out of the bucket, or says how long to wait.
    pub(super) fn take(&self, meter: &Meter, now: u64) -> Result<(), Excess> {
        let room = self.interval.saturating_mul(u64::from(self.burst));
        let mut full_at = meter.0.load(Ordering::Relaxed);
        loop {
            let next = full_at.max(now).saturating_add(self.interval);
            let filled = next - now;
            if filled > room {
                return Err(Excess {
                    wait: Duration::from_nanos(filled - room),
                    reset: Duration::from_nanos(full_at.saturating_sub(now)),
                });
            }
            // Relaxed is enough: the number stands for itself, nothing is published with it.
            match meter.0.compare_exchange_weak(full_at, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Ok(()),
                Err(seen) => full_at = seen,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use proptest::prelude::*;

    use super::*;

    /// A bucket that is filled as time passes and emptied by requests, in nanoseconds of credit.
    struct Bucket {
        rate: Rate,
        credit: u64,
        at: u64,
    }

    impl Bucket {
        fn take(&mut self, now: u64) -> bool {
            let room = self.rate.interval * u64::from(self.rate.burst);
            self.credit = room.min(self.credit + (now - self.at));
            self.at = now;
            let fits = self.credit >= self.rate.interval;
            if fits {
                self.credit -= self.rate.interval;
            }
            fits
        }
    }

    proptest! {
        #[test]
        fn it_decides_like_a_token_bucket(
            per_second in 1u32..5000,
            burst in 1u32..20,
            pauses in proptest::collection::vec(0u64..3_000_000, 1..300),
        ) {
            let rate = Rate::new(f64::from(per_second), burst);
            let mut bucket = Bucket { rate, credit: rate.interval * u64::from(burst), at: 0 };
            let meter = Meter::default();
            let mut now = 0;
            for pause in pauses {
                now += pause;
                let taken = rate.take(&meter, now);
                prop_assert_eq!(taken.is_ok(), bucket.take(now));
                if let Err(excess) = taken {
                    // Waiting that long, and no less, helps.
                    let wait = excess.wait.as_nanos() as u64;
                    prop_assert!(rate.take(&Meter(AtomicU64::new(meter.0.load(Ordering::Relaxed))), now + wait - 1).is_err());
                    prop_assert!(rate.take(&Meter(AtomicU64::new(meter.0.load(Ordering::Relaxed))), now + wait).is_ok());
                    prop_assert!(excess.reset <= Duration::from_nanos(rate.interval * u64::from(burst)));
                }
            }
        }
    }

    #[test]
    fn what_is_given_back_can_be_taken_again_and_nothing_more() {
        let rate = Rate::new(0.001, 3);
        let meter = Meter::default();
        for _ in 0..100 {
            assert!(rate.take(&meter, 5).is_ok());
            rate.give_back(&meter);
        }
        let taken = (0..10).filter(|_| rate.take(&meter, 6).is_ok()).count();
        assert_eq!(taken, 3);
    }

    #[test]
    fn threads_share_one_burst_exactly() {
        let rate = Rate::new(0.001, 1000);
        let (meter, granted) = (Meter::default(), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        if rate.take(&meter, 5).is_ok() {
                            granted.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(granted.into_inner(), 1000);
    }

    #[test]
    fn extreme_rates_do_not_overflow() {
        for (per_second, burst) in [(0.0, u32::MAX), (f64::INFINITY, 0), (f64::NAN, 1), (1e-300, 7)] {
            let rate = Rate::new(per_second, burst);
            let meter = Meter::default();
            for now in [0, 1, u64::MAX / 2, u64::MAX - 1] {
                let _ = rate.take(&meter, now);
            }
            assert!(rate.burst() >= 1);
        }
    }
}
