//! Registering a worker, for the node and the admin plane alike: check the address, ask the
//! engine about itself, propose.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use super::body::{BodyLimits, collect};
use super::errors::{ApiError, Code};
use super::fetch;
use super::front::{Front, Shard};
use super::upstream::Endpoint;
use crate::admin_types::{RegisterRequest, RegisteredReply};
use crate::engines::probe::{EngineFacts, FACTS, parse_models};
use crate::ids::Group;
use crate::routing::view::WorkerView;
use crate::state::command::{ControlCommand, ControlOutcome};
use crate::state::worker::{WorkerSource, WorkerSpec};

/// Reads a JSON body whose unknown and repeated members are errors.
pub(super) async fn read_json<B, T>(body: B, max_bytes: usize) -> Result<T, ApiError>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    T: DeserializeOwned,
{
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

/// Registers a worker.
pub(super) async fn register(
    shard: &Shard,
    request: RegisterRequest,
    source: WorkerSource,
    owner: Option<String>,
) -> Result<RegisteredReply, ApiError> {
    let heartbeats = request.wants_heartbeats(source);
    let probe = request.wants_probe();
    let given = Given { engine: request.engine.is_some(), ranks: request.dp_ranks.is_some() };
    let mut spec = request.to_spec(source).map_err(|why| ApiError::new(Code::InvalidValue, why))?;
    spec.owner = owner;
    if source == WorkerSource::Node {
        // Another replica may have registered the id a moment ago.
        shard.front.control.read_barrier(Group::Control).await?;
        refuse_takeover(shard.front.control.registry().worker(&spec.id), &spec)?;
    }
    let endpoint = check_address(shard, &spec.url, spec.http2).await?;
    if probe {
        let facts = ask(shard, &spec, &endpoint).await?;
        fill_in(&mut spec, facts, given);
        // What the engine says is checked like what the caller says.
        spec.validate().map_err(|why| ApiError::new(Code::ProbeFailed, why))?;
    }
    if spec.models.is_empty() {
        let text = "no models: give `models`, or leave `probe` on and have the worker list some";
        return Err(ApiError::new(Code::InvalidValue, text).param("models"));
    }
    let id = spec.id.clone();
    let (replaced, generation) =
        match shard.front.control.propose(ControlCommand::RegisterWorker { spec, heartbeats }).await? {
            ControlOutcome::Registered { replaced, generation } => (replaced, generation),
            ControlOutcome::Refused(why) => return Err(ApiError::new(Code::Refused, why)),
            // Applied, but from a snapshot: the record is there, the details are not.
            _ => {
                let view = shard.front.control.registry();
                (false, view.worker(&id).map_or(0, |worker| worker.record.generation))
            }
        };
    let interval_ms = heartbeats.then(|| shard.front.config.nodes.heartbeat_interval.as_millis() as u64);
    let verb = if replaced { "registered again" } else { "registered" };
    let message = format!("worker {id} is {verb}");
    let cluster = (source == WorkerSource::Node).then(|| shard.front.control.status().cluster_id);
    Ok(RegisteredReply { id, replaced, generation, message, interval_ms, cluster })
}

/// A live worker's identity stays where it is; an operator may move it.
fn refuse_takeover(standing: Option<&Arc<WorkerView>>, spec: &WorkerSpec) -> Result<(), ApiError> {
    let Some(standing) = standing else { return Ok(()) };
    let owned = standing.record.spec.is_owned_by(spec.owner.as_deref());
    if !standing.record.online || (owned && standing.record.spec.url == spec.url) {
        return Ok(());
    }
    let how = if owned { "at another address" } else { "and was registered with another node token" };
    let text = format!(
        "worker {} is online {how}; register under another id, wait until it is offline, or have an \
         operator remove it",
        spec.id
    );
    Err(ApiError::new(Code::WorkerExists, text).param("id"))
}

async fn check_address(shard: &Shard, url: &str, http2: bool) -> Result<Endpoint, ApiError> {
    let invalid = |why: String| ApiError::new(Code::InvalidValue, why).param("url");
    let endpoint = Endpoint::parse(url, http2).map_err(|why| invalid(why.to_string()))?;
    let (host, port) = (endpoint.host(), endpoint.port());
    let limit = shard.front.config.nodes.probe_timeout;
    let resolved = tokio::time::timeout(limit, shard.front.config.allow.resolve(host, port)).await;
    match resolved {
        Ok(Ok(_)) => Ok(endpoint),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(ApiError::new(Code::AddressForbidden, error.to_string()).param("url"))
        }
        Ok(Err(error)) => Err(invalid(format!("the host of `url` cannot be resolved: {error}"))),
        Err(_) => Err(invalid("the host of `url` was not resolved in time".to_owned())),
    }
}

