//! The front over real sockets on loopback.

mod proxy;
mod support;
