//! What the admin listener says of output streams.

use serde::{Deserialize, Serialize};

/// `GET /v1/admin/streams`; with `?all=true` those too that have ended. `?state=` and `?model=` leave others
/// out, `?limit=` and `?after=` make pages.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct StreamsReply {
    /// Streams that the cluster lists, by id; 1,000 at most.
    pub streams: Vec<StreamStatus>,
    /// There are more, behind the id of the last one.
    pub more: bool,
}

/// A stream as the cluster lists it.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct StreamStatus {
    /// `st_` and 26 characters.
    pub id: String,
    /// `running`, `completed`, `failed` or `cancelled`.
    pub state: String,
    /// Model it is of.
    pub model: String,
    /// Who generates it.
    pub holder: String,
    /// The replica that would go on with it.
    pub mirror: Option<String>,
    /// Counts take-overs, from 1.
    pub attempt: u32,
    /// Who answers; this and what follows only where the answering replica has a copy.
    #[serde(default)]
    pub worker: Option<String>,
    /// Name of the API key.
    #[serde(default)]
    pub key: Option<String>,
    /// Seconds since it was asked for.
    #[serde(default)]
    pub age_s: Option<u64>,
}

/// `GET /v1/admin/streams/{id}`
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct StreamReply {
    /// Name of the answering replica.
    pub replica: String,
    /// What the cluster says of it, if it lists it.
    pub stream: Option<StreamStatus>,
    /// What the answering replica has of it.
    pub copy: Option<StreamCopy>,
    /// What the node agent says that generates it: operators do not ask agents themselves.
    #[serde(default)]
    pub agent: Option<StreamAtAgent>,
}

/// What a node agent has of a stream.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct StreamAtAgent {
    /// Whose it is.
    pub name: String,
    /// As in [`StreamStatus`].
    pub state: String,
    /// Counts take-overs, from 1.
    pub attempt: u32,
    /// Events so far.
    pub events: u64,
    /// Who answers.
    pub worker: Option<String>,
}

/// What one replica has of a stream.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct StreamCopy {
    /// `holder`, `copy` or `passing` (it keeps nothing).
    pub role: String,
    /// As in [`StreamStatus`].
    pub state: String,
    /// Counts take-overs, from 1.
    pub attempt: u32,
    /// Events so far.
    pub events: u64,
    /// Memory.
    pub bytes: u64,
    /// Clients that listen, here and elsewhere, as far as is known here.
    pub clients: u32,
    /// Since when it is here.
    pub age_ms: u64,
    /// Who answers.
    pub worker: Option<String>,
    /// `exact`, `continue` or `replay`, once the worker has answered.
    pub resumable: Option<String>,
    /// Path that was asked.
    pub route: String,
    /// Name of the API key.
    pub key: Option<String>,
    /// How the request is called in logs.
    pub request_id: String,
}

/// Output streams at one replica.
#[derive(Clone, Copy, Serialize, Deserialize, Debug, PartialEq, Eq, Default)]
pub struct StreamNumbers {
    /// Generated here.
    pub held: u64,
    /// Generated elsewhere, with a copy here.
    pub copies: u64,
    /// Ended and not forgotten.
    pub kept: u64,
    /// Memory of all of them.
    pub bytes: u64,
    /// Begun here since the start.
    pub opened: u64,
    /// Clients that came back, since the start.
    pub resumed: u64,
    /// Given to another holder, since the start.
    pub taken_over: u64,
    /// Gone on with here, since the start.
    pub continued: u64,
    /// Lost, since the start.
    pub lost: u64,
}
