//! Real processes, real faults, checkers: what Everline promises, tried.
//!
//! A [`fleet::Fleet`] is a whole cluster of `everline` child processes on this machine. Tests
//! send it load ([`load`]), write to its registry ([`writes`]), hurt it by signals and look at
//! what every replica says afterwards. Only one fleet lives at a time, however many tests run.

pub mod binary;
pub mod client;
pub mod edges;
pub mod endpoint;
pub mod figures;
pub mod fleet;
pub mod h2;
pub mod handover;
pub mod hurts;
pub mod load;
pub mod ports;
pub mod process;
pub mod programs;
pub mod published;
pub mod raw;
pub mod replica;
pub mod streams;
pub mod tally;
pub mod vllm;
pub mod wait;
pub mod writes;
