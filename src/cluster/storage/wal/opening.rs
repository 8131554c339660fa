//! The steps of `Wal::open` that touch files: watermark, left-overs, first segments. Invariant:
//! the watermark is durable before the first segment, so a log without one has lost it.

use std::path::Path;

use super::Recovered;
use super::error::WalError;
use super::frame::{self, HeadState};
use super::memory::GroupMemory;
use super::options::WalOptions;
use super::recovery::Inspected;
use super::segment::{SegmentStore, TEMPORARY, parse_name};
use super::writer::GroupWriter;
use crate::cluster::storage::disk::Disk;
use crate::cluster::storage::watermark::{FILE_NAME as WATERMARK, Watermark, WatermarkState};
use crate::ids::Group;

/// The watermark, made if there is neither one nor a log; what it said, if it was there.
pub(super) fn open_watermark(
    disk: &dyn Disk,
    dir: &Path,
    store: &SegmentStore,
    options: &WalOptions,
) -> Result<(Watermark, Option<WatermarkState>), WalError> {
    let (cluster, member) = (options.cluster, options.member);
    if let Some((watermark, state)) = Watermark::load(disk, dir)? {
        if (state.cluster, state.member) != (cluster, member) {
            return Err(WalError::Identity {
                dir: dir.to_path_buf(),
                cluster,
                member,
                found_cluster: state.cluster,
                found_member: state.member,
            });
        }
        return Ok((watermark, Some(state)));
    }
    // The watermark is made before the first segment, so a log without one has lost it.
    let names = disk.list(&store.dir).map_err(WalError::io(&store.dir))?;
    if Group::ALL.iter().any(|group| names.iter().any(|name| parse_name(*group, name).is_some())) {
        return Err(WalError::WatermarkMissing { watermark: dir.join(WATERMARK), dir: store.dir.clone() });
    }
    let state = WatermarkState { cluster, member, ..Default::default() };
    Ok((Watermark::create(disk, dir, &state)?, None))
}

/// Deletes what an earlier process left half-made.
pub(super) fn remove_temporaries(store: &SegmentStore) -> Result<(), WalError> {
    let names = store.disk.list(&store.dir).map_err(WalError::io(&store.dir))?;
    for name in names.iter().filter(|name| name.ends_with(TEMPORARY)) {
        let path = store.dir.join(name);
        store.disk.remove(&path).map_err(WalError::io(&path))?;
    }
    Ok(())
}

/// Makes a group's first segment, replacing what an interrupted creation left.
pub(super) fn create_log(store: &SegmentStore, group: Group) -> Result<Inspected, WalError> {
    let make = || {
        for name in store.disk.list(&store.dir)? {
            if parse_name(group, &name).is_some() {
                store.disk.remove(&store.dir.join(&name))?;
                store.disk.sync_dir(&store.dir)?;
            }
        }
        let segment = store.make(group, 1, None)?;
        let log = Inspected::fresh(segment);
        log.current.file.write_at(frame::SEGMENT_HEADER, &log.first_head(group))?;
        log.current.file.sync_data()?;
        Ok(log)
    };
    make().map_err(WalError::io(&store.dir))
}

/// What the caller of `open` is told.
pub(super) fn summary(log: &Inspected) -> Recovered {
    Recovered {
        vote: log.state.vote.clone(),
        committed: log.state.committed.clone(),
        purged: log.state.purged.clone(),
        first: log.entries.first(),
        last: log.entries.last(),
        truncated_tail_bytes: log.torn_bytes,
    }
}

/// A group's log as the writer and as the readers see it.
pub(super) fn split(group: Group, log: Inspected) -> (GroupWriter, GroupMemory) {
    let HeadState { vote, committed, purged, .. } = log.state.clone();
    let memory = GroupMemory { entries: log.entries, files: log.files, vote, committed, purged };
    (GroupWriter::new(group, log.current, log.end, log.state, log.segments), memory)
}
