//! The simulated engine over real sockets.

mod behaviour;
mod dialects;
mod golden;
mod ksana;
mod model_files;
mod nixl;
mod ranks;
mod rooms;
mod support;
