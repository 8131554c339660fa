//! The demo's child processes. Each has a pipe as standard input and ends when that does, so
//! that no child outlives the demo, however the demo ends.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout_at};

use super::super::output::Failure;

/// How long children may take to stop before they are killed.
const GRACE: Duration = Duration::from_secs(3);
/// Most bytes of a log that are read for its tail.
const TAIL_BYTES: u64 = 16 * 1024;
/// Most lines of a log's tail.
const TAIL_LINES: usize = 15;

/// How to start a child.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    pub(super) exe: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) log: PathBuf,
}

struct Entry {
    recipe: Recipe,
    process: Child,
    pid: u32,
    ended: Option<ExitStatus>,
}

/// All children by name.
#[derive(Default)]
pub(super) struct Children {
    entries: BTreeMap<String, Entry>,
    /// The demo's folder, once it is in use.
    pub(super) folder: Option<PathBuf>,
}

impl Children {
    /// Starts a child.
    pub(super) fn start(&mut self, name: &str, recipe: Recipe) -> Result<(), Failure> {
        let process = spawn(&recipe).map_err(|e| Failure::Failed(format!("cannot start {name}: {e}")))?;
        let pid = process.id().unwrap_or_default();
        self.entries.insert(name.to_owned(), Entry { recipe, process, pid, ended: None });
        Ok(())
    }

    /// Starts an ended child again.
    pub(super) fn restart(&mut self, name: &str) -> Result<(), Failure> {
        match self.entries.get(name).map(|entry| entry.recipe.clone()) {
            Some(recipe) => self.start(name, recipe),
            None => Ok(()),
        }
    }

    /// The process id that a child has or had.
    pub(super) fn pid(&self, name: &str) -> u32 {
        self.entries.get(name).map_or(0, |entry| entry.pid)
    }

    /// Children that ended since the last call, and how.
    pub(super) fn newly_ended(&mut self) -> Vec<(String, ExitStatus)> {
        let mut ended = Vec::new();
        for (name, entry) in self.entries.iter_mut().filter(|(_, entry)| entry.ended.is_none()) {
            if let Ok(Some(status)) = entry.process.try_wait() {
                entry.ended = Some(status);
                ended.push((name.clone(), status));
            }
        }
        ended
    }

    /// Stops everything: asks, and after [`GRACE`] kills.
    pub(super) async fn stop(mut self) {
        let mut left: Vec<&mut Entry> =
            self.entries.values_mut().filter(|entry| entry.ended.is_none()).collect();
        for entry in &left {
            terminate(&entry.process);
        }
        let deadline = Instant::now() + GRACE;
        for entry in &mut left {
            if timeout_at(deadline, entry.process.wait()).await.is_err() {
                // An error here means that it has ended meanwhile.
                let _ = entry.process.kill().await;
            }
        }
    }
}

fn terminate(process: &Child) {
    // A child that was waited for has no id any more, so that no stranger can be hit.
    let pid = process.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        let _ = kill_process(pid, Signal::TERM);
    }
}

fn spawn(recipe: &Recipe) -> std::io::Result<Child> {
    let log = OpenOptions::new().create(true).append(true).open(&recipe.log)?;
    let mut command = Command::new(&recipe.exe);
    command
        .args(&recipe.args)
        .arg("--exit-with-parent")
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C goes to the demo, which stops its children in order.
        .process_group(0);
    // Settings meant for a replica of the user's must not reach the demo's.
    for (name, _) in
        crate::config::variables().filter(|(name, _)| name.starts_with(crate::config::ENV_PREFIX))
    {
        command.env_remove(name);
    }
    command.spawn()
}

/// The last lines of a log, indented.
pub(super) fn tail(log: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = match read() {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(e) => format!("(cannot read {}: {e})", log.display()),
    };
    let lines: Vec<&str> = text.lines().collect();
    if lines.is_empty() {
        return "    (its log is empty)".to_owned();
    }
    let shown = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    shown.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
