//! Registering a worker, for the node and the admin plane alike: check the address, ask the
//! engine about itself, propose.

use std::sync::Arc;

use bytes::Bytes;
use http::Uri;
use serde::de::DeserializeOwned;

use super::body::{BodyLimits, collect};
use super::errors::{ApiError, Code};
use super::fetch;
use super::front::Shard;
use super::types::RegisterRequest;
use super::upstream::port_of;
use crate::engines::probe::{EngineFacts, parse_metrics, parse_models};
use crate::ids::{Group, WorkerId};
use crate::routing::view::WorkerView;
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::worker::{WorkerSource, WorkerSpec};

/// Largest body of the node plane.
pub(super) const MAX_NODE_BODY: usize = 64 * 1024;

/// Reads a JSON body whose unknown and repeated members are errors.
pub(super) async fn read_json<T: DeserializeOwned>(
    body: axum::body::Body,
    max_bytes: usize,
) -> Result<T, ApiError> {
    let bytes: Bytes = collect(body, &BodyLimits::of(max_bytes)).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        use serde_json::error::Category;
        let (code, what) = match error.classify() {
            Category::Data => (Code::InvalidValue, "the body does not fit this route"),
            _ => (Code::InvalidJson, "the body is not valid JSON"),
        };
        ApiError::new(code, format!("{what}: {error}"))
    })
}

/// Registers a worker and answers with its id, whether it replaced a record, and its generation.
pub(super) async fn register(
    shard: &Shard,
    request: RegisterRequest,
    source: WorkerSource,
) -> Result<(WorkerId, bool, u64), ApiError> {
    let heartbeats = request.heartbeat.unwrap_or(source == WorkerSource::Node);
    let probe = request.probe;
    let (mut spec, engine_given) = spec_of(request, source)?;
    if source == WorkerSource::Node {
        // Another replica may have registered the id a moment ago.
        shard.front.control.read_barrier(Group::Control).await?;
        refuse_takeover(shard.front.control.registry().worker(&spec.id), &spec)?;
    }
    check_address(shard, &spec.url).await?;
    if probe {
        let facts = ask(shard, &spec).await?;
        fill_in(&mut spec, facts, engine_given);
        // What the engine says is checked like what the caller says.
        spec.validate().map_err(|why| ApiError::new(Code::ProbeFailed, why))?;
    }
    if spec.models.is_empty() {
        let text = "no models: give `models`, or leave `probe` on and have the worker list some";
        return Err(ApiError::new(Code::InvalidValue, text).param("models"));
    }
    let id = spec.id.clone();
    match shard.front.control.propose(ControlCommand::RegisterWorker { spec, heartbeats }).await? {
        ControlOutcome::Registered { replaced, generation } => Ok((id, replaced, generation)),
        ControlOutcome::Refused(why) => Err(ApiError::new(Code::Refused, why)),
        // Applied, but from a snapshot: the record is there, the details are not.
        _ => {
            let view = shard.front.control.registry();
            Ok((id.clone(), false, view.worker(&id).map_or(0, |worker| worker.record.generation)))
        }
    }
}

fn spec_of(request: RegisterRequest, source: WorkerSource) -> Result<(WorkerSpec, bool), ApiError> {
    let invalid = |why: String| ApiError::new(Code::InvalidValue, why);
    let url = request.url.strip_suffix('/').unwrap_or(&request.url).to_owned();
    let authority = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
    let id = match request.id {
        Some(id) => WorkerId::parse(&id).map_err(|why| invalid(why).param("id"))?,
        None => {
            // IPv6 brackets are not in the alphabet of ids.
            let text = authority.replace(['[', ']'], "");
            WorkerId::parse(&text).map_err(|why| {
                invalid(format!("no id can be made of the url ({why}); give `id`")).param("id")
            })?
        }
    };
    let spec = WorkerSpec {
        id,
        url,
        engine: request.engine.unwrap_or_default(),
        models: request.models,
        role: request.role,
        dp_ranks: request.dp_ranks,
        block_size: request.block_size,
        capacity_blocks: request.capacity_blocks,
        labels: request.labels,
        weight: request.weight,
        source,
    };
    spec.validate().map_err(invalid)?;
    Ok((spec, request.engine.is_some()))
}

/// A live worker's identity stays where it is; an operator may move it.
fn refuse_takeover(standing: Option<&Arc<WorkerView>>, spec: &WorkerSpec) -> Result<(), ApiError> {
    let Some(standing) = standing else { return Ok(()) };
    if !standing.record.online || standing.record.spec.url == spec.url {
        return Ok(());
    }
    let text = format!(
        "worker {} is online at another address; register under another id, wait until it is offline, \
         or have an operator remove it",
        spec.id
    );
    Err(ApiError::new(Code::WorkerExists, text).param("id"))
}

async fn check_address(shard: &Shard, url: &str) -> Result<(), ApiError> {
    let invalid = |why: String| ApiError::new(Code::InvalidValue, why).param("url");
    let uri: Uri = url.parse().map_err(|_| invalid("`url` must be http://host:port".to_owned()))?;
    if uri.scheme_str() != Some("http") {
        return Err(invalid("`url` must start with http://; TLS to workers is not supported".to_owned()));
    }
    let host = uri.host().filter(|host| !host.is_empty());
    let host = host.ok_or_else(|| invalid("`url` must be http://host:port".to_owned()))?;
    let port = port_of(&uri).ok_or_else(|| invalid("`url` has an invalid port".to_owned()))?;
    let limit = shard.front.config.nodes.probe_timeout;
    let resolved = tokio::time::timeout(limit, shard.front.config.allow.resolve(host, port)).await;
    match resolved {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(ApiError::new(Code::AddressForbidden, error.to_string()).param("url"))
        }
        Ok(Err(error)) => Err(invalid(format!("the host of `url` cannot be resolved: {error}"))),
        Err(_) => Err(invalid("the host of `url` was not resolved in time".to_owned())),
    }
}

/// Asks the worker: health must answer; models must be listed unless they were given; metrics
/// are taken where there are any.
async fn ask(shard: &Shard, spec: &WorkerSpec) -> Result<EngineFacts, ApiError> {
    let limit = shard.front.config.nodes.probe_timeout;
    let get = |path: &'static str| fetch::get(&shard.pool, &spec.url, path, limit);
    let failed = |path: &str, why: String| {
        let text = format!(
            "the worker was asked GET {}{path}: {why}; start it first, or register with \"probe\": false",
            spec.url
        );
        ApiError::new(Code::ProbeFailed, text).param("url")
    };
    let (health, models, metrics) = tokio::join!(get("/health"), get("/v1/models"), get("/metrics"));
    health.map_err(|error| failed("/health", error.to_string()))?;
    let mut facts = match metrics {
        Ok(text) => parse_metrics(&String::from_utf8_lossy(&text)),
        Err(_) => EngineFacts::default(),
    };
    if spec.models.is_empty() {
        let body = models.map_err(|error| failed("/v1/models", error.to_string()))?;
        facts.models = parse_models(&body).map_err(|why| failed("/v1/models", why))?;
    }
    Ok(facts)
}

fn fill_in(spec: &mut WorkerSpec, facts: EngineFacts, engine_given: bool) {
    if spec.models.is_empty() {
        spec.models = facts.models;
    }
    spec.block_size = spec.block_size.or(facts.block_size);
    spec.capacity_blocks = spec.capacity_blocks.or(facts.capacity_blocks);
    if let (Some(engine), false) = (facts.engine, engine_given) {
        spec.engine = engine;
    }
}
