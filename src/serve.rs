//! Runs a replica: puts configuration, cluster and HTTP front together, and takes them apart in
//! order when told to stop.
//!
//! On SIGTERM or SIGINT: `/readyz` goes off, leadership is handed over, after
//! `http.drain_settle_ms` (SIGTERM only) listeners close, what is in flight may finish for
//! `http.shutdown_grace_ms`, then the log is closed. A second signal
//! ends the process at once; the log takes that as it takes a crash.

mod discovery;
pub mod edge;
pub mod feeds;
mod keys;
mod lives;
mod loads;
mod names;
mod prompts;
pub mod sources;
pub(crate) mod streams;
#[cfg(test)]
mod testing;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use http::HeaderValue;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cluster::api::ControlPlane;
use crate::cluster::clock::Rhythm;
use crate::cluster::down::DownPlane;
use crate::cluster::inner::{NodeConfig, StartError};
use crate::cluster::node::Cluster;
use crate::cluster::peer::dial::Dialer;
use crate::cluster::proposer::Batching;
use crate::cluster::pulse::KsanaWatch;
use crate::config::{
    AccessLog, Certificates, Config, ConfigErrors, KsanaCompat, Loaded, LogConfig, LogFormat, NodeTokenEntry,
};
use crate::http::{
    Access, AccessOptions, Allowed, BodyLimits, ConnTimeouts, Front, FrontConfig, FrontOptions, Generator,
    HeaderRules, KeyRing, KsanaOptions, Metrics, NodeOptions, NodeToken, Origins, PdOptions, Places,
    PoolOptions, ProcessGauges, ProxyOptions, QueueOptions, RetryOptions, Shard, TokenDigests, WorkerTls,
    bind, keep_configured_workers, run_prober, serve_admin, serve_client,
};
use crate::ingest::hub::Hub;
use crate::relay;
use crate::relay::directory::OfReplica;
use crate::relay::hub::Relays;
use crate::routing::breaker::BreakerOptions;
use crate::routing::policy;
use crate::routing::select::Overload;
use crate::state::command::ReplicaInfo;
use crate::telemetry::log;
use crate::telemetry::trace::{TraceOptions, Tracing};
use crate::zmtp::{Endpoint, Limits};
use feeds::Feeds;
use keys::{KeysFile, client_key};
use loads::Loads;
use prompts::ByWorkers;

/// How often a node is asked to heartbeat, as a part of the timeout: four may be lost.
const HEARTBEATS_PER_TIMEOUT: u32 = 5;

/// From when on a certificate's end is near: two weeks.
const EXPIRES_SOON: Duration = Duration::from_secs(14 * 86_400);

/// Runs a replica until it is told to stop, or its consensus fails for good.
pub fn run(loaded: Loaded) -> anyhow::Result<()> {
    let config = loaded.config;
    start_logging(&config.log);
    for note in &loaded.notes {
        tracing::warn!("{note}");
    }
    let certificates = Certificates::open(&config).map_err(ConfigErrors)?;
    raise_file_limit(config.http.max_connections);
    // All listeners first: a port that is taken must not cost a life of the log.
    let http = listen("http", config.http.listen)?;
    let admin = listen("admin", config.admin.listen)?;
    let peer = listen("peer", config.peer.listen)?;

    let streams = streams::runtime()?;
    let late = Arc::<OnceLock<Arc<Relays>>>::default();
    let mut services = tonic::service::Routes::builder();
    services.add_service(relay::link::server::Service::serve(Arc::clone(&late)));
    services.add_service(relay::remote::places::Service::serve(Arc::clone(&late)));
    let directory = Arc::<OnceLock<Arc<OfReplica>>>::default();
    services.add_service(relay::remote::server::Service::serve(Arc::clone(&directory)));
    let node = NodeConfig {
        tls: certificates.peer.clone(),
        services: Some((services.routes(), streams.handle().clone())),
        ..node_config(&config)
    };
    let (cluster, plane): (Option<Cluster>, Arc<dyn ControlPlane>) = match Cluster::start(node, peer) {
        Ok(cluster) => {
            let plane = cluster.control_plane();
            (Some(cluster), plane)
        }
        Err(StartError::Damaged(why)) => {
            let remedy = format!(
                "{why}; look at it, then set the folder aside with `everline member repair --data-dir {}` and start \
                 again: the replica rejoins from its peers",
                config.replica.data_dir.display()
            );
            tracing::error!(why = %remedy, "this replica takes no part in the cluster");
            (None, Arc::new(DownPlane::new(&config.replica.name, remedy)))
        }
        Err(StartError::Io(error)) => {
            return Err(error).with_context(|| format!("cannot use {}", config.replica.data_dir.display()));
        }
    };

    let _ = directory.set(OfReplica::new(Arc::clone(&plane)));

    let runtime = front_runtime()?;
    let serving = serve(&config, &certificates, cluster, plane, late, (http, admin), streams.handle());
    let result = runtime.block_on(serving);
    runtime.shutdown_background();
    streams.shutdown_background();
    result
}

