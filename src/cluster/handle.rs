//! [`ControlPlane`] over a node: proposals with a deadline, read barriers, and the status.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::{Instant as _, ServerState};
use tokio::sync::{oneshot, watch};

use super::api::{
    Answer, CacheDigest, ClusterError, ClusterStats, ClusterStatus, ControlPlane, DigestRound, GroupStatus,
    LogStats, MemberOp, MemberStatus,
};
use super::inner::{Inner, Member};
use super::membership::Members;
use super::peer::wire::{Kind, ReadIndexReply};
use super::proposer::Route;
use crate::codec;
use crate::ids::{Group, Incarnation, ReplicaId, StreamId, WorkerId, WorkerIx};
use crate::kv::feed::Cursor;
use crate::routing::blocks::Blocks;
use crate::routing::book::{Booking, Bookings, Tentative};
use crate::routing::groups::Groups;
use crate::routing::view::RegistryView;
use crate::state::command::{CacheCommand, CacheOutcome, ControlCommand, ControlOutcome, ReplicaInfo};
use crate::state::ksana::{KsanaState, Rules};
use crate::state::ranks::{RankKey, Ranks};
use crate::state::replicated::State;
use crate::state::streams::StreamRecord;

/// A quorum heard of within this is a quorum.
const QUORUM_FRESH: Duration = Duration::from_millis(1000);

/// How soon a consensus that has stopped is noticed.
const FAILURE_CHECK: Duration = Duration::from_secs(1);

/// Everybody else's handle to the node.
pub(super) struct Handle {
    pub(super) inner: Arc<Inner>,
}

impl Inner {
    fn down_reason(&self) -> Result<(), ClusterError> {
        match self.down.lock().clone() {
            Some(why) => Err(ClusterError::Down(why)),
            None => Ok(()),
        }
    }

    /// Proposes one command and waits until it is applied here.
    pub(super) async fn propose(&self, command: ControlCommand) -> Result<ControlOutcome, ClusterError> {
        // An entry that cannot be read back would stop every replica, at every start.
        if let Err(error) = codec::decode::<ControlCommand>(&codec::encode(&command)) {
            return Err(ClusterError::Refused(format!("this build cannot encode the command: {error}")));
        }
        self.down_reason()?;
        self.outcome(self.control.submit(&[command])?, ControlOutcome::Unknown).await
    }

    /// Waits until a command is applied here, for a while.
    async fn outcome<O>(&self, outcomes: oneshot::Receiver<Vec<O>>, unknown: O) -> Result<O, ClusterError> {
        let waited = self.config.propose_timeout;
        match tokio::time::timeout(waited, outcomes).await {
            Ok(Ok(outcomes)) => Ok(outcomes.into_iter().next().unwrap_or(unknown)),
            Ok(Err(_)) => Err(ClusterError::Down("the proposer has stopped".to_owned())),
            Err(_) => Err(ClusterError::Unavailable { waited }),
        }
    }

    /// Puts a reservation into the queue and sees to its end, whoever waits for it.
    fn reserve(
        &self,
        tentative: Tentative,
    ) -> Result<tokio::task::JoinHandle<Result<Option<Booking>, ClusterError>>, ClusterError> {
        let submitted = self.down_reason().and_then(|()| match tentative.command() {
            Some(command) => self.cache.submit(&[command]),
            None => Err(ClusterError::Refused("nothing is to be booked".to_owned())),
        });
        let answer = match submitted {
            Ok(answer) => answer,
            Err(error) => {
                tentative.refused();
                return Err(error);
            }
        };
        // Without a deadline: it may be applied however late. The proposer answers or ends.
        Ok(self.raft_runtime.spawn(async move {
            let outcome = answer.await.ok().and_then(|outcomes| outcomes.into_iter().next());
            match outcome {
                Some(CacheOutcome::Done) => Ok(tentative.confirmed()),
                Some(CacheOutcome::Busy(_)) => {
                    tentative.refused();
                    Ok(None)
                }
                Some(CacheOutcome::Refused) => {
                    tentative.refused();
                    Err(ClusterError::Down("it has no place in the cluster yet".to_owned()))
                }
                _ => {
                    tentative.unknown();
                    Ok(None)
                }
            }
        }))
    }

