//! `everline demo`: a whole cluster of child processes on this machine.
//!
//! [`plan`] decides on ports and files, [`profile`] on what the engines are told, [`child`] keeps the processes, [`ready`] waits for them
//! and [`live`] watches them.

mod child;
mod live;
mod plan;
mod profile;
mod ready;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::client::block_on;
use super::output::{Failure, Out};
use child::Children;
use plan::Plan;
use profile::Profile;

/// Run a whole cluster on this machine: replicas, simulated engines and a balancer
///
/// Everything listens on loopback and runs as a child process of the demo; Ctrl-C stops it all
/// and removes its data. A replica that you kill stays dead, so that you can watch the others
/// carry on; the demo prints the command that brings it back.
///
/// Examples:
///   everline demo
///   everline demo --replicas 5 --engines 8 --port 0
///   everline demo --edges 2
///   everline demo --profile vllm-pd      prompts on one half of the engines, texts on the other
///   everline demo --run-for 60 --state-file demo.json     for scripts: addresses and pids as JSON
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// What kind of engines: ones that answer by themselves, or fleets of prefill and decode engines
    #[arg(long, value_enum, default_value_t = Profile::Plain)]
    profile: Profile,
    /// Replicas to start
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    replicas: u8,
    /// Edges to start: the balancer then sends clients to them instead of the replicas
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=9))]
    edges: u8,
    /// Simulated engines to start
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    engines: u8,
    /// Port of the balancer on 127.0.0.1; 0 takes a free one
    #[arg(long, default_value_t = plan::DEFAULT_PORT)]
    port: u16,
    /// Write addresses and process ids to this file once everything is ready
    #[arg(long, value_name = "FILE")]
    state_file: Option<PathBuf>,
    /// Stop after so many seconds
    #[arg(long, value_name = "SECONDS")]
    run_for: Option<u64>,
    /// Keep data and logs in this (new or empty) folder [default: a temporary one, removed at the end]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Start children again that end
    #[arg(long)]
    restart: bool,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        block_on(self.supervise(out))
    }

    async fn supervise(self, out: &mut Out) -> Result<(), Failure> {
        // Signals first: from here on nothing can end the demo without the clean-up below.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        if let Some(path) = &self.state_file {
            // One left by a demo that was killed would be taken for this one's.
            let _ = std::fs::remove_file(path);
        }
        let plan = Plan::new(
            self.replicas,
            self.edges,
            self.engines,
            self.port,
            self.profile,
            self.data_dir.as_deref(),
        )?;
        let mut children = Children::default();
        let result = tokio::select! {
            result = self.drive(plan, &mut children, out) => result,
            _ = interrupt.recv() => Ok(()),
            _ = terminate.recv() => Ok(()),
            _ = hangup.recv() => Ok(()),
        };
        let folder = children.folder.clone();
        children.stop().await;
        if let Some(path) = &self.state_file {
            // What it says is no longer true; it may never have been written.
            let _ = std::fs::remove_file(path);
        }
        self.clean_up(folder.as_deref(), result.is_err());
        result
    }

    async fn drive(&self, plan: Plan, children: &mut Children, out: &mut Out) -> Result<(), Failure> {
        out.line(&format!(
            "starting {} replicas, {}{} engines and a balancer; data and logs in {}",
            plan.replicas.len(),
            if plan.edges.is_empty() { String::new() } else { format!("{} edges, ", plan.edges.len()) },
            plan.engines.len(),
            plan.folder.display()
        ))?;
        let layout = plan.start(children)?;
        if layout.profile.engines_register() {
            ready::wait(&layout, ready::Phase::Replicas, children, out).await?;
            layout.start_engines(children)?;
        }
        ready::wait(&layout, ready::Phase::All, children, out).await?;
        self.write_state(&layout, children)?;
        out.write(&welcome(&layout, children, out))?;
        let watch = live::watch(&layout, children, out, self.restart, self.state_file.as_deref());
        match self.run_for {
            None => watch.await,
            Some(seconds) => match tokio::time::timeout(Duration::from_secs(seconds), watch).await {
                Ok(result) => result,
                Err(_) => Ok(()),
            },
        }
    }

    fn write_state(&self, layout: &plan::Layout, children: &Children) -> Result<(), Failure> {
        self.state_file.as_deref().map_or(Ok(()), |path| plan::write_state(path, layout, children))
    }

    /// Removes the temporary folder, unless something failed and its logs may tell why.
    fn clean_up(&self, folder: Option<&Path>, failed: bool) {
        let Some(folder) = folder.filter(|_| self.data_dir.is_none()) else { return };
        if failed {
            eprintln_quietly(&format!("logs are kept in {}", folder.display()));
        } else if let Err(e) = std::fs::remove_dir_all(folder) {
            eprintln_quietly(&format!("cannot remove {}: {e}", folder.display()));
        }
    }
}

