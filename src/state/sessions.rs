//! Which worker each session is with, for the policy that keeps sessions where they are.
//!
//! Bounded: the session that was bound or refreshed longest ago makes room for a new one. A session
//! in use is refreshed long before that (see [`Sessions::worker`]), so that one entry in the log
//! serves many requests.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::WorkerIx;

/// Most sessions that are remembered.
pub const MOST_SESSIONS: usize = 100_000;

/// Entries in one record of a snapshot.
const IN_A_RECORD: usize = 4096;

/// Where a session is, and since when.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug)]
struct Bound {
    worker: WorkerIx,
    /// Counts bindings.
    turn: u64,
}

/// All of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sessions {
    by_id: BTreeMap<u64, Bound>,
    /// The same, oldest first.
    by_turn: BTreeMap<u64, u64>,
    next: u64,
    /// Sum of the digests of all bindings.
    digest: u64,
}

fn digest(session: u64, bound: Bound) -> u64 {
    let words = [session, bound.worker.0.into(), bound.turn];
    xxhash_rust::xxh3::xxh3_64(&words.map(u64::to_le_bytes).concat())
}

impl Sessions {
    /// Where a session is, and whether that should be said again before it is forgotten.
    pub fn worker(&self, session: u64) -> Option<(WorkerIx, bool)> {
        let bound = self.by_id.get(&session)?;
        Some((bound.worker, self.next - bound.turn > MOST_SESSIONS as u64 / 2))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Binds a session if it is where the proposer thinks. Of two that bind it at once the first
    /// one wins.
    pub(super) fn bind(&mut self, session: u64, worker: WorkerIx, from: Option<WorkerIx>) {
        if self.by_id.get(&session).map(|bound| bound.worker) != from {
            return;
        }
        self.remove(session);
        let oldest = self.by_turn.first_key_value().map(|(_, session)| *session);
        if let (true, Some(oldest)) = (self.by_id.len() >= MOST_SESSIONS, oldest) {
            self.remove(oldest);
        }
        self.insert(session, Bound { worker, turn: self.next });
        self.next += 1;
    }

    /// A worker is gone, and so is what its sessions had there.
    pub(super) fn forget(&mut self, worker: WorkerIx) {
        let theirs = self.by_id.iter().filter(|(_, bound)| bound.worker == worker);
        let theirs: Vec<u64> = theirs.map(|(session, _)| *session).collect();
        theirs.into_iter().for_each(|session| self.remove(session));
    }

    fn insert(&mut self, session: u64, bound: Bound) {
        self.digest = self.digest.wrapping_add(digest(session, bound));
        self.by_turn.insert(bound.turn, session);
        self.by_id.insert(session, bound);
    }

    fn remove(&mut self, session: u64) {
        if let Some(bound) = self.by_id.remove(&session) {
            self.digest = self.digest.wrapping_sub(digest(session, bound));
            self.by_turn.remove(&bound.turn);
        }
    }

    /// Says which content this is.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    /// The content in pieces; none of nothing.
    pub(super) fn records(&self) -> Vec<Vec<u8>> {
        let all: Vec<(&u64, &Bound)> = self.by_id.iter().collect();
        let pieces = all.chunks(IN_A_RECORD).map(|piece| crate::codec::encode(&(self.next, piece)));
        let empty = (self.next > 0 && all.is_empty()).then(|| crate::codec::encode(&(self.next, &all)));
        pieces.chain(empty).collect()
    }

    /// Takes a piece in.
    pub(super) fn restore(&mut self, piece: &[u8]) -> Result<(), crate::codec::CodecError> {
        let (next, bound): (u64, Vec<(u64, Bound)>) = crate::codec::decode(piece)?;
        self.next = next;
        bound.into_iter().for_each(|(session, bound)| self.insert(session, bound));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WorkerIx = WorkerIx(1);
    const B: WorkerIx = WorkerIx(2);

    #[test]
    fn the_first_binding_wins_and_moves_only_from_where_it_is() {
        let mut sessions = Sessions::default();
        sessions.bind(7, A, None);
        sessions.bind(7, B, None);
        assert_eq!(sessions.worker(7), Some((A, false)));
        sessions.bind(7, B, Some(A));
        sessions.bind(8, B, Some(A));
        assert_eq!((sessions.worker(7), sessions.worker(8)), (Some((B, false)), None));
        sessions.forget(B);
        assert!(sessions.is_empty() && sessions.by_turn.is_empty());
        assert_eq!(sessions.digest(), 0);
    }

    #[test]
    fn the_oldest_goes_when_there_is_no_room_unless_it_is_refreshed_in_time() {
        let mut sessions = Sessions::default();
        let most = MOST_SESSIONS as u64;
        (0..most).for_each(|session| sessions.bind(session, A, None));
        assert_eq!(sessions.worker(0), Some((A, true)), "time to say it again");
        assert_eq!(sessions.worker(most - 1), Some((A, false)));
        sessions.bind(0, A, Some(A));
        assert_eq!(sessions.worker(0), Some((A, false)));
        sessions.bind(most, B, None);
        assert_eq!((sessions.worker(1), sessions.len()), (None, MOST_SESSIONS));
        assert_eq!(sessions.by_turn.len(), MOST_SESSIONS);

        let mut again = Sessions::default();
        for piece in sessions.records() {
            again.restore(&piece).unwrap();
        }
        assert_eq!(again, sessions);
        again.bind(1, A, None);
        sessions.bind(1, A, None);
        assert_eq!(again.digest(), sessions.digest());
    }
}
