//! What can be asked of the replicated state, and what it answers.
//!
//! Commands are data: encoded by [`crate::codec`] with a version, carried by the log, applied
//! in the same order on every replica. A command that is refused (an outcome, not an error)
//! is refused alike everywhere.

use serde::{Deserialize, Serialize};

use super::corrections::Correction;
use super::ksana::{KsanaCommand, KsanaOutcome};
use super::load::{LoadDelta, LoadSum};
use super::worker::{WorkerSource, WorkerSpec};
use bytes::Bytes;

use super::ranks::RankKey;
use super::streams::{StreamEnd, StreamRecord};
use crate::ids::{Group, Incarnation, ReplicaId, StreamId, WorkerId, WorkerIx};
use crate::kv::feed::Cursor;
use crate::kv::hash::Seed;

/// A mutation of the control group.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum ControlCommand {
    /// Adds a worker or replaces its record. A worker registered under the same id by a more
    /// trusted source (config and admin before node) keeps its record.
    RegisterWorker {
        /// The new record's content.
        spec: WorkerSpec,
        /// Held to heartbeats from now on (true) or probed (false).
        heartbeats: bool,
    },
    /// Removes a worker.
    RemoveWorker {
        /// Which.
        id: WorkerId,
        /// Only if this source put it there; `None` removes whatever the source.
        only_source: Option<WorkerSource>,
        /// With `only_source`: the node token that asks. An online worker goes only by the one it
        /// came with.
        owner: Option<String>,
    },
    /// Sets or clears the drain flag.
    DrainWorker {
        /// Which.
        id: WorkerId,
        /// New requests stay away while set.
        drain: bool,
    },
    /// Workers heard from at a replica since its last report: heartbeats or good probes.
    Heard {
        /// Workers whose own heartbeat arrived.
        heartbeats: Vec<Sign>,
        /// Workers whose health route answered a probe.
        probed: Vec<Sign>,
        /// Workers whose health route refused or failed a probe at this replica.
        failed: Vec<WorkerId>,
    },
    /// The leader's clock: this much time has passed since its last tick, and these replicas
    /// answered it within their lease.
    Tick {
        /// Milliseconds of the leader's monotonic clock; 0 in a leader's first tick, so that a
        /// change of leader expires nobody.
        elapsed_ms: u32,
        /// Replicas heard from.
        replicas: Vec<ReplicaId>,
        /// After how long without a sign a worker is offline, as the leader is configured.
        worker_timeout_ms: u32,
        /// Life of a replica's lease after its last sign, milliseconds.
        lease_ms: u32,
    },
    /// A replica process has started.
    ReplicaUp {
        /// Which.
        id: ReplicaId,
        /// Its life.
        incarnation: Incarnation,
        /// How others name and reach it.
        info: ReplicaInfo,
    },
    /// Hands out the next unused replica id, once for each `nonce` (a retry gets the same id).
    AllocateReplicaId {
        /// Chosen at random by the joining replica.
        nonce: u64,
        /// Who asks.
        name: String,
    },
    /// A replica's digest of its state at a log index; the state tells which differ.
    Digest {
        /// Who says so.
        id: ReplicaId,
        /// Of which group's state.
        group: Group,
        /// After applying this index.
        index: u64,
        /// [`crate::state::digest`].
        digest: u64,
    },
    /// A member was removed from the cluster: forget it.
    ForgetReplica {
        /// Which.
        id: ReplicaId,
    },
    /// Nothing. A no-op through the whole path, for measuring and for barriers.
    Noop,
    /// What a worker's engine said of itself after it was registered; what is known already stays.
    Learned {
        /// Which.
        id: WorkerId,
        /// The registration it belongs to; a later one is left alone.
        generation: u64,
        /// Tokens in a KV block.
        block_size: Option<u32>,
        /// KV blocks the engine can hold, over all ranks.
        capacity_blocks: Option<u64>,
    },
    /// A change of KsanaLLM's tables.
    Ksana(KsanaCommand),
}

/// A sign of life.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Sign {
    /// Whose.
    pub id: WorkerId,
    /// How long before the report it came, milliseconds.
    pub age_ms: u32,
}

