//! Listening to engines: KV event feeds over ZeroMQ, and SGLang's load socket.
//!
//! [`feed`] is one task for one rank of one worker: it connects (or lets the engine connect, by
//! a [`hub`]), asks for what it missed ([`replay`]), and hands batches of operations to a
//! [`FeedSink`], which answers when they are safe. What comes next and what is missing is decided by
//! [`crate::kv::feed`]; this is the I/O around it. [`discover`] reads where engines say that their
//! feeds are, [`load`] listens to loads, [`forward`] offers a feed again at another address.
//!
//! **Invariant:** a feed's position moves only when the sink has said so; a feed that is dropped at any
//! moment can be continued elsewhere from the sink's cursor, and nothing is lost or repeated.

pub mod batch;
pub mod discover;
pub mod feed;
pub mod forward;
pub mod hub;
mod live;
pub mod load;
mod replay;

#[cfg(test)]
mod tests;

use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;

pub use batch::FeedBatch;
pub use feed::{FeedConfig, FeedCounters, FeedHandle, Source};

use crate::kv::feed::Cursor;
use crate::kv::hash::Seed;
use crate::kv::types::EngineHash;
use crate::state::ranks::RankKey;

/// What the feeds of this process do, for whoever wants to tell of it.
pub type FeedBoard = Arc<Mutex<Vec<(RankKey, FeedCounters)>>>;

/// What became of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// It is durable and will not be forgotten.
    Applied,
    /// It was not applied, because the rank's cursor is not where the batch begins: somebody else
    /// has continued the feed, or an earlier answer was lost. This is the cursor; the feed goes on there.
    Moved(Cursor),
    /// It was not applied, and the feed is not ours any more.
    Stop,
}

/// Where batches go.
pub trait FeedSink: Send + Sync + 'static {
    /// Takes a batch in and answers when it is durable. Applies it only if the rank's cursor is
    /// [`FeedBatch::after`], and then moves the cursor to [`FeedBatch::cursor`] in one step with it.
    /// Until it answers nothing else is read from the engine. May be dropped at any await; the
    /// batch is then either applied or not, which the cursor tells.
    fn deliver(&self, batch: FeedBatch) -> impl Future<Output = Delivery> + Send;

    /// The seed that a block of an applied batch was stored with. `None` for a block that is not known,
    /// or whose seed is that of its adapter alone ([`Seed::new`] without a salt).
    fn seed_of(&self, block: EngineHash) -> Option<Seed>;
}
