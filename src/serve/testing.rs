//! For tests of what runs beside the front: a whole replica's cluster part, and engines whose every
//! word is given.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::cluster::api::ControlPlane;
use crate::cluster::inner::NodeConfig;
use crate::cluster::node::Cluster;
use crate::http::{Front, FrontConfig, Metrics, Shard};
use crate::ids::WorkerId;
use crate::routing::view::WorkerView;
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::worker::{EngineKind, ServedModel, WorkerSource, WorkerSpec};

/// Longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A cluster of one replica.
pub(super) struct Alone {
    pub(super) plane: Arc<dyn ControlPlane>,
    pub(super) front: Arc<Front>,
    /// Ends what the test started, with it.
    pub(super) stop: CancellationToken,
    _cluster: Cluster,
    _folder: tempfile::TempDir,
}

impl Drop for Alone {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Alone {
    /// Starts it and waits until it takes commands.
    pub(super) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut config = NodeConfig::new("alone", folder.path().join("alone"));
        config.info.peer = listener.local_addr().unwrap().to_string();
        config.peers = BTreeMap::from([("alone".to_owned(), config.info.peer.clone())]);
        // It has a runtime of its own, which may not be started on one.
        let cluster =
            tokio::task::spawn_blocking(|| Cluster::start(config, listener)).await.unwrap().unwrap();
        let plane = cluster.control_plane();
        let front = Front::new(FrontConfig::default(), Arc::clone(&plane), Arc::new(Metrics::default()));
        let alone = Self { plane, front, stop: CancellationToken::new(), _cluster: cluster, _folder: folder };
        eventually("a leader of both groups, and a lease", || {
            let status = alone.plane.status();
            status.groups.len() == 2
                && status.groups.iter().all(|group| group.role == "leader")
                && status.members.iter().any(|member| member.alive)
        })
        .await;
        alone
    }

    /// Registers an engine of one rank.
    pub(super) async fn add(&self, id: &str, address: SocketAddr, engine: EngineKind) -> Arc<WorkerView> {
        self.add_ranks(id, address, engine, 1).await
    }

    /// Registers an engine of so many ranks.
    pub(super) async fn add_ranks(
        &self,
        id: &str,
        address: SocketAddr,
        engine: EngineKind,
        dp_ranks: u32,
    ) -> Arc<WorkerView> {
        self.put(WorkerSpec { dp_ranks, ..Self::spec(id, address, engine) }).await
    }

    /// Registers an engine that serves this model.
    pub(super) async fn add_serving(
        &self,
        id: &str,
        address: SocketAddr,
        engine: EngineKind,
        model: &str,
    ) -> Arc<WorkerView> {
        let model = ServedModel { name: model.to_owned(), lora_of: None, max_model_len: None };
        self.put(WorkerSpec { models: vec![model], ..Self::spec(id, address, engine) }).await
    }

    /// An engine of one rank.
    pub(super) fn spec(id: &str, address: SocketAddr, engine: EngineKind) -> WorkerSpec {
        WorkerSpec {
            id: WorkerId(id.into()),
            url: format!("http://{address}"),
            engine,
            models: Vec::new(),
            role: Default::default(),
            transfer: Default::default(),
            dp_ranks: 1,
            block_size: Some(16),
            capacity_blocks: Some(1000),
            labels: Default::default(),
            weight: 100,
            http2: false,
            max_requests: None,
            owner: None,
            source: WorkerSource::Admin,
        }
    }

    /// Registers it.
    pub(super) async fn put(&self, spec: WorkerSpec) -> Arc<WorkerView> {
        let id = spec.id.clone();
        let command = ControlCommand::RegisterWorker { spec, heartbeats: false };
        let outcome = self.plane.propose(command).await.unwrap();
        assert!(matches!(outcome, ControlOutcome::Registered { .. }), "{outcome:?}");
        self.plane.registry().worker(&id).cloned().unwrap()
    }

    /// An I/O thread of its front.
    pub(super) fn shard(&self) -> Arc<Shard> {
        Shard::new(Arc::clone(&self.front))
    }
}

/// An engine that answers with what it was given, and 404 otherwise.
pub(super) struct Scripted {
    pub(super) address: SocketAddr,
    said: Arc<Mutex<Said>>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Said {
    bodies: BTreeMap<String, (u16, String)>,
    asked: BTreeMap<String, usize>,
}

impl Scripted {
    /// One that knows nothing yet.
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let said = Arc::<Mutex<Said>>::default();
        let words = Arc::clone(&said);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let words = Arc::clone(&words);
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    // Connections that are left idle end with the runtime.
                    while let Some(path) = asked(&mut stream).await {
                        let body = {
                            let mut words = words.lock();
                            *words.asked.entry(path.clone()).or_default() += 1;
                            words.bodies.get(&path).cloned()
                        };
                        let (status, body) = body.unwrap_or((404, String::new()));
                        let length = body.len();
                        let answer = format!("HTTP/1.1 {status} .\r\ncontent-length: {length}\r\n\r\n{body}");
                        if stream.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, said, _task: AbortOnDropHandle::new(task) }
    }

    /// What it says there from now on.
    pub(super) fn says(&self, path: &str, body: impl Into<String>) {
        self.said.lock().bodies.insert(path.to_owned(), (200, body.into()));
    }

    /// Refuses to say anything there from now on.
    pub(super) fn refuses(&self, path: &str, status: u16) {
        self.said.lock().bodies.insert(path.to_owned(), (status, String::new()));
    }

    /// Says in vLLM's words that so many requests run, and no other figures.
    pub(super) fn runs(&self, requests: u32) {
        let page = format!(
            "vllm:num_requests_running{{engine=\"0\"}} {requests}\nvllm:num_requests_waiting{{engine=\"0\"}} 0\n"
        );
        self.says("/metrics", page);
    }

    /// How often it was asked that.
    pub(super) fn asked(&self, path: &str) -> usize {
        self.said.lock().asked.get(path).copied().unwrap_or_default()
    }
}

/// The path of the next request, of which the body is read over.
async fn asked(stream: &mut BufReader<tokio::net::TcpStream>) -> Option<String> {
    let (mut path, mut length) = (None, 0);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        if line.trim().is_empty() {
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.ok()?;
            return path;
        }
        if let Some(said) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = said.trim().parse().ok()?;
        }
        path = path.or_else(|| line.split(' ').nth(1).map(str::to_owned));
    }
}

/// Waits until this holds of something that tells nobody when it changes.
pub(super) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("waited {PATIENCE:?} for {what}"));
}
