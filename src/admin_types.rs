//! What the admin listener says and takes, as JSON: shared by the server, the CLI and tests.

pub mod ksana;
pub mod names;
mod routing;
mod streams;

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use crate::cluster::api::{ClusterStatus, MemberStatus};
use crate::ids::WorkerId;
use crate::state::streams::StreamEnd;
use crate::state::worker::{
    Connector, EngineKind, KvTransfer, Liveness, ServedModel, WorkerRole, WorkerSource, WorkerSpec,
};

pub use self::routing::{
    CacheStatus, CandidateReply, CostReply, ExplainReply, ExplainRequest, FeedStatus, IndexCounters,
    IndexReply, Known, MOST_EXPLAINED, PrefillReply, RankStatus, TierBlocks,
};
pub use self::streams::{StreamAtAgent, StreamCopy, StreamNumbers, StreamReply, StreamStatus, StreamsReply};

/// `GET /v1/admin/status`
#[derive(Clone, Serialize, Deserialize, Debug)]
pub struct StatusReply {
    /// The cluster as the answering replica sees it.
    pub cluster: ClusterStatus,
    /// The registry with loads.
    pub workers: Vec<WorkerStatus>,
    /// Everline's version.
    pub version: String,
    /// Seconds since the answering replica started.
    pub uptime_s: u64,
    /// Client requests the answering replica has taken since it started.
    #[serde(default)]
    pub requests_total: u64,
    /// What went wrong lately at the answering replica, newest first; at most 16.
    #[serde(default)]
    pub recent_errors: Vec<RecentError>,
    /// Output streams at the answering replica; nothing where it keeps none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub streams: Option<StreamNumbers>,
    /// What is wrong with the answering replica's name service, a line for each name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub name_troubles: Vec<String>,
}

/// Something that went wrong.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct RecentError {
    /// How long ago.
    pub at_ms_ago: u64,
    /// What; never prompts or outputs.
    pub what: String,
}

/// What stands between the answering replica and a worker that fails.
#[derive(Clone, Copy, Serialize, Deserialize, Debug, PartialEq, Eq, Default)]
#[serde(rename_all = "kebab-case")]
pub enum BreakerState {
    /// Nothing: requests pass.
    #[default]
    Closed,
    /// A few requests pass, to see whether it is well again.
    HalfOpen,
    /// No request passes while another worker can take it.
    Open,
}

/// A worker with its load and health.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq)]
pub struct WorkerStatus {
    /// Its id.
    pub id: WorkerId,
    /// Its base URL.
    pub url: String,
    /// The dialect spoken there.
    pub engine: EngineKind,
    /// The part of a request it does.
    pub role: WorkerRole,
    /// How it hands the KV cache on, if it does but a part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connector: Option<Connector>,
    /// Names of the models and adapters it serves.
    pub models: Vec<String>,
    /// Alive, by committed decision.
    pub online: bool,
    /// Gets no new requests.
    pub drain: bool,
    /// Who registered it.
    pub source: WorkerSource,
    /// How it is told to be alive.
    pub liveness: Liveness,
    /// Requests in flight, cluster-wide.
    pub requests: i64,
    /// Prompt tokens whose prefill is outstanding.
    pub prefill_tokens: i64,
    /// KV blocks held by running requests, predicted.
    pub decode_blocks: i64,
    /// Whether the answering replica could connect lately.
    pub reachable: bool,
    /// The answering replica's breaker.
    #[serde(default)]
    pub breaker: BreakerState,
    /// Counts registrations.
    pub generation: u64,
    /// Relative share of traffic; 100 is ordinary.
    pub weight: u32,
    /// Spoken to in HTTP/2.
    #[serde(default)]
    pub http2: bool,
    /// Requests it should have at once, where its registration says.
    #[serde(default)]
    pub max_requests: Option<u32>,
    /// Tokens in a KV block, where known.
    pub block_size: Option<u32>,
    /// KV blocks the engine can hold, where known.
    pub capacity_blocks: Option<u64>,
    /// What is known of its cache; only in a [`StatusReply`], and only if something is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheStatus>,
}

/// `GET /v1/admin/workers`
#[derive(Clone, Serialize, Deserialize, Debug)]
pub struct WorkersReply {
    /// All workers, by id.
    pub workers: Vec<WorkerStatus>,
}

/// `GET /v1/admin/members`
#[derive(Clone, Serialize, Deserialize, Debug)]
pub struct MembersReply {
    /// All members, by id.
    pub members: Vec<MemberStatus>,
}

/// `GET /v1/admin/keys`
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct KeysReply {
    /// Whether clients need a key here.
    pub required: bool,
    /// The keys in force at the answering replica, by id.
    pub keys: Vec<KeyStatus>,
}

