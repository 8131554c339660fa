//! The front over real sockets on loopback.

mod booking;
mod deserted;
mod discovered;
mod exchange;
mod heads;
mod keys;
mod ksana;
mod limits;
mod matrix;
mod metrics;
mod operators;
mod pd;
mod planes;
mod proxy;
mod registration;
mod routing;
mod seams;
mod sequel;
mod strangers;
mod streams;
mod support;
mod tls;
mod traces;
mod upstream;
