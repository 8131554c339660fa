//! The node agent: beside an engine, for it. It registers the engine and heartbeats to any replica,
//! offers its KV events where replicas can reach them, and **holds its streams**: what the engine
//! generates is kept here, so that no replica's death, nor that of all of them, ends a generation.
//!
//! What generates is the front's own [`Generator`], over a cluster of one worker ([`SoloPlane`]);
//! what keeps and feeds is a replica's own [`Relays`], over a directory that knows nobody
//! ([`Alone`]). Replicas list what is here, read it, and take it over when this process is lost.

mod engine;
mod events;
mod load;
mod registrar;
mod replicas;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use crate::admin_types::RegisterRequest;
use crate::cluster::api::ControlPlane;
use crate::cluster::peer::dial::Dialer;
use crate::cluster::peer::incoming;
use crate::cluster::solo::SoloPlane;
use crate::config::Config;
use crate::http::{
    Access, AccessOptions, Allowed, Front, FrontConfig, Generator, HeaderRules, Metrics, PoolOptions,
    ProxyOptions, Shard, WorkerTls, bind,
};
use crate::relay::alone::Alone;
use crate::relay::hub::Relays;
use crate::relay::link::server::Service;
use crate::serve::streams::{relay_options, stream_options};
use crate::serve::{Signals, worker_authorization};
use crate::state::worker::{AGENT_LABEL, AGENT_NAME_LABEL, WorkerSource};
use crate::tls::peer::{PeerFiles, PeerTls};
use engine::Engine;
use events::Events;
use registrar::Registrar;
use replicas::Replicas;

/// What replicas may have been told to let through, and agents do not ask again: it was decided
/// where the client is.
const FORWARDED: [&str; 9] = [
    "authorization",
    "api-key",
    "cookie",
    "forwarded",
    "x-api-key",
    "x-real-ip",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
];

/// How an agent runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// The engine as the agent reaches it, and everything that its registration says.
    pub worker: RegisterRequest,
    /// The engine as replicas reach it, where that is another URL.
    pub advertise_engine: Option<String>,
    /// File with the engine's API key.
    pub engine_key: Option<PathBuf>,
    /// Authority of an `https://` engine's certificate.
    pub engine_ca: Option<PathBuf>,
    /// Client listeners of replicas.
    pub replicas: Vec<String>,
    /// What the node plane wants to see.
    pub node_token: Option<String>,
    /// Authority of `https://` replicas' certificates.
    pub ca: Option<PathBuf>,
    /// Where replicas come for streams.
    pub listen: SocketAddr,
    /// `host:port` of that for replicas, where it is another.
    pub advertise: Option<String>,
    /// Name in the agent's certificate, and its files.
    pub peer: Option<(String, PeerFiles)>,
    /// The only cluster to belong to, by its id; otherwise what replicas say.
    pub cluster: Option<String>,
    /// Forward KV events, from this port on; 0 takes free ones.
    pub kv_port: Option<u16>,
    /// The engine's events, where it cannot be asked: endpoint, replay endpoint, topic.
    pub kv_source: Option<(String, Option<String>, Option<String>)>,
    /// Listen for others than this machine without certificates.
    pub insecure: bool,
    /// How long streams may take to be taken over, or to end, before the agent does.
    pub drain: Duration,
    /// How streams are kept, and for how long the engine is waited for: as replicas do.
    pub config: Config,
}

