//! Replaying a trace of requests: in a simulation in virtual time, or against a cluster.
//!
//! Reading order: [`trace`] (what is replayed), [`engine`] and [`cache`] (what is simulated),
//! [`simulate`] (how they meet the product's own routing), [`stats`] (what comes out), [`live`]
//! (the same against real endpoints), [`plot`].
//!
//! **Invariant:** the simulation chooses with [`crate::routing`] and books with its bookings; it has
//! no rule of its own about where a request goes, but for the bound.

pub mod cache;
pub mod engine;
pub mod generate;
pub mod index;
pub mod live;
#[cfg(test)]
mod live_tests;
pub mod plot;
pub mod prompt;
pub mod simulate;
mod sse;
pub mod stats;
#[cfg(test)]
mod tests;
pub mod trace;
