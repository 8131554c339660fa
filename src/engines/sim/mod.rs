//! A simulated vLLM engine: the same routes, bytes and timing, with a text that is a pure function of its ids.
//!
//! Reading order: [`options`] (what can be set), [`tokenizer`] and [`text`] (what is said),
//! [`kv`], `host` and [`scheduler`] (when it is said), [`engine`] (the one task that drives all of it), [`ranks`] (several of them behind one listener),
//! [`pd`] (prompts computed by one and gone on with by another), [`ksana`] (as a node of a KsanaLLM fleet),
//! [`http`] (how it is put on the wire), [`events`] (what it publishes of its cache), [`server`] (sockets and shutdown).
//!
//! **Invariant:** everything below [`engine`] is synchronous and free of clocks; the engine task
//! hands in the time. One task steps all sequences; a request owns no timer of its own.

pub mod detok;
pub mod engine;
pub mod events;
pub mod faults;
mod host;
pub mod http;
pub mod ksana;
pub mod kv;
pub mod model_files;
pub mod options;
pub mod outbox;
pub mod pd;
pub mod ranks;
pub mod scheduler;
pub mod server;
pub mod stats;
pub mod text;
pub mod tokenizer;
mod words;

pub use engine::Engine;
pub use options::EngineSimArgs;
pub use ranks::Ranks;
pub use server::{Simulator, run};
