//! What streams need to know of the cluster, and tell it.

use std::pin::Pin;
use std::sync::Arc;

use super::together::Together;
use crate::cluster::api::{Answer, ClusterError, ControlPlane};
use crate::ids::{Group, ReplicaId, StreamId};
use crate::state::command::{CacheCommand, CacheOutcome};
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// Another process that may hold streams.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Which.
    pub id: ReplicaId,
    /// Its name, which its certificate has to show.
    pub name: String,
    /// `host:port` of its peer listener.
    pub address: String,
    /// Whether the cluster hears it.
    pub alive: bool,
    /// Whether it leads a group.
    pub leads: bool,
}

/// A boxed future.
pub type Soon<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// How a take-over went.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Taken {
    /// It is the proposer's to give to the new holder.
    Won,
    /// Somebody else was first, or it has ended: it stands like this.
    Lost(Box<StreamRecord>),
    /// There is no room for it in the directory.
    Refused,
}

/// See the module. Replicas have it of their own state, agents and edges ask a replica.
pub trait Directory: Send + Sync + 'static {
    /// This process, where it is a replica.
    fn me(&self) -> Option<ReplicaId>;
    /// The cluster's id, hexadecimal; empty before there is one.
    fn cluster(&self) -> String;
    /// The other replicas.
    fn peers(&self) -> Vec<Peer>;
    /// Whether this process knows what the others know: one that has just started may not know of a single
    /// engine.
    fn is_current(&self) -> bool {
        true
    }
    /// Whether it takes another process to look a stream up.
    fn is_elsewhere(&self) -> bool {
        false
    }
    /// A stream as it stands, as far as is known here; where the directory is elsewhere, as far as is
    /// known there.
    fn find(&self, id: StreamId) -> Soon<Option<StreamRecord>>;
    /// A stream as it stands now, once all is applied that was committed before.
    fn find_surely(&self, id: StreamId) -> Soon<Result<Option<StreamRecord>, ClusterError>>;
    /// Lists a new stream. The answer comes when it is listed; the record that stands, if it was
    /// before.
    fn open(
        &self,
        id: StreamId,
        record: StreamRecord,
    ) -> Soon<Result<Option<Box<StreamRecord>>, ClusterError>>;
    /// The same, some milliseconds later: who is asked for the stream before that finds it at its
    /// holder and at its client's process.
    fn list(
        &self,
        id: StreamId,
        record: StreamRecord,
    ) -> Soon<Result<Option<Box<StreamRecord>>, ClusterError>> {
        self.open(id, record)
    }
    /// Gives a stream to another holder, if it is still in this attempt.
    fn take(
        &self,
        id: StreamId,
        from_attempt: u32,
        record: StreamRecord,
    ) -> Soon<Result<Taken, ClusterError>>;
    /// This replica has a copy. Not said by who is none: nobody could come for it.
    fn mirror(&self, id: StreamId, attempt: u32);
    /// A stream has ended.
    fn end(&self, id: StreamId, attempt: u32, how: StreamEnd, keep_ms: u32);
    /// A stream is to be forgotten.
    fn purge(&self, id: StreamId);
    /// What ids are derived from; `None` before there is a cluster.
    fn secret(&self) -> Option<[u8; 32]>;
    /// Offers random bytes for [`Directory::secret`], where there are none yet; the first count.
    fn offer_secret(&self, _secret: [u8; 32]) {}
    /// Where a holder is reached: `host:port` and the name its certificate has to show.
    fn address(&self, holder: Holder) -> Soon<Option<Address>>;
}

/// `host:port`, and the name that the certificate there has to show.
pub type Address = (String, Option<String>);

/// A replica's directory.
pub struct OfReplica {
    control: Arc<dyn ControlPlane>,
    barrier: Arc<Together>,
}

impl OfReplica {
    /// Of this cluster.
    pub fn new(control: Arc<dyn ControlPlane>) -> Arc<Self> {
        Arc::new(Self { control, barrier: Arc::default() })
    }

    fn locate(&self, holder: Holder) -> Option<Address> {
        match holder {
            Holder::Replica(id) => {
                let peer = self.peers().into_iter().find(|peer| peer.id == id)?;
                Some((peer.address, Some(peer.name)))
            }
            Holder::Agent(worker) => {
                let view = self.control.registry();
                let worker = view.workers.iter().find(|view| view.record.ix == worker)?;
                worker.record.spec.agent()
            }
        }
    }
}

/// A directory that tells those outside what they may know of the cluster.
pub trait Known: Directory {
    /// The cluster.
    fn look(&self) -> Look;
}

impl Known for OfReplica {
    fn look(&self) -> Look {
        let status = self.control.status();
        let members = status.members.into_iter().map(|member| Member {
            http: member.info.http.clone(),
            admin: member.info.admin.clone(),
            peer: Peer {
                id: member.id,
                name: member.info.name,
                address: member.info.peer,
                alive: member.alive || member.id == status.me,
                leads: member.leads_control || member.leads_cache,
            },
        });
        Look {
            members: members.collect(),
            cluster: status.cluster_id,
            leader: !status.groups.is_empty() && status.groups.iter().all(|group| group.leader.is_some()),
            quorum: status.quorum,
            agents: self.control.registry().has_agents,
        }
    }
}

