//! What the registry keeps of a worker.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{ReplicaId, WorkerId, WorkerIx};

/// Which dialect the engine behind a worker speaks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Debug, Default)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// vLLM's OpenAI server.
    #[default]
    Vllm,
    /// SGLang's OpenAI server.
    Sglang,
    /// Anything else that answers the OpenAI routes.
    #[serde(alias = "openai")]
    OpenaiCompatible,
}

impl EngineKind {
    /// The name used in JSON, flags and metrics.
    pub fn name(self) -> &'static str {
        match self {
            EngineKind::Vllm => "vllm",
            EngineKind::Sglang => "sglang",
            EngineKind::OpenaiCompatible => "openai-compatible",
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What part of a request a worker does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Debug, Default)]
#[serde(rename_all = "lowercase")]
pub enum WorkerRole {
    /// Prefill and decode in one engine.
    #[default]
    Aggregated,
    /// Prefill only (disaggregated serving).
    Prefill,
    /// Decode only (disaggregated serving).
    Decode,
}

impl WorkerRole {
    /// The name used in JSON, flags and metrics.
    pub fn name(self) -> &'static str {
        match self {
            WorkerRole::Aggregated => "aggregated",
            WorkerRole::Prefill => "prefill",
            WorkerRole::Decode => "decode",
        }
    }
}

/// How an engine that does a part of a request hands the KV cache on, or gets it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Connector {
    /// vLLM's NIXL connectors, pulling or pushing: the prefill's answer says where its blocks are, for
    /// the decode worker to see.
    Nixl,
    /// vLLM's Mooncake connector: both parts run at once, under an id that the router makes.
    Mooncake,
    /// vLLM's P2pNccl connector (before 0.24): the addresses of both are in the request's id.
    P2pNccl,
    /// vLLM's MoRI-IO connector: as NIXL, with an id that the router makes and both addresses in the
    /// request's id.
    Moriio,
    /// A store that both know (LMCache, shared storage): nothing is said of it.
    Shared,
    /// SGLang: both parts run at once, under a room number that the router makes.
    Sglang,
}

impl Connector {
    /// All of them, in the order of their declaration.
    pub const ALL: [Connector; 6] = [
        Connector::Nixl,
        Connector::Mooncake,
        Connector::P2pNccl,
        Connector::Moriio,
        Connector::Shared,
        Connector::Sglang,
    ];

    /// The name used in JSON, flags and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Connector::Nixl => "nixl",
            Connector::Mooncake => "mooncake",
            Connector::P2pNccl => "p2p-nccl",
            Connector::Moriio => "moriio",
            Connector::Shared => "shared",
            Connector::Sglang => "sglang",
        }
    }

    /// Whether an engine that decodes can do a whole request by itself: SGLang's asks for a room, and
    /// P2pNccl for an id with addresses.
    pub fn decodes_alone(self) -> bool {
        !matches!(self, Connector::Sglang | Connector::P2pNccl)
    }

    /// Whether the engines' addresses for each other have to be registered.
    pub fn wants_side_channel(self) -> bool {
        matches!(self, Connector::P2pNccl | Connector::Moriio)
    }
}

/// What is known of handing the KV cache on, of a worker that does a part of a request.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Debug, Default)]
pub struct KvTransfer {
    /// How; where left out, as the engine ordinarily does.
    #[serde(default)]
    pub connector: Option<Connector>,
    /// Where decode workers find this prefill worker; where left out, the host of its URL.
    #[serde(default)]
    pub bootstrap_host: Option<String>,
    /// ... and at which port; where left out, [`KvTransfer::BOOTSTRAP_PORT`].
    #[serde(default)]
    pub bootstrap_port: Option<u16>,
    /// Its address for the engines it hands over to or gets from, where those are told it by the router.
    #[serde(default)]
    pub side_channel: Option<String>,
}

impl KvTransfer {
    /// What SGLang and vLLM's Mooncake connector listen on where nobody says otherwise.
    pub const BOOTSTRAP_PORT: u16 = 8998;
}

/// Who put a worker into the registry; a source may only take back what it put in itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Debug)]
#[serde(rename_all = "lowercase")]
pub enum WorkerSource {
    /// `[[workers]]` of a configuration file.
    Config,
    /// `everline worker add` or the admin API.
    Admin,
    /// `POST /v1/nodes`: the engine or its agent registered itself.
    Node,
    /// `[[discover]]`: an endpoint of a name.
    Name,
}

