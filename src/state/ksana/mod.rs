//! KsanaLLM's fleet: nodes, the groups they form, and the pairs of a prefill and a decode group.
//!
//! The three tables are those of the reference router (`node_info`, `inference_group_status`,
//! `comm_group_pair`). What happens to them is in `strict` (as the reference does it, faults
//! included) and `fixed`; `answer` is what a node is told and where requests may go.
//!
//! **Invariant.** No two nodes have the same coordinator address, nor the same place (cluster, address,
//! role, rank).

mod answer;
mod fixed;
mod node_id;
mod strict;
mod table;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::ids::WorkerIx;

pub use answer::{Answer, KeyView, RoutePair};
pub use node_id::{describe, node_id};
pub use table::{KSANA_GROUP, KSANA_NODE, KSANA_PAIR, KSANA_SCALARS, KsanaState};

/// Most nodes.
pub const MAX_NODES: usize = 4096;
/// Most pairs: 128 prefill groups with 128 decode groups.
pub const MAX_PAIRS: usize = 16_384;
/// Longest address, cluster name or node id, bytes.
pub const MAX_NAME: usize = 256;
/// Longest comm id; NCCL's takes 172.
pub const MAX_COMM_ID: usize = 1024;
/// Most devices of a node.
pub const MAX_DEVICES: u32 = 1024;
/// Largest world size and rank.
pub const MAX_WORLD: u32 = 65_536;
/// Largest request id that engines read.
pub const MAX_REQUEST_ID: u32 = i32::MAX as u32;
/// Most request ids leased at once.
pub const MAX_LEASE: u32 = 65_536;

/// Groups are called by numbers from here on where workers are called by theirs, in loads and in the prefix
/// index. The registry counts from 1, and would have to have registered as many workers to get here.
pub const FIRST_GROUP_IX: u32 = 1 << 31;

/// Which half of a request a node does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The prompt.
    Prefill,
    /// The output.
    Decode,
}

impl Role {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
        }
    }

    /// The other one.
    pub fn opposite(self) -> Self {
        match self {
            Role::Prefill => Role::Decode,
            Role::Decode => Role::Prefill,
        }
    }
}

/// What a node says of itself.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct NodeSpec {
    /// Its cluster.
    pub cluster: String,
    /// Where its group takes requests.
    pub inference_addr: String,
    /// Where the node itself coordinates: its identity.
    pub coordinator_addr: String,
    /// What its group does.
    pub role: Role,
    /// Its place in the group.
    pub rank: u32,
    /// Devices of the whole group.
    pub world_size: u32,
    /// Devices of this node.
    pub devices: u32,
}

impl NodeSpec {
    /// Whether it is within bounds.
    pub fn check(&self) -> Result<(), String> {
        for (what, text) in [
            ("cluster_name", &self.cluster),
            ("inference_addr", &self.inference_addr),
            ("coordinator_addr", &self.coordinator_addr),
        ] {
            if text.len() > MAX_NAME {
                return Err(format!("{what} is longer than {MAX_NAME} bytes"));
            }
        }
        if self.rank >= MAX_WORLD || !(1..=MAX_WORLD).contains(&self.world_size) {
            return Err(format!("node_rank and world_size must not be larger than {MAX_WORLD}"));
        }
        if !(1..=MAX_DEVICES).contains(&self.devices) {
            return Err(format!("a node has 1 to {MAX_DEVICES} devices"));
        }
        Ok(())
    }

    /// The group it belongs to.
    pub fn group(&self) -> GroupKey {
        GroupKey {
            cluster: self.cluster.clone(),
            role: self.role,
            inference_addr: self.inference_addr.clone(),
        }
    }

    fn is_prefill_head(&self) -> bool {
        self.role == Role::Prefill && self.rank == 0
    }

    /// Whether both want the same place in the same group.
    fn same_place(&self, other: &Self) -> bool {
        self.rank == other.rank && self.is_in(other)
    }

    fn is_in(&self, other: &Self) -> bool {
        self.role == other.role
            && self.inference_addr == other.inference_addr
            && self.cluster == other.cluster
    }
}

/// A node as the cluster knows it: a row of `node_info`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct NodeRecord {
    /// Its id.
    pub node_id: String,
    /// What it said at its last registration.
    pub spec: NodeSpec,
    /// Cluster time of the last sign of life.
    pub last_heard_ms: u64,
    /// Whether it counts.
    pub online: bool,
    /// Counts registrations of new nodes: the order of rows.
    pub order: u64,
}

/// What names a group.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
pub struct GroupKey {
    /// Its cluster.
    pub cluster: String,
    /// What it does.
    pub role: Role,
    /// Where it takes requests.
    pub inference_addr: String,
}

