//! What the rest of the program may ask of the cluster.
//!
//! The HTTP front, the CLI's admin routes and the prober know the cluster only by this trait;
//! nothing here names openraft.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use super::stats::{ClusterStats, GroupStats, LogStats};
use crate::ids::{Group, Incarnation, ReplicaId, StreamId, WorkerId, WorkerIx};
use crate::kv::feed::Cursor;
use crate::routing::blocks::Blocks;
use crate::routing::book::{Booking, Bookings, Tentative};
use crate::routing::groups::Groups;
use crate::routing::view::RegistryView;
use crate::state::command::{CacheCommand, CacheOutcome, ControlCommand, ControlOutcome, ReplicaInfo};
use crate::state::ksana::{KsanaState, Rules};
use crate::state::ranks::{RankKey, Ranks};
use crate::state::streams::StreamRecord;

/// Why the cluster did not do something.
#[derive(thiserror::Error, Clone, Debug, PartialEq, Eq)]
pub enum ClusterError {
    /// No quorum within the deadline. The command may still be applied later; it is applied
    /// at most once.
    #[error("no quorum of replicas answered within {} ms", .waited.as_millis())]
    Unavailable {
        /// How long was waited.
        waited: Duration,
    },
    /// The queue of proposals is full.
    #[error("the queue of proposals is full ({bytes} bytes wait for a leader)")]
    Overloaded {
        /// Bytes waiting.
        bytes: usize,
    },
    /// The request makes no sense for this cluster; the text says why and what to do.
    #[error("{0}")]
    Refused(String),
    /// This replica is stopping or its storage has failed.
    #[error("this replica does not take part: {0}")]
    Down(String),
}

impl ClusterError {
    /// Whether the same call may succeed a little later.
    pub fn retryable(&self) -> bool {
        !matches!(self, ClusterError::Refused(_))
    }
}

/// A boxed future with a cluster answer.
pub type Answer<T> = Pin<Box<dyn Future<Output = Result<T, ClusterError>> + Send>>;

/// Life of one Raft group as seen from one replica.
#[derive(Clone, Serialize, Deserialize, Debug, Default)]
pub struct GroupStatus {
    /// `control` or `cache`.
    pub group: String,
    /// `leader`, `follower`, `candidate`, `learner` or `down`.
    pub role: String,
    /// Raft term.
    pub term: u64,
    /// Leader, where known.
    pub leader: Option<ReplicaId>,
    /// Last log index on disk here.
    pub last_log: u64,
    /// Last index known to be committed.
    pub committed: u64,
    /// Last index applied here.
    pub applied: u64,
    /// Index of the newest checkpoint.
    pub checkpoint: u64,
    /// Oldest index still in the log.
    pub first_log: u64,
    /// Bytes of log on disk.
    pub log_bytes: u64,
    /// Digest of the state at `applied`, hexadecimal.
    pub digest: String,
    /// Milliseconds since a quorum was last known to follow (leader) or the leader was last
    /// heard (follower); `None` before the first.
    pub quorum_age_ms: Option<u64>,
}

/// One member.
#[derive(Clone, Serialize, Deserialize, Debug)]
pub struct MemberStatus {
    /// Member id.
    pub id: ReplicaId,
    /// Name and addresses.
    pub info: ReplicaInfo,
    /// Its current life, where known.
    pub incarnation: Option<Incarnation>,
    /// `voter` or `learner`.
    pub membership: String,
    /// Heard from within its lease, by committed decision.
    pub alive: bool,
    /// Log entries behind the leader in the cache group, where the leader says so.
    pub lag: Option<u64>,
    /// Whether it leads the control group.
    pub leads_control: bool,
    /// Whether it leads the cache group.
    pub leads_cache: bool,
    /// Requests it has in flight, cluster view.
    pub requests: i64,
    /// How old the newest is that the answering replica knows of this one, in milliseconds at
    /// most; `None` for itself and before the first.
    #[serde(default)]
    pub view_age_ms: Option<u64>,
}

/// The cluster as one replica sees it.
#[derive(Clone, Serialize, Deserialize, Debug)]
pub struct ClusterStatus {
    /// Hexadecimal cluster id; empty while the replica belongs to none.
    pub cluster_id: String,
    /// Who answers.
    pub me: ReplicaId,
    /// Its name.
    pub name: String,
    /// Its life.
    pub incarnation: Incarnation,
    /// Whether a quorum was heard of within the last second, in the control group.
    pub quorum: bool,
    /// Whether it has applied, since it started, all that was committed before; or there is nobody to hear
    /// that from.
    #[serde(default)]
    pub current: bool,
    /// Why this replica does not take part, if so.
    pub down: Option<String>,
    /// Both groups.
    pub groups: Vec<GroupStatus>,
    /// All members.
    pub members: Vec<MemberStatus>,
}

/// What one replica's state of the cache group was at one index of the log, for comparison with
/// others'. Equal indexes must have equal digests.
#[derive(Clone, Serialize, Deserialize, Debug, Default, PartialEq, Eq)]
pub struct CacheDigest {
    /// Index of the last entry applied; 0 where nothing was.
    pub applied: u64,
    /// Digest of the whole state as of then, hexadecimal.
    pub state: String,
    /// Of that, the prefix index.
    pub index: String,
    /// What all replicas reported lately, at indexes that they agree on beforehand; oldest first.
    pub rounds: Vec<DigestRound>,
}

