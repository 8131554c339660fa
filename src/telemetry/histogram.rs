//! Histograms that are nearly free to observe: fixed bounds, one atomic addition for the bucket
//! and one for the sum, no lock. A stream of many observations gathers them in a [`Local`] and
//! merges it now and then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{MetricEncoder, NoLabelSet};

/// Most bounds of a scale, so that a [`Local`] has a fixed size.
pub const MOST_BOUNDS: usize = 23;

/// The buckets of a histogram. Values are whole ticks; what is exported is in units.
#[derive(Debug, PartialEq, Eq)]
pub struct Scale {
    /// Upper bounds in ticks, ascending, at most [`MOST_BOUNDS`]; a last bucket without a bound
    /// follows.
    pub bounds: &'static [u64],
    /// Ticks in the exported unit.
    pub ticks_per_unit: u64,
}

/// Ticks of a microsecond: a sum of 64 bits lasts for ten thousand streams and sixty years.
pub const MICROS: u64 = 1_000_000;

/// Whole answers: 1 ms to 30 min.
pub static ANSWER: Scale = Scale {
    bounds: &[
        1_000,
        2_500,
        5_000,
        10_000,
        25_000,
        50_000,
        100_000,
        250_000,
        500_000,
        1_000_000,
        2_500_000,
        5_000_000,
        10_000_000,
        30_000_000,
        60_000_000,
        120_000_000,
        300_000_000,
        600_000_000,
        1_800_000_000,
    ],
    ticks_per_unit: MICROS,
};

/// Times to a first token: 1 ms to 160 s, close around what people agree on (100 ms to 2 s).
pub static FIRST_TOKEN: Scale = Scale {
    bounds: &[
        1_000,
        5_000,
        10_000,
        20_000,
        40_000,
        60_000,
        80_000,
        100_000,
        150_000,
        250_000,
        500_000,
        750_000,
        1_000_000,
        1_500_000,
        2_500_000,
        5_000_000,
        7_500_000,
        10_000_000,
        20_000_000,
        40_000_000,
        80_000_000,
        160_000_000,
    ],
    ticks_per_unit: MICROS,
};

/// Times between tokens: 1 ms to 5 s, close around 10 to 100 ms.
pub static BETWEEN_TOKENS: Scale = Scale {
    bounds: &[
        1_000, 2_500, 5_000, 7_500, 10_000, 15_000, 20_000, 25_000, 30_000, 40_000, 50_000, 75_000, 100_000,
        150_000, 200_000, 300_000, 500_000, 750_000, 1_000_000, 2_500_000, 5_000_000,
    ],
    ticks_per_unit: MICROS,
};

/// The router's own time, in nanoseconds: 5 us to 1 s.
pub static OVERHEAD: Scale = Scale {
    bounds: &[
        5_000,
        10_000,
        20_000,
        30_000,
        50_000,
        75_000,
        100_000,
        150_000,
        250_000,
        500_000,
        1_000_000,
        2_500_000,
        5_000_000,
        10_000_000,
        50_000_000,
        100_000_000,
        1_000_000_000,
    ],
    ticks_per_unit: 1_000_000_000,
};

/// A consensus round or a piece of disk work: 100 us to 30 s.
pub static ROUND: Scale = Scale {
    bounds: &[
        100, 250, 500, 1_000, 2_000, 3_000, 5_000, 7_500, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
        1_000_000, 3_000_000, 10_000_000, 30_000_000,
    ],
    ticks_per_unit: MICROS,
};

/// How many: 1 to 16,384.
pub static COUNT: Scale =
    Scale { bounds: &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16_384], ticks_per_unit: 1 };

/// Tokens of prompts: none to 131,072.
pub static TOKENS: Scale = Scale {
    bounds: &[0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072],
    ticks_per_unit: 1,
};

/// Bytes: 64 B to 4 MiB.
pub static BYTES: Scale = Scale {
    bounds: &[
        64,
        128,
        256,
        512,
        1 << 10,
        2 << 10,
        4 << 10,
        8 << 10,
        16 << 10,
        32 << 10,
        64 << 10,
        128 << 10,
        256 << 10,
        1 << 20,
        4 << 20,
    ],
    ticks_per_unit: 1,
};

impl Scale {
    /// The bucket of a value.
    fn bucket(&self, ticks: u64) -> usize {
        self.bounds.partition_point(|bound| *bound < ticks)
    }