/// Runs an agent until it is told to stop; `announce` gets the address it listens on.
pub async fn run(options: Options, announce: impl FnOnce(SocketAddr)) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot listen for signals")?;
    let listener = listen(&options)?;
    let listens = listener.local_addr()?;
    let advertised = advertised(&options, listens)?;
    let tls = match &options.peer {
        None => None,
        Some((name, files)) => Some(Arc::new(PeerTls::open(name, files)?)),
    };
    if let Some(tls) = tls.clone() {
        // Ends with the process.
        tokio::spawn(async move { tls.watch().await });
    }

    let mut wanted = options.worker.clone();
    wanted.labels.insert(AGENT_LABEL.to_owned(), advertised.clone());
    if let Some((name, _)) = &options.peer {
        wanted.labels.insert(AGENT_NAME_LABEL.to_owned(), name.clone());
    }
    let spec = wanted.to_spec(WorkerSource::Node).map_err(anyhow::Error::msg)?;
    // The same worker for replicas, wherever they reach it.
    wanted.id = Some(spec.id.to_string());
    wanted.url = options.advertise_engine.clone().unwrap_or(wanted.url);
    wanted.to_spec(WorkerSource::Node).map_err(anyhow::Error::msg).context("--advertise-engine")?;

    let plane = SoloPlane::new(spec.id.as_str(), spec.clone());
    let front = front(&options, Arc::clone(&plane) as Arc<dyn ControlPlane>)?;
    let directory = Arc::<Alone>::default();
    if let Some(cluster) = &options.cluster {
        directory.set_cluster(cluster);
    }
    let runtime = tokio::runtime::Handle::current();
    let dialer = Dialer::new(tls.clone());
    let relays = Relays::new(relay_options(&options.config), Arc::clone(&directory) as _, dialer, runtime);
    let generator = Generator::beside(spec.id.clone(), Shard::new(Arc::clone(&front)), Arc::clone(&relays));
    relays.set_engines(generator);
    relays.look();
    let _ = front.streams.set(Arc::clone(&relays));
    let stop = CancellationToken::new();
    tokio::spawn(Arc::clone(&relays).run(stop.clone()));

    let late = Arc::new(OnceLock::from(Arc::clone(&relays)));
    let incoming = incoming::incoming(tokio::net::TcpListener::from_std(listener)?, tls, stop.clone());
    let server = incoming::server().add_service(Service::serve(late));
    let closing = stop.clone();
    let server = tokio::spawn(async move {
        server.serve_with_incoming_shutdown(incoming, async move { closing.cancelled().await }).await
    });
    announce(listens);
    tracing::info!(engine = spec.url, id = %spec.id, %listens, advertised, "the agent is there");

    let host = advertised.rsplit_once(':').map_or(advertised.as_str(), |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let events = options.kv_port.map(|port| Events::new(listens.ip(), host, port));
    let replicas = Replicas::new(&options.replicas, options.node_token.as_deref(), options.ca.as_deref())?;
    let engine = Engine::new(
        Shard::new(front),
        plane,
        spec,
        options.worker.dp_ranks.is_some(),
        options.kv_source.clone(),
    );
    let registrar = Registrar {
        replicas,
        engine,
        events,
        wanted,
        directory,
        relays: Arc::clone(&relays),
        pinned: options.cluster,
    };
    let registrar = Arc::new(tokio::sync::Mutex::new(registrar));
    let registering = {
        let (registrar, stop) = (Arc::clone(&registrar), stop.clone());
        tokio::spawn(async move { registrar.lock().await.run(stop).await })
    };

    let signal = signals.next().await;
    tracing::info!(signal, "stopping; a second signal stops at once");
    let leaving = async {
        // Replicas go on with what runs, while the engine is still registered.
        relays.leave();
        relays.handed_over(options.drain).await;
        stop.cancel();
        let _ = registering.await;
        registrar.lock().await.unregister().await;
        // Replicas keep their links open: nobody reads them any more.
        server.abort();
    };
    tokio::select! {
        () = leaving => {}
        _ = signals.next() => tracing::warn!("second signal: stopping at once"),
    }
    Ok(())
}

fn listen(options: &Options) -> anyhow::Result<std::net::TcpListener> {
    let address = options.listen;
    anyhow::ensure!(
        address.ip().is_loopback() || options.peer.is_some() || options.insecure,
        "--listen {address} can be reached from other machines, and anybody there could read and order streams; give \
         the agent a certificate (--peer-cert, --peer-key, --peer-ca), or, on a network you trust, say --insecure"
    );
    let listener = bind(address, false);
    listener.with_context(|| format!("cannot listen on {address}; choose another port with --listen"))
}

fn advertised(options: &Options, listens: SocketAddr) -> anyhow::Result<String> {
    if let Some(advertised) = &options.advertise {
        let port =
            advertised.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
        let good = port.is_some_and(|(host, port)| !host.is_empty() && !host.contains('/') && port > 0);
        anyhow::ensure!(good, "--advertise {advertised} must be host:port, as replicas reach the agent");
        return Ok(advertised.clone());
    }
    anyhow::ensure!(
        !listens.ip().is_unspecified(),
        "--listen {listens} is no address that replicas could connect to; say it with --advertise host:port"
    );
    Ok(listens.to_string())
}

fn front(options: &Options, plane: Arc<dyn ControlPlane>) -> anyhow::Result<Arc<Front>> {
    let tls = crate::tls::client_config(options.engine_ca.as_deref()).context("--engine-ca")?;
    let key = options.engine_key.as_deref().map(worker_authorization).transpose();
    let pool = PoolOptions {
        tls: Some(WorkerTls::new(tls)),
        authorization: key.context("--engine-key-file")?,
        ..PoolOptions::default()
    };
    let forward = FORWARDED.iter().filter_map(|name| name.parse().ok()).collect();
    let timeouts = &options.config.proxy;
    let proxy = ProxyOptions {
        headers: HeaderRules { forward, ..HeaderRules::default() },
        // Who may come was decided where the client is.
        max_requests_per_worker: u32::MAX,
        first_byte_timeout: Duration::from_millis(timeouts.first_byte_timeout_ms),
        idle_timeout: Duration::from_millis(timeouts.idle_timeout_ms),
        ..ProxyOptions::default()
    };
    let anywhere = ["0.0.0.0/0", "::/0"].iter().filter_map(|net| net.parse().ok()).collect();
    let config = FrontConfig {
        replica: "agent".to_owned(),
        proxy,
        pool,
        // The operator says where the engine is.
        allow: Arc::new(Allowed::new(anywhere)),
        streams: stream_options(&options.config),
        ..FrontConfig::default()
    };
    let metrics = Metrics::new(AccessOptions { access: Access::Off, slow: Duration::MAX });
    Ok(Front::new(config, plane, Arc::new(metrics)))
}
