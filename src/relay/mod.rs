//! Output streams that outlive their replica.
//!
//! A stream's **holder** owns the connection to the engine; the **edge**, which has the client, is
//! another process as long as there is one, and keeps a copy of all that it passes on. So whatever
//! a client has seen is in two processes, without anybody waiting for an acknowledgement: the edge's
//! death leaves the holder generating, and the holder's death leaves the edge able to have somebody
//! else go on, by a compare-and-set on the stream's attempt in the replicated directory.
//!
//! Nothing here knows HTTP or engines: what generates is an [`Engines`], who reads is a
//! [`Listener`]. Reading order: [`order`], [`log`] and [`line`] (what a stream is), [`copy`] (one
//! process's view of it), [`link`] (between processes), `begin` (who shall hold one), [`hub`] (who holds,
//! who takes over, who forgets), [`remote`] (the directory for processes that are no replicas), [`placing`]
//! (where their streams go).

pub mod alone;
pub mod attempts;
pub mod begin;
pub mod by_agent;
pub mod copy;
pub mod counts;
pub mod directory;
pub mod find;
mod gather;
mod holding;
mod host;
pub mod hub;
pub mod line;
pub mod link;
pub mod links;
pub mod listener;
pub mod log;
pub mod order;
mod past;
pub mod placing;
mod presence;
pub mod reach;
mod recover;
pub mod remote;
pub mod secret;
mod spread;
#[cfg(test)]
mod tests;
mod together;

use std::sync::Arc;
use std::time::Duration;

use copy::Copy;
use directory::Soon;
use log::Event;
use tokio_util::sync::CancellationToken;

/// How many processes have what a client has seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// Two, as long as there are two.
    #[default]
    Peer,
    /// One.
    Local,
}

/// How streams are kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where a stream's holder is.
    pub durability: Durability,
    /// A holder that sends nothing for so long is taken to be dead: 1 s.
    pub silence: Duration,
    /// How long a take-over may take, with all its tries: 15 s.
    pub takeover: Duration,
    /// Bytes of events of one stream that are kept: 8 MiB.
    pub stream_bytes: usize,
    /// Bytes of all streams at this process: 512 MiB.
    pub process_bytes: usize,
    /// Clients that may listen to one stream at one process: 8.
    pub most_listeners: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            durability: Durability::Peer,
            silence: Duration::from_secs(1),
            takeover: Duration::from_secs(15),
            stream_bytes: 8 << 20,
            process_bytes: 512 << 20,
            most_listeners: 8,
        }
    }
}

/// Why a stream ends otherwise than by its engine's last event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// Nobody can go on with it.
    Lost,
    /// Engines failed.
    Upstream,
    /// Somebody said so.
    Cancelled,
}

/// What generates.
pub trait Engines: Send + Sync + 'static {
    /// Generates `copy`'s stream in this attempt, to its terminal event. With events from earlier
    /// attempts it goes on after them. Dropping the future stops generating.
    fn generate(self: Arc<Self>, copy: Arc<Copy>, attempt: u32, stop: CancellationToken) -> Soon<()>;

    /// The last events of a stream that fails, in its client's dialect.
    fn failure(&self, copy: &Copy, failure: Failure, text: &str) -> Vec<Event>;
}
