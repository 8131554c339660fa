//! A simulated vLLM engine: the same routes, bytes and timing, with a text that is a pure function of its ids.
//!
//! Reading order: [`options`] (what can be set), [`tokenizer`] and [`text`] (what is said),
//! [`kv`] and [`scheduler`] (when it is said), [`engine`] (the one task that drives all of it),
//! [`http`] (how it is put on the wire), [`events`] (what it publishes of its cache), [`server`] (sockets and shutdown).
//!
//! **Invariant:** everything below [`engine`] is synchronous and free of clocks; the engine task
//! hands in the time. One task steps all sequences; a request owns no timer of its own.

pub mod detok;
pub mod engine;
pub mod events;
pub mod faults;
pub mod http;
pub mod kv;
pub mod options;
pub mod outbox;
pub mod scheduler;
pub mod server;
pub mod stats;
pub mod text;
pub mod tokenizer;
mod words;

pub use engine::Engine;
pub use options::EngineSimArgs;
pub use server::{Simulator, run};
