//! Who a replica is, across its lives: a small checksummed file in its data folder, replaced
//! atomically.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::ids::ReplicaId;

const FILE: &str = "identity.json";
const FORMAT: u32 = 1;

/// See the module.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Identity {
    format: u32,
    /// Configured name at the time.
    pub name: String,
    /// The cluster, 32 hexadecimal digits, once there is one.
    pub cluster: Option<String>,
    /// Member id, with the cluster.
    pub id: Option<ReplicaId>,
    /// The replica came to an existing cluster and is not yet what it wants to be.
    pub joining: bool,
    /// Chosen once, so that a join that is tried again gets the same id.
    pub nonce: u64,
    /// Set when this replica's state was found to differ from the majority's: it must not take
    /// part again with this folder.
    #[serde(default)]
    pub quarantined: Option<String>,
}

impl Identity {
    /// Reads the file, or makes up a newcomer's and writes it.
    pub fn open(dir: &Path, name: &str, nonce: u64) -> io::Result<Self> {
        let mut identity = match Self::read(dir)? {
            Some(identity) => identity,
            None => Self {
                format: FORMAT,
                name: name.to_owned(),
                cluster: None,
                id: None,
                joining: false,
                nonce,
                quarantined: None,
            },
        };
        identity.name = name.to_owned();
        identity.write(dir)?;
        Ok(identity)
    }

    fn read(dir: &Path) -> io::Result<Option<Self>> {
        let path = dir.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let damaged =
            |why: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", path.display()));
        let (body, sum) = text.trim_end().rsplit_once('\n').ok_or_else(|| damaged("no checksum line"))?;
        if format!("{:016x}", xxh3_64(body.as_bytes())) != sum {
            return Err(damaged("the checksum does not match"));
        }
        let identity: Self = serde_json::from_str(body).map_err(|e| damaged(&e.to_string()))?;
        if identity.format != FORMAT {
            return Err(damaged(&format!("format {} is not known to this build", identity.format)));
        }
        Ok(Some(identity))
    }

    /// Replaces the file: written beside, synced, renamed, folder synced.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let body = serde_json::to_string(self).map_err(io::Error::other)?;
        let text = format!("{body}\n{:016x}\n", xxh3_64(body.as_bytes()));
        let beside: PathBuf = dir.join("identity.json.new");
        let mut file = File::create(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, dir.join(FILE))?;
        File::open(dir)?.sync_all()
    }

    /// Cluster and member id, if it has them.
    pub fn member(&self) -> Option<(u128, ReplicaId)> {
        let cluster = u128::from_str_radix(self.cluster.as_deref()?, 16).ok()?;
        Some((cluster, self.id?))
    }

    /// Takes a place in a cluster, unless it has one: a place is never exchanged for another, as
    /// the members may count on it from the moment it was taken. Gives the place it has then.
    pub fn become_member(&mut self, cluster: u128, id: ReplicaId, joining: bool) -> (u128, ReplicaId) {
        if let Some(place) = self.member() {
            return place;
        }
        self.cluster = Some(format!("{cluster:032x}"));
        self.id = Some(id);
        self.joining = joining;
        (cluster, id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_survives_and_its_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Identity::open(dir.path(), "r1", 5).unwrap();
        assert_eq!(first.become_member(77, ReplicaId(3), false), (77, ReplicaId(3)));
        assert_eq!(first.become_member(77, ReplicaId(101), true), (77, ReplicaId(3)), "not exchanged");
        assert!(!first.joining);
        first.write(dir.path()).unwrap();
        let second = Identity::open(dir.path(), "r1", 6).unwrap();
        assert_eq!((second.nonce, second.member()), (5, Some((77, ReplicaId(3)))));
        let path = dir.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&path, &bytes).unwrap();
            // The final line feed is the one byte that says nothing.
            assert!(Identity::read(dir.path()).is_err() || at == whole.len() - 1, "byte {at}");
        }
    }
}
