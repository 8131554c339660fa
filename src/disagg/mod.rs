//! Requests whose prefill one engine does and whose decode another: what each of the two is sent, and
//! what the first one's answer means for the second. Without clock or I/O; `http::pd` does the sending.
//!
//! There are two shapes. *In turn*: the prefill worker answers first, with one token and, for most
//! engines, with parameters that say where its blocks are; the decode worker is sent the request with
//! these ([`turns`]). *At once*: both are sent the request under an id that was made for this one
//! attempt, and find each other ([`at_once`]).
//!
//! **Invariants.** Parameters of a transfer are opaque, used once and thrown away when they are old: an
//! engine that is shown those of blocks that were given to somebody else answers with wrong text and
//! without an error. [`turns::Handoff`] can be made from an answer only, is consumed by its use, and
//! cannot be copied. An id is never used for two attempts: whoever begins one makes it anew.

pub mod answer;
pub mod at_once;
pub mod logprobs;
mod members;
pub mod ping;
pub mod shape;
pub mod turns;

pub use members::Members;
