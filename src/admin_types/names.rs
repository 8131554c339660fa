//! What names stand for, as operators see it.

use serde::{Deserialize, Serialize};

/// `GET /v1/admin/names`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NamesReply {
    /// `auto`, `static`, `kubernetes` or `polaris`; empty where no names are followed.
    pub provider: String,
    /// The names that are followed.
    pub names: Vec<NameStatus>,
}

/// A name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NameStatus {
    /// The name.
    pub name: String,
    /// What it stands for, by address.
    pub endpoints: Vec<NameEndpoint>,
    /// Endpoints beyond the most that are kept.
    pub left_out: u64,
    /// Milliseconds since the service last said that this is so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_ms: Option<u64>,
    /// Whether that is too long ago, so that it is not used.
    pub expired: bool,
    /// What was wrong when it was last asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// Questions that were not answered well.
    pub failures: u64,
    /// Times that everything was asked for.
    pub lists: u64,
    /// Times that it came to stand for something else.
    pub changes: u64,
}

/// An endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NameEndpoint {
    /// `host:port`
    pub address: String,
    /// Its share.
    pub weight: u32,
    /// `ready`, `leaving`, `unhealthy` or `out`.
    pub state: String,
    /// Whether requests go there.
    pub used: bool,
}
