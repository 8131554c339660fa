//! What the front's parts share: its configuration, the cluster, the policy, the counters; and
//! what each listener has to itself.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::accept::FrontOptions;
use super::allowed::Allowed;
use super::announced::Announced;
use super::auth::{NodeToken, NodeTokens, TokenDigests};
use super::awake::{Awake, Lookouts};
use super::body::BodyLimits;
use super::bootstrap::Bootstraps;
use super::cors::Origins;
use super::headers::HeaderRules;
use super::keys::KeyRing;
use super::ksana::{Ksana, KsanaOptions, RegistryNames};
use super::metrics::Metrics;
use super::names::Names;
use super::queue::{Queue, QueueOptions};
use super::retry::{RetryBudget, RetryOptions};
use super::routes::Listener;
use super::streams::StreamOptions;
use super::throttle::Meter;
use super::upstream::{Pool, PoolOptions};
use crate::cluster::api::ControlPlane;
use crate::ingest::FeedBoard;
use crate::naming::NameService;
use crate::relay::hub::Relays;
use crate::relay::remote::Remote;
use crate::routing::book::Reserve;
use crate::routing::breaker::BreakerOptions;
use crate::routing::policy::{self, POLICY_NAMES, Policy, PowerOfTwo};
use crate::routing::select::Overload;
use crate::tls::listener::ListenerTls;
use crate::tokens::Tokenizers;

/// Time limits and retries of the proxy path.
#[derive(Clone, Debug)]
pub struct ProxyOptions {
    /// Largest request body: 32 MiB. Its times as in [`BodyLimits::of`].
    pub body: BodyLimits,
    /// Attempts after the first.
    pub retry: RetryOptions,
    /// When a worker that fails is left alone.
    pub breaker: BreakerOptions,
    /// Requests a worker should have at once where its registration does not say: 8,192.
    pub max_requests_per_worker: u32,
    /// Requests that wait while all workers have as many as they should.
    pub queue: QueueOptions,
    /// Which headers pass.
    pub headers: HeaderRules,
    /// Most workers that may see one request: 2, so that a request that kills engines kills
    /// few of them.
    pub max_workers_reached: u32,
    /// From sending to the response head: 10 min, because an engine that does not stream
    /// answers when it is done.
    pub first_byte_timeout: Duration,
    /// Longest pause inside a response: 5 min.
    pub idle_timeout: Duration,
    /// A whole request: 30 min.
    pub total_timeout: Duration,
    /// Above what load a worker is left out while others are not: no threshold.
    pub overload: Overload,
    /// How requests are booked that do not say.
    pub reserve: Reserve,
}

impl Default for ProxyOptions {
    fn default() -> Self {
        Self {
            body: BodyLimits::of(32 << 20),
            retry: RetryOptions::default(),
            breaker: BreakerOptions::default(),
            max_requests_per_worker: 8192,
            queue: QueueOptions::default(),
            headers: HeaderRules::default(),
            max_workers_reached: 2,
            first_byte_timeout: Duration::from_secs(600),
            idle_timeout: Duration::from_secs(300),
            total_timeout: Duration::from_secs(1800),
            overload: Overload::default(),
            reserve: Reserve::default(),
        }
    }
}

/// The node plane and health probing.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// SHA-256 of each node token that is good everywhere; none, and no bound ones, means no
    /// authentication.
    pub tokens: TokenDigests,
    /// Node tokens bound to networks and roles.
    pub bound_tokens: Vec<NodeToken>,
    /// How often a node should heartbeat; told to it with each answer: 1 s.
    pub heartbeat_interval: Duration,
    /// How often a worker that does not heartbeat is probed: 2 s.
    pub probe_interval: Duration,
    /// Longest wait for one answer to a probe: 2 s.
    pub probe_timeout: Duration,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            tokens: TokenDigests::default(),
            bound_tokens: Vec::new(),
            heartbeat_interval: Duration::from_secs(1),
            probe_interval: Duration::from_secs(2),
            probe_timeout: Duration::from_secs(2),
        }
    }
}

