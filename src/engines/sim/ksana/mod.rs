//! A simulated engine as a node of a KsanaLLM fleet: how it registers with a router, what it learns from
//! heartbeats, and what it knows of the groups that KV goes through.
//!
//! [`options`] (what can be set), [`node`] (registration, heartbeats, groups). Its HTTP routes are among those
//! of the other engines; prompts are handed over as SGLang's are, by rooms whose numbers are request ids.

pub mod node;
pub mod options;

pub use node::Node;
pub use options::KsanaArgs;