/// What runs everything but consensus and the threads that serve connections.
fn front_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.thread_name("front").enable_all().build().context("cannot start the HTTP runtime")
}

/// Takes as many open files as the system allows: a request needs two, one on either side.
fn raise_file_limit(max_connections: u32) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) =
            setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
    let wanted = 2 * u64::from(max_connections);
    if let Some(allowed) = getrlimit(Resource::Nofile).current.filter(|allowed| *allowed < wanted) {
        tracing::warn!(
            allowed,
            wanted,
            "fewer open files are allowed than http.max_connections may need; raise the limit (LimitNOFILE, \
             ulimit -n), or lower the setting"
        );
    }
}

fn listen(what: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    bind(address, false).with_context(|| {
        format!("cannot listen on {address} ({what}.listen); is another one running there? choose another port with --{what}")
    })
}

async fn serve(
    config: &Config,
    certificates: &Certificates,
    cluster: Option<Cluster>,
    plane: Arc<dyn ControlPlane>,
    late: Arc<OnceLock<Arc<Relays>>>,
    (http, admin): (TcpListener, TcpListener),
    streams: &Handle,
) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot listen for signals")?;
    let expiring = certificates.clone();
    let gauges = ProcessGauges::new(move || expiring.expiries());
    tokio::spawn(warn_before_expiry(certificates.clone()));
    tokio::spawn(log::tell_what_is_left_out());
    let metrics = Metrics::new(access_options(&config.log))
        .with_tracing(tracing(&config.replica.name))
        .with_collector(gauges);
    let metrics = Arc::new(metrics);
    let asked = Arc::<ByWorkers>::default();
    let tokenizers = prompts::load(config, Arc::clone(&asked))?;
    let mut front_config = FrontConfig {
        pool: pool_options(config)?,
        tokenizers: Some(tokenizers),
        ..front_config(config, certificates)
    };
    let shutdown = CancellationToken::new();
    names::use_in(&mut front_config, config, names::start(config, &shutdown).context("name_service")?);
    let keys_file = KeysFile::load(config, Arc::clone(&front_config.keys))?;
    let front = Front::new(front_config, Arc::clone(&plane), Arc::clone(&metrics));
    asked.begin(Shard::new(Arc::clone(&front)));
    let relays = keep_streams(config, certificates, &front, &plane, streams);
    let _ = late.set(Arc::clone(&relays));
    for tls in [&certificates.http, &certificates.admin].into_iter().flatten() {
        let tls = Arc::clone(tls);
        // Ends with the runtime: nothing is left half done by it.
        tokio::spawn(async move { tls.watch().await });
    }
    let admin_shutdown = CancellationToken::new();
    tracing::info!(
        name = config.replica.name,
        http = %config.http.listen,
        admin = %config.admin.listen,
        peer = %config.peer.listen,
        "serving"
    );
    let clients = tokio::spawn(serve_client(http, Arc::clone(&front), shutdown.clone()));
    let operators = tokio::spawn(serve_admin(admin, Arc::clone(&front), admin_shutdown.clone()));
    tokio::spawn(run_prober(Arc::clone(&front), shutdown.clone()));
    tokio::spawn(keep_configured_workers(Arc::clone(&front), config.worker.clone(), shutdown.clone()));
    names::discover(config, &front, shutdown.clone());

    let hub = listen_for_engines(config, Arc::clone(&front.config.allow)).await?;
    // Ends with this function.
    let _pings = discovery::listen(config, &front).await?;
    let feeds =
        Feeds::new(Shard::new(Arc::clone(&front)), Arc::clone(&plane), Arc::clone(&front.config.allow));
    let sockets = feeds.loads();
    let feeds = tokio::spawn(feeds.with_hub(hub).run(shutdown.clone()));

    if config.kv.scrape_ms > 0 {
        let every = ms(config.kv.scrape_ms);
        let loads = Loads::new(Shard::new(Arc::clone(&front)), Arc::clone(&plane), every, sockets);
        tokio::spawn(loads.run(shutdown.clone()));
    }

    if let Some(file) = keys_file {
        tokio::spawn(file.follow(shutdown.clone()));
    }

    let failed = async {
        match &cluster {
            Some(cluster) => cluster.failed().await,
            None => std::future::pending().await,
        }
    };
    let mut settle = Duration::ZERO;
    let failure = tokio::select! {
        signal = signals.next() => {
            tracing::info!(signal, "stopping; a second signal stops at once");
            // A person at a terminal has no balancer that must notice first.
            if signal == SIGTERM {
                settle = ms(config.http.drain_settle_ms);
            }
            None
        }
        () = front.stop_asked.cancelled() => {
            tracing::info!("stopping as planned; a signal stops at once");
            settle = ms(config.http.drain_settle_ms);
            None
        }
        why = failed => {
            // The log may hold less than was promised: this replica proposes and votes no more.
            // Running answers do not depend on that and may finish; then whoever supervises us
            // starts us again.
            tracing::error!(%why, "the cluster part of this replica has failed; ending the process");
            Some(why)
        }
    };

    let stop = async {
        front.draining.cancel();
        relays.leave();
        let hand_over = async {
            let transfer = async {
                if let (Some(cluster), None) = (&cluster, &failure) {
                    cluster.hand_over_leadership().await;
                }
            };
            // Requests are still taken meanwhile: a balancer sends some until its next check.
            tokio::join!(transfer, tokio::time::sleep(settle));
            let_clients_go(&front, clients, &shutdown, ms(config.http.shutdown_grace_ms)).await;
            // What nobody here reads is still generated for others until they have taken it over.
            relays.handed_over(HAND_OVER).await;
            let _ = feeds.await;
            // The admin listener stays to the end, so that an operator can watch.
            admin_shutdown.cancel();
            let _ = operators.await;
            if let Some(cluster) = cluster {
                cluster.shutdown().await;
            }
            let _ = tokio::task::spawn_blocking(move || metrics.flush_spans()).await;
        };
        hand_over.await;
        tracing::info!("stopped");
    };
    tokio::select! {
        () = stop => {}
        _ = signals.next() => {
            tracing::warn!("second signal: stopping at once");
            log::finish();
            std::process::exit(1);
        }
    }
    match failure {
        Some(why) => anyhow::bail!("{why}"),
        None => Ok(()),
    }
}