/// Everything the front can be told.
#[derive(Clone)]
pub struct FrontConfig {
    /// Goes out as `Everline-Replica`; visible ASCII.
    pub replica: String,
    /// Connections.
    pub accept: FrontOptions,
    /// TLS of the client listener; none means plain text.
    pub client_tls: Option<Arc<ListenerTls>>,
    /// TLS of the admin listener.
    pub admin_tls: Option<Arc<ListenerTls>>,
    /// The proxy path.
    pub proxy: ProxyOptions,
    /// Connections to workers.
    pub pool: PoolOptions,
    /// Where workers may be.
    pub allow: Arc<Allowed>,
    /// Node plane and probing.
    pub nodes: NodeOptions,
    /// SHA-256 of each accepted admin token; none means no authentication.
    pub admin_tokens: TokenDigests,
    /// API keys of clients: none are asked for. Whoever keeps a handle can replace them.
    pub keys: Arc<KeyRing>,
    /// Whether `/metrics` on the admin listener needs no token although there are some: false.
    pub metrics_open_on_admin: bool,
    /// Whether `/metrics` is served on the client listener too: true.
    pub metrics_on_client: bool,
    /// Pages of which origins may ask from within a browser: none.
    pub cors: Origins,
    /// Chooses among workers: power of two choices.
    pub policy: Arc<dyn Policy>,
    /// Output streams.
    pub streams: StreamOptions,
    /// The cluster, where this process is an edge: streams are served here, everything else of the
    /// client plane is passed on to a replica, and there are no other planes.
    pub edge: Option<Arc<Remote>>,
    /// Turns prompts into blocks; without, no policy knows of prefixes.
    pub tokenizers: Option<Arc<Tokenizers>>,
    /// How KsanaLLM is served, where the client listener is its.
    pub ksana: Option<KsanaOptions>,
    /// By which names KsanaLLM's groups are found, where that is not the registry.
    pub names: Option<Names>,
    /// The name service, whatever it is asked for.
    pub name_service: Option<Arc<dyn NameService>>,
    /// Requests that two workers share.
    pub pd: PdOptions,
}

/// How two workers share a request.
#[derive(Clone, Copy, Debug)]
pub struct PdOptions {
    /// A prompt of which no more tokens than this have to be computed somewhere is done there, by one
    /// worker: 0, which is none.
    pub bypass_tokens: u32,
    /// From when on what a prefill worker holds ready is not asked for any more: 25 s, of the 30 s for
    /// which vLLM keeps it.
    pub handoff_age: Duration,
}

impl Default for PdOptions {
    fn default() -> Self {
        Self { bypass_tokens: 0, handoff_age: Duration::from_secs(25) }
    }
}

impl Default for FrontConfig {
    fn default() -> Self {
        Self {
            replica: "everline".to_owned(),
            accept: FrontOptions::default(),
            client_tls: None,
            admin_tls: None,
            proxy: ProxyOptions::default(),
            pool: PoolOptions::default(),
            allow: Arc::default(),
            nodes: NodeOptions::default(),
            admin_tokens: TokenDigests::default(),
            keys: Arc::new(KeyRing::new(None)),
            metrics_open_on_admin: false,
            metrics_on_client: true,
            cors: Origins::None,
            policy: Arc::new(PowerOfTwo),
            streams: StreamOptions::default(),
            edge: None,
            tokenizers: None,
            ksana: None,
            names: None,
            name_service: None,
            pd: PdOptions::default(),
        }
    }
}

/// One replica's front: shared by all its listeners.
pub struct Front {
    /// As configured.
    pub config: FrontConfig,
    /// The cluster.
    pub control: Arc<dyn ControlPlane>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    pub(super) node_tokens: NodeTokens,
    /// Cancelled when this replica should get no new work: `/readyz` then answers 503.
    pub draining: CancellationToken,
    /// Cancelled when clients that can come back should go elsewhere: after balancers had time to
    /// notice that this replica is not ready.
    pub leaving: CancellationToken,
    /// Cancelled when whoever is still here is told that it is over.
    pub ending: CancellationToken,
    /// Cancelled by an operator who wants this replica to stop as planned.
    pub stop_asked: CancellationToken,
    /// Since when.
    pub started: Instant,
    /// Requests that wait for a worker.
    pub(super) queue: Arc<Queue>,
    pub(super) retry_budget: RetryBudget,
    /// What engines with the Mooncake connector are called.
    pub(super) bootstraps: Bootstraps,
    pub(super) lookouts: Arc<Lookouts>,
    /// Streams that were asked for without a key and that do not exist.
    pub(super) guesses: Meter,
    /// Places of those who have a stream looked up at another process before it is known to be theirs.
    pub(super) looking: Semaphore,
    /// Output streams of this process; without, answers are passed on and cannot be resumed.
    pub streams: OnceLock<Arc<Relays>>,
    /// What agents say that runs at their engines and nobody has booked.
    pub(super) announced: Announced,
    /// KsanaLLM's part, where the client listener is its.
    pub(super) ksana: Option<Ksana>,
    /// Who says what names stand for; for KsanaLLM without another one, the registry.
    pub(super) name_service: Option<Arc<dyn NameService>>,
    /// What this replica's feeds of KV events do, written by whoever keeps them.
    pub feeds: FeedBoard,
    /// All policies, with their defaults, for requests that name one.
    policies: Vec<Arc<dyn Policy>>,
    replica: http::HeaderValue,
}

