//! KsanaLLM's tables as operators see them.

use serde::{Deserialize, Serialize};

/// `GET /v1/admin/ksana`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KsanaReply {
    /// `strict` or `fixed`; empty where this replica does not serve KsanaLLM.
    pub compat: String,
    /// All nodes, in the order of their registration.
    pub nodes: Vec<KsanaNode>,
    /// All groups that have sent a heartbeat.
    pub groups: Vec<KsanaGroup>,
    /// All pairs.
    pub pairs: Vec<KsanaPair>,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KsanaNode {
    /// Its id.
    pub node_id: String,
    /// Its cluster.
    pub cluster_name: String,
    /// Where its group takes requests.
    pub inference_addr: String,
    /// Where it coordinates.
    pub coordinator_addr: String,
    /// `prefill` or `decode`.
    pub role: String,
    /// Its place in the group.
    pub node_rank: u32,
    /// Devices of its group.
    pub world_size: u32,
    /// Its own devices.
    pub device_num: u32,
    /// Whether it counts.
    pub is_online: bool,
    /// Milliseconds since it was last heard, as far as was committed.
    pub heard_ms_ago: u64,
}

/// A group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KsanaGroup {
    /// Its cluster.
    pub cluster_name: String,
    /// Where it takes requests.
    pub inference_addr: String,
    /// `prefill` or `decode`.
    pub role: String,
    /// Devices that it should have.
    pub world_size_expected: u32,
    /// Devices that are online.
    pub online_device_sum: u32,
    /// Nodes that are online.
    pub online_node_count: u32,
    /// Whether all of its devices are there.
    pub is_ready: bool,
    /// Requests that run there, of all replicas.
    #[serde(default)]
    pub requests: i64,
    /// Tokens of their prompts that are not computed yet.
    #[serde(default)]
    pub prefill_tokens: i64,
    /// Blocks that they hold.
    #[serde(default)]
    pub kv_blocks: i64,
    /// Blocks that it is reckoned to have cached.
    #[serde(default)]
    pub cached_blocks: u64,
}

/// A pair.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KsanaPair {
    /// `<prefill>__<decode>`
    pub comm_key: String,
    /// Its cluster.
    pub cluster_name: String,
    /// Whether requests go there.
    pub is_active: bool,
    /// Why not, in fixed mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocked_by: Option<String>,
    /// Whether it has a comm id.
    pub has_comm_id: bool,
}
