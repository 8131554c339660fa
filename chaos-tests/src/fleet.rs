//! A whole cluster of processes: replicas, simulated engines and a balancer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use everline::state::worker::WorkerRole;
use everline::zmtp;
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit};

use crate::client::Http;
use crate::endpoint::{Endpoint, LIMIT, engine_worker};
use crate::handover::Handover;
use crate::ports::{free_address, free_ports};
use crate::process::{Process, tail};
use crate::replica::Replica;
use crate::wait::{check, until};

/// The model that the engines serve.
pub const MODEL: &str = "sim-model";

/// How long a fleet may take to be ready; other work may run on the machine.
const START: Duration = Duration::from_secs(30);

/// One fleet at a time: what is measured must not be measured against another test.
static TURN: Semaphore = Semaphore::const_new(1);

/// Waits until no other fleet lives; for tests that start processes of their own. The first one also
/// waits for the disk: as long as the compiler's output is on its way there, each write of a replica
/// stands behind gigabytes.
pub async fn turn() -> SemaphorePermit<'static> {
    static SYNCED: OnceCell<()> = OnceCell::const_new();
    let turn = TURN.acquire().await.expect("the semaphore is never closed");
    let sync = async || tokio::task::spawn_blocking(rustix::fs::sync).await.expect("it does not panic");
    SYNCED.get_or_init(sync).await;
    turn
}

/// A simulated engine.
#[derive(Debug)]
pub struct Engine {
    /// Its id as a worker.
    pub id: String,
    /// Where it listens.
    pub address: SocketAddr,
    labels: BTreeMap<String, String>,
    role: Option<WorkerRole>,
    /// How it hands over, and the port that is free for that.
    handover: Option<(Handover, u16)>,
    ranks: u32,
    has_loras: bool,
    args: Vec<String>,
    log: PathBuf,
    process: Option<Process>,
    /// The node agent beside it.
    pub agent: Option<Agent>,
}

/// A node agent.
#[derive(Debug)]
pub struct Agent {
    args: Vec<String>,
    log: PathBuf,
    process: Option<Process>,
}

impl Agent {
    /// Starts it, or starts it again.
    pub fn start(&mut self) {
        self.process = Some(Process::start(&self.args, &self.log));
    }

    /// `kill -9`.
    pub fn kill9(&mut self) {
        self.process = None;
    }

    /// Shows these files' certificate from its next start on, as the agent of this name.
    pub fn show(&mut self, files: &Files, name: &str) {
        let at =
            self.args.iter().position(|arg| arg == "--name").expect("agents of this fleet have certificates");
        let flags = files.flags(name);
        self.args.splice(at..at + flags.len(), flags);
    }

