//! The front over real sockets on loopback.

mod limits;
mod metrics;
mod planes;
mod proxy;
mod support;
mod traces;