/// An API key in force, with what it did at the answering replica; never its secret.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct KeyStatus {
    /// What it is called.
    pub id: String,
    /// Models it may use; all where left out.
    pub models: Option<Vec<String>>,
    /// From when on it is refused, in seconds since 1970; never where left out.
    pub expires_unix_s: Option<u64>,
    /// Whether that time has come.
    pub expired: bool,
    /// Requests in flight.
    pub in_flight: u32,
    /// Requests let in since the start.
    pub admitted: u64,
    /// Requests refused for its limits since the start.
    pub limited: u64,
}

/// What a registration answers.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct RegisteredReply {
    /// The worker's id.
    pub id: WorkerId,
    /// Whether a record stood there before.
    pub replaced: bool,
    /// Counts registrations of this id.
    pub generation: u64,
    /// The same as a sentence.
    pub message: String,
    /// How often it should heartbeat, milliseconds; only for `POST /v1/nodes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
    /// The cluster's id, which agents name to replicas; only for `POST /v1/nodes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
}

/// What a heartbeat may say besides: of the streams that the node's agent holds, what nobody else tells.
#[derive(Clone, Serialize, Deserialize, Debug, Default, PartialEq, Eq)]
pub struct HeartbeatRequest {
    /// What no replica has booked, rank by rank; ranks without such streams may be left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub running: Vec<RunningOnRank>,
    /// Streams that have ended there without anybody reading the end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ended: Vec<EndedStream>,
}

/// A stream that has ended.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct EndedStream {
    /// Its id.
    pub id: String,
    /// Counts take-overs.
    pub attempt: u32,
    /// How it ended.
    pub how: EndedAs,
    /// How long it is kept there, milliseconds.
    pub keep_ms: u32,
}

/// How a stream has ended.
#[derive(Clone, Copy, Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum EndedAs {
    /// With its last event.
    Completed,
    /// It was told to, or no client came back.
    Cancelled,
    /// With an error.
    Failed,
}

impl From<StreamEnd> for EndedAs {
    fn from(end: StreamEnd) -> Self {
        match end {
            StreamEnd::Complete => Self::Completed,
            StreamEnd::Cancelled => Self::Cancelled,
            StreamEnd::Failed => Self::Failed,
        }
    }
}

impl From<EndedAs> for StreamEnd {
    fn from(end: EndedAs) -> Self {
        match end {
            EndedAs::Completed => Self::Complete,
            EndedAs::Cancelled => Self::Cancelled,
            EndedAs::Failed => Self::Failed,
        }
    }
}

/// What runs on one rank of a worker.
#[derive(Clone, Copy, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct RunningOnRank {
    /// Which.
    pub rank: u32,
    /// Streams.
    pub requests: u32,
    /// Tokens of their prompts whose prefill is outstanding.
    pub prefill_tokens: u32,
    /// KV blocks that they take.
    pub decode_blocks: u32,
}

impl RunningOnRank {
    /// Most streams of a rank that are believed: as many as one link has.
    pub const MOST_REQUESTS: u32 = 65_536;
}

/// What a change answers: a sentence for the operator.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct MessageReply {
    /// The sentence.
    pub message: String,
}

/// `POST /v1/admin/workers/ID/drain`
#[derive(Clone, Copy, Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Whether new requests stay away.
    pub drain: bool,
}

/// An error as OpenAI's clients understand it.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct ErrorReply {
    /// The error.
    pub error: ErrorBody,
}

/// The inside of an [`ErrorReply`].
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct ErrorBody {
    /// What, why and what to do.
    pub message: String,
    /// Family, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The parameter at fault.
    #[serde(default)]
    pub param: Option<String>,
    /// Stable code.
    #[serde(default)]
    pub code: Option<String>,
}

impl ErrorReply {
    /// An error with a message and a family.
    pub fn new(kind: &str, message: impl Into<String>) -> Self {
        Self { error: ErrorBody { message: message.into(), kind: kind.to_owned(), param: None, code: None } }
    }
}

/// A model in a [`RegisterRequest`]: its name, or everything about it.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(untagged)]
pub enum ModelEntry {
    /// Only the name.
    Name(String),
    /// All of it.
    Full(ServedModel),
}

impl ModelEntry {
    /// As the registry keeps it.
    pub fn served(&self) -> ServedModel {
        match self {
            ModelEntry::Name(name) => ServedModel { name: name.clone(), lora_of: None, max_model_len: None },
            ModelEntry::Full(model) => model.clone(),
        }
    }
}

