//! How a replica without a past finds its place: forms a new cluster with the peers on its
//! list, or joins one that exists.
//!
//! A new cluster is formed only when *every* peer on the list answers and none of them belongs
//! to a cluster: a replica whose disk was wiped while the others were away must not found a
//! second one. The peer with the lowest name leads: it makes up the cluster id, writes down its
//! own membership, has all others write down theirs, and only then initializes the log. Each
//! step may be repeated after a crash.
//!
//! A replica that finds an existing cluster asks for a *new* member id (an id with an empty log
//! could vote twice), becomes a learner, and when it has caught up takes the place of its dead
//! predecessor of the same name.

use std::collections::BTreeMap;
use std::time::Duration;

use super::peer::dial::Dialer;
use super::peer::link::call_address;
use super::peer::wire::{Call, Reply};
use super::types::PeerNode;
use crate::ids::ReplicaId;

/// How long a peer may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_millis(700);

/// What the peers say.
#[derive(Debug, PartialEq, Eq)]
pub enum Finding {
    /// A cluster exists; this address belongs to it.
    Cluster(String),
    /// Everybody is there and nobody has a past: the first members, with their ids.
    AllFresh(Vec<(ReplicaId, PeerNode)>),
    /// Some are missing; wait.
    Incomplete(Vec<String>),
}

/// The ids of the first members: 1, 2, … in the order of their names.
pub fn first_members(peers: &BTreeMap<String, String>) -> Vec<(ReplicaId, PeerNode)> {
    peers
        .iter()
        .zip(1..)
        .map(|((name, peer), id)| (ReplicaId(id), PeerNode { name: name.clone(), peer: peer.clone() }))
        .collect()
}

/// Asks everybody on the list (and the addresses given for joining) who they are.
pub async fn look_around(
    dialer: &Dialer,
    me: &str,
    peers: &BTreeMap<String, String>,
    join: &[String],
) -> Finding {
    let others: Vec<(Option<&String>, &String)> = peers
        .iter()
        .filter(|(name, _)| name.as_str() != me)
        .map(|(name, peer)| (Some(name), peer))
        .chain(join.iter().map(|peer| (None, peer)))
        .collect();
    let hello = Call::Hello { name: me.to_owned() };
    let asked = others.iter().map(|(name, peer)| {
        let name = name.map(String::as_str);
        call_address(dialer, peer, name, &hello, HELLO_TIMEOUT)
    });
    let replies = futures_util::future::join_all(asked).await;
    let mut missing = Vec::new();
    for ((name, peer), reply) in others.into_iter().zip(replies) {
        match reply {
            Ok(Reply::Hello { initialized: true, member: Some(_), .. }) => {
                return Finding::Cluster(peer.clone());
            }
            Ok(Reply::Hello { name: theirs, .. }) => match name {
                Some(name) if *name != theirs => {
                    missing.push(format!("{name} at {peer} (calls itself {theirs:?}; check the peer list)"));
                }
                Some(_) => {}
                None => missing.push(format!("{peer} (belongs to no cluster yet)")),
            },
            Ok(other) => missing.push(format!("{peer} (answered {other:?})")),
            Err(why) => missing.push(format!("{peer} ({why})")),
        }
    }
    if missing.is_empty() && join.is_empty() {
        Finding::AllFresh(first_members(peers))
    } else {
        Finding::Incomplete(missing)
    }
}

/// Has every other first member write down its membership. All must have, before the log may be
/// initialized.
pub async fn form_all(
    dialer: &Dialer,
    me: ReplicaId,
    cluster: u128,
    members: &[(ReplicaId, PeerNode)],
) -> Result<(), String> {
    let call = Call::Form { cluster, members: members.to_vec() };
    let others = members.iter().filter(|(id, _)| *id != me);
    let asked = others
        .clone()
        .map(|(_, node)| call_address(dialer, &node.peer, Some(&node.name), &call, HELLO_TIMEOUT));
    for ((id, node), reply) in others.zip(futures_util::future::join_all(asked).await) {
        match reply {
            Ok(Reply::Done) => {}
            other => return Err(format!("{} (member {id}): {other:?}", node.name)),
        }
    }
    Ok(())
}

/// Asks a member of a cluster for an id.
pub async fn ask_to_join(
    dialer: &Dialer,
    peer: &str,
    nonce: u64,
    node: &PeerNode,
) -> Result<(u128, ReplicaId), String> {
    let call = Call::Join { nonce, node: node.clone() };
    match call_address(dialer, peer, None, &call, Duration::from_secs(4)).await? {
        Reply::Joined { cluster, id } => Ok((cluster, id)),
        Reply::Refused(why) | Reply::Later(why) => Err(why),
        other => Err(format!("{peer} answered {other:?}")),
    }
}
