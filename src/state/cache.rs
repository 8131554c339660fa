//! The cache group's state: what each replica has booked on each worker, and the leases that
//! hold it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::command::CacheCommand;
use super::digest::Digest;
use super::load::{LoadDelta, LoadSum};
use super::replicated::{Records, State};
use crate::ids::{Incarnation, ReplicaId, WorkerIx};

/// What one replica holds.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
struct Column {
    incarnation: Incarnation,
    last_heard_ms: u64,
    alive: bool,
    cells: BTreeMap<WorkerIx, LoadSum>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct CacheState {
    now_ms: u64,
    columns: BTreeMap<ReplicaId, Column>,
    /// Sum over all columns, so that a reader need not add them up.
    totals: BTreeMap<WorkerIx, LoadSum>,
    digest: Digest,
    changed: BTreeSet<WorkerIx>,
    released: Vec<ReplicaId>,
}

const CLOCK: u8 = 1;
const COLUMN: u8 = 2;

impl CacheState {
    /// What all replicas but `me` hold on a worker.
    pub fn peers_load(&self, me: ReplicaId, worker: WorkerIx) -> LoadSum {
        let total = self.totals.get(&worker).copied().unwrap_or_default();
        let own = self.columns.get(&me).and_then(|c| c.cells.get(&worker)).copied().unwrap_or_default();
        total.minus(&own)
    }

    /// What all replicas hold on a worker.
    pub fn total_load(&self, worker: WorkerIx) -> LoadSum {
        self.totals.get(&worker).copied().unwrap_or_default()
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

    /// Whether any replica holds anything: then leases are watched closely.
    pub fn holds_anything(&self) -> bool {
        !self.totals.is_empty()
    }

    /// Workers whose load changed since the last call. Local, not replicated.
    pub fn take_changed(&mut self) -> BTreeSet<WorkerIx> {
        std::mem::take(&mut self.changed)
    }

    /// Replicas whose lease ended since the last call. Local, not replicated.
    pub fn take_released(&mut self) -> Vec<ReplicaId> {
        std::mem::take(&mut self.released)
    }

    /// A replica that never said it is up, or was forgotten, books nothing: nobody would release it.
    fn change(&mut self, replica: ReplicaId, worker: WorkerIx, delta: &LoadDelta) {
        let Some(column) = self.columns.get_mut(&replica) else { return };
        let cell = column.cells.entry(worker).or_default();
        let (old, new) = (*cell, cell.plus(delta));
        *cell = new;
        if new.is_zero() {
            column.cells.remove(&worker);
        }
        self.digest.change_cell([replica.0, worker.0.into()], old.as_array(), new.as_array());
        let total = self.totals.entry(worker).or_default();
        *total = total.plus(delta);
        if total.is_zero() {
            self.totals.remove(&worker);
        }
        self.changed.insert(worker);
    }

    fn release(&mut self, replica: ReplicaId) {
        let Some(column) = self.columns.get(&replica) else { return };
        let held: Vec<_> = column.cells.iter().map(|(worker, cell)| (*worker, *cell)).collect();
        for (worker, cell) in held {
            self.change(replica, worker, &cell.undo());
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
    type Outcome = ();

    fn mutations(command: &CacheCommand) -> u64 {
        match command {
            CacheCommand::Loads(deltas) | CacheCommand::ReplaceLoads(deltas) => deltas.len() as u64,
            _ => 1,
        }
    }

    fn apply(&mut self, origin: ReplicaId, command: CacheCommand) {
        match command {
            CacheCommand::Loads(deltas) => {
                self.heard(origin);
                for (worker, delta) in &deltas {
                    self.change(origin, *worker, delta);
                }
            }
            CacheCommand::ReplaceLoads(held) => {
                self.release(origin);
                self.heard(origin);
                for (worker, delta) in &held {
                    self.change(origin, *worker, delta);
                }
            }
            CacheCommand::Tick { elapsed_ms, replicas, lease_ms } => {
                self.now_ms += u64::from(elapsed_ms);
                for id in &replicas {
                    self.heard(*id);
                }
                let now_ms = self.now_ms;
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
            CacheCommand::Noop => {}
        }
    }

    fn unknown() {}

    fn digest(&self) -> u64 {
        self.digest.0
    }

    fn records(&self) -> Records {
        use crate::codec::encode;
        let mut records = vec![(vec![CLOCK], encode(&self.now_ms))];
        for (id, column) in &self.columns {
            let mut key = vec![COLUMN];
            key.extend_from_slice(&id.0.to_be_bytes());
            records.push((key, encode(&(id, column))));
        }
        records
    }

    fn restore(records: Records) -> Result<Self, String> {
        use crate::codec::decode;
        let mut state = Self::default();
        for (key, value) in records {
            let text = |e: crate::codec::CodecError| format!("record {key:02x?}: {e}");
            match key.first() {
                Some(&CLOCK) => state.now_ms = decode(&value).map_err(text)?,
                Some(&COLUMN) => {
                    let (id, mut column): (ReplicaId, Column) = decode(&value).map_err(text)?;
                    let cells = std::mem::take(&mut column.cells);
                    state.columns.insert(id, column);
                    for (worker, cell) in cells {
                        state.change(id, worker, &cell.undo().negated());
                    }
                }
                _ => return Err(format!("record {key:02x?} is of no known kind")),
            }
        }
        Ok(state)
    }
}
