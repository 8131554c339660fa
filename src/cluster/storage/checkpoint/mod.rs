//! Checkpoints of the state machines in sled, for the node that runs the groups. Sled syncs no
//! file to the device and opens damaged files with fewer keys, so: every value is checksummed,
//! sled's file is fsynced here, and what must be there is named in a file of our own. A
//! checkpoint is either returned exactly as it was written, or reported as damaged.
//!
//! Checkpoints alternate between two sled databases: one flipped bit makes sled forget every key
//! of its file, and a database that is being written is at risk in a power cut. So the previous
//! checkpoint lies where nothing is written.

mod pieces;
mod sidecar;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use self::pieces::{Cutter, Joiner};
use self::sidecar::{Entry, KeyedSum, Sidecar};
use crate::ids::Group;

/// Page cache of each of the two databases, 64 MiB together. Sled's default is 1 GiB.
const CACHE_BYTES: u64 = 32 << 20;
/// Pairs in one sled batch; about 1.8 MB with full pieces.
const BATCH: usize = 256;

/// Why a checkpoint could not be written or read.
#[derive(thiserror::Error, Debug)]
pub enum CheckpointError {
    /// The disk refused.
    #[error("checkpoint store {}: {source}", .file.display())]
    Io {
        /// File or directory.
        file: PathBuf,
        /// What the disk said.
        source: io::Error,
    },
    /// Sled refused or panicked.
    #[error("checkpoint store {}: sled: {why}", .dir.display())]
    Sled {
        /// Sled's directory.
        dir: PathBuf,
        /// What it said.
        why: String,
    },
    /// The list of checkpoints is missing or damaged.
    #[error("{} {why}; this replica must get its state from its peers", .file.display())]
    Sidecar {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// No checkpoint of the group is whole.
    #[error("no whole checkpoint of the {group} group: {newest}; the one before: {previous}")]
    Damaged {
        /// Whose.
        group: Group,
        /// What is wrong with the newest.
        newest: String,
        /// What is wrong with the one before.
        previous: String,
    },
    /// The plain records are not the ones that were written.
    #[error("the plain records of the {group} group are damaged: {why}")]
    Records {
        /// Whose.
        group: Group,
        /// What is wrong.
        why: String,
    },
    /// A plain record too large for sled's log.
    #[error("a plain record of {bytes} bytes is above the limit of {max}")]
    TooLarge {
        /// Its size, key and value.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// An earlier call failed half-way; the store must be opened again.
    #[error("the checkpoint store failed earlier: {0}")]
    Failed(String),
}

/// A checkpoint that was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CheckpointInfo {
    /// Counts the group's checkpoints.
    pub generation: u64,
    /// Log index it covers.
    pub index: u64,
    /// Records in it.
    pub records: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
    /// Log index of the checkpoint that [`CheckpointStore::load`] falls back to. A log purged
    /// only up to here can bring that one up to date.
    pub previous_index: Option<u64>,
}

/// Keys with their values.
pub type Records = Vec<(Vec<u8>, Vec<u8>)>;

/// A checkpoint that was read; every byte passed its checksum.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checkpoint {
    /// Log index it covers.
    pub index: u64,
    /// What was handed in with it.
    pub meta: Vec<u8>,
    /// The records, in the order they were written.
    pub records: Records,
    /// Set if the newest checkpoint is damaged and this is the one before: what is wrong.
    pub fell_back: Option<String>,
}

/// One of the two databases.
struct Half {
    dir: PathBuf,
    db: sled::Db,
    /// By [`Group::index`].
    trees: [sled::Tree; 2],
    /// Sled could not open what was there; it was put aside and this is a fresh one.
    lost: Option<String>,
}

struct Store {
    /// A generation is in the half with its parity; plain records are in the first.
    halves: [Half; 2],
    sidecar: Sidecar,
    /// Per group: the newest checkpoint was found damaged.
    fell_back: [bool; 2],
    failed: Option<String>,
}

