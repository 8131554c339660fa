//! What the admin plane says of routing: a choice explained, the prefix index, its feeds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::cluster::api::CacheDigest;
use crate::ids::{ReplicaId, WorkerId};
use crate::state::load::LoadSum;

/// Most candidates in an [`ExplainReply`].
pub const MOST_EXPLAINED: usize = 1024;

/// `POST /v1/admin/explain`: a request that is not sent.
#[derive(Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct ExplainRequest {
    /// Path of one of the routes that go to workers.
    #[serde(default = "chat")]
    pub route: String,
    /// Headers of the request, as far as routing reads them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// Its body.
    pub body: Box<RawValue>,
}

fn chat() -> String {
    "/v1/chat/completions".to_owned()
}

/// Where a request would go, and why; as the answering replica sees it at this moment.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq)]
pub struct ExplainReply {
    /// Who answers.
    pub replica: String,
    /// The model or adapter asked for.
    pub model: Option<String>,
    /// The policy that chooses.
    pub policy: String,
    /// Length of the prompt, counted or estimated.
    pub prompt_tokens: u32,
    /// What its blocks are made of: `ids`, `tokenizer`, `engine`, `text` or `unknown`.
    pub source: String,
    /// How old what is known of other replicas' bookings is, at most.
    pub view_age_ms: u64,
    /// Whether the request would wait in line.
    pub waits: bool,
    /// Whether it would go to a worker that this replica had better leave alone, because there is
    /// no other.
    pub last_resort: bool,
    /// Ranks of workers that serve the model, the likeliest first.
    pub candidates: Vec<CandidateReply>,
    /// Further ones that are not listed.
    pub more: usize,
    /// Who would do the prefill, if somebody else does than what `candidates` are for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill: Option<PrefillReply>,
}

/// Where the prefill of a request would go that two workers share.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq)]
pub struct PrefillReply {
    /// The policy that chooses.
    pub policy: String,
    /// Ranks of workers that serve the model, the likeliest first.
    pub candidates: Vec<CandidateReply>,
    /// Further ones that are not listed.
    pub more: usize,
}

/// What is known of one rank for one request.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq)]
pub struct CandidateReply {
    /// The worker.
    pub worker: WorkerId,
    /// Which of its ranks.
    pub rank: u32,
    /// Of 1: how often it would be chosen, were the same request to come many times now. Left
    /// out where that was not tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// Leading blocks of the prompt that it holds.
    pub overlap: TierBlocks,
    /// Blocks after those that requests on their way there will bring.
    pub coming: u32,
    /// Tokens in a block.
    pub block_size: u32,
    /// What is to do there: what is booked, corrected by the engine's own figures.
    pub load: LoadSum,
    /// What those add in `load` to what is booked on this rank, or take off; left out where they agree.
    #[serde(default, skip_serializing_if = "LoadSum::is_zero")]
    pub correction: LoadSum,
    /// The sum of `terms`, in blocks; for policies that go by cost.
    pub cost: Option<f64>,
    /// What the cost is made of.
    pub terms: Option<CostReply>,
    /// Why it may not be chosen, or is not while there are others.
    pub not_chosen: Option<String>,
}

/// Blocks by the fastest tier that holds them.
#[derive(Clone, Copy, Serialize, Deserialize, Debug, PartialEq, Eq, Default)]
pub struct TierBlocks {
    /// On the accelerator.
    pub gpu: u32,
    /// In the host's memory.
    pub host: u32,
    /// On something slower.
    pub disk: u32,
}

/// A cost, term by term, weighed.
#[derive(Clone, Copy, Serialize, Deserialize, Debug, PartialEq, Default)]
pub struct CostReply {
    /// The prefill that stands before the request.
    pub queued: f64,
    /// The prompt's own, if nothing were cached.
    pub prompt: f64,
    /// What is cached of it; subtracted.
    pub credit: f64,
    /// What running requests hold.
    pub decode: f64,
}

/// `GET /v1/admin/index`: the prefix index as the answering replica has it.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct IndexReply {
    /// Who answers.
    pub replica: ReplicaId,
    /// Its name.
    pub name: String,
    /// Digests, for comparison with other replicas'.
    pub digest: CacheDigest,
    /// What can be counted; the same on every replica at the same index of the log.
    pub counters: IndexCounters,
    /// Each rank that is known.
    pub ranks: Vec<RankStatus>,
}

/// What can be counted of the prefix index.
#[derive(Clone, Copy, Serialize, Deserialize, Debug, PartialEq, Eq, Default)]
pub struct IndexCounters {
    /// Different blocks, whoever holds them.
    pub blocks: u64,
    /// Blocks of each rank, added up.
    pub worker_blocks: u64,
    /// Nodes of the tree.
    pub nodes: u64,
    /// Memory, by its own account.
    pub bytes: u64,
    /// Blocks of ranks that were dropped to keep the bound.
    pub evicted: u64,
    /// Blocks that were not stored because what comes before them is unknown.
    pub orphans: u64,
    /// What was refused.
    pub refused: u64,
}

/// How what a rank holds is known.
#[derive(Clone, Copy, Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Known {
    /// The engine tells.
    Events,
    /// Reckoned from what was sent there.
    Predicted,
}

/// A rank in the prefix index.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct RankStatus {
    /// The worker; `None` for one that left the registry and is not forgotten yet.
    pub worker: Option<WorkerId>,
    /// Which of its ranks.
    pub rank: u32,
    /// How what it holds is known.
    pub known: Known,
    /// Name of the replica that listens to its events.
    pub owner: Option<String>,
    /// Blocks that it holds.
    pub blocks: u64,
    /// Number of the last message applied.
    pub cursor: Option<u64>,
    /// Whether its blocks are known in part only, so that it is not scored.
    pub recovering: bool,
    /// What the feed did, where the answering replica listens to it.
    pub feed: Option<FeedStatus>,
}

/// What is known of a worker's cache, its ranks together.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct CacheStatus {
    /// Blocks that it holds.
    pub blocks: u64,
    /// How they are known.
    pub known: Known,
    /// Whether some rank's are known in part only.
    pub recovering: bool,
    /// Names of the replicas that listen to its events.
    pub owners: Vec<String>,
}

/// A feed of KV events, since the answering replica began to listen.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq, Default)]
pub struct FeedStatus {
    /// Whether the subscription stands.
    pub connected: bool,
    /// Live messages read.
    pub messages: u64,
    /// Times numbers were missing.
    pub gaps: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Times the engine had begun anew.
    pub restarts: u64,
    /// Times messages were lost for good.
    pub losses: u64,
    /// Why the last connection ended.
    pub last_error: Option<String>,
}
