//! A disk in memory that fails on command, for simulations and tests. It keeps what was written
//! apart from what is durable: a power cut keeps a random part of the un-synced sectors (torn at
//! any byte) and a random prefix of the un-synced name changes, all drawn from one seed.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::{Disk, DiskFile};

/// Writes reach the medium in units of this size.
const SECTOR: usize = 512;

/// Kinds of operation that can be told to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskOp {
    /// A write inside a file, also the zero-filling of a new one.
    Write,
    /// A read inside a file.
    Read,
    /// `sync_data` of a file.
    Sync,
    /// `sync_dir` of a directory.
    SyncDir,
    /// Create, rename or remove.
    Name,
}

/// SplitMix64: small, seeded, the same on every version of every library.
#[derive(Clone, Debug)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }
}

#[derive(Clone, Default)]
struct Inode {
    durable: Vec<u8>,
    current: Vec<u8>,
    dirty: BTreeSet<usize>,
}

#[derive(Clone)]
enum NameChange {
    Put(PathBuf, u64),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

impl NameChange {
    fn parent(&self) -> Option<&Path> {
        match self {
            NameChange::Put(path, _) | NameChange::Remove(path) | NameChange::Rename(_, path) => {
                path.parent()
            }
        }
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            NameChange::Put(path, inode) => {
                names.insert(path.clone(), *inode);
            }
            NameChange::Remove(path) => {
                names.remove(path);
            }
            NameChange::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
        }
    }
}

#[derive(Clone)]
struct State {
    inodes: HashMap<u64, Inode>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    pending: Vec<NameChange>,
    next_inode: u64,
    dice: Dice,
    /// Counts power cycles; handles of an earlier one are dead.
    epoch: u64,
    powered: bool,
    ops: u64,
    cut_at: Option<u64>,
    faults: Vec<(DiskOp, u64, io::ErrorKind)>,
    capacity: Option<u64>,
    syncs: u64,
}

/// What to do with the operation that is just starting.
enum Step {
    /// Carry it out.
    Go,
    /// Carry it out as far as the cache, but the caller never hears of it: power is gone.
    Cut,
}

fn powerless() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "simulated power cut")
}

impl State {
    fn step(&mut self, kind: DiskOp) -> io::Result<Step> {
        if !self.powered {
            return Err(powerless());
        }
        self.ops += 1;
        if self.cut_at == Some(self.ops) {
            self.powered = false;
            return Ok(Step::Cut);
        }
        for at in 0..self.faults.len() {
            let (fault_kind, left, error) = &mut self.faults[at];
            if *fault_kind != kind {
                continue;
            }
            *left -= 1;
            if *left == 0 {
                let error = io::Error::new(*error, "simulated fault");
                self.faults.remove(at);
                return Err(error);
            }
        }
        Ok(Step::Go)
    }

    fn used(&self) -> u64 {
        self.names.values().filter_map(|inode| self.inodes.get(inode)).map(|i| i.current.len() as u64).sum()
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.pending.push(change);
    }
}

/// The disk. Clones share one state; [`SimDisk::fork`] makes an independent copy.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

