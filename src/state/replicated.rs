//! What every replicated state has around it: exactly-once application of the replicas'
//! proposals.
//!
//! A replica numbers its proposals (*segments*) from 1 in each life. The state remembers, per
//! replica, its life and the last number applied; a number seen before is skipped, a number
//! that leaves a gap is skipped too (the proposer sends again from the gap), an earlier life is
//! ignored. So a proposer may send a segment again whenever it does not know what became of it.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ids::{Incarnation, ReplicaId};

/// Key and value pairs: what a state is written to disk and sent to a peer as.
pub type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// A deterministic state machine.
pub trait State: Clone + Default + Send + Sync + 'static {
    /// What mutates it.
    type Command: Serialize + DeserializeOwned + Clone + Send + Sync + std::fmt::Debug + 'static;
    /// What a mutation answers.
    type Outcome: Clone + Send + Sync + std::fmt::Debug + 'static;

    /// Applies one command that `origin` proposed.
    fn apply(&mut self, origin: ReplicaId, command: Self::Command) -> Self::Outcome;

    /// The outcome of a command whose application this replica has not seen (it came with a
    /// snapshot).
    fn unknown() -> Self::Outcome;

    /// How many changes a command stands for, for counting.
    fn mutations(_: &Self::Command) -> u64 {
        1
    }

    /// See [`super::digest`].
    fn digest(&self) -> u64;

    /// The whole state as records, in an order that depends on the state alone. No key starts
    /// with 0: that is for [`Replicated`].
    fn records(&self) -> Records;

    /// A consistent copy as records: taken at once, encoded when called.
    fn image(&self) -> Box<dyn FnOnce() -> Records + Send> {
        let copy = self.clone();
        Box::new(move || copy.records())
    }

    /// The inverse of [`State::records`].
    fn restore(records: Records) -> Result<Self, String>;
}

/// How far a replica's proposals have been applied.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug, Default)]
pub struct Session {
    /// The life they belong to.
    pub incarnation: Incarnation,
    /// The last number applied.
    pub applied: u64,
}

/// What became of a segment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Applied<O> {
    /// Its commands were applied, with these outcomes.
    Now(Vec<O>),
    /// It had been applied before, or belongs to an earlier life.
    Before,
    /// An earlier segment is missing.
    Gap,
}

/// A state with its sessions.
#[derive(Clone, Debug, Default)]
pub struct Replicated<S> {
    /// The state proper.
    pub state: S,
    sessions: BTreeMap<ReplicaId, Session>,
}

const SESSIONS: u8 = 0;

impl<S: State> Replicated<S> {
    /// Applies a segment of `origin`'s life `incarnation`.
    pub fn apply(
        &mut self,
        origin: ReplicaId,
        incarnation: Incarnation,
        number: u64,
        commands: Vec<S::Command>,
    ) -> Applied<S::Outcome> {
        let session = self.sessions.entry(origin).or_default();
        if incarnation < session.incarnation {
            return Applied::Before;
        }
        if incarnation > session.incarnation {
            *session = Session { incarnation, applied: 0 };
        }
        if number <= session.applied {
            return Applied::Before;
        }
        if number != session.applied + 1 {
            return Applied::Gap;
        }
        session.applied = number;
        Applied::Now(commands.into_iter().map(|command| self.state.apply(origin, command)).collect())
    }

    /// How far a replica's proposals have been applied.
    pub fn session(&self, origin: ReplicaId) -> Session {
        self.sessions.get(&origin).copied().unwrap_or_default()
    }

    /// A consistent copy as records: taken at once, encoded when called.
    pub fn image(&self) -> Box<dyn FnOnce() -> Records + Send> {
        let (sessions, state) = (self.sessions.clone(), self.state.image());
        Box::new(move || {
            let mut records = vec![(vec![SESSIONS], crate::codec::encode(&sessions))];
            records.extend(state());
            records
        })
    }

    /// State and sessions as records.
    pub fn records(&self) -> Records {
        let mut records = vec![(vec![SESSIONS], crate::codec::encode(&self.sessions))];
        records.extend(self.state.records());
        records
    }

    /// The inverse of [`Replicated::records`].
    pub fn restore(mut records: Records) -> Result<Self, String> {
        let at = records
            .iter()
            .position(|(key, _)| key.as_slice() == [SESSIONS])
            .ok_or("the sessions record is missing")?;
        let (_, sessions) = records.swap_remove(at);
        let sessions = crate::codec::decode(&sessions).map_err(|e| format!("sessions: {e}"))?;
        Ok(Self { state: S::restore(records)?, sessions })
    }
}
