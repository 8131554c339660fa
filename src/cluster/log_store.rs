//! openraft's log storage over the write-ahead log: encodes entries, votes and log ids, and
//! turns the log writer's callbacks into openraft's.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use bytes::Bytes;
use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use tokio::sync::oneshot;

use super::storage::wal::{Done, Wal, WalError};
use super::types::{Entry, LogId, TypeConfig, Vote};
use crate::codec;
use crate::ids::Group;

/// Most bytes read for one append to a follower. openraft would take up to 300 entries whatever
/// their size, and a peer link refuses a frame above its limit for ever.
const READ_BYTES: usize = 1 << 20;

/// One group's log.
#[derive(Clone)]
pub struct LogStore {
    wal: Arc<Wal>,
    group: Group,
}

impl LogStore {
    /// The log of `group` in `wal`.
    pub fn new(wal: Arc<Wal>, group: Group) -> Self {
        Self { wal, group }
    }

    fn read_all(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut next = start;
        while next < end {
            let part = self.wal.read(self.group, next..end, READ_BYTES).map_err(io::Error::other)?;
            let Some((last, _)) = part.last() else { break };
            next = last + 1;
            for (_, bytes) in &part {
                entries.push(decode(bytes)?);
            }
        }
        Ok(entries)
    }
}

fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    codec::decode(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Runs an operation of the log writer and waits until it is on disk.
async fn durable(start: impl FnOnce(Done) -> Result<(), WalError>) -> io::Result<()> {
    let (tx, rx) = oneshot::channel();
    start(Box::new(move |result| {
        // The receiver is gone only when the caller was dropped; then nobody wants to know.
        let _ = tx.send(result);
    }))
    .map_err(io::Error::other)?;
    rx.await.unwrap_or_else(|_| Err(io::Error::other("the log writer has stopped")))
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let start = match range.start_bound() {
            Bound::Included(n) => *n,
            Bound::Excluded(n) => n + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(n) => n + 1,
            Bound::Excluded(n) => *n,
            Bound::Unbounded => u64::MAX,
        };
        let (first, last) = self.wal.bounds(self.group);
        let (Some(first), Some(last)) = (first, last) else { return Ok(Vec::new()) };
        self.read_all(start.max(first), end.min(last + 1))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        let part = self.wal.read(self.group, start..end, READ_BYTES).map_err(io::Error::other)?;
        part.iter().map(|(_, bytes)| decode(bytes)).collect()
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        self.wal.vote(self.group).map(|bytes| decode(&bytes)).transpose()
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let purged = self.wal.purged(self.group).map(|(_, meta)| decode::<LogId>(&meta)).transpose()?;
        let last = match self.wal.bounds(self.group).1 {
            Some(last) => self.read_all(last, last + 1)?.pop().map(|entry| entry.log_id),
            None => None,
        };
        Ok(LogState { last_purged_log_id: purged, last_log_id: last.or(purged) })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let bytes = Bytes::from(codec::encode(vote));
        durable(|done| self.wal.save_vote(self.group, bytes, done)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        if let Some(committed) = committed {
            self.wal
                .save_committed(self.group, codec::encode(&committed).into())
                .map_err(io::Error::other)?;
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        self.wal.committed(self.group).map(|bytes| decode(&bytes)).transpose()
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encoded: Vec<(u64, Bytes)> =
            entries.into_iter().map(|entry| (entry.log_id.index, codec::encode(&entry).into())).collect();
        self.wal
            .append(self.group, encoded, Box::new(move |result| callback.io_completed(result)))
            .map_err(io::Error::other)
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let after = last_log_id.map(|id| id.index);
        durable(|done| self.wal.truncate_after(self.group, after, done)).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let meta = Bytes::from(codec::encode(&log_id));
        durable(|done| self.wal.purge(self.group, log_id.index, meta, done)).await
    }
}
