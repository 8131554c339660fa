//! The side channel between two engines: a ROUTER socket at the one that has KV, to which the other connects.
//!
//! vLLM's handshake is vLLM's; everything behind it is JSON, and stands for what goes over UCX, Mooncake's
//! transfer engine or NCCL between the real ones.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::rooms::{Rooms, Told};
use super::{Identity, nixl};
use crate::engines::sim::ksana::Node;
use crate::engines::sim::scheduler::Contents;
use crate::zmtp::{AnyAddress, Endpoint, Limits, Link, SocketType, ZmtpError};

/// What one message may have: the numbers of 1,000,000 blocks.
pub(super) const LIMITS: Limits = Limits { bytes: 24 << 20, parts: 4 };
/// Connections at once: one for each request that waits for its prompt.
pub(super) const CONNECTIONS: usize = 16_384;
/// How long something that is not answered may take to be said.
const SAY: Duration = Duration::from_secs(5);

/// What one engine asks of another.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Question {
    /// What these blocks hold, of the engine of this name.
    Read {
        /// The name.
        engine: String,
        /// As vLLM numbers them.
        blocks: Vec<u32>,
    },
    /// The KV of the prompt that both engines were told this of; answered once it is there.
    Join(String),
    /// To set a KsanaLLM group up: its key, its communicator's id, and which life of which node asks.
    Group {
        /// Its key.
        key: String,
        /// The id.
        comm_id: String,
        /// Who asks.
        life: String,
    },
    /// This request's blocks are not needed any more; not answered.
    Done(String),
    /// These requests' blocks still are; not answered.
    Heartbeat(Vec<String>),
}

/// What the socket hands to the engine.
pub(super) enum Notice {
    /// Blocks are not needed any more.
    Done(String),
    /// They still are.
    Heartbeat(Vec<String>),
    /// Whoever joined is gone.
    Lost(String),
    /// These may begin: the decode engine is there.
    Met(Vec<u64>),
}

/// What a side channel answers from.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) identity: Identity,
    pub(super) contents: Contents,
    pub(super) compatibility: String,
    pub(super) rooms: Arc<Rooms>,
    /// The KsanaLLM node that the engine is.
    pub(super) node: Arc<OnceLock<Arc<Node>>>,
}

pub(super) fn wrong() -> ZmtpError {
    ZmtpError::Protocol("not what the side channel of a simulated engine says")
}

/// A message with the delimiter that ROUTER sockets want before it.
pub(super) fn framed(payload: impl Into<Bytes>) -> [Bytes; 2] {
    [Bytes::new(), payload.into()]
}

/// Numbers and texts as JSON; writing them to memory cannot fail.
fn json(value: &impl Serialize) -> [Bytes; 2] {
    framed(serde_json::to_vec(value).unwrap_or_default())
}

/// Connects to an engine's side channel.
pub(super) async fn connect(host: &str, port: u16) -> Result<Link, ZmtpError> {
    let endpoint = Endpoint::Tcp { host: host.to_owned(), port };
    Link::connect(&endpoint, SocketType::Dealer, LIMITS, &AnyAddress).await
}

/// Asks something that is answered.
pub(super) async fn ask<T>(link: &mut Link, question: &Question) -> Result<T, ZmtpError>
where
    T: for<'de> Deserialize<'de>,
{
    link.send(&json(question)).await?;
    let answer = link.recv().await?;
    answer.get(1).and_then(|answer| serde_json::from_slice(answer).ok()).ok_or_else(wrong)
}

/// Says something that is not.
pub(super) async fn say(link: &mut Link, what: &Question) -> Result<(), ZmtpError> {
    timeout(SAY, link.send(&json(what))).await.unwrap_or(Err(ZmtpError::Handshake))
}

/// Sets a KsanaLLM group up with the prefill node at `prefill`; whether that does so, too.
pub(in crate::engines::sim) async fn join_group(
    prefill: &str,
    key: &str,
    comm_id: &str,
    life: &str,
) -> Result<bool, ZmtpError> {
    let (key, comm_id, life) = (key.to_owned(), comm_id.to_owned(), life.to_owned());
    let joining = async {
        let mut link = connect_to(prefill).await?;
        ask(&mut link, &Question::Group { key, comm_id, life }).await
    };
    timeout(SAY, joining).await.unwrap_or(Err(ZmtpError::Handshake))
}

/// Connects to `host:port`.
pub(super) async fn connect_to(address: &str) -> Result<Link, ZmtpError> {
    let endpoint = Endpoint::parse(&format!("tcp://{address}"))?;
    Link::connect(&endpoint, SocketType::Dealer, LIMITS, &AnyAddress).await
}

/// Answers one connection.
pub(super) async fn answer(mut link: Link, shared: Shared, notice: impl Fn(Notice)) -> Result<(), ZmtpError> {
    loop {
        let message = link.recv().await?;
        let [empty, question] = message.as_slice() else { return Err(wrong()) };
        if !empty.is_empty() {
            return Err(wrong());
        }
        if nixl::asks_for_metadata(question) {
            link.send(&framed(nixl::metadata(&shared))).await?;
            continue;
        }
        match serde_json::from_slice(question).map_err(|_| wrong())? {
            Question::Done(id) => notice(Notice::Done(id)),
            Question::Heartbeat(ids) => notice(Notice::Heartbeat(ids)),
            Question::Read { engine, blocks } => {
                let is_registered = engine == shared.identity.get();
                let content = |block: &u32| block.checked_sub(1).and_then(|block| shared.contents.get(block));
                let contents: Option<Vec<u64>> =
                    blocks.iter().map(content).collect::<Option<_>>().filter(|_| is_registered);
                link.send(&json(&contents)).await?;
            }
            Question::Group { key, comm_id, life } => {
                let joins = shared.node.get().is_some_and(|node| node.join(&key, &comm_id, &life));
                link.send(&json(&joins)).await?;
            }
            Question::Join(key) => join(&mut link, &shared.rooms, key, &notice).await?,
        }
    }
}

/// Answers once the KV is there; the decode engine says then that it has it, and only then is it let go.
async fn join(
    link: &mut Link,
    rooms: &Rooms,
    key: String,
    notice: &impl Fn(Notice),
) -> Result<(), ZmtpError> {
    let Some((mut told, waiting)) = rooms.ask(&key) else {
        // Somebody else is there already: what comes is for them.
        return Err(link.recv().await.err().unwrap_or_else(wrong));
    };
    if !waiting.is_empty() {
        notice(Notice::Met(waiting));
    }
    let joined = async {
        let told: Told = tokio::select! {
            // Whoever can tell has gone: the engine ends.
            told = &mut told => told.map_err(|_| ZmtpError::Closed)?,
            other = link.recv() => return Err(other.err().unwrap_or_else(wrong)),
        };
        let is_there = matches!(told, Told::Kv { .. });
        link.send(&json(&told)).await?;
        if is_there {
            let message = link.recv().await?;
            match message.get(1).and_then(|done| serde_json::from_slice(done).ok()) {
                Some(Question::Done(_)) => {}
                _ => return Err(wrong()),
            }
        }
        Ok(is_there)
    };
    match joined.await {
        Ok(true) => notice(Notice::Done(key)),
        Ok(false) => {}
        Err(error) => {
            notice(Notice::Lost(key));
            return Err(error);
        }
    }
    Ok(())
}
