//! The control group's state: registry, KsanaLLM's tables, replicas, cluster time, digests.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::command::{ControlCommand, ControlOutcome, ReplicaInfo, Sign};
use super::digest::Digest;
use super::ksana::{KSANA_GROUP, KSANA_NODE, KSANA_PAIR, KSANA_SCALARS, KsanaState};
use super::replicated::{Records, State};
use super::worker::{Liveness, WorkerRecord, WorkerSource, WorkerSpec};
use crate::ids::{Group, Incarnation, ReplicaId, WorkerId, WorkerIx};

/// Most workers in the registry.
pub const MAX_WORKERS: usize = 4096;
/// Most replicas remembered.
pub const MAX_REPLICAS: usize = 64;
/// Digest rounds kept per group until all replicas have reported.
const MAX_DIGEST_ROUNDS: usize = 8;
/// Allocations remembered, so that a retried join gets the id it was given.
const MAX_ALLOCATIONS: usize = 64;

/// A replica as the cluster knows it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct ReplicaRecord {
    /// Name and addresses, as the replica said at its last start.
    pub info: ReplicaInfo,
    /// Its current life.
    pub incarnation: Incarnation,
    /// Cluster time of the last sign of life.
    pub last_heard_ms: u64,
    /// Within its lease.
    pub alive: bool,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
struct Scalars {
    now_ms: u64,
    next_ix: u32,
    next_replica: u64,
    allocations: Vec<(u64, ReplicaId)>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct ControlState {
    workers: BTreeMap<WorkerId, WorkerRecord>,
    replicas: BTreeMap<ReplicaId, ReplicaRecord>,
    ksana: KsanaState,
    scalars: Scalars,
    /// Reports by (group, index); not part of the digest, which they describe.
    digests: BTreeMap<(Group, u64), BTreeMap<ReplicaId, u64>>,
    digest: Digest,
    registry_version: u64,
    diverged: Vec<(Group, u64, ReplicaId)>,
}

const WORKER: u8 = 1;
const REPLICA: u8 = 2;
const SCALARS: u8 = 3;
const DIGESTS: u8 = 4;

impl ControlState {
    /// The registry.
    pub fn workers(&self) -> &BTreeMap<WorkerId, WorkerRecord> {
        &self.workers
    }

    /// The replicas.
    pub fn replicas(&self) -> &BTreeMap<ReplicaId, ReplicaRecord> {
        &self.replicas
    }

    /// KsanaLLM's nodes, groups and pairs.
    pub fn ksana(&self) -> &KsanaState {
        &self.ksana
    }

    /// Cluster time in milliseconds: the sum of all leaders' ticks. It stands still without a
    /// quorum and has nothing to do with the wall clock.
    pub fn now_ms(&self) -> u64 {
        self.scalars.now_ms
    }

    /// Changes whenever something that routing reads has changed. Local, not replicated.
    pub fn registry_version(&self) -> u64 {
        self.registry_version
    }

    /// Replicas whose reported digest differs from what a majority of the reports say, since
    /// the last call. Local, not replicated.
    pub fn take_diverged(&mut self) -> Vec<(Group, u64, ReplicaId)> {
        std::mem::take(&mut self.diverged)
    }

    fn with_worker<R>(&mut self, id: &WorkerId, change: impl FnOnce(&mut WorkerRecord) -> R) -> Option<R> {
        let record = self.workers.get_mut(id)?;
        self.digest.remove(WORKER, record);
        let result = change(record);
        self.digest.add(WORKER, record);
        Some(result)
    }

    fn with_replica(&mut self, id: ReplicaId, change: impl FnOnce(&mut ReplicaRecord)) {
        if let Some(record) = self.replicas.get_mut(&id) {
            self.digest.remove(REPLICA, record);
            change(record);
            self.digest.add(REPLICA, record);
        }
    }

    fn with_scalars<R>(&mut self, change: impl FnOnce(&mut Scalars) -> R) -> R {
        self.digest.remove(SCALARS, &self.scalars);
        let result = change(&mut self.scalars);
        self.digest.add(SCALARS, &self.scalars);
        result
    }

