//! Finding, keeping and changing a replica's place in the cluster: drives [`super::formation`],
//! answers the calls of others, and takes changes of membership to whoever leads.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::RngExt;

use super::api::{ClusterError, MemberOp};
use super::formation::{self, Finding};
use super::inner::{Inner, Member, StartError};
use super::membership::{self, Members};
use super::peer::link::call_address;
use super::peer::server::{Host, Served};
use super::peer::wire::{Call, Reply};
use super::types::PeerNode;
use crate::ids::{Group, ReplicaId};
use crate::state::command::{CacheCommand, ControlCommand, ControlOutcome};

/// How long one question to a leader may take; a joint change of membership commits twice.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an operator's change is tried.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

impl Inner {
    fn node(&self) -> PeerNode {
        PeerNode { name: self.config.info.name.clone(), peer: self.config.info.peer.clone() }
    }

    /// Writes down a place in a cluster; or gives the one that this replica was given meanwhile:
    /// while it looks around or asks to join, whoever forms the cluster may have counted it in.
    fn take_place(
        &self,
        cluster: u128,
        id: ReplicaId,
        joining: bool,
    ) -> Result<(u128, ReplicaId), StartError> {
        let mut identity = self.identity.lock();
        if let Some(place) = identity.member() {
            return Ok(place);
        }
        // Counted on by others as soon as they hear of it: on disk first.
        let mut placed = identity.clone();
        let place = placed.become_member(cluster, id, joining);
        placed.write(&self.config.data_dir)?;
        *identity = placed;
        tracing::info!(cluster = format!("{cluster:032x}"), member = %id, joining, "took a place in the cluster");
        Ok(place)
    }

