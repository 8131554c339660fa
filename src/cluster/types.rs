//! What the two Raft groups carry, and the aliases that keep openraft's generics in one place.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::ids::{Incarnation, ReplicaId};
use crate::state::replicated::Records;

/// A replica's batch of commands, numbered in its life (see [`crate::state::replicated`]).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Segment {
    /// Who proposed it.
    pub origin: ReplicaId,
    /// In which of its lives.
    pub incarnation: Incarnation,
    /// From 1 in each life, without gaps.
    pub number: u64,
    /// The encoded list of commands; the leader does not look into it.
    pub commands: Bytes,
}

/// One log entry: segments of any replicas, and perhaps a tick of the leader's clock.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct Proposal {
    /// In the order of arrival at the leader.
    pub segments: Vec<Segment>,
    /// One encoded command on the leader's own account. Not numbered: a tick that is lost is
    /// lost, and one that was not committed under its leader never will be.
    pub clock: Option<Bytes>,
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} segments", self.segments.len())
    }
}

/// A member as the Raft membership names it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct PeerNode {
    /// Configured name.
    pub name: String,
    /// `host:port` of its peer listener.
    pub peer: String,
}

openraft::declare_raft_types!(
    /// Both groups have the same types; they differ in what the state machine does with them.
    pub TypeConfig: D = Proposal, R = (), NodeId = u64, Node = PeerNode
);

/// The content of a snapshot: a state's records.
pub type Image = Arc<Records>;
/// (term, leader, index).
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
/// Term and candidate.
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
/// A log entry.
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
/// Voters and learners with the index that set them.
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
/// What a snapshot covers.
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
/// Meta and content.
pub type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Image>;