    fn register(&mut self, spec: WorkerSpec, heartbeats: bool) -> ControlOutcome {
        if let Err(why) = spec.validate() {
            return ControlOutcome::Refused(why);
        }
        let now_ms = self.scalars.now_ms;
        let liveness = if heartbeats { Liveness::Heartbeat } else { Liveness::Probe };
        let id = spec.id.clone();
        if let Some(old) = self.workers.get(&id) {
            if spec.source == WorkerSource::Node && old.spec.source == WorkerSource::Node {
                if old.online && old.spec.url != spec.url {
                    return ControlOutcome::Refused(format!(
                        "worker {id} is online at {}; it can be registered elsewhere when it has gone offline or was removed",
                        old.spec.url
                    ));
                }
                if old.online && !old.spec.is_owned_by(spec.owner.as_deref()) {
                    return ControlOutcome::Refused(format!(
                        "worker {id} is online and was registered with another node token; with this one it can \
                         be when it has gone offline or was removed"
                    ));
                }
            } else if spec.source == WorkerSource::Node {
                return ControlOutcome::Refused(format!(
                    "worker {id} was registered by an operator; remove it first or choose another id"
                ));
            }
            if old.spec == spec && matches!(spec.source, WorkerSource::Config | WorkerSource::Name) {
                // Every replica proposes its configured workers at every start, and each new leader what
                // names stand for.
                return ControlOutcome::Registered { replaced: true, generation: old.generation };
            }
            self.registry_version += 1;
            let generation = self.with_worker(&id, |record| {
                record.spec = spec;
                record.online = true;
                record.liveness = liveness;
                record.last_heard_ms = now_ms;
                record.failed_by.clear();
                record.generation += 1;
                record.generation
            });
            return ControlOutcome::Registered { replaced: true, generation: generation.unwrap_or(1) };
        }
        if self.workers.len() >= MAX_WORKERS {
            return ControlOutcome::Refused(format!("the registry is full ({MAX_WORKERS} workers)"));
        }
        let ix = self.with_scalars(|s| {
            s.next_ix += 1;
            WorkerIx(s.next_ix)
        });
        let record = WorkerRecord {
            spec,
            ix,
            drain: false,
            online: true,
            liveness,
            last_heard_ms: now_ms,
            generation: 1,
            failed_by: Default::default(),
        };
        self.digest.add(WORKER, &record);
        self.workers.insert(id, record);
        self.registry_version += 1;
        ControlOutcome::Registered { replaced: false, generation: 1 }
    }

    fn remove(
        &mut self,
        id: &WorkerId,
        only_source: Option<WorkerSource>,
        owner: Option<&str>,
    ) -> ControlOutcome {
        match self.workers.get(id) {
            None => ControlOutcome::UnknownWorker,
            Some(record) if only_source.is_some_and(|source| source != record.spec.source) => {
                ControlOutcome::Refused(format!("worker {id} was registered by an operator and stays"))
            }
            Some(record) if only_source.is_some() && record.online && !record.spec.is_owned_by(owner) => {
                ControlOutcome::Refused(format!(
                    "worker {id} is online and was registered with another node token"
                ))
            }
            Some(record) => {
                self.digest.remove(WORKER, record);
                self.workers.remove(id);
                self.registry_version += 1;
                ControlOutcome::Done
            }
        }
    }

    fn sign_of_life(&mut self, sign: &Sign, heartbeat: bool) {
        let at_ms = self.scalars.now_ms.saturating_sub(sign.age_ms.into());
        let came_back = self.with_worker(&sign.id, |record| {
            if heartbeat {
                record.liveness = Liveness::Heartbeat;
            } else if record.liveness == Liveness::Heartbeat {
                return false;
            }
            record.last_heard_ms = record.last_heard_ms.max(at_ms);
            record.failed_by.clear();
            !std::mem::replace(&mut record.online, true)
        });
        if came_back == Some(true) {
            self.registry_version += 1;
        }
    }

    /// A worker that every live replica fails to reach is offline without waiting for the
    /// timeout.
    fn probe_failed(&mut self, id: &WorkerId, by: ReplicaId) {
        let alive: Vec<ReplicaId> =
            self.replicas.iter().filter(|(_, r)| r.alive).map(|(id, _)| *id).collect();
        let went = self.with_worker(id, |record| {
            if record.liveness == Liveness::Heartbeat {
                return false;
            }
            record.failed_by.insert(by);
            let all = alive.iter().all(|replica| record.failed_by.contains(replica));
            all && std::mem::replace(&mut record.online, false)
        });
        if went == Some(true) {
            self.registry_version += 1;
        }
    }

