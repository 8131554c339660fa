//! The replicated state machine: commands in, state and outcomes out. Deterministic; no clock,
//! no I/O, no async.

pub mod command;
pub mod load;
pub mod worker;
