//! Choosing a worker: pure cost over a read view. Microseconds, no I/O, no await.

pub mod book;
pub mod breaker;
pub mod policy;
pub mod select;
#[cfg(test)]
mod tests;
pub mod view;
