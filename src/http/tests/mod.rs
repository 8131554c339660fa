//! The front over real sockets on loopback.

mod limits;
mod planes;
mod proxy;
mod registration;
mod support;
