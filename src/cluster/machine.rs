//! openraft's state machine over a replicated state: applies proposals, answers this replica's
//! waiting proposers, publishes to readers, and makes and loads checkpoints.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use parking_lot::{Mutex, RwLock};

use super::stats::GroupCounters;
use super::storage::checkpoint::CheckpointStore;
use super::storage::wal::Wal;
use super::types::{Image, LogId, Proposal, Snapshot, SnapshotMeta, StoredMembership, TypeConfig};
use crate::codec;
use crate::ids::{Group, Incarnation, ReplicaId};
use crate::state::replicated::{Applied, Records, Replicated, State};

/// A group's consensus.
pub type Raft = openraft::Raft<TypeConfig, Machine>;

/// What happens around a state when it changes. Called in log order, on the Raft runtime: must
/// not block.
pub trait Hooks<S: State>: Send + Sync + 'static {
    /// A segment of this replica's current life was applied, for the first time, and published.
    fn acknowledged(&self, number: u64, outcomes: Vec<S::Outcome>);
    /// All of this replica's segments up to this number are known to be applied.
    fn caught_up(&self, number: u64);
    /// A batch of entries was applied, or a snapshot installed; `index` is the last.
    fn published(&self, state: &mut S, index: u64);
    /// `index` is one at which replicas compare digests.
    fn digest_due(&self, index: u64, digest: u64);
}

/// A replicated state with its surroundings; shared by the Raft group, its snapshot builder and
/// all readers.
pub struct Cell<S: State> {
    state: RwLock<Replicated<S>>,
    /// Own segments applied since the last publication: whoever waits for one must find its
    /// effect published.
    acknowledged: Mutex<Vec<(u64, Vec<S::Outcome>)>>,
    hooks: Arc<dyn Hooks<S>>,
    /// When the leader's clock was last heard here: how old the state may be.
    ticked: Mutex<Option<Instant>>,
    me: ReplicaId,
    incarnation: Incarnation,
    digest_every: u64,
}

impl<S: State> Cell<S> {
    /// An empty state. Digests are due every `digest_every` entries, never if that is 0.
    pub fn new(hooks: Arc<dyn Hooks<S>>, me: ReplicaId, incarnation: Incarnation, digest_every: u64) -> Self {
        Self {
            state: RwLock::default(),
            acknowledged: Mutex::default(),
            hooks,
            ticked: Mutex::default(),
            me,
            incarnation,
            digest_every: if digest_every == 0 { u64::MAX } else { digest_every },
        }
    }

    /// Reads the state; writers wait meanwhile, so be short.
    pub fn read<R>(&self, look: impl FnOnce(&S) -> R) -> R {
        look(&self.state.read().state)
    }

    /// How long ago the leader's clock was last heard here; `None` before the first time.
    pub fn tick_age(&self) -> Option<Duration> {
        self.ticked.lock().map(|at| at.elapsed())
    }
}

/// [`Cell`] without its type, so that both groups have the same state machine.
pub trait AnyCell: Send + Sync + 'static {
    /// Applies an entry's proposal; the error says that the log holds what this build cannot read.
    fn apply(&self, leader: ReplicaId, index: u64, proposal: Proposal) -> Result<(), codec::CodecError>;
    /// See [`Hooks::published`].
    fn publish(&self, index: u64);
    /// A consistent copy as records; the copy is taken at once, the encoding when called.
    fn image(&self) -> Box<dyn FnOnce() -> Records + Send>;
    /// Replaces the state.
    fn restore(&self, records: Records) -> Result<(), String>;
    /// The state's digest.
    fn digest(&self) -> u64;
}

impl<S: State> AnyCell for Cell<S> {
    fn apply(&self, leader: ReplicaId, index: u64, proposal: Proposal) -> Result<(), codec::CodecError> {
        let mut replicated = self.state.write();
        if let Some(clock) = proposal.clock {
            replicated.state.apply(leader, codec::decode(&clock)?);
            *self.ticked.lock() = Some(Instant::now());
        }
        for segment in proposal.segments {
            let commands: Vec<S::Command> = codec::decode(&segment.commands)?;
            let mine = segment.origin == self.me && segment.incarnation == self.incarnation;
            let applied = replicated.apply(segment.origin, segment.incarnation, segment.number, commands);
            if let (true, Applied::Now(outcomes)) = (mine, applied) {
                self.acknowledged.lock().push((segment.number, outcomes));
            }
        }
        if index.is_multiple_of(self.digest_every) {
            self.hooks.digest_due(index, replicated.state.digest());
        }
        Ok(())
    }

    fn publish(&self, index: u64) {
        self.hooks.published(&mut self.state.write().state, index);
        for (number, outcomes) in self.acknowledged.lock().drain(..) {
            self.hooks.acknowledged(number, outcomes);
        }
    }

    fn image(&self) -> Box<dyn FnOnce() -> Records + Send> {
        self.state.read().image()
    }

    fn restore(&self, records: Records) -> Result<(), String> {
        let restored = Replicated::restore(records)?;
        let mut state = self.state.write();
        *state = restored;
        let session = state.session(self.me);
        if session.incarnation == self.incarnation {
            self.hooks.caught_up(session.applied);
        }
        Ok(())
    }

    fn digest(&self) -> u64 {
        self.state.read().state.digest()
    }
}

/// What has been applied, beside the state.
#[derive(Clone, Default)]
struct Position {
    applied: Option<LogId>,
    membership: StoredMembership,
}

