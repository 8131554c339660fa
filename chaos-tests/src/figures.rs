//! Durations as figures: collected, sorted, printed.

use std::time::Duration;

/// Measured durations of one thing.
#[derive(Clone, Debug, Default)]
pub struct Figures(Vec<Duration>);

impl Figures {
    /// Takes note of one.
    pub fn add(&mut self, took: Duration) {
        self.0.push(took);
        self.0.sort_unstable();
    }

    /// Takes note of all that another has.
    pub fn merge(&mut self, other: &Figures) {
        self.0.extend_from_slice(&other.0);
        self.0.sort_unstable();
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The value that `percent` of all do not exceed (nearest rank); zero when there is none.
    pub fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }

    /// The largest.
    pub fn max(&self) -> Duration {
        self.0.last().copied().unwrap_or_default()
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "n {}  p50 {} ms  p99 {} ms  max {} ms",
            self.count(),
            self.percentile(50).as_millis(),
            self.percentile(99).as_millis(),
            self.max().as_millis()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let mut figures = Figures::default();
        (1..=10).rev().for_each(|ms| figures.add(Duration::from_millis(ms)));
        assert_eq!(figures.to_string(), "n 10  p50 5 ms  p99 10 ms  max 10 ms");
        assert_eq!(Figures::default().percentile(50), Duration::ZERO);
    }
}