/// The replicas' reports about one index.
#[derive(Clone, Serialize, Deserialize, Debug, Default, PartialEq, Eq)]
pub struct DigestRound {
    /// Index of the log.
    pub index: u64,
    /// Digest of the whole state as of then, by replica.
    pub states: BTreeMap<ReplicaId, String>,
}

/// A change of membership.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", tag = "op")]
pub enum MemberOp {
    /// Tell the waiting replica at this peer address to join.
    Add {
        /// `host:port` of its peer listener.
        peer: String,
    },
    /// Remove a member (by name or id) from both groups.
    Remove {
        /// Name or id.
        member: String,
    },
    /// Make a learner a voter.
    Promote {
        /// Name or id.
        member: String,
    },
    /// Hand leadership of both groups to a member.
    TransferLeader {
        /// Name or id; `None` picks the most caught-up other voter.
        member: Option<String>,
    },
}

/// The cluster, as seen by everything above it.
pub trait ControlPlane: Send + Sync + 'static {
    /// Proposes a command and waits until this replica has applied it. Held through an
    /// election; fails with [`ClusterError::Unavailable`] after the configured deadline (3 s).
    fn propose(&self, command: ControlCommand) -> Answer<ControlOutcome>;

    /// Waits until this replica has applied everything committed before the call.
    fn read_barrier(&self, group: Group) -> Answer<()>;

    /// Takes note of a worker's heartbeat; reported to the cluster within 250 ms. False when
    /// this replica does not know the worker (ask again after a [`ControlPlane::read_barrier`]).
    fn heartbeat(&self, worker: &WorkerId) -> bool;

    /// Takes note of a health probe's result.
    fn probed(&self, worker: &WorkerId, healthy: bool);

    /// The registry as applied here.
    fn registry(&self) -> Arc<RegistryView>;

    /// Books and frees load.
    fn bookings(&self) -> &Bookings;

    /// Has a booking confirmed by the cluster; `None` if somebody has booked on the worker since it
    /// was chosen. Waits for as long as that takes: a caller who does not is not held to it, and
    /// what was booked is freed.
    fn reserve(&self, tentative: Tentative) -> Answer<Option<Booking>>;

    /// Proposes a command of the cache group and waits until this replica has applied it, like
    /// [`ControlPlane::propose`].
    fn propose_cache(&self, command: CacheCommand) -> Answer<CacheOutcome>;

    /// Like [`ControlPlane::propose_cache`], of what may wait some milliseconds: it goes with what the
    /// cluster is told next.
    fn propose_cache_unhurried(&self, command: CacheCommand) -> Answer<CacheOutcome> {
        self.propose_cache(command)
    }

    /// Tells the cluster something of the cache group that nobody waits for; forgotten when there
    /// is no room.
    fn tell_cache(&self, command: CacheCommand);

    /// Who has which blocks.
    fn blocks(&self) -> &Blocks;

    /// The ranks and who owns their feeds; changes when one came, went, changed hands or became
    /// whole.
    fn ranks(&self) -> watch::Receiver<Arc<Ranks>>;

    /// How far one rank's events were applied here.
    fn feed_cursor(&self, rank: RankKey) -> Option<Cursor>;

    /// Which worker a session is with, as applied here, and whether that should be said again before
    /// it is forgotten.
    fn session(&self, session: u64) -> Option<(WorkerIx, bool)>;

    /// How many sessions are bound to a worker.
    fn sessions(&self) -> usize {
        0
    }

    /// A stream, as applied here.
    fn stream(&self, _id: StreamId) -> Option<StreamRecord> {
        None
    }

    /// The streams that `wanted` lets through, as applied here, by id; at most `most`.
    fn streams(
        &self,
        _wanted: &mut dyn FnMut(StreamId, &StreamRecord) -> bool,
        _most: usize,
    ) -> Vec<(StreamId, StreamRecord)> {
        Vec::new()
    }

    /// What stream ids and capabilities are derived from; `None` before anybody has said it.
    fn stream_secret(&self) -> Option<[u8; 32]> {
        None
    }

    /// Has `told` called with each stream that is taken over, and its new attempt, as that is applied
    /// here. At most one caller; it must not block.
    fn on_stream_moved(&self, _told: Box<dyn Fn(StreamId, u32) + Send + Sync>) {}

    /// Shows KsanaLLM's tables as applied here, with the cluster time; false where there are none.
    fn ksana(&self, _look: &mut dyn FnMut(&KsanaState, u64)) -> bool {
        false
    }

    /// KsanaLLM's groups with what is booked on them.
    fn ksana_groups(&self) -> Arc<Groups> {
        Arc::default()
    }

    /// Takes note of a KsanaLLM node's heartbeat that changes nothing but its time; reported to the
    /// cluster within 250 ms, with all that came since the last report.
    fn ksana_heard(&self, _node: &str, _rules: Rules) {}

    /// How long what this replica proposed is waiting to be applied, in milliseconds: what its
    /// peers proposed may be as old. 0 while nothing waits.
    fn view_age_ms(&self) -> u64;

    /// Changes the membership; answers with a sentence for the operator.
    fn member(&self, op: MemberOp) -> Answer<String>;

    /// The cluster as this replica sees it.
    fn status(&self) -> ClusterStatus;

    /// What was counted since the start; nothing where nothing is.
    fn stats(&self) -> ClusterStats {
        ClusterStats::default()
    }

    /// Where the state of the cache group stands; nothing where there is none.
    fn cache_digest(&self) -> CacheDigest {
        CacheDigest::default()
    }
}