/// A group's state machine.
#[derive(Clone)]
pub struct Machine {
    group: Group,
    cell: Arc<dyn AnyCell>,
    store: Arc<CheckpointStore>,
    position: Arc<Mutex<Position>>,
    /// Told what was applied, so that the watermark knows.
    wal: Arc<Wal>,
    /// Where the checkpoint before the newest ends: the log from there on must stay, for the
    /// newest may turn out damaged.
    purgeable: Arc<AtomicU64>,
    counters: Arc<GroupCounters>,
}

impl Machine {
    /// Loads the newest good checkpoint into `cell`. Returns the machine and, if the newest was
    /// damaged and the one before was taken, why.
    pub fn open(
        group: Group,
        cell: Arc<dyn AnyCell>,
        store: Arc<CheckpointStore>,
        wal: Arc<Wal>,
        counters: Arc<GroupCounters>,
    ) -> Result<(Self, Option<String>), String> {
        let mut position = Position::default();
        let mut fell_back = None;
        if let Some(checkpoint) = store.load(group).map_err(|e| e.to_string())? {
            let meta: SnapshotMeta = codec::decode(&checkpoint.meta).map_err(|e| e.to_string())?;
            cell.restore(checkpoint.records)?;
            cell.publish(checkpoint.index);
            position = Position { applied: meta.last_log_id, membership: meta.last_membership };
            fell_back = checkpoint.fell_back;
        }
        let position = Arc::new(Mutex::new(position));
        let purgeable = Arc::default();
        Ok((Self { group, cell, store, position, wal, purgeable, counters }, fell_back))
    }

    /// Index of the last entry applied; 0 before the first.
    pub fn applied_index(&self) -> u64 {
        self.position.lock().applied.map_or(0, |id| id.index)
    }

    /// The index of the last entry applied, 0 before the first, and what `look` sees of the state
    /// as of just then. Nothing is applied meanwhile, so be short.
    pub fn at_position<R>(&self, look: impl FnOnce() -> R) -> (u64, R) {
        let position = self.position.lock();
        (position.applied.map_or(0, |id| id.index), look())
    }

    /// The state's digest.
    pub fn digest(&self) -> u64 {
        self.cell.digest()
    }

    /// The log up to here is covered by two checkpoints; 0 while there are not two.
    pub fn purgeable(&self) -> u64 {
        self.purgeable.load(Ordering::Acquire)
    }

    async fn save(
        &self,
        meta: &SnapshotMeta,
        encode: impl FnOnce() -> Image + Send + 'static,
    ) -> io::Result<Image> {
        let (store, group, purgeable) = (self.store.clone(), self.group, self.purgeable.clone());
        let index = meta.last_log_id.map_or(0, |id| id.index);
        let meta = codec::encode(meta);
        let started = Instant::now();
        let task = tokio::task::spawn_blocking(move || {
            let image = encode();
            let info = store.write(group, index, &meta, image.iter().cloned()).map_err(io::Error::other)?;
            purgeable.store(info.previous_index.unwrap_or(0), Ordering::Release);
            Ok(image)
        });
        let saved = task.await.map_err(io::Error::other).flatten();
        self.counters.checkpoint(started.elapsed(), saved.is_ok());
        saved
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Machine {
    type SnapshotData = Image;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        // openraft takes the builder between two batches of entries, so that the position
        // belongs to the state; see `try_create_snapshot_builder`.
        let (position, image) = {
            let position = self.position.lock();
            (position.clone(), self.cell.image())
        };
        let meta = SnapshotMeta { last_log_id: position.applied, last_membership: position.membership };
        let snapshot = self.save(&meta, move || Arc::new(image())).await?;
        Ok(Snapshot { meta, snapshot })
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = Image;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let position = self.position.lock();
        Ok((position.applied, position.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut last = 0;
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            {
                // Position and state move together: a checkpoint must not see one without the other.
                let mut position = self.position.lock();
                match entry.payload {
                    EntryPayload::Blank => {}
                    EntryPayload::Normal(proposal) => {
                        let leader = ReplicaId(entry.log_id.leader_id.node_id);
                        self.cell
                            .apply(leader, entry.log_id.index, proposal)
                            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                    }
                    EntryPayload::Membership(membership) => {
                        position.membership = StoredMembership::new(Some(entry.log_id), membership);
                    }
                }
                position.applied = Some(entry.log_id);
            }
            last = entry.log_id.index;
            if let Some(responder) = responder {
                responder.send(());
            }
        }
        self.cell.publish(last);
        self.wal.note_applied(self.group, last, self.cell.digest().into());
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Image) -> Result<(), io::Error> {
        // Disk first: a crash in between finds the checkpoint, not a state without one.
        let image = self.save(meta, move || snapshot).await?;
        let mut position = self.position.lock();
        self.cell.restore(image.as_ref().clone()).map_err(|why| {
            io::Error::new(io::ErrorKind::InvalidData, format!("snapshot of {}: {why}", self.group))
        })?;
        *position = Position { applied: meta.last_log_id, membership: meta.last_membership.clone() };
        self.cell.publish(meta.last_log_id.map_or(0, |id| id.index));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let (store, group) = (self.store.clone(), self.group);
        let loaded = tokio::task::spawn_blocking(move || store.load(group))
            .await
            .map_err(io::Error::other)?
            .map_err(io::Error::other)?;
        let Some(checkpoint) = loaded else { return Ok(None) };
        let meta =
            codec::decode(&checkpoint.meta).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(Some(Snapshot { meta, snapshot: Arc::new(checkpoint.records) }))
    }
}
