//! Runs an edge: the HTTP front over a directory that is asked of replicas, and no cluster part.
//!
//! On SIGTERM or SIGINT: `/readyz` goes off; after `http.drain_settle_ms` (SIGTERM only) the client
//! listener closes, clients that can come back are let go between two events, and what is in flight
//! may finish for `http.shutdown_grace_ms`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use anyhow::Context;
use ipnet::IpNet;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio_util::sync::CancellationToken;

use super::{
    SIGTERM, Signals, access_options, front_config, front_runtime, let_clients_go, listen, ms, pool_options,
    raise_file_limit, start_logging, tracing, warn_before_expiry,
};
use crate::cluster::api::{ClusterStatus, ControlPlane, MemberStatus};
use crate::cluster::down::DownPlane;
use crate::cluster::peer::dial::Dialer;
use crate::config::{Certificates, Config, ConfigErrors};
use crate::http::{
    Allowed, Front, FrontConfig, Metrics, NoEngines, ProcessGauges, WorkerTls, serve_admin, serve_client,
};
use crate::ids::{Incarnation, ReplicaId};
use crate::relay::directory::Address;
use crate::relay::hub::Relays;
use crate::relay::remote::{OfRemote, Remote};
use crate::serve::keys::KeysFile;
use crate::serve::streams::relay_options;
use crate::state::command::ReplicaInfo;
use crate::telemetry::log;

/// Runs an edge until it is told to stop.
pub fn run(config: &Config) -> anyhow::Result<()> {
    start_logging(&config.log);
    let certificates = Certificates::open(config).map_err(ConfigErrors)?;
    raise_file_limit(config.http.max_connections);
    let http = listen("http", config.http.listen)?;
    let admin = listen("admin", config.admin.listen)?;
    let runtime = front_runtime()?;
    let streams = super::streams::runtime()?;
    let result = runtime.block_on(serve(config, &certificates, http, admin, streams.handle()));
    runtime.shutdown_background();
    streams.shutdown_background();
    result
}

async fn serve(
    config: &Config,
    certificates: &Certificates,
    http: std::net::TcpListener,
    admin: std::net::TcpListener,
    streams: &tokio::runtime::Handle,
) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot listen for signals")?;
    let dialer = Dialer::new(certificates.peer.clone());
    let remote = Remote::new(dialer.clone(), seeds(config), tokio::runtime::Handle::current());
    let expiring = certificates.clone();
    let metrics = Metrics::new(access_options(&config.log))
        .with_tracing(tracing(&config.replica.name))
        .with_collector(ProcessGauges::new(move || expiring.expiries()))
        .with_collector(ReachGauges(Arc::clone(&remote)));
    let metrics = Arc::new(metrics);
    let tls = crate::tls::client_config(config.edge.tls_ca.as_deref()).context("edge.tls_ca")?;
    let front_config = FrontConfig {
        // Where replicas are is for the cluster to say: it is asked over certified links.
        allow: Arc::new(Allowed::new(everywhere())),
        pool: crate::http::PoolOptions {
            tls: Some(WorkerTls::new(tls)),
            // That is for workers.
            authorization: None,
            ..pool_options(config)?
        },
        edge: Some(Arc::clone(&remote)),
        ..front_config(config, certificates)
    };
    let keys_file = KeysFile::load(config, Arc::clone(&front_config.keys))?;
    let plane: Arc<dyn ControlPlane> = Arc::new(plane(&config.replica.name, &remote));
    let front = Front::new(front_config, plane, Arc::clone(&metrics));
    let directory = Arc::new(OfRemote(Arc::clone(&remote)));
    let relays = Relays::new(relay_options(config), directory, dialer, streams.clone());
    relays.set_engines(Arc::new(NoEngines));
    remote.look().await;
    relays.look();
    let _ = front.streams.set(Arc::clone(&relays));
    // These end with the runtime: streams outlive the listeners.
    tokio::spawn(Arc::clone(&remote).run(CancellationToken::new()));
    tokio::spawn(relays.run(CancellationToken::new()));
    tokio::spawn(warn_before_expiry(certificates.clone()));
    tokio::spawn(log::tell_what_is_left_out());
    for tls in [&certificates.http, &certificates.admin].into_iter().flatten() {
        let tls = Arc::clone(tls);
        tokio::spawn(async move { tls.watch().await });
    }
    if let Some(tls) = certificates.peer.clone() {
        tokio::spawn(async move { tls.watch().await });
    }
    let (shutdown, admin_shutdown) = (CancellationToken::new(), CancellationToken::new());
    tracing::info!(
        name = config.replica.name,
        http = %config.http.listen,
        admin = %config.admin.listen,
        replicas = remote.replicas().len(),
        "serving as an edge"
    );
    let clients = tokio::spawn(serve_client(http, Arc::clone(&front), shutdown.clone()));
    let operators = tokio::spawn(serve_admin(admin, Arc::clone(&front), admin_shutdown.clone()));
    if let Some(file) = keys_file {
        tokio::spawn(file.follow(shutdown.clone()));
    }

    let signal = signals.next().await;
    tracing::info!(signal, "stopping; a second signal stops at once");
    let stop = async {
        front.draining.cancel();
        // A person at a terminal has no balancer that must notice first.
        if signal == SIGTERM {
            tokio::time::sleep(ms(config.http.drain_settle_ms)).await;
        }
        let_clients_go(&front, clients, &shutdown, ms(config.http.shutdown_grace_ms)).await;
        admin_shutdown.cancel();
        let _ = operators.await;
        let _ = tokio::task::spawn_blocking(move || metrics.flush_spans()).await;
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
    Ok(())
}

