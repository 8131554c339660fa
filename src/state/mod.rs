//! The replicated state machine: commands in, state and outcomes out. Deterministic; no clock,
//! no I/O, no async.

pub mod cache;
pub mod command;
pub mod control;
pub mod corrections;
pub mod digest;
pub mod ksana;
pub mod load;
pub mod ranks;
pub mod replicated;
pub mod sessions;
pub mod streams;
#[cfg(test)]
mod tests;
pub mod worker;