    /// Until there is a place: look around, form or join. Then finish what a crash may have left
    /// half done.
    pub(super) async fn find_a_place(self: Arc<Self>) {
        let mut said = String::new();
        while self.member.get().is_none() {
            match self.try_to_find_a_place().await {
                Ok(()) => {}
                Err(why) => {
                    if why != said {
                        tracing::info!(%why, "waiting for a place in a cluster");
                        said = why;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_millis(200)) => {}
                        () = self.nudge.notified() => {}
                        () = self.stop.cancelled() => return,
                    }
                }
            }
        }
        let Some(member) = self.member.get().cloned() else { return };
        let joining = self.identity.lock().joining;
        let finish = async {
            if joining {
                self.finish_joining(&member).await;
            } else {
                tokio::join!(self.finish_forming(&member), self.catch_up());
            }
        };
        tokio::select! {
            () = finish => {}
            () = self.stop.cancelled() => {}
        }
    }

    async fn try_to_find_a_place(self: &Arc<Self>) -> Result<(), String> {
        // Somebody may have formed a cluster with us meanwhile.
        let formed = self.identity.lock().member();
        if let Some((cluster, id)) = formed {
            return self.become_member(cluster, id).await.map_err(|e| self.give_up(&e));
        }
        let config = &self.config;
        let mut join = config.join.clone();
        join.extend(self.invited.lock().iter().cloned());
        if config.peers.len() <= 1 && join.is_empty() {
            let (cluster, id) = (rand::rng().random(), ReplicaId(1));
            return self.settle(cluster, id, false).await;
        }
        match formation::look_around(&self.dialer, &config.info.name, &config.peers, &join).await {
            Finding::Cluster(peer) => {
                let nonce = self.identity.lock().nonce;
                let (cluster, id) = formation::ask_to_join(&self.dialer, &peer, nonce, &self.node()).await?;
                self.settle(cluster, id, true).await
            }
            Finding::AllFresh(members) => match members.first() {
                Some((id, first)) if first.name == config.info.name => {
                    let cluster = rand::rng().random();
                    self.settle(cluster, *id, false).await
                }
                first => Err(format!(
                    "all peers are here; {} forms the cluster",
                    first.map_or("nobody", |(_, node)| node.name.as_str())
                )),
            },
            Finding::Incomplete(missing) => Err(format!("not reached: {}", missing.join(", "))),
        }
    }

    /// Takes a place and starts both groups there.
    async fn settle(self: &Arc<Self>, cluster: u128, id: ReplicaId, joining: bool) -> Result<(), String> {
        let (cluster, id) = self.take_place(cluster, id, joining).map_err(|e| self.give_up(&e))?;
        self.become_member(cluster, id).await.map_err(|e| self.give_up(&e))
    }

    fn give_up(&self, error: &StartError) -> String {
        *self.down.lock() = Some(error.to_string());
        error.to_string()
    }

    /// The first of the first members sees to it that all others know, then initializes the logs.
    async fn finish_forming(&self, member: &Member) {
        let members = if self.config.peers.len() <= 1 {
            vec![(member.id, self.node())]
        } else {
            formation::first_members(&self.config.peers)
        };
        let mine = members.iter().any(|(id, node)| *id == member.id && node.name == self.config.info.name);
        if !mine || member.id != ReplicaId(1) {
            return;
        }
        let nodes: BTreeMap<u64, PeerNode> = members.iter().map(|(id, node)| (id.0, node.clone())).collect();
        for raft in &member.rafts {
            while !raft.is_initialized().await.unwrap_or(true) {
                let formed = formation::form_all(&self.dialer, member.id, member.cluster, &members).await;
                let result = match formed {
                    Ok(()) => raft.initialize(nodes.clone()).await.map_err(|e| e.to_string()),
                    Err(why) => Err(why),
                };
                if let Err(why) = result {
                    tracing::info!(%why, "cluster is not formed yet");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    /// Learner, caught up, voter: in both groups, however often it has to be asked.
    async fn finish_joining(self: &Arc<Self>, member: &Member) {
        for group in Group::ALL {
            let call = Call::AddLearner { group, id: member.id, node: self.node() };
            self.insist(group, call).await;
        }
        // Known to the leaders as a learner: the logs come by themselves.
        self.catch_up().await;
        if self.config.auto_promote {
            for group in Group::ALL {
                self.insist(group, Call::Promote { group, id: member.id }).await;
            }
            tracing::info!(member = %member.id, "caught up and voting");
        }
        let predecessors: Vec<ReplicaId> = member.control.read(|state| {
            let same = |(id, r): &(&ReplicaId, &crate::state::control::ReplicaRecord)| {
                **id != member.id && r.info.name == self.config.info.name
            };
            state.replicas().iter().filter(same).map(|(id, _)| *id).collect()
        });
        for id in predecessors {
            let _ = self.control.submit(&[ControlCommand::ForgetReplica { id }]);
            let _ = self.cache.submit(&[CacheCommand::ForgetReplica { id }]);
        }
        let mut identity = self.identity.lock();
        identity.joining = false;
        if let Err(error) = identity.write(&self.config.data_dir) {
            tracing::error!(%error, "cannot write down that joining is done; it will be done again");
        }
    }

    /// Until all is applied here that was committed before.
    async fn catch_up(&self) {
        for group in Group::ALL {
            while self.read_barrier(group).await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        self.caught_up.store(true, Ordering::Release);
    }

    async fn insist(self: &Arc<Self>, group: Group, call: Call) {
        let mut said = String::new();
        loop {
            match self.ask_leader(group, &call).await {
                Ok(()) => return,
                Err(why) => {
                    if said != why {
                        tracing::info!(%group, %why, "not yet part of the cluster");
                        said = why;
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    /// Takes a change of membership to the group's leader, wherever it is: one round over
    /// everybody known, following pointers.
    async fn ask_leader(self: &Arc<Self>, group: Group, call: &Call) -> Result<(), String> {
        let member = self.member.get().ok_or("this replica belongs to no cluster yet")?;
        let members = Members::of(&member.rafts[group.index()]);
        if members.leader == Some(member.id) {
            match self.answer(call.clone()).await {
                Reply::Done => return Ok(()),
                Reply::Later(why) | Reply::Refused(why) => return Err(why),
                _ => {}
            }
        }
        let leader = members.leader.and_then(|id| members.node(id));
        // With the name of whoever should be there, where it is known.
        let node = |node: &PeerNode| (node.peer.clone(), Some(node.name.clone()));
        let mut addresses: Vec<(String, Option<String>)> = leader.into_iter().map(node).collect();
        addresses.extend(members.nodes.iter().map(|(_, n)| node(n)));
        addresses.extend(self.config.peers.iter().map(|(name, peer)| (peer.clone(), Some(name.clone()))));
        addresses.extend(self.config.join.iter().map(|peer| (peer.clone(), None)));
        addresses.extend(self.invited.lock().iter().map(|peer| (peer.clone(), None)));
        let dialer = &self.dialer;
        let mut asked = Vec::new();
        let mut why = format!("nobody leads the {group} group");
        while let Some((address, name)) = addresses.first().cloned() {
            addresses.remove(0);
            if asked.contains(&address) || address == self.config.info.peer {
                continue;
            }
            match call_address(dialer, &address, name.as_deref(), call, ASK_TIMEOUT).await {
                Ok(Reply::Done) => return Ok(()),
                Ok(Reply::NotLeader(Some(node))) => addresses.insert(0, (node.peer, Some(node.name))),
                Ok(Reply::NotLeader(None)) => {}
                Ok(Reply::Later(text) | Reply::Refused(text)) => return Err(text),
                Ok(other) => why = format!("{address} answered {other:?}"),
                Err(text) => why = format!("{address}: {text}"),
            }
            asked.push(address);
        }
        Err(why)
    }

    /// Asks until it is done, the answer is final, or the time is up.
    async fn change(self: &Arc<Self>, group: Group, call: Call) -> Result<(), ClusterError> {
        let deadline = tokio::time::Instant::now() + CHANGE_TIMEOUT;
        loop {
            let why = match self.ask_leader(group, &call).await {
                Ok(()) => return Ok(()),
                Err(why) => why,
            };
            if tokio::time::Instant::now() >= deadline {
                return Err(ClusterError::Refused(format!("{group} group: {why}")));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// An operator's change of membership.
    pub(super) async fn member_op(self: Arc<Self>, op: MemberOp) -> Result<String, ClusterError> {
        let refused = |why: String| ClusterError::Refused(why);
        let member =
            self.member.get().ok_or_else(|| refused("this replica belongs to no cluster yet".to_owned()))?;
        let find = |text: &str| {
            Members::of(&member.rafts[0])
                .find(text)
                .ok_or_else(|| refused(format!("no member is called {text:?}; see `everline member list`")))
        };
        match op {
            MemberOp::Add { peer } => {
                let invite = Call::Invite { peer: self.config.info.peer.clone() };
                match call_address(&self.dialer, &peer, None, &invite, ASK_TIMEOUT).await {
                    Ok(Reply::Done) => Ok(format!("{peer} is joining; see `everline member list`")),
                    Ok(Reply::Refused(why) | Reply::Later(why)) => Err(refused(why)),
                    Ok(other) => Err(refused(format!("{peer} answered {other:?}"))),
                    Err(why) => Err(refused(format!(
                        "{peer} cannot be reached ({why}); start the new replica with `everline serve --join {}`",
                        self.config.info.peer
                    ))),
                }
            }
            MemberOp::Remove { member: text } => {
                let id = find(&text)?;
                for group in Group::ALL {
                    self.change(group, Call::Remove { group, id }).await?;
                }
                let _ = self.control.submit(&[ControlCommand::ForgetReplica { id }]);
                let _ = self.cache.submit(&[CacheCommand::ForgetReplica { id }]);
                Ok(format!(
                    "{text} (member {id}) is no longer a member; stop it, and delete its data folder before it is used again"
                ))
            }
            MemberOp::Promote { member: text } => {
                let id = find(&text)?;
                for group in Group::ALL {
                    self.change(group, Call::Promote { group, id }).await?;
                }
                Ok(format!("{text} (member {id}) votes"))
            }
            MemberOp::TransferLeader { member: named } => {
                let to = named.as_deref().map(find).transpose()?;
                for group in Group::ALL {
                    self.change(group, Call::Transfer { group, to }).await?;
                }
                Ok(match named.zip(to) {
                    Some((text, id)) => format!("{text} (member {id}) leads both groups"),
                    None => "leadership of both groups was handed over".to_owned(),
                })
            }
        }
    }

    fn alive(&self, member: &Member, id: ReplicaId) -> bool {
        member.control.read(|state| state.replicas().get(&id).is_some_and(|r| r.alive))
    }

    /// Answers a call, of a peer or of this replica itself.
    async fn answer(self: &Arc<Self>, call: Call) -> Reply {
        match call {
            Call::Hello { .. } => {
                let initialized = match self.member.get() {
                    Some(member) => member.rafts[0].is_initialized().await.unwrap_or(false),
                    None => false,
                };
                let place = self.identity.lock().member();
                Reply::Hello { name: self.config.info.name.clone(), member: place, initialized }
            }
            Call::Form { cluster, members } => self.take_part(cluster, &members),
            Call::Invite { peer } => {
                if self.identity.lock().member().is_some() {
                    return Reply::Refused(format!("{} already belongs to a cluster", self.config.info.name));
                }
                *self.invited.lock() = vec![peer];
                self.nudge.notify_one();
                Reply::Done
            }
            Call::Join { nonce, node } => self.give_id(nonce, node).await,
            Call::AddLearner { group, id, node } => match self.member.get() {
                Some(member) => membership::add_learner(&member.rafts[group.index()], id, node).await,
                None => Reply::NotLeader(None),
            },
            Call::Promote { group, id } => match self.member.get() {
                Some(member) => {
                    membership::promote(&member.rafts[group.index()], id, |other| self.alive(member, other))
                        .await
                }
                None => Reply::NotLeader(None),
            },
            Call::Remove { group, id } => match self.member.get() {
                Some(member) => membership::remove(&member.rafts[group.index()], member.id, id).await,
                None => Reply::NotLeader(None),
            },
            Call::Transfer { group, to } => match self.member.get() {
                Some(member) => membership::transfer(&member.rafts[group.index()], member.id, to).await,
                None => Reply::NotLeader(None),
            },
        }
    }

    /// Writes down a place in a cluster that is being formed, unless there is a past.
    fn take_part(&self, cluster: u128, members: &[(ReplicaId, PeerNode)]) -> Reply {
        let Some((id, _)) = members.iter().find(|(_, node)| node.name == self.config.info.name) else {
            return Reply::Refused(format!("{} is not on the list", self.config.info.name));
        };
        match self.take_place(cluster, *id, false) {
            Ok(place) if place == (cluster, *id) => {
                self.nudge.notify_one();
                Reply::Done
            }
            Ok(_) => Reply::Refused(format!("{} belongs to another cluster", self.config.info.name)),
            Err(error) => Reply::Later(error.to_string()),
        }
    }

    async fn give_id(&self, nonce: u64, node: PeerNode) -> Reply {
        let Some(member) = self.member.get() else {
            return Reply::Later("this replica is not a member yet".to_owned());
        };
        let command = ControlCommand::AllocateReplicaId { nonce, name: node.name };
        match self.propose(command).await {
            Ok(ControlOutcome::ReplicaId(id)) => Reply::Joined { cluster: member.cluster, id },
            Ok(other) => Reply::Later(format!("no id was given: {other:?}")),
            Err(error) => Reply::Later(error.to_string()),
        }
    }
}

/// The answering side of the links.
pub(super) struct LinkHost {
    pub(super) inner: Arc<Inner>,
}

impl Host for LinkHost {
    fn served(&self) -> Option<Arc<Served>> {
        Some(self.inner.member.get()?.served.clone())
    }

    fn call(self: Arc<Self>, call: Call) -> Pin<Box<dyn Future<Output = Reply> + Send>> {
        Box::pin(async move { self.inner.answer(call).await })
    }
}
