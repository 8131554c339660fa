//! Choosing a worker: pure cost over a read view. Microseconds, no I/O, no await.

pub mod book;
pub mod breaker;
pub mod cost;
pub mod policy;
pub mod select;
pub mod stale;
#[cfg(test)]
mod tests;
pub mod view;
