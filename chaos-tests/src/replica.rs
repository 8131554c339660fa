//! A replica that can be hurt.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use rustix::process::Signal;

use crate::endpoint::Endpoint;
use crate::process::Process;

/// A replica's process, or what is left of it.
#[derive(Debug)]
pub struct Replica {
    endpoint: Endpoint,
    args: Vec<String>,
    data_dir: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl Deref for Replica {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Replica {
    /// Not started yet; `more` is said on its command line after names and addresses.
    pub fn new(endpoint: Endpoint, folder: &Path, more: &[String]) -> Self {
        let data_dir = folder.join(&endpoint.name);
        let log = folder.join(format!("{}.log", endpoint.name));
        let mut args: Vec<String> = [
            "serve",
            "--name",
            &endpoint.name,
            "--log-format",
            "pretty",
            "--log-filter",
            "info,everline::access=warn,everline::relay=debug",
        ]
        .map(str::to_owned)
        .into();
        args.extend(["--data-dir".to_owned(), data_dir.display().to_string()]);
        let listeners = [("--http", endpoint.http), ("--admin", endpoint.admin), ("--peer", endpoint.peer)];
        args.extend(listeners.iter().flat_map(|(flag, address)| [(*flag).to_owned(), address.to_string()]));
        args.extend_from_slice(more);
        Self { endpoint, args, data_dir, log, process: None }
    }

    /// Starts it, or starts it again; a living one is left alone.
    pub fn start(&mut self) {
        if self.process.is_none() {
            self.process = Some(Process::start(&self.args, &self.log));
        }
    }

    /// `kill -9`; gone when this returns.
    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Sends `SIGKILL` without waiting, for killing several at one moment.
    pub fn kill9_at_once(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::KILL);
        }
    }

    /// Asks it to stop.
    pub fn sigterm(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::TERM);
        }
    }

    /// Freezes it.
    pub fn sigstop(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::STOP);
        }
    }

    /// Lets it go on.
    pub fn sigcont(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal(Signal::CONT);
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        self.process.take().map(|mut process| process.wait(limit))
    }

    /// Its process id; it must have been started.
    pub fn id(&self) -> u32 {
        self.process.as_ref().expect("it was started").id()
    }

    /// Memory that its process has in use, in KiB.
    pub fn memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        number.expect("the kernel says how much memory a process has")
    }

    /// Whether its process runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.ended().is_none())
    }

    /// Deletes its data folder; it must be dead.
    pub fn wipe(&mut self) {
        assert!(self.process.is_none(), "{} still runs", self.name);
        std::fs::remove_dir_all(&self.data_dir).expect("a folder can be deleted");
    }

    /// Its data folder.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Its log.
    pub fn log(&self) -> &Path {
        &self.log
    }
}
