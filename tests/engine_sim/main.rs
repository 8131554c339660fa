//! The simulated engine over real sockets.

mod behaviour;
mod golden;
mod support;
