//! `everline agent`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::client::read_token;
use super::output::{Failure, Out};
use super::serve::overrides;
use super::urls;
use super::worker::{parse_name, parse_pair};
use crate::admin_types::{ModelEntry, RegisterRequest};
use crate::agent::{Options, run};
use crate::config::{Config, LogConfig, Role, node_token, variables};
use crate::state::worker::EngineKind;
use crate::tls::peer::PeerFiles;

/// Run the node agent beside an engine
///
/// It registers the engine and heartbeats to any replica, and holds its output streams: all
/// replicas may die, and the engine goes on generating. Replicas reach it at --listen; with
/// --kv-port it also offers the engine's KV events, from wherever the engine publishes them.
/// SIGTERM hands streams over to replicas and unregisters the engine.
///
/// Examples:
///   everline agent --engine http://127.0.0.1:8000 --replica http://10.0.0.1:8080,http://10.0.0.2:8080 \
///                  --listen 10.0.1.1:8083 --advertise-engine http://10.0.1.1:8000 --name gpu-1 \
///                  --peer-ca ca.crt --peer-cert gpu-1.crt --peer-key gpu-1.key
///   everline agent --engine http://127.0.0.1:8000 --replica 127.0.0.1:8080 --listen 127.0.0.1:8083 --kv-port 0
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// The engine as the agent reaches it
    #[arg(long, value_name = "URL", value_parser = urls::engine)]
    engine: String,
    /// The engine as replicas reach it, for what is no stream [default: --engine]
    #[arg(long, value_name = "URL", value_parser = urls::engine)]
    advertise_engine: Option<String>,
    /// Client listeners of replicas, or of what is before them; another one is asked when one does not answer
    #[arg(long, value_name = "URL", required = true, value_delimiter = ',', value_parser = urls::base)]
    replica: Vec<String>,
    /// Where replicas come for streams; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:8083")]
    listen: SocketAddr,
    /// The same as replicas reach it [default: --listen]
    #[arg(long, value_name = "HOST:PORT", value_parser = urls::host_port)]
    advertise: Option<String>,
    /// The worker's id [default: host:port of the engine as replicas reach it]
    #[arg(long)]
    id: Option<String>,
    /// A model that the engine serves; may be given more than once [default: what it says]
    #[arg(long)]
    model: Vec<String>,
    /// The engine's dialect [default: what its metrics give away]
    #[arg(long, value_name = "KIND", value_parser = parse_name::<EngineKind>)]
    engine_kind: Option<EngineKind>,
    /// Data-parallel ranks behind the engine's URL [default: what it says]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    dp_ranks: Option<u32>,
    /// A label of the worker; may be given more than once
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    label: Vec<(String, String)>,
    /// Relative share of traffic; 100 is ordinary
    #[arg(long, value_name = "N")]
    weight: Option<u32>,
    /// File with the node token, if replicas want one [default: EVERLINE_NODE_TOKEN]
    #[arg(long, value_name = "FILE")]
    node_token_file: Option<PathBuf>,
    /// Authority that https replicas' certificates must be of (PEM) [default: Mozilla's list]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Name in the agent's certificate
    #[arg(long, requires = "peer_cert")]
    name: Option<String>,
    /// The cluster's authority (PEM), as replicas have it
    #[arg(long, value_name = "FILE", requires = "peer_cert")]
    peer_ca: Option<PathBuf>,
    /// The agent's certificate (PEM), from `everline certs issue NAME`
    #[arg(long, value_name = "FILE", requires_all = ["name", "peer_ca", "peer_key"])]
    peer_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", requires = "peer_cert")]
    peer_key: Option<PathBuf>,
    /// Listen for other machines without certificates, on a network you trust
    #[arg(long)]
    insecure: bool,
    /// Id of the only cluster to belong to [default: what replicas say]
    #[arg(long, value_name = "ID")]
    cluster: Option<String>,
    /// Forward the engine's KV events from this port of --listen's address; 0 takes free ones. Ranks' ports count up, then those for replays
    #[arg(long, value_name = "PORT")]
    kv_port: Option<u16>,
    /// Where the engine publishes its KV events, if it cannot be asked: tcp://host:port or ipc://path
    #[arg(long, value_name = "ENDPOINT", requires = "kv_port", value_parser = urls::events)]
    kv_events: Option<String>,
    /// Where it says them again
    #[arg(long, value_name = "ENDPOINT", requires = "kv_events", value_parser = urls::events)]
    kv_replay: Option<String>,
    /// Topic of its events
    #[arg(long, value_name = "TOPIC", requires = "kv_events")]
    kv_topic: Option<String>,
    /// File with the engine's API key
    #[arg(long, value_name = "FILE")]
    engine_key_file: Option<PathBuf>,
    /// Authority that an https engine's certificate must be of (PEM) [default: Mozilla's list]
    #[arg(long, value_name = "FILE")]
    engine_ca: Option<PathBuf>,
    /// Seconds that streams may take to be taken over after SIGTERM
    #[arg(long, value_name = "S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    drain_timeout: u64,
    /// The replicas' configuration file: [streams], [[model]] and the times of [proxy] hold here, too
    #[arg(long, short, env = "EVERLINE_CONFIG", hide_env_values = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set any key of it, such as streams.replica_bytes; may be given more than once
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// What is logged, such as info or everline=debug
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log_filter: String,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        crate::serve::start_logging(&LogConfig { filter: self.log_filter.clone(), ..LogConfig::default() });
        let options = self.options()?;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().thread_name("agent").enable_all().build()?;
        runtime.block_on(async {
            let mut said = Ok(());
            let announce = |address| said = out.line(&format!("agent listening on {address}"));
            run(options, announce).await?;
            said
        })
    }

    fn options(self) -> Result<Options, Failure> {
        let overrides = overrides(&[], &self.set)?;
        let loaded = Config::load_as(Role::Agent, self.config.as_deref(), &mut variables(), &overrides)?;
        let node_token = match &self.node_token_file {
            None => node_token(),
            Some(path) => Some(read_token("--node-token-file", path)?),
        };
        let mut worker = RegisterRequest::new(self.engine);
        worker.id = match (self.id, &self.advertise_engine) {
            (Some(id), _) => Some(id),
            (None, None) => None,
            (None, Some(url)) => {
                let rest = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
                Some(rest.trim_end_matches('/').replace(['[', ']'], ""))
            }
        };
        worker.models = self.model.into_iter().map(ModelEntry::Name).collect();
        worker.engine = self.engine_kind;
        worker.dp_ranks = self.dp_ranks;
        worker.labels = self.label.into_iter().collect();
        worker.weight = self.weight;
        let peer = match (self.name, self.peer_ca, self.peer_cert, self.peer_key) {
            (Some(name), Some(ca), Some(cert), Some(key)) => Some((name, PeerFiles { ca, cert, key })),
            _ => None,
        };
        Ok(Options {
            worker,
            advertise_engine: self.advertise_engine,
            engine_key: self.engine_key_file,
            engine_ca: self.engine_ca,
            replicas: self.replica,
            node_token,
            ca: self.ca,
            listen: self.listen,
            advertise: self.advertise,
            peer,
            cluster: self.cluster,
            kv_port: self.kv_port,
            kv_source: self.kv_events.map(|events| (events, self.kv_replay, self.kv_topic)),
            insecure: self.insecure,
            drain: Duration::from_secs(self.drain_timeout),
            config: loaded.config,
        })
    }
}
