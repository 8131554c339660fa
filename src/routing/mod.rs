//! Choosing a worker: pure cost over a read view. Microseconds, no I/O, no await.

pub mod blocks;
pub mod book;
pub mod breaker;
pub mod certain;
pub mod cost;
pub mod groups;
pub mod live;
pub mod part;
pub mod policy;
pub mod recent;
pub mod rehearse;
pub mod select;
pub mod stale;
#[cfg(test)]
mod tests;
pub mod view;
