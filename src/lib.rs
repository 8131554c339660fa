//! Everline: an LLM-inference router cluster whose output streams outlive its replicas.

pub mod cluster;
pub mod engines;
pub mod ids;
pub mod routing;
pub mod state;