impl Store {
    fn half(&self, generation: u64) -> &Half {
        &self.halves[(generation % 2) as usize]
    }
}

impl Half {
    /// Opens a database; one that sled refuses is renamed to `….damaged` and a fresh one is made.
    /// What it held is then missing, which the list of checkpoints tells.
    fn open(dir: PathBuf) -> Result<Self, CheckpointError> {
        let io_error = |source| CheckpointError::Io { file: dir.clone(), source };
        let attempt = || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io_error)?;
            Ok(guarded(|| {
                // The flusher thread stays on: it is the only place where sled reclaims space.
                let db = sled::Config::new().path(&dir).cache_capacity(CACHE_BYTES).open()?;
                let trees = [db.open_tree(Group::Control.name())?, db.open_tree(Group::Cache.name())?];
                Ok((db, trees))
            }))
        };
        let why = match attempt()? {
            Ok((db, trees)) => return Ok(Self { dir, db, trees, lost: None }),
            Err(why) => why,
        };
        if why.contains("could not acquire lock") {
            return Err(CheckpointError::Sled { dir, why });
        }
        tracing::error!(dir = %dir.display(), %why, "sled database put aside");
        let aside = dir.with_extension("damaged");
        if aside.exists() {
            fs::remove_dir_all(&aside).map_err(io_error)?;
        }
        fs::rename(&dir, &aside).map_err(io_error)?;
        match attempt()? {
            Ok((db, trees)) => Ok(Self { dir, db, trees, lost: Some(why) }),
            Err(why) => Err(CheckpointError::Sled { dir, why }),
        }
    }

    fn failure(&self, why: String) -> CheckpointError {
        CheckpointError::Sled { dir: self.dir.clone(), why }
    }

    /// Makes everything durable: sled's own flush reaches the page cache of the device at best,
    /// so its files and directory are synced here.
    fn settle(&self) -> Result<(), CheckpointError> {
        guarded(|| self.db.flush()).map_err(|why| self.failure(why))?;
        let sync = || {
            for entry in fs::read_dir(&self.dir)? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    match File::open(entry.path()).and_then(|file| file.sync_all()) {
                        // Sled replaces its `snap` files while we look.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        other => other?,
                    }
                }
            }
            File::open(&self.dir)?.sync_all()
        };
        sync().map_err(|source| CheckpointError::Io { file: self.dir.clone(), source })
    }
}

/// The open store. One call at a time; others wait.
pub struct CheckpointStore {
    dir: PathBuf,
    store: Mutex<Store>,
}

/// Runs sled code; a panic inside becomes its text.
fn guarded<T>(run: impl FnOnce() -> sled::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(format!("panicked: {}", text.unwrap_or("no text")))
        }
    }
}

