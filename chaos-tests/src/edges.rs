//! Two edges in front of a fleet, and a balancer in front of them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;

use crate::client::Http;
use crate::fleet::{Fleet, MODEL};
use crate::ports::free_address;
use crate::process::{Process, tail};
use crate::wait::{check, until};

const LIMIT: Duration = Duration::from_secs(60);

/// An edge's process.
#[derive(Debug)]
pub struct Edge {
    /// Client listener.
    pub http: SocketAddr,
    /// Listener for health checks and metrics.
    pub admin: SocketAddr,
    process: Process,
    log: PathBuf,
}

impl Edge {
    /// Starts one that is called so; with `more` on its command line.
    pub fn start(fleet: &Fleet, name: &str, more: &[String]) -> Self {
        let replicas: Vec<String> = fleet.replicas.iter().map(|replica| replica.peer.to_string()).collect();
        let (http, admin) = (free_address(), free_address());
        let log = fleet.folder().join(format!("{name}.log"));
        let mut args: Vec<String> = [
            "edge",
            "--name",
            name,
            "--replicas",
            &replicas.join(","),
            "--http",
            &http.to_string(),
            "--admin",
            &admin.to_string(),
            "--log-format",
            "pretty",
            "--set",
            "http.drain_settle_ms=0",
            "--set",
            "http.shutdown_grace_ms=8000",
        ]
        .map(str::to_owned)
        .into();
        args.extend_from_slice(more);
        Self { http, admin, process: Process::start(&args, &log), log }
    }

    /// URL of a route of the client listener.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.http)
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> std::process::ExitStatus {
        self.process.wait(limit)
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it is ready.
    pub async fn ready(&self) {
        until(&format!("edge {} ready", self.http), LIMIT, async || {
            let reply = Http::fresh().get(&self.url("/readyz?verbose"), LIMIT).await?;
            check(reply.status == 200, || reply.text())
        })
        .await;
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", tail(&self.log));
        }
    }
}

/// Two edges, `edge1` and `edge2`, and a balancer in front of them.
#[derive(Debug)]
pub struct Edges {
    /// Both.
    pub edges: Vec<Edge>,
    /// URL of the balancer.
    pub base: String,
    _balancer: Process,
}

impl Edges {
    /// Starts them and waits until they serve.
    pub async fn start(fleet: &Fleet) -> Self {
        let named = ["edge1", "edge2"].map(|name| Edge::start(fleet, name, &fleet.certificate_of(name)));
        let edges: Vec<Edge> = named.into();
        let listen = free_address();
        let mut args = vec!["balancer".to_owned(), "--listen".to_owned(), listen.to_string()];
        args.extend(edges.iter().flat_map(|edge| ["--backend".to_owned(), edge.http.to_string()]));
        let balancer = Process::start(&args, &fleet.folder().join("edge-balancer.log"));
        let edges = Self { edges, base: format!("http://{listen}"), _balancer: balancer };
        for edge in &edges.edges {
            edge.ready().await;
        }
        until("the balancer of the edges", LIMIT, async || {
            let reply = Http::fresh().get(&format!("{}/v1/models", edges.base), LIMIT).await?;
            check(reply.text().contains(MODEL), || reply.text())
        })
        .await;
        edges
    }
}
