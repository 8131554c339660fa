//! A request that is answered with a stream: admitted here, generated elsewhere.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Response};

use super::answer::{Coming, first_answer, resume};
use super::at_agent;
use super::generate::target_of;
use super::owner::owned;
use crate::http::attempts::Asked;
use crate::http::body::FrontBody;
use crate::http::errors::{ApiError, Code};
use crate::http::front::Shard;
use crate::http::headers;
use crate::http::keys::Caller;
use crate::http::ksana::held::TARGET;
use crate::http::routes::Route;
use crate::ids::StreamId;
use crate::relay::Durability;
use crate::relay::begin::{KeyReused, Manner};
use crate::relay::find::Missing;
use crate::relay::hub::{Entry, Relays};
use crate::relay::log::kept;
use crate::relay::order::{Order, header_lines};
use crate::relay::secret::{self, MOST_KEY};

pub(super) const RESUME: HeaderName = HeaderName::from_static("everline-resume");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const DURABILITY: HeaderName = HeaderName::from_static("everline-durability");
const ORPHAN: HeaderName = HeaderName::from_static("everline-orphan");
const NO_STORE: HeaderName = HeaderName::from_static("everline-no-store");
pub(super) const STREAM: HeaderName = HeaderName::from_static("everline-stream");
pub(super) const RESUMABLE: HeaderName = HeaderName::from_static("everline-resumable");
pub(super) const ATTACHED: HeaderName = HeaderName::from_static("everline-attached");

/// Longest `Everline-Orphan`.
const MOST_ORPHAN: u64 = 3600;

/// An event id: a stream, an event of it, and who said that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::http) struct EventId {
    pub(in crate::http) stream: StreamId,
    pub(in crate::http) seq: u64,
    /// The attempt, where it is not the first one.
    pub(in crate::http) attempt: u32,
}

impl EventId {
    /// Reads `st_….7`, or `st_….7.2` of the second attempt.
    pub(in crate::http) fn parse(text: &str) -> Option<Self> {
        let (stream, seq) = text.split_once('.')?;
        let (seq, attempt) = match seq.split_once('.') {
            Some((seq, attempt)) => (seq, u32::try_from(number(attempt)?).ok().filter(|at| *at > 1)?),
            None => (seq, 1),
        };
        Some(Self { stream: StreamId::parse(stream)?, seq: number(seq)?, attempt })
    }

    /// What it says to those who know the stream.
    pub(super) fn place(self) -> After {
        After { seq: self.seq, of: Some(self.attempt) }
    }
}

fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.len() <= 19 && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

/// The last event that a client has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::http) struct After {
    pub(in crate::http) seq: u64,
    /// Which attempt said it, where the client knows.
    pub(in crate::http) of: Option<u32>,
}

/// The event id in `Last-Event-ID`. An EventSource that has seen none sends none, or an empty one.
pub(in crate::http) fn last_event_id(headers: &HeaderMap) -> Result<Option<EventId>, ApiError> {
    let Some(value) = headers.get(LAST_EVENT_ID).filter(|value| !value.is_empty()) else { return Ok(None) };
    let id = value.to_str().ok().and_then(EventId::parse);
    let bad = || {
        let text = "Last-Event-ID is no event id of this service, as they are in the stream's `id:` lines";
        ApiError::new(Code::BadEventId, text).no_retry()
    };
    id.map(Some).ok_or_else(bad)
}

fn flag(headers: &HeaderMap, name: &HeaderName) -> bool {
    headers.get(name).is_some_and(|value| matches!(value.as_bytes(), b"1" | b"true"))
}

/// A request that is answered with a stream.
pub(in crate::http) struct Asking<'a> {
    pub(in crate::http) route: Route,
    pub(in crate::http) head: &'a Parts,
    /// As the client sent it.
    pub(in crate::http) body: &'a Bytes,
    pub(in crate::http) asked: Asked<'a>,
    pub(in crate::http) request_id: &'a HeaderValue,
    pub(in crate::http) caller: &'a Caller,
    /// What is to be sent to an engine in place of the body, of a response in the background.
    pub(in crate::http) background: Option<Bytes>,
    /// Headers that make what is measured of the stream a part of what the client measures.
    pub(in crate::http) trace: HeaderMap,
}

