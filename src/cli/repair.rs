//! `everline member repair`: sets a damaged data folder aside.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::output::{Failure, Out};

/// The file that a replica locks while it uses its data folder.
const LOCK: &str = "LOCK";

/// Set a damaged data folder aside, so that the replica comes back from its peers (offline)
///
/// Renames the folder; nothing is deleted. Started again, the replica has no memory, joins as a
/// learner under a new id and gets everything from its peers. So this is only for a replica
/// whose peers have a quorum without it. Without --yes it only says what it would do.
///
/// Example:
///   everline member repair --data-dir /var/lib/everline --yes
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// The replica's data folder
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Do it
    #[arg(long)]
    yes: bool,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        let folder = self.data_dir.as_path();
        let _lock = claim(folder)?;
        let aside = free_name(folder)?;
        if !self.yes {
            return out.line(&format!(
                "{folder} would be renamed to {aside}; nothing would be deleted.\n\
                 Started again, this replica would join its peers as a learner under a new id and get its data from \
                 them.\n\
                 Make sure that they have a quorum without it (everline status --server http://PEER:8081), then add \
                 --yes.",
                folder = folder.display(),
                aside = aside.display()
            ));
        }
        fs::rename(folder, &aside).map_err(|e| {
            Failure::Failed(format!("cannot rename {} to {}: {e}", folder.display(), aside.display()))
        })?;
        out.line(&format!(
            "{} is now {}.\n\
             1. start the replica again as before; it must know its peers (cluster.peers or cluster.join)\n\
             2. `everline status` shows it as a voter under a new id once it has caught up; the old id is gone then\n\
             3. when you no longer want to look into the damage, delete {1}",
            folder.display(),
            aside.display()
        ))
    }
}

/// Holds the folder's lock, so that no replica starts on it meanwhile.
fn claim(folder: &Path) -> Result<File, Failure> {
    let shown = folder.display();
    if !folder.is_dir() {
        return Err(Failure::Usage(format!("{shown} is not a folder; name the replica's replica.data_dir")));
    }
    let holds_something = fs::read_dir(folder)?.next().is_some();
    if !holds_something {
        return Err(Failure::Usage(format!("{shown} is empty: there is nothing to repair")));
    }
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(folder.join(LOCK))
        .map_err(|e| Failure::Failed(format!("cannot open {shown}/{LOCK}: {e}")))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(Failure::Failed(format!("a running replica holds {shown}/{LOCK}; stop it first")))
        }
        Err(e) => Err(Failure::Failed(format!("cannot lock {shown}/{LOCK}: {e}"))),
    }
}

fn free_name(folder: &Path) -> Result<PathBuf, Failure> {
    let whole = fs::canonicalize(folder)?;
    let name = whole
        .file_name()
        .ok_or_else(|| Failure::Usage(format!("{} cannot be renamed", folder.display())))?
        .to_string_lossy()
        .into_owned();
    let candidates = (1..=1000).map(|n| whole.with_file_name(format!("{name}.damaged-{n}")));
    candidates
        .into_iter()
        .find(|path| !path.exists())
        .ok_or_else(|| Failure::Failed("a thousand damaged folders are here already; delete some".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("data");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("wal"), "x").unwrap();
        (parent, folder)
    }

    fn repair(folder: &Path, yes: bool) -> Result<(), Failure> {
        Args { data_dir: folder.to_owned(), yes }.run(&mut Out::stdout())
    }

    #[test]
    fn nothing_happens_without_yes() {
        let (_parent, folder) = data();
        repair(&folder, false).unwrap();
        assert!(folder.join("wal").exists());
    }

    #[test]
    fn the_folder_is_kept_under_another_name() {
        let (parent, folder) = data();
        repair(&folder, true).unwrap();
        assert!(!folder.exists());
        assert!(parent.path().join("data.damaged-1/wal").exists());
    }

    #[test]
    fn a_folder_in_use_is_left_alone() {
        let (_parent, folder) = data();
        let lock = File::create(folder.join(LOCK)).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        assert!(
            matches!(repair(&folder, true), Err(Failure::Failed(text)) if text.contains("stop it first"))
        );
        assert!(folder.join("wal").exists());
    }
}