/// Closes the client listener and waits for its end: who can come back is let go, and who does not finish
/// in time hears so.
async fn let_clients_go<T>(
    front: &Front,
    clients: tokio::task::JoinHandle<T>,
    listener: &CancellationToken,
    grace: Duration,
) {
    // From here on who comes back comes to another process.
    front.leaving.cancel();
    listener.cancel();
    let ending = front.ending.clone();
    let last_word = tokio::spawn(async move {
        tokio::time::sleep(grace.saturating_sub(LAST_WORD)).await;
        ending.cancel();
    });
    let _ = clients.await;
    last_word.abort();
}

/// Has output streams kept here and by peers.
fn keep_streams(
    config: &Config,
    certificates: &Certificates,
    front: &Arc<Front>,
    plane: &Arc<dyn ControlPlane>,
    runtime: &Handle,
) -> Arc<Relays> {
    let directory = OfReplica::new(Arc::clone(plane));
    let dialer = Dialer::new(certificates.peer.clone());
    let relays = Relays::new(streams::relay_options(config), directory, dialer, runtime.clone());
    relays.set_engines(Generator::new(Shard::new(Arc::clone(front)), Arc::clone(&relays)));
    relays.set_placer(Places::new(Shard::new(Arc::clone(front))));
    let moved = Arc::downgrade(&relays);
    plane.on_stream_moved(Box::new(move |id, attempt| {
        if let Some(relays) = moved.upgrade() {
            relays.moved(id, attempt);
        }
    }));
    relays.look();
    let _ = front.streams.set(Arc::clone(&relays));
    // Ends with the runtime: streams outlive the listeners.
    runtime.spawn(Arc::clone(&relays).run(CancellationToken::new()));
    relays
}