/// Whether a client says that it can come back.
pub(in crate::http) fn may_come_back(headers: &HeaderMap) -> bool {
    headers.contains_key(IDEMPOTENCY_KEY) || headers.contains_key(LAST_EVENT_ID) || flag(headers, &RESUME)
}

impl Asking<'_> {
    /// Whether its client may come back.
    fn is_aware(&self) -> bool {
        let headers = &self.head.headers;
        self.background.is_some() || headers.contains_key(IDEMPOTENCY_KEY) || flag(headers, &RESUME)
    }
}

/// A stream that was begun for a request, or before under the same key.
pub(super) enum Begun {
    New(Arc<Entry>),
    Attached(StreamId),
}

/// Serves a request for a stream.
pub(in crate::http) async fn stream_out(
    shard: &Shard,
    relays: &Arc<Relays>,
    asking: Asking<'_>,
) -> Result<Response<FrontBody>, ApiError> {
    let headers = &asking.head.headers;
    if let Some(last) = last_event_id(headers)? {
        owned(shard, relays, last.stream, asking.caller).await?;
        return resume(shard, relays, last.stream, Coming::Back(Some(last.place()))).await;
    }
    let (aware, route) = (asking.is_aware(), asking.route);
    match begin(shard, relays, asking).await? {
        Begun::Attached(id) => {
            let mut response = resume(shard, relays, id, Coming::Again).await?;
            response.headers_mut().insert(ATTACHED, HeaderValue::from_static("1"));
            Ok(response)
        }
        Begun::New(entry) => {
            let listener = relays.listen(entry, aware);
            Ok(first_answer(shard, listener, route, aware).await)
        }
    }
}

/// Begins a stream, or finds the one that was begun under the same key.
pub(super) async fn begin(
    shard: &Shard,
    relays: &Arc<Relays>,
    asking: Asking<'_>,
) -> Result<Begun, ApiError> {
    let aware = asking.is_aware();
    let Asking { route, head, body, asked, request_id, caller, background, trace } = asking;
    let headers = &head.headers;
    let principal = secret::principal(caller.key_id());
    let key = idempotency_key(headers)?;
    let options = &shard.front.config.streams;
    let total_ms = shard.front.config.proxy.total_timeout.as_millis() as u64;
    let is_for_pair = matches!(route, Route::KsanaGenerate | Route::KsanaV1 | Route::KsanaV2);
    // Of the others the path is what the route is called.
    let path = if is_for_pair { head.uri.path() } else { route.path() };
    let kind = if is_for_pair { TARGET } else { "" };
    let mut order = Order {
        principal,
        request: secret::request_digest(path, body),
        target: format!("{kind}{}", target_of(&head.uri, route)),
        headers: header_lines(&{
            let mut passed = passed_on(shard, headers);
            passed.extend(trace);
            passed
        }),
        background: background.is_some(),
        body: kept(background.as_ref().unwrap_or(body).clone()),
        key: caller.key_id().map(str::to_owned),
        request_id: request_id.to_str().unwrap_or_default().to_owned(),
        model: asked.model.as_deref().unwrap_or_default().to_owned(),
        orphan_ms: match seconds(headers, &ORPHAN, MOST_ORPHAN)? {
            Some(seconds) => (seconds * 1000) as u32,
            // Nobody needs to listen to it: what bounds it is the time for the whole.
            None if background.is_some() => u32::try_from(total_ms).unwrap_or(u32::MAX),
            None => options.orphan_grace.as_millis() as u32,
        },
        keep_ms: if flag(headers, &NO_STORE) { 0 } else { options.keep.as_millis() as u32 },
        total_ms,
        edge: relays.view().me,
        created_s: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
    };
    let durability = durability(headers)?;
    // In which attempt the stream is that was begun under this key, and lost.
    let mut lost = None;
    let id = match key {
        None => secret::random_id(),
        Some(key) => {
            let Some(cluster) = relays.directory.secret() else {
                let text = "this replica does not know the cluster yet; try again";
                return Err(ApiError::new(Code::ReplicaDown, text).retry_after(1));
            };
            let id = secret::derived_id(&cluster, &principal, key);
            match known_request(relays, id).await {
                Some(request) if !secret::same(&request, &order.request) => {
                    return Err(key_reused());
                }
                Some(_) => {
                    // Nobody has it any more, and this client has read nothing of it.
                    if let Err(Missing::Gone) = relays.find(id, 0).await {
                        lost = relays.directory.find(id).await.map(|record| record.attempt);
                    }
                    if lost.is_none() {
                        return Ok(Begun::Attached(id));
                    }
                    id
                }
                None => id,
            }
        }
    };
    if let Some(lost) = lost {
        return Ok(Begun::New(relays.begin_again(id, order, lost, aware).await));
    }
    let durability = durability.unwrap_or(relays.options.durability);
    let placed = match durability {
        Durability::Peer if !is_for_pair => {
            at_agent::place(shard, route, &mut order, asked, request_id, caller).await?
        }
        Durability::Peer | Durability::Local => None,
    };
    let agent = placed.as_ref().map(|placed| placed.holder);
    let manner = Manner { durability, agent, shared: key.is_some(), aware };
    let entry = relays.begin(id, order, manner).await.map_err(|KeyReused| key_reused())?;
    if let Some(placed) = placed {
        placed.follow(&entry.copy);
    }
    Ok(Begun::New(entry))
}