    fn tick(&mut self, elapsed_ms: u32, heard: &[ReplicaId], worker_timeout_ms: u32, lease_ms: u32) {
        let now_ms = self.with_scalars(|s| {
            s.now_ms += u64::from(elapsed_ms);
            s.now_ms
        });
        let replicas: Vec<ReplicaId> = self.replicas.keys().copied().collect();
        for id in replicas {
            let is_heard = heard.contains(&id);
            self.with_replica(id, |record| {
                if is_heard {
                    record.last_heard_ms = now_ms;
                    record.alive = true;
                } else if now_ms.saturating_sub(record.last_heard_ms) > u64::from(lease_ms) {
                    record.alive = false;
                }
            });
        }
        // Signs are dated by the tick before them, so one period is given in addition: nobody is
        // offline before its time.
        let allowed_ms = u64::from(worker_timeout_ms) + u64::from(elapsed_ms);
        let overdue: Vec<WorkerId> = self
            .workers
            .iter()
            .filter(|(_, w)| w.online && now_ms.saturating_sub(w.last_heard_ms) > allowed_ms)
            .map(|(id, _)| id.clone())
            .collect();
        for id in overdue {
            self.with_worker(&id, |record| record.online = false);
            self.registry_version += 1;
        }
    }

    fn replica_up(&mut self, id: ReplicaId, incarnation: Incarnation, info: ReplicaInfo) -> ControlOutcome {
        if let Some(old) = self.replicas.get(&id) {
            if old.incarnation > incarnation {
                return ControlOutcome::Refused(format!(
                    "replica {id} already lives its life {}",
                    old.incarnation
                ));
            }
            self.digest.remove(REPLICA, old);
        } else if self.replicas.len() >= MAX_REPLICAS {
            return ControlOutcome::Refused(format!("the cluster remembers {MAX_REPLICAS} replicas already"));
        }
        let last_heard_ms = self.scalars.now_ms;
        let record = ReplicaRecord { info, incarnation, last_heard_ms, alive: true };
        self.digest.add(REPLICA, &record);
        self.replicas.insert(id, record);
        self.with_scalars(|s| s.next_replica = s.next_replica.max(id.0 + 1));
        ControlOutcome::Done
    }

    fn allocate(&mut self, nonce: u64) -> ControlOutcome {
        if let Some((_, id)) = self.scalars.allocations.iter().find(|(n, _)| *n == nonce) {
            return ControlOutcome::ReplicaId(*id);
        }
        let id = self.with_scalars(|s| {
            // The first replicas got theirs (1, 2, …) when the cluster was formed, before any
            // entry existed; 101 keeps clear of them even if none has reported in yet.
            let id = ReplicaId(s.next_replica.max(101));
            s.next_replica = id.0 + 1;
            s.allocations.push((nonce, id));
            let excess = s.allocations.len().saturating_sub(MAX_ALLOCATIONS);
            s.allocations.drain(..excess);
            id
        });
        ControlOutcome::ReplicaId(id)
    }

    /// What replicas reported lately of their states of a group: index, and digests by replica.
    pub fn digest_rounds(&self, group: Group) -> impl Iterator<Item = (u64, &BTreeMap<ReplicaId, u64>)> {
        let rounds = self.digests.range((group, 0)..=(group, u64::MAX));
        rounds.map(|((_, index), reports)| (*index, reports))
    }

    fn report_digest(&mut self, id: ReplicaId, group: Group, index: u64, digest: u64) {
        let round = self.digests.entry((group, index)).or_default();
        round.insert(id, digest);
        let mut votes: BTreeMap<u64, usize> = BTreeMap::new();
        for value in round.values() {
            *votes.entry(*value).or_default() += 1;
        }
        if votes.len() > 1 {
            let reports = round.len();
            if let Some((right, _)) = votes.iter().find(|(_, n)| **n * 2 > reports) {
                let wrong = round.iter().filter(|(_, d)| *d != right).map(|(id, _)| (group, index, *id));
                self.diverged.extend(wrong);
            }
        }
        while self.digests.range((group, 0)..=(group, u64::MAX)).count() > MAX_DIGEST_ROUNDS {
            let oldest = self.digests.range((group, 0)..).next().map(|(key, _)| *key);
            if let Some(key) = oldest {
                self.digests.remove(&key);
            }
        }
    }
}

impl State for ControlState {
    type Command = ControlCommand;
    type Outcome = ControlOutcome;

