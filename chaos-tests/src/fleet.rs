//! A whole cluster of processes: replicas, simulated engines and a balancer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::endpoint::{Endpoint, LIMIT, engine_worker};
use crate::ports::free_address;
use crate::process::{Process, tail};
use crate::replica::Replica;
use crate::wait::{check, until};

/// The model that the engines serve.
pub const MODEL: &str = "sim-model";

/// How long a fleet may take to be ready; other work may run on the machine.
const START: Duration = Duration::from_secs(30);

/// One fleet at a time: what is measured must not be measured against another test.
static TURN: Semaphore = Semaphore::const_new(1);

/// Waits until no other fleet lives; for tests that start processes of their own.
pub async fn turn() -> SemaphorePermit<'static> {
    TURN.acquire().await.expect("the semaphore is never closed")
}

/// A simulated engine.
#[derive(Debug)]
pub struct Engine {
    /// Its id as a worker.
    pub id: String,
    /// Where it listens.
    pub address: SocketAddr,
    labels: BTreeMap<String, String>,
    args: Vec<String>,
    log: PathBuf,
    process: Option<Process>,
}

impl Engine {
    /// Starts it, or starts it again.
    pub fn start(&mut self) {
        self.process = Some(Process::start(&self.args, &self.log));
    }

    /// `kill -9`.
    pub fn kill9(&mut self) {
        self.process = None;
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Builder {
    replicas: usize,
    engines: usize,
    settings: Vec<String>,
    config: Option<String>,
    engine_args: Vec<String>,
    kv_events: bool,
    kv_hubs: Vec<SocketAddr>,
}

impl Builder {
    /// So many simulated engines; none at first.
    pub fn engines(mut self, engines: usize) -> Self {
        self.engines = engines;
        self
    }

    /// A setting of every replica, as `section.key=value`.
    pub fn set(mut self, setting: &str) -> Self {
        self.settings.push(setting.to_owned());
        self
    }

    /// The configuration file of every replica, for what no setting can say.
    pub fn config(mut self, text: &str) -> Self {
        self.config = Some(text.to_owned());
        self
    }

    /// An argument of every engine.
    pub fn engine_arg(mut self, arg: &str) -> Self {
        self.engine_args.push(arg.to_owned());
        self
    }

    /// Every engine publishes its KV events, and can say them again.
    pub fn kv_events(mut self) -> Self {
        self.kv_events = true;
        self
    }

    /// Every engine publishes its KV events to a replica that it connects to, each to another.
    pub fn kv_hubs(mut self) -> Self {
        self.kv_hubs = (0..self.replicas).map(|_| free_address()).collect();
        self
    }

    /// Starts everything and waits until all replicas are ready and know all engines.
    pub async fn start(self) -> Fleet {
        let turn = turn().await;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let endpoints: Vec<Endpoint> = (1..=self.replicas).map(|n| Endpoint::new(&format!("r{n}"))).collect();
        let peers: Vec<String> = endpoints.iter().map(|e| format!("{}={}", e.name, e.peer)).collect();
        let mut more = vec!["--peers".to_owned(), peers.join(",")];
        let settings = self.settings.iter().flat_map(|setting| ["--set".to_owned(), setting.clone()]);
        let mut settings: Vec<String> = settings.collect();
        if let Some(text) = &self.config {
            let file = folder.path().join("everline.toml");
            std::fs::write(&file, text).expect("a file can be written");
            settings.extend(["--config".to_owned(), file.display().to_string()]);
        }
        more.extend_from_slice(&settings);
        let mut hubs = self.kv_hubs.iter();
        let replicas: Vec<Replica> = endpoints
            .into_iter()
            .map(|endpoint| {
                let hub = hubs.next().map(|hub| ["--set".to_owned(), format!("kv.listen=tcp://{hub}")]);
                let more: Vec<String> = more.iter().cloned().chain(hub.into_iter().flatten()).collect();
                Replica::new(endpoint, folder.path(), &more)
            })
            .collect();
        let engines: Vec<Engine> = (1..=self.engines).map(|n| self.engine(n, folder.path())).collect();
        let balancer = free_address();
        let mut fleet = Fleet { replicas, engines, balancer, settings, _balancer: None, folder, _turn: turn };
        fleet.bring_up().await;
        fleet
    }

    fn engine(&self, n: usize, folder: &Path) -> Engine {
        let (id, address) = (format!("e{n}"), free_address());
        let mut args: Vec<String> =
            ["engine-sim", "--listen", &address.to_string(), "--model", MODEL].map(str::to_owned).into();
        args.extend_from_slice(&self.engine_args);
        let mut labels = BTreeMap::new();
        if !self.kv_hubs.is_empty() {
            let hub = self.kv_hubs[(n - 1) % self.kv_hubs.len()];
            let replay = free_address();
            let config = serde_json::json!({
                "enable_kv_cache_events": true,
                "publisher": "zmq",
                "endpoint": format!("tcp://{hub}"),
                "replay_endpoint": format!("tcp://*:{}", replay.port()),
                "topic": format!("kv-{id}"),
            });
            args.extend(["--kv-events-config".to_owned(), config.to_string()]);
            labels.insert("kv-events".to_owned(), "hub".to_owned());
            labels.insert("kv-replay".to_owned(), format!("tcp://{replay}"));
            labels.insert("kv-topic".to_owned(), format!("kv-{id}"));
        }
        if self.kv_events {
            let config = serde_json::json!({
                "enable_kv_cache_events": true,
                "publisher": "zmq",
                "endpoint": format!("tcp://*:{}", free_address().port()),
                "replay_endpoint": format!("tcp://*:{}", free_address().port()),
            });
            args.extend(["--kv-events-config".to_owned(), config.to_string()]);
        }
        Engine { log: folder.join(format!("{id}.log")), id, address, labels, args, process: None }
    }
}

/// A running cluster; everything is killed when it is dropped. A test that fails shows the ends
/// of all logs.
#[derive(Debug)]
pub struct Fleet {
    /// The replicas, by name.
    pub replicas: Vec<Replica>,
    /// The engines, by id.
    pub engines: Vec<Engine>,
    /// Where the balancer listens.
    pub balancer: SocketAddr,
    settings: Vec<String>,
    _balancer: Option<Process>,
    folder: TempDir,
    _turn: SemaphorePermit<'static>,
}

impl Fleet {
    /// So many replicas.
    pub fn of(replicas: usize) -> Builder {
        Builder {
            replicas,
            engines: 0,
            // A test that stops replicas does not want to wait for idle connections.
            settings: vec!["http.shutdown_grace_ms=3000".to_owned(), "http.drain_settle_ms=0".to_owned()],
            config: None,
            engine_args: Vec::new(),
            kv_events: false,
            kv_hubs: Vec::new(),
        }
    }

    async fn bring_up(&mut self) {
        self.engines.iter_mut().for_each(Engine::start);
        self.replicas.iter_mut().for_each(Replica::start);
        let mut args = vec!["balancer".to_owned(), "--listen".to_owned(), self.balancer.to_string()];
        args.extend(self.replicas.iter().flat_map(|r| ["--backend".to_owned(), r.http.to_string()]));
        self._balancer = Some(Process::start(&args, &self.folder.path().join("balancer.log")));
        for replica in &self.replicas {
            ready(replica, START).await;
        }
        for engine in &self.engines {
            let mut request = engine_worker(&engine.id, engine.address);
            request.labels = engine.labels.clone();
            until(&format!("{} registered", engine.id), START, async || {
                self.replicas[0].add_worker(&request, LIMIT).await?.json::<serde_json::Value>()
            })
            .await;
        }
        for replica in &self.replicas {
            until("all engines everywhere", START, async || {
                let online = replica.local_workers().await?.iter().filter(|w| w.online).count();
                check(online == self.engines.len(), || format!("{} sees {online}", replica.name))
            })
            .await;
        }
    }

    /// A replica that joins this cluster by `--join`, not started yet.
    pub fn newcomer(&self, name: &str) -> Replica {
        self.stranger(name, vec!["--join".to_owned(), self.replicas[0].peer.to_string()])
    }

    /// A replica that waits until somebody adds it, not started yet: nobody is where it
    /// was told to join.
    pub fn waiting(&self, name: &str) -> Replica {
        let nobody = free_address();
        self.stranger(name, vec!["--set".to_owned(), format!("cluster.join={nobody}")])
    }

    fn stranger(&self, name: &str, mut more: Vec<String>) -> Replica {
        let endpoint = Endpoint::new(name);
        more.extend_from_slice(&self.settings);
        Replica::new(endpoint, self.folder.path(), &more)
    }

    /// Who leads the control group, when all who are asked and answer agree.
    pub async fn leader_among(&self, asked: &[usize]) -> Result<usize, String> {
        let mut led_by = None;
        for &at in asked {
            let status = self.replicas[at].status().await?.cluster;
            let group = status.groups.first().ok_or("no groups yet")?;
            let leader = group.leader.ok_or_else(|| format!("{} knows no leader", status.name))?;
            let name = status.members.iter().find(|m| m.id == leader).map(|m| m.info.name.clone());
            match &led_by {
                None => led_by = Some(name),
                Some(other) if *other == name => {}
                Some(other) => return Err(format!("{other:?} or {name:?} leads")),
            }
        }
        let name = led_by.flatten().ok_or("nobody was asked")?;
        self.replicas.iter().position(|r| r.name == name).ok_or_else(|| format!("{name} leads"))
    }

    /// Who leads, once all agree.
    pub async fn leader(&self) -> usize {
        let all: Vec<usize> = (0..self.replicas.len()).collect();
        until("one leader", START, async || self.leader_among(&all).await).await.0
    }

    /// All replicas but these.
    pub fn others(&self, than: &[usize]) -> Vec<usize> {
        (0..self.replicas.len()).filter(|at| !than.contains(at)).collect()
    }

    /// Addresses of some replicas, for tasks of their own.
    pub fn endpoints(&self, at: &[usize]) -> Vec<Endpoint> {
        at.iter().map(|at| (*self.replicas[*at]).clone()).collect()
    }

    /// Base URLs of some replicas' client listeners.
    pub fn targets(&self, at: &[usize]) -> Vec<String> {
        at.iter().map(|at| self.replicas[*at].http_url("")).collect()
    }

    /// The folder of everything.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// All replicas have applied the same, and their states are the same: equal digests at
    /// equal indexes, in both groups.
    pub async fn agree(&self) {
        until("equal digests at equal indexes", Duration::from_secs(15), async || {
            let mut seen = Vec::new();
            for replica in &self.replicas {
                let groups = replica.status().await?.cluster.groups;
                seen.push(groups.into_iter().map(|g| (g.applied, g.digest)).collect::<Vec<_>>());
            }
            check(seen.windows(2).all(|pair| pair[0] == pair[1]), || format!("{seen:?}"))
        })
        .await;
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if std::env::var_os("EVERLINE_CHAOS_KEEP").is_some() {
                self.folder.disable_cleanup(true);
                eprintln!("kept: {}", self.folder.path().display());
            }
            for replica in &self.replicas {
                eprintln!("{}", tail(replica.log()));
            }
            for engine in &self.engines {
                eprintln!("{}", tail(&engine.log));
            }
        }
    }
}

/// Waits until a replica is ready; how long that took.
pub async fn ready(replica: &Endpoint, limit: Duration) -> Duration {
    let what = format!("{} ready", replica.name);
    let look = async || {
        let reply = replica.ready().await?;
        check(reply.status.is_success(), || reply.text())
    };
    until(&what, limit, look).await.1
}
