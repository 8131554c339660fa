//! Changes of membership, done by the leader of the group they concern.

use std::collections::BTreeSet;
use std::time::Duration;

use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};

use super::machine::Raft;
use super::peer::wire::Reply;
use super::types::{PeerNode, TypeConfig};
use crate::ids::ReplicaId;

/// What a group's membership says, as of this replica.
#[derive(Clone, Debug, Default)]
pub struct Members {
    /// All, voters and learners.
    pub nodes: Vec<(ReplicaId, PeerNode)>,
    /// The voters.
    pub voters: BTreeSet<ReplicaId>,
    /// The leader, where known.
    pub leader: Option<ReplicaId>,
}

impl Members {
    /// Reads the current membership.
    pub fn of(raft: &Raft) -> Self {
        let metrics = raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = &metrics.membership_config;
        Self {
            nodes: membership.nodes().map(|(id, node)| (ReplicaId(*id), node.clone())).collect(),
            voters: membership.voter_ids().map(ReplicaId).collect(),
            leader: metrics.current_leader.map(ReplicaId),
        }
    }

    /// A member's name and address.
    pub fn node(&self, id: ReplicaId) -> Option<&PeerNode> {
        self.nodes.iter().find(|(other, _)| *other == id).map(|(_, node)| node)
    }

    /// Finds a member by id or name.
    pub fn find(&self, text: &str) -> Option<ReplicaId> {
        let by_name = self.nodes.iter().filter(|(_, node)| node.name == text).map(|(id, _)| *id).next_back();
        by_name.or_else(|| {
            let id = ReplicaId(text.parse().ok()?);
            self.node(id).map(|_| id)
        })
    }
}

fn not_leader(raft: &Raft) -> Reply {
    let members = Members::of(raft);
    Reply::NotLeader(members.leader.and_then(|id| members.node(id).cloned()))
}

fn outcome<T>(raft: &Raft, result: Result<T, RaftError<TypeConfig, ClientWriteError<TypeConfig>>>) -> Reply {
    match result {
        Ok(_) => Reply::Done,
        Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => not_leader(raft),
        Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error))) => {
            Reply::Later(error.to_string())
        }
        Err(other) => Reply::Later(other.to_string()),
    }
}

/// Adds a learner; does not wait until it has caught up.
pub async fn add_learner(raft: &Raft, id: ReplicaId, node: PeerNode) -> Reply {
    if !raft.is_leader() {
        return not_leader(raft);
    }
    if Members::of(raft).node(id) == Some(&node) {
        return Reply::Done;
    }
    outcome(raft, raft.add_learner(id.0, node, false).await)
}

/// Makes a learner a voter. Members of the same name are its own earlier selves, whose disk is
/// gone: they leave in the same change, unless `alive` says that one of them still lives.
pub async fn promote(raft: &Raft, id: ReplicaId, alive: impl Fn(ReplicaId) -> bool) -> Reply {
    if !raft.is_leader() {
        return not_leader(raft);
    }
    let members = Members::of(raft);
    let Some(node) = members.node(id) else {
        return Reply::Later(format!("member {id} is not a learner yet"));
    };
    let earlier: BTreeSet<ReplicaId> = members
        .nodes
        .iter()
        .filter(|(other, n)| *other != id && n.name == node.name)
        .map(|(id, _)| *id)
        .collect();
    if let Some(living) = earlier.iter().find(|other| alive(**other)) {
        return Reply::Later(format!(
            "member {living} is also called {:?} and is alive; give one of them another name",
            node.name
        ));
    }
    if !members.voters.contains(&id) || earlier.iter().any(|e| members.voters.contains(e)) {
        let voters: BTreeSet<u64> =
            members.voters.iter().filter(|v| !earlier.contains(v)).map(|v| v.0).chain([id.0]).collect();
        let reply = outcome(raft, raft.change_membership(voters, false).await);
        if reply != Reply::Done {
            return reply;
        }
    }
    // Earlier selves that were only learners.
    forget_nodes(raft, earlier).await
}

async fn forget_nodes(raft: &Raft, nodes: BTreeSet<ReplicaId>) -> Reply {
    let members = Members::of(raft);
    let left: BTreeSet<u64> = nodes.iter().filter(|id| members.node(**id).is_some()).map(|id| id.0).collect();
    if left.is_empty() {
        return Reply::Done;
    }
    outcome(raft, raft.change_membership(ChangeMembers::RemoveNodes(left), false).await)
}

/// Removes a member, voter or learner. A leader that is to go hands over first.
pub async fn remove(raft: &Raft, me: ReplicaId, id: ReplicaId) -> Reply {
    if !raft.is_leader() {
        return not_leader(raft);
    }
    let members = Members::of(raft);
    if members.node(id).is_none() {
        return Reply::Done;
    }
    if members.voters.contains(&id) {
        if members.voters.len() == 1 {
            return Reply::Refused("the last voter cannot be removed".to_owned());
        }
        if id == me {
            let reply = transfer(raft, me, None).await;
            return if reply == Reply::Done { not_leader(raft) } else { reply };
        }
        let voters: BTreeSet<u64> = members.voters.iter().filter(|v| **v != id).map(|v| v.0).collect();
        let reply = outcome(raft, raft.change_membership(voters, false).await);
        if reply != Reply::Done {
            return reply;
        }
    }
    forget_nodes(raft, BTreeSet::from([id])).await
}

/// How long the other side may take to show that it leads.
const TRANSFER_TIMEOUT: Duration = Duration::from_millis(1000);

/// Hands leadership over, to the most caught-up other voter unless told whom, and waits until
/// somebody else leads.
pub async fn transfer(raft: &Raft, me: ReplicaId, to: Option<ReplicaId>) -> Reply {
    if !raft.is_leader() {
        return not_leader(raft);
    }
    let members = Members::of(raft);
    let to = match to {
        Some(id) if !members.voters.contains(&id) => {
            return Reply::Refused(format!("member {id} is not a voter"));
        }
        Some(id) => Some(id),
        None => most_caught_up(raft, me, &members),
    };
    let Some(to) = to else {
        return Reply::Refused("there is no other voter that could lead".to_owned());
    };
    if to == me {
        return Reply::Done;
    }
    if raft.trigger().transfer_leader(to.0).await.is_err() {
        return Reply::Later("this replica's consensus has stopped".to_owned());
    }
    let done = raft
        .wait(Some(TRANSFER_TIMEOUT))
        .metrics(|m| m.current_leader.is_some_and(|leader| leader != me.0), "another leader")
        .await;
    match done {
        Ok(_) => Reply::Done,
        Err(_) => {
            Reply::Later(format!("member {to} did not take over within {} ms", TRANSFER_TIMEOUT.as_millis()))
        }
    }
}

fn most_caught_up(raft: &Raft, me: ReplicaId, members: &Members) -> Option<ReplicaId> {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    let matched = |id: &ReplicaId| {
        let replication = metrics.replication.as_ref()?;
        replication.get(&id.0).copied().flatten().map(|log_id| log_id.index)
    };
    members.voters.iter().filter(|id| **id != me).max_by_key(|id| matched(id)).copied()
}