/// Opens `kv.listen`; only those may connect that could be workers.
async fn listen_for_engines(config: &Config, allow: Arc<Allowed>) -> anyhow::Result<Option<Hub>> {
    let Some(text) = &config.kv.listen else { return Ok(None) };
    let endpoint = engines_endpoint("kv.listen", text, config, "tell what engines have cached")?;
    let admits = move |peer| allow.check(peer).is_ok();
    let hub = Hub::bind(&endpoint, Limits::default(), Arc::new(admits)).await;
    Ok(Some(hub.with_context(|| format!("cannot listen on {text} (kv.listen)"))?))
}

/// Where engines connect without authentication.
fn engines_endpoint(key: &str, text: &str, config: &Config, could: &str) -> anyhow::Result<Endpoint> {
    let endpoint = Endpoint::parse(text).with_context(|| format!("{key} = {text:?}"))?;
    if let Endpoint::Tcp { host, .. } = &endpoint {
        let is_loopback = host.parse::<IpAddr>().map_or(host == "localhost", |ip| ip.is_loopback());
        anyhow::ensure!(
            is_loopback || config.http.insecure,
            "{key} = {text:?} can be reached from other machines without authentication: anybody could {could}; listen \
             on 127.0.0.1, or, on a network you trust, write http.insecure = true"
        );
    }
    Ok(endpoint)
}

/// Says every day which certificates are near their end. Ends with the runtime.
async fn warn_before_expiry(certificates: Certificates) {
    loop {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        for (listener, expires) in certificates.expiries() {
            let left = u64::try_from(expires).unwrap_or_default().saturating_sub(now);
            if left < EXPIRES_SOON.as_secs() {
                tracing::warn!(
                    listener,
                    hours_left = left / 3600,
                    "a certificate expires soon; put a new one in its place"
                );
            }
        }
        tokio::time::sleep(Duration::from_secs(86_400)).await;
    }
}

/// How long before the end of the grace time clients that are still here are told.
const LAST_WORD: Duration = Duration::from_millis(500);
/// How long others may take to take over what is generated here.
const HAND_OVER: Duration = Duration::from_secs(5);

/// The name of the signal that supervisors send.
const SIGTERM: &str = "SIGTERM";

/// SIGTERM and SIGINT.
pub(crate) struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => SIGTERM,
            _ = self.int.recv() => "SIGINT",
        }
    }
}

