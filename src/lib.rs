//! Everline: an LLM-inference router cluster whose output streams outlive its replicas.

pub mod cluster;
pub mod codec;
pub mod engines;
pub mod http;
pub mod ids;
pub mod routing;
pub mod state;
