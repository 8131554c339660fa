//! API keys from the configuration into force, and the file of keys followed while it changes.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::config::{Config, ConfigErrors, KeyEntry, parse_keys, read_keys_file};
use crate::http::{ClientKey, KeyRing, Rate};

/// Time between two looks at the file: a key taken out of it is refused within this and what it
/// takes to read. The file is read each time instead of asking for its date, because dates miss
/// quick changes and links that are moved; reading some KiB twice a second costs nothing.
const LOOK: Duration = Duration::from_millis(500);

/// A key as the front wants it.
pub(super) fn client_key(entry: &KeyEntry) -> ClientKey {
    ClientKey {
        id: entry.id.clone(),
        digest: entry.sha256.0,
        models: entry.models.clone(),
        rate: entry.rate().map(|(per_second, burst)| Rate::new(per_second, burst)),
        max_concurrent: entry.max_concurrent,
        expires: entry.expires.as_ref().map(|expiry| expiry.at),
    }
}

/// The file of keys, and what of it is in force.
pub(super) struct KeysFile {
    path: PathBuf,
    /// Keys of the configuration itself, in force besides those of the file.
    given: Vec<KeyEntry>,
    ring: Arc<KeyRing>,
    /// What was seen last, good or bad.
    seen: Seen,
}

/// What a look at the file brought.
#[derive(PartialEq, Eq)]
enum Seen {
    Text(String),
    Unreadable(io::ErrorKind),
}

impl KeysFile {
    /// Puts the keys of `http.keys_file` into force, if there is one.
    pub(super) fn load(config: &Config, ring: Arc<KeyRing>) -> Result<Option<Self>, ConfigErrors> {
        let Some(path) = config.http.keys_file.clone() else { return Ok(None) };
        let given = config.key.clone();
        let keys = read_keys_file(&path, &given)?;
        // Seen as nothing yet: the first look takes the text, and replaces keys with the same.
        // It is also what says so in the log.
        let file = Self { path, given, ring, seen: Seen::Unreadable(io::ErrorKind::WouldBlock) };
        file.put_into_force(&keys);
        Ok(Some(file))
    }

    /// Follows the file until `shutdown`.
    pub(super) async fn follow(mut self, shutdown: CancellationToken) {
        let looks = async {
            loop {
                self.look().await;
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = looks => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// Looks once; what is broken changes nothing but the log.
    async fn look(&mut self) {
        let seen = match tokio::fs::read_to_string(&self.path).await {
            Ok(text) => Seen::Text(text),
            Err(error) => Seen::Unreadable(error.kind()),
        };
        if seen == self.seen {
            return;
        }
        match &seen {
            Seen::Unreadable(why) => {
                tracing::error!(path = %self.path.display(), %why, "the file of keys cannot be read; the old keys stay in force");
            }
            Seen::Text(text) => match parse_keys(&self.path, text, &self.given) {
                Ok(keys) => {
                    self.put_into_force(&keys);
                    let keys = self.given.len() + keys.len();
                    tracing::info!(path = %self.path.display(), keys, "API keys are in force");
                }
                Err(errors) => {
                    tracing::error!(path = %self.path.display(), why = %errors, "the file of keys is broken; the old keys stay in force");
                }
            },
        }
        self.seen = seen;
    }

    fn put_into_force(&self, keys: &[KeyEntry]) {
        self.ring.replace(self.given.iter().chain(keys).map(client_key).collect());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::config::TokenDigest;

    fn entry(id: &str) -> String {
        format!("[[key]]\nid = \"{id}\"\nsha256 = \"{}\"\n", TokenDigest::of(id))
    }

    fn ids(ring: &KeyRing) -> Vec<String> {
        ring.list().into_iter().map(|key| key.id).collect()
    }

    fn write(path: &Path, text: &str) {
        let beside = path.with_extension("new");
        fs::write(&beside, text).unwrap();
        fs::rename(&beside, path).unwrap();
    }

    #[tokio::test]
    async fn changes_of_the_file_come_into_force_and_broken_ones_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let ring = Arc::new(KeyRing::new(Some(Vec::new())));
        let mut config = Config::default();
        config.http.keys_file = Some(path.clone());
        assert!(KeysFile::load(&config, Arc::clone(&ring)).is_err(), "it must be there at the start");

        write(&path, &entry("a"));
        let mut file = KeysFile::load(&config, Arc::clone(&ring)).unwrap().unwrap();
        assert_eq!(ids(&ring), ["a"]);
        write(&path, &(entry("a") + &entry("b")));
        file.look().await;
        assert_eq!(ids(&ring), ["a", "b"]);
        for broken in ["[[key]]\nid = 1\n", "[[key", "[http]\nmax_headers = 64\n"] {
            write(&path, broken);
            file.look().await;
            assert_eq!(ids(&ring), ["a", "b"], "{broken}");
        }
        fs::remove_file(&path).unwrap();
        file.look().await;
        assert_eq!(ids(&ring), ["a", "b"]);
        // Revoking the last key locks everybody out; it does not let everybody in.
        write(&path, "");
        file.look().await;
        assert!(ids(&ring).is_empty() && ring.is_closed());
    }

    #[tokio::test]
    async fn a_key_taken_out_is_refused_soon_after() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        write(&path, &(entry("a") + &entry("b")));
        let mut config = Config::default();
        config.http.keys_file = Some(path.clone());
        let ring = Arc::new(KeyRing::new(Some(Vec::new())));
        let file = KeysFile::load(&config, Arc::clone(&ring)).unwrap().unwrap();
        let stop = CancellationToken::new();
        let follower = tokio::spawn(file.follow(stop.clone()));
        write(&path, &entry("a"));
        // Half a second is what it should take; the rest is for a machine that is busy.
        let gone = async {
            while ids(&ring).len() > 1 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), gone).await.unwrap();
        stop.cancel();
        follower.await.unwrap();
    }
}
