//! Everline: an LLM-inference router cluster whose output streams outlive its replicas.

pub mod admin_types;
pub mod balancer;
pub mod cli;
pub mod cluster;
pub mod codec;
pub mod config;
pub mod engines;
pub mod http;
pub mod ids;
pub mod routing;
pub mod serve;
pub mod state;