/// What KsanaLLM's groups are called where no names are configured.
const OF_REGISTRY: [&str; 2] = ["prefill", "decode"];

/// Most streams that are looked up at another process at once before they are known to be their
/// asker's.
const LOOKS: usize = 64;

impl std::fmt::Debug for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Front").field("replica", &self.config.replica).finish_non_exhaustive()
    }
}

impl Front {
    /// Puts a front together; nothing runs yet.
    pub fn new(config: FrontConfig, control: Arc<dyn ControlPlane>, metrics: Arc<Metrics>) -> Arc<Self> {
        let replica = http::HeaderValue::from_str(&config.replica)
            .unwrap_or_else(|_| http::HeaderValue::from_static("unprintable"));
        let started = Instant::now();
        // Never more than fit under the limit at once: what is given back is never missed.
        let looks_at_once = LOOKS.min(config.streams.guesses.burst() as usize);
        let node_tokens = NodeTokens::new(config.nodes.tokens.clone(), config.nodes.bound_tokens.clone());
        let ksana = config.ksana.clone().map(Ksana::new);
        let by_registry = || {
            let cluster = config.ksana.as_ref()?.cluster.clone();
            let [prefill, decode] = OF_REGISTRY.map(str::to_owned);
            let names = RegistryNames::new(Arc::clone(&control), cluster, prefill, decode);
            Some(Arc::new(names) as Arc<dyn NameService>)
        };
        let name_service = config.name_service.clone().or_else(by_registry);
        Arc::new(Self {
            config,
            control,
            metrics,
            ksana,
            name_service,
            node_tokens,
            draining: CancellationToken::new(),
            leaving: CancellationToken::new(),
            ending: CancellationToken::new(),
            stop_asked: CancellationToken::new(),
            started,
            queue: Arc::default(),
            retry_budget: RetryBudget::new(started),
            bootstraps: Bootstraps::default(),
            lookouts: Arc::default(),
            guesses: Meter::default(),
            looking: Semaphore::new(looks_at_once),
            streams: OnceLock::new(),
            announced: Announced::default(),
            feeds: FeedBoard::default(),
            policies: POLICY_NAMES.into_iter().filter_map(policy::by_name).collect(),
            replica,
        })
    }

    /// A policy by its name: the configured one, or one with its defaults.
    pub(super) fn policy(&self, name: &str) -> Option<&dyn Policy> {
        if self.config.policy.name() == name {
            return Some(self.config.policy.as_ref());
        }
        self.policies.iter().find(|policy| policy.name() == name).map(AsRef::as_ref)
    }

    /// Milliseconds since the start, from 1; never goes back.
    pub(super) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64 + 1
    }

    /// TLS of the client listener or of the admin listener.
    pub(super) fn tls(&self, listener: Listener) -> Option<&Arc<ListenerTls>> {
        if listener == Listener::Client {
            self.config.client_tls.as_ref()
        } else {
            self.config.admin_tls.as_ref()
        }
    }

    /// The value of `Everline-Replica`.
    pub(super) fn replica_header(&self) -> http::HeaderValue {
        self.replica.clone()
    }
}

/// What one I/O thread has to itself.
#[derive(Debug)]
pub struct Shard {
    /// What it shares with the others.
    pub front: Arc<Front>,
    /// Its connections to workers.
    pub pool: Pool,
    /// Keeps it from sleeping while that would cost more than it saves.
    pub awake: Awake,
}

impl Shard {
    /// A shard with an empty pool.
    pub fn new(front: Arc<Front>) -> Arc<Self> {
        let pool = Pool::new(&front.config.pool, Arc::clone(&front.config.allow));
        let awake = Awake::new(front.config.accept.poll, Arc::clone(&front.lookouts));
        Arc::new(Self { front, pool, awake })
    }
}