    fn apply(&mut self, origin: ReplicaId, command: ControlCommand) -> ControlOutcome {
        match command {
            ControlCommand::RegisterWorker { spec, heartbeats } => return self.register(spec, heartbeats),
            ControlCommand::RemoveWorker { id, only_source, owner } => {
                return self.remove(&id, only_source, owner.as_deref());
            }
            ControlCommand::DrainWorker { id, drain } => {
                if self.with_worker(&id, |record| record.drain = drain).is_none() {
                    return ControlOutcome::UnknownWorker;
                }
                self.registry_version += 1;
            }
            ControlCommand::Heard { heartbeats, probed, failed } => {
                for sign in &heartbeats {
                    self.sign_of_life(sign, true);
                }
                for sign in &probed {
                    self.sign_of_life(sign, false);
                }
                for id in &failed {
                    self.probe_failed(id, origin);
                }
            }
            ControlCommand::Tick { elapsed_ms, replicas, worker_timeout_ms, lease_ms } => {
                self.tick(elapsed_ms, &replicas, worker_timeout_ms, lease_ms);
            }
            ControlCommand::ReplicaUp { id, incarnation, info } => {
                return self.replica_up(id, incarnation, info);
            }
            ControlCommand::AllocateReplicaId { nonce, .. } => return self.allocate(nonce),
            ControlCommand::Digest { id, group, index, digest } => {
                self.report_digest(id, group, index, digest)
            }
            ControlCommand::ForgetReplica { id } => {
                if let Some(old) = self.replicas.remove(&id) {
                    self.digest.remove(REPLICA, &old);
                }
            }
            ControlCommand::Noop => {}
            ControlCommand::Learned { id, generation, block_size, capacity_blocks } => {
                let is_same = |record: &WorkerRecord| record.generation == generation;
                if !self.workers.get(&id).is_some_and(is_same) {
                    return ControlOutcome::UnknownWorker;
                }
                self.with_worker(&id, |record| {
                    let spec = &mut record.spec;
                    spec.block_size = spec.block_size.or(block_size.filter(|size| *size > 0));
                    spec.capacity_blocks =
                        spec.capacity_blocks.or(capacity_blocks.filter(|blocks| *blocks > 0));
                });
                self.registry_version += 1;
            }
            ControlCommand::Ksana(command) => {
                return ControlOutcome::Ksana(self.ksana.apply(self.scalars.now_ms, command));
            }
        }
        ControlOutcome::Done
    }

    fn unknown() -> ControlOutcome {
        ControlOutcome::Unknown
    }

    fn digest(&self) -> u64 {
        self.digest.0.wrapping_add(self.ksana.digest())
    }

    fn records(&self) -> Records {
        use crate::codec::encode;
        let mut records = Records::new();
        records.push((vec![SCALARS], encode(&self.scalars)));
        records.push((vec![DIGESTS], encode(&self.digests)));
        records.extend(self.workers.iter().map(|(id, r)| (key(WORKER, id.as_str().as_bytes()), encode(r))));
        records.extend(
            self.replicas.iter().map(|(id, r)| (key(REPLICA, &id.0.to_be_bytes()), encode(&(id, r)))),
        );
        records.extend(self.ksana.records());
        records
    }

    fn restore(records: Records) -> Result<Self, String> {
        use crate::codec::decode;
        let mut state = Self::default();
        for (key, value) in records {
            let text = |e: crate::codec::CodecError| format!("record {key:02x?}: {e}");
            match key.first() {
                Some(&SCALARS) => state.scalars = decode(&value).map_err(text)?,
                Some(&DIGESTS) => state.digests = decode(&value).map_err(text)?,
                Some(&WORKER) => {
                    let record: WorkerRecord = decode(&value).map_err(text)?;
                    state.digest.add(WORKER, &record);
                    state.workers.insert(record.spec.id.clone(), record);
                }
                Some(&REPLICA) => {
                    let (id, record): (ReplicaId, ReplicaRecord) = decode(&value).map_err(text)?;
                    state.digest.add(REPLICA, &record);
                    state.replicas.insert(id, record);
                }
                Some(&kind @ (KSANA_NODE | KSANA_GROUP | KSANA_PAIR | KSANA_SCALARS)) => {
                    state.ksana.restore(kind, &value).map_err(text)?;
                }
                _ => return Err(format!("record {key:02x?} is of no known kind")),
            }
        }
        if state.scalars != Scalars::default() {
            // The default scalars were never added: `with_scalars` takes them off at the first
            // change, which wraps, and so it must here.
            state.digest.remove(SCALARS, &Scalars::default());
            state.digest.add(SCALARS, &state.scalars);
        }
        state.registry_version = 1;
        Ok(state)
    }
}

fn key(kind: u8, rest: &[u8]) -> Vec<u8> {
    let mut key = vec![kind];
    key.extend_from_slice(rest);
    key
}