impl CheckpointStore {
    /// Opens the store, or creates it. Fails if sled's files are there but the list of
    /// checkpoints is not. What the checkpoints hold is checked by [`CheckpointStore::load`].
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let io_error = |source| CheckpointError::Io { file: dir.to_path_buf(), source };
        let sled_dir = dir.join("sled");
        let fresh = !dir.join(sidecar::FILE_NAME).exists();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error)?;
        let sidecar = match Sidecar::load(dir).map_err(io_error)? {
            Some(Ok(sidecar)) => sidecar,
            Some(Err(why)) => return Err(sidecar_error(dir, why)),
            None if sled_dir.exists() => {
                return Err(sidecar_error(dir, "is missing although there is a sled database".into()));
            }
            None => Sidecar::default(),
        };
        if fresh {
            sidecar.store(dir).map_err(io_error)?;
        }
        let halves = [Half::open(sled_dir.join("0"))?, Half::open(sled_dir.join("1"))?];
        for sync in [sled_dir.as_path(), dir] {
            File::open(sync).and_then(|dir| dir.sync_all()).map_err(io_error)?;
        }
        let store = Store { halves, sidecar, fell_back: [false; 2], failed: None };
        let this = Self { dir: dir.to_path_buf(), store: Mutex::new(store) };
        if fresh {
            this.change(|store| store.halves.iter().try_for_each(Half::settle))?;
        }
        Ok(this)
    }

    /// Writes a checkpoint. When this returns it is durable and was read back; the one before
    /// it stays, older ones are removed.
    pub fn write(
        &self,
        group: Group,
        index: u64,
        meta: &[u8],
        records: impl Iterator<Item = (Vec<u8>, Vec<u8>)>,
    ) -> Result<CheckpointInfo, CheckpointError> {
        self.change(|store| {
            let known = store.sidecar.groups[group.index()];
            self.remove_unnamed(store, group)?;
            // Never into the database that holds the newest whole one.
            let (base, generation) = match store.fell_back[group.index()] {
                false => (known.current, known.current.generation + 1),
                true => (known.previous, known.current.generation + 2),
            };
            let half = store.half(generation);
            let (entry, bytes) = self.put_records(half, group, generation, index, meta, records)?;
            half.settle()?;
            self.verify(store, group, &entry, |_| ())
                .map_err(|why| half.failure(format!("checkpoint does not read back: {why}")))?;
            let named = &mut store.sidecar.groups[group.index()];
            named.previous = base;
            named.current = entry;
            store.fell_back[group.index()] = false;
            self.store_sidecar(store)?;
            self.remove_unnamed(store, group)?;
            let previous = Some(base).filter(|entry| entry.generation > 0);
            Ok(CheckpointInfo {
                generation,
                index,
                // Record 0 is the meta.
                records: entry.records - 1,
                bytes,
                previous_index: previous.map(|entry| entry.index),
            })
        })
    }

    /// Reads the newest checkpoint that is whole; `None` if none was ever written.
    pub fn load(&self, group: Group) -> Result<Option<Checkpoint>, CheckpointError> {
        let mut store = self.store.lock();
        let known = store.sidecar.groups[group.index()];
        if known.current.generation == 0 {
            return Ok(None);
        }
        let read = |entry: &Entry| {
            if entry.generation == 0 {
                return Err("there is none".to_string());
            }
            let mut records = Vec::new();
            self.verify(&store, group, entry, |record| records.push(record))?;
            let (_, meta) = records.remove(0);
            Ok(Checkpoint { index: entry.index, meta, records, fell_back: None })
        };
        match read(&known.current) {
            Ok(checkpoint) => Ok(Some(checkpoint)),
            Err(newest) => match read(&known.previous) {
                Ok(checkpoint) => {
                    store.fell_back[group.index()] = true;
                    Ok(Some(Checkpoint { fell_back: Some(newest), ..checkpoint }))
                }
                Err(previous) => Err(CheckpointError::Damaged { group, newest, previous }),
            },
        }
    }

    /// Changes plain records of a group, all or none, durably. `None` removes a key.
    pub fn put(&self, group: Group, changes: &[(Vec<u8>, Option<Vec<u8>>)]) -> Result<(), CheckpointError> {
        for (key, value) in changes {
            let bytes = key.len() + value.as_ref().map_or(0, Vec::len);
            if bytes > pieces::PIECE {
                return Err(CheckpointError::TooLarge { bytes, max: pieces::PIECE });
            }
        }
        self.change(|store| {
            let before = self.sum_keyed(store, group)?;
            let mut after = before;
            let mut batch = sled::Batch::default();
            let mut seen = std::collections::BTreeMap::new();
            for (key, value) in changes {
                seen.insert(key, value);
            }
            for (key, value) in seen {
                let sled_key = keyed(key);
                let half = &store.halves[0];
                let old = guarded(|| half.trees[group.index()].get(&sled_key));
                if let Some(old) = old.map_err(|why| half.failure(why))? {
                    after.count -= 1;
                    after.sum = after.sum.wrapping_sub(pieces::pair_hash(&sled_key, &old));
                }
                match value {
                    Some(value) => {
                        let sealed = pieces::seal(&sled_key, value);
                        after.count += 1;
                        after.sum = after.sum.wrapping_add(pieces::pair_hash(&sled_key, &sealed));
                        batch.insert(sled_key, sealed);
                    }
                    None => batch.remove(sled_key),
                }
            }
            store.sidecar.groups[group.index()].keyed = [before, after];
            self.store_sidecar(store)?;
            let half = &store.halves[0];
            guarded(|| half.trees[group.index()].apply_batch(batch)).map_err(|why| half.failure(why))?;
            half.settle()?;
            store.sidecar.groups[group.index()].keyed = [after, after];
            self.store_sidecar(store)
        })
    }

    /// All plain records of a group, in key order; an error if one is damaged, missing or new.
    pub fn records(&self, group: Group) -> Result<Records, CheckpointError> {
        let store = self.store.lock();
        let mut records = Vec::new();
        self.walk_keyed(&store, group, |key, value| records.push((key.to_vec(), value.to_vec())))?;
        Ok(records)
    }

    /// Bytes of sled's files.
    pub fn bytes(&self) -> Result<u64, CheckpointError> {
        let store = self.store.lock();
        let size = |half: &Half| guarded(|| half.db.size_on_disk()).map_err(|why| half.failure(why));
        Ok(size(&store.halves[0])? + size(&store.halves[1])?)
    }

    /// Runs a change; an error leaves the store refusing further changes, since what sled did
    /// with the rest of it is unknown.
    fn change<T>(
        &self,
        run: impl FnOnce(&mut Store) -> Result<T, CheckpointError>,
    ) -> Result<T, CheckpointError> {
        let mut store = self.store.lock();
        if let Some(why) = &store.failed {
            return Err(CheckpointError::Failed(why.clone()));
        }
        let outcome = run(&mut store);
        if let Err(error) = &outcome {
            store.failed = Some(error.to_string());
        }
        outcome
    }

    fn put_records(
        &self,
        half: &Half,
        group: Group,
        generation: u64,
        index: u64,
        meta: &[u8],
        records: impl Iterator<Item = (Vec<u8>, Vec<u8>)>,
    ) -> Result<(Entry, u64), CheckpointError> {
        let tree = &half.trees[group.index()];
        let mut cutter = Cutter::new(generation);
        let mut batch = sled::Batch::default();
        let mut waiting = 0;
        let mut bytes = 0;
        let all = std::iter::once((Vec::new(), meta.to_vec())).chain(records);
        for (nth, (key, value)) in all.enumerate() {
            if nth > 0 {
                bytes += (key.len() + value.len()) as u64;
            }
            cutter.record(&key, &value, |key, value| {
                batch.insert(key, value);
                waiting += 1;
                if waiting < BATCH {
                    return Ok(());
                }
                waiting = 0;
                let full = std::mem::take(&mut batch);
                guarded(|| tree.apply_batch(full)).map_err(|why| half.failure(why))
            })?;
        }
        let (records, pieces, checksum) = cutter.sums();
        let entry = Entry { generation, index, records, pieces, checksum };
        let key = pieces::manifest_key(generation);
        batch.insert(key.as_slice(), pieces::seal(&key, &manifest(&entry)));
        guarded(|| tree.apply_batch(batch)).map_err(|why| half.failure(why))?;
        Ok((entry, bytes))
    }

    /// Reads a generation, checks it against the list, and hands over every record.
    fn verify(
        &self,
        store: &Store,
        group: Group,
        entry: &Entry,
        mut each: impl FnMut(pieces::Record),
    ) -> Result<(), String> {
        let half = store.half(entry.generation);
        let tree = &half.trees[group.index()];
        let key = pieces::manifest_key(entry.generation);
        let found = guarded(|| tree.get(&key))?;
        let Some(found) = found else {
            let why = half.lost.as_ref().map(|why| format!(", sled could not open its database: {why}"));
            return Err(format!(
                "generation {} has no manifest{}",
                entry.generation,
                why.unwrap_or_default()
            ));
        };
        if pieces::unseal(&key, &found)? != manifest(entry) {
            return Err(format!("manifest of generation {} is another one", entry.generation));
        }
        let mut joiner = Joiner::new(entry.generation);
        let mut pairs = tree.scan_prefix(pieces::record_prefix(entry.generation));
        while let Some((key, value)) = guarded(|| pairs.next().transpose())? {
            if let Some(record) = joiner.pair(&key, &value)? {
                each(record);
            }
        }
        if let Some(record) = joiner.finish()? {
            each(record);
        }
        let (records, pieces, checksum) = joiner.sums();
        if (records, pieces, checksum) != (entry.records, entry.pieces, entry.checksum) {
            return Err(format!(
                "generation {} has {records} records in {pieces} pieces instead of {} in {}, or other contents",
                entry.generation, entry.records, entry.pieces
            ));
        }
        Ok(())
    }

    /// Removes every generation that the list does not name.
    fn remove_unnamed(&self, store: &Store, group: Group) -> Result<(), CheckpointError> {
        let named = store.sidecar.groups[group.index()];
        let keep = [named.current.generation, named.previous.generation];
        let clean = |tree: &sled::Tree| -> sled::Result<()> {
            let mut batch = sled::Batch::default();
            let mut waiting = 0;
            for key in tree.scan_prefix(b"c").keys() {
                let key = key?;
                if pieces::generation_of(&key).is_some_and(|generation| keep.contains(&generation)) {
                    continue;
                }
                batch.remove(key);
                waiting += 1;
                if waiting == BATCH {
                    waiting = 0;
                    tree.apply_batch(std::mem::take(&mut batch))?;
                }
            }
            tree.apply_batch(batch)
        };
        for half in &store.halves {
            guarded(|| clean(&half.trees[group.index()])).map_err(|why| half.failure(why))?;
        }
        Ok(())
    }

    fn walk_keyed(
        &self,
        store: &Store,
        group: Group,
        mut each: impl FnMut(&[u8], &[u8]),
    ) -> Result<KeyedSum, CheckpointError> {
        let damaged = |why| CheckpointError::Records { group, why };
        let mut sum = KeyedSum::default();
        let mut pairs = store.halves[0].trees[group.index()].scan_prefix(b"k");
        while let Some((key, value)) = guarded(|| pairs.next().transpose()).map_err(damaged)? {
            let data = pieces::unseal(&key, &value).map_err(damaged)?;
            sum.count += 1;
            sum.sum = sum.sum.wrapping_add(pieces::pair_hash(&key, &value));
            each(&key[1..], data);
        }
        let known = store.sidecar.groups[group.index()].keyed;
        if !known.contains(&sum) {
            let why = format!("{} records instead of {}, or other contents", sum.count, known[1].count);
            return Err(damaged(why));
        }
        Ok(sum)
    }

    fn sum_keyed(&self, store: &Store, group: Group) -> Result<KeyedSum, CheckpointError> {
        self.walk_keyed(store, group, |_, _| ())
    }

    fn store_sidecar(&self, store: &Store) -> Result<(), CheckpointError> {
        let stored = store.sidecar.store(&self.dir);
        stored.map_err(|source| CheckpointError::Io { file: self.dir.join(sidecar::FILE_NAME), source })
    }
}

fn sidecar_error(dir: &Path, why: String) -> CheckpointError {
    CheckpointError::Sidecar { file: dir.join(sidecar::FILE_NAME), why }
}

fn keyed(key: &[u8]) -> Vec<u8> {
    let mut sled_key = vec![b'k'];
    sled_key.extend_from_slice(key);
    sled_key
}

fn manifest(entry: &Entry) -> Vec<u8> {
    let numbers = [entry.generation, entry.index, entry.records, entry.pieces, entry.checksum];
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}
