//! What Everline promises, tried on real processes.

mod agents;
mod answers;
mod bounds;
mod browser;
mod choices;
mod cli;
mod costs;
mod damage;
mod dead_worker;
mod demo;
mod edges;
mod foreign;
mod frozen;
mod h2_attacks;
mod hijack;
mod hostile_clients;
mod hostile_workers;
mod keys;
mod ksana;
mod ksana_nodes;
mod kv;
mod leader_kill;
mod liveness;
mod lives;
mod loads;
mod logs;
mod pd;
mod profiles;
mod prompts;
mod quorum;
mod real_engine;
mod real_pd;
mod real_streams;
mod rolling;
mod sdk;
mod seen;
mod smuggling;
mod streams;
mod tier_tls;
mod tiers;
mod total_kill;
mod wiped;

/// A seed for everything random in a test; printed, and taken from `EVERLINE_CHAOS_SEED` to
/// have the same again.
fn seed() -> u64 {
    let given = std::env::var("EVERLINE_CHAOS_SEED").ok().and_then(|text| text.parse().ok());
    // Tests count upwards from here.
    let seed = given.unwrap_or_else(rand::random::<u32>).into();
    println!("EVERLINE_CHAOS_SEED={seed}");
    seed
}