impl SimDisk {
    /// An empty disk whose faults are drawn from `seed`.
    pub fn new(seed: u64) -> Self {
        let state = State {
            inodes: HashMap::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending: Vec::new(),
            next_inode: 1,
            dice: Dice(seed),
            epoch: 0,
            powered: true,
            ops: 0,
            cut_at: None,
            faults: Vec::new(),
            capacity: None,
            syncs: 0,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// An independent copy, with its own power and faults; files opened before stay with the
    /// original.
    pub fn fork(&self) -> Self {
        Self { state: Arc::new(Mutex::new(self.state.lock().clone())) }
    }

    /// Operations so far.
    pub fn ops(&self) -> u64 {
        self.state.lock().ops
    }

    /// Successful `sync_data` calls so far.
    pub fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// Cuts the power during the `n`th operation from now (1 is the next one).
    pub fn cut_power_after(&self, n: u64) {
        let mut state = self.state.lock();
        state.cut_at = Some(state.ops + n);
    }

    /// Whether the power is on.
    pub fn powered(&self) -> bool {
        self.state.lock().powered
    }

    /// Makes the `n`th operation of a kind from now (1 is the next) fail with `error`. A failed
    /// sync drops the dirty pages as Linux does: later syncs succeed and prove nothing.
    pub fn fail_nth(&self, kind: DiskOp, n: u64, error: io::ErrorKind) {
        self.state.lock().faults.push((kind, n.max(1), error));
    }

    /// Limits the sum of all files; `None` lifts the limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state.lock().capacity = bytes;
    }

    /// Bytes of all files now.
    pub fn used(&self) -> u64 {
        self.state.lock().used()
    }

    /// Flips one bit of a file, on the medium and in the cache.
    pub fn flip(&self, path: &Path, byte: u64, bit: u8) {
        self.damage(path, |data| {
            if let Some(byte) = data.get_mut(byte as usize) {
                *byte ^= 1 << (bit & 7);
            }
        });
    }

    /// Cuts a file short, on the medium and in the cache.
    pub fn truncate(&self, path: &Path, bytes: u64) {
        self.damage(path, |data| data.truncate(bytes as usize));
    }

    /// Applies `change` to a file's bytes, durable and cached.
    pub fn damage(&self, path: &Path, change: impl Fn(&mut Vec<u8>)) {
        let mut state = self.state.lock();
        let Some(inode) = state.names.get(path).copied() else { return };
        if let Some(inode) = state.inodes.get_mut(&inode) {
            change(&mut inode.current);
            change(&mut inode.durable);
        }
    }

    /// Copy of a file's bytes as a reader sees them now.
    pub fn bytes_of(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.state.lock();
        state.names.get(path).and_then(|inode| state.inodes.get(inode)).map(|inode| inode.current.clone())
    }

    /// Every file there is.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.state.lock().names.keys().cloned().collect()
    }

    /// Cuts the power (if it is still on) and turns it on again: what was synced is there, of
    /// the rest a random part. Faults and limits are lifted, open files are dead.
    pub fn power_cycle(&self) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let kept_names = state.dice.below(state.pending.len() as u64 + 1) as usize;
        for change in state.pending.drain(..).take(kept_names) {
            change.apply(&mut state.durable_names);
        }
        state.names = state.durable_names.clone();
        let alive: BTreeSet<u64> = state.names.values().copied().collect();
        state.inodes.retain(|inode, _| alive.contains(inode));

        let keep_percent = [0, 10, 50, 90, 100][state.dice.below(5) as usize];
        let mut inodes: Vec<_> = state.inodes.iter_mut().collect();
        inodes.sort_by_key(|(inode, _)| **inode);
        for (_, inode) in inodes {
            let dirty = std::mem::take(&mut inode.dirty);
            for sector in dirty {
                if state.dice.below(100) >= keep_percent {
                    continue;
                }
                let start = sector * SECTOR;
                let mut end = (start + SECTOR).min(inode.current.len());
                if state.dice.below(8) == 0 && end > start {
                    end = start + state.dice.below((end - start) as u64) as usize;
                }
                if start >= end {
                    continue;
                }
                if inode.durable.len() < end {
                    inode.durable.resize(end, 0);
                }
                inode.durable[start..end].copy_from_slice(&inode.current[start..end]);
            }
            inode.current = inode.durable.clone();
        }
        state.epoch += 1;
        state.powered = true;
        state.cut_at = None;
        state.faults.clear();
        state.capacity = None;
    }

    /// The process dies and starts again, the machine stays up: nothing written is lost, but
    /// open files are dead and faults are lifted.
    pub fn process_restart(&self) {
        let mut state = self.state.lock();
        state.epoch += 1;
        state.powered = true;
        state.cut_at = None;
        state.faults.clear();
        state.capacity = None;
    }
}

struct SimFile {
    state: Arc<Mutex<State>>,
    inode: u64,
    epoch: u64,
}

