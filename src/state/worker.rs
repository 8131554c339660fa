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
    /// Most models of one worker.
    pub const MAX_MODELS: usize = 256;
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
        if !(1..=1024).contains(&self.dp_ranks) {
            return Err(format!("dp_ranks must be 1 to 1024, this is {}", self.dp_ranks));
        }
        if !(1..=1000).contains(&self.weight) {
            return Err(format!("weight must be 1 to 1000, this is {}", self.weight));
        }
        if self.block_size == Some(0) || self.capacity_blocks == Some(0) || self.max_requests == Some(0) {
            return Err(
                "block_size, capacity_blocks and max_requests must be greater than 0 where given".to_owned()
            );
        }
        Ok(())
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
