//! The cache group's state: what each replica has booked on each rank and the leases that hold
//! it, and the prefix index with the feeds that fill it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use bytes::Bytes;

use super::command::{CacheCommand, CacheOutcome};
use super::corrections::{Correction, Corrections};
use super::digest::Digest;
use super::load::{LoadDelta, LoadSum};
use super::ranks::{Knowledge, RankKey, RankRecord, Ranks};
use super::replicated::{Records, State};
use super::sessions::Sessions;
use super::streams::{StreamRecord, Streams};
use crate::ids::{Incarnation, ReplicaId, StreamId, WorkerIx};
use crate::kv::feed::Cursor;
use crate::kv::hash::{LocalHash, Seed};
use crate::kv::index::{self, Index};
use crate::kv::types::RankIx;

/// What one replica holds.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
struct Column {
    incarnation: Incarnation,
    last_heard_ms: u64,
    alive: bool,
    cells: BTreeMap<RankKey, LoadSum>,
}

/// A prompt that some replica sent to a rank with events.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Routed {
    /// Where to.
    pub rank: RankIx,
    /// What the hashes were made with.
    pub seed: Seed,
    /// The prompt's blocks.
    pub locals: Vec<LocalHash>,
}

/// See the module. A clone shares the index, and is for [`State::image`] only.
#[derive(Clone, Debug, Default)]
pub struct CacheState {
    now_ms: u64,
    columns: BTreeMap<ReplicaId, Column>,
    /// Sum over all columns, so that a reader need not add them up.
    totals: BTreeMap<RankKey, LoadSum>,
    digest: Digest,
    corrections: Corrections,
    sessions: Sessions,
    /// Which process the engines of workers are in whose blocks are reckoned. At most
    /// [`MOST_LIVES`].
    lives: BTreeMap<WorkerIx, u64>,
    streams: Streams,
    /// See [`CacheCommand::StreamSecret`].
    secret: Option<[u8; 32]>,
    ranks: Ranks,
    index: Arc<Index>,
    changed: BTreeSet<WorkerIx>,
    /// Everything may be another than readers have.
    restored: bool,
    released: Vec<ReplicaId>,
    ranks_changed: bool,
    routed: Vec<(ReplicaId, Routed)>,
    waiting: Vec<(ReplicaId, Vec<u64>)>,
}

const CLOCK: u8 = 1;
const COLUMN: u8 = 2;
const RANKS: u8 = 3;
const CORRECTIONS: u8 = 4;
const SESSIONS: u8 = 5;
const BOUND: u8 = 6;
const LIVES: u8 = 7;
const STREAMS: u8 = 8;
const SECRET: u8 = 9;
/// Records of the index; see [`index::Frozen::records`].
const INDEX: u8 = b'x';

/// Workers with a life; there are no more in the registry.
const MOST_LIVES: usize = super::control::MAX_WORKERS;

/// Most blocks of a prompt that [`CacheCommand::Routed`] tells of: the first ones.
pub const MOST_ROUTED: usize = 8192;

/// Prompts that wait for [`CacheState::take_routed`], and words that wait for
/// [`CacheState::take_waiting`]; more are forgotten.
const ROUTED_WAITING: usize = 4096;

