//! Segment files: their names, how one is made, and the keeper thread that prepares the next one
//! ahead of need and recycles purged ones. A segment under its final name always has a durable
//! header and its full size.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::frame::encode_segment_header;
use crate::cluster::storage::disk::{Disk, DiskFile};
use crate::ids::Group;

/// Ending of everything that may be deleted when the log is opened.
pub(super) const TEMPORARY: &str = ".tmp";

/// File name of a segment.
pub(super) fn file_name(group: Group, number: u64) -> String {
    format!("{}-{number:08}.wal", group.name())
}

/// Number of a segment by its file name, if it belongs to the group.
pub(super) fn parse_name(group: Group, name: &str) -> Option<u64> {
    let digits = name.strip_prefix(group.name())?.strip_prefix('-')?.strip_suffix(".wal")?;
    digits.parse().ok().filter(|number| file_name(group, *number) == name)
}

/// A segment as the writer fills it.
#[derive(Clone)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) capacity: u64,
    pub(super) file: Arc<dyn DiskFile>,
}

/// Where segments live and how large they are.
#[derive(Clone)]
pub(super) struct SegmentStore {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) bytes: u64,
    pub(super) max_spares: usize,
}

impl SegmentStore {
    pub(super) fn path(&self, group: Group, number: u64) -> PathBuf {
        self.dir.join(file_name(group, number))
    }

    /// Makes a segment from a spare or from nothing; durable, name and all, when this returns.
    pub(super) fn make(&self, group: Group, number: u64, spare: Option<PathBuf>) -> io::Result<Segment> {
        let recycled = spare.is_some();
        let temporary =
            spare.unwrap_or_else(|| self.dir.join(format!("{}{TEMPORARY}", file_name(group, number))));
        let made = self.fill(&temporary, group, number, recycled);
        if made.is_err() {
            // Best effort, to give the space back; a left-over is removed when the log is opened.
            let _ = self.disk.remove(&temporary);
        }
        Ok(Segment { number, capacity: self.bytes, file: made? })
    }

    fn fill(&self, path: &Path, group: Group, number: u64, recycled: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = if recycled {
            self.disk.open(path)?
        } else {
            let file = self.disk.create(path)?;
            file.preallocate(self.bytes)?;
            file
        };
        file.write_at(0, &encode_segment_header(group, number, self.bytes))?;
        file.sync_data()?;
        self.disk.rename(path, &self.path(group, number))?;
        self.disk.sync_dir(&self.dir)?;
        Ok(file)
    }

    /// Takes a purged segment away: its name first, durably, so that no later segment can be
    /// gone while this one is still there.
    fn retire(&self, group: Group, number: u64, spares: &mut VecDeque<PathBuf>) -> io::Result<()> {
        let path = self.path(group, number);
        let reusable = spares.len() < self.max_spares && self.disk.open(&path)?.size()? == self.bytes;
        if reusable {
            let spare = self.dir.join(format!("spare-{}{TEMPORARY}", file_name(group, number)));
            self.disk.rename(&path, &spare)?;
            self.disk.sync_dir(&self.dir)?;
            spares.push_back(spare);
            Ok(())
        } else {
            self.disk.remove(&path)?;
            self.disk.sync_dir(&self.dir)
        }
    }
}

enum Job {
    Prepare(Group, u64),
    Retire(Group, Vec<u64>),
}

/// A prepared segment, one being prepared, or why it could not be.
#[derive(Default)]
enum Next {
    #[default]
    Nothing,
    Coming,
    Ready(Segment),
    Failed(io::Error),
}

#[derive(Default)]
struct Bench {
    next: Mutex<[Next; 2]>,
    changed: Condvar,
}

/// Handle of the keeper thread. Its queue is bounded by what the writer does: at most one
/// segment per group is being prepared, and a retirement follows a purge.
pub(super) struct Keeper {
    bench: Arc<Bench>,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts the thread. `ready` are the segments that were found prepared on disk.
    pub(super) fn start(store: SegmentStore, ready: [Option<Segment>; 2]) -> io::Result<Self> {
        let bench = Arc::new(Bench::default());
        *bench.next.lock() = ready.map(|segment| segment.map_or(Next::Nothing, Next::Ready));
        let (jobs, inbox) = mpsc::channel();
        let shared = bench.clone();
        let thread = std::thread::Builder::new()
            .name("wal-keeper".into())
            .spawn(move || keep(&store, &shared, &inbox))?;
        Ok(Self { bench, jobs: Some(jobs), thread: Some(thread) })
    }

    /// Asks for a segment unless one is there or coming.
    pub(super) fn prepare(&self, group: Group, number: u64) {
        let mut next = self.bench.next.lock();
        let slot = &mut next[group.index()];
        if matches!(slot, Next::Nothing | Next::Failed(_)) {
            *slot = Next::Coming;
            self.send(Job::Prepare(group, number));
        }
    }

    /// The prepared segment; waits for it. A preparation that failed earlier (a full disk) is
    /// tried once more, with a new file, before the error is final.
    pub(super) fn take(&self, group: Group, number: u64) -> io::Result<Segment> {
        let mut again = true;
        let mut next = self.bench.next.lock();
        loop {
            match std::mem::take(&mut next[group.index()]) {
                Next::Ready(segment) => return Ok(segment),
                Next::Failed(error) if !again => return Err(error),
                Next::Coming => {
                    next[group.index()] = Next::Coming;
                    self.bench.changed.wait(&mut next);
                }
                Next::Nothing | Next::Failed(_) => {
                    again = false;
                    next[group.index()] = Next::Coming;
                    self.send(Job::Prepare(group, number));
                }
            }
        }
    }

    /// Takes purged segments away in the background, oldest first.
    pub(super) fn retire(&self, group: Group, numbers: Vec<u64>) {
        if !numbers.is_empty() {
            self.send(Job::Retire(group, numbers));
        }
    }

    fn send(&self, job: Job) {
        // The keeper ends only after `jobs` is dropped, so the send cannot fail while it is Some.
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the keeper has nothing left to tell.
            let _ = thread.join();
        }
    }
}

fn keep(store: &SegmentStore, bench: &Bench, inbox: &mpsc::Receiver<Job>) {
    let mut spares = VecDeque::new();
    for job in inbox {
        match job {
            Job::Prepare(group, number) => {
                let made = store.make(group, number, spares.pop_front());
                bench.next.lock()[group.index()] = made.map_or_else(Next::Failed, Next::Ready);
                bench.changed.notify_all();
            }
            Job::Retire(group, numbers) => {
                for number in numbers {
                    if let Err(error) = store.retire(group, number, &mut spares) {
                        // Only space is lost: recovery ignores segments below the oldest needed
                        // one and removes them. Later ones must stay while this one does.
                        tracing::warn!(%group, segment = number, %error, "purged segment not removed");
                        break;
                    }
                }
            }
        }
    }
}