/// A worker to register: the body of `POST /v1/nodes` and
/// `POST /v1/admin/workers`, and an entry of `[[worker]]`.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct RegisterRequest {
    /// `http://host:port`, nothing behind it.
    pub url: String,
    /// Unique over the cluster; `host:port` of the URL where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The dialect spoken there; vllm where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    /// Models served; asked of the engine where left out and `probe` is set.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<ModelEntry>,
    /// The part of a request it does; aggregated where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<WorkerRole>,
    /// How it hands the KV cache on, if it does but a part of a request; where left out, nixl for vLLM,
    /// sglang for SGLang, shared for others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connector: Option<Connector>,
    /// Where decode workers find this prefill worker; the host of the URL where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap_host: Option<String>,
    /// ... and at which port; 8998 where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap_port: Option<u16>,
    /// Its address for other engines, where the router has to tell them (p2p-nccl, moriio).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub side_channel: Option<String>,
    /// Data-parallel ranks, 1 to 1024; where left out, as many as the engine says when it is probed, or 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dp_ranks: Option<u32>,
    /// Tokens in a KV block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_size: Option<u32>,
    /// KV blocks the engine can hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_blocks: Option<u64>,
    /// Free-form pairs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Relative share of traffic, 1 to 1000; 100 where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Speak HTTP/2 to it; false where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http2: Option<bool>,
    /// Requests it should have at once; more wait at the replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<u32>,
    /// Whether the worker will heartbeat; else it is probed. Where left out: true for
    /// `POST /v1/nodes`, false elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<bool>,
    /// Whether the replica asks the engine for its health and models before it registers it;
    /// true where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<bool>,
}

impl RegisterRequest {
    /// The names of its fields.
    pub const FIELDS: &[&str] = &[
        "url",
        "id",
        "engine",
        "models",
        "role",
        "connector",
        "bootstrap_host",
        "bootstrap_port",
        "side_channel",
        "dp_ranks",
        "block_size",
        "capacity_blocks",
        "labels",
        "weight",
        "http2",
        "max_requests",
        "heartbeat",
        "probe",
    ];

    /// Whether the worker is held to heartbeats.
    pub fn wants_heartbeats(&self, source: WorkerSource) -> bool {
        self.heartbeat.unwrap_or(source == WorkerSource::Node)
    }

    /// A request with nothing but an address.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            id: None,
            engine: None,
            models: Vec::new(),
            role: None,
            connector: None,
            bootstrap_host: None,
            bootstrap_port: None,
            side_channel: None,
            dp_ranks: None,
            block_size: None,
            capacity_blocks: None,
            labels: BTreeMap::new(),
            weight: None,
            http2: None,
            max_requests: None,
            heartbeat: None,
            probe: None,
        }
    }

    /// Whether to ask the engine before registering.
    pub fn wants_probe(&self) -> bool {
        self.probe.unwrap_or(true)
    }

    /// The record to register, with defaults filled in and every bound checked. A trailing
    /// slash of the URL is dropped.
    pub fn to_spec(&self, source: WorkerSource) -> Result<WorkerSpec, String> {
        let url = self.url.trim_end_matches('/').to_owned();
        let derived = || url.split_once("://").map_or(url.as_str(), |(_, rest)| rest).replace(['[', ']'], "");
        let id = self.id.clone().unwrap_or_else(derived);
        let spec = WorkerSpec {
            id: WorkerId::parse(&id).map_err(|e| match self.id {
                Some(_) => e,
                None => format!("url {:?} must be http://host:port, or give an id ({e})", self.url),
            })?,
            url,
            engine: self.engine.unwrap_or_default(),
            models: self.models.iter().map(ModelEntry::served).collect(),
            role: self.role.unwrap_or_default(),
            transfer: KvTransfer {
                connector: self.connector,
                bootstrap_host: self.bootstrap_host.clone(),
                bootstrap_port: self.bootstrap_port,
                side_channel: self.side_channel.clone(),
            },
            dp_ranks: self.dp_ranks.unwrap_or(1),
            block_size: self.block_size,
            capacity_blocks: self.capacity_blocks,
            labels: self.labels.clone(),
            weight: self.weight.unwrap_or(100),
            http2: self.http2.unwrap_or(false),
            max_requests: self.max_requests,
            owner: None,
            source,
        };
        spec.validate()?;
        let (_, authority) = spec.url.split_once("://").unwrap_or_default();
        if !is_host_and_port(authority) {
            return Err(format!("url {:?} must be scheme://host:port with nothing behind it", self.url));
        }
        Ok(spec)
    }
}

