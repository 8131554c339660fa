//! Tests of the log on the simulated disk: a naive model, and a driver that runs random
//! operations against both.

mod faults;
mod model;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, mpsc};

use bytes::Bytes;

use super::*;
use crate::cluster::storage::disk::Disk;
use crate::cluster::storage::sim_disk::SimDisk;
use crate::cluster::storage::watermark::Watermark;

const DIR: &str = "/r";

/// Small enough that a few dozen entries fill and recycle segments.
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

fn open(disk: &SimDisk) -> Result<(Wal, [Recovered; 2]), WalError> {
    Wal::open(Arc::new(disk.clone()) as Arc<dyn Disk>, Path::new(DIR), options())
}

type Waiting = mpsc::Receiver<std::io::Result<()>>;

/// A callback and the way to wait for it.
fn done() -> (Done, Waiting) {
    let (tx, rx) = mpsc::channel();
    (Box::new(move |result| drop(tx.send(result))), rx)
}

fn acknowledged(waiting: &Waiting) -> bool {
    waiting.recv().expect("every callback is called").is_ok()
}

fn payload(index: u64, salt: u64) -> Bytes {
    let length = (index * 37 + salt * 11) % 200;
    format!("{index}/{salt}/").bytes().chain((0..length).map(|at| (at ^ index ^ salt) as u8)).collect()
}

/// A vote, commit note or purge note.
fn note(salt: u64) -> Bytes {
    format!("note {salt} {}", "x".repeat((salt % 60) as usize)).into()
}

fn append(wal: &Wal, group: Group, range: Range<u64>, salt: u64) -> Waiting {
    let (done, rx) = done();
    let entries = range.map(|index| (index, payload(index, salt))).collect();
    wal.append(group, entries, done).expect("append is accepted");
    rx
}

/// What one group must look like, the obvious way.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Model {
    entries: BTreeMap<u64, Bytes>,
    next: u64,
    vote: Option<Bytes>,
    committed: Option<Bytes>,
    purged: Option<(u64, Bytes)>,
}

/// One step of one group.
#[derive(Clone, Debug)]
enum Step {
    Append {
        count: u64,
        salt: u64,
    },
    Vote(u64),
    /// Keeps about this many of the newest 8 entries.
    Truncate(u64),
    /// Purges up to this far behind the end; above 8: beyond the end.
    Purge(u64),
    Committed(u64),
}

impl Model {
    /// Of an open log, everything read through its interface.
    fn of(wal: &Wal, group: Group) -> Model {
        Self::read(wal, group).expect("entries can be read")
    }

    fn read(wal: &Wal, group: Group) -> Result<Model, WalError> {
        let (first, last) = wal.bounds(group);
        let purged = wal.purged(group);
        let entries: BTreeMap<_, _> = match (first, last) {
            (Some(first), Some(last)) => {
                let read = wal.read(group, first..last + 1, usize::MAX)?;
                assert_eq!(read.len() as u64, last + 1 - first);
                read.into_iter().collect()
            }
            _ => BTreeMap::new(),
        };
        let after_purge = purged.as_ref().map_or(0, |(index, _)| index + 1);
        let next = last.map_or(after_purge, |last| last + 1);
        Ok(Model { entries, next, vote: wal.vote(group), committed: wal.committed(group), purged })
    }

    fn purged_index(&self) -> Option<u64> {
        self.purged.as_ref().map(|(index, _)| *index)
    }

    /// Index to keep for [`Step::Truncate`].
    fn keep(&self, of_last: u64) -> Option<u64> {
        self.next.checked_sub(1 + (8 - of_last.min(8))).max(self.purged_index())
    }

    fn upto(&self, behind: u64) -> u64 {
        if behind > 8 { self.next + (behind - 8) } else { self.next.saturating_sub(1 + behind) }
    }

    /// Takes the step, and gives every state the log may be found in if it was cut on the way.
    fn step(&mut self, step: &Step) -> Vec<Model> {
        let mut states = Vec::new();
        match step {
            Step::Append { count, salt } => {
                for _ in 0..*count {
                    self.entries.insert(self.next, payload(self.next, *salt));
                    self.next += 1;
                    states.push(self.clone());
                }
                return states;
            }
            Step::Vote(salt) => self.vote = Some(note(*salt)),
            Step::Truncate(of_last) => {
                let keep = self.keep(*of_last);
                self.entries.retain(|index, _| keep.is_some_and(|keep| *index <= keep));
                self.next = self.next.min(keep.map_or(0, |keep| keep + 1));
            }
            Step::Purge(behind) => {
                let upto = self.upto(*behind);
                if self.purged_index() < Some(upto) {
                    self.entries.retain(|index, _| *index > upto);
                    self.next = self.next.max(upto + 1);
                    self.purged = Some((upto, note(upto)));
                }
            }
            Step::Committed(salt) => self.committed = Some(note(*salt)),
        }
        states.push(self.clone());
        states
    }
}

