//! What travels on the links: kinds of frames and calls, and the metadata by which both ends
//! know that they talk to whom they mean.

use serde::{Deserialize, Serialize};

use crate::ids::{Group, ReplicaId};

use super::super::types::{PeerNode, Segment};

/// Largest message accepted, in bytes: an append holds at most 1 MiB of entries plus one entry
/// of at most 1 MiB of segments.
pub const MAX_MESSAGE: usize = 16 << 20;
/// Bytes of records in one chunk of a snapshot.
pub const CHUNK: usize = 1 << 20;

/// Metadata key of the cluster id (32 hexadecimal digits).
pub const CLUSTER: &str = "everline-cluster";
/// Metadata key of the member id the caller means to reach: addresses are recycled.
pub const TO: &str = "everline-to";
/// Metadata key of the caller's member id.
pub const FROM: &str = "everline-from";

/// What a frame on a lane asks. The body is the encoded request; the answer's the encoded reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Kind {
    /// AppendEntries, heartbeats included; answered in order.
    Append = 1,
    /// RequestVote.
    Vote = 2,
    /// The question before RequestVote.
    PreVote = 3,
    /// The leader asks this replica to take over.
    TransferLeader = 4,
    /// A segment for the leader's log.
    Propose = 5,
    /// The index a linearizable read must wait for.
    ReadIndex = 6,
    /// Has the answerer voted in no later term than the leader that asks?
    Vouch = 7,
}

impl Kind {
    /// The inverse of the number on the wire.
    pub fn from_wire(number: u32) -> Option<Self> {
        [
            Kind::Append,
            Kind::Vote,
            Kind::PreVote,
            Kind::TransferLeader,
            Kind::Propose,
            Kind::ReadIndex,
            Kind::Vouch,
        ]
        .into_iter()
        .find(|kind| *kind as u32 == number)
    }
}

/// A segment on its way to the leader's log.
pub type ProposeRequest = Segment;

/// The leader's answer to a segment.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum ProposeReply {
    /// Taken into the log; whether it commits shows in the state.
    Taken,
    /// Not the leader (any more, or yet).
    NotLeader,
    /// The leader's queue is full; send again later.
    Busy,
}

/// The leader's answer to [`Kind::ReadIndex`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum ReadIndexReply {
    /// Everything up to here was committed before the question arrived.
    Index(u64),
    /// Ask somebody else, or later.
    NotLeader,
}

/// A call: one question, one answer, outside the lanes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum Call {
    /// Who are you, and do you belong to a cluster?
    Hello {
        /// The asker's name.
        name: String,
    },
    /// Take part in forming this cluster.
    Form {
        /// Its id.
        cluster: u128,
        /// All first members.
        members: Vec<(ReplicaId, PeerNode)>,
    },
    /// I have nothing and want to join; give me an id.
    Join {
        /// Chosen by the joiner for this attempt.
        nonce: u64,
        /// Its name and address.
        node: PeerNode,
    },
    /// Make me a learner of this group.
    AddLearner {
        /// Which group.
        group: Group,
        /// The joiner's id.
        id: ReplicaId,
        /// Its name and address.
        node: PeerNode,
    },
    /// Make a learner a voter, in place of the dead members of the same name.
    Promote {
        /// Which group.
        group: Group,
        /// Whom.
        id: ReplicaId,
    },
    /// Remove members from this group.
    Remove {
        /// Which group.
        group: Group,
        /// Whom.
        id: ReplicaId,
    },
    /// Hand leadership of this group over.
    Transfer {
        /// Which group.
        group: Group,
        /// To whom; `None` for the most caught-up other voter.
        to: Option<ReplicaId>,
    },
    /// Join the cluster at this address (to a waiting replica).
    Invite {
        /// `host:port` of a member's peer listener.
        peer: String,
    },
}

impl Call {
    /// The member that the caller says it is, where the call says so.
    pub fn claims(&self) -> Option<&str> {
        match self {
            Call::Hello { name } => Some(name),
            // The first of the first members forms the cluster.
            Call::Form { members, .. } => members.first().map(|(_, node)| node.name.as_str()),
            // Asked by the joiner itself.
            Call::Join { node, .. } | Call::AddLearner { node, .. } => Some(&node.name),
            // Asked by any member, for a joiner or an operator.
            Call::Promote { .. } | Call::Remove { .. } | Call::Transfer { .. } | Call::Invite { .. } => None,
        }
    }
}

/// The answer to a call.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum Reply {
    /// To `Hello`.
    Hello {
        /// The answering replica's name.
        name: String,
        /// Cluster and member id, once it has them.
        member: Option<(u128, ReplicaId)>,
        /// Whether its log has a membership: the cluster exists.
        initialized: bool,
    },
    /// To `Join`.
    Joined {
        /// The cluster.
        cluster: u128,
        /// The joiner's new id.
        id: ReplicaId,
    },
    /// Done.
    Done,
    /// Not the leader of that group; the leader, where known.
    NotLeader(Option<PeerNode>),
    /// Not now: try again.
    Later(String),
    /// Never, as asked.
    Refused(String),
}
