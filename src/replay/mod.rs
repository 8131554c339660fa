//! Replaying a trace: in a simulation in virtual time, or against a cluster.

pub mod cache;
pub mod engine;
pub mod index;
pub mod simulate;
pub mod stats;
pub mod trace;
