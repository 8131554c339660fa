//! Clients in other languages: scripts that a test runs, and programs that ask for it and say what
//! they heard.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::streams::{Broken, Heard, Question, Retold};

/// How long a program may take to load what it needs.
const START: Duration = Duration::from_secs(60);
/// How long one stream may take: longer than any client's own patience.
const STREAM: Duration = Duration::from_secs(180);
/// Questions on their way to a program.
const QUEUE: usize = 64;

/// Whether a program can load what a script needs; says what to do if not.
pub fn has(program: &str, args: &[&str], remedy: &str) -> bool {
    let tried = std::process::Command::new(program).args(args).output();
    let has = tried.is_ok_and(|output| output.status.success());
    if !has {
        println!("SKIPPED: {program} {} fails; {remedy}", args.join(" "));
    }
    has
}

#[derive(Serialize)]
struct Asked<'a> {
    n: u64,
    manner: &'a str,
    base: &'a str,
    path: &'a str,
    body: &'a Value,
}

#[derive(Deserialize)]
struct Answered {
    n: u64,
    #[serde(flatten)]
    retold: Retold,
}

type Waiting = Arc<Mutex<BTreeMap<u64, oneshot::Sender<Retold>>>>;

/// A program that asks as it is told, many streams at a time; killed when dropped.
#[derive(Debug)]
pub struct Program {
    name: &'static str,
    questions: mpsc::Sender<String>,
    waiting: Waiting,
    next: AtomicU64,
    complaints: PathBuf,
    /// Ends with the program; holds it.
    _task: JoinHandle<()>,
}

impl Program {
    /// The Python clients, if there is a Python for them. What they say on standard error is kept in
    /// `folder`, under a name.
    pub async fn python(folder: &Path, name: &str) -> Option<Arc<Self>> {
        if !has("python3", &["-c", "import openai"], "pip install openai") {
            return None;
        }
        // Warnings are errors of ours.
        Some(Self::start("python3", &["-W", "error", "-B"], "storm_client.py", folder, name).await)
    }

    /// The JavaScript clients, if there is a Node for them.
    pub async fn node(folder: &Path) -> Option<Arc<Self>> {
        let packages = "['openai', 'eventsource', '@microsoft/fetch-event-source'].forEach(require)";
        let remedy = "npm install openai eventsource @microsoft/fetch-event-source, and set NODE_PATH to its node_modules";
        if !has("node", &["-e", packages], remedy) {
            return None;
        }
        Some(Self::start("node", &["--throw-deprecation"], "storm_client.mjs", folder, "node").await)
    }

    async fn start(name: &'static str, args: &[&str], script: &str, folder: &Path, log: &str) -> Arc<Self> {
        let complaints = folder.join(format!("{log}.log"));
        let err = std::fs::File::create(&complaints).expect("a log can be created");
        let script = format!("{}/../clients/testing/{script}", env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(name);
        command.args(args).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(err);
        let mut child = command.kill_on_drop(true).spawn().expect("it starts");
        let input = child.stdin.take().expect("it was piped");
        let mut output = BufReader::new(child.stdout.take().expect("it was piped")).lines();
        let first = tokio::time::timeout(START, output.next_line()).await.expect("it loads");
        let said = || std::fs::read_to_string(&complaints).unwrap_or_default();
        let first = first.ok().flatten().unwrap_or_else(|| panic!("{name} did not start: {}", said()));
        println!("{name}: {first}");
        let (questions, asked) = mpsc::channel(QUEUE);
        let waiting = Waiting::default();
        let task = tokio::spawn(run(child, input, output, asked, Arc::clone(&waiting)));
        Arc::new(Self { name, questions, waiting, next: AtomicU64::new(0), complaints, _task: task })
    }

    /// Has a question asked at `base`, in a manner that the program knows.
    pub async fn ask(&self, manner: &str, base: &str, question: &Question) -> Result<Heard, Broken> {
        let broken = |why: String| Broken { why, heard: Box::default(), silent: false };
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.waiting.lock().expect("nobody panics with it").insert(n, answer);
        let asked = Asked { n, manner, base, path: question.path, body: &question.body };
        let line = serde_json::to_string(&asked).expect("a question can be written") + "\n";
        if self.questions.send(line).await.is_err() {
            return Err(broken(format!("{} has ended", self.name)));
        }
        match tokio::time::timeout(STREAM, answered).await {
            Ok(Ok(retold)) => Heard::retold(retold),
            Ok(Err(_)) => Err(broken(format!("{} has ended", self.name))),
            Err(_) => Err(broken(format!("no end within {} s", STREAM.as_secs()))),
        }
    }

    /// What it said on standard error.
    pub fn complaints(&self) -> String {
        std::fs::read_to_string(&self.complaints).expect("its log is there")
    }
}

/// Passes lines on in both directions until the program or the test has had enough.
async fn run(
    _child: Child,
    mut input: ChildStdin,
    mut output: Lines<BufReader<ChildStdout>>,
    mut asked: mpsc::Receiver<String>,
    waiting: Waiting,
) {
    loop {
        tokio::select! {
            line = asked.recv() => {
                let Some(line) = line else { break };
                if input.write_all(line.as_bytes()).await.is_err() {
                    break;
                }
            }
            line = output.next_line() => {
                let Ok(Some(line)) = line else { break };
                let answered: Answered = serde_json::from_str(&line).expect("an answer is one line of JSON");
                let waiting = waiting.lock().expect("nobody panics with it").remove(&answered.n);
                if let Some(waiting) = waiting {
                    // The test may have given it up.
                    let _ = waiting.send(answered.retold);
                }
            }
        }
    }
    waiting.lock().expect("nobody panics with it").clear();
}
