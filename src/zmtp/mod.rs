//! As much of ZeroMQ's wire protocol (ZMTP 3.0, NULL mechanism) as engines' event feeds need.
//!
//! A [`Link`] is one connection between two sockets, of which we can be a SUB or a DEALER (the
//! router's side) or a PUB or a ROUTER (the simulated engine's, and a node agent's). What ZeroMQ does behind one's back, a
//! caller does here in the open: connecting again, queues, what happens when they are full. An
//! [`Endpoint`] is `tcp://…` or `ipc://…`; addresses are asked of a [`Resolve`] that says which may be
//! connected to. [`Publisher`] is a PUB socket with a bounded queue for each subscriber, [`Router`] a
//! ROUTER that answers each of its connections.
//!
//! Everything a peer sends is bounded ([`Limits`]) before it is kept. Names nothing else of ours.

mod endpoint;
mod link;
mod publisher;
mod router;
mod wire;

use std::io;

pub use endpoint::{AnyAddress, Endpoint, Listener, Resolve, Resolved};
pub use link::{HANDSHAKE_TIMEOUT, Incoming, Limits, Link};
pub use publisher::{Publisher, PublisherStats};
pub use router::Router;

/// Parts of one message.
pub type Parts = Vec<bytes::Bytes>;

/// What a socket is, as the peers tell each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketType {
    /// Sends to whoever subscribed.
    Pub,
    /// Subscribes and receives.
    Sub,
    /// Sends and receives as it likes.
    Dealer,
    /// Answers each peer by itself.
    Router,
}

impl SocketType {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pub => "PUB",
            Self::Sub => "SUB",
            Self::Dealer => "DEALER",
            Self::Router => "ROUTER",
        }
    }

    /// Whether it can talk to a peer that says it is `peer`.
    fn talks_to(self, peer: &[u8]) -> bool {
        match self {
            Self::Pub => matches!(peer, b"SUB" | b"XSUB"),
            Self::Sub => matches!(peer, b"PUB" | b"XPUB"),
            Self::Dealer => matches!(peer, b"ROUTER" | b"DEALER" | b"REP"),
            Self::Router => matches!(peer, b"ROUTER" | b"DEALER" | b"REQ"),
        }
    }
}

/// Why there is no link, or no more.
#[derive(Debug, thiserror::Error)]
pub enum ZmtpError {
    /// Of the network.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other side ended the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// The other side does not answer.
    #[error("no ZeroMQ handshake within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Handshake,
    /// The other side speaks something else.
    #[error("the other side does not speak ZMTP 3 with the NULL mechanism: {0}")]
    Protocol(&'static str),
    /// The other side is a socket of another type.
    #[error("a {} socket cannot talk to a socket of type {theirs:?}", .ours.name())]
    Mismatch {
        /// What we are.
        ours: SocketType,
        /// What it says it is.
        theirs: String,
    },
    /// The other side refused, with its reason.
    #[error("the other side refused: {0}")]
    Refused(String),
    /// A message is longer than allowed.
    #[error("a message is longer than {0} bytes, or has more than {1} parts")]
    TooLong(usize, usize),
    /// Not an endpoint.
    #[error("{0}")]
    Endpoint(String),
}
