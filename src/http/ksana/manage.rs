//! `/RegisterNode`, `/Heartbeat` and `/RegisterCommId`.
//!
//! Every call of an engine is a connection of its own and may come to another replica than the last one,
//! milliseconds later. So a heartbeat is answered from what was committed before it came, as long as
//! there is a leader to ask; without one, from what is known here, and what may only not be known here
//! is left out. A registration is sent once and never again: it is held through an election, and where
//! even that does not do, it is answered with the id that describes the node, which its first heartbeat
//! registers.

use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{HeaderMap, Request, Response, StatusCode};
use hyper::body::Incoming;
use tokio::time::timeout;

use super::{Ksana, error, failure, json, of_error};
use crate::cluster::api::{Answer as Decided, ClusterError};
use crate::http::body::{BodyLimits, FrontBody, collect};
use crate::http::errors::ApiError;
use crate::http::front::{Front, Shard};
use crate::http::headers::new_request_id;
use crate::ids::Group;
use crate::ksana::fields::{Fields, Wrong, body};
use crate::ksana::register::{Refused, registration};
use crate::ksana::reply::{self, Broken};
use crate::state::command::{CacheCommand, ControlCommand, ControlOutcome};
use crate::state::ksana::{
    Answer, KsanaCommand, KsanaOutcome, KsanaState, NodeRecord, NodeSpec, Rules, describe,
};

/// Largest body of these routes.
const MAX_BODY: usize = 256 * 1024;
/// How long a registration is held in fixed mode before it is answered without an agreement: some
/// engines wait a second.
const HOLD: Duration = Duration::from_millis(600);
/// How long a heartbeat waits to be sure that it knows all that was committed.
const SETTLE: Duration = Duration::from_millis(250);
/// ... and in all, where what is known here may be little: a replica that has just started.
const CATCH_UP: Duration = Duration::from_millis(650);
/// How long a heartbeat that changes something is held besides: some engines wait a second in all.
const BEAT: Duration = Duration::from_millis(300);

struct Asked {
    content_type: Option<String>,
    bytes: bytes::Bytes,
}

async fn read(request: Request<Incoming>) -> Result<Asked, ApiError> {
    let (head, body) = request.into_parts();
    let bytes = collect(body, &BodyLimits::of(MAX_BODY)).await?;
    Ok(Asked { content_type: content_type(&head.headers), bytes })
}

