//! An edge's client plane beside streams: each request goes to a replica's client listener, as its
//! client sent it, and the answer comes back as the replica gives it.
//!
//! The next replica is asked where nobody answers. A replica that dies before it has begun to answer
//! has let go of its worker with that, so one more replica may see the request; what has begun is
//! not repeated.

use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderValue, Response};
use rand::seq::SliceRandom as _;
use tokio::time::{Instant, sleep, timeout_at};

use super::body::FrontBody;
use super::errors::{ApiError, Code};
use super::front::Shard;
use super::headers::HeaderRules;
use super::metrics::Tracked;
use super::proxy::Failed;
use super::relay::{Relay, RelayLimits};
use super::routes::{Listener, Plane, Route, Served};
use super::upstream::{HeadersToWorker, Outgoing, SendError, UpstreamBody};
use crate::relay::directory::Member;
use crate::relay::remote::Remote;

/// How often a replica that has not answered yet is looked after.
const LOOK: Duration = Duration::from_millis(500);
/// Most replicas that are named to who wants another plane.
const NAMED: usize = 3;
/// After so many looks at which the cluster misses it, a replica is given up.
const MISSED: u32 = 2;

/// What replicas are sent: everything that their clients could send them.
static RULES: HeaderRules = HeaderRules { forward: Vec::new(), drop: Vec::new(), everything: true };

/// Whether edges serve a route at all.
pub(super) fn has(route: Route) -> bool {
    let plane = route.entry().map(|entry| entry.plane);
    matches!(plane, Some(Plane::Client | Plane::Health | Plane::Metrics)) || route == Route::AdminKeys
}

/// Whether a replica answers in place of this process.
pub(super) fn passes(route: Route) -> bool {
    let known_to_replicas = matches!(route, Route::Models | Route::Model | Route::Streams);
    let answered_by_replicas = |served| served != Served::Here || known_to_replicas;
    route.entry().is_some_and(|entry| entry.plane == Plane::Client && answered_by_replicas(entry.served))
}

/// What who wants another plane hears.
pub(super) fn not_here(remote: &Remote, listener: Listener) -> ApiError {
    let text = "this is an edge, for clients only: it has no registry and no list of streams; nodes and operators ask a \
                replica";
    // Clients need not know where operators go.
    let known = if listener == Listener::Admin { remote.replicas() } else { Vec::new() };
    let replicas = known.into_iter().filter(|member| !member.admin.is_empty());
    let servers: Vec<String> =
        replicas.take(NAMED).map(|member| format!("--server {}", member.admin)).collect();
    let text = match servers.is_empty() {
        true => text.to_owned(),
        false => format!("{text}, such as {}", servers.join(" or ")),
    };
    ApiError::new(Code::UnknownRoute, text)
}

/// Passes a request on.
pub(super) async fn pass_on(
    shard: &Shard,
    remote: &Remote,
    head: &Parts,
    body: &Bytes,
    mut tracked: Tracked,
    request_id: &HeaderValue,
    deadline: Instant,
) -> Result<Response<FrontBody>, Failed> {
    let options = &shard.front.config.proxy;
    let target = head.uri.path_and_query().map_or(tracked.route().path(), PathAndQuery::as_str);
    let headers =
        HeadersToWorker { client: &head.headers, request_id, rules: &RULES, ours: tracked.span_headers() };
    let outgoing = Outgoing::new(&head.method, target, headers, body.clone());
    let until = deadline.min(Instant::now() + options.first_byte_timeout);
    tracked.sent_upstream();
    let mut failures = Vec::new();
    let mut reached = 0;
    for member in in_order(remote) {
        let sent = timeout_at(until, send(shard, remote, &member, &outgoing)).await;
        match sent {
            Ok(Ok(response)) => {
                let (parts, upstream) = response.into_parts();
                tracked.set_status(parts.status);
                let limits = RelayLimits {
                    idle: options.idle_timeout,
                    deadline,
                    ending: None,
                    growth: None,
                    sequel: None,
                };
                let relay = Relay::new(upstream, None, tracked, limits);
                let mut response = Response::new(FrontBody::relay(relay));
                *response.status_mut() = parts.status;
                *response.headers_mut() = parts.headers;
                return Ok(response);
            }
            Ok(Err(Unsent::Nobody(why))) => failures.push(format!("{}: {why}", member.peer.name)),
            Ok(Err(Unsent::Lost(why))) => {
                failures.push(format!("{}: {why}", member.peer.name));
                reached += 1;
            }
            Err(_) => {
                let text =
                    format!("replica {} did not begin to answer within the time allowed", member.peer.name);
                return Err(Failed { error: ApiError::new(Code::UpstreamTimeout, text), tracked });
            }
        }
        if reached >= options.max_workers_reached {
            break;
        }
    }
    let code = if reached > 0 { Code::UpstreamFailed } else { Code::UpstreamConnectFailed };
    let text = match failures.is_empty() {
        true => "this edge knows no replica yet; try again".to_owned(),
        false => format!("every replica tried has failed ({})", failures.join("; ")),
    };
    Err(Failed { error: ApiError::new(code, text).retry_after(1), tracked })
}

/// The replicas in the order to be asked: at random, those last that the cluster misses.
fn in_order(remote: &Remote) -> Vec<Member> {
    let mut members = remote.replicas();
    members.shuffle(&mut rand::rng());
    members.sort_by_key(|member| !member.peer.alive);
    members
}

/// Why there is no answer.
enum Unsent {
    /// Nothing was sent.
    Nobody(String),
    /// It may have been seen.
    Lost(String),
}

async fn send(
    shard: &Shard,
    remote: &Remote,
    member: &Member,
    outgoing: &Outgoing<'_>,
) -> Result<Response<UpstreamBody>, Unsent> {
    let slot = shard.pool.slot_of_replica(&member.peer.name, &member.http);
    let slot = slot.map_err(|why| Unsent::Nobody(why.to_string()))?;
    let sending = async {
        match shard.pool.send(&slot, outgoing, false).await {
            // It closed an idle connection just then.
            Err(SendError::Stale) => shard.pool.send(&slot, outgoing, true).await,
            sent => sent,
        }
    };
    let missed = async {
        let mut missed = 0;
        while missed < MISSED {
            sleep(LOOK).await;
            // One that is frozen keeps its connections open.
            missed = if remote.misses(member.peer.id) { missed + 1 } else { 0 };
        }
    };
    tokio::select! {
        sent = sending => sent.map_err(|why| match why {
            SendError::Connect(_) | SendError::Forbidden(_) | SendError::Full => Unsent::Nobody(why.to_string()),
            SendError::Stale | SendError::Closed | SendError::Garbage(_) => Unsent::Lost(why.to_string()),
        }),
        () = missed => Err(Unsent::Lost("the cluster misses it".to_owned())),
    }
}