/// A mutation of the cache group.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum CacheCommand {
    /// What the proposing replica booked and freed since its last batch.
    Loads(Vec<(RankKey, LoadDelta)>),
    /// All that the proposing replica holds; replaces its column.
    ReplaceLoads(Vec<(RankKey, LoadDelta)>),
    /// The cache leader's clock, with the replicas that answered it within their lease.
    Tick {
        /// See [`ControlCommand::Tick`].
        elapsed_ms: u32,
        /// Replicas heard from.
        replicas: Vec<ReplicaId>,
        /// Life of a lease after the last sign, milliseconds.
        lease_ms: u32,
    },
    /// A replica process has started: what its earlier lives hold is released.
    ReplicaUp {
        /// Which.
        id: ReplicaId,
        /// Its life.
        incarnation: Incarnation,
    },
    /// A member was removed: release what it holds and forget it.
    ForgetReplica {
        /// Which.
        id: ReplicaId,
    },
    /// The proposing replica wants to listen to a rank's events. It gets the feed if `from` has
    /// it, so that two who want it at once do not take it from each other.
    ClaimFeed {
        /// Whose events.
        rank: RankKey,
        /// Who has it, as far as the proposer knows.
        from: Option<ReplicaId>,
    },
    /// The proposing replica listens no longer.
    ReleaseFeed {
        /// To whose events.
        rank: RankKey,
    },
    /// What a rank's engine said, from its feed's owner. All of it is applied, or nothing.
    Events {
        /// Whose blocks.
        rank: RankKey,
        /// Where the feed stands, for this to be applied.
        after: Cursor,
        /// Where it stands then.
        cursor: Cursor,
        /// [`crate::kv::wire::encode`]d operations.
        ops: Bytes,
    },
    /// The proposing replica sent a prompt to a rank.
    Routed {
        /// Where to.
        rank: RankKey,
        /// What the hashes were made with.
        seed: Seed,
        /// Local hashes of the prompt's blocks, as little-endian u64.
        locals: Bytes,
        /// Blocks that the rank holds, for one whose engine tells nothing: its blocks are
        /// reckoned from what is sent to it. `None` for one with events.
        capacity: Option<u64>,
    },
    /// A worker has left the registry: its ranks hold nothing.
    ForgetWorker {
        /// Which.
        worker: WorkerIx,
    },
    /// How much memory the prefix index may take, on every replica from here on: configured
    /// differently, they would forget differently.
    BoundIndex {
        /// See [`crate::kv::index::Options::bytes`].
        bytes: u64,
    },
    /// Nothing.
    Noop,
    /// The proposing replica books a request before it sends it: only if no more is booked on the
    /// worker, by all together and on all of its ranks, than it knew of when it chose.
    Reserve {
        /// Where.
        rank: RankKey,
        /// What is booked.
        delta: LoadDelta,
        /// Most that may be booked on the worker, of each kind.
        at_most: LoadSum,
    },
    /// The worker's engine has more to do than is booked there, or less, for long, as the proposing
    /// replica was told by it: by so much, on the worker and on each of its ranks. Replaces what was
    /// said of it before; zero takes that back.
    Correct {
        /// Where.
        worker: WorkerIx,
        /// How much more; below zero for less.
        extra: Correction,
    },
    /// The proposing replica sent a session's request to a worker, where it stays from now on.
    Bind {
        /// The session.
        session: u64,
        /// Where it is.
        worker: WorkerIx,
        /// Where it was, as far as the proposer knows; otherwise nothing changes.
        from: Option<WorkerIx>,
    },
    /// The process that a worker's engine is in, by the time of its start; or, where it does not
    /// say, that it has begun anew. What was reckoned of another process is void.
    Life {
        /// Whose.
        worker: WorkerIx,
        /// Milliseconds since 1970; `None` if it has begun anew.
        life: Option<u64>,
    },
    /// A rank's engine has no events any more: what they told is void, and its blocks are reckoned
    /// from here on. For whoever has its feed, or anybody if nobody has.
    LoseFeed {
        /// Whose.
        rank: RankKey,
    },
    /// A stream has begun.
    OpenStream {
        /// Which.
        id: StreamId,
        /// What is known of it; the time is the state's.
        record: StreamRecord,
    },
    /// A stream's holder is taken to be dead: another one goes on, if nobody else does.
    TakeStream {
        /// Which.
        id: StreamId,
        /// The attempt that has failed; the next is the new holder's.
        from_attempt: u32,
        /// The record that is to stand; attempt and time are the state's.
        record: StreamRecord,
    },
    /// The proposing replica has a copy of a stream.
    MirrorStream {
        /// Of which.
        id: StreamId,
        /// In which attempt.
        attempt: u32,
    },
    /// A stream has ended.
    EndStream {
        /// Which.
        id: StreamId,
        /// In which attempt; the word of an earlier one counts nothing.
        attempt: u32,
        /// How.
        how: StreamEnd,
        /// How long it stays listed, milliseconds.
        keep_ms: u32,
    },
    /// A stream is to be forgotten.
    PurgeStream {
        /// Which.
        id: StreamId,
    },
    /// Random bytes that all replicas derive stream ids and capabilities from; the first count.
    StreamSecret([u8; 32]),
    /// Prompts that the proposing replica told of still wait for the first token of their answers:
    /// [`crate::routing::recent::Recent::still_wait`].
    Waiting {
        /// Which.
        keys: Vec<u64>,
    },
}

/// The answer to a cache command.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum CacheOutcome {
    /// Done.
    Done,
    /// The feed is the proposer's, and stands here.
    Feed(Cursor),
    /// Nothing was applied: the feed stands here.
    Moved(Cursor),
    /// Nothing was applied: the feed is not the proposer's, but this replica's, if anybody's.
    NotOwner(Option<ReplicaId>),
    /// Nothing was applied, and never will be.
    Refused,
    /// Applied, but this replica learned it from a snapshot and does not know the answer.
    Unknown,
    /// Nothing was booked: there is more on the worker than the proposer knew of.
    Busy(LoadSum),
    /// Nothing was changed: the stream stands like this.
    Stream(Box<StreamRecord>),
}

/// A replica as others know it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct ReplicaInfo {
    /// Configured name, unique among live replicas.
    pub name: String,
    /// `host:port` of its peer listener.
    pub peer: String,
    /// `http://host:port` of its client listener.
    pub http: String,
    /// `http://host:port` of its admin listener.
    pub admin: String,
    /// Everline's version.
    pub version: String,
}

/// The answer to a control command.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum ControlOutcome {
    /// Done.
    Done,
    /// Registered; `replaced` when a record stood there before.
    Registered {
        /// Whether a record was replaced.
        replaced: bool,
        /// The record's generation.
        generation: u64,
    },
    /// The worker is not in the registry.
    UnknownWorker,
    /// Refused, with the reason to show the caller.
    Refused(String),
    /// A replica id.
    ReplicaId(ReplicaId),
    /// Applied, but this replica learned it from a snapshot and does not know the answer.
    Unknown,
    /// What became of a change of KsanaLLM's tables.
    Ksana(KsanaOutcome),
}
