//! The names things go by. Newtypes, so that a replica is never mistaken for a log index.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A member of the cluster. Allocated once, never used again after the member is gone:
/// a replica that lost its disk comes back under a new one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug, Default)]
#[serde(transparent)]
pub struct ReplicaId(pub u64);

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One life of a replica's process. Counts up at every start, durably, so that what an
/// earlier life of the same replica booked or sent can be told from what this one did.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug, Default)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A worker: one engine behind one base URL. 1 to 128 bytes of `[A-Za-z0-9._:-]`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
#[serde(transparent)]
pub struct WorkerId(pub Arc<str>);

impl WorkerId {
    /// Longest accepted id, in bytes.
    pub const MAX_LEN: usize = 128;

    /// Checks the alphabet and the length; the error says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > Self::MAX_LEN {
            return Err(format!("worker id must have 1 to {} bytes, this has {}", Self::MAX_LEN, text.len()));
        }
        match text.chars().find(|c| !(c.is_ascii_alphanumeric() || "._:-".contains(*c))) {
            Some(bad) => {
                Err(format!("worker id {text:?} contains {bad:?}; allowed are letters, digits and . _ : -"))
            }
            None => Ok(Self(text.into())),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A worker's short name in what is mutated often. Allocated by the registry with the worker's
/// first registration, kept while it is registered, never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug, Default)]
#[serde(transparent)]
pub struct WorkerIx(pub u32);

impl fmt::Display for WorkerIx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The two Raft groups. `Control` carries what is rare and must not wait (registry, members,
/// liveness); `Cache` carries the firehose (loads, later prefix-index mutations and streams).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
#[repr(u8)]
pub enum Group {
    /// Registry, members, liveness.
    Control = 0,
    /// Loads; later the prefix index and the stream directory.
    Cache = 1,
}

impl Group {
    /// Both groups, in index order.
    pub const ALL: [Group; 2] = [Group::Control, Group::Cache];

    /// 0 for control, 1 for cache: an index into per-group arrays and the number on the wire.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The inverse of [`Group::index`]; `None` for a number no group has.
    pub fn from_wire(number: u32) -> Option<Self> {
        match number {
            0 => Some(Group::Control),
            1 => Some(Group::Cache),
            _ => None,
        }
    }

    /// Lower-case name for logs, metrics and folders.
    pub fn name(self) -> &'static str {
        match self {
            Group::Control => "control",
            Group::Cache => "cache",
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