/// Where replicas are, as configured.
fn seeds(config: &Config) -> Vec<Address> {
    let named = config.cluster.peers.iter().map(|peer| (peer.address.clone(), Some(peer.name.clone())));
    named.chain(config.cluster.join.iter().map(|address| (address.clone(), None))).collect()
}

fn everywhere() -> Vec<IpNet> {
    let v4 = IpNet::new_assert(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
    let v6 = IpNet::new_assert(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);
    vec![v4, v6]
}

/// The cluster as this edge's gauges show it; it can be asked for nothing.
fn plane(name: &str, remote: &Arc<Remote>) -> DownPlane {
    let (own, remote) = (name.to_owned(), Arc::clone(remote));
    let why = "this is an edge, which takes no part in the cluster; ask a replica".to_owned();
    DownPlane::new(name, why).seeing(move || {
        let members = remote.replicas().into_iter().map(|member| MemberStatus {
            id: member.peer.id,
            info: ReplicaInfo {
                name: member.peer.name,
                peer: member.peer.address,
                http: member.http,
                admin: String::new(),
                version: String::new(),
            },
            incarnation: None,
            membership: "voter".to_owned(),
            alive: member.peer.alive,
            lag: None,
            leads_control: false,
            leads_cache: member.peer.leads,
            requests: 0,
            view_age_ms: None,
        });
        ClusterStatus {
            cluster_id: remote.seen().cluster,
            me: ReplicaId::default(),
            name: own.clone(),
            incarnation: Incarnation::default(),
            quorum: remote.reach().quorum,
            current: true,
            down: None,
            groups: Vec::new(),
            members: members.collect(),
        }
    })
}

/// What an edge can reach, read at the moment of a scrape.
struct ReachGauges(Arc<Remote>);

impl fmt::Debug for ReachGauges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReachGauges")
    }
}

impl Collector for ReachGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let reach = self.0.reach();
        let alive = self.0.replicas().iter().filter(|member| member.peer.alive).count();
        for (name, help, value) in [
            (
                "edge_replicas_alive",
                "Replicas that the cluster hears, as this edge was told last",
                alive as u64,
            ),
            ("edge_replica_reachable", "1 while a replica answers this edge", reach.replica.into()),
            (
                "edge_quorum",
                "1 while the replica that answers knows a leader and a quorum",
                reach.quorum.into(),
            ),
        ] {
            let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(gauge)?;
        }
        Ok(())
    }
}
