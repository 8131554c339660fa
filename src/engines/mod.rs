//! The engines behind the router; so far a simulated one.

pub mod sim;
