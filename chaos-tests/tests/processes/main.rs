//! What Everline promises, tried on real processes.

mod leader_kill;
mod quorum;
mod sdk;

/// A seed for everything random in a test; printed, and taken from `EVERLINE_CHAOS_SEED` to
/// have the same again.
fn seed() -> u64 {
    let given = std::env::var("EVERLINE_CHAOS_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(rand::random);
    println!("EVERLINE_CHAOS_SEED={seed}");
    seed
}