    /// Waits until everything committed before the call is applied here.
    pub(super) async fn read_barrier(&self, group: Group) -> Result<(), ClusterError> {
        self.down_reason()?;
        let waited = self.config.propose_timeout;
        let barrier = async {
            loop {
                let Some(member) = self.member.get() else {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let raft = &member.rafts[group.index()];
                if let Some(index) = self.ask_read_index(member, group).await {
                    let wait =
                        raft.wait(Some(waited)).applied_index_at_least(Some(index), "read barrier").await;
                    if wait.is_ok() {
                        return;
                    }
                }
                // No leader, or one that is not sure of itself yet.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(waited, barrier).await.map_err(|_| ClusterError::Unavailable { waited })
    }

    async fn ask_read_index(&self, member: &Member, group: Group) -> Option<u64> {
        let route = member.routes[group.index()].borrow().clone();
        let reply = match route {
            Route::Nowhere => return None,
            Route::Here => member.served.reads.ask(&member.rafts[group.index()], group).await,
            Route::Peer(lane) => {
                let answer =
                    lane.call(Kind::ReadIndex, group, Vec::new(), Duration::from_millis(500)).await.ok()?;
                codec::decode(&answer).ok()?
            }
        };
        match reply {
            ReadIndexReply::Index(index) => Some(index),
            ReadIndexReply::NotLeader => None,
        }
    }

    /// Pending while the consensus runs; the reason when one of its groups has stopped for good.
    /// From then on this replica proposes nothing and says why.
    pub(super) async fn watch_for_failure(&self) -> String {
        let why = self.failure().await;
        *self.down.lock() = Some(why.clone());
        why
    }

    async fn failure(&self) -> String {
        loop {
            if let Some(member) = self.member.get() {
                if let Some(why) = member.wal.failed() {
                    return why;
                }
                for (raft, group) in member.rafts.iter().zip(Group::ALL) {
                    if let Err(fatal) = &raft.metrics().borrow_watched().running_state
                        && !self.stop.is_cancelled()
                    {
                        return format!("{group} consensus has stopped: {fatal}");
                    }
                }
            }
            tokio::time::sleep(FAILURE_CHECK).await;
        }
    }

    fn status(&self) -> ClusterStatus {
        let place = self.identity.lock().member();
        let mut status = ClusterStatus {
            cluster_id: place.map(|(cluster, _)| format!("{cluster:032x}")).unwrap_or_default(),
            me: place.map(|(_, id)| id).unwrap_or_default(),
            name: self.config.info.name.clone(),
            incarnation: Incarnation::default(),
            quorum: false,
            current: false,
            down: self.down.lock().clone(),
            groups: Vec::new(),
            members: Vec::new(),
        };
        let Some(member) = self.member.get() else { return status };
        status.incarnation = member.incarnation;
        status.groups = Group::ALL.map(|group| group_status(member, group)).to_vec();
        let fresh = QUORUM_FRESH.as_millis() as u64;
        status.quorum = status.groups[0].quorum_age_ms.is_some_and(|age| age <= fresh);
        // Who hears of no quorum for long serves with what it has.
        let has_waited = || self.started.elapsed() >= self.config.propose_timeout;
        status.current = self.caught_up.load(Ordering::Acquire) || (!status.quorum && has_waited());
        status.members = member_statuses(member);
        status
    }

    fn cache_digest(&self) -> CacheDigest {
        let Some(member) = self.member.get() else { return CacheDigest::default() };
        let look = || member.cache.read(|state| (state.digest(), state.index().digest()));
        let (applied, (state, index)) = member.machines[Group::Cache.index()].at_position(look);
        let hex = |digest: u64| format!("{digest:016x}");
        let rounds = member.control.read(|state| {
            let of_round = |(index, reports): (u64, &BTreeMap<ReplicaId, u64>)| DigestRound {
                index,
                states: reports.iter().map(|(id, digest)| (*id, hex(*digest))).collect(),
            };
            state.digest_rounds(Group::Cache).map(of_round).collect()
        });
        CacheDigest { applied, state: hex(state), index: hex(index), rounds }
    }

    fn stats(&self) -> ClusterStats {
        let control = self.control.counters().read(Group::Control, self.control.queued_bytes());
        let cache = self.cache.counters().read(Group::Cache, self.cache.queued_bytes());
        let log = self.member.get().map(|member| LogStats::from(&member.wal.stats()));
        ClusterStats { groups: vec![control, cache], log }
    }
}

/// How old the newest is that this replica knows of another, at most: cluster time between that
/// and the last tick, and the time since that tick was applied here. The better of both groups.
fn view_age(member: &Member, id: ReplicaId) -> Option<u64> {
    if id == member.id {
        return None;
    }
    let age = |heard_ago: Option<u64>, tick: Option<Duration>| Some(heard_ago? + tick?.as_millis() as u64);
    let control = member.control.read(|state| {
        let record = state.replicas().get(&id)?;
        Some(state.now_ms().saturating_sub(record.last_heard_ms))
    });
    let cache = member.cache.read(|state| state.heard_ms_ago(id));
    let ages = [age(control, member.control.tick_age()), age(cache, member.cache.tick_age())];
    ages.into_iter().flatten().min()
}

/// Milliseconds since a quorum was known to be there: as leader, since a quorum acknowledged;
/// as follower, since an append of the leader was taken.
fn quorum_age(member: &Member, group: Group) -> Option<u64> {
    let raft = &member.rafts[group.index()];
    if raft.is_leader() && Members::of(raft).voters.iter().eq([&member.id]) {
        // The only voter is a quorum by itself. Nobody acknowledges anything to it, so that
        // openraft's time of the last acknowledgement stands still.
        return Some(0);
    }
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    let age = match metrics.state {
        ServerState::Leader => metrics.last_quorum_acked?.elapsed(),
        _ => member.served.heard.age(group)?,
    };
    Some(age.as_millis() as u64)
}

fn group_status(member: &Member, group: Group) -> GroupStatus {
    let raft = &member.rafts[group.index()];
    let quorum_age_ms = quorum_age(member, group);
    let machine = &member.machines[group.index()];
    let (applied, digest) = machine.at_position(|| machine.digest());
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    let role = match (&metrics.running_state, metrics.state) {
        (Err(_), _) | (_, ServerState::Shutdown) => "down",
        (_, ServerState::Leader) => "leader",
        (_, ServerState::Follower) => "follower",
        (_, ServerState::Candidate) => "candidate",
        (_, ServerState::Learner) => "learner",
    };
    GroupStatus {
        group: group.name().to_owned(),
        role: role.to_owned(),
        term: metrics.current_term,
        leader: metrics.current_leader.map(ReplicaId),
        last_log: metrics.last_log_index.unwrap_or(0),
        committed: metrics.local_committed.map_or(0, |id| id.index),
        applied,
        checkpoint: metrics.snapshot.map_or(0, |id| id.index),
        first_log: member.wal.bounds(group).0.unwrap_or(0),
        log_bytes: member.wal.bytes(group),
        digest: format!("{digest:016x}"),
        quorum_age_ms,
    }
}

fn member_statuses(member: &Member) -> Vec<MemberStatus> {
    let control = Members::of(&member.rafts[0]);
    let cache = Members::of(&member.rafts[1]);
    let replication = member.rafts[1].metrics().borrow_watched().replication.clone();
    let last = member.rafts[1].metrics().borrow_watched().last_log_index.unwrap_or(0);
    let records = member.control.read(|state| state.replicas().clone());
    control
        .nodes
        .iter()
        .map(|(id, node)| {
            let record = records.get(id);
            let matched = replication.as_ref().and_then(|r| r.get(&id.0)).map(|m| m.map_or(0, |id| id.index));
            let requests = member.cache.read(|state| state.replica(*id).map_or(0, |(requests, _)| requests));
            let fallback =
                ReplicaInfo { name: node.name.clone(), peer: node.peer.clone(), ..Default::default() };
            MemberStatus {
                id: *id,
                info: record.map_or(fallback, |r| r.info.clone()),
                incarnation: record.map(|r| r.incarnation),
                membership: if control.voters.contains(id) { "voter" } else { "learner" }.to_owned(),
                alive: record.is_some_and(|r| r.alive),
                lag: matched.map(|matched| last.saturating_sub(matched)),
                leads_control: control.leader == Some(*id),
                leads_cache: cache.leader == Some(*id),
                requests,
                view_age_ms: view_age(member, *id),
            }
        })
        .collect()
}

impl Handle {
    fn has_peers(&self) -> bool {
        let Some(member) = self.inner.member.get() else { return false };
        let metrics = member.rafts[1].server_metrics();
        metrics.borrow_watched().membership_config.membership().nodes().count() > 1
    }
}

impl ControlPlane for Handle {
    fn propose(&self, command: ControlCommand) -> Answer<ControlOutcome> {
        let inner = self.inner.clone();
        Box::pin(async move { inner.propose(command).await })
    }

    fn read_barrier(&self, group: Group) -> Answer<()> {
        let inner = self.inner.clone();
        Box::pin(async move { inner.read_barrier(group).await })
    }

    fn heartbeat(&self, worker: &WorkerId) -> bool {
        let known = self.registry().worker(worker).is_some();
        if known {
            self.inner.pulse.heartbeat(worker);
        }
        known
    }

    fn probed(&self, worker: &WorkerId, healthy: bool) {
        if self.registry().worker(worker).is_some() {
            self.inner.pulse.probed(worker, healthy);
        }
    }

    fn registry(&self) -> Arc<RegistryView> {
        self.inner.board.registry.load_full()
    }

    fn bookings(&self) -> &Bookings {
        &self.inner.bookings
    }

    fn reserve(&self, tentative: Tentative) -> Answer<Option<Booking>> {
        let under_way = self.inner.reserve(tentative);
        Box::pin(async move { under_way?.await.map_err(|error| ClusterError::Down(error.to_string()))? })
    }

    fn propose_cache(&self, command: CacheCommand) -> Answer<CacheOutcome> {
        let inner = self.inner.clone();
        Box::pin(async move {
            inner.down_reason()?;
            inner.outcome(inner.cache.submit(&[command])?, CacheOutcome::Unknown).await
        })
    }

    fn propose_cache_unhurried(&self, command: CacheCommand) -> Answer<CacheOutcome> {
        let inner = self.inner.clone();
        Box::pin(async move {
            inner.down_reason()?;
            inner.outcome(inner.cache.submit_unhurried(&[command])?, CacheOutcome::Unknown).await
        })
    }

    fn tell_cache(&self, command: CacheCommand) {
        // No room: then it is not known. That is what was said.
        let _ = match &command {
            // Only peers want to know: this replica has noted it, and the engine will tell.
            CacheCommand::Routed { capacity: None, .. } if !self.has_peers() => Ok(()),
            CacheCommand::Routed { .. } | CacheCommand::MirrorStream { .. } => {
                self.inner.cache.tell(&[command])
            }
            _ => self.inner.cache.submit(&[command]).map(drop),
        };
    }

    fn blocks(&self) -> &Blocks {
        &self.inner.board.blocks
    }

    fn ranks(&self) -> watch::Receiver<Arc<Ranks>> {
        self.inner.board.ranks.subscribe()
    }

    fn feed_cursor(&self, rank: RankKey) -> Option<Cursor> {
        let member = self.inner.member.get()?;
        member.cache.read(|state| state.ranks().get(rank).map(|record| record.cursor))
    }

    fn session(&self, session: u64) -> Option<(WorkerIx, bool)> {
        let member = self.inner.member.get()?;
        member.cache.read(|state| state.sessions().worker(session))
    }

    fn stream(&self, id: StreamId) -> Option<StreamRecord> {
        self.inner.member.get()?.cache.read(|state| state.streams().get(id).cloned())
    }

    fn streams(
        &self,
        wanted: &mut dyn FnMut(StreamId, &StreamRecord) -> bool,
        most: usize,
    ) -> Vec<(StreamId, StreamRecord)> {
        let Some(member) = self.inner.member.get() else { return Vec::new() };
        member.cache.read(|state| {
            let found = state.streams().iter().filter(|(id, record)| wanted(*id, record));
            found.take(most).map(|(id, record)| (id, record.clone())).collect()
        })
    }

    fn stream_secret(&self) -> Option<[u8; 32]> {
        self.inner.member.get()?.cache.read(|state| state.stream_secret())
    }

    fn on_stream_moved(&self, told: Box<dyn Fn(StreamId, u32) + Send + Sync>) {
        let _ = self.inner.board.stream_moved.set(told);
    }

    fn ksana(&self, look: &mut dyn FnMut(&KsanaState, u64)) -> bool {
        let Some(member) = self.inner.member.get() else { return false };
        member.control.read(|state| look(state.ksana(), state.now_ms()));
        true
    }

    fn ksana_groups(&self) -> Arc<Groups> {
        self.inner.board.groups.load_full()
    }

    fn ksana_heard(&self, node: &str, rules: Rules) {
        self.inner.pulse.ksana_heard(node, rules);
    }

    fn sessions(&self) -> usize {
        self.inner.member.get().map_or(0, |member| member.cache.read(|state| state.sessions().len()))
    }

    fn view_age_ms(&self) -> u64 {
        self.inner.cache.oldest_in_flight().map_or(0, |age| age.as_millis() as u64)
    }

    fn member(&self, op: MemberOp) -> Answer<String> {
        let inner = self.inner.clone();
        // On the Raft runtime, so that a caller who goes away does not leave it half done.
        let task = inner.raft_runtime.clone().spawn(inner.member_op(op));
        Box::pin(async move { task.await.map_err(|e| ClusterError::Down(e.to_string()))? })
    }

    fn status(&self) -> ClusterStatus {
        self.inner.status()
    }

    fn stats(&self) -> ClusterStats {
        self.inner.stats()
    }

    fn cache_digest(&self) -> CacheDigest {
        self.inner.cache_digest()
    }
}