impl CacheState {
    /// What all replicas but `me` hold on a worker's ranks: for each replica the ranks on which it
    /// holds something.
    pub fn peers_load(
        &self,
        me: ReplicaId,
        worker: WorkerIx,
    ) -> impl Iterator<Item = (u32, LoadSum)> + use<'_> {
        let peers = self.columns.iter().filter(move |(id, _)| **id != me);
        peers.flat_map(move |(_, column)| {
            column.cells.range(RankKey::all_of(worker)).map(|(key, cell)| (key.rank, *cell))
        })
    }

    /// What all replicas hold on a worker, on all of its ranks.
    pub fn total_load(&self, worker: WorkerIx) -> LoadSum {
        let ranks = self.totals.range(RankKey::all_of(worker));
        ranks.fold(LoadSum::default(), |sum, (_, total)| sum.with(total))
    }

    /// What a worker's engine has to do beyond what is booked there; below zero for what it has not.
    pub fn correction(&self, worker: WorkerIx) -> Option<&Correction> {
        self.corrections.of(worker)
    }

    /// Requests a replica has in flight, and whether its lease is good.
    pub fn replica(&self, id: ReplicaId) -> Option<(i64, bool)> {
        let column = self.columns.get(&id)?;
        Some((column.cells.values().map(|c| c.requests).sum(), column.alive))
    }

    /// Cluster time since the last sign of life of a replica that was applied.
    pub fn heard_ms_ago(&self, id: ReplicaId) -> Option<u64> {
        Some(self.now_ms.saturating_sub(self.columns.get(&id)?.last_heard_ms))
    }

    /// The prefix index. Look-ups need no lock of the state's.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Which worker each session is with.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// The stream directory.
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// What stream ids and capabilities are derived from, once somebody has said it.
    pub fn stream_secret(&self) -> Option<[u8; 32]> {
        self.secret
    }

    /// Streams that were taken over since the last call, with their attempts. Local, not
    /// replicated.
    pub fn take_moved_streams(&mut self) -> Vec<(StreamId, u32)> {
        self.streams.take_moved()
    }

    /// The ranks and their feeds.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Whether ranks came, went, changed hands or became whole since the last call. Local, not
    /// replicated.
    pub fn take_ranks_changed(&mut self) -> bool {
        std::mem::take(&mut self.ranks_changed)
    }

    /// Prompts sent to ranks with events since the last call, and by whom. Local, not replicated.
    pub fn take_routed(&mut self) -> Vec<(ReplicaId, Routed)> {
        std::mem::take(&mut self.routed)
    }

    /// Which prompts still wait for their first token since the last call, and at whom. Local, not
    /// replicated.
    pub fn take_waiting(&mut self) -> Vec<(ReplicaId, Vec<u64>)> {
        std::mem::take(&mut self.waiting)
    }

    /// Whether any replica holds anything: then leases are watched closely.
    pub fn holds_anything(&self) -> bool {
        !self.totals.is_empty()
    }

    /// Workers whose load changed since the last call. Local, not replicated.
    pub fn take_changed(&mut self) -> BTreeSet<WorkerIx> {
        std::mem::take(&mut self.changed)
    }

    /// Whether this state took another one's place since the last call: then the load of every
    /// worker may have changed. Local, not replicated.
    pub fn take_restored(&mut self) -> bool {
        std::mem::take(&mut self.restored)
    }

    /// Replicas whose lease ended since the last call. Local, not replicated.
    pub fn take_released(&mut self) -> Vec<ReplicaId> {
        std::mem::take(&mut self.released)
    }

    /// A replica that never said it is up, or was forgotten, books nothing: nobody would release it.
    fn change(&mut self, replica: ReplicaId, rank: RankKey, delta: &LoadDelta) {
        let Some(column) = self.columns.get_mut(&replica) else { return };
        let cell = column.cells.entry(rank).or_default();
        let (old, new) = (*cell, cell.plus(delta));
        *cell = new;
        if new.is_zero() {
            column.cells.remove(&rank);
        }
        let place = u64::from(rank.worker.0) << 32 | u64::from(rank.rank);
        self.digest.change_cell([replica.0, place], old.as_array(), new.as_array());
        let total = self.totals.entry(rank).or_default();
        *total = total.plus(delta);
        if total.is_zero() {
            self.totals.remove(&rank);
        }
        self.changed.insert(rank.worker);
    }

    fn correct(&mut self, origin: ReplicaId, worker: WorkerIx, extra: Correction) -> CacheOutcome {
        // One of a replica without a lease would never end.
        let alive = self.columns.get(&origin).is_some_and(|column| column.alive);
        if extra.is_zero() {
            self.corrections.remove(worker);
        } else if !alive || !self.corrections.set(worker, origin, extra) {
            return CacheOutcome::Refused;
        }
        self.changed.insert(worker);
        CacheOutcome::Done
    }

    fn release(&mut self, replica: ReplicaId) {
        self.ranks_changed |= self.ranks.disown(replica);
        self.streams.abandon(replica, self.now_ms);
        self.changed.extend(self.corrections.disown(replica));
        for rank in self.release_loads(replica) {
            self.corrections.take_nothing_off(rank);
        }
    }

    /// Takes back what a replica has booked, and nothing else; where that was.
    fn release_loads(&mut self, replica: ReplicaId) -> Vec<RankKey> {
        let column = self.columns.get(&replica);
        let held: Vec<_> =
            column.into_iter().flat_map(|column| &column.cells).map(|(rank, cell)| (*rank, *cell)).collect();
        held.iter().for_each(|(rank, cell)| self.change(replica, *rank, &cell.undo()));
        held.into_iter().map(|(rank, _)| rank).collect()
    }

    fn claim(&mut self, origin: ReplicaId, rank: RankKey, from: Option<ReplicaId>) -> CacheOutcome {
        let alive = self.columns.get(&origin).is_some_and(|column| column.alive);
        let Some(mut record) = self.ranks.entry(rank, Knowledge::Events) else {
            return CacheOutcome::Refused;
        };
        if record.owner != Some(origin) {
            // A replica without a lease would keep it from the others for ever.
            if record.owner != from || !alive {
                return CacheOutcome::NotOwner(record.owner);
            }
            record.owner = Some(origin);
            self.ranks_changed = true;
        }
        if record.knowledge == Knowledge::Predicted {
            // The engine is found to have events after all: what was reckoned is void.
            *record =
                RankRecord { knowledge: Knowledge::Events, cursor: Cursor::default(), ..record.clone() };
            self.index.remove_rank(record.ix);
            self.ranks_changed = true;
        }
        CacheOutcome::Feed(record.cursor)
    }

    fn life(&mut self, worker: WorkerIx, life: Option<u64>) -> CacheOutcome {
        let known = self.lives.get(&worker).copied();
        match life {
            Some(life) if known == Some(life) => return CacheOutcome::Done,
            Some(_) if known.is_none() && self.lives.len() >= MOST_LIVES => return CacheOutcome::Refused,
            Some(life) => drop(self.lives.insert(worker, life)),
            None => drop(self.lives.remove(&worker)),
        }
        // The first word is about the process that all was sent to.
        if life.is_none() || known.is_some() {
            let reckoned = self.ranks.of(worker).filter(|(_, r)| r.knowledge == Knowledge::Predicted);
            reckoned.for_each(|(_, record)| self.index.remove_rank(record.ix));
        }
        CacheOutcome::Done
    }

    fn lose_feed(&mut self, origin: ReplicaId, rank: RankKey) -> CacheOutcome {
        let Some(mut record) = self.ranks.get_mut(rank) else { return CacheOutcome::Done };
        if record.owner.is_some_and(|owner| owner != origin) {
            return CacheOutcome::NotOwner(record.owner);
        }
        if record.knowledge == Knowledge::Events {
            *record = RankRecord {
                ix: record.ix,
                knowledge: Knowledge::Predicted,
                owner: None,
                cursor: Cursor::default(),
            };
            self.index.remove_rank(record.ix);
            self.ranks_changed = true;
        }
        CacheOutcome::Done
    }

    fn events(
        &mut self,
        origin: ReplicaId,
        rank: RankKey,
        after: Cursor,
        cursor: Cursor,
        ops: &Bytes,
    ) -> CacheOutcome {
        let Some(mut record) = self.ranks.get_mut(rank) else { return CacheOutcome::NotOwner(None) };
        if record.owner != Some(origin) {
            return CacheOutcome::NotOwner(record.owner);
        }
        if record.cursor != after {
            return CacheOutcome::Moved(record.cursor);
        }
        if self.index.apply_encoded(record.ix, ops).is_err() {
            return CacheOutcome::Refused;
        }
        self.ranks_changed |= record.cursor.recovering() != cursor.recovering();
        record.cursor = cursor;
        CacheOutcome::Done
    }

    fn routed(
        &mut self,
        origin: ReplicaId,
        key: RankKey,
        seed: Seed,
        locals: &[u8],
        capacity: Option<u64>,
    ) -> CacheOutcome {
        let locals: Vec<LocalHash> = locals
            .as_chunks::<8>()
            .0
            .iter()
            .take(MOST_ROUTED)
            .map(|bytes| LocalHash(u64::from_le_bytes(*bytes)))
            .collect();
        let known = self.ranks.get(key).is_some();
        if let (false, Some(_)) = (known, capacity) {
            if self.ranks.entry(key, Knowledge::Predicted).is_none() {
                return CacheOutcome::Refused;
            }
            self.ranks_changed = true;
        }
        match (self.ranks.get(key), capacity) {
            (Some(record), Some(capacity)) if record.knowledge == Knowledge::Predicted => {
                self.index.predict(record.ix, seed, &locals, capacity);
            }
            (Some(record), _) if self.routed.len() < ROUTED_WAITING => {
                self.routed.push((origin, Routed { rank: record.ix, seed, locals }));
            }
            _ => {}
        }
        CacheOutcome::Done
    }

    fn reserve(
        &mut self,
        origin: ReplicaId,
        rank: RankKey,
        delta: &LoadDelta,
        at_most: LoadSum,
    ) -> CacheOutcome {
        if !self.columns.contains_key(&origin) {
            return CacheOutcome::Refused;
        }
        self.heard(origin);
        let total = self.total_load(rank.worker);
        if total.as_array().iter().zip(at_most.as_array()).any(|(booked, most)| *booked > most) {
            return CacheOutcome::Busy(total);
        }
        self.change(origin, rank, delta);
        CacheOutcome::Done
    }

    fn open_stream(&mut self, origin: ReplicaId, id: StreamId, record: StreamRecord) -> CacheOutcome {
        self.heard(origin);
        let known = self.streams.get(id).is_some();
        match self.streams.open(id, record, self.now_ms) {
            None => CacheOutcome::Refused,
            Some(record) if known => CacheOutcome::Stream(Box::new(record.clone())),
            Some(_) => CacheOutcome::Done,
        }
    }

    /// A proposal of a replica that was applied is a sign of life, too.
    fn heard(&mut self, replica: ReplicaId) {
        let now_ms = self.now_ms;
        if let Some(column) = self.columns.get_mut(&replica) {
            column.last_heard_ms = now_ms;
            column.alive = true;
        }
    }
}

