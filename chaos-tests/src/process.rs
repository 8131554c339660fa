//! A child process that does not outlive its owner.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::binary::everline;

/// Lines of a log that a failure shows.
const TAIL_LINES: usize = 25;

/// An `everline` process with its output in a file; killed when dropped. It also watches its
/// standard input, so that it ends when this process is killed.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `everline ARGS`, its output appended to `log`.
    pub fn start(args: &[String], log: &Path) -> Self {
        Self::start_with(args, log, &[])
    }

    /// The same with variables in its environment.
    pub fn start_with(args: &[String], log: &Path, variables: &[(&str, &str)]) -> Self {
        let out: File = OpenOptions::new().create(true).append(true).open(log).expect("a log can be opened");
        let mut command = Command::new(everline());
        command.args(args).arg("--exit-with-parent");
        // Settings of whoever runs the tests are not for these children.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("EVERLINE_") || text.starts_with("OTEL_") {
                command.env_remove(name);
            }
        }
        command.envs(variables.iter().copied());
        let err = out.try_clone().expect("a log can be shared");
        let child = command.stdin(Stdio::piped()).stdout(out).stderr(err).spawn().expect("everline starts");
        Self { child, log: log.to_owned() }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal; nothing happens when it has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none()
            && let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
        {
            kill_process(pid, signal).expect("a child takes signals");
        }
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(started.elapsed() < limit, "still running after {limit:?}; log:\n{}", tail(&self.log));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let text = text.unwrap_or_else(|error| format!("({error})"));
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    format!("--- {} (last {} of {} lines)\n{}\n", log.display(), shown.len(), lines.len(), shown.join("\n"))
}