/// Whether it is `host`, `host:port`, `[ipv6]` or `[ipv6]:port`, written so that no two readers
/// can disagree about the host: plain ASCII, no user, no zone, digits for a port.
fn is_host_and_port(text: &str) -> bool {
    let (host_is_good, rest) = match text.strip_prefix('[').map(|inside| inside.split_once(']')) {
        Some(Some((ipv6, rest))) => (ipv6.parse::<Ipv6Addr>().is_ok(), rest),
        Some(None) => return false,
        None => {
            let end = text.find(':').unwrap_or(text.len());
            let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            (end > 0 && text[..end].bytes().all(is_plain), &text[end..])
        }
    };
    let port_is_good = match rest.strip_prefix(':') {
        None => rest.is_empty(),
        // `u16::from_str` would take a plus sign.
        Some(port) => port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|p| p > 0),
    };
    host_is_good && port_is_good
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_only_a_url_becomes_a_whole_record() {
        let spec = RegisterRequest::new("http://127.0.0.1:8000/").to_spec(WorkerSource::Admin).unwrap();
        assert_eq!(spec.id.as_str(), "127.0.0.1:8000");
        assert_eq!((spec.url.as_str(), spec.weight, spec.dp_ranks), ("http://127.0.0.1:8000", 100, 1));
    }

    #[test]
    fn what_hands_over_is_checked_with_the_engine_and_the_role() {
        let spec = |json: &str| {
            let request: RegisterRequest = serde_json::from_str(json).unwrap();
            request.to_spec(WorkerSource::Admin)
        };
        let prefill =
            |more: &str| spec(&format!(r#"{{"url":"http://[::1]:80","id":"p","role":"prefill"{more}}}"#));
        let plain = prefill("").unwrap();
        assert_eq!((plain.connector(), plain.bootstrap()), (Connector::Nixl, ("[::1]", 8998)));
        let sglang = prefill(r#","engine":"sglang","bootstrap_host":"b","bootstrap_port":7"#).unwrap();
        assert_eq!((sglang.connector(), sglang.bootstrap()), (Connector::Sglang, ("b", 7)));
        assert!(!sglang.works_alone() && !plain.works_alone());
        assert!(
            prefill(r#","connector":"moriio","side_channel":"host:10.0.0.1,handshake:1,notify:2""#).is_ok()
        );
        for (more, why) in [
            (r#","connector":"sglang""#, "does not go with"),
            (r#","engine":"sglang","connector":"nixl""#, "does not go with"),
            (r#","connector":"p2p-nccl""#, "needs side_channel"),
            (r#","connector":"p2p-nccl","side_channel":"a___b""#, "must be an address"),
            (r#","bootstrap_host":"a b""#, "must be an address"),
            (r#","bootstrap_port":0"#, "1 to 65535"),
        ] {
            let error = prefill(more).expect_err(more);
            assert!(error.contains(why), "{more}: {error}");
        }
        let error = spec(r#"{"url":"http://a:80","connector":"nixl"}"#).unwrap_err();
        assert!(error.contains("prefill or decode"), "{error}");
    }

    #[test]
    fn unknown_fields_are_refused() {
        assert!(serde_json::from_str::<RegisterRequest>(r#"{"url":"http://a:1","modles":[]}"#).is_err());
    }

    #[test]
    fn the_list_of_fields_is_complete() {
        let mut full = RegisterRequest::new("http://a:1");
        full.id = Some("a".into());
        full.engine = Some(EngineKind::Vllm);
        full.models = vec![ModelEntry::Name("m".into())];
        full.role = Some(WorkerRole::Decode);
        (full.connector, full.bootstrap_port) = (Some(Connector::Nixl), Some(1));
        (full.bootstrap_host, full.side_channel) = (Some("a".into()), Some("a:1".into()));
        (full.dp_ranks, full.block_size, full.capacity_blocks) = (Some(1), Some(1), Some(1));
        full.labels.insert("a".into(), "b".into());
        (full.weight, full.heartbeat, full.probe) = (Some(1), Some(true), Some(true));
        (full.http2, full.max_requests) = (Some(true), Some(1));
        let json = serde_json::to_value(&full).unwrap();
        let mut names: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut fields = RegisterRequest::FIELDS.to_vec();
        names.sort_unstable();
        fields.sort_unstable();
        assert_eq!(names, fields);
    }

    #[test]
    fn a_model_is_a_name_or_a_table() {
        let json = r#"{"url":"http://a:1","models":["m",{"name":"l","lora_of":"m"}]}"#;
        let request: RegisterRequest = serde_json::from_str(json).unwrap();
        assert_eq!(request.models[1].served().lora_of.as_deref(), Some("m"));
    }
}