impl State for CacheState {
    type Command = CacheCommand;
    type Outcome = CacheOutcome;

    fn mutations(command: &CacheCommand) -> u64 {
        match command {
            CacheCommand::Loads(deltas) | CacheCommand::ReplaceLoads(deltas) => deltas.len() as u64,
            // Two columns of u64.
            CacheCommand::Events { ops, .. } => (ops.len() as u64 / 16).max(1),
            _ => 1,
        }
    }

    fn apply(&mut self, origin: ReplicaId, command: CacheCommand) -> CacheOutcome {
        match command {
            CacheCommand::ClaimFeed { rank, from } => return self.claim(origin, rank, from),
            CacheCommand::Events { rank, after, cursor, ops } => {
                self.heard(origin);
                return self.events(origin, rank, after, cursor, &ops);
            }
            CacheCommand::ReleaseFeed { rank } => {
                if let Some(mut record) = self.ranks.get_mut(rank).filter(|r| r.owner == Some(origin)) {
                    record.owner = None;
                    self.ranks_changed = true;
                }
            }
            CacheCommand::Routed { rank, seed, locals, capacity } => {
                return self.routed(origin, rank, seed, &locals, capacity);
            }
            CacheCommand::ForgetWorker { worker } => {
                for ix in self.ranks.forget(worker) {
                    self.index.remove_rank(ix);
                    self.ranks_changed = true;
                }
                self.sessions.forget(worker);
                self.lives.remove(&worker);
                if self.corrections.remove(worker) {
                    self.changed.insert(worker);
                }
            }
            CacheCommand::Life { worker, life } => return self.life(worker, life),
            CacheCommand::LoseFeed { rank } => return self.lose_feed(origin, rank),
            CacheCommand::Bind { session, worker, from } => self.sessions.bind(session, worker, from),
            CacheCommand::Correct { worker, extra } => return self.correct(origin, worker, extra),
            CacheCommand::Reserve { rank, delta, at_most } => {
                return self.reserve(origin, rank, &delta, at_most);
            }
            CacheCommand::Loads(deltas) => {
                self.heard(origin);
                for (rank, delta) in &deltas {
                    self.change(origin, *rank, delta);
                }
            }
            CacheCommand::ReplaceLoads(held) => {
                // It is alive: what else it has stays its own.
                self.release_loads(origin);
                self.heard(origin);
                for (rank, delta) in &held {
                    self.change(origin, *rank, delta);
                }
            }
            CacheCommand::Tick { elapsed_ms, replicas, lease_ms } => {
                self.now_ms += u64::from(elapsed_ms);
                for id in &replicas {
                    self.heard(*id);
                }
                let now_ms = self.now_ms;
                self.streams.tick(now_ms);
                let expired: Vec<ReplicaId> = self
                    .columns
                    .iter()
                    .filter(|(_, c)| c.alive && now_ms.saturating_sub(c.last_heard_ms) > u64::from(lease_ms))
                    .map(|(id, _)| *id)
                    .collect();
                for id in expired {
                    self.release(id);
                    if let Some(column) = self.columns.get_mut(&id) {
                        column.alive = false;
                    }
                    self.released.push(id);
                }
            }
            CacheCommand::ReplicaUp { id, incarnation } => {
                let known = self.columns.get(&id).map(|c| c.incarnation);
                if known.is_none_or(|known| known < incarnation) {
                    self.release(id);
                    let now_ms = self.now_ms;
                    let column = self.columns.entry(id).or_default();
                    *column =
                        Column { incarnation, last_heard_ms: now_ms, alive: true, cells: BTreeMap::new() };
                }
            }
            CacheCommand::ForgetReplica { id } => {
                self.release(id);
                self.columns.remove(&id);
            }
            CacheCommand::OpenStream { id, record } => return self.open_stream(origin, id, record),
            CacheCommand::TakeStream { id, from_attempt, record } => {
                self.heard(origin);
                if !self.streams.take(id, from_attempt, record, self.now_ms) {
                    let known = self.streams.get(id).cloned();
                    return known
                        .map_or(CacheOutcome::Refused, |record| CacheOutcome::Stream(Box::new(record)));
                }
            }
            CacheCommand::MirrorStream { id, attempt } => self.streams.mirrored(id, attempt, origin),
            CacheCommand::EndStream { id, attempt, how, keep_ms } => {
                self.streams.end(id, attempt, how, keep_ms, self.now_ms);
            }
            CacheCommand::PurgeStream { id } => self.streams.remove(id),
            CacheCommand::StreamSecret(secret) => {
                self.secret.get_or_insert(secret);
            }
            CacheCommand::Waiting { keys } => {
                if self.waiting.len() < ROUTED_WAITING {
                    self.waiting.push((origin, keys));
                }
            }
            CacheCommand::BoundIndex { bytes } => self.index.set_options(index::Options { bytes }),
            CacheCommand::Noop => {}
        }
        CacheOutcome::Done
    }

