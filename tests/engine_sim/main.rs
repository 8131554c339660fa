//! The simulated engine over real sockets.

mod behaviour;
mod dialects;
mod golden;
mod support;