    /// Listens where the other one does, from its next start on.
    pub fn listen_as(&mut self, other: &Self) {
        let value = |args: &[String]| args.iter().position(|arg| arg == "--listen").map(|at| at + 1);
        if let (Some(mine), Some(theirs)) = (value(&self.args), value(&other.args)) {
            self.args[mine] = other.args[theirs].clone();
        }
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// How often it has registered its engine, over all its lives.
    pub fn registrations(&self) -> usize {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().filter(|line| line.contains("is registered")).count()
    }

    /// Asks it to stop, and waits until it has.
    pub fn stop(&mut self, limit: Duration) {
        if let Some(mut process) = self.process.take() {
            process.signal(Signal::TERM);
            process.wait(limit);
        }
    }
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

    /// Asks it to stop.
    pub fn sigterm(&mut self) {
        self.signal(Signal::TERM);
    }

    /// Freezes it.
    pub fn sigstop(&mut self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn sigcont(&mut self) {
        self.signal(Signal::CONT);
    }

    fn signal(&mut self, signal: Signal) {
        if let Some(process) = &mut self.process {
            process.signal(signal);
        }
    }

    /// Whether its process runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.ended().is_none())
    }

    /// Gives one of its arguments another value, from its next start on.
    pub fn set_arg(&mut self, name: &str, value: &str) {
        let at = self.args.iter().position(|arg| arg == name).expect("the argument was given");
        self.args[at + 1] = value.to_owned();
    }

    /// Where what it published can be asked for, rank by rank; nothing where it publishes nothing or does
    /// not run.
    pub fn replay_sockets(&self) -> Vec<zmtp::Endpoint> {
        let named =
            self.args.iter().position(|arg| arg == "--kv-events-config").filter(|_| self.process.is_some());
        let Some(config) = named.and_then(|at| self.args.get(at + 1)) else { return Vec::new() };
        let config: serde_json::Value = serde_json::from_str(config).expect("a config of ours");
        let first = config["replay_endpoint"].as_str().expect("each config names one");
        let first =
            zmtp::Endpoint::parse(first).expect("an endpoint").at_host(&self.address.ip().to_string());
        (0..self.ranks).filter_map(|rank| first.of_rank(rank)).collect()
    }

    /// Publishes no KV events when it is started the next time.
    pub fn without_kv_events(&mut self) {
        if let Some(at) = self.args.iter().position(|arg| arg == "--kv-events-config") {
            self.args.drain(at..at + 2);
        }
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
    roles: Vec<WorkerRole>,
    handover: Option<Handover>,
    ranks: u32,
    loras: Vec<String>,
    tokenizer: bool,
    kv_events: bool,
    kv_hubs: Vec<SocketAddr>,
    agents: bool,
    certificates: bool,
}

/// Files of a certificate that `everline certs` has issued for `name`.
#[derive(Clone, Debug)]
pub struct Files {
    /// The authority.
    pub ca: PathBuf,
    /// The certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Files {
    /// In this folder.
    pub fn of(folder: &Path, name: &str) -> Self {
        let file = |name: String| folder.join(name);
        Self {
            ca: file("ca.crt".to_owned()),
            cert: file(format!("{name}.crt")),
            key: file(format!("{name}.key")),
        }
    }

    /// As a replica or an edge takes them.
    pub fn settings(&self) -> Vec<String> {
        let named = [("tls_ca", &self.ca), ("tls_cert", &self.cert), ("tls_key", &self.key)];
        let setting = |(key, file): (&str, &PathBuf)| format!("peer.{key}={}", file.display());
        named.into_iter().flat_map(|named| ["--set".to_owned(), setting(named)]).collect()
    }

    /// As the agent of this name takes them.
    pub fn flags(&self, name: &str) -> Vec<String> {
        let named = [("--peer-ca", &self.ca), ("--peer-cert", &self.cert), ("--peer-key", &self.key)];
        let flags = named.into_iter().flat_map(|(flag, file)| [flag.to_owned(), file.display().to_string()]);
        ["--name".to_owned(), name.to_owned()].into_iter().chain(flags).collect()
    }
}

/// An authority in this folder, with certificates of these names.
pub async fn issue(folder: &Path, names: &[String]) {
    let dir = folder.display().to_string();
    let mut args = vec!["certs", "init", "--dir", &dir];
    let all: Vec<String> = names.iter().map(|name| format!("{name}=127.0.0.1")).collect();
    args.extend(all.iter().flat_map(|replica| ["--replica", replica]));
    crate::binary::run_ok(&args).await;
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

    /// What part of requests each engine does, in their order.
    pub fn roles(mut self, roles: &[WorkerRole]) -> Self {
        self.roles = roles.to_vec();
        self
    }

    /// How engines with a role hand over.
    pub fn handover(mut self, how: Handover) -> Self {
        self.handover = Some(how);
        self
    }

    /// Every engine serves these adapters of its model.
    pub fn loras(mut self, names: &[&str]) -> Self {
        self.loras = names.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    /// The replicas read prompts by the model's own files.
    pub fn tokenizer(mut self) -> Self {
        self.tokenizer = true;
        self
    }

    /// Every engine has so many data-parallel ranks.
    pub fn ranks(mut self, ranks: u32) -> Self {
        self.ranks = ranks;
        self
    }

    /// Every engine publishes its KV events, and can say them again.
    pub fn kv_events(mut self) -> Self {
        self.kv_events = true;
        self
    }

    /// A node agent is beside every engine, and registers it. KV events are published at files, and
    /// told by the agents.
    pub fn agents(mut self) -> Self {
        self.agents = true;
        self
    }

    /// Replicas, agents and edges show each other certificates.
    pub fn certificates(mut self) -> Self {
        self.certificates = true;
        self
    }

    /// Every engine publishes its KV events to a replica that it connects to, each to another.
    pub fn kv_hubs(mut self) -> Self {
        self.kv_hubs = (0..self.replicas).map(|_| free_address()).collect();
        self
    }

    /// Where replicas listen for engines that connect with their KV events, one after the other.
    pub fn kv_listen(mut self, addresses: &[SocketAddr]) -> Self {
        self.kv_hubs = addresses.to_vec();
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
        let mut config = self.config.clone();
        if self.tokenizer {
            let model = folder.path().join("model").display().to_string();
            crate::binary::run_ok(&["engine-sim", "--write-model", &model]).await;
            let entry = format!("\n[[model]]\nname = \"{MODEL}\"\ndirectory = \"{model}\"\n");
            config.get_or_insert_default().push_str(&entry);
        }
        if let Some(text) = &config {
            let file = folder.path().join("everline.toml");
            std::fs::write(&file, text).expect("a file can be written");
            settings.extend(["--config".to_owned(), file.display().to_string()]);
        }
        more.extend_from_slice(&settings);
        let certificates = folder.path().join("certs");
        if self.certificates {
            let replicas = endpoints.iter().map(|endpoint| endpoint.name.clone());
            let agents = (1..=self.engines).map(|n| format!("e{n}"));
            let names: Vec<String> =
                replicas.chain(agents).chain(["edge1", "edge2"].map(str::to_owned)).collect();
            issue(&certificates, &names).await;
        }
        let mut hubs = self.kv_hubs.iter();
        let urls: Vec<String> = endpoints.iter().map(|endpoint| endpoint.http_url("")).collect();
        let replicas: Vec<Replica> = endpoints
            .into_iter()
            .map(|endpoint| {
                let hub = hubs.next().map(|hub| ["--set".to_owned(), format!("kv.listen=tcp://{hub}")]);
                let mut more: Vec<String> = more.iter().cloned().chain(hub.into_iter().flatten()).collect();
                if self.certificates {
                    more.extend(Files::of(&certificates, &endpoint.name).settings());
                }
                Replica::new(endpoint, folder.path(), &more)
            })
            .collect();
        let engines: Vec<Engine> =
            (1..=self.engines).map(|n| self.engine(n, folder.path(), &urls.join(","))).collect();
        let balancer = free_address();
        let certificates = self.certificates.then_some(certificates);
        let mut fleet = Fleet {
            replicas,
            engines,
            balancer,
            settings,
            certificates,
            _balancer: None,
            folder,
            _turn: turn,
        };
        fleet.bring_up().await;
        fleet
    }

    fn engine(&self, n: usize, folder: &Path, replicas: &str) -> Engine {
        let (id, address) = (format!("e{n}"), free_address());
        let mut args: Vec<String> =
            ["engine-sim", "--listen", &address.to_string(), "--model", MODEL].map(str::to_owned).into();
        args.extend_from_slice(&self.engine_args);
        args.extend(self.loras.iter().flat_map(|name| ["--lora".to_owned(), name.clone()]));
        if self.ranks > 1 {
            args.extend(["--dp".to_owned(), self.ranks.to_string()]);
        }
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
        if self.kv_events && self.agents {
            // Where no replica may look.
            let at = |what: &str| format!("ipc://{}", folder.join(format!("{id}.{what}")).display());
            let config = serde_json::json!({
                "enable_kv_cache_events": true,
                "publisher": "zmq",
                "endpoint": at("events"),
                "replay_endpoint": at("replay"),
                "topic": "kv",
            });
            args.extend(["--kv-events-config".to_owned(), config.to_string()]);
        } else if self.kv_events {
            let config = serde_json::json!({
                "enable_kv_cache_events": true,
                "publisher": "zmq",
                "endpoint": format!("tcp://*:{}", free_ports(self.ranks as u16)),
                "replay_endpoint": format!("tcp://*:{}", free_ports(self.ranks as u16)),
            });
            args.extend(["--kv-events-config".to_owned(), config.to_string()]);
        }
        let (log, ranks) = (folder.join(format!("{id}.log")), self.ranks);
        let has_loras = !self.loras.is_empty();
        let agent = self.agents.then(|| {
            let mut args: Vec<String> =
                ["agent", "--id", &id, "--replica", replicas].map(str::to_owned).into();
            args.extend(["--engine".to_owned(), format!("http://{address}")]);
            args.extend(["--listen".to_owned(), free_address().to_string()]);
            args.extend(["--log-filter".to_owned(), "info,everline::relay=debug".to_owned()]);
            if self.kv_events {
                args.extend(["--kv-port".to_owned(), "0".to_owned()]);
            }
            if self.certificates {
                args.extend(Files::of(&folder.join("certs"), &id).flags(&id));
            }
            Agent { args, log: folder.join(format!("{id}.agent.log")), process: None }
        });
        let role = self.roles.get(n - 1).copied();
        let handover = self.handover.map(|how| (how, free_address().port()));
        if let (Some((how, port)), Some(role)) = (handover, role) {
            args.extend(how.args(role, port));
        }
        Engine { log, id, address, labels, role, handover, ranks, has_loras, args, process: None, agent }
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
    certificates: Option<PathBuf>,
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
            roles: Vec::new(),
            handover: None,
            ranks: 1,
            loras: Vec::new(),
            tokenizer: false,
            kv_events: false,
            kv_hubs: Vec::new(),
            agents: false,
            certificates: false,
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
        for agent in self.engines.iter_mut().filter_map(|engine| engine.agent.as_mut()) {
            agent.start();
        }
        for engine in self.engines.iter().filter(|engine| engine.agent.is_none()) {
            let mut request = engine_worker(&engine.id, engine.address);
            request.labels = engine.labels.clone();
            request.dp_ranks = Some(engine.ranks);
            request.role = engine.role;
            if let Some((how, port)) = engine.handover {
                how.describe(port, &mut request);
            }
            if engine.has_loras {
                // It says which.
                request.models.clear();
            }
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

    /// Settings of an edge of this name with its certificate, if there are any here: `edge1` and
    /// `edge2` have one.
    pub fn certificate_of(&self, name: &str) -> Vec<String> {
        let folder = self.certificates.as_deref();
        folder.map(|folder| Files::of(folder, name).settings()).unwrap_or_default()
    }

    /// What is written of this by replicas so far, all of them together.
    pub fn logs(&self) -> String {
        self.replicas
            .iter()
            .map(|replica| std::fs::read_to_string(replica.log()).unwrap_or_default())
            .collect()
    }

    /// The folder of the fleet's certificates; it must have some.
    pub fn certificates(&self) -> &Path {
        self.certificates.as_deref().expect("a fleet with certificates")
    }

    /// The folder of everything.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What each engine has generated, in tokens. All of them must run.
    pub async fn generated_by_engine(&self) -> Vec<u64> {
        let mut each = Vec::new();
        for engine in &self.engines {
            let url = format!("http://{}/metrics", engine.address);
            let text = Http::fresh().get(&url, LIMIT).await.expect("an engine that runs").text();
            let lines = text.lines().filter(|line| line.starts_with("vllm:generation_tokens_total"));
            let numbers: Vec<f64> = lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
            assert!(!numbers.is_empty(), "{text}");
            each.push(numbers.iter().sum::<f64>() as u64);
        }
        each
    }

    /// What all engines have generated, in tokens.
    pub async fn generated(&self) -> u64 {
        self.generated_by_engine().await.iter().sum()
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
                if let Some(agent) = &engine.agent {
                    eprintln!("{}", tail(&agent.log));
                }
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