/// A log with models of both groups beside it.
struct Driver {
    wal: Option<Wal>,
    models: [Model; 2],
    /// Per group: every state since opening, the first is the one at opening.
    history: [Vec<Model>; 2],
    /// Per group: callbacks, with the length of the history they vouch for.
    waiting: [Vec<(usize, Waiting)>; 2],
}

impl Driver {
    /// Opens the log and takes what is found as the truth.
    fn open(disk: &SimDisk) -> Result<Driver, WalError> {
        let (wal, _) = open(disk)?;
        let models = [Model::read(&wal, Group::Control)?, Model::read(&wal, Group::Cache)?];
        let history = models.clone().map(|model| vec![model]);
        Ok(Driver { wal: Some(wal), models, history, waiting: [Vec::new(), Vec::new()] })
    }

    fn wal(&self) -> &Wal {
        self.wal.as_ref().expect("the log is open")
    }

    /// Hands a step to log and model; false if the log refuses.
    fn step(&mut self, group: Group, step: &Step) -> bool {
        let (done, waiting) = done();
        let wal = self.wal.as_ref().expect("the log is open");
        let model = &mut self.models[group.index()];
        let before = model.clone();
        let states = model.step(step);
        let outcome = match step {
            Step::Append { .. } => {
                let entries = (before.next..model.next).map(|index| (index, model.entries[&index].clone()));
                wal.append(group, entries.collect(), done)
            }
            Step::Vote(_) => wal.save_vote(group, model.vote.clone().expect("just voted"), done),
            Step::Truncate(of_last) => wal.truncate_after(group, before.keep(*of_last), done),
            Step::Purge(behind) => {
                let upto = before.upto(*behind);
                wal.purge(group, upto, note(upto), done)
            }
            Step::Committed(_) => wal.save_committed(group, model.committed.clone().expect("just noted")),
        };
        match outcome {
            Ok(()) => {
                self.history[group.index()].extend(states);
                if !matches!(step, Step::Committed(_)) {
                    let vouched = self.history[group.index()].len();
                    self.waiting[group.index()].push((vouched, waiting));
                }
                true
            }
            Err(WalError::Failed(_)) => {
                *model = before;
                false
            }
            Err(error) => panic!("{step:?}: {error}"),
        }
    }

    /// Waits for every callback; per group, the least history that must be found again.
    fn settle(&mut self) -> [usize; 2] {
        let mut vouched = [1, 1];
        for (waiting, vouched) in self.waiting.iter_mut().zip(&mut vouched) {
            for (length, waiting) in waiting.drain(..) {
                if acknowledged(&waiting) {
                    *vouched = length;
                }
            }
        }
        vouched
    }

    /// Compares what is found after a crash: a state at or after the last acknowledged one.
    fn check_found(&self, vouched: [usize; 2], found: &Wal, context: &str) {
        for group in Group::ALL {
            let found = Model::of(found, group);
            let allowed = &self.history[group.index()][vouched[group.index()] - 1..];
            assert!(
                allowed.contains(&found),
                "{context}: {group}: found {found:#?}\nallowed are {} states, the first {:#?}",
                allowed.len(),
                allowed[0],
            );
        }
    }
}

