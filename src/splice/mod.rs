//! What makes a stream outlive the engine that began it: an engine's events in, the client's out.
//!
//! Pure: no I/O, no clock, no randomness. Who drives it holds the connections and does what it
//! says. Reading order: [`plan`] (what the client asked, and what is asked of the engine in its
//! place), [`sse`] (events out of bytes), [`stream`] (one stream over all its attempts).
//!
//! ```text
//! client's body ── Plan ──▶ first_body ──▶ engine ──▶ sse::Parser ──▶ Splice::push ──▶ Out ──▶ client
//!                                             │ dies                       ▲   │
//!                                             ▼                            │   └──▶ Out::journal
//!                         Splice::recover ──▶ Leg::body ──▶ another engine ┘            │ another process
//!                               ▲                                                       ▼
//!                               └─────────────────────────────────────────────── Splice::restore
//! ```
//!
//! **Invariant:** what was handed out is never contradicted. A continuation begins behind the
//! last token whose text was seen; what an engine said behind that is said again by the next one.
//! What cannot be continued exactly by its text is [`Next::Lost`], never a guess.
//!
//! **Invariant:** a state that was rebuilt from the journal of the first k events continues after
//! these k events, whatever the process that wrote the journal knew beyond them.

mod body;
mod choice;
mod continued;
mod delta;
mod journal;
mod json;
mod leg;
mod logprobs;
mod own;
mod pass;
pub mod plan;
mod recover;
mod render;
mod scan;
pub mod sse;
mod stops;
pub mod stream;
#[cfg(test)]
mod tests;

pub use plan::{Options, Penalties, Plan, PlanError, Resumable, StreamRoute};
pub use stream::{Failure, JournalError, Leg, LegId, Lost, Next, Out, Progress, Splice, Usage};
