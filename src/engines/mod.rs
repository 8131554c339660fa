//! What is known of the engines behind the workers.

pub mod probe;
