//! What a stream is of: the client's request as it came, and the head of the answer. Travels between
//! processes, stays in memory.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde::{Deserialize, Serialize};

use crate::ids::ReplicaId;

/// Header lines on the wire.
pub type HeaderLines = Vec<(String, Bytes)>;

/// A request that is answered with a stream.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Order {
    /// Digest of whose it is; see [`super::secret::principal`].
    pub principal: [u8; 16],
    /// Digest of what was asked.
    pub request: [u8; 16],
    /// Path and query.
    pub target: String,
    /// As the client sent them, without what belongs to its connection.
    pub headers: HeaderLines,
    /// As the client sent it.
    pub body: Bytes,
    /// Name of the API key it came with.
    pub key: Option<String>,
    /// What the request is called in logs and by the engine.
    pub request_id: String,
    /// Model, as far as one is named.
    pub model: String,
    /// How long generation goes on while no client listens, milliseconds.
    pub orphan_ms: u32,
    /// How long events are kept after the end, milliseconds; 0 with `Everline-No-Store`.
    pub keep_ms: u32,
    /// Milliseconds that the whole request may take, from its beginning.
    pub total_ms: u64,
    /// When it was asked for, seconds since 1970.
    pub created_s: u64,
    /// The replica whose client asked for it: it has a copy, too.
    pub edge: Option<ReplicaId>,
    /// Asked for in the background: generated whether a client listens or not, and known to clients
    /// by the response's id.
    pub background: bool,
}

impl Order {
    /// Memory that it takes.
    pub fn bytes(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len() + 64).sum();
        self.body.len() + self.target.len() + headers + 256
    }

    /// The same without what may be long.
    pub fn outline(&self) -> Self {
        Self { headers: Vec::new(), body: Bytes::new(), ..self.clone() }
    }

    /// The headers, for those who look into them.
    pub fn header_map(&self) -> HeaderMap {
        header_map(&self.headers)
    }
}

/// How the body of an answer is framed.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum Framing {
    /// Server-sent events: numbered, and resumed at any of them.
    Events,
    /// Anything else: passed on as it is.
    Raw,
    /// KsanaLLM's frames, each of which ends with NUL: numbered by who counts them, and resumed at any of
    /// them.
    Frames,
}

/// How far a stream survives the death of its holder.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub enum Resumable {
    /// Its holder is beside the engine: no replica's death touches it.
    Exact,
    /// Another one goes on with it where it was.
    Continue,
    /// What was generated can be read again, but nobody can go on with it.
    Replay,
    /// Nothing is promised: its holder has no memory to keep it.
    Unkept,
}

impl Resumable {
    /// As in the header `Everline-Resumable`, which is missing where nothing is promised.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Resumable::Exact => Some("exact"),
            Resumable::Continue => Some("continue"),
            Resumable::Replay => Some("replay"),
            Resumable::Unkept => None,
        }
    }
}

/// The head of an answer.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Head {
    /// HTTP status.
    pub status: u16,
    /// As the engine sent them, without what belongs to its connection; and ours.
    pub headers: HeaderLines,
    /// How what follows is framed.
    pub framing: Framing,
    /// What becomes of it without its holder.
    pub resumable: Resumable,
    /// Who answers.
    pub worker: String,
}

impl Head {
    /// The headers.
    pub fn header_map(&self) -> HeaderMap {
        header_map(&self.headers)
    }
}

/// Header lines of a map.
pub fn header_lines(map: &HeaderMap) -> HeaderLines {
    map.iter()
        .map(|(name, value)| (name.as_str().to_owned(), Bytes::copy_from_slice(value.as_bytes())))
        .collect()
}

fn header_map(lines: &HeaderLines) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(lines.len());
    for (name, value) in lines {
        // They were headers before; a peer that sends something else is not obeyed.
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_maybe_shared(value.clone()))
        {
            map.append(name, value);
        }
    }
    map
}