/// Standard error may be gone; then nobody is left to tell.
fn eprintln_quietly(text: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "everline: {text}");
}

fn welcome(layout: &plan::Layout, children: &Children, out: &Out) -> String {
    let paint = out.paint();
    let url = format!("http://{}", layout.balancer);
    let exe = plan::shown(&layout.exe);
    let inside = layout.profile.inside().map(|command| format!("  {exe} {command}"));
    let pids: Vec<String> = layout
        .replicas
        .iter()
        .map(|replica| {
            format!(
                "  kill -9 {:<8} # {}  {}",
                children.pid(&replica.name),
                replica.name,
                replica.admin_url()
            )
        })
        .collect();
    let edges = layout.edges.iter().map(|edge| {
        format!("  kill -9 {:<8} # {}  {}", children.pid(&edge.name), edge.name, edge.admin_url())
    });
    let pids: Vec<String> = pids.into_iter().chain(edges).collect();
    let victims = if layout.edges.is_empty() { "a replica" } else { "a replica or an edge" };
    let admin = layout.replicas[0].admin_url();
    format!(
        "
{banner}

{how}

Look inside:
  export EVERLINE_SERVER={admin}
  {exe} status --watch
{inside}

Now kill {victims} and go on asking:
{pids}

Ctrl-C stops everything.

",
        banner = paint
            .yellow("DEV MODE: loopback only, no authentication, simulated engines. Not for production."),
        how = how(layout.profile, &url),
        inside = inside.join("\n"),
        exe = exe,
        pids = pids.join("\n"),
    )
}

/// How to use a demo's cluster at `url`.
fn how(profile: Profile, url: &str) -> String {
    let model = plan::MODEL;
    if profile == Profile::Ksana {
        return format!(
            "Endpoint   {url}/generate, {url}/v1   (KsanaLLM's; nodes register at the same address)

Stream something, frame by frame, each with all so far:
  curl -N {url}/generate -H 'content-type: application/json' \\
    -d '{{\"prompt\":\"Tell me a story\",\"sampling_config\":{{\"max_new_tokens\":50}}}}' | tr '\\0' '\\n'

As OpenAI's clients do:
  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{\"model\":\"{model}\",\"stream\":true,\"max_tokens\":200,
         \"messages\":[{{\"role\":\"user\",\"content\":\"Tell me a story\"}}]}}'"
        );
    }
    format!(
        "Endpoint   {url}/v1   (any API key, model {model})

Stream something:
  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{\"model\":\"{model}\",\"stream\":true,\"max_tokens\":200,
         \"messages\":[{{\"role\":\"user\",\"content\":\"Tell me a story\"}}]}}'

From Python:
  from openai import OpenAI
  client = OpenAI(base_url=\"{url}/v1\", api_key=\"unused\")
  for chunk in client.chat.completions.create(model=\"{model}\", stream=True, max_tokens=200,
                                              messages=[{{\"role\": \"user\", \"content\": \"Tell me a story\"}}]):
      print(chunk.choices[0].delta.content or \"\", end=\"\", flush=True)

See where a prompt goes, and why; the same once more goes where it is cached:
  curl -s -o /dev/null -D - {url}/v1/chat/completions -H 'content-type: application/json' -H 'Everline-Trace: 1' \\
    -d '{{\"model\":\"{model}\",\"max_tokens\":4,\"messages\":[{{\"role\":\"user\",
         \"content\":\"Once upon a time there was a router that knew who had read this very sentence before, and it remembered well\"}}]}}'"
    )
}
