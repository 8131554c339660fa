//! Tests of the log on the simulated disk.

use std::path::Path;
use std::sync::{Arc, mpsc};

use bytes::Bytes;

use super::*;
use crate::cluster::storage::disk::Disk;
use crate::cluster::storage::sim_disk::SimDisk;

fn options() -> WalOptions {
    WalOptions {
        cluster: 7,
        member: 3,
        segment_bytes: 4096,
        cache_bytes: 300,
        max_entry_bytes: 600,
        max_meta_bytes: 128,
        max_queue_bytes: 1 << 20,
        max_spare_segments: 2,
    }
}

const DIR: &str = "/r";

fn open(disk: &SimDisk) -> Result<(Wal, [Recovered; 2]), WalError> {
    Wal::open(Arc::new(disk.clone()) as Arc<dyn Disk>, Path::new(DIR), options())
}

/// A callback and the way to wait for it.
fn done() -> (Done, mpsc::Receiver<std::io::Result<()>>) {
    let (tx, rx) = mpsc::channel();
    (Box::new(move |result| drop(tx.send(result))), rx)
}

fn payload(index: u64, salt: u64) -> Bytes {
    let length = (index * 37 + salt * 11) % 200;
    format!("{index}/{salt}/").bytes().chain((0..length).map(|at| (at ^ index ^ salt) as u8)).collect()
}

fn append(wal: &Wal, group: Group, range: Range<u64>, salt: u64) -> mpsc::Receiver<std::io::Result<()>> {
    let (done, rx) = done();
    let entries = range.map(|index| (index, payload(index, salt))).collect();
    wal.append(group, entries, done).expect("append is accepted");
    rx
}

#[test]
fn what_was_acknowledged_is_there_after_reopening() {
    let disk = SimDisk::new(1);
    let (wal, recovered) = open(&disk).expect("creates");
    assert_eq!(recovered, [Recovered::default(), Recovered::default()]);
    for index in 1..200 {
        append(&wal, Group::Control, index..index + 1, 0).recv().expect("called").expect("synced");
    }
    append(&wal, Group::Cache, 0..50, 1).recv().expect("called").expect("synced");
    let all = wal.read(Group::Control, 1..200, usize::MAX).expect("reads");
    assert_eq!(all.len(), 199);
    drop(wal);
    disk.power_cycle();
    let (wal, recovered) = open(&disk).expect("opens");
    assert_eq!((recovered[0].first, recovered[0].last), (Some(1), Some(199)));
    assert_eq!((recovered[1].first, recovered[1].last), (Some(0), Some(49)));
    for (index, data) in wal.read(Group::Control, 1..200, usize::MAX).expect("reads") {
        assert_eq!(data, payload(index, 0));
    }
    assert_eq!(wal.read(Group::Control, 5..9, 1).expect("reads").len(), 1);
    assert_eq!(wal.incarnation(), Incarnation(2));
}
