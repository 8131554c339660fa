//! The stream directory: which replica holds each output stream, and in which attempt.
//!
//! What is in a stream is not in here: user text never enters the log. Bounded: at most
//! [`MOST_STREAMS`], of which the one that ended longest ago makes room for a new one; where all run,
//! a new one is refused (and then runs without being listed: it cannot be resumed).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{ReplicaId, StreamId, WorkerIx};

/// Most streams that are listed.
pub const MOST_STREAMS: usize = 200_000;

/// How long a stream that was not taken over stays listed after its holder's lease ended,
/// milliseconds: whoever might take it over gives up long before.
const ABANDONED_MS: u64 = 60_000;

/// Entries that are looked at for one that may make room: those that end last are listed last.
const LOOKED_AT: usize = 256;

/// Entries in one record of a snapshot.
const IN_A_RECORD: usize = 1024;

/// Who owns a stream's connection to its engine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Debug)]
pub enum Holder {
    /// A replica.
    Replica(ReplicaId),
    /// The node agent beside this worker's engine.
    Agent(WorkerIx),
}

/// How a stream ended.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum StreamEnd {
    /// With its last event.
    Complete,
    /// It was told to.
    Cancelled,
    /// With an error event.
    Failed,
}

/// One stream.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct StreamRecord {
    /// Digest of whose it is.
    pub principal: [u8; 16],
    /// Digest of what was asked.
    pub request: [u8; 16],
    /// Who generates it.
    pub holder: Holder,
    /// Who else has a copy, as far as was said.
    pub mirror: Option<ReplicaId>,
    /// Counts take-overs, from 1.
    pub attempt: u32,
    /// What model it is of.
    pub model: Arc<str>,
    /// When it was opened, in the state's time.
    pub opened_ms: u64,
    /// Longest that it may run and be kept, milliseconds.
    pub lasts_ms: u64,
    /// How it ended.
    pub ended: Option<StreamEnd>,
}

/// A record, and when it is forgotten: known of one that has ended or was abandoned, and of one that
/// an agent holds, whose end nobody may see.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
struct Listed {
    record: StreamRecord,
    due_ms: Option<u64>,
}

/// All of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Streams {
    by_id: BTreeMap<StreamId, Listed>,
    expiry: BTreeSet<(u64, StreamId)>,
    /// Sum of the digests of all records.
    digest: u64,
    /// Streams whose holder changed since the last call of [`Streams::take_moved`].
    moved: Vec<(StreamId, u32)>,
}

impl Listed {
    /// One that runs. A replica's lease ends with it, an agent has none: what it holds is forgotten
    /// when it must have ended, if nobody says so before.
    fn running(record: StreamRecord, now_ms: u64) -> Self {
        let due_ms = match record.holder {
            Holder::Replica(_) => None,
            Holder::Agent(_) => Some(now_ms.saturating_add(record.lasts_ms)),
        };
        Self { record, due_ms }
    }

    /// Whether somebody may still come for it.
    fn may_go(&self) -> bool {
        let is_agents = matches!(self.record.holder, Holder::Agent(_));
        self.due_ms.is_some() && (self.record.ended.is_some() || !is_agents)
    }
}

fn digest(id: StreamId, listed: &Listed) -> u64 {
    xxhash_rust::xxh3::xxh3_64(&crate::codec::encode(&(id, listed)))
}

impl Streams {
    /// One stream.
    pub fn get(&self, id: StreamId) -> Option<&StreamRecord> {
        self.by_id.get(&id).map(|listed| &listed.record)
    }

