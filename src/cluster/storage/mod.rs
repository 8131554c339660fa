//! Durable storage under Raft, for the node that runs the two groups: a write-ahead log, a
//! watermark that notices lost memory, and checkpoints in sled. Payloads are opaque bytes here;
//! nothing is acknowledged before it would survive a power cut.
//!
//! ```text
//!  replica directory
//!  ├── lock                       held while the log is open
//!  ├── watermark                  two slots: who we are, how far the log was known to be durable
//!  └── log/
//!      ├── control-00000007.wal   pre-allocated segments, one series a group
//!      ├── cache-00000041.wal
//!      └── cache-00000042.wal     the next one, prepared ahead of need
//! ```
//!
//! No async runtime: plain threads, and callers hand over callbacks.

pub mod checkpoint;
pub mod disk;
pub mod sim_disk;
pub mod wal;
pub mod watermark;
