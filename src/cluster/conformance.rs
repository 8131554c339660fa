//! openraft's own storage conformance suite against our log and our state machine.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use super::log_store::LogStore;
use super::machine::{Cell, Hooks, Machine};
use super::storage::checkpoint::CheckpointStore;
use super::storage::disk::RealDisk;
use super::storage::wal::{Wal, WalOptions};
use super::types::TypeConfig;
use crate::ids::{Group, Incarnation, ReplicaId};
use crate::state::cache::CacheState;
use crate::state::command::CacheOutcome;

struct NoHooks;

impl Hooks<CacheState> for NoHooks {
    fn acknowledged(&self, _: u64, _: Vec<CacheOutcome>) {}
    fn caught_up(&self, _: u64) {}
    fn published(&self, _: &mut CacheState, _: u64) {}
    fn digest_due(&self, _: u64, _: u64) {}
}

struct OnDisk;

impl StoreBuilder<TypeConfig, LogStore, Machine, tempfile::TempDir> for OnDisk {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let options =
            WalOptions { segment_bytes: 1 << 20, max_entry_bytes: 1 << 18, ..WalOptions::default() };
        let (wal, _) = Wal::open(Arc::new(RealDisk), &dir.path().join("raft"), options).unwrap();
        let wal = Arc::new(wal);
        let store = Arc::new(CheckpointStore::open(&dir.path().join("checkpoints")).unwrap());
        let cell = Arc::new(Cell::new(Arc::new(NoHooks), ReplicaId(1), Incarnation(1), 256));
        let (machine, _) = Machine::open(Group::Cache, cell, store, wal.clone(), Arc::default()).unwrap();
        Ok((dir, LogStore::new(wal, Group::Cache), machine))
    }
}

#[test]
fn openrafts_storage_suite_passes() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(Suite::test_all(OnDisk)).unwrap();
}
