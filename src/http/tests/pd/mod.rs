//! Requests that a prefill and a decode worker share: what each of them gets, and every way in which
//! either can fail.

mod at_once;
mod choice;
mod failing;
mod fleet;
mod sims;
mod turns;