/// A replica, for those outside the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// What streams need to know of it.
    pub peer: Peer,
    /// URL of its client listener.
    pub http: String,
    /// URL of its admin listener; empty where it does not say.
    pub admin: String,
}

/// The cluster, as a replica tells those outside.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Look {
    /// The cluster's id, hexadecimal; empty before there is one.
    pub cluster: String,
    /// All replicas.
    pub members: Vec<Member>,
    /// Whether a leader of each group is known.
    pub leader: bool,
    /// Whether a quorum was heard of lately.
    pub quorum: bool,
    /// Whether some engine has an agent.
    pub agents: bool,
}

impl OfReplica {
    fn listed(
        &self,
        id: StreamId,
        answer: Answer<CacheOutcome>,
    ) -> Soon<Result<Option<Box<StreamRecord>>, ClusterError>> {
        let control = Arc::clone(&self.control);
        Box::pin(async move {
            Ok(match answer.await? {
                CacheOutcome::Stream(record) => Some(record),
                // Learned from a snapshot: what stands now is as good.
                CacheOutcome::Unknown => control.stream(id).map(Box::new),
                _ => None,
            })
        })
    }
}

impl Directory for OfReplica {
    fn me(&self) -> Option<ReplicaId> {
        Some(self.control.status().me)
    }

    fn cluster(&self) -> String {
        self.control.status().cluster_id
    }

    fn peers(&self) -> Vec<Peer> {
        let status = self.control.status();
        let others = status.members.into_iter().filter(|member| member.id != status.me);
        others
            .map(|member| Peer {
                id: member.id,
                name: member.info.name,
                address: member.info.peer,
                alive: member.alive,
                leads: member.leads_control || member.leads_cache,
            })
            .collect()
    }

    fn is_current(&self) -> bool {
        self.control.status().current
    }

    fn find(&self, id: StreamId) -> Soon<Option<StreamRecord>> {
        let found = self.control.stream(id);
        Box::pin(std::future::ready(found))
    }

    fn find_surely(&self, id: StreamId) -> Soon<Result<Option<StreamRecord>, ClusterError>> {
        let (control, barrier) = (Arc::clone(&self.control), Arc::clone(&self.barrier));
        Box::pin(async move {
            barrier.pass(|| control.read_barrier(Group::Cache)).await?;
            Ok(control.stream(id))
        })
    }

    fn open(
        &self,
        id: StreamId,
        record: StreamRecord,
    ) -> Soon<Result<Option<Box<StreamRecord>>, ClusterError>> {
        self.listed(id, self.control.propose_cache(CacheCommand::OpenStream { id, record }))
    }

    fn list(
        &self,
        id: StreamId,
        record: StreamRecord,
    ) -> Soon<Result<Option<Box<StreamRecord>>, ClusterError>> {
        self.listed(id, self.control.propose_cache_unhurried(CacheCommand::OpenStream { id, record }))
    }

    fn take(
        &self,
        id: StreamId,
        from_attempt: u32,
        record: StreamRecord,
    ) -> Soon<Result<Taken, ClusterError>> {
        let holder = record.holder;
        let answer = self.control.propose_cache(CacheCommand::TakeStream { id, from_attempt, record });
        let control = Arc::clone(&self.control);
        Box::pin(async move {
            Ok(match answer.await? {
                CacheOutcome::Done => Taken::Won,
                CacheOutcome::Stream(record) => Taken::Lost(record),
                CacheOutcome::Unknown => match control.stream(id) {
                    // Ours, or one just like it of somebody else: then that holder has it already, and
                    // refuses a second order of the same attempt.
                    Some(stands) if stands.attempt == from_attempt + 1 && stands.holder == holder => {
                        Taken::Won
                    }
                    Some(stands) => Taken::Lost(Box::new(stands)),
                    None => Taken::Refused,
                },
                _ => Taken::Refused,
            })
        })
    }

    fn mirror(&self, id: StreamId, attempt: u32) {
        self.control.tell_cache(CacheCommand::MirrorStream { id, attempt });
    }

    fn end(&self, id: StreamId, attempt: u32, how: StreamEnd, keep_ms: u32) {
        let end = CacheCommand::EndStream { id, attempt, how, keep_ms };
        let told = self.control.propose_cache_unhurried(end);
        // Without an answer it is applied later, or the stream is forgotten with its holder's lease.
        tokio::spawn(told);
    }

    fn purge(&self, id: StreamId) {
        tokio::spawn(self.control.propose_cache(CacheCommand::PurgeStream { id }));
    }

    fn secret(&self) -> Option<[u8; 32]> {
        self.control.stream_secret()
    }

    fn offer_secret(&self, secret: [u8; 32]) {
        self.control.tell_cache(CacheCommand::StreamSecret(secret));
    }

    fn address(&self, holder: Holder) -> Soon<Option<Address>> {
        Box::pin(std::future::ready(self.locate(holder)))
    }
}
