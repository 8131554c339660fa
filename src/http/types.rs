//! The JSON of the node and admin planes.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::cluster::api::ClusterStatus;
use crate::ids::WorkerId;
use crate::state::worker::{EngineKind, Liveness, ServedModel, WorkerRole, WorkerSource};

/// `POST /v1/nodes` and `POST /v1/admin/workers`. Members not given are asked of the worker.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct RegisterRequest {
    /// `http://host:port`.
    pub url: String,
    /// Unique over the cluster; by default `host:port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The dialect; by default what the worker's metrics give away, else vLLM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    /// Models served, as names or objects; by default what `/v1/models` lists.
    #[serde(default, deserialize_with = "names_or_objects", skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<ServedModel>,
    /// Part of a request it does.
    #[serde(default)]
    pub role: WorkerRole,
    /// Data-parallel ranks behind the URL.
    #[serde(default = "one")]
    pub dp_ranks: u32,
    /// Tokens in a KV block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
    /// KV blocks it can hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_blocks: Option<u64>,
    /// Free-form labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Relative share of traffic, 100 is ordinary.
    #[serde(default = "hundred")]
    pub weight: u32,
    /// Whether it will heartbeat; else it is probed. By default true on the node plane and
    /// false on the admin plane.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<bool>,
    /// Whether to ask the worker about itself before it is registered.
    #[serde(default = "yes")]
    pub probe: bool,
}

fn one() -> u32 {
    1
}

fn hundred() -> u32 {
    100
}

fn yes() -> bool {
    true
}

fn names_or_objects<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ServedModel>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Name(String),
        Object(ServedModel),
    }
    let given = Vec::<Either>::deserialize(deserializer)?;
    Ok(given
        .into_iter()
        .map(|either| match either {
            Either::Name(name) => ServedModel { name, lora_of: None, max_model_len: None },
            Either::Object(model) => model,
        })
        .collect())
}

/// `GET /v1/admin/status`.
#[derive(Clone, Serialize, Deserialize, Debug)]
pub struct StatusReply {
    /// The cluster as this replica sees it.
    pub cluster: ClusterStatus,
    /// All workers.
    pub workers: Vec<WorkerStatus>,
    /// Everline's version.
    pub version: String,
    /// Seconds since this replica started.
    pub uptime_s: u64,
    /// The newest errors, newest first.
    pub recent_errors: Vec<RecentError>,
}

/// An error this replica remembers.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct RecentError {
    /// How long ago, in milliseconds.
    pub at_ms_ago: u64,
    /// What happened.
    pub what: String,
}

/// One worker, as registered and as it is doing.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct WorkerStatus {
    /// Its id.
    pub id: WorkerId,
    /// Its address.
    pub url: String,
    /// The dialect spoken there.
    pub engine: EngineKind,
    /// Part of a request it does.
    pub role: WorkerRole,
    /// Models and adapters served.
    pub models: Vec<ServedModel>,
    /// By the cluster's decision.
    pub online: bool,
    /// An operator asked for no new requests.
    pub drain: bool,
    /// Who registered it.
    pub source: WorkerSource,
    /// How it is told to be alive.
    pub liveness: Liveness,
    /// Requests booked on it, cluster-wide.
    pub requests: i64,
    /// Prompt tokens booked whose prefill is outstanding.
    pub prefill_tokens: i64,
    /// KV blocks booked.
    pub decode_blocks: i64,
    /// This replica could connect to it last.
    pub reachable: bool,
    /// Counts its registrations.
    pub generation: u64,
    /// Relative share of traffic.
    pub weight: u32,
    /// Tokens in a KV block.
    pub block_size: Option<u32>,
    /// KV blocks it can hold.
    pub capacity_blocks: Option<u64>,
    /// How long ago it was heard of, where known.
    pub last_heard_ms_ago: Option<u64>,
}

/// The body of an error.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct ErrorReply {
    /// The error.
    pub error: ErrorObject,
}

/// OpenAI's error object.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct ErrorObject {
    /// What happened, why, what to do.
    pub message: String,
    /// Its family.
    #[serde(rename = "type")]
    pub kind: String,
    /// The member of the request at fault.
    pub param: Option<String>,
    /// Stable code.
    pub code: Option<String>,
}
