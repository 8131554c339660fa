//! Following services of Polaris by its HTTP interface: `POST /v1/Discover`, again and again, with the
//! revision that is known.
//!
//! Results of calls Polaris' naming server does not take: its own clients go by them themselves (as the
//! proxy does here), and hand them to its monitoring, a Prometheus. The latter is what is done here, too:
//! they are pushed to its gateway, where one is named.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request};
use http_body_util::Full;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::answer::Answer;
use super::board::{Board, NameState};
use super::calls::Calls;
use super::client::{Client, Trouble, shown};
use super::discover::{Found, question, read};
use super::{Call, NameService};

/// Longest time for an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Largest answer read.
const MAX_ANSWER: usize = 16 << 20;
/// Time between two reports of results.
const REPORT: Duration = Duration::from_secs(10);
/// The job that results are pushed as: that of Polaris' own clients.
const JOB: &str = "polaris-client";

/// Where Polaris is and how it is spoken to.
#[derive(Clone, Debug)]
pub struct PolarisOptions {
    /// `http://host:port` of its servers; the one that answered last is asked.
    pub servers: Vec<String>,
    /// Namespace of names that have none of their own.
    pub namespace: String,
    /// The authority of their certificates, for https; without, Mozilla's list.
    pub ca: Option<PathBuf>,
    /// File with the access token.
    pub token_file: Option<PathBuf>,
    /// Time between two questions.
    pub refresh: Duration,
    /// How long an answer counts.
    pub max_age: Duration,
    /// `http://host:port` of the push gateway of its monitoring.
    pub push_gateway: Option<String>,
    /// Who calls, for the reports.
    pub caller: String,
    /// Time between two reports: 10 s where nothing is said.
    pub report_every: Option<Duration>,
}

/// A service as it is written: `[namespace/]service`.
pub fn split_name<'a>(name: &'a str, namespace: &'a str) -> (&'a str, &'a str) {
    name.split_once('/').unwrap_or((namespace, name))
}

/// See the module.
#[derive(Debug)]
pub struct Polaris {
    options: PolarisOptions,
    board: Board,
    calls: Mutex<Calls>,
    /// Which server answered last.
    at: AtomicUsize,
    reports: AtomicU64,
    failed_reports: AtomicU64,
}