fn key_reused() -> ApiError {
    let text = "this Idempotency-Key was used for another request; use a new one";
    ApiError::new(Code::IdempotencyKeyReused, text).no_retry()
}

/// What was asked under an id, if anything.
async fn known_request(relays: &Relays, id: StreamId) -> Option<[u8; 16]> {
    if let Some(entry) = relays.get(id).filter(|entry| !entry.is_purged() && !entry.copy.is_refusal()) {
        return Some(entry.copy.order.request);
    }
    let record = match relays.record_of(id).await {
        Ok(record) => record,
        // No quorum: whoever has it may still answer.
        Err(_) => relays.unlisted(id).await,
    };
    record.map(|record| record.request)
}

/// The headers that travel with an order: those that workers see, and what routing reads. No
/// credentials.
fn passed_on(shard: &Shard, headers: &HeaderMap) -> HeaderMap {
    let rules = &shard.front.config.proxy.headers;
    let mut passed = headers::passing(headers, rules);
    for (name, value) in headers.iter().filter(|(name, _)| name.as_str().starts_with("everline-")) {
        passed.append(name.clone(), value.clone());
    }
    passed
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    match value.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= MOST_KEY => Ok(Some(key)),
        _ => {
            let text = format!("Idempotency-Key must have 1 to {MOST_KEY} visible ASCII characters");
            Err(ApiError::new(Code::InvalidValue, text).no_retry())
        }
    }
}

fn seconds(headers: &HeaderMap, name: &HeaderName, most: u64) -> Result<Option<u64>, ApiError> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let number =
        value.to_str().ok().and_then(|text| text.parse::<u64>().ok()).filter(|seconds| *seconds <= most);
    match number {
        Some(seconds) => Ok(Some(seconds)),
        None => {
            let text = format!("{name} must be a number of seconds, 0 to {most}");
            Err(ApiError::new(Code::InvalidValue, text).no_retry())
        }
    }
}

fn durability(headers: &HeaderMap) -> Result<Option<Durability>, ApiError> {
    match headers.get(DURABILITY).map(HeaderValue::as_bytes) {
        None => Ok(None),
        Some(b"peer") => Ok(Some(Durability::Peer)),
        Some(b"local") => Ok(Some(Durability::Local)),
        Some(_) => {
            let text = "Everline-Durability must be peer or local";
            Err(ApiError::new(Code::InvalidValue, text).no_retry())
        }
    }
}