/// Logs as is configured from now on.
pub(crate) fn start_logging(config: &LogConfig) {
    let pretty = match config.format {
        LogFormat::Pretty => Some(true),
        LogFormat::Json => Some(false),
        LogFormat::Auto => None,
    };
    log::start(&config.filter, pretty, crate::config::no_color());
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn node_config(config: &Config) -> NodeConfig {
    let cluster = &config.cluster;
    NodeConfig {
        info: ReplicaInfo {
            name: config.replica.name.clone(),
            peer: config.peer_address(),
            http: config.http_url(),
            admin: config.admin_url(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        data_dir: config.replica.data_dir.clone(),
        peers: cluster.peers.iter().map(|p| (p.name.clone(), p.address.clone())).collect(),
        join: cluster.join.clone(),
        tls: None,
        services: None,
        auto_promote: cluster.auto_promote,
        heartbeat: ms(cluster.heartbeat_ms),
        election: (ms(cluster.election_min_ms), ms(cluster.election_max_ms)),
        propose_timeout: ms(cluster.propose_timeout_ms),
        batching: Batching {
            window: Duration::from_micros(cluster.batch_window_us),
            load_window: Duration::from_micros(cluster.load_window_us),
            bytes: cluster.batch_bytes as usize,
            queue_bytes: cluster.queue_bytes as usize,
        },
        rhythm: Rhythm {
            lease: ms(cluster.lease_ms),
            worker_timeout: ms(config.workers.timeout_ms),
            ..Rhythm::default()
        },
        index: crate::kv::index::Options { bytes: config.kv.index_bytes },
        ksana: ksana_options(config).map(|options| KsanaWatch {
            rules: options.rules(),
            forget: Duration::from_secs(config.ksana.forget_after_s),
        }),
        checkpoint_log_bytes: cluster.checkpoint_log_bytes,
        checkpoint_interval: Duration::from_secs(cluster.checkpoint_interval_s),
        wal_segment_bytes: cluster.wal_segment_bytes,
        digest_every: cluster.digest_every,
    }
}

/// Traces, where the `OTEL_*` variables ask for them. What they ask for and cannot have is said,
/// and no reason not to serve.
fn tracing(replica: &str) -> Option<Tracing> {
    let started = TraceOptions::from_variables(crate::config::variables()).and_then(|options| {
        let Some(options) = options else { return Ok(None) };
        let collector = options.collector();
        let tracing = Tracing::start(options, replica)?;
        tracing::info!(%collector, "sending traces");
        Ok(Some(tracing))
    });
    started.unwrap_or_else(|why| {
        tracing::error!("{why}");
        None
    })
}

fn access_options(config: &LogConfig) -> AccessOptions {
    let access = match config.access {
        AccessLog::All => Access::All,
        AccessLog::Errors => Access::Errors,
        AccessLog::Off => Access::Off,
    };
    AccessOptions { access, slow: ms(config.access_slow_ms) }
}

/// How workers are connected to. Reads the files named for that.
fn pool_options(config: &Config) -> anyhow::Result<PoolOptions> {
    let (proxy, workers) = (&config.proxy, &config.workers);
    let tls = crate::tls::client_config(workers.tls_ca.as_deref()).context("workers.tls_ca")?;
    let authorization = workers.api_key_file.as_deref().map(worker_authorization).transpose();
    Ok(PoolOptions {
        connect_timeout: ms(proxy.connect_timeout_ms),
        max_idle_per_worker: proxy.pool_idle_per_worker as usize,
        idle_timeout: ms(proxy.pool_idle_timeout_ms),
        max_head_bytes: proxy.max_response_header_bytes as usize,
        tls: Some(WorkerTls::new(tls)),
        authorization: authorization.context("workers.api_key_file")?,
        ..PoolOptions::default()
    })
}

pub(crate) fn worker_authorization(file: &Path) -> anyhow::Result<HeaderValue> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let key = text.trim();
    anyhow::ensure!(!key.is_empty(), "{} has no key in it", file.display());
    let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
        .map_err(|_| anyhow::anyhow!("the key in {} has characters that cannot be sent", file.display()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Names that the configuration's checks have let pass.
fn header_names(names: &[String]) -> Vec<http::HeaderName> {
    names.iter().filter_map(|name| name.parse().ok()).collect()
}

fn front_config(config: &Config, certificates: &Certificates) -> FrontConfig {
    let (http, proxy) = (&config.http, &config.proxy);
    let heartbeat_interval = ms(config.workers.timeout_ms) / HEARTBEATS_PER_TIMEOUT;
    let policy = policy::by_name(proxy.policy.name()).unwrap_or_else(|| FrontConfig::default().policy);
    FrontConfig {
        replica: config.replica.name.clone(),
        client_tls: certificates.http.clone(),
        admin_tls: certificates.admin.clone(),
        accept: FrontOptions {
            timeouts: ConnTimeouts {
                first_byte: ms(http.first_byte_timeout_ms),
                head: ms(http.header_timeout_ms),
                idle: ms(http.idle_timeout_ms),
                write_stall: ms(http.write_stall_timeout_ms),
            },
            max_headers: http.max_headers as usize,
            max_head_bytes: http.max_header_bytes as usize,
            max_connections: http.max_connections as usize,
            max_connections_per_ip: match http.max_connections_per_ip {
                0 => usize::MAX,
                n => n as usize,
            },
            grace: ms(http.shutdown_grace_ms),
            max_h2_streams: http.max_h2_streams,
            poll: Duration::from_micros(http.poll_us.into()),
            threads: match http.threads {
                0 => std::thread::available_parallelism().map_or(1, usize::from),
                n => n as usize,
            },
            ..FrontOptions::default()
        },
        proxy: ProxyOptions {
            body: BodyLimits {
                total: ms(http.body_timeout_ms),
                floor: http.body_min_bytes_per_s.into(),
                ..BodyLimits::of(http.max_body_bytes as usize)
            },
            retry: RetryOptions {
                attempts: proxy.retries,
                budget_percent: proxy.retry_budget_percent,
                pause: ms(proxy.retry_pause_ms),
            },
            breaker: BreakerOptions {
                failures: proxy.breaker_failures,
                open_ms: proxy.breaker_open_ms,
                max_open_ms: proxy.breaker_max_open_ms.max(proxy.breaker_open_ms),
            },
            max_requests_per_worker: proxy.max_requests_per_worker,
            queue: QueueOptions { most: proxy.queue_max as usize, patience: ms(proxy.queue_timeout_ms) },
            headers: HeaderRules {
                forward: header_names(&proxy.headers_forward),
                drop: header_names(&proxy.headers_drop),
                everything: false,
            },
            first_byte_timeout: ms(proxy.first_byte_timeout_ms),
            idle_timeout: ms(proxy.idle_timeout_ms),
            total_timeout: ms(proxy.total_timeout_ms),
            reserve: proxy.reserve,
            overload: Overload {
                prefill_tokens: Some(proxy.overload_prefill_tokens).filter(|most| *most > 0),
                kv_share: Some(f64::from(proxy.overload_kv_percent) / 100.0).filter(|share| *share > 0.0),
            },
            ..ProxyOptions::default()
        },
        pool: PoolOptions::default(),
        allow: Arc::new(Allowed::new(config.workers.allow.clone())),
        nodes: NodeOptions {
            tokens: TokenDigests::new(config.nodes.token_sha256.iter().map(|digest| digest.0).collect()),
            bound_tokens: config.node_token.iter().map(node_token).collect(),
            heartbeat_interval,
            probe_interval: ms(config.workers.probe_interval_ms),
            probe_timeout: ms(config.workers.probe_timeout_ms),
        },
        pd: PdOptions { bypass_tokens: config.pd.bypass_tokens, handoff_age: ms(config.pd.handoff_ms) },
        admin_tokens: TokenDigests::new(config.admin.token_sha256.iter().map(|digest| digest.0).collect()),
        keys: Arc::new(KeyRing::new(
            config.wants_client_keys().then(|| config.key.iter().map(client_key).collect()),
        )),
        metrics_open_on_admin: config.admin.listen.ip().is_loopback(),
        metrics_on_client: config.http.listen.ip().is_loopback(),
        policy,
        cors: Origins::new(&http.cors_origins),
        streams: streams::stream_options(config),
        edge: None,
        tokenizers: None,
        ksana: ksana_options(config),
        names: None,
        name_service: None,
    }
}

/// How KsanaLLM is served, if it is.
fn ksana_options(config: &Config) -> Option<KsanaOptions> {
    let ksana = &config.ksana;
    ksana.enabled.then(|| KsanaOptions {
        strict: ksana.compat == KsanaCompat::Strict,
        cluster: ksana.cluster_name.clone(),
        heartbeat_timeout: Duration::from_secs(ksana.heartbeat_timeout_s),
    })
}

fn node_token(entry: &NodeTokenEntry) -> NodeToken {
    NodeToken {
        id: entry.id.clone(),
        digest: entry.sha256.0,
        networks: entry.networks.clone(),
        roles: entry.roles.clone(),
    }
}
