//! Name services: what endpoints a name stands for, asked of a file, of Kubernetes or of Polaris, behind
//! one trait.
//!
//! The core is without I/O: [`answer`] (endpoints, and which of them are used), [`board`] (what is known
//! of each name, and for how long it may be believed), [`slices`] (Kubernetes' EndpointSlices), `discover`
//! (Polaris' answers), [`calls`] (results of calls, to be reported). Around it are the shells
//! [`kubernetes`], [`polaris`] and [`fixed`], and the small HTTP client that they share.
//!
//! **Invariant.** A service that is away changes nothing but the age of what it said: the last answer
//! holds until it is older than the bound that was configured.

pub mod answer;
pub mod board;
pub mod calls;
mod client;
mod discover;
pub mod fixed;
pub mod kubernetes;
pub mod polaris;
pub mod slices;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

pub use answer::{Answer, Endpoint, Standing};
pub use board::NameState;
pub use client::Trouble;

/// Who turns names into endpoints.
pub trait NameService: fmt::Debug + Send + Sync {
    /// The provider's name in the configuration.
    fn provider(&self) -> &'static str;

    /// What a name stands for now; `None` where nothing is known of it, or only something too old. The
    /// same allocation until something changes.
    fn answer(&self, name: &str) -> Option<Arc<Answer>>;

    /// Takes note of how a call of an endpoint ended. Never waits.
    fn report(&self, call: &Call<'_>) {
        let _ = call;
    }

    /// All names that are followed, and how that goes.
    fn states(&self) -> Vec<NameState>;

    /// Reports of results that were handed on, and that could not be.
    fn reports(&self) -> (u64, u64) {
        (0, 0)
    }
}

/// How a call of an endpoint ended.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The name it was found by.
    pub name: &'a str,
    /// `host:port`
    pub address: &'a str,
    /// The answer's status; `None` where there was none.
    pub status: Option<u16>,
    /// From sending to the answer's head.
    pub took: std::time::Duration,
}

impl Call<'_> {
    /// Whether it went well, in the reference router's sense.
    pub fn is_ok(&self) -> bool {
        self.status.is_some_and(|status| status < 400)
    }
}