/// A model that a worker serves. Goes through [`crate::codec`]: no member may be skipped when
/// it is written.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize, Debug)]
pub struct ServedModel {
    /// The name clients ask for, as in the engine's `/v1/models`.
    pub name: String,
    /// For a LoRA adapter: the base model's name.
    #[serde(default)]
    pub lora_of: Option<String>,
    /// Longest context in tokens, where the engine says so.
    #[serde(default)]
    pub max_model_len: Option<u32>,
}

/// How the registry learns that a worker is alive.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Debug, Default)]
#[serde(rename_all = "lowercase")]
pub enum Liveness {
    /// Replicas probe the engine's health route.
    #[default]
    Probe,
    /// The worker has heartbeated at least once and is held to it.
    Heartbeat,
}

/// The label that says where a worker's node agent is: `host:port`. It holds the worker's streams.
pub const AGENT_LABEL: &str = "everline-agent";
/// A label: the name that the agent's certificate has to show, where there are certificates.
pub const AGENT_NAME_LABEL: &str = "everline-agent-name";

/// A label of workers that are endpoints of a name: the name.
pub const NAME_LABEL: &str = "everline-name";

/// A worker as it was registered: everything that routing may want to know and that does not
/// change from one second to the next.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct WorkerSpec {
    /// Unique over the cluster.
    pub id: WorkerId,
    /// `http://host:port`, no trailing slash, no path.
    pub url: String,
    /// The dialect spoken there.
    #[serde(default)]
    pub engine: EngineKind,
    /// Models and LoRA adapters served. At most 256.
    #[serde(default)]
    pub models: Vec<ServedModel>,
    /// Part of the request it does.
    #[serde(default)]
    pub role: WorkerRole,
    /// How it hands the KV cache on, if it does but a part.
    #[serde(default)]
    pub transfer: KvTransfer,
    /// Data-parallel ranks behind this URL, 1 to 1024.
    #[serde(default = "one")]
    pub dp_ranks: u32,
    /// Tokens in a KV block, where known.
    #[serde(default)]
    pub block_size: Option<u32>,
    /// KV blocks the engine can hold, where known.
    #[serde(default)]
    pub capacity_blocks: Option<u64>,
    /// Free-form `key=value` pairs for filters. At most 64.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Relative share of traffic, 1 to 1000; 100 is ordinary.
    #[serde(default = "hundred")]
    pub weight: u32,
    /// Speak HTTP/2 to it, with prior knowledge where the URL is `http://`.
    #[serde(default)]
    pub http2: bool,
    /// Requests it should have at once, over the whole cluster; more wait. Where left out,
    /// what each replica is configured with.
    #[serde(default)]
    pub max_requests: Option<u32>,
    /// Name of the node token it was registered with, which alone may speak for it on the node
    /// plane while it is online.
    #[serde(default)]
    pub owner: Option<String>,
    /// Who registered it.
    pub source: WorkerSource,
}

fn one() -> u32 {
    1
}

fn hundred() -> u32 {
    100
}

impl WorkerSpec {
    /// Where its agent is reached, and the name that the certificate there has to show.
    pub fn agent(&self) -> Option<(String, Option<String>)> {
        Some((self.labels.get(AGENT_LABEL)?.clone(), self.labels.get(AGENT_NAME_LABEL).cloned()))
    }

    /// How it hands the KV cache on, if it does but a part of a request.
    pub fn connector(&self) -> Connector {
        self.transfer.connector.unwrap_or(match self.engine {
            EngineKind::Vllm => Connector::Nixl,
            EngineKind::Sglang => Connector::Sglang,
            EngineKind::OpenaiCompatible => Connector::Shared,
        })
    }

