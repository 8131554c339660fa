//! A real vLLM on the CPU, where one is installed (`chaos-tests/real-engine/`).

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::client::Http;
use crate::ports::free_address;
use crate::process::tail;
use crate::wait::{check, until};

/// The model that it serves.
pub const MODEL: &str = "tiny";

/// How long it may take to start: it imports a gigabyte of Python, on cores that others use, too.
pub const START: Duration = Duration::from_secs(600);

/// Names the folder that `install.sh` made.
const VARIABLE: &str = "EVERLINE_REAL_ENGINE";

/// The folder it is installed in; says so if there is none.
pub fn installed() -> Option<PathBuf> {
    let folder = std::env::var_os(VARIABLE).map(PathBuf::from);
    if folder.is_none() {
        println!("SKIPPED: {VARIABLE} is not set; chaos-tests/real-engine/install.sh installs a vLLM");
    }
    folder
}

/// Whether it can hand KV over; says so if not.
pub fn has_nixl(installed: &Path) -> bool {
    let python = Command::new(installed.join("bin/python")).args(["-c", "import nixl"]).status();
    let has = python.is_ok_and(|status| status.success());
    if !has {
        println!("SKIPPED: {} has no nixl; install.sh installs it", installed.display());
    }
    has
}

/// The topic of its events.
pub const TOPIC: &str = "kv";

/// Where its events are to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Events {
    /// It listens at a file.
    File,
    /// It listens at a port that is another one with each start.
    AnyPort,
    /// It connects there.
    Connects(SocketAddr),
}

/// One engine; killed when dropped.
#[derive(Debug)]
pub struct Vllm {
    /// Its id as a worker.
    pub id: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Where its events are to be had.
    pub events: Events,
    installed: PathBuf,
    run: PathBuf,
    blocks: u32,
    endpoint: String,
    /// Where it says its events again.
    pub replay: String,
    /// Port of its side channel, if it shares requests with others.
    side_channel: Option<u16>,
    child: Option<Child>,
}

impl Vllm {
    /// With so many KV blocks, not started yet. `folder` takes what it writes.
    pub fn new(id: &str, installed: &Path, folder: &Path, blocks: u32, events: &Events) -> Self {
        let endpoint = match events {
            Events::File => format!("ipc://{}/{id}.ipc", folder.display()),
            Events::AnyPort => "tcp://*:0".to_owned(),
            Events::Connects(address) => format!("tcp://{address}"),
        };
        let replay = match events {
            Events::AnyPort => "tcp://*:0".to_owned(),
            _ => format!("tcp://{}", free_address()),
        };
        Self {
            id: id.to_owned(),
            address: free_address(),
            events: events.clone(),
            installed: installed.to_owned(),
            run: folder.to_owned(),
            blocks,
            endpoint,
            replay,
            side_channel: None,
            child: None,
        }
    }

    /// It can do a part of a request, and another engine the rest (NIXL over TCP).
    pub fn shares(mut self) -> Self {
        self.side_channel = Some(free_address().port());
        self
    }

    /// Starts it, or starts it again.
    pub fn start(&mut self) {
        self.kill9();
        let out = OpenOptions::new().create(true).append(true).open(self.log()).expect("a log can be opened");
        let err = out.try_clone().expect("a log can be shared");
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/real-engine/serve.sh"));
        command.arg(&self.installed).arg(&self.run);
        command.args([&self.address.port().to_string(), &self.blocks.to_string()]);
        command.args([&self.endpoint, &self.replay, TOPIC]);
        if let Some(port) = self.side_channel {
            command.env("VLLM_NIXL_SIDE_CHANNEL_PORT", port.to_string());
            let connector =
                r#"{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}"#;
            command.env("KV_TRANSFER", connector);
        }
        // A group of its own, because it is several processes. It ends with its standard input.
        command.process_group(0).stdin(Stdio::piped()).stdout(out).stderr(err);
        self.child = Some(command.spawn().expect("serve.sh starts"));
    }

    /// Waits until it is well; how long that took.
    pub async fn ready(&mut self) -> Duration {
        let (http, url) = (Http::fresh(), self.url("/health"));
        let what = format!("{} well", self.id);
        let look = async || {
            if let Some(child) = &mut self.child {
                let ended = child.try_wait().expect("a child can be waited for");
                assert!(ended.is_none(), "{ended:?}: {}", tail(&self.run.join(format!("{}.log", self.id))));
            }
            let reply = http.get(&url, Duration::from_secs(5)).await?;
            check(reply.status.is_success(), || reply.text())
        };
        until(&what, START, look).await.1
    }

    /// URL of one of its routes.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Asks it to stop: it gives up what it generates, and says so. What is left of it is killed when
    /// it is started again.
    pub fn sigterm(&self) {
        if let Some(pid) =
            self.child.as_ref().and_then(|child| Pid::from_raw(i32::try_from(child.id()).ok()?))
        {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// Freezes all its processes.
    pub fn sigstop(&self) {
        self.signal_all(Signal::STOP);
    }

    /// Lets them go on.
    pub fn sigcont(&self) {
        self.signal_all(Signal::CONT);
    }

    fn signal_all(&self, signal: Signal) {
        let group = self.child.as_ref().and_then(|child| i32::try_from(child.id()).ok());
        if let Some(group) = group.and_then(Pid::from_raw) {
            // It may have ended by itself.
            let _ = kill_process_group(group, signal);
        }
    }

    /// `kill -9` of all its processes; gone when this returns.
    pub fn kill9(&mut self) {
        self.signal_all(Signal::KILL);
        let Some(mut child) = self.child.take() else { return };
        let _ = child.wait();
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.run.join(format!("{}.log", self.id))
    }
}

impl Drop for Vllm {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            eprintln!("{}", tail(&self.log()));
        }
    }
}