#[test]
fn what_was_acknowledged_is_there_after_reopening() {
    let disk = SimDisk::new(1);
    let (wal, recovered) = open(&disk).expect("creates");
    assert_eq!(recovered, [Recovered::default(), Recovered::default()]);
    for index in 1..200 {
        assert!(acknowledged(&append(&wal, Group::Control, index..index + 1, 0)));
    }
    assert!(acknowledged(&append(&wal, Group::Cache, 0..50, 1)));
    assert_eq!(wal.read(Group::Control, 1..200, usize::MAX).expect("reads").len(), 199);
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

#[test]
fn entries_must_continue_the_log() {
    let (wal, _) = open(&SimDisk::new(1)).expect("creates");
    let refused = |first: u64| wal.append(Group::Cache, vec![(first, Bytes::new())], done().0);
    append(&wal, Group::Cache, 0..5, 0);
    assert!(matches!(refused(4), Err(WalError::Order { expected: 5, found: 4, .. })));
    let big = Bytes::from(vec![0; 601]);
    assert!(matches!(
        wal.append(Group::Cache, vec![(5, big)], done().0),
        Err(WalError::TooLarge { bytes: 601, max: 600 })
    ));
    wal.purge(Group::Cache, 2, Bytes::new(), done().0).expect("purges");
    assert!(matches!(
        wal.truncate_after(Group::Cache, Some(1), done().0),
        Err(WalError::CutBelowPurged { purged: 2, .. })
    ));
    assert!(matches!(wal.read(Group::Cache, 2..5, 10), Err(WalError::Purged { purged: 2, .. })));
}

#[test]
fn a_log_without_watermark_and_a_watermark_without_log_are_refused() {
    let disk = SimDisk::new(1);
    drop(open(&disk).expect("creates"));
    let lost = disk.fork();
    lost.remove(&Path::new(DIR).join("watermark")).expect("is there");
    assert!(matches!(open(&lost), Err(WalError::WatermarkMissing { .. })));
    let lost = disk.fork();
    for path in lost.paths().iter().filter(|path| path.starts_with("/r/log")) {
        lost.remove(path).expect("is there");
    }
    let error = open(&lost).err().expect("is refused");
    assert!(matches!(error, WalError::LogMissing { .. }) && error.forbids_voting());
}

#[test]
fn an_older_copy_of_the_log_is_lost_memory() {
    let disk = SimDisk::new(1);
    let (wal, _) = open(&disk).expect("creates");
    append(&wal, Group::Control, 1..4, 0);
    drop(wal);
    let old = disk.fork();
    let (wal, _) = open(&disk).expect("opens");
    append(&wal, Group::Control, 4..9, 0);
    drop(wal);
    let watermark = disk.bytes_of(Path::new("/r/watermark")).expect("is there");
    old.damage(Path::new("/r/watermark"), |bytes| bytes.clone_from(&watermark));
    let error = open(&old).err().expect("is refused");
    assert!(matches!(error, WalError::LostMemory { group: Group::Control, .. }), "{error}");
}

#[test]
fn another_members_directory_is_refused() {
    let disk = SimDisk::new(1);
    drop(open(&disk).expect("creates"));
    let other = WalOptions { member: 4, ..options() };
    let outcome = Wal::open(Arc::new(disk.clone()) as Arc<dyn Disk>, Path::new(DIR), other);
    assert!(matches!(outcome.err(), Some(WalError::Identity { found_member: 3, .. })));
    assert_eq!(Watermark::peek(&disk, Path::new(DIR)).expect("reads").map(|state| state.member), Some(3));
}

#[test]
fn one_sync_covers_everything_that_was_queued_together() {
    let disk = SimDisk::new(1);
    let (wal, _) = open(&disk).expect("creates");
    // The callback of the first holds the writer until all others are queued.
    let (hold, held) = mpsc::channel::<()>();
    let first = Box::new(move |_| {
        let _ = held.recv();
    });
    wal.append(Group::Control, vec![(1, Bytes::new())], first).expect("accepted");
    let syncs_before = loop {
        match wal.stats().syncs {
            0 => std::thread::yield_now(),
            syncs => break syncs,
        }
    };
    let waiting: Vec<_> = (2..40).map(|index| append(&wal, Group::Control, index..index + 1, 200)).collect();
    hold.send(()).expect("the callback waits");
    assert!(waiting.iter().all(acknowledged));
    let segments = wal.bytes(Group::Control) / 4096;
    assert!(wal.stats().syncs - syncs_before <= segments, "{:?}", wal.stats());
}

#[test]
fn a_frame_is_valid_only_where_it_was_written() {
    let at = Position { segment: 3, offset: 128 };
    let mut buffer = Vec::new();
    frame::encode(&mut buffer, Group::Cache, at, at, frame::Kind::Entry, Some(9), b"payload");
    let bytes = Bytes::from(buffer);
    assert!(frame::decode(Group::Cache, at, &bytes).is_ok());
    // 65539 has the same low 16 bits as 3.
    for segment in [2, 4, 65_539] {
        assert!(frame::decode(Group::Cache, Position { segment, ..at }, &bytes).is_err());
    }
    assert!(frame::decode(Group::Cache, Position { offset: 136, ..at }, &bytes).is_err());
    assert!(frame::decode(Group::Control, at, &bytes).is_err());
}