/// A group that has sent a heartbeat: a row of `inference_group_status`.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct GroupRecord {
    /// Devices that it should have.
    pub world_size: u32,
    /// Devices of its nodes that are online.
    pub online_devices: u32,
    /// Nodes that are online.
    pub online_nodes: u32,
    /// Whether all of its devices are there.
    pub ready: bool,
    /// Counts groups: the order of rows.
    pub order: u64,
}

impl GroupRecord {
    /// What it is called where workers are called by their numbers; another one after it was forgotten.
    pub fn ix(&self) -> WorkerIx {
        WorkerIx(FIRST_GROUP_IX | (self.order as u32 & (FIRST_GROUP_IX - 1)))
    }
}

/// One node's part of a pair's addresses.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Leg {
    /// The node's rank.
    pub rank: u32,
    /// Its devices, numbered from 0.
    pub devices: u32,
    /// Its coordinator address.
    pub coordinator_addr: String,
}

/// A pair of groups: a row of `comm_group_pair`. Its key is `<prefill>__<decode>`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct PairRecord {
    /// Its cluster.
    pub cluster: String,
    /// The prefill group's address.
    pub prefill_addr: String,
    /// The decode group's address.
    pub decode_addr: String,
    /// In strict mode: whether requests may go there, as the last heartbeat left it.
    pub active: bool,
    /// What the engines form their communicator with; empty while there is none.
    pub comm_id: String,
    /// In strict mode: the nodes as they were when the comm id was registered, prefill before decode.
    pub legs: Vec<Leg>,
    /// Cluster time when the comm id was registered.
    pub named_ms: u64,
    /// In fixed mode: a decode node that knew the comm id began anew, so that the communicator is gone
    /// until the prefill group begins anew, too.
    pub broken: bool,
    /// Counts pairs: the order of rows.
    pub order: u64,
}

/// How a command is to be understood: as the proposing replica is configured.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Rules {
    /// As the reference does it.
    pub strict: bool,
    /// After how long without a heartbeat a node is offline, milliseconds.
    pub timeout_ms: u32,
}

/// Signs of life are dated by the leader's tick before them, so that much is given in addition to the
/// timeout: nobody is offline before its time.
pub const GRACE_MS: u64 = 500;

impl Rules {
    /// Whether a node that was heard last at `heard` is overdue.
    pub fn overdue(&self, now_ms: u64, heard_ms: u64) -> bool {
        now_ms.saturating_sub(heard_ms) > u64::from(self.timeout_ms) + GRACE_MS
    }
}

/// A change of KsanaLLM's tables.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum KsanaCommand {
    /// A node has started.
    Register {
        /// What it says.
        spec: NodeSpec,
        /// The id that it wants.
        wanted: Option<String>,
        /// A random id, for where the one that describes it is taken.
        spare: String,
        /// How.
        rules: Rules,
    },
    /// A heartbeat that changes something.
    Beat {
        /// Whose.
        node_id: String,
        /// The cluster that a node is of which nobody knows.
        cluster: String,
        /// How.
        rules: Rules,
    },
    /// Heartbeats that changed nothing, since the proposer's last report.
    Heard {
        /// Node ids, and how long before the report they were heard, milliseconds.
        nodes: Vec<(String, u32)>,
        /// How.
        rules: Rules,
    },
    /// A comm id for a pair.
    CommId {
        /// Who says so.
        node_id: String,
        /// The cluster that a node is of which nobody knows.
        cluster: String,
        /// Of which pair.
        comm_key: String,
        /// The id.
        comm_id: String,
        /// How.
        rules: Rules,
    },
    /// The leader finds nodes overdue: those that are so by the committed clock go offline, and those
    /// that have long been are forgotten. Fixed mode only; in strict mode heartbeats do that.
    Judge {
        /// How.
        rules: Rules,
        /// After how long offline a node is forgotten, milliseconds.
        forget_ms: u64,
    },
    /// Request ids for the proposer.
    Lease {
        /// How many.
        count: u32,
        /// Where to begin if none was ever given: random, so that ids that were given out before all
        /// state was lost are hardly met again.
        start: u32,
    },
    /// Takes a node out.
    Remove {
        /// Which.
        node_id: String,
    },
}

/// What became of it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum KsanaOutcome {
    /// Done.
    Done,
    /// The node has this id.
    Registered {
        /// The id.
        node_id: String,
    },
    /// Another node has this place in the group.
    PlaceTaken,
    /// Another node has this id.
    IdTaken,
    /// No such node, and the id describes none.
    UnknownNode,
    /// Only prefill nodes of rank 0 register comm ids.
    NotPrefillHead,
    /// The key is not `<prefill>__<decode>`.
    BadKey,
    /// The key is another group's.
    ForeignKey,
    /// The pair's comm id is this.
    CommId(String),
    /// Ids from here on, so many.
    Block {
        /// The first.
        first: u32,
        /// How many.
        count: u32,
    },
    /// There is no room, or something is out of bounds.
    Refused(String),
}