    /// All streams.
    pub fn iter(&self) -> impl Iterator<Item = (StreamId, &StreamRecord)> {
        self.by_id.iter().map(|(id, listed)| (*id, &listed.record))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Lists a stream; the record that stands, if it is listed already. `None` where there is no
    /// room.
    pub(super) fn open(
        &mut self,
        id: StreamId,
        mut record: StreamRecord,
        now_ms: u64,
    ) -> Option<&StreamRecord> {
        if !self.by_id.contains_key(&id) {
            if self.by_id.len() >= MOST_STREAMS {
                let due = self.expiry.iter().take(LOOKED_AT).map(|(_, id)| *id);
                let oldest = due.into_iter().find(|id| self.by_id.get(id).is_some_and(Listed::may_go))?;
                self.remove(oldest);
            }
            record.opened_ms = now_ms;
            self.put(id, Listed::running(record, now_ms));
        }
        self.get(id)
    }

    /// Gives a stream to another holder if it is in this attempt; one that is not listed is. True if
    /// so.
    pub(super) fn take(
        &mut self,
        id: StreamId,
        from_attempt: u32,
        mut record: StreamRecord,
        now_ms: u64,
    ) -> bool {
        record.opened_ms = match self.get(id) {
            Some(known) if known.attempt != from_attempt || known.ended.is_some() => return false,
            Some(known) => known.opened_ms,
            None if self.by_id.len() >= MOST_STREAMS => return false,
            None => now_ms,
        };
        record.attempt = from_attempt + 1;
        record.ended = None;
        self.moved.push((id, record.attempt));
        self.remove(id);
        self.put(id, Listed::running(record, now_ms));
        true
    }

    /// Takes note of who has a copy.
    pub(super) fn mirrored(&mut self, id: StreamId, attempt: u32, mirror: ReplicaId) {
        self.change(id, |listed| {
            if listed.record.attempt == attempt {
                listed.record.mirror = Some(mirror);
            }
        });
    }

    /// Takes note of the end; the first word counts.
    pub(super) fn end(&mut self, id: StreamId, attempt: u32, how: StreamEnd, keep_ms: u32, now_ms: u64) {
        self.change(id, |listed| {
            if listed.record.attempt == attempt && listed.record.ended.is_none() {
                listed.record.ended = Some(how);
                listed.due_ms = Some(now_ms + u64::from(keep_ms));
            }
        });
    }

    /// A replica's lease has ended: what it holds and nobody takes over is forgotten in a while.
    pub(super) fn abandon(&mut self, replica: ReplicaId, now_ms: u64) {
        let running = self.by_id.iter().filter(|(_, listed)| listed.due_ms.is_none());
        let its = running.filter(|(_, listed)| listed.record.holder == Holder::Replica(replica));
        let its: Vec<StreamId> = its.map(|(id, _)| *id).collect();
        for id in its {
            self.change(id, |listed| listed.due_ms = Some(now_ms + ABANDONED_MS));
        }
    }

    /// Forgets what is due.
    pub(super) fn tick(&mut self, now_ms: u64) {
        while let Some((_, id)) = self.expiry.first().copied().filter(|(due, _)| *due <= now_ms) {
            self.remove(id);
        }
    }

    /// Forgets a stream.
    pub(super) fn remove(&mut self, id: StreamId) {
        let Some(listed) = self.by_id.remove(&id) else { return };
        self.digest = self.digest.wrapping_sub(digest(id, &listed));
        if let Some(due) = listed.due_ms {
            self.expiry.remove(&(due, id));
        }
    }

    /// Streams that were taken over since the last call, with their attempts. Local, not
    /// replicated.
    pub(super) fn take_moved(&mut self) -> Vec<(StreamId, u32)> {
        std::mem::take(&mut self.moved)
    }

    fn change(&mut self, id: StreamId, with: impl FnOnce(&mut Listed)) {
        let Some(mut listed) = self.by_id.get(&id).cloned() else { return };
        with(&mut listed);
        self.remove(id);
        self.put(id, listed);
    }

    fn put(&mut self, id: StreamId, listed: Listed) {
        self.digest = self.digest.wrapping_add(digest(id, &listed));
        self.expiry.extend(listed.due_ms.map(|due| (due, id)));
        self.by_id.insert(id, listed);
    }

    /// Says which content this is.
    pub(super) fn digest(&self) -> u64 {
        self.digest
    }

    /// The content in pieces; none of nothing.
    pub(super) fn records(&self) -> Vec<Vec<u8>> {
        let all: Vec<_> = self.by_id.iter().collect();
        all.chunks(IN_A_RECORD).map(crate::codec::encode).collect()
    }

    /// Takes a piece in.
    pub(super) fn restore(&mut self, piece: &[u8]) -> Result<(), crate::codec::CodecError> {
        let listed: Vec<(StreamId, Listed)> = crate::codec::decode(piece)?;
        for (id, listed) in listed {
            self.moved.push((id, listed.record.attempt));
            self.put(id, listed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ReplicaId = ReplicaId(1);
    const B: ReplicaId = ReplicaId(2);

    fn id(n: u8) -> StreamId {
        StreamId::from_bits([n; 17])
    }

    fn held_by(replica: ReplicaId) -> StreamRecord {
        StreamRecord {
            principal: [1; 16],
            request: [2; 16],
            holder: Holder::Replica(replica),
            mirror: None,
            attempt: 1,
            model: "m".into(),
            opened_ms: 0,
            lasts_ms: 1000,
            ended: None,
        }
    }

    fn again(streams: &Streams) -> Streams {
        let mut again = Streams::default();
        streams.records().iter().for_each(|piece| again.restore(piece).unwrap());
        again.take_moved();
        again
    }

    #[test]
    fn of_two_who_take_a_stream_over_the_first_wins() {
        let mut streams = Streams::default();
        assert_eq!(streams.open(id(1), held_by(A), 5).unwrap().opened_ms, 5);
        // Whoever opens it again learns who was first.
        assert_eq!(streams.open(id(1), held_by(B), 6).unwrap().holder, Holder::Replica(A));
        assert!(streams.take(id(1), 1, held_by(B), 7));
        assert!(!streams.take(id(1), 1, held_by(A), 8));
        let record = streams.get(id(1)).unwrap();
        assert_eq!((record.attempt, record.holder, record.opened_ms), (2, Holder::Replica(B), 5));
        assert_eq!(streams.take_moved(), [(id(1), 2)]);
        // The word of an attempt that is over changes nothing.
        streams.end(id(1), 1, StreamEnd::Complete, 100, 9);
        streams.mirrored(id(1), 1, A);
        assert_eq!((streams.get(id(1)).unwrap().ended, streams.get(id(1)).unwrap().mirror), (None, None));
        streams.end(id(1), 2, StreamEnd::Complete, 100, 10);
        assert!(!streams.take(id(1), 2, held_by(A), 11), "what has ended is not taken over");
        // One whose opening was lost with its holder is listed by whoever takes it over.
        assert!(streams.take(id(2), 1, held_by(B), 12));
        assert_eq!(streams.get(id(2)).unwrap().attempt, 2);
    }

    #[test]
    fn what_has_ended_is_forgotten_when_its_time_is_over() {
        let mut streams = Streams::default();
        for n in 1..=3 {
            streams.open(id(n), held_by(A), 0);
        }
        streams.end(id(1), 1, StreamEnd::Complete, 100, 10);
        streams.end(id(1), 1, StreamEnd::Failed, 900, 11);
        streams.abandon(A, 20);
        assert!(streams.take(id(3), 1, held_by(B), 30));
        assert_eq!(again(&streams).digest(), streams.digest());
        streams.tick(109);
        assert_eq!(streams.len(), 3);
        streams.tick(110);
        assert_eq!((streams.len(), streams.get(id(1))), (2, None));
        streams.tick(20 + ABANDONED_MS);
        assert_eq!((streams.len(), streams.get(id(3)).is_some()), (1, true));
        let same = again(&streams);
        assert_eq!(
            (same.digest(), &same.by_id, &same.expiry),
            (streams.digest(), &streams.by_id, &streams.expiry)
        );
        streams.remove(id(3));
        assert_eq!((streams.digest(), streams.expiry.len()), (0, 0));
    }
    #[test]
    fn what_an_agent_holds_is_forgotten_when_it_must_have_ended() {
        let by_agent = || StreamRecord { holder: Holder::Agent(WorkerIx(7)), ..held_by(A) };
        let mut streams = Streams::default();
        for n in 1..=3 {
            streams.open(id(n), by_agent(), 100);
        }
        // An agent has no lease that could end.
        streams.abandon(A, 200);
        streams.end(id(1), 1, StreamEnd::Complete, 50, 300);
        assert!(streams.take(id(2), 1, held_by(B), 400), "a replica may go on with it");
        assert_eq!(again(&streams).digest(), streams.digest());
        assert_eq!(again(&streams).expiry, streams.expiry);
        streams.tick(350);
        assert_eq!((streams.get(id(1)), streams.len()), (None, 2), "it was kept as long as was said");
        streams.tick(1099);
        assert_eq!(streams.len(), 2);
        streams.tick(1100);
        assert!(streams.get(id(3)).is_none() && streams.get(id(2)).is_some());
    }

    #[test]
    fn what_runs_at_an_agent_makes_no_room() {
        let by_agent = || StreamRecord { holder: Holder::Agent(WorkerIx(7)), lasts_ms: 1, ..held_by(A) };
        let mut streams = Streams::default();
        let numbered = |n: usize| {
            let mut bits = [0; 17];
            bits[..8].copy_from_slice(&n.to_be_bytes());
            StreamId::from_bits(bits)
        };
        streams.open(numbered(0), by_agent(), 0);
        for n in 1..MOST_STREAMS {
            streams.open(numbered(n), held_by(A), 0);
        }
        assert!(streams.open(numbered(MOST_STREAMS), held_by(A), 0).is_none(), "all run");
        streams.end(numbered(9), 1, StreamEnd::Complete, 5000, 0);
        assert!(streams.open(numbered(MOST_STREAMS), held_by(A), 0).is_some());
        assert!(streams.get(numbered(9)).is_none() && streams.get(numbered(0)).is_some());
    }
}