    /// Where decode workers find this prefill worker. An IPv6 address has its brackets.
    pub fn bootstrap(&self) -> (&str, u16) {
        let authority = self.url.split_once("://").map_or(self.url.as_str(), |(_, rest)| rest);
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => host,
            _ => authority,
        };
        let transfer = &self.transfer;
        let host = transfer.bootstrap_host.as_deref().unwrap_or(host);
        (host, transfer.bootstrap_port.unwrap_or(KvTransfer::BOOTSTRAP_PORT))
    }

    /// Whether it can do a whole request by itself.
    pub fn works_alone(&self) -> bool {
        match self.role {
            WorkerRole::Aggregated => true,
            WorkerRole::Prefill => false,
            WorkerRole::Decode => self.connector().decodes_alone(),
        }
    }

    fn validate_transfer(&self) -> Result<(), String> {
        let transfer = &self.transfer;
        if self.role == WorkerRole::Aggregated {
            if *transfer != KvTransfer::default() {
                let text = "connector, bootstrap_host, bootstrap_port and side_channel are for workers of the role \
                            prefill or decode";
                return Err(text.to_owned());
            }
            return Ok(());
        }
        for (what, text) in
            [("bootstrap_host", &transfer.bootstrap_host), ("side_channel", &transfer.side_channel)]
        {
            let Some(text) = text else { continue };
            bound(what, text.len(), Self::MAX_TEXT)?;
            // They become parts of headers, addresses and ids.
            let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-._:,[]".contains(&b);
            if text.is_empty() || !text.bytes().all(is_plain) || text.contains("___") {
                return Err(format!("{what} {text:?} must be an address"));
            }
        }
        if transfer.bootstrap_port == Some(0) {
            return Err("bootstrap_port must be 1 to 65535".to_owned());
        }
        let connector = self.connector();
        if (connector == Connector::Sglang) != (self.engine == EngineKind::Sglang) {
            return Err(format!("engine {} does not go with connector {}", self.engine, connector.name()));
        }
        if connector.wants_side_channel() && transfer.side_channel.is_none() {
            return Err(format!(
                "connector {} needs side_channel, the engine's zmq_address",
                connector.name()
            ));
        }
        Ok(())
    }

    /// Most models of one worker.
    pub const MAX_MODELS: usize = 256;
    /// Most data-parallel ranks of one worker.
    pub const MAX_RANKS: u32 = 1024;
    /// Most labels of one worker.
    pub const MAX_LABELS: usize = 64;
    /// Longest model name, label key, label value and URL, in bytes.
    pub const MAX_TEXT: usize = 512;

    /// Checks every bound; the error names the member and the limit. The address itself is
    /// checked against `workers.allow` elsewhere, because that is configuration.
    pub fn validate(&self) -> Result<(), String> {
        WorkerId::parse(self.id.as_str())?;
        let rest = self
            .url
            .strip_prefix("http://")
            .or_else(|| self.url.strip_prefix("https://"))
            .ok_or_else(|| format!("url {:?} must start with http:// or https://", self.url))?;
        if rest.is_empty() || rest.contains(['/', '?', '#', '@', ' ']) || self.url.len() > Self::MAX_TEXT {
            return Err(format!("url {:?} must be scheme://host:port with nothing behind it", self.url));
        }
        bound("models", self.models.len(), Self::MAX_MODELS)?;
        bound("labels", self.labels.len(), Self::MAX_LABELS)?;
        for model in &self.models {
            if model.name.is_empty() {
                return Err("a model name is empty".to_owned());
            }
            bound("a model name", model.name.len(), Self::MAX_TEXT)?;
            bound("lora_of", model.lora_of.as_deref().unwrap_or_default().len(), Self::MAX_TEXT)?;
        }
        for (key, value) in &self.labels {
            bound("a label", key.len().max(value.len()), Self::MAX_TEXT)?;
        }
        if !(1..=Self::MAX_RANKS).contains(&self.dp_ranks) {
            return Err(format!("dp_ranks must be 1 to {}, this is {}", Self::MAX_RANKS, self.dp_ranks));
        }
        if !(1..=1000).contains(&self.weight) {
            return Err(format!("weight must be 1 to 1000, this is {}", self.weight));
        }
        if self.block_size == Some(0) || self.capacity_blocks == Some(0) || self.max_requests == Some(0) {
            return Err(
                "block_size, capacity_blocks and max_requests must be greater than 0 where given".to_owned()
            );
        }
        self.validate_transfer()
    }

    /// Whether a node with this token may speak for the worker.
    pub fn is_owned_by(&self, token: Option<&str>) -> bool {
        self.owner.is_none() || self.owner.as_deref() == token
    }

    /// Whether the worker serves `model` (a model or an adapter).
    pub fn serves(&self, model: &str) -> bool {
        self.models.iter().any(|m| m.name == model)
    }
}

fn bound(what: &str, is: usize, most: usize) -> Result<(), String> {
    if is > most { Err(format!("{what} must be at most {most}, this is {is}")) } else { Ok(()) }
}

/// A worker's place in the replicated registry.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct WorkerRecord {
    /// As registered.
    pub spec: WorkerSpec,
    /// Short name in the cache group's mutations; given once, never to another worker.
    pub ix: WorkerIx,
    /// An operator asked for no new requests.
    pub drain: bool,
    /// Committed by the cluster: heard from (or probed well) within the timeout.
    pub online: bool,
    /// How it is told to be alive.
    pub liveness: Liveness,
    /// Cluster time (see [`crate::state::control::ControlState::now_ms`]) when it was last heard of.
    pub last_heard_ms: u64,
    /// Counts up whenever the worker is registered again.
    pub generation: u64,
    /// Replicas whose probe failed since the last sign of life.
    pub failed_by: BTreeSet<ReplicaId>,
}
