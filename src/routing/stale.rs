//! How much of a view may be believed, by its age.
//!
//! What peers booked reaches this replica some milliseconds late. While it is late, several
//! replicas see the same worker as the best and herd onto it; the later, the worse. Simulated on
//! real traces, 10 ms cost next to nothing, 200 ms a quarter of the mean time to the first token,
//! and 1 s more than knowing nothing of the peers at all.

/// What an age means for a decision.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Freshness {
    /// Believed as it is.
    Fresh,
    /// Chosen at random among all within this share of the best.
    Spread(f64),
    /// What the peers booked is left out, and chosen as with the widest spread.
    OwnOnly,
}

impl Freshness {
    /// Up to this age, in ms, a view is fresh.
    pub const FRESH_MS: u64 = 100;
    /// Up to this age, in ms, peers' loads are better than none.
    pub const USABLE_MS: u64 = 500;
    const LEAST_SPREAD: f64 = 0.15;
    const MOST_SPREAD: f64 = 0.30;

    /// For a view of this age.
    pub fn of(age_ms: u64) -> Self {
        match age_ms {
            0..=Self::FRESH_MS => Self::Fresh,
            Self::USABLE_MS.. if age_ms > Self::USABLE_MS => Self::OwnOnly,
            _ => {
                let along = (age_ms - Self::FRESH_MS) as f64 / (Self::USABLE_MS - Self::FRESH_MS) as f64;
                Self::Spread(Self::LEAST_SPREAD + along * (Self::MOST_SPREAD - Self::LEAST_SPREAD))
            }
        }
    }

    /// Candidates this share above the best are as good as the best.
    pub fn tolerance(self) -> f64 {
        match self {
            Self::Fresh => 0.0,
            Self::Spread(share) => share,
            Self::OwnOnly => Self::MOST_SPREAD,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_the_view_the_wider_the_choice() {
        assert_eq!(Freshness::of(0), Freshness::Fresh);
        assert_eq!(Freshness::of(100), Freshness::Fresh);
        assert!((Freshness::of(300).tolerance() - 0.225).abs() < 1e-9);
        assert_eq!(Freshness::of(500), Freshness::Spread(0.30));
        assert_eq!(Freshness::of(501), Freshness::OwnOnly);
        let tolerances: Vec<f64> = (0..700).map(|age| Freshness::of(age).tolerance()).collect();
        assert!(tolerances.is_sorted());
    }
}