/// Asks the worker: health must answer; models must be listed unless they were given; what else it
/// says of itself is taken where it says anything.
async fn ask(shard: &Shard, spec: &WorkerSpec, endpoint: &Endpoint) -> Result<EngineFacts, ApiError> {
    let limit = shard.front.config.nodes.probe_timeout;
    let get = |path: &'static str| fetch::get(&shard.pool, endpoint, path, limit);
    let failed = |path: &str, why: String| {
        let text = format!(
            "the worker was asked GET {}{path}: {why}; start it first, or register with \"probe\": false (--no-probe)",
            spec.url
        );
        ApiError::new(Code::ProbeFailed, text).param("url")
    };
    let facts = futures_util::future::join_all(FACTS.map(&get));
    let (health, models, facts) = tokio::join!(get("/health"), get("/v1/models"), facts);
    health.map_err(|error| failed("/health", error.to_string()))?;
    let mut facts = facts.into_iter().map(Result::ok);
    let mut facts = EngineFacts::read(&FACTS.map(|_| facts.next().flatten()));
    if spec.models.is_empty() {
        let body = models.map_err(|error| failed("/v1/models", error.to_string()))?;
        facts.models = parse_models(&body).map_err(|why| failed("/v1/models", why))?;
    }
    Ok(facts)
}

/// What whoever registers a worker said, where the record has a default for it.
#[derive(Clone, Copy)]
struct Given {
    engine: bool,
    ranks: bool,
}

/// What was said counts; where the engine says otherwise, that is worth a word: its events are of no
/// use then, or of a part of it.
fn fill_in(spec: &mut WorkerSpec, facts: EngineFacts, given: Given) {
    if let (Some(given), Some(told)) = (spec.block_size, facts.block_size)
        && given != told
    {
        tracing::warn!(worker = %spec.id, given, told, "registered with another block_size than the engine says");
    }
    match facts.dp_ranks {
        Some(told) if !given.ranks => spec.dp_ranks = told,
        Some(told) if spec.dp_ranks != told => {
            let given = spec.dp_ranks;
            tracing::warn!(worker = %spec.id, given, told, "registered with another number of dp_ranks than the engine says");
        }
        _ => {}
    }
    if spec.models.is_empty() {
        spec.models = facts.models;
    }
    spec.block_size = spec.block_size.or(facts.block_size);
    spec.capacity_blocks = spec.capacity_blocks.or(facts.capacity_blocks);
    if let (Some(engine), false) = (facts.engine, given.engine) {
        spec.engine = engine;
    }
}

/// Pause between attempts to register a configured worker.
const CONFIGURED_PAUSE: Duration = Duration::from_secs(1);

/// Registers the workers of the configuration file, however long that takes: until there is a
/// quorum, and, for those whose models are not given, until they answer.
pub async fn keep_configured_workers(
    front: Arc<Front>,
    workers: Vec<RegisterRequest>,
    shutdown: CancellationToken,
) {
    let shard = Shard::new(front);
    let all = stream::iter(workers).for_each_concurrent(CONFIGURED_AT_ONCE, |request| {
        let shard = &shard;
        async move { register_configured(shard, request).await }
    });
    tokio::select! {
        () = all => {}
        () = shutdown.cancelled() => {}
    }
}

/// Registers an engine that says of itself that it is there, unless it is known as it says. It is asked
/// for its health like one that was added by hand: its pings come too seldom to be held to them.
pub async fn register_found(shard: &Shard, request: RegisterRequest) -> Result<bool, ApiError> {
    let spec = request.to_spec(WorkerSource::Node).map_err(|why| ApiError::new(Code::InvalidValue, why))?;
    let view = shard.front.control.registry();
    let is_known = view.worker(&spec.id).is_some_and(|known| {
        let known = &known.record.spec;
        (&known.url, known.role, &known.transfer) == (&spec.url, spec.role, &spec.transfer)
    });
    if !is_known {
        register(shard, request, WorkerSource::Node, None).await?;
    }
    Ok(!is_known)
}

/// Configured workers registered at once.
const CONFIGURED_AT_ONCE: usize = 16;

async fn register_configured(shard: &Shard, request: RegisterRequest) {
    let mut said = String::new();
    loop {
        let mut result = register(shard, request.clone(), WorkerSource::Config, None).await;
        let is_away = matches!(&result, Err(error) if error.code == Code::ProbeFailed);
        if is_away && !request.models.is_empty() {
            // What it serves is known; that it is away shows in its health.
            let unasked = RegisterRequest { probe: Some(false), ..request.clone() };
            result = register(shard, unasked, WorkerSource::Config, None).await;
        }
        match result {
            Ok(_) => return,
            Err(error) => {
                if said != error.message {
                    tracing::warn!(
                        url = request.url,
                        why = %error.message,
                        "configured worker is not registered yet"
                    );
                    said = error.message.into_owned();
                }
            }
        }
        tokio::time::sleep(CONFIGURED_PAUSE).await;
    }
}
