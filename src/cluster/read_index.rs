//! Linearizable reads: up to which index a reader must wait to have seen everything that was
//! committed before it asked.
//!
//! The leader notes what is committed, then asks the voters whether any of them has voted in a
//! later term. If a quorum has not, nobody was elected in a later term before that moment, so
//! nothing was committed that the leader does not know.
//!
//! openraft's own `ReadPolicy::ReadIndex` is not used. It takes the answer to an append as the
//! answer to every later append that ends at the same log id, and a commit alone makes such an
//! append. So a leader that was frozen with an append in flight and goes on after another was
//! elected may find the old answer in its socket, take it for a fresh one, and answer from the
//! past (seen in `chaos-tests`, `frozen`; version 0.10.0-alpha.37).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;

use super::machine::Raft;
use super::peer::lane::Lane;
use super::peer::link::Links;
use super::peer::wire::{Kind, ReadIndexReply};
use super::types::{PeerNode, Vote};
use crate::codec;
use crate::ids::{Group, ReplicaId};

/// A voter that does not vouch within this does not count.
const WITHIN: Duration = Duration::from_millis(400);

/// Answers [`Kind::ReadIndex`] on the leader.
pub struct ReadIndex {
    me: ReplicaId,
    links: Arc<Links>,
    /// By member and address; a member removed leaves one closed lane behind.
    lanes: Mutex<HashMap<(ReplicaId, String), Arc<Lane>>>,
}

/// The leader's position at one moment.
struct Stand {
    vote: Vote,
    index: u64,
    /// The voters; two sets while the membership changes, with a quorum needed in each.
    quorums: Vec<BTreeSet<u64>>,
    nodes: Vec<(u64, PeerNode)>,
}

impl ReadIndex {
    /// For member `me`, asking over `links`.
    pub fn new(me: ReplicaId, links: Arc<Links>) -> Self {
        Self { me, links, lanes: Mutex::default() }
    }

    /// The index, if this replica leads and a quorum vouches for it.
    pub async fn ask(&self, raft: &Raft, group: Group) -> ReadIndexReply {
        let Some(stand) = stand(raft, self.me).await else { return ReadIndexReply::NotLeader };
        let body = codec::encode(&stand.vote);
        let mut answers: FuturesUnordered<_> = stand
            .nodes
            .iter()
            .filter(|(id, _)| *id != self.me.0 && stand.quorums.iter().any(|voters| voters.contains(id)))
            .filter_map(|(id, node)| Some((*id, self.lane(ReplicaId(*id), node)?)))
            .map(|(id, lane)| {
                let body = body.clone();
                async move {
                    let answer = lane.call(Kind::Vouch, group, body, WITHIN).await.ok()?;
                    codec::decode::<bool>(&answer).ok()?.then_some(id)
                }
            })
            .collect();
        let mut vouched = BTreeSet::from([self.me.0]);
        while !is_quorum(&stand.quorums, &vouched) {
            match answers.next().await {
                Some(Some(id)) => vouched.insert(id),
                Some(None) => continue,
                None => return ReadIndexReply::NotLeader,
            };
        }
        ReadIndexReply::Index(stand.index)
    }

    fn lane(&self, id: ReplicaId, node: &PeerNode) -> Option<Arc<Lane>> {
        let key = (id, node.peer.clone());
        if let Some(lane) = self.lanes.lock().get(&key) {
            return Some(lane.clone());
        }
        let lane = Arc::new(Lane::new(self.links.to(id, node).ok()?));
        let mut lanes = self.lanes.lock();
        lanes.retain(|(other, address), _| *other != id || *address == node.peer);
        Some(lanes.entry(key).or_insert(lane).clone())
    }
}

/// Whether `asked` is not behind what this replica has voted: the answer to [`Kind::Vouch`].
pub async fn vouch(raft: &Raft, asked: Vote) -> bool {
    // Asked of the core itself, in line with the votes that it gives.
    raft.with_raft_state(move |state| *state.vote_ref() <= asked).await.unwrap_or(false)
}

async fn stand(raft: &Raft, me: ReplicaId) -> Option<Stand> {
    raft.with_raft_state(move |state| {
        let vote = *state.vote_ref();
        if !vote.is_committed() || vote.leader_id().node_id != me.0 {
            return None;
        }
        // Only what was committed in this term tells what was committed before it.
        let committed = state.cluster_committed()?;
        if committed.leader_id.term != vote.leader_id().term || committed.leader_id.node_id != me.0 {
            return None;
        }
        let membership = state.membership_state.effective();
        Some(Stand {
            vote,
            index: committed.index,
            quorums: membership.get_joint_config().clone(),
            nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
        })
    })
    .await
    .ok()
    .flatten()
}

/// Whether more than half of each set are among `these`.
fn is_quorum(sets: &[BTreeSet<u64>], these: &BTreeSet<u64>) -> bool {
    sets.iter().all(|set| set.intersection(these).count() * 2 > set.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quorum_is_more_than_half_of_every_set() {
        let set = |ids: &[u64]| ids.iter().copied().collect::<BTreeSet<_>>();
        assert!(is_quorum(&[set(&[1])], &set(&[1])));
        assert!(!is_quorum(&[set(&[1, 2])], &set(&[1])));
        assert!(is_quorum(&[set(&[1, 2, 3])], &set(&[1, 3])));
        assert!(!is_quorum(&[set(&[1, 2, 3]), set(&[4, 5, 6])], &set(&[1, 2, 4])));
        assert!(is_quorum(&[set(&[1, 2, 3]), set(&[1, 4, 5])], &set(&[1, 2, 4])));
        assert!(!is_quorum(&[set(&[1, 2, 3])], &set(&[1, 8, 9])), "others do not count");
    }
}
