//! The front over real sockets on loopback.

mod booking;
mod exchange;
mod keys;
mod limits;
mod matrix;
mod metrics;
mod planes;
mod proxy;
mod registration;
mod routing;
mod support;
mod tls;
mod traces;
mod upstream;
