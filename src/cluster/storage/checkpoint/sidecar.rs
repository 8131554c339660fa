//! `checkpoints.meta`: which checkpoints there are, kept apart from sled because sled may open
//! with fewer keys and say nothing. Written by the checkpoint store after each checkpoint is
//! durable; replaced as a whole (write, fsync, rename, fsync of the directory).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

pub(super) const FILE_NAME: &str = "checkpoints.meta";
const TEMPORARY: &str = "checkpoints.meta.tmp";
const MAGIC: [u8; 8] = *b"EVRLCKP\n";
const VERSION: u64 = 1;

/// A checkpoint, by what must be found in sled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Entry {
    /// 0: there is none.
    pub(super) generation: u64,
    pub(super) index: u64,
    pub(super) records: u64,
    pub(super) pieces: u64,
    pub(super) checksum: u64,
}

/// The plain records of a group, as a set: how many, and the sum of their hashes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct KeyedSum {
    pub(super) count: u64,
    pub(super) sum: u64,
}

/// What is known of one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct GroupEntry {
    pub(super) current: Entry,
    pub(super) previous: Entry,
    /// The plain records before the last change, and after it: a crash leaves either.
    pub(super) keyed: [KeyedSum; 2],
}

/// Contents of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Sidecar {
    pub(super) groups: [GroupEntry; 2],
}

impl Sidecar {
    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        for group in &self.groups {
            for entry in [&group.current, &group.previous] {
                for number in [entry.generation, entry.index, entry.records, entry.pieces, entry.checksum] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
            }
            for keyed in &group.keyed {
                out.extend_from_slice(&keyed.count.to_le_bytes());
                out.extend_from_slice(&keyed.sum.to_le_bytes());
            }
        }
        let sum = xxh3_64(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let expected = Self::default().encode().len();
        if bytes.len() != expected {
            return Err(format!("has {} bytes instead of {expected}", bytes.len()));
        }
        let mut numbers = bytes[8..].chunks_exact(8).map(|raw| {
            let mut number = [0; 8];
            number.copy_from_slice(raw);
            u64::from_le_bytes(number)
        });
        // The length was checked, so the numbers do not run out.
        let mut next = || numbers.next().unwrap_or_default();
        let version = next();
        let mut sidecar = Self::default();
        for group in &mut sidecar.groups {
            for entry in [&mut group.current, &mut group.previous] {
                *entry = Entry {
                    generation: next(),
                    index: next(),
                    records: next(),
                    pieces: next(),
                    checksum: next(),
                };
            }
            for keyed in &mut group.keyed {
                *keyed = KeyedSum { count: next(), sum: next() };
            }
        }
        if bytes[..8] != MAGIC || next() != xxh3_64(&bytes[..expected - 8]) {
            return Err("checksum does not match".into());
        }
        if version != VERSION {
            return Err(format!("has format {version}, this program reads {VERSION}"));
        }
        Ok(sidecar)
    }

    /// Reads the file; `None` if it is missing, the inner error says what is wrong with it.
    pub(super) fn load(dir: &Path) -> io::Result<Option<Result<Self, String>>> {
        match fs::read(dir.join(FILE_NAME)) {
            Ok(bytes) => Ok(Some(Self::decode(&bytes))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Replaces the file, durably.
    pub(super) fn store(&self, dir: &Path) -> io::Result<()> {
        let temporary = dir.join(TEMPORARY);
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(&self.encode())?;
        file.sync_all()?;
        fs::rename(&temporary, dir.join(FILE_NAME))?;
        File::open(dir)?.sync_all()
    }
}