impl SimFile {
    fn with<T>(
        &self,
        kind: DiskOp,
        run: impl FnOnce(&mut State, u64, &Step) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.state.lock();
        if state.epoch != self.epoch {
            return Err(powerless());
        }
        let step = match state.step(kind) {
            Ok(step) => step,
            Err(error) => {
                if kind == DiskOp::Sync
                    && state.powered
                    && let Some(inode) = state.inodes.get_mut(&self.inode)
                {
                    inode.dirty.clear();
                }
                return Err(error);
            }
        };
        let answer = run(&mut state, self.inode, &step);
        match step {
            Step::Go => answer,
            Step::Cut => Err(powerless()),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(DiskOp::Write, |state, inode, _| {
            let used = state.used();
            let capacity = state.capacity;
            let Some(inode) = state.inodes.get_mut(&inode) else { return Err(powerless()) };
            let start = offset as usize;
            let end = start + data.len();
            if let Some(capacity) = capacity {
                let grows = end.saturating_sub(inode.current.len()) as u64;
                if grows > 0 && used + grows > capacity {
                    return Err(io::Error::new(io::ErrorKind::StorageFull, "simulated full disk"));
                }
            }
            if inode.current.len() < end {
                inode.current.resize(end, 0);
            }
            inode.current[start..end].copy_from_slice(data);
            if start < end {
                inode.dirty.extend(start / SECTOR..=(end - 1) / SECTOR);
            }
            Ok(())
        })
    }
}

impl DiskFile for SimFile {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(offset, data)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.with(DiskOp::Read, |state, inode, _| {
            let Some(inode) = state.inodes.get(&inode) else { return Err(powerless()) };
            let start = offset as usize;
            match inode.current.get(start..start + into.len()) {
                Some(data) => {
                    into.copy_from_slice(data);
                    Ok(())
                }
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        })
    }

    fn preallocate(&self, bytes: u64) -> io::Result<()> {
        self.write(0, &vec![0; bytes as usize])
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(DiskOp::Sync, |state, inode, step| {
            if matches!(step, Step::Cut) {
                return Ok(());
            }
            state.syncs += 1;
            let Some(inode) = state.inodes.get_mut(&inode) else { return Err(powerless()) };
            if inode.durable.len() < inode.current.len() {
                inode.durable.resize(inode.current.len(), 0);
            }
            for sector in std::mem::take(&mut inode.dirty) {
                let start = sector * SECTOR;
                let end = (start + SECTOR).min(inode.current.len());
                inode.durable[start..end].copy_from_slice(&inode.current[start..end]);
            }
            Ok(())
        })
    }

    fn size(&self) -> io::Result<u64> {
        self.with(DiskOp::Read, |state, inode, _| {
            state.inodes.get(&inode).map(|inode| inode.current.len() as u64).ok_or_else(powerless)
        })
    }
}

impl SimDisk {
    fn handle(&self, inode: u64, epoch: u64) -> Arc<dyn DiskFile> {
        Arc::new(SimFile { state: self.state.clone(), inode, epoch })
    }

    fn change(&self, run: impl FnOnce(&mut State) -> io::Result<()>) -> io::Result<()> {
        let mut state = self.state.lock();
        let step = state.step(DiskOp::Name)?;
        run(&mut state)?;
        match step {
            Step::Go => Ok(()),
            Step::Cut => Err(powerless()),
        }
    }
}

impl Disk for SimDisk {
    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        if self.powered() { Ok(()) } else { Err(powerless()) }
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let mut created = (0, 0);
        self.change(|state| {
            if state.names.contains_key(path) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let inode = state.next_inode;
            state.next_inode += 1;
            state.inodes.insert(inode, Inode::default());
            state.change_name(NameChange::Put(path.to_path_buf(), inode));
            created = (inode, state.epoch);
            Ok(())
        })?;
        Ok(self.handle(created.0, created.1))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let state = self.state.lock();
        if !state.powered {
            return Err(powerless());
        }
        let inode = *state.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(self.handle(inode, state.epoch))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(|state| {
            if !state.names.contains_key(from) {
                return Err(io::ErrorKind::NotFound.into());
            }
            state.change_name(NameChange::Rename(from.to_path_buf(), to.to_path_buf()));
            Ok(())
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change(|state| {
            if !state.names.contains_key(path) {
                return Err(io::ErrorKind::NotFound.into());
            }
            state.change_name(NameChange::Remove(path.to_path_buf()));
            Ok(())
        })
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if matches!(state.step(DiskOp::SyncDir)?, Step::Cut) {
            return Err(powerless());
        }
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            state.pending.drain(..).partition(|change| change.parent() == Some(dir));
        for change in here {
            change.apply(&mut state.durable_names);
        }
        state.pending = elsewhere;
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.state.lock();
        if !state.powered {
            return Err(powerless());
        }
        let here = state.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(here.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect())
    }

    fn lock(&self, _path: &Path) -> io::Result<Box<dyn Any + Send + Sync>> {
        if self.powered() { Ok(Box::new(())) } else { Err(powerless()) }
    }
}
