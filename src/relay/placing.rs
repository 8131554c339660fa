//! Where a stream goes, for processes that do not choose by themselves: a replica chooses the engine,
//! and books the stream there for as long as whoever asked holds on.
//!
//! Only engines with a node agent are chosen this way. Where the choice falls on another one, whoever
//! holds the stream chooses anew.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::directory::{Address, Soon};
use super::order::Order;
use crate::ids::WorkerIx;
use crate::state::streams::Holder;

/// A stream's place at an engine that has an agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Place {
    /// Which engine.
    pub worker: WorkerIx,
    /// Its id.
    pub id: String,
    /// Where its agent is.
    pub agent: Address,
    /// Which of its ranks.
    pub rank: u32,
    /// Tokens of its KV blocks.
    pub block_size: u32,
    /// Tokens of the prompt, counted or estimated.
    pub prompt_tokens: u32,
    /// Those of them that the engine has cached, where that is known.
    pub cached: Option<u32>,
    /// What is booked.
    pub share: Share,
    /// Whether the replica wants to read what is generated: nobody else tells what the engine has
    /// cached.
    pub wants_text: bool,
    /// `Everline-Trace`, if it was asked for: visible ASCII, some kilobytes at most.
    pub trace: Option<String>,
}

impl Place {
    /// Who holds the stream.
    pub fn holder(&self) -> Holder {
        Holder::Agent(self.worker)
    }
}

/// What a running stream takes of its engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Share {
    /// Tokens whose prefill is outstanding.
    pub prefill_tokens: u32,
    /// KV blocks.
    pub decode_blocks: u32,
}

/// The same, where the replica that had booked it is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Running {
    /// Which engine.
    pub worker: WorkerIx,
    /// Which of its ranks.
    pub rank: u32,
    /// What it takes by now.
    pub share: Share,
}

/// How a question for a place went.
pub enum Placed {
    /// Here, and booked.
    At(Place, Box<dyn Booked>),
    /// Whoever holds the stream chooses.
    Elsewhere,
    /// The client gets this error, encoded by whoever reads it at the other end.
    Refused(Bytes),
}

/// A booking that is kept for another process. Frees what it booked when it is dropped.
pub trait Booked: Send {
    /// The first output has come.
    fn began(&mut self);
    /// The output takes so many blocks more.
    fn grew(&mut self, blocks: u32);
    /// A piece of the answer, where they are wanted.
    fn said(&mut self, piece: &[u8]);
    /// The answer has ended as it should.
    fn ended(self: Box<Self>);
}

/// Who chooses.
pub trait Placer: Send + Sync + 'static {
    /// Chooses a place for a stream that another process has admitted. May wait in line.
    fn place(self: Arc<Self>, order: Order) -> Soon<Placed>;
    /// Books a stream that runs already. `None` where the engine is not known here.
    fn book(self: Arc<Self>, running: Running) -> Option<Box<dyn Booked>>;
}
