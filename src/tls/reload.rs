//! Something made of files, made anew when they change. What is in use is replaced only by
//! something whole: a set of files that makes no sense leaves everything as it was.
//!
//! The contents are compared, not the times: that notices files that were replaced within a
//! second, by renaming or through a changed link, which is how secrets are delivered in
//! containers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use super::{TlsError, files};

/// Time between two looks at the files. Certificates are replaced days before they expire, and a
/// look is three small reads.
pub const POLL: Duration = Duration::from_secs(1);

/// A file, and whether it holds a secret.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// Where.
    pub path: PathBuf,
    /// A private key: refused if others can read it.
    pub secret: bool,
}

impl Source {
    /// A file of certificates.
    pub fn public(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), secret: false }
    }

    /// A file with a private key.
    pub fn secret(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), secret: true }
    }
}

/// What a look at the files found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Look {
    /// Nothing new.
    Same,
    /// New files, in use from now on.
    Replaced,
    /// New files that make no sense. Perhaps they are being replaced one after the other, so the
    /// first time nobody is told.
    Unfinished,
    /// The same senseless files a second time. What was in use stays in use.
    Refused(TlsError),
}

type Digest = [u8; 32];
type Make<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, TlsError> + Send + Sync>;

#[derive(Default)]
struct Seen {
    in_use: Digest,
    /// The last senseless set, and whether it was reported.
    broken: Option<(Result<Digest, TlsError>, bool)>,
}

/// See the module.
pub struct Reloading<T> {
    what: &'static str,
    sources: Vec<Source>,
    make: Make<T>,
    current: ArcSwap<T>,
    seen: Mutex<Seen>,
}

impl<T> std::fmt::Debug for Reloading<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reloading").field("what", &self.what).field("sources", &self.sources).finish()
    }
}

impl<T: Send + Sync + 'static> Reloading<T> {
    /// Reads the files and makes the first one. `make` gets the contents in the order of
    /// `sources`; `what` is for the log.
    pub fn open(
        what: &'static str,
        sources: Vec<Source>,
        make: impl Fn(&[Vec<u8>]) -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let contents = read(&sources)?;
        let first = make(&contents)?;
        let seen = Seen { in_use: digest(&contents), broken: None };
        let current = ArcSwap::from_pointee(first);
        Ok(Self { what, sources, make: Box::new(make), current, seen: Mutex::new(seen) })
    }

    /// What is in use.
    pub fn get(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Looks at the files once. Reads from disk.
    pub fn look(&self) -> Look {
        let mut seen = self.seen.lock();
        let contents = match read(&self.sources) {
            Ok(contents) => contents,
            Err(error) => return seen.broken(Err(error.clone()), error),
        };
        let digest = digest(&contents);
        if digest == seen.in_use {
            seen.broken = None;
            return Look::Same;
        }
        if let Some((Ok(broken), true)) = &seen.broken
            && *broken == digest
        {
            return Look::Same;
        }
        match (self.make)(&contents) {
            Ok(next) => {
                self.current.store(Arc::new(next));
                *seen = Seen { in_use: digest, broken: None };
                Look::Replaced
            }
            Err(error) => seen.broken(Ok(digest), error),
        }
    }

    /// Looks at the files every [`POLL`], for ever; drop the future to stop.
    pub async fn watch(self: Arc<Self>) {
        loop {
            tokio::time::sleep(POLL).await;
            let this = Arc::clone(&self);
            // A look that panicked is the same as one that found nothing; the next one follows.
            let look = tokio::task::spawn_blocking(move || this.look()).await.unwrap_or(Look::Same);
            match look {
                Look::Same | Look::Unfinished => {}
                Look::Replaced => tracing::info!(what = self.what, "new certificates are in use"),
                Look::Refused(error) => {
                    tracing::error!(what = self.what, %error, "changed certificates are refused; the earlier ones stay in use");
                }
            }
        }
    }
}

impl Seen {
    fn broken(&mut self, set: Result<Digest, TlsError>, error: TlsError) -> Look {
        match &mut self.broken {
            Some((known, reported)) if *known == set => {
                if std::mem::replace(reported, true) {
                    Look::Same
                } else {
                    Look::Refused(error)
                }
            }
            slot => {
                *slot = Some((set, false));
                Look::Unfinished
            }
        }
    }
}

fn read(sources: &[Source]) -> Result<Vec<Vec<u8>>, TlsError> {
    let one = |source: &Source| match source.secret {
        true => files::read_secret(&source.path),
        false => files::read(&source.path),
    };
    sources.iter().map(one).collect()
}

fn digest(contents: &[Vec<u8>]) -> Digest {
    let mut hasher = Sha256::new();
    for content in contents {
        hasher.update((content.len() as u64).to_le_bytes());
        hasher.update(content);
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn number(contents: &[Vec<u8>]) -> Result<u32, TlsError> {
        let text = String::from_utf8_lossy(&contents[0]).into_owned();
        text.parse().map_err(|_| TlsError::content("n".as_ref(), text))
    }

    #[test]
    fn a_changed_file_is_taken_and_a_broken_one_is_refused_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("n");
        fs::write(&path, "1").unwrap();
        let n = Reloading::open("numbers", vec![Source::public(&path)], number).unwrap();
        assert_eq!((*n.get(), n.look()), (1, Look::Same));
        fs::write(&path, "2").unwrap();
        assert_eq!((n.look(), *n.get()), (Look::Replaced, 2));

        fs::write(&path, "two").unwrap();
        assert_eq!(n.look(), Look::Unfinished, "perhaps somebody is still writing");
        assert!(matches!(n.look(), Look::Refused(_)));
        assert_eq!((n.look(), *n.get()), (Look::Same, 2), "said once, and nothing has changed");
        fs::remove_file(&path).unwrap();
        assert_eq!(n.look(), Look::Unfinished);
        assert!(matches!(n.look(), Look::Refused(TlsError::Unreadable { .. })));
        assert_eq!((n.look(), *n.get()), (Look::Same, 2));

        fs::write(&path, "3").unwrap();
        assert_eq!((n.look(), *n.get()), (Look::Replaced, 3));
        fs::write(&path, "x").unwrap();
        n.look();
        fs::write(&path, "3").unwrap();
        assert_eq!(n.look(), Look::Same, "put back");
    }

    #[test]
    fn a_secret_that_others_can_read_is_refused_with_the_remedy() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("n");
        fs::write(&path, "1").unwrap();
        for (mode, fits) in [(0o640, false), (0o604, false), (0o600, true), (0o400, true)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let opened = Reloading::open("numbers", vec![Source::secret(&path)], number);
            assert_eq!(opened.is_ok(), fits, "{mode:o}");
            if let Err(error) = opened {
                assert!(error.to_string().contains("chmod 600"), "{error}");
            }
        }
    }
}
