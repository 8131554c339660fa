//! What Everline knows of inference engines: how to ask one about itself, and how to be one.

pub mod probe;
pub mod sim;
