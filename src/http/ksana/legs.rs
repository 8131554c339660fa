//! The two legs of a request: the same to the prefill and to the decode group, at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response};
use tokio::time::timeout;

use super::named::Ended;
use crate::http::front::Shard;
use crate::http::headers::HeaderRules;
use crate::http::upstream::{HeadersToWorker, Outgoing, SendError, UpstreamBody};
use crate::state::ksana::{Role, RoutePair};

const GROUP_KEY: HeaderName = HeaderName::from_static("kv-comm-group-key");
const REQUEST_ID: HeaderName = HeaderName::from_static("kv-comm-request-id");

/// A request as both legs get it.
#[derive(Clone, Debug)]
pub(super) struct Sending {
    /// As the reference's HTTP library sends it, over connections of their own.
    pub(super) strict: bool,
    /// Path, and in fixed mode the query.
    pub(super) target: String,
    /// The client's, of which strict mode passes none.
    pub(super) client: HeaderMap,
    pub(super) request_id: HeaderValue,
    /// Whether the client's credentials are for the engine, there being none of ours.
    pub(super) passes_credentials: bool,
    pub(super) body: Bytes,
    /// Longest time to an answer's head.
    pub(super) head_limit: Duration,
}

/// Both answers, their bodies unread, and how long they took.
pub(super) struct Heads {
    pub(super) prefill: Response<UpstreamBody>,
    pub(super) decode: Response<UpstreamBody>,
    took: (Duration, Duration),
}

impl Heads {
    /// What both legs have come to so far.
    pub(super) fn ended(&self) -> [(Role, Ended); 2] {
        let ended =
            |answer: &Response<UpstreamBody>, took| Ended { status: Some(answer.status().as_u16()), took };
        [(Role::Prefill, ended(&self.prefill, self.took.0)), (Role::Decode, ended(&self.decode, self.took.1))]
    }
}

/// Why there are not both.
#[derive(Debug, thiserror::Error)]
#[error("{} group {addr}: {why}", role.name())]
pub(super) struct Lost {
    pub(super) role: Role,
    pub(super) addr: String,
    pub(super) why: String,
    /// Whether the node may have seen the request, and may have been lost by it.
    pub(super) reached: bool,
    /// After how long.
    pub(super) took: Duration,
}

/// Sends to both, under this number, and waits for both heads. When one fails, or the future is
/// dropped, the other is closed.
pub(super) async fn send(
    shard: Arc<Shard>,
    sending: Sending,
    pair: Arc<RoutePair>,
    id: u32,
) -> Result<Heads, Lost> {
    let prefill = leg(&shard, &sending, &pair, id, Role::Prefill, &pair.prefill_addr);
    let decode = leg(&shard, &sending, &pair, id, Role::Decode, &pair.decode_addr);
    let ((prefill, prefill_took), (decode, decode_took)) = tokio::try_join!(prefill, decode)?;
    Ok(Heads { prefill, decode, took: (prefill_took, decode_took) })
}

async fn leg(
    shard: &Shard,
    sending: &Sending,
    pair: &RoutePair,
    id: u32,
    role: Role,
    addr: &str,
) -> Result<(Response<UpstreamBody>, Duration), Lost> {
    let began = Instant::now();
    let lost = |why: String| {
        let took = began.elapsed();
        Lost { role, addr: addr.to_owned(), why, reached: false, took }
    };
    let slot =
        shard.pool.slot_of_replica(addr, &format!("http://{addr}")).map_err(|why| lost(why.to_string()))?;
    let key = HeaderValue::from_str(&pair.comm_key).map_err(|_| lost("its key is no header".to_owned()))?;
    let rules = &shard.front.config.proxy.headers;
    let own_rules;
    let none = HeaderMap::new();
    let method = Method::POST;
    let request = if sending.strict {
        let headers = HeadersToWorker::own(&sending.request_id, &none, rules);
        let lines = strict_lines(&pair.comm_key, id, sending.body.len());
        Outgoing::verbatim(&method, &sending.target, headers, lines, sending.body.clone())
    } else {
        let rules = match sending.passes_credentials {
            true => {
                let forward = rules.forward.iter().cloned().chain([AUTHORIZATION]).collect();
                own_rules = HeaderRules { forward, ..rules.clone() };
                &own_rules
            }
            false => rules,
        };
        let mut ours = HeaderMap::new();
        ours.insert(GROUP_KEY, key);
        ours.insert(REQUEST_ID, id.into());
        // Frames of two legs are put together: neither may be compressed.
        ours.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if !sending.client.contains_key(CONTENT_TYPE) {
            ours.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        if let Some(authorization) = shard.pool.authorization() {
            ours.insert(AUTHORIZATION, authorization.clone());
        }
        let headers =
            HeadersToWorker { client: &sending.client, request_id: &sending.request_id, rules, ours };
        Outgoing::new(&method, &sending.target, headers, sending.body.clone())
    };
    let send = async {
        match shard.pool.send(&slot, &request, sending.strict).await {
            // A kept connection was closed just then: the engine has seen nothing of it.
            Err(SendError::Stale) => shard.pool.send(&slot, &request, true).await,
            other => other,
        }
    };
    let Ok(sent) = timeout(sending.head_limit, send).await else {
        let why = format!("no answer within {} ms", sending.head_limit.as_millis());
        return Err(Lost { reached: true, ..lost(why) });
    };
    sent.map(|answer| (answer, began.elapsed())).map_err(|why| {
        let reached = !matches!(why, SendError::Connect(_) | SendError::Forbidden(_) | SendError::Full);
        Lost { reached, ..lost(why.to_string()) }
    })
}

/// The header lines that the reference's HTTP library sends, in its order and case.
fn strict_lines(key: &str, id: u32, length: usize) -> Vec<u8> {
    format!(
        "Accept: */*\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n\
         User-Agent: python-httpx/0.28.1\r\nkv-comm-group-key: {key}\r\nkv-comm-request-id: {id}\r\n\
         Content-Length: {length}\r\nContent-Type: application/json\r\n\r\n"
    )
    .into_bytes()
}