    fn unknown() -> CacheOutcome {
        CacheOutcome::Unknown
    }

    fn digest(&self) -> u64 {
        let lives = match self.lives.is_empty() {
            true => 0,
            false => xxhash_rust::xxh3::xxh3_64_with_seed(&crate::codec::encode(&self.lives), LIVES.into()),
        };
        let all = [
            self.digest.0,
            self.ranks.digest(),
            self.index.digest(),
            self.index.options().bytes,
            self.corrections.digest() ^ lives,
            self.sessions.digest(),
            self.streams.digest(),
            self.secret.map_or(0, |secret| xxhash_rust::xxh3::xxh3_64(&secret)),
        ];
        xxhash_rust::xxh3::xxh3_64(&all.map(u64::to_le_bytes).concat())
    }

    fn image(&self) -> Box<dyn FnOnce() -> Records + Send> {
        // A clone would share the index, which goes on changing: frozen here, written down later.
        let (index, bound, rest) = (self.index.freeze(), self.index.options().bytes, self.clone());
        Box::new(move || rest.records_with(bound, index.records()))
    }

    fn records(&self) -> Records {
        self.image()()
    }

    fn restore(records: Records) -> Result<Self, String> {
        use crate::codec::decode;
        let mut state = Self::default();
        let (index, records): (Records, Records) =
            records.into_iter().partition(|(key, _)| key.first() == Some(&INDEX));
        let mut options = index::Options::default();
        if let Some((key, bound)) = records.iter().find(|(key, _)| key.first() == Some(&BOUND)) {
            options.bytes = decode(bound).map_err(|e| format!("record {key:02x?}: {e}"))?;
        }
        state.index = Arc::new(if index.is_empty() {
            Index::new(options)
        } else {
            Index::load(options, &index).map_err(|e| format!("prefix index: {e}"))?
        });
        // Readers have the old ones.
        state.ranks_changed = true;
        state.restored = true;
        for (key, value) in records {
            let text = |e: crate::codec::CodecError| format!("record {key:02x?}: {e}");
            match key.first() {
                Some(&CORRECTIONS) => {
                    state.corrections = decode(&value).map_err(text)?;
                }
                Some(&LIVES) => state.lives = decode(&value).map_err(text)?,
                Some(&STREAMS) => state.streams.restore(&value).map_err(text)?,
                Some(&SECRET) => state.secret = decode(&value).map_err(text)?,
                Some(&SESSIONS) => state.sessions.restore(&value).map_err(text)?,
                // Read above.
                Some(&BOUND) => {}
                Some(&RANKS) => state.ranks = decode(&value).map_err(text)?,
                Some(&CLOCK) => state.now_ms = decode(&value).map_err(text)?,
                Some(&COLUMN) => {
                    let (id, mut column): (ReplicaId, Column) = decode(&value).map_err(text)?;
                    let cells = std::mem::take(&mut column.cells);
                    state.columns.insert(id, column);
                    for (rank, cell) in cells {
                        state.change(id, rank, &cell.undo().negated());
                    }
                }
                _ => return Err(format!("record {key:02x?} is of no known kind")),
            }
        }
        Ok(state)
    }
}

impl CacheState {
    fn records_with(&self, bound: u64, index: Records) -> Records {
        use crate::codec::encode;
        let mut records = vec![(vec![CLOCK], encode(&self.now_ms))];
        for (id, column) in &self.columns {
            let mut key = vec![COLUMN];
            key.extend_from_slice(&id.0.to_be_bytes());
            records.push((key, encode(&(id, column))));
        }
        records.push((vec![RANKS], encode(&self.ranks)));
        records.push((vec![CORRECTIONS], encode(&self.corrections)));
        if !self.lives.is_empty() {
            records.push((vec![LIVES], encode(&self.lives)));
        }
        for (at, piece) in self.sessions.records().into_iter().enumerate() {
            let mut key = vec![SESSIONS];
            key.extend_from_slice(&(at as u32).to_be_bytes());
            records.push((key, piece));
        }
        for (at, piece) in self.streams.records().into_iter().enumerate() {
            let mut key = vec![STREAMS];
            key.extend_from_slice(&(at as u32).to_be_bytes());
            records.push((key, piece));
        }
        records.push((vec![SECRET], encode(&self.secret)));
        records.push((vec![BOUND], encode(&bound)));
        records.extend(index);
        records
    }
}