    /// A duration in ticks, for scales whose unit is a second.
    fn ticks(&self, time: Duration) -> u64 {
        let ticks = time.as_nanos() * u128::from(self.ticks_per_unit) / 1_000_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    fn units(&self, ticks: u64) -> f64 {
        ticks as f64 / self.ticks_per_unit as f64
    }
}

/// A histogram that any thread may observe at any time.
#[derive(Debug)]
pub struct Histogram {
    scale: &'static Scale,
    /// One more than bounds, the last for what is above all of them.
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    /// An empty one.
    pub fn new(scale: &'static Scale) -> Self {
        debug_assert!(scale.bounds.len() <= MOST_BOUNDS && scale.bounds.is_sorted());
        let counts = (0..=scale.bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { scale, counts, sum: AtomicU64::new(0) }
    }

    /// Counts a value in ticks.
    pub fn observe(&self, ticks: u64) {
        self.counts[self.scale.bucket(ticks)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(ticks, Ordering::Relaxed);
    }

    /// Counts a duration.
    pub fn observe_time(&self, time: Duration) {
        self.observe(self.scale.ticks(time));
    }

    /// Adds what was gathered and empties it.
    pub fn merge(&self, local: &mut Local) {
        debug_assert!(std::ptr::eq(self.scale, local.scale));
        for (mine, theirs) in self.counts.iter().zip(&mut local.counts) {
            if *theirs > 0 {
                mine.fetch_add(u64::from(std::mem::take(theirs)), Ordering::Relaxed);
            }
        }
        self.sum.fetch_add(std::mem::take(&mut local.sum), Ordering::Relaxed);
    }

    /// What has been counted so far. Counts and sum may be of different moments, by as much as
    /// is being observed meanwhile.
    pub fn snapshot(&self) -> Snapshot {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        Snapshot { scale: self.scale, counts, sum: self.sum.load(Ordering::Relaxed) }
    }
}

/// Observations of one owner, not yet in the histogram of all.
#[derive(Debug)]
pub struct Local {
    scale: &'static Scale,
    counts: [u32; MOST_BOUNDS + 1],
    sum: u64,
}

impl Local {
    /// Empty.
    pub fn new(scale: &'static Scale) -> Self {
        Self { scale, counts: [0; MOST_BOUNDS + 1], sum: 0 }
    }

    /// Counts a duration.
    pub fn observe_time(&mut self, time: Duration) {
        let ticks = self.scale.ticks(time);
        // An owner that never merges would stay at the most; see `merge`.
        let count = &mut self.counts[self.scale.bucket(ticks)];
        *count = count.saturating_add(1);
        self.sum = self.sum.saturating_add(ticks);
    }
}

/// A histogram at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    scale: &'static Scale,
    counts: Vec<u64>,
    sum: u64,
}

impl Snapshot {
    /// From counts that were kept elsewhere, one more than the scale has bounds.
    pub fn from_parts(scale: &'static Scale, counts: &[u64], sum: u64) -> Self {
        let mut counts = counts.to_vec();
        counts.resize(scale.bounds.len() + 1, 0);
        Self { scale, counts, sum }
    }

    /// How many values were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their sum, in units.
    pub fn sum(&self) -> f64 {
        self.scale.units(self.sum)
    }

    /// Writes it down as a metric.
    pub fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        let bounds = self.scale.bounds.iter().map(|ticks| self.scale.units(*ticks)).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(self.counts.iter().copied()).collect();
        encoder.encode_histogram::<NoLabelSet>(self.sum(), self.count(), &buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    static SCALES: [&Scale; 7] = [&ANSWER, &FIRST_TOKEN, &BETWEEN_TOKENS, &OVERHEAD, &ROUND, &COUNT, &BYTES];

    #[test]
    fn scales_ascend_and_fit() {
        for scale in SCALES {
            assert!(scale.bounds.len() <= MOST_BOUNDS, "{scale:?}");
            assert!(scale.bounds.windows(2).all(|pair| pair[0] < pair[1]), "{scale:?}");
        }
    }

    #[test]
    fn bounds_are_written_as_people_write_them() {
        let mut text = String::new();
        let mut registry = prometheus_client::registry::Registry::default();
        #[derive(Debug)]
        struct One(Histogram);
        impl prometheus_client::collector::Collector for One {
            fn encode(
                &self,
                mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>,
            ) -> std::fmt::Result {
                let histogram = prometheus_client::metrics::MetricType::Histogram;
                self.0.snapshot().encode(encoder.encode_descriptor("x_seconds", "X", None, histogram)?)
            }
        }
        let histogram = Histogram::new(&ANSWER);
        histogram.observe_time(Duration::from_millis(1));
        histogram.observe_time(Duration::from_micros(2_501));
        histogram.observe_time(Duration::from_secs(7200));
        registry.register_collector(Box::new(One(histogram)));
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "x_seconds_bucket{le=\"0.001\"} 1",
            "x_seconds_bucket{le=\"0.0025\"} 1",
            "x_seconds_bucket{le=\"0.005\"} 2",
            "x_seconds_bucket{le=\"1800.0\"} 2",
            "x_seconds_bucket{le=\"+Inf\"} 3",
            "x_seconds_count 3",
            "x_seconds_sum 7200.003501",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    proptest! {
        #[test]
        fn gathering_and_merging_counts_the_same_as_observing(
            values in proptest::collection::vec(0_u64..20_000_000_000, 0..200),
            every in 1_usize..50,
        ) {
            let (direct, merged) = (Histogram::new(&BETWEEN_TOKENS), Histogram::new(&BETWEEN_TOKENS));
            let mut local = Local::new(&BETWEEN_TOKENS);
            for (at, nanos) in values.iter().enumerate() {
                let time = Duration::from_nanos(*nanos);
                direct.observe_time(time);
                local.observe_time(time);
                if at % every == 0 {
                    merged.merge(&mut local);
                }
            }
            merged.merge(&mut local);
            prop_assert_eq!(direct.snapshot(), merged.snapshot());
            prop_assert_eq!(direct.snapshot().count(), values.len() as u64);
            // Against the naive definition of a cumulative bucket.
            let mut cumulative = 0;
            for (bound, count) in BETWEEN_TOKENS.bounds.iter().zip(direct.snapshot().counts) {
                cumulative += count;
                let naive = values.iter().filter(|nanos| **nanos / 1000 <= *bound).count() as u64;
                prop_assert_eq!(cumulative, naive);
            }
        }
    }
}