impl Polaris {
    /// Follows these names until `shutdown`, a task for each.
    pub fn start(
        options: PolarisOptions,
        names: &[String],
        shutdown: &CancellationToken,
    ) -> Result<Arc<Self>, String> {
        if options.servers.is_empty() {
            return Err("no server of Polaris is named".to_owned());
        }
        let client = Client::new(options.ca.as_deref()).map_err(|why| why.to_string())?;
        let client = Arc::new(client);
        let this = Arc::new(Self {
            board: Board::new(names.iter().cloned(), options.max_age),
            // Replicas that start together do not all ask the same.
            at: AtomicUsize::new(rand::random_range(0..options.servers.len())),
            options,
            calls: Mutex::default(),
            reports: AtomicU64::new(0),
            failed_reports: AtomicU64::new(0),
        });
        for name in names {
            let (this, client, name) = (Arc::clone(&this), Arc::clone(&client), name.clone());
            let shutdown = shutdown.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = this.follow(&client, &name) => {}
                    () = shutdown.cancelled() => {}
                }
            });
        }
        if let Some(gateway) = this.options.push_gateway.clone() {
            let (this, shutdown) = (Arc::clone(&this), shutdown.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = this.keep_reporting(&client, &gateway) => {}
                    () = shutdown.cancelled() => {}
                }
                // What was not yet reported, before the process ends.
                let _ = this.push(&client, &gateway).await;
            });
        }
        Ok(this)
    }

    async fn follow(&self, client: &Client, name: &str) {
        let mut revision = String::new();
        loop {
            match self.ask(client, name, &revision).await {
                Ok(Found::Same) => self.board.confirm(name, Instant::now()),
                Ok(Found::Instances(answer, new)) => {
                    let (ready, left_out) = (answer.usable().count(), answer.left_out);
                    self.board.listed(name);
                    if self.board.put(name, answer, Instant::now()) {
                        tracing::info!(name, ready, left_out, "a name stands for other endpoints now");
                    }
                    revision = new;
                }
                Err(why) => {
                    let why = why.to_string();
                    if self.board.failed(name, &why) {
                        tracing::warn!(name, %why, "the name service is away; what it said last holds");
                    }
                    // The next one may have answers.
                    self.at.fetch_add(1, Ordering::Relaxed);
                }
            }
            tokio::time::sleep(self.options.refresh.mul_f64(rand::random_range(0.9..1.1))).await;
        }
    }

    async fn ask(&self, client: &Client, name: &str, revision: &str) -> Result<Found, Trouble> {
        let (namespace, service) = split_name(name, &self.options.namespace);
        let servers = &self.options.servers;
        let server = &servers[self.at.load(Ordering::Relaxed) % servers.len()];
        let mut request = Request::post(format!("{}/v1/Discover", server.trim_end_matches('/')))
            .header(CONTENT_TYPE, "application/json");
        if let Some(path) = &self.options.token_file {
            let token = tokio::fs::read_to_string(path).await;
            let token =
                token.map_err(|why| Trouble::Refused(format!("cannot read {}: {why}", path.display())))?;
            let mut value = HeaderValue::from_str(token.trim())
                .map_err(|_| Trouble::Refused(format!("{} is not a token", path.display())))?;
            value.set_sensitive(true);
            request = request.header("X-Polaris-Token", value);
        }
        let request = request
            .body(Full::from(question(namespace, service, revision)))
            .map_err(|why| Trouble::Refused(format!("{server}: {why}")))?;
        let (status, body) = client.whole(request, MAX_ANSWER, ANSWER).await?;
        // Its refusals are JSON, too, and say more than the status does.
        match read(&body, namespace, service) {
            Err(Trouble::Garbage(_)) if !status.is_success() => {
                let text = shown(&String::from_utf8_lossy(&body));
                Err(Trouble::Refused(format!(
                    "{server} answered {status}: {text}; is it Polaris' HTTP port (8090)?"
                )))
            }
            read => read,
        }
    }

    async fn keep_reporting(&self, client: &Client, gateway: &str) {
        let mut told = false;
        loop {
            tokio::time::sleep(self.options.report_every.unwrap_or(REPORT)).await;
            match self.push(client, gateway).await {
                Ok(()) => told = false,
                Err(why) if !std::mem::replace(&mut told, true) => {
                    tracing::warn!(%why, "results of calls could not be reported");
                }
                Err(_) => {}
            }
        }
    }

    /// Pushes all results since the start: whoever reads them takes differences, so that a push that is
    /// lost costs nothing.
    async fn push(&self, client: &Client, gateway: &str) -> Result<(), Trouble> {
        let text = {
            let calls = self.calls.lock();
            if calls.is_empty() {
                return Ok(());
            }
            calls.to_text(&self.options.caller)
        };
        let uri =
            format!("{}/metrics/job/{JOB}/instance/{}", gateway.trim_end_matches('/'), self.options.caller);
        let request = Request::put(uri).header(CONTENT_TYPE, "text/plain; version=0.0.4");
        let request = request
            .body(Full::new(Bytes::from(text)))
            .map_err(|why| Trouble::Refused(format!("{gateway}: {why}")))?;
        let pushed = match client.whole(request, MAX_ANSWER, ANSWER).await {
            Ok((status, _)) if status.is_success() => Ok(()),
            Ok((status, body)) => {
                let text = shown(&String::from_utf8_lossy(&body));
                Err(Trouble::Refused(format!("the push gateway {gateway} answered {status}: {text}")))
            }
            Err(why) => Err(why),
        };
        let counter = if pushed.is_ok() { &self.reports } else { &self.failed_reports };
        counter.fetch_add(1, Ordering::Relaxed);
        pushed
    }
}

impl NameService for Polaris {
    fn provider(&self) -> &'static str {
        "polaris"
    }

    fn answer(&self, name: &str) -> Option<Arc<Answer>> {
        self.board.answer(name, Instant::now())
    }

    fn report(&self, call: &Call<'_>) {
        if self.options.push_gateway.is_some() {
            let (namespace, service) = split_name(call.name, &self.options.namespace);
            self.calls.lock().add(namespace, service, call);
        }
    }

    fn states(&self) -> Vec<NameState> {
        self.board.states(Instant::now())
    }

    fn reports(&self) -> (u64, u64) {
        (self.reports.load(Ordering::Relaxed), self.failed_reports.load(Ordering::Relaxed))
    }
}