fn content_type(headers: &HeaderMap) -> Option<String> {
    headers.get(CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

fn invalid(wrong: &Wrong) -> Response<FrontBody> {
    json(StatusCode::UNPROCESSABLE_ENTITY, wrong.body())
}

fn utc(format: &str) -> String {
    jiff::Timestamp::now().strftime(format).to_string()
}

fn local() -> String {
    jiff::Zoned::now().strftime("%Y-%m-%dT%H:%M:%S.%6f").to_string()
}

/// Shows the tables as they are here.
fn look<R>(front: &Front, mut look: impl FnMut(&KsanaState, u64) -> R) -> Option<R> {
    let mut seen = None;
    front.control.ksana(&mut |state, now_ms| seen = Some(look(state, now_ms)));
    seen
}

/// What became of a command; `None` if that is not known in time.
async fn decided(
    answer: Decided<ControlOutcome>,
    hold: Option<Duration>,
) -> Result<Option<KsanaOutcome>, ClusterError> {
    let outcome = match hold {
        Some(hold) => match timeout(hold, answer).await {
            Ok(outcome) => outcome,
            Err(_) => return Ok(None),
        },
        // It has a deadline of its own.
        None => answer.await,
    };
    match outcome {
        Ok(ControlOutcome::Ksana(outcome)) => Ok(Some(outcome)),
        // Applied, but this replica learned it from a snapshot.
        Ok(_) => Ok(None),
        Err(ClusterError::Refused(why)) => Err(ClusterError::Refused(why)),
        Err(_) if hold.is_some() => Ok(None),
        Err(why) => Err(why),
    }
}

/// Registers a node.
pub(super) async fn register(
    shard: &Shard,
    ksana: &Ksana,
    request: Request<Incoming>,
) -> Response<FrontBody> {
    let front = &shard.front;
    let asked = match read(request).await {
        Ok(asked) => asked,
        Err(error) => return of_error(&error),
    };
    let registered = registration(asked.content_type.as_deref(), &asked.bytes, &ksana.options.cluster);
    let registration = match registered {
        Ok(registration) => registration,
        Err(Refused::Form(wrong)) => return invalid(&wrong),
        Err(Refused::Content(why)) => return error(StatusCode::BAD_REQUEST, &why),
    };
    let (spec, wanted) = (registration.spec, registration.node_id);
    warn_of_address(front, &spec.inference_addr);
    let spare = new_request_id().to_str().unwrap_or_default().to_owned();
    let rules = ksana.rules();
    let command =
        KsanaCommand::Register { spec: spec.clone(), wanted: wanted.clone(), spare: spare.clone(), rules };
    // What the node will be called in all likelihood; a name of its own choice describes nothing.
    let expected = look(front, |state, _| state.expected_id(&spec));
    let expected = expected.flatten().filter(|_| wanted.is_none() && !rules.strict);
    let hold = expected.is_some().then_some(HOLD);
    let proposed = front.control.propose(ControlCommand::Ksana(command));
    let outcome = decided(proposed, hold).await;
    let answered = |node_id: &str| {
        let now = utc("%Y-%m-%dT%H:%M:%S.%6fZ");
        json(StatusCode::CREATED, reply::registered(node_id, &now))
    };
    match outcome {
        Ok(Some(KsanaOutcome::Registered { node_id })) => {
            begins_anew(front, &spec);
            answered(&node_id)
        }
        Ok(Some(KsanaOutcome::PlaceTaken)) => refuse_by_sql(Broken::Place, wanted.unwrap_or(spare), &spec),
        Ok(Some(KsanaOutcome::IdTaken)) if rules.strict => {
            refuse_by_sql(Broken::Id, wanted.unwrap_or(spare), &spec)
        }
        Ok(Some(KsanaOutcome::IdTaken)) => {
            let id = wanted.unwrap_or_default();
            error(StatusCode::CONFLICT, &format!("node_id '{id}' is another node's"))
        }
        Ok(Some(KsanaOutcome::Refused(why))) => error(StatusCode::BAD_REQUEST, &why),
        Ok(Some(_)) => failure(),
        Ok(None) => match expected.or_else(|| look(front, |state, _| state.registered_id(&spec)).flatten()) {
            Some(node_id) => answered(&node_id),
            None => unavailable(),
        },
        Err(why) => of_error(&why.into()),
    }
}

/// A node that registers has just started: whatever its group is taken to have cached is gone.
fn begins_anew(front: &Front, spec: &NodeSpec) {
    if let Some(group) = front.control.ksana_groups().get(&spec.group()) {
        front.control.tell_cache(CacheCommand::Life { worker: group.record.ix, life: None });
    }
}

/// Says in the log what no engine would hear: nothing is sent to an address that workers may not have.
fn warn_of_address(front: &Front, addr: &str) {
    let ip = addr.rsplit_once(':').and_then(|(host, _)| host.parse::<std::net::IpAddr>().ok());
    if let Some(Err(why)) = ip.map(|ip| front.config.allow.check(ip)) {
        tracing::warn!(inference_addr = addr, %why, "a KsanaLLM node registered that no request can be sent to");
    }
}

fn refuse_by_sql(broken: Broken, id: String, spec: &NodeSpec) -> Response<FrontBody> {
    let now = utc("%Y-%m-%d %H:%M:%S.%6f");
    json(StatusCode::INTERNAL_SERVER_ERROR, reply::sql_error(broken, &id, spec, &now))
}

fn unavailable() -> Response<FrontBody> {
    error(StatusCode::SERVICE_UNAVAILABLE, "no quorum of replicas answered in time; try again")
}

fn unknown_node(ksana: &Ksana, id: &str) -> Response<FrontBody> {
    match ksana.options.strict {
        true => failure(),
        false => error(StatusCode::NOT_FOUND, &format!("Node '{id}' not found")),
    }
}

/// Answers a heartbeat.
pub(super) async fn heartbeat(
    shard: &Shard,
    ksana: &Ksana,
    request: Request<Incoming>,
) -> Response<FrontBody> {
    let front = &shard.front;
    let asked = match read(request).await {
        Ok(asked) => asked,
        Err(error) => return of_error(&error),
    };
    let node_id = match heartbeat_of(&asked) {
        Ok(node_id) => node_id,
        Err(wrong) => return invalid(&wrong),
    };
    let rules = ksana.rules();
    let mut certain = caught_up(front, &node_id, rules).await;
    let seen = look(front, |state, now_ms| {
        (state.node(&node_id).is_some(), state.is_plain_beat(now_ms, &node_id, rules))
    });
    let described = describe(&node_id, &ksana.options.cluster);
    match seen {
        Some((true, true)) => front.control.ksana_heard(&node_id, rules),
        Some((false, _)) if described.is_none() && certain => return unknown_node(ksana, &node_id),
        Some((false, _)) if described.is_none() => return unavailable(),
        Some(_) => {
            let cluster = ksana.options.cluster.clone();
            let command = KsanaCommand::Beat { node_id: node_id.clone(), cluster, rules };
            let proposed = front.control.propose(ControlCommand::Ksana(command));
            // Without a leader nothing is decided; it is not waited for twice.
            match decided(proposed, Some(if certain { BEAT } else { Duration::from_millis(50) })).await {
                Ok(Some(KsanaOutcome::UnknownNode)) => return unknown_node(ksana, &node_id),
                Ok(Some(_)) => certain = true,
                Ok(None) => {
                    certain = false;
                    front.control.ksana_heard(&node_id, rules);
                }
                Err(why) => return of_error(&why.into()),
            }
        }
        None => certain = false,
    }
    let answer = look(front, |state, _| state.answer(&node_id, rules.strict)).flatten().or_else(|| {
        // Nobody knows it yet, but it says what it is; of its pairs nothing can be said.
        let spec = described?;
        let node = NodeRecord { node_id: node_id.clone(), spec, last_heard_ms: 0, online: true, order: 0 };
        Some(Answer { node, group_ready: false, keys: Vec::new() })
    });
    match answer {
        Some(answer) => json(StatusCode::OK, reply::heartbeat(&answer, &local(), certain)),
        None => unavailable(),
    }
}

/// Waits until all is known here that was committed before; whether that came to be. No longer than a
/// while where what is known anyhow is a whole answer.
async fn caught_up(front: &Front, node_id: &str, rules: Rules) -> bool {
    let mut barrier = front.control.read_barrier(Group::Control);
    if let Ok(settled) = timeout(SETTLE, &mut barrier).await {
        return settled.is_ok();
    }
    let known = look(front, |state, _| state.answer(node_id, rules.strict)).flatten();
    let is_whole =
        |answer: &Answer| answer.group_ready && answer.keys.iter().all(|key| !key.comm_id.is_empty());
    if known.as_ref().is_some_and(is_whole) {
        return false;
    }
    matches!(timeout(CATCH_UP - SETTLE, barrier).await, Ok(Ok(())))
}

fn heartbeat_of(asked: &Asked) -> Result<String, Wrong> {
    let json = body(asked.content_type.as_deref(), &asked.bytes)?;
    let mut fields = Fields::of(&json)?;
    let node_id = fields.text("node_id");
    if fields.wrong.is_nothing() { Ok(node_id) } else { Err(fields.wrong) }
}

/// Registers a comm id.
pub(super) async fn comm_id(shard: &Shard, ksana: &Ksana, request: Request<Incoming>) -> Response<FrontBody> {
    let front = &shard.front;
    let asked = match read(request).await {
        Ok(asked) => asked,
        Err(error) => return of_error(&error),
    };
    let (node_id, comm_key, comm_id) = match comm_id_of(&asked) {
        Ok(named) => named,
        Err(wrong) => return invalid(&wrong),
    };
    let (rules, cluster) = (ksana.rules(), ksana.options.cluster.clone());
    let command = KsanaCommand::CommId { node_id: node_id.clone(), cluster, comm_key, comm_id, rules };
    let proposed = front.control.propose(ControlCommand::Ksana(command));
    // The engine tries again at its next heartbeat.
    match decided(proposed, (!rules.strict).then_some(HOLD)).await {
        Ok(Some(KsanaOutcome::CommId(stored))) => json(StatusCode::OK, reply::comm_id(&stored)),
        Ok(Some(KsanaOutcome::UnknownNode)) => unknown_node(ksana, &node_id),
        Ok(Some(KsanaOutcome::NotPrefillHead)) => {
            error(StatusCode::FORBIDDEN, "Only prefill rank-0 nodes may register comm ids")
        }
        Ok(Some(KsanaOutcome::BadKey)) => {
            error(StatusCode::BAD_REQUEST, "comm_key must follow 'prefill__decode' format")
        }
        Ok(Some(KsanaOutcome::ForeignKey)) => error(
            StatusCode::FORBIDDEN,
            "comm_key is not of this node's group and a decode group of its cluster",
        ),
        Ok(Some(KsanaOutcome::Refused(why))) => error(StatusCode::BAD_REQUEST, &why),
        Ok(Some(_)) => failure(),
        Ok(None) => unavailable(),
        Err(why) => of_error(&why.into()),
    }
}

fn comm_id_of(asked: &Asked) -> Result<(String, String, String), Wrong> {
    let json = body(asked.content_type.as_deref(), &asked.bytes)?;
    let mut fields = Fields::of(&json)?;
    let named = (fields.text("node_id"), fields.text("comm_key"), fields.text("comm_id"));
    if fields.wrong.is_nothing() { Ok(named) } else { Err(fields.wrong) }
}
